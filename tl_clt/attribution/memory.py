"""How much memory tracing takes, known before it starts, and the batch size that fits."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from tl_clt.attribution.engines import Engine
from tl_clt.attribution.engines.sweep import CHUNK_ROWS, SweepEngine
from tl_clt.attribution.nodes import NodeKind
from tl_clt.attribution.row_store import dense_bytes, sparse_bytes
from tl_clt.attribution.streams import Writes
from tl_clt.errors import ConfigError, MemoryLimit
from tl_clt.machine import GIB, free_memory, held_memory
from tl_clt.transcoder import CrossLayerTranscoder

SHARE_OF_FREE = 0.8
"""Share of the free memory that tracing takes where no limit is given."""
CPU_BATCH, GPU_BATCH = 512, 4096
"""More targets at once gain nothing: their matrix products are large enough."""
MARGIN = 64 * 2**20
"""For the small things, and what the selection of a sparse graph's edges takes."""


class Budget:
    """What tracing one prompt may take beyond what the process held when it began.

    Args:
        memory_limit: GiB, or None for a share of what is free.

    Raises:
        ConfigError: the limit is out of range.
    """

    def __init__(self, device: torch.device, memory_limit: float | None) -> None:
        if memory_limit is not None and not memory_limit > 0:
            raise ConfigError(f"memory_limit is {memory_limit}: give GiB, more than 0.")
        self.device = device
        self.before = held_memory(device)
        if memory_limit is None:
            free = free_memory(device)
            self.limit = int(SHARE_OF_FREE * (psutil.virtual_memory().available if free is None else free))
        else:
            self.limit = int(memory_limit * GIB)

    def taken(self) -> int:
        """Bytes that the process holds beyond what it held then."""
        return max(0, held_memory(self.device) - self.before)

    def require_sources(self, clt: CrossLayerTranscoder, writes: Writes, behind_norm: bool) -> None:
        """Raise where the vectors that the active features write do not fit.

        Args:
            behind_norm: whether they are held a second time, as a norm behind the MLPs passes them on.
        """
        n_active = torch.bincount(writes.features.layer, minlength=clt.cfg.n_layers).tolist()
        n_vectors = sum(n * len(clt.cfg.targets(source)) for source, n in enumerate(n_active))
        size = writes.embed.element_size() * writes.embed.shape[1]
        needed = n_vectors * size * (2 if behind_norm else 1)
        taken = self.taken()
        if taken + needed + MARGIN > self.limit:
            raise MemoryLimit(
                f"The {sum(n_active)} active features write {n_vectors} vectors, which take {needed / GIB:.2f} GiB;"
                f" {taken / GIB:.2f} GiB of the limit of {self.limit / GIB:.2f} are taken already. Raise memory_limit,"
                " or trace a shorter prompt or a CLT that is sparser or of a smaller span."
            )


@dataclass(frozen=True)
class MemoryPlan:
    """What tracing one prompt takes, in bytes, beyond what the process held when it began."""

    taken: int
    """By the prompt's clean run and the vectors that its nodes write."""
    rows: int
    """The adjacency, at most."""
    batch_size: int
    batch: int
    """One batch of targets at work."""
    limit: int
    at_the_end: int = 0
    """What putting a sparse graph's rows in order takes, once all are traced."""
    all_fit: bool = True
    """Whether the rows of all features that may get one are sure to fit."""

    @property
    def total(self) -> int:
        return self.taken + self.rows + max(self.batch, self.at_the_end) + MARGIN

    def __str__(self) -> str:
        return f"at most {self.total / GIB:.2f} GiB: edges {self.rows / GIB:.2f}, {self.batch_size} targets at a time"


def plan_memory(
    engine: Engine,
    n_rows: int,
    keep_edges: float | None,
    batch_size: int | None,
    budget: Budget,
    adaptive: bool = False,
) -> MemoryPlan:
    """The largest useful batch size with which tracing stays within the limit.

    Args:
        n_rows: nodes that get a row, at most.
        keep_edges: share of each row that a sparse graph holds; None for a dense one.
        batch_size: the user's choice, or None.
        budget: what tracing this prompt may take.
        adaptive: whether tracing may end before all rows are traced, so that they need not all fit.

    Raises:
        ConfigError: a batch size out of range.
        MemoryLimit: not even one target at a time fits.
    """
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}: give at least 1.")
    local, n_nodes = engine.local, len(engine.sources.nodes)
    device, taken, limit = local.tokens.device, budget.taken(), budget.limit
    n_targets = len(engine.sources.nodes.where(NodeKind.LOGIT))
    if keep_edges is None:
        most = dense_bytes(n_rows, n_nodes, local.dtype, device)
        least = dense_bytes(n_targets, n_nodes, local.dtype, device)
    else:
        most, least = (sparse_bytes(n, n_nodes, local.dtype) for n in (n_rows, n_targets))
    room = limit - MARGIN - taken - _at_work(engine, batch_size or 1)
    if keep_edges is not None:
        # Sparse rows are put in order at the end: half for them, half for that.
        room //= 2
    all_fit = most <= room
    if not all_fit and (least > room or (keep_edges is None and not adaptive)):
        sparse = [] if keep_edges is not None else ["keep_edges=0.9 to hold the strongest edges alone"]
        fewer = [] if adaptive else ["max_feature_nodes or max_unexplored to trace fewer features"]
        raise MemoryLimit(
            f"Tracing {n_rows} of {n_nodes} nodes takes {most / GIB:.2f} GiB for edges,"
            f" {(_at_work(engine, batch_size or 1) + MARGIN) / GIB:.2f} to work in and {taken / GIB:.2f} for the"
            f" prompt; the limit is {limit / GIB:.2f}. Give {', or '.join([*sparse, *fewer, 'a higher memory_limit'])}."
        )
    rows = min(most, room)
    at_the_end = rows if keep_edges is not None else 0
    if batch_size is None:
        largest = GPU_BATCH if device.type == "cuda" else CPU_BATCH
        per_target = _at_work(engine, 2) - _at_work(engine, 1)
        left = limit - MARGIN - taken - rows - _at_work(engine, 0)
        batch_size = max(1, min(largest, n_rows, left // per_target))
    return MemoryPlan(taken, rows, batch_size, _at_work(engine, batch_size), limit, at_the_end, all_fit)


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
