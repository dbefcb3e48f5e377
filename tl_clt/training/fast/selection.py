"""Which features TopK and BatchTopK keep: see `clt.smallest_kept_scores`, on a grid of processes and without sorting.

Features compete with those of all ranks of a grid, and the batch is that of all ranks. Each rank offers what might be
kept, every rank sees all offers, and so all agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from tl_clt.training.clt import TrainingCLT
from tl_clt.training.fast.products import GROUP, Support, support_above, support_of_topk
from tl_clt.training.parallel import SINGLE, ProcessGrid

Scores = Float[Tensor, "batch d_transcoder"]

CANDIDATES_ABOVE = (0.9, 0.6, 0.0)
"""Shares of the running threshold above which a batch's smallest kept score is looked for, one after another until
there are enough candidates."""


class Selected(NamedTuple):
    """What is kept of some layers."""

    places: list[Support]
    """Where, in each layer, of this rank's tokens and features."""

    smallest: list[Float[Tensor, ""]]
    """The smallest score kept in each layer, of all ranks' features; mean over this rank's tokens."""


class LayerTopK(NamedTuple):
    """What topk keeps of one layer."""

    places: Support
    """Where, of this rank's features."""

    smallest: Float[Tensor, " batch"]
    """The smallest score kept at each token, of all ranks' features."""


def layer_topk(scores: Scores, k: int, grid: ProcessGrid) -> LayerTopK:
    """Exactly the k largest of each token in one layer, of all ranks' features."""
    offers = largest(scores, min(k, scores.shape[1]))
    if grid.n_feature_shards == 1:
        return LayerTopK(support_of_topk(offers.indices, scores.shape[1]), offers.values.amin(dim=1))
    kept = largest_offers(offers.values, k, grid)
    offsets = F.pad(kept.sum(dim=1).cumsum(dim=0), (1, 0))
    smallest = torch.where(kept, offers.values, torch.inf).amin(dim=1)
    places = Support(offers.indices[kept], offsets, scores.shape[1])
    return LayerTopK(places, grid.all_features(smallest[:, None], dim=1).amin(dim=1))


class Largest(NamedTuple):
    """As `torch.topk` gives it, in any order."""

    values: Float[Tensor, "batch k"]
    """The largest scores of each token."""

    indices: Int[Tensor, "batch k"]
    """Of which features."""


def largest(scores: Scores, k: int) -> Largest:
    """The k largest scores of each token.

    On the CPU, torch.topk takes longer than the product that made the scores. The k largest scores are in the k groups
    whose largest score is largest: it chooses groups first, and then among their members only.
    """
    n_tokens, n_features = scores.shape
    n_groups = n_features // GROUP
    if scores.device.type != "cpu":
        return Largest(*torch.topk(scores, k, dim=1, sorted=False))
    if n_groups * GROUP != n_features or n_groups < k:
        return _largest_on_cpu(scores, k)
    grouped = scores.view(n_tokens, GROUP, n_groups)
    groups = _largest_on_cpu(grouped.amax(dim=1), k).indices
    members = grouped.gather(2, groups[:, None, :].expand(-1, GROUP, -1)).flatten(start_dim=1)
    values, places = _largest_on_cpu(members, k)
    return Largest(values, places // k * n_groups + groups.gather(1, places % k))


def _largest_on_cpu(scores: Scores, k: int) -> Largest:
    """By numpy's partition, which takes a third of the time of torch.topk. What is no number is largest in both."""
    n_others = scores.shape[1] - k
    if n_others == 0:
        return Largest(scores, torch.arange(k).expand(len(scores), k))
    indices = torch.from_numpy(np.argpartition(scores.detach().numpy(), n_others, axis=1)[:, n_others:])
    return Largest(scores.gather(1, indices), indices)


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
    offers = [largest(s, min(n_kept, s.shape[1])).values for s in scores]
    together = grid.all_features(torch.cat(offers, dim=1), dim=1)
    return largest(together, n_kept).values.amin(dim=1, keepdim=True)


def batch_topk(scores: Sequence[Scores], n_kept: int, guess: float, grid: ProcessGrid = SINGLE) -> Selected:
    """The `n_kept` largest scores of a batch, where they are positive, over the features of all the layers given.

    Args:
        scores: one tensor a layer, of this rank's tokens and features.
        n_kept: how many to keep, of all ranks' together.
        guess: about what the smallest will be, or 0: it saves looking at what is far below, and changes nothing else.
        grid: the ranks.
    """
    for share in CANDIDATES_ABOVE:
        places = [support_above(s, s.new_full((1, 1), share * guess)) for s in scores]
        scores_here = [support.gather(s) for support, s in zip(places, scores, strict=True)]
        candidates = grid.all_of_any_length(torch.cat(scores_here))
        if len(candidates) >= n_kept:
            smallest = torch.kthvalue(candidates, len(candidates) - n_kept + 1).values
            kept = [support.only(~(values < smallest)) for support, values in zip(places, scores_here, strict=True)]
            return Selected(kept, [smallest] * len(scores))
    return Selected(places, [candidates.new_zeros(())] * len(scores))


def select(clt: TrainingCLT, layers: range, scores: Sequence[Scores], k: int) -> Selected:
    """What is kept of layers that compete: in training within the batch, otherwise as at inference.

    Args:
        clt: on a grid, one rank's share of it.
        layers: all of them, or one by itself.
        scores: of each.
        k: features per layer and token.
    """
    cfg, grid = clt.cfg, clt.grid
    if cfg.has_score_threshold and not clt.selects_in_batch:
        smallest = [clt.score_threshold[s] for s in layers]
        lows = [t.clamp(min=0.0).view(1, 1) for t in smallest]
        return Selected([support_above(s, low) for s, low in zip(scores, lows, strict=True)], smallest)
    if cfg.activation == "batchtopk":
        n_kept = k * len(layers) * len(scores[0]) * grid.n_data_parallel
        return batch_topk(scores, n_kept, float(clt.score_threshold[layers[0]]), grid)
    if cfg.topk_across == "layer":
        best = layer_topk(scores[0], k, grid)
        return Selected([best.places], [best.smallest.mean()])
    of_token = token_thresholds(scores, k * len(layers), grid)
    below = torch.nextafter(of_token, of_token.new_tensor(-torch.inf)).clamp(min=0.0)
    return Selected([support_above(s, below) for s in scores], [of_token.mean()] * len(layers))
