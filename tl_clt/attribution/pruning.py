"""Pruning a graph to the nodes and edges that carry most of the influence (Methods, "Graph Pruning")."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_clt.arguments import as_share
from tl_clt.attribution.edges import (
    EdgeList,
    NodeKind,
    WeightedGraph,
    build_adjacency,
    list_edges_between,
    sum_inputs_from,
)
from tl_clt.attribution.influence import walk_upstream
from tl_clt.shapes import NodeMask, NodeValues


class PruneMasks(NamedTuple):
    """What pruning keeps."""

    nodes: NodeMask
    edges: Bool[Tensor, "n_nodes n_nodes"]


class Pruned(NamedTuple):
    """The nodes kept, and the edges kept among them."""

    nodes: NodeMask
    edges: EdgeList
    """In the numbering of the whole graph."""
    cut: NodeValues
    """Absolute input of each node kept along edges that go; 0 for other nodes."""
    out_of_reach: list[str]
    """Thresholds that what the graph keeps cannot be sure to reach, so that all of it stays."""


def prune_graph(graph: WeightedGraph, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> Pruned:
    """The most influential nodes up to a share of all influence, then the strongest edges up to a share.

    Tokens and logits always stay. An edge's score is A[t, s] * (influence[t] + w[t]) among the nodes kept.
    Then features without an in- or out-edge go, and other nodes without an out-edge, until nothing changes; features
    that were not traced may have in-edges.

    Of a reduced graph, both shares are of all that there may be: of what is known and the most that lost walks could
    add. So the nodes kept carry `node_threshold` of the whole graph's influence for sure, and they are no fewer than
    the whole graph's most influential nodes up to that share.

    Raises:
        ConfigError: a threshold is not between 0 and 1.
    """
    node_threshold, edge_threshold = check_thresholds(node_threshold, edge_threshold)
    walks = walk_upstream(graph)
    stays = graph.nodes.is_kind(NodeKind.TOKEN, NodeKind.LOGIT)
    least = _smallest_of_share(walks.influence, node_threshold, walks.unknown_visits)
    kept = (walks.influence >= least.value) | stays
    if not least.reached:
        certain = float(walks.influence.sum() / (walks.influence.sum() + walks.unknown_visits))
        warnings.warn(
            f"The graph is sure of {certain:.0%} of the influence alone, so that node_threshold={node_threshold:g}"
            f" keeps all its nodes. Give node_threshold={math.floor(50 * certain) / 50:g} or less, or trace with a"
            " higher keep_edges, a lower max_unexplored or more max_feature_nodes.",
            stacklevel=3,
        )
    numbers, left = torch.nonzero(kept).flatten(), list_edges_between(graph.adjacency, kept)
    inner = WeightedGraph(
        nodes=graph.nodes.take(kept),
        adjacency=build_adjacency(left, len(numbers), sparse=graph.is_sparse),
        expanded=graph.expanded[kept],
        logit_probs=graph.logit_probs,
        dropped=None if graph.dropped is None else graph.dropped[kept],
    )
    scores = score_edges(inner, left)
    weakest = _smallest_of_share(scores.known, edge_threshold, scores.unknown)
    strong = scores.known >= weakest.value
    alive = _drop_loose_ends(inner, EdgeList(*(part[strong] for part in left)), stays[kept])
    stay = strong & alive[left.row] & alive[left.col]
    mask, cut = torch.zeros_like(kept), torch.zeros_like(walks.influence)
    mask[numbers[alive]] = True
    from_outside = sum_inputs_from(graph.adjacency, numbers, ~kept)
    cut[mask] = from_outside.index_add_(0, left.row[~stay], left.value[~stay].abs())[alive]
    edges = EdgeList(numbers[left.row[stay]], numbers[left.col[stay]], left.value[stay])
    reached = {"node_threshold": least.reached, "edge_threshold": weakest.reached}
    return Pruned(mask, edges, cut, [name for name, is_reached in reached.items() if not is_reached])


def list_node_thresholds(graph: WeightedGraph) -> list[float]:
    """The node thresholds at which `prune_graph` keeps one node more, rising: each keeps the nodes that reach it and no
    others, but for tokens and logits and for what loses its edges."""
    walks = walk_upstream(graph)
    running = _running_shares(walks.influence.sort(descending=True).values, walks.unknown_visits)
    thresholds = running[running > 0].clamp(max=1).unique().tolist()
    return thresholds or [1.0]


class EdgeScores(NamedTuple):
    """What `score_edges` gives."""

    known: Float[Tensor, " n_edges"]
    unknown: float
    """The most that the scores of edges which are not kept can sum to."""


def score_edges(graph: WeightedGraph, edges: EdgeList) -> EdgeScores:
    """A[t, s] * (influence[t] + w[t]) of each edge of a graph.

    What a row does not keep may come from nodes that are kept, and stays in the row's sum.
    """
    walks = walk_upstream(graph)
    # A lost walk's steps, each along one edge, are as many as its further visits.
    return EdgeScores(edges.value.abs() * (walks.output / walks.inputs)[edges.row], walks.unknown_visits)


def _drop_loose_ends(graph: WeightedGraph, edges: EdgeList, stays: NodeMask) -> NodeMask:
    """The nodes left once features without an in- or out-edge are gone, and other nodes without an out-edge but those
    that stay, until nothing changes."""
    row, col, _ = edges
    features, alive = graph.nodes.is_kind(NodeKind.FEATURE), torch.ones_like(stays)
    while True:
        inside = alive[row] & alive[col]
        row, col = row[inside], col[inside]
        # Features that were not traced may have in-edges.
        has_output, has_input = torch.zeros_like(alive), graph.untraced
        has_output[col], has_input[row] = True, True
        still = alive & (has_output | stays) & (has_input | ~features)
        if bool((still == alive).all()):
            return alive
        alive = still


class _Smallest(NamedTuple):
    value: Float[Tensor, ""]
    reached: bool
    """Whether the share was reached; else this is the smallest of all."""


def _smallest_of_share(values: Float[Tensor, " n"], share: float, unknown: float = 0.0) -> _Smallest:
    """The smallest of the largest values that together make up a share of the sum, unknown values included."""
    if len(values) == 0:
        return _Smallest(values.new_zeros(()), unknown == 0)
    ordered = values.sort(descending=True).values
    running = _running_shares(ordered, unknown)
    at = int(torch.searchsorted(running, share))
    reached = at < len(ordered) or unknown == 0
    return _Smallest(ordered[min(at, len(ordered) - 1)], reached)


def _running_shares(ordered: Float[Tensor, " n"], unknown: float) -> Float[Tensor, " n"]:
    """The share of the sum, unknown values included, that values make up together with those before them."""
    return ordered.cumsum(dim=0) / (ordered.sum() + unknown).clamp_min(torch.finfo(ordered.dtype).tiny)


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
