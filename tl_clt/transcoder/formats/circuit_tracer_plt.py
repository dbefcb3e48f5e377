"""circuit-tracer's set of per-layer transcoders (`transcoder_set`): a CLT of span 1.

`layer_{i}.safetensors`: W_enc [d_transcoder, d_model], W_dec [d_transcoder, d_model], b_enc, b_dec, and where
present activation_function.threshold (JumpReLU) and W_skip [d_model, d_model], used as `x @ W_skip.T`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from tl_clt.transcoder.config import CrossLayerTranscoderConfig
from tl_clt.transcoder.decoders import DecoderFile
from tl_clt.transcoder.formats import circuit_tracer_config
from tl_clt.transcoder.formats.per_layer import LayerNames, load_layers
from tl_clt.transcoder.formats.reading import numbered_files
from tl_clt.transcoder.transcoder import CrossLayerTranscoder

MODEL_KIND = "transcoder_set"
THRESHOLD = "activation_function.threshold"
NAMES = LayerNames("W_enc", "b_enc", "b_dec", THRESHOLD, W_skip="W_skip", outputs_first=True)


def recognises(folder: Path) -> bool:
    """Whether the folder holds this layout's files."""
    return any(folder.glob("layer_*.safetensors"))


def load(folder: Path, *, device: torch.device, dtype: str | None, lazy_decoder: bool) -> CrossLayerTranscoder:
    """Read a set of per-layer transcoders from this layout."""
    files = numbered_files(folder, "layer_")

    def decoder_file(source: int, cfg: CrossLayerTranscoderConfig) -> DecoderFile:
        return DecoderFile(files[source], "W_dec")

    return load_layers(
        folder, files, NAMES, decoder_file, span=1, device=device, dtype=dtype, lazy_decoder=lazy_decoder
    )


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
    circuit_tracer_config.write(clt, folder, MODEL_KIND)


def check_can_express(clt: CrossLayerTranscoder) -> None:
    """Raise unless this layout can hold the transcoders."""
    circuit_tracer_config.check_activation(clt)
