"""Steering new tokens as they come, with a key-value cache and without; and passes that cannot be steered."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from tests.interventions.edits import CLOSE, by_hand, set_all
from tests.models import Model, random_tokens, save_hf, tiny_clt, tiny_hf
from tl_clt import Intervention, attach, intervention_hooks, load_model
from tl_clt.errors import ModelUnsupported, PromptError

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
