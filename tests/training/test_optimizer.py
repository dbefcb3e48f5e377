"""Random rounding is right on average, and training in bfloat16 with it goes where float32 goes."""

from __future__ import annotations

import copy

import pytest
import torch

from tl_clt.training.run.trainer import RandomRoundingAdam, round_at_random


def test_rounding_gives_a_neighbour_with_the_right_mean() -> None:
    for value in (1.0 + 1 / 512, -3.3, 1e-20, 7e30):
        x = torch.full((40_000,), value)
        rounded = round_at_random(x).double()
        below, above = rounded.min(), rounded.max()
        assert below < value < above
        share = (value - below) / (above - below)
        assert (rounded == below).logical_or(rounded == above).all()
        assert float((rounded == above).double().mean()) == pytest.approx(float(share), abs=0.01)


def test_what_bfloat16_has_stays() -> None:
    x = torch.tensor([0.0, -0.0, 1.0, -2.5, float("inf"), -float("inf"), float("nan")])
    for _ in range(20):
        assert torch.equal(round_at_random(x).float().nan_to_num(9.0), x.nan_to_num(9.0))


def test_rounding_keeps_shapes_and_order() -> None:
    x = torch.randn(5, 3).T
    torch.testing.assert_close(round_at_random(x).float(), x, rtol=1 / 128, atol=0)
    assert round_at_random(torch.zeros(0)).shape == (0,)


def test_small_updates_are_not_lost() -> None:
    weight = torch.nn.Parameter(torch.ones(2000, dtype=torch.bfloat16))
    optimizer = RandomRoundingAdam([weight], lr=1e-4, betas=(0.9, 0.999))
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert float(weight.detach().float().mean()) == pytest.approx(0.99, abs=1e-3)
    assert optimizer.state[weight]["exp_avg"].dtype == torch.float32


def test_moments_are_those_of_torch_adam() -> None:
    start, gradients = torch.randn(50).bfloat16(), torch.randn(6, 50).bfloat16()
    low, full = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    ours, theirs = RandomRoundingAdam([low], lr=1e-3, betas=(0.8, 0.9)), torch.optim.Adam([full], 1e-3, (0.8, 0.9))
    for grad in gradients:
        low.grad, full.grad = grad.clone(), grad.float()
        ours.step()
        theirs.step()
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(ours.state[low][name], theirs.state[full][name])
    torch.testing.assert_close(low.detach().float(), full.detach(), rtol=0.05, atol=0.01)


def test_a_loaded_state_goes_on_as_the_saved_one() -> None:
    weight = torch.nn.Parameter(torch.randn(30).bfloat16())
    optimizer = RandomRoundingAdam([weight], lr=1e-2, betas=(0.9, 0.99))
    weight.grad = torch.randn(30).bfloat16()
    optimizer.step()
    twin = torch.nn.Parameter(weight.detach().clone())
    other = RandomRoundingAdam([twin], lr=1e-2, betas=(0.9, 0.99))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(other.state[twin]["exp_avg"], optimizer.state[weight]["exp_avg"])
    for parameter, adam in ((weight, optimizer), (twin, other)):
        torch.manual_seed(1)
        parameter.grad = torch.ones_like(parameter)
        adam.step()
    assert torch.equal(twin, weight)
