"""Unembedding weights are alike on both kinds of model, and the tap gives what the logits are made of."""

from __future__ import annotations

import torch

from tests.models import Model, random_tokens
from tl_clt.lens import dtype_of, run_with_cache, tap_unembedding, unembedding_biases, unembedding_directions


def test_logits_above_their_mean_are_read_by_the_directions(model: Model):
    tokens = random_tokens(model)
    with torch.no_grad(), tap_unembedding(model) as tap:
        model(tokens)
    seen = tap.get()
    ids = torch.tensor([3, 60, 3])
    read = seen.final @ unembedding_directions(model, ids).T + unembedding_biases(model, ids)
    expected = seen.logits[..., ids] - seen.logits.mean(dim=-1, keepdim=True)
    torch.testing.assert_close(read, expected, rtol=1e-10, atol=1e-10)
    assert dtype_of(model) == torch.float64


def test_the_tap_leaves_nothing_behind(model: Model):
    with tap_unembedding(model):
        pass
    assert not model.unembed._forward_hooks


def test_run_with_cache_keeps_what_was_asked_for(one_of_each: Model):
    tokens = random_tokens(one_of_each)
    logits, cache = run_with_cache(one_of_each, tokens, lambda name: name.endswith("hook_mlp_out"))
    assert set(cache.keys()) == {f"blocks.{t}.hook_mlp_out" for t in range(3)}
    assert not logits.requires_grad
