"""Influence and scores (Methods, "Graph Pruning" and "Evaluating Graphs").

A = |adjacency| with each row divided by its sum; influence = w (A + A^2 + ...) with w the target weights (logit
probabilities). Edges run from lower to higher layers only, so that the series is one pass from the top layer down.

A sparse graph holds the strongest edges of each row; what was dropped counts in the row's sum, so that shares are
those of the whole graph, and walks that would take a dropped edge end there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_clt.arguments import as_choice
from tl_clt.attribution.edges import row_sums, spread
from tl_clt.attribution.nodes import NodeKind, Nodes
from tl_clt.shapes import Adjacency, NodeValues

Definition = Literal["paper", "circuit-tracer"]
SMALLEST_ROW_SUM = 1e-8


class GraphScores(NamedTuple):
    """How much of a graph is explained by features. Never compare across definitions."""

    replacement: float
    """Share of influence that starts at tokens rather than errors."""
    completeness: float
    """Share of inputs, weighted by the receiving node's influence, that come from features or tokens."""


class InfluenceShares(NamedTuple):
    """Share of the influence by where walks end; they sum to 1."""

    token: float
    error: float
    position: float
    bias: float
    unexplored: float
    """At features whose in-edges were not traced."""
    dropped: float = 0.0
    """At edges that a sparse graph does not hold."""


def normalised(adjacency: Adjacency) -> Adjacency:
    """|adjacency| with each row divided by its sum, of a dense adjacency."""
    return adjacency.abs() / row_sums(adjacency).clamp_min(SMALLEST_ROW_SUM)[:, None]


def input_sums(adjacency: Adjacency, dropped: NodeValues | None = None) -> NodeValues:
    """Each node's absolute input, dropped edges included; never quite 0."""
    sums = row_sums(adjacency)
    return (sums if dropped is None else sums + dropped).clamp_min(SMALLEST_ROW_SUM)


def logit_weights(nodes: Nodes, logit_probs: Float[Tensor, " n_logits"]) -> NodeValues:
    """w: the weight of each target node, 0 elsewhere."""
    weights = torch.zeros(len(nodes), dtype=logit_probs.dtype, device=logit_probs.device)
    weights[nodes.where(NodeKind.LOGIT)] = logit_probs
    return weights


def top_down(nodes: Nodes) -> Iterator[Int[Tensor, " n"]]:
    """Nodes with inputs, so that each comes before all that writes to it: targets, then features by layer."""
    yield nodes.where(NodeKind.LOGIT)
    features = nodes.where(NodeKind.FEATURE)
    layers = nodes.layer[features]
    for layer in sorted(layers.unique().tolist(), reverse=True):
        yield features[layers == layer]


def node_influence(
    adjacency: Adjacency, nodes: Nodes, weights: NodeValues, dropped: NodeValues | None = None
) -> NodeValues:
    """w (A + A^2 + ...)."""
    sums = input_sums(adjacency, dropped)
    influence = torch.zeros_like(weights)
    for rows in top_down(nodes):
        influence += spread(adjacency, rows, (influence[rows] + weights[rows]) / sums[rows])
    return influence


def influence_shares(
    adjacency: Adjacency, nodes: Nodes, weights: NodeValues, dropped: NodeValues | None = None
) -> InfluenceShares:
    """Where walks upstream along normalised edges end, by kind."""
    weights = weights / weights.sum()
    influence = node_influence(adjacency, nodes, weights, dropped)
    sums = input_sums(adjacency, dropped)
    ends = influence * (sums <= SMALLEST_ROW_SUM)
    kinds = (NodeKind.TOKEN, NodeKind.ERROR, NodeKind.POSITION, NodeKind.BIAS, NodeKind.FEATURE)
    shares = [float(ends[nodes.is_kind(kind)].sum()) for kind in kinds]
    lost = 0.0 if dropped is None else float(((influence + weights) * dropped / sums).sum())
    whole = sum(shares) + lost or 1.0
    return InfluenceShares(*(share / whole for share in (*shares, lost)))


def graph_scores(
    adjacency: Adjacency,
    nodes: Nodes,
    weights: NodeValues,
    definition: Definition,
    dropped: NodeValues | None = None,
) -> GraphScores:
    """Replacement and completeness.

    replacement = token influence / (token + error influence).
    completeness = sum_t o_t (1 - A[t, errors]) / sum_t o_t with o = influence + w; "paper" sums over nodes that
    have inputs (features and logits), "circuit-tracer" over all, leaves included, which flatters.
    """
    definition = as_choice("definition", definition, get_args(Definition))
    influence = node_influence(adjacency, nodes, weights, dropped)
    errors = nodes.is_kind(NodeKind.ERROR)
    token = influence[nodes.is_kind(NodeKind.TOKEN)].sum()
    error = influence[errors].sum()
    counted = influence + weights
    if definition == "paper":
        counted = counted * nodes.is_kind(NodeKind.FEATURE, NodeKind.LOGIT)
    explained = 1 - row_sums(adjacency, errors) / input_sums(adjacency, dropped)
    tiny = torch.finfo(weights.dtype).tiny
    return GraphScores(
        float(token / (token + error).clamp_min(tiny)),
        float((counted * explained).sum() / counted.sum().clamp_min(tiny)),
    )


def path_length(adjacency: Adjacency, nodes: Nodes, weights: NodeValues, dropped: NodeValues | None = None) -> float:
    """Mean number of edges on a path from a token to a logit, each path weighted by its strength.

    With P_l the tokens' sum of w (A + ... + A^l): sum_l l (P_l - P_{l-1}) / P_inf; 0 where no path leads to a token.
    """
    sums = input_sums(adjacency, dropped)
    tokens = nodes.is_kind(NodeKind.TOKEN)
    every = torch.arange(len(nodes), device=weights.device)
    at, steps, whole, weighted = weights, 0, 0.0, 0.0
    while bool((at > 0).any()):
        at, steps = spread(adjacency, every, at / sums), steps + 1
        arrived = float(at[tokens].sum())
        whole, weighted = whole + arrived, weighted + steps * arrived
    return weighted / whole if whole > 0 else 0.0
