"""With every layer constrained and all frozen, a change of one node moves every other by the graph's edge, exactly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.models import Model, tiny_bridge, tiny_clt, tiny_hooked
from tl_clt import AttributionGraph, CrossLayerTranscoder, Intervention, NodeKind, attribute, intervene, load_organism
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


def assert_edges_are_effects(
    model: Model, clt: CrossLayerTranscoder, graph: AttributionGraph, *, every: int = 1, tolerance: float = 1e-8
) -> None:
    """For each (or every so many) feature, error, token and position node. The tolerance is relative to the largest
    effect of a node."""
    vectors = vectors_of(model, clt, graph)
    sources = torch.nonzero(graph.nodes.is_kind(NodeKind.FEATURE, *vectors)).flatten()[::every].tolist()
    assert len(sources) >= 12
    for node in sources:
        column = measured_column(model, clt, graph, doubled(graph, node, vectors))
        expected = graph.adjacency[:, node]
        allowed = tolerance * max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(column, expected, rtol=0, atol=allowed)


def test_doubling_any_node_moves_every_other_by_its_edge(model: Model):
    clt = tiny_clt(model)
    graph = attribute(model, clt, TOKENS)
    assert len(graph.nodes.where(NodeKind.FEATURE)) > 40
    assert_edges_are_effects(model, clt, graph)


@pytest.mark.parametrize(
    "options",
    [{"bos": "features"}, {"span": 1}, {"skip": True}, {"activation": "topk"}, {"input_hook": "ln2.hook_normalized"}],
    ids=str,
)
def test_edges_are_effects_for_every_kind_of_clt(model: Model, options: dict):
    bos = options.get("bos", "error")
    clt = tiny_clt(model, **{k: v for k, v in options.items() if k != "bos"})
    assert_edges_are_effects(model, clt, attribute(model, clt, TOKENS, bos=bos), every=8)


@pytest.mark.parametrize("amount", [{"scale": 0}, {"scale": -1}, {"value": 3.5}, {"add": -2.0}], ids=str)
def test_any_change_of_a_feature_acts_in_proportion(one_of_each: Model, amount: dict):
    """The effect is the edge times the relative change of the activation."""
    clt = tiny_clt(one_of_each)
    graph = attribute(one_of_each, clt, TOKENS)
    ((how, by),) = amount.items()
    for node in graph.nodes.where(NodeKind.FEATURE)[::9].tolist():
        layer, pos, feature = (int(x[node]) for x in (graph.nodes.layer, graph.nodes.pos, graph.nodes.index))
        act = float(graph.nodes.activation[node])
        new = {"scale": by * act, "value": by, "add": act + by}[how]
        what = Intervention(layer=layer, pos=pos, feature=feature, **amount)
        column = measured_column(one_of_each, clt, graph, what)
        expected = graph.adjacency[:, node] * (new / act - 1)
        torch.testing.assert_close(column, expected, rtol=1e-8, atol=1e-8)


def test_effects_of_nodes_add_up(model: Model):
    """Everything is linear: a supernode's effect is the sum of its members', over layers and positions."""
    clt = tiny_clt(model)
    graph = attribute(model, clt, TOKENS)
    nodes = graph.nodes.where(NodeKind.FEATURE)[::4].tolist()
    members = [doubled(graph, node, {}) for node in nodes]
    effect = intervene(model, clt, TOKENS, members, through_layer=2, freeze="all")
    change = (effect.logits - effect.baseline_logits)[0, -1]
    logits = graph.nodes.where(NodeKind.LOGIT)
    measured = change[graph.nodes.index[logits]] - change.mean()
    torch.testing.assert_close(measured, graph.adjacency[logits][:, nodes].sum(dim=1), rtol=1e-8, atol=1e-8)


def test_on_atlas(as_users_run_it):
    """A sample, float32: a thousandth of each node's largest effect."""
    model, clt = load_organism("atlas")
    graph = attribute(model, clt, "Fact: the capital of the state containing Dallas is", progress=False)
    assert_edges_are_effects(model, clt, graph, every=max(1, len(graph.nodes) // 40), tolerance=1e-3)
