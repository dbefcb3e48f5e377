"""Does this CLT belong to this model? Asked before any work starts."""

from __future__ import annotations

import warnings

from tl_clt.arguments import shown
from tl_clt.errors import CLTMismatch
from tl_clt.lens import (
    MLP_IN,
    MLP_OUT,
    HookDict,
    HookedModel,
    block_hook,
    mlp_hook_points,
    model_name,
    require_hooks,
    require_model,
)
from tl_clt.transcoder import CrossLayerTranscoder, CrossLayerTranscoderConfig

READ_PLACES = ("hook_resid_pre", "hook_resid_mid", "hook_mlp_in", "ln1.hook_normalized", "ln2.hook_normalized", MLP_IN)
"""Where a CLT may read: the residual stream of a block, or what becomes of it on the way to the MLP."""
WRITE_PLACES = ("hook_mlp_out", MLP_OUT)
"""Where a CLT may write: the MLP's output, behind or in front of a norm."""
FOLDED = ("LNPre", "RMSPre")
"""Kinds of norms without a gain, of models whose weights were processed."""


def check_fit(model: HookedModel, clt: CrossLayerTranscoder) -> HookDict:
    """Raise unless depth, width, hooks and device of the CLT are the model's.

    Returns:
        The model's hook points, for what comes next.

    Raises:
        ModelUnsupported: the model is no HookedTransformer or TransformerBridge, or is compiled.
        CLTMismatch: it is no CrossLayerTranscoder; n_layers, d_model or device differ; or it reads or writes where no
            CLT does.
        HookNotFound: the model lacks a hook that the CLT reads or writes.
    """
    require_model(model)
    if not isinstance(clt, CrossLayerTranscoder):
        raise CLTMismatch(f"The CLT is {shown(clt)}: give a CrossLayerTranscoder, after the model.")
    cfg, name = clt.cfg, model_name(model)
    if cfg.n_layers != model.cfg.n_layers:
        raise CLTMismatch(
            f"The CLT has {cfg.n_layers} layers, but {name} has {model.cfg.n_layers}: it was made for"
            f" {cfg.model_name}. Load that model, or a CLT of this one."
        )
    if cfg.d_model != model.cfg.d_model:
        raise CLTMismatch(
            f"The CLT has d_model {cfg.d_model}, but {name} has {model.cfg.d_model}: it was made for"
            f" {cfg.model_name}. Load that model, or a CLT of this one."
        )
    if clt.W_enc.device != model.W_E.device:
        raise CLTMismatch(
            f"The CLT is on {clt.W_enc.device}, but {name} is on {model.W_E.device}."
            f" Move it: clt.to('{model.W_E.device}')."
        )
    hook_dict = model.hook_dict
    with mlp_hook_points(model):
        require_hooks(
            model, [block_hook(t, h) for t in clt.layers for h in (cfg.input_hook, cfg.output_hook)], hook_dict
        )
    for verb, place, places in (("reads", cfg.input_hook, READ_PLACES), ("writes", cfg.output_hook, WRITE_PLACES)):
        if place not in places:
            raise CLTMismatch(
                f"The CLT {verb} {place}, but a CLT {verb} one of {', '.join(places)}. Give it the right"
                f" {'input' if verb == 'reads' else 'output'}_hook."
            )
    if cfg.input_hook == MLP_IN and getattr(model.cfg, "normalization_type", None) in FOLDED:
        warnings.warn(
            f"The CLT reads {MLP_IN}, what the MLP is given after its norm's gain and bias, but {name} has these folded"
            " into the MLP's weights, so that its MLP is given something else. Features are those meant only if the CLT"
            " was made on a model folded like this one; public ones were not: load the model with"
            " HookedTransformer.from_pretrained_no_processing, or tl_clt.load_model.",
            stacklevel=3,
        )
    return hook_dict


def not_read(cfg: CrossLayerTranscoderConfig, layer: int) -> CLTMismatch:
    """The error of an output hook that comes before its input hook."""
    return CLTMismatch(
        f"The CLT writes at blocks.{layer}.{cfg.output_hook} before anything passed its input hook"
        f" blocks.{layer}.{cfg.input_hook}: that hook comes later in the block, or a flag of the"
        " model keeps it off (as use_hook_mlp_in does with hook_mlp_in). Set the flag, or the right hook."
    )
