"""Steering strength against outcome, and the strengths at which the answer flips."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from pandas import DataFrame
from tqdm.auto import tqdm

from tl_clt.arguments import as_number, as_several, as_switch
from tl_clt.attribution.targets import TargetsGiven
from tl_clt.errors import InterventionError
from tl_clt.interventions.intervention import SETTERS, AnyIntervention, Number, as_interventions
from tl_clt.interventions.sweeps.outcomes import Outcome, Outcomes
from tl_clt.lens import Freeze, HookedModel, Prompt
from tl_clt.replacement import check_fit
from tl_clt.transcoder import CrossLayerTranscoder

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True, eq=False)
class StrengthSweep:
    """What `sweep_strength` found."""

    table: DataFrame
    """One row for each strength and named token: strength, token, token_id, probability, logit (less the mean logit
    over the vocabulary)."""

    answers: DataFrame
    """The likeliest token at each strength of the grid: strength, answer, answer_id, probability."""

    flips: DataFrame
    """Where the answer changes, from low strength to high: strength, width (of the interval around it that holds
    the change), before, after (the answers on either side). Empty where it does not."""

    def plot(self) -> Figure:
        """Probability of each named token against strength, flips as dashed lines. Needs matplotlib."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7.5, 5), layout="constrained")
        axes = figure.subplots()
        for _, rows in self.table.groupby("token_id", sort=False):
            token = rows["token"].iloc[0]
            axes.plot(rows["strength"], rows["probability"], marker="o", markersize=3, label=repr(token))
        flips = self.flips[["strength", "before", "after"]].to_numpy().tolist()
        for i, (strength, before, after) in enumerate(flips):
            label = f"{strength:.3g}: {before!r} to {after!r}"
            axes.axvline(strength, color="grey", linestyle=("--", ":", "-.")[i % 3], linewidth=1, label=label)
        axes.set(xlabel="strength (times the given amounts)", ylabel="probability of the next token")
        axes.set(title="Steering", ylim=(-0.02, 1.02))
        axes.grid(linewidth=0.3)
        figure.legend(loc="outside lower center", ncols=2)
        return figure


def sweep_strength(
    model: HookedModel,
    clt: CrossLayerTranscoder,
    prompt: Prompt,
    interventions: AnyIntervention | Iterable[AnyIntervention],
    strengths: Number | Iterable[Number],
    tokens: TargetsGiven,
    *,
    pos: int = -1,
    through_layer: int | None = None,
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
        tokens: whose probabilities to report, as ids or text; one or several.
        pos: position after which the token comes.
        tolerance: width of the interval that a flip is found in; a thousandth of the grid's range where left out.
        progress: show progress bars.

    Raises:
        InterventionError: no strength, one that is not finite, only amounts of 0, or what `intervene` refuses.
        TargetError: a token that is not one.
        CLTMismatch, HookNotFound, PromptError, TokenizerMissing, ConfigError: as `intervene`.
    """
    check_fit(model, clt)
    given = as_interventions(interventions)
    grid = _grid(strengths, given)
    none = "a thousandth of the grid's range"
    width = as_number("tolerance", tolerance, above=0, none=none, error=InterventionError)
    width = width or (grid[-1] - grid[0]) / 1000 or 1.0
    quiet = not as_switch("progress", progress)
    outcomes = Outcomes(model, clt, prompt, tokens, pos, freeze)

    def at(strength: float) -> Outcome:
        return outcomes.of([_times(what, strength) for what in given], through_layer)

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
    answer: Callable[[float], int], low: float, high: float, known: Mapping[float, int], tolerance: Number
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


def _grid(strengths: Number | Iterable[Number], given: list[AnyIntervention]) -> list[float]:
    """The strengths in order, each once."""
    numbers = as_several("strengths", strengths, "finite numbers", InterventionError)
    grid = sorted({float(as_number(f"strengths[{i}]", s, error=InterventionError)) for i, s in enumerate(numbers)})
    if not any(amount for what in given for amount in _amounts(what)):
        raise InterventionError(
            "Strengths multiply the amounts of the interventions, and there is none other than 0. Give value=1 or"
            " scale=1, for strengths to be values or scales."
        )
    return grid


def _setter(what: AnyIntervention) -> str:
    return next(name for name in SETTERS if getattr(what, name) is not None)


def _amounts(what: AnyIntervention) -> list[Number]:
    amount = getattr(what, _setter(what))
    return list(amount) if isinstance(amount, Sequence) else [amount]


def _times(what: AnyIntervention, strength: float) -> AnyIntervention:
    """The same intervention, of `strength` times the amount."""
    amount = getattr(what, _setter(what))
    more: Any = [strength * a for a in amount] if isinstance(amount, Sequence) else strength * amount
    return replace(what, **{_setter(what): more})
