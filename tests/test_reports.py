"""What all reports share: figures by name, files all or nothing, one line of text, escaped HTML, equality and hash."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from pandas import DataFrame

from tests.models import random_tokens, tiny_clt, tiny_hooked
from tl_clt import (
    Intervention,
    attribute,
    evaluate,
    find_supernodes,
    graph_figures,
    intervene,
    measure_faithfulness,
    measure_interaction,
    measure_supernodes,
    sweep_end_layer,
    sweep_strength,
    validate,
)
from tl_clt.benchmark import OrganismReport, run_benchmark
from tl_clt.benchmark.tasks import OF_ORGANISM
from tl_clt.errors import ConfigError, OutputNotEmpty
from tl_clt.evaluation import EvaluationReport, compare_tasks, measure_curves
from tl_clt.evaluation.tradeoff import compare
from tl_clt.organisms import Emergence
from tl_clt.report import Report

RUDE = "<script>alert('&')</script>"
NAMES = (
    *("evaluation", "validation", "faithfulness", "tradeoff", "effect", "strength sweep", "end layer sweep", "curves"),
    *("hops", "benchmark"),
    *("interaction", "supernodes"),
    *("tasks", "emergence", "organism"),
    "graph figures",
)
COURSE = DataFrame({"step": [0, 5], "hop": RUDE, "layer": 1, "pos": 3, "token": RUDE, "part": "all"}).assign(
    accuracy_held_out=[0, 1], read=[0.5, 1], shuffled=0.1, follows=[0, 1], random_direction=0.0
)
HOP = dict.fromkeys(OF_ORGANISM, 0.5) | {"task": RUDE, "variable": RUDE, "token": RUDE, "part": "all"}
HOP |= {"layer": 1, "pos": 2, "carried": True, "shown": True, "shown_pure": False}
CHANGE = Intervention(layer=0, pos=-1, feature=3, value=20)
OTHER = Intervention(layer=1, pos=-1, feature=2, add=10)


@pytest.fixture(scope="module")
def reports() -> dict[str, Report]:
    """Of a model with a rude name; two prompts where several are taken."""
    model = tiny_hooked("gpt2")
    model.cfg.model_name = RUDE
    clt, tokens = tiny_clt(model), random_tokens(model, batch=2, pos=6)
    quick: dict[str, Any] = {"progress": False}
    graph = attribute(model, clt, tokens[0], **quick)
    one = (model, clt, tokens[0])
    benchmark = run_benchmark("sum", kinds="neurons", neurons_kept=[1.0], n_pairs=4, n_graphs=1, **quick)
    return {
        "evaluation": evaluate(model, clt, tokens, n_graphs=1, **quick),
        "validation": validate(graph, model, clt, n_features=2, **quick),
        "faithfulness": measure_faithfulness(model, {RUDE: clt}, tokens, n_perturbations=1, **quick),
        "tradeoff": compare(model, tokens, {RUDE: clt}, n_graphs=0, **quick),
        "effect": intervene(model, clt, tokens, CHANGE),
        "strength sweep": sweep_strength(*one, CHANGE, [-1, 1], [5, 7], tolerance=1, **quick),
        "end layer sweep": sweep_end_layer(*one, CHANGE, [5, 7], **quick),
        "graph figures": graph_figures(graph, model=model, clt=clt),
        "interaction": measure_interaction(*one, CHANGE, OTHER, [5, 7], **quick),
        "supernodes": measure_supernodes(model, clt, graph, find_supernodes(graph), n_random=1, **quick),
        "curves": measure_curves(model, {RUDE: clt}, tokens, shares=(0.5, 1.0), **quick),
        "tasks": compare_tasks(model, clt, {RUDE: tokens, "other": tokens[:1]}, **quick),
        "emergence": Emergence(table=COURSE, info={"task": RUDE}),
        "organism": OrganismReport(
            organism=RUDE,
            hops=DataFrame([HOP]),
            hop_recall=1.0,
            precision=0.5,
            l0=[3.0, 4.0],
            explained_variance=[0.9, 0.8],
            answers_kept=0.9,
        ),
        "hops": benchmark.runs[0].report,
        "benchmark": benchmark,
    }


@pytest.fixture
def report(request: pytest.FixtureRequest, reports: dict[str, Report]) -> Report:
    return reports[request.param]


every_report = pytest.mark.parametrize("report", NAMES, indirect=True)


def test_all_of_them_are_here(reports: dict[str, Report]):
    def below(cls: type) -> set[type]:
        return {one for sub in cls.__subclasses__() for one in (sub, *below(sub))}

    concrete = {cls for cls in below(Report) if cls.__module__.startswith("tl_clt.")}
    assert {type(one) for one in reports.values()} == concrete


@every_report
def test_a_figure_by_its_name_and_the_first_without(report: Report, as_users_run_it):
    def lines(name: str | None) -> list[tuple[str, int]]:
        return [(axes.get_xlabel(), len(axes.get_children())) for axes in report.plot(name).axes]

    assert lines(None) == lines(report.figures[0])
    for name in report.figures:
        assert report.plot(name).axes
    for wrong in ("pie", "", 3):
        with pytest.raises(ConfigError, match="There is no figure .*: give one of " + report.FIGURES[0]):
            report.plot(wrong)


@every_report
def test_saved_are_numbers_and_every_figure(report: Report, tmp_path):
    folder = report.save(tmp_path / "a" / "report")
    assert folder == tmp_path / "a" / "report"
    written = {path.name for path in folder.iterdir()}
    figures = {f"{name}.png" for name in report.figures}
    assert figures < written
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in figures)
    assert all((folder / name).stat().st_size > 10 for name in written - figures)
    with pytest.raises(OutputNotEmpty, match="not empty"):
        report.save(folder)
    assert {path.name for path in folder.iterdir()} == written


@every_report
def test_what_is_no_folder_is_refused(report: Report, as_users_run_it):
    for wrong in (None, 3, ""):
        with pytest.raises(ConfigError, match="folder is .*: give a path"):
            report.save(wrong)


@every_report
def test_one_line_of_text_and_escaped_html(report: Report):
    line = repr(report)
    assert line.startswith(type(report).__name__ + "(") and "\n" not in line and len(line) < 200
    html = report._repr_html_()
    assert html.count("<table") == html.count("</table>") == len(report._tables()) > 0
    assert "<script" not in html


def test_names_that_a_user_gave_are_in_the_html_and_do_nothing(reports: dict[str, Report]):
    for name in ("evaluation", "faithfulness", "tradeoff", "curves", "tasks", "emergence"):
        assert "&lt;script&gt;" in reports[name]._repr_html_()


@every_report
def test_equality_and_hash_do_not_raise(report: Report, reports: dict[str, Report]):
    assert report == report and hash(report) == hash(report)
    assert [one == report for one in reports.values()].count(True) == 1
    assert report != "a report" and len({report, report}) == 1


def test_equal_evaluations_have_one_hash(reports: dict[str, Report]):
    report = reports["evaluation"]
    assert isinstance(report, EvaluationReport)
    again = EvaluationReport.from_json(report.to_json())
    assert again == report and hash(again) == hash(report)
    assert hash(replace(report, n_prompts=9)) != hash(report)


def test_an_effect_shows_what_changed_most(reports: dict[str, Report]):
    effect: Any = reports["effect"]
    first = effect.top_changes(10).iloc[:10]
    bars = [bar.get_width() for bar in effect.plot().axes[0].patches]
    assert bars == pytest.approx([*first["before"], *first["after"]])


def test_a_clt_in_short_and_in_a_notebook():
    clt = tiny_clt((3, 8), activation="topk", span=1)
    line = repr(clt)
    assert "3 layers x 24 features" in line and "topk (k 4)" in line and "PLTs of " in line and "\n" not in line
    rude = type(clt)(replace(clt.cfg, model_name=RUDE))
    html = rude._repr_html_()
    assert "&lt;script&gt;" in html and "<script" not in html and "hook_resid_mid" in html
    assert rude == rude and rude != clt and len({rude, clt, rude}) == 2
    assert torch.equal(rude.b_dec, torch.zeros(3, 8, dtype=torch.float64))
