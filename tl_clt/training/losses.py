"""The terms of the training loss (Methods, "Building an Interpretable Replacement Model").

Inputs and outputs come scaled so that each layer's mean norm is sqrt(d_model) (see `scaling`). Every term is a sum
over layers and features or coordinates and a mean over tokens, so that the MSE of a CLT that writes nothing is
about n_layers * d_model, and `sparsity_coefficient` is what one strongly active feature costs at one token, in the
same units. SAELens's trainer clips the gradient's norm to 1 and uses Adam: the overall scale of the loss
makes no difference, only the ratio of its terms does.

Sparsity has three forms, lambda = `sparsity_coefficient`, n_i(x) what feature i counts for at a token, N(x) the sum of
n_i(x) over the features of all layers:
    "tanh"          lambda * N(x),   n_i = tanh(c * ||W_dec,i|| * a_i)                   (Methods)
    "l0"            lambda * N(x),   n_i = 1[h_i > theta_i], straight-through            (Rajamanoharan et al. 2024)
    "quadratic_l0"  lambda * (N(x) / (n_layers * target_l0) - 1)^2,   n_i as for "l0"    (the same, section 5)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

SparsityKind = Literal["tanh", "l0", "quadratic_l0"]
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


def tanh_count(
    feature_acts: Float[Tensor, "batch d_transcoder"], norms: Float[Tensor, " d_transcoder"], tanh_scale: float
) -> Float[Tensor, " batch"]:
    """sum_i tanh(c * ||W_dec,i|| * a_i) over one layer's features, at each token; c = `tanh_scale`.

    Written as 2 sigmoid(2z) - 1 = tanh(z), which torch computes five times as fast on the CPU.
    """
    return (2 * torch.sigmoid(feature_acts * (2 * tanh_scale * norms)) - 1).sum(dim=1)


def sparsity_loss(
    counts: Float[Tensor, " batch"], kind: SparsityKind, target: float | None = None
) -> Float[Tensor, ""]:
    """The sparsity term without lambda.

    Args:
        counts: N(x) of each token, over all layers.
        kind: which form.
        target: n_layers * target_l0, for "quadratic_l0".
    """
    if kind == "quadratic_l0":
        assert target is not None
        return (counts / target - 1).square().mean()
    return counts.mean()


def dead_feature_loss(hidden_pre: PerLayer, thresholds: PerFeature, norms: PerFeature) -> Float[Tensor, ""]:
    """sum_i relu(theta_i - h_i) * ||W_dec,i|| over the features of all layers, mean over tokens.

    It draws features that do not fire towards their threshold. theta is 0 where phi has no threshold.
    """
    terms = [
        torch.relu(threshold - h).sum(dim=0) @ norm
        for h, threshold, norm in zip(hidden_pre, thresholds, norms, strict=True)
    ]
    return torch.stack(terms).sum() / hidden_pre[0].shape[0]
