"""Layouts of public sets: each written as its maker writes it, a few features wide, and read against the formula."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from tl_clt.errors import FormatError
from tl_clt.transcoder import CrossLayerTranscoder, hub

L, D, F, K = 3, 6, 10, 3


class Made(NamedTuple):
    """A folder in a public layout, and what its maker's own formula gives for some inputs."""

    folder: Path
    acts: Callable[[Tensor, int], Tensor]
    """Features of a layer from its input."""
    outputs: Callable[[Tensor], Tensor]
    """MLP outputs [n, n_layers, d_model] from inputs of the same shape."""
    hooks: tuple[str, str]
    dtype: torch.dtype


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def plt_outputs(acts, W_dec, b_dec, skip):
    return lambda x: torch.stack(
        [acts(x[:, i], i) @ W_dec[i].float() + b_dec[i].float() + skip(x[:, i], i) for i in range(L)], 1
    )


def gemma_scope_2(folder: Path, with_config: bool = True) -> Made:
    """Per-layer transcoders with affine skip, listed by a config.yaml, a config.json beside each."""
    layers = [
        {
            "w_enc": rand(D, F),
            "w_dec": rand(F, D),
            "b_enc": rand(F),
            "b_dec": rand(D),
            "threshold": rand(F).abs(),
            "affine_skip_connection": rand(D, D),
        }
        for _ in range(L)
    ]
    for i, tensors in enumerate(layers):
        sub = folder / f"layer_{i}_width_16k_l0_small_affine"
        sub.mkdir(parents=True)
        save_file(tensors, sub / "params.safetensors")
        makers = {
            "architecture": "jump_relu",
            "model_name": "google/gemma-3-270m-pt",
            "hf_hook_point_in": f"model.layers.{i}.pre_feedforward_layernorm.output",
            "hf_hook_point_out": f"model.layers.{i}.post_feedforward_layernorm.output",
            "affine_connection": True,
        }
        if with_config:
            (sub / "config.json").write_text(json.dumps(makers))
    listed = [f"layer_{i}_width_16k_l0_small_affine" for i in range(L)]
    (folder / "config.yaml").write_text(yaml.safe_dump({"model_kind": "transcoder_set", "transcoders": listed}))

    def acts(x: Tensor, i: int) -> Tensor:
        pre = x @ layers[i]["w_enc"] + layers[i]["b_enc"]
        return pre * (pre > layers[i]["threshold"])

    def skip(x: Tensor, i: int) -> Tensor:
        return x @ layers[i]["affine_skip_connection"]

    outputs = plt_outputs(acts, [t["w_dec"] for t in layers], [t["b_dec"] for t in layers], skip)
    return Made(folder, acts, outputs, ("mlp.hook_in", "hook_mlp_out"), torch.float32)


def gemma_scope_2_without_config(folder: Path) -> Made:
    return gemma_scope_2(folder, with_config=False)


def gemma_scope_1(folder: Path) -> Made:
    """`.npz` files in folders of their own, listed by file and by folder."""
    layers = [
        {
            "W_enc": np.random.randn(D, F).astype("f4"),
            "W_dec": np.random.randn(F, D).astype("f4"),
            "b_enc": np.random.randn(F).astype("f4"),
            "b_dec": np.random.randn(D).astype("f4"),
            "threshold": np.abs(np.random.randn(F)).astype("f4"),
        }
        for _ in range(L)
    ]
    listed = []
    for i, arrays in enumerate(layers):
        sub = folder / f"layer_{i}/width_16k/average_l0_{70 + i}"
        sub.mkdir(parents=True)
        (np.savez if i else np.savez_compressed)(sub / "params.npz", **arrays)
        listed.append(str(sub.relative_to(folder)) + ("/params.npz" if i else ""))
    (folder / "config.yaml").write_text(yaml.safe_dump({"model_kind": "transcoder_set", "transcoders": listed}))
    tensors = [{k: torch.from_numpy(v) for k, v in arrays.items()} for arrays in layers]

    def acts(x: Tensor, i: int) -> Tensor:
        pre = x @ tensors[i]["W_enc"] + tensors[i]["b_enc"]
        return pre * (pre > tensors[i]["threshold"])

    outputs = plt_outputs(acts, [t["W_dec"] for t in tensors], [t["b_dec"] for t in tensors], lambda x, i: 0 * x)
    return Made(folder, acts, outputs, ("ln2.hook_normalized", "hook_mlp_out"), torch.float32)


def qwen3(folder: Path) -> Made:
    """bfloat16, ReLU, `layer_{i}.safetensors`, hooks by config.yaml."""
    folder.mkdir()
    b = torch.bfloat16
    layers = [
        {
            "W_enc": rand(F, D, dtype=b),
            "W_dec": rand(F, D, dtype=b),
            "b_enc": rand(F, dtype=b),
            "b_dec": rand(D, dtype=b),
        }
        for _ in range(L)
    ]
    for i, tensors in enumerate(layers):
        save_file(tensors, folder / f"layer_{i}.safetensors")
    config = {
        "model_name": "Qwen/Qwen3-4B",
        "model_kind": "transcoder_set",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "mlp.hook_out",
        "scan": "qwen3-4b",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))

    def acts(x: Tensor, i: int) -> Tensor:
        return torch.relu(x @ layers[i]["W_enc"].float().T + layers[i]["b_enc"].float())

    outputs = plt_outputs(acts, [t["W_dec"] for t in layers], [t["b_dec"] for t in layers], lambda x, i: 0 * x)
    return Made(folder, acts, outputs, ("mlp.hook_in", "mlp.hook_out"), b)


def largest(pre: Tensor) -> Tensor:
    """The K largest that are positive, written as a comparison with the K-th."""
    return torch.relu(pre) * (pre >= pre.sort(-1, descending=True).values[..., K - 1 : K])


def topk_set(folder: Path) -> Made:
    """Per-layer transcoders whose config.yaml says topk."""
    folder.mkdir()
    layers = [
        {"W_enc": rand(F, D), "W_dec": rand(F, D), "b_enc": rand(F), "b_dec": rand(D), "W_skip": rand(D, D)}
        for _ in range(L)
    ]
    for i, tensors in enumerate(layers):
        save_file(tensors, folder / f"layer_{i}.safetensors")
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"feature_input_hook": "mlp.hook_in", "activation": "topk", "k": K})
    )

    def acts(x: Tensor, i: int) -> Tensor:
        return largest(x @ layers[i]["W_enc"].T + layers[i]["b_enc"])

    def skip(x: Tensor, i: int) -> Tensor:
        return x @ layers[i]["W_skip"].T

    outputs = plt_outputs(acts, [t["W_dec"] for t in layers], [t["b_dec"] for t in layers], skip)
    return Made(folder, acts, outputs, ("mlp.hook_in", "hook_mlp_out"), torch.float32)


def sparsify(folder: Path) -> Made:
    layers = [
        {
            "encoder.weight": rand(F, D),
            "encoder.bias": rand(F),
            "W_dec": rand(F, D),
            "b_dec": rand(D),
            "W_skip": rand(D, D),
        }
        for _ in range(L)
    ]
    for i, tensors in enumerate(layers):
        sub = folder / f"layers.{i}.mlp"
        sub.mkdir(parents=True)
        save_file(tensors, sub / "sae.safetensors")
        config = {
            "activation": "topk",
            "expansion_factor": 32,
            "normalize_decoder": True,
            "num_latents": F,
            "k": K,
            "multi_topk": False,
            "skip_connection": True,
            "transcode": True,
            "d_in": D,
        }
        (sub / "cfg.json").write_text(json.dumps(config))

    def acts(x: Tensor, i: int) -> Tensor:
        return largest(x @ layers[i]["encoder.weight"].T + layers[i]["encoder.bias"])

    def skip(x: Tensor, i: int) -> Tensor:
        return x @ layers[i]["W_skip"].T

    outputs = plt_outputs(acts, [t["W_dec"] for t in layers], [t["b_dec"] for t in layers], skip)
    return Made(folder, acts, outputs, ("mlp.hook_in", "mlp.hook_out"), torch.float32)


def clt_outputs(acts, write, b_dec, skip=lambda x, t: 0 * x):
    return lambda x: torch.stack(
        [sum(acts(x[:, s], s) @ write(s, t) for s in range(t + 1)) + b_dec[t] + skip(x[:, t], t) for t in range(L)], 1
    )


def gemma_scope_2_clt(folder: Path) -> Made:
    folder.mkdir()
    layers = [
        {
            "w_enc": rand(D, F),
            "w_dec": rand(F, L, D),
            "b_enc": rand(F),
            "b_dec": rand(D),
            "threshold": rand(F).abs(),
            "affine_skip_connection": rand(D, D),
        }
        for _ in range(L)
    ]
    for i, tensors in enumerate(layers):
        save_file(tensors, folder / f"params_layer_{i}.safetensors")
    makers = {
        "hf_hook_point_in": "model.layers.{layer}.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.{layer}.post_feedforward_layernorm.output",
    }
    (folder / "config.json").write_text(json.dumps(makers))

    def acts(x: Tensor, i: int) -> Tensor:
        pre = x @ layers[i]["w_enc"] + layers[i]["b_enc"]
        return pre * (pre > layers[i]["threshold"])

    outputs = clt_outputs(
        acts,
        lambda s, t: layers[s]["w_dec"][:, t],
        [t["b_dec"] for t in layers],
        lambda x, t: x @ layers[t]["affine_skip_connection"],
    )
    return Made(folder, acts, outputs, ("mlp.hook_in", "hook_mlp_out"), torch.float32)


def listed_gemma_scope_2_clt(folder: Path) -> Made:
    made = gemma_scope_2_clt(folder)
    for i in range(L):
        (folder / f"params_layer_{i}.safetensors").rename(folder / f"part_{i}.safetensors")
    listed = [f"part_{i}.safetensors" for i in range(L)]
    (folder / "config.yaml").write_text(yaml.safe_dump({"model_kind": "cross_layer_transcoder", "transcoders": listed}))
    return made


def llamascopium(folder: Path, act_fn: str = "jumprelu", with_norm: bool = True) -> Made:
    folder.mkdir()
    W_D = [rand(t + 1, F, D) for t in range(L)]
    b_D = [rand(D) for _ in range(L)]
    W_E, b_E, log_threshold = rand(L, D, F), rand(L, F), rand(L, F)
    tensors = {"W_E": W_E, "b_E": b_E}
    if act_fn == "jumprelu":
        tensors["activation_function.log_jumprelu_threshold"] = log_threshold
    tensors |= {f"W_D.{t}": W_D[t] for t in range(L)} | {f"b_D.{t}": b_D[t] for t in range(L)}
    save_file(tensors, folder / "sae_weights.safetensors")
    config = {
        "sae_type": "clt",
        "act_fn": act_fn,
        "d_model": D,
        "expansion_factor": F / D,
        "hook_points_in": [f"blocks.{i}.hook_resid_mid" for i in range(L)],
        "hook_points_out": [f"blocks.{i}.hook_mlp_out" for i in range(L)],
        "norm_activation": "inference",
        "sparsity_include_decoder_norm": with_norm,
        "top_k": K,
        "dtype": "torch.float32",
    }
    (folder / "config.json").write_text(json.dumps(config))

    def acts(x: Tensor, i: int) -> Tensor:
        pre = x @ W_E[i] + b_E[i]
        norm = torch.cat([W_D[t][i] for t in range(i, L)], dim=-1).norm(dim=-1) if with_norm else torch.ones(F)
        scaled = pre * norm
        if act_fn == "jumprelu":
            return scaled * (scaled > log_threshold[i].exp()) / norm
        return largest(scaled) if act_fn == "topk" else torch.relu(scaled) / norm

    return Made(
        folder, acts, clt_outputs(acts, lambda s, t: W_D[t][s], b_D), ("hook_resid_mid", "hook_mlp_out"), torch.float32
    )


LAYOUTS: dict[str, Callable[[Path], Made]] = {
    "gemma-scope-2": gemma_scope_2,
    "gemma-scope-2-no-config": gemma_scope_2_without_config,
    "gemma-scope-2-clt": gemma_scope_2_clt,
    "gemma-scope-2-clt-listed": listed_gemma_scope_2_clt,
    "gemma-scope-1": gemma_scope_1,
    "qwen3": qwen3,
    "topk-by-config": topk_set,
    "sparsify": sparsify,
    "llamascopium": llamascopium,
    "llamascopium-relu": lambda folder: llamascopium(folder, "relu"),
    "llamascopium-no-norm": lambda folder: llamascopium(folder, "jumprelu", False),
    "llamascopium-topk": lambda folder: llamascopium(folder, "topk", False),
}


@pytest.fixture(params=LAYOUTS)
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Made:
    torch.manual_seed(0)
    np.random.seed(0)
    return LAYOUTS[request.param](tmp_path / "set")


@pytest.mark.parametrize("lazy", [False, True])
def test_a_set_gives_what_its_makers_formula_gives(made: Made, lazy: bool):
    clt = CrossLayerTranscoder.from_pretrained(made.folder, lazy_decoder=lazy)
    assert (clt.cfg.input_hook, clt.cfg.output_hook) == made.hooks
    assert clt.W_enc.dtype == made.dtype and clt.W_dec[0].dtype == made.dtype
    clt = CrossLayerTranscoder.from_pretrained(made.folder, lazy_decoder=lazy, dtype=torch.float32)
    x = torch.randn(50, L, D)
    feature_acts = clt.encode(x)
    # Sums of 6 to 60 terms of size 1 to 10 in float32: the order of a product's sums differs by up to 1e-5.
    for i in range(L):
        torch.testing.assert_close(feature_acts[:, i], made.acts(x[:, i], i), atol=1e-5, rtol=1e-5)
    assert (feature_acts > 0).any() and (feature_acts == 0).any()
    torch.testing.assert_close(clt(x), made.outputs(x), atol=5e-5, rtol=1e-5)


def test_rows_of_lazy_decoders_are_those_of_dense_ones(made: Made):
    dense = CrossLayerTranscoder.from_pretrained(made.folder)
    lazy = CrossLayerTranscoder.from_pretrained(made.folder, lazy_decoder=True)
    features = torch.tensor([7, 0, 3, 4])
    for s in dense.layers:
        assert torch.equal(dense.decoder_rows(s, features), lazy.decoder_rows(s, features))


def weight_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix in (".safetensors", ".npz"))


@pytest.mark.parametrize("keep", [0, 0.3, 0.9])
def test_a_truncated_file_is_refused_by_name(made: Made, keep: float):
    path = weight_files(made.folder)[-1]
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    with pytest.raises(FormatError, match=path.name):
        CrossLayerTranscoder.from_pretrained(made.folder)


def test_a_tensor_that_is_missing_or_of_another_shape_is_refused(made: Made):
    path = weight_files(made.folder)[-1]
    tensors = dict(np.load(path)) if path.suffix == ".npz" else load_file(path)
    for change in ("renamed", "shorter"):
        for key in tensors:
            mangled = dict(tensors)
            value = mangled.pop(key)
            if change == "shorter" or key in ("W_skip", "affine_skip_connection"):
                mangled[key] = value[1:]
            else:
                mangled["other"] = value
            if path.suffix == ".npz":
                np.savez(path, **mangled)
            else:
                save_file({k: v.contiguous().clone() for k, v in mangled.items()}, path)
            with pytest.raises(FormatError):
                CrossLayerTranscoder.from_pretrained(made.folder)


def test_npz_files_that_would_run_code_are_refused(tmp_path: Path):
    made = gemma_scope_1(tmp_path / "set")
    path = weight_files(made.folder)[-1]
    arrays = dict(np.load(path)) | {"b_enc": np.array([print] * F, dtype=object)}
    np.savez(path, **arrays)
    with pytest.raises(FormatError, match="b_enc holds object"):
        CrossLayerTranscoder.from_pretrained(made.folder)


def test_npz_files_that_unpack_to_much_more_than_their_size_are_refused(tmp_path: Path):
    made = gemma_scope_1(tmp_path / "set")
    path = weight_files(made.folder)[-1]
    np.savez_compressed(path, **(dict(np.load(path)) | {"b_enc": np.zeros(2**23, "f4")}))
    with pytest.raises(FormatError, match="more than 64 times its size"):
        CrossLayerTranscoder.from_pretrained(made.folder)


# -- hub ---------------------------------------------------------------------------------------------------


def test_a_list_may_name_files_of_other_repositories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = gemma_scope_2(tmp_path / "set")
    asked = []

    def download(repo: str, path: str, revision: str | None = None) -> str:
        asked.append((repo, revision))
        return str(made.folder / path)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    ours = tmp_path / "ours"
    ours.mkdir()
    listed = [
        f"hf://google/gemma-scope-2/layer_{i}_width_16k_l0_small_affine/params.safetensors" + end
        for i, end in enumerate(("?revision=abc", "@abc", ""))
    ]
    config = {"model_kind": "transcoder_set", "model_name": "google/gemma-3-270m", "transcoders": listed}
    (ours / "config.yaml").write_text(yaml.safe_dump(config))
    clt = CrossLayerTranscoder.from_pretrained(ours)
    assert asked == [("google/gemma-scope-2", "abc")] * 2 + [("google/gemma-scope-2", None)]
    assert clt.cfg.model_name == "google/gemma-3-270m" and clt.cfg.input_hook == "mlp.hook_in"
    x = torch.randn(5, L, D)
    torch.testing.assert_close(clt(x), made.outputs(x), atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("where", "place"),
    [
        ("a/b", hub.HubPath("a/b", "", None)),
        ("a/b@v1", hub.HubPath("a/b", "", "v1")),
        ("a/b/c/d@refs/pr/1", hub.HubPath("a/b", "c/d", "refs/pr/1")),
        ("hf://a/b/c.safetensors?revision=main", hub.HubPath("a/b", "c.safetensors", "main")),
    ],
)
def test_places_on_the_hub(where: str, place: hub.HubPath):
    assert hub.parse(where) == place


@pytest.mark.parametrize("where", ["", "a", "hf://a", "a/", "/a", "a/b/../c", "a/b?x=1"])
def test_what_is_no_place_on_the_hub(where: str):
    with pytest.raises(FormatError, match="written owner/repo"):
        hub.parse(where)


# -- what cannot be verified -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "name", "key", "value", "message"),
    [
        (gemma_scope_2, "layer_0*/config.json", "hf_hook_point_in", "model.layers.0.self_attn.input", "self_attn"),
        (qwen3, "config.yaml", "model_kind", "cross_layer_transcoder", "model_kind"),
        (qwen3, "config.yaml", "activation", "gelu", "gelu"),
        (topk_set, "config.yaml", "k", None, "topk"),
        (sparsify, "layers.1.mlp/cfg.json", "activation", "groupmax", "groupmax"),
        (sparsify, "layers.1.mlp/cfg.json", "transcode", False, "may be a sparse autoencoder"),
        (sparsify, "layers.1.mlp/cfg.json", "k", K + 1, "one k only"),
        (llamascopium, "config.json", "act_fn", "batchtopk", "batchtopk"),
        (llamascopium, "config.json", "norm_activation", "token-wise", "norm_activation"),
        (llamascopium, "config.json", "hook_points_in", ["blocks.0.hook_resid_mid"], "hook_points_in"),
        (llamascopium, "config.json", "act_fn", "topk", "decoder norm"),
    ],
)
def test_what_a_config_says_that_is_not_supported_is_refused_by_name(
    layout: Callable[[Path], Made], name: str, key: str, value: object, message: str, tmp_path: Path
):
    made = layout(tmp_path / "set")
    (path,) = made.folder.glob(name)
    values = yaml.safe_load(path.read_text()) | {key: value}
    path.write_text(json.dumps(values) if path.suffix == ".json" else yaml.safe_dump(values))
    with pytest.raises(FormatError, match=message):
        CrossLayerTranscoder.from_pretrained(made.folder)


@pytest.mark.parametrize("name", ["manifest.json", "model_config.json"])
def test_layouts_that_could_not_be_verified_are_named(name: str, tmp_path: Path):
    (tmp_path / name).write_text("{}")
    save_file({"W_enc": rand(2, 2)}, tmp_path / "clt.safetensors")
    with pytest.raises(FormatError, match=name):
        CrossLayerTranscoder.from_pretrained(tmp_path)


def test_a_missing_layer_of_sparsifys_is_named(tmp_path: Path):
    made = sparsify(tmp_path / "set")
    (made.folder / "layers.1.mlp").rename(tmp_path / "elsewhere")
    with pytest.raises(FormatError, match=r"layers\.2\.mlp but nothing of layer 1"):
        CrossLayerTranscoder.from_pretrained(made.folder)


def test_a_listed_file_that_is_missing_is_named(tmp_path: Path):
    made = gemma_scope_2(tmp_path / "set")
    next(made.folder.glob("layer_1*/params.safetensors")).unlink()
    with pytest.raises(FormatError, match="layer_1_width_16k_l0_small_affine"):
        CrossLayerTranscoder.from_pretrained(made.folder)


@pytest.mark.parametrize("name", ["h.{}.mlp", "model.layers.{}.mlp", "transformer.h.{}.mlp"])
def test_sparsify_names_layers_as_the_model_does(tmp_path: Path, name: str):
    made = sparsify(tmp_path / "set")
    wanted = CrossLayerTranscoder.from_pretrained(tmp_path / "set").W_enc
    for i in range(len(wanted)):
        (tmp_path / "set" / f"layers.{i}.mlp").rename(tmp_path / "set" / name.format(i))
    clt = CrossLayerTranscoder.from_pretrained(tmp_path / "set")
    assert torch.equal(clt.W_enc, wanted) and (clt.cfg.input_hook, clt.cfg.output_hook) == made.hooks
