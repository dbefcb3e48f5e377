"""A graph's edges against what changes of its nodes do, measured by `intervene`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tests.models import Model
from tl_clt import AttributionGraph, CrossLayerTranscoder, Intervention, NodeKind, intervene
from tl_clt.attribution import build_local_model
from tl_clt.interventions import AnyIntervention, DirectionIntervention
from tl_clt.lens import norm_map

Vectors = dict[NodeKind, Tensor]
"""What errors [n_layers, pos, d_model], tokens and positions [pos, d_model] write into the residual stream."""
ROWS = 64
"""Interventions that are measured in one pass, each in a row of its own; as few as keep logits below 64 MB."""
LOGITS = 2**24


def measured_columns(
    model: Model, clt: CrossLayerTranscoder, graph: AttributionGraph, whats: Sequence[AnyIntervention]
) -> Tensor:
    """What each intervention changes by itself, [node, intervention]: the pre-activation of each traced feature and
    of each logit less the mean logit; 0 for other nodes."""
    rows = min(ROWS, max(1, LOGITS // (len(graph.tokens) * model.cfg.d_vocab)))
    parts = [_measured_together(model, clt, graph, whats[i : i + rows]) for i in range(0, len(whats), rows)]
    return torch.cat(parts, dim=1)


def _measured_together(
    model: Model, clt: CrossLayerTranscoder, graph: AttributionGraph, whats: Sequence[AnyIntervention]
) -> Tensor:
    tokens = graph.tokens.expand(len(whats), -1)
    whats = [replace(what, prompt=row) for row, what in enumerate(whats)]
    through, bos = clt.cfg.n_layers - 1, graph.info["bos"]
    effect = intervene(model, clt, tokens, whats, through_layer=through, freeze="all", bos=bos)
    nodes = graph.nodes
    columns = torch.zeros(len(nodes), len(whats), dtype=graph.adjacency.dtype)
    features, logits = nodes.where(NodeKind.FEATURE), nodes.where(NodeKind.LOGIT)
    features = features[graph.expanded[features]]
    hidden = effect.hidden_pre - effect.baseline_hidden_pre
    columns[features] = hidden[:, nodes.pos[features], nodes.layer[features], nodes.index[features]].T
    change = (effect.logits - effect.baseline_logits)[:, -1]
    columns[logits] = (change[:, nodes.index[logits]] - change.mean(dim=-1, keepdim=True)).T
    return columns


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
    sample = _sample(graph, vectors, every)
    columns = measured_columns(model, clt, graph, [increased(graph, node, vectors) for node in sample])
    for node, column in zip(sample, columns.T, strict=True):
        expected = graph.adjacency[:, node]
        torch.testing.assert_close(column, expected, rtol=0, atol=tolerance * max(1.0, float(expected.abs().max())))


def assert_edges_are_effects_in_float32(
    model: Model, clt: CrossLayerTranscoder, graph: AttributionGraph, *, every: int, tolerance: float = 1e-3
) -> None:
    """As above, relative to a node's largest edge however small it is.

    Logits of 20 are rounded to 2e-6, and many edges are of that size. So each node is increased not to twice, but by
    as much as moves something by 1: everything is linear.
    """
    vectors = vectors_of(model, clt, graph)
    sample = _sample(graph, vectors, every)
    largest = graph.adjacency[:, sample].abs().amax(dim=0).tolist()
    times = [1 / most if most > 0 else 1.0 for most in largest]
    whats = [increased(graph, node, vectors, by) for node, by in zip(sample, times, strict=True)]
    columns = measured_columns(model, clt, graph, whats)
    for node, by, column in zip(sample, times, columns.T, strict=True):
        torch.testing.assert_close(column, graph.adjacency[:, node] * by, rtol=0, atol=tolerance)


def _sample(graph: AttributionGraph, vectors: Vectors, every: int) -> list[int]:
    """Every so many features, errors, tokens and positions, at least three of each kind."""
    sample = []
    for kind in (NodeKind.FEATURE, *vectors):
        nodes = graph.nodes.where(kind).tolist()
        sample += nodes[:: min(every, max(1, len(nodes) // 3))]
    assert len(sample) >= 10
    return sample
