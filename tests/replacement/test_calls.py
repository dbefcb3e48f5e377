"""The CLT's hook points work in every call that TransformerLens has."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

from tests.models import Model, random_tokens, tiny_clt, tiny_hooked
from tl_clt.errors import ModelUnsupported
from tl_clt.lens import CleanCaches
from tl_clt.replacement import attach

MODES = ("observe", "replace", "replace_with_error")
ACTS = "blocks.0.clt.hook_acts_post"


def strong(acts: Tensor, hook: object) -> Tensor:
    """A strong edit at every position, new ones included."""
    acts = acts.clone()
    acts[..., 3] = 20.0
    return acts


@pytest.mark.parametrize("how", ["names_filter", "add_hook", "add_hook by filter", "hooks", "run_with_hooks by filter"])
def test_points_are_found_by_every_way_to_hook(one_of_each: Model, how: str):
    tokens = random_tokens(one_of_each)
    seen: dict[str, Tensor] = {}

    def keep(tensor: Tensor, hook) -> None:
        seen[hook.name] = tensor

    def is_acts(name: str) -> bool:
        return name.endswith("clt.hook_acts_post")

    with torch.no_grad(), attach(one_of_each, tiny_clt(one_of_each)):
        if how == "names_filter":
            seen.update(one_of_each.run_with_cache(tokens, names_filter=is_acts)[1].items())
        elif how == "add_hook":
            for t in range(3):
                one_of_each.add_hook(f"blocks.{t}.clt.hook_acts_post", keep)
            one_of_each(tokens)
        elif how == "add_hook by filter":
            one_of_each.add_hook(is_acts, keep)
            one_of_each(tokens)
        elif how == "hooks":
            with one_of_each.hooks(fwd_hooks=[(f"blocks.{t}.clt.hook_acts_post", keep) for t in range(3)]):
                one_of_each(tokens)
        else:
            one_of_each.run_with_hooks(tokens, fwd_hooks=[(is_acts, keep)])
    assert list(seen) == [f"blocks.{t}.clt.hook_acts_post" for t in range(3)]
    assert all(v.shape == (1, 7, 24) and (v > 0).any() for v in seen.values())


def test_backward_hooks_see_gradients(one_of_each: Model):
    seen = []
    with attach(one_of_each, tiny_clt(one_of_each).requires_grad_(True), "replace"):
        loss = one_of_each.run_with_hooks(
            random_tokens(one_of_each),
            return_type="loss",
            bwd_hooks=[(ACTS, lambda grad, hook: seen.append(grad.clone()))],
        )
        with one_of_each.hooks(bwd_hooks=[(ACTS, lambda grad, hook: seen.append(grad.clone()))]):
            loss = one_of_each(random_tokens(one_of_each), return_type="loss")
            loss.backward()
    assert seen and seen[0].shape == (1, 7, 24) and seen[0].any()
    one_of_each.zero_grad()


def test_a_hook_added_inside_does_not_outlive_the_block(one_of_each: Model):
    tokens = random_tokens(one_of_each)
    clt = tiny_clt(one_of_each)
    with torch.no_grad():
        with attach(one_of_each, clt, "replace"):
            expected = one_of_each(tokens)
            one_of_each.add_hook(ACTS, strong, is_permanent=True)
            assert not torch.allclose(one_of_each(tokens), expected)
        with attach(one_of_each, clt, "replace"):
            assert torch.equal(one_of_each(tokens), expected)


def step_logits(model: Model, tokens: Tensor, *, cache: bool, hooks: list) -> tuple[Tensor, list[Tensor]]:
    """Four greedy tokens after the prompt, and the logits that each was chosen by."""
    calls: list[Tensor] = []
    handle = model.unembed.register_forward_hook(lambda module, args, output: calls.append(output[:, -1].clone()))
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        generated = model.generate(
            tokens,
            max_new_tokens=4,
            do_sample=False,
            stop_at_eos=False,
            use_past_kv_cache=cache,
            return_type="tokens",
            verbose=False,
        )
    handle.remove()
    # In mode replace_with_error a clean run goes before each run that counts.
    runs = len(calls) // 4
    assert len(calls) == 4 * runs
    # What generate gives cannot take part in gradients: a copy can.
    return generated.clone(), calls[runs - 1 :: runs]


@pytest.mark.parametrize("mode", ["replace", "replace_with_error"])
def test_generation_under_an_edit_equals_one_pass_over_what_was_generated(generating: Model, mode):
    """With and without a key-value cache: same tokens, and the logits of a pass over all of them."""
    tokens = random_tokens(generating, batch=2)
    edit = [(ACTS, strong)]
    with torch.no_grad(), attach(generating, tiny_clt(generating), mode):
        generated, steps = step_logits(generating, tokens, cache=False, hooks=edit)
        fast, fast_steps = step_logits(generating, tokens, cache=True, hooks=edit)
        whole = generating.run_with_hooks(generated, fwd_hooks=edit)
    assert generated.shape == (2, 11) and torch.equal(generated, fast)
    # Hugging Face's norms compute in float32 whatever the dtype: 6e-8 of logits near 5, by each of seven norms.
    close = {"rtol": 0, "atol": 1e-9 if isinstance(generating, HookedTransformer) else 7 * 5 * 6e-8}
    for i in range(4):
        torch.testing.assert_close(steps[i], whole[:, 6 + i], **close)
        torch.testing.assert_close(fast_steps[i], whole[:, 6 + i], **close)
    with torch.no_grad():
        assert (whole - generating(generated)).abs().max() > 0.1, "the edit is strong"


@pytest.mark.parametrize("mode", ["observe", "replace_with_error"])
@pytest.mark.parametrize("cache", [False, True])
def test_generation_without_edits_is_the_models_own(one_of_each: Model, mode, cache: bool):
    tokens = random_tokens(one_of_each)
    own, own_steps = step_logits(one_of_each, tokens, cache=cache, hooks=[])
    with attach(one_of_each, tiny_clt(one_of_each), mode):
        generated, steps = step_logits(one_of_each, tokens, cache=cache, hooks=[])
    assert torch.equal(own, generated)
    assert all(torch.equal(a, b) for a, b in zip(own_steps, steps, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_generating_twice_gives_the_same(one_of_each: Model, mode):
    """No state of one generation reaches the next."""
    tokens = random_tokens(one_of_each)
    other = random_tokens(one_of_each, seed=5, pos=4)
    with attach(one_of_each, tiny_clt(one_of_each), mode):
        first, first_steps = step_logits(one_of_each, tokens, cache=True, hooks=[(ACTS, strong)])
        step_logits(one_of_each, other, cache=True, hooks=[])
        second, second_steps = step_logits(one_of_each, tokens, cache=True, hooks=[(ACTS, strong)])
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(first_steps, second_steps, strict=True))


def test_key_value_caches_are_not_kept_longer_than_their_owner_does():
    caches = CleanCaches()
    theirs = TransformerLensKeyValueCache.init_cache(tiny_hooked("gpt2").cfg, "cpu", 1)
    swapped = caches.swap_in({"past_kv_cache": theirs})["past_kv_cache"]
    assert swapped is not theirs
    assert caches.swap_in({"past_kv_cache": theirs})["past_kv_cache"] is swapped
    del theirs
    assert not caches.clean


@pytest.mark.parametrize("mode", MODES)
def test_loss_and_text_and_stopping_early_work(session_models, mode):
    model = session_models("bridge-llama")
    with torch.no_grad(), attach(model, tiny_clt(model), mode):
        tokens = model.to_tokens("w3 w4 w5")
        assert torch.equal(model("w3 w4 w5"), model(tokens))
        assert model(tokens, return_type="loss").ndim == 0
        _, cache = model.run_with_cache(tokens, stop_at_layer=2)
        assert "blocks.1.clt.hook_recons" in cache and "blocks.2.clt.hook_recons" not in cache
        _, whole = model.run_with_cache(tokens)
        assert torch.equal(cache["blocks.1.clt.hook_recons"], whole["blocks.1.clt.hook_recons"])


@pytest.mark.parametrize("mode", MODES)
def test_stopping_early_works_on_a_hooked_transformer(session_models, mode):
    model = session_models("hooked-gpt2")
    tokens = random_tokens(model)
    with torch.no_grad(), attach(model, tiny_clt(model), mode):
        _, cache = model.run_with_cache(tokens, stop_at_layer=2)
        _, whole = model.run_with_cache(tokens)
        assert model(tokens, return_type="loss").ndim == 0
        assert model(tokens, return_type=None) is None
    assert "blocks.1.clt.hook_recons" in cache and "blocks.2.clt.hook_recons" not in cache
    assert torch.equal(cache["blocks.1.clt.hook_recons"], whole["blocks.1.clt.hook_recons"])


def test_starting_at_a_later_layer_is_refused_where_it_would_be_wrong(session_models):
    model = session_models("hooked-gpt2")
    tokens = random_tokens(model)
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        residual = cache["blocks.1.hook_resid_pre"]
        for mode in ("replace", "replace_with_error"):
            with attach(model, tiny_clt(model), mode):
                with pytest.raises(ModelUnsupported, match="start_at_layer leaves out features"):
                    model(residual, start_at_layer=1)
                with pytest.raises(ModelUnsupported, match="start_at_layer leaves out features"):
                    model(residual, start_at_layer=-2)
        with attach(model, tiny_clt(model), "observe"):
            torch.testing.assert_close(model(residual, start_at_layer=1), model(tokens))
        with attach(model, tiny_clt(model, span=1), "replace"):
            _, replaced = model.run_with_cache(tokens)
            from_one = model(replaced["blocks.1.hook_resid_pre"], start_at_layer=1)
            torch.testing.assert_close(from_one, model(tokens))
