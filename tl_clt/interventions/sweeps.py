"""What follows from an intervention as its strength, its end layer, or a second one beside it varies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from pandas import DataFrame
from torch import Tensor
from tqdm.auto import tqdm

from tl_clt.arguments import as_number, as_several, as_switch, as_whole
from tl_clt.attribution.targets import TargetsGiven, as_token_ids
from tl_clt.errors import InterventionError
from tl_clt.interventions.hooks import ThroughLayer
from tl_clt.interventions.intervene import intervene
from tl_clt.interventions.intervention import SETTERS, AnyIntervention, Number, as_interventions
from tl_clt.lens import Freeze, HookedModel, Prompt, to_tokens, token_strings
from tl_clt.replacement import check_fit
from tl_clt.report import GREY, Report
from tl_clt.shapes import Tokens
from tl_clt.transcoder import CrossLayerTranscoder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKERS = "os^Dv*P"
"""Of lines that may lie on each other: open, and one shape each."""


class Outcome(NamedTuple):
    """The next token in one run."""

    probabilities: Float[Tensor, " d_vocab"]
    logits: Float[Tensor, " d_vocab"]
    """Less their mean over the vocabulary."""

    @property
    def answer(self) -> int:
        """The likeliest token."""
        return int(self.logits.argmax())


class Reading(NamedTuple):
    """One named token in one run."""

    token: str
    token_id: int
    probability: float
    logit: float


class Outcomes:
    """Runs interventions on one prompt and reads named tokens after one position.

    Raises:
        InterventionError: a position that is not there, or no token.
        TargetError: a token that is not one.
        PromptError, TokenizerMissing: as `to_tokens`.
    """

    def __init__(
        self,
        model: HookedModel,
        clt: CrossLayerTranscoder,
        prompt: Prompt,
        targets: TargetsGiven,
        pos: int,
        freeze: Freeze,
    ) -> None:
        self.model, self.clt = model, clt
        self.freeze: Freeze = freeze
        self.prompt: Tokens = to_tokens(model, prompt)
        n_pos = len(self.prompt)
        self.pos = as_whole("pos", pos, -n_pos, n_pos - 1, why="the prompt's positions", error=InterventionError)
        self.ids = list(dict.fromkeys(as_token_ids(model, targets)))
        if not self.ids:
            raise InterventionError("There are no tokens to report: name at least one.")

    def of(self, interventions: Sequence[AnyIntervention], through_layer: ThroughLayer) -> Outcome:
        """The outcome of one run."""
        effect = intervene(self.model, self.clt, self.prompt, interventions, through_layer, self.freeze)
        logits = effect.logits[0, self.pos].double()
        return Outcome(logits.softmax(dim=-1), logits - logits.mean())

    def clean(self) -> Outcome:
        """The outcome of the model itself."""
        return self.of([], -1)

    def read(self, outcome: Outcome) -> list[Reading]:
        """The named tokens in one run."""
        pairs = zip(self.texts(self.ids), self.ids, strict=True)
        return [Reading(text, i, float(outcome.probabilities[i]), float(outcome.logits[i])) for text, i in pairs]

    def texts(self, ids: list[int]) -> list[str]:
        """Tokens as text, or #id without a tokenizer."""
        return token_strings(self.model, torch.tensor(ids))


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class StrengthSweep(Report[Literal["strength"]]):
    """What `sweep_strength` found.

    Figure: "strength" (probability of each named token against strength, flips as dashed lines). `save` writes it,
    strength.csv, answers.csv and flips.csv.
    """

    FIGURES: ClassVar[tuple[str, ...]] = ("strength",)

    table: DataFrame
    """One row for each strength and named token: strength, token, token_id, probability, logit (less the mean logit
    over the vocabulary)."""

    answers: DataFrame
    """The likeliest token at each strength of the grid: strength, answer, answer_id, probability."""

    flips: DataFrame
    """Where the answer changes, from low strength to high: strength, width (of the interval around it that holds
    the change), before, after (the answers on either side). Empty where it does not."""

    def _draw(self, name: str) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7.5, 5), layout="constrained")
        axes = figure.subplots()
        for (_, rows), marker in zip(self.table.groupby("token_id", sort=False), cycle(MARKERS), strict=False):
            look: dict[str, Any] = {"marker": marker, "markersize": 5, "fillstyle": "none"}
            axes.plot(rows["strength"], rows["probability"], label=repr(rows["token"].iloc[0]), **look)
        flips = self.flips[["strength", "before", "after"]].to_numpy().tolist()
        for i, (strength, before, after) in enumerate(flips):
            label = f"{strength:.3g}: {before!r} to {after!r}"
            axes.axvline(strength, color=GREY, linestyle=("--", ":", "-.")[i % 3], linewidth=1, label=label)
        axes.set(xlabel="strength (times the given amounts)", ylabel="probability of the next token")
        axes.set(title="Steering", ylim=(-0.02, 1.02))
        axes.grid(linewidth=0.3)
        figure.legend(loc="outside lower center", ncols=2)
        return figure

    def _write_numbers(self, folder: Path) -> None:
        for name, table in (("strength", self.table), ("answers", self.answers), ("flips", self.flips)):
            table.to_csv(folder / f"{name}.csv", index=False)

    def _in_short(self) -> str:
        return f"{len(self.answers)} strengths, {len(self.flips)} flips of the answer"

    def _tables(self) -> dict[str, DataFrame]:
        return {"flips of the answer": self.flips, "the likeliest token": self.answers, "named tokens": self.table}


def sweep_strength(
    model: HookedModel,
    clt: CrossLayerTranscoder,
    prompt: Prompt,
    interventions: AnyIntervention | Iterable[AnyIntervention],
    strengths: Number | Iterable[Number],
    targets: TargetsGiven,
    *,
    pos: int = -1,
    through_layer: ThroughLayer = None,
    freeze: Freeze = "attention",
    tolerance: Number | None = None,
    progress: bool = True,
) -> StrengthSweep:
    """Run an intervention at many strengths, and find where the answer (the likeliest token) flips.

    A strength multiplies the amount (value, scale, add or noise) of every intervention: with `value=1` strengths
    are values, with `scale=1` they are scales (and 1 is the clean run), with lists of values (swaps) they are
    shares of these. `scale=0` stays what it is, so that one feature can be kept off while another is turned up.
    Between neighbours of the grid with different answers each flip is found by bisection; changes that come and go
    between neighbours with the same answer are not seen.

    Args:
        model, clt, through_layer, freeze: as for `intervene`.
        prompt: one prompt.
        interventions: what to change (one or several), by the amounts that strengths multiply.
        strengths: the grid, in any order (an array will do); or one.
        targets: tokens whose probabilities to report, as ids or text; one or several.
        pos: position after which the token comes.
        tolerance: width of the interval that a flip is found in; a thousandth of the grid's range where left out.
        progress: show progress bars.

    Raises:
        InterventionError: no strength, one that is not finite, only amounts of 0, or what `intervene` refuses.
        TargetError: a token that is not one.
        CLTMismatch, HookNotFound, PromptError, TokenizerMissing, ConfigError: as `intervene`.
    """
    check_fit(model, clt)
    entries = as_interventions(interventions)
    grid = _grid(strengths, entries)
    none = "a thousandth of the grid's range"
    width = as_number("tolerance", tolerance, above=0, none=none, error=InterventionError)
    width = width or (grid[-1] - grid[0]) / 1000 or 1.0
    quiet = not as_switch("progress", progress)
    outcomes = Outcomes(model, clt, prompt, targets, pos, freeze)

    def at(strength: float) -> Outcome:
        return outcomes.of([_times(intervention, strength) for intervention in entries], through_layer)

    found = {s: at(s) for s in tqdm(grid, desc="strengths", delay=2.0, disable=quiet)}
    answers = {s: outcome.answer for s, outcome in found.items()}
    flips = []
    for low, high in tqdm(list(pairwise(grid)), desc="flips", delay=2.0, disable=quiet):
        for flip in _flips(lambda s: at(s).answer, low, high, answers, width):
            flips.append((flip.strength, flip.width, *outcomes.texts([flip.before, flip.after])))
    rows = [(s, *reading) for s, outcome in found.items() for reading in outcomes.read(outcome)]
    best = [(s, *outcomes.texts([a]), a, float(found[s].probabilities[a])) for s, a in answers.items()]
    return StrengthSweep(
        table=DataFrame(rows, columns=["strength", "token", "token_id", "probability", "logit"]),
        answers=DataFrame(best, columns=["strength", "answer", "answer_id", "probability"]),
        flips=DataFrame(flips, columns=["strength", "width", "before", "after"]),
    )


class _Flip(NamedTuple):
    strength: float
    width: float
    before: int
    after: int


def _flips(
    answer: Callable[[float], int], low: float, high: float, answers: Mapping[float, int], tolerance: Number
) -> Iterator[_Flip]:
    """Flips of the answer between two strengths, by bisection, until the answer is that of the upper one."""
    before, last = answers[low], answers[high]
    while before != last:
        top, after = high, last
        while top - low > tolerance and low < (middle := (low + top) / 2) < top:
            if (now := answer(middle)) == before:
                low = middle
            else:
                top, after = middle, now
        yield _Flip((low + top) / 2, top - low, before, after)
        low, before = top, after


def _grid(strengths: Number | Iterable[Number], interventions: list[AnyIntervention]) -> list[float]:
    """The strengths in order, each once."""
    numbers = as_several("strengths", strengths, "finite numbers", InterventionError)
    grid = sorted({float(as_number(f"strengths[{i}]", s, error=InterventionError)) for i, s in enumerate(numbers)})
    if not any(amount for intervention in interventions for amount in _amounts(intervention)):
        raise InterventionError(
            "Strengths multiply the amounts of the interventions, and there is none other than 0. Give value=1 or"
            " scale=1, for strengths to be values or scales."
        )
    return grid


def _setter(intervention: AnyIntervention) -> str:
    return next(name for name in SETTERS if getattr(intervention, name) is not None)


def _amounts(intervention: AnyIntervention) -> list[Number]:
    amount = getattr(intervention, _setter(intervention))
    return list(amount) if isinstance(amount, Sequence) else [amount]


def _times(intervention: AnyIntervention, strength: float) -> AnyIntervention:
    """The same intervention, of `strength` times the amount."""
    amount = getattr(intervention, _setter(intervention))
    more: Any = [strength * a for a in amount] if isinstance(amount, Sequence) else strength * amount
    return replace(intervention, **{_setter(intervention): more})


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class EndLayerSweep(Report[Literal["end_layers"]]):
    """What `sweep_end_layer` found.

    Figure: "end_layers" (change of each token's probability against the end layer, its mean dotted). `save` writes it,
    end_layers.csv and summary.csv.
    """

    FIGURES: ClassVar[tuple[str, ...]] = ("end_layers",)

    table: DataFrame
    """One row for each end layer and named token: through_layer, token, token_id, probability, change (of it, from
    the clean run), logit (less the mean logit over the vocabulary), logit_change."""

    @property
    def summary(self) -> DataFrame:
        """One row for each token: token, clean (probability without the intervention), mean and mean_change over
        all end layers, best, best_change and best_layer. The best layer is the one whose change is largest in
        size; it was picked after the fact, and the mean says what a layer named beforehand would have given."""
        rows = []
        for _, at in self.table.groupby("token_id", sort=False):
            best = at.loc[at["change"].abs().idxmax()]
            mean, mean_change = at["probability"].mean(), at["change"].mean()
            clean = best["probability"] - best["change"]
            at_best = (best["probability"], best["change"], best["through_layer"])
            rows.append((best["token"], clean, mean, mean_change, *at_best))
        names = ["token", "clean", "mean", "mean_change", "best", "best_change", "best_layer"]
        return DataFrame(rows, columns=names)

    def _draw(self, name: str) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7.5, 5), layout="constrained")
        axes = figure.subplots()
        for (_, rows), marker in zip(self.table.groupby("token_id", sort=False), cycle(MARKERS), strict=False):
            token = rows["token"].iloc[0]
            [line] = axes.plot(
                rows["through_layer"], rows["change"], marker=marker, fillstyle="none", label=repr(token)
            )
            mean = rows["change"].mean()
            axes.axhline(mean, color=line.get_color(), linestyle=":", label=f"{token!r}, mean {mean:+.2f}")
        axes.axhline(0, color=GREY, linewidth=0.8)
        layers = sorted(self.table["through_layer"].unique())
        axes.set_xticks(layers[:: -(-len(layers) // 16)])
        axes.set(xlabel="last layer whose MLP output is held (through_layer)", ylabel="change of probability")
        axes.set_title("Constrained intervention by end layer")
        axes.grid(linewidth=0.3)
        figure.legend(loc="outside lower center", ncols=2)
        return figure

    def _write_numbers(self, folder: Path) -> None:
        self.table.to_csv(folder / "end_layers.csv", index=False)
        self.summary.to_csv(folder / "summary.csv", index=False)

    def _in_short(self) -> str:
        layers = self.table["through_layer"]
        return f"end layers {layers.min()} to {layers.max()}, {self.table['token_id'].nunique()} tokens"

    def _tables(self) -> dict[str, DataFrame]:
        return {"by token": self.summary, "by end layer": self.table}


def sweep_end_layer(
    model: HookedModel,
    clt: CrossLayerTranscoder,
    prompt: Prompt,
    interventions: AnyIntervention | Iterable[AnyIntervention],
    targets: TargetsGiven,
    *,
    pos: int = -1,
    freeze: Freeze = "attention",
    progress: bool = True,
) -> EndLayerSweep:
    """Run a constrained intervention with every possible end layer.

    `through_layer` goes from the highest layer that is changed to the last. How far the MLPs are held is a free
    choice that changes the outcome, so the summary gives the mean over layers beside the best one.

    Args:
        model, clt, prompt, interventions, targets, pos, freeze, progress: as for `sweep_strength`.

    Raises:
        InterventionError: no intervention, or what `intervene` refuses.
        TargetError, CLTMismatch, HookNotFound, PromptError, TokenizerMissing, ConfigError: as there.
    """
    check_fit(model, clt)
    entries = as_interventions(interventions)
    if not entries:
        raise InterventionError("There are no interventions to sweep: give at least one.")
    quiet = not as_switch("progress", progress)
    outcomes = Outcomes(model, clt, prompt, targets, pos, freeze)
    clean = outcomes.read(outcomes.clean())
    # `intervene` says what is wrong with a layer that is not there.
    first = min(max(intervention.layer for intervention in entries), clt.cfg.n_layers - 1)
    rows = []
    for layer in tqdm(range(first, clt.cfg.n_layers), desc="end layers", delay=2.0, disable=quiet):
        for before, now in zip(clean, outcomes.read(outcomes.of(entries, layer)), strict=True):
            p, logit = now.probability, now.logit
            rows.append((layer, now.token, now.token_id, p, p - before.probability, logit, logit - before.logit))
    names = ["through_layer", "token", "token_id", "probability", "change", "logit", "logit_change"]
    return EndLayerSweep(table=DataFrame(rows, columns=names))


MEASURES = ("logit", "probability")
CHANGES = ["first", "second", "sum", "both", "interaction"]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Interaction(Report[Literal["interaction"]]):
    """What `measure_interaction` found.

    Figure: "interaction" (bars of each change, one panel a measure). `save` writes it and interaction.csv.
    """

    FIGURES: ClassVar[tuple[str, ...]] = ("interaction",)

    table: DataFrame
    """One row for each named token and measure: token, token_id, measure ("logit", less the mean logit over the
    vocabulary, or "probability"), clean (value of the clean run), first, second, both (changes from it), sum
    (first + second), interaction (both - sum)."""

    def _draw(self, name: str) -> Figure:
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

    def _write_numbers(self, folder: Path) -> None:
        self.table.to_csv(folder / "interaction.csv", index=False)

    def _in_short(self) -> str:
        return f"{self.table['token_id'].nunique()} tokens"

    def _tables(self) -> dict[str, DataFrame]:
        return {"changes from the clean run": self.table}


def measure_interaction(
    model: HookedModel,
    clt: CrossLayerTranscoder,
    prompt: Prompt,
    first: AnyIntervention | Iterable[AnyIntervention],
    second: AnyIntervention | Iterable[AnyIntervention],
    targets: TargetsGiven,
    *,
    pos: int = -1,
    through_layer: ThroughLayer = None,
    freeze: Freeze = "attention",
    progress: bool = True,
) -> Interaction:
    """The effect of two interventions together, less the sum of their effects.

    Zero in logits where everything between is linear (every layer constrained, `freeze="all"`): an interaction
    is what a graph, which is linear, cannot show. Probabilities interact also then, through the softmax.

    Args:
        first, second: features, supernodes or directions, one or several, changed one after another where both are.
        model, clt, prompt, targets, pos, through_layer, freeze, progress: as for `sweep_strength`.

    Raises:
        InterventionError, TargetError, CLTMismatch, HookNotFound, PromptError, TokenizerMissing, ConfigError: as
            there.
    """
    check_fit(model, clt)
    one, other = as_interventions(first), as_interventions(second)
    quiet = not as_switch("progress", progress)
    outcomes = Outcomes(model, clt, prompt, targets, pos, freeze)
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
