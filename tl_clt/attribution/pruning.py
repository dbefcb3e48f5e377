"""Pruning a graph to the nodes and edges that carry most of the influence (Methods, "Graph Pruning")."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_clt.arguments import as_share
from tl_clt.attribution.edges import Entries, assemble, between, is_sparse
from tl_clt.attribution.influence import SMALLEST_ROW_SUM, node_influence
from tl_clt.attribution.nodes import NodeKind, Nodes
from tl_clt.shapes import Adjacency, NodeMask, NodeValues


class PruneMasks(NamedTuple):
    """What pruning keeps."""

    nodes: NodeMask
    edges: Bool[Tensor, "n_nodes n_nodes"]


class Pruned(NamedTuple):
    """The nodes kept, and the edges kept among them."""

    nodes: NodeMask
    edges: Entries
    """In the numbering of the whole graph."""


def prune_graph(
    adjacency: Adjacency,
    nodes: Nodes,
    weights: NodeValues,
    node_threshold: float = 0.8,
    edge_threshold: float = 0.98,
    dropped: NodeValues | None = None,
) -> Pruned:
    """The most influential nodes up to a share of all influence, then the strongest edges up to a share.

    Tokens and logits always stay. An edge's score is A[t, s] * (influence[t] + w[t]) among the nodes kept.
    Then features without an in- or out-edge go, and other nodes without an out-edge, until nothing changes.

    Raises:
        ConfigError: a threshold is not between 0 and 1.
    """
    node_threshold, edge_threshold = check_thresholds(node_threshold, edge_threshold)
    influence = node_influence(adjacency, nodes, weights, dropped)
    stays = nodes.is_kind(NodeKind.TOKEN, NodeKind.LOGIT)
    kept = (influence >= _smallest_of_share(influence, node_threshold)) | stays
    numbers = torch.nonzero(kept).flatten()
    inner, left = nodes.take(kept), between(adjacency, kept)
    among = _scores(left, inner, weights[kept], sparse=is_sparse(adjacency))
    strong = among >= _smallest_of_share(among, edge_threshold)
    row, col, value = (part[strong] for part in left)
    inner_stays, features = stays[kept], inner.is_kind(NodeKind.FEATURE)
    alive = torch.ones_like(inner_stays)
    while True:
        inside = alive[row] & alive[col]
        row, col, value = row[inside], col[inside], value[inside]
        out, into = torch.zeros_like(alive), torch.zeros_like(alive)
        out[col], into[row] = True, True
        still = alive & (out | inner_stays) & (into | ~features)
        if bool((still == alive).all()):
            break
        alive = still
    mask = torch.zeros_like(kept)
    mask[numbers[alive]] = True
    return Pruned(mask, Entries(numbers[row], numbers[col], value))


def _scores(edges: Entries, nodes: Nodes, weights: NodeValues, *, sparse: bool) -> Float[Tensor, " n_edges"]:
    """A[t, s] * (influence[t] + w[t]) of each edge, the rows of what is left normalised anew."""
    left = assemble(edges, len(nodes), sparse=sparse)
    sums = torch.zeros_like(weights).index_add_(0, edges.row, edges.value.abs()).clamp_min(SMALLEST_ROW_SUM)
    carried = node_influence(left, nodes, weights) + weights
    return edges.value.abs() * (carried / sums)[edges.row]


def _smallest_of_share(values: Float[Tensor, " n"], share: float) -> Float[Tensor, ""]:
    """The smallest of the largest values that together make up a share of the sum."""
    if len(values) == 0:
        return values.new_zeros(())
    ordered = values.sort(descending=True).values
    running = ordered.cumsum(dim=0) / ordered.sum().clamp_min(torch.finfo(values.dtype).tiny)
    at = torch.searchsorted(running, share)
    return ordered[min(int(at), len(ordered) - 1)]


class Thresholds(NamedTuple):
    """Shares of the influence that pruning keeps."""

    node: float
    edge: float


def check_thresholds(node_threshold: float, edge_threshold: float) -> Thresholds:
    """The thresholds as plain numbers.

    Raises:
        ConfigError: one is no share, more than 0 and at most 1.
    """
    return Thresholds(as_share("node_threshold", node_threshold), as_share("edge_threshold", edge_threshold))
