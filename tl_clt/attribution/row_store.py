"""Rows of the adjacency as they are traced: dense, straight into their final place, or the strongest edges alone."""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_clt.attribution.edges import CSR, from_csr, spread
from tl_clt.attribution.nodes import NodeKind, Nodes
from tl_clt.shapes import Adjacency, NodeValues

BISECTIONS = 24
"""Halvings of the threshold between kept and dropped edges: to 1e-7 of the strongest."""


class RowStore(ABC):
    """Takes rows in any order; hands on influence along them at any time."""

    def __init__(self, nodes: Nodes, dtype: torch.dtype) -> None:
        self.nodes = nodes
        zeros = torch.zeros(len(nodes), dtype=dtype, device=nodes.kind.device)
        self.sums = zeros
        """Absolute input of each node traced."""
        self.dropped = zeros.clone()
        """The part of it in edges that are not held."""

    @abstractmethod
    def put(self, targets: Int[Tensor, " n"], rows: Float[Tensor, "n n_nodes"]) -> None:
        """Keep the in-edges of some nodes."""

    @abstractmethod
    def spread(self, targets: Int[Tensor, " n"], amounts: Float[Tensor, " n"]) -> NodeValues:
        """`sum_t amounts[t] |row of t|`."""

    @abstractmethod
    def adjacency(self) -> Adjacency:
        """All rows; those not traced are empty. The store is of no use afterwards."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Memory that the rows so far take."""


class DenseRows(RowStore):
    """One tensor [n_nodes, n_nodes]. On a CPU, what is never written takes no memory: rows that are not traced, and
    the columns of features at a target's own layer or above, which cannot reach it."""

    def __init__(self, nodes: Nodes, dtype: torch.dtype) -> None:
        super().__init__(nodes, dtype)
        self.edges = _zeros(len(nodes), dtype, nodes.kind.device)
        features = nodes.where(NodeKind.FEATURE)
        self.n_features = len(features)
        n_layers = max(int(nodes.layer.max()), 0) + 1
        layers = torch.arange(n_layers + 1, device=features.device)
        self.below = torch.searchsorted(nodes.layer[features], layers).tolist()
        """How many features lie below each layer: they come first."""
        self.n_traced = 0

    def put(self, targets: Int[Tensor, " n"], rows: Float[Tensor, "n n_nodes"]) -> None:
        layers = self.nodes.layer[targets]
        for layer in layers.unique().tolist():
            at = torch.nonzero(layers == layer).flatten()
            self.edges[targets[at], : self.below[layer]] = rows[at, : self.below[layer]]
        self.edges[targets, self.n_features :] = rows[:, self.n_features :]
        self.sums[targets] = rows.abs().sum(dim=1)
        self.n_traced += len(targets)

    def spread(self, targets: Int[Tensor, " n"], amounts: Float[Tensor, " n"]) -> NodeValues:
        return spread(self.edges, targets, amounts)

    def adjacency(self) -> Adjacency:
        return self.edges

    @property
    def nbytes(self) -> int:
        return self.n_traced * self.edges.shape[1] * self.edges.element_size()


def _zeros(n_nodes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros [n_nodes, n_nodes]; on a CPU, small pages of memory that are taken when they are first written."""
    if device.type != "cpu":
        return torch.zeros(n_nodes, n_nodes, dtype=dtype, device=device)
    pages = mmap.mmap(-1, max(n_nodes * n_nodes * torch.finfo(dtype).bits // 8, 1))
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with suppress(OSError):  # A kernel without huge pages knows no such advice.
            pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype, count=n_nodes * n_nodes).view(n_nodes, n_nodes)


class _Held(NamedTuple):
    """The strongest edges of some targets."""

    targets: Int[Tensor, " n"]
    counts: Int[Tensor, " n"]
    cols: Int[Tensor, " n_edges"]
    values: Float[Tensor, " n_edges"]


class SparseRows(RowStore):
    """Each row's strongest edges up to a share of its absolute input; the rest is known by its sum."""

    def __init__(self, nodes: Nodes, dtype: torch.dtype, share: float) -> None:
        super().__init__(nodes, dtype)
        self.share = share
        self.held: list[_Held] = []

    def put(self, targets: Int[Tensor, " n"], rows: Float[Tensor, "n n_nodes"]) -> None:
        sizes = rows.abs()
        self.sums[targets] = sizes.sum(dim=1)
        kept = strongest(sizes, self.share)
        self.dropped[targets] = sizes.masked_fill_(kept, 0).sum(dim=1)
        row, cols = torch.nonzero(kept, as_tuple=True)
        counts = torch.bincount(row, minlength=len(targets))
        self.held.append(_Held(targets, counts, cols.int(), rows[row, cols]))

    def spread(self, targets: Int[Tensor, " n"], amounts: Float[Tensor, " n"]) -> NodeValues:
        by_node = torch.zeros_like(self.sums)
        by_node[targets] = amounts
        given = torch.zeros_like(self.sums)
        for held in self.held:
            amount = by_node[held.targets]
            if amount.any():
                each = torch.repeat_interleave(amount, held.counts)
                given.index_add_(0, held.cols, held.values.abs() * each)
        return given

    def adjacency(self) -> Adjacency:
        counts = torch.zeros(len(self.nodes), dtype=torch.long, device=self.sums.device)
        for held in self.held:
            counts[held.targets] = held.counts
        ends = counts.cumsum(0)
        starts = torch.cat([ends.new_zeros(1), ends])
        n_edges = int(ends[-1])
        cols = torch.empty(n_edges, dtype=torch.int32, device=counts.device)
        values = torch.empty(n_edges, dtype=self.sums.dtype, device=counts.device)
        while self.held:
            held = self.held.pop()
            within = torch.arange(len(held.cols), device=counts.device)
            within -= torch.repeat_interleave(held.counts.cumsum(0) - held.counts, held.counts)
            place = torch.repeat_interleave(starts[held.targets], held.counts) + within
            cols[place], values[place] = held.cols, held.values
        index = torch.int32 if n_edges < 2**31 else torch.int64
        return from_csr(CSR(starts.to(index), cols.to(index), values))

    @property
    def nbytes(self) -> int:
        return sum(h.cols.nbytes + h.values.nbytes for h in self.held)


def strongest(sizes: Float[Tensor, "n n_nodes"], share: float) -> Tensor:
    """Mask [n, n_nodes] of each row's largest values that together reach a share of its sum, and of no 0.

    By halving the interval in which the smallest kept value lies: cheaper than sorting every row.
    """
    if share >= 1:
        return sizes > 0
    wanted = share * sizes.sum(dim=1, keepdim=True)
    low, high = torch.zeros_like(wanted), sizes.amax(dim=1, keepdim=True)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        enough = torch.where(sizes >= middle, sizes, 0).sum(dim=1, keepdim=True) >= wanted
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return (sizes >= low) & (sizes > 0)
