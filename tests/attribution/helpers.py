"""What several tests of attribution share: a prompt, definitions that are written out, comparisons."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

TOKENS = torch.tensor([0, 7, 19, 4, 33, 50, 21])


def normalised(adjacency: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """A of the Methods: |adjacency| with each row divided by its sum."""
    return adjacency.abs() / adjacency.abs().sum(dim=1, keepdim=True).clamp_min(1e-8)
