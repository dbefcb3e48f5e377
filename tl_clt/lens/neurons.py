"""An MLP's own neurons: what each reads, computes and writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor
from transformer_lens.components.layer_norm import LayerNorm
from transformer_lens.components.mlps.mlp import MLP
from transformer_lens.components.rms_norm import RMSNorm

from tl_clt.errors import ModelUnsupported
from tl_clt.lens.hooks import model_name
from tl_clt.lens.types import HookedModel, HookedTransformer

NORMALISED = "ln2.hook_normalized"


class NeuronWeights(NamedTuple):
    """The MLP of one layer, reading `ln2.hook_normalized`: out = act_fn(x @ W_in + b_in) @ W_out + b_out."""

    W_in: Float[Tensor, "d_model d_mlp"]
    """The norm's gain folded in."""
    b_in: Float[Tensor, " d_mlp"]
    """The norm's bias folded in."""
    W_out: Float[Tensor, "d_mlp d_model"]
    b_out: Float[Tensor, " d_model"]
    act_fn: Callable[[Tensor], Tensor]


def neuron_weights(model: HookedModel, layer: int) -> NeuronWeights:
    """One layer's neurons.

    Raises:
        ModelUnsupported: its MLP is not one of plain neurons (a gated one, or a mixture of experts), does not read
            `ln2.hook_normalized`, or the model is a bridge.
    """
    block: Any = model.blocks[layer]
    mlp: Any = getattr(block, "mlp", None)
    if not _is_plain(model, mlp, layer):
        raise ModelUnsupported(
            f"blocks.{layer}.mlp of {model_name(model)} is not of plain neurons that read {NORMALISED} of a"
            " HookedTransformer, so thresholded neurons cannot stand beside its CLTs. Leave neurons out, or load it"
            " with backend='hooked' if its MLPs are not gated."
        )
    W_in, b_in = mlp.W_in.detach(), mlp.b_in.detach()
    if isinstance(block.ln2, LayerNorm):
        b_in = b_in + block.ln2.b.detach() @ W_in
    if isinstance(block.ln2, (LayerNorm, RMSNorm)):
        W_in = block.ln2.w.detach()[:, None] * W_in
    return NeuronWeights(W_in, b_in, mlp.W_out.detach(), mlp.b_out.detach(), mlp.act_fn)


def _is_plain(model: HookedModel, mlp: Any, layer: int) -> bool:
    if not isinstance(model, HookedTransformer) or type(mlp) is not MLP:
        return False
    cfg = model.cfg
    normalised_after = cfg.is_layer_norm_activation() or cfg.use_normalization_before_and_after
    return not normalised_after and f"blocks.{layer}.{NORMALISED}" in model.hook_dict
