"""`intervene`: change features, and see what follows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from pandas import DataFrame
from torch import Tensor

from tl_clt.arguments import as_whole
from tl_clt.attribution.local import Bos
from tl_clt.errors import InterventionError
from tl_clt.interventions.hooks import Steering, ThroughLayer
from tl_clt.interventions.intervention import AnyIntervention
from tl_clt.lens import (
    Freeze,
    FwdHook,
    HookedModel,
    PromptBatch,
    PromptRows,
    block_hook,
    run_with_hooks,
    to_token_batch,
    token_strings,
    user_hooks_aside,
)
from tl_clt.replacement import check_fit
from tl_clt.report import Report
from tl_clt.shapes import Logits, TokenBatch
from tl_clt.transcoder import CrossLayerTranscoder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_DRAWN = 8
"""Prompts of a batch that the figure of an effect shows."""
Inputs = Float[Tensor, "batch pos n_layers d_model"]
Acts = Float[Tensor, "batch pos n_layers d_transcoder"]


@torch.no_grad()
def intervene(
    model: HookedModel,
    clt: CrossLayerTranscoder,
    prompt: PromptBatch,
    interventions: AnyIntervention | Iterable[AnyIntervention],
    through_layer: ThroughLayer = None,
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
        model, clt, prompt, interventions, through_layer, freeze, attention_mask, bos: as for `intervention_hooks`.
            Prompts of unequal lengths are padded, on the tokenizer's side, and masked.
        record: further hooks whose values, in both runs, to give back in `recorded`.

    Raises:
        InterventionError, CLTMismatch, HookNotFound, PromptError, TokenizerMissing, ConfigError: as there.
    """
    hook_dict = check_fit(model, clt)
    prompts = to_token_batch(model, prompt, attention_mask)
    steering = Steering(model, hook_dict, clt, prompts, interventions, through_layer, freeze, record, bos)
    call = {} if prompts.mask is None else {"attention_mask": prompts.mask}
    recorded: dict[str, Tensor] = {}

    def keep(name: str) -> Callable:
        def keep_value(x: Tensor, hook: object) -> None:
            recorded[name] = x

        return keep_value

    names = [block_hook(t, clt.cfg.input_hook) for t in clt.layers]
    recording: list[FwdHook] = [(name, keep(name)) for name in dict.fromkeys([*names, *record])]
    try:
        with user_hooks_aside(model, hook_dict):
            logits = run_with_hooks(model, prompts.tokens, [*steering.hooks, *recording], hook_dict, **call)
    finally:
        steering.clean.close()
    dtype = clt.W_enc.dtype
    inputs = torch.stack([recorded[name] for name in names], dim=-2).to(dtype)
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
        recorded={name: Recorded(recorded[name], steering.clean.at(name)) for name in record},
        model=model,
        clt=clt,
    )


def _measured(steering: Steering, acts: Tensor, baseline: Tensor) -> Tensor:
    """What features read in the intervened run, the changed ones at the values they were set to."""
    for layer in {intervention.layer for intervention in steering.features}:
        if steering.constrained:
            set_to = steering.delta(baseline[..., layer, :], layer) + baseline[..., layer, :]
            changed = steering.changed(acts[..., layer, :], layer)
            acts[..., layer, :] = torch.where(changed, set_to, acts[..., layer, :])
        else:
            acts[..., layer, :] += steering.delta(acts[..., layer, :], layer)
    return acts


def _inactive(steering: Steering, baseline: Tensor) -> list[InactiveFeature]:
    inactive = []
    for intervention in steering.features:
        for place in steering.places(intervention, baseline.shape[1]):
            acts = baseline[..., intervention.layer, intervention.features][place.index(baseline.device)]
            for row, feature in torch.nonzero(~(acts != 0).any(dim=1)).tolist():
                inactive.append(InactiveFeature(place.rows[row], intervention.layer, intervention.features[feature]))
    return list(dict.fromkeys(inactive))


class InactiveFeature(NamedTuple):
    """A feature that was changed though it is active at none of the positions named, in the clean run."""

    prompt: int
    """Which of the batch."""
    layer: int
    feature: int

    def __str__(self) -> str:
        return f"feature {self.layer}.{self.feature} is not active there in prompt {self.prompt}"


class Recorded(NamedTuple):
    """What passed a hook."""

    value: Tensor
    """In the intervened run."""
    baseline: Tensor
    """In the clean run."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class InterventionEffect(Report[Literal["changes"]]):
    """A run with an intervention (no prefix) and the clean run (`baseline_`) of the same prompts.

    Figure: "changes" (probabilities of the next tokens that changed most, before and after). `save` writes it and
    changes.csv (`top_changes`).
    """

    FIGURES: ClassVar[tuple[str, ...]] = ("changes",)

    tokens: TokenBatch
    """The prompts, padded where their lengths differ."""

    attention_mask: Int[Tensor, "batch pos"] | None = None
    """1 where a row has its own tokens, 0 at padding; None where nothing is padded."""

    logits: Logits
    """Of the intervened run, as the model gives them."""

    baseline_logits: Logits
    """Of the clean run."""

    feature_acts: Acts
    """Of the intervened run: what features read there. Changed features have the values they were set to."""

    baseline_feature_acts: Acts
    """Of the clean run."""

    inputs: Inputs
    """What features read in the intervened run."""

    baseline_inputs: Inputs
    """What features read in the clean run."""

    inactive: list[InactiveFeature]
    """Features that were changed though they are not active: suppressing one does nothing."""

    recorded: dict[str, Recorded] = field(default_factory=dict)
    """By name, what passed the hooks that `record` named."""

    model: HookedModel = field(repr=False)
    clt: CrossLayerTranscoder = field(repr=False)

    def _in_short(self) -> str:
        batch, pos = self.tokens.shape
        inactive = f", inactive: {'; '.join(map(str, self.inactive))}" if self.inactive else ""
        return f"{batch} prompts of {pos} tokens{inactive}"

    def _tables(self) -> dict[str, DataFrame]:
        return {"next tokens whose probability changed most": self._most_changed()}

    def _write_numbers(self, folder: Path) -> None:
        self._most_changed().to_csv(folder / "changes.csv", index=False)

    def _draw(self, name: str) -> Figure:
        from matplotlib.figure import Figure

        changes = [rows for _, rows in self._most_changed().groupby("prompt")]
        drawn = changes[:MOST_DRAWN]
        figure = Figure(figsize=(7.5, 3.4 * len(drawn) + 0.4), layout="constrained")
        if len(drawn) < len(changes):
            figure.suptitle(f"the first {len(drawn)} of {len(changes)} prompts")
        for axes, rows in zip(figure.subplots(len(drawn), squeeze=False)[:, 0], drawn, strict=True):
            place = range(len(rows))
            axes.barh([p - 0.2 for p in place], rows["before"], height=0.4, label="before")
            axes.barh([p + 0.2 for p in place], rows["after"], height=0.4, label="after")
            axes.set_yticks(place, [repr(token) for token in rows["token"]])
            axes.invert_yaxis()
            axes.set(xlabel="probability of the next token", title=f"prompt {rows['prompt'].iloc[0]}")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
        return figure

    def _most_changed(self) -> DataFrame:
        return self.top_changes(min(10, self.logits.shape[-1]))

    @property
    def hidden_pre(self) -> Acts:
        """Pre-activations in the intervened run. Their change is what an edge of a graph predicts."""
        return self.clt.hidden_pre(self.inputs).detach()

    @property
    def baseline_hidden_pre(self) -> Acts:
        """Pre-activations in the clean run."""
        return self.clt.hidden_pre(self.baseline_inputs).detach()

    def top_changes(self, k: int = 10, pos: int = -1) -> DataFrame:
        """The k tokens of each prompt whose probability of coming next changed most.

        Args:
            k: rows for each prompt.
            pos: position within each prompt after which the token comes; the last one unless said otherwise.

        Returns:
            Columns prompt (number in the batch), token (text, or #id without a tokenizer), token_id, before and
            after (probabilities), change (after - before), logit_change; the largest change first.

        Raises:
            InterventionError: k or pos is out of range.
        """
        d_vocab = self.logits.shape[-1]
        rows = PromptRows(self.tokens, self.attention_mask)
        n_pos = min(rows.lengths)
        k = as_whole("k", k, 1, d_vocab, why="the size of the vocabulary", error=InterventionError)
        pos = as_whole("pos", pos, -n_pos, n_pos - 1, why="the positions of the prompts", error=InterventionError)
        columns = [offset + pos % n for offset, n in zip(rows.offsets, rows.lengths, strict=True)]
        at = (range(len(columns)), columns)
        before, after = (x[at].double().softmax(dim=-1) for x in (self.baseline_logits, self.logits))
        logit_change = (self.logits - self.baseline_logits)[at]
        table = []
        for prompt, ids in enumerate((after - before).abs().topk(k).indices):
            for token, text in zip(ids.tolist(), token_strings(self.model, ids), strict=True):
                b, a = float(before[prompt, token]), float(after[prompt, token])
                table.append((prompt, text, token, b, a, a - b, float(logit_change[prompt, token])))
        names = ["prompt", "token", "token_id", "before", "after", "change", "logit_change"]
        return DataFrame(table, columns=names)
