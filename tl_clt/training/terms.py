"""phi and the loss terms that are sums over features: a block of tokens at a time.

Taken at once, the terms keep half a dozen tensors [batch, d_transcoder] for the backward pass. Here a block of tokens
goes through the plain formulas (`plain_terms`), which stays in the cache; backward goes through them again,
with gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from tl_clt.training.activations import StraightThrough, jumprelu, step_function
from tl_clt.training.losses import SparsityKind, dead_feature_loss, tanh_count

BLOCK_ELEMENTS = {"cpu": 2**18}
"""Pre-activations of a block: 1 MiB in float32."""
BLOCK_ELEMENTS_ELSEWHERE = 2**26
"""On a GPU launching small blocks costs more than the memory saved."""


@dataclass(frozen=True, kw_only=True)
class TermOptions:
    """Which phi and which terms."""

    activation: Literal["relu", "jumprelu"]
    """phi."""

    bandwidth: float
    """Of the straight-through gradient."""

    straight_through: StraightThrough
    """What it reaches."""

    sparsity: SparsityKind
    """What each feature counts for in the sparsity loss."""

    tanh_scale: float
    """c of "tanh"."""

    dead_features: bool
    """Whether there is a dead-feature loss."""


class PlainTerms(NamedTuple):
    """What the plain formulas give for a block of tokens of one layer."""

    feature_acts: Float[Tensor, "batch d_transcoder"]
    """After phi."""

    counts: Float[Tensor, " batch"]
    """What the features count for in the sparsity loss, summed over the layer, at each token."""

    dead_features: Float[Tensor, ""]
    """The dead-feature loss, summed over tokens."""


class Terms(NamedTuple):
    """The same for a whole batch, with firing counts."""

    feature_acts: Float[Tensor, "batch d_transcoder"]
    """After phi."""

    counts: Float[Tensor, " batch"]
    """What the features count for in the sparsity loss, summed over the layer, at each token."""

    dead_features: Float[Tensor, ""]
    """The dead-feature loss, summed over tokens."""

    fired: Int[Tensor, " d_transcoder"]
    """Tokens at which each feature fires."""


def plain_terms(
    hidden_pre: Float[Tensor, "batch d_transcoder"],
    threshold: Float[Tensor, " d_transcoder"],
    norms: Float[Tensor, " d_transcoder"],
    options: TermOptions,
) -> PlainTerms:
    """The formulas of `activations` and `losses`, for one layer."""
    if options.activation == "jumprelu":
        acts = jumprelu(hidden_pre, threshold, options.bandwidth, options.straight_through)
    else:
        acts = torch.relu(hidden_pre)
    if options.sparsity == "tanh":
        counts = tanh_count(acts, norms, options.tanh_scale)
    else:
        counts = step_function(hidden_pre, threshold, options.bandwidth, options.straight_through).sum(dim=1)
    dead = hidden_pre.new_zeros(())
    if options.dead_features:
        dead = len(hidden_pre) * dead_feature_loss([hidden_pre], [threshold], [norms])
    return PlainTerms(acts, counts, dead)


def terms(
    hidden_pre: Float[Tensor, "batch d_transcoder"],
    threshold: Float[Tensor, " d_transcoder"],
    norms: Float[Tensor, " d_transcoder"],
    options: TermOptions,
    out: Float[Tensor, "batch d_transcoder"],
) -> Terms:
    """`plain_terms` of a whole batch, with its gradients, block by block. Activations are written into `out`."""
    return Terms(*_Terms.apply(hidden_pre, threshold, norms, options, out))


class _Terms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_pre: Tensor, threshold: Tensor, norms: Tensor, options: TermOptions, acts: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(hidden_pre, threshold, norms)
        ctx.mark_dirty(acts)
        ctx.options = options
        counts, dead_features = hidden_pre.new_empty(len(hidden_pre)), hidden_pre.new_zeros(())
        fired = torch.zeros(hidden_pre.shape[1], dtype=torch.long, device=hidden_pre.device)
        for rows in _blocks(hidden_pre):
            block = plain_terms(hidden_pre[rows], threshold, norms, options)
            acts[rows] = block.feature_acts
            counts[rows] = block.counts
            dead_features += block.dead_features
            fired += block.feature_acts.count_nonzero(dim=0)
        ctx.mark_non_differentiable(fired)
        return acts, counts, dead_features, fired

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, for_acts: Tensor, for_counts: Tensor, for_dead: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden_pre, threshold, norms = ctx.saved_tensors
        for_hidden_pre = torch.empty_like(hidden_pre)
        for_threshold, for_norms = torch.zeros_like(threshold), torch.zeros_like(norms)
        threshold, norms = threshold.detach().requires_grad_(), norms.detach().requires_grad_()
        for rows in _blocks(hidden_pre):
            with torch.enable_grad():
                h = hidden_pre[rows].detach().requires_grad_()
                block = plain_terms(h, threshold, norms, ctx.options)
            upstream = (for_acts[rows], for_counts[rows], for_dead)
            wanted = [(term, grad) for term, grad in zip(block, upstream, strict=True) if term.requires_grad]
            outputs, upstream = zip(*wanted, strict=True)
            grads = torch.autograd.grad(outputs, (h, threshold, norms), upstream, allow_unused=True)
            for_hidden_pre[rows] = grads[0]
            for total, grad in zip((for_threshold, for_norms), grads[1:], strict=True):
                if grad is not None:
                    total += grad
        return for_hidden_pre, for_threshold, for_norms, None, None


def _blocks(hidden_pre: Tensor) -> list[slice]:
    elements = BLOCK_ELEMENTS.get(hidden_pre.device.type, BLOCK_ELEMENTS_ELSEWHERE)
    n = max(1, elements // hidden_pre.shape[1])
    return [slice(start, start + n) for start in range(0, len(hidden_pre), n)]
