"""A CLT that is exactly the model's MLPs, made of its own neurons: nothing is lost. And graphs' numbers by hand."""

from __future__ import annotations

import pytest
import torch

from tests.attribution.helpers import normalised
from tests.models import random_tokens, tiny_bridge, tiny_clt, tiny_hooked
from tl_clt import NodeKind, attribute, evaluate
from tl_clt.errors import ConfigError, ModelUnsupported
from tl_clt.evaluation.evaluate import numbers_of
from tl_clt.evaluation.report import mean_numbers
from tl_clt.evaluation.tradeoff import ThresholdedNeurons, thresholded_neurons
from tl_clt.lens import block_hook


@pytest.fixture(scope="module", params=["gpt2", "neox"])
def model(request):
    return tiny_hooked(request.param)


@pytest.fixture(scope="module")
def tokens(model):
    return random_tokens(model, batch=4, pos=8)


def test_all_neurons_are_the_model(model, tokens):
    every = ThresholdedNeurons(model, torch.full((3, 64), -1.0))
    report = evaluate(model, every, tokens, n_graphs=2)
    assert report.explained_variance == pytest.approx(1, abs=1e-12)
    assert report.nmse == pytest.approx(0, abs=1e-12)
    assert report.top1_agreement == 1
    assert report.kl_divergence == pytest.approx(0, abs=1e-12)
    assert report.cross_entropy_recovered == pytest.approx(1, abs=1e-12)
    assert report.l0_per_layer == pytest.approx([64] * 3)
    assert report.dead_share == 0
    assert report.written_share_by_distance == [1.0]


def test_thresholds_let_the_wanted_number_of_neurons_through(model, tokens):
    found = thresholded_neurons(model, [tokens], [4, 16, 64])
    for l0, neurons in found.items():
        report = evaluate(model, neurons, tokens, n_graphs=0)
        assert report.l0_per_layer == pytest.approx([l0] * 3, abs=0.05)
    _, cache = model.run_with_cache(tokens)
    for layer in range(3):
        acts = cache[block_hook(layer, "mlp.hook_post")]
        written = acts.abs() * model.W_out[layer].norm(dim=-1)
        kept = found[4].encode_layer(cache[block_hook(layer, "ln2.hook_normalized")], layer).feature_acts
        limit = written[:, 1:].flatten().sort(descending=True).values[4 * 28]
        # A neuron within rounding of the limit may fall on either side.
        clear = (written - limit).abs() > 1e-9
        torch.testing.assert_close(kept[clear], (acts * (written > limit))[clear])


def test_neurons_that_are_not_plain_are_refused(tmp_path):
    for model in (tiny_hooked("llama"), tiny_hooked("gemma"), tiny_bridge("gpt2", tmp_path)):
        with pytest.raises(ModelUnsupported, match="not of plain neurons"):
            thresholded_neurons(model, [random_tokens(model)], [4])


@pytest.mark.parametrize("l0", [0, 65])
def test_an_l0_out_of_range(l0):
    with pytest.raises(ConfigError, match=f"An L0 of {l0} is asked for, but a layer has 64 neurons"):
        thresholded_neurons(tiny_hooked("gpt2"), [], [l0])


@pytest.fixture(scope="module")
def graph():
    model = tiny_hooked("gpt2")
    return attribute(model, tiny_clt(model), random_tokens(model)[0])


def test_path_length_is_the_papers_sum(graph):
    A, w = normalised(graph.adjacency), graph.logit_weights
    tokens = graph.nodes.is_kind(NodeKind.TOKEN)
    P, power, total = [0.0], torch.eye(len(A), dtype=A.dtype), torch.zeros_like(A)
    for _ in range(12):
        power = power @ A
        total += power
        P.append(float((w @ total)[tokens].sum()))
    wanted = sum(i * (P[i] - P[i - 1]) for i in range(1, len(P))) / P[-1]
    assert graph.path_length() == pytest.approx(wanted, rel=1e-12)
    assert 1 < graph.path_length() < 4


def test_path_length_of_a_sparse_graph(graph):
    model = tiny_hooked("gpt2")
    sparse = attribute(model, tiny_clt(model), random_tokens(model)[0], keep_edges=1.0)
    assert sparse.is_sparse
    assert sparse.path_length() == pytest.approx(graph.path_length())


def test_numbers_of_a_graph(graph):
    numbers = numbers_of(graph)
    assert numbers.replacement == graph.scores().replacement
    assert numbers.completeness == graph.scores().completeness
    assert numbers.completeness_circuit_tracer == graph.scores("circuit-tracer").completeness
    assert (numbers.n_nodes, numbers.n_tokens) == (len(graph.nodes), 7)
    assert numbers.n_nodes_pruned == len(graph.prune().nodes)
    A, masks, nodes = normalised(graph.adjacency), graph.prune_masks(), graph.nodes
    output, above, below = graph.influence() + graph.logit_weights, 0.0, 0.0
    for t in torch.nonzero(masks.nodes & nodes.is_kind(NodeKind.FEATURE, NodeKind.LOGIT)).flatten():
        kept = masks.edges[t] & (nodes.kind != NodeKind.ERROR)
        above += float(output[t] * A[t][kept].sum())
        below += float(output[t])
    assert numbers.completeness_pruned == pytest.approx(above / below)
    assert 0 < numbers.completeness_pruned < numbers.completeness


def test_means_over_prompts(graph):
    numbers = numbers_of(graph)
    assert mean_numbers([numbers, numbers]) == numbers


def test_graphs_are_of_prompts_drawn_from_the_text():
    model = tiny_hooked("gpt2")
    clt, prompts = tiny_clt(model), random_tokens(model, batch=6, pos=9)
    report = evaluate(model, clt, prompts, n_graphs=3, graph_tokens=5)
    wanted = [numbers_of(attribute(model, clt, tokens[:5])) for tokens in prompts]
    assert len(report.graphs) == 3
    assert all(any(g.replacement == pytest.approx(w.replacement) for w in wanted) for g in report.graphs)
    assert report.graphs == evaluate(model, clt, prompts, n_graphs=3, graph_tokens=5).graphs
    assert len(evaluate(model, clt, prompts, n_graphs=9, graph_tokens=5).graphs) == 6
    assert report.graph_means == mean_numbers(report.graphs)
    loose = evaluate(model, clt, prompts, n_graphs=1, graph_tokens=5, max_unexplored=0.5)
    assert 0 < loose.graphs[0].unexplored <= 0.5
