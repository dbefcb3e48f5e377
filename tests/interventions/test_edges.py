"""With every layer constrained and all frozen, a change of one node moves every other by the graph's edge, exactly."""

from __future__ import annotations

import pytest
import torch

from tests.interventions.edges import (
    assert_edges_are_effects,
    assert_edges_are_effects_in_float32,
    increased,
    measured_column,
)
from tests.models import Model, tiny_bridge, tiny_clt, tiny_hooked
from tl_clt import Intervention, NodeKind, attribute, intervene, load_organism

MODELS = ["hooked-gpt2", "hooked-llama", "hooked-gemma", "hooked-neox", "bridge-gpt2", "bridge-llama", "bridge-gemma3"]
TOKENS = torch.tensor([0, 7, 19, 4, 33, 50, 21])


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory) -> Model:
    """As users load them: a bridge's norms in Hugging Face's own code, which rounds to float32."""
    kind, family = request.param.split("-")
    if kind == "hooked":
        return tiny_hooked(family, dtype=torch.float64)
    return tiny_bridge(family, tmp_path_factory.mktemp(family), dtype=torch.float64)


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
def test_edges_are_effects_for_every_kind_of_clt(one_of_each: Model, options: dict):
    bos = options.get("bos", "error")
    clt = tiny_clt(one_of_each, **{k: v for k, v in options.items() if k != "bos"})
    assert_edges_are_effects(one_of_each, clt, attribute(one_of_each, clt, TOKENS, bos=bos), every=3)


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
    members = [increased(graph, node, {}) for node in nodes]
    effect = intervene(model, clt, TOKENS, members, through_layer=2, freeze="all")
    change = (effect.logits - effect.baseline_logits)[0, -1]
    logits = graph.nodes.where(NodeKind.LOGIT)
    measured = change[graph.nodes.index[logits]] - change.mean()
    torch.testing.assert_close(measured, graph.adjacency[logits][:, nodes].sum(dim=1), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
def test_on_atlas(backend: str):
    model, clt = load_organism("atlas", backend=backend)
    graph = attribute(model, clt, "Fact: the capital of the state containing Dallas is", progress=False)
    assert_edges_are_effects_in_float32(model, clt, graph, every=len(graph.nodes) // 40)
