"""lambda follows L0."""

from __future__ import annotations

import json

import pytest
import torch

from tl_clt.training.losses import L0Controller


def controller(target: float = 8.0, start: float = 0.1, steps: int = 1000, n_layers: int = 2) -> L0Controller:
    return L0Controller(n_layers, target, start, steps // 2, gains=(2.0, 20 / steps), bounds=(1e-4, 1e4))


def run(one: L0Controller, steps: int, response: float = 0.5, lag: float = 0.9) -> list[torch.Tensor]:
    """L0 of a run in which each layer's falls with a power of its lambda, after a while; layers differ by ten times."""
    scale = torch.tensor([5.0, 50.0], dtype=torch.float64)
    l0, seen = torch.full((2,), 100.0, dtype=torch.float64), []
    for _ in range(steps):
        l0 = lag * l0 + (1 - lag) * scale * one.log_values.exp() ** -response
        one.observe(l0)
        one.step()
        seen.append(l0)
    return seen


@pytest.mark.parametrize("start", [1e-3, 1e-1, 10.0])
@pytest.mark.parametrize("response", [0.5, 1.0])
def test_every_layer_reaches_the_target_from_any_start(start: float, response: float) -> None:
    one = controller(start=start)
    seen = run(one, 1000, response)
    torch.testing.assert_close(seen[-1], torch.full_like(seen[-1], 8.0), rtol=0.05, atol=0)
    assert float(one.shares.mean()) == pytest.approx(1.0) and one.shares[1] > one.shares[0]
    assert one.value == pytest.approx(float(one.log_values.exp().mean()))


@pytest.mark.parametrize("lag", [0.9, 0.98, 0.99])
def test_a_late_answer_winds_nothing_up(lag: float) -> None:
    """L0 answers after up to a tenth of the run: it must not fall far below the target meanwhile."""
    one = controller(steps=1000)
    seen = torch.stack(run(one, 1000, response=0.5, lag=lag))
    assert seen[500:].min() > 8.0 / 2
    torch.testing.assert_close(seen[-1], torch.full_like(seen[-1], 8.0), rtol=0.1, atol=0)


def test_lambdas_change_by_the_distance_and_by_its_change_and_stay_within_bounds() -> None:
    one = L0Controller(1, target=10.0, start=0.5, ramp_steps=1, gains=(2.0, 0.1), bounds=(0.4, 0.6))
    one.observe(torch.tensor([10.0]))
    assert one.step() == pytest.approx(0.5)
    one.running = torch.tensor([10.1], dtype=torch.float64)
    assert one.step() == pytest.approx(0.5 * 1.01**2.1)
    for _ in range(200):
        one.observe(torch.tensor([100.0]))
        one.step()
    assert one.value == pytest.approx(0.6)


def test_state_goes_through_a_checkpoint() -> None:
    one, other = controller(), controller(start=9.9)
    run(one, 30)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert torch.equal(torch.stack(run(one, 20)), torch.stack(run(other, 20))) and one.value == other.value
