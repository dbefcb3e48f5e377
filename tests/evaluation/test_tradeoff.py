"""The trade-off table: the same numbers as `evaluate` gives, side by side."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from tests.models import random_tokens, tiny_clt, tiny_hooked
from tl_clt import CrossLayerTranscoder, evaluate
from tl_clt.cli import app
from tl_clt.errors import CLTMismatch, ConfigError
from tl_clt.evaluation import EvaluationReport
from tl_clt.evaluation.tradeoff import compare, short_names, thresholded_neurons, train_transcoders, training_config
from tl_clt.organisms import organism_folder

ROUNDING = 1e-9
"""Two evaluations need not round alike: sums of some thousand float64 terms, through graphs of some hundred nodes."""
ATLAS_CLT = str(organism_folder("atlas") / "clt")


@pytest.fixture(scope="module")
def model():
    return tiny_hooked("gpt2")


@pytest.fixture(scope="module")
def tokens(model):
    return random_tokens(model, batch=4, pos=8)


@pytest.fixture(scope="module")
def transcoders(model):
    return {"a": tiny_clt(model), "b": tiny_clt(model, span=1), "c": tiny_clt(model, span=2, l0=8)}


@pytest.fixture(scope="module")
def found(model, tokens, transcoders):
    return compare(model, tokens, transcoders, [4, 64], n_graphs=2)


def test_rows_are_what_evaluate_gives(model, tokens, transcoders, found):
    table = found.table.set_index("name")
    assert dict(table["kind"]) == {
        "a": "CLT",
        "b": "PLT",
        "c": "span 2",
        "neurons-l0-4": "neurons",
        "neurons-l0-64": "neurons",
    }
    everything = transcoders | {"neurons-l0-4": thresholded_neurons(model, [tokens], [4])[4]}
    for name, clt in everything.items():
        report = evaluate(model, clt, tokens, n_graphs=2)
        assert_same_numbers(asdict(found.reports[name]), asdict(report))
        for column in ("nmse", "top1_agreement", "l0_sum_over_layers", "n_tokens"):
            assert table.loc[name, column] == pytest.approx(getattr(report, column), rel=ROUNDING)
        for column in ("replacement", "completeness", "path_length"):
            assert table.loc[name, column] == pytest.approx(getattr(report.graph_means, column), rel=ROUNDING)


def assert_same_numbers(a: object, b: object) -> None:
    """Whatever is nested in dictionaries and lists, with numbers up to rounding."""
    assert type(a) is type(b)
    if isinstance(a, dict) and isinstance(b, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same_numbers(a[key], b[key])
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same_numbers(one, other)
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=ROUNDING, nan_ok=True)
    else:
        assert a == b


def test_files(found, tmp_path):
    found.save(tmp_path / "out")
    table = pd.read_csv(tmp_path / "out" / "tradeoff.csv")
    pd.testing.assert_frame_equal(table, found.table)
    reports = json.loads((tmp_path / "out" / "reports.json").read_text())
    assert EvaluationReport.from_json(json.dumps(reports["b"])) == found.reports["b"]
    assert (tmp_path / "out" / "tradeoff.png").stat().st_size > 0


def test_the_figure_has_a_line_for_each_kind_and_size(found):
    panels = found.figure().axes[:-1]
    for panel, column in zip(
        panels, ("nmse", "top1_agreement", "replacement", "completeness", "path_length"), strict=True
    ):
        assert panel.get_xscale() == "log"
        lines = {line.get_label(): line for line in panel.lines}
        assert set(lines) == {"CLT, 24 a layer", "PLT, 24 a layer", "span 2, 24 a layer", "neurons, 64 a layer"}
        neurons = found.table[found.table["kind"] == "neurons"].sort_values("l0_sum_over_layers")
        assert list(lines["neurons, 64 a layer"].get_ydata()) == list(neurons[column])


def test_without_graphs_their_columns_are_empty(model, tokens, transcoders):
    table = compare(model, tokens, transcoders, n_graphs=0).table
    assert table["replacement"].isna().all()


def test_names_are_short_unless_two_are_alike():
    assert short_names(["a/clt", "b/plt/"]) == ["clt", "plt"]
    assert short_names(["a/clt", "b/clt"]) == ["a/clt", "b/clt"]


def test_one_that_does_not_fit_is_found_before_any_is_measured(model, tokens, transcoders, monkeypatch):
    measured = []
    monkeypatch.setattr("tl_clt.evaluation.tradeoff.evaluate", lambda *args, **kwargs: measured.append(args))
    other = tiny_clt((model.cfg.n_layers + 1, model.cfg.d_model))
    with pytest.raises(CLTMismatch):
        compare(model, tokens, {**transcoders, "last": other})
    assert measured == []


def test_nothing_to_compare(model, tokens):
    with pytest.raises(ConfigError, match="nothing to compare"):
        compare(model, tokens, {})


def test_trained_alike(model, tmp_path):
    text = torch.cat([random_tokens(model, pos=16, seed=seed) for seed in range(64)])
    base = replace(training_config(model, 512, 1e-3, 16, "cpu", 0), train_batch_size_tokens=128, lr_decay_steps=1)
    trained = train_transcoders(model, text, base, [8, 16], [2], tmp_path)
    assert set(trained) == {"plt-8-l0-2", "plt-16-l0-2", "clt-8-l0-2", "clt-16-l0-2"}
    for name, clt in trained.items():
        kind, size, _, k = name.split("-")
        assert (clt.cfg.span, clt.cfg.d_transcoder, clt.cfg.k) == (1 if kind == "plt" else 3, int(size), int(k))
        assert CrossLayerTranscoder.from_pretrained(tmp_path / name).cfg == clt.cfg


def run(*arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "150", "TERM": "dumb"})
    assert result.exit_code == status, (result.output, result.exception)
    return result.output.replace("\n", " ")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(["the capital of Texas is Austin .", "Dallas is a city in Texas ."] * 300))
    return str(path)


def test_tradeoff_from_a_shell(tmp_path, text):
    output = run(
        *("tradeoff", "--model", "atlas", "--dataset", text, "--output", str(tmp_path / "out"), "--clt", ATLAS_CLT),
        *("--neurons", "8", "--train-on", text, "--d-transcoder", "16", "--l0", "4", "--training-tokens", "2048"),
        *("--max-tokens", "200", "--n-graphs", "1", "--context-size", "32"),
    )
    assert "plt-16-l0-4" in output and "neurons-l0-8" in output
    table = pd.read_csv(tmp_path / "out" / "tradeoff.csv").set_index("kind")
    assert list(table.index) == ["CLT", "PLT", "CLT", "neurons"]
    assert table.loc["PLT", "l0_mean_per_layer"] == pytest.approx(4, abs=0.5)
    assert CrossLayerTranscoder.from_pretrained(tmp_path / "out" / "clt-16-l0-4").cfg.k == 4


def test_text_that_cannot_be_read_is_told_before_training(tmp_path, text, monkeypatch, as_users_run_it):
    trained = []
    monkeypatch.setattr("tl_clt.evaluation.tradeoff.train_transcoders", lambda *args: trained.append(args) or {})
    basic = ("tradeoff", "--model", "atlas", "--dataset", str(tmp_path / "none.txt"), "--output", str(tmp_path / "out"))
    output = run(*basic, "--train-on", text, "--d-transcoder", "16", "--l0", "4", status=1)
    assert "DatasetError" in output and trained == [] and not (tmp_path / "out").exists()


def test_evaluate_from_a_shell(tmp_path, text):
    basic = ("evaluate", "--model", "atlas", "--clt", ATLAS_CLT, "--dataset", text)
    output = run(*basic, "--output", str(tmp_path / "out"), "--max-tokens", "200", "--n-graphs", "1")
    report = EvaluationReport.from_json((tmp_path / "out" / "report.json").read_text())
    assert 200 <= report.n_tokens < 210 and len(report.graphs) == 1
    assert f"{report.explained_variance:.3f}" in output
    assert (tmp_path / "out" / "graphs.png").exists()


@pytest.mark.parametrize(
    ("command", "options", "error"),
    [
        ("evaluate", {"--dataset": "no/such.txt"}, "DatasetError: Dataset 'no/such.txt' does not exist"),
        ("evaluate", {"--n-graphs": "-1"}, "ConfigError: n_graphs is -1"),
        ("evaluate", {"--context-size": "100"}, "ConfigError: context_size is 100, but atlas takes 2 to 64 tokens"),
        ("evaluate", {"--clt": "no/such"}, "FormatError"),
        ("evaluate", {"--output": "."}, "OutputNotEmpty"),
        ("tradeoff", {"--d-transcoder": "8"}, "ConfigError: To train transcoders give --train-on"),
        ("tradeoff", {"--neurons": "999"}, "ConfigError: An L0 of 999"),
        ("tradeoff", {"--output": "."}, "OutputNotEmpty"),
    ],
)
def test_bad_input_is_one_message_and_no_file(tmp_path, text, monkeypatch, as_users_run_it, command, options, error):
    monkeypatch.chdir(tmp_path)
    given = {"--model": "atlas", "--clt": ATLAS_CLT, "--dataset": text, "--output": "out", **options}
    output = run(command, *[part for pair in given.items() for part in pair], status=1)
    assert error in output and "Traceback" not in output
    assert not (tmp_path / "out").exists()
