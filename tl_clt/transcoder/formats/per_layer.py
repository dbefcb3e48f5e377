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
    # All files before the first weight: nothing is made that they do not hold.
    for layer, path in enumerate(files):
        with open_tensors(path) as tensors:
            _check_layer(cfg, tensors, names(tensors).of(layer))
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


def _check_layer(cfg: CrossLayerTranscoderConfig, tensors: TensorFile, names: LayerNames) -> None:
    """Raise unless a file holds what its CLT has, in the right shape, and nothing that the CLT has not."""
    D, F = cfg.d_model, cfg.d_transcoder
    tensors.require_shape(names.W_enc, (F, D) if names.encoder_outputs_first else (D, F))
    tensors.require_shape(names.b_enc, (F,))
    tensors.require_shape(names.b_dec, (D,))
    if names.threshold is None and cfg.has_threshold:
        raise FormatError(f"'{tensors.path}' has no thresholds, but its CLT is {cfg.activation} by its config.")
    if names.threshold is not None and cfg.has_threshold:
        tensors.require_shape(names.threshold, (F,))
    elif names.threshold is not None:
        tensors.refuse([names.threshold])
    if names.W_skip is None and cfg.skip:
        raise FormatError(f"'{tensors.path}' has no skip connection, but other files of its CLT have one.")
    if names.W_skip is not None and cfg.skip:
        tensors.require_shape(names.W_skip, (D, D))
    elif names.W_skip is not None:
        tensors.refuse([names.W_skip])


@torch.no_grad()
def _read_layer(clt: CrossLayerTranscoder, layer: int, tensors: TensorFile, names: LayerNames) -> None:
    """Read a file that was checked."""
    whole = (slice(None),)
    W_enc = tensors.part(names.W_enc, whole)
    clt.W_enc[layer] = W_enc.T if names.encoder_outputs_first else W_enc
    clt.b_enc[layer] = tensors.part(names.b_enc, whole)
    clt.b_dec[layer] = tensors.part(names.b_dec, whole)
    if clt.threshold is not None and names.threshold is not None:
        clt.threshold[layer] = tensors.part(names.threshold, whole)
    if clt.W_skip is not None and names.W_skip is not None:
        W_skip = tensors.part(names.W_skip, whole)
        clt.W_skip[layer] = W_skip.T if names.skip_outputs_first else W_skip
