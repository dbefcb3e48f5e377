"""How an organism is made: a word-level tokenizer, a small GPT-2 with untied embeddings (float32), and its training.

Each training sequence is `<bos>` followed by as many tokens of whole sentences as fit, the last one cut off, so that
every sequence begins with the beginning of a sentence. A run depends on nothing but its options and the sentences (and
on the number of CPU threads, which changes the order of floating-point sums).
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from rich.console import Console
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import Tensor
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD_TOKEN = "<pad>"
BOS_TOKEN = "<bos>"
UNK_TOKEN = "<unk>"


@dataclass(frozen=True)
class TrainOptions:
    """Shape of the model and settings of its training."""

    n_layers: int = 4
    d_model: int = 96
    n_heads: int = 4
    n_ctx: int = 64
    """Longest context, and length of each training sequence, in tokens."""
    batch_size: int = 48
    """Sequences per step."""
    steps: int = 2400
    learning_rate: float = 3e-3
    """Highest learning rate, reached at the end of the warm-up."""
    warmup_steps: int = 150
    final_learning_rate_fraction: float = 0.02
    weight_decay: float = 0.1
    """Applies to weight matrices only, not to biases, layer norms and position embeddings."""
    gradient_clip: float = 1.0
    seed: int = 0


# -- the tokenizer


def word_pattern(words: Sequence[str]) -> str:
    """Return the regular expression of one token: a name of several words, else a word, else a mark.

    Longer names come first, so that "Salt Lake City" is never cut short, nor "Virginia Beach" to "Virginia".
    """
    names = sorted((word for word in words if " " in word), key=lambda name: (-len(name), name))
    longer = rf"\b(?:{'|'.join(re.escape(name) for name in names)})\b|" if names else ""
    return longer + r"\w+|[^\w\s]"


def build_tokenizer(words: Sequence[str], max_length: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words, with `<bos>` put before each text unless special tokens are switched off.

    Each word, punctuation mark and name is one token, names of several words included. Spaces are not tokens and belong
    to none: `" Austin"` and `"Austin"` both become the token `Austin`, and decoding puts the spaces back, so that a
    text reads naturally. Words outside the vocabulary become `<unk>`.

    Args:
        words: the vocabulary, beside the special tokens.
        max_length: longest text, in tokens, the model takes.
    """
    special = [PAD_TOKEN, BOS_TOKEN, UNK_TOKEN]
    ids = {token: index for index, token in enumerate([*special, *words])}
    core = Tokenizer(WordLevel(ids, unk_token=UNK_TOKEN))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(word_pattern(words)), behavior="removed", invert=True)
    # Joins tokens with spaces, except before a full stop or a colon. No token begins with "##".
    spacing = decoders.WordPiece(prefix="##", cleanup=True)
    core.decoder = decoders.Sequence([spacing, decoders.Replace(" :", ":")])
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS_TOKEN} $A",
        pair=f"{BOS_TOKEN} $A $B",
        special_tokens=[(BOS_TOKEN, ids[BOS_TOKEN])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS_TOKEN,
        unk_token=UNK_TOKEN,
        pad_token=PAD_TOKEN,
        model_max_length=max_length,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """Return the id of one token."""
    return tokenizer.get_vocab()[token]


# -- the model and its text


def build_model(tokenizer: PreTrainedTokenizerFast, options: TrainOptions) -> GPT2LMHeadModel:
    """Return an untrained model for the tokenizer's vocabulary."""
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=options.n_ctx,
        n_embd=options.d_model,
        n_layer=options.n_layers,
        n_head=options.n_heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=token_id(tokenizer, BOS_TOKEN),
        eos_token_id=None,
        pad_token_id=token_id(tokenizer, PAD_TOKEN),
        tie_word_embeddings=False,
        use_cache=False,
    )
    torch.manual_seed(options.seed)
    return GPT2LMHeadModel(config).float()


def training_batches(
    tokenizer: PreTrainedTokenizerBase, sentences: Iterator[str], options: TrainOptions
) -> Iterator[Int[Tensor, "batch_size n_ctx"]]:
    """Yield batches of token ids, each row `<bos>` and whole sentences as far as they fit."""
    cache: dict[str, list[int]] = {}
    bos = token_id(tokenizer, BOS_TOKEN)

    def sequence() -> list[int]:
        ids = [bos]
        while len(ids) < options.n_ctx:
            text = next(sentences)
            if text not in cache:
                cache[text] = tokenizer.encode(text, add_special_tokens=False)
            ids.extend(cache[text])
        return ids[: options.n_ctx]

    while True:
        yield torch.tensor([sequence() for _ in range(options.batch_size)])


# -- training


def make_optimizer(model: GPT2LMHeadModel, options: TrainOptions) -> torch.optim.AdamW:
    """Return AdamW with weight decay on the weight matrices only."""
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        (decayed if parameter.ndim >= 2 and "wpe" not in name else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.98))


def learning_rate_factor(step: int, options: TrainOptions) -> float:
    """Return the fraction of the highest learning rate at a step: linear warm-up, then half a cosine."""
    if step < options.warmup_steps:
        return (step + 1) / options.warmup_steps
    progress = (step - options.warmup_steps) / max(1, options.steps - options.warmup_steps)
    low = options.final_learning_rate_fraction
    return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))


def train(
    model: GPT2LMHeadModel,
    batches: Iterator[Int[Tensor, "batch_size n_ctx"]],
    options: TrainOptions,
    after_step: Callable[[int], None] = lambda step: None,
) -> float:
    """Train the model in place and return the mean loss of the last hundred steps, in nats per token.

    Args:
        after_step: called with the number of steps made, from 0 before the first.
    """
    optimizer = make_optimizer(model, options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, options))
    losses: list[float] = []
    model.train()
    after_step(0)
    for step in (progress := tqdm(range(options.steps), desc="training", unit="step", mininterval=2.0)):
        tokens = next(batches)
        logits = model(input_ids=tokens).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.gradient_clip)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if len(losses) % 50 == 0:
            progress.set_postfix(loss=f"{sum(losses[-50:]) / 50:.3f}")
        after_step(step + 1)
    model.eval()
    return sum(losses[-100:]) / len(losses[-100:])


@torch.no_grad()
def answers_right(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], answers: Sequence[str]
) -> list[bool]:
    """Return, for each prompt, whether the likeliest token after `<bos>` and the prompt is the answer."""
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    lengths = torch.tensor([len(ids) for ids in encoded])
    width = int(lengths.max())
    # The padding lies to the right of the position that is read, where causal attention cannot see it.
    tokens = torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids in encoded])
    seen = (torch.arange(width) < lengths[:, None]).long()
    best = model(input_ids=tokens, attention_mask=seen).logits[torch.arange(len(encoded)), lengths - 1].argmax(-1)
    wanted = torch.tensor(tokenizer.convert_tokens_to_ids(list(answers)))
    return (best == wanted).tolist()


def save(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write model and tokenizer to a new folder in Hugging Face form."""
    output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    # Name the tokenizer class by the name that every release of transformers knows.
    path = output / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def train_organism(
    output: Path,
    words: Sequence[str],
    sentences: Iterator[str],
    evaluate: Callable[[GPT2LMHeadModel, PreTrainedTokenizerFast], Mapping[str, object]],
    options: TrainOptions,
    say_every: int | None = None,
    keep_every: int | None = None,
) -> dict[str, object]:
    """Train an organism, write it to a new folder and return what `metrics.json` there holds.

    Args:
        output: the folder.
        words: the vocabulary.
        sentences: the text, without end.
        evaluate: what the model gets right.
        options: shape and settings.
        say_every: steps after which what it gets right is told on stderr; never if None.
        keep_every: steps after which the model is written to `checkpoints/STEP` of the folder, before the first step
            too; never if None.

    Raises:
        FileExistsError: the folder is there.
    """
    if output.exists():
        raise FileExistsError(f"{output} already exists; name a new folder")
    tokenizer = build_tokenizer(words, options.n_ctx)
    model = build_model(tokenizer, options)
    start = time.perf_counter()

    def after_step(step: int) -> None:
        if say_every and step and step % say_every == 0:
            model.eval()
            Console(stderr=True).print(f"step {step}:", dict(evaluate(model, tokenizer)))
            model.train()
        if keep_every and step % keep_every == 0:
            save(model, tokenizer, output / "checkpoints" / str(step))

    loss = train(model, training_batches(tokenizer, sentences, options), options, after_step)
    metrics: dict[str, object] = {
        "accuracy": dict(evaluate(model, tokenizer)),
        "final_loss_nats_per_token": round(loss, 4),
        "seconds": round(time.perf_counter() - start, 1),
        "tokens_seen": options.steps * options.batch_size * options.n_ctx,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "vocabulary": len(tokenizer),
        "threads": torch.get_num_threads(),
        "options": asdict(options),
    }
    save(model, tokenizer, output)
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    return metrics
