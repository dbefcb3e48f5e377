"""Which features TopK and BatchTopK keep.

A feature's score at a token is what it writes: hidden_pre * ||W_dec,i||, the norm over all its decoder vectors. Kept
is what scores at least a threshold and more than 0:
    topk, per layer           the k-th largest score of the token in the layer
    topk, across layers       the (k * n_layers)-th largest of the token in all layers
    batchtopk, per layer      the (k * batch)-th largest of the batch in the layer
    batchtopk, across layers  the (k * batch * n_layers)-th largest of the batch in all layers
so that k is the mean number of features per layer and token in each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Across = Literal["layer", "all_layers"]
Scores = Float[Tensor, "batch d_transcoder"]

CANDIDATES_ABOVE = 0.7
"""Share of the running threshold above which a batch's smallest kept score is looked for first."""


def token_thresholds(scores: Sequence[Scores], n_kept: int) -> Float[Tensor, "batch 1"]:
    """Each token's `n_kept`-th largest score, over the features of all the layers given."""
    largest = [torch.topk(s, min(n_kept, s.shape[1]), dim=1, sorted=False).values for s in scores]
    together = torch.cat(largest, dim=1)
    return torch.topk(together, n_kept, dim=1, sorted=False).values.amin(dim=1, keepdim=True)


def batch_threshold(scores: Sequence[Scores], n_kept: int, guess: float) -> Float[Tensor, "1 1"]:
    """The `n_kept`-th largest score of a batch, over the features of all the layers given; 0 where fewer are positive.

    Args:
        scores: one tensor a layer.
        n_kept: how many to keep.
        guess: about what the result will be, or 0: it saves sorting what is far below, and changes nothing else.
    """
    for low in (CANDIDATES_ABOVE * guess, 0.0):
        candidates = torch.cat([s[s > low] for s in scores])
        if len(candidates) >= n_kept:
            return torch.kthvalue(candidates, len(candidates) - n_kept + 1).values.view(1, 1)
    return candidates.new_zeros(1, 1)


def annealed_k(k: int, k_start: int | None, anneal_steps: int, step: int) -> int:
    """k at a training step: it falls linearly from `k_start` to `k` over the first `anneal_steps` steps."""
    if k_start is None or step >= anneal_steps:
        return k
    return round(k_start + (k - k_start) * step / anneal_steps)
