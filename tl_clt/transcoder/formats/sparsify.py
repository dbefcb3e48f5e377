"""sparsify's transcoders, for reading: a folder a layer with `cfg.json` and `sae.safetensors`, named as the model names
its MLPs: `layers.{i}.mlp`, `h.{i}.mlp`, either with what the model puts in front (`model.layers.{i}.mlp`).

encoder.weight [d_transcoder, d_model], encoder.bias, W_dec [d_transcoder, d_model], b_dec and where present W_skip
[d_model, d_model], used as `x @ W_skip.T`; the k largest positive pre-activations of a token are kept. They read and
write the MLP module itself (`mlp.hook_in`, `mlp.hook_out`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from tl_clt.errors import FormatError
from tl_clt.files import read_config
from tl_clt.transcoder.config import CrossLayerTranscoderConfig
from tl_clt.transcoder.decoders import DecoderFile
from tl_clt.transcoder.formats.per_layer import LayerNames, load_layers
from tl_clt.transcoder.transcoder import CrossLayerTranscoder

WEIGHTS = "sae.safetensors"
FOLDER = r"(?:[\w.]+\.)?(?:layers|h)\.(\d+)\.mlp"
NAMES = LayerNames("encoder.weight", "encoder.bias", "b_dec", None, "W_skip", True, True)


def recognises(folder: Path) -> bool:
    """Whether the folder holds this layout's files."""
    return any(re.fullmatch(FOLDER, path.parent.name) for path in folder.glob(f"*.mlp/{WEIGHTS}"))


def load(folder: Path, *, device: torch.device, dtype: str | None, lazy_decoder: bool) -> CrossLayerTranscoder:
    """Read a set of per-layer transcoders from this layout."""
    found = {int(m[1]): p for p in folder.iterdir() if (m := re.fullmatch(FOLDER, p.name))}
    missing = next((layer for layer in range(len(found)) if layer not in found), None)
    if missing is not None:
        raise FormatError(
            f"'{folder}' has {found[max(found)].name} but nothing of layer {missing}: a graph needs a transcoder of"
            " every layer. Copy or download the set again, whole, or train the layers that are missing."
        )
    configs = [read_config(found[layer] / "cfg.json") for layer in range(len(found))]
    for layer, values in enumerate(configs):
        _check(values, found[layer] / "cfg.json")
    k = {values.get("k") for values in configs}
    if len(k) > 1:
        raise FormatError(f"'{folder}': layers keep different numbers of features ({sorted(map(str, k))}): one k only.")
    files = [found[layer] / WEIGHTS for layer in range(len(found))]

    def decoder_file(source: int, cfg: CrossLayerTranscoderConfig) -> DecoderFile:
        return DecoderFile(files[source], "W_dec")

    def config(**from_files: Any) -> CrossLayerTranscoderConfig:
        return CrossLayerTranscoderConfig(input_hook="mlp.hook_in", output_hook="mlp.hook_out", **from_files)

    return load_layers(
        files,
        lambda _: NAMES,
        decoder_file,
        config,
        span=1,
        activation="topk",
        k=k.pop(),
        device=device,
        dtype=dtype,
        lazy_decoder=lazy_decoder,
    )


def _check(values: dict[str, Any], path: Path) -> None:
    if values.get("transcode") is not True:
        raise FormatError(
            f"'{path}' does not say that it is a transcoder (transcode: true), so that it may be a sparse"
            " autoencoder, which reads what it writes. If its makers call it a transcoder, add the key."
        )
    if values.get("activation", "topk") != "topk":
        raise FormatError(f"'{path}': activation {values['activation']!r} is not supported; only topk is.")
    if not isinstance(values.get("k"), int):
        raise FormatError(f"'{path}' gives no k, the number of features kept a token. Copy or download it again.")
