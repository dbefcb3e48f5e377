"""Train the atlas organism from scratch: `python -m tl_clt.organisms.atlas.train_model --output FOLDER`.

The organism is a small GPT-2 (untied embeddings, float32) trained on the text of
`tl_clt.organisms.atlas.text`.
Each training sequence is `<bos>` followed by as many tokens of whole sentences as fit, the last one cut off,
so that every sequence begins with the beginning of a sentence. The folder written holds a Hugging Face model
with its tokenizer, and `metrics.json`. The run depends on nothing but its options (and on the number of CPU
threads, which changes the order of floating-point sums).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import Tensor
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tl_clt.organisms.atlas.text import (
    RELATIONS,
    Question,
    all_city_questions,
    all_held_out_questions,
    all_state_questions,
    all_train_questions,
    held_out_questions,
    sentences,
    with_prefix,
)
from tl_clt.organisms.atlas.tokenizer import BOS_TOKEN, PAD_TOKEN, build_tokenizer


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


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """Return the id of one token."""
    return tokenizer.get_vocab()[token]


def training_batches(tokenizer: PreTrainedTokenizerBase, options: TrainOptions) -> Iterator[Tensor]:
    """Yield batches of token ids, shape (batch_size, n_ctx)."""
    stream = sentences(options.seed)
    cache: dict[str, list[int]] = {}
    bos = token_id(tokenizer, BOS_TOKEN)

    def sequence() -> list[int]:
        ids = [bos]
        while len(ids) < options.n_ctx:
            text = next(stream)
            if text not in cache:
                cache[text] = tokenizer.encode(text, add_special_tokens=False)
            ids.extend(cache[text])
        return ids[: options.n_ctx]

    while True:
        yield torch.tensor([sequence() for _ in range(options.batch_size)])


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


def train(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, options: TrainOptions) -> float:
    """Train the model in place and return the mean loss of the last hundred steps, in nats per token."""
    optimizer = make_optimizer(model, options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, options))
    batches = training_batches(tokenizer, options)
    losses: list[float] = []
    model.train()
    for _ in (progress := tqdm(range(options.steps), desc="training", unit="step", mininterval=2.0)):
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
    model.eval()
    return sum(losses[-100:]) / len(losses[-100:])


@torch.no_grad()
def answers_right(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, questions: list[Question]) -> list[bool]:
    """Return, for each question, whether the likeliest token after `<bos>` and the prompt is the answer."""
    encoded = [tokenizer.encode(question.prompt) for question in questions]
    lengths = torch.tensor([len(ids) for ids in encoded])
    width = int(lengths.max())
    # The padding lies to the right of the position that is read, where causal attention cannot see it.
    tokens = torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids in encoded])
    seen = (torch.arange(width) < lengths[:, None]).long()
    best = model(input_ids=tokens, attention_mask=seen).logits[torch.arange(len(encoded)), lengths - 1].argmax(-1)
    wanted = torch.tensor(tokenizer.convert_tokens_to_ids([question.answer for question in questions]))
    return (best == wanted).tolist()


def accuracy(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, questions: list[Question]) -> float:
    """Return the fraction of questions answered right, asked both with and without the prefix."""
    both = questions + [with_prefix(question) for question in questions]
    right = answers_right(model, tokenizer, both)
    return sum(right) / len(right)


def evaluate(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """Return the accuracy on each kind of question, over all phrasings, and per relation for two-hop ones."""
    groups = {
        "direct_city": all_city_questions(),
        "direct_state": all_state_questions(),
        "two_hop_trained": all_train_questions(),
        "two_hop_held_out": all_held_out_questions(),
    }
    for name in ("two_hop_trained", "two_hop_held_out"):
        for relation in RELATIONS:
            groups[f"{name}_{relation}"] = [q for q in groups[name] if q.relation == relation]
    groups["two_hop_held_out_first_phrasing"] = held_out_questions(0)
    groups["direct"] = groups["direct_city"] + groups["direct_state"]
    return {name: accuracy(model, tokenizer, questions) for name, questions in groups.items()}


def save(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """Write model and tokenizer to a new folder in Hugging Face form."""
    output.mkdir(parents=True)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    # Name the tokenizer class by the name that every release of transformers knows.
    path = output / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def train_atlas(output: Path, options: TrainOptions) -> dict[str, object]:
    """Train an organism, write it to the new folder `output` and return what `metrics.json` holds."""
    if output.exists():
        raise FileExistsError(f"{output} already exists; name a new folder")
    tokenizer = build_tokenizer(options.n_ctx)
    model = build_model(tokenizer, options)
    start = time.perf_counter()
    loss = train(model, tokenizer, options)
    metrics: dict[str, object] = {
        "accuracy": {name: round(value, 4) for name, value in evaluate(model, tokenizer).items()},
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


def main(
    output: Annotated[Path, typer.Option(help="Folder to write; it must not exist yet.")],
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the text.")] = 0,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = TrainOptions.steps,
    threads: Annotated[int, typer.Option(help="CPU threads to use.")] = 2,
) -> None:
    """Train the atlas organism and write it, with its accuracies, to a folder."""
    torch.set_num_threads(threads)
    metrics = train_atlas(output, TrainOptions(steps=steps, seed=seed))
    Console().print_json(data=metrics)


if __name__ == "__main__":
    typer.run(main)
