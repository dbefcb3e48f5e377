"""How often each feature fires, over the last steps."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

BLOCKS = 8
"""Parts of the window: the oldest is dropped whole when a new one begins."""


class RunningDensity:
    """The share of tokens at which each feature fires, over the last `window` steps (and up to an eighth fewer)."""

    def __init__(self, d_sae: int, window: int, device: torch.device | str) -> None:
        """Nothing seen yet.

        Args:
            d_sae: features of all layers.
            window: steps.
            device: where the counts are.
        """
        self.steps_per_block = max(1, -(-window // BLOCKS))
        self.n_steps = 0
        self.fired = torch.zeros(BLOCKS, d_sae, dtype=torch.long, device=device)
        self.tokens = torch.zeros(BLOCKS, dtype=torch.long, device=device)

    @torch.no_grad()
    def add(self, fired: Int[Tensor, " d_sae"], n_tokens: int) -> None:
        """A step: at how many of its tokens each feature fired."""
        block = self.n_steps // self.steps_per_block % BLOCKS
        if self.n_steps % self.steps_per_block == 0:
            self.fired[block] = 0
            self.tokens[block] = 0
        self.fired[block] += fired
        self.tokens[block] += n_tokens
        self.n_steps += 1

    @property
    def density(self) -> Float[Tensor, " d_sae"]:
        """Of each feature; 0 before the first step."""
        return self.fired.sum(dim=0) / self.tokens.sum().clamp(min=1)

    def dead(self, below: float) -> Bool[Tensor, " d_sae"]:
        """Features with a density under `below`, or that did not fire at all. None before the window is full."""
        if self.n_steps < self.steps_per_block * (BLOCKS - 1):
            return torch.zeros_like(self.fired[0], dtype=torch.bool)
        fired = self.fired.sum(dim=0)
        return (fired == 0) | (fired < below * self.tokens.sum())

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints."""
        return {"n_steps": self.n_steps, "fired": self.fired.clone(), "tokens": self.tokens.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.n_steps = state["n_steps"]
        self.fired.copy_(state["fired"])
        self.tokens.copy_(state["tokens"])
