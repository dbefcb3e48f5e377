"""Tiny seeded models and their data."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import PreTrainedTokenizerFast

from tl_clt.training import CLTTrainingRunnerConfig
from tl_clt.training.data.batches import ActivationBatches
from tl_clt.training.data.dataset import AnyDataset, DatasetSource, open_dataset

N_LAYERS, D_MODEL, N_CTX, D_VOCAB = 3, 16, 8, 30
WORDS = ["red", "green", "blue", "cat", "dog", "sees", "eats", "the", "a", "."]


def tiny_model(tokenizer: PreTrainedTokenizerFast | None = None) -> HookedTransformer:
    torch.manual_seed(0)
    cfg = HookedTransformerConfig(
        n_layers=N_LAYERS,
        d_model=D_MODEL,
        n_ctx=N_CTX,
        d_head=8,
        n_heads=2,
        d_vocab=D_VOCAB,
        act_fn="gelu",
        seed=0,
    )
    model = HookedTransformer(cfg, tokenizer)
    for name, parameter in model.named_parameters():
        if name.endswith(("W_in", "W_out", "W_E")):
            parameter.data.mul_(5)
    return model.eval()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on several threads, and much slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model() -> HookedTransformer:
    return tiny_model()


@pytest.fixture(scope="session")
def model_with_tokenizer(tmp_path_factory) -> HookedTransformer:
    vocabulary = {word: i for i, word in enumerate(["<bos>", "<eos>", "<pad>", "<unk>", *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    special = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return tiny_model(PreTrainedTokenizerFast.from_pretrained(folder))


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    return torch.randint(0, D_VOCAB, (60, N_CTX), generator=torch.Generator().manual_seed(1))


def config(**changes: object) -> CLTTrainingRunnerConfig:
    """A run of a second or so."""
    values: dict = {
        "d_transcoder": 24,
        "activation": "topk",
        "k": 6,
        "training_tokens": 64 * 40,
        "train_batch_size_tokens": 64,
        "context_size": N_CTX,
        "store_batch_size_prompts": 8,
        "n_batches_in_buffer": 16,
        "n_batches_for_scale": 2,
        "n_eval_prompts": 8,
        "exclude_special_tokens": False,
        "max_norm_ratio": None,
        "lr": 1e-2,
        "log_every": 10,
    }
    values |= changes
    if values["activation"] not in ("topk", "batchtopk") and "k" not in changes:
        values["k"] = None
    return CLTTrainingRunnerConfig(**values)


def opened(source: DatasetSource, model: HookedTransformer, cfg: CLTTrainingRunnerConfig) -> AnyDataset:
    """A dataset as the runner opens it."""
    data = cfg.data
    return open_dataset(
        source,
        model,
        context_size=data.context_size,
        batch_size=data.train_batch_size_tokens,
        prepend_bos=data.prepend_bos,
    )


def batches_of(model: HookedTransformer, dataset: AnyDataset, cfg: CLTTrainingRunnerConfig) -> ActivationBatches:
    """Batches as the runner makes them."""
    return ActivationBatches(model, dataset, cfg.clt, cfg.data, device=cfg.device, seed=cfg.seed, model_name="tiny")


@pytest.fixture(scope="session")
def make_config():
    return config
