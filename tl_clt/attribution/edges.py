"""Nodes, and the edges among them: the tensors that a graph is made of.

Nodes stand in a fixed order: features, errors, tokens, positions, biases, logits. Edges are an adjacency matrix
[target, source]. It is a strided tensor, or torch's CSR tensor where a graph keeps the strongest edges alone; the few
sums over its rows that influence, scores and pruning are made of stand here for both. What an edge is, by its formula,
stands in `autograd`.
"""

from __future__ import annotations

import mmap
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple, SupportsIndex, overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_clt.arguments import as_whole
from tl_clt.errors import MemoryLimit, NodeNotFound, TlCltError
from tl_clt.machine import GIB
from tl_clt.shapes import Adjacency, NodeMask, NodeValues

ROWS_AT_ONCE = 256
"""Rows whose absolute values are in memory at a time."""


class NodeKind(IntEnum):
    """What a node stands for."""

    FEATURE = 0
    """An active CLT feature at one position."""
    ERROR = 1
    """What the CLT does not reconstruct of one MLP's output at one position."""
    TOKEN = 2
    """A token's embedding."""
    POSITION = 3
    """A position's embedding, where the model has learned ones."""
    BIAS = 4
    """All biases of one block: of attention and its norms, and b_dec. The last one: of ln_final and b_U."""
    LOGIT = 5
    """A token's logit above the mean logit, at the last position."""


NODE_TENSORS = ("kind", "layer", "pos", "index", "activation")


def same_values(first: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors, or their absence, are alike: number type, shape and every number, on whatever device."""
    if first is None or other is None:
        return first is other
    return first.dtype == other.dtype and torch.equal(first, other.to(first.device))


@dataclass(frozen=True)
class Node:
    """One node of a graph, in plain values."""

    kind: NodeKind
    layer: int
    """The layer a feature reads, an error writes or a bias belongs to; -1 for tokens and positions, n_layers for logits
    and the last bias."""
    pos: int
    """Position in the prompt; -1 for biases, which act at all of them."""
    index: int
    """Feature number; token id for tokens and logits; else 0."""
    activation: float
    """A feature's activation; a logit's height above the mean logit; else the norm of the node's vectors."""
    label: str
    """The node in words."""
    number: int = field(compare=False)
    """Its place among the nodes of the graph that it was taken from: its row and column of the adjacency."""

    def __repr__(self) -> str:
        return f"Node({self.number}: {self.label}, activation {self.activation:.3g})"


@dataclass(frozen=True, eq=False, repr=False)
class Nodes:
    """One entry a node in each tensor [n_nodes]. Equal where all of them are, number for number.

    `nodes[i]` is one node, `nodes[i:j]` a list of some, and a loop goes over all.
    """

    kind: Int[Tensor, " n_nodes"]
    """Values of `NodeKind`."""

    layer: Int[Tensor, " n_nodes"]
    """The layer a feature reads, an error writes or a bias belongs to; -1 for tokens and positions, n_layers for
    logits and the last bias."""

    pos: Int[Tensor, " n_nodes"]
    """Position in the prompt; -1 for biases, which act at all of them."""

    index: Int[Tensor, " n_nodes"]
    """Feature number; token id for tokens and logits; else 0."""

    activation: Float[Tensor, " n_nodes"]
    """A feature's activation; a logit's height above the mean logit; else the norm of the node's vectors."""

    labels: list[str] | None = None
    """The nodes in words. A graph fills them in."""

    def where(self, kind: NodeKind) -> Int[Tensor, " n"]:
        """Numbers of the nodes of one kind, in order."""
        return torch.nonzero(self.kind == int(kind)).flatten()

    def is_kind(self, *kinds: NodeKind) -> Bool[Tensor, " n_nodes"]:
        """Mask of the nodes of some kinds."""
        return torch.isin(self.kind, torch.tensor([int(k) for k in kinds], device=self.kind.device))

    def take(self, kept: Int[Tensor, " n_kept"] | Bool[Tensor, " n_nodes"]) -> Nodes:
        """The nodes of a mask or list of numbers."""
        labels = self.labels
        if labels is not None:
            numbers = torch.nonzero(kept).flatten() if kept.dtype == torch.bool else kept
            labels = [labels[i] for i in numbers.tolist()]
        return Nodes(**{name: values[kept] for name, values in self.tensors().items()}, labels=labels)

    def number_of(self, node: object, error: Callable[[str], TlCltError] = NodeNotFound) -> object:
        """The number of a node that was taken from this graph. Anything else is returned as it is, as a number.

        Raises:
            NodeNotFound, or `error`: the node was taken from another graph, where numbers mean other nodes.
        """
        if not isinstance(node, Node):
            return node
        here = self[node.number] if node.number < len(self) else None
        if here is None or (here.kind, here.layer, here.pos, here.index) != (
            node.kind,
            node.layer,
            node.pos,
            node.index,
        ):
            there = "not there" if here is None else here.label
            raise error(
                f"{node} was taken from another graph: in this one node {node.number} is {there}. Pruning numbers nodes"
                " anew; take it from this graph's own."
            )
        return node.number

    @overload
    def __getitem__(self, number: SupportsIndex) -> Node: ...
    @overload
    def __getitem__(self, number: slice) -> list[Node]: ...
    def __getitem__(self, number: SupportsIndex | slice) -> Node | list[Node]:
        """One node, counted from the end where the number is negative; or those of a slice.

        Raises:
            NodeNotFound: there is no such node.
        """
        if isinstance(number, slice):
            return [self[i] for i in range(len(self))[number]]
        last = len(self) - 1
        at = as_whole("The number of a node", number, -len(self), last, why="the nodes", error=NodeNotFound) % len(self)
        kind, layer, pos, index = (int(values[at]) for values in (self.kind, self.layer, self.pos, self.index))
        label = f"{NodeKind(kind).name.lower()} {at}" if self.labels is None else self.labels[at]
        return Node(NodeKind(kind), layer, pos, index, float(self.activation[at]), label, at)

    def __iter__(self) -> Iterator[Node]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        counts = Counter(self.kind.tolist())
        return f"Nodes({', '.join(f'{counts[kind]} {kind.name.lower()}' for kind in NodeKind if counts[kind])})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Nodes):
            return NotImplemented
        return all(same_values(values, other.tensors()[name]) for name, values in self.tensors().items())

    def __hash__(self) -> int:
        return hash((len(self), tuple(self.layer.tolist()), tuple(self.index.tolist())))

    def __len__(self) -> int:
        return len(self.kind)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {name: getattr(self, name) for name in NODE_TENSORS}

    @classmethod
    def build(cls, parts: list[tuple[NodeKind, Tensor, Tensor, Tensor, Tensor]]) -> Nodes:
        """Nodes of (kind, layer, pos, index, activation) parts, one after another."""
        kinds = torch.cat([torch.full_like(layer, int(kind)) for kind, layer, *_ in parts])
        _, layer, pos, index, activation = (list(values) for values in zip(*parts, strict=True))
        return cls(kinds, torch.cat(layer), torch.cat(pos), torch.cat(index), torch.cat(activation))


@dataclass(frozen=True, kw_only=True, eq=False)
class WeightedGraph:
    """Nodes, the edges among them, and the weights of the targets: all that influence, scores and pruning go by.

    A graph is whole or reduced. In a reduced graph some features were not traced, or some edges are not kept and only
    their absolute sum is known.
    """

    nodes: Nodes
    """kind, layer, pos, index and activation of every node: features, errors, tokens, positions, biases, logits."""

    adjacency: Adjacency
    """Linear effect of each source node on each target's pre-activation or logit. Rows that were not traced are 0.
    A torch CSR tensor where the graph was traced with `keep_edges`."""

    expanded: Bool[Tensor, " n_nodes"]
    """Nodes whose in-edges were traced."""

    logit_probs: Float[Tensor, " n_logits"]
    """Weights of the target nodes: probabilities of tokens, 1 for other targets."""

    dropped: NodeValues | None = None
    """Absolute input of each node along edges that the graph does not keep: dropped by `keep_edges`, or cut by `prune`.
    None where every edge of the nodes traced is kept."""

    @property
    def is_sparse(self) -> bool:
        """Whether only the strongest edges are kept."""
        return is_sparse(self.adjacency)

    @property
    def lacks_nodes(self) -> bool:
        """Whether edges that are not kept may come from nodes that are not there, since pruning took them out."""
        return False

    @property
    def untraced(self) -> NodeMask:
        """Features that have no row."""
        return self.nodes.is_kind(NodeKind.FEATURE) & ~self.expanded

    @property
    def logit_weights(self) -> NodeValues:
        """w: logit probabilities on the logit nodes, 0 elsewhere."""
        return place_logit_weights(self.nodes, self.logit_probs.to(self.adjacency.dtype))


def place_logit_weights(nodes: Nodes, logit_probs: Float[Tensor, " n_logits"]) -> NodeValues:
    """w: the weight of each target node, 0 elsewhere."""
    weights = torch.zeros(len(nodes), dtype=logit_probs.dtype, device=logit_probs.device)
    weights[nodes.where(NodeKind.LOGIT)] = logit_probs
    return weights


class EdgeList(NamedTuple):
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


def csr_parts(adjacency: Adjacency) -> CSR:
    """The parts of a sparse adjacency."""
    return CSR(adjacency.crow_indices(), adjacency.col_indices(), adjacency.values())


def from_csr(parts: CSR) -> Adjacency:
    """A sparse adjacency of its parts."""
    size = len(parts.starts) - 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(parts.starts, parts.cols, parts.values, (size, size), check_invariants=False)


def same_adjacency(first: Adjacency, other: Adjacency) -> bool:
    """Whether both are dense or both sparse, with the same numbers."""
    if is_sparse(first) and is_sparse(other):
        parts = zip(csr_parts(first), csr_parts(other), strict=True)
        # Few edges may be counted in 32 bits, or in 64.
        return all(same_values(a, b) if a.is_floating_point() else same_values(a.long(), b.long()) for a, b in parts)
    return not is_sparse(first) and not is_sparse(other) and same_values(first, other)


def sum_rows(adjacency: Adjacency) -> NodeValues:
    """Sum of |edges| into each node."""
    if is_sparse(adjacency):
        starts, _, values = csr_parts(adjacency)
        return torch.segment_reduce(values.abs(), "sum", offsets=starts.long(), initial=0)
    return torch.cat([rows.abs().sum(dim=1) for rows in adjacency.split(ROWS_AT_ONCE)])


def sum_inputs_from(
    adjacency: Adjacency, rows: Int[Tensor, " n"], columns: NodeMask | NodeValues
) -> Float[Tensor, " n"]:
    """Sum of |edges| into some nodes, from the nodes of a mask, or each times a weight of its source."""
    if is_sparse(adjacency):
        row, col, value = list_edges(adjacency, rows)
        return value.new_zeros(len(rows)).index_add_(0, row, value.abs() * columns[col])
    wanted = columns.to(adjacency.dtype)
    return torch.cat([adjacency[part].abs() @ wanted for part in rows.split(ROWS_AT_ONCE)])


def pass_upstream(adjacency: Adjacency, rows: Int[Tensor, " n"], amounts: Float[Tensor, " n"]) -> NodeValues:
    """`sum_r amounts[r] |adjacency[r]|`: amounts at some nodes, passed on to the sources of their in-edges."""
    received = torch.zeros(adjacency.shape[1], dtype=amounts.dtype, device=amounts.device)
    passing = torch.nonzero(amounts).flatten()
    for at in passing.split(ROWS_AT_ONCE):
        if is_sparse(adjacency):
            row, col, value = list_edges(adjacency, rows[at])
            received.index_add_(0, col, value.abs() * amounts[at][row])
        else:
            received += amounts[at] @ adjacency[rows[at]].abs()
    return received


def list_edges(adjacency: Adjacency, rows: Int[Tensor, " n"]) -> EdgeList:
    """The edges of some rows, which are numbered in the order given."""
    if not is_sparse(adjacency):
        chosen = adjacency[rows]
        row, col = torch.nonzero(chosen, as_tuple=True)
        return EdgeList(row, col, chosen[row, col])
    starts, cols, values = csr_parts(adjacency)
    counts = (starts[rows + 1] - starts[rows]).long()
    row = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), counts)
    within = torch.arange(len(row), device=rows.device) - (counts.cumsum(0) - counts)[row]
    at = starts[rows].long()[row] + within
    return EdgeList(row, cols[at].long(), values[at])


def take_rows(adjacency: Adjacency, rows: Int[Tensor, " n"]) -> Float[Tensor, "n n_nodes"]:
    """Some rows, dense."""
    if not is_sparse(adjacency):
        return adjacency[rows]
    row, col, value = list_edges(adjacency, rows)
    return value.new_zeros(len(rows), adjacency.shape[1]).index_put_((row, col), value, accumulate=True)


def list_all_edges(adjacency: Adjacency) -> EdgeList:
    """All edges."""
    everything = torch.arange(adjacency.shape[0], device=adjacency.device)
    found = []
    for rows in everything.split(ROWS_AT_ONCE):
        row, col, value = list_edges(adjacency, rows)
        found.append(EdgeList(row + rows[0], col, value))
    return EdgeList(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def list_edges_between(adjacency: Adjacency, kept: NodeMask) -> EdgeList:
    """The edges among the nodes of a mask, in the numbering of those nodes."""
    numbers = torch.nonzero(kept).flatten()
    new = torch.full_like(kept, -1, dtype=torch.long)
    new[numbers] = torch.arange(len(numbers), device=numbers.device)
    found = []
    for first, rows in zip(range(0, len(numbers), ROWS_AT_ONCE), numbers.split(ROWS_AT_ONCE), strict=True):
        row, col, value = list_edges(adjacency, rows)
        inside = kept[col]
        found.append(EdgeList(row[inside] + first, new[col[inside]], value[inside]))
    if not found:
        return EdgeList(
            numbers, numbers, adjacency.new_zeros(0) if not is_sparse(adjacency) else csr_parts(adjacency).values
        )
    return EdgeList(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def build_adjacency(edges: EdgeList, n_nodes: int, *, sparse: bool) -> Adjacency:
    """An adjacency of its edges, which are ordered by row."""
    if not sparse:
        dense = edges.value.new_zeros(n_nodes, n_nodes)
        dense[edges.row, edges.col] = edges.value
        return dense
    counts = torch.bincount(edges.row, minlength=n_nodes)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return from_csr(CSR(starts, edges.col, edges.value))


def zero_rows(n_nodes: int, dtype: torch.dtype, device: torch.device) -> Adjacency:
    """Zeros [n_nodes, n_nodes]; on a CPU, small pages of memory that are taken when they are first written, and not
    when they are read."""
    if device.type != "cpu":
        return torch.zeros(n_nodes, n_nodes, dtype=dtype, device=device)
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    n_bytes = n_nodes * n_nodes * dtype.itemsize
    try:
        pages = mmap.mmap(-1, max(n_bytes, 1), **private)
    except (OSError, OverflowError) as error:
        raise MemoryLimit(
            f"The system gives no room for the edges among {n_nodes} nodes, {n_bytes / GIB:.1f} GiB ({error}). Take a"
            " sparse graph (keep_edges), or fewer features."
        ) from error
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with suppress(OSError):  # A kernel without huge pages knows no such advice.
            pages.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype, count=n_nodes * n_nodes).view(n_nodes, n_nodes)
