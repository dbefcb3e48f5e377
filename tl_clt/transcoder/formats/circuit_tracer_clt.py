"""circuit-tracer's CLT folder.

`W_enc_{i}.safetensors`: W_enc_{i} [d_transcoder, d_model], b_enc_{i}, b_dec_{i} (of output layer i), and
threshold_{i} for JumpReLU. `W_dec_{i}.safetensors`: W_dec_{i} [d_transcoder, n_layers - i, d_model], slot j
writing layer i + j. A span below n_layers is written with zero slots, and read back by our key in config.yaml.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from tl_clt.errors import FormatError
from tl_clt.transcoder.config import CrossLayerTranscoderConfig
from tl_clt.transcoder.decoders import DecoderFile
from tl_clt.transcoder.formats.per_layer import (
    LayerNames,
    check_activation,
    load_layers,
    numbered_files,
    read_yaml_config,
    write_yaml_config,
)
from tl_clt.transcoder.transcoder import CrossLayerTranscoder

MODEL_KIND = "cross_layer_transcoder"
NAMES = LayerNames("W_enc_{i}", "b_enc_{i}", "b_dec_{i}", "threshold_{i}", None, True, True)


def recognises(folder: Path) -> bool:
    """Whether the folder holds this layout's files."""
    return any(folder.glob("W_enc_*.safetensors"))


def load(folder: Path, *, device: torch.device, dtype: str | None, lazy_decoder: bool) -> CrossLayerTranscoder:
    """Read a CLT from this layout."""
    files = numbered_files(folder, "W_enc_")
    n_layers = len(files)

    def decoder_file(source: int, cfg: CrossLayerTranscoderConfig) -> DecoderFile:
        unused = n_layers - source - len(cfg.targets(source))
        return DecoderFile(folder / f"W_dec_{source}.safetensors", f"W_dec_{source}", unused_slots=unused)

    return load_layers(
        files,
        lambda _: NAMES,
        decoder_file,
        partial(read_yaml_config, folder),
        span=n_layers,
        device=device,
        dtype=dtype,
        lazy_decoder=lazy_decoder,
    )


def save(clt: CrossLayerTranscoder, folder: Path) -> None:
    """Write a CLT in this layout."""
    n_layers = clt.cfg.n_layers
    for i in clt.layers:
        encoder = {f"W_enc_{i}": clt.W_enc[i].T, f"b_enc_{i}": clt.b_enc[i], f"b_dec_{i}": clt.b_dec[i]}
        if clt.threshold is not None:
            encoder[f"threshold_{i}"] = clt.threshold[i]
        W_dec = clt.W_dec[i].detach()
        unwritten = W_dec.new_zeros(W_dec.shape[0], n_layers - i - W_dec.shape[1], W_dec.shape[2])
        decoder = {f"W_dec_{i}": torch.cat([W_dec, unwritten], dim=1)}
        for name, tensors in (("W_enc", encoder), ("W_dec", decoder)):
            ready = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
            save_file(ready, folder / f"{name}_{i}.safetensors")
    write_yaml_config(clt, folder, MODEL_KIND)


def check_can_express(clt: CrossLayerTranscoder) -> None:
    """Raise unless this layout can hold the CLT."""
    check_activation(clt)
    if clt.W_skip is not None:
        raise FormatError(
            "circuit-tracer's CLT layout has no skip connection: its weights would be lost."
            " Save it with layout='native'."
        )
