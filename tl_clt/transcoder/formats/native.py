"""The native layout: `cfg.json` (the config) and `clt.safetensors`.

`clt.safetensors` holds W_enc [n_layers, d_model, d_transcoder], b_enc, b_dec, threshold and W_skip where
present, and `W_dec.{source}` [d_transcoder, n_writes, d_model].
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from tl_clt.files import read_config
from tl_clt.transcoder.config import CrossLayerTranscoderConfig
from tl_clt.transcoder.decoders import DecoderFile, read_decoders
from tl_clt.transcoder.tensor_files import open_tensors
from tl_clt.transcoder.transcoder import CrossLayerTranscoder

CONFIG = "cfg.json"
WEIGHTS = "clt.safetensors"
STACKED = ("W_enc", "b_enc", "b_dec", "threshold", "W_skip")


def recognises(folder: Path) -> bool:
    """Whether the folder holds this layout's files."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def load(folder: Path, *, device: torch.device, dtype: str | None, lazy_decoder: bool) -> CrossLayerTranscoder:
    """Read a CLT from this layout."""
    values = read_config(folder / CONFIG)
    cfg = CrossLayerTranscoderConfig.from_dict(values)
    cfg = cfg if dtype is None else replace(cfg, dtype=dtype)
    torch_dtype = getattr(torch, cfg.dtype)
    path = folder / WEIGHTS
    L, D, F = cfg.n_layers, cfg.d_model, cfg.d_transcoder
    stacked = {"W_enc": (L, D, F), "b_enc": (L, F), "b_dec": (L, D)}
    stacked |= {"threshold": (L, F)} if cfg.has_threshold else {}
    stacked |= {"W_skip": (L, D, D)} if cfg.skip else {}
    # Before anything of a stated size is made.
    with open_tensors(path) as tensors:
        for name, shape in stacked.items():
            tensors.require_shape(name, shape)
        tensors.refuse(tensors.keys - {*stacked, *(f"W_dec.{s}" for s in range(L))})
    decoders = read_decoders(
        [DecoderFile(path, f"W_dec.{s}") for s in range(cfg.n_layers)],
        [len(cfg.targets(s)) for s in range(cfg.n_layers)],
        cfg.d_transcoder,
        cfg.d_model,
        dtype=torch_dtype,
        device=device,
        lazy=lazy_decoder,
    )
    clt = CrossLayerTranscoder(cfg, decoders).to(device)
    with open_tensors(path) as tensors, torch.no_grad():
        for name, shape in stacked.items():
            getattr(clt, name).copy_(tensors.tensor(name, shape))
    return clt


def save(clt: CrossLayerTranscoder, folder: Path) -> None:
    """Write a CLT in this layout."""
    tensors = {name: getattr(clt, name) for name in STACKED if getattr(clt, name) is not None}
    tensors |= {f"W_dec.{source}": clt.W_dec[source] for source in clt.layers}
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(clt.cfg.to_dict(), indent=2) + "\n")
