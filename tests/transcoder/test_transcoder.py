"""encode, decode and forward against a plain loop over (source, target) pairs, in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

from tests.models import tiny_clt
from tl_clt.errors import CLTMismatch, ConfigError
from tl_clt.transcoder import CrossLayerTranscoder, CrossLayerTranscoderConfig
from tl_clt.transcoder.transcoder import jumprelu, topk

N_LAYERS, D_MODEL = 4, 8
ACTIVATIONS = ("relu", "jumprelu", "topk", "batchtopk")


def encode_one(clt: CrossLayerTranscoder, x: Tensor, layer: int) -> Tensor:
    """One token of one layer, feature by feature."""
    pre = [float(x @ clt.W_enc[layer, :, f] + clt.b_enc[layer, f]) for f in range(clt.cfg.d_transcoder)]
    if clt.cfg.activation == "relu":
        kept = [p > 0 for p in pre]
    elif clt.cfg.activation == "topk":
        limit = sorted(pre, reverse=True)[clt.cfg.k - 1]
        kept = [p >= limit and p > 0 for p in pre]
    else:
        kept = [p > float(clt.threshold[layer, f]) for f, p in enumerate(pre)]
    return torch.tensor([p if keep else 0.0 for p, keep in zip(pre, kept, strict=True)], dtype=x.dtype)


def decode_by_pairs(clt: CrossLayerTranscoder, acts: Tensor, x: Tensor) -> Tensor:
    """Every (source, target) pair that the span allows, one at a time; acts and x [sample, n_layers, ...]."""
    recons = clt.b_dec.expand(len(acts), -1, -1).clone()
    for source in range(clt.cfg.n_layers):
        for target in range(clt.cfg.n_layers):
            if target - clt.cfg.span < source <= target:
                recons[:, target] += acts[:, source] @ clt.W_dec[source][:, target - source]
    if clt.W_skip is not None:
        for target in range(clt.cfg.n_layers):
            recons[:, target] += x[:, target] @ clt.W_skip[target]
    return recons


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, N_LAYERS, D_MODEL, dtype=torch.float64)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_encode_equals_a_loop_over_features(activation: str, x: Tensor):
    clt = tiny_clt((N_LAYERS, D_MODEL), activation=activation)
    expected = torch.stack([torch.stack([encode_one(clt, x[i, s], s) for s in range(N_LAYERS)]) for i in range(5)])
    acts = clt.encode(x)
    assert 0 < (acts > 0).sum() < acts.numel() / 2
    torch.testing.assert_close(acts, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("span", [1, 2, N_LAYERS])
@pytest.mark.parametrize("skip", [False, True])
def test_decode_equals_a_loop_over_source_and_target(activation: str, span: int, skip: bool, x: Tensor):
    clt = tiny_clt((N_LAYERS, D_MODEL), activation=activation, span=span, skip=skip)
    acts = clt.encode(x)
    expected = decode_by_pairs(clt, acts, x)
    torch.testing.assert_close(clt.decode(acts, x), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(clt(x), expected, rtol=1e-12, atol=1e-12)


def test_any_number_of_batch_axes(x: Tensor):
    clt = tiny_clt((N_LAYERS, D_MODEL), skip=True)
    whole = clt(x)
    torch.testing.assert_close(clt(x[0]), whole[0])
    torch.testing.assert_close(clt(x.view(5, 1, N_LAYERS, D_MODEL)), whole[:, None])
    assert clt(x[:0]).shape == (0, N_LAYERS, D_MODEL)


def test_encode_layer_gives_pre_activations_too(x: Tensor):
    clt = tiny_clt((N_LAYERS, D_MODEL))
    encoding = clt.encode_layer(x[:, 2], 2)
    # Another product of the same numbers: float64 rounding of a few sums, which assert_close allows for.
    torch.testing.assert_close(encoding.hidden_pre, x[:, 2] @ clt.W_enc[2] + clt.b_enc[2])
    torch.testing.assert_close(encoding.feature_acts, clt.encode(x)[:, 2])


def test_hidden_pre_of_all_layers_is_that_of_each(x: Tensor):
    clt = tiny_clt((N_LAYERS, D_MODEL))
    hidden_pre = clt.hidden_pre(x)
    for layer in clt.layers:
        torch.testing.assert_close(hidden_pre[:, layer], x[:, layer] @ clt.W_enc[layer] + clt.b_enc[layer])
        torch.testing.assert_close(clt.activate(hidden_pre[:, layer], layer), clt.encode(x)[:, layer])
    with pytest.raises(CLTMismatch, match="x has shape"):
        clt.hidden_pre(x[:, 1:])


def test_jumprelu_is_off_at_its_threshold():
    threshold = torch.tensor([0.5, 0.5, 0.5], dtype=torch.float64)
    above = torch.nextafter(threshold[2], torch.tensor(1.0, dtype=torch.float64))
    hidden_pre = torch.stack([torch.tensor(0.25, dtype=torch.float64), threshold[1], above])
    assert torch.equal(jumprelu(hidden_pre, threshold), torch.stack([above * 0, above * 0, above]))


def test_topk_keeps_no_negative_pre_activation():
    hidden_pre = torch.tensor([[3.0, -1.0, 2.0, 1.0], [-1.0, -2.0, -3.0, 0.5]])
    assert topk(hidden_pre, 2).tolist() == [[3.0, 0.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.5]]


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("shape", [(5, N_LAYERS, D_MODEL + 1), (5, N_LAYERS + 1, D_MODEL), (5, D_MODEL), (D_MODEL,)])
def test_inputs_of_another_depth_or_width_raise(shape: tuple[int, ...]):
    with pytest.raises(CLTMismatch, match=r"x has shape .* takes \[\.\.\., 4, 8\] \(layers, then d_model\)"):
        tiny_clt((N_LAYERS, D_MODEL)).forward(torch.randn(*shape, dtype=torch.float64))


@pytest.mark.usefixtures("as_users_run_it")
def test_feature_acts_of_another_width_raise():
    with pytest.raises(CLTMismatch, match=r"feature_acts has shape .* \(layers, then d_transcoder\)"):
        tiny_clt((N_LAYERS, D_MODEL)).decode(torch.zeros(5, N_LAYERS, 23, dtype=torch.float64))


def test_whole_numbers_are_no_inputs():
    with pytest.raises(TypeCheckError):
        tiny_clt((N_LAYERS, D_MODEL)).encode(torch.zeros(5, N_LAYERS, D_MODEL, dtype=torch.long))


def test_decode_of_a_skip_clt_asks_for_the_inputs(x: Tensor):
    clt = tiny_clt((N_LAYERS, D_MODEL), skip=True)
    with pytest.raises(ConfigError, match=r"decode\(feature_acts, x\)"):
        clt.decode(clt.encode(x))


@pytest.mark.parametrize("span", [1, 2, N_LAYERS])
def test_decoder_rows_are_the_vectors_of_features_to_each_target(span: int):
    clt = tiny_clt((N_LAYERS, D_MODEL), span=span)
    for source in clt.layers:
        rows = clt.decoder_rows(source, torch.tensor([7, 2, 7]))
        assert torch.equal(rows, clt.W_dec[source][[7, 2, 7]])
        assert rows.shape == (3, len(clt.cfg.targets(source)), D_MODEL)


def test_decoders_have_a_slot_for_each_target_within_the_span():
    clt = tiny_clt((N_LAYERS, D_MODEL), span=2)
    assert [clt.W_dec[s].shape[1] for s in clt.layers] == [2, 2, 2, 1]
    for source in clt.layers:
        for target in clt.layers:
            assert (target in clt.cfg.targets(source)) == (source in clt.cfg.sources(target))


def test_fresh_weights_lie_within_the_bounds_of_the_paper():
    cfg = CrossLayerTranscoderConfig(n_layers=3, d_model=16, d_transcoder=64)
    clt = CrossLayerTranscoder(cfg)
    assert 0.1 < clt.W_enc.abs().max() <= 64**-0.5
    for source in clt.layers:
        assert 0.1 < clt.W_dec[source].abs().max() <= (3 * 16) ** -0.5
    assert not clt.b_enc.any() and not clt.b_dec.any() and not clt.threshold.any()


def test_gradients_reach_every_weight(x: Tensor):
    clt = tiny_clt((N_LAYERS, D_MODEL), activation="relu", skip=True).requires_grad_(True)
    clt(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in clt.parameters())


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_weights_have_the_dtype_of_the_config(dtype: str):
    cfg = CrossLayerTranscoderConfig(n_layers=2, d_model=4, d_transcoder=8, dtype=dtype, skip=True)
    assert {p.dtype for p in CrossLayerTranscoder(cfg).parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("active_only", [False, True])
def test_decode_layer_by_layer_is_decode(active_only: bool, x: Tensor):
    """`add_written` and `recons_of` in the order in which a pass comes to the layers."""
    clt = tiny_clt((N_LAYERS, D_MODEL), span=2, skip=True)
    acts, written, recons = clt.encode(x), {}, []
    for layer in clt.layers:
        clt.add_written(written, acts[:, layer], layer, active_only=active_only)
        recons.append(clt.recons_of(written, layer, x[:, layer]))
    assert not written
    # Sums over active features alone, or over all: float64 in another order.
    expected = decode_by_pairs(clt, acts, x)
    torch.testing.assert_close(torch.stack(recons, dim=1), expected, rtol=1e-12, atol=1e-12)


def test_a_cast_clt_says_its_number_type_and_keeps_it_in_a_file(tmp_path):
    clt = tiny_clt((N_LAYERS, D_MODEL), dtype=torch.float32)
    before = clt.cfg
    assert clt.half() is clt and clt.cfg == replace(before, dtype="float16")
    assert "float16" in repr(clt)
    again = CrossLayerTranscoder.from_pretrained(clt.save_pretrained(tmp_path / "clt"))
    assert again.W_enc.dtype == torch.float16 and again.cfg == clt.cfg
    assert again.to("cpu").cfg == clt.cfg and again.float().cfg == before
