"""With every layer constrained and all frozen, a change of one node moves every other by the graph's edge, exactly."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from tests.interventions.edges import (
    assert_edges_are_effects,
    assert_edges_are_effects_in_float32,
    increased,
    measured_columns,
    vectors_of,
)
from tests.models import Model, tiny_bridge, tiny_clt, tiny_hooked
from tl_clt import Intervention, NodeKind, attach, attribute, intervene, load_organism
from tl_clt.attribution.local import Bos
from tl_clt.errors import ConfigError
from tl_clt.interventions import DirectionIntervention

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


@pytest.mark.parametrize("bos", get_args(Bos))
def test_a_skip_connection_at_position_0_is_that_of_the_graph(one_of_each: Model, bos: Bos):
    clt = tiny_clt(one_of_each, skip=True)
    graph = attribute(one_of_each, clt, TOKENS, bos=bos)
    vectors = vectors_of(one_of_each, clt, graph)
    nodes = graph.nodes
    kinds = (NodeKind.FEATURE, NodeKind.TOKEN, *([NodeKind.POSITION] if NodeKind.POSITION in vectors else []))
    at_first = torch.nonzero(nodes.is_kind(*kinds) & (nodes.pos == 0)).flatten().tolist()
    assert (NodeKind.FEATURE in nodes.kind[at_first]) == (bos == "features")
    whats = [increased(graph, node, vectors) for node in at_first]
    columns = measured_columns(one_of_each, clt, graph, whats)
    for node, what, measured in zip(at_first, whats, columns.T, strict=True):
        expected = graph.adjacency[:, node]
        # As assert_edges_are_effects has it.
        allowed = 1e-8 * max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(measured, expected, rtol=0, atol=allowed)
        # Left out, bos is that of the graphs that have such a node, or attribute's own.
        if bos == ("features" if nodes.kind[node] == NodeKind.FEATURE else "error"):
            effect, told = (
                intervene(one_of_each, clt, TOKENS, [what], through_layer=2, freeze="all", bos=given)
                for given in (None, bos)
            )
            assert torch.equal(effect.logits, told.logits)
    token = int(nodes.where(NodeKind.TOKEN)[0])
    other = attribute(one_of_each, clt, TOKENS, bos="drop" if bos == "error" else "error")
    theirs = other.adjacency[other.nodes.where(NodeKind.LOGIT), int(other.nodes.where(NodeKind.TOKEN)[0])]
    assert not torch.allclose(theirs, graph.adjacency[nodes.where(NodeKind.LOGIT), token])


@pytest.mark.parametrize("span", [1, 3])
def test_in_the_iterative_kind_a_skip_connection_stands_at_every_position_as_within_attach(one_of_each: Model, span):
    clt = tiny_clt(one_of_each, skip=True, span=span)
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(clt.cfg.d_model, generator=generator, dtype=torch.float64)
    what = DirectionIntervention(layer=-1, pos=0, vector=vector, add=1.0)
    effect = intervene(one_of_each, clt, TOKENS, [what], freeze="none")

    def add(x, hook):
        x = x.clone()
        x[:, 0] += vector
        return x

    with attach(one_of_each, clt, mode="replace_with_error"):
        logits = one_of_each.run_with_hooks(TOKENS[None], fwd_hooks=[("blocks.0.hook_resid_pre", add)])
    # The same sums in another order, through three blocks.
    torch.testing.assert_close(effect.logits, logits, rtol=1e-9, atol=1e-9)
    for bos in ("error", "drop"):
        with pytest.raises(ConfigError, match="is for the constrained kind.*Give through_layer"):
            intervene(one_of_each, clt, TOKENS, [what], bos=bos)


@pytest.mark.parametrize("amount", [{"scale": 0}, {"scale": -1}, {"value": 3.5}, {"add": -2.0}], ids=str)
def test_any_change_of_a_feature_acts_in_proportion(one_of_each: Model, amount: dict):
    """The effect is the edge times the relative change of the activation."""
    clt = tiny_clt(one_of_each)
    graph = attribute(one_of_each, clt, TOKENS)
    ((how, by),) = amount.items()
    nodes = graph.nodes
    sample = nodes.where(NodeKind.FEATURE)[::9].tolist()
    places = [(int(nodes.layer[n]), int(nodes.pos[n]), int(nodes.index[n])) for n in sample]
    whats = [Intervention(layer=layer, pos=pos, feature=feature, **amount) for layer, pos, feature in places]
    for node, column in zip(sample, measured_columns(one_of_each, clt, graph, whats).T, strict=True):
        act = float(nodes.activation[node])
        new = {"scale": by * act, "value": by, "add": act + by}[how]
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
