"""Files that are broken, missing, mixed or foreign raise FormatError with the mend; a failed save leaves nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import tiny_clt
from tl_clt.errors import ConfigError, FormatError, OutputNotEmpty
from tl_clt.transcoder import CrossLayerTranscoder
from tl_clt.transcoder.formats import circuit_tracer_clt, circuit_tracer_plt, native

N_LAYERS, D_MODEL = 3, 8


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A CLT in circuit-tracer's layout."""
    return tiny_clt((N_LAYERS, D_MODEL)).save_pretrained(tmp_path / "clt", "circuit-tracer")


@pytest.fixture
def native_folder(tmp_path: Path) -> Path:
    return tiny_clt((N_LAYERS, D_MODEL)).save_pretrained(tmp_path / "native")


def truncate(path: Path, keep: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("name", ["W_enc_0", "W_enc_2", "W_dec_0", "W_dec_1"])
@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_named(folder: Path, name: str, keep: float, lazy: bool):
    truncate(folder / f"{name}.safetensors", keep)
    with pytest.raises(FormatError, match=rf"{name}\.safetensors' is truncated or no safetensors file"):
        CrossLayerTranscoder.from_pretrained(folder, lazy_decoder=lazy)


def test_a_truncated_native_file_is_named(native_folder: Path):
    truncate(native_folder / "clt.safetensors")
    with pytest.raises(FormatError, match=r"clt\.safetensors' is truncated"):
        CrossLayerTranscoder.from_pretrained(native_folder)


def test_a_text_file_in_place_of_weights_is_named(folder: Path):
    (folder / "W_enc_1.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n" * 20)
    with pytest.raises(FormatError, match=r"W_enc_1\.safetensors' is truncated or no safetensors file"):
        CrossLayerTranscoder.from_pretrained(folder)


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["W_enc", "b_enc", "b_dec", "threshold", "W_dec.1"])
def test_weights_that_are_not_finite_are_refused(native_folder: Path, name: str, value: float, lazy: bool):
    path = native_folder / "clt.safetensors"
    weights = load_file(path)
    weights[name].view(-1)[3] = value
    save_file(weights, path)
    with pytest.raises(FormatError, match=r"is not finite everywhere.*get it anew"):
        clt = CrossLayerTranscoder.from_pretrained(native_folder, lazy_decoder=lazy)
        clt.decoder_rows(1, range(clt.cfg.d_transcoder))  # decoders on disk are read here


@pytest.mark.parametrize("missing", [0, 1])
def test_a_missing_encoder_below_the_last_is_named(folder: Path, missing: int):
    (folder / f"W_enc_{missing}.safetensors").unlink()
    with pytest.raises(FormatError, match=rf"lacks W_enc_{missing}\.safetensors"):
        CrossLayerTranscoder.from_pretrained(folder)


def test_a_missing_last_layer_is_seen_by_our_config(folder: Path):
    (folder / "W_enc_2.safetensors").unlink()
    with pytest.raises(FormatError, match=r"says n_layers 3, but the weight files have 2"):
        CrossLayerTranscoder.from_pretrained(folder)


def test_a_missing_last_layer_is_seen_by_the_decoders_shape(folder: Path):
    """Without our config only the decoders tell how many layers there were."""
    (folder / "config.yaml").unlink()
    (folder / "W_enc_2.safetensors").unlink()
    with pytest.raises(FormatError, match=r"W_dec_0 has shape \[24, 3, 8\], but \[24, 2, 8\]"):
        CrossLayerTranscoder.from_pretrained(folder)


@pytest.mark.parametrize("missing", range(N_LAYERS))
def test_a_missing_decoder_is_named(folder: Path, missing: int):
    (folder / f"W_dec_{missing}.safetensors").unlink()
    with pytest.raises(FormatError, match=rf"W_dec_{missing}\.safetensors' is missing"):
        CrossLayerTranscoder.from_pretrained(folder)


@pytest.mark.parametrize(
    ("tensor", "wrong"),
    [
        ("W_enc_1", (24, 9)),
        ("W_enc_1", (8, 24)),
        ("b_enc_1", (23,)),
        ("b_dec_2", (24,)),
        ("threshold_0", (1,)),
        ("W_dec_1", (24, 1, 8)),
        ("W_dec_1", (24, 2, 9)),
        ("W_dec_0", (24, 8)),
        ("W_dec_2", (24, 2, 8)),
    ],
)
def test_a_tensor_of_a_wrong_shape_is_named(folder: Path, tensor: str, wrong: tuple[int, ...]):
    layer = tensor[-1]
    path = folder / f"{'W_dec' if 'W_dec' in tensor else 'W_enc'}_{layer}.safetensors"
    save_file({**load_file(path), tensor: torch.zeros(*wrong)}, path)
    with pytest.raises(FormatError, match=rf"{tensor} has shape .* was expected"):
        CrossLayerTranscoder.from_pretrained(folder)


@pytest.mark.parametrize("tensor", ["b_enc_1", "b_dec_1", "threshold_1"])
def test_a_missing_tensor_is_named(folder: Path, tensor: str):
    path = folder / "W_enc_1.safetensors"
    save_file({k: v for k, v in load_file(path).items() if k != tensor}, path)
    with pytest.raises(FormatError, match=rf"has no tensor '{tensor}'"):
        CrossLayerTranscoder.from_pretrained(folder)


def test_thresholds_in_later_layers_only_are_no_relu_clt(folder: Path):
    (folder / "config.yaml").unlink()
    path = folder / "W_enc_0.safetensors"
    save_file({k: v for k, v in load_file(path).items() if k != "threshold_0"}, path)
    with pytest.raises(FormatError, match="threshold"):
        CrossLayerTranscoder.from_pretrained(folder)


@pytest.mark.parametrize("tensor", ["W_skip", "activation_function.threshold"])
@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_per_layer_transcoders_of_two_kinds_are_mixed(tensor: str, layer: int, tmp_path: Path):
    clt = tiny_clt((N_LAYERS, D_MODEL), span=1, skip=True)
    folder = clt.save_pretrained(tmp_path / "plt", "circuit-tracer")
    (folder / "config.yaml").unlink()
    path = folder / f"layer_{layer}.safetensors"
    save_file({k: v for k, v in load_file(path).items() if k != tensor}, path)
    with pytest.raises(FormatError, match=f"'{tensor}'"):
        CrossLayerTranscoder.from_pretrained(folder)


def test_a_file_of_another_clt_among_them_is_named(folder: Path, tmp_path: Path):
    other = tiny_clt((N_LAYERS, D_MODEL), d_transcoder=12).save_pretrained(tmp_path / "other", "circuit-tracer")
    (folder / "W_dec_1.safetensors").write_bytes((other / "W_dec_1.safetensors").read_bytes())
    with pytest.raises(FormatError, match=r"W_dec_1 has shape \[12, 2, 8\], but \[24, 2, 8\]"):
        CrossLayerTranscoder.from_pretrained(folder)


def test_the_config_of_another_clt_is_named(folder: Path, tmp_path: Path):
    other = tiny_clt((N_LAYERS, D_MODEL), d_transcoder=12).save_pretrained(tmp_path / "other", "circuit-tracer")
    (folder / "config.yaml").write_bytes((other / "config.yaml").read_bytes())
    with pytest.raises(FormatError, match="says d_transcoder 12, but the weight files have 24"):
        CrossLayerTranscoder.from_pretrained(folder)


@pytest.mark.parametrize("key", ["n_layers", "d_model", "d_transcoder"])
def test_a_native_config_that_does_not_fit_its_weights_raises(native_folder: Path, key: str):
    values = json.loads((native_folder / "cfg.json").read_text())
    values |= {key: values[key] + 1, "span": 1}
    (native_folder / "cfg.json").write_text(json.dumps(values))
    with pytest.raises(FormatError, match=r"clt\.safetensors'"):
        CrossLayerTranscoder.from_pretrained(native_folder)


@pytest.mark.parametrize("change", [{"n_layers": 2, "span": 2}, {"span": 2}, {"activation": "relu"}])
def test_a_native_config_that_leaves_weights_out_raises(native_folder: Path, change: dict):
    """Weights that no part of the CLT would use are a sign of the wrong config."""
    values = json.loads((native_folder / "cfg.json").read_text()) | change
    (native_folder / "cfg.json").write_text(json.dumps(values))
    with pytest.raises(FormatError, match=r"clt\.safetensors'"):
        CrossLayerTranscoder.from_pretrained(native_folder)


def test_an_unknown_key_in_a_native_config_raises_with_the_nearest(native_folder: Path):
    values = json.loads((native_folder / "cfg.json").read_text()) | {"d_transcodr": 3}
    (native_folder / "cfg.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="'d_transcodr' is no key .* Nearest: 'd_transcoder'"):
        CrossLayerTranscoder.from_pretrained(native_folder)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "\x00\x01", "null"])
def test_a_native_config_that_is_no_mapping_is_named(native_folder: Path, text: str):
    (native_folder / "cfg.json").write_text(text)
    with pytest.raises(FormatError, match=r"cfg\.json'"):
        CrossLayerTranscoder.from_pretrained(native_folder)


@pytest.mark.parametrize("content", [b"a: [", b"- 1\n- 2\n", b"just words", b"\xff\xfe\x00", b"tl_clt: 3\n"])
def test_a_config_yaml_that_is_no_mapping_is_named(folder: Path, content: bytes):
    (folder / "config.yaml").write_bytes(content)
    with pytest.raises(FormatError, match=r"config\.yaml'"):
        CrossLayerTranscoder.from_pretrained(folder)


def test_yaml_runs_no_code(folder: Path, tmp_path: Path):
    touched = tmp_path / "touched"
    (folder / "config.yaml").write_text(f"model_name: !!python/object/apply:pathlib.Path.touch ['{touched}']\n")
    with pytest.raises(FormatError, match=r"config\.yaml' cannot be read"):
        CrossLayerTranscoder.from_pretrained(folder)
    assert not touched.exists()


def test_aliases_that_stand_for_more_than_memory_holds_are_refused(folder: Path):
    lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30))]
    (folder / "config.yaml").write_text("\n".join([*lines, "tl_clt: {scan: *a29}"]))
    with pytest.raises(FormatError, match=r"config\.yaml' cannot be read .*alias of a list"):
        CrossLayerTranscoder.from_pretrained(folder)


@pytest.mark.parametrize("change", [{"n_layers": 10**12}, {"d_model": 10**9, "skip": True}, {"d_transcoder": 2**62}])
def test_sizes_that_only_the_config_states_take_no_memory(native_folder: Path, change: dict):
    values = json.loads((native_folder / "cfg.json").read_text()) | change | {"span": 1}
    (native_folder / "cfg.json").write_text(json.dumps(values))
    with pytest.raises(FormatError, match="W_enc has shape"):
        CrossLayerTranscoder.from_pretrained(native_folder)


@pytest.mark.parametrize("kind", ["cross_layer_transcoder", "transcoder_set"])
def test_weights_of_a_number_type_that_is_none_of_ours_raise(kind: str, tmp_path: Path):
    zeros = {"W_enc": torch.zeros(4, 2), "b_enc": torch.zeros(4), "b_dec": torch.zeros(2)}
    if kind == "transcoder_set":
        save_file(
            {k: v.to(torch.int8) for k, v in zeros.items()} | {"W_dec": torch.zeros(4, 2)},
            tmp_path / "layer_0.safetensors",
        )
    else:
        save_file({f"{k}_0": v.to(torch.int8) for k, v in zeros.items()}, tmp_path / "W_enc_0.safetensors")
        save_file({"W_dec_0": torch.zeros(4, 1, 2)}, tmp_path / "W_dec_0.safetensors")
    with pytest.raises(ConfigError, match="dtype is 'int8'"):
        CrossLayerTranscoder.from_pretrained(tmp_path)


def test_a_folder_of_no_known_layout_says_which_are_known(tmp_path: Path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(FormatError, match=r"known layout: native .* circuit-tracer .* Gemma Scope 2"):
        CrossLayerTranscoder.from_pretrained(tmp_path)


def test_a_file_is_no_folder(native_folder: Path):
    with pytest.raises(FormatError, match="is a file: give the folder"):
        CrossLayerTranscoder.from_pretrained(native_folder / "clt.safetensors")


@pytest.mark.parametrize("repo", ["nobody/nothing", "no-such-folder", "/no/such/folder", "a/b/c/d", "with space"])
def test_an_unknown_repo_says_that_it_is_neither_folder_nor_reachable(repo: str):
    with pytest.raises(FormatError, match="neither a folder here nor a hub repository that can be reached"):
        CrossLayerTranscoder.from_pretrained(repo)


def test_an_unknown_dtype_raises(native_folder: Path):
    with pytest.raises(ConfigError, match="dtype is 'int8': give one of"):
        CrossLayerTranscoder.from_pretrained(native_folder, dtype=torch.int8)


# -- saving ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("span", [1, N_LAYERS])
def test_topk_is_refused_by_circuit_tracers_layout(span: int, tmp_path: Path):
    with pytest.raises(FormatError, match="no topk"):
        tiny_clt((N_LAYERS, D_MODEL), activation="topk", span=span).save_pretrained(tmp_path / "x", "circuit-tracer")
    assert list(tmp_path.iterdir()) == []


def test_skip_is_refused_by_circuit_tracers_clt_layout(tmp_path: Path):
    with pytest.raises(FormatError, match="no skip connection"):
        tiny_clt((N_LAYERS, D_MODEL), skip=True).save_pretrained(tmp_path / "x", "circuit-tracer")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("as_users_run_it")
def test_an_unknown_layout_is_refused(tmp_path: Path):
    with pytest.raises(FormatError, match="'pickle' is no layout to save in: give one of native, circuit-tracer"):
        tiny_clt((N_LAYERS, D_MODEL)).save_pretrained(tmp_path / "x", "pickle")  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ["native", "circuit-tracer"])
def test_a_folder_that_holds_something_is_refused_and_kept(layout: str, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(OutputNotEmpty, match="is not empty"):
        tiny_clt((N_LAYERS, D_MODEL)).save_pretrained(tmp_path / "out", layout)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_file_in_the_place_of_the_folder_is_refused_and_kept(tmp_path: Path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputNotEmpty):
        tiny_clt((N_LAYERS, D_MODEL)).save_pretrained(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_an_empty_folder_is_taken(tmp_path: Path):
    (tmp_path / "out").mkdir()
    tiny_clt((N_LAYERS, D_MODEL)).save_pretrained(tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"cfg.json", "clt.safetensors"}


@pytest.mark.parametrize(
    ("module", "layout", "span", "fails_at"),
    [
        (native, "native", 3, 1),
        (circuit_tracer_clt, "circuit-tracer", 3, 4),
        (circuit_tracer_plt, "circuit-tracer", 1, 2),
    ],
)
@pytest.mark.parametrize("existed", [False, True])
def test_a_full_disk_leaves_nothing_behind(module, layout, span, fails_at, existed, tmp_path: Path, monkeypatch):
    calls = []

    def save_until_full(tensors, path):
        calls.append(path)
        if len(calls) == fails_at:
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(module, "save_file", save_until_full)
    if existed:
        (tmp_path / "out").mkdir()
    with pytest.raises(OSError, match="No space left"):
        tiny_clt((N_LAYERS, D_MODEL), span=span).save_pretrained(tmp_path / "out", layout)
    assert len(calls) == fails_at
    assert [p.name for p in tmp_path.rglob("*")] == (["out"] if existed else [])
