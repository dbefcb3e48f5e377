"""Gemma Scope 2 CLT files, for reading: `params_layer_{i}.safetensors`, one source layer a file.

w_enc [d_model, d_transcoder], w_dec [d_transcoder, n_layers, d_model] (slot t writes layer t; those before the
source are unused), b_enc, b_dec, threshold, and where present affine_skip_connection [d_model, d_model] used as
`x @ W`. Hooks and model name are taken from a `config.yaml` beside them where there is one.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from tl_clt.transcoder.decoders import DecoderFile
from tl_clt.transcoder.formats import circuit_tracer_config
from tl_clt.transcoder.formats.reading import numbered_files, open_tensors, read_decoders
from tl_clt.transcoder.transcoder import CrossLayerTranscoder

SKIP = "affine_skip_connection"


def recognises(folder: Path) -> bool:
    """Whether the folder holds this layout's files."""
    return any(folder.glob("params_layer_*.safetensors"))


def load(folder: Path, *, device: torch.device, dtype: str | None, lazy_decoder: bool) -> CrossLayerTranscoder:
    """Read a CLT from this layout."""
    files = numbered_files(folder, "params_layer_")
    with open_tensors(files[0]) as tensors:
        d_model, d_transcoder = tensors.shape("w_enc")
        skip = SKIP in tensors.keys
        stored_dtype = tensors.dtype("w_enc")
    n_layers = len(files)
    cfg = circuit_tracer_config.read(
        folder,
        n_layers=n_layers,
        d_model=d_model,
        d_transcoder=d_transcoder,
        span=n_layers,
        activation="jumprelu",
        skip=skip,
        dtype=stored_dtype,
    )
    cfg = cfg if dtype is None else replace(cfg, dtype=dtype)
    decoders = read_decoders(
        [DecoderFile(path, "w_dec", first_slot=i) for i, path in enumerate(files)],
        [n_layers - i for i in range(n_layers)],
        d_transcoder,
        d_model,
        dtype=getattr(torch, cfg.dtype),
        device=device,
        lazy=lazy_decoder,
    )
    clt = CrossLayerTranscoder(cfg, decoders).to(device)
    for i, path in enumerate(files):
        with open_tensors(path) as tensors, torch.no_grad():
            clt.W_enc[i] = tensors.tensor("w_enc", (d_model, d_transcoder))
            clt.b_enc[i] = tensors.tensor("b_enc", (d_transcoder,))
            clt.b_dec[i] = tensors.tensor("b_dec", (d_model,))
            assert clt.threshold is not None
            clt.threshold[i] = tensors.tensor("threshold", (d_transcoder,))
            if clt.W_skip is not None:
                clt.W_skip[i] = tensors.tensor(SKIP, (d_model, d_model))
            else:
                tensors.refuse([SKIP])
    return clt
