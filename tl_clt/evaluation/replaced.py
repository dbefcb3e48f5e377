"""A model whose MLPs are replaced by a CLT, or silenced, at all positions but the first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from tl_clt.lens import FwdHook, HookedModel, block_hook
from tl_clt.replacement import attach
from tl_clt.transcoder import CrossLayerTranscoder


@contextmanager
def replaced(model: HookedModel, clt: CrossLayerTranscoder) -> Iterator[HookedModel]:
    """Within, CLT reconstructions stand in for all MLPs, but for position 0, which keeps its own outputs.

    Activations there are huge and mean nothing, and a CLT need not have been trained on them; tracing treats
    them likewise (`bos="error"`).
    """
    with attach(model, clt, mode="replace"):
        with model.hooks(fwd_hooks=[h for t in clt.layers for h in _keep_first(t, clt.cfg.output_hook)]):
            yield model


def ablating_hooks(clt: CrossLayerTranscoder) -> list[FwdHook]:
    """Hooks that put zeros in place of all MLP outputs but those of position 0."""

    def silence(out: Float[Tensor, "batch pos d_model"], hook: object) -> Tensor:
        return torch.cat([out[:, :1], torch.zeros_like(out[:, 1:])], dim=1)

    return [(block_hook(t, clt.cfg.output_hook), silence) for t in clt.layers]


def _keep_first(layer: int, output_hook: str) -> list[FwdHook]:
    """Hooks that put the MLP's own output, recons + error, back at position 0."""
    seen: dict[str, Tensor] = {}

    def note(tensor: Tensor, hook: object, name: str) -> None:
        seen[name] = tensor[:, 0]

    def put_back(out: Float[Tensor, "batch pos d_model"], hook: object) -> Tensor:
        out = out.clone()
        out[:, 0] = (seen["recons"] + seen["error"]).to(out.dtype)
        return out

    return [
        (block_hook(layer, "clt.hook_recons"), partial(note, name="recons")),
        (block_hook(layer, "clt.hook_error"), partial(note, name="error")),
        (block_hook(layer, output_hook), put_back),
    ]
