"""Which features a top-k keeps, chosen among those of all ranks.

Each rank offers its own k largest, so that the k largest of all are among what is offered. Every rank sees all offers
and orders them in the same way, and so all agree. Of equal values at the border the ranks with the lower features
come first, and exactly k are kept.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from tl_clt.training.sharding import ProcessGrid
from tl_clt.training.sparse import Support, support_of_topk


def topk_places(hidden_pre: Float[Tensor, "batch d_transcoder"], k: int, grid: ProcessGrid) -> Support:
    """The k largest of each token, of all ranks' features of one layer: those of them that are this rank's."""
    n_features = hidden_pre.shape[1]
    offers = torch.topk(hidden_pre, min(k, n_features), dim=1, sorted=False)
    if grid.n_feature_shards == 1:
        return support_of_topk(offers.indices, n_features)
    kept = _kept(offers.values, k, grid)
    offsets = F.pad(kept.sum(dim=1).cumsum(dim=0), (1, 0))
    return Support(offers.indices[kept], offsets, n_features)


def _kept(offers: Float[Tensor, "batch n_offers"], k: int, grid: ProcessGrid) -> Bool[Tensor, "batch n_offers"]:
    """Which of this rank's offers are among the k largest of all ranks' offers."""
    everyones, n = grid.all_features(offers, dim=1), offers.shape[1]
    first = torch.sort(everyones, dim=1, descending=True, stable=True).indices[:, :k]
    kept = torch.zeros_like(everyones, dtype=torch.bool).scatter_(1, first, True)
    return kept[:, grid.feature_index * n : (grid.feature_index + 1) * n]
