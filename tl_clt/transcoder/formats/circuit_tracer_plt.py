"""Sets of per-layer transcoders (circuit-tracer's `transcoder_set`): a CLT of span 1.

`layer_{i}.safetensors`: W_enc [d_transcoder, d_model], W_dec [d_transcoder, d_model], b_enc, b_dec, and where
present activation_function.threshold (JumpReLU) and W_skip [d_model, d_model], used as `x @ W_skip.T`.

Or a `config.yaml` whose `transcoders:` lists each layer's file: `hf://owner/repo/path?revision=R`, which may be of
another repository, or a path here (a folder stands for the `params.safetensors` or `params.npz` in it). Such files may
be of other makers, told by what they hold: Gemma Scope 1's `params.npz` (W_enc [d_model, d_transcoder], W_dec, b_enc,
b_dec, threshold) and Gemma Scope 2's `params.safetensors` (w_enc [d_model, d_transcoder], w_dec, b_enc, b_dec,
threshold, affine_skip_connection [d_model, d_model] used as `x @ W`). With `model_kind: cross_layer_transcoder` the
list names the files of a Gemma Scope 2 CLT.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tl_clt.errors import FormatError
from tl_clt.files import read_config, reading
from tl_clt.transcoder import hub
from tl_clt.transcoder.config import CrossLayerTranscoderConfig
from tl_clt.transcoder.decoders import DecoderFile
from tl_clt.transcoder.formats import gemma_scope
from tl_clt.transcoder.formats.per_layer import (
    LayerNames,
    check_activation,
    load_layers,
    numbered_files,
    read_yaml_config,
    write_yaml_config,
)
from tl_clt.transcoder.tensor_files import TensorFile, open_tensors
from tl_clt.transcoder.transcoder import CrossLayerTranscoder

MODEL_KIND = "transcoder_set"
THRESHOLD = "activation_function.threshold"
CIRCUIT_TRACER = LayerNames("W_enc", "b_enc", "b_dec", THRESHOLD, "W_skip", True, True)
GEMMA_SCOPE_1 = LayerNames("W_enc", "b_enc", "b_dec", "threshold", None, False, False, always_threshold=True)
GEMMA_SCOPE_2 = gemma_scope.NAMES
FILES = ("params.safetensors", "params.npz")
"""What a folder of one layer holds, in Gemma Scope 2 and 1."""


def recognises(folder: Path) -> bool:
    """Whether the folder holds this layout's files."""
    return any(folder.glob("layer_*.safetensors")) or "transcoders" in read_config(folder / "config.yaml")


def names_in(tensors: TensorFile) -> LayerNames:
    """Whose names a layer's file uses."""
    if "w_enc" in tensors.keys:
        return GEMMA_SCOPE_2
    return GEMMA_SCOPE_1 if tensors.path.suffix == ".npz" else CIRCUIT_TRACER


def listed_files(folder: Path, listed: Any) -> list[Path]:
    """The files that a `transcoders:` list names, each of them fetched if it is on the hub.

    Raises:
        FormatError: it is no list of names, or names what is neither here nor on the hub.
    """
    config = folder / "config.yaml"
    if not isinstance(listed, list) or not listed or not all(isinstance(entry, str) for entry in listed):
        raise FormatError(f"'{config}': transcoders must list one file or folder a layer. Copy or download it again.")
    files = []
    for entry in listed:
        if entry.startswith(hub.URI):
            files.append(hub.fetch_file(hub.parse(entry)))
            continue
        path = folder / entry
        with reading(config, "list of files"):
            if path.is_dir():
                path = next((path / name for name in FILES if (path / name).is_file()), path / FILES[0])
            is_here = path.is_file()
        if not is_here:
            raise FormatError(f"'{path}', which '{config}' lists, is missing. Copy or download the set again, whole.")
        files.append(path)
    return files


def load(folder: Path, *, device: torch.device, dtype: str | None, lazy_decoder: bool) -> CrossLayerTranscoder:
    """Read a set of per-layer transcoders from this layout."""
    values = read_config(folder / "config.yaml")
    listed = "transcoders" in values
    files = listed_files(folder, values["transcoders"]) if listed else numbered_files(folder, "layer_")
    kind = values.get("model_kind", MODEL_KIND)
    if kind == "cross_layer_transcoder" and listed:
        return gemma_scope.load_files(folder, files, device=device, dtype=dtype, lazy_decoder=lazy_decoder)
    if kind != MODEL_KIND:
        raise FormatError(f"'{folder / 'config.yaml'}': model_kind is {kind!r}, but the files are a {MODEL_KIND}.")
    names = []
    for path in files:
        with open_tensors(path) as tensors:
            names.append(names_in(tensors))
    defaults: dict[str, Any] = {"beside": files[0].parent}
    if names[0] is GEMMA_SCOPE_2:
        defaults["input_hook"] = "mlp.hook_in"
    if names[0] is GEMMA_SCOPE_1:
        defaults["input_hook"] = "ln2.hook_normalized"

    def decoder_file(source: int, cfg: CrossLayerTranscoderConfig) -> DecoderFile:
        return DecoderFile(files[source], names[source].W_dec)

    activation, k = stated_activation(values, folder)
    return load_layers(
        files,
        names_in,
        decoder_file,
        partial(read_yaml_config, folder, **defaults),
        span=1,
        activation=activation,
        k=k,
        device=device,
        dtype=dtype,
        lazy_decoder=lazy_decoder,
    )


def stated_activation(values: dict[str, Any], folder: Path) -> tuple[str | None, int | None]:
    """Activation and k where `config.yaml` has `activation: topk` with a `k`; nothing where it is silent.

    Raises:
        FormatError: it names an activation that the weights do not tell and that this package does not know.
    """
    stated = values.get("activation", values.get("activation_function"))
    if stated in (None, "relu", "jumprelu", "jump_relu"):
        return None, None
    if stated != "topk" or not isinstance(values.get("k"), int):
        raise FormatError(
            f"'{folder / 'config.yaml'}': activation {stated!r} with k {values.get('k')!r} cannot be read: give relu,"
            " jumprelu, or topk with k, the number of features kept a token."
        )
    return "topk", values["k"]


def save(clt: CrossLayerTranscoder, folder: Path) -> None:
    """Write a set of per-layer transcoders in this layout."""
    for i in clt.layers:
        tensors = {
            "W_enc": clt.W_enc[i].T,
            "W_dec": clt.W_dec[i][:, 0],
            "b_enc": clt.b_enc[i],
            "b_dec": clt.b_dec[i],
        }
        if clt.threshold is not None:
            tensors[THRESHOLD] = clt.threshold[i]
        if clt.W_skip is not None:
            tensors["W_skip"] = clt.W_skip[i].T
        ready = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        save_file(ready, folder / f"layer_{i}.safetensors")
    write_yaml_config(clt, folder, MODEL_KIND)


def check_can_express(clt: CrossLayerTranscoder) -> None:
    """Raise unless this layout can hold the transcoders."""
    check_activation(clt)
