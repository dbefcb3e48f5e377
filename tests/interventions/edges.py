"""A graph's edges against what changes of its nodes do, measured by `intervene`."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.models import Model
from tl_clt import AttributionGraph, CrossLayerTranscoder, Intervention, NodeKind, intervene
from tl_clt.attribution import build_local_model
from tl_clt.interventions import AnyIntervention, DirectionIntervention
from tl_clt.lens import norm_map

Vectors = dict[NodeKind, Tensor]
"""What errors [n_layers, pos, d_model], tokens and positions [pos, d_model] write into the residual stream."""


def measured_column(model: Model, clt: CrossLayerTranscoder, graph: AttributionGraph, what: AnyIntervention) -> Tensor:
    """The change of each traced feature's pre-activation and of each logit less the mean logit; 0 for other nodes."""
    through, bos = clt.cfg.n_layers - 1, graph.info["bos"]
    effect = intervene(model, clt, graph.tokens, [what], through_layer=through, freeze="all", bos=bos)
    nodes = graph.nodes
    column = torch.zeros(len(nodes), dtype=graph.adjacency.dtype)
    features, logits = nodes.where(NodeKind.FEATURE), nodes.where(NodeKind.LOGIT)
    features = features[graph.expanded[features]]
    hidden = (effect.hidden_pre - effect.baseline_hidden_pre)[0]
    column[features] = hidden[nodes.pos[features], nodes.layer[features], nodes.index[features]]
    change = (effect.logits - effect.baseline_logits)[0, -1]
    column[logits] = change[nodes.index[logits]] - change.mean()
    return column


def increased(graph: AttributionGraph, node: int, vectors: Vectors, by: float = 1.0) -> AnyIntervention:
    """The intervention that adds to what a node writes the same once more (doubles it), or `by` times."""
    kind = NodeKind(int(graph.nodes.kind[node]))
    layer, pos, index = (int(x[node]) for x in (graph.nodes.layer, graph.nodes.pos, graph.nodes.index))
    if kind == NodeKind.FEATURE:
        return Intervention(layer=layer, pos=pos, feature=index, scale=1 + by)
    vector = vectors[kind][layer, pos] if kind == NodeKind.ERROR else vectors[kind][pos]
    return DirectionIntervention(layer=layer, pos=pos, vector=vector, add=by)


def vectors_of(model: Model, clt: CrossLayerTranscoder, graph: AttributionGraph) -> Vectors:
    local = build_local_model(model, clt, graph.tokens, graph.info["bos"])
    errors = local.errors
    if clt.cfg.output_hook == "mlp.hook_out" and "blocks.0.ln2_post.hook_scale" in local.frozen:
        # The residual stream gets what the norm behind the MLP makes of an error.
        gains = torch.stack([norm_map(model, f"blocks.{t}.ln2_post").gain for t in clt.layers])
        scales = torch.stack([local.frozen[f"blocks.{t}.ln2_post.hook_scale"][0] for t in clt.layers])
        errors = errors * gains[:, None] / scales
    vectors = {NodeKind.ERROR: errors, NodeKind.TOKEN: local.written.embed}
    if local.written.pos_embed is not None:
        vectors[NodeKind.POSITION] = local.written.pos_embed
    return vectors


def assert_edges_are_effects(
    model: Model, clt: CrossLayerTranscoder, graph: AttributionGraph, *, every: int = 1, tolerance: float = 1e-8
) -> None:
    """For each (or every so many) feature, error, token and position node: doubling it moves all others by its edges.

    The tolerance is relative to a node's largest edge, if that is above 1.
    """
    vectors = vectors_of(model, clt, graph)
    for node in _sample(graph, vectors, every):
        expected = graph.adjacency[:, node]
        column = measured_column(model, clt, graph, increased(graph, node, vectors))
        torch.testing.assert_close(column, expected, rtol=0, atol=tolerance * max(1.0, float(expected.abs().max())))


def assert_edges_are_effects_in_float32(
    model: Model, clt: CrossLayerTranscoder, graph: AttributionGraph, *, every: int, tolerance: float = 1e-3
) -> None:
    """As above, relative to a node's largest edge however small it is.

    Logits of 20 are rounded to 2e-6, and many edges are of that size. So each node is increased not to twice, but by
    as much as moves something by 1: everything is linear.
    """
    vectors = vectors_of(model, clt, graph)
    for node in _sample(graph, vectors, every):
        edges = graph.adjacency[:, node]
        largest = float(edges.abs().max())
        by = 1 / largest if largest > 0 else 1.0
        column = measured_column(model, clt, graph, increased(graph, node, vectors, by))
        torch.testing.assert_close(column, edges * by, rtol=0, atol=tolerance)


def _sample(graph: AttributionGraph, vectors: Vectors, every: int) -> list[int]:
    """Every so many features, errors, tokens and positions, at least three of each kind."""
    sample = []
    for kind in (NodeKind.FEATURE, *vectors):
        nodes = graph.nodes.where(kind).tolist()
        sample += nodes[:: min(every, max(1, len(nodes) // 3))]
    assert len(sample) >= 10
    return sample
