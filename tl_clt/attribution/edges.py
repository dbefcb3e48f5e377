"""An adjacency matrix's rows, dense or sparse: the few sums that influence, scores and pruning are made of.

Dense graphs are strided tensors; graphs that hold the strongest edges alone are torch's CSR tensors.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_clt.attribution.nodes import same_values
from tl_clt.shapes import Adjacency, NodeMask, NodeValues

ROWS_AT_ONCE = 256
"""Rows whose absolute values are in memory at a time."""


class Entries(NamedTuple):
    """Edges that are not 0, one by one, by row and then column."""

    row: Int[Tensor, " n_edges"]
    col: Int[Tensor, " n_edges"]
    value: Float[Tensor, " n_edges"]


class CSR(NamedTuple):
    """The parts of a sparse adjacency."""

    starts: Int[Tensor, " n_nodes_and_one"]
    cols: Int[Tensor, " n_edges"]
    values: Float[Tensor, " n_edges"]


def is_sparse(adjacency: Adjacency) -> bool:
    return adjacency.layout == torch.sparse_csr


def csr(adjacency: Adjacency) -> CSR:
    """Parts of a sparse adjacency."""
    return CSR(adjacency.crow_indices(), adjacency.col_indices(), adjacency.values())


def from_csr(parts: CSR) -> Adjacency:
    """A sparse adjacency of its parts."""
    size = len(parts.starts) - 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(parts.starts, parts.cols, parts.values, (size, size), check_invariants=False)


def same_adjacency(one: Adjacency, other: Adjacency) -> bool:
    """Whether both are dense or both sparse, with the same numbers."""
    if is_sparse(one) and is_sparse(other):
        parts = zip(csr(one), csr(other), strict=True)
        # Few edges may be counted in 32 bits, or in 64.
        return all(same_values(a, b) if a.is_floating_point() else same_values(a.long(), b.long()) for a, b in parts)
    return not is_sparse(one) and not is_sparse(other) and same_values(one, other)


def row_sums(adjacency: Adjacency) -> NodeValues:
    """Sum of |edges| into each node."""
    if is_sparse(adjacency):
        starts, _, values = csr(adjacency)
        return torch.segment_reduce(values.abs(), "sum", offsets=starts.long(), initial=0)
    return torch.cat([rows.abs().sum(dim=1) for rows in adjacency.split(ROWS_AT_ONCE)])


def input_from(adjacency: Adjacency, rows: Int[Tensor, " n"], columns: NodeMask | NodeValues) -> Float[Tensor, " n"]:
    """Sum of |edges| into some nodes, from the nodes of a mask, or each times a weight of its source."""
    if is_sparse(adjacency):
        row, col, value = entries(adjacency, rows)
        return value.new_zeros(len(rows)).index_add_(0, row, value.abs() * columns[col])
    wanted = columns.to(adjacency.dtype)
    return torch.cat([adjacency[some].abs() @ wanted for some in rows.split(ROWS_AT_ONCE)])


def spread(adjacency: Adjacency, rows: Int[Tensor, " n"], amounts: Float[Tensor, " n"]) -> NodeValues:
    """`sum_r amounts[r] |adjacency[r]|`: amounts at some nodes, handed on along their in-edges."""
    given = torch.zeros(adjacency.shape[1], dtype=amounts.dtype, device=amounts.device)
    some = torch.nonzero(amounts).flatten()
    for at in some.split(ROWS_AT_ONCE):
        if is_sparse(adjacency):
            row, col, value = entries(adjacency, rows[at])
            given.index_add_(0, col, value.abs() * amounts[at][row])
        else:
            given += amounts[at] @ adjacency[rows[at]].abs()
    return given


def entries(adjacency: Adjacency, rows: Int[Tensor, " n"]) -> Entries:
    """The edges of some rows, which are numbered in the order given."""
    if not is_sparse(adjacency):
        chosen = adjacency[rows]
        row, col = torch.nonzero(chosen, as_tuple=True)
        return Entries(row, col, chosen[row, col])
    starts, cols, values = csr(adjacency)
    counts = (starts[rows + 1] - starts[rows]).long()
    row = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), counts)
    within = torch.arange(len(row), device=rows.device) - (counts.cumsum(0) - counts)[row]
    at = starts[rows].long()[row] + within
    return Entries(row, cols[at].long(), values[at])


def between(adjacency: Adjacency, kept: NodeMask) -> Entries:
    """The edges among the nodes of a mask, in the numbering of those nodes."""
    numbers = torch.nonzero(kept).flatten()
    new = torch.full_like(kept, -1, dtype=torch.long)
    new[numbers] = torch.arange(len(numbers), device=numbers.device)
    found = []
    for first, rows in zip(range(0, len(numbers), ROWS_AT_ONCE), numbers.split(ROWS_AT_ONCE), strict=True):
        row, col, value = entries(adjacency, rows)
        inside = kept[col]
        found.append(Entries(row[inside] + first, new[col[inside]], value[inside]))
    if not found:
        return Entries(numbers, numbers, adjacency.new_zeros(0) if not is_sparse(adjacency) else csr(adjacency).values)
    return Entries(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def assemble(edges: Entries, n_nodes: int, *, sparse: bool) -> Adjacency:
    """An adjacency of its edges, which are ordered by row."""
    if not sparse:
        dense = edges.value.new_zeros(n_nodes, n_nodes)
        dense[edges.row, edges.col] = edges.value
        return dense
    counts = torch.bincount(edges.row, minlength=n_nodes)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return from_csr(CSR(starts, edges.col, edges.value))
