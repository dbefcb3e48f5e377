"""The matrix products of a CLT, with gradients that cost no more memory than they must.

Each product with a weight writes that weight's gradient where it belongs. Where a weight has a `.grad` from the
step before (zeroed, not dropped), the product is added to it in place, and autograd is handed nothing for that
weight: a fresh gradient above glibc's largest mmap threshold (32 MiB) is given back to the system and faulted in
again at every step, which takes as long as half of the product that fills it. Without a `.grad`, autograd gets the
gradient as from any operation.

Under autocast, and with weights in a lower precision, products take that precision and sums float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from tl_clt.training.sharding import SINGLE, ProcessGrid
from tl_clt.training.sparse import Support, Values, add_outer, inner_products, weighted_rows


def encode(
    x: Float[Tensor, "batch d_model"],
    W_enc: Float[Tensor, "d_transcoder d_model"],
    b_enc: Float[Tensor, " d_transcoder"],
    out: Float[Tensor, "batch d_transcoder"],
) -> Float[Tensor, "batch d_transcoder"]:
    """`x @ W_enc.T + b_enc`, written into `out`. No gradient reaches x, which is data."""
    return _Encode.apply(x, W_enc, b_enc, out)


def given(
    hidden_pre: Float[Tensor, "batch d_transcoder"],
    x: Float[Tensor, "batch d_model"],
    W_enc: Float[Tensor, "d_transcoder d_model"],
    b_enc: Float[Tensor, " d_transcoder"],
) -> Float[Tensor, "batch d_transcoder"]:
    """`encode(x, W_enc, b_enc)` that was computed without gradients, with them."""
    return _Given.apply(hidden_pre, x, W_enc, b_enc)


def pick(
    hidden_pre: Float[Tensor, "batch d_transcoder"],
    x: Float[Tensor, "batch d_model"],
    W_enc: Float[Tensor, "d_transcoder d_model"],
    b_enc: Float[Tensor, " d_transcoder"],
    support: Support,
) -> Values:
    """`encode(x, W_enc, b_enc)` at the places of a support, out of a `hidden_pre` that needs no gradient itself."""
    return _Pick.apply(hidden_pre, x, W_enc, b_enc, support)


def decode(
    feature_acts: Float[Tensor, "batch d_transcoder"],
    W_dec: Float[Tensor, "d_transcoder width"],
    support: Support | None = None,
    block: int = 512,
) -> Float[Tensor, "batch width"]:
    """`feature_acts @ W_dec`: what one layer's features write, to all their targets at once.

    Args:
        feature_acts: of one layer; its gradient is dense, and made where it is asked for.
        W_dec: the layer's decoder vectors side by side.
        support: where feature_acts may differ from 0. Where given, the products run over these places only.
        block: columns of W_dec that a sparse gradient is made of at a time.
    """
    return _Decode.apply(feature_acts, W_dec, support, block)


def decode_places(
    values: Values, W_dec: Float[Tensor, "d_transcoder width"], support: Support, block: int
) -> Float[Tensor, "batch width"]:
    """The same of activations that exist at the places of a support only, in both directions."""
    return _DecodePlaces.apply(values, W_dec, support, block)


def row_norms(W: Float[Tensor, "d_transcoder width"]) -> Float[Tensor, " d_transcoder"]:
    """The 2-norm of each row."""
    return _RowNorms.apply(W)


def sum_by_target(
    b_dec: Float[Tensor, "n_layers d_model"], written: Sequence[Float[Tensor, "batch _"]], grid: ProcessGrid = SINGLE
) -> Float[Tensor, "batch n_layers d_model"]:
    """`b_dec` plus what each source layer wrote: to its own layer and the next ones; summed over a grid's features."""
    return _SumByTarget.apply(b_dec, grid, *written)


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


class _Given(torch.autograd.Function):
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


class _Pick(torch.autograd.Function):
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
        for_bias = torch.zeros_like(b_enc)
        add_outer(for_bias[:, None], grad, ctx.support, ones, 1)
        return None, None, _add_sparse_product(W_enc, grad, ctx.support, x, x.shape[1]), for_bias, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, feature_acts: Tensor, W_dec: Tensor, support: Support | None, block: int) -> Tensor:
        ctx.low, ctx.support, ctx.block = _product_dtype(W_dec), support, block
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
            for_W = _add_sparse_product(W_dec, acts, ctx.support, grad, ctx.block)
        for_acts = _product(grad, W_dec.T, ctx.low) if ctx.needs_input_grad[0] else None
        return for_acts, for_W, None, None


class _DecodePlaces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, support: Support, block: int) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.support, ctx.block = support, block
        return weighted_rows(values, support, W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, W_dec = ctx.saved_tensors
        for_values = inner_products(grad, W_dec, ctx.support)
        return for_values, _add_sparse_product(W_dec, values, ctx.support, grad, ctx.block), None, None


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
        total = _gradient(W)
        if total is None:
            return W * share
        total.addcmul_(W, share)
        return None


class _SumByTarget(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, b_dec: Tensor, grid: ProcessGrid, *written: Tensor) -> Tensor:
        ctx.widths, ctx.dtype = [w.shape[1] for w in written], b_dec.dtype
        n_layers, d_model = b_dec.shape
        start = b_dec if grid.feature_index == 0 else torch.zeros_like(b_dec)
        recons = start.to(written[0].dtype).expand(len(written[0]), -1, -1).contiguous()
        flat = recons.view(len(recons), n_layers * d_model)
        for source, slots in enumerate(written):
            flat[:, source * d_model : source * d_model + slots.shape[1]] += slots
        return grid.add_over_features(recons)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Every rank has the gradient of the sum, which is that of each part.
        flat, d_model = grad.flatten(start_dim=1), grad.shape[-1]
        starts = range(0, flat.shape[1], d_model)
        return (
            grad.sum(dim=0).to(ctx.dtype),
            None,
            *(flat[:, a : a + w] for a, w in zip(starts, ctx.widths, strict=True)),
        )


def _product_dtype(weight: Tensor) -> torch.dtype | None:
    """The lower precision that products are to take, if any."""
    device = weight.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype if weight.dtype in (torch.bfloat16, torch.float16) else None


def _product(a: Tensor, b: Tensor, low: torch.dtype | None) -> Tensor:
    return a @ b if low is None else (a.to(low) @ b.to(low)).float()


def _gradient(weight: Tensor) -> Tensor | None:
    """The gradient that a weight has already; it can be added to in place."""
    return weight.grad if weight.is_leaf else None


def _add_product(weight: Tensor, a: Tensor, b: Tensor, low: torch.dtype | None) -> Tensor | None:
    """Gradient a @ b of a weight: added to its `.grad` where there is one, else given back."""
    total = _gradient(weight)
    if low is not None:
        product = a.to(low) @ b.to(low)
        return product.to(weight.dtype) if total is None else _none(total.add_(product))
    return a @ b if total is None else _none(total.addmm_(a, b))


def _add_sparse_product(weight: Tensor, values: Tensor, support: Support, grad: Tensor, block: int) -> Tensor | None:
    """The same of A.T @ grad, with A at the places of a support."""
    total = _gradient(weight)
    if total is None:
        total = torch.zeros_like(weight)
        add_outer(total, values, support, grad, block)
        return total
    add_outer(total, values, support, grad, block)
    return None


def _none(_: Tensor) -> None:
    return None
