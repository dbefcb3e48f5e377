"""What is measured of a known circuit: all hops with the neurons themselves, none with features that skip them."""

from __future__ import annotations

import math

import pytest
import torch

from tests.models import tiny_clt
from tl_clt.benchmark.hops import (
    activations,
    answers_kept,
    explained_by,
    find_group,
    measure_hops,
    neurons_as_transcoder,
    predict,
    tokens_influence,
    without_far_writes,
    writes_by_distance,
)
from tl_clt.benchmark.train import train_on_circuit
from tl_clt.errors import CLTMismatch, ConfigError
from tl_clt.organisms import known_circuits, load_circuit
from tl_clt.transcoder import CrossLayerTranscoder, CrossLayerTranscoderConfig
from tl_clt.transcoder.decoders import DenseDecoders


def memoriser(circuit) -> CrossLayerTranscoder:
    """A CLT of `hops` that does all in one hop: a feature of layer 0 for each prompt, which writes what both MLPs write
    there. It needs four bits at once, and layer 1 has nothing to do."""
    inputs, outputs = activations(circuit, neurons_as_transcoder(circuit))
    n_prompts, n_layers, d_model = inputs.shape
    cfg = CrossLayerTranscoderConfig(n_layers=n_layers, d_model=d_model, d_transcoder=n_prompts, activation="relu")
    W_dec = [outputs.clone(), torch.zeros(n_prompts, 1, d_model)]
    clt = CrossLayerTranscoder(cfg, DenseDecoders(W_dec))
    bits = inputs[:, 0, [6, 7, 8, 0]]
    with torch.no_grad():
        clt.W_enc.zero_()
        # Four bits of +1 or -1: half their product with a prompt's own is 2, with another's at most 1.
        clt.W_enc[0, [6, 7, 8, 0]] = bits.T / 2
        clt.b_enc[0] = -1.0
        clt.b_enc[1] = -1.0
    return clt.requires_grad_(False)


@pytest.mark.parametrize("name", known_circuits())
def test_neurons_show_every_hop_there_is(name):
    circuit = load_circuit(name)
    report = measure_hops(circuit, neurons_as_transcoder(circuit), n_pairs=24, n_graphs=3)
    table = report.variables
    assert (report.hop_recall, report.hops_shown, report.precision, report.answers_kept) == (1, 1, 1, 1)
    assert table["shown"].all() and (table[["accuracy", "swap", "swap_replaced"]] == 1).all(axis=None)
    assert table["through"].equals(table["through_there"]) and table["through"].iloc[-1] == pytest.approx(1)
    assert (table["accuracy_shuffled"] < 0.75).all()
    assert report.explained_variance == pytest.approx([1.0] * circuit.model.cfg.n_layers)
    assert report.writes_by_distance == [1.0]


def test_each_step_of_a_chain_has_half_the_paths_of_the_next():
    """A step reads the last one's value and one input: of the tokens' influence on it half comes through each."""
    circuit = load_circuit("parity")
    report = measure_hops(circuit, neurons_as_transcoder(circuit), n_pairs=8, n_graphs=2)
    assert report.variables["through_there"].tolist() == pytest.approx([0.25, 0.5, 1.0])


def test_features_that_do_all_in_one_hop_show_none():
    circuit = load_circuit("hops")
    report = measure_hops(circuit, memoriser(circuit), n_pairs=24, n_graphs=4)
    assert report.explained_variance == pytest.approx([1.0, 1.0]) and report.answers_kept == 1
    assert report.l0 == [1.0, 0.0]
    assert (report.hop_recall, report.hops_shown, report.precision) == (0, 0, 0)
    assert (report.variables["n_features"] == 0).all() and (report.variables["accuracy"] <= 0.5).all()
    assert report.answers_kept_without_far < 1
    assert report.writes_by_distance == pytest.approx([2**0.5 / (1 + 2**0.5), 1 / (1 + 2**0.5)])


def test_a_random_clt_shows_no_hop():
    circuit = load_circuit("hops")
    torch.manual_seed(0)
    clt = CrossLayerTranscoder(CrossLayerTranscoderConfig(n_layers=2, d_model=12, d_transcoder=16, activation="relu"))
    report = measure_hops(circuit, clt, n_pairs=16, n_graphs=2)
    assert report.hop_recall == 0 and report.answers_kept < 1


def test_the_far_writes_of_a_clt_are_taken_away():
    circuit = load_circuit("hops")
    clt = memoriser(circuit)
    near = without_far_writes(clt)
    inputs, outputs = activations(circuit, clt)
    recons = near(inputs)
    torch.testing.assert_close(recons[:, 0], outputs[:, 0])
    assert not recons[:, 1].any()
    assert near.cfg.span == 1 and answers_kept(circuit, near) == answers_kept(circuit, without_far_writes(near))


def test_what_explains_a_feature():
    quantity = torch.tensor([0, 0, 1, 1, 2, 2])
    acts = torch.tensor([[5.0, 5, 1, 1, 0, 0], [0, 1, 0, 1, 0, 1], [2.0] * 6, [0, 2, 0, 2, 4, 6]]).T
    explained = explained_by(acts, quantity)
    assert explained[:2].tolist() == pytest.approx([1.0, 0.0])
    assert math.isnan(explained[2])
    assert explained[3] == pytest.approx(1 - 6 / acts[:, 3].var(correction=0).item() / 6)


def test_a_group_is_of_its_layer_and_its_arguments():
    circuit = load_circuit("hops")
    acts = neurons_as_transcoder(circuit).encode(activations(circuit, neurons_as_transcoder(circuit))[0])
    groups = [find_group(v, acts).nonzero().flatten().tolist() for v in circuit.variables]
    assert groups == [[0, 1], [3, 4], [0]]


def test_reading_a_value_from_activations():
    arguments = torch.arange(4).repeat(8)
    pairs = torch.nn.functional.one_hot(arguments).float()
    assert predict(pairs, arguments // 2, arguments) == 1
    assert predict(pairs[:, :0], arguments // 2, arguments) == 0.5
    # With one of two features of a value, half of its prompts look like the others.
    assert predict(pairs[:, :1], arguments // 2, arguments) == 0.75
    # What is told of each prompt alone is told of no other.
    assert predict(torch.eye(32), arguments // 2, arguments) <= 0.5


def test_walks_past_closed_nodes():
    from tl_clt import NodeKind, attribute

    circuit = load_circuit("hops")
    row = int((circuit.answers == 1).nonzero()[0])
    clt = neurons_as_transcoder(circuit)
    graph = attribute(circuit.model, clt, circuit.prompts[row], targets=[1], max_n_logits=1, bos="features")
    tokens = graph.nodes.where(NodeKind.TOKEN)
    assert tokens_influence(graph) == pytest.approx(float(graph.influence()[tokens].sum()), rel=1e-5)
    assert tokens_influence(graph, graph.nodes.is_kind(NodeKind.FEATURE)) == 0


def test_writes_by_distance_count_activation_times_norm():
    clt = tiny_clt((2, 3), d_transcoder=2, l0=1)
    acts = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]], dtype=torch.float64)
    own = clt.W_dec[0][0, 0].norm() + 2 * clt.W_dec[1][1, 0].norm()
    far = clt.W_dec[0][0, 1].norm()
    assert writes_by_distance(clt, acts) == pytest.approx([float(own / (own + far)), float(far / (own + far))])


def test_what_is_trained_on_a_circuit_shows_its_hop():
    circuit = load_circuit("sum")
    clt = train_on_circuit(circuit, span=1, sparsity=1.0, seed=0, n_steps=400)
    report = measure_hops(circuit, clt, n_pairs=24, n_graphs=2)
    assert (report.hop_recall, report.answers_kept) == (1, 1)
    assert report.l0[0] < 8 and report.explained_variance[0] > 0.9


def test_a_penalty_on_far_writes_leaves_few():
    circuit = load_circuit("hops")
    far = []
    for settings in ({}, {"far_write_coefficient": 0.3}):
        clt = train_on_circuit(circuit, span=2, sparsity=1.0, seed=0, n_steps=500, **settings)
        acts = clt.encode(activations(circuit, clt)[0])
        far.append(writes_by_distance(clt, acts)[1])
    assert far[1] < far[0] / 4


def test_what_does_not_fit_is_refused():
    circuit = load_circuit("hops")
    with pytest.raises(ConfigError, match="n_graphs is 0"):
        measure_hops(circuit, neurons_as_transcoder(circuit), n_graphs=0)
    with pytest.raises(CLTMismatch):
        measure_hops(circuit, neurons_as_transcoder(load_circuit("parity")))


def test_the_report_says_the_main_figures():
    circuit = load_circuit("sum")
    report = measure_hops(circuit, neurons_as_transcoder(circuit), n_pairs=4, n_graphs=1)
    assert repr(report) == "HopReport(hop_recall=1.00, hops_shown=1.00, precision=1.00, answers_kept=1.00)"
