"""circuit-tracer's set of per-layer transcoders (`transcoder_set`): a CLT of span 1.

`layer_{i}.safetensors`: W_enc [d_transcoder, d_model], W_dec [d_transcoder, d_model], b_enc, b_dec, and where
present activation_function.threshold (JumpReLU) and W_skip [d_model, d_model], used as `x @ W_skip.T`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from tl_clt.transcoder.decoders import DecoderFile
from tl_clt.transcoder.formats import circuit_tracer_config
from tl_clt.transcoder.formats.reading import numbered_files, open_tensors, read_decoders
from tl_clt.transcoder.transcoder import CrossLayerTranscoder

MODEL_KIND = "transcoder_set"
THRESHOLD = "activation_function.threshold"


def recognises(folder: Path) -> bool:
    """Whether the folder holds this layout's files."""
    return any(folder.glob("layer_*.safetensors"))


def load(folder: Path, *, device: torch.device, dtype: str | None, lazy_decoder: bool) -> CrossLayerTranscoder:
    """Read a set of per-layer transcoders from this layout."""
    files = numbered_files(folder, "layer_")
    with open_tensors(files[0]) as tensors:
        d_transcoder, d_model = tensors.shape("W_enc")
        activation = "jumprelu" if THRESHOLD in tensors.keys else "relu"
        skip = "W_skip" in tensors.keys
        stored_dtype = tensors.dtype("W_enc")
    cfg = circuit_tracer_config.read(
        folder,
        n_layers=len(files),
        d_model=d_model,
        d_transcoder=d_transcoder,
        span=1,
        activation=activation,
        skip=skip,
        dtype=stored_dtype,
    )
    cfg = cfg if dtype is None else replace(cfg, dtype=dtype)
    decoders = read_decoders(
        [DecoderFile(path, "W_dec") for path in files],
        [1] * len(files),
        d_transcoder,
        d_model,
        dtype=getattr(torch, cfg.dtype),
        device=device,
        lazy=lazy_decoder,
    )
    clt = CrossLayerTranscoder(cfg, decoders).to(device)
    for i, path in enumerate(files):
        with open_tensors(path) as tensors, torch.no_grad():
            clt.W_enc[i] = tensors.tensor("W_enc", (d_transcoder, d_model)).T
            clt.b_enc[i] = tensors.tensor("b_enc", (d_transcoder,))
            clt.b_dec[i] = tensors.tensor("b_dec", (d_model,))
            if clt.threshold is not None:
                clt.threshold[i] = tensors.tensor(THRESHOLD, (d_transcoder,))
            else:
                tensors.refuse([THRESHOLD])
            if clt.W_skip is not None:
                clt.W_skip[i] = tensors.tensor("W_skip", (d_model, d_model)).T
            else:
                tensors.refuse(["W_skip"])
    return clt


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
