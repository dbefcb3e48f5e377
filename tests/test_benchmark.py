"""What is measured of a known circuit: all hops with the neurons themselves, none with features that skip them."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal

from tests.models import tiny_clt
from tl_clt.benchmark import BenchmarkReport, Candidate, Judge, known_judges, load_judge, run_benchmark
from tl_clt.benchmark.hops import (
    HopReport,
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
from tl_clt.benchmark.judges import JUDGES, Run
from tl_clt.benchmark.train import train_on_circuit
from tl_clt.errors import CLTMismatch, ConfigError, FormatError
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


def test_a_report_of_hops_from_its_json(tmp_path):
    circuit = load_circuit("hops")
    for clt in (neurons_as_transcoder(circuit), memoriser(circuit)):
        report = measure_hops(circuit, clt, n_pairs=8, n_graphs=1)
        again = HopReport.from_json(report.to_json())
        assert_frame_equal(again.variables, report.variables)
        assert again.to_json() == report.to_json() and again.numbers == pytest.approx(report.numbers, nan_ok=True)
    folder = report.save(tmp_path / "hops")
    assert {path.name for path in folder.iterdir()} == {"report.json", "variables.csv", "hops.png"}
    assert (folder / "report.json").read_text() == report.to_json()


def test_the_figure_of_hops_has_a_bar_for_each_number():
    circuit = load_circuit("hops")
    report = measure_hops(circuit, memoriser(circuit), n_pairs=8, n_graphs=4)
    drawn = {bars.get_label(): [bar.get_height() for bar in bars] for bars in report.plot().axes[0].containers}
    table = report.variables
    assert drawn["told (balanced accuracy)"] == table["accuracy"].tolist()
    assert drawn["paths through it, of those there are"] == (table["through"] / table["through_there"]).tolist()


@pytest.mark.parametrize(
    "changed", [None, {"hop_recall": "much"}, {"variables": []}, {"variables": [{"variable": "a"}]}, {"l0": [1.0, "a"]}]
)
def test_what_is_no_report_of_hops_is_refused(changed):
    circuit = load_circuit("sum")
    values = measure_hops(circuit, neurons_as_transcoder(circuit), n_pairs=4, n_graphs=1).to_dict()
    text = "no JSON" if changed is None else json.dumps(values | changed)
    with pytest.raises(FormatError, match="no report of hops"):
        HopReport.from_json(text)


def test_thresholds_leave_the_strongest_of_the_neurons():
    circuit = load_circuit("hops")
    whole = neurons_as_transcoder(circuit)
    inputs, _ = activations(circuit, whole)
    acts = whole.encode(inputs)
    for kept in (0.75, 0.5, 0.25):
        clt = neurons_as_transcoder(circuit, kept)
        left = clt.encode(inputs)
        for layer in clt.layers:
            written, norms = acts[:, layer], whole.W_dec[layer][:, 0].norm(dim=-1)
            stays = left[:, layer] != 0
            assert int(stays.sum()) >= kept * int((written != 0).sum())
            torch.testing.assert_close(left[:, layer][stays], written[stays])
            sizes = written * norms
            assert not (~stays & (sizes > 0)).any() or sizes[stays].min() > sizes[~stays].max()
        assert clt.cfg.activation == "jumprelu" and clt.cfg.span == 1


def test_the_benchmark_judges_all_that_is_asked_for():
    report = run_benchmark(
        "hops", sparsities=[1.0], k=[2], neurons_kept=[1.0], n_seeds=2, n_steps=20, n_pairs=24, n_graphs=1,
        progress=False,
    )  # fmt: skip
    found = [tuple(run.candidate) for run in report.runs]
    trained = [
        (kind, *how, seed) for kind in ("plt", "clt") for how in (("jumprelu", 1), ("topk", 2)) for seed in (0, 1)
    ]
    untrained = [("untrained", "jumprelu", 0, seed) for seed in (0, 1)]
    assert found == [("neurons", "jumprelu", 1, 0), *untrained, *trained]
    assert report.table["hop_recall"].iloc[0] == 1 and report.table["hop_recall"].iloc[1] == 0
    assert (report.table.query("kind == 'plt'")["far"] == 0).all()
    assert report.table.query("activation == 'topk'")["l0"].max() <= 4
    again = BenchmarkReport.from_json(report.to_json())
    assert_frame_equal(again.table, report.table)
    assert again.to_json() == report.to_json() and again.info == report.info
    # One run is what measuring the same transcoder gives.
    circuit, last = load_circuit("hops"), report.runs[-1]
    clt = train_on_circuit(circuit, 2, 2, 1, activation="topk", n_steps=20)
    assert measure_hops(circuit, clt, n_pairs=24, n_graphs=1, seed=1).to_json() == last.report.to_json()


def test_a_model_of_one_layer_has_no_clt():
    report = run_benchmark(
        "sum", kinds=["clt", "plt"], sparsities=[1.0], k=[], n_seeds=1, n_steps=5, n_pairs=4, n_graphs=1, progress=False
    )
    assert report.table["kind"].tolist() == ["plt"]


def test_the_summary_has_means_ranges_and_intervals_over_seeds():
    circuit = load_circuit("sum")
    one = measure_hops(circuit, neurons_as_transcoder(circuit), n_pairs=4, n_graphs=1)
    recalls, nan = (0.2, 0.4, 0.9), float("nan")
    runs = [
        Run("sum", Candidate("clt", "topk", 4.0, seed), replace(one, hop_recall=recall, precision=nan))
        for seed, recall in enumerate(recalls)
    ]
    report = BenchmarkReport(runs=[*runs, Run("sum", Candidate("neurons", "jumprelu", 1.0, 0), one)], info={})
    of, neurons = report.summary.to_dict("records")
    assert (of["runs"], of["hop_recall"], of["hop_recall_least"], of["hop_recall_most"]) == (3, 0.5, 0.2, 0.9)
    half = 4.302653 * pd.Series(recalls).std() / 3**0.5  # Student's t of 2 degrees of freedom
    assert (of["hop_recall_low"], of["hop_recall_high"]) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-6)
    assert math.isnan(of["precision"]) and neurons["hop_recall"] == 1 and math.isnan(neurons["hop_recall_low"])


def test_a_further_model_becomes_a_judge_by_an_entry(monkeypatch):
    circuit, seen = load_circuit("sum"), []

    def make(candidate, n_steps):
        seen.append((candidate, n_steps))
        return neurons_as_transcoder(circuit)

    def measure(clt, n_pairs, n_graphs, seed):
        return measure_hops(circuit, clt, n_pairs=n_pairs, n_graphs=n_graphs, seed=seed)

    monkeypatch.setitem(JUDGES, "school", lambda name: Judge(4, make, measure))
    report = run_benchmark(
        "school", kinds="clt", sparsities=[], k=[3], n_seeds=1, n_pairs=4, n_graphs=1, n_steps=7, progress=False
    )
    assert seen == [(Candidate("clt", "topk", 3.0, 0), 7)]
    assert report.table["judge"].tolist() == ["school"] and "school" in known_judges()


def test_what_was_judged_before_an_interruption_is_not_done_again(monkeypatch, tmp_path):
    circuit, made, broken = load_circuit("sum"), [], 2.0

    def make(candidate, n_steps):
        made.append((candidate.sparsity, n_steps))
        if candidate.sparsity == broken:
            raise RuntimeError("it breaks off")
        return neurons_as_transcoder(circuit)

    def measure(clt, n_pairs, n_graphs, seed):
        return measure_hops(circuit, clt, n_pairs=n_pairs, n_graphs=n_graphs, seed=seed)

    monkeypatch.setitem(JUDGES, "sum", lambda name: Judge(1, make, measure))
    record = tmp_path / "runs.jsonl"
    asked = {
        **{"judges": "sum", "kinds": "plt", "sparsities": [], "k": [1, 2, 3], "n_seeds": 1, "n_steps": 5},
        **{"n_pairs": 4, "n_graphs": 1, "progress": False},
    }
    with pytest.raises(RuntimeError, match="breaks off"):
        run_benchmark(**asked, record=record)
    assert made == [(1.0, 5), (2.0, 5)] and len(record.read_text().splitlines()) == 1
    broken = 0.0
    again = run_benchmark(**asked, record=record)
    assert made[2:] == [(2.0, 5), (3.0, 5)]
    assert again.to_json() == run_benchmark(**asked).to_json()
    assert again.table["sparsity"].tolist() == [1.0, 2.0, 3.0]
    # What was measured in another way does not count, and stays.
    made.clear()
    run_benchmark(**{**asked, "n_steps": 6, "k": [1]}, record=str(record))
    assert made == [(1.0, 6)] and len(record.read_text().splitlines()) == 4
    with record.open("a") as file:
        file.write('{"judge": "sum"}\n')
    with pytest.raises(FormatError, match="Line 5 of .* is no run of the benchmark"):
        run_benchmark(**asked, record=record)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"record": 3}, "record is 3"),
        ({"judges": "hop"}, "give one of hops, sum, equal, parity, automaton, atlas, school. Nearest: 'hops'"),
        ({"kinds": ["saes"]}, "give one of neurons, untrained, plt, clt"),
        ({"sparsities": [-1.0]}, r"sparsities\[0\] is -1"),
        ({"k": [0]}, r"k\[0\] is 0"),
        ({"k": [99], "kinds": "plt", "sparsities": []}, r"k\[0\] is 99"),
        ({"neurons_kept": [2.0]}, r"neurons_kept\[0\] is 2"),
        ({"n_seeds": 0}, "n_seeds is 0"),
        ({"kinds": "plt", "k": [], "sparsities": []}, "kinds with a lambda, a k or a share"),
    ],
)
def test_what_cannot_be_judged_is_refused(changed, words, as_users_run_it):
    with pytest.raises(ConfigError, match=words):
        run_benchmark(**{"judges": "sum", "progress": False, **changed})


def test_too_large_a_k_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr("tl_clt.benchmark.judges.load_judge", None)
    with pytest.raises(ConfigError, match=r"k\[1\] is 99: give 1 to 32, the features of a layer of sum's transcoders"):
        run_benchmark("sum", k=[2, 99], progress=False)
    with pytest.raises(ConfigError, match=r"k\[0\] is 257: give 1 to 256, the features of a layer of atlas's"):
        run_benchmark(["school", "atlas"], k=[257], progress=False)


def test_what_is_no_judge_is_refused():
    with pytest.raises(ConfigError, match="Nearest: 'parity'"):
        load_judge("parities")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"runs": []}', '{"runs": [{"judge": "a"}]}'])
def test_what_is_no_benchmark_report_is_refused(text):
    with pytest.raises(FormatError, match="no benchmark report"):
        BenchmarkReport.from_json(text)
