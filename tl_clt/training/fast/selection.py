"""Which features TopK and BatchTopK keep: see `clt.smallest_kept_scores`, on a grid of processes and without sorting.

Features compete with those of all ranks of a grid, and the batch is that of all ranks. Each rank offers what might be
kept, every rank sees all offers, and so all agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from tl_clt.training.clt import TrainingCLT
from tl_clt.training.fast.products import Support, support_of_topk
from tl_clt.training.parallel import SINGLE, ProcessGrid

Scores = Float[Tensor, "batch d_transcoder"]

CANDIDATES_ABOVE = 0.7
"""Share of the running threshold above which a batch's smallest kept score is looked for first."""


class LayerTopK(NamedTuple):
    """What topk keeps of one layer."""

    places: Support
    """Where, of this rank's features."""

    smallest: Float[Tensor, " batch"]
    """The smallest score kept at each token, of all ranks' features."""


def layer_topk(scores: Scores, k: int, grid: ProcessGrid) -> LayerTopK:
    """Exactly the k largest of each token in one layer, of all ranks' features."""
    offers = torch.topk(scores, min(k, scores.shape[1]), dim=1, sorted=False)
    if grid.n_feature_shards == 1:
        return LayerTopK(support_of_topk(offers.indices, scores.shape[1]), offers.values.amin(dim=1))
    kept = largest_offers(offers.values, k, grid)
    offsets = F.pad(kept.sum(dim=1).cumsum(dim=0), (1, 0))
    smallest = torch.where(kept, offers.values, torch.inf).amin(dim=1)
    places = Support(offers.indices[kept], offsets, scores.shape[1])
    return LayerTopK(places, grid.all_features(smallest[:, None], dim=1).amin(dim=1))


def largest_offers(
    offers: Float[Tensor, "batch n_offers"], k: int, grid: ProcessGrid
) -> Bool[Tensor, "batch n_offers"]:
    """Which of this rank's offers are among the k largest of all ranks': of equal ones, those of lower ranks first.

    Args:
        offers: of as many on every rank; -inf where it has fewer.
        k: at most as many as are not -inf.
        grid: the ranks.
    """
    everyones, n = grid.all_features(offers, dim=1), offers.shape[1]
    first = torch.sort(everyones, dim=1, descending=True, stable=True).indices[:, :k]
    kept = torch.zeros_like(everyones, dtype=torch.bool).scatter_(1, first, True)
    return kept[:, grid.feature_index * n : (grid.feature_index + 1) * n]


def token_thresholds(scores: Sequence[Scores], n_kept: int, grid: ProcessGrid = SINGLE) -> Float[Tensor, "batch 1"]:
    """Each token's `n_kept`-th largest score, over the features of all the layers given."""
    largest = [torch.topk(s, min(n_kept, s.shape[1]), dim=1, sorted=False).values for s in scores]
    together = grid.all_features(torch.cat(largest, dim=1), dim=1)
    return torch.topk(together, n_kept, dim=1, sorted=False).values.amin(dim=1, keepdim=True)


def batch_threshold(
    scores: Sequence[Scores], n_kept: int, guess: float, grid: ProcessGrid = SINGLE
) -> Float[Tensor, "1 1"]:
    """The `n_kept`-th largest score of a batch, over the features of all the layers given; 0 where fewer are positive.

    Args:
        scores: one tensor a layer, of this rank's tokens and features.
        n_kept: how many to keep, of all ranks' together.
        guess: about what the result will be, or 0: it saves sorting what is far below, and changes nothing else.
        grid: the ranks.
    """
    for low in (CANDIDATES_ABOVE * guess, 0.0):
        candidates = grid.all_of_any_length(torch.cat([s[s > low] for s in scores]))
        if len(candidates) >= n_kept:
            return torch.kthvalue(candidates, len(candidates) - n_kept + 1).values.view(1, 1)
    return candidates.new_zeros(1, 1)


def smallest_kept(clt: TrainingCLT, scores: Sequence[Scores], k: int) -> list[Float[Tensor, "_ 1"]]:
    """The smallest score that is kept in each layer: of each token for topk, of the batch for batchtopk.

    Args:
        clt: on a grid, one rank's share of it.
        scores: of the layers that compete: all of them, or one by itself.
        k: features per layer and token.
    """
    together = clt.cfg.topk_across == "all_layers"
    groups = [list(scores)] if together else [[s] for s in scores]
    smallest = []
    for layer, group in enumerate(groups):
        n_kept = k * len(group)
        if clt.cfg.activation == "topk":
            smallest.append(token_thresholds(group, n_kept, clt.grid))
        else:
            guess = float(clt.score_threshold[layer])
            n_tokens = len(group[0]) * clt.grid.n_data_parallel
            smallest.append(batch_threshold(group, n_kept * n_tokens, guess, clt.grid))
    return smallest * len(scores) if together else smallest
