"""`feature_acts`: what a CLT makes of the model's own activations, for one prompt or several."""

from __future__ import annotations

import pytest
import torch

from tests.models import tiny_bridge, tiny_clt, tiny_hooked
from tl_clt import attach, feature_acts
from tl_clt.errors import CLTMismatch, PromptError

TOKENS = [0, 5, 9, 40, 2]
SHORT = [0, 33, 12]


@pytest.fixture(scope="module")
def model():
    return tiny_hooked("llama")


@pytest.fixture(scope="module")
def clt(model):
    return tiny_clt(model)


def test_they_are_what_an_attached_clt_has(model, clt):
    acts = feature_acts(model, clt, TOKENS)
    assert acts.shape == (len(TOKENS), clt.cfg.n_layers, clt.cfg.d_transcoder) and bool((acts != 0).any())
    with attach(model, clt):
        _, cache = model.run_with_cache(torch.tensor([TOKENS]))
    for layer in clt.layers:
        # The same products of float64 numbers, in another order at most.
        torch.testing.assert_close(acts[:, layer], cache[f"blocks.{layer}.clt.hook_acts_post"][0], rtol=1e-12, atol=0)


def test_users_hooks_are_set_aside(model, clt):
    clean = feature_acts(model, clt, TOKENS)
    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda x, hook: 3 * x + 1)]):
        assert torch.equal(feature_acts(model, clt, TOKENS), clean)


def test_no_logits_are_computed_for_them(model, clt, monkeypatch):
    wanted = feature_acts(model, clt, TOKENS)
    monkeypatch.setattr(type(model.unembed), "forward", lambda *args: pytest.fail("computed logits"))
    assert torch.equal(feature_acts(model, clt, TOKENS), wanted)


@pytest.mark.parametrize("kind", ["hooked", "bridge"])
def test_several_prompts_are_each_as_by_itself_and_padding_has_none(kind, model, tmp_path):
    model = model if kind == "hooked" else tiny_bridge("llama", tmp_path / "model", exact=True)
    clt = tiny_clt(model)
    together = feature_acts(model, clt, [TOKENS, SHORT])
    assert together.shape[:2] == (2, len(TOKENS))
    for acts, prompt in zip(together, (TOKENS, SHORT), strict=True):
        alone = feature_acts(model, clt, prompt)
        own = acts[: len(prompt)] if not bool(acts[len(prompt) :].any()) else acts[-len(prompt) :]
        # Sums over masked positions round otherwise; a bridge's rotary angles are of float32.
        torch.testing.assert_close(own, alone, rtol=1e-5, atol=1e-6)
    assert int((together[1] != 0).any(dim=-1).any(dim=-1).sum()) <= len(SHORT)


def test_a_list_of_one_prompt_is_a_batch(model, clt):
    [acts] = feature_acts(model, clt, [TOKENS])
    assert torch.equal(acts, feature_acts(model, clt, TOKENS))


def test_what_is_not_there_is_refused(model, clt):
    with pytest.raises(CLTMismatch):
        feature_acts(model, tiny_clt(tiny_hooked("llama", n_layers=2)), TOKENS)
    with pytest.raises(PromptError):
        feature_acts(model, clt, [[0, 5, 64]])
