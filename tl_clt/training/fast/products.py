"""The matrix products of a CLT, with gradients that cost no more memory than they must.

Each product with a weight writes that weight's gradient where it belongs. Where a weight has a `.grad`, `backward()`
adds the product to it in place; where it has none, and that of the step before was set aside (`set_gradients_aside`, in
the place of `zero_grad`), the product is written over that, which becomes `.grad`. In both cases autograd is handed
nothing for that weight: a fresh gradient above glibc's largest mmap threshold (32 MiB) is given back to the system and
faulted in again at every step, which takes as long as half of the product that fills it, and zeros are written and read
for nothing. What looks at gradients on their way would see nothing. So autograd gets the gradient as from any operation
where there is neither, where it is not to be added to `.grad` (`torch.autograd.grad`), and where the weight has hooks.
The hooks of DistributedDataParallel cannot be told: `FastStep` refuses to run within it.

Under autocast, and with weights in a lower precision, products take that precision and sums float32.

Sums over active features only: with A [batch, n_features] the activations, mostly zero, and a support S of the places
that count,
    weighted_rows   A @ W             reads a weight row for each active feature
    add_outer       G (+)= A.T @ g    writes each weight row once
    inner_products  (g @ W.T) on S
are what the dense products are, up to the order of addition, at a cost in proportion to the places of S.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from tl_clt.training.parallel import SINGLE, ProcessGrid


def encode(
    x: Float[Tensor, "batch d_model"],
    W_enc: Float[Tensor, "d_transcoder d_model"],
    b_enc: Float[Tensor, " d_transcoder"],
    out: Float[Tensor, "batch d_transcoder"],
) -> Float[Tensor, "batch d_transcoder"]:
    """`x @ W_enc.T + b_enc`, written into `out`. No gradient reaches x, which is data."""
    return _Encode.apply(x, W_enc, b_enc, out)


def attach_gradients(
    hidden_pre: Float[Tensor, "batch d_transcoder"],
    x: Float[Tensor, "batch d_model"],
    W_enc: Float[Tensor, "d_transcoder d_model"],
    b_enc: Float[Tensor, " d_transcoder"],
) -> Float[Tensor, "batch d_transcoder"]:
    """`encode(x, W_enc, b_enc)` that was computed without gradients, with them."""
    return _AttachGradients.apply(hidden_pre, x, W_enc, b_enc)


def encode_places(
    hidden_pre: Float[Tensor, "batch d_transcoder"],
    x: Float[Tensor, "batch d_model"],
    W_enc: Float[Tensor, "d_transcoder d_model"],
    b_enc: Float[Tensor, " d_transcoder"],
    support: Support,
) -> Values:
    """`encode(x, W_enc, b_enc)` at the places of a support, out of a `hidden_pre` that needs no gradient itself."""
    return _EncodePlaces.apply(hidden_pre, x, W_enc, b_enc, support)


def encode_rows(
    hidden_pre: Float[Tensor, "batch d_transcoder"],
    x: Float[Tensor, "batch d_model"],
    W_enc: Float[Tensor, "d_transcoder d_model"],
    b_enc: Float[Tensor, " d_transcoder"],
    rows: Int[Tensor, " n_rows"],
) -> Float[Tensor, "batch n_rows"]:
    """`encode(x, W_enc, b_enc)` of some features alone, out of a `hidden_pre` that needs no gradient itself."""
    return _EncodeRows.apply(hidden_pre, x, W_enc, b_enc, rows)


def decode(
    feature_acts: Float[Tensor, "batch d_transcoder"],
    W_dec: Float[Tensor, "d_transcoder width"],
    support: Support | None = None,
) -> Float[Tensor, "batch width"]:
    """`feature_acts @ W_dec`: what one layer's features write, to all their targets at once.

    Args:
        feature_acts: of one layer; its gradient is dense, and made where it is asked for.
        W_dec: the layer's decoder vectors side by side.
        support: where feature_acts may differ from 0. Where given, the products run over these places only.
    """
    return _Decode.apply(feature_acts, W_dec, support)


def decode_places(
    values: Values, W_dec: Float[Tensor, "d_transcoder width"], support: Support
) -> Float[Tensor, "batch width"]:
    """The same of activations that exist at the places of a support only, in both directions."""
    return _DecodePlaces.apply(values, W_dec, support)


def decode_rows(
    feature_acts: Float[Tensor, "batch n_rows"],
    W_dec: Float[Tensor, "d_transcoder width"],
    rows: Int[Tensor, " n_rows"],
) -> Float[Tensor, "batch width"]:
    """`feature_acts @ W_dec[rows]`: what these features alone write."""
    return _DecodeRows.apply(feature_acts, W_dec, rows)


def row_norms(W: Float[Tensor, "d_transcoder width"]) -> Float[Tensor, " d_transcoder"]:
    """The 2-norm of each row."""
    return _RowNorms.apply(W)


def sum_by_target(
    written: Sequence[Float[Tensor, "batch _"]], shape: tuple[int, int], grid: ProcessGrid = SINGLE
) -> Float[Tensor, "batch n_layers d_model"]:
    """What each source layer wrote, to its own layer and the next ones; summed over sources and a grid's features.

    Args:
        written: by each source layer, to its targets side by side.
        shape: n_layers and d_model.
        grid: the processes.
    """
    return grid.sum_over_features(_SumByTarget.apply(shape, *written))


class _SumByTarget(torch.autograd.Function):
    """Each source's gradient is a part of the sum's: autograd would put a copy together."""

    @staticmethod
    def forward(ctx: Any, shape: tuple[int, int], *written: Tensor) -> Tensor:
        ctx.widths = [one.shape[1] for one in written]
        total = torch.zeros(len(written[0]), shape[0] * shape[1], dtype=written[0].dtype, device=written[0].device)
        for source, one in enumerate(written):
            start = source * shape[1]
            total[:, start : start + one.shape[1]] += one
        ctx.d_model = shape[1]
        return total.unflatten(1, shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        flat = grad.flatten(start_dim=1)
        starts = [source * ctx.d_model for source in range(len(ctx.widths))]
        return None, *(flat[:, a : a + width] for a, width in zip(starts, ctx.widths, strict=True))


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, out: Tensor) -> Tensor:
        ctx.low = _product_dtype(W_enc)
        ctx.save_for_backward(x, W_enc, b_enc)
        ctx.mark_dirty(out)
        if ctx.low is None:
            return torch.addmm(b_enc, x, W_enc.T, out=out)
        return torch.add(_product(x, W_enc.T, ctx.low), b_enc, out=out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, b_enc = ctx.saved_tensors
        return None, _add_product(W_enc, grad.T, x, ctx.low), grad.sum(dim=0).to(b_enc.dtype), None


class _AttachGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_pre: Tensor, x: Tensor, W_enc: Tensor, b_enc: Tensor) -> Tensor:
        ctx.low = _product_dtype(W_enc)
        ctx.save_for_backward(x, W_enc, b_enc)
        return hidden_pre.view_as(hidden_pre)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, b_enc = ctx.saved_tensors
        return None, None, _add_product(W_enc, grad.T, x, ctx.low), grad.sum(dim=0).to(b_enc.dtype)


class _EncodePlaces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_pre: Tensor, x: Tensor, W_enc: Tensor, b_enc: Tensor, support: Support) -> Tensor:
        ctx.save_for_backward(x, W_enc, b_enc)
        ctx.support = support
        return support.gather(hidden_pre)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, b_enc = ctx.saved_tensors
        ones = x.new_ones(len(x), 1)
        for_bias = torch.empty_like(b_enc)
        add_outer(for_bias[:, None], grad, ctx.support, ones, adds=False)
        return None, None, _add_sparse_product(W_enc, grad, ctx.support, x), for_bias, None


class _EncodeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_pre: Tensor, x: Tensor, W_enc: Tensor, b_enc: Tensor, rows: Tensor) -> Tensor:
        ctx.low = _product_dtype(W_enc)
        ctx.save_for_backward(x, W_enc, b_enc, rows)
        return hidden_pre.index_select(1, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, b_enc, rows = ctx.saved_tensors
        for_bias = torch.zeros_like(b_enc).index_copy_(0, rows, grad.sum(dim=0).to(b_enc.dtype))
        return None, None, _add_product_of_rows(W_enc, rows, grad.T, x, ctx.low), for_bias, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, feature_acts: Tensor, W_dec: Tensor, support: Support | None) -> Tensor:
        ctx.low, ctx.support = _product_dtype(W_dec), support
        if support is not None:
            values = support.gather(feature_acts)
            ctx.save_for_backward(values, W_dec)
            return weighted_rows(values, support, W_dec)
        acts = feature_acts if ctx.low is None else feature_acts.to(ctx.low)
        ctx.save_for_backward(acts, W_dec)
        return _product(acts, W_dec, ctx.low)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        acts, W_dec = ctx.saved_tensors
        if ctx.support is None:
            for_W = _add_product(W_dec, acts.T, grad, ctx.low)
        else:
            for_W = _add_sparse_product(W_dec, acts, ctx.support, grad)
        for_acts = _product(grad, W_dec.T, ctx.low) if ctx.needs_input_grad[0] else None
        return for_acts, for_W, None


class _DecodePlaces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, support: Support) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.support = support
        return weighted_rows(values, support, W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, W_dec = ctx.saved_tensors
        for_values = inner_products(grad, W_dec, ctx.support)
        return for_values, _add_sparse_product(W_dec, values, ctx.support, grad), None


class _DecodeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, feature_acts: Tensor, W_dec: Tensor, rows: Tensor) -> Tensor:
        ctx.low = _product_dtype(W_dec)
        ctx.save_for_backward(feature_acts, W_dec, rows)
        return _product(feature_acts, W_dec.index_select(0, rows), ctx.low)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        acts, W_dec, rows = ctx.saved_tensors
        # The rows are read out once more: kept, those of all layers would take their part of the weights' memory.
        for_acts = _product(grad, W_dec.index_select(0, rows).T, ctx.low)
        return for_acts, _add_product_of_rows(W_dec, rows, acts.T, grad, ctx.low), None


class _RowNorms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W: Tensor) -> Tensor:
        norms = W.norm(dim=1, dtype=torch.promote_types(W.dtype, torch.float32))
        ctx.save_for_backward(W, norms)
        return norms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor | None:
        W, norms = ctx.saved_tensors
        # A row of zeros has no direction: its gradient is 0, as that of torch's norm.
        share = torch.where(norms > 0, grad / norms, 0.0)[:, None].to(W.dtype)
        memory = _gradient(W)
        if memory is None:
            return W * share
        total, adds = memory
        if adds:
            total.addcmul_(W, share)
        else:
            torch.mul(W, share, out=total)
        return None


def _product_dtype(weight: Tensor) -> torch.dtype | None:
    """The lower precision that products are to take, if any."""
    device = weight.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype if weight.dtype in (torch.bfloat16, torch.float16) else None


def _product(a: Tensor, b: Tensor, low: torch.dtype | None) -> Tensor:
    return a @ b if low is None else (a.to(low) @ b.to(low)).float()


_ASIDE = WeakTensorKeyDictionary()
"""Memory for the gradients of weights."""


def set_gradients_aside(weights: Iterable[Tensor]) -> None:
    """Drop the gradients, whose memory the next products with these weights write theirs into."""
    for weight in weights:
        if weight.grad is not None:
            _ASIDE[weight] = weight.grad
            weight.grad = None


def zero_gradients_aside(weights: Iterable[Tensor]) -> None:
    """After a backward pass: what no product was written into is a gradient of zeros, unless there is another."""
    for weight in weights:
        memory = _ASIDE.pop(weight, None)
        if memory is not None and weight.grad is None:
            weight.grad = memory.zero_()


def _gradient(weight: Tensor) -> tuple[Tensor, bool] | None:
    """Where a weight's gradient may be written to, and whether what is there is a gradient to be added to."""
    if not weight.is_leaf or (weight.grad is None and weight not in _ASIDE):
        return None
    if weight._backward_hooks or weight._post_accumulate_grad_hooks:
        return None
    try:
        adds_to_grad = torch._C._will_engine_execute_node(get_gradient_edge(weight).node)
    except RuntimeError:  # what torch says of a leaf that `torch.autograd.grad` was asked for
        adds_to_grad = False
    if not adds_to_grad:
        return None
    if weight.grad is not None:
        return weight.grad, True
    memory = _ASIDE.pop(weight)
    weight.grad = memory
    return memory, False


def _add_product(weight: Tensor, a: Tensor, b: Tensor, low: torch.dtype | None) -> Tensor | None:
    """Gradient a @ b of a weight: written to its `.grad` where that may be, else given back."""
    memory = _gradient(weight)
    if low is not None:
        product = a.to(low) @ b.to(low)
        return product.to(weight.dtype) if memory is None else _write(product, *memory)
    if memory is None:
        return a @ b
    total, adds = memory
    total.addmm_(a, b, beta=int(adds))
    return None


def _add_sparse_product(weight: Tensor, values: Tensor, support: Support, grad: Tensor) -> Tensor | None:
    """The same of A.T @ grad, with A at the places of a support."""
    memory = _gradient(weight)
    total, adds = (torch.empty_like(weight), False) if memory is None else memory
    add_outer(total, values, support, grad, adds)
    return total if memory is None else None


def _add_product_of_rows(weight: Tensor, rows: Tensor, a: Tensor, b: Tensor, low: torch.dtype | None) -> Tensor | None:
    """The same of a @ b for some rows of the weight, and 0 for the others."""
    product = a @ b if low is None else a.to(low) @ b.to(low)
    memory = _gradient(weight)
    total, adds = (torch.empty_like(weight), False) if memory is None else memory
    if not adds:
        total.zero_()
    total.index_add_(0, rows, product.to(weight.dtype))
    return total if memory is None else None


def _write(gradient: Tensor, total: Tensor, adds: bool) -> None:
    if adds:
        total.add_(gradient)
    else:
        total.copy_(gradient)


# -- sums over active features

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

    def only(self, wanted: Bool[Tensor, " n_places"]) -> Support:
        """Those of the places that are wanted."""
        return Support(self.features[wanted], F.pad(wanted.cumsum(0), (1, 0))[self.offsets], self.n_features)

    def to_dense(self, values: Values) -> Float[Tensor, "batch n_features"]:
        """The values at the places, 0 elsewhere."""
        return values.new_zeros(self.n_tokens, self.n_features).index_put((self.tokens, self.features), values)


def support_of_topk(indices: Int[Tensor, "batch k"], n_features: int) -> Support:
    """The places that a top-k chose, as many for each token."""
    n_tokens, k = indices.shape
    offsets = torch.arange(0, n_tokens * k + 1, k, device=indices.device)
    return Support(indices.flatten(), offsets, n_features)


GROUP = 8
"""Features whose largest value is looked at before each of them is: one of eight values is as fast to find as eight are
slow to list."""


def support_above(values: Float[Tensor, "batch n_features"], low: Float[Tensor, "_ 1"]) -> Support:
    """The places of all values greater than `low`: one number, or one for each token.

    What is no number counts as greater: it is to be seen in the loss.
    """
    n_tokens, n_features = values.shape
    size = math.gcd(n_features, GROUP)
    grouped = values.view(n_tokens, size, n_features // size)
    tokens, groups = (~(grouped.amax(dim=1) <= low)).nonzero(as_tuple=True)
    found, within = (~(grouped[tokens, :, groups] <= low.expand(n_tokens, 1)[tokens])).nonzero(as_tuple=True)
    features = within * (n_features // size) + groups[found]
    counts = torch.bincount(tokens[found], minlength=n_tokens)
    return Support(features, F.pad(counts.cumsum(0), (1, 0)), n_features)


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


BLOCK_COLUMNS = {"cpu": 128}
"""Columns that `add_outer` makes at a time: those of 1,024 tokens have 512 KiB in float32, which the second-level cache
of a core holds while they are read at random."""
BLOCK_COLUMNS_ELSEWHERE = 512


def add_outer(
    total: Float[Tensor, "n_features width"],
    values: Values,
    support: Support,
    grad: Float[Tensor, "batch width"],
    adds: bool,
) -> None:
    """`total += A.T @ grad`, or `total = A.T @ grad` where it is not to be added, some columns at a time: what is read
    and what is made then stay in the cache."""
    block = BLOCK_COLUMNS.get(grad.device.type, BLOCK_COLUMNS_ELSEWHERE)
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
        _write(rows, part, adds)


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


# -- far decoders of low rank


def apply_far_decoders(
    written: Float[Tensor, "batch own_and_ranks"], W_far: Float[Tensor, "n_far rank d_model"]
) -> Float[Tensor, "batch width"]:
    """What a layer writes to all its targets, from what its features write to [own | A_1 | A_2 | ...]."""
    n_far, rank, d_model = W_far.shape
    near, ranks = written[:, :d_model], written[:, d_model:].unflatten(1, (n_far, rank))
    far = torch.einsum("bjr,jrd->bjd", ranks, W_far.to(written.dtype)).to(written.dtype)
    return torch.cat([near, far.flatten(start_dim=1)], dim=1)


def far_norms(
    W_dec: Float[Tensor, "d_transcoder own_and_ranks"], W_far: Float[Tensor, "n_far rank d_model"]
) -> Float[Tensor, " d_transcoder"]:
    """||W_dec,i|| over all decoder vectors, without making them: sum_t A_t,i (B_t B_t^T) A_t,i^T beside the own."""
    wide = torch.promote_types(W_dec.dtype, torch.float32)
    W_dec, W_far = W_dec.to(wide), W_far.to(wide)
    n_far, rank, d_model = W_far.shape
    near, A = W_dec[:, :d_model], W_dec[:, d_model:].unflatten(1, (n_far, rank))
    far = (torch.einsum("fjr,jrq->fjq", A, W_far @ W_far.mT) * A).sum(dim=(1, 2))
    return (near.square().sum(dim=1) + far).sqrt()
