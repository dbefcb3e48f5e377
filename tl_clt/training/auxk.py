"""AuxK: features that died are trained to write what the others leave out (Gao et al. 2024, section 2.3).

    auxk_loss = sum over layers ||e - e_hat||^2, mean over tokens,   e = outputs - recons (without gradient)
    e_hat     = what the `k_aux` dead features of each layer with the largest hidden_pre would write, without b_dec

Times min(1, dead features / (n_layers * k_aux)). A chosen feature counts with its pre-activation even where that is
negative, as in SAELens: set to 0, it would leave most dead features without a gradient at most tokens. Without dead
features nothing is computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from tl_clt.training.products import pick
from tl_clt.training.selection import largest_offers
from tl_clt.training.sparse import Support, support_of_topk

if TYPE_CHECKING:
    from tl_clt.training.sparse import Values
    from tl_clt.training.training_clt import TrainingCLT


def auxk_features(
    clt: TrainingCLT,
    layer: int,
    x: Float[Tensor, "batch d_model"],
    hidden_pre: Float[Tensor, "batch d_transcoder"],
    dead: Bool[Tensor, " all_features"],
    k_aux: int,
) -> tuple[Values, Support] | None:
    """One layer's chosen dead features: their pre-activations, with gradients, and places. None where none is dead.

    Args:
        clt: on a grid, one rank's share of it.
        layer: which.
        x: its scaled input.
        hidden_pre: of this rank's features.
        dead: of all features of the layer, on whatever rank.
        k_aux: to choose at a token, of all ranks' features.
    """
    grid, d_transcoder = clt.grid, clt.cfg.d_transcoder
    if not dead.any():
        return None
    numbers = dead[grid.own(d_transcoder)].nonzero().flatten()
    offers = torch.topk(hidden_pre.detach()[:, numbers], min(k_aux, len(numbers)), dim=1, sorted=False)
    if grid.n_feature_shards == 1:
        places = support_of_topk(numbers[offers.indices], d_transcoder)
    else:
        most = int(dead.unflatten(0, (grid.n_feature_shards, -1)).sum(dim=1).max())
        padding = (0, min(k_aux, most) - offers.values.shape[1])
        kept = largest_offers(F.pad(offers.values, padding, value=-torch.inf), min(k_aux, int(dead.sum())), grid)
        kept = kept[:, : offers.values.shape[1]]
        offsets = F.pad(kept.sum(dim=1).cumsum(dim=0), (1, 0))
        places = Support(numbers[offers.indices][kept], offsets, clt.n_own_features)
    return pick(hidden_pre.detach(), x, clt.W_enc[layer], clt.b_enc[layer], places), places


def auxk_loss(
    residual: Float[Tensor, "batch n_layers d_model"],
    written: Float[Tensor, "batch n_layers d_model"],
    n_dead: int,
    k_aux: int,
) -> Float[Tensor, ""]:
    """The loss, from what the chosen features write.

    Args:
        residual: e, without gradient.
        written: e_hat.
        n_dead: dead features of all layers.
        k_aux: of each layer.
    """
    share = min(1.0, n_dead / (residual.shape[1] * k_aux))
    return share * (residual - written).square().sum() / len(residual)
