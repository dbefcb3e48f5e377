"""The sweep gives what autograd, the definition, gives: every architecture, hook, span and option, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig

from tests.attribution.helpers import EIGHT_TOKENS, assert_engines_agree, names
from tests.conftest import KINDS
from tests.models import COMMON, ROTARY, input_hook_of, random_tokens, randomise, save_hf, tiny_clt, tiny_hf
from tl_clt.attribution import DifferenceTarget, DirectionTarget, FeatureTarget, TokenTarget, attribute, sweep
from tl_clt.errors import LocalModelMismatch, ModelUnsupported
from tl_clt.lens import load_model, weights


@pytest.fixture(params=KINDS)
def model(request, session_models):
    """Every tiny model, of either kind."""
    return session_models(request.param)


@pytest.mark.parametrize("bos", ["error", "drop", "features"])
@pytest.mark.parametrize("bias_nodes", [True, False])
def test_on_every_architecture(model, bos, bias_nodes):
    clt = tiny_clt(model, input_hook=input_hook_of(model))
    assert_engines_agree(model, clt, bos=bos, bias_nodes=bias_nodes)


def test_for_every_hook_with_and_without_skip(model):
    # The usual hook without skip is above.
    usual = input_hook_of(model)
    for hook in {"hook_resid_pre", "ln2.hook_normalized"} - {usual}:
        assert_engines_agree(model, tiny_clt(model, input_hook=hook), bos="features")
    for hook in {"hook_resid_pre", "ln2.hook_normalized", usual}:
        for bos in ("error", "features"):
            assert_engines_agree(model, tiny_clt(model, input_hook=hook, skip=True), bos=bos)


@pytest.mark.parametrize("span", [1, 2])
def test_for_every_span(one_of_each, span):
    for skip in (False, True):
        assert_engines_agree(one_of_each, tiny_clt(one_of_each, span=span, skip=skip))


@pytest.mark.parametrize("activation", ["relu", "topk"])
def test_for_every_activation(one_of_each, activation):
    assert_engines_agree(one_of_each, tiny_clt(one_of_each, activation=activation))


NORMS = {
    "LNPre": {"normalization_type": "LNPre"},
    "RMSPre": {**ROTARY, "normalization_type": "RMSPre"},
    "none": {"normalization_type": None},
    "RMSPre, post-norms": {**ROTARY, "normalization_type": "RMSPre", "use_normalization_before_and_after": True},
    "parallel RMS": {**ROTARY, "parallel_attn_mlp": True},
}


@pytest.mark.parametrize("name", NORMS)
def test_for_every_kind_of_norm(name):
    settings = {**COMMON, "act_fn": "gelu", **NORMS[name], "dtype": torch.float64, "seed": 0}
    model = HookedTransformer(HookedTransformerConfig(**settings))
    randomise(model, 0)
    for hook in ("ln2.hook_normalized", input_hook_of(model)):
        if f"blocks.0.{hook}" in model.hook_dict:
            assert_engines_agree(model, tiny_clt(model, input_hook=hook))


def test_with_norms_folded_into_the_weights(tmp_path):
    folder = save_hf(tiny_hf("gpt2"), tmp_path)
    hooked = load_model(folder, dtype=torch.float64)
    hooked.process_weights_(fold_ln=True, center_writing_weights=True)
    assert hooked.cfg.normalization_type == "LNPre"
    bridge = load_model(folder, backend="bridge", dtype=torch.float64)
    bridge.enable_compatibility_mode()
    for model in (hooked, bridge):
        assert_engines_agree(model, tiny_clt(model))


def test_for_every_target(model):
    clt = tiny_clt(model, input_hook=input_hook_of(model))
    direction = torch.randn(model.cfg.d_model, dtype=torch.float64)
    hooks = ["blocks.1.hook_resid_pre", "blocks.0.hook_resid_post", f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"]
    if input_hook_of(model) == "hook_resid_mid":
        hooks.append("blocks.1.hook_resid_mid")
    targets = [
        3,
        TokenTarget(9, pos=2),
        DifferenceTarget(5, 6),
        FeatureTarget(1, 4, pos=3),
        FeatureTarget(0, 2, pos=0),
        *(DirectionTarget(direction, hook, pos=p) for hook in hooks for p in (0, 5)),
        DirectionTarget(direction, "blocks.0.hook_resid_pre"),
    ]
    graph = assert_engines_agree(model, clt, targets=targets)
    sums, heights = graph.adjacency.sum(dim=1), graph.nodes.activation
    ends = graph.nodes.kind == 5
    torch.testing.assert_close(sums[ends], heights[ends], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_for_every_batch_size_and_chunk(one_of_each, batch_size, monkeypatch):
    monkeypatch.setattr(sweep, "FEW_TARGETS", 5)
    monkeypatch.setattr(sweep, "CHUNK_ROWS", 20)
    assert_engines_agree(one_of_each, tiny_clt(one_of_each), batch_size=batch_size)


def test_where_embeddings_are_too_many_to_carry(model, monkeypatch):
    monkeypatch.setattr(sweep, "CARRIED_NUMBERS", 0)
    assert_engines_agree(model, tiny_clt(model, input_hook=input_hook_of(model), skip=True))


def test_for_prompts_of_two_tokens(model):
    assert_engines_agree(model, tiny_clt(model, input_hook=input_hook_of(model)), torch.tensor([0, 5]))


def test_auto_takes_the_sweep(model):
    graph = attribute(model, tiny_clt(model, input_hook=input_hook_of(model)), EIGHT_TOKENS)
    assert graph.info["engine"] == "sweep"


def test_an_unknown_norm_is_named_and_auto_uses_autograd(one_of_each, monkeypatch):
    class OddNorm(torch.nn.Module):
        pass

    part = weights._part
    monkeypatch.setattr(
        weights, "_part", lambda model, name: OddNorm() if name == "blocks.1.ln1" else part(model, name)
    )
    clt = tiny_clt(one_of_each)
    with pytest.raises(ModelUnsupported, match=r"blocks\.1\.ln1 of .* is a OddNorm.*engine='autograd'"):
        attribute(one_of_each, clt, EIGHT_TOKENS, engine="sweep")
    with pytest.warns(UserWarning, match="OddNorm"):
        assert attribute(one_of_each, clt, EIGHT_TOKENS).info["engine"] == "autograd"


def test_an_architecture_that_only_looks_known_is_found_out(one_of_each, monkeypatch):
    """The sweep's maps are tested against the clean run: here attention weights that are not the model's."""
    honest = sweep.ov_weights
    monkeypatch.setattr(sweep, "ov_weights", lambda m, t: honest(m, t)._replace(W_V=honest(m, t).W_V * 1.01))
    clt = tiny_clt(one_of_each)
    with pytest.raises(LocalModelMismatch, match="does not know the architecture"):
        attribute(one_of_each, clt, EIGHT_TOKENS, engine="sweep")
    with pytest.warns(UserWarning, match="does not know the architecture"):
        graph = attribute(one_of_each, clt, EIGHT_TOKENS)
    assert graph.info["engine"] == "autograd"


def test_half_precision_models_are_traced_in_float32(one_of_each):
    model = copy.deepcopy(one_of_each)
    clt = tiny_clt(model, dtype=torch.float32)
    exact = attribute(model, tiny_clt(model), random_tokens(model)[0], targets=[5, 9])
    model.to(torch.bfloat16)
    model.cfg.dtype = torch.bfloat16
    graph = attribute(model, clt, random_tokens(model)[0], targets=[5, 9])
    assert graph.adjacency.dtype == torch.float32 and graph.info["engine"] == "sweep"
    shared = [name for name in names(graph) if name in set(names(exact))]
    assert len(shared) > 0.9 * len(exact.nodes)
    ours, theirs = (
        part.adjacency[at][:, at].double()
        for part in (graph, exact)
        for at in [torch.tensor([names(part).index(name) for name in shared])]
    )
    # bfloat16 keeps 8 bits, so that weights and activations are off by up to 0.4%, of which a few add up along a path.
    assert (ours - theirs).norm() < 0.05 * theirs.norm()
