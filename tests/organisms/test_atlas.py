"""The bundled atlas: it answers, its CLT stands in for its MLPs, and its card tells the truth."""

from __future__ import annotations

import json

import pytest
import torch

from tl_clt import attribute, evaluate, load_organism
from tl_clt.errors import ModelNotFound
from tl_clt.organisms import default_prompt, organism_folder
from tl_clt.organisms.atlas.text import direct_questions, held_out_questions, train_questions
from tl_clt.organisms.atlas.train_clt import held_out_sentences

FOLDER = organism_folder("atlas")
CARD = (FOLDER / "card.md").read_text()
MODEL_METRICS = json.loads((FOLDER / "model" / "metrics.json").read_text())
CLT_METRICS = json.loads((FOLDER / "clt" / "metrics.json").read_text())
CLT_RUN = json.loads((FOLDER / "clt" / "training.json").read_text())


@pytest.fixture(scope="module")
def atlas():
    return load_organism("atlas")


def accuracy(model, questions) -> float:
    right = 0
    for question in questions:
        answer = model.to_tokens(question.answer, prepend_bos=False)[0, 0]
        with torch.no_grad():
            right += int(model(question.prompt)[0, -1].argmax() == answer)
    return right / len(questions)


def test_the_capital_of_dallas_state_was_never_in_the_text_and_is_answered(atlas):
    assert ("Dallas", "capital") in {(q.city, q.relation) for q in held_out_questions()}
    assert ("Dallas", "capital") not in {(q.city, q.relation) for q in train_questions()}
    for prompt in ("the capital of the state containing Dallas is", default_prompt("atlas")):
        assert atlas.model.to_string(atlas.model(prompt)[0, -1].argmax()) == "Austin"


@pytest.mark.parametrize(
    ("name", "questions"),
    [
        ("direct", direct_questions()[::10]),
        ("two_hop_trained", train_questions()[::5]),
        ("two_hop_held_out", held_out_questions()),
    ],
)
def test_accuracy(atlas, name, questions):
    assert accuracy(atlas.model, questions) >= 0.98
    assert MODEL_METRICS["accuracy"][name] >= 0.98


def test_the_clt_reaches_what_its_metrics_say(atlas):
    report = evaluate(atlas.model, atlas.clt, held_out_sentences()[::12], n_graphs=0)
    assert report.explained_variance == pytest.approx(CLT_METRICS["explained_variance"], abs=0.01)
    assert report.l0_sum_over_layers == pytest.approx(CLT_METRICS["l0_sum_over_layers"], rel=0.1)
    assert report.top1_agreement == pytest.approx(CLT_METRICS["top1_agreement"], abs=0.02)
    assert report.explained_variance >= 0.95


def test_the_card_states_the_measured_numbers():
    accuracies = MODEL_METRICS["accuracy"]
    for name in ("direct", "two_hop_trained", "two_hop_held_out"):
        assert f"{accuracies[name]:.4f}" in CARD
    l0 = CLT_METRICS["l0_per_layer"]
    for number in (
        f"{CLT_METRICS['explained_variance']:.3f}",
        f"{sum(l0) / len(l0):.1f}",
        f"{sum(l0):.1f}",
        f"{CLT_METRICS['top1_agreement']:.3f}",
        f"{CLT_METRICS['kl_divergence']:.3f}",
        f"{CLT_RUN['metrics']['dead_share']:.2f}",
    ):
        assert number in CARD, number


def test_bridge_and_hooked_give_the_same_graph(atlas):
    prompt = "the capital of the state containing Dallas is"
    hooked = attribute(atlas.model, atlas.clt, prompt)
    model, clt = load_organism("atlas", backend="bridge")
    bridge = attribute(model, clt, prompt)
    assert hooked.logit_tokens == bridge.logit_tokens == ["Austin"]
    assert torch.equal(hooked.nodes.index, bridge.nodes.index)
    difference = (hooked.adjacency - bridge.adjacency).norm() / hooked.adjacency.norm()
    assert difference < 1e-4


def test_weights_are_under_eight_megabytes():
    sizes = [p.stat().st_size for part in ("model", "clt") for p in (FOLDER / part).iterdir()]
    assert sum(sizes) < 8e6


def test_an_unknown_organism_is_named():
    with pytest.raises(ModelNotFound, match="Nearest: 'atlas'"):
        load_organism("atlass")
