"""Models in unusual states: compiled, within inference_mode, with split inputs; and what is no model at all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.models import Model, random_tokens, snapshot, tiny_clt, tiny_hooked
from tl_clt import Intervention, attach, attribute, evaluate, intervene, intervention_hooks
from tl_clt.errors import CLTMismatch, ModelUnsupported

CHANGE = [Intervention(layer=0, feature=1, value=3.0)]


def attached(model, clt, tokens):
    with torch.no_grad(), attach(model, clt, "replace_with_error"):
        return model(tokens)


CALLS: dict[str, Callable] = {
    "attach": attached,
    "attribute": lambda model, clt, tokens: attribute(model, clt, tokens, progress=False).adjacency,
    "autograd": lambda m, clt, tokens: attribute(m, clt, tokens, engine="autograd", progress=False).adjacency,
    "intervene": lambda model, clt, tokens: intervene(model, clt, tokens, CHANGE, freeze="all").logits,
    "hooks": lambda m, clt, tokens: m.run_with_hooks(tokens, fwd_hooks=intervention_hooks(m, clt, tokens, CHANGE)),
    "evaluate": lambda model, clt, tokens: torch.tensor(
        evaluate(model, clt, tokens, n_graphs=1, progress=False).explained_variance
    ),
}


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("how", ["whole", "in place", "a block"])
def test_compiled_models_are_refused_before_any_work(one_of_each: Model, call: str, how: str):
    clt, tokens = tiny_clt(one_of_each), random_tokens(one_of_each)
    model = one_of_each if isinstance(one_of_each, torch.nn.Module) else None
    assert model is not None
    part = model if how != "a block" else model.blocks[1]
    given = torch.compile(model, backend="eager") if how == "whole" else model
    before = snapshot(model)
    if how != "whole":
        part.compile(backend="eager")
    try:
        with pytest.raises(ModelUnsupported, match="compiled by torch.compile"):
            CALLS[call](given, clt, tokens)
    finally:
        part.__dict__.pop("_compiled_call_impl", None)
    assert snapshot(model) == before


@pytest.mark.parametrize("call", CALLS)
def test_inference_mode_changes_nothing(one_of_each: Model, call: str):
    clt, tokens = tiny_clt(one_of_each), random_tokens(one_of_each)
    before = snapshot(one_of_each)
    with torch.no_grad():
        expected = CALLS[call](one_of_each, clt, tokens)
    with torch.inference_mode():
        found = CALLS[call](one_of_each, clt, tokens.clone())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert snapshot(one_of_each) == before
    if call in ("attribute", "autograd"):
        assert not found.is_inference()


def test_weights_made_in_inference_mode(tmp_path):
    with torch.inference_mode():
        model = tiny_hooked("llama")
        clt = tiny_clt(model)
    tokens = random_tokens(model)
    expected = attribute(tiny_hooked("llama"), tiny_clt(tiny_hooked("llama")), tokens, progress=False).adjacency
    torch.testing.assert_close(attribute(model, clt, tokens, progress=False).adjacency, expected, rtol=0, atol=1e-10)
    with pytest.raises(ModelUnsupported, match="inference_mode.*engine='sweep'"):
        attribute(model, clt, tokens, engine="autograd", progress=False)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("flag", ["split_qkv_input", "attn_result", "hook_mlp_in", "attn_in"])
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_flags_of_hooked_transformers_change_nothing(arch, flag: str, call: str):
    """llama has fewer key-value heads than heads; TransformerLens refuses use_attn_in for it itself."""
    model = tiny_hooked(arch)
    clt, tokens = tiny_clt(model), random_tokens(model)
    with torch.no_grad():
        expected = CALLS[call](model, clt, tokens)
        if (arch, flag) == ("llama", "attn_in"):
            with pytest.raises(AssertionError):
                getattr(model, f"set_use_{flag}")(True)
            return
        getattr(model, f"set_use_{flag}")(True)
        found = CALLS[call](model, clt, tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("call", CALLS)
def test_what_is_no_model_or_no_clt(one_of_each: Model, call: str):
    clt, tokens = tiny_clt(one_of_each), random_tokens(one_of_each)
    before = snapshot(one_of_each)
    for model, transcoder, error, message in (
        (clt, one_of_each, ModelUnsupported, "give a HookedTransformer or a TransformerBridge, then the CLT"),
        (None, clt, ModelUnsupported, "The model is None"),
        ("gpt2", clt, ModelUnsupported, "The model is 'gpt2', of type str"),
        (one_of_each, None, CLTMismatch, "The CLT is None"),
        (one_of_each, one_of_each, CLTMismatch, "give a CrossLayerTranscoder"),
    ):
        if call == "hooks" and not hasattr(model, "run_with_hooks"):
            continue
        with pytest.raises(error, match=message):
            CALLS[call](model, transcoder, tokens)
    assert snapshot(one_of_each) == before


@pytest.mark.parametrize("call", ["attribute", "intervene", "evaluate"])
def test_what_measures_sets_users_hooks_aside(one_of_each: Model, call: str):
    clt, tokens = tiny_clt(one_of_each), random_tokens(one_of_each)
    with torch.no_grad():
        expected = CALLS[call](one_of_each, clt, tokens)
        one_of_each.add_hook("blocks.1.hook_resid_pre", lambda x, hook: 0 * x)
        try:
            found = CALLS[call](one_of_each, clt, tokens)
        finally:
            one_of_each.reset_hooks()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
