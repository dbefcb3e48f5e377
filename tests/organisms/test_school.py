"""The bundled school: it does its tasks, its transcoders stand in for its MLPs, and its card tells the truth."""

from __future__ import annotations

import json
import random

import pytest
import torch

from tl_clt import evaluate, load_organism
from tl_clt.benchmark import measure_task
from tl_clt.organisms import benchmark_prompts, default_prompt, load_features, organism_folder, organism_tasks
from tl_clt.organisms.interchange import (
    N_FOR_MEANS,
    answer_ids,
    answered_right,
    as_batch,
    exchanges,
    find_variables,
    interchange,
)
from tl_clt.organisms.school.text import BRANDS
from tl_clt.organisms.school.train_clt import held_out_prompts
from tl_clt.transcoder import CrossLayerTranscoder

FOLDER = organism_folder("school")
CARD = (FOLDER / "card.md").read_text()
METRICS = json.loads((FOLDER / "model" / "metrics.json").read_text())
TASKS = organism_tasks("school")
SCORES = ("score", "score_nearest", "score_random", "score_random_nearest")


@pytest.fixture(scope="module")
def school():
    return load_organism("school")


def right(model, cases) -> float:
    answers = model(as_batch(model, TASKS["recall"], cases))[:, -1].argmax(dim=-1)
    return float((answers == answer_ids(model, [case.answer for case in cases])).double().mean())


@pytest.mark.parametrize("name", METRICS["accuracy"])
def test_accuracy(school, name):
    told = METRICS["accuracy"][name]
    if name == "misfire":
        assert f"{told['given a fact']:.4f}" in CARD
        return
    for held_out, split in ((False, "in the text"), (True, "held out")):
        cases = TASKS[name.split(",")[0]].cases(400, held_out=held_out)
        if name.startswith("recall"):
            cases = [case for case in cases if (case.values["known"] == "known") == ("known" in name)]
        # The same prompts on other kernels: near-ties between two answers may fall otherwise, a few in a hundred.
        assert right(school.model, cases) == pytest.approx(told[split], abs=0.03)
        assert f"{told[split]:.4f}" in CARD
    assert told["in the text"] >= 0.99
    if name != "recall, known people":  # the one that is not learnt, as the card says
        assert told["held out"] >= 0.95


def test_the_store_is_of_the_bundled_clt(school):
    store = load_features("school")
    assert store.clt_fingerprint == school.clt.fingerprint()
    summary = store.label_summary()
    for layer in summary["layers"]:
        row = [str(layer["n_labels"]), *(f"{layer[name]:.3f}".lstrip("0") for name in SCORES)]
        assert f"| {layer['layer']} | {' | '.join(row)} |" in CARD
        assert layer["score"] > layer["score_random"] and layer["score_nearest"] > layer["score_random_nearest"]


@pytest.mark.parametrize("part", ["clt", "plt"])
def test_transcoders_reach_what_their_metrics_say(school, part):
    clt = CrossLayerTranscoder.from_pretrained(FOLDER / part)
    told = json.loads((FOLDER / part / "metrics.json").read_text())
    report = evaluate(school.model, clt, held_out_prompts()[::8], n_graphs=0)
    assert report.explained_variance == pytest.approx(told["explained_variance"], abs=0.01)
    assert report.top1_agreement == pytest.approx(told["top1_agreement"], abs=0.04)
    for number in (
        f"{told['explained_variance']:.3f}",
        f"{told['l0_mean_per_layer']:.1f}",
        f"{told['top1_agreement']:.3f}",
        f"{told['top1_agreement_uncertain']:.3f}",
        f"{told['kl_divergence']:.3f}",
    ):
        assert number in CARD, number
    assert clt.cfg.span == (1 if part == "plt" else 4)


def test_the_language_of_a_word_is_carried_and_told_and_chance_does_nothing(school):
    """The hop of which the card says most; a CLT of random weights must not come near it."""
    task = TASKS["opposite"]
    places = find_variables(school.model, task, n_pairs=24)
    of = places.set_index("variable")
    assert of.loc["language", "follows"] >= 0.95 and of.loc["language", "random_direction"] <= 0.1
    assert (of["copied"] == 0).all()
    report = measure_task(school.model, school.clt, task, places=places, n_pairs=24, n_prompts=300)
    language = report.hops.set_index("variable").loc["language"]
    assert language["carried"] and language["accuracy"] >= 0.95 and language["swap"] >= 0.6
    assert not language["swap_other"] > 0.1 and language["accuracy_shuffled"] <= 0.7
    chance = CrossLayerTranscoder.from_pretrained(FOLDER / "clt")
    for parameter in chance.parameters():
        parameter.data = parameter.data.flatten()[chance_order(parameter.numel())].view_as(parameter)
    nothing = measure_task(school.model, chance, task, places=places, n_pairs=24, n_prompts=300)
    assert not nothing.hops["shown"].any() and nothing.hop_recall == 0 and (nothing.hops["swap"] <= 0.1).all()


def test_what_a_place_with_nothing_but_the_answer_follows_is_no_hop(school):
    """Unknown people are those whose answer is "unknown", so that the means of that hop differ by the answer alone; of
    the better brand a table of answers follows as well, written anew here with a row of numbers for each."""
    at_last = {"part": "mean", "n_pairs": 24, "places": [(3, 10)]}
    known = interchange(school.model, TASKS["recall"], "known", **at_last)
    assert known.loc[0, "follows"] >= 0.9 and known.loc[0, "answer_alone"] == 1 and known["beyond"].isna().all()
    report = measure_task(school.model, school.clt, TASKS["recall"], places=known, n_prompts=60, n_pairs=4)
    assert not report.hops["carried"].any() and report.hop_recall != report.hop_recall

    task = TASKS["pick"]
    found = interchange(school.model, task, "better", **at_last).iloc[0]
    cases, _ = answered_right(school.model, task, 8 * 24, True, 0)
    pairs, _ = exchanges(task, cases, "better", 24, random.Random("pick better 0"))
    told = task.cases(N_FOR_MEANS, held_out=False, seed=0)
    rows = torch.eye(len(BRANDS), dtype=torch.float64)

    def mean(value: str) -> torch.Tensor:
        return torch.stack([rows[BRANDS.index(c.answer)] for c in told if c.values["better"] == value]).mean(dim=0)

    alone = []
    for a, b in pairs:
        better = cases[b].values["better"]
        table = rows[BRANDS.index(cases[a].answer)] + mean(better) - mean(cases[a].values["better"])
        alone.append(BRANDS[int(table.argmax())] == task.run(cases[a].values, {"better": better})["pick"])
    assert found["answer_alone"] == pytest.approx(sum(alone) / len(alone)) and found["answer_alone"] >= 0.9

    rhyme = interchange(school.model, TASKS["rhyme"], "rhyme", part="mean", n_pairs=24, places=[(0, 8)]).iloc[0]
    assert rhyme["answer_alone"] <= 0.05 and rhyme["beyond"] >= 0.9


def chance_order(n: int) -> torch.Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))


def test_a_task_whose_only_hop_is_its_answer_has_nothing_to_show(school):
    report = measure_task(school.model, school.clt, TASKS["diagnosis"], n_pairs=4, n_prompts=40)
    assert len(report.hops) == 0 and report.hop_recall != report.hop_recall
    assert "diagnosis" in repr(report)


def test_the_prompt_that_shows_what_it_can_do_is_held_out_and_answered(school):
    prompt = default_prompt("school")
    [case] = [case for case in TASKS["rhyme"].cases(400, held_out=True) if case.prompt == prompt]
    assert school.model.to_string(school.model(prompt)[0, -1].argmax()).strip() == case.answer


def test_prompts_for_curves_are_held_out(school):
    prompts = benchmark_prompts("school")
    assert len(prompts) == len({p.prompt for p in prompts}) == len(TASKS) * 50
    assert all(p.counterfactual != p.prompt for p in prompts)
