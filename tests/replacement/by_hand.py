"""The replacement model written out with ordinary hooks, layer by layer: what `attach` must equal."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tests.models import Model
from tl_clt.transcoder import CrossLayerTranscoder

Edit = Callable[[Tensor, int], Tensor]
"""(feature_acts of one layer, layer) -> feature_acts."""


class Clean(NamedTuple):
    """A run of the model as it is."""

    logits: Tensor
    inputs: Tensor
    """[batch, pos, n_layers, d_model]"""
    mlp_outs: Tensor
    """[batch, pos, n_layers, d_model]"""


def clean_run(model: Model, clt: CrossLayerTranscoder, tokens: Tensor) -> Clean:
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens)
    inputs, outs = (
        torch.stack([cache[f"blocks.{t}.{hook}"] for t in clt.layers], dim=-2)
        for hook in (clt.cfg.input_hook, clt.cfg.output_hook)
    )
    return Clean(logits, inputs, outs)


def run_by_hand(
    model: Model,
    clt: CrossLayerTranscoder,
    tokens: Tensor,
    *,
    errors: Tensor | None = None,
    edit: Edit = lambda acts, layer: acts,
    hooks: list[tuple[str, Callable]] | None = None,
) -> Tensor:
    """Logits with each MLP's output replaced by decode(edit(encode(inputs))) + errors, one layer at a time.

    Args:
        model, clt, tokens: what runs.
        errors: added to the reconstruction [batch, pos, n_layers, d_model]; none where left out.
        edit: change of each layer's feature activations.
        hooks: further hooks, which act before these.
    """
    inputs = torch.zeros(*tokens.shape, clt.cfg.n_layers, clt.cfg.d_model, dtype=clt.W_enc.dtype)

    def reader(layer: int) -> Callable:
        def read(tensor: Tensor, hook: object) -> None:
            inputs[..., layer, :] = tensor

        return read

    def writer(layer: int) -> Callable:
        def write(tensor: Tensor, hook: object) -> Tensor:
            # Layers above have not been read yet; they do not write here.
            acts = clt.encode(inputs)
            acts = torch.stack([edit(acts[..., s, :], s) for s in clt.layers], dim=-2)
            recons = clt.decode(acts, inputs)[..., layer, :]
            return recons if errors is None else recons + errors[..., layer, :]

        return write

    by_layer = [
        (f"blocks.{t}.{name}", make(t))
        for t in clt.layers
        for name, make in ((clt.cfg.input_hook, reader), (clt.cfg.output_hook, writer))
    ]
    with torch.no_grad():
        return model.run_with_hooks(tokens, fwd_hooks=[*(hooks or []), *by_layer])
