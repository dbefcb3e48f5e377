"""`validate`: what a graph predicts, what interventions do, and how the two are compared."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig

from tests.attribution.helpers import normalised
from tests.models import COMMON, Model, input_hook_of, random_tokens, randomise, tiny_clt, tiny_hooked
from tl_clt import (
    AttributionGraph,
    CrossLayerTranscoder,
    CrossLayerTranscoderConfig,
    Intervention,
    NodeKind,
    attribute,
    intervene,
    load_organism,
    validate,
)
from tl_clt.attribution import DifferenceTarget, DirectionTarget, FeatureTarget, TokenTarget
from tl_clt.errors import CLTMismatch, ConfigError, OutputNotEmpty, TargetError
from tl_clt.interventions import ValidationReport
from tl_clt.interventions.validation import KINDS, STRATA, baseline_clt, predict, sample_features
from tl_clt.interventions.validation_report import (
    BASELINES,
    Statistic,
    interval,
    pooled,
    resample,
    select,
    within,
)
from tl_clt.lens import run_with_cache

FIGURES = ("chance", "logits", "features", "signs", "quadrants", "errors")


_TRACED: WeakKeyDictionary[Model, tuple[AttributionGraph, CrossLayerTranscoder]] = WeakKeyDictionary()


def traced(model: Model, **options) -> tuple[AttributionGraph, Model, CrossLayerTranscoder]:
    """A graph of one prompt; without options it is traced once for each model."""
    if not options and model in _TRACED:
        graph, clt = _TRACED[model]
        return graph, model, clt
    clt = tiny_clt(model)
    graph = attribute(model, clt, random_tokens(model, pos=7, seed=5)[0], progress=False, **options)
    if not options:
        _TRACED[model] = graph, clt
    return graph, model, clt


def one_summary(report: ValidationReport, kind: str, at: str, prediction: str, errors: str = "all") -> Any:
    return select(report.summary, clt="given", kind=kind, measured_at=at, errors=errors, prediction=prediction).iloc[0]


# -- predictions -------------------------------------------------------------------------------------------


def test_constrained_and_all_frozen_edges_are_exact(model: Model):
    report = validate(*traced(model), n_features=None, freeze="all", threshold=0.003, baselines=())
    rows = select(report.measurements, kind="constrained")
    assert (rows["change"] - rows["edge"]).abs().max() <= 1e-8 * rows["edge"].abs().max()
    assert len(rows) > 500
    for at in ("logit", "feature"):
        found = one_summary(report, "constrained", at, "edge")
        assert found["pearson"] == pytest.approx(1, abs=1e-9)
        assert found["spearman"] == pytest.approx(1, abs=1e-6)
        assert found["sign_agreement"] == found["sign_agreement_predicted"] == 1
        assert found["predicted_only"] == found["seen_only"] == 0
        assert found["predicted_seen"] > 0 and found["neither"] > 0


def test_constrained_and_all_frozen_edges_are_exact_for_clts_of_chance_too(one_of_each: Model):
    """Which is why such a number by itself says nothing of a CLT."""
    rows = validate(*traced(one_of_each), n_features=8, freeze="all").measurements
    rows = select(rows, kind="constrained")
    for clt in ("given", "random", "shuffled"):
        of = select(rows, clt=clt)
        assert len(of) > 20
        assert (of["change"] - of["edge"]).abs().max() <= 1e-8 * of["edge"].abs().max()


def test_iterative_and_all_frozen_small_changes_are_exact(model: Model):
    """Of a change too small to switch a feature on or off, all paths together tell the effect."""
    report = validate(*traced(model), n_features=None, freeze="all", scale=1 + 1e-5, baselines=())
    rows = select(report.measurements, kind="iterative")
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
    rows = validate(graph, model, clt, n_features=None, baselines=()).measurements
    assert (rows["target_layer"] > rows["source_layer"]).all() and (rows["target_pos"] >= rows["source_pos"]).all()
    targets = torch.tensor(rows["target"].to_numpy())
    assert graph.expanded[targets].all()
    logits = graph.nodes.where(NodeKind.LOGIT).tolist()
    assert set(rows.loc[rows["measured_at"] == "logit", "target"]) == set(logits)
    assert set(rows["source"]) > set(torch.nonzero(graph.expanded).flatten().tolist()) & set(rows["source"])
    assert not graph.expanded[torch.tensor(rows["source"].to_numpy())].all()


def test_features_that_only_a_change_makes_active_are_counted(one_of_each: Model):
    graph, model, clt = traced(one_of_each)
    rows = validate(graph, model, clt, n_features=12, scale=-3.0, baselines=()).measurements
    rows = select(rows, kind="iterative").drop_duplicates(["source"])
    assert rows["switched_on"].max() > 0
    for row in rows.iloc[::5].itertuples():
        what = Intervention(layer=row.source_layer, pos=row.source_pos, feature=row.source_feature, scale=-3)
        effect = intervene(model, clt, graph.tokens, [what])
        on = (effect.feature_acts != 0) & (effect.baseline_feature_acts == 0)
        assert row.switched_on == int(on.sum())


def test_how_runs_are_batched_does_not_matter(one_of_each: Model):
    graph, model, clt = traced(one_of_each)
    ones, many = (validate(graph, model, clt, 12, batch_size=size, baselines=()).measurements for size in (1, 5))
    pd.testing.assert_frame_equal(ones, many, rtol=1e-9, atol=1e-12)


# -- targets of every kind -----------------------------------------------------------------------------------


def mixed_targets(model: Model) -> list[Any]:
    direction = torch.randn(model.cfg.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    before = "hook_resid_mid" if input_hook_of(model) == "hook_resid_mid" else "hook_resid_pre"
    return [
        5,
        TokenTarget(9, pos=4),
        DifferenceTarget(6, 7),
        FeatureTarget(1, 3),
        FeatureTarget(2, 4, pos=5),
        DirectionTarget(direction, "blocks.1.hook_resid_post", pos=5, name="random"),
        DirectionTarget(direction, f"blocks.2.{before}"),
    ]


def test_every_kind_of_target_moves_by_its_edge(model: Model):
    """With all held and every layer constrained, what is measured of a target is what the graph says of it."""
    graph, model, clt = traced(model, targets=mixed_targets(model))
    rows = validate(graph, model, clt, n_features=24, freeze="all", baselines=()).measurements
    rows = select(rows, kind="constrained", measured_at="logit")
    assert set(rows["target_kind"]) == {"token", "difference", "feature", "direction"}
    assert rows["target"].nunique() == len(graph.logit_tokens)
    for target, of in rows.groupby("target"):
        off = (of["change"] - of["edge"]).abs().max()
        assert off <= 1e-9 * max(1.0, of["edge"].abs().max()), graph.logit_tokens
        assert of["edge"].abs().max() > 1e-3, target


def test_mixed_targets_are_weighed_as_influence_weighs_them(one_of_each: Model):
    graph, model, clt = traced(one_of_each, targets=mixed_targets(one_of_each))
    report = validate(graph, model, clt, n_features=None, baselines=())
    weights = graph.logit_probs / graph.logit_probs.sum()
    assert graph.logit_probs[2:].eq(1).all() and (graph.logit_probs[:2] < 1).all()
    logits = graph.nodes.where(NodeKind.LOGIT)
    rows = select(report.measurements, kind="iterative", measured_at="logit", role="tested")
    of_target = dict(zip(rows["target"], rows["weight"], strict=True))
    assert [of_target[int(node)] for node in logits] == pytest.approx(weights.tolist())
    compared = {(kind, at, p): c for kind, at, p, c in report.comparisons()}["iterative", "logit", "influence"]
    influence = graph.influence() / graph.logit_probs.sum()
    for source, predicted, measured in zip(compared.source, compared.predicted, compared.measured, strict=True):
        assert predicted == pytest.approx(float(influence[source]))
        of = rows[rows["source"] == source]
        # Where a source does not reach a target, its effect there is 0, and the weight still counts.
        wanted = sum(row.weight * abs(row.change / row.target_activation) for row in of.itertuples())
        assert measured == pytest.approx(wanted)
    assert rows.groupby("source").size().nunique() > 1


def test_graphs_of_older_files_are_measured_where_they_say_enough(one_of_each: Model):
    graph, model, clt = traced(one_of_each, targets=[5, FeatureTarget(1, 3)])
    known, derived = (validate(g, model, clt, 8, baselines=()) for g in (graph, replace(graph, targets=None)))
    pd.testing.assert_frame_equal(known.measurements, derived.measurements)


# -- chance ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk", "batchtopk"])
@pytest.mark.parametrize("which", BASELINES)
def test_a_clt_of_chance_is_like_the_given_one(one_of_each: Model, activation: str, which):
    clt = tiny_clt(one_of_each, activation=activation, span=2)
    tokens = random_tokens(one_of_each, pos=12)[0]
    made, again = (baseline_clt(which, one_of_each, clt, tokens, seed=0) for _ in range(2))
    assert made.cfg == clt.cfg and made.b_dec is clt.b_dec
    _, cache = run_with_cache(one_of_each, tokens[None], lambda name: name.endswith(clt.cfg.input_hook))
    x = torch.stack([cache[f"blocks.{t}.{clt.cfg.input_hook}"][0, 1:] for t in clt.layers], dim=1)
    acts, given = made.encode(x), clt.encode(x)
    for layer in clt.layers:
        assert torch.equal(made.W_dec[layer], again.W_dec[layer])
        norms = [c.W_dec[layer].norm(dim=-1) for c in (made, clt)]
        torch.testing.assert_close(*norms)
        cosines = torch.cosine_similarity(made.W_dec[layer], clt.W_dec[layer], dim=-1)
        assert cosines.max() < 0.9, "no decoder vector keeps its direction"
        if which == "shuffled":
            assert made.W_enc is clt.W_enc and torch.equal(acts, given)
            continue
        mine, its = acts[:, layer], given[:, layer]
        # TopK keeps k of either, fewer where fewer are positive.
        tolerance = 0.15 if activation == "topk" else 0
        assert mine.count_nonzero() == pytest.approx(int(its.count_nonzero()), rel=tolerance)
        assert float(mine[mine != 0].mean()) == pytest.approx(float(its[its != 0].mean()))
        size = made.W_enc[layer].norm(dim=0) / clt.W_enc[layer].norm(dim=0)
        torch.testing.assert_close(size, size[:1].expand_as(size))


def test_each_prompt_has_clts_of_chance_of_its_own(one_of_each: Model):
    clt = tiny_clt(one_of_each)
    a, b = (baseline_clt("random", one_of_each, clt, random_tokens(one_of_each, seed=s)[0], seed=0) for s in (1, 2))
    assert torch.cosine_similarity(a.W_enc[0], b.W_enc[0], dim=0).abs().max() < 0.9


def test_baselines_are_traced_as_the_graph_was(one_of_each: Model, monkeypatch):
    graphs = []

    def keep(*args: Any, **options: Any) -> AttributionGraph:
        graphs.append(attribute(*args, **options))
        return graphs[-1]

    monkeypatch.setattr("tl_clt.interventions.validation.attribute", keep)
    options: dict[str, Any] = {"bos": "features", "bias_nodes": False, "keep_edges": 0.9, "max_feature_nodes": 20}
    graph, model, clt = traced(one_of_each, targets=[5, DifferenceTarget(6, 7)], **options)
    report = validate(graph.prune(0.95, 0.99), model, clt, 6)
    assert report.clts == ["given", "random", "shuffled"] and len(graphs) == 2
    for found in graphs:
        assert found.targets == graph.targets and found.is_sparse
        assert found.info["bos"] == "features" and not found.info["bias_nodes"]
        assert int(found.expanded.sum()) == int(graph.expanded.sum()) == 22
    features = graph.nodes.take(graph.nodes.where(NodeKind.FEATURE))
    shuffled = graphs[1].nodes.take(graphs[1].nodes.where(NodeKind.FEATURE))
    assert torch.equal(features.index, shuffled.index) and torch.equal(features.activation, shuffled.activation)


def test_without_baselines_the_report_says_so(one_of_each: Model):
    report = validate(*traced(one_of_each), n_features=6, baselines=())
    assert report.clts == ["given"] and "No baseline was taken" in str(report)
    assert not any(name.startswith("above") for name in report.chance)


def reports_on(model: Model, clt: CrossLayerTranscoder, n_prompts: int, n_features: int) -> ValidationReport:
    prompts = [random_tokens(model, pos=6, seed=seed)[0] for seed in range(n_prompts)]
    graphs = [attribute(model, clt, tokens, progress=False) for tokens in prompts]
    return ValidationReport.concat([validate(g, model, clt, n_features, progress=False) for g in graphs])


def test_a_random_clt_is_high_and_no_better_than_chance():
    """What a random CLT on a random model scores looks good by itself, and the report shows that it is nothing."""
    model = tiny_hooked("gpt2")
    report = reports_on(model, tiny_clt(model), 10, 8)
    chance = report.chance.set_index(["kind", "measured_at", "prediction", "statistic"])
    for kind in ("constrained", "iterative"):
        assert chance.loc[(kind, "logit", "influence", "spearman"), "given"] > 0.72
    told = chance[chance["given_n"] > 0]
    for baseline in BASELINES:
        assert (told[f"above_{baseline}_low"] > 0).mean() <= 0.05, "of 95% intervals, one in twenty may lie beside 0"
    for kind in KINDS:
        influence = chance.loc[(kind, "logit", "influence", "spearman")]
        assert influence["above_random_low"] <= 0 <= influence["above_random_high"]


def neurons_clt(model: HookedTransformer) -> CrossLayerTranscoder:
    """Each neuron of plain ReLU MLPs a feature: exactly the model."""
    cfg = model.cfg
    settings = {"span": 1, "activation": "relu", "input_hook": "mlp.hook_in", "dtype": "float64"}
    shape = {"n_layers": cfg.n_layers, "d_model": cfg.d_model, "d_transcoder": cfg.d_mlp}
    clt = CrossLayerTranscoder(CrossLayerTranscoderConfig(**shape, **settings))
    with torch.no_grad():
        for layer in clt.layers:
            clt.W_enc[layer], clt.b_enc[layer] = model.W_in[layer], model.b_in[layer]
            clt.b_dec[layer] = model.b_out[layer]
            clt.W_dec[layer].copy_(model.W_out[layer][:, None])
    return clt.requires_grad_(False)


def test_a_clt_that_is_the_model_is_better_than_chance_where_the_model_reacts():
    """And only there: constrained and iterative interventions hold or replace the MLPs, so that they are as well
    predicted for any CLT."""
    model = HookedTransformer(
        HookedTransformerConfig(**{**COMMON, "act_fn": "relu", "normalization_type": "LN", "dtype": torch.float64})
    )
    randomise(model, 0)
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.W_out *= 2  # What MLPs write matters beside what they read.
    report = reports_on(model.eval(), neurons_clt(model), 10, 8)
    chance = report.chance.set_index(["measured_at", "prediction", "statistic", "kind"])
    for statistic in ("spearman", "within_target", "within_source"):
        found = chance.loc[("feature", "total", statistic)]
        for baseline in BASELINES:
            assert found.loc["model", f"above_{baseline}_low"] > 0, (statistic, baseline)
            assert found.loc["iterative", f"above_{baseline}_low"] <= 0.01, (statistic, baseline)
    rows = select(report.measurements, clt="given")
    iterative, itself = (select(rows, kind=kind)["change"].to_numpy() for kind in ("iterative", "model"))
    # The features are the MLPs: it is the same whether they react or the MLPs do.
    np.testing.assert_allclose(itself, iterative, rtol=0, atol=1e-9 * abs(iterative).max())


@pytest.mark.parametrize("scale", [0.0, 1 + 1e-6])
def test_small_changes_of_what_is_written_are_predicted_without_mlps_in_between(one_of_each: Model, scale: float):
    """From the last layer, nothing but the norm before the logits reacts: edges tell what the model does."""
    graph, model, clt = traced(one_of_each, targets=list(range(5, 25)))
    rows = validate(graph, model, clt, n_features=None, freeze="all", scale=scale, baselines=()).measurements
    rows = select(rows, kind="model", source_layer=2)
    assert len(rows) > 20
    assert (rows["change"] - rows["edge"]).abs().max() <= 1e-8 * max(rows["edge"].abs().max(), 1e-3)


@pytest.mark.parametrize("kind", ["hooked-gemma", "bridge-gemma3"])
def test_what_is_written_goes_through_the_norm_behind_the_mlp(session_models, kind: str):
    model = session_models(kind)
    clt = tiny_clt(model, input_hook="mlp.hook_in", output_hook="mlp.hook_out")
    tokens = random_tokens(model, pos=7, seed=5)[0]
    graph = attribute(model, clt, tokens, targets=list(range(5, 25)), progress=False)
    rows = validate(graph, model, clt, n_features=None, freeze="all", baselines=()).measurements
    rows = select(rows, kind="model", source_layer=2)
    assert len(rows) > 20
    assert (rows["change"] - rows["edge"]).abs().max() <= 1e-8 * rows["edge"].abs().max()


# -- rank correlations and their intervals -------------------------------------------------------------------


def drawn(n_prompts: int, n: int = 24) -> tuple[np.ndarray, ...]:
    """prompt, group, and three things that go together, with ties."""
    random = np.random.default_rng(0)
    prompt = np.repeat(np.arange(n_prompts), n)
    group = prompt * 2 + np.tile([0, 1], n_prompts * n // 2)
    z = random.normal(size=len(prompt)) + prompt
    x, y = (np.round(z + random.normal(size=len(prompt)), 1) for _ in range(2))
    return prompt, group, x, y, z


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    return float(pd.Series(x).corr(pd.Series(y), method="spearman"))


def partial_by_hand(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> float:
    """The correlation of what a straight line through the ranks of z leaves of the ranks of x and y."""
    rx, ry, rz = (pd.Series(v).rank().to_numpy() for v in (x, y, z))
    left = [r - np.polyval(np.polyfit(rz, r, 1), rz) for r in (rx, ry)]
    return float(np.corrcoef(*left)[0, 1])


def by_repeating(times: np.ndarray, prompt: np.ndarray, *values: np.ndarray) -> list[np.ndarray]:
    again = np.repeat(np.arange(len(prompt)), times[prompt].astype(int))
    return [v[again] for v in values]


def test_pooled_correlations_are_those_of_prompts_repeated():
    prompt, _, x, y, z = drawn(6)
    plain, partial = pooled(prompt, 6, x, y), pooled(prompt, 6, x, y, z)
    assert plain.value(6) == pytest.approx(spearman(x, y))
    assert partial.value(6) == pytest.approx(partial_by_hand(x, y, z))
    times = resample(6)[:5]
    for number, drawn_times in enumerate(times):
        again = by_repeating(drawn_times, prompt, x, y, z)
        assert plain.at(times)[number] == pytest.approx(spearman(again[0], again[1]))
        assert partial.at(times)[number] == pytest.approx(partial_by_hand(*again))


def test_correlations_within_groups_leave_out_what_differs_between_them():
    prompt, group, x, y, z = drawn(6)
    for given, correlate in ((None, lambda i: spearman(x[i], y[i])), (z, _partial_of(x, y, z))):
        found = within(group, prompt, 6, x, y, given)
        each = [correlate(group == g) for g in np.unique(group)]
        assert (found.n, found.n_prompts) == (12, 6)
        assert found.value(6) == pytest.approx(np.mean(each))
        times = np.array([[2.0, 0, 1, 0, 0, 3]])
        assert found.at(times)[0] == pytest.approx(np.average(each, weights=np.repeat(times[0], 2)))


def _partial_of(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> Callable[[np.ndarray], float]:
    return lambda i: partial_by_hand(x[i], y[i], z[i])


def test_groups_of_fewer_than_five_and_constant_ones_do_not_count():
    prompt = np.zeros(15, dtype=int)
    group = np.array([0] * 4 + [1] * 5 + [2] * 6)
    x = np.array([0.0, 1, 2, 3] + [0.0, 1, 2, 3, 4] + [7.0] * 6)
    y = np.array([3.0, 2, 1, 0, 0, 1, 2, 3, 5, 0, 1, 2, 3, 4, 5])
    found = within(group, prompt, 1, x, y)
    assert found.n == 1 and found.value(1) == pytest.approx(1)
    assert math.isnan(within(group[:4], prompt[:4], 1, x[:4], y[:4]).value(1))
    constant = pooled(prompt, 1, np.full(15, 1 / 3), y)
    assert math.isnan(constant.value(1))
    # A third thing that ranks nothing apart explains nothing.
    size = np.ones(15)
    assert pooled(prompt, 1, x, y, size).value(1) == pytest.approx(spearman(x, y))


def test_no_interval_comes_from_fewer_than_ten_prompts():
    for n_prompts in (9, 10):
        prompt, group, x, y, z = drawn(n_prompts)
        for statistic in (pooled(prompt, n_prompts, x, y), within(group, prompt, n_prompts, x, y, z)):
            low, high = interval(statistic, resample(n_prompts))
            if n_prompts < 10:
                assert math.isnan(low) and math.isnan(high)
            else:
                assert low < statistic.value(n_prompts) < high
                assert interval(statistic, resample(n_prompts), less=statistic) == (0, 0)
    # Nine prompts of ten have pairs.
    few = prompt < 9
    statistic = pooled(prompt[few], 10, x[few], y[few])
    assert statistic.n_prompts == 9 and math.isnan(interval(statistic, resample(10)).low)


def test_an_interval_holds_nineteen_of_twenty_resamples():
    prompt, _, x, y, _ = drawn(12)
    statistic: Statistic = pooled(prompt, 12, x, y)
    low, high = interval(statistic, resample(12))
    inside = (statistic.at(resample(12)) >= low) & (statistic.at(resample(12)) <= high)
    assert inside.mean() == pytest.approx(0.95, abs=0.005)


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
    controls = [
        (node, of) for node, of in zip(sample.node.tolist(), sample.control_of.tolist(), strict=True) if of >= 0
    ]
    for node, of in controls:
        _assert_alike(graph, node, of)


def _assert_alike(graph: AttributionGraph, node: int, of: int) -> None:
    """A control is another feature of the same layer, at the same position if three others are, and only two of these,
    whatever their influence, have an activation more like."""
    nodes = graph.nodes
    others = nodes.where(NodeKind.FEATURE)
    others = others[(nodes.layer[others] == nodes.layer[of]) & (others != of)]
    here = others[nodes.pos[others] == nodes.pos[of]]
    among = here if len(here) >= 3 else others
    assert node in among
    away = (nodes.activation - nodes.activation[of]).abs()
    assert (away[among] < away[node]).sum() <= 2


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
    table = table.assign(prompt=0, act_change=table["change"], target_activation=2.0, weight=0.5, switched_on=3.0)
    table = table.assign(source_influence=table["influence"], clt="given", source_size=1.0, target=99)
    return ValidationReport(measurements=table, threshold=threshold, info={})


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
    assert influence["spearman"] == pytest.approx(0.9)
    assert math.isnan(float(influence["sign_agreement"]))
    total = one_summary(report, "iterative", "feature", "total")
    assert total["n"] == 1 and total["sign_agreement"] == 0
    assert math.isnan(float(total["spearman"]))
    assert report.summary["threshold"].eq(0.1).all()
    assert set(report.summary.loc[report.summary["kind"] == "constrained", "prediction"]) == {"edge", "influence"}
    low, high = (
        one_summary(report, "constrained", "feature", "edge", split)["error_share"] for split in ("low", "high")
    )
    assert low == pytest.approx(0.2) and high == pytest.approx(0.45)
    assert set(report.summary.loc[report.summary["kind"] == "iterative", "errors"]) == {"all", "low"}


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
    assert beside["n"] == beside["n_distinct"] == 1 and beside["larger"] == 1
    assert beside["tested_mean"] == pytest.approx(0.75) and beside["control_median"] == pytest.approx(0.05)
    assert report.controls.set_index("kind").loc["constrained", "n"] == 0
    assert report.switched_on.to_dict("records") == [{"kind": "iterative", "clt": "given", "switched_on": 3.0}]


def test_a_control_of_several_is_counted_once():
    rows = [("iterative", "tested", -1, s, "logit", 0.1, 1.0, 1.0, 0.5, 1.0) for s in (0, 1, 2)]
    rows += [("iterative", "control", of, 7 + of // 2, "logit", 0.1, 0.0, 0.0, 0.5, 0.2) for of in (0, 1, 2)]
    beside = report_of(rows).controls.set_index("kind").loc["iterative"]
    assert (beside["n"], beside["n_distinct"]) == (3, 2)
    assert math.isnan(beside["larger_low"]), "one prompt gives no interval"


def test_influential_features_of_atlas_matter_more_than_their_controls():
    model, clt = load_organism("atlas")
    prompts = [f"Fact: the capital of the state containing {city} is" for city in ("Dallas", "Oakland")]
    reports = [validate(attribute(model, clt, p, progress=False), model, clt, n_features=40) for p in prompts]
    joined = ValidationReport.concat([ValidationReport.concat(reports[:1]), reports[1]])
    assert joined.info["prompts"] == [f"<bos> {p}" for p in prompts] and joined.info["n_features"] == 80
    assert joined.info["n_controls"] == sum(r.info["n_controls"] for r in reports)
    assert joined.info["intervals"].startswith("none: 2 prompts")
    for number, report in enumerate(reports):
        part = select(joined.measurements, prompt=number).drop(columns="prompt")
        pd.testing.assert_frame_equal(part.reset_index(drop=True), report.measurements.drop(columns="prompt"))
    beside = select(joined.controls, clt="given")
    # Those of like activation may be influential too.
    assert (beside["larger"] > 0.5).all() and (beside["n_distinct"] <= beside["n"]).all()
    assert (beside["tested_mean"] > 1.5 * beside["control_mean"]).all()
    assert one_summary(joined, "iterative", "logit", "influence")["spearman"] > 0.72
    assert one_summary(joined, "constrained", "feature", "edge")["pearson"] > 0.9


def test_reports_that_cannot_be_joined(one_of_each: Model):
    given = traced(one_of_each)
    options: dict[str, Any] = {"n_features": 2, "baselines": ()}
    first = validate(*given, **options)
    others = {
        "threshold": validate(*given, **options, threshold=0.2),
        "scale": validate(*given, **options, scale=-1.0),
        "freeze": validate(*given, **options, freeze="all"),
        "baselines": validate(*given, n_features=2, baselines=("shuffled",)),
    }
    for name, other in others.items():
        with pytest.raises(ConfigError, match=f"{name} differs"):
            ValidationReport.concat([first, other])
    with pytest.raises(ConfigError, match="no report"):
        ValidationReport.concat([])


def test_it_can_be_printed_and_saved(session_models, tmp_path):
    report = validate(*traced(session_models("hooked-gpt2")), n_features=10)
    text = str(report)
    assert "1 prompts" in text and "constrained" in text and "spearman" in text and "controls" in text
    assert "above_random" in text and "above_shuffled" in text and "intervals none: 1 prompts" in text
    folder = report.save(tmp_path / "report")
    assert {p.name for p in folder.iterdir()} == {"measurements.csv", "report.json", *(f"{n}.png" for n in FIGURES)}
    read = json.loads((folder / "report.json").read_text())
    assert read["info"] == report.info and read["threshold"] == report.threshold
    assert len(read["summary"]) == len(report.summary) and len(read["controls"]) == 3 * 3
    assert len(read["chance"]) == len(report.chance)
    table = pd.read_csv(folder / "measurements.csv")
    pd.testing.assert_frame_equal(table, report.measurements, check_dtype=False)
    with pytest.raises(OutputNotEmpty, match="not empty"):
        report.save(folder)


def test_figures_have_constrained_on_the_left_iterative_beside_it_and_model_on_the_right(
    session_models, as_users_run_it
):
    report = validate(*traced(session_models("bridge-llama")), n_features=8)
    for name in FIGURES:
        titles = [axes.get_title() for axes in report.plot(name).axes[:3]]
        assert all(title.startswith(kind) for title, kind in zip(titles, KINDS, strict=True))
    with pytest.raises(ConfigError, match="no figure 'pie'"):
        report.plot("pie")  # type: ignore[arg-type]


# -- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n_features": 0}, "n_features is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"scale": 1.0}, "changes nothing"),
        ({"scale": math.nan}, "scale is nan"),
        ({"threshold": 0.0}, "threshold is 0.0"),
        ({"baselines": ("chance",)}, "give some of"),
        ({"baselines": ("random", "random")}, "each once"),
    ],
    ids=str,
)
def test_bad_arguments(one_of_each: Model, as_users_run_it, given: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        validate(*traced(one_of_each), **given)


def test_graphs_that_cannot_be_tested(one_of_each: Model, as_users_run_it):
    other = random_tokens(one_of_each, pos=7, seed=6)[0]
    with pytest.raises(ConfigError, match="contrastive"):
        validate(*traced(one_of_each, contrast=other))
    graph, model, clt = traced(one_of_each, targets=[DifferenceTarget(3, 4)])
    with pytest.raises(TargetError, match="does not tell what its targets are.*Trace the prompt again"):
        validate(replace(graph, targets=None), model, clt)
    graph, model, _ = traced(one_of_each)
    for clt in (tiny_clt(model, seed=9), tiny_clt(model, d_transcoder=4, l0=1)):
        with pytest.raises(CLTMismatch, match="another model or CLT"):
            validate(graph, model, clt)
    nothing: Tensor = torch.zeros_like(graph.adjacency)
    with pytest.raises(ConfigError, match="no feature with any influence"):
        validate(AttributionGraph(**{**vars(graph), "adjacency": nothing}), model, tiny_clt(model))
