"""Graphs of several tasks beside each other: parts sum to logits, shares to 1, and alike tasks overlap more."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tests.models import random_tokens, tiny_clt, tiny_hooked
from tl_clt import NodeKind, attribute, load_organism
from tl_clt.attribution import find_head_effects
from tl_clt.errors import ConfigError, DatasetError, TlCltError
from tl_clt.evaluation import compare_tasks
from tl_clt.evaluation.across import _overlap
from tl_clt.organisms import organism_tasks


@pytest.fixture(scope="module")
def tiny():
    model = tiny_hooked("gpt2")
    return model, tiny_clt(model), random_tokens(model, batch=4, pos=6)


@pytest.fixture(scope="module")
def report(tiny):
    model, clt, tokens = tiny
    return compare_tasks(model, clt, {"one": tokens[:2], "two": tokens[2:]}, progress=False)


def test_parts_of_each_prompt_sum_to_its_logit_and_heads_to_attention(tiny, report):
    model, _, tokens = tiny
    logits = model(tokens)[:, -1].detach()
    expected = (logits.max(dim=-1).values - logits.mean(dim=-1)).numpy()
    sums = report.parts.groupby(["task", "prompt"])["direct"].sum().to_numpy()
    assert sums == pytest.approx(expected, rel=1e-9)
    attention = report.parts[report.parts["part"] == "attention"].groupby(["task", "prompt", "layer"])["direct"].sum()
    heads = report.heads.groupby(["task", "prompt", "layer"])["direct"].sum()
    assert heads.to_numpy() == pytest.approx(attention.to_numpy(), rel=1e-12)
    assert report.shares["whole"].mean() == pytest.approx(expected.mean(), rel=1e-9)


def test_attention_by_hand_and_heads_by_transformer_lens_s_own_cache(tiny, report):
    """Direct logit attribution of each head's result, its value's bias taken off, through ln_final's held scale."""
    model, _, tokens = tiny
    model.set_use_attn_result(True)
    logits, cache = model.run_with_cache(tokens[3:])
    model.set_use_attn_result(False)
    target = logits[0, -1].argmax()
    above = model.W_U[:, target] - model.W_U.mean(dim=1)
    rows = report.heads[(report.heads["task"] == "two") & (report.heads["prompt"] == 1)]
    for layer, head, direct in zip(rows["layer"], rows["head"], rows["direct"], strict=True):
        block = model.blocks[layer]
        bias = (block.attn.b_V[head] + block.ln1.b @ block.attn.W_V[head]) @ block.attn.W_O[head]
        written = cache["result", layer][0, -1, head] - bias
        read = (written - written.mean()) / cache["ln_final.hook_scale"][0, -1] * model.ln_final.w
        assert direct == pytest.approx((read @ above).item(), rel=1e-9, abs=1e-12)


def test_through_is_weighted_by_hand(tiny, report):
    """Of what the target and the kept features take in, what passes one head, written out."""
    model, clt, tokens = tiny
    graph = attribute(model, clt, tokens[0], int(model(tokens[:1])[0, -1].argmax()), progress=False)
    kept = graph.prune_masks(0.8).nodes & graph.nodes.is_kind(NodeKind.FEATURE)
    effects = find_head_effects(graph, model, clt, torch.nonzero(kept).flatten())
    influence = graph.influence() / graph.logit_probs
    top = whole = 0.0
    for row, node in enumerate(effects.nodes.tolist()):
        o = 1.0 if graph.nodes.kind[node] == NodeKind.LOGIT else float(influence[node])
        top += o * abs(float(effects.total[row, 1, 2])) / float(graph.in_edges(node).abs().sum())
        whole += o
    rows = report.heads.set_index(["task", "prompt", "layer", "head"])
    assert rows.loc[("one", 0, 1, 2), "through"] == pytest.approx(top / whole, rel=1e-9)


def test_flow_is_the_graph_s_influence(tiny, report):
    model, clt, tokens = tiny
    graph = attribute(model, clt, tokens[0], int(model(tokens[:1])[0, -1].argmax()), progress=False)
    nodes, influence = graph.nodes, graph.influence() / graph.logit_probs
    rows = report.flow[(report.flow["task"] == "one") & (report.flow["prompt"] == 0)].set_index(["layer", "pos"])
    for layer, pos in ((-1, 3), (0, 5), (1, 2)):
        here = (nodes.layer == layer) & (nodes.pos == pos)
        features = float(influence[here & nodes.is_kind(NodeKind.FEATURE, NodeKind.TOKEN)].sum())
        errors = float(influence[here & nodes.is_kind(NodeKind.ERROR)].sum())
        assert tuple(rows.loc[(layer, pos), ["features", "errors"]]) == pytest.approx((features, errors), rel=1e-6)
    shares = graph.shares()
    assert rows["errors"].sum() == pytest.approx(shares.error, rel=1e-6)
    assert rows.loc[-1]["features"].sum() == pytest.approx(shares.token, rel=1e-6)
    tokens_of_one = report.tokens[report.tokens["task"] == "one"]
    both = report.flow[(report.flow["task"] == "one") & (report.flow["layer"] == -1)]
    assert tokens_of_one["influence"].sum() == pytest.approx(both["features"].sum() / 2)
    quadrants = report.quadrants
    assert len(quadrants) == 2 * 4 and quadrants["error_share"].dropna().between(0, 1).all()
    of_one = quadrants[quadrants["task"] == "one"]["errors"].sum()
    assert of_one == pytest.approx(report.flow[report.flow["task"] == "one"]["errors"].sum() / 2)
    assert report.stages["at_last"].between(0, 1).all() and len(report.stages) == 2 * (clt.cfg.n_layers + 1)


def test_overlap_by_hand():
    one, other = {(0, 1): 0.5, (0, 2): 0.5}, {(0, 2): 0.25, (1, 2): 0.75}
    assert _overlap(one, other) == pytest.approx((1 / 3, 0.25 / 1.75))
    assert _overlap(one, one) == (1, 1)
    assert _overlap(one, {}) == _overlap({}, {}) == (0, 0)


def test_circuits_of_a_task_are_more_alike_than_chance_and_the_same_prompt_is_the_same(tiny):
    organism = load_organism("atlas")
    cases = organism_tasks("atlas")["two_hop"].cases(3, held_out=True)
    prompts = {"two_hop": [case.prompt for case in cases], "again": [cases[0].prompt]}
    answers = {"two_hop": [case.answer for case in cases], "again": [cases[0].answer]}
    report = compare_tasks(*organism, prompts, answers, progress=False)
    rows = report.overlap.set_index(["task", "other"])
    within = rows.loc[("two_hop", "two_hop")]
    assert within["n_pairs"] == 3
    assert within["weighted"] > 1.5 * within["weighted_chance"] and within["jaccard"] > within["jaccard_chance"]
    assert np.isnan(rows.loc[("again", "again"), "jaccard"])
    model, clt, tokens = tiny
    same = compare_tasks(model, clt, {"a": tokens[:1], "b": tokens[:1]}, progress=False).overlap
    assert same.set_index(["task", "other"]).loc[("a", "b"), ["jaccard", "weighted"]].tolist() == [1, 1]


def test_every_head_is_in_its_table_and_figures_are_drawn(report, tiny):
    model = tiny[0]
    assert len(report.heads) == 4 * model.cfg.n_layers * model.cfg.n_heads
    assert (report.heads["through"] >= 0).all()
    for name in report.figures:
        assert report.plot(name).axes


def test_what_cannot_be_compared(tiny, as_users_run_it):
    model, clt, tokens = tiny
    wrong: Any = tokens
    with pytest.raises(ConfigError, match="give the prompts of each task, by its name"):
        compare_tasks(model, clt, wrong)
    with pytest.raises(ConfigError, match="give the targets of each task, by its name"):
        compare_tasks(model, clt, {"one": tokens[:2]}, wrong)
    with pytest.raises(ConfigError, match="targets has 'other', and prompts has not"):
        compare_tasks(model, clt, {"one": tokens[:2]}, {"one": [3, 4], "other": [3]})
    with pytest.raises(DatasetError, match="none: There are no prompts"):
        compare_tasks(model, clt, {"none": []})
    with pytest.raises(DatasetError, match="There are 1 targets for 2 prompts of one"):
        compare_tasks(model, clt, {"one": tokens[:2]}, {"one": [3]})
    with pytest.raises(DatasetError, match="There are 0 targets for 2 prompts of one"):
        compare_tasks(model, clt, {"one": tokens[:2]}, {"other": [3]})
    with pytest.raises(TlCltError, match="node_threshold"):
        compare_tasks(model, clt, {"one": tokens}, node_threshold=2)
