"""What a graph predicts of changes of its features: through direct edges, through all paths, as influence."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_clt.attribution import AttributionGraph, NodeKind
from tl_clt.attribution.influence import sum_inputs, top_down
from tl_clt.shapes import NodeValues

Nodes = Int[Tensor, " n_sources"]
ByNode = Float[Tensor, "n_nodes n_sources"]
ROWS_AT_ONCE = 256
"""Rows of the graph that are dense in memory at a time."""


class Predictions(NamedTuple):
    """Of each source node, on every node. Rows of nodes that were not traced are 0."""

    edge: ByNode
    """E[t, s]: the direct edge, which is how much t falls when s is ablated and nothing between them reacts."""
    total: ByNode
    """T[t, s] = E[t, s] + sum_u E[t, u] / act_u T[u, s] over traced features u: the same where the features between
    react in proportion, none switches on or off, and attention and norms stay."""
    influence: ByNode
    """B[t, s], with B = A + A^2 + ... and A the |edges| as shares of each node's input: how often a walk upstream from
    t visits s. The nodes' influence is w B with w the logit probabilities."""


def predict(graph: AttributionGraph, sources: Nodes) -> Predictions:
    """The three predictions, by one pass from the bottom layer up each."""
    nodes = graph.nodes
    features = nodes.is_kind(NodeKind.FEATURE) & (nodes.activation != 0)
    per_unit = torch.where(features, 1 / torch.where(features, nodes.activation, 1), 0).to(graph.adjacency.dtype)
    everything = torch.ones_like(per_unit)
    share = 1 / sum_inputs(graph)
    return Predictions(
        _carried(graph, sources, everything, torch.zeros_like(per_unit)),
        _carried(graph, sources, everything, per_unit),
        _carried(graph, sources, share, everything, absolute=True),
    )


def _carried(
    graph: AttributionGraph, sources: Nodes, scale: NodeValues, through: NodeValues, absolute: bool = False
) -> ByNode:
    """X[t] = scale_t (E[t, sources] + sum_u E[t, u] through_u X[u]), or with |E|."""
    found = graph.adjacency.new_zeros(len(graph.nodes), len(sources), layout=torch.strided)
    for layer in reversed(list(top_down(graph.nodes))):
        for rows in layer.split(ROWS_AT_ONCE):
            edges = torch.stack([graph.in_edges(int(row)) for row in rows])
            edges = (edges.abs() if absolute else edges) * scale[rows, None]
            found[rows] = edges[:, sources] + (edges * through) @ found
    return found
