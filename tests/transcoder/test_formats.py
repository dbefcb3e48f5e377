"""What each layout holds, and that nothing is lost on the way from one to another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.models import oracle_model, tiny_clt
from tl_clt.lens import run_with_cache
from tl_clt.transcoder import CrossLayerTranscoder

N_LAYERS, D_MODEL, F = 3, 8, 24


def assert_equal(a: CrossLayerTranscoder, b: CrossLayerTranscoder) -> None:
    """Equal configs, and equal weights to the bit."""
    assert a.cfg == b.cfg
    for name in ("W_enc", "b_enc", "b_dec", "threshold", "W_skip"):
        one, other = getattr(a, name), getattr(b, name)
        assert (one is None) == (other is None), name
        assert one is None or (one.dtype == other.dtype and torch.equal(one, other)), name
    for source in a.layers:
        assert torch.equal(a.W_dec[source], b.W_dec[source])


def recorded(clt: CrossLayerTranscoder) -> CrossLayerTranscoder:
    """The CLT with every field of its config set to something that is no default."""
    scale = tuple(1 / (3 + t) for t in clt.layers)
    clt.cfg = replace(clt.cfg, input_scale=scale, output_scale=scale[::-1], scan="some/scan", model_name="me/model")
    return clt


@pytest.mark.parametrize("span", [1, 2, N_LAYERS])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk", "batchtopk"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_native_round_trip_is_exact(activation: str, span: int, skip: bool, dtype: torch.dtype, tmp_path: Path):
    clt = recorded(tiny_clt((N_LAYERS, D_MODEL), activation=activation, span=span, skip=skip, dtype=dtype))
    assert clt.save_pretrained(tmp_path / "clt") == tmp_path / "clt"
    assert_equal(CrossLayerTranscoder.from_pretrained(tmp_path / "clt"), clt)


@pytest.mark.parametrize("span", [1, 2, N_LAYERS])
@pytest.mark.parametrize("activation", ["relu", "jumprelu", "batchtopk"])
@pytest.mark.parametrize("input_hook", ["hook_resid_mid", "ln2.hook_normalized"])
def test_native_to_circuit_tracer_and_back_is_exact(activation: str, span: int, input_hook: str, tmp_path: Path):
    clt = recorded(tiny_clt((N_LAYERS, D_MODEL), activation=activation, span=span, input_hook=input_hook))
    clt.save_pretrained(tmp_path / "native")
    CrossLayerTranscoder.from_pretrained(tmp_path / "native").save_pretrained(tmp_path / "theirs", "circuit-tracer")
    assert (tmp_path / "theirs" / "W_dec_0.safetensors").exists() == (span > 1)
    back = CrossLayerTranscoder.from_pretrained(tmp_path / "theirs")
    assert_equal(back, clt)
    back.save_pretrained(tmp_path / "again")
    assert_equal(CrossLayerTranscoder.from_pretrained(tmp_path / "again"), clt)


@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_plt_with_skip_to_circuit_tracer_and_back_is_exact(activation: str, tmp_path: Path):
    clt = recorded(tiny_clt((N_LAYERS, D_MODEL), activation=activation, span=1, skip=True))
    clt.save_pretrained(tmp_path / "theirs", "circuit-tracer")
    assert_equal(CrossLayerTranscoder.from_pretrained(tmp_path / "theirs"), clt)


def test_a_scan_that_was_not_set_stays_unset(tmp_path: Path):
    clt = tiny_clt((N_LAYERS, D_MODEL))
    clt.save_pretrained(tmp_path / "theirs", "circuit-tracer")
    assert CrossLayerTranscoder.from_pretrained(tmp_path / "theirs").cfg.scan is None
    assert yaml.safe_load((tmp_path / "theirs" / "config.yaml").read_text())["scan"] == "tiny"


def test_one_layer_saves_as_a_cross_layer_transcoder(tmp_path: Path):
    clt = tiny_clt((1, D_MODEL))
    clt.save_pretrained(tmp_path / "theirs", "circuit-tracer")
    assert_equal(CrossLayerTranscoder.from_pretrained(tmp_path / "theirs"), clt)


def test_more_than_ten_layers_keep_their_order(tmp_path: Path):
    clt = tiny_clt((12, D_MODEL), d_transcoder=4, l0=1)
    for layout in ("native", "circuit-tracer"):
        clt.save_pretrained(tmp_path / layout, layout)
        assert_equal(CrossLayerTranscoder.from_pretrained(tmp_path / layout), clt)


def test_circuit_tracer_folder_is_as_circuit_tracer_reads_it(tmp_path: Path):
    clt = tiny_clt((N_LAYERS, D_MODEL), span=2, input_hook="ln2.hook_normalized")
    clt.save_pretrained(tmp_path / "theirs", "circuit-tracer")
    config = yaml.safe_load((tmp_path / "theirs" / "config.yaml").read_text())
    assert config["model_kind"] == "cross_layer_transcoder"
    assert config["feature_input_hook"] == "ln2.hook_normalized"
    assert config["feature_output_hook"] == "hook_mlp_out"
    for i in range(N_LAYERS):
        encoder = load_file(tmp_path / "theirs" / f"W_enc_{i}.safetensors")
        assert set(encoder) == {f"{n}_{i}" for n in ("W_enc", "b_enc", "b_dec", "threshold")}
        assert torch.equal(encoder[f"W_enc_{i}"], clt.W_enc[i].T)
        W_dec = load_file(tmp_path / "theirs" / f"W_dec_{i}.safetensors")[f"W_dec_{i}"]
        assert W_dec.shape == (F, N_LAYERS - i, D_MODEL)
        assert torch.equal(W_dec[:, : len(clt.cfg.targets(i))], clt.W_dec[i])
        assert not W_dec[:, 2:].any(), "slots beyond the span are zero"


def test_circuit_tracer_plt_folder_is_as_circuit_tracer_reads_it(tmp_path: Path):
    clt = tiny_clt((N_LAYERS, D_MODEL), span=1, skip=True)
    clt.save_pretrained(tmp_path / "theirs", "circuit-tracer")
    assert yaml.safe_load((tmp_path / "theirs" / "config.yaml").read_text())["model_kind"] == "transcoder_set"
    for i in range(N_LAYERS):
        layer = load_file(tmp_path / "theirs" / f"layer_{i}.safetensors")
        assert torch.equal(layer["W_enc"], clt.W_enc[i].T)
        assert torch.equal(layer["W_dec"], clt.W_dec[i][:, 0])
        assert torch.equal(layer["activation_function.threshold"], clt.threshold[i])
        assert torch.equal(layer["W_skip"], clt.W_skip[i].T)


# -- folders of others, written by hand ------------------------------------------------------------------


def write_clt_folder(folder: Path, *, threshold: bool, hook: str = "hook_resid_mid") -> dict[str, Tensor]:
    """A circuit-tracer CLT folder as its documentation states it; gives the tensors."""
    folder.mkdir()
    tensors: dict[str, Tensor] = {}
    for i in range(N_LAYERS):
        encoder = {
            f"W_enc_{i}": torch.randn(F, D_MODEL),
            f"b_enc_{i}": torch.randn(F),
            f"b_dec_{i}": torch.randn(D_MODEL),
        }
        if threshold:
            encoder[f"threshold_{i}"] = torch.rand(F)
        decoder = {f"W_dec_{i}": torch.randn(F, N_LAYERS - i, D_MODEL)}
        save_file(encoder, folder / f"W_enc_{i}.safetensors")
        save_file(decoder, folder / f"W_dec_{i}.safetensors")
        tensors |= encoder | decoder
    (folder / "config.yaml").write_text(
        "model_kind: cross_layer_transcoder\nmodel_name: google/gemma-2-2b\n"
        f"feature_input_hook: {hook}\nfeature_output_hook: hook_mlp_out\nscan: them/theirs\n"
    )
    return tensors


@pytest.mark.parametrize("threshold", [False, True])
def test_a_foreign_clt_folder_computes_their_formula(threshold: bool, tmp_path: Path):
    w = write_clt_folder(tmp_path / "clt", threshold=threshold)
    clt = CrossLayerTranscoder.from_pretrained(tmp_path / "clt")
    assert clt.cfg.activation == ("jumprelu" if threshold else "relu")
    assert (clt.cfg.n_layers, clt.cfg.d_model, clt.cfg.d_transcoder, clt.cfg.span) == (N_LAYERS, D_MODEL, F, N_LAYERS)
    assert (clt.cfg.model_name, clt.cfg.scan, clt.cfg.dtype) == ("google/gemma-2-2b", "them/theirs", "float32")
    x = torch.randn(5, N_LAYERS, D_MODEL)
    expected = torch.stack([w[f"b_dec_{t}"] for t in range(N_LAYERS)]).repeat(5, 1, 1)
    for i in range(N_LAYERS):
        pre = x[:, i] @ w[f"W_enc_{i}"].T + w[f"b_enc_{i}"]
        acts = pre * (pre > w[f"threshold_{i}"]) if threshold else pre.relu()
        torch.testing.assert_close(clt.encode(x)[:, i], acts)
        for j in range(N_LAYERS - i):
            expected[:, i + j] += acts @ w[f"W_dec_{i}"][:, j]
    torch.testing.assert_close(clt(x), expected)


@pytest.mark.parametrize("hook", ["mlp.hook_in", "ln2.hook_normalized", "hook_resid_mid"])
def test_hooks_keep_their_names_both_ways(hook: str, tmp_path: Path):
    """`mlp.hook_in` comes after the norm's gain and bias, `ln2.hook_normalized` before: two places."""
    write_clt_folder(tmp_path / "clt", threshold=True, hook=hook)
    clt = CrossLayerTranscoder.from_pretrained(tmp_path / "clt")
    assert clt.cfg.input_hook == hook
    config = yaml.safe_load((clt.save_pretrained(tmp_path / "again", "circuit-tracer") / "config.yaml").read_text())
    assert (config["feature_input_hook"], config["feature_output_hook"]) == (hook, "hook_mlp_out")


def test_folders_saved_before_keep_their_meaning(tmp_path: Path):
    """They named `ln2.hook_normalized` as `mlp.hook_in` to circuit-tracer, and rightly under our own key."""
    clt = tiny_clt((N_LAYERS, D_MODEL), input_hook="ln2.hook_normalized")
    path = clt.save_pretrained(tmp_path / "saved", "circuit-tracer") / "config.yaml"
    path.write_text(
        path.read_text().replace("feature_input_hook: ln2.hook_normalized", "feature_input_hook: mlp.hook_in")
    )
    assert CrossLayerTranscoder.from_pretrained(tmp_path / "saved").cfg.input_hook == "ln2.hook_normalized"


@pytest.mark.parametrize("threshold", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_a_foreign_plt_folder_computes_their_formula(threshold: bool, skip: bool, tmp_path: Path):
    layers = []
    for i in range(N_LAYERS):
        w = {"W_enc": torch.randn(F, D_MODEL), "W_dec": torch.randn(F, D_MODEL)}
        w |= {"b_enc": torch.randn(F), "b_dec": torch.randn(D_MODEL)}
        if threshold:
            w["activation_function.threshold"] = torch.rand(F)
        if skip:
            w["W_skip"] = torch.randn(D_MODEL, D_MODEL)
        save_file(w, tmp_path / f"layer_{i}.safetensors")
        layers.append(w)
    (tmp_path / "config.yaml").write_text(
        "model_kind: transcoder_set\nmodel_name: m\nfeature_input_hook: mlp.hook_in\n"
        "feature_output_hook: hook_mlp_out\nscan: s\n"
    )
    x = torch.randn(5, N_LAYERS, D_MODEL)
    for lazy in (False, True):
        clt = CrossLayerTranscoder.from_pretrained(tmp_path, lazy_decoder=lazy)
        assert (clt.cfg.span, clt.cfg.skip, clt.cfg.input_hook) == (1, skip, "mlp.hook_in")
        for i, w in enumerate(layers):
            pre = x[:, i] @ w["W_enc"].T + w["b_enc"]
            acts = pre * (pre > w["activation_function.threshold"]) if threshold else pre.relu()
            expected = acts @ w["W_dec"] + w["b_dec"] + (x[:, i] @ w["W_skip"].T if skip else 0)
            torch.testing.assert_close(clt(x)[:, i], expected)


def test_a_folder_without_config_yaml_has_the_defaults(tmp_path: Path):
    write_clt_folder(tmp_path / "clt", threshold=True)
    (tmp_path / "clt" / "config.yaml").unlink()
    with pytest.warns(UserWarning, match="does not say where the CLT reads and writes .*feature_input_hook.*assumed"):
        cfg = CrossLayerTranscoder.from_pretrained(tmp_path / "clt").cfg
    assert (cfg.model_name, cfg.input_hook, cfg.output_hook) == ("unknown", "hook_resid_mid", "hook_mlp_out")


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("lazy", [False, True])
def test_gemma_scope_files_compute_their_formula(skip: bool, lazy: bool, tmp_path: Path):
    layers = []
    for i in range(N_LAYERS):
        w = {"w_enc": torch.randn(D_MODEL, F), "w_dec": torch.randn(F, N_LAYERS, D_MODEL)}
        w |= {"b_enc": torch.randn(F), "b_dec": torch.randn(D_MODEL), "threshold": torch.rand(F)}
        if skip:
            w["affine_skip_connection"] = torch.randn(D_MODEL, D_MODEL)
        save_file(w, tmp_path / f"params_layer_{i}.safetensors")
        layers.append(w)
    clt = CrossLayerTranscoder.from_pretrained(tmp_path, lazy_decoder=lazy)
    assert (clt.cfg.n_layers, clt.cfg.span, clt.cfg.skip, clt.cfg.activation) == (N_LAYERS, N_LAYERS, skip, "jumprelu")
    assert (clt.cfg.input_hook, clt.cfg.output_hook) == ("mlp.hook_in", "hook_mlp_out")
    x = torch.randn(5, N_LAYERS, D_MODEL)
    expected = torch.stack([w["b_dec"] for w in layers]).repeat(5, 1, 1)
    for source, w in enumerate(layers):
        pre = x[:, source] @ w["w_enc"] + w["b_enc"]
        acts = pre * (pre > w["threshold"])
        for target in range(source, N_LAYERS):
            expected[:, target] += acts @ w["w_dec"][:, target]
        if skip:
            expected[:, source] += x[:, source] @ w["affine_skip_connection"]
    torch.testing.assert_close(clt(x), expected)
    last = clt.decoder_rows(N_LAYERS - 1, torch.tensor([0]))
    assert torch.equal(last, layers[-1]["w_dec"][:1, -1:]), "the last layer writes its own output"


def test_gemma_scope_hooks_come_from_a_config_beside_the_files(tmp_path: Path):
    w = {"w_enc": torch.randn(D_MODEL, F), "w_dec": torch.randn(F, 1, D_MODEL), "threshold": torch.rand(F)}
    w |= {"b_enc": torch.randn(F), "b_dec": torch.randn(D_MODEL)}
    save_file(w, tmp_path / "params_layer_0.safetensors")
    (tmp_path / "config.yaml").write_text("model_name: google/gemma-3-270m\nfeature_input_hook: mlp.hook_in\n")
    cfg = CrossLayerTranscoder.from_pretrained(tmp_path).cfg
    assert (cfg.model_name, cfg.input_hook) == ("google/gemma-3-270m", "mlp.hook_in")


def test_oracle_clts_find_the_active_features_of_circuit_tracer(oracle: Path):
    model, tokens = oracle_model(oracle)
    clt = CrossLayerTranscoder.from_pretrained(oracle / "clt")
    _, cache = run_with_cache(model, tokens, lambda name: name.endswith(clt.cfg.input_hook))
    x = torch.stack([cache[f"blocks.{t}.{clt.cfg.input_hook}"][0] for t in clt.layers], dim=-2)
    acts = clt.encode(x)
    acts[0] = 0  # circuit-tracer leaves out the first position
    expected = load_file(oracle / "expected.safetensors")
    layer, pos, feature = expected["active_features"].long().unbind(1)
    found = torch.zeros_like(acts)
    found[pos, layer, feature] = expected["activations"]
    torch.testing.assert_close(acts, found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["native", "circuit-tracer"])
@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_dtype_argument_is_the_dtype_of_weights_and_config(layout: str, dtype: str | torch.dtype, tmp_path: Path):
    clt = tiny_clt((N_LAYERS, D_MODEL))
    clt.save_pretrained(tmp_path / "clt", layout)
    loaded = CrossLayerTranscoder.from_pretrained(tmp_path / "clt", dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded.cfg == replace(clt.cfg, dtype="bfloat16")
    assert torch.equal(loaded.W_enc, clt.W_enc.bfloat16())


def test_a_moved_clt_saves_the_dtype_that_its_weights_have(tmp_path: Path):
    clt = tiny_clt((N_LAYERS, D_MODEL)).to(torch.float32)
    for layout in ("native", "circuit-tracer"):
        clt.save_pretrained(tmp_path / layout, layout)
        assert torch.equal(CrossLayerTranscoder.from_pretrained(tmp_path / layout).W_enc, clt.W_enc)


def test_a_string_path_is_as_good_as_a_path(tmp_path: Path):
    clt = tiny_clt((N_LAYERS, D_MODEL))
    clt.save_pretrained(str(tmp_path / "deep" / "er" / "clt"))
    assert_equal(CrossLayerTranscoder.from_pretrained(str(tmp_path / "deep" / "er" / "clt")), clt)
