"""Sweeps: what follows from an intervention as its strength, its end layer, or a second one beside it varies.

Everything is read at one position of one prompt, as probabilities of the next token and as logits less the mean
logit over the vocabulary (what a graph's logit nodes hold).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxtyping import Float
from pandas import DataFrame
from torch import Tensor, tensor
from tqdm.auto import tqdm

from tl_clt.attribution.targets import token_id
from tl_clt.errors import InterventionError
from tl_clt.interventions.hooks import AnyIntervention
from tl_clt.interventions.intervene import intervene
from tl_clt.interventions.intervention import SETTERS
from tl_clt.lens import Freeze, HookedModel, Prompt, to_tokens, token_strings
from tl_clt.shapes import Tokens
from tl_clt.transcoder import CrossLayerTranscoder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEASURES = ("logit", "probability")


@dataclass(frozen=True, kw_only=True, eq=False)
class StrengthSweep:
    """What `sweep_strength` found."""

    table: DataFrame
    """One row for each strength and named token: strength, token, token_id, probability, logit."""

    answers: DataFrame
    """The likeliest token at each strength of the grid: strength, answer, answer_id, probability."""

    flips: DataFrame
    """Where the answer changes: strength, width (of the interval that holds the change, around strength), before,
    after (the answers on either side). Empty where it never does between two neighbours of the grid."""

    def plot(self) -> Figure:
        """Probability of each named token against strength, flips as dashed lines. Needs matplotlib."""
        figure = _figure(7, 4.5)
        axes = figure.subplots()
        for token, rows in self.table.groupby("token", sort=False):
            axes.plot(rows["strength"], rows["probability"], marker=".", label=repr(token))
        for i, strength in enumerate(self.flips["strength"]):
            axes.axvline(strength, color="grey", linestyle="--", label="answer changes" if i == 0 else None)
        axes.set(title="Steering", xlabel="strength (times the given amounts)", ylabel="probability of the next token")
        axes.set_ylim(-0.02, 1.02)
        axes.legend(title="token")
        return figure


@dataclass(frozen=True, kw_only=True, eq=False)
class EndLayerSweep:
    """What `sweep_end_layer` found."""

    table: DataFrame
    """One row for each end layer and named token: through_layer, token, token_id, probability, change (of it, from
    the clean run), logit, logit_change."""

    @property
    def summary(self) -> DataFrame:
        """One row for each token: token, clean (probability without the intervention), mean and mean_change over
        all end layers, best, best_change and best_layer. The best layer is the one whose change is largest in
        size; it was picked after the fact, and the mean says what a layer named beforehand would have given."""
        rows = []
        for token, at in self.table.groupby("token", sort=False):
            best = at.loc[at["change"].abs().idxmax()]
            mean, mean_change = at["probability"].mean(), at["change"].mean()
            clean = best["probability"] - best["change"]
            rows.append((token, clean, mean, mean_change, best["probability"], best["change"], best["through_layer"]))
        names = ["token", "clean", "mean", "mean_change", "best", "best_change", "best_layer"]
        return DataFrame(rows, columns=names)

    def plot(self) -> Figure:
        """Change of each token's probability against the end layer, with the mean over layers. Needs matplotlib."""
        figure = _figure(7, 4.5)
        axes = figure.subplots()
        for token, rows in self.table.groupby("token", sort=False):
            [line] = axes.plot(rows["through_layer"], rows["change"], marker="o", label=repr(token))
            axes.axhline(
                rows["change"].mean(), color=line.get_color(), linestyle=":", label=f"{token!r}, mean over layers"
            )
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set_xticks(sorted(self.table["through_layer"].unique()))
        axes.set(title="Constrained intervention by end layer", xlabel="last layer held (through_layer)")
        axes.set_ylabel("change of probability")
        axes.legend(title="token")
        return figure


@dataclass(frozen=True, kw_only=True, eq=False)
class Interaction:
    """What `measure_interaction` found."""

    table: DataFrame
    """One row for each named token and measure: token, token_id, measure ("logit" or "probability"), clean (value
    of the clean run), first, second, both (changes from it), sum (first + second), interaction (both - sum)."""

    def plot(self) -> Figure:
        """Bars of each change, one panel a measure. Needs matplotlib."""
        figure = _figure(10, 4.5)
        columns = ["first", "second", "sum", "both", "interaction"]
        for axes, measure in zip(figure.subplots(1, len(MEASURES)), MEASURES, strict=True):
            rows = self.table[self.table["measure"] == measure]
            for i, column in enumerate(columns):
                at = [place + (i - (len(columns) - 1) / 2) / (len(columns) + 1) for place in range(len(rows))]
                axes.bar(at, rows[column], width=1 / (len(columns) + 1), label=column)
            axes.axhline(0, color="grey", linewidth=0.8)
            axes.set_xticks(range(len(rows)), [repr(token) for token in rows["token"]])
            axes.set(title=f"Change of {measure}", xlabel="token", ylabel=f"change of {measure}")
        figure.axes[-1].legend()
        return figure


def sweep_strength(
    model: HookedModel,
    clt: CrossLayerTranscoder,
    prompt: Prompt,
    interventions: Iterable[AnyIntervention],
    strengths: Sequence[float],
    tokens: Sequence[int | str],
    *,
    pos: int = -1,
    through_layer: int | None = None,
    freeze: Freeze = "attention",
    tolerance: float | None = None,
    progress: bool = True,
) -> StrengthSweep:
    """Run an intervention at many strengths, and find where the answer (the likeliest token) changes.

    A strength multiplies the amount (value, scale, add or noise) of every intervention: with `value=1` strengths
    are values, with `scale=1` they are scales (and 1 is the clean run), with lists of values (swaps) they are
    shares of these. `scale=0` stays what it is, so that one feature can be kept off while another is turned up.
    Between neighbours of the grid with different answers the flip is found by bisection; changes of the answer
    that come and go between two neighbours with the same answer are not seen.

    Args:
        model, clt, through_layer, freeze: as for `intervene`.
        prompt: one prompt.
        interventions: what to change, by the amounts that strengths multiply.
        strengths: the grid, in any order.
        tokens: whose probabilities to report, as ids or text.
        pos: position after which the token comes.
        tolerance: width of the interval that a flip is found in; a thousandth of the grid's range where left out.
        progress: show a progress bar.

    Raises:
        InterventionError: no strength, one that is not finite, only amounts of 0, or what `intervene` refuses.
        TargetError: a token that is not one.
        CLTMismatch, HookNotFound, PromptError, TokenizerMissing, ConfigError: as `intervene`.
    """
    given = list(interventions)
    grid = _grid(strengths, given)
    tolerance = (grid[-1] - grid[0]) / 1000 if tolerance is None else tolerance
    if not 0 <= tolerance < math.inf or (tolerance == 0 and len(grid) > 1):
        raise InterventionError(f"tolerance is {tolerance}: give a number above 0.")
    outcomes = _Outcomes(model, clt, prompt, tokens, pos, freeze)

    def at(strength: float) -> _Outcome:
        return outcomes.of([_times(what, strength) for what in given], through_layer)

    found = {s: at(s) for s in tqdm(grid, desc="strengths", delay=2.0, disable=not progress)}
    answers = {s: outcome.answer for s, outcome in found.items()}
    flips = []
    for low, high in tqdm(list(pairwise(grid)), desc="flips", delay=2.0, disable=not progress):
        for flip in _flips(lambda s: at(s).answer, low, high, answers, tolerance):
            flips.append((flip.strength, flip.width, *outcomes.texts([flip.before, flip.after])))
    rows = [(s, *row) for s, outcome in found.items() for row in outcomes.rows(outcome)]
    best = [(s, *outcomes.texts([a]), a, float(found[s].probabilities[a])) for s, a in answers.items()]
    return StrengthSweep(
        table=DataFrame(rows, columns=["strength", "token", "token_id", "probability", "logit"]),
        answers=DataFrame(best, columns=["strength", "answer", "answer_id", "probability"]),
        flips=DataFrame(flips, columns=["strength", "width", "before", "after"]),
    )


def sweep_end_layer(
    model: HookedModel,
    clt: CrossLayerTranscoder,
    prompt: Prompt,
    interventions: Iterable[AnyIntervention],
    tokens: Sequence[int | str],
    *,
    pos: int = -1,
    freeze: Freeze = "attention",
    progress: bool = True,
) -> EndLayerSweep:
    """Run a constrained intervention with every possible end layer (Methods, "Constrained patching").

    `through_layer` goes from the highest layer that is changed to the last. How far the MLPs are held is a free
    choice that changes the outcome, so the summary gives the mean over layers beside the best one.

    Args:
        model, clt, prompt, interventions, tokens, pos, freeze, progress: as for `sweep_strength`.

    Raises:
        InterventionError: no intervention, or what `intervene` refuses.
        TargetError, CLTMismatch, HookNotFound, PromptError, TokenizerMissing, ConfigError: as there.
    """
    given = list(interventions)
    if not given:
        raise InterventionError("There are no interventions to sweep: give at least one.")
    outcomes = _Outcomes(model, clt, prompt, tokens, pos, freeze)
    # `intervene` says what is wrong with a layer that is not there.
    first = min(max(what.layer for what in given), clt.cfg.n_layers - 1)
    clean = outcomes.rows(outcomes.of([], None))
    rows = []
    for layer in tqdm(range(first, clt.cfg.n_layers), desc="end layers", delay=2.0, disable=not progress):
        for before, now in zip(clean, outcomes.rows(outcomes.of(given, layer)), strict=True):
            p, logit = now.probability, now.logit
            rows.append((layer, now.token, now.token_id, p, p - before.probability, logit, logit - before.logit))
    names = ["through_layer", "token", "token_id", "probability", "change", "logit", "logit_change"]
    return EndLayerSweep(table=DataFrame(rows, columns=names))


def measure_interaction(
    model: HookedModel,
    clt: CrossLayerTranscoder,
    prompt: Prompt,
    first: AnyIntervention,
    second: AnyIntervention,
    tokens: Sequence[int | str],
    *,
    pos: int = -1,
    through_layer: int | None = None,
    freeze: Freeze = "attention",
) -> Interaction:
    """Whether two interventions do together what each does alone: effect of both minus the sum of each.

    Zero in logits where everything between is linear (every layer constrained, `freeze="all"`): an interaction
    is what a graph, which is linear, cannot show. Probabilities interact also then, through the softmax.

    Args:
        first, second: features, supernodes or directions, changed one after another where both are.
        model, clt, prompt, tokens, pos, through_layer, freeze: as for `sweep_strength`.

    Raises:
        InterventionError, TargetError, CLTMismatch, HookNotFound, PromptError, TokenizerMissing, ConfigError: as
            there.
    """
    outcomes = _Outcomes(model, clt, prompt, tokens, pos, freeze)
    runs = [[], [first], [second], [first, second]]
    found = [outcomes.rows(outcomes.of(run, through_layer)) for run in runs]
    rows = []
    for clean, *changed in zip(*found, strict=True):
        for measure in MEASURES:
            before = getattr(clean, measure)
            one, other, both = (getattr(row, measure) - before for row in changed)
            at = (clean.token, clean.token_id, measure, before)
            rows.append((*at, one, other, both, one + other, both - (one + other)))
    names = ["token", "token_id", "measure", "clean", "first", "second", "both", "sum", "interaction"]
    return Interaction(table=DataFrame(rows, columns=names))


class _Outcome(NamedTuple):
    """The next token in one run."""

    probabilities: Float[Tensor, " d_vocab"]
    logits: Float[Tensor, " d_vocab"]
    """Less their mean."""

    @property
    def answer(self) -> int:
        return int(self.logits.argmax())


class _Row(NamedTuple):
    token: str
    token_id: int
    probability: float
    logit: float


class _Outcomes:
    """Runs interventions on one prompt and reads named tokens after one position."""

    def __init__(
        self,
        model: HookedModel,
        clt: CrossLayerTranscoder,
        prompt: Prompt,
        tokens: Sequence[int | str],
        pos: int,
        freeze: Freeze,
    ) -> None:
        self.model, self.clt = model, clt
        self.freeze: Freeze = freeze
        self.prompt: Tokens = to_tokens(model, prompt)
        n_pos = len(self.prompt)
        if not -n_pos <= pos < n_pos:
            raise InterventionError(f"pos is {pos}: the prompt has positions 0 to {n_pos - 1}.")
        self.pos = pos
        self.ids = list(dict.fromkeys(token_id(model, token) for token in tokens))
        if not self.ids:
            raise InterventionError("There are no tokens to report: name at least one.")

    def of(self, interventions: list[AnyIntervention], through_layer: int | None) -> _Outcome:
        effect = intervene(self.model, self.clt, self.prompt, interventions, through_layer, self.freeze)
        logits = effect.logits[0, self.pos].double()
        return _Outcome(logits.softmax(dim=-1), logits - logits.mean())

    def rows(self, outcome: _Outcome) -> list[_Row]:
        at = zip(self.texts(self.ids), self.ids, strict=True)
        return [_Row(text, i, float(outcome.probabilities[i]), float(outcome.logits[i])) for text, i in at]

    def texts(self, ids: list[int]) -> list[str]:
        return token_strings(self.model, tensor(ids))


class _Flip(NamedTuple):
    strength: float
    width: float
    before: int
    after: int


def _flips(
    answer: Callable[[float], int], low: float, high: float, known: Mapping[float, int], tolerance: float
) -> Iterator[_Flip]:
    """Flips of the answer between two strengths, by bisection, until the answer is that of the upper one."""
    before, last = known[low], known[high]
    while before != last:
        top, after = high, last
        while top - low > tolerance and low < (middle := (low + top) / 2) < top:
            if (now := answer(middle)) == before:
                low = middle
            else:
                top, after = middle, now
        yield _Flip((low + top) / 2, top - low, before, after)
        low, before = top, after


def _grid(strengths: Sequence[float], given: list[AnyIntervention]) -> list[float]:
    """The strengths in order, each once."""
    grid = sorted({float(s) for s in strengths})
    if not grid or not all(map(math.isfinite, grid)):
        raise InterventionError(f"strengths are {list(strengths)}: give at least one, and finite numbers.")
    amounts = [amount for what in given for amount in _amounts(what)]
    if not any(amounts):
        raise InterventionError(
            "Strengths multiply the amounts of the interventions, and there is none other than 0. Give value=1 or"
            " scale=1, for strengths to be values or scales."
        )
    return grid


def _setter(what: AnyIntervention) -> str:
    return next(name for name in SETTERS if getattr(what, name) is not None)


def _amounts(what: AnyIntervention) -> list[float]:
    amount = getattr(what, _setter(what))
    return list(amount) if isinstance(amount, Sequence) else [amount]


def _times(what: AnyIntervention, strength: float) -> AnyIntervention:
    """The same intervention, of `strength` times the amount."""
    amount = getattr(what, _setter(what))
    more: Any = [strength * a for a in amount] if isinstance(amount, Sequence) else strength * amount
    return replace(what, **{_setter(what): more})


def _figure(width: float, height: float) -> Figure:
    """An empty figure, in inches; matplotlib is imported here, when a plot is asked for."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
