"""Model weights under the same names and shapes on both kinds of model."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_clt.lens.types import HookedModel


def unembedding_directions(model: HookedModel, token_ids: Int[Tensor, " n"]) -> Float[Tensor, "n d_model"]:
    """`W_U[:, k]` minus its mean over the vocabulary: what pushes logit k above the rest."""
    W_U = model.W_U.detach()
    return W_U[:, token_ids].T - W_U.mean(dim=1)


def unembedding_biases(model: HookedModel, token_ids: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """`b_U[k]` minus its mean over the vocabulary."""
    b_U = model.b_U.detach()
    return b_U[token_ids] - b_U.mean()


def dtype_of(model: HookedModel) -> torch.dtype:
    """Number type of the weights."""
    return model.W_E.dtype
