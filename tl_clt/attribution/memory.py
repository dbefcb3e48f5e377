"""How much memory tracing takes, known before it starts, the batch size that fits, and where the traced rows go.

Rows of the adjacency are kept as they are traced: dense, straight into their final place, or the strongest edges alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import psutil
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_clt.attribution.autograd import Engine
from tl_clt.attribution.edges import CSR, NodeKind, Nodes, from_csr, pass_upstream, zero_rows
from tl_clt.attribution.local import Writes
from tl_clt.errors import ConfigError, MemoryLimit
from tl_clt.machine import GIB, free_memory, held_memory
from tl_clt.shapes import Adjacency, NodeMask, NodeValues
from tl_clt.transcoder import CrossLayerTranscoder

SHARE_OF_FREE = 0.8
"""Share of the free memory that tracing takes where no limit is given."""
CPU_BATCH, GPU_BATCH = 512, 4096
"""More targets at once gain nothing: their matrix products are large enough."""
MARGIN = 64 * 2**20
"""For the small things, and what the selection of a sparse graph's edges takes."""
CHUNK_EDGES = 2**20
"""Edges whose sizes are ranked at a time."""
KEY_SHIFT, N_KEYS = 20, 2**11
"""The upper bits of a float32 that is not negative, 8 of its exponent and 3 behind the point, as a number."""


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
    batch_bytes: int
    """One batch of targets at work."""
    limit: int
    at_the_end: int = 0
    """What putting a sparse graph's rows in order takes, once all are traced."""
    all_fit: bool = True
    """Whether the rows of all features that may get one are sure to fit."""

    @property
    def total(self) -> int:
        return self.taken + self.rows + max(self.batch_bytes, self.at_the_end) + MARGIN

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
        keep_edges: share of each row that a sparse graph keeps; None for a dense one.
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
    room = limit - MARGIN - taken - engine.work_bytes(batch_size or 1)
    if keep_edges is not None:
        # Sparse rows are put in order at the end: half for them, half for that.
        room //= 2
    all_fit = most <= room
    if not all_fit and (least > room or (keep_edges is None and not adaptive)):
        sparse = [] if keep_edges is not None else ["keep_edges=0.9 to hold the strongest edges alone"]
        fewer = [] if adaptive else ["max_feature_nodes or max_unexplored to trace fewer features"]
        raise MemoryLimit(
            f"Tracing {n_rows} of {n_nodes} nodes takes {most / GIB:.2f} GiB for edges,"
            f" {(engine.work_bytes(batch_size or 1) + MARGIN) / GIB:.2f} to work in and {taken / GIB:.2f} for the"
            f" prompt; the limit is {limit / GIB:.2f}. Give {', or '.join([*sparse, *fewer, 'a higher memory_limit'])}."
        )
    rows = min(most, room)
    at_the_end = rows if keep_edges is not None else 0
    if batch_size is None:
        largest = GPU_BATCH if device.type == "cuda" else CPU_BATCH
        per_target = engine.work_bytes(2) - engine.work_bytes(1)
        left = limit - MARGIN - taken - rows - engine.work_bytes(0)
        batch_size = max(1, min(largest, n_rows, left // per_target))
    return MemoryPlan(taken, rows, batch_size, engine.work_bytes(batch_size), limit, at_the_end, all_fit)


def dense_bytes(n_rows: int, n_nodes: int, dtype: torch.dtype, device: torch.device) -> int:
    """What dense rows take: on a CPU, only those that are written."""
    return (n_nodes if device.type != "cpu" else n_rows) * n_nodes * dtype.itemsize


def sparse_bytes(n_rows: int, n_nodes: int, dtype: torch.dtype) -> int:
    """What sparse rows take, if every edge is kept."""
    return n_rows * n_nodes * (dtype.itemsize + torch.int32.itemsize)


class RowStore(ABC):
    """Takes rows in any order, as many as there is room for; hands on influence along them at any time."""

    def __init__(self, nodes: Nodes, dtype: torch.dtype, room: int) -> None:
        self.nodes = nodes
        self.room = room
        """Bytes that rows may take."""
        self.nbytes = 0
        """Bytes that the rows so far take."""
        self.n_features = len(nodes.where(NodeKind.FEATURE))
        layers = torch.arange(max(int(nodes.layer.max()), 0) + 2, device=nodes.layer.device)
        self.below = torch.searchsorted(nodes.layer[: self.n_features], layers).tolist()
        """How many features lie below each layer: they come first, and they alone can reach it."""
        zeros = torch.zeros(len(nodes), dtype=dtype, device=nodes.kind.device)
        self.sums = zeros
        """Absolute input of each node traced."""
        self.dropped = zeros.clone()
        """The part of it in edges that are not kept."""

    def put(self, targets: Int[Tensor, " n"], rows: Float[Tensor, "n n_nodes"]) -> NodeMask:
        """Keep the in-edges of some nodes, from the lowest layer up, as many as there is room for.

        Returns:
            A mask of all nodes: the targets whose rows were kept.
        """
        kept = torch.zeros_like(self.nodes.kind, dtype=torch.bool)
        layers = self.nodes.layer[targets]
        for layer in layers.unique().tolist():
            at = torch.nonzero(layers == layer).flatten()
            for some in at.split(max(1, CHUNK_EDGES // rows.shape[1])):
                n = self._put(layer, targets[some], rows[some])
                kept[targets[some[:n]]] = True
                if n < len(some):
                    return kept
        return kept

    @abstractmethod
    def _put(self, layer: int, targets: Int[Tensor, " n"], rows: Float[Tensor, "n n_nodes"]) -> int:
        """Keep rows of one layer; returns how many there was room for."""

    @abstractmethod
    def pass_upstream(self, targets: Int[Tensor, " n"], amounts: Float[Tensor, " n"]) -> NodeValues:
        """`sum_t amounts[t] |row of t|`, for targets of one layer."""

    @abstractmethod
    def adjacency(self) -> Adjacency:
        """All rows; those not traced are empty. The store is of no use afterwards."""


class DenseRows(RowStore):
    """One tensor [n_nodes, n_nodes]. On a CPU, what is never written takes no memory: rows that are not traced, and
    the columns of features at a target's own layer or above, which cannot reach it."""

    def __init__(self, nodes: Nodes, dtype: torch.dtype, room: int) -> None:
        super().__init__(nodes, dtype, room)
        self.edges = zero_rows(len(nodes), dtype, nodes.kind.device)

    def _put(self, layer: int, targets: Int[Tensor, " n"], rows: Float[Tensor, "n n_nodes"]) -> int:
        row_bytes = self.edges.shape[1] * self.edges.element_size()
        n = min(len(targets), max(0, self.room - self.nbytes) // row_bytes)
        targets, rows = targets[:n], rows[:n]
        self.edges[targets, : self.below[layer]] = rows[:, : self.below[layer]]
        self.edges[targets, self.n_features :] = rows[:, self.n_features :]
        self.sums[targets] = rows.abs().sum(dim=1)
        self.nbytes += n * row_bytes
        return n

    def pass_upstream(self, targets: Int[Tensor, " n"], amounts: Float[Tensor, " n"]) -> NodeValues:
        return pass_upstream(self.edges, targets, amounts)

    def adjacency(self) -> Adjacency:
        return self.edges


class _KeptEdges(NamedTuple):
    """The strongest edges of some targets."""

    targets: Int[Tensor, " n"]
    counts: Int[Tensor, " n"]
    cols: Int[Tensor, " n_edges"]
    values: Float[Tensor, " n_edges"]


class SparseRows(RowStore):
    """Each row's strongest edges up to a share of its absolute input; the rest is known by its sum."""

    def __init__(self, nodes: Nodes, dtype: torch.dtype, room: int, share: float) -> None:
        super().__init__(nodes, dtype, room)
        self.share = share
        self.kept: dict[int, list[_KeptEdges]] = {}
        """By the targets' layer."""

    def _put(self, layer: int, targets: Int[Tensor, " n"], rows: Float[Tensor, "n n_nodes"]) -> int:
        below = self.below[layer]
        rows = torch.cat([rows[:, :below], rows[:, self.n_features :]], dim=1)
        sizes = rows.abs()
        kept = strongest(sizes, self.share)
        row, cols = torch.nonzero(kept, as_tuple=True)
        counts = torch.bincount(row, minlength=len(targets))
        edge_bytes = rows.element_size() + torch.int32.itemsize
        ends = counts.cumsum(0)
        n = int((self.nbytes + ends * edge_bytes <= self.room).sum())
        n_edges = int(ends[n - 1]) if n else 0
        row, cols, targets = row[:n_edges], cols[:n_edges], targets[:n]
        self.nbytes += n_edges * edge_bytes
        self.sums[targets] = sizes.sum(dim=1)[:n]
        self.dropped[targets] = sizes.masked_fill_(kept, 0).sum(dim=1)[:n]
        values = rows[row, cols]
        cols += (cols >= below) * (self.n_features - below)
        self.kept.setdefault(layer, []).append(_KeptEdges(targets, counts[:n], cols.int(), values))
        return n

    def pass_upstream(self, targets: Int[Tensor, " n"], amounts: Float[Tensor, " n"]) -> NodeValues:
        by_node = torch.zeros_like(self.sums)
        by_node[targets] = amounts
        received = torch.zeros_like(self.sums)
        for layer in self.nodes.layer[targets].unique().tolist():
            for some in self.kept.get(layer, ()):
                amount = by_node[some.targets]
                if amount.any():
                    each = torch.repeat_interleave(amount, some.counts)
                    received.index_add_(0, some.cols, some.values.abs() * each)
        return received

    def adjacency(self) -> Adjacency:
        everything = [some for of_layer in self.kept.values() for some in of_layer]
        self.kept.clear()
        counts = torch.zeros(len(self.nodes), dtype=torch.long, device=self.sums.device)
        for some in everything:
            counts[some.targets] = some.counts
        ends = counts.cumsum(0)
        starts = torch.cat([ends.new_zeros(1), ends])
        n_edges = int(ends[-1])
        cols = torch.empty(n_edges, dtype=torch.int32, device=counts.device)
        values = torch.empty(n_edges, dtype=self.sums.dtype, device=counts.device)
        while everything:
            some = everything.pop()
            within = torch.arange(len(some.cols), device=counts.device)
            within -= torch.repeat_interleave(some.counts.cumsum(0) - some.counts, some.counts)
            place = torch.repeat_interleave(starts[some.targets], some.counts) + within
            cols[place], values[place] = some.cols, some.values
        index = torch.int32 if n_edges < 2**31 else torch.int64
        return from_csr(CSR(starts.to(index), cols.to(index), values))


def strongest(sizes: Float[Tensor, "n n_edges"], share: float) -> Bool[Tensor, "n n_edges"]:
    """Mask of each row's largest values, as few as together reach a share of its sum, and never of zeros.

    Sorting every row would take most of the tracing: values are counted into buckets by their upper bits, and only
    the bucket in which a row's sum crosses the share is sorted.
    """
    if share >= 1:
        return sizes > 0
    n = len(sizes)
    largest = sizes.amax(dim=1, keepdim=True).clamp_min(torch.finfo(sizes.dtype).tiny)
    relative = sizes / largest
    key = (relative.float().view(torch.int32) >> KEY_SHIFT).long()
    totals = sizes.new_zeros(n, N_KEYS).scatter_add_(1, key, relative)
    wanted = share * totals.sum(dim=1, keepdim=True)
    above = totals.flip(1).cumsum(dim=1).flip(1) - totals
    # Buckets from the top until the share is reached; `above` falls as keys rise. Rows of zeros cross nowhere.
    crossing = (above >= wanted).sum(dim=1, keepdim=True).clamp_max(N_KEYS - 1)
    kept = key > crossing
    row, col = torch.nonzero(key == crossing, as_tuple=True)
    # All rows lie in one sum, which float32 would be too coarse for.
    value = relative[row, col].double()
    order = torch.argsort(value, descending=True, stable=True)
    order = order[torch.argsort(row[order], stable=True)]
    row, col, value = row[order], col[order], value[order]
    before = value.cumsum(0) - value
    first = torch.searchsorted(row, torch.arange(n, device=row.device))
    start = torch.cat([before, before.new_zeros(1)])[first]
    missing = (wanted - above.gather(1, crossing)).flatten()
    needed = (before - start[row] < missing[row]) & (value > 0)
    kept[row[needed], col[needed]] = True
    return kept
