"""How often features fire, over the last steps only."""

from __future__ import annotations

import torch

from tl_clt.training.run.trainer import BLOCKS, RunningDensity


def fired(*counts: int) -> torch.Tensor:
    return torch.tensor(counts)


def test_density_is_the_share_of_tokens() -> None:
    running = RunningDensity(2, window=8, device="cpu")
    for _ in range(3):
        running.add(fired(5, 1), 10)
    torch.testing.assert_close(running.density, torch.tensor([0.5, 0.1]))


def test_what_fired_before_the_window_is_forgotten() -> None:
    running = RunningDensity(2, window=16, device="cpu")
    for _ in range(20):
        running.add(fired(5, 5), 10)
    for _ in range(16):
        running.add(fired(5, 0), 10)
    torch.testing.assert_close(running.density, torch.tensor([0.5, 0.0]))
    assert running.dead(below=0.0).tolist() == [False, True]


def test_rare_features_are_dead_by_their_density() -> None:
    running = RunningDensity(3, window=BLOCKS, device="cpu")
    for step in range(BLOCKS):
        running.add(fired(10, 1, int(step == 0)), 1000)
    assert running.dead(below=5e-4).tolist() == [False, False, True]
    assert running.dead(below=5e-5).tolist() == [False, False, False]


def test_nothing_is_dead_before_the_window_is_full() -> None:
    running = RunningDensity(1, window=100 * BLOCKS, device="cpu")
    for _ in range(100 * (BLOCKS - 1) - 1):
        running.add(fired(0), 10)
    assert not running.dead(1e-6).any()
    running.add(fired(0), 10)
    assert running.dead(1e-6).all()


def test_state_goes_through_a_checkpoint() -> None:
    one, other = (RunningDensity(2, window=24, device="cpu") for _ in range(2))
    for step in range(30):
        one.add(fired(step % 3, 1), 10)
    other.load_state_dict(one.state_dict())
    for step in range(5):
        for running in (one, other):
            running.add(fired(0, step), 10)
    assert torch.equal(one.density, other.density)
