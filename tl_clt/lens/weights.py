"""Model weights under the same names and shapes on both kinds of model: the unembedding, the linear parts of a block
under held patterns and scales (norms' centring and gain, attention's OV weights), and an MLP's own neurons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.components.layer_norm import LayerNorm
from transformer_lens.components.layer_norm_pre import LayerNormPre
from transformer_lens.components.mlps.mlp import MLP
from transformer_lens.components.rms_norm import RMSNorm
from transformer_lens.components.rms_norm_pre import RMSNormPre
from transformer_lens.model_bridge.generalized_components import NormalizationBridge

from tl_clt.errors import ModelUnsupported
from tl_clt.lens.hooks import HookDict, HookedModel, HookedTransformer, model_name


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


class NormMap(NamedTuple):
    """A norm with its scale held: `gain * (x - mean(x)) / scale` (+ a bias, which is no part of the map)."""

    centred: bool
    """Whether the mean is taken off (LayerNorm), or not (RMSNorm)."""

    gain: Float[Tensor, " d_model"] | None
    """None where it is 1 throughout, as after folding."""


class OVWeights(NamedTuple):
    """Attention's value and output weights of one layer."""

    W_V: Float[Tensor, "n_key_value_heads d_model d_head"]
    """One a key-value head: with grouped queries there are fewer of them than heads."""

    W_O: Float[Tensor, "n_heads d_head d_model"]


def norm_map(model: HookedModel, name: str) -> NormMap | None:
    """The linear map of a norm, for example `blocks.3.ln1` or `ln_final`; None where the model has none there.

    Raises:
        ModelUnsupported: a kind of norm other than LN, LNPre, RMS and RMSPre.
    """
    norm = _part(model, name)
    if norm is None or isinstance(norm, nn.Identity):
        return None
    if isinstance(norm, NormalizationBridge):
        return _bridge_norm(norm)
    if isinstance(norm, (LayerNorm, RMSNorm)):
        return NormMap(isinstance(norm, LayerNorm), norm.w.detach())
    if isinstance(norm, (LayerNormPre, RMSNormPre)):
        return NormMap(isinstance(norm, LayerNormPre), None)
    raise ModelUnsupported(
        f"{name} of {model_name(model)} is a {type(norm).__name__}, a norm that the sweep does not know."
        " Trace with engine='autograd'."
    )


def _bridge_norm(norm: NormalizationBridge) -> NormMap | None:
    if isinstance(norm.original_component, nn.Identity):
        return None
    weight = getattr(norm.original_component, "weight", None)
    if weight is None:
        return NormMap(not norm.uses_rms_norm, None)
    offset = 1.0 if getattr(norm.config, "rmsnorm_uses_offset", False) else 0.0
    return NormMap(not norm.uses_rms_norm, weight.detach() + offset)


def ov_weights(model: HookedModel, layer: int) -> OVWeights:
    """Value and output weights of one layer.

    Raises:
        ModelUnsupported: the attention has no such weights (latent or linear attention, for example).
    """
    attn: Any = _part(model, f"blocks.{layer}.attn")
    cfg = model.cfg
    try:
        # HookedTransformer repeats grouped heads in W_V and keeps them as they are in _W_V.
        W_V = attn._W_V if isinstance(model, HookedTransformer) and hasattr(attn, "_W_V") else attn.W_V
        W_O = attn.W_O
    except (AttributeError, NotImplementedError, ValueError) as error:
        raise _no_ov(model, layer) from error
    shapes_fit = (
        isinstance(W_V, Tensor)
        and isinstance(W_O, Tensor)
        and W_V.ndim == W_O.ndim == 3
        and W_V.shape[1:] == (cfg.d_model, W_O.shape[1])
        and W_O.shape[2] == cfg.d_model
        and W_O.shape[0] % W_V.shape[0] == 0
    )
    if not shapes_fit:
        raise _no_ov(model, layer)
    # Granite multiplies what attention writes, and its hook_attn_out comes after that.
    scale = getattr(_part(model, f"blocks.{layer}"), "residual_contribution_scale", 1.0)
    return OVWeights(W_V.detach(), W_O.detach() if scale == 1.0 else W_O.detach() * scale)


class MLPNorms(NamedTuple):
    """The norms around one MLP, by name, for example `blocks.3.ln2`; None where there is none."""

    before: str | None
    """Gives what the MLP is given (`mlp.hook_in`). Blocks that norm once for attention and MLP have it at ln1."""

    behind: str | None
    """Takes what the MLP returns (`mlp.hook_out`) and gives `hook_mlp_out`."""


def mlp_norms(model: HookedModel, layer: int) -> MLPNorms:
    """The norms in front of and behind one layer's MLP, as far as they have a scale to hold."""
    hook_dict = model.hook_dict
    before = ("ln2", "ln1") if is_parallel(model, hook_dict) else ("ln2",)
    names = [f"blocks.{layer}.{name}" for name in (*before, "ln2_post")]
    norms = [name for name in names if f"{name}.hook_scale" in hook_dict]
    behind = norms.pop() if norms and norms[-1].endswith("ln2_post") else None
    return MLPNorms(norms[0] if norms else None, behind)


def is_parallel(model: HookedModel, hook_dict: HookDict | None = None) -> bool:
    """Whether attention and MLP of a block both read its input."""
    return "blocks.0.hook_resid_mid" not in (model.hook_dict if hook_dict is None else hook_dict)


def _part(model: HookedModel, name: str) -> Any:
    part: Any = model
    for step in name.split("."):
        part = part[int(step)] if step.isdigit() else getattr(part, step, None)
        if part is None:
            return None
    return part


def _no_ov(model: HookedModel, layer: int) -> ModelUnsupported:
    return ModelUnsupported(
        f"blocks.{layer}.attn of {model_name(model)} has no W_V and W_O that the sweep knows."
        " Trace with engine='autograd'."
    )


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
