"""Gemma Scope 2 CLT files, for reading: `params_layer_{i}.safetensors`, one source layer a file.

w_enc [d_model, d_transcoder], w_dec [d_transcoder, n_layers, d_model] (slot t writes layer t; those before the
source are unused), b_enc, b_dec, threshold, and where present affine_skip_connection [d_model, d_model] used as
`x @ W`. They read `mlp.hook_in`, what the MLP is given after the norm's gain, and write `hook_mlp_out`, after the norm
behind the MLP, unless a `config.yaml` or `config.json` (`hf_hook_point_in`, `hf_hook_point_out`) beside them says so.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from tl_clt.transcoder.config import CrossLayerTranscoderConfig
from tl_clt.transcoder.decoders import DecoderFile
from tl_clt.transcoder.formats.per_layer import LayerNames, load_layers, numbered_files, read_yaml_config
from tl_clt.transcoder.transcoder import CrossLayerTranscoder

NAMES = LayerNames("w_enc", "b_enc", "b_dec", "threshold", "affine_skip_connection", False, False, "w_dec", True)


def recognises(folder: Path) -> bool:
    """Whether the folder holds this layout's files."""
    return any(folder.glob("params_layer_*.safetensors"))


def load(folder: Path, *, device: torch.device, dtype: str | None, lazy_decoder: bool) -> CrossLayerTranscoder:
    """Read a CLT from this layout."""
    files = numbered_files(folder, "params_layer_")
    return load_files(folder, files, device=device, dtype=dtype, lazy_decoder=lazy_decoder)


def load_files(
    folder: Path, files: list[Path], *, device: torch.device, dtype: str | None, lazy_decoder: bool
) -> CrossLayerTranscoder:
    """Read a CLT from its layers' files, with the `config.yaml` of `folder` if there is one."""

    def decoder_file(source: int, cfg: CrossLayerTranscoderConfig) -> DecoderFile:
        unused = len(files) - source - len(cfg.targets(source))
        return DecoderFile(files[source], "w_dec", first_slot=source, unused_slots=unused)

    return load_layers(
        files,
        lambda _: NAMES,
        decoder_file,
        partial(read_yaml_config, folder, input_hook="mlp.hook_in", beside=files[0].parent),
        span=len(files),
        device=device,
        dtype=dtype,
        lazy_decoder=lazy_decoder,
    )
