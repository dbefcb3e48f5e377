"""With attention patterns and norm scales held, what follows the MLPs' outputs is linear in them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.models import Model, random_tokens
from tl_clt import load_organism
from tl_clt.errors import HookNotFound, ModelUnsupported, PromptError
from tl_clt.lens import find_hook, frozen_hooks, hold, is_frozen_hook, run_with_hooks
from tl_clt.lens.freezing import require_held

LAYERS = range(3)


def cached(model: Model, tokens: Tensor):
    with torch.no_grad():
        return model.run_with_cache(tokens)


def test_holding_the_clean_values_reproduces_the_logits(model: Model, tokens: Tensor):
    logits, cache = cached(model, tokens)
    with torch.no_grad():
        frozen = run_with_hooks(model, tokens, frozen_hooks(cache))
    torch.testing.assert_close(frozen, logits, rtol=0, atol=1e-10)


def frozen_logits(model: Model, tokens: Tensor, cache, mlp_outs: list[Tensor], final: list[Tensor]) -> Tensor:
    """Logits and last residual stream with every MLP's output given and everything not linear held."""
    hooks = [(f"blocks.{t}.hook_mlp_out", hold(mlp_outs[t])) for t in LAYERS]
    # Not through a hook_scale: what comes after the last norm is seen as well.
    keep = ("blocks.2.hook_resid_post", lambda tensor, hook: final.append(tensor))
    with torch.no_grad():
        return run_with_hooks(model, tokens, [*frozen_hooks(cache), *hooks, keep])


def test_second_differences_vanish(model: Model, tokens: Tensor):
    """f(x + a + b) - f(x + a) - f(x + b) + f(x) = 0 for large changes a and b of the MLPs' outputs."""
    _, cache = cached(model, tokens)
    clean = [cache[f"blocks.{t}.hook_mlp_out"] for t in LAYERS]
    a, b = ([10 * torch.randn_like(c) for c in clean] for _ in range(2))

    def f(*changes: list[Tensor]) -> Tensor:
        outs = [c + sum(change[t] for change in changes) for t, c in enumerate(clean)]
        return frozen_logits(model, tokens, cache, outs, [])

    moved = (f(a) - f()).abs().max()
    second = f(a, b) - f(a) - f(b) + f()
    assert moved > 1
    assert second.abs().max() < 1e-10 * moved


def test_without_freezing_second_differences_do_not_vanish(model: Model, tokens: Tensor):
    """The test above would see it if patterns or scales were not held."""
    _, cache = cached(model, tokens)
    clean = [cache[f"blocks.{t}.hook_mlp_out"] for t in LAYERS]
    a, b = ([10 * torch.randn_like(c) for c in clean] for _ in range(2))

    def f(held: dict, *changes: list[Tensor]) -> Tensor:
        outs = [c + sum(change[t] for change in changes) for t, c in enumerate(clean)]
        hooks = [(f"blocks.{t}.hook_mlp_out", hold(outs[t])) for t in LAYERS]
        with torch.no_grad():
            return run_with_hooks(model, tokens, [*frozen_hooks(cache, **held), *hooks])

    for held in ({"patterns": False}, {"scales": False}):
        second = f(held, a, b) - f(held, a) - f(held, b) + f(held)
        assert second.abs().max() > 1e-3, held


def test_patterns_or_scales_alone_may_be_held(one_of_each: Model):
    _, cache = cached(one_of_each, random_tokens(one_of_each))
    patterns = [name for name, _ in frozen_hooks(cache, scales=False)]
    scales = [name for name, _ in frozen_hooks(cache, patterns=False)]
    assert patterns == [f"blocks.{t}.attn.hook_pattern" for t in LAYERS]
    assert "ln_final.hook_scale" in scales and len(scales) >= 7
    assert set(patterns) | set(scales) == {name for name, _ in frozen_hooks(cache)}
    assert all(is_frozen_hook(name) for name in patterns + scales)


@pytest.mark.parametrize("how", ["run_with_hooks", "hooks", "add_hook"])
def test_frozen_hooks_are_plain_hooks(one_of_each: Model, how: str):
    tokens = random_tokens(one_of_each, seed=1)
    other = random_tokens(one_of_each, seed=2)
    logits, cache = cached(one_of_each, tokens)
    hooks = frozen_hooks(cache)
    with torch.no_grad():
        expected = one_of_each.run_with_hooks(other, fwd_hooks=hooks)
        if how == "hooks":
            with one_of_each.hooks(fwd_hooks=hooks):
                assert torch.equal(one_of_each(other), expected)
        if how == "add_hook":
            for name, hook in hooks:
                one_of_each.add_hook(name, hook)
            assert torch.equal(one_of_each(other), expected)
            one_of_each.reset_hooks()
        assert not torch.allclose(expected, one_of_each(other))
        assert torch.equal(one_of_each(tokens), logits)


def test_held_values_reach_only_their_own_hooks(one_of_each: Model):
    """No gradient flows through what is held, and the cache stays as it was."""
    tokens = random_tokens(one_of_each)
    _, cache = one_of_each.run_with_cache(tokens)
    name, hook = frozen_hooks(cache)[0]
    before = cache[name].clone()
    held = hook(torch.zeros_like(cache[name]), hook=find_hook(one_of_each, name))
    assert not held.requires_grad and torch.equal(held, before)
    held.zero_()
    assert torch.equal(cache[name], before)


def test_another_length_raises(one_of_each: Model):
    _, cache = cached(one_of_each, random_tokens(one_of_each, pos=7))
    with pytest.raises(PromptError, match=r"has shape \[1, .* to hold have \[1, .*same length"):
        one_of_each.run_with_hooks(random_tokens(one_of_each, pos=5), fwd_hooks=frozen_hooks(cache))
    assert not any(point.fwd_hooks for point in one_of_each.hook_dict.values())


def test_another_number_of_prompts_raises(one_of_each: Model):
    _, cache = cached(one_of_each, random_tokens(one_of_each))
    with pytest.raises(PromptError, match="as many prompts"):
        one_of_each.run_with_hooks(random_tokens(one_of_each, batch=2), fwd_hooks=frozen_hooks(cache))


@pytest.mark.parametrize("names", [[], ["blocks.0.hook_mlp_out"]])
def test_a_cache_with_nothing_to_hold_raises(one_of_each: Model, names: list[str]):
    _, cache = one_of_each.run_with_cache(random_tokens(one_of_each), names_filter=lambda n: n in names)
    with pytest.raises(HookNotFound, match="no attn.hook_pattern and no hook_scale to hold"):
        frozen_hooks(cache)


def test_a_plain_dictionary_will_do(one_of_each: Model):
    logits, cache = cached(one_of_each, random_tokens(one_of_each))
    hooks = frozen_hooks({name: cache[name] for name in cache.keys()})
    with torch.no_grad():
        frozen = one_of_each.run_with_hooks(random_tokens(one_of_each), fwd_hooks=hooks)
    torch.testing.assert_close(frozen, logits, rtol=0, atol=1e-10)


def test_what_rounding_alone_may_do_is_not_blamed_on_the_backend():
    """Half precision rounds so much that what is linear does not look so."""
    model, _ = load_organism("atlas", dtype="bfloat16")
    tokens = model.to_tokens("Dallas is in a state with the region South .")
    with pytest.raises(
        ModelUnsupported, match=r"In bfloat16 rounding alone may do so: load the model with dtype='float32'"
    ):
        require_held(model, tokens)
