"""What layouts with one file a source layer share: each file's tensors under names of its maker's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from tl_clt.errors import FormatError
from tl_clt.transcoder.config import CrossLayerTranscoderConfig
from tl_clt.transcoder.decoders import DecoderSource
from tl_clt.transcoder.formats.reading import read_decoders
from tl_clt.transcoder.tensor_files import TensorFile, open_tensors
from tl_clt.transcoder.transcoder import CrossLayerTranscoder


class LayerNames(NamedTuple):
    """What a layout calls a layer's tensors; `{i}` stands for the layer's number."""

    W_enc: str
    b_enc: str
    b_dec: str
    threshold: str | None
    """None where the layout has no thresholds."""
    W_skip: str | None
    """None where the layout has no skip connection."""
    encoder_outputs_first: bool
    """The encoder is stored [d_transcoder, d_model]."""
    skip_outputs_first: bool
    """The skip connection is stored [out, in] and used as `x @ W_skip.T`."""
    W_dec: str = "W_dec"
    always_threshold: bool = False
    """JumpReLU, whatever the first file holds."""

    def of(self, layer: int) -> LayerNames:
        """The names of one layer."""
        return self._replace(**{k: v.format(i=layer) for k, v in self._asdict().items() if isinstance(v, str)})


def load_layers(
    files: Sequence[Path],
    names: Callable[[TensorFile], LayerNames],
    decoder: Callable[[int, CrossLayerTranscoderConfig], DecoderSource],
    config: Callable[..., CrossLayerTranscoderConfig],
    *,
    span: int,
    activation: str | None = None,
    k: int | None = None,
    device: torch.device,
    dtype: str | None,
    lazy_decoder: bool,
) -> CrossLayerTranscoder:
    """Read a CLT whose files hold a layer each.

    Args:
        files: each layer's file with its encoder.
        names: what an open file's tensors are called.
        decoder: where a source layer's decoder lies.
        config: the config, given what the weight files say (n_layers, d_model, d_transcoder, span, activation, k,
            skip, dtype).
        span: the layout's own; a config beside the files may say less.
        activation, k: what a config beside the files says of them; without, thresholds mean JumpReLU, none ReLU.
        device, dtype, lazy_decoder: as in `from_pretrained`.
    """
    with open_tensors(files[0]) as tensors:
        first = names(tensors).of(0)
        d_transcoder, d_model = (_length(tensors, name) for name in (first.b_enc, first.b_dec))
        has_threshold = first.threshold is not None and (first.always_threshold or first.threshold in tensors.keys)
        cfg = config(
            n_layers=len(files),
            d_model=d_model,
            d_transcoder=d_transcoder,
            span=span,
            activation=activation or ("jumprelu" if has_threshold else "relu"),
            k=k,
            skip=first.W_skip in tensors.keys,
            dtype=tensors.dtype(first.W_enc),
        )
    cfg = cfg if dtype is None else replace(cfg, dtype=dtype)
    decoders = read_decoders(
        [decoder(source, cfg) for source in range(cfg.n_layers)],
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
            _read_layer(clt, layer, tensors, names(tensors).of(layer))
    return clt


def _length(tensors: TensorFile, name: str) -> int:
    shape = tensors.shape(name)
    if len(shape) != 1:
        raise FormatError(f"'{tensors.path}': {name} has shape {list(shape)}: a vector was expected.")
    return shape[0]


@torch.no_grad()
def _read_layer(clt: CrossLayerTranscoder, layer: int, tensors: TensorFile, names: LayerNames) -> None:
    d_model, d_transcoder = clt.cfg.d_model, clt.cfg.d_transcoder

    def matrix(name: str, inputs: int, outputs: int, outputs_first: bool) -> torch.Tensor:
        if outputs_first:
            return tensors.tensor(name, (outputs, inputs)).T
        return tensors.tensor(name, (inputs, outputs))

    clt.W_enc[layer] = matrix(names.W_enc, d_model, d_transcoder, names.encoder_outputs_first)
    clt.b_enc[layer] = tensors.tensor(names.b_enc, (d_transcoder,))
    clt.b_dec[layer] = tensors.tensor(names.b_dec, (d_model,))
    if clt.threshold is not None:
        if names.threshold is None:
            raise FormatError(f"'{tensors.path}' has no thresholds, but its CLT is {clt.cfg.activation} by its config.")
        clt.threshold[layer] = tensors.tensor(names.threshold, (d_transcoder,))
    elif names.threshold is not None:
        tensors.refuse([names.threshold])
    if names.W_skip is not None and clt.W_skip is not None:
        clt.W_skip[layer] = matrix(names.W_skip, d_model, d_model, names.skip_outputs_first)
    elif names.W_skip is not None:
        tensors.refuse([names.W_skip])
    elif clt.W_skip is not None:
        raise FormatError(f"'{tensors.path}' has no skip connection, but other files of its CLT have one.")
