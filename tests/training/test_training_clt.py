"""A CLT as SAELens sees it, and the CLT that it becomes."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from sae_lens import registry
from sae_lens.saes.sae import SAE, TrainCoefficientConfig, TrainingSAE

from tests.training.small_clts import BATCH, N_LAYERS, D, F, build, raw_batch, scale_of, step_input
from tl_clt.errors import ConfigError, TrainingWarning
from tl_clt.training import clt as clt_module
from tl_clt.training.clt import (
    ARCHITECTURE,
    InferenceCLT,
    TrainingCLT,
    TrainingCLTConfig,
    init_decoder_biases,
    init_encoder_biases,
    initial_firing_rate,
)
from tl_clt.training.data.batches import apply_scale, estimate_scale
from tl_clt.training.export import export, require_same_kind, take_over
from tl_clt.training.fast.step import FastStep
from tl_clt.transcoder import CrossLayerTranscoder

EVERY_KIND = list(product(["relu", "jumprelu", "topk"], [1, 2, 3]))
SHAPES = {"full": {}, "skip": {"skip": True}, "low rank": {"far_rank": 2}, "both": {"far_rank": 3, "skip": True}}


@pytest.mark.parametrize(("activation", "span"), EVERY_KIND)
@pytest.mark.parametrize("shape", SHAPES)
def test_export_on_raw_activations_equals_training_on_scaled_ones(activation: str, span: int, shape: str) -> None:
    clt = build(activation, span, **SHAPES[shape])
    step = clt.training_forward_pass(step_input(clt))
    exported = export(clt)
    s_out = torch.tensor(clt.cfg.output_scale, dtype=torch.float64)
    want = step.sae_out.unflatten(1, (N_LAYERS, D)) / s_out[:, None]
    x = raw_batch()[:, 0]
    torch.testing.assert_close(exported(x), want, rtol=1e-10, atol=1e-12)
    # topk ranks by activation times norm; exported decoders have norm 1, in units of training.
    norms = torch.cat(clt.norms()) if activation == "topk" else 1.0
    torch.testing.assert_close(exported.encode(x).flatten(1), step.feature_acts * norms, rtol=1e-10, atol=1e-12)
    assert (step.feature_acts > 0).any() and (step.feature_acts == 0).any()
    assert exported.cfg.skip == clt.cfg.skip


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
@pytest.mark.parametrize("span", [1, 2, 3])
def test_folding_is_exact_in_float64(activation: str, span: int) -> None:
    clt = build(activation, span, skip=True)
    exported = export(clt)
    for s in range(N_LAYERS):
        torch.testing.assert_close(exported.W_enc[s] / clt.cfg.input_scale[s], clt.W_enc[s].T, rtol=1e-12, atol=0)
        assert torch.equal(exported.b_enc[s], clt.b_enc[s])
        for slot, t in enumerate(exported.cfg.targets(s)):
            folded = exported.W_dec[s][:, slot] * clt.cfg.output_scale[t]
            torch.testing.assert_close(folded, clt.W_dec[s][:, slot * D : (slot + 1) * D], rtol=1e-12, atol=0)
        torch.testing.assert_close(exported.b_dec[s] * clt.cfg.output_scale[s], clt.b_dec[s], rtol=1e-12, atol=0)
    assert (exported.threshold is not None) == (activation == "jumprelu")
    assert exported.cfg.input_scale == clt.cfg.input_scale
    assert exported.cfg.span == span


BY_SCORE = [("batchtopk", "layer"), ("batchtopk", "all_layers"), ("topk", "all_layers")]


@pytest.mark.parametrize(("activation", "across"), BY_SCORE)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_competes_beyond_a_token_and_layer_is_exported_as_jumprelu(activation, across, shape) -> None:
    clt = build(activation, topk_across=across, **SHAPES[shape])
    for step in range(3):
        given = step_input(clt)
        given.n_training_steps, given.sae_in = step, given.sae_in + 0.1 * step
        clt.step(given, FastStep())
    clt.eval()
    step = clt.training_forward_pass(step_input(clt))
    exported = export(clt)
    assert (exported.cfg.activation, exported.cfg.k) == ("jumprelu", None)
    norms = torch.stack(clt.norms())
    torch.testing.assert_close(exported.threshold * norms, clt.score_threshold[:, None].expand_as(norms))
    x = raw_batch()[:, 0]
    torch.testing.assert_close(exported.encode(x).flatten(1), step.feature_acts, rtol=1e-10, atol=1e-12)
    s_out = torch.tensor(clt.cfg.output_scale, dtype=torch.float64)
    want = step.sae_out.unflatten(1, (N_LAYERS, D)) / s_out[:, None]
    torch.testing.assert_close(exported(x), want, rtol=1e-10, atol=1e-12)
    assert 0 < (step.feature_acts > 0).sum() < step.feature_acts.numel()


@pytest.mark.parametrize(("activation", "across"), BY_SCORE)
def test_running_threshold_is_the_mean_of_the_smallest_kept_scores(activation: str, across: str) -> None:
    clt, seen = build(activation, topk_across=across), []
    for n in range(4):
        given = step_input(clt)
        given.n_training_steps, given.sae_in = n, given.sae_in + 0.1 * n
        seen.append(clt.step(given, FastStep()).smallest_kept)
    torch.testing.assert_close(clt.score_threshold, torch.stack(seen).mean(dim=0))
    if activation == "batchtopk":
        acts = clt.step(given, FastStep()).features
        lowest = [
            float((f.dense() * norm.detach())[f.dense() > 0].min()) for f, norm in zip(acts, clt.norms(), strict=True)
        ]
        want = lowest if across == "layer" else [min(lowest)] * N_LAYERS
        assert seen[-1].tolist() == pytest.approx(want)
    before = clt.score_threshold.clone()
    clt.eval()
    clt.step(given, FastStep())
    assert torch.equal(clt.score_threshold, before)


@pytest.mark.parametrize("far_rank", [None, 2])
def test_norm_is_over_all_decoder_vectors_of_a_feature(far_rank: int | None) -> None:
    clt = build("relu", span=2, far_rank=far_rank)
    exported = export(clt)
    scale = torch.tensor(clt.cfg.output_scale, dtype=torch.float64)
    for s, norms in enumerate(clt.norms()):
        written = [W * scale[t] for t, W in zip(exported.cfg.targets(s), exported.W_dec[s].unbind(dim=1), strict=True)]
        want = [sum(float(W.detach()[i].square().sum()) for W in written) ** 0.5 for i in range(F)]
        assert norms.tolist() == pytest.approx(want, rel=1e-12)


def test_export_takes_another_dtype() -> None:
    assert export(build(dtype="float32"), dtype="float64").W_enc.dtype == torch.float64


def test_l0_is_logged_as_the_mean_per_layer() -> None:
    step = (clt := build()).training_forward_pass(step_input(clt))
    assert float(step.metrics["l0_mean_per_layer"]) * N_LAYERS == pytest.approx(
        float((step.feature_acts > 0).sum(dim=1).double().mean())
    )


def test_every_parameter_gets_a_gradient() -> None:
    clt = build("jumprelu")
    clt.training_forward_pass(step_input(clt)).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in clt.parameters())


def test_output_is_flat_as_saelens_expects() -> None:
    step = (clt := build("jumprelu")).training_forward_pass(step_input(clt))
    assert step.feature_acts.shape == step.hidden_pre.shape == (BATCH, clt.cfg.d_sae)
    assert step.sae_in.shape == step.sae_out.shape == (BATCH, N_LAYERS * D)


def test_saelens_own_calls_agree_with_the_step() -> None:
    clt = build("jumprelu")
    step = clt.training_forward_pass(step_input(clt))
    feature_acts, hidden_pre = clt.encode_with_hidden_pre(step_input(clt).sae_in[:, 0])
    torch.testing.assert_close(feature_acts, step.feature_acts)
    torch.testing.assert_close(hidden_pre, step.hidden_pre)
    torch.testing.assert_close(clt.decode(feature_acts).flatten(1), step.sae_out)
    assert clt.get_W_dec_norm().shape == (clt.cfg.d_sae,)
    assert clt.log_histograms()["weights/W_dec_norms"].shape == (clt.cfg.d_sae,)
    with pytest.raises(NotImplementedError, match="export a CrossLayerTranscoder"):
        clt.fold_W_dec_norm()
    with pytest.raises(NotImplementedError, match="call training_forward_pass"):
        clt.calculate_aux_loss(step_input(clt), feature_acts, hidden_pre, step.sae_out)


def test_coefficients_go_through_saelens_schedulers() -> None:
    cfg = {"sparsity_coefficient": 0.5, "sparsity_warm_up_steps": 9, "dead_feature_coefficient": 1e-5}
    assert build("relu", **cfg).get_coefficients() == {
        "sparsity": TrainCoefficientConfig(0.5, 9),
        "dead_feature": 1e-5,
        "auxk": 1 / 32,
    }
    assert build("topk", **cfg, auxk_coefficient=0.1).get_coefficients() == {"auxk": 0.1}
    assert build("topk", far_write_coefficient=0.2).get_coefficients() == {"auxk": 1 / 32, "far_write": 0.2}


def test_registering_twice_changes_nothing() -> None:
    clt_module.register()
    assert registry.get_sae_training_class(ARCHITECTURE) == (TrainingCLT, TrainingCLTConfig)
    assert registry.get_sae_class(ARCHITECTURE)[0] is InferenceCLT


def test_saelens_saves_and_loads_it(tmp_path: Path) -> None:
    clt = build("jumprelu")
    clt.save_model(tmp_path / "training")
    loaded = TrainingSAE.load_from_disk(tmp_path / "training")
    assert isinstance(loaded, TrainingCLT)
    x = raw_batch()[:, 0]
    assert torch.equal(export(loaded)(x), export(clt)(x))
    clt.save_inference_model(tmp_path / "inference")
    inference = SAE.load_from_disk(tmp_path / "inference")
    assert isinstance(inference, InferenceCLT)
    scaled = step_input(clt).sae_in[:, 0]
    step = clt.training_forward_pass(step_input(clt))
    torch.testing.assert_close(inference(scaled).flatten(1), step.sae_out)


def test_scale_brings_every_median_norm_to_sqrt_d_model() -> None:
    batches = [raw_batch(40), 2 * raw_batch(40)]
    scale = estimate_scale(batches)
    norms = torch.cat([apply_scale(b, scale) for b in batches]).norm(dim=-1).median(dim=0).values
    torch.testing.assert_close(norms, torch.full_like(norms, D**0.5), rtol=1e-12, atol=0)


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_encoder_biases_set_the_firing_rate(activation: str) -> None:
    clt, n_tokens = build(activation), 200
    x = apply_scale(raw_batch(n_tokens), scale_of(clt))[:, 0]
    init_encoder_biases(clt, x)
    rates = (clt.encode(x) > 0).double().mean(dim=0)
    assert (rates - initial_firing_rate(clt.cfg.d_sae)).abs().max() < 1e-12


def test_decoder_biases_are_the_mean_output() -> None:
    clt = build()
    outputs = apply_scale(raw_batch(200), scale_of(clt))[:, 1]
    init_decoder_biases(clt, outputs)
    torch.testing.assert_close(clt.b_dec.data, outputs.mean(dim=0))


def test_firing_rate_falls_with_the_dictionary() -> None:
    assert initial_firing_rate(30) == 0.5
    assert initial_firing_rate(1_000_000) == 0.01


def test_fresh_weights_are_within_the_bounds_of_the_paper() -> None:
    clt = build("relu")
    W_enc, W_dec = (torch.cat([w.detach().flatten() for w in group]) for group in (clt.W_enc, clt.W_dec))
    for weights, bound in ((W_enc, F**-0.5), (W_dec, (N_LAYERS * D) ** -0.5)):
        assert 0.9 * bound < float(weights.abs().max()) <= bound
        assert abs(float(weights.mean())) < bound / 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_sae": 7}, "n_layers \\* d_transcoder = 30"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations='none'"),
        ({"span": 4}, "span is 4"),
    ],
)
def test_bad_config_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**changes)


def other_scales() -> dict[str, tuple[float, ...]]:
    return {"input_scale": (0.3, 4.0, 1.7), "output_scale": (2.0, 0.05, 9.0)}


@pytest.mark.parametrize("span", [1, N_LAYERS])
@pytest.mark.parametrize(
    ("activation", "changes"),
    [
        ("relu", {"skip": True}),
        ("jumprelu", {}),
        ("topk", {"skip": True}),
        ("batchtopk", {}),
        ("topk", {"topk_across": "all_layers"}),
    ],
)
def test_a_run_that_begins_with_a_clt_begins_with_the_same_function(activation: str, span: int, changes: dict) -> None:
    first = build(activation, span, **changes)
    if first.cfg.has_score_threshold:
        first.score_threshold.copy_(torch.tensor([0.5, 0.1, 0.7]))
    exported = export(first)
    fresh = build(activation, span, **(changes | other_scales()))
    with torch.no_grad():
        for weight in fresh.parameters():
            weight.uniform_()
    take_over(fresh, exported.weights)
    again = export(fresh)
    # A run that ranks features has the scales with which they were ranked.
    assert (again.cfg.input_scale == exported.cfg.input_scale) == first.cfg.selects
    for name, value in exported.state_dict().items():
        # Each weight was multiplied and divided by a scale, or a norm.
        torch.testing.assert_close(again.state_dict()[name], value, rtol=1e-12, atol=1e-14, msg=name)


def test_features_that_are_ranked_otherwise_are_warned_of() -> None:
    exported = export(build("topk"))
    foreign = CrossLayerTranscoder(replace(exported.cfg, input_scale=None, output_scale=None), exported.W_dec)
    with pytest.warns(TrainingWarning, match="chose them otherwise in layers 0, 1, where others fire at first"):
        take_over(build("topk", **other_scales()), foreign.weights)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layers": 2, "span": 2}, "n_layers 2, but this run has 3: give a CLT of the same model"),
        ({"d_model": 4}, "d_model 4, but this run has 8: give a CLT of the same model"),
        ({"d_transcoder": 11}, "d_transcoder 11, but this run has 10: give d_transcoder=11, or leave init_from out"),
        ({"span": 2}, "span 2, but this run has 3"),
        ({"skip": True}, "skip True, but this run has False"),
        ({"input_hook": "hook_resid_pre"}, "input_hook 'hook_resid_pre', but this run has 'hook_resid_mid'"),
        ({"output_hook": "mlp.hook_out"}, "output_hook 'mlp.hook_out', but this run has 'hook_mlp_out'"),
        ({"activation": "relu"}, "activation 'relu', but this run has 'jumprelu': give activation='relu'"),
    ],
)
def test_a_run_begins_with_no_clt_of_another_kind(changes: dict, message: str) -> None:
    cfg = replace(build("jumprelu").transcoder_config, input_scale=None, output_scale=None)
    require_same_kind(build("jumprelu"), CrossLayerTranscoder(cfg).weights, "old")
    with pytest.raises(ConfigError, match=f"init_from is 'old', which has {message}"):
        require_same_kind(build("jumprelu"), CrossLayerTranscoder(replace(cfg, **changes)).weights, "old")
    below = CrossLayerTranscoder(cfg)
    below.threshold.data[1, 2] = -1
    with pytest.raises(ConfigError, match="thresholds below 0"):
        require_same_kind(build("jumprelu"), below.weights, "old")
    with pytest.raises(ConfigError, match="far_rank is 2 with init_from"):
        require_same_kind(build("jumprelu", far_rank=2), CrossLayerTranscoder(cfg).weights, "old")
