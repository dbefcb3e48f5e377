"""AuxK: features that died are trained to write what the others leave out (Gao et al. 2024, section 2.3).

    auxk_loss = sum over layers ||e - e_hat||^2, mean over tokens,   e = outputs - recons (without gradient)
    e_hat     = what the `k_aux` dead features of each layer with the largest hidden_pre would write, without b_dec

Times min(1, dead features / (n_layers * k_aux)). A chosen feature counts with its pre-activation even where that is
negative, as in SAELens: on atlas 3% of the features were dead at the end, and 17% with negative ones set to 0, which
leaves features without a gradient at most tokens. Without dead features nothing is computed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_clt.training.products import pick
from tl_clt.training.sparse import support_of_topk

if TYPE_CHECKING:
    from tl_clt.training.sparse import Support, Values
    from tl_clt.training.training_clt import TrainingCLT


def auxk_features(
    clt: TrainingCLT,
    layer: int,
    x: Float[Tensor, "batch d_model"],
    hidden_pre: Float[Tensor, "batch d_transcoder"],
    dead: Bool[Tensor, " d_transcoder"],
    k_aux: int,
) -> tuple[Values, Support] | None:
    """One layer's chosen dead features: their pre-activations, with gradients, and places. None where none is dead."""
    numbers = dead.nonzero().flatten()
    if len(numbers) == 0:
        return None
    chosen = torch.topk(hidden_pre.detach()[:, numbers], min(k_aux, len(numbers)), dim=1, sorted=False).indices
    places = support_of_topk(numbers[chosen], clt.cfg.d_transcoder)
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
