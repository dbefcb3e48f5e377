"""Gradients of a CLT that is spread over several processes: their mean over tokens, and their norm over features."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tl_clt.training.layers import is_shared
from tl_clt.training.sharding import ProcessGrid

EPSILON = 1e-6
"""Added to the norm, as `torch.nn.utils.clip_grad_norm_` does."""


SUMS_OVER_FEATURES = "W_far"
"""A shared weight through which each rank's features write: a rank has its features' part of the gradient. Others
(b_dec, W_skip) come after the sum over ranks, and every rank has the whole of theirs."""


def combine_gradients(clt: nn.Module, grid: ProcessGrid) -> None:
    """Make each rank's gradients those of all tokens and, of shared weights, all features; in place."""
    for name, parameter in clt.named_parameters():
        if name.startswith(SUMS_OVER_FEATURES) and parameter.grad is not None:
            grid.add_over_features(parameter.grad)
    grid.mean_over_data([p.grad for p in clt.parameters() if p.grad is not None])


def clip_gradients(clt: nn.Module, max_norm: float, grid: ProcessGrid) -> Float[Tensor, ""]:
    """Scale all gradients in place so that their norm is at most `max_norm`; the norm before, over all ranks.

        norm = sqrt(sum over ranks of |gradients of their features|^2 + |gradients of shared weights|^2)

    Where one rank has all features this is `torch.nn.utils.clip_grad_norm_`.
    """
    if grid.n_feature_shards == 1:
        return torch.nn.utils.clip_grad_norm_(clt.parameters(), max_norm)
    gradients = {name: p.grad for name, p in clt.named_parameters() if p.grad is not None}
    norm = _norm_over_ranks(gradients, grid)
    scale = (max_norm / (norm + EPSILON)).clamp(max=1.0)
    for grad in gradients.values():
        grad.mul_(scale)
    return norm


def _norm_over_ranks(gradients: Mapping[str, Tensor], grid: ProcessGrid) -> Float[Tensor, ""]:
    def square(shared: bool) -> Tensor:
        grads = [g for name, g in gradients.items() if is_shared(name) == shared]
        return torch.stack([torch.linalg.vector_norm(g, dtype=_sum_dtype(g)).square() for g in grads]).sum()

    return (grid.add_over_features(square(shared=False)) + square(shared=True)).sqrt()


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
