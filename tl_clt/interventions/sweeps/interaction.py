"""Whether two interventions do together what each does alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pandas import DataFrame
from tqdm.auto import tqdm

from tl_clt.arguments import as_switch
from tl_clt.attribution.targets import TargetsGiven
from tl_clt.interventions.intervention import AnyIntervention, as_interventions
from tl_clt.interventions.sweeps.outcomes import Outcomes
from tl_clt.lens import Freeze, HookedModel, Prompt
from tl_clt.replacement import check_fit
from tl_clt.transcoder import CrossLayerTranscoder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEASURES = ("logit", "probability")
CHANGES = ["first", "second", "sum", "both", "interaction"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Interaction:
    """What `measure_interaction` found."""

    table: DataFrame
    """One row for each named token and measure: token, token_id, measure ("logit", less the mean logit over the
    vocabulary, or "probability"), clean (value of the clean run), first, second, both (changes from it), sum
    (first + second), interaction (both - sum)."""

    def plot(self) -> Figure:
        """Bars of each change, one panel a measure. Needs matplotlib."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 4.2), layout="constrained")
        width = 1 / (len(CHANGES) + 1)
        for axes, measure in zip(figure.subplots(1, len(MEASURES)), MEASURES, strict=True):
            rows = self.table[self.table["measure"] == measure]
            for i, change in enumerate(CHANGES):
                at = [place + (i - (len(CHANGES) - 1) / 2) * width for place in range(len(rows))]
                axes.bar(at, rows[change], width=width, label=change)
            axes.axhline(0, color="black", linewidth=0.8)
            axes.set_xticks(range(len(rows)), [repr(token) for token in rows["token"]])
            axes.set_ylabel(f"change of {measure}")
            axes.set_axisbelow(True)
            axes.grid(axis="y", linewidth=0.3)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(CHANGES))
        return figure


def measure_interaction(
    model: HookedModel,
    clt: CrossLayerTranscoder,
    prompt: Prompt,
    first: AnyIntervention | Iterable[AnyIntervention],
    second: AnyIntervention | Iterable[AnyIntervention],
    tokens: TargetsGiven,
    *,
    pos: int = -1,
    through_layer: int | None = None,
    freeze: Freeze = "attention",
    progress: bool = True,
) -> Interaction:
    """The effect of two interventions together, less the sum of their effects.

    Zero in logits where everything between is linear (every layer constrained, `freeze="all"`): an interaction
    is what a graph, which is linear, cannot show. Probabilities interact also then, through the softmax.

    Args:
        first, second: features, supernodes or directions, one or several, changed one after another where both are.
        model, clt, prompt, tokens, pos, through_layer, freeze, progress: as for `sweep_strength`.

    Raises:
        InterventionError, TargetError, CLTMismatch, HookNotFound, PromptError, TokenizerMissing, ConfigError: as
            there.
    """
    check_fit(model, clt)
    one, other = as_interventions(first), as_interventions(second)
    quiet = not as_switch("progress", progress)
    outcomes = Outcomes(model, clt, prompt, tokens, pos, freeze)
    each = tqdm([one, other, one + other], desc="interaction", delay=2.0, disable=quiet)
    found = [outcomes.read(outcomes.of(run, through_layer)) for run in each]
    rows = []
    for clean, *changed in zip(outcomes.read(outcomes.clean()), *found, strict=True):
        for measure in MEASURES:
            before = getattr(clean, measure)
            alone, beside, both = (getattr(reading, measure) - before for reading in changed)
            at = (clean.token, clean.token_id, measure, before)
            rows.append((*at, alone, beside, both, alone + beside, both - (alone + beside)))
    names = ["token", "token_id", "measure", "clean", "first", "second", "both", "sum", "interaction"]
    return Interaction(table=DataFrame(rows, columns=names))
