"""`intervene` and what it gives: measurements, tables, swaps, and errors that say what is wrong."""

from __future__ import annotations

import gc
import math
import sys

import numpy as np
import pytest
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from tests.models import Model, random_tokens, snapshot, tiny_clt
from tests.replacement.by_hand import clean_run
from tl_clt import Intervention, attach, intervene, intervention_hooks
from tl_clt.errors import CLTMismatch, ConfigError, InterventionError, PromptError, TokenizerMissing
from tl_clt.interventions import DirectionIntervention, swap_interventions

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
SET = Intervention(layer=0, pos=slice(2, None), feature=3, value=20)
HIGHER = Intervention(layer=1, feature=0, value=1)


# -- what is measured --------------------------------------------------------------------------------------


@pytest.mark.parametrize("through_layer", [None, 1, 2])
@pytest.mark.parametrize("freeze", ["attention", "all", "none"])
def test_logits_and_features_are_those_of_the_hooked_run(model: Model, tokens: Tensor, through_layer, freeze):
    clt = tiny_clt(model)
    after = "blocks.1.hook_resid_post"
    effect = intervene(model, clt, tokens, [SET], through_layer, freeze, record=[after])
    hooks = intervention_hooks(model, clt, tokens, [SET], through_layer, freeze)
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        logits, cache = model.run_with_cache(tokens)
    clean = clean_run(model, clt, tokens)
    inputs = torch.stack([cache[f"blocks.{t}.{clt.cfg.input_hook}"] for t in clt.layers], dim=-2)
    acts = clt.encode(inputs)
    acts[:, 2:, 0, 3] = 20
    torch.testing.assert_close(effect.logits, logits, **CLOSE)
    torch.testing.assert_close(effect.inputs, inputs, **CLOSE)
    torch.testing.assert_close(effect.feature_acts, acts, **CLOSE)
    torch.testing.assert_close(effect.baseline_inputs, clean.inputs, **CLOSE)
    torch.testing.assert_close(effect.baseline_feature_acts, clt.encode(clean.inputs), **CLOSE)
    assert torch.equal(effect.baseline_logits, clean.logits)
    torch.testing.assert_close(effect.recorded[after].value, cache[after], **CLOSE)
    torch.testing.assert_close(effect.recorded[after].baseline, model.run_with_cache(tokens)[1][after], **CLOSE)
    pre = torch.stack([clt.encode_layer(inputs[..., t, :], t).hidden_pre for t in clt.layers], dim=-2)
    torch.testing.assert_close(effect.hidden_pre, pre, **CLOSE)
    assert effect.feature_acts.shape == (2, 7, 3, 24) and not effect.logits.requires_grad


def test_measured_features_are_those_at_the_hook_points_of_attach(one_of_each: Model):
    tokens, clt = random_tokens(one_of_each, batch=2), tiny_clt(one_of_each)
    scale = Intervention(layer=1, feature=range(24), scale=-2)
    effect = intervene(one_of_each, clt, tokens, [SET, scale], freeze="none")

    def set_by_hand(acts: Tensor, hook: object) -> Tensor:
        acts = acts.clone()
        acts[:, 2:, 3] = 20
        return acts

    hooks = [("blocks.0.clt.hook_acts_post", set_by_hand), ("blocks.1.clt.hook_acts_post", lambda x, hook: -2 * x)]
    with torch.no_grad(), attach(one_of_each, clt, "replace_with_error"):
        with one_of_each.hooks(fwd_hooks=hooks):
            _, cache = one_of_each.run_with_cache(tokens)
    expected = torch.stack([cache[f"blocks.{t}.clt.hook_acts_post"] for t in clt.layers], dim=-2)
    torch.testing.assert_close(effect.feature_acts, expected, **CLOSE)


@pytest.mark.parametrize("mode", ["observe", "replace_with_error"])
@pytest.mark.parametrize("through_layer", [None, 1])
def test_pre_activations_can_be_read_within_attach(model: Model, tokens: Tensor, mode, through_layer):
    clt = tiny_clt(model)
    effect = intervene(model, clt, tokens, [SET], through_layer, freeze="all")
    with torch.no_grad(), attach(model, clt, mode):
        hooks = intervention_hooks(model, clt, tokens, [SET], through_layer, freeze="all")
        with model.hooks(fwd_hooks=hooks):
            _, cache = model.run_with_cache(tokens)
    layers = range(3 if mode == "observe" or through_layer is None else through_layer + 1)
    for t in layers:
        torch.testing.assert_close(cache[f"blocks.{t}.clt.hook_acts_pre"], effect.hidden_pre[..., t, :], **CLOSE)


def test_prompts_of_a_batch_do_not_touch_each_other(model: Model):
    tokens, clt = random_tokens(model, batch=3), tiny_clt(model)
    together = intervene(model, clt, tokens, [SET])
    for i, prompt in enumerate(tokens):
        alone = intervene(model, clt, prompt, [SET])
        torch.testing.assert_close(alone.logits[0], together.logits[i], **CLOSE)
        torch.testing.assert_close(alone.feature_acts[0], together.feature_acts[i], **CLOSE)


def test_text_and_lists_of_texts_are_prompts(session_models):
    model = session_models("bridge-llama")
    clt = tiny_clt(model)
    one, two = intervene(model, clt, "w3 w4 w5", [SET]), intervene(model, clt, ["w3 w4 w5", "w6 w7 w8"], [SET])
    assert one.tokens.shape[0] == 1 and two.tokens.shape[0] == 2
    torch.testing.assert_close(one.logits[0], two.logits[0], **CLOSE)
    ids = two.tokens.tolist()
    assert torch.equal(intervene(model, clt, ids, [SET]).logits, two.logits)


@pytest.mark.parametrize("kind", [{}, {"through_layer": 2, "freeze": "all", "record": ["blocks.1.hook_resid_post"]}])
def test_a_bridges_hooks_are_looked_up_once_and_once_more_in_the_clean_run(session_models, monkeypatch, kind: dict):
    """A bridge makes `hook_dict` anew at each access, which takes longer than a pass of these models."""
    model = session_models("bridge-gemma3")
    clt, tokens, readers, hook_dict = tiny_clt(model), random_tokens(model), [], TransformerBridge.hook_dict
    expected = intervene(model, clt, tokens, [SET], **kind)

    def counted(bridge: TransformerBridge) -> dict:
        readers.append(sys._getframe(1).f_globals["__name__"])
        return hook_dict.fget(bridge)

    monkeypatch.setattr(TransformerBridge, "hook_dict", property(counted))
    effect = intervene(model, clt, tokens, [SET], **kind)
    # TransformerLens's own run_with_cache reads it too, as often as it likes.
    assert [name for name in readers if name.startswith("tl_clt.")] == ["tl_clt.replacement.fit", "tl_clt.lens.hooks"]
    assert torch.equal(effect.logits, expected.logits) and torch.equal(effect.feature_acts, expected.feature_acts)


@pytest.mark.parametrize("mode", ["observe", "replace", "replace_with_error"])
def test_the_model_is_as_before_and_the_users_hooks_stay_unused(model: Model, tokens: Tensor, mode):
    clt, calls = tiny_clt(model), []
    own = intervene(model, clt, tokens, [SET])
    model.add_hook("blocks.1.hook_mlp_out", lambda out, hook: calls.append(1))
    try:
        before = snapshot(model)
        effect = intervene(model, clt, tokens, [SET])
        assert snapshot(model) == before and not calls
        with attach(model, clt, mode):
            inside = snapshot(model)
            attached = intervene(model, clt, tokens, [SET], freeze="none")
            assert snapshot(model) == inside
            with torch.no_grad():
                calls.clear()
                assert torch.equal(attached.baseline_logits, model(tokens)) and calls
        assert snapshot(model) == before
    finally:
        model.reset_hooks()
    assert torch.equal(effect.logits, own.logits)


def test_a_run_that_failed_leaves_the_model_as_it_was(one_of_each: Model):
    tokens, clt = random_tokens(one_of_each), tiny_clt(one_of_each)
    before = snapshot(one_of_each)
    hooks = intervention_hooks(one_of_each, clt, tokens, [SET])

    def fail(out: Tensor, hook: object) -> None:
        raise KeyError("on purpose")

    with torch.no_grad(), pytest.raises(KeyError):
        one_of_each.run_with_hooks(tokens, fwd_hooks=[*hooks, ("blocks.1.hook_mlp_out", fail)])
    with torch.no_grad():
        assert torch.equal(one_of_each(tokens), intervene(one_of_each, clt, tokens, [SET]).baseline_logits)
    # What notes the masks of calls goes with the hooks.
    del hooks
    gc.collect()
    assert snapshot(one_of_each) == before


def test_a_bfloat16_model_takes_a_float32_clt(tmp_path):
    from tests.models import tiny_hooked

    model = tiny_hooked("gpt2", torch.bfloat16)
    tokens, clt = random_tokens(model), tiny_clt(model, dtype=torch.float32)
    effect = intervene(model, clt, tokens, [SET], freeze="all")
    assert effect.logits.dtype == torch.bfloat16 and effect.feature_acts.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(effect.baseline_logits, model(tokens))
    assert not torch.equal(effect.logits, effect.baseline_logits)
    none = intervene(model, clt, tokens, [Intervention(layer=0, feature=3, scale=1)])
    assert torch.equal(none.logits, none.baseline_logits)


def test_a_lazy_clt_does_as_a_dense_one(one_of_each: Model, tmp_path):
    tokens, clt = random_tokens(one_of_each), tiny_clt(one_of_each)
    lazy = type(clt).from_pretrained(clt.save_pretrained(tmp_path / "clt"), lazy_decoder=True)
    for through_layer in (None, 1):
        ours, theirs = (intervene(one_of_each, c, tokens, [SET], through_layer) for c in (lazy, clt))
        torch.testing.assert_close(ours.logits, theirs.logits, **CLOSE)


# -- the table ---------------------------------------------------------------------------------------------


def test_top_changes_is_a_table_for_each_prompt(session_models):
    model = session_models("bridge-llama")
    tokens = random_tokens(model, batch=2)
    effect = intervene(model, tiny_clt(model), tokens, [SET])
    table = effect.top_changes(5)
    assert list(table.columns) == ["prompt", "token", "token_id", "before", "after", "change", "logit_change"]
    assert table["prompt"].tolist() == [0] * 5 + [1] * 5
    change = effect.logits.softmax(-1)[:, -1] - effect.baseline_logits.softmax(-1)[:, -1]
    for prompt, rows in table.groupby("prompt"):
        expected = change[prompt].abs().topk(5)
        assert rows["token_id"].tolist() == expected.indices.tolist()
        torch.testing.assert_close(torch.tensor(rows["change"].tolist()).double().abs(), expected.values)
        assert rows["token"].tolist() == [f"w{i}" for i in rows["token_id"]]
        torch.testing.assert_close(
            torch.tensor((rows["after"] - rows["before"]).tolist()), torch.tensor(rows["change"].tolist())
        )
    assert len(effect.top_changes(3, pos=2)) == 6
    assert not effect.top_changes(3, pos=0)["change"].any(), "nothing was changed before position 2"


@pytest.mark.parametrize(("k", "pos"), [(0, -1), (65, -1), (3, 7), (3, -8)])
def test_top_changes_out_of_range(session_models, k: int, pos: int):
    model = session_models("hooked-gpt2")
    effect = intervene(model, tiny_clt(model), random_tokens(model), [SET])
    with pytest.raises(InterventionError, match="give 1 to 64|give -7 to 6, the positions"):
        effect.top_changes(k, pos)


# -- features that are not active --------------------------------------------------------------------------


def test_changing_an_inactive_feature_is_allowed_and_said(one_of_each: Model):
    tokens, clt = random_tokens(one_of_each, batch=2), tiny_clt(one_of_each)
    acts = clt.encode(clean_run(one_of_each, clt, tokens).inputs)
    active = acts[:, 4, 1] != 0
    prompt, feature = next((p, f) for p, f in torch.nonzero(~active).tolist() if bool(active[1 - p, f]))
    effect = intervene(one_of_each, clt, tokens, [Intervention(layer=1, pos=4, feature=feature, scale=0)])
    assert effect.inactive == [(prompt, 1, feature)]
    assert f"feature 1.{feature} is not active there in prompt {prompt}" in repr(effect)
    torch.testing.assert_close(effect.logits[prompt], effect.baseline_logits[prompt], **CLOSE)
    assert not torch.allclose(effect.logits[1 - prompt], effect.baseline_logits[1 - prompt])
    turned_on = intervene(one_of_each, clt, tokens, [Intervention(layer=1, pos=4, feature=feature, value=9)])
    assert turned_on.inactive == effect.inactive
    assert not torch.allclose(turned_on.logits[prompt], turned_on.baseline_logits[prompt])
    everywhere = intervene(one_of_each, clt, tokens, [Intervention(layer=1, feature=range(24), value=1.0)])
    silent = (acts[:, :, 1] == 0).all(dim=1)
    assert everywhere.inactive == [(p, 1, f) for p, f in torch.nonzero(silent).tolist()]
    assert "inactive" not in repr(intervene(one_of_each, clt, tokens, []))


# -- swaps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [{4: 4}, {5: 2, -2: -1}])
def test_a_swap_gives_features_the_activations_of_the_source(model: Model, positions: dict):
    clt = tiny_clt(model)
    to, of = random_tokens(model)[0], random_tokens(model, pos=9, seed=5)[0]
    here, there = (clt.encode(clean_run(model, clt, t[None]).inputs)[0] for t in (to, of))
    swaps = swap_interventions(model, clt, to, of, positions)
    effect = intervene(model, clt, to, swaps)
    for source, target in positions.items():
        torch.testing.assert_close(effect.feature_acts[0, target], swapped(effect, here, there, source, target))
        assert not torch.allclose(here[target], there[source])
    one = next(f for f in range(24) if here[4, 1, f] != there[4, 1, f])
    swaps = swap_interventions(model, clt, to, of, {4: 4}, features=[(1, one)])
    assert swaps == [Intervention(layer=1, pos=4, feature=[one], value=[float(there[4, 1, one])])]


def swapped(effect, here: Tensor, there: Tensor, source: int, target: int) -> Tensor:
    """The source's activations where either prompt has a feature on; elsewhere what features read."""
    either = (here[target] != 0) | (there[source] != 0)
    return torch.where(either, there[source], effect.feature_acts[0, target])


def test_a_swap_with_itself_changes_nothing(one_of_each: Model):
    tokens, clt = random_tokens(one_of_each)[0], tiny_clt(one_of_each)
    swaps = swap_interventions(one_of_each, clt, tokens, tokens, {p: p for p in range(1, 7)})
    effect = intervene(one_of_each, clt, tokens, swaps)
    torch.testing.assert_close(effect.logits, effect.baseline_logits, **CLOSE)


@pytest.mark.parametrize(
    ("positions", "features", "message"),
    [
        ({9: 2}, None, "no position 9 in the source: it has positions 0 to 8"),
        ({2: 7}, None, "no position 7 in the prompt: it has positions 0 to 6"),
        ({2: 4, 3: -3}, None, "Two positions of the source go to one"),
        ({2: 2}, [(3, 0)], "no feature 0 in layer 3: the CLT has layers 0 to 2"),
        ({2: 2}, [(0, 24)], "no feature 24 in layer 0"),
        ({}, None, "nothing to swap"),
        ({2: 2}, [], r"features is \[\].*: give \(layer, feature\) pairs, at least one"),
    ],
)
def test_swaps_out_of_range(session_models, positions: dict, features, message: str):
    model = session_models("hooked-gpt2")
    to, of = random_tokens(model)[0], random_tokens(model, pos=9)[0]
    with pytest.raises(InterventionError, match=message):
        swap_interventions(model, tiny_clt(model), to, of, positions, features)


# -- bad input ---------------------------------------------------------------------------------------------

BAD_NUMBERS = {
    "nothing": ({}, "sets nothing: give exactly one of value, scale, add or noise"),
    "two": ({"value": 1, "scale": 2.0}, "sets value and scale: give exactly one"),
    "nan": ({"value": math.nan}, "value is nan: give a finite number"),
    "infinite": ({"scale": math.inf}, "scale is inf"),
    "infinite noise": ({"noise": -math.inf}, "noise is -inf"),
    "nan in a list": ({"add": [1.0, math.nan]}, r"add\[1\] is nan: give a finite number"),
    "too few": ({"value": [1.0]}, "1 numbers for 2 features"),
    "no feature": ({"feature": [], "value": 1}, "name at least one feature"),
    "twice": ({"feature": [3, 3], "value": 1}, "each once"),
}


@pytest.mark.parametrize("case", BAD_NUMBERS)
def test_bad_numbers_are_refused_when_the_intervention_is_made(case: str):
    given, message = BAD_NUMBERS[case]
    with pytest.raises(InterventionError, match=message):
        Intervention(**{"layer": 0, "feature": [1, 2], **given})


BAD_PLACES = {
    "layer": ({"layer": 3}, "no layer 3. The CLT has layers 0 to 2"),
    "negative layer": ({"layer": -1}, "no layer -1"),
    "feature": ({"feature": 24}, "no feature 24. A layer has features 0 to 23"),
    "negative feature": ({"feature": [2, -1]}, "no feature -1"),
    "position": ({"pos": 7}, "no position 7. The prompt has 7 tokens, positions 0 to 6.* For new tokens give None"),
    "negative position": ({"pos": -8}, "no position -8"),
    "list of positions": ({"pos": [0, 9]}, "no position 9"),
    "no positions": ({"pos": []}, "list of positions is empty"),
    "empty slice": ({"pos": slice(5, 5)}, "holds none of the prompt's 7 positions"),
    "backwards": ({"pos": slice(5, 1, -1)}, "positions go backwards"),
}


@pytest.mark.parametrize("case", BAD_PLACES)
def test_places_that_are_not_there(session_models, case: str):
    model = session_models("hooked-gpt2")
    given, message = BAD_PLACES[case]
    what = Intervention(**{"layer": 0, "feature": 1, "value": 1, **given})
    for call in (intervene, intervention_hooks):
        with pytest.raises(InterventionError, match=message):
            call(model, tiny_clt(model), random_tokens(model), [what])


def test_bad_directions(session_models):
    model = session_models("hooked-gpt2")
    tokens, clt = random_tokens(model), tiny_clt(model)
    for vector in (torch.zeros(32), torch.full((32,), math.nan)):
        with pytest.raises(InterventionError, match="is zero: give a direction|not be finite: give finite"):
            DirectionIntervention(layer=0, vector=vector, add=1)
    for layer, width, message in ((0, 31, "31 entries, but d_model is 32"), (3, 32, "no layer 3"), (-2, 32, "-1 for")):
        with pytest.raises(InterventionError, match=message):
            intervene(model, clt, tokens, [DirectionIntervention(layer=layer, vector=torch.ones(width), add=1)])


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"freeze": "norms"}, ConfigError, "freeze is 'norms': give one of attention, all, none"),
        ({"through_layer": 3}, InterventionError, "through_layer is 3: give -1 to 2, or None"),
        ({"through_layer": -2}, InterventionError, "through_layer is -2"),
        ({"through_layer": 0, "interventions": [HIGHER]}, InterventionError, "above through_layer=0"),
        ({"prompt": [[0, 5, 6], [0]]}, PromptError, "1 token long"),
        ({"prompt": []}, PromptError, "0 tokens"),
        ({"prompt": torch.zeros(0, 5, dtype=torch.long)}, PromptError, "no prompt in the batch"),
        ({"prompt": [0, 64]}, PromptError, "Token id 64 is out of range"),
        ({"prompt": "text"}, TokenizerMissing, "no tokenizer"),
        ({"clt": "other"}, CLTMismatch, "The CLT has d_model 16"),
    ],
)  # fmt: skip
def test_bad_arguments(session_models, given: dict, error, message: str):
    model = session_models("hooked-gpt2")
    arguments = {"prompt": random_tokens(model), "interventions": [SET], **given}
    arguments["clt"] = tiny_clt((3, 16)) if "clt" in given else tiny_clt(model)
    for call in (intervene, intervention_hooks):
        with pytest.raises(error, match=message):
            call(model, **arguments)


def test_an_intervention_may_mean_one_prompt_of_a_batch(model: Model):
    """Rows of one batch are so many runs of their own."""
    tokens, clt = random_tokens(model, batch=3), tiny_clt(model)
    direction = torch.randn(model.cfg.d_model, dtype=torch.float64)

    def changes(prompt: int | None) -> list:
        return [
            Intervention(layer=0, pos=[2, 3], feature=[3, 5], value=20, prompt=prompt),
            Intervention(layer=1, feature=0, add=2, prompt=prompt),
            DirectionIntervention(layer=0, pos=-1, vector=direction, add=1, prompt=prompt),
        ]

    for through_layer in (None, 2):
        effect = intervene(model, clt, tokens, [*changes(0), *changes(2)], through_layer)
        torch.testing.assert_close(effect.logits[1], effect.baseline_logits[1], **CLOSE)
        for row in (0, 2):
            alone = intervene(model, clt, tokens[row : row + 1], changes(None), through_layer)
            torch.testing.assert_close(effect.logits[row], alone.logits[0], **CLOSE)
            torch.testing.assert_close(effect.feature_acts[row], alone.feature_acts[0], **CLOSE)
            assert [i._replace(prompt=0) for i in effect.inactive if i.prompt == row] == alone.inactive


@pytest.mark.parametrize("prompt", [-1, 2])
def test_a_prompt_that_is_not_there(one_of_each: Model, prompt: int):
    tokens = random_tokens(one_of_each, batch=2)
    with pytest.raises(InterventionError, match="numbered from 0" if prompt < 0 else "batch has prompts 0 to 1"):
        intervene(one_of_each, tiny_clt(one_of_each), tokens, [Intervention(layer=0, feature=0, add=1, prompt=prompt)])


# -- what is meant, and what is no intervention ------------------------------------------------------------


@pytest.mark.usefixtures("as_users_run_it")
def test_numbers_of_numpy_and_tensors_are_numbers(one_of_each: Model):
    clt, tokens = tiny_clt(one_of_each), random_tokens(one_of_each)
    wanted = Intervention(layer=1, pos=[2, 3], feature=[4, 5], value=[1.0, 2.0])
    ways = [
        Intervention(
            layer=np.int64(1), pos=torch.tensor([2, 3]), feature=np.array([4, 5]), value=torch.tensor([1.0, 2.0])
        ),
        Intervention(layer=torch.tensor(1), pos=range(2, 4), feature=range(4, 6), value=np.array([1.0, 2.0])),
    ]
    assert ways == [wanted, wanted]
    effect = intervene(one_of_each, clt, tokens, [wanted], np.int64(2))
    for given in (wanted, ways, iter([wanted])):
        assert torch.equal(intervene(one_of_each, clt, tokens, given, 2).logits, effect.logits)
    assert len(effect.top_changes(np.int64(3), torch.tensor(-1))) == 3


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    "given",
    [
        {"feature": 1.5, "value": 1.0},
        {"feature": "3", "value": 1.0},
        {"feature": True, "value": 1.0},
        {"feature": 3, "value": "much"},
        {"feature": 3, "value": True},
        {"feature": 3, "value": np.zeros((2, 2))},
        {"feature": 3, "noise": [1.0]},
        {"feature": 3, "value": 1.0, "pos": 1.0},
        {"feature": 3, "value": 1.0, "pos": slice("a", None)},
        {"feature": 3, "value": 1.0, "seed": 0.5},
        {"feature": 3, "value": 1.0, "layer": None},
        {"feature": 3, "value": 10**400},
    ],
    ids=str,
)
def test_what_is_no_number_is_refused(given: dict):
    with pytest.raises(InterventionError, match=": give "):
        Intervention(**{"layer": 1, **given})


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("given", [None, 3, "1:2:3=0", {"layer": 1}, [None], [[SET]]], ids=str)
def test_what_is_no_intervention_is_refused(one_of_each: Model, given):
    with pytest.raises(InterventionError, match=r"interventions(\[0\])? is .*: give an Intervention"):
        intervene(one_of_each, tiny_clt(one_of_each), random_tokens(one_of_each), given)
