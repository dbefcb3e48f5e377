"""Adam for weights in bfloat16: moments in float32, and weights rounded at random.

bfloat16 has 8 significant bits, and an update of Adam is often less than half of the last one: rounded to the
nearest, it is lost every time. Rounded up with the probability that the position between two neighbours gives, it is
right on average.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import BFloat16, Float32
from torch import Tensor
from torch.optim import Optimizer

LOW_BITS = 16
"""Bits that float32 has and bfloat16 has not."""


def round_at_random(x: Float32[Tensor, "*any"]) -> BFloat16[Tensor, "*any"]:
    """x in bfloat16: the neighbour above or below, so that the mean is x. Exact values and infinities stay."""
    # A number's bits, read as an integer, grow with its size, and their upper half is its bfloat16: add a random lower
    # half and cut. 64 random bits make four lower halves.
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    noise = words.view(torch.int16)[: x.numel()].view(x.shape).to(torch.int32) & (2**LOW_BITS - 1)
    bits = x.contiguous().view(torch.int32)
    rounded = ((bits + noise) & -(2**LOW_BITS)).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)


class RandomRoundingAdam(Optimizer):
    """Adam as torch has it (no weight decay), on bfloat16 weights."""

    def __init__(self, params: Iterable[Tensor], lr: float, betas: tuple[float, float], eps: float = 1e-8) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Change every weight that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._change(weight, group)
        return loss

    def _change(self, weight: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[weight], group["betas"]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(weight, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(weight, dtype=torch.float32)
        state["step"] += 1
        n, grad = int(state["step"]), weight.grad.float()  # type: ignore[union-attr]
        mean = state["exp_avg"].lerp_(grad, 1 - beta1)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        scale = square.sqrt().div_((1 - beta2**n) ** 0.5).add_(group["eps"])
        weight.copy_(round_at_random(weight.float().addcdiv_(mean, scale, value=-group["lr"] / (1 - beta1**n))))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but moments stay in float32, which torch casts to the weights' dtype."""
        super().load_state_dict(state_dict)
        weights = [weight for group in self.param_groups for weight in group["params"]]
        for index, saved in state_dict["state"].items():
            for name in ("exp_avg", "exp_avg_sq"):
                self.state[weights[index]][name] = saved[name].to(weights[index].device, torch.float32, copy=True)
