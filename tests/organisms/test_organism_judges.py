"""Trained organisms as judges: what their neurons show, what chance does not, and what the benchmark makes of it."""

from __future__ import annotations

import random

import pytest
import torch
from pandas import DataFrame
from pandas.testing import assert_frame_equal

from tl_clt import load_organism
from tl_clt.benchmark import (
    BenchmarkReport,
    OrganismReport,
    find_neurons,
    measure_organism,
    measure_task,
    run_benchmark,
)
from tl_clt.benchmark.tasks import MOSTLY, swap_group
from tl_clt.benchmark.train import train_on_organism
from tl_clt.errors import ConfigError, FormatError
from tl_clt.organisms import find_variables, organism_tasks, training_tokens
from tl_clt.organisms.interchange import answered_right, exchanges
from tl_clt.replacement import feature_acts
from tl_clt.transcoder import CrossLayerTranscoder
from tl_clt.viewer.tables import benchmark_table

TASKS = organism_tasks("atlas")
TASK = TASKS["two_hop"]


@pytest.fixture(scope="module")
def atlas():
    return load_organism("atlas")


@pytest.fixture(scope="module")
def places(atlas):
    return {"two_hop": find_variables(atlas.model, TASK, n_pairs=24)}


@pytest.fixture(scope="module")
def of_neurons(atlas, places):
    neurons = find_neurons(atlas.model, training_tokens("atlas", atlas.model, 1000, 0))
    return measure_organism("atlas", atlas.model, neurons, TASKS, places=places, n_prompts=400, n_pairs=24)


def test_all_neurons_are_the_model_and_show_its_hop(of_neurons):
    assert of_neurons.answers_kept == 1 and of_neurons.explained_variance == pytest.approx([1.0] * 4)
    state = of_neurons.hops.set_index("variable").loc["state"]
    assert state["carried"] and state["shown"] and of_neurons.hop_recall == 1
    assert state["accuracy_shuffled"] < 0.3 and state["swap_other"] < 0.2
    assert state["n_pure"] < state["n_features"]


def test_shuffled_weights_show_nothing(atlas, places):
    chance = CrossLayerTranscoder.from_pretrained("atlas")
    for parameter in chance.parameters():
        order = torch.randperm(parameter.numel(), generator=torch.Generator().manual_seed(0))
        parameter.data = parameter.data.flatten()[order].view_as(parameter)
    report = measure_organism("atlas", atlas.model, chance, TASKS, places=places, n_prompts=100, n_pairs=12)
    assert report.hop_recall == 0 and not report.hops["shown"].any() and not report.hops["shown_pure"].any()
    assert report.answers_kept < 0.1 and max(report.explained_variance) < 0


def test_a_report_of_all_tasks_holds_each_task_s_own(atlas, places):
    all_of = measure_organism("atlas", atlas.model, atlas.clt, TASKS, places=places, n_prompts=100, n_pairs=8)
    one = measure_task(atlas.model, atlas.clt, TASK, places=places["two_hop"], n_prompts=100, n_pairs=8)
    assert_frame_equal(all_of.hops.drop(columns="task"), one.hops)
    assert max(all_of.l0) <= 8 and min(all_of.explained_variance) > 0.8 and all_of.answers_kept > 0.8


def test_neurons_swapped_by_hand(atlas, places):
    """The same exchange of a group of neurons, with TransformerLens's own hooks, a pair at a time."""
    model, place = atlas.model, places["two_hop"].iloc[0].to_dict()
    neurons = find_neurons(model, training_tokens("atlas", model, 1000, 0), kept=0.4)
    cases, tokens = answered_right(model, TASK, 60, True, 5)
    pairs, _ = exchanges(TASK, cases, "state", 6, random.Random(0))
    layer, pos, n_layers = int(place["layer"]), int(place["pos"]), model.cfg.n_layers
    _, cache = model.run_with_cache(tokens)
    raw = torch.stack([cache["post", of] for of in range(n_layers)], dim=2)
    acts = raw * (raw.abs() >= neurons.thresholds)
    features = torch.zeros(acts.shape[1:], dtype=torch.bool)
    features[: pos + 1, : layer + 1, ::3] = True
    right = []
    for a, b in pairs:

        def change(x, hook, a=a, b=b):
            of = hook.layer()
            x[0] = raw[a, :, of] + torch.where(features[:, of], acts[b, :, of] - acts[a, :, of], 0.0)
            return x

        hooks = [(f"blocks.{of}.mlp.hook_post", change) for of in range(layer + 1)]
        answer = model.run_with_hooks(tokens[a : a + 1], fwd_hooks=hooks)[0, -1].argmax()
        wanted = TASK.run(cases[a].values, {"state": cases[b].values["state"]})["fact"]
        right.append(int(answer) == model.to_single_token(wanted))
    followed = swap_group(
        model, neurons, TASK, cases, tokens, acts, acts[[b for _, b in pairs]], pairs, features, place
    )
    assert followed == pytest.approx(sum(right) / len(right))


def test_thresholds_leave_a_share_of_what_neurons_write(atlas):
    tokens = training_tokens("atlas", atlas.model, 3000, 0)
    neurons = find_neurons(atlas.model, tokens, kept=0.25)
    _, cache = atlas.model.run_with_cache(tokens)
    for layer in range(4):
        left = cache["post", layer][:, 1:].abs() >= neurons.thresholds[layer]
        assert float(left.double().mean()) == pytest.approx(0.25, abs=0.001)
    with pytest.raises(ConfigError, match="kept is 2"):
        find_neurons(atlas.model, tokens, kept=2.0)


def test_groups_are_about_their_value(atlas):
    """A feature that is the value for the most part, written anew: variance within values beside all of it."""
    cases = TASK.cases(80, held_out=False)
    acts = feature_acts(atlas.model, atlas.clt, [case.prompt for case in cases])[:, -1].flatten(1).double()
    states = [case.values["state"] for case in cases]
    report = measure_task(atlas.model, atlas.clt, TASK, places=at_the_end(atlas), n_prompts=80, n_pairs=4)
    within = sum(
        ((rows := acts[[i for i, s in enumerate(states) if s == state]]) - rows.mean(dim=0)).square().sum(dim=0)
        for state in set(states)
    )
    total = (acts - acts.mean(dim=0)).square().sum(dim=0)
    about = (1 - within / total.clamp_min(1e-30) >= MOSTLY) & (total > 1e-9)
    # At the last position alone; the report counts those at positions before as well.
    assert 0 < int(about.sum()) <= int(report.hops["n_features"].iloc[0])


def at_the_end(atlas) -> DataFrame:
    pos = atlas.model.to_tokens(TASK.cases(1, held_out=False)[0].prompt).shape[1] - 1
    place = {"variable": "state", "layer": 3, "pos": pos, "token": " is", "part": "mean"}
    return DataFrame([{**place, "follows": 1.0, "keeps": 1.0, "beyond": 1.0}])


def test_text_of_organisms_is_as_it_was_packed_and_another_seed_is_another(atlas):
    first, again, other = (training_tokens("atlas", atlas.model, 500, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape[1] == atlas.model.cfg.n_ctx and (first[:, 0] == atlas.model.tokenizer.bos_token_id).all()
    assert first[:, 1:].numel() >= 500


def test_what_is_trained_on_an_organism(atlas):
    clt = train_on_organism("atlas", atlas.model, 1, 4, 0, activation="topk", n_steps=12)
    assert clt.cfg.span == 1 and clt.cfg.k == 4 and clt.cfg.d_transcoder == 256
    settings = {"d_transcoder": 32, "target_l0": 3.0, "far_write_coefficient": 0.1}
    clt = train_on_organism("atlas", atlas.model, 2, 1.0, 0, n_steps=4, **settings)
    assert clt.cfg.span == 2 and clt.cfg.activation == "jumprelu" and clt.cfg.d_transcoder == 32
    chance = train_on_organism("atlas", atlas.model, 4, 0.0, 0, n_steps=0)
    assert chance.cfg.span in (None, 4) and chance.cfg.activation == "jumprelu"


def test_the_benchmark_judges_by_an_organism(tmp_path):
    report = run_benchmark(
        "atlas", kinds=["neurons", "untrained"], sparsities=[], k=[], neurons_kept=[0.5], n_seeds=1, n_pairs=6,
        progress=False,
    )  # fmt: skip
    assert report.table["kind"].tolist() == ["neurons", "untrained"]
    assert report.table["hop_recall"].iloc[1] == 0 and report.table["answers_kept"].iloc[0] > 0.9
    again = BenchmarkReport.from_json(report.to_json())
    assert again.to_json() == report.to_json() and isinstance(again.runs[0].report, OrganismReport)
    # Organisms have no hops shown in graphs: the table has no empty column for them.
    assert [str(column.header) for column in benchmark_table(report).columns][3:] == (
        ["L0", "right", "told", "swap", "hop recall", "prec."]
    )
    folder = report.save(tmp_path / "judged")
    assert (folder / "hops.png").exists() and "swap" in report.summary


def test_a_report_is_saved_and_read(of_neurons, tmp_path):
    folder = of_neurons.save(tmp_path / "neurons")
    assert {path.name for path in folder.iterdir()} == {"report.json", "hops.csv", "hops.png"}
    again = OrganismReport.from_dict(of_neurons.to_dict())
    assert again.to_dict() == of_neurons.to_dict() and again.numbers == pytest.approx(of_neurons.numbers)
    with pytest.raises(FormatError, match="no report of tasks"):
        OrganismReport.from_dict({"organism": "atlas"})
