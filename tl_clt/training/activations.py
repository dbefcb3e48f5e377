"""phi with gradients for training. The forward values are those of `tl_clt.transcoder.activations`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

TrainedActivation = Literal["relu", "jumprelu", "topk", "batchtopk"]
StraightThrough = Literal["all", "threshold"]


class _JumpReLU(torch.autograd.Function):
    """Forward: x where x > threshold, else 0. Backward: see `jumprelu`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor, bandwidth: float, through_input: bool) -> Tensor:
        ctx.save_for_backward(x, threshold)
        ctx.bandwidth, ctx.through_input = bandwidth, through_input
        return x * _ones_where(torch.gt, x, threshold)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, threshold = ctx.saved_tensors
        half, bandwidth = ctx.bandwidth / 2, ctx.bandwidth
        distance = x - threshold
        window = _ones_where(torch.lt, distance.abs(), half)
        grad_threshold = (grad * window).sum(dim=0) * (-threshold / bandwidth)
        if ctx.through_input:
            slope = window.mul_((threshold + half) / bandwidth).add_(_ones_where(torch.ge, distance, half))
        else:
            slope = _ones_where(torch.gt, distance, 0.0)
        return slope.mul_(grad).to(x.dtype), grad_threshold.to(threshold.dtype), None, None


def _ones_where(compare: Callable[..., Tensor], x: Tensor, other: Tensor | float) -> Tensor:
    """1 where the comparison holds, else 0, in x's dtype: a product with a bool tensor takes 20 times as long."""
    return compare(x, other, out=torch.empty_like(x))


def jumprelu(
    hidden_pre: Float[Tensor, "batch d_transcoder"],
    threshold: Float[Tensor, " d_transcoder"],
    bandwidth: float,
    straight_through: StraightThrough,
) -> Float[Tensor, "batch d_transcoder"]:
    """`x * 1[x > theta]`, with straight-through gradients over a rectangular window of width `bandwidth` = eps.

        d/dtheta = -(theta / eps) * 1[|x - theta| < eps/2]                                     both modes
        d/dx     = 1[x > theta]                                                                "threshold"
        d/dx     = 1[x - theta >= eps/2] + 1[|x - theta| < eps/2] * (theta + eps/2) / eps      "all"

    "all" is the slope of the line that rises from 0 at the window's lower end to the true value at its upper
    end, so that features just below their threshold learn as well (Methods, "Building an Interpretable
    Replacement Model").
    """
    return _JumpReLU.apply(hidden_pre, threshold, bandwidth, straight_through == "all")  # type: ignore[no-any-return]


class _Step(torch.autograd.Function):
    """Forward: 1 where x > threshold, else 0. Backward: see `step_function`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor, bandwidth: float, through_input: bool) -> Tensor:
        ctx.save_for_backward(x, threshold)
        ctx.bandwidth, ctx.through_input = bandwidth, through_input
        return _ones_where(torch.gt, x, threshold)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        x, threshold = ctx.saved_tensors
        slope = _ones_where(torch.lt, (x - threshold).abs(), ctx.bandwidth / 2).mul_(grad / ctx.bandwidth)
        for_x = slope.to(x.dtype) if ctx.through_input else None
        return for_x, -slope.sum(dim=0).to(threshold.dtype), None, None


def step_function(
    hidden_pre: Float[Tensor, "batch d_transcoder"],
    threshold: Float[Tensor, " d_transcoder"],
    bandwidth: float,
    straight_through: StraightThrough,
) -> Float[Tensor, "batch d_transcoder"]:
    """`1[x > theta]`, with straight-through gradients over a rectangular window of width `bandwidth` = eps.

        d/dtheta = -(1 / eps) * 1[|x - theta| < eps/2]                              both modes
        d/dx     = 0 ("threshold"), or +(1 / eps) * 1[|x - theta| < eps/2] ("all")

    Its sum over features is L0 (Rajamanoharan et al. 2024, "JumpReLU SAEs", section 3).
    """
    return _Step.apply(hidden_pre, threshold, bandwidth, straight_through == "all")  # type: ignore[no-any-return]
