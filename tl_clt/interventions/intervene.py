"""`intervene`: change features, and see what follows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import torch
from jaxtyping import Int
from torch import Tensor

from tl_clt.attribution.local import Bos
from tl_clt.interventions.effect import InactiveFeature, InterventionEffect, Recorded
from tl_clt.interventions.hooks import Steering
from tl_clt.interventions.intervention import AnyIntervention
from tl_clt.lens import (
    Freeze,
    FwdHook,
    HookedModel,
    PromptBatch,
    block_hook,
    run_with_hooks,
    to_token_batch,
    user_hooks_aside,
)
from tl_clt.replacement import check_fit
from tl_clt.transcoder import CrossLayerTranscoder


@torch.no_grad()
def intervene(
    model: HookedModel,
    clt: CrossLayerTranscoder,
    tokens: PromptBatch,
    interventions: AnyIntervention | Iterable[AnyIntervention],
    through_layer: int | None = None,
    freeze: Freeze = "attention",
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    record: Collection[str] = (),
    bos: Bos | None = None,
) -> InterventionEffect:
    """Run prompts with features changed, and without, and compare.

    Hooks of the user's own are set aside, as in `attribute`: what is measured is what a graph predicts. With
    every layer constrained and `freeze="all"`, doubling a feature changes every other node's pre-activation and
    every logit (less the mean logit, before any soft-cap) by exactly the graph's edge, for a CLT with a skip connection
    by that of the graph with this `bos`.

    Args:
        model, clt, tokens, interventions, through_layer, freeze, attention_mask, bos: as for `intervention_hooks`.
            Prompts of unequal lengths are padded, on the tokenizer's side, and masked.
        record: further hooks whose values, in both runs, to give back in `recorded`.

    Raises:
        InterventionError, CLTMismatch, HookNotFound, PromptError, TokenizerMissing, ConfigError: as there.
    """
    check_fit(model, clt)
    prompts = to_token_batch(model, tokens, attention_mask)
    steering = Steering(model, clt, prompts, interventions, through_layer, freeze, record, bos)
    call = {} if prompts.mask is None else {"attention_mask": prompts.mask}
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable:
        def keep_value(x: Tensor, hook: object) -> None:
            seen[name] = x

        return keep_value

    names = [block_hook(t, clt.cfg.input_hook) for t in clt.layers]
    recording: list[FwdHook] = [(name, keep(name)) for name in dict.fromkeys([*names, *record])]
    try:
        with user_hooks_aside(model):
            logits = run_with_hooks(model, prompts.tokens, [*steering.hooks, *recording], **call)
    finally:
        steering.clean.close()
    dtype = clt.W_enc.dtype
    inputs = torch.stack([seen[name] for name in names], dim=-2).to(dtype)
    baseline_inputs = torch.stack([steering.clean.at(name) for name in names], dim=-2).to(dtype)
    baseline_feature_acts = clt.encode(baseline_inputs)
    return InterventionEffect(
        tokens=prompts.tokens,
        attention_mask=prompts.mask,
        logits=logits,
        baseline_logits=steering.clean.logits,
        feature_acts=_measured(steering, clt.encode(inputs), baseline_feature_acts),
        baseline_feature_acts=baseline_feature_acts,
        inputs=inputs,
        baseline_inputs=baseline_inputs,
        inactive=_inactive(steering, baseline_feature_acts),
        recorded={name: Recorded(seen[name], steering.clean.at(name)) for name in record},
        model=model,
        clt=clt,
    )


def _measured(steering: Steering, acts: Tensor, baseline: Tensor) -> Tensor:
    """What features read in the intervened run, the changed ones at the values they were set to."""
    for layer in {what.layer for what in steering.features}:
        if steering.constrained:
            set_to = steering.delta(baseline[..., layer, :], layer) + baseline[..., layer, :]
            changed = steering.changed(acts[..., layer, :], layer)
            acts[..., layer, :] = torch.where(changed, set_to, acts[..., layer, :])
        else:
            acts[..., layer, :] += steering.delta(acts[..., layer, :], layer)
    return acts


def _inactive(steering: Steering, baseline: Tensor) -> list[InactiveFeature]:
    found = []
    for what in steering.features:
        for place in steering.places(what, baseline.shape[1]):
            acts = baseline[..., what.layer, what.features][place.index(baseline.device)]
            for row, feature in torch.nonzero(~(acts != 0).any(dim=1)).tolist():
                found.append(InactiveFeature(place.rows[row], what.layer, what.features[feature]))
    return list(dict.fromkeys(found))
