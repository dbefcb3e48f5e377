"""`measure_curves`: every circuit equals a run written out by hand; areas are those of MIB's own sums."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal

from tests.models import random_tokens, tiny_clt, tiny_hooked
from tests.replacement.by_hand import clean_run, run_by_hand
from tl_clt import NodeKind, attach, attribute, frozen_hooks, load_organism
from tl_clt.attribution import DifferenceTarget
from tl_clt.errors import AlreadyAttached, ConfigError, DatasetError, FormatError, PromptError, TargetError
from tl_clt.evaluation import FaithfulnessCurves, measure_curves
from tl_clt.evaluation.curves import SHARES

ATLAS = [
    f"the {relation} of the state containing {city} is"
    for relation in ("capital", "region")
    for city in ("Dallas", "Oakland", "Tucson", "Mobile", "Boulder")
]
FEW = (0.02, 0.1, 0.3, 1.0)


@pytest.fixture(scope="module")
def model():
    return tiny_hooked("gpt2")


@pytest.fixture(scope="module")
def clt(model):
    return tiny_clt(model)


def order_by_hand(graph, kinds) -> list[int]:
    """Nodes at positions after 0, by influence, largest first."""
    chosen = torch.nonzero(graph.nodes.is_kind(*kinds) & (graph.nodes.pos > 0)).flatten().tolist()
    influence = graph.influence().tolist()
    return sorted(chosen, key=lambda node: -influence[node])


def circuit_by_hand(model, clt, tokens, graph, circuit, *, errors, ablated=None, freeze="attention"):
    """Logits at the end with the features and errors of a circuit alone, by ordinary hooks and without `attach`."""
    clean = clean_run(model, clt, tokens)
    error = clean.mlp_outs - clt(clean.inputs)
    acts_there, errors_there = torch.zeros_like(clt.encode(clean.inputs)), torch.zeros_like(error)
    if ablated is not None:
        there = clean_run(model, clt, ablated)
        acts_there, errors_there = clt.encode(there.inputs), there.mlp_outs - clt(there.inputs)
    features = torch.zeros_like(acts_there, dtype=torch.bool)
    some_errors = torch.full(error.shape[:3], errors == "kept")
    features[:, 0], some_errors[:, 0] = True, True
    for node in map(graph.nodes.__getitem__, circuit):
        if node.kind == NodeKind.FEATURE:
            features[0, node.pos, node.layer, node.index] = True
        else:
            some_errors[0, node.pos, node.layer] = True

    def edit(acts, layer):
        return torch.where(features[..., layer, :], acts, acts_there[..., layer, :])

    _, cache = model.run_with_cache(tokens)
    hooks = [] if freeze == "none" else frozen_hooks(cache, scales=freeze == "all")
    left = torch.where(some_errors[..., None], error, errors_there)
    return run_by_hand(model, clt, tokens, errors=left, edit=edit, hooks=hooks)[0, -1]


@pytest.mark.parametrize("freeze", ["attention", "all", "none"])
@pytest.mark.parametrize("errors", ["nodes", "kept", "removed"])
def test_every_circuit_equals_a_run_by_hand(model, clt, errors, freeze):
    tokens = random_tokens(model, pos=6)
    with torch.no_grad():
        target = int(model(tokens)[0, -1].argmax())
    report = measure_curves(
        model, clt, tokens, errors=errors, freeze=freeze, rankings="influence", shares=FEW, progress=False
    )
    graph = attribute(model, clt, tokens[0], [target], progress=False)
    kinds = [NodeKind.FEATURE, NodeKind.ERROR] if errors == "nodes" else [NodeKind.FEATURE]
    order = order_by_hand(graph, kinds)
    for row in report.table.itertuples():
        assert row.n_nodes == len(order) and row.n_kept == int(row.share * len(order) + 1e-9)
        for measured, circuit in ((row.measure, order[: row.n_kept]), (row.measure_empty, [])):
            logits = circuit_by_hand(model, clt, tokens, graph, circuit, errors=errors, freeze=freeze)
            assert measured == pytest.approx(float(logits[target] - logits.mean()), abs=1e-9)
        assert row.answer == (int(circuit_argmax(model, clt, tokens, graph, order, row, errors, freeze)) == target)
    assert report.table["n_kept"].nunique() == len(FEW)


def circuit_argmax(model, clt, tokens, graph, order, row, errors, freeze):
    kept = order[: row.n_kept]
    return circuit_by_hand(model, clt, tokens, graph, kept, errors=errors, freeze=freeze).argmax()


@pytest.mark.parametrize("activation", ["jumprelu", "topk"])
def test_with_counterfactuals_what_is_ablated_is_what_it_is_there(model, activation):
    clt = tiny_clt(model, activation=activation, skip=True)
    tokens, other = random_tokens(model, pos=6), random_tokens(model, pos=6, seed=3)
    with torch.no_grad():
        target, against = 7, int(model(other)[0, -1].argmax())
    report = measure_curves(model, clt, tokens, [target], other, rankings="influence", shares=FEW, progress=False)
    graph = attribute(model, clt, tokens[0], DifferenceTarget(target, against), contrast=other[0], progress=False)
    order = order_by_hand(graph, [NodeKind.FEATURE, NodeKind.ERROR])
    for row in report.table.itertuples():
        for measured, circuit in ((row.measure, order[: row.n_kept]), (row.measure_empty, [])):
            logits = circuit_by_hand(model, clt, tokens, graph, circuit, errors="nodes", ablated=other)
            assert measured == pytest.approx(float(logits[target] - logits[against]), abs=1e-9)
    assert (report.info["ablated_to"], report.info["metric"]) == ("counterfactual", "difference")
    # All nodes are kept: the model itself, features that are active on the counterfactual prompt alone included.
    last = report.table.iloc[-1]
    assert last["measure"] == pytest.approx(last["measure_model"], abs=1e-9)


def test_the_whole_circuit_is_the_model_where_errors_are_nodes_or_kept(model, clt):
    tokens = random_tokens(model, batch=3, pos=5)
    for errors, exact in (("nodes", True), ("kept", True), ("removed", False)):
        areas = measure_curves(model, clt, tokens, errors=errors, metric="log_prob", progress=False).areas
        assert np.allclose(areas["whole"], 1, atol=1e-9) == exact
        # All nodes are the same whatever their order, up to rounding.
        assert np.ptp(areas["whole"]) < 1e-9


def test_magnitude_is_what_a_node_writes(model, clt):
    """The first circuits by magnitude keep the nodes that write most: told from a run by hand with just these."""
    tokens = random_tokens(model, pos=6)
    with torch.no_grad():
        target = int(model(tokens)[0, -1].argmax())
    report = measure_curves(model, clt, tokens, rankings="magnitude", shares=FEW, progress=False)
    graph = attribute(model, clt, tokens[0], [target], progress=False)
    nodes = graph.nodes
    chosen = torch.nonzero(nodes.is_kind(NodeKind.FEATURE, NodeKind.ERROR) & (nodes.pos > 0)).flatten().tolist()

    def size(number: int) -> float:
        node = nodes[number]
        norm = clt.W_dec[node.layer][node.index].norm() if node.kind == NodeKind.FEATURE else 1.0
        return float(node.activation * norm)

    order = sorted(chosen, key=lambda number: -size(number))
    for row in report.table.itertuples():
        logits = circuit_by_hand(model, clt, tokens, graph, order[: row.n_kept], errors="nodes")
        assert row.measure == pytest.approx(float(logits[target] - logits.mean()), abs=1e-9)


def test_faithfulness_and_areas_are_ratios_of_means_and_trapezoids():
    """By hand: two prompts, two shares."""
    rows = [
        ("CLT", 0, "influence", 0.5, 4, 2, 1.0, 0.0, 2.0, True),
        ("CLT", 0, "influence", 1.0, 4, 4, 2.0, 0.0, 2.0, True),
        ("CLT", 1, "influence", 0.5, 4, 2, 8.0, 2.0, 6.0, False),
        ("CLT", 1, "influence", 1.0, 4, 4, 6.0, 2.0, 6.0, True),
    ]
    columns = ["transcoder", "prompt", "ranking", "share", "n_nodes", "n_kept"]
    columns += ["measure", "measure_empty", "measure_model", "answer"]
    info = {"metric": "logit", "errors": "nodes"}
    report = FaithfulnessCurves(table=pd.DataFrame(rows, columns=columns), info=info)
    # (9 - 2) / (8 - 2) and (8 - 2) / (8 - 2).
    assert report.curves["faithfulness"].tolist() == pytest.approx([7 / 6, 1.0])
    assert report.curves["answers"].tolist() == [0.5, 1.0] and report.curves["n_kept"].tolist() == [2, 4]
    [area] = report.areas.itertuples()
    assert (area.area, area.distance) == pytest.approx((0.5 * (7 / 6 + 1) / 2, 0.5 * (1 / 6) / 2))
    assert np.isnan([area.area_low, area.distance_high]).all()  # two prompts are too few for an interval


def test_a_circuit_that_is_the_model_from_the_first_node_on_has_mibs_largest_area():
    rows = [("CLT", 0, "random", share, 9, 9, 2.0, 1.0, 2.0, True) for share in SHARES]
    columns = ["transcoder", "prompt", "ranking", "share", "n_nodes", "n_kept"]
    columns += ["measure", "measure_empty", "measure_model", "answer"]
    report = FaithfulnessCurves(table=pd.DataFrame(rows, columns=columns), info={})
    assert report.areas[["area", "distance"]].iloc[0].tolist() == pytest.approx([0.999, 0.0])


def test_on_atlas_influence_finds_the_circuit_and_chance_does_not():
    model, clt = load_organism("atlas")
    report = measure_curves(model, clt, ATLAS, progress=False)
    area = report.areas.set_index("ranking")["area"]
    assert area["influence"] > 0.9 and area["influence"] > area["magnitude"] + 0.1 > area["random"] + 0.1
    at_tenth = report.curves.query("share == 0.1").set_index("ranking")
    assert at_tenth.loc["influence", "answers"] >= 0.9 and at_tenth.loc["random", "answers"] <= 0.2
    # Ten prompts are enough for intervals, which hold what they are of.
    for low, of, high in (("low", "faithfulness", "high"),):
        assert (report.curves[low] <= report.curves[of] + 1e-12).all()
        assert (report.curves[of] <= report.curves[high] + 1e-12).all()
    assert report.info["targets"][0].strip() == "Austin"


def test_several_transcoders_and_the_same_seed_the_same_order(model, clt):
    tokens = random_tokens(model, batch=2, pos=5)
    both = {"one": clt, "PLT": tiny_clt(model, span=1)}
    first, again = (
        measure_curves(model, both, tokens, seed=seed, batch_size=batch, progress=False)
        for seed, batch in ((1, 32), (1, 3))
    )
    assert_frame_equal(first.table, again.table, rtol=1e-9)
    assert set(first.table["transcoder"]) == {"one", "PLT"}
    other = measure_curves(model, both, tokens, seed=2, progress=False).table
    differs = other["measure"] != first.table["measure"]
    assert set(other.loc[differs, "ranking"]) == {"random"}


def test_targets_may_be_named(model, clt):
    tokens = random_tokens(model, batch=2, pos=5)
    report = measure_curves(model, clt, tokens, [7, 7], shares=(0.5, 1.0), progress=False)
    with torch.no_grad():
        logits = model(tokens)[:, -1].double()
    assert report.table.groupby("prompt")["measure_model"].first().tolist() == pytest.approx(
        (logits[:, 7] - logits.mean(dim=-1)).tolist()
    )


def test_the_model_is_left_as_it_was_and_users_hooks_do_not_act(model, clt):
    tokens = random_tokens(model, pos=5)
    first = measure_curves(model, clt, tokens, shares=(0.5, 1.0), progress=False).table
    with model.hooks([("blocks.0.hook_mlp_out", lambda x, hook: 0 * x)]):
        assert_frame_equal(measure_curves(model, clt, tokens, shares=(0.5, 1.0), progress=False).table, first)


def test_a_report_from_its_json(model, clt, tmp_path):
    report = measure_curves(model, clt, random_tokens(model, batch=2, pos=5), shares=FEW, progress=False)
    again = FaithfulnessCurves.from_json(report.to_json())
    assert_frame_equal(again.table, report.table)
    assert_frame_equal(again.areas, report.areas)
    assert again.info == report.info and again.to_json() == report.to_json()
    folder = report.save(tmp_path / "curves")
    assert {path.name for path in folder.iterdir()} == {
        *("report.json", "measurements.csv", "curves.csv", "areas.csv", "curves.png", "numbers.png")
    }
    assert (folder / "report.json").read_text() == report.to_json()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"table": []}', '{"table": [{"share": 1}]}', '{"table": 3}'])
def test_what_is_no_report_is_refused(text):
    with pytest.raises(FormatError, match="no report of faithfulness curves"):
        FaithfulnessCurves.from_json(text)


def test_a_report_with_a_gap_is_refused(model, clt):
    values = json.loads(
        measure_curves(model, clt, random_tokens(model, pos=4), shares=(0.5, 1.0), progress=False).to_json()
    )
    values["table"][0]["measure"] = None
    with pytest.raises(FormatError, match="gaps"):
        FaithfulnessCurves.from_json(json.dumps(values))


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"shares": (1.0,)}, ConfigError, "at least two, each larger"),
        ({"shares": (0.5, 0.2)}, ConfigError, "at least two, each larger"),
        ({"shares": (0.5, 2)}, ConfigError, r"shares\[1\] is 2"),
        ({"metric": "difference"}, ConfigError, "needs counterfactual prompts"),
        ({"metric": "loss"}, ConfigError, "give one of logit, difference, log_prob"),
        ({"errors": "none"}, ConfigError, "give one of nodes, kept, removed"),
        ({"rankings": "edge"}, ConfigError, "give one of influence, magnitude, random"),
        ({"freeze": "norms"}, ConfigError, "give one of"),
        ({"batch_size": 0}, ConfigError, "batch_size is 0"),
        ({"targets": [1, 2, 3]}, DatasetError, "3 targets for 1 prompts"),
        ({"targets": [999]}, TargetError, "out of range"),
        ({"clts": {}}, ConfigError, "no CLT"),
        ({"prompts": []}, DatasetError, "no prompts"),
        ({"counterfactuals": [[0, 4, 5]]}, PromptError, "Prompt 0 has 5 tokens and its counterfactual 3"),
        ({"counterfactuals": [[0, 4, 5], [0, 5, 5]]}, PromptError, "2 counterfactuals for 1 prompts"),
    ],
)
def test_bad_arguments_name_the_mend(model, clt, changed, error, words, as_users_run_it):
    given = {"clts": clt, "prompts": random_tokens(model, pos=5), "progress": False} | changed
    with pytest.raises(error, match=words):
        measure_curves(model, **given)


def test_an_attached_clt_is_refused(model, clt):
    with attach(model, clt), pytest.raises(AlreadyAttached):
        measure_curves(model, clt, random_tokens(model))
