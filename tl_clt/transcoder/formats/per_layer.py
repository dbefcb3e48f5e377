"""What circuit-tracer's and Gemma Scope's layouts share: one file a source layer, under names of each one's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from tl_clt.transcoder.config import CrossLayerTranscoderConfig
from tl_clt.transcoder.decoders import DecoderFile
from tl_clt.transcoder.formats import circuit_tracer_config
from tl_clt.transcoder.formats.reading import read_decoders
from tl_clt.transcoder.tensor_files import TensorFile, open_tensors
from tl_clt.transcoder.transcoder import CrossLayerTranscoder


class LayerNames(NamedTuple):
    """What a layout calls a layer's tensors; `{i}` stands for the layer's number."""

    W_enc: str
    b_enc: str
    b_dec: str
    threshold: str
    W_skip: str | None
    """None where the layout has no skip connection."""
    outputs_first: bool
    """Matrices are stored [out, in] and used as `x @ W.T`."""

    def of(self, layer: int) -> LayerNames:
        """The names of one layer."""
        return self._replace(
            W_enc=self.W_enc.format(i=layer),
            b_enc=self.b_enc.format(i=layer),
            b_dec=self.b_dec.format(i=layer),
            threshold=self.threshold.format(i=layer),
            W_skip=None if self.W_skip is None else self.W_skip.format(i=layer),
        )


def load_layers(
    folder: Path,
    files: Sequence[Path],
    names: LayerNames,
    decoder_file: Callable[[int, CrossLayerTranscoderConfig], DecoderFile],
    *,
    span: int,
    always_threshold: bool = False,
    input_hook: str = "hook_resid_mid",
    device: torch.device,
    dtype: str | None,
    lazy_decoder: bool,
) -> CrossLayerTranscoder:
    """Read a CLT whose files hold a layer each.

    Args:
        folder: where `config.yaml` lies, if there is one.
        files: each layer's file with its encoder.
        names: what its tensors are called.
        decoder_file: where a source layer's decoder lies.
        span: the layout's own; `config.yaml` may say less.
        always_threshold: JumpReLU whatever the first file holds.
        input_hook: what features read where no `config.yaml` says so.
        device, dtype, lazy_decoder: as in `from_pretrained`.
    """
    first = names.of(0)
    with open_tensors(files[0]) as tensors:
        shape = tensors.shape(first.W_enc)
        d_transcoder, d_model = shape if names.outputs_first else shape[::-1]
        cfg = circuit_tracer_config.read(
            folder,
            input_hook=input_hook,
            n_layers=len(files),
            d_model=d_model,
            d_transcoder=d_transcoder,
            span=span,
            activation="jumprelu" if always_threshold or first.threshold in tensors.keys else "relu",
            skip=first.W_skip in tensors.keys,
            dtype=tensors.dtype(first.W_enc),
        )
    cfg = cfg if dtype is None else replace(cfg, dtype=dtype)
    decoders = read_decoders(
        [decoder_file(source, cfg) for source in range(cfg.n_layers)],
        [len(cfg.targets(source)) for source in range(cfg.n_layers)],
        d_transcoder,
        d_model,
        dtype=getattr(torch, cfg.dtype),
        device=device,
        lazy=lazy_decoder,
    )
    clt = CrossLayerTranscoder(cfg, decoders).to(device)
    for layer, path in enumerate(files):
        with open_tensors(path) as tensors:
            _read_layer(clt, layer, tensors, names.of(layer))
    return clt


@torch.no_grad()
def _read_layer(clt: CrossLayerTranscoder, layer: int, tensors: TensorFile, names: LayerNames) -> None:
    d_model, d_transcoder = clt.cfg.d_model, clt.cfg.d_transcoder

    def matrix(name: str, inputs: int, outputs: int) -> torch.Tensor:
        if names.outputs_first:
            return tensors.tensor(name, (outputs, inputs)).T
        return tensors.tensor(name, (inputs, outputs))

    clt.W_enc[layer] = matrix(names.W_enc, d_model, d_transcoder)
    clt.b_enc[layer] = tensors.tensor(names.b_enc, (d_transcoder,))
    clt.b_dec[layer] = tensors.tensor(names.b_dec, (d_model,))
    if clt.threshold is not None:
        clt.threshold[layer] = tensors.tensor(names.threshold, (d_transcoder,))
    else:
        tensors.refuse([names.threshold])
    if names.W_skip is not None and clt.W_skip is not None:
        clt.W_skip[layer] = matrix(names.W_skip, d_model, d_model)
    elif names.W_skip is not None:
        tensors.refuse([names.W_skip])
