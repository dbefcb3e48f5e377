"""`validate`: what a graph predicts, what interventions do, and how the two are compared."""

from __future__ import annotations

import json
import math

import pandas as pd
import pytest
import torch
from torch import Tensor

from tests.models import Model, random_tokens, tiny_clt
from tests.test_package import modules_after
from tl_clt import AttributionGraph, NodeKind, attribute, load_organism, validate
from tl_clt.attribution import DifferenceTarget, FeatureTarget
from tl_clt.attribution.influence import normalised
from tl_clt.errors import CLTMismatch, ConfigError
from tl_clt.interventions import ValidationReport
from tl_clt.interventions.predictions import predict
from tl_clt.interventions.sampling import STRATA, sample_features

FIGURES = ("logits", "features", "signs", "quadrants", "errors")


def traced(model: Model, **options) -> tuple[AttributionGraph, Model, object]:
    clt = tiny_clt(model)
    return attribute(model, clt, random_tokens(model, pos=7, seed=5)[0], progress=False, **options), model, clt


def one_summary(report: ValidationReport, kind: str, at: str, prediction: str, errors: str = "all") -> pd.Series:
    table = report.summary
    rows = table[(table["kind"] == kind) & (table["measured_at"] == at) & (table["errors"] == errors)]
    return rows[rows["prediction"] == prediction].iloc[0]


# -- predictions -------------------------------------------------------------------------------------------


def test_constrained_and_all_frozen_edges_are_exact(model: Model):
    report = validate(*traced(model), n_features=None, freeze="all")
    rows = report.measurements[report.measurements["kind"] == "constrained"]
    assert (rows["change"] - rows["edge"]).abs().max() <= 1e-8 * rows["edge"].abs().max()
    assert len(rows) > 500
    for at in ("logit", "feature"):
        found = one_summary(report, "constrained", at, "edge")
        assert found["pearson"] == pytest.approx(1, abs=1e-9)
        assert found["spearman"] == pytest.approx(1, abs=1e-6)
        assert found["sign_agreement"] == found["sign_agreement_predicted"] == 1
        assert found["predicted_only"] == found["seen_only"] == 0
        assert found["predicted_seen"] > 0 and found["neither"] > 0


def test_iterative_and_all_frozen_small_changes_are_exact(model: Model):
    """Of a change too small to switch a feature on or off, all paths together tell the effect."""
    report = validate(*traced(model), n_features=None, freeze="all", scale=1 + 1e-5)
    rows = report.measurements[report.measurements["kind"] == "iterative"]
    assert (rows["change"] - rows["total"]).abs().max() <= 1e-6 * rows["total"].abs().max()
    assert (rows["total"] - rows["edge"]).abs().max() > 1e-2 * rows["total"].abs().max()
    found = one_summary(report, "iterative", "logit", "total")
    assert found["pearson"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("keep_edges", [None, 0.9])
def test_predictions_are_those_of_matrix_inverses(one_of_each: Model, keep_edges):
    graph, *_ = traced(one_of_each, keep_edges=keep_edges, max_feature_nodes=30)
    nodes = graph.nodes
    dense = torch.stack([graph.in_edges(n) for n in range(len(nodes))])
    feature = nodes.kind == int(NodeKind.FEATURE)
    per_unit = torch.where(feature, 1 / nodes.activation, 0)
    identity = torch.eye(len(nodes), dtype=dense.dtype)
    sources = nodes.where(NodeKind.FEATURE)[::3]
    found = predict(graph, sources)
    total = torch.linalg.solve(identity - dense * per_unit, dense)
    torch.testing.assert_close(found.edge, dense[:, sources])
    torch.testing.assert_close(found.total, total[:, sources])
    torch.testing.assert_close(graph.logit_weights @ found.influence, graph.influence()[sources])
    if keep_edges is None:
        shares = normalised(dense)
        torch.testing.assert_close(found.influence, torch.linalg.solve(identity - shares, shares)[:, sources])


def test_targets_are_what_lies_downstream_and_was_traced(one_of_each: Model):
    graph, model, clt = traced(one_of_each, max_feature_nodes=25)
    rows = validate(graph, model, clt, n_features=None).measurements
    assert (rows["target_layer"] > rows["source_layer"]).all() and (rows["target_pos"] >= rows["source_pos"]).all()
    targets = torch.tensor(rows["target"].to_numpy())
    assert graph.expanded[targets].all()
    logits = graph.nodes.where(NodeKind.LOGIT).tolist()
    assert set(rows.loc[rows["measured_at"] == "logit", "target"]) == set(logits)
    assert set(rows["source"]) > set(torch.nonzero(graph.expanded).flatten().tolist()) & set(rows["source"])
    assert not graph.expanded[torch.tensor(rows["source"].to_numpy())].all()


def test_differences_and_features_as_targets_are_left_out(one_of_each: Model):
    graph, model, clt = traced(one_of_each, targets=[5, DifferenceTarget(6, 7), FeatureTarget(1, 3)])
    rows = validate(graph, model, clt).measurements
    assert set(rows.loc[rows["measured_at"] == "logit", "target_index"]) == {5}


def test_how_runs_are_batched_does_not_matter(one_of_each: Model):
    graph, model, clt = traced(one_of_each)
    ones, many = (validate(graph, model, clt, n_features=12, batch_size=size).measurements for size in (1, 5))
    pd.testing.assert_frame_equal(ones, many, rtol=1e-9, atol=1e-12)


# -- which features ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_features", [1, 12, 40, None])
def test_the_sample_has_some_of_every_stratum_and_controls_beside_the_first(one_of_each: Model, n_features):
    graph, *_ = traced(one_of_each)
    sample = sample_features(graph, n_features, seed=3)
    again = sample_features(graph, n_features, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(sample, again, strict=True))
    nodes, influence = graph.nodes, graph.influence()
    tested = sample.node[sample.control_of < 0]
    features = nodes.where(NodeKind.FEATURE)
    assert len(tested) == (int((influence[features] > 0).sum()) if n_features is None else n_features)
    assert len(tested.unique()) == len(tested)
    if n_features != 1:
        assert set(sample.stratum.tolist()) == set(range(len(STRATA)))
    order = influence[tested].argsort(descending=True)
    assert (sample.stratum[sample.control_of < 0][order].diff() >= 0).all()
    middle = influence[features].median()
    for node, of in zip(sample.node.tolist(), sample.control_of.tolist(), strict=True):
        if of >= 0:
            assert nodes.layer[node] == nodes.layer[of] and influence[node] <= middle and node != of
            at = features[(nodes.layer[features] == nodes.layer[of]) & (nodes.pos[features] == nodes.pos[of])]
            if (influence[at] < middle).any():
                assert nodes.pos[node] == nodes.pos[of]


def test_the_first_stratum_carries_half_of_the_influence(one_of_each: Model):
    graph, *_ = traced(one_of_each)
    sample = sample_features(graph, None, seed=0)
    tested = sample.control_of < 0
    influence = graph.influence()[sample.node[tested]]
    for end, stratum in zip(STRATA, range(len(STRATA)), strict=True):
        within = sample.stratum[tested] <= stratum
        assert float(influence[within].sum() / influence.sum()) >= end - 1e-6
        assert float((influence[within].sum() - influence[within].min()) / influence.sum()) < end


# -- the report --------------------------------------------------------------------------------------------


def report_of(rows: list[tuple], threshold: float = 0.1) -> ValidationReport:
    """A report of rows (kind, role, control_of, source, measured_at, error_share, edge, total, influence, change)."""
    names = [
        "kind",
        "role",
        "control_of",
        "source",
        "measured_at",
        "error_share",
        "edge",
        "total",
        "influence",
        "change",
    ]
    table = pd.DataFrame(rows, columns=names)
    table = table.assign(prompt=0, act_change=table["change"], target_activation=2.0, weight=0.5)
    return ValidationReport(measurements=table.assign(source_influence=table["influence"]), threshold=threshold)


def test_the_summary_counts_what_it_says():
    rows = [
        ("constrained", "tested", -1, 0, "feature", 0.1, 1.0, 9.0, 0.5, 1.5),
        ("constrained", "tested", -1, 1, "feature", 0.2, -1.0, 9.0, 0.4, 1.0),
        ("constrained", "tested", -1, 2, "feature", 0.3, -1.0, 9.0, 0.3, -0.1),
        ("constrained", "tested", -1, 3, "feature", 0.4, 0.1, 9.0, 0.2, -0.5),
        ("constrained", "tested", -1, 4, "feature", 0.5, 0.0, 9.0, 0.1, 0.0),
        ("constrained", "control", 0, 5, "feature", 0.5, 5.0, 9.0, 0.1, -5.0),
        ("iterative", "tested", -1, 0, "feature", 0.1, 9.0, 1.0, 0.5, -2.0),
    ]
    report = report_of(rows)
    found = one_summary(report, "constrained", "feature", "edge")
    quadrants = ["predicted_seen", "predicted_only", "seen_only", "neither"]
    assert found[["n", *quadrants]].tolist() == [5, 2, 1, 1, 1]
    assert found["sign_agreement"] == 0.5 and found["sign_agreement_predicted"] == pytest.approx(2 / 3)
    assert found["pearson"] == pytest.approx(pd.Series([1, -1, -1, 0.1, 0]).corr(pd.Series([1.5, 1, -0.1, -0.5, 0])))
    assert one_summary(report, "constrained", "feature", "edge", "low")["n"] == 3
    assert one_summary(report, "constrained", "feature", "edge", "high")[quadrants].tolist() == [0, 0, 1, 1]
    influence = one_summary(report, "constrained", "feature", "influence")
    assert influence["spearman"] == pytest.approx(0.9) and math.isnan(influence["sign_agreement"])
    total = one_summary(report, "iterative", "feature", "total")
    assert total["n"] == 1 and total["sign_agreement"] == 0 and math.isnan(total["spearman"])
    assert report.summary["threshold"].eq(0.1).all()
    assert set(report.summary.loc[report.summary["kind"] == "constrained", "prediction"]) == {"edge", "influence"}


def test_effects_on_several_logits_are_weighed_and_set_beside_the_controls():
    rows = [
        ("iterative", "tested", -1, 0, "logit", 0.1, 1.0, 1.0, 0.5, 1.0),
        ("iterative", "tested", -1, 0, "logit", 0.3, 1.0, 1.0, 0.5, -2.0),
        ("iterative", "control", 0, 7, "logit", 0.1, 0.0, 0.0, 0.5, 0.2),
        ("iterative", "control", 0, 7, "logit", 0.1, 0.0, 0.0, 0.5, 0.0),
    ]
    report = report_of(rows)
    assert one_summary(report, "iterative", "logit", "influence")["n"] == 1
    assert one_summary(report, "iterative", "logit", "total")["n"] == 2
    beside = report.controls.set_index("kind").loc["iterative"]
    assert beside["n"] == 1 and beside["larger"] == 1
    assert beside["tested_mean"] == pytest.approx(0.75) and beside["control_median"] == pytest.approx(0.05)
    assert report.controls.set_index("kind").loc["constrained", "n"] == 0


def test_influential_features_of_atlas_matter_more_than_their_controls():
    model, clt = load_organism("atlas")
    prompts = [f"Fact: the capital of the state containing {city} is" for city in ("Dallas", "Oakland")]
    reports = [validate(attribute(model, clt, p, progress=False), model, clt, n_features=40) for p in prompts]
    pooled = ValidationReport.pool(reports)
    assert pooled.info["prompt"] == [r.info["prompt"] for r in reports] and pooled.info["n_features"] == 80
    assert set(pooled.measurements["prompt"]) == {0, 1}
    assert len(pooled.measurements) == sum(len(r.measurements) for r in reports)
    assert (pooled.controls["larger"] > 0.9).all()
    assert one_summary(pooled, "iterative", "logit", "influence")["spearman"] > 0.5
    assert one_summary(pooled, "constrained", "feature", "edge")["pearson"] > 0.9


def test_it_can_be_printed_saved_and_drawn(one_of_each: Model, tmp_path):
    report = validate(*traced(one_of_each), n_features=20)
    text = str(report)
    assert "constrained" in text and "spearman" in text and "controls" in text
    read = json.loads(report.to_json())
    assert read["threshold"] == 0.1 and len(read["summary"]) == len(report.summary)
    table = pd.DataFrame(read["measurements"]["data"], columns=read["measurements"]["columns"])
    pd.testing.assert_frame_equal(table, report.measurements, check_dtype=False)
    for name in FIGURES:
        figure = report.figure(name)
        assert [axes.get_title() for axes in figure.axes][:2] == ["constrained", "iterative"]
        figure.savefig(tmp_path / f"{name}.png")
    with pytest.raises(ConfigError, match="no figure 'pie'"):
        report.figure("pie")  # type: ignore[arg-type]


def test_no_plotting_library_is_loaded_before_a_figure_is_asked_for():
    assert "matplotlib" not in modules_after("from tl_clt import validate")


# -- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n_features": 0}, "n_features is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"scale": 1.0}, "changes nothing"),
        ({"scale": math.nan}, "scale is nan"),
        ({"threshold": 0.0}, "threshold is 0.0"),
    ],
    ids=str,
)
def test_bad_arguments(one_of_each: Model, given: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        validate(*traced(one_of_each), **given)


def test_graphs_that_cannot_be_tested(one_of_each: Model, as_users_run_it):
    other = random_tokens(one_of_each, pos=7, seed=6)[0]
    with pytest.raises(ConfigError, match="contrastive"):
        validate(*traced(one_of_each, contrast=other))
    with pytest.raises(ConfigError, match="no token's logit"):
        validate(*traced(one_of_each, targets=[DifferenceTarget(3, 4)]))
    graph, model, _ = traced(one_of_each)
    for clt in (tiny_clt(model, seed=9), tiny_clt(model, d_transcoder=4, l0=1)):
        with pytest.raises(CLTMismatch, match="another model or CLT"):
            validate(graph, model, clt)
    nothing: Tensor = torch.zeros_like(graph.adjacency)
    with pytest.raises(ConfigError, match="no feature with any influence"):
        validate(AttributionGraph(**{**vars(graph), "adjacency": nothing}), model, tiny_clt(model))
    with pytest.raises(ConfigError, match="2 thresholds"):
        reports = [validate(graph, model, tiny_clt(model), n_features=2, threshold=t) for t in (0.1, 0.2)]
        ValidationReport.pool(reports)
