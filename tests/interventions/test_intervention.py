"""Interventions as values: of a graph's node, equal and with a hash; and the same words everywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from tests.models import random_tokens, tiny_clt, tiny_hooked
from tl_clt import Intervention, NodeKind, attribute, intervene, intervention_hooks, sweep_strength
from tl_clt.errors import CLTMismatch, InterventionError


@pytest.fixture(scope="module")
def model():
    return tiny_hooked("gpt2")


@pytest.fixture(scope="module")
def clt(model):
    return tiny_clt(model)


@pytest.fixture(scope="module")
def prompt(model):
    return random_tokens(model)[0]


@pytest.fixture(scope="module")
def graph(model, clt, prompt):
    return attribute(model, clt, prompt, progress=False)


@dataclass
class Node:
    """What a single node of a graph has."""

    kind: Any
    layer: Any
    pos: Any
    index: Any


def test_a_feature_node_is_ablated_where_it_is(graph):
    number = int(graph.nodes.where(NodeKind.FEATURE)[7])
    at = [int(values[number]) for values in (graph.nodes.layer, graph.nodes.pos, graph.nodes.index)]
    wanted = Intervention(layer=at[0], pos=at[1], feature=at[2], scale=0)
    forms = (number, np.int64(number), torch.tensor(number), number - len(graph.nodes))
    nodes = (Node(NodeKind.FEATURE, *at), Node("feature", *(torch.tensor(n) for n in at)), Node(0, *at))
    for node in (*forms, *nodes):
        assert Intervention.of(graph, node) == wanted
    assert Intervention.of(graph, number, -2, prompt=1) == Intervention(
        layer=at[0], pos=at[1], feature=at[2], scale=-2, prompt=1
    )


def test_its_effect_is_the_graphs_edge(graph, model, clt, prompt):
    """Doubled, with all else held, a feature moves each logit by its edge (Methods, "Constrained patching")."""
    number = int(graph.nodes.where(NodeKind.FEATURE)[0])
    effect = intervene(model, clt, prompt, Intervention.of(graph, number, 2), through_layer="all", freeze="all")
    change = (effect.logits - effect.baseline_logits)[0, -1]
    targets = graph.nodes.where(NodeKind.LOGIT)
    measured = (change - change.mean())[graph.nodes.index[targets]]
    expected = graph.adjacency[targets, number]
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(measured, expected, rtol=1e-9, atol=1e-10)


def test_a_feature_of_another_clts_graph_is_refused(graph, model, clt, prompt):
    """Of the same shape, its number means another feature."""
    number = int(graph.nodes.where(NodeKind.FEATURE)[0])
    other = tiny_clt(model, seed=1)
    with pytest.raises(CLTMismatch, match="made from a graph of another CLT"):
        intervene(model, other, prompt, Intervention.of(graph, number))
    node = graph.nodes[number]
    intervene(model, other, prompt, Intervention(layer=node.layer, pos=node.pos, feature=node.index, scale=0))
    with torch.no_grad():
        clt.b_enc[0, 0] += 1
    try:
        with pytest.raises(CLTMismatch):
            intervene(model, clt, prompt, Intervention.of(graph, number))
    finally:
        with torch.no_grad():
            clt.b_enc[0, 0] -= 1


def test_a_negative_deviation_of_noise_is_refused():
    with pytest.raises(InterventionError, match="noise is -3: give a standard deviation"):
        Intervention(layer=0, feature=0, noise=-3)


@pytest.mark.parametrize("kind", [kind for kind in NodeKind if kind != NodeKind.FEATURE])
def test_other_nodes_are_refused_by_name(graph, kind):
    number = int(graph.nodes.where(kind)[0])
    for node in (number, Node(kind, 0, 0, 0), Node(kind.name.lower(), 0, 0, 0)):
        with pytest.raises(InterventionError, match=f"is of kind {kind.name.lower()}, and only features"):
            Intervention.of(graph, node)


@pytest.mark.usefixtures("as_users_run_it")
def test_what_is_no_node_is_refused(graph):
    n_nodes = len(graph.nodes)
    for node in (n_nodes, -n_nodes - 1, 1.5, True, None, "feature", (0, 1, 2)):
        with pytest.raises(InterventionError, match="node is .*: give"):
            Intervention.of(graph, node)
    with pytest.raises(InterventionError, match="give an AttributionGraph"):
        Intervention.of(None, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "given",
    [
        {"pos": [1, 2], "feature": [3, 4], "value": [1.0, 2.0]},
        {"pos": slice(1, None), "feature": 3, "scale": 0},
        {"pos": None, "feature": range(3), "add": 1},
        {"pos": -1, "feature": 2, "noise": 0.5},
    ],
    ids=str,
)
def test_equal_interventions_have_one_hash(given):
    one, same = (Intervention(layer=1, **given) for _ in range(2))
    assert one == same and hash(one) == hash(same) and len({one, same}) == 1
    other = Intervention(layer=2, **given)
    assert other != one and len({one, other}) == 2


def test_whole_and_floating_amounts_that_are_equal_have_one_hash():
    assert hash(Intervention(layer=1, feature=2, value=1)) == hash(Intervention(layer=1, feature=2, value=1.0))


def test_all_layers_are_those_up_to_the_last(model, clt, prompt):
    what = Intervention(layer=0, pos=2, feature=3, value=20)
    whole, last = (intervene(model, clt, prompt, what, through_layer=t).logits for t in ("all", clt.cfg.n_layers - 1))
    assert torch.equal(whole, last)
    assert not torch.allclose(whole, intervene(model, clt, prompt, what).logits)
    names = [[name for name, _ in intervention_hooks(model, clt, prompt, what, t)] for t in ("all", 2)]
    assert names[0] == names[1]
    swept = [
        sweep_strength(model, clt, prompt, what, [0.5], [5], through_layer=t, progress=False).table for t in ("all", 2)
    ]
    assert swept[0].equals(swept[1])


@pytest.mark.usefixtures("as_users_run_it")
def test_other_words_for_layers_are_refused(model, clt, prompt):
    for word in ("every", "ALL", "2", ""):
        with pytest.raises(InterventionError, match="through_layer is '.*': give one of all"):
            intervene(model, clt, prompt, [], word)
