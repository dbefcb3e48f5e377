"""The hooks against hooks written by hand, in every call that TransformerLens has, beside hooks of the user's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.interventions.edits import CASES, CLOSE, Edit, by_hand, scale_one, set_all, set_list
from tests.models import Model, random_tokens, snapshot, tiny_clt
from tests.replacement.by_hand import clean_run
from tl_clt import Intervention, attach, frozen_hooks, intervention_hooks
from tl_clt.interventions import DirectionIntervention
from tl_clt.transcoder import CrossLayerTranscoder


@pytest.mark.parametrize("case", CASES)
def test_iterative_unfrozen_equals_a_hook_by_hand(model: Model, tokens: Tensor, case: str):
    layer, edit, intervention = CASES[case]
    clt = tiny_clt(model)
    hooks = intervention_hooks(model, clt, tokens, [intervention], freeze="none")
    with torch.no_grad():
        clean, steered = model(tokens), model.run_with_hooks(tokens, fwd_hooks=hooks)
        with attach(model, clt, mode="replace_with_error"):
            expected = model.run_with_hooks(tokens, fwd_hooks=by_hand(layer, edit))
            torch.testing.assert_close(model.run_with_hooks(tokens, fwd_hooks=hooks), expected, **CLOSE)
            made_inside = intervention_hooks(model, clt, tokens, [intervention], freeze="none")
            torch.testing.assert_close(model.run_with_hooks(tokens, fwd_hooks=made_inside), expected, **CLOSE)
        torch.testing.assert_close(model.run_with_hooks(tokens, fwd_hooks=made_inside), expected, **CLOSE)
    torch.testing.assert_close(steered, expected, **CLOSE)
    assert (steered - clean).abs().max() > 0.01


@pytest.mark.parametrize(
    "variant",
    [{"span": 1}, {"span": 2}, {"skip": True}, {"activation": "topk"}, {"input_hook": "ln2.hook_normalized"}],
    ids=str,
)
def test_by_hand_for_every_kind_of_clt(one_of_each: Model, variant: dict):
    tokens = random_tokens(one_of_each, batch=2)
    clt = tiny_clt(one_of_each, **variant)
    hooks = intervention_hooks(one_of_each, clt, tokens, [CASES["value everywhere"][2]], freeze="none")
    with torch.no_grad():
        steered = one_of_each.run_with_hooks(tokens, fwd_hooks=hooks)
        with attach(one_of_each, clt, mode="replace_with_error"):
            expected = one_of_each.run_with_hooks(tokens, fwd_hooks=by_hand(0, set_all))
    torch.testing.assert_close(steered, expected, **CLOSE)


@pytest.mark.parametrize("freeze", ["attention", "all"])
def test_frozen_iterative_equals_frozen_hooks_by_hand(one_of_each: Model, freeze: str):
    tokens = random_tokens(one_of_each, batch=2)
    clt = tiny_clt(one_of_each)
    layer, edit, intervention = CASES["values on a list"]
    with torch.no_grad():
        _, cache = one_of_each.run_with_cache(tokens)
        held = frozen_hooks(cache, scales=freeze == "all")
        hooks = intervention_hooks(one_of_each, clt, tokens, [intervention], freeze=freeze)
        steered = one_of_each.run_with_hooks(tokens, fwd_hooks=hooks)
        with attach(one_of_each, clt, mode="replace_with_error"):
            expected = one_of_each.run_with_hooks(tokens, fwd_hooks=[*held, *by_hand(layer, edit)])
            free = one_of_each.run_with_hooks(tokens, fwd_hooks=by_hand(layer, edit))
    torch.testing.assert_close(steered, expected, **CLOSE)
    assert (steered - free).abs().max() > 1e-4


def test_two_interventions_on_one_feature_act_in_order(one_of_each: Model):
    tokens = random_tokens(one_of_each)
    clt = tiny_clt(one_of_each)

    def run(*interventions: Intervention) -> Tensor:
        with torch.no_grad():
            return one_of_each.run_with_hooks(
                tokens, fwd_hooks=intervention_hooks(one_of_each, clt, tokens, interventions)
            )

    both = run(Intervention(layer=0, feature=3, value=4), Intervention(layer=0, feature=3, scale=2.5))
    torch.testing.assert_close(both, run(Intervention(layer=0, feature=3, value=10)), **CLOSE)


# -- constrained -------------------------------------------------------------------------------------------


def constrained_by_hand(
    model: Model, clt: CrossLayerTranscoder, tokens: Tensor, layer: int, edit: Edit, through: int
) -> Tensor:
    """Each MLP output up to `through` put at its clean value plus the decoder vectors times the change."""
    clean = clean_run(model, clt, tokens)
    acts = clt.encode(clean.inputs)
    change = torch.zeros_like(acts)
    change[..., layer, :] = edit(acts[..., layer, :].clone()) - acts[..., layer, :]
    outs = clean.mlp_outs + clt.decode(change) - clt.b_dec
    hooks = [(f"blocks.{t}.hook_mlp_out", lambda out, hook, t=t: outs[..., t, :].clone()) for t in range(through + 1)]
    with torch.no_grad():
        return model.run_with_hooks(tokens, fwd_hooks=hooks)


@pytest.mark.parametrize("through", [1, 2])
@pytest.mark.parametrize("case", ["scale a supernode", "values on a list"])
def test_constrained_equals_mlp_outputs_put_by_hand(model: Model, tokens: Tensor, case: str, through: int):
    layer, edit, intervention = CASES[case]
    clt = tiny_clt(model)
    hooks = intervention_hooks(model, clt, tokens, [intervention], through_layer=through, freeze="none")
    with torch.no_grad():
        steered = model.run_with_hooks(tokens, fwd_hooks=hooks)
    expected = constrained_by_hand(model, clt, tokens, layer, edit, through)
    torch.testing.assert_close(steered, expected, **CLOSE)
    assert (steered - model(tokens)).abs().max() > 0.01


def test_constrained_and_iterative_differ(one_of_each: Model):
    tokens, clt = random_tokens(one_of_each), tiny_clt(one_of_each)
    with torch.no_grad():
        iterative, constrained = (
            one_of_each.run_with_hooks(
                tokens, fwd_hooks=intervention_hooks(one_of_each, clt, tokens, [CASES["value everywhere"][2]], through)
            )
            for through in (None, 2)
        )
    assert (iterative - constrained).abs().max() > 1e-3


@pytest.mark.parametrize("through_layer", [None, -1, 0, 2])
@pytest.mark.parametrize("freeze", ["none", "attention", "all"])
def test_without_a_change_the_logits_are_the_models_own(model: Model, tokens: Tensor, through_layer, freeze):
    nothing = [Intervention(layer=0, feature=3, scale=1)] if through_layer != -1 else []
    hooks = intervention_hooks(model, tiny_clt(model), tokens, nothing, through_layer, freeze)
    with torch.no_grad():
        torch.testing.assert_close(model.run_with_hooks(tokens, fwd_hooks=hooks), model(tokens), rtol=0, atol=1e-12)


# -- directions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [-1, 0, 2])
def test_a_direction_is_written_into_the_residual_stream(model: Model, tokens: Tensor, layer: int):
    """With no layer constrained and nothing frozen this is the model itself with a vector added."""
    vector = torch.randn(model.cfg.d_model, dtype=torch.float64)
    name = "blocks.0.hook_resid_pre" if layer == -1 else f"blocks.{layer}.hook_resid_post"

    def run(through_layer: int | None, **how: float) -> Tensor:
        what = DirectionIntervention(layer=layer, pos=[2, 3], vector=vector, **how)
        hooks = intervention_hooks(model, tiny_clt(model), tokens, [what], through_layer, freeze="none")
        with torch.no_grad():
            return model.run_with_hooks(tokens, fwd_hooks=hooks)

    def by_hand(x: Tensor, hook: object, *, remove: bool) -> Tensor:
        x, unit = x.clone(), vector / vector.norm()
        x[:, [2, 3]] -= (x[:, [2, 3]] @ unit)[..., None] * unit if remove else -1.5 * vector
        return x

    with torch.no_grad():
        added = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: by_hand(x, hook, remove=False))])
        removed = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook: by_hand(x, hook, remove=True))])
    torch.testing.assert_close(run(-1, add=1.5), added, **CLOSE)
    torch.testing.assert_close(run(-1, scale=0), removed, **CLOSE)
    torch.testing.assert_close(run(-1, value=0), removed, **CLOSE)
    same = layer == 2  # nothing comes after the last block but the unembedding
    assert torch.allclose(run(None, add=1.5), added) == same


def test_hooks_print_without_their_tensors(one_of_each: Model):
    """TransformerLens prints every hook that it adds: one that prints a large tensor takes longer than the model."""
    what = [
        DirectionIntervention(layer=1, vector=torch.ones(one_of_each.cfg.d_model, dtype=torch.float64), add=1),
        Intervention(layer=0, feature=range(24), value=[1.0] * 24),
    ]
    hooks = intervention_hooks(one_of_each, tiny_clt(one_of_each), random_tokens(one_of_each), what, freeze="all")
    assert max(len(repr(hook)) for _, hook in hooks) < 300


# -- noise -------------------------------------------------------------------------------------------------


def test_noise_is_seeded_and_moves_along_the_features_decoder_only(one_of_each: Model):
    tokens = random_tokens(one_of_each, batch=2)
    clt = tiny_clt(one_of_each)
    outs: dict[int, Tensor] = {}

    def run(seed: int) -> Tensor:
        noisy = Intervention(layer=1, pos=slice(1, None), feature=6, noise=3, seed=seed)
        hooks = intervention_hooks(one_of_each, clt, tokens, [noisy], through_layer=2)
        kept = [("blocks.1.hook_mlp_out", lambda out, hook: outs.update({seed: out}))]
        with torch.no_grad():
            return one_of_each.run_with_hooks(tokens, fwd_hooks=[*hooks, *kept])

    first, again, other = run(0), run(0), run(1)
    assert torch.equal(first, again) and not torch.allclose(first, other)
    clean = clean_run(one_of_each, clt, tokens).mlp_outs[..., 1, :]
    row = clt.decoder_rows(1, torch.tensor([6]))[0, 0]
    amount = (outs[0] - clean) @ row / row.square().sum()
    torch.testing.assert_close(outs[0] - clean, amount[..., None] * row, **CLOSE)
    assert not amount[:, 0].any() and 1 < amount[:, 1:].std() < 6
    assert len(amount[:, 1:].unique()) == 12, "drawn anew for each prompt and position"


# -- the user's own hooks ----------------------------------------------------------------------------------


def test_the_users_hooks_act_once_and_stay(model: Model, tokens: Tensor):
    clt, calls = tiny_clt(model), []
    shift = torch.randn(model.cfg.d_model, dtype=torch.float64)

    def own(out: Tensor, hook: object) -> Tensor:
        calls.append(1)
        return out + shift

    hooks = intervention_hooks(model, clt, tokens, [CASES["scale a supernode"][2]], freeze="none")
    user = ("blocks.0.hook_attn_out", own)
    try:
        model.add_hook(*user)
        before = snapshot(model)
        with torch.no_grad():
            steered = model.run_with_hooks(tokens, fwd_hooks=hooks)
            assert calls == [1]
            assert snapshot(model) == before
            with attach(model, clt, "replace_with_error"):
                expected = model.run_with_hooks(tokens, fwd_hooks=by_hand(1, scale_one))
    finally:
        model.reset_hooks()
    torch.testing.assert_close(steered, expected, **CLOSE)


@pytest.mark.parametrize("mode", ["replace", "replace_with_error"])
def test_within_attach_hooks_by_hand_act_beside_these(one_of_each: Model, mode):
    """On features, and on an MLP's output after these."""
    tokens, clt = random_tokens(one_of_each, batch=2), tiny_clt(one_of_each)
    theirs = [*by_hand(0, set_all), ("blocks.1.hook_mlp_out", lambda out, hook: 2 * out)]
    hooks = intervention_hooks(one_of_each, clt, tokens, [CASES["values on a list"][2]], freeze="none")
    with torch.no_grad(), attach(one_of_each, clt, mode):
        expected = one_of_each.run_with_hooks(tokens, fwd_hooks=[*theirs, *by_hand(1, set_list)])
        steered = one_of_each.run_with_hooks(tokens, fwd_hooks=[*hooks, *theirs])
    torch.testing.assert_close(steered, expected, **CLOSE)


def test_a_hook_on_an_mlps_output_after_these_acts_on_what_they_put_there(one_of_each: Model):
    tokens = random_tokens(one_of_each)
    hooks = intervention_hooks(one_of_each, tiny_clt(one_of_each), tokens, [CASES["scale a supernode"][2]])
    double = ("blocks.2.hook_mlp_out", lambda out, hook: 2 * out)
    with torch.no_grad():
        with one_of_each.hooks(fwd_hooks=hooks):
            _, once = one_of_each.run_with_cache(tokens)
        with one_of_each.hooks(fwd_hooks=[*hooks, double]):
            _, twice = one_of_each.run_with_cache(tokens)
    torch.testing.assert_close(twice["blocks.2.hook_mlp_out"], 2 * once["blocks.2.hook_mlp_out"])


def test_gradients_flow_through_the_changed_run(one_of_each: Model):
    tokens, clt = random_tokens(one_of_each), tiny_clt(one_of_each)
    hooks = intervention_hooks(one_of_each, clt, tokens, [CASES["value everywhere"][2]])
    kept = []

    def keep(x: Tensor, hook: object) -> None:
        x.retain_grad()
        kept.append(x)

    one_of_each.run_with_hooks(tokens, fwd_hooks=[*hooks, ("blocks.0.hook_attn_out", keep)])[0, -1, 5].backward()
    one_of_each.zero_grad()
    assert kept[0].grad.abs().max() > 0
