"""A tiny model, its CLT and a text for feature stores, and what a process of several does."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from tests.models import tiny_clt, tiny_hooked
from tl_clt.features import EndpointLabeller, FeatureStore, collect_features, label_features
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


def make_long_case() -> Case:
    """With text enough for labels."""
    made = make_case()
    generator = torch.Generator().manual_seed(5)
    more = [torch.randint(0, made.model.cfg.d_vocab, (12,), generator=generator) for _ in range(300)]
    return made._replace(prompts=more)


def collect(case: Case, folder: str | Path, **options) -> FeatureStore:
    return collect_features(*case, folder, progress=False, **{**SETTINGS, **options})


def collect_on_rank(folder: str, resume: bool = False) -> str:
    """What each process does; they meet in one store."""
    return repr(collect(make_case(), folder, resume=resume))


def label_on_rank(folder: str, url: str | None = None) -> str:
    """What each process does to label a store that is there, by rule or by an endpoint."""
    case = make_long_case()
    labeller = None if url is None else quick_endpoint(url)
    store = FeatureStore.open(folder, case.clt)
    return repr(label_features(case.model, case.clt, store, labeller, features=PLACES, progress=False))


PLACES = [(0, 3), (1, 2), (1, 7), (2, 1), (2, 5)]


def quick_endpoint(url: str) -> EndpointLabeller:
    """One that asks little of the random dictionary, and gives up at once."""
    labeller = EndpointLabeller(url, "m", key_from=None, retries=0)
    labeller.n_random = 2
    return labeller


def same_files(one: Path, other: Path) -> None:
    """Raise unless two stores are the same to the bit."""
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
