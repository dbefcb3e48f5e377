"""Each layer's inputs and outputs brought to a mean norm of sqrt(d_model) (Methods, "Normalization")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tl_clt.errors import ModelUnsupported

Batch = Float[Tensor, "batch 2 n_layers d_model"]


class ActivationScale(NamedTuple):
    """Factors that activations are multiplied by in training."""

    inputs: tuple[float, ...]
    """One a layer, for what features read."""

    outputs: tuple[float, ...]
    """One a layer, for what they write."""


def estimate_scale(batches: Sequence[Batch]) -> ActivationScale:
    """sqrt(d_model) / mean norm, for the inputs and the outputs of each layer.

    Raises:
        ModelUnsupported: a layer's activations are zero everywhere, or not finite.
    """
    norms = torch.cat([b.double().norm(dim=-1) for b in batches]).mean(dim=0)
    for side, values in zip(("input", "output"), norms.tolist(), strict=True):
        for layer, norm in enumerate(values):
            if not 0 < norm < float("inf"):
                raise ModelUnsupported(
                    f"The {side} of layer {layer} has mean norm {norm}: there is nothing to learn from."
                    " Check the model's weights and the hook names."
                )
    inputs, outputs = (batches[0].shape[-1] ** 0.5 / norms).tolist()
    return ActivationScale(tuple(inputs), tuple(outputs))


def apply_scale(batch: Batch, scale: ActivationScale) -> Batch:
    """Every layer's inputs and outputs times their factors."""
    return batch * torch.tensor(scale, dtype=batch.dtype, device=batch.device)[..., None]
