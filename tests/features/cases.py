"""A tiny model, its CLT and a text for feature stores, and what a process of several does."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from tests.models import tiny_clt, tiny_hooked
from tl_clt.features import FeatureStore, collect_features
from tl_clt.transcoder import CrossLayerTranscoder

SETTINGS = {"n_top": 3, "before": 4, "after": 2, "label_tokens": 40, "n_logits": 4, "n_connected": 5}


class Case(NamedTuple):
    model: HookedTransformer
    clt: CrossLayerTranscoder
    prompts: list[Tensor]


def make_case() -> Case:
    model = tiny_hooked("gpt2", torch.float32)
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(3, 14, (90,), generator=generator).tolist()
    prompts = [torch.randint(0, model.cfg.d_vocab, (n,), generator=generator) for n in lengths]
    return Case(model, tiny_clt(model, d_transcoder=12, l0=2, dtype=torch.float32), prompts)


def collect(case: Case, folder: str | Path, **options) -> FeatureStore:
    return collect_features(*case, folder, progress=False, **{**SETTINGS, **options})


def collect_on_rank(folder: str, resume: bool = False) -> str:
    """What each process does; they meet in one store."""
    return repr(collect(make_case(), folder, resume=resume))


def same_files(one: Path, other: Path) -> None:
    """Raise unless two stores are the same to the bit."""
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
