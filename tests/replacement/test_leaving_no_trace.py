"""After `attach` the model is as it was, whatever happened inside; user's own hooks act and stay."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformer_lens import HookedTransformer

from tests.models import Model, input_hook_of, random_tokens, snapshot, tiny_clt, tiny_hooked
from tests.replacement.by_hand import clean_run, run_by_hand
from tl_clt import attribute
from tl_clt.errors import AlreadyAttached, CLTMismatch, ConfigError, HookNotFound
from tl_clt.replacement import attach

MODES = ("observe", "replace", "replace_with_error")


def use(model: Model, tokens: Tensor, hook: str) -> None:
    """What people do with a model."""
    with torch.no_grad():
        model(tokens)
        model.run_with_cache(tokens)
        model.run_with_hooks(tokens, fwd_hooks=[(hook, lambda acts, hook: acts * 0)])
        model.generate(
            tokens, max_new_tokens=2, do_sample=False, stop_at_eos=False, return_type="tokens", verbose=False
        )


@pytest.mark.parametrize("mode", MODES)
def test_the_model_is_as_before(model: Model, tokens: Tensor, mode):
    clt = tiny_clt(model)
    with torch.no_grad():
        logits = model(tokens)
    # What TransformerLens itself keeps on first use is there before.
    use(model, tokens, "blocks.0.hook_mlp_out")
    before = snapshot(model)
    with attach(model, clt, mode) as attached:
        assert attached is model
        assert "blocks.2.clt.hook_error" in model.hook_dict
        use(model, tokens, "blocks.0.clt.hook_acts_post")
    after = snapshot(model)
    for key in before:
        assert after[key] == before[key], key
    with torch.no_grad():
        assert torch.equal(model(tokens), logits)
    assert not any(p._forward_hooks for p in clt.modules())


class Stop(Exception):
    pass


def stop(tensor: Tensor, hook: object) -> None:
    raise Stop


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "where", ["block", "blocks.1.clt.hook_acts_post", "blocks.1.hook_mlp_out", "blocks.2.clt.hook_in"]
)
def test_the_model_is_as_before_after_an_exception(one_of_each: Model, mode, where: str):
    tokens = random_tokens(one_of_each)
    before = snapshot(one_of_each)
    with pytest.raises(Stop), attach(one_of_each, tiny_clt(one_of_each), mode):
        if where == "block":
            raise Stop
        one_of_each.run_with_hooks(tokens, fwd_hooks=[(where, stop)])
    assert snapshot(one_of_each) == before


@pytest.mark.parametrize("mode", MODES)
def test_a_pass_that_failed_leaves_nothing_to_the_next(one_of_each: Model, mode):
    tokens = random_tokens(one_of_each)
    with torch.no_grad(), attach(one_of_each, tiny_clt(one_of_each), mode):
        expected = one_of_each(tokens)
        with pytest.raises(Stop):
            one_of_each.run_with_hooks(random_tokens(one_of_each, pos=4), fwd_hooks=[("blocks.1.hook_mlp_out", stop)])
        assert torch.equal(one_of_each(tokens), expected)


def test_a_forward_of_the_instance_is_kept(session_models):
    model = tiny_hooked("gpt2")
    calls = []
    inner = model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return inner(*args, **kwargs)

    model.forward = counted  # type: ignore[method-assign]
    with attach(model, tiny_clt(model), "replace"):
        calls.clear()
        model(random_tokens(model))
        assert calls == [1]
    assert model.__dict__["forward"] is counted


# -- hooks of the user's own -----------------------------------------------------------------------------


@pytest.mark.parametrize("permanent", [False, True])
@pytest.mark.parametrize("when", ["before", "inside", "run_with_hooks"])
def test_a_users_hook_on_the_output_acts_on_what_the_clt_puts_there(model: Model, permanent: bool, when: str):
    tokens = random_tokens(model)
    clt = tiny_clt(model)
    seen = []

    def double(tensor: Tensor, hook: object) -> Tensor:
        seen.append(tensor)
        return tensor * 2

    name = "blocks.2.hook_mlp_out"
    try:
        if when == "before":
            model.add_hook(name, double, is_permanent=permanent)
        with torch.no_grad(), attach(model, clt, "replace"):
            if when == "inside":
                model.add_hook(name, double, is_permanent=permanent)
            hooks = [(name, double)] if when == "run_with_hooks" else []
            recons = []
            hooks.append(("blocks.2.clt.hook_recons", lambda tensor, hook: recons.append(tensor)))
            model.run_with_hooks(tokens, fwd_hooks=hooks)
        assert len(seen) == 1 and torch.equal(seen[0], recons[0])
        if when != "run_with_hooks":
            with torch.no_grad():
                model(tokens)
            assert len(seen) == 2, "the hook is still there afterwards"
    finally:
        model.reset_hooks(including_permanent=True)


@pytest.mark.parametrize("permanent", [False, True])
@pytest.mark.parametrize("when", ["before", "inside", "run_with_hooks"])
def test_a_users_hook_on_the_input_acts_before_the_clt_reads(model: Model, permanent: bool, when: str):
    tokens = random_tokens(model)
    clt = tiny_clt(model)
    name = f"blocks.1.{input_hook_of(model)}"
    shift = torch.randn(clt.cfg.d_model, dtype=torch.float64)
    hook = (name, lambda tensor, hook: tensor + shift)
    expected = run_by_hand(model, clt, tokens, hooks=[hook])
    try:
        if when == "before":
            model.add_hook(*hook, is_permanent=permanent)
        with torch.no_grad(), attach(model, clt, "replace"):
            if when == "inside":
                model.add_hook(*hook, is_permanent=permanent)
            hooks = [hook] if when == "run_with_hooks" else []
            actual = model.run_with_hooks(tokens, fwd_hooks=hooks)
    finally:
        model.reset_hooks(including_permanent=True)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("permanent", [False, True])
def test_errors_are_measured_without_the_users_hooks(model: Model, tokens: Tensor, permanent: bool):
    clt = tiny_clt(model)
    clean = clean_run(model, clt, tokens)
    shift = torch.randn(clt.cfg.d_model, dtype=torch.float64)
    hook = (f"blocks.1.{input_hook_of(model)}", lambda tensor, hook: tensor + shift)
    expected = run_by_hand(model, clt, tokens, errors=clean.mlp_outs - clt(clean.inputs), hooks=[hook])
    try:
        model.add_hook(*hook, is_permanent=permanent)
        with torch.no_grad(), attach(model, clt, "replace_with_error"):
            actual = model(tokens)
    finally:
        model.reset_hooks(including_permanent=True)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_the_users_hooks_are_there_afterwards_in_their_order(one_of_each: Model, mode):
    tokens = random_tokens(one_of_each)
    order: list[str] = []
    names = ["blocks.0.hook_mlp_out", f"blocks.0.{input_hook_of(one_of_each)}"]
    try:
        for name in names:
            one_of_each.add_hook(name, lambda tensor, hook: order.append("first"))
            one_of_each.add_hook(name, lambda tensor, hook: order.append("permanent"), is_permanent=True)
            one_of_each.add_hook(name, lambda tensor, hook: order.append("last"))
        before = snapshot(one_of_each)
        with torch.no_grad(), attach(one_of_each, tiny_clt(one_of_each), mode):
            order.clear()
            one_of_each(tokens)
            assert order == ["first", "permanent", "last"] * 2
        assert snapshot(one_of_each) == before
        order.clear()
        one_of_each(tokens)
        assert order == ["first", "permanent", "last"] * 2
    finally:
        one_of_each.reset_hooks(including_permanent=True)


@pytest.mark.parametrize("mode", ["replace", "replace_with_error"])
@pytest.mark.parametrize("including_permanent", [False, True])
def test_reset_hooks_inside_does_not_break_the_attachment(one_of_each: Model, mode, including_permanent: bool):
    tokens = random_tokens(one_of_each)
    edit = [("blocks.0.clt.hook_acts_post", lambda acts, hook: acts + 1)]
    before = snapshot(one_of_each)
    with torch.no_grad(), attach(one_of_each, tiny_clt(one_of_each), mode):
        expected = one_of_each(tokens), one_of_each.run_with_hooks(tokens, fwd_hooks=edit)
        one_of_each.reset_hooks(including_permanent=including_permanent)
        assert torch.equal(one_of_each(tokens), expected[0])
        assert torch.equal(one_of_each.run_with_hooks(tokens, fwd_hooks=edit), expected[1])
    assert snapshot(one_of_each) == before


# -- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", MODES)
def test_a_second_attachment_raises_and_the_first_goes_on(one_of_each: Model, inner):
    tokens = random_tokens(one_of_each)
    clt, other = tiny_clt(one_of_each), tiny_clt(one_of_each, seed=5)
    before = snapshot(one_of_each)
    with torch.no_grad(), attach(one_of_each, clt, "replace"):
        expected = one_of_each(tokens)
        inside = snapshot(one_of_each)
        for second in (clt, other):
            with pytest.raises(AlreadyAttached, match="Leave its `with attach"):
                with attach(one_of_each, second, inner):
                    raise AssertionError("never reached")
        assert snapshot(one_of_each) == inside
        assert torch.equal(one_of_each(tokens), expected)
    assert snapshot(one_of_each) == before


def test_one_clt_in_two_models_at_once(session_models):
    first, second = tiny_hooked("gpt2"), tiny_hooked("gpt2", seed=3)
    clt, tokens = tiny_clt(first), random_tokens(first)
    with torch.no_grad():
        with attach(second, clt, "replace"):
            expected = second(tokens)
        with attach(first, clt, "replace_with_error"), attach(second, clt, "replace"):
            assert torch.equal(second(tokens), expected)
            inside = first(tokens)
        assert torch.equal(first(tokens), inside)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ("layers", CLTMismatch, "The CLT has 4 layers, but .* has 3"),
        ("width", CLTMismatch, "The CLT has d_model 16, but .* has 32"),
        ("device", CLTMismatch, r"The CLT is on meta, but .* is on cpu\. Move it: clt\.to\('cpu'\)"),
        ("hook", HookNotFound, r"'blocks\.0\.hook_resid_middle' is no hook .* Nearest: 'blocks\.0\.hook_resid_mid'"),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_a_clt_of_another_model_raises_before_any_work(one_of_each: Model, wrong: str, error, message: str, mode):
    clt = {
        "layers": lambda: tiny_clt((4, 32)),
        "width": lambda: tiny_clt((3, 16)),
        "device": lambda: tiny_clt((3, 32)).to("meta"),
        "hook": lambda: tiny_clt((3, 32), input_hook="hook_resid_middle"),
    }[wrong]()
    before = snapshot(one_of_each)
    ran = []
    handle = one_of_each.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(error, match=message), attach(one_of_each, clt, mode):
        raise AssertionError("never reached")
    handle.remove()
    assert not ran and snapshot(one_of_each) == before


def test_a_parallel_model_has_no_resid_mid(session_models):
    model = session_models("hooked-neox")
    with pytest.raises(HookNotFound, match=r"'blocks\.0\.hook_resid_mid' is no hook"):
        with attach(model, tiny_clt((3, 32))):
            raise AssertionError("never reached")


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        (
            {"input_hook": "hook_resid_post"},
            "reads hook_resid_post, but .* one of hook_resid_pre, .*input_hook",
        ),
        ({"input_hook": "hook_mlp_out"}, "reads hook_mlp_out"),
        ({"input_hook": "attn.hook_pattern"}, "reads attn.hook_pattern"),
        ({"output_hook": "hook_resid_mid"}, "writes hook_resid_mid, but a CLT writes one of hook_mlp_out"),
        ({"output_hook": "hook_attn_out"}, "writes hook_attn_out"),
    ],
)
def test_places_that_no_clt_reads_or_writes_are_named_before_any_work(one_of_each: Model, hooks, message):
    tokens = random_tokens(one_of_each)
    clt = tiny_clt((3, 32), **hooks)
    for mode in MODES:
        with pytest.raises(CLTMismatch, match=message), attach(one_of_each, clt, mode):
            raise AssertionError("never reached")
    with pytest.raises(CLTMismatch, match=message):
        attribute(one_of_each, clt, tokens)


def test_a_folded_model_and_a_clt_that_reads_behind_the_norms_gain_are_warned_about():
    model = tiny_hooked("gpt2")
    clt = tiny_clt((3, 32), input_hook="mlp.hook_in", output_hook="mlp.hook_out")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with attach(model, clt):
            pass
    folded = HookedTransformer(replace(model.cfg))
    folded.load_and_process_state_dict(model.state_dict(), fold_ln=True)
    with pytest.warns(UserWarning, match="gain and bias.*folded.*from_pretrained_no_processing"), attach(folded, clt):
        pass


def test_an_input_hook_that_a_flag_keeps_off_is_named():
    model = tiny_hooked("gpt2")
    clt, tokens = tiny_clt((3, 32), input_hook="hook_mlp_in"), random_tokens(model)
    with attach(model, clt, "replace"):
        with pytest.raises(CLTMismatch, match="use_hook_mlp_in"):
            model(tokens)
        model.set_use_hook_mlp_in(True)
        model(tokens)


@pytest.mark.usefixtures("as_users_run_it")
def test_an_unknown_mode_raises(one_of_each: Model):
    with pytest.raises(ConfigError, match="mode is 'swap': give one of observe, replace, replace_with_error"):
        with attach(one_of_each, tiny_clt(one_of_each), "swap"):  # type: ignore[arg-type]
            raise AssertionError("never reached")
