"""The report as JSON, tables and figures."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from rich.console import Console

from tests.models import random_tokens, tiny_clt, tiny_hooked
from tl_clt import evaluate
from tl_clt.errors import ConfigError, FormatError, OutputNotEmpty
from tl_clt.evaluation import FIGURES, EvaluationReport
from tl_clt.viewer.tables import evaluation_table, layer_table


@pytest.fixture(scope="module")
def report():
    model = tiny_hooked("gpt2")
    return evaluate(model, tiny_clt(model), random_tokens(model, batch=4, pos=8), n_graphs=2)


@pytest.fixture(scope="module")
def bare():
    """No graphs, no next tokens."""
    model = tiny_hooked("gpt2")
    return evaluate(model, tiny_clt(model), [[0, 5], [0, 7]], n_graphs=0)


def test_json_round_trip(report, bare):
    for one in (report, bare):
        assert EvaluationReport.from_json(one.to_json()) == one
    values = json.loads(report.to_json())
    assert values["l0_sum_over_layers"] == pytest.approx(sum(values["l0_per_layer"]))
    assert values["graph_means"]["replacement"] == pytest.approx(sum(g["replacement"] for g in values["graphs"]) / 2)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": 1}'])
def test_other_json_is_no_report(text):
    with pytest.raises(FormatError, match="no evaluation report"):
        EvaluationReport.from_json(text)


def test_numbers_that_json_has_no_word_for_lose_no_report(report, tmp_path):
    """A CLT with one broken weight makes nan of some numbers; the others are worth keeping."""
    nmse = [*report.nmse_per_layer[:-1], math.nan]
    broken = replace(report, nmse=math.nan, nmse_per_layer=nmse, cross_entropy_replaced=math.inf)
    broken.save(tmp_path / "report")
    read = EvaluationReport.from_json((tmp_path / "report" / "report.json").read_text())
    assert math.isnan(read.nmse) and math.isnan(read.nmse_per_layer[-1])
    assert read.cross_entropy_replaced is None and read.l0_per_layer == report.l0_per_layer


@pytest.mark.parametrize(
    "change",
    [
        {"n_tokens": "many"},
        {"nmse": True},
        {"nmse_per_layer": [1.0]},
        {"density_counts": [[1], [2], [3]]},
        {"graphs": [{"replacement": 1.0}]},
        {"graphs": {}},
        {"clt": {"n_layers": 0}},
        {"clt": None},
        {"written_share_by_distance": []},
    ],
)
def test_a_report_that_contradicts_itself_is_refused(report, change):
    with pytest.raises(FormatError, match="no evaluation report"):
        EvaluationReport.from_json(json.dumps({**report.to_dict(), **change}))


def test_saved_whole_or_not_at_all(report, bare, tmp_path):
    report.save(tmp_path / "report")
    assert {p.name for p in (tmp_path / "report").iterdir()} == {"report.json", *(f"{name}.png" for name in FIGURES)}
    assert EvaluationReport.from_json((tmp_path / "report" / "report.json").read_text()) == report
    with pytest.raises(OutputNotEmpty):
        bare.save(tmp_path / "report")
    bare.save(tmp_path / "bare")
    assert not (tmp_path / "bare" / "graphs.png").exists()


def test_figures_show_the_numbers(report, bare):
    bars = [[bar.get_height() for bar in axes.patches] for axes in report.plot("layers").axes]
    per_layer = (report.explained_variance_per_layer, report.nmse_per_layer, report.l0_per_layer)
    assert bars == [list(values) for values in (*per_layer, report.dead_share_per_layer)]
    heights = [bar.get_height() for bar in report.plot("density").axes[0].patches]
    assert heights == [n for layer in report.density_counts for n in layer]
    shares = [bar.get_height() for bar in report.plot("distance").axes[1].patches]
    assert shares == report.written_share_by_distance
    points = report.plot("graphs").axes[0].lines[0].get_ydata()
    assert list(points) == sorted(g.replacement for g in report.graphs)
    with pytest.raises(ConfigError, match="No prompt was traced"):
        bare.plot("graphs")


def test_there_is_no_other_figure(report, as_users_run_it):
    with pytest.raises(ConfigError, match="no figure 'layer'"):
        report.plot("layer")


def test_tables(report, bare):
    for one in (report, bare):
        console = Console(width=150, record=True)
        console.print(evaluation_table(one))
        console.print(layer_table(one))
        text = console.export_text()
        assert f"{one.explained_variance:.3f}" in text and f"{one.nmse_per_layer[-1]:.3f}" in text
        assert ("replacement score" in text) == bool(one.graphs)
        assert ("recovered" in text) == (one.n_predicted > 0)
        assert f"never active on these {one.n_tokens} tokens" in text
