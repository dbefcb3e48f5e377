"""How much memory tracing takes, known before it starts, and the batch size that fits."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from tl_clt.attribution.engines import Engine
from tl_clt.attribution.engines.sweep import CHUNK_ROWS, SweepEngine
from tl_clt.errors import ConfigError, MemoryLimit

GIB = 2**30
SHARE_OF_FREE = 0.8
"""Share of the free memory that tracing takes where no limit is given."""
CPU_BATCH, GPU_BATCH = 512, 4096
"""More targets at once gain nothing: their matrix products are large enough."""
MARGIN = 64 * 2**20
"""For the small things."""


@dataclass(frozen=True)
class MemoryPlan:
    """What tracing one prompt takes, in bytes, beyond what is in memory already."""

    rows: int
    """The adjacency, at most."""
    batch_size: int
    batch: int
    """One batch of targets at work."""
    limit: int

    @property
    def total(self) -> int:
        return self.rows + self.batch + MARGIN

    def __str__(self) -> str:
        return f"at most {self.total / GIB:.2f} GiB: edges {self.rows / GIB:.2f}, {self.batch_size} targets at a time"


def free_memory(device: torch.device) -> int:
    """Bytes that can be had now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def plan_memory(
    engine: Engine, n_rows: int, keep_edges: float | None, batch_size: int | None, memory_limit: float | None
) -> MemoryPlan:
    """The largest useful batch size with which tracing stays within the limit.

    Args:
        n_rows: nodes that get a row, at most.
        keep_edges: share of each row that a sparse graph holds; None for a dense one.
        batch_size: the user's choice, or None.
        memory_limit: GiB, or None for a share of what is free.

    Raises:
        ConfigError: a limit or batch size out of range.
        MemoryLimit: not even one target at a time fits.
    """
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}: give at least 1.")
    if memory_limit is not None and not memory_limit > 0:
        raise ConfigError(f"memory_limit is {memory_limit}: give GiB, more than 0.")
    local, n_nodes = engine.local, len(engine.sources.nodes)
    device = local.tokens.device
    limit = int(memory_limit * GIB) if memory_limit else int(SHARE_OF_FREE * free_memory(device))
    size = torch.finfo(local.dtype).bits // 8
    dense = (n_nodes if device.type == "cuda" else n_rows) * n_nodes * size
    room = limit - MARGIN - _at_work(engine, 1)
    rows = min(dense, max(room, 0)) if keep_edges is not None else dense
    if rows > room or room <= 0:
        raise MemoryLimit(
            f"Tracing {n_rows} of {n_nodes} nodes takes {dense / GIB:.2f} GiB for edges and"
            f" {(_at_work(engine, 1) + MARGIN) / GIB:.2f} to work in; the limit is {limit / GIB:.2f}."
            " Give keep_edges=0.9 to hold the strongest edges alone, or max_feature_nodes or max_unexplored to trace"
            " fewer features."
        )
    if keep_edges is not None:
        # Sparse rows are gathered into their final order at the end: half for them, half for the gathering.
        rows = min(rows, limit // 2)
    if batch_size is None:
        most = GPU_BATCH if device.type == "cuda" else CPU_BATCH
        per_target = _at_work(engine, 2) - _at_work(engine, 1)
        batch_size = max(1, min(most, n_rows, (limit - MARGIN - rows - _at_work(engine, 0)) // per_target))
    return MemoryPlan(rows, batch_size, _at_work(engine, batch_size), limit)


def _at_work(engine: Engine, batch_size: int) -> int:
    """Bytes that a batch of targets takes."""
    local = engine.local
    n_pos, d_model = local.sites.embed.shape
    size = torch.finfo(local.dtype).bits // 8
    edges = 3 * len(engine.sources.nodes)
    if isinstance(engine, SweepEngine):
        widths = [ov.from_out.shape[1] + ov.to_in.shape[0] for ov in engine.folded.attention]
        heads = max(ov.n_heads for ov in engine.folded.attention)
        chunk = CHUNK_ROWS * (2 * max(widths) + heads * d_model // 4 + 2 * d_model)
        return size * (batch_size * (edges + n_pos * d_model + 2 * d_model) + chunk)
    # Gradients with respect to every site of every layer, and those on the way.
    return size * batch_size * (edges + n_pos * d_model * (4 * local.n_layers + 8))
