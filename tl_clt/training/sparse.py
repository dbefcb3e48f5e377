"""Sums over the features that are active, and only over those.

With A [batch, n_features] the activations, mostly zero, and a support S of the places that count:
    weighted_rows   A @ W             reads a weight row for each active feature
    add_outer       G += A.T @ g      writes each weight row once
    inner_products  (g @ W.T) on S
All are what the dense products are, up to the order of addition, at a cost in proportion to the places of S.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

Values = Float[Tensor, " n_places"]
"""One value at each place of a support."""


class ByFeature(NamedTuple):
    """The same places, sorted by feature, then by token."""

    order: Int[Tensor, " n_places"]
    """Where each place is in the order by token."""

    tokens: Int[Tensor, " n_places"]
    """The token of each."""

    offsets: Int[Tensor, " n_features_plus_1"]
    """Where each feature's places begin, and the end."""


@dataclass(frozen=True)
class Support:
    """Places (token, feature) of one layer, sorted by token."""

    features: Int[Tensor, " n_places"]
    """The feature of each place."""

    offsets: Int[Tensor, " batch_plus_1"]
    """Where each token's places begin, and the end."""

    n_features: int
    """Features of the layer."""

    @property
    def n_tokens(self) -> int:
        """Tokens of the batch."""
        return len(self.offsets) - 1

    @cached_property
    def tokens(self) -> Int[Tensor, " n_places"]:
        """The token of each place."""
        tokens = torch.arange(self.n_tokens, device=self.offsets.device)
        return tokens.repeat_interleave(self.offsets.diff(), output_size=len(self.features))

    @cached_property
    def by_feature(self) -> ByFeature:
        """The places in the order that sums over tokens need."""
        order = torch.argsort(self.features, stable=True)
        counts = torch.bincount(self.features, minlength=self.n_features)
        return ByFeature(order, self.tokens[order], F.pad(counts.cumsum(0), (1, 0)))

    def gather(self, dense: Float[Tensor, "batch n_features"]) -> Values:
        """A dense tensor's values at the places."""
        return dense[self.tokens, self.features]

    def to_dense(self, values: Values) -> Float[Tensor, "batch n_features"]:
        """The values at the places, 0 elsewhere."""
        return values.new_zeros(self.n_tokens, self.n_features).index_put((self.tokens, self.features), values)


def support_of_topk(indices: Int[Tensor, "batch k"], n_features: int) -> Support:
    """The places that a top-k chose, as many for each token."""
    n_tokens, k = indices.shape
    offsets = torch.arange(0, n_tokens * k + 1, k, device=indices.device)
    return Support(indices.flatten(), offsets, n_features)


def support_of_dense(acts: Float[Tensor, "batch n_features"]) -> Support:
    """The places where a tensor is not zero."""
    with _without_csr_notice():
        csr = acts.to_sparse_csr()
    return Support(csr.col_indices(), csr.crow_indices(), acts.shape[1])


def weighted_rows(
    values: Values, support: Support, weight: Float[Tensor, "n_features width"]
) -> Float[Tensor, "batch width"]:
    """`A @ weight`, in the dtype of the values."""
    rows = F.embedding_bag(
        support.features,
        weight,
        support.offsets,
        per_sample_weights=values.to(weight.dtype),
        mode="sum",
        include_last_offset=True,
    )
    return rows.to(values.dtype)


def add_outer(
    total: Float[Tensor, "n_features width"],
    values: Values,
    support: Support,
    grad: Float[Tensor, "batch width"],
    block: int,
) -> None:
    """`total += A.T @ grad`, `block` columns at a time: what is read and what is made then stay in the cache."""
    order, tokens, offsets = support.by_feature
    values = values[order].to(grad.dtype)
    for part, columns in zip(total.split(block, dim=1), grad.split(block, dim=1), strict=True):
        rows = F.embedding_bag(
            tokens,
            columns.contiguous(),
            offsets,
            per_sample_weights=values,
            mode="sum",
            include_last_offset=True,
        )
        part.add_(rows)


def inner_products(
    grad: Float[Tensor, "batch width"], weight: Float[Tensor, "n_features width"], support: Support
) -> Values:
    """`grad @ weight.T` at the places of a support. Taken by feature, so that each weight row is read once."""
    order, tokens, offsets = support.by_feature
    with _without_csr_notice():
        places = torch.sparse_csr_tensor(
            offsets,
            tokens,
            grad.new_zeros(len(tokens)),
            size=(support.n_features, support.n_tokens),
            check_invariants=False,
        )
    products = torch.sparse.sampled_addmm(places, weight.to(grad.dtype), grad.T, beta=0.0).values()
    return torch.empty_like(products).index_copy_(0, order, products)


@contextmanager
def _without_csr_notice() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        yield
