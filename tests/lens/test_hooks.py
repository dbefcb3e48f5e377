"""Hooks by name, on either kind of model, and hooks that stand aside."""

from __future__ import annotations

import pytest
import torch

from tests.models import Model, random_tokens, tiny_hooked
from tl_clt.errors import HookNotFound
from tl_clt.lens import (
    HookPoint,
    add_hook_points,
    block_hook,
    find_hook,
    remove_hook_points,
    require_hooks,
    run_behind_layer,
    user_hooks_aside,
)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("blocks.2.hook_mlp_ot", "blocks.2.hook_mlp_out"),
        ("blocks.1.attn.hook_patern", "blocks.1.attn.hook_pattern"),
        ("ln_final.hook_scales", "ln_final.hook_scale"),
    ],
)
def test_an_unknown_hook_raises_with_the_nearest_name(one_of_each: Model, name: str, near: str):
    with pytest.raises(HookNotFound, match=rf"'{name}' is no hook of .* \(3 layers\)\. Nearest: '{near}'\."):
        find_hook(one_of_each, name)
    with pytest.raises(HookNotFound, match=f"Nearest: '{near}'"):
        require_hooks(one_of_each, ["blocks.0.hook_mlp_out", name])


def test_a_layer_that_the_model_lacks_raises(one_of_each: Model):
    with pytest.raises(HookNotFound, match=r"'blocks\.3\.hook_mlp_out' is no hook .* \(3 layers\)"):
        find_hook(one_of_each, block_hook(3, "hook_mlp_out"))


@pytest.mark.parametrize("name", ["hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_mlp_out"])
def test_names_and_aliases_lead_to_the_point_that_fires(one_of_each: Model, name: str):
    seen = []
    handle = find_hook(one_of_each, block_hook(1, name)).register_forward_hook(lambda m, a, o: seen.append(o))
    tokens = random_tokens(one_of_each)
    with torch.no_grad():
        _, cache = one_of_each.run_with_cache(tokens)
    handle.remove()
    assert len(seen) == 1 and torch.equal(seen[0], cache[block_hook(1, name)])


class Points(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hook_a = HookPoint()


def test_added_hook_points_are_found_by_name_and_gone_afterwards(one_of_each: Model):
    before = dict(one_of_each.hook_dict)
    points = Points()
    add_hook_points(one_of_each, "blocks.1", "extra", points)
    assert find_hook(one_of_each, "blocks.1.extra.hook_a") is points.hook_a
    assert points.hook_a.name == "blocks.1.extra.hook_a"
    remove_hook_points(one_of_each, "blocks.1", "extra")
    after = one_of_each.hook_dict
    assert list(after) == list(before) and all(after[k] is before[k] for k in before)


def test_user_hooks_stand_aside_and_come_back(one_of_each: Model):
    calls = []
    tokens = random_tokens(one_of_each)

    def count(tensor, hook):
        calls.append(hook.name)

    one_of_each.add_hook("blocks.0.hook_mlp_out", count)
    one_of_each.add_hook("blocks.1.hook_mlp_out", count, is_permanent=True)
    try:
        with pytest.raises(ZeroDivisionError):
            with user_hooks_aside(one_of_each):
                one_of_each(tokens)
                assert calls == []
                _ = 1 / 0
        one_of_each(tokens)
        assert len(calls) == 2
    finally:
        one_of_each.reset_hooks(including_permanent=True)
    one_of_each(tokens)
    assert len(calls) == 2


def test_torch_hooks_do_not_stand_aside():
    model, seen = tiny_hooked("gpt2"), []
    model.blocks[0].hook_mlp_out.register_forward_hook(lambda *_: seen.append(1))
    model.add_hook("blocks.0.hook_mlp_out", lambda tensor, hook: seen.append(2))
    with user_hooks_aside(model):
        model(random_tokens(model))
    assert seen == [1]


def test_mlp_out_is_what_the_residual_stream_gains(model: Model):
    """Also with norms after each sublayer, and with attention and MLP side by side."""
    with torch.no_grad():
        _, cache = model.run_with_cache(random_tokens(model))
    for t in range(3):
        before = cache[f"blocks.{t}.hook_resid_pre"] + cache[f"blocks.{t}.hook_attn_out"]
        gained = cache[f"blocks.{t}.hook_resid_post"] - before
        torch.testing.assert_close(gained, cache[f"blocks.{t}.hook_mlp_out"], rtol=1e-10, atol=1e-10)


def test_a_stream_behind_a_layer_goes_on_as_the_model_does(one_of_each: Model):
    """The logits of a run in which TransformerLens's own hook puts another stream there."""
    tokens = random_tokens(one_of_each, batch=3)
    for layer in range(one_of_each.cfg.n_layers):
        name = block_hook(layer, "hook_resid_post")
        _, cache = one_of_each.run_with_cache(tokens)
        other = cache[name].flip(0)
        expected = one_of_each.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook, other=other: other)])
        torch.testing.assert_close(run_behind_layer(one_of_each, tokens, layer, other), expected)
