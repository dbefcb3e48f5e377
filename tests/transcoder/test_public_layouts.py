"""Layouts of public sets: each written as its maker writes it, a few features wide, and read against the formula."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.transcoder.layouts import (
    LAYOUTS,
    D,
    F,
    K,
    L,
    Made,
    gemma_scope_1,
    gemma_scope_2,
    llamascopium,
    qwen3,
    rand,
    sparsify,
    topk_set,
)
from tl_clt.errors import FormatError
from tl_clt.transcoder import CrossLayerTranscoder, hub


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
