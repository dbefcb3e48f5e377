"""From a CLT in training, on scaled activations, to a `CrossLayerTranscoder` on raw ones, and back."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor

from tl_clt.errors import ConfigError, TrainingWarning
from tl_clt.training.clt import InferenceCLT, InferenceCLTConfig, TrainingCLT
from tl_clt.transcoder import CrossLayerTranscoder
from tl_clt.transcoder.decoders import DenseDecoders, Weights


@torch.no_grad()
def export(clt: TrainingCLT | InferenceCLT, dtype: str | None = None) -> CrossLayerTranscoder:
    """A `CrossLayerTranscoder` with the scaling of training folded into its weights, exactly: see `fold_scaling`.

    Args:
        clt: the CLT, with `input_scale` and `output_scale` in its config.
        dtype: number type of the result; that of training where left out. The products are taken in float64.
    """
    cfg = clt.transcoder_config
    cfg = cfg if dtype is None else replace(cfg, dtype=dtype)
    folded = fold_scaling(clt, getattr(torch, cfg.dtype), torch.float64)
    exported = CrossLayerTranscoder(cfg, DenseDecoders([folded.W_dec[s] for s in range(cfg.n_layers)]))
    exported = exported.to(clt.b_dec.device)
    for name in cfg.weight_shapes:
        getattr(exported, name).copy_(getattr(folded, name))
    return exported


class ComputedDecoders(DenseDecoders):
    """Decoders that are computed from others, to which gradients go on."""

    def __init__(self, per_source: Sequence[Float[Tensor, "d_transcoder _ d_model"]]) -> None:
        torch.nn.Module.__init__(self)
        self.per_source = tuple(per_source)  # type: ignore[assignment]


def fold_scaling(clt: TrainingCLT | InferenceCLT, dtype: torch.dtype, products: torch.dtype) -> Weights:
    """The weights that a CLT in training has on raw activations, as a function of its own: gradients go on to these.

    With x_scaled = s_in * x and y_scaled = s_out * y:
        W_enc[s].T * s_in[s],   W_dec[s -> t] / s_out[t],   b_dec[t] / s_out[t],   W_skip[t] * s_in[t] / s_out[t];
        b_enc and thresholds stay.
    Decoders of low rank become full. Where k features of each layer and token are kept, which are ranked by
    hidden_pre * ||W_dec,i||, that norm moves from the decoder to the encoder: ranking by hidden_pre, as a
    `CrossLayerTranscoder` does, is then the same. Other selections become JumpReLU, with thresholds
    score_threshold / ||W_dec,i||.

    Args:
        clt: the CLT, with `input_scale` and `output_scale` in its config.
        dtype: number type of the result.
        products: number type that the products are taken in.
    """
    cfg = clt.transcoder_config
    placement = {"dtype": products, "device": clt.b_dec.device}
    s_in = torch.tensor(cfg.input_scale or [1.0] * cfg.n_layers, **placement)
    s_out = torch.tensor(cfg.output_scale or [1.0] * cfg.n_layers, **placement)
    moved = _moved_norms(clt, products)
    decoders = []
    for source, pairs in enumerate(clt.decoders(products)):
        slots = [W / moved[source][:, None] / s_out[target] for target, W in pairs.items()]
        decoders.append(torch.stack(slots, dim=1).to(dtype))

    def stacked(per_layer: Any) -> Tensor:
        return torch.stack([weight.to(products) for weight in per_layer])

    factors = (s_in / s_out)[:, None, None]
    return Weights(
        cfg=cfg,
        W_dec=ComputedDecoders(decoders),
        W_enc=((stacked(clt.W_enc) * moved[..., None]).mT * s_in[:, None, None]).to(dtype),
        b_enc=(stacked(clt.b_enc) * moved).to(dtype),
        b_dec=(clt.b_dec.to(products) / s_out[:, None]).to(dtype),
        threshold=stacked(clt.thresholds()).to(dtype) if cfg.has_threshold else None,
        W_skip=None if clt.W_skip is None else (stacked(clt.W_skip) * factors).to(dtype),
    )


def _moved_norms(clt: TrainingCLT | InferenceCLT, dtype: torch.dtype) -> Tensor:
    """The factor [n_layers, d_transcoder] that moves from decoders to encoders. What a CLT computes does not depend on
    it, so that it needs no gradient."""
    if clt.cfg.selects and not clt.cfg.has_score_threshold:
        norms = torch.stack(clt.norms(dtype)).detach()
        return torch.where(norms > 0, norms, 1.0)
    return torch.ones(clt.cfg.n_layers, clt.cfg.d_transcoder, dtype=dtype, device=clt.b_dec.device)


# -- and back: the weights of a CLT, for a run that begins with them, and for SAELens's loader

LIKE_EACH_OTHER = 0.01
"""Features of a layer whose factors differ by less are ranked as before, but for near-ties."""

OF_MODEL = ("n_layers", "d_model")
SAME_AS_RUN = (*OF_MODEL, "d_transcoder", "span", "skip", "input_hook", "output_hook", "activation")
"""What the CLT that a run begins with must have as the run has it."""


def require_same_kind(clt: TrainingCLT, weights: Weights, name: str) -> None:
    """Raise where a CLT in training cannot begin with some weights.

    Args:
        clt: may be on the "meta" device.
        weights: of a CLT on raw activations.
        name: of those, for messages.

    Raises:
        ConfigError: shape, hooks or activation differ, with the field; or thresholds are below 0.
    """
    ours, theirs, trained = clt.transcoder_config, weights.cfg, clt.cfg.activation
    if clt.cfg.far_rank is not None:
        raise ConfigError(f"far_rank is {clt.cfg.far_rank} with init_from, whose decoders are full: leave one out.")
    # What compares with thresholds does the same by either name.
    activations = ("jumprelu", "batchtopk") if ours.has_threshold else (ours.activation,)
    for field in SAME_AS_RUN:
        theirs_value, wanted = getattr(theirs, field), getattr(ours, field)
        if theirs_value == wanted or (field == "activation" and theirs_value in activations):
            continue
        mend = "give a CLT of the same model" if field in OF_MODEL else f"give {field}={theirs_value!r}"
        raise ConfigError(
            f"init_from is '{name}', which has {field} {theirs_value!r}, but this run has"
            f" {trained if field == 'activation' else wanted!r}: {mend}, or leave init_from out."
        )
    if weights.threshold is not None and bool((weights.threshold < 0).any()):
        raise ConfigError(f"init_from is '{name}', which has thresholds below 0, as training has not: leave it out.")


@torch.no_grad()
def take_over(clt: TrainingCLT | InferenceCLT, weights: Weights) -> None:
    """Give a CLT on scaled activations the weights of one on raw ones; on a grid, each rank its features. The inverse
    of `export`, which gives that CLT back, up to rounding:

        W_enc[s].T / s_in[s],   W_dec[s -> t] * s_out[t],   b_dec[t] * s_out[t],   W_skip[t] * s_out[t] / s_in[t],
        log(threshold);   b_enc stays.

    Where k features are kept, training ranks them by hidden_pre * ||W_dec,i||, and the other CLT by hidden_pre, or
    compares it with thresholds. With the scales that it was trained with the two are the same, for which reason such a
    run takes them over from it into its config; where they still differ, a warning says so. `score_threshold`, one a
    layer, is the mean of threshold * ||W_dec,i||.

    Args:
        clt: changed in place.
        weights: such as `require_same_kind` lets pass.
    """
    cfg, weights_cfg = clt.cfg, weights.cfg
    if cfg.selects and weights_cfg.input_scale is not None and weights_cfg.output_scale is not None:
        cfg.input_scale, cfg.output_scale = weights_cfg.input_scale, weights_cfg.output_scale
    placement = {"dtype": torch.float64, "device": clt.b_dec.device}
    s_in = torch.tensor(cfg.input_scale or [1.0] * cfg.n_layers, **placement)
    s_out = torch.tensor(cfg.output_scale or [1.0] * cfg.n_layers, **placement)
    own, ranked_anew = clt.grid.own(cfg.d_transcoder), []
    for source, targets in enumerate(clt.targets):
        W_dec = weights.W_dec[source].to(**placement) * s_out[targets.start : targets.stop, None]
        clt.W_enc[source].copy_((weights.W_enc[source].to(**placement) / s_in[source]).T[own])
        clt.b_enc[source].copy_(weights.b_enc[source][own])
        clt.W_dec[source].copy_(W_dec[own].flatten(start_dim=1))
        factors = W_dec.flatten(start_dim=1).norm(dim=1)
        writes = factors > 0
        if weights.threshold is not None:
            threshold = weights.threshold[source].to(**placement)
            factors = factors * threshold
            if clt.log_threshold is not None:
                clt.log_threshold[source].copy_(threshold.clamp(min=torch.finfo(clt.dtype).tiny).log()[own])
        if cfg.selects and writes.any():
            if cfg.has_score_threshold:
                clt.score_threshold[source] = factors[writes].mean()
            if factors[writes].max() > (1 + LIKE_EACH_OTHER) * factors[writes].min():
                ranked_anew.append(source)
    clt.b_dec.copy_(weights.b_dec.to(**placement) * s_out[:, None])
    if clt.W_skip is not None and weights.W_skip is not None:
        for layer, W_skip in enumerate(clt.W_skip):
            W_skip.copy_(weights.W_skip[layer].to(**placement) * s_out[layer] / s_in[layer])
    if ranked_anew:
        warnings.warn(
            f"{cfg.activation} ranks features by activation times decoder norm in training. The CLT that this run"
            f" begins with chose them otherwise in layers {', '.join(map(str, ranked_anew))}, where others fire at"
            " first. Begin with one that was trained with this activation, or train with the other's.",
            TrainingWarning,
            stacklevel=2,
        )


UNIT_NORM_WITHIN = 0.02
"""How far from 1 the norm of an exported decoder may be: bfloat16 rounds each weight by up to 0.4%."""


@torch.no_grad()
def clt_disk_loader(
    path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A saved `CrossLayerTranscoder` for SAELens: `SAE.load_from_disk(folder, converter=clt_disk_loader)`.

    What it gives is an `InferenceCLT`, on the scaled inputs that it was trained on: `cfg.input_scale` times raw ones.
    `take_over` makes it, with decoders of full rank.

    Args:
        path: a folder that `CrossLayerTranscoder.from_pretrained` takes, such as a runner's output.
        device: for the weights.
        cfg_overrides: changes of the config: SAELens gives the dtype that was asked for.

    Returns:
        SAELens's config as a dict, and the weights by name.

    Raises:
        FormatError: it holds no CLT.
        ConfigError: SAELens's CLTs have no such thresholds, or rank features otherwise: it was not trained here.
    """
    overrides = cfg_overrides or {}
    weights = CrossLayerTranscoder.from_pretrained(str(path), device=device, dtype=overrides.get("dtype")).weights
    cfg = weights.cfg
    if weights.threshold is not None and bool((weights.threshold < 0).any()):
        raise ConfigError("Some thresholds are below 0, which SAELens's CLTs cannot have: use a CrossLayerTranscoder.")
    same = ("n_layers", "d_transcoder", "span", "activation", "k", "skip", "input_hook", "output_hook", "model_name")
    values = {
        **{name: getattr(cfg, name) for name in (*same, "dtype", "input_scale", "output_scale")},
        **{"d_in": cfg.d_model, "d_sae": cfg.n_layers * cfg.d_transcoder, "device": device},
        "metadata": SAEMetadata(model_name=cfg.model_name, hook_name=cfg.input_hook, hook_name_out=cfg.output_hook),
    }
    clt = InferenceCLT(InferenceCLTConfig(**(values | overrides)))
    take_over(clt, weights)
    if cfg.activation == "topk":
        _require_unit_norms(clt)
    return clt.cfg.to_dict(), dict(clt.state_dict())


def _require_unit_norms(clt: InferenceCLT) -> None:
    norms = torch.cat(clt.norms())
    if ((norms - 1).abs() > UNIT_NORM_WITHIN).any():
        raise ConfigError(
            f"Features have decoders of norm {float(norms.min()):.3g} to {float(norms.max()):.3g}, in units of"
            " training: SAELens's CLTs rank features by activation times that norm, this one by activation alone. Use a"
            " CrossLayerTranscoder."
        )
