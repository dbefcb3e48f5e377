"""With every layer constrained and all frozen, a change of one node moves every other by the graph's edge, exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.models import Model, tiny_bridge, tiny_clt, tiny_hooked
from tl_clt import AttributionGraph, CrossLayerTranscoder, Intervention, NodeKind, attribute, intervene
from tl_clt.attribution import build_local_model
from tl_clt.interventions import AnyIntervention, DirectionIntervention

MODELS = ["hooked-gpt2", "hooked-llama", "hooked-gemma", "hooked-neox", "bridge-gpt2", "bridge-llama", "bridge-gemma3"]
TOKENS = torch.tensor([0, 7, 19, 4, 33, 50, 21])


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory) -> Model:
    """As users load them: a bridge's norms in Hugging Face's own code, which rounds to float32."""
    kind, family = request.param.split("-")
    if kind == "hooked":
        return tiny_hooked(family, dtype=torch.float64)
    return tiny_bridge(family, tmp_path_factory.mktemp(family), dtype=torch.float64)


def measured_column(model: Model, clt: CrossLayerTranscoder, graph: AttributionGraph, what: AnyIntervention) -> Tensor:
    """The change of each feature's pre-activation and of each logit less the mean logit; 0 for other nodes."""
    effect = intervene(model, clt, graph.tokens, [what], through_layer=clt.cfg.n_layers - 1, freeze="all")
    nodes = graph.nodes
    column = torch.zeros(len(nodes), dtype=graph.adjacency.dtype)
    features, logits = nodes.where(NodeKind.FEATURE), nodes.where(NodeKind.LOGIT)
    hidden = (effect.hidden_pre - effect.baseline_hidden_pre)[0]
    column[features] = hidden[nodes.pos[features], nodes.layer[features], nodes.index[features]]
    change = (effect.logits - effect.baseline_logits)[0, -1]
    column[logits] = change[nodes.index[logits]] - change.mean()
    return column


def doubled(graph: AttributionGraph, node: int, vectors: dict[NodeKind, Tensor]) -> AnyIntervention:
    """The intervention that doubles what a node writes."""
    kind = NodeKind(int(graph.nodes.kind[node]))
    layer, pos, index = (int(x[node]) for x in (graph.nodes.layer, graph.nodes.pos, graph.nodes.index))
    if kind == NodeKind.FEATURE:
        return Intervention(layer=layer, pos=pos, feature=index, scale=2)
    vector = vectors[kind][layer, pos] if kind == NodeKind.ERROR else vectors[kind][pos]
    return DirectionIntervention(layer=layer, pos=pos, vector=vector, add=1)


def vectors_of(model: Model, clt: CrossLayerTranscoder, graph: AttributionGraph) -> dict[NodeKind, Tensor]:
    local = build_local_model(model, clt, graph.tokens, graph.info["bos"])
    vectors = {NodeKind.ERROR: local.errors, NodeKind.TOKEN: local.sites.embed}
    if local.sites.pos_embed is not None:
        vectors[NodeKind.POSITION] = local.sites.pos_embed
    return vectors


@pytest.mark.parametrize("bos", ["error", "features"])
def test_doubling_any_node_moves_every_other_by_its_edge(model: Model, bos):
    clt = tiny_clt(model)
    graph = attribute(model, clt, TOKENS, bos=bos)
    vectors = vectors_of(model, clt, graph)
    kinds = [NodeKind.FEATURE, *vectors]
    sources = torch.nonzero(graph.nodes.is_kind(*kinds)).flatten()
    assert len(sources) > 60
    for node in sources.tolist():
        column = measured_column(model, clt, graph, doubled(graph, node, vectors))
        torch.testing.assert_close(column, graph.adjacency[:, node], rtol=1e-8, atol=1e-8)
