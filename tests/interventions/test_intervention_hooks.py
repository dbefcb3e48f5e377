"""The hooks against hooks written by hand, in every call that TransformerLens has, beside hooks of the user's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from tests.models import Model, random_tokens, save_hf, tiny_clt, tiny_hf
from tests.replacement.by_hand import clean_run
from tests.replacement.test_calls import generating as generating  # a fixture
from tests.replacement.test_leaving_no_trace import snapshot
from tl_clt import Intervention, attach, frozen_hooks, intervention_hooks, load_model
from tl_clt.errors import ModelUnsupported, PromptError
from tl_clt.interventions import DirectionIntervention
from tl_clt.transcoder import CrossLayerTranscoder

Edit = Callable[[Tensor], Tensor]
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def by_hand(layer: int, edit: Edit) -> list[tuple[str, Callable]]:
    """A hook on feature activations, as people write them."""
    return [(f"blocks.{layer}.clt.hook_acts_post", lambda acts, hook: edit(acts.clone()))]


def set_all(acts: Tensor) -> Tensor:
    acts[..., 3] = 20.0
    return acts


def scale_one(acts: Tensor) -> Tensor:
    acts[:, [1, 2, 3, 4], 2:12] *= -3.0
    return acts


def add_some(acts: Tensor) -> Tensor:
    acts[:, 2:6:2, 7] += 9.0
    return acts


def set_list(acts: Tensor) -> Tensor:
    acts[:, [1, -1], 11] = 15.0
    acts[:, [1, -1], 4] = -5.0
    return acts


CASES: dict[str, tuple[int, Edit, Intervention]] = {
    "value everywhere": (0, set_all, Intervention(layer=0, feature=3, value=20.0)),
    "scale a supernode": (1, scale_one, Intervention(layer=1, pos=[1, 2, 3, 4], feature=range(2, 12), scale=-3)),
    "add on a slice": (0, add_some, Intervention(layer=0, pos=slice(2, 6, 2), feature=7, add=9)),
    "values on a list": (1, set_list, Intervention(layer=1, pos=[1, -1], feature=[11, 4], value=[15, -5.0])),
}


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


# -- generation --------------------------------------------------------------------------------------------

STEERING = {
    "iterative": ([Intervention(layer=0, feature=3, value=20)], None, "none"),
    "iterative, attention held": ([Intervention(layer=0, feature=3, value=20)], None, "attention"),
    "constrained, all held": ([Intervention(layer=1, pos=slice(2, None), feature=3, value=20)], 1, "all"),
    "noise": ([Intervention(layer=0, feature=3, noise=20)], None, "attention"),
    "new tokens only": ([Intervention(layer=0, pos=slice(7, None), feature=3, value=40)], None, "attention"),
}


@pytest.fixture
def generating_one(one_of_each: Model, tmp_path: Path) -> Model:
    """As `one_of_each`; the one with learned positions with a tokenizer, for the reason of `generating`."""
    if isinstance(one_of_each, HookedTransformer):
        return load_model(save_hf(tiny_hf("gpt2"), tmp_path), dtype=torch.float64)
    return one_of_each


def generate(model: Model, tokens: Tensor, hooks: list, *, cache: bool, n: int = 5) -> Tensor:
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        return model.generate(
            tokens,
            max_new_tokens=n,
            do_sample=False,
            stop_at_eos=False,
            use_past_kv_cache=cache,
            return_type="tokens",
            verbose=False,
        ).clone()


@pytest.mark.parametrize("how", STEERING)
def test_generation_with_and_without_a_cache_gives_the_same_tokens(generating: Model, how: str):
    """And those that one pass over the whole text gives. The user's own hook acts all along."""
    tokens = random_tokens(generating, batch=2)
    interventions, through_layer, freeze = STEERING[how]
    hooks = intervention_hooks(generating, tiny_clt(generating), tokens, interventions, through_layer, freeze)
    seen: list[int] = []
    generating.add_hook("blocks.1.hook_resid_post", lambda x, hook: seen.append(x.shape[1]))
    try:
        slow, fast = (generate(generating, tokens, hooks, cache=cache) for cache in (False, True))
        assert seen == [7, 8, 9, 10, 11, 7, 1, 1, 1, 1]
        again = generate(generating, tokens, hooks, cache=True)
        with torch.no_grad():
            whole = generating.run_with_hooks(slow, fwd_hooks=hooks)
            generating(tokens)
        assert len(seen) == 17, "the user's hook is still there"
    finally:
        generating.reset_hooks()
    assert slow.shape == (2, 12) and torch.equal(slow, fast) and torch.equal(fast, again)
    assert torch.equal(whole[:, 6:-1].argmax(dim=-1), slow[:, 7:])


@pytest.mark.parametrize("cache", [False, True])
def test_steering_changes_what_is_generated(generating_one: Model, cache: bool):
    tokens = random_tokens(generating_one)
    hooks = intervention_hooks(generating_one, tiny_clt(generating_one), tokens, STEERING["new tokens only"][0])
    own, steered = (generate(generating_one, tokens, h, cache=cache, n=8) for h in ([], hooks))
    assert torch.equal(own[:, :8], steered[:, :8]), "the first new token comes from the prompt alone"
    assert not torch.equal(own, steered)


@pytest.mark.parametrize("mode", ["observe", "replace", "replace_with_error"])
def test_generation_within_attach(generating_one: Model, mode):
    tokens, clt = random_tokens(generating_one), tiny_clt(generating_one)
    with attach(generating_one, clt, mode):
        hooks = intervention_hooks(generating_one, clt, tokens, STEERING["iterative"][0], freeze="none")
        slow, fast = (generate(generating_one, tokens, hooks, cache=cache) for cache in (False, True))
        at_points = generate(generating_one, tokens, by_hand(0, set_all), cache=True)
    assert torch.equal(slow, fast)
    if mode != "observe":
        assert torch.equal(fast, at_points)


def test_within_replace_the_replacement_model_is_steered(one_of_each: Model):
    tokens, clt = random_tokens(one_of_each, batch=2), tiny_clt(one_of_each)
    hooks = intervention_hooks(one_of_each, clt, tokens, STEERING["iterative"][0], freeze="none")
    with torch.no_grad(), attach(one_of_each, clt, "replace"):
        expected = one_of_each.run_with_hooks(tokens, fwd_hooks=by_hand(0, set_all))
        torch.testing.assert_close(one_of_each.run_with_hooks(tokens, fwd_hooks=hooks), expected, **CLOSE)


def test_a_token_out_of_nowhere_is_refused(one_of_each: Model):
    tokens, clt = random_tokens(one_of_each), tiny_clt(one_of_each)
    hooks = intervention_hooks(one_of_each, clt, tokens, STEERING["iterative"][0])
    with torch.no_grad():
        with pytest.raises(PromptError, match="have not seen the text before it"):
            one_of_each.run_with_hooks(tokens[:, :1], fwd_hooks=hooks)
        one_of_each.run_with_hooks(tokens, fwd_hooks=hooks)
        with pytest.raises(ModelUnsupported, match="attends to 1 tokens of which 1 are new.* have seen 7"):
            one_of_each.run_with_hooks(tokens[:, :1], fwd_hooks=hooks)
        with pytest.raises(PromptError, match="have not seen the text before it"):
            one_of_each.run_with_hooks(tokens[:, :1].expand(3, 1), fwd_hooks=hooks)


def test_a_pass_that_starts_later_is_refused(session_models):
    model = session_models("hooked-gpt2")
    tokens = random_tokens(model)
    hooks = intervention_hooks(model, tiny_clt(model), tokens, STEERING["iterative"][0], freeze="none")
    with torch.no_grad():
        residual = model.run_with_cache(tokens)[1]["blocks.1.hook_resid_pre"]
        for _ in range(2):
            with pytest.raises(ModelUnsupported, match="came to block 1 without block 0"):
                with model.hooks(fwd_hooks=hooks):
                    model(residual, start_at_layer=1)
            model.run_with_hooks(tokens, fwd_hooks=hooks)


@pytest.mark.parametrize("stop", [1, 2])
def test_stopping_early_works(one_of_each: Model, stop: int):
    tokens = random_tokens(one_of_each)
    hooks = intervention_hooks(one_of_each, tiny_clt(one_of_each), tokens, STEERING["iterative"][0])
    with torch.no_grad(), one_of_each.hooks(fwd_hooks=hooks):
        _, whole = one_of_each.run_with_cache(tokens)
        _, early = one_of_each.run_with_cache(tokens, stop_at_layer=stop)
        one_of_each(tokens, stop_at_layer=stop)
        _, again = one_of_each.run_with_cache(tokens)
    assert torch.equal(early["blocks.0.hook_mlp_out"], whole["blocks.0.hook_mlp_out"])
    assert torch.equal(again["blocks.2.hook_mlp_out"], whole["blocks.2.hook_mlp_out"])


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
    hooks = intervention_hooks(one_of_each, clt, tokens, STEERING["iterative"][0])
    kept = []

    def keep(x: Tensor, hook: object) -> None:
        x.retain_grad()
        kept.append(x)

    one_of_each.run_with_hooks(tokens, fwd_hooks=[*hooks, ("blocks.0.hook_attn_out", keep)])[0, -1, 5].backward()
    one_of_each.zero_grad()
    assert kept[0].grad.abs().max() > 0
