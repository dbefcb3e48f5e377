"""Sweeps: each row is what `intervene` gives by itself; flips, means and interactions are what they say."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.models import Model, random_tokens, tiny_clt, tiny_hooked
from tl_clt import Intervention, intervene, measure_interaction, sweep_end_layer, sweep_strength
from tl_clt.errors import InterventionError, TargetError, TokenizerMissing
from tl_clt.interventions import DirectionIntervention
from tl_clt.interventions.sweeps import _flips

TOKENS = [5, 17, 40]
LOW = Intervention(layer=0, pos=[2, -1], feature=[3, 7], value=[20, -15])
HIGH = Intervention(layer=1, pos=-1, feature=range(24), scale=-2)


def next_token(effect) -> tuple[Tensor, Tensor]:
    """Probabilities, and logits less their mean."""
    logits = effect.logits[0, -1]
    return logits.softmax(-1), logits - logits.mean()


@pytest.fixture(scope="module")
def model():
    return tiny_hooked("llama")


@pytest.fixture(scope="module")
def clt(model):
    return tiny_clt(model)


@pytest.fixture(scope="module")
def prompt(model):
    return random_tokens(model)[0]


# -- strength ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("through_layer", [None, 1])
def test_each_strength_multiplies_the_amounts(one_of_each: Model, through_layer):
    clt, prompt = tiny_clt(one_of_each), random_tokens(one_of_each)[0]
    given = [LOW, HIGH, Intervention(layer=1, pos=1, feature=2, scale=0)]
    options = {"through_layer": through_layer, "freeze": "none", "tolerance": 0.5, "progress": False}
    sweep = sweep_strength(one_of_each, clt, prompt, given, [2, -0.5, 2], TOKENS, **options)
    assert sweep.table["strength"].tolist() == [-0.5] * 3 + [2.0] * 3
    assert sweep.table["token_id"].tolist() == TOKENS * 2
    for strength, rows in sweep.table.groupby("strength"):
        by_hand = [
            Intervention(layer=0, pos=[2, -1], feature=[3, 7], value=[20 * strength, -15 * strength]),
            Intervention(layer=1, pos=-1, feature=range(24), scale=-2 * strength),
            Intervention(layer=1, pos=1, feature=2, scale=0),
        ]
        probs, logits = next_token(intervene(one_of_each, clt, prompt, by_hand, through_layer, "none"))
        assert rows["probability"].tolist() == pytest.approx(probs[TOKENS].tolist())
        assert rows["logit"].tolist() == pytest.approx(logits[TOKENS].tolist())
        answer = sweep.answers[sweep.answers["strength"] == strength].iloc[0]
        assert answer["answer_id"] == int(probs.argmax()) and answer["probability"] == pytest.approx(float(probs.max()))


def test_the_answer_flips_where_it_is_said_to(model, clt, prompt):
    """Steered towards one token's unembedding, every model ends up with it."""
    towards = model.W_U[:, 17].detach()
    steer = DirectionIntervention(layer=2, pos=-1, vector=towards / towards.norm(), add=1)
    sweep = sweep_strength(model, clt, prompt, [steer], np.linspace(0, 80, 3), TOKENS, progress=False)
    answers = sweep.answers["answer_id"].tolist()
    assert answers[0] != 17 and answers[-1] == 17
    assert len(sweep.flips) >= 1 and sweep.flips["strength"].is_monotonic_increasing
    assert sweep.flips.iloc[-1]["after"] == "#17"
    before, after = sweep.flips["before"].tolist(), sweep.flips["after"].tolist()
    assert before == [f"#{answers[0]}", *after[:-1]]
    for flip in sweep.flips.itertuples():
        assert flip.width <= 80 / 1000
        for side, answer in ((-1, flip.before), (1, flip.after)):
            at = DirectionIntervention(
                layer=2, pos=-1, vector=steer.vector, add=flip.strength + side * (flip.width / 2 + 1e-9)
            )
            probs, _ = next_token(intervene(model, clt, prompt, [at]))
            assert f"#{int(probs.argmax())}" == answer


def test_several_flips_between_two_neighbours_are_found_in_turn():
    edges, calls = [0.1234, 0.125, 0.7], Counter()

    def answer(strength: float) -> int:
        calls[strength] += 1
        return sum(strength > edge for edge in edges)

    flips = list(_flips(answer, 0.0, 1.0, {0.0: 0, 1.0: 3}, 1e-4))
    assert [(flip.before, flip.after) for flip in flips] == [(0, 1), (1, 2), (2, 3)]
    for flip, edge in zip(flips, edges, strict=True):
        assert abs(flip.strength - edge) <= flip.width / 2 <= 1e-4 / 2
    assert max(calls.values()) <= 2 and sum(calls.values()) < 60
    assert not list(_flips(answer, 0.0, 0.1, {0.0: 0, 0.1: 0}, 1e-4))
    # Not even floating point tells these strengths apart.
    [flip] = _flips(lambda s: int(s > 1), 1.0, math.nextafter(1.0, 2), {1.0: 0, math.nextafter(1.0, 2): 1}, 1e-300)
    assert (flip.before, flip.after) == (0, 1)


def test_one_strength_makes_a_sweep_without_flips(model, clt, prompt):
    sweep = sweep_strength(model, clt, prompt, [LOW], [1], [5], progress=False)
    assert len(sweep.table) == 1 and len(sweep.flips) == 0


# -- end layer ---------------------------------------------------------------------------------------------


def test_every_end_layer_is_one_constrained_intervention(one_of_each: Model):
    clt, prompt = tiny_clt(one_of_each), random_tokens(one_of_each)[0]
    sweep = sweep_end_layer(one_of_each, clt, prompt, [LOW, HIGH], TOKENS, pos=-1, progress=False)
    assert sweep.table["through_layer"].tolist() == [1] * 3 + [2] * 3
    for layer, rows in sweep.table.groupby("through_layer"):
        effect = intervene(one_of_each, clt, prompt, [LOW, HIGH], through_layer=layer)
        probs, logits = next_token(effect)
        clean = effect.baseline_logits[0, -1]
        clean_logits = clean - clean.mean()
        assert rows["probability"].tolist() == pytest.approx(probs[TOKENS].tolist())
        assert rows["change"].tolist() == pytest.approx((probs - clean.softmax(-1))[TOKENS].tolist(), abs=1e-12)
        assert rows["logit_change"].tolist() == pytest.approx((logits - clean_logits)[TOKENS].tolist(), abs=1e-9)
    table = sweep.table
    for token, row in zip(TOKENS, sweep.summary.itertuples(), strict=True):
        rows = table[table["token_id"] == token].set_index("through_layer")
        best = rows["change"].abs().idxmax()
        assert (row.best_layer, row.best_change) == (best, rows.loc[best, "change"])
        assert row.mean_change == pytest.approx(rows["change"].mean())
        assert row.mean == pytest.approx(rows["probability"].mean())
        assert row.clean == pytest.approx(float(clean.softmax(-1)[token]))


def test_a_direction_before_the_first_block_is_swept_from_no_layer_on(model, clt, prompt):
    what = DirectionIntervention(layer=-1, pos=2, vector=torch.ones(model.cfg.d_model), add=0.5)
    sweep = sweep_end_layer(model, clt, prompt, [what], [5], progress=False)
    assert sweep.table["through_layer"].tolist() == [-1, 0, 1, 2]


# -- interaction -------------------------------------------------------------------------------------------


def test_an_interaction_is_what_both_do_beyond_the_sum(one_of_each: Model):
    clt, prompt = tiny_clt(one_of_each), random_tokens(one_of_each)[0]
    found = measure_interaction(one_of_each, clt, prompt, LOW, HIGH, TOKENS, progress=False)
    runs = [next_token(intervene(one_of_each, clt, prompt, run)) for run in ([], [LOW], [HIGH], [LOW, HIGH])]
    for row in found.table.itertuples():
        clean, *changed = (run[0 if row.measure == "probability" else 1][row.token_id].item() for run in runs)
        first, second, both = (value - clean for value in changed)
        expected = (clean, first, second, both, first + second, both - first - second)
        found_here = (row.clean, row.first, row.second, row.both, row.sum, row.interaction)
        assert found_here == pytest.approx(expected, abs=1e-9)
    assert len(found.table) == 2 * len(TOKENS)
    assert found.table["interaction"].abs().max() > 1e-3


def test_nothing_interacts_in_logits_where_all_is_held(model, clt, prompt):
    add = [Intervention(layer=layer, pos=-2, feature=f, add=5) for layer, f in ((0, 3), (0, 4), (1, 3))]
    held = {"through_layer": 2, "freeze": "all", "progress": False}
    for i, first in enumerate(add):
        for second in add[i + 1 :]:
            table = measure_interaction(model, clt, prompt, first, second, TOKENS, **held).table
            logits = table[table["measure"] == "logit"]
            assert logits["interaction"].abs().max() < 1e-10 < 1e-4 < logits["both"].abs().max()


# -- figures, bars, bad input ------------------------------------------------------------------------------


def test_figures_show_every_token(model, clt, prompt, tmp_path):
    sweep = sweep_strength(model, clt, prompt, [LOW], [-1, 0, 1], TOKENS, tolerance=1, progress=False)
    ends = sweep_end_layer(model, clt, prompt, [LOW], TOKENS, progress=False)
    both = measure_interaction(model, clt, prompt, LOW, HIGH, TOKENS, progress=False)
    figures = {"strength": sweep.plot(), "end": ends.plot(), "both": both.plot()}
    for name, figure in figures.items():
        figure.savefig(tmp_path / f"{name}.png")
    assert len(figures["strength"].axes[0].lines) == len(TOKENS) + len(sweep.flips)
    assert len(figures["end"].axes[0].lines) == 2 * len(TOKENS) + 1
    assert [len(axes.patches) for axes in figures["both"].axes] == [5 * len(TOKENS)] * 2


@pytest.mark.parametrize(
    ("given", "strengths", "options", "message"),
    [
        ([LOW], [], {}, "strengths is [], of type list: give finite numbers, at least one"),
        ([LOW], [1, math.nan], {}, "strengths[1] is nan: give a finite number"),
        ([], [1], {}, "none other than 0"),
        ([Intervention(layer=0, feature=1, scale=0)], [1, 2], {}, "Give value=1 or scale=1"),
        ([LOW], [1, 2], {"tolerance": 0.0}, "tolerance is 0.0"),
        ([LOW], [1, 2], {"pos": 7}, "pos is 7: give -7 to 6, the prompt's positions"),
        ([Intervention(layer=3, feature=1, value=1)], [1], {}, "there is no layer 3"),
    ],
)
def test_bad_sweeps_are_refused(model, clt, prompt, given, strengths, options, message):
    with pytest.raises(InterventionError) as error:
        sweep_strength(model, clt, prompt, given, strengths, [5], **options)
    assert message in str(error.value)


def test_tokens_that_are_not_there_are_refused(model, clt, prompt):
    with pytest.raises(InterventionError, match="no tokens to report"):
        measure_interaction(model, clt, prompt, LOW, HIGH, [])
    with pytest.raises(TargetError, match="64 is out of range"):
        measure_interaction(model, clt, prompt, LOW, HIGH, [64])
    with pytest.raises(TokenizerMissing):
        sweep_end_layer(model, clt, prompt, [LOW], [" Austin"])


def test_bad_end_layer_sweeps_are_refused(model, clt, prompt):
    with pytest.raises(InterventionError, match="no interventions to sweep"):
        sweep_end_layer(model, clt, prompt, [], [5])
    with pytest.raises(InterventionError, match="there is no layer 7"):
        sweep_end_layer(model, clt, prompt, [Intervention(layer=7, feature=1, value=1)], [5])


@pytest.mark.usefixtures("as_users_run_it")
def test_one_of_each_is_a_list_of_one(model, clt, prompt):
    wanted = sweep_strength(model, clt, prompt, [LOW], [0.5], [5]).table
    for strengths in (0.5, np.float32(0.5), torch.tensor(0.5), torch.tensor([0.5])):
        assert sweep_strength(model, clt, prompt, LOW, strengths, np.int64(5)).table.equals(wanted)
    assert sweep_end_layer(model, clt, prompt, LOW, 5).table.equals(
        sweep_end_layer(model, clt, prompt, [LOW], [5]).table
    )
    both = measure_interaction(model, clt, prompt, [LOW], HIGH, torch.tensor(5)).table
    assert both.equals(measure_interaction(model, clt, prompt, LOW, HIGH, [5]).table)


@pytest.mark.usefixtures("as_users_run_it")
def test_what_is_no_strength_is_refused(model, clt, prompt):
    for strengths in ("0.5", None, [True], {0.5}, [1j]):
        with pytest.raises(InterventionError, match="strengths.*: give"):
            sweep_strength(model, clt, prompt, LOW, strengths, [5])
