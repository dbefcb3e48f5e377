"""Straight-through JumpReLU against its written definition, one number at a time."""

from __future__ import annotations

import pytest
import torch

from tl_clt.training.activations import jumprelu, step_function
from tl_clt.transcoder.transcoder import jumprelu as inference_jumprelu

BANDWIDTH = 0.6


def batch(requires_grad: bool = True) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 5, dtype=torch.float64, generator=generator).requires_grad_(requires_grad)
    theta = torch.rand(5, dtype=torch.float64, generator=generator).requires_grad_(requires_grad)
    upstream = torch.randn(40, 5, dtype=torch.float64, generator=generator)
    return x, theta, upstream


@pytest.mark.parametrize("mode", ["all", "threshold"])
def test_forward_is_the_inference_jumprelu(mode: str) -> None:
    x, theta, _ = batch(requires_grad=False)
    assert torch.equal(jumprelu(x, theta, BANDWIDTH, mode), inference_jumprelu(x, theta))


@pytest.mark.parametrize("mode", ["all", "threshold"])
def test_gradients_are_the_formulas(mode: str) -> None:
    x, theta, upstream = batch()
    jumprelu(x, theta, BANDWIDTH, mode).backward(upstream)
    want_x, want_theta = torch.zeros_like(x), torch.zeros_like(theta)
    half = BANDWIDTH / 2
    for row in range(x.shape[0]):
        for i in range(x.shape[1]):
            a, t, g = float(x.detach()[row, i]), float(theta.detach()[i]), float(upstream[row, i])
            in_window = -half < a - t < half
            if in_window:
                want_theta[i] -= g * t / BANDWIDTH
            if mode == "threshold":
                slope = 1.0 if a > t else 0.0
            elif in_window:
                slope = (t + half) / BANDWIDTH
            else:
                slope = 1.0 if a > t else 0.0
            want_x[row, i] = g * slope
    torch.testing.assert_close(x.grad, want_x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(theta.grad, want_theta, rtol=1e-12, atol=1e-12)


def test_only_the_all_mode_reaches_features_below_their_threshold() -> None:
    theta = torch.tensor([0.3], dtype=torch.float64)
    slopes = {}
    for mode in ("all", "threshold"):
        x = torch.tensor([[0.2]], dtype=torch.float64, requires_grad=True)
        jumprelu(x, theta, BANDWIDTH, mode).sum().backward()
        slopes[mode] = float(x.grad)
    assert slopes["threshold"] == 0
    assert slopes["all"] == pytest.approx((0.3 + BANDWIDTH / 2) / BANDWIDTH)


@pytest.mark.parametrize("mode", ["all", "threshold"])
def test_step_function_counts_active_features_and_its_gradients_are_the_formulas(mode: str) -> None:
    x, theta, upstream = batch()
    active = step_function(x, theta, BANDWIDTH, mode)
    assert torch.equal(active, (x > theta).double())
    active.backward(upstream)
    window = ((x - theta).abs() < BANDWIDTH / 2).double().detach()
    torch.testing.assert_close(theta.grad, -(upstream * window).sum(dim=0) / BANDWIDTH, rtol=1e-12, atol=1e-12)
    if mode == "threshold":
        assert x.grad is None
    else:
        torch.testing.assert_close(x.grad, upstream * window / BANDWIDTH, rtol=1e-12, atol=1e-12)
