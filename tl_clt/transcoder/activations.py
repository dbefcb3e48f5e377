"""phi: from pre-activations to sparse feature activations (Methods, "From Transcoders to the Replacement Model")."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def jumprelu(
    hidden_pre: Float[Tensor, "*batch d_transcoder"], threshold: Float[Tensor, " d_transcoder"]
) -> Float[Tensor, "*batch d_transcoder"]:
    """`hidden_pre` where it is strictly above its feature's threshold, else 0."""
    return hidden_pre * (hidden_pre > threshold)


def topk(hidden_pre: Float[Tensor, "*batch d_transcoder"], k: int) -> Float[Tensor, "*batch d_transcoder"]:
    """The k largest pre-activations of each token that are positive, else 0."""
    kept = torch.topk(hidden_pre, k, dim=-1)
    return torch.zeros_like(hidden_pre).scatter(-1, kept.indices, torch.relu(kept.values))
