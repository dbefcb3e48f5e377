"""`measure_supernodes`: joint and single changes equal interventions and, where all is linear, what graphs predict."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.models import random_tokens, tiny_clt, tiny_hooked
from tl_clt import (
    AttributionGraph,
    Intervention,
    NodeKind,
    attribute,
    find_supernodes,
    intervene,
    load_organism,
    measure_supernodes,
)
from tl_clt.attribution import DifferenceTarget, DirectionTarget, FeatureTarget, TokenTarget, score_subgraph
from tl_clt.errors import CLTMismatch, ConfigError, InterventionError
from tl_clt.interventions.validation import predict, predict_joint

DALLAS = "Fact: the capital of the state containing Dallas is"


@pytest.fixture(scope="module")
def model():
    return tiny_hooked("gpt2")


@pytest.fixture(scope="module")
def clt(model):
    return tiny_clt(model)


@pytest.fixture(scope="module")
def graph(model, clt) -> AttributionGraph:
    return attribute(model, clt, random_tokens(model, pos=6)[0], max_n_logits=3, progress=False)


def groups_of(graph: AttributionGraph, n_groups: int = 3, every: int = 2) -> dict[str, list[int]]:
    """Groups that mean nothing, of several layers and positions."""
    features = graph.nodes.where(NodeKind.FEATURE).tolist()[::every]
    return {f"group {i}": features[i::n_groups] for i in range(n_groups)}


@pytest.mark.parametrize("skip", [False, True])
def test_with_everything_held_joint_and_single_effects_are_the_graphs_edges(model, skip: bool):
    clt = tiny_clt(model, skip=skip)
    tokens = random_tokens(model, pos=6)[0]
    targets = [TokenTarget(5), TokenTarget(9), DifferenceTarget(3, 4), FeatureTarget(2, 1)]
    targets.append(DirectionTarget(torch.ones(32, dtype=torch.float64), "blocks.2.hook_resid_post"))
    for bos in ("error", "features"):
        graph = attribute(model, clt, tokens, targets, bos=bos, progress=False)
        report = measure_supernodes(
            model, clt, graph, groups_of(graph), n_random=2, through_layer="all", freeze="all", progress=False
        )
        table = report.table
        assert len(table) == 9 and (table["direct"].abs() > 1e-6).all()
        assert table["joint"].tolist() == pytest.approx(table["direct"].tolist(), rel=1e-9, abs=1e-12)
        assert table["singles"].tolist() == pytest.approx(table["direct"].tolist(), rel=1e-9, abs=1e-12)


def always_on(model):
    """A CLT whose features are all active, far from 0: none switches, so that the replacement model is linear."""
    clt = tiny_clt(model, activation="relu")
    with torch.no_grad():
        clt.b_enc += 30
        for source in clt.layers:
            clt.W_dec[source].mul_(0.02)
    return clt


@pytest.mark.parametrize("scale", [0.0, -1.0, 0.5])
def test_where_no_feature_switches_the_joint_effect_is_what_all_paths_carry(model, scale: float):
    clt = always_on(model)
    graph = attribute(model, clt, random_tokens(model, pos=5)[0], max_n_logits=2, progress=False)
    groups = groups_of(graph, every=5)
    report = measure_supernodes(model, clt, graph, groups, scale=scale, n_random=1, freeze="all", progress=False)
    table = report.table
    assert table["joint"].tolist() == pytest.approx(table["total"].tolist(), rel=1e-7)
    # Members of several layers pass on to each other: the whole is not the sum of its parts.
    assert (table["joint"] - table["singles"]).abs().max() > 1e-3 * table["joint"].abs().max()
    weights = graph.logit_probs / graph.logit_probs.sum()
    for row, members in zip(table.itertuples(), groups.values(), strict=False):
        total = predict(graph, torch.tensor(members)).total[graph.nodes.where(NodeKind.LOGIT)]
        assert row.singles == pytest.approx((scale - 1) * float(weights @ total.sum(dim=1)), rel=1e-7)


def test_the_joint_prediction_by_matrices(graph: AttributionGraph):
    """delta = E/act (delta_acts), the sources' own activation multiplied after they have reacted."""
    sources, scale = torch.tensor(groups_of(graph)["group 0"]), 0.3
    E, n = graph.adjacency, len(graph.nodes)
    is_feature = graph.nodes.is_kind(NodeKind.FEATURE)
    per_unit = torch.where(is_feature, 1 / graph.nodes.activation, 0.0)
    change = torch.zeros(n, dtype=E.dtype)
    for _ in range(5):  # more than there are layers
        acts = torch.where(is_feature, change, 0.0)
        acts[sources] = (scale - 1) * graph.nodes.activation[sources] + scale * change[sources]
        change = E @ (per_unit * acts)
    assert torch.allclose(predict_joint(graph, sources, scale), change, rtol=1e-12)


def test_effects_are_those_of_interventions_by_hand(model, clt, graph: AttributionGraph):
    groups = groups_of(graph)
    report = measure_supernodes(model, clt, graph, groups, n_random=0, progress=False)
    weights = graph.logit_probs / graph.logit_probs.sum()
    tokens = graph.nodes.index[graph.nodes.where(NodeKind.LOGIT)]

    def change(members: list[int]) -> tuple[float, bool]:
        effect = intervene(model, clt, graph.tokens, [Intervention.of(graph, n) for n in members])
        before, after = effect.baseline_logits[0, -1], effect.logits[0, -1]
        rise = (after - before)[tokens] - (after - before).mean()
        return float(rise @ weights), bool(before.argmax() == after.argmax())

    influence = graph.influence() / graph.logit_probs.sum()
    for row, (name, members) in zip(report.table.itertuples(), groups.items(), strict=True):
        joint, kept = change(members)
        assert (row.supernode, row.role, row.n_features) == (name, "group", len(members))
        assert row.joint == pytest.approx(joint, rel=1e-9) and row.answer_kept == kept
        assert row.singles == pytest.approx(sum(change([n])[0] for n in members), rel=1e-9)
        assert row.influence == pytest.approx(float(influence[members].sum()))


def test_the_same_whatever_the_batch_and_from_the_same_seed(model, clt, graph):
    options = {"n_random": 2, "progress": False}
    first = measure_supernodes(model, clt, graph, groups_of(graph), batch_size=3, **options)
    again = measure_supernodes(model, clt, graph, groups_of(graph), **options)
    other = measure_supernodes(model, clt, graph, groups_of(graph), seed=1, **options)
    assert first.table["joint"].tolist() == pytest.approx(again.table["joint"].tolist(), rel=1e-9)
    differs = (other.table["joint"] - again.table["joint"]).abs() > 1e-9
    assert set(other.table.loc[differs, "role"]) == {"random"}


def test_scores_are_the_subgraphs_beside_as_many_features_at_random(model, clt, graph):
    groups = groups_of(graph)
    scores = measure_supernodes(model, clt, graph, groups, n_random=3, progress=False).scores
    assert scores["role"].tolist() == ["supernodes"] + ["random"] * 3 and scores["n_features"].nunique() == 1
    assert tuple(scores.iloc[0][["replacement", "completeness"]]) == pytest.approx(
        tuple(score_subgraph(graph, [n for members in groups.values() for n in members]))
    )


def test_agreement_is_of_groups_of_one_role(model, clt, graph):
    report = measure_supernodes(model, clt, graph, groups_of(graph, 4), n_random=2, progress=False)
    agreement = report.agreement.set_index(["role", "prediction"])
    assert agreement.loc[("group", "influence"), "n_groups"] == 4
    assert agreement.loc[("random", "singles"), "n_groups"] == 8
    of = report.table[report.table["role"] == "group"]
    assert agreement.loc[("group", "total"), "pearson"] == pytest.approx(of["total"].corr(of["joint"]))
    assert agreement.loc[("group", "influence"), "spearman"] == pytest.approx(
        of["influence"].corr(of["joint"].abs(), method="spearman")
    )
    few = measure_supernodes(model, clt, graph, groups_of(graph, 2), n_random=0, progress=False).agreement
    assert few["pearson"].isna().all() and few["n_groups"].tolist() == [2] * 4 + [0] * 4


def test_on_atlas_groups_of_the_pruned_graph_do_what_groups_of_chance_do_not():
    model, clt = load_organism("atlas")
    graph = attribute(model, clt, DALLAS, progress=False)
    groups = find_supernodes(graph, graph.prune_masks().nodes)
    report = measure_supernodes(model, clt, graph, groups, n_random=2, progress=False)
    size = report.table.assign(size=report.table["joint"].abs()).groupby("role")["size"].mean()
    assert size["group"] > 3 * size["random"]
    scores = report.scores.groupby("role")[["replacement", "completeness"]].mean()
    assert (scores.loc["supernodes"] > scores.loc["random"] + 0.1).all()


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"supernodes": [1, 2]}, ConfigError, "give a mapping"),
        ({"supernodes": {"a": [-1]}}, ConfigError, "of kind logit"),
        ({"graph": 3}, ConfigError, "The graph is 3"),
        ({"scale": 1}, ConfigError, "scale is 1"),
        ({"n_random": -1}, ConfigError, "n_random is -1"),
        ({"n_random": 10**9}, ConfigError, "give 0 to 1000, each a run"),
        ({"freeze": "some"}, ConfigError, "freeze is 'some'"),
        ({"through_layer": 7}, InterventionError, "through_layer is 7"),
        ({"batch_size": 0}, ConfigError, "batch_size is 0"),
        ({"clt": 3}, CLTMismatch, "CLT is 3"),
    ],
)
def test_bad_arguments_are_refused(as_users_run_it, model, clt, graph, changed, error, words):
    arguments = {"model": model, "clt": clt, "graph": graph, "supernodes": groups_of(graph), "progress": False}
    with pytest.raises(error, match=words):
        measure_supernodes(**{**arguments, **changed})


def test_graphs_of_another_clt_or_prompt_are_refused(model, clt, graph):
    with pytest.raises(CLTMismatch, match="graph of another CLT"):
        measure_supernodes(model, tiny_clt(model, seed=5), graph, groups_of(graph), progress=False)
    elsewhere = replace(graph, tokens=graph.tokens.flip(0))
    with pytest.raises(CLTMismatch, match="other activations"):
        measure_supernodes(model, clt, elsewhere, groups_of(graph), progress=False)
    contrast = attribute(model, clt, graph.tokens, contrast=graph.tokens.flip(0), progress=False)
    with pytest.raises(ConfigError, match="contrastive"):
        measure_supernodes(model, clt, contrast, groups_of(contrast), progress=False)
