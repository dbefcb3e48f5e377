"""lambda follows L0."""

from __future__ import annotations

import pytest

from tl_clt.training.losses import L0Controller


def run(controller: L0Controller, steps: int, response: float = 0.5, lag: float = 0.9) -> list[float]:
    """L0 of a run that, after a while, falls with a power of lambda."""
    l0, seen = 100.0, []
    for _ in range(steps):
        l0 = lag * l0 + (1 - lag) * 20.0 * controller.value**-response
        controller.observe(l0)
        controller.step()
        seen.append(l0)
    return seen


@pytest.mark.parametrize("start", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("response", [0.3, 1.0])
def test_l0_reaches_its_target_from_any_start(start: float, response: float) -> None:
    controller = L0Controller(target=8.0, start=start, ramp_steps=500, gain=0.04)
    seen = run(controller, 1000, response)
    assert seen[-1] == pytest.approx(8.0, rel=0.05)
    assert controller.value == pytest.approx((8.0 / 20.0) ** (-1 / response), rel=0.2)


def test_lambda_is_multiplied_by_a_power_of_the_distance() -> None:
    controller = L0Controller(target=10.0, start=0.5, ramp_steps=1, gain=0.1)
    controller.observe(12.0)
    assert controller.step() == pytest.approx(0.5 * 1.2**0.1)
    for _ in range(200):
        controller.observe(1e-9)
    before = controller.value
    assert controller.step() == pytest.approx(before * 2.718281828**-0.1)


def test_state_goes_through_a_checkpoint() -> None:
    one = L0Controller(target=8.0, start=0.1, ramp_steps=50, gain=0.05)
    run(one, 30)
    other = L0Controller(target=8.0, start=9.9, ramp_steps=50, gain=0.05)
    other.load_state_dict(one.state_dict())
    assert run(one, 20) == run(other, 20) and one.value == other.value
