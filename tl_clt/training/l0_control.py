"""lambda for an L0: what users want to say is how many features are active, not what one costs."""

from __future__ import annotations

import math
from typing import Any

SMOOTHING = 0.9
"""Weight of what was seen before in the running L0."""


class L0Controller:
    """Adjusts lambda so that L0 follows a course down to its target. Stands among SAELens's coefficient schedulers.

    After each step:
        lambda <- lambda * (L0 / course)^gain,   course = L0_first^(1 - p) * target^p,   p = min(1, step / ramp_steps)
    with L0 the running mean of active features per layer. The course keeps lambda from rising without bound while
    features are yet to learn: at the start half of them are active. One step's factor is at most e^gain.
    """

    def __init__(self, target: float, start: float, ramp_steps: int, gain: float) -> None:
        """Before the first step.

        Args:
            target: active features per layer and token, mean over layers.
            start: lambda of the first step.
            ramp_steps: steps until the course is at its target.
            gain: how fast lambda follows.
        """
        self.target, self.start, self.ramp_steps, self.gain = target, start, ramp_steps, gain
        self.current_step = 0
        self.log_value = math.log(start)
        self.first: float | None = None
        self.running: float | None = None

    @property
    def value(self) -> float:
        """lambda."""
        return math.exp(self.log_value)

    def observe(self, l0: float) -> None:
        """A step's active features per layer and token."""
        if self.first is None or self.running is None:
            self.first = self.running = max(l0, self.target)
        self.running += (1 - SMOOTHING) * (l0 - self.running)

    def step(self) -> float:
        """Adjust lambda; gives the new one."""
        self.current_step += 1
        if self.first is not None and self.running is not None:
            share = min(1.0, self.current_step / max(1, self.ramp_steps))
            course = (1 - share) * math.log(self.first) + share * math.log(self.target)
            distance = math.log(max(self.running, 1e-6)) - course
            self.log_value += self.gain * max(-1.0, min(1.0, distance))
        return self.value

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints."""
        names = ("current_step", "log_value", "first", "running")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        for name, value in state.items():
            setattr(self, name, value)
