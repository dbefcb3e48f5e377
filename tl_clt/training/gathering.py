"""From the shares of a CLT that several ranks hold to the whole of it, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tl_clt.training.layers import is_shared
from tl_clt.training.sharding import SINGLE, ProcessGrid
from tl_clt.training.training_clt import TrainingCLT


@torch.no_grad()
def gather(name: str, own: Tensor, grid: ProcessGrid) -> Tensor | None:
    """A weight, or anything of its shape (a gradient, a moment), whole and in main memory; None but on the main rank.

    Every rank of the first row has to call it, in the same order; other rows may.
    """
    if is_shared(name) or grid.n_feature_shards == 1:
        return own.detach().cpu() if grid.is_main else None
    if grid.data_index > 0:
        return None
    # Only the main rank makes room for the shares of others.
    shares = [torch.empty_like(own) for _ in range(grid.n_feature_shards)] if grid.is_main else None
    dist.gather(own.detach().contiguous(), shares, dst=0, group=grid.feature_group)
    return None if shares is None else torch.cat([share.cpu() for share in shares])


def gather_all(values: Mapping[str, Tensor], grid: ProcessGrid) -> dict[str, Tensor]:
    """`gather` of some weights by name; none of them but on the main rank."""
    gathered = {name: gather(name, own, grid) for name, own in values.items()}
    return {name: value for name, value in gathered.items() if value is not None}


def own_share(name: str, whole: Any, grid: ProcessGrid) -> Tensor:
    """What a rank holds of a weight, or of anything of its shape: a tensor, or a slice of a safetensors file."""
    n = whole.shape[0] if isinstance(whole, Tensor) else whole.get_shape()[0]
    return whole[:] if is_shared(name) else whole[grid.own(n)]


@torch.no_grad()
def gather_clt(clt: TrainingCLT) -> TrainingCLT:
    """The whole CLT: itself on a single process; else in main memory on the main rank, and without values elsewhere.

    The copy of other ranks is on torch's "meta" device: it has shapes and a config, and any use of its values raises.
    """
    if clt.grid.n_feature_shards == 1:
        return clt
    whole = TrainingCLT(replace(clt.cfg, device="meta"), grid=SINGLE)
    if clt.grid.is_main:
        whole = whole.to_empty(device="cpu")
        whole.cfg.device, whole.device = "cpu", torch.device("cpu")
    places = whole.state_dict()
    for name, value in gather_all(clt.state_dict(), clt.grid).items():
        places[name].copy_(value)
    return whole
