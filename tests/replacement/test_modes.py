"""What each mode of `attach` does to the model's outputs, against hooks written by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.models import Model, random_tokens, tiny_bridge, tiny_clt, tiny_hooked
from tests.replacement.by_hand import clean_run, run_by_hand
from tl_clt.replacement import attach
from tl_clt.transcoder import CrossLayerTranscoder

POINTS = ("hook_in", "hook_acts_pre", "hook_acts_post", "hook_recons", "hook_error")
MODES = ("observe", "replace", "replace_with_error")


def set_feature(acts: Tensor, layer: int, *, value: float = 20.0) -> Tensor:
    """Feature 3 of layer 0, strongly on at every position but the first."""
    if layer == 0:
        acts = acts.clone()
        acts[..., 1:, 3] = value
    return acts


EDIT = [("blocks.0.clt.hook_acts_post", lambda acts, hook: set_feature(acts, 0))]


@pytest.mark.parametrize("mode", ["observe", "replace_with_error"])
def test_logits_are_bit_equal_without_edits(model: Model, tokens: Tensor, mode):
    clt = tiny_clt(model)
    with torch.no_grad():
        logits = model(tokens)
        with attach(model, clt, mode):
            assert torch.equal(model(tokens), logits)
            assert torch.equal(model.run_with_cache(tokens)[0], logits)
            assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=[]), logits)
            assert torch.equal(model.forward(tokens), logits)


def test_replace_equals_hooks_by_hand(model: Model, tokens: Tensor):
    clt = tiny_clt(model)
    expected = run_by_hand(model, clt, tokens)
    with torch.no_grad(), attach(model, clt, "replace"):
        replaced = model(tokens)
    torch.testing.assert_close(replaced, expected, rtol=1e-10, atol=1e-10)
    assert (replaced - model(tokens)).abs().max() > 0.1


def test_replace_with_error_and_an_edit_equals_hooks_by_hand(model: Model, tokens: Tensor):
    clt = tiny_clt(model)
    clean = clean_run(model, clt, tokens)
    errors = clean.mlp_outs - clt(clean.inputs)
    expected = run_by_hand(model, clt, tokens, errors=errors, edit=set_feature)
    with torch.no_grad(), attach(model, clt, "replace_with_error"):
        edited = model.run_with_hooks(tokens, fwd_hooks=EDIT)
        assert torch.equal(model(tokens), clean.logits), "the edit is gone with its hook"
    torch.testing.assert_close(edited, expected, rtol=1e-9, atol=1e-9)
    assert (edited - clean.logits).abs().max() > 0.1


def test_observe_ignores_edits(model: Model, tokens: Tensor):
    with torch.no_grad(), attach(model, tiny_clt(model), "observe"):
        assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=EDIT), model(tokens))


VARIANTS = [
    {"span": 1},
    {"span": 2},
    {"span": 3, "skip": True},
    {"span": 1, "skip": True},
    {"activation": "relu"},
    {"activation": "topk", "span": 2},
    {"activation": "batchtopk", "skip": True},
    {"input_hook": "hook_resid_pre"},
    {"input_hook": "ln2.hook_normalized"},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(f"{k}={x}" for k, x in v.items()))
def test_every_kind_of_clt_is_replaced_as_by_hand(one_of_each: Model, variant: dict):
    tokens = random_tokens(one_of_each, batch=2)
    clt = tiny_clt(one_of_each, **variant)
    clean = clean_run(one_of_each, clt, tokens)
    errors = clean.mlp_outs - clt(clean.inputs)
    with torch.no_grad():
        with attach(one_of_each, clt, "replace"):
            replaced = one_of_each(tokens)
        with attach(one_of_each, clt, "replace_with_error"):
            assert torch.equal(one_of_each(tokens), clean.logits)
            edited = one_of_each.run_with_hooks(tokens, fwd_hooks=EDIT)
    torch.testing.assert_close(replaced, run_by_hand(one_of_each, clt, tokens), rtol=1e-10, atol=1e-10)
    expected = run_by_hand(one_of_each, clt, tokens, errors=errors, edit=set_feature)
    torch.testing.assert_close(edited, expected, rtol=1e-9, atol=1e-9)


def test_a_lazy_clt_is_replaced_as_a_dense_one(one_of_each: Model, tmp_path: Path):
    tokens = random_tokens(one_of_each)
    clt = tiny_clt(one_of_each)
    lazy = CrossLayerTranscoder.from_pretrained(clt.save_pretrained(tmp_path / "clt"), lazy_decoder=True)
    with torch.no_grad():
        with attach(one_of_each, clt, "replace"):
            expected = one_of_each(tokens)
        with attach(one_of_each, lazy, "replace"):
            torch.testing.assert_close(one_of_each(tokens), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_cached_values_are_those_of_the_formula(model: Model, tokens: Tensor, mode):
    clt = tiny_clt(model, skip=True, span=2)
    with torch.no_grad(), attach(model, clt, mode):
        _, cache = model.run_with_cache(tokens)
    assert {f"blocks.{t}.clt.{p}" for t in clt.layers for p in POINTS} <= set(cache.keys())
    x, pre, acts, recons, error = (
        torch.stack([cache[f"blocks.{t}.clt.{p}"] for t in clt.layers], dim=-2) for p in POINTS
    )
    inputs = torch.stack([cache[f"blocks.{t}.{clt.cfg.input_hook}"] for t in clt.layers], dim=-2)
    assert torch.equal(x, inputs)
    torch.testing.assert_close(pre, torch.stack([clt.encode_layer(x[..., t, :], t).hidden_pre for t in clt.layers], -2))
    torch.testing.assert_close(acts, clt.encode(x))
    torch.testing.assert_close(recons, clt.decode(acts, x))
    if mode != "replace":
        clean = clean_run(model, clt, tokens)
        torch.testing.assert_close(error, clean.mlp_outs - clt(clean.inputs), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", ["replace", "replace_with_error"])
def test_mlp_out_in_the_cache_is_what_goes_on(one_of_each: Model, mode):
    tokens = random_tokens(one_of_each)
    with torch.no_grad(), attach(one_of_each, tiny_clt(one_of_each), mode):
        _, cache = one_of_each.run_with_cache(tokens)
    for t in range(3):
        out = cache[f"blocks.{t}.hook_mlp_out"]
        expected = cache[f"blocks.{t}.clt.hook_recons"]
        expected = expected if mode == "replace" else expected + cache[f"blocks.{t}.clt.hook_error"]
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
        gained = cache[f"blocks.{t}.hook_resid_post"] - cache[f"blocks.{t}.hook_resid_mid"]
        torch.testing.assert_close(out, gained, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("point", POINTS)
def test_a_change_at_any_point_moves_the_logits(one_of_each: Model, point: str):
    """`hook_error` in mode replace is a reading only: no error is added back."""
    tokens = random_tokens(one_of_each)
    clt = tiny_clt(one_of_each)
    change = [(f"blocks.1.clt.{point}", lambda tensor, hook: tensor + 1)]
    with torch.no_grad():
        for mode in ("replace", "replace_with_error"):
            with attach(one_of_each, clt, mode):
                moved = (one_of_each.run_with_hooks(tokens, fwd_hooks=change) - one_of_each(tokens)).abs().max()
            assert (moved > 1e-3) == (point != "hook_error" or mode == "replace_with_error")


def test_a_changed_error_is_added_as_it_is(one_of_each: Model):
    tokens = random_tokens(one_of_each)
    clt = tiny_clt(one_of_each)
    zero = [(f"blocks.{t}.clt.hook_error", lambda tensor, hook: torch.zeros_like(tensor)) for t in range(3)]
    with torch.no_grad():
        with attach(one_of_each, clt, "replace"):
            expected = one_of_each(tokens)
        with attach(one_of_each, clt, "replace_with_error"):
            without_errors = one_of_each.run_with_hooks(tokens, fwd_hooks=zero)
    torch.testing.assert_close(without_errors, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", MODES)
def test_prompts_of_a_batch_do_not_touch_each_other(one_of_each: Model, mode):
    tokens = random_tokens(one_of_each, batch=3)
    with torch.no_grad(), attach(one_of_each, tiny_clt(one_of_each), mode):
        together = one_of_each(tokens)
        alone = torch.cat([one_of_each(t[None]) for t in tokens])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["hooked", "bridge"])
def test_a_bfloat16_model_takes_a_float32_clt(kind: str, tmp_path: Path):
    if kind == "hooked":
        model: Model = tiny_hooked("gpt2", torch.bfloat16)
    else:
        model = tiny_bridge("llama", tmp_path, torch.bfloat16)
    tokens = random_tokens(model)
    clt = tiny_clt(model, dtype=torch.float32)
    with torch.no_grad():
        logits = model(tokens)
        for mode in ("observe", "replace_with_error"):
            with attach(model, clt, mode):
                assert torch.equal(model(tokens), logits)
        with attach(model, clt, "replace"):
            replaced, cache = model.run_with_cache(tokens)
    assert replaced.dtype == torch.bfloat16
    assert cache["blocks.1.clt.hook_acts_post"].dtype == torch.float32
    assert cache["blocks.1.hook_mlp_out"].dtype == torch.bfloat16
    assert not torch.equal(replaced, logits)


def test_gradients_flow_through_the_features(one_of_each: Model):
    tokens = random_tokens(one_of_each)
    kept = {}

    def keep(acts: Tensor, hook: object) -> None:
        acts.retain_grad()
        kept["acts"] = acts

    clt = tiny_clt(one_of_each).requires_grad_(True)
    for mode in ("replace", "replace_with_error"):
        with attach(one_of_each, clt, mode):
            logits = one_of_each.run_with_hooks(tokens, fwd_hooks=[("blocks.0.clt.hook_acts_post", keep)])
            logits[0, -1, 5].backward()
        assert kept["acts"].grad.abs().max() > 0
    one_of_each.zero_grad()


def test_compatibility_mode_of_a_bridge_changes_nothing(tmp_path: Path):
    model = tiny_bridge("gpt2", tmp_path)
    model.enable_compatibility_mode(no_processing=True)
    tokens = random_tokens(model)
    clt = tiny_clt(model)
    before = dict(model.hook_dict)
    expected = run_by_hand(model, clt, tokens)
    with torch.no_grad():
        logits = model(tokens)
        with attach(model, clt, "replace"):
            torch.testing.assert_close(model(tokens), expected, rtol=1e-10, atol=1e-10)
        with attach(model, clt, "replace_with_error"):
            assert torch.equal(model(tokens), logits)
            assert not torch.allclose(model.run_with_hooks(tokens, fwd_hooks=EDIT), logits)
    assert list(model.hook_dict) == list(before) and all(model.hook_dict[k] is v for k, v in before.items())
