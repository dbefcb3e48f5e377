"""Batches of the main rank, handed out to all ranks.

The main rank alone runs the model, shuffles, and reads or writes files. The order of tokens is therefore that of a
single process, a run can go on from a checkpoint on another number of ranks, and the other ranks hold no model. The
price: the model's forward passes are not split among the ranks. A token costs 6 operations per weight of the CLT,
shared by all ranks, and 2 per weight of the model, on one: with N_clt and N_model weights the others wait once there
are more than about 3 * N_clt / N_model ranks, and then cached activations take the model away.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from tl_clt.training.scaling import Batch
from tl_clt.training.sharding import ProcessGrid


class Handout(Iterator[Batch]):
    """Of each batch, the tokens that this rank is to see: the n-th of n_data_parallel equal parts.

    Args:
        batches: on the main rank; None on others.
        grid: the ranks. On a single process, batches are as they are.
        shape: of one token's activations, [2, n_layers, d_model].
        dtype: of the batches.
        device: where this rank's part is to be.
    """

    def __init__(
        self,
        batches: Iterator[Batch] | None,
        grid: ProcessGrid,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._batches, self._grid = batches, grid
        self._shape, self._dtype, self._device = shape, dtype, device

    def __next__(self) -> Batch:
        batch = None if self._batches is None else next(self._batches)
        grid = self._grid
        if grid.n_processes == 1:
            assert batch is not None
            return batch
        n_tokens = torch.tensor(0 if batch is None else len(batch), device=self._device)
        dist.broadcast(n_tokens, src=0)
        part = torch.empty(int(n_tokens) // grid.n_data_parallel, *self._shape, dtype=self._dtype, device=self._device)
        if grid.feature_index == 0 and grid.n_data_parallel > 1:
            parts = None if batch is None else [p.contiguous() for p in batch.chunk(grid.n_data_parallel)]
            dist.scatter(part, parts, src=0, group=grid.data_group)
        elif batch is not None:
            part.copy_(batch)
        if grid.n_feature_shards > 1:
            dist.broadcast(part, src=grid.data_index * grid.n_feature_shards, group=grid.feature_group)
        return part


def from_main(tensor: Tensor | None, grid: ProcessGrid, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The main rank's tensor, on every rank; None is given on others."""
    if grid.n_processes == 1:
        assert tensor is not None
        return tensor
    shape = grid.on_main(lambda: tuple(tensor.shape) if tensor is not None else ())
    received = torch.empty(shape, dtype=dtype, device=device) if tensor is None else tensor.contiguous()
    dist.broadcast(received, src=0)
    return received
