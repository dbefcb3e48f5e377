"""What a user does with a graph: single nodes, tables, the most influential nodes, what a notebook shows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.attribution.helpers import TOKENS, hold_strongest
from tl_clt import AttributionGraph, NodeKind, attribute
from tl_clt.attribution import DifferenceTarget, DirectionTarget, Node, TokenTarget
from tl_clt.errors import ConfigError, NodeNotFound


def test_one_node_has_the_values_that_the_tensors_have(graph):
    nodes = graph.nodes
    assert len(nodes) == len(nodes.kind) == len(list(nodes))
    for i, node in enumerate(nodes):
        assert (node.kind, node.layer, node.pos, node.index) == tuple(
            int(values[i]) for values in (nodes.kind, nodes.layer, nodes.pos, nodes.index)
        )
        assert node.activation == float(nodes.activation[i])
        assert isinstance(node.kind, NodeKind) and node.number == i
    assert nodes[-1] == nodes[len(nodes) - 1] and nodes[-1].kind == NodeKind.LOGIT
    assert nodes[2:5] == [nodes[2], nodes[3], nodes[4]]
    for number in (np.int64(3), torch.tensor(3)):
        assert nodes[number] == nodes[3]
    assert len({nodes[0], nodes[0], nodes[1]}) == 2


@pytest.mark.usefixtures("as_users_run_it")
def test_a_node_that_is_not_there_is_an_index_error(graph):
    n = len(graph.nodes)
    for number in (n, -n - 1):
        with pytest.raises(IndexError, match=f"The number of a node is {number}: give {-n} to {n - 1}"):
            graph.nodes[number]
    for number in ("0", 1.0, True, None):
        with pytest.raises(NodeNotFound, match="give a whole number"):
            graph.nodes[number]
    for ask in (graph.in_edges, graph.out_edges, graph.inputs, graph.outputs, graph.input_shares):
        with pytest.raises(IndexError, match=f"node is {n}"):
            ask(n)


def test_labels_name_kind_place_and_token(graph):
    labels = {kind: graph.nodes[int(graph.nodes.where(kind)[-1])].label for kind in NodeKind}
    assert labels[NodeKind.TOKEN] == 'token "#21"'
    assert labels[NodeKind.ERROR] == 'error of MLP 2 at "#21"'
    assert labels[NodeKind.BIAS] == "biases of the output"
    assert labels[NodeKind.POSITION] == "position 6"
    assert labels[NodeKind.LOGIT] == f'output "{graph.logit_tokens[-1]}", probability {graph.logit_probs[-1]:.3f}'
    feature = graph.nodes[0]
    assert feature.label == f'feature {feature.layer}.{feature.index} at "#{int(TOKENS[feature.pos])}"'


def test_what_is_no_token_has_no_probability_in_its_label(model, clt, tmp_path):
    ones = DirectionTarget(torch.ones(model.cfg.d_model), "blocks.1.hook_resid_post")
    targets = [TokenTarget(3), DifferenceTarget(3, 5), ones]
    traced = attribute(model, clt, TOKENS, targets=targets)
    for graph in (traced, AttributionGraph.load(traced.save(tmp_path / "graph.safetensors"))):
        labels = [graph.nodes[int(i)].label for i in graph.nodes.where(NodeKind.LOGIT)]
        assert ", probability 0." in labels[0]
        assert not any("probability" in label for label in labels[1:])


def test_labels_stay_with_their_nodes(graph):
    pruned = graph.prune()
    whole = {(n.kind, n.layer, n.pos, n.index): n.label for n in graph.nodes}
    assert all(whole[n.kind, n.layer, n.pos, n.index] == n.label for n in pruned.nodes)
    ends = graph.nodes.take(graph.nodes.where(NodeKind.LOGIT))
    assert [n.label for n in ends] == [n.label for n in graph.nodes if n.kind == NodeKind.LOGIT]
    assert [n.number for n in ends] == list(range(len(ends)))


REDUCED = {
    "whole": lambda g: g,
    "pruned": lambda g: g.prune(),
    "sparse": lambda g: hold_strongest(g, 0.9),
    "sparse, pruned": lambda g: hold_strongest(g, 0.9).prune(0.6, 0.8),
}


@pytest.mark.parametrize("how", REDUCED)
def test_tables_hold_every_node_and_every_edge(graph, how):
    part = REDUCED[how](graph)
    nodes, edges = part.to_pandas()
    assert len(nodes) == len(part.nodes) and len(edges) == part.n_edges > 0
    dense = torch.zeros(len(nodes), len(nodes), dtype=torch.float64)
    source, target = (torch.tensor(edges[name].to_numpy()) for name in ("source", "target"))
    dense[target, source] = torch.tensor(edges["weight"].to_numpy())
    assert torch.equal(dense, part.adjacency.to_dense())
    assert (edges["weight"] != 0).all()
    for name in ("layer", "pos", "index", "activation"):
        assert nodes[name].tolist() == getattr(part.nodes, name).tolist()
    assert nodes["kind"].tolist() == [node.kind.name.lower() for node in part.nodes]
    assert nodes["label"].tolist() == [node.label for node in part.nodes]
    assert nodes["influence"].tolist() == part.influence().tolist()
    assert ("dropped" in nodes) == (part.dropped is not None)


def test_the_edges_of_a_pruned_graph_are_edges_of_the_whole(graph):
    """By their ends' kind, layer, position and index, with the same weights."""

    def named(part):
        edges = part.to_pandas().edges
        names = [(n.kind, n.layer, n.pos, n.index) for n in part.nodes]
        rows = zip(edges["source"], edges["target"], edges["weight"], strict=True)
        return {(names[source], names[target]): weight for source, target, weight in rows}

    whole, part = named(graph), named(graph.prune())
    assert 0 < len(part) < len(whole)
    assert part.items() <= whole.items()


@pytest.mark.usefixtures("as_users_run_it")
def test_top_nodes_are_those_of_most_influence(graph):
    influence = graph.influence()
    for kind, asked in ((None, None), (NodeKind.FEATURE, NodeKind.FEATURE), (NodeKind.ERROR, "error")):
        top = graph.top(6, asked)
        numbers = [node.number for node, _ in top]
        of_kind = influence if kind is None else influence[graph.nodes.where(kind)]
        assert [value for _, value in top] == of_kind.sort(descending=True).values[:6].tolist()
        assert [float(influence[i]) for i in numbers] == [value for _, value in top]
        assert kind is None or {node.kind for node, _ in top} == {kind}
    assert len(graph.top(10**6)) == int(influence.count_nonzero())
    for bad in (0, 1.5, "ten"):
        with pytest.raises(ConfigError, match="n is"):
            graph.top(bad)


@pytest.mark.usefixtures("as_users_run_it")
def test_an_unknown_kind_is_named(graph):
    with pytest.raises(ConfigError, match="kind is 'neuron': give one of feature, error"):
        graph.top(kind="neuron")


@pytest.mark.parametrize("how", REDUCED)
def test_inputs_and_outputs_are_the_strongest_edges(graph, how):
    part = REDUCED[how](graph)
    dense = part.adjacency.to_dense()
    for number in (0, int(part.nodes.where(NodeKind.TOKEN)[-1]), len(part.nodes) - 1):
        for edges, ranked in ((dense[number], part.inputs(number, 4)), (dense[:, number], part.outputs(number, 4))):
            wanted = edges[edges != 0]
            assert [weight for _, weight in ranked] == wanted[wanted.abs().argsort(descending=True)][:4].tolist()
            assert all(float(edges[node.number]) == weight for node, weight in ranked)
    node: Node = part.nodes[-1]
    assert part.inputs(node) == part.inputs(-1) and torch.equal(part.in_edges(node), dense[-1])


@pytest.mark.parametrize("how", REDUCED)
def test_a_notebook_shows_text_as_text(graph, how):
    """Tokens are anybody's: none of them may become part of the page."""
    evil = "</script><b>"
    part = replace(
        REDUCED[how](graph),
        prompt_tokens=[evil] * len(TOKENS),
        logit_tokens=[evil] * len(graph.logit_tokens),
        info={**REDUCED[how](graph).info, "prompt": evil, "contrast": evil},
    )
    shown = part._repr_html_()
    assert evil not in shown and "</script>" not in shown
    assert shown.count("<b>") == shown.count("</b>") == 1  # The headline is bold.
    # The prompt, the contrast, the targets (which may be cut short), the token of each feature.
    assert shown.count("&lt;/script&gt;&lt;b&gt;") >= 3 + len(part.top(5, "feature"))
    assert ("not in this graph" in shown) == part.is_reduced
    assert part.scores().replacement_text() in shown


def test_what_is_shown_is_short(model, clt, graph):
    contrastive = attribute(model, clt, TOKENS, contrast=torch.tensor([0, 7, 40, 4, 33, 12, 21]))
    assert "beyond the prompt" in contrastive._repr_html_() and "beyond the prompt" not in graph._repr_html_()
    scores, shares = graph.prune().scores(), graph.shares()
    assert scores.replacement_text(4) in scores._repr_html_()
    assert f"{shares.error:.3g}" in shares._repr_html_()
    for shown in (graph, graph.prune(), graph.nodes, graph.nodes[0], scores, graph.top(1)[0]):
        assert "tensor" not in repr(shown) and len(repr(shown)) < 200
