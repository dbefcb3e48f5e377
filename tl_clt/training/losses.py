"""The terms of the training loss (Methods, "Building an Interpretable Replacement Model").

Inputs and outputs come scaled so that each layer's mean norm is sqrt(d_model) (see `scaling`). Every term is a sum
over layers and features or coordinates and a mean over tokens, so that the MSE of a CLT that writes nothing is
about n_layers * d_model, and `sparsity_coefficient` is what one strongly active feature costs at one token, in the
same units. SAELens's trainer clips the gradient's norm to 1 and uses Adam: the overall scale of the loss
makes no difference, only the ratio of its terms does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

PerLayer = Sequence[Float[Tensor, "batch d_transcoder"]]
PerFeature = Sequence[Float[Tensor, " d_transcoder"]]


def decoder_norms(W_dec: Sequence[Float[Tensor, "d_transcoder _"]]) -> list[Float[Tensor, " d_transcoder"]]:
    """||W_dec,i||: for each source layer, each feature's norm over the concatenation of all its decoder vectors."""
    return [w.norm(dim=1) for w in W_dec]


def mse_loss(
    recons: Float[Tensor, "batch n_layers d_model"], outputs: Float[Tensor, "batch n_layers d_model"]
) -> Float[Tensor, ""]:
    """Squared error summed over layers and d_model, mean over tokens."""
    return (recons - outputs).square().sum() / recons.shape[0]


def sparsity_loss(feature_acts: PerLayer, norms: PerFeature, tanh_scale: float) -> Float[Tensor, ""]:
    """sum_i tanh(c * ||W_dec,i|| * a_i) over the features of all layers, mean over tokens; c = `tanh_scale`.

    Written as 2 sigmoid(2z) - 1 = tanh(z), which torch computes five times as fast on the CPU.
    """
    terms = [
        (2 * torch.sigmoid(a * (2 * tanh_scale * norm)) - 1).sum() for a, norm in zip(feature_acts, norms, strict=True)
    ]
    return torch.stack(terms).sum() / feature_acts[0].shape[0]


def dead_feature_loss(hidden_pre: PerLayer, thresholds: PerFeature, norms: PerFeature) -> Float[Tensor, ""]:
    """sum_i relu(theta_i - h_i) * ||W_dec,i|| over the features of all layers, mean over tokens.

    It draws features that do not fire towards their threshold. theta is 0 where phi has no threshold.
    """
    terms = [
        torch.relu(threshold - h).sum(dim=0) @ norm
        for h, threshold, norm in zip(hidden_pre, thresholds, norms, strict=True)
    ]
    return torch.stack(terms).sum() / hidden_pre[0].shape[0]
