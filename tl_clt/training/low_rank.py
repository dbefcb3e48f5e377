"""Decoders of far layers as products of two thin matrices.

Features of a layer mostly write to the layer itself; what they write further on is a small part of the result and
most of the weights. With `far_rank` = r:
    W_dec[s -> s] is full,   W_dec[s -> t] = A[s -> t] @ B[s -> t]   for t > s,   A [d_transcoder, r], B [r, d_model]
A layer's own decoder and all its A lie side by side, [own | A_1 | A_2 | ...], so that decoding is one product of
all features, and then one of r numbers a target.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def spread(
    written: Float[Tensor, "batch own_and_ranks"], W_far: Float[Tensor, "n_far rank d_model"]
) -> Float[Tensor, "batch width"]:
    """What a layer writes to all its targets, from what its features write to [own | A_1 | A_2 | ...]."""
    n_far, rank, d_model = W_far.shape
    own, ranks = written[:, :d_model], written[:, d_model:].unflatten(1, (n_far, rank))
    far = torch.einsum("bjr,jrd->bjd", ranks, W_far.to(written.dtype)).to(written.dtype)
    return torch.cat([own, far.flatten(start_dim=1)], dim=1)


def full_decoder(
    W_dec: Float[Tensor, "d_transcoder own_and_ranks"], W_far: Float[Tensor, "n_far rank d_model"]
) -> Float[Tensor, "d_transcoder width"]:
    """A layer's decoder vectors side by side, as without `far_rank`."""
    return spread(W_dec, W_far)


def far_norms(
    W_dec: Float[Tensor, "d_transcoder own_and_ranks"], W_far: Float[Tensor, "n_far rank d_model"]
) -> Float[Tensor, " d_transcoder"]:
    """||W_dec,i|| over all decoder vectors, without making them: sum_t A_t,i (B_t B_t^T) A_t,i^T beside the own."""
    kind = torch.promote_types(W_dec.dtype, torch.float32)
    W_dec, W_far = W_dec.to(kind), W_far.to(kind)
    n_far, rank, d_model = W_far.shape
    own, A = W_dec[:, :d_model], W_dec[:, d_model:].unflatten(1, (n_far, rank))
    far = (torch.einsum("fjr,jrq->fjq", A, W_far @ W_far.mT) * A).sum(dim=(1, 2))
    return (own.square().sum(dim=1) + far).sqrt()
