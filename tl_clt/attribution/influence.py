"""Influence, pruning and scores (Methods, "Graph Pruning" and "Evaluating Graphs").

A = |adjacency| with each row divided by its sum; influence = w (A + A^2 + ...) with w the logit probabilities
on the logit nodes. The graph has no cycles, so the series ends.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_clt.attribution.nodes import NodeKind, Nodes
from tl_clt.errors import ConfigError
from tl_clt.shapes import Adjacency, NodeMask, NodeValues

Definition = Literal["paper", "circuit-tracer"]
SMALLEST_ROW_SUM = 1e-8


class GraphScores(NamedTuple):
    """How much of a graph is explained by features. Never compare across definitions."""

    replacement: float
    """Share of influence that starts at tokens rather than errors."""
    completeness: float
    """Share of inputs, weighted by the receiving node's influence, that come from features or tokens."""


class InfluenceShares(NamedTuple):
    """Share of the influence that starts at each kind of node without inputs; they sum to 1."""

    token: float
    error: float
    position: float
    bias: float
    unexplored: float
    """At features whose in-edges were not traced."""


class PruneMasks(NamedTuple):
    """What pruning keeps."""

    nodes: NodeMask
    edges: Bool[Tensor, "n_nodes n_nodes"]


def normalised(adjacency: Adjacency) -> Adjacency:
    """|adjacency| with each row divided by its sum."""
    absolute = adjacency.abs()
    return absolute / absolute.sum(dim=1, keepdim=True).clamp_min(SMALLEST_ROW_SUM)


def logit_weights(nodes: Nodes, logit_probs: Float[Tensor, " n_logits"]) -> NodeValues:
    """w: the probability of each logit node, 0 elsewhere."""
    weights = torch.zeros(len(nodes), dtype=logit_probs.dtype, device=logit_probs.device)
    weights[nodes.where(NodeKind.LOGIT)] = logit_probs
    return weights


def node_influence(A: Adjacency, weights: NodeValues) -> NodeValues:
    """w (A + A^2 + ...) of a row-normalised adjacency."""
    total, step = torch.zeros_like(weights), weights
    while True:
        step = step @ A
        if not step.any():
            return total
        total = total + step


def influence_shares(adjacency: Adjacency, nodes: Nodes, weights: NodeValues) -> InfluenceShares:
    """Where walks upstream along normalised edges end, by kind."""
    A = normalised(adjacency)
    influence = node_influence(A, weights / weights.sum())
    ends = influence * ~adjacency.any(dim=1)
    kinds = (NodeKind.TOKEN, NodeKind.ERROR, NodeKind.POSITION, NodeKind.BIAS, NodeKind.FEATURE)
    sums = [float(ends[nodes.is_kind(kind)].sum()) for kind in kinds]
    whole = sum(sums) or 1.0
    return InfluenceShares(*(s / whole for s in sums))


def graph_scores(adjacency: Adjacency, nodes: Nodes, weights: NodeValues, definition: Definition) -> GraphScores:
    """Replacement and completeness.

    replacement = token influence / (token + error influence).
    completeness = sum_t o_t (1 - A[t, errors]) / sum_t o_t with o = influence + w; "paper" sums over nodes that
    have inputs (features and logits), "circuit-tracer" over all, leaves included, which flatters.
    """
    if definition not in ("paper", "circuit-tracer"):
        raise ConfigError(f"definition is {definition!r}: give 'paper' or 'circuit-tracer'.")
    A = normalised(adjacency)
    influence = node_influence(A, weights)
    token = influence[nodes.is_kind(NodeKind.TOKEN)].sum()
    error = influence[nodes.is_kind(NodeKind.ERROR)].sum()
    counted = influence + weights
    if definition == "paper":
        counted = counted * nodes.is_kind(NodeKind.FEATURE, NodeKind.LOGIT)
    explained = 1 - A[:, nodes.is_kind(NodeKind.ERROR)].sum(dim=1)
    tiny = torch.finfo(weights.dtype).tiny
    return GraphScores(
        float(token / (token + error).clamp_min(tiny)),
        float((counted * explained).sum() / counted.sum().clamp_min(tiny)),
    )


def prune_masks(
    adjacency: Adjacency,
    nodes: Nodes,
    weights: NodeValues,
    node_threshold: float = 0.8,
    edge_threshold: float = 0.98,
) -> PruneMasks:
    """The most influential nodes up to a share of all influence, then the strongest edges up to a share.

    Tokens and logits always stay. An edge's score is A[t, s] * (influence[t] + w[t]) among the nodes kept.
    Then features without an in- or out-edge go, and other nodes without an out-edge, until nothing changes.

    Raises:
        ConfigError: a threshold is not between 0 and 1.
    """
    for name, value in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold)):
        if not 0 < value <= 1:
            raise ConfigError(f"{name} is {value}: give a share, more than 0 and at most 1.")
    influence = node_influence(normalised(adjacency), weights)
    stays = nodes.is_kind(NodeKind.TOKEN, NodeKind.LOGIT)
    kept = (influence >= _smallest_of_share(influence, node_threshold)) | stays
    left = adjacency * kept[:, None] * kept[None, :]
    A = normalised(left)
    scores = A * (node_influence(A, weights) + weights)[:, None]
    edges = scores >= _smallest_of_share(scores.flatten(), edge_threshold)
    features = nodes.is_kind(NodeKind.FEATURE)
    while True:
        edges &= kept[:, None] & kept[None, :]
        still = kept & (edges.any(dim=0) | stays) & (edges.any(dim=1) | ~features)
        if bool((still == kept).all()):
            return PruneMasks(kept, edges)
        kept = still


def _smallest_of_share(values: Float[Tensor, " n"], share: float) -> Float[Tensor, ""]:
    """The smallest of the largest values that together make up a share of the sum."""
    ordered = values.sort(descending=True).values
    running = ordered.cumsum(dim=0) / ordered.sum().clamp_min(torch.finfo(values.dtype).tiny)
    at = torch.searchsorted(running, share)
    return ordered[min(int(at), len(ordered) - 1)]
