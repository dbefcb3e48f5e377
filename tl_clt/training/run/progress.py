"""What one sees while a CLT trains: a line every so many steps, its table and figure, warnings, and where time goes.

A line is measured on the batch just trained on, from what its step made anyway: the reconstruction, and how often each
feature fired.

In Python, the logger "tl_clt.training" has the lines at level INFO (`logging.basicConfig(level="INFO")` shows them),
and the runner's `on_progress` is told each as a `TrainingProgress`, which `print` prints. Where neither is used,
SAELens's progress bar is shown; with lines it would stand in their way.
"""

from __future__ import annotations

import csv
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training import sae_trainer
from torch import Tensor

from tl_clt.errors import CheckpointError, LayerWarning
from tl_clt.files import READING_ERRORS, new_file
from tl_clt.report import GREY, PALETTE, drawing
from tl_clt.training.clt import CLTStep, TrainingCLT
from tl_clt.training.config import CLTSettings
from tl_clt.transcoder import explained_variance

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tl_clt.training.run.trainer import CLTTrainer

TABLE = "progress.csv"
FIGURE = "progress.png"

logger = logging.getLogger("tl_clt.training")


class TrainingProgress(NamedTuple):
    """What `on_progress` is told. Printed, it is one line."""

    step: int
    """Steps done."""

    n_steps: int
    """Steps of the whole run."""

    tokens: int
    """Tokens trained on so far."""

    losses: dict[str, float]
    """Terms of the last step's loss, coefficients included."""

    seconds: float
    """Wall time of the run so far, loading included; of a resumed one, with what it took before."""

    explained_variance: float
    """Mean over layers, on the last step's batch: see `EvaluationReport`."""

    explained_variance_per_layer: list[float]
    """That of each layer."""

    l0_per_layer: list[float]
    """Features that fired at a token of the last step's batch, of each layer."""

    dead_share: float
    """Share of dead features, as in `Metrics`; 0 until enough steps are done to tell."""

    tokens_per_second: float
    """Since the line before."""

    seconds_left: float
    """At the mean speed since training began."""

    @property
    def l0_mean(self) -> float:
        """Features that fired at a token, mean over layers."""
        return sum(self.l0_per_layer) / len(self.l0_per_layer)

    @property
    def l0_least(self) -> float:
        """Of the layer where the fewest fired."""
        return min(self.l0_per_layer)

    @property
    def l0_greatest(self) -> float:
        """Of the layer where the most fired."""
        return max(self.l0_per_layer)

    def __str__(self) -> str:
        losses = ", ".join(f"{shorten(name)} {value:.4g}" for name, value in self.losses.items())
        return (
            f"step {self.step}/{self.n_steps}: loss {sum(self.losses.values()):.4g} ({losses}), explained variance"
            f" {self.explained_variance:.3f}, L0 {self.l0_mean:.3g} ({self.l0_least:.3g} to {self.l0_greatest:.3g} by"
            f" layer), dead {self.dead_share:.1%}, {self.tokens_per_second:.0f} tokens/s,"
            f" {in_words(self.seconds_left)} left"
        )

    def to_row(self) -> dict[str, Any]:
        """Plain values for a table, one a column."""
        return {
            **{name: getattr(self, name) for name in ("step", "n_steps", "tokens")},
            "seconds": round(self.seconds, 3),
            **self.losses,
            "explained_variance": self.explained_variance,
            **{name: getattr(self, name) for name in ("l0_mean", "l0_least", "l0_greatest", "dead_share")},
            "tokens_per_second": round(self.tokens_per_second, 1),
            "seconds_left": round(self.seconds_left, 1),
            **{f"l0_layer_{layer}": value for layer, value in enumerate(self.l0_per_layer)},
            **{f"{EV_OF_LAYER}{layer}": value for layer, value in enumerate(self.explained_variance_per_layer)},
        }

    @classmethod
    def from_row(cls, row: dict[str, str]) -> TrainingProgress:
        """The line that `to_row` made a row of.

        Raises:
            KeyError, ValueError: it is no such row.
        """

        def by_layer(prefix: str) -> list[float]:
            return [float(value) for name, value in row.items() if name.startswith(prefix)]

        return cls(
            step=int(row["step"]),
            n_steps=int(row["n_steps"]),
            tokens=int(row["tokens"]),
            losses={name: float(value) for name, value in row.items() if name.endswith("_loss") and value != ""},
            **{name: float(row[name]) for name in NUMBERS},
            explained_variance_per_layer=by_layer(EV_OF_LAYER),
            l0_per_layer=by_layer("l0_layer_"),
        )


EV_OF_LAYER = "explained_variance_layer_"
NUMBERS = ("seconds", "explained_variance", "dead_share", "tokens_per_second", "seconds_left")


def shorten(loss: str) -> str:
    """The name of a loss term in a line: "sparsity_loss" is "sparsity"."""
    return loss.removesuffix("_loss").replace("_", " ")


def in_words(seconds: float) -> str:
    """5s, 12m05s, 1h02m, 3d04h."""
    whole = round(seconds)
    for unit, small, size, smaller in (("d", "h", 86400, 3600), ("h", "m", 3600, 60), ("m", "s", 60, 1)):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // smaller:02d}{small}"
    return f"{whole}s"


# -- measuring


class _Measured(NamedTuple):
    explained_variance: float
    explained_variance_per_layer: list[float]
    l0_per_layer: list[float]


@torch.no_grad()
def measure_batch(
    clt: TrainingCLT,
    step: CLTStep,
    outputs: Float[Tensor, "batch n_layers d_model"],
    fired: Int[Tensor, " d_sae"],
) -> _Measured:
    """Explained variance and L0 of a step's batch; on a grid, of all ranks' tokens, and every rank has to call it.

    Args:
        clt: in training.
        step: what its forward pass gave.
        outputs: scaled ones, of this rank's tokens.
        fired: tokens of the whole batch at which each feature fired.
    """
    sums = []
    for recons, rows in zip(step.recons.unbind(dim=1), outputs.unbind(dim=1), strict=True):
        # One layer at a time: no copy of the batch. On a grid the sums need the whole batch's mean.
        y = clt.grid.all_tokens(rows.to(clt.sum_dtype))
        error, centred = clt.grid.all_tokens(recons) - y, y - y.mean(dim=0)
        sums.append(torch.stack([part.square().sum(dtype=torch.float64) for part in (error, centred, y)]))
    explained = explained_variance(*torch.stack(sums, dim=1))
    l0 = clt.l0_per_layer(fired, len(step.recons) * clt.grid.n_data_parallel)
    return _Measured(explained.mean, explained.per_layer, l0.tolist())


class ProgressMeter:
    """Makes a run's lines. The trainer calls `see` within each step and `done` after it.

    Args:
        every: steps from line to line; the last step has one as well.
        n_steps: of the whole run.
        n_tokens: of the whole run.
        started: when the run began, in seconds of `time.monotonic`.
        tell: given each line.
    """

    def __init__(
        self, every: int, n_steps: int, n_tokens: int, started: float, tell: Callable[[TrainingProgress], None]
    ) -> None:
        self._every, self._n_steps, self._n_tokens = every, n_steps, n_tokens
        self._started, self._tell = started, tell
        self._first = self._last = (started, 0)
        self._most_tokens = 0

    def begin(self, tokens: int) -> None:
        """Training begins, with so many tokens done before."""
        self._first = self._last = (time.monotonic(), tokens)

    def see(self, clt: TrainingCLT, step: CLTStep, step_input: TrainStepInput, fired: Tensor) -> None:
        """A step's forward pass, and at how many tokens of the whole batch each feature fired."""
        n, n_tokens = step_input.n_training_steps + 1, len(step.recons)
        # The variance of a few tokens says nothing: a short last batch has the numbers of the one before.
        short = n == self._n_steps and 2 * n_tokens < self._most_tokens
        if not short and (self._is_due(n) or n == self._n_steps - 1):
            self._measured = measure_batch(clt, step, step_input.sae_in[:, 1], fired)
        self._most_tokens = max(self._most_tokens, n_tokens)

    def done(self, trainer: CLTTrainer) -> None:
        """A step, before it is counted in `n_training_steps`."""
        step, tokens = trainer.n_training_steps + 1, trainer.n_training_samples
        if not self._is_due(step):
            return
        now, (began, before), (last, at_last) = time.monotonic(), self._first, self._last
        self._last = (now, tokens)
        line = TrainingProgress(
            step=step,
            n_steps=self._n_steps,
            tokens=tokens,
            losses={name: float(value) for name, value in trainer.sae.last_losses.items()},
            seconds=now - self._started,
            **self._measured._asdict(),
            dead_share=float(trainer.dead_neurons.double().mean()),
            tokens_per_second=(tokens - at_last) / max(now - last, 1e-9),
            seconds_left=(now - began) * (self._n_tokens - tokens) / max(tokens - before, 1),
        )
        self._tell(line)

    def times(self, in_steps: float, waiting: float, in_model: float) -> TrainingTimes:
        """Where the time since `begin` went, from the seconds of its parts."""
        seconds = max(time.monotonic() - self._first[0], 1e-9)
        shares = [round(part / seconds, 4) for part in (in_steps, waiting, in_model)]
        return TrainingTimes(round(seconds, 1), *shares)

    def _is_due(self, step: int) -> bool:
        """Whether a line follows that step, counted from 1."""
        return step % self._every == 0 or step == self._n_steps


# -- layers that do not learn

SILENT = 0.1
"""Features that fire at a token: a layer with fewer, and with fewer than this share of `target_l0`, is silent."""


class LayerWatch:
    """Warns of each layer once where it falls silent, or is worse late in the run than a constant would be."""

    def __init__(self, clt: CLTSettings) -> None:
        self._clt = clt
        self._warned_of: set[int] = set()

    def look(self, line: TrainingProgress) -> list[str]:
        """Warn of what the line shows; the messages."""
        silent_below = SILENT * min(1.0, self._clt.target_l0 or 1.0)
        silent = [layer for layer, l0 in enumerate(line.l0_per_layer) if l0 < silent_below]
        late = line.step > line.n_steps / 2
        bad = [layer for layer, ev in enumerate(line.explained_variance_per_layer) if late and ev < 0]
        messages = []
        for layers, describe in ((silent, self._say_silent), (bad, self._say_negative)):
            new = [layer for layer in layers if layer not in self._warned_of]
            self._warned_of.update(new)
            if new:
                messages.append(f"Step {line.step} of {line.n_steps}: {describe(new, line)}")
        for message in messages:
            warnings.warn(message, LayerWarning, stacklevel=2)
        return messages

    def _say_silent(self, layers: list[int], line: TrainingProgress) -> str:
        most = max(line.l0_per_layer[layer] for layer in layers)
        return (
            f"{_layers(layers)} {'has' if len(layers) == 1 else 'have'} almost no active features left (L0"
            f" {most:.2g}). {self._more_features()}"
        )

    def _say_negative(self, layers: list[int], line: TrainingProgress) -> str:
        least = min(line.explained_variance_per_layer[layer] for layer in layers)
        return (
            f"the CLT's output for {_layers(layers).lower()} is worse than a constant (explained variance {least:.2g})."
            f" {self._more_features()} Or lower lr, or leave out positions of very large norm (max_norm_ratio)."
        )

    def _more_features(self) -> str:
        clt = self._clt
        if clt.selects:
            own = "" if clt.topk_across == "layer" else ", or give each layer its own share with topk_across='layer'"
            return f"Raise k (now {clt.k}){own}."
        fewer = (
            f"Raise target_l0 (now {clt.target_l0:g})"
            if clt.target_l0 is not None
            else f"Lower sparsity_coefficient (now {clt.sparsity_coefficient:g})"
        )
        return f"{fewer}, or raise dead_feature_coefficient (now {clt.dead_feature_coefficient:g})."


def _layers(layers: Sequence[int]) -> str:
    """Layer 3; Layers 3, 5 and 6."""
    *first, last = map(str, layers)
    return f"Layers {', '.join(first)} and {last}" if first else f"Layer {last}"


# -- where time goes


class TrainingTimes(NamedTuple):
    """Where the time of training went, since it began or was resumed. On a GPU, whose work goes on after a call
    returned, these are the times that calls took."""

    seconds: float
    """From the first batch to the last step."""

    step_share: float
    """Share of it in training steps."""

    waiting_share: float
    """Share of it waiting for the next batch."""

    model_share: float
    """Time of making activations (the model's forward passes, or reading the cache), as a share of the same. With
    prefetch this goes on beside the steps; without, it is part of waiting."""

    def __str__(self) -> str:
        rest = 1 - self.step_share - self.waiting_share
        return (
            f"Training took {in_words(self.seconds)}: {self.step_share:.0%} in steps, {self.waiting_share:.0%} waiting"
            f" for activations and {rest:.0%} for the rest, with the model's forward passes (or the cache) busy for"
            f" {self.model_share:.0%} of the time."
        )


class Waiting(Iterator[Any]):
    """Batches, and how long they were waited for."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches = batches
        self.seconds = 0.0

    def __next__(self) -> Any:
        began = time.monotonic()
        batch = next(self._batches)
        self.seconds += time.monotonic() - began
        return batch


# -- what is shown and kept


@contextmanager
def bar(show: bool) -> Iterator[None]:
    """Within the block, SAELens's progress bar is shown or not: it has no switch of its own."""
    before = sae_trainer.tqdm
    if not show:
        sae_trainer.tqdm = partial(before, disable=True)  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        sae_trainer.tqdm = before  # type: ignore[misc]


class ProgressTable:
    """The lines of a run as a table, in memory and beside its checkpoints.

    The file is there as soon as there is a checkpoint to go on from: a run that was cut off before that leaves nothing
    behind, and may be started again with the same folder.

    Args:
        losses: names of the terms that the loss may have.
        beside: folder of checkpoints, if any.
        lines: of the run that is gone on with.
    """

    def __init__(self, losses: Sequence[str], beside: Path | None, lines: Sequence[TrainingProgress] = ()) -> None:
        self._losses, self._beside = losses, beside
        self.lines = list(lines)
        self._n_written = 0

    def add(self, line: TrainingProgress) -> None:
        """One more."""
        self.lines.append(line)
        self.write_beside_checkpoints()

    def write_beside_checkpoints(self) -> None:
        """Add to the file what it does not have yet, where there is a checkpoint."""
        if self._beside is None or self._n_written == len(self.lines) or not any(self._beside.glob("step_*")):
            return
        path = self._beside / TABLE
        if self._n_written == 0:
            self.write(path)
        else:
            with path.open("a", newline="", encoding="utf-8") as file:
                self._rows(file, self.lines[self._n_written :])
        self._n_written = len(self.lines)

    def write(self, path: Path) -> None:
        """Write the whole table."""
        with new_file(path) as unfinished, unfinished.open("w", newline="", encoding="utf-8") as file:
            self._rows(file, self.lines, header=True)

    def _rows(self, file: Any, lines: Sequence[TrainingProgress], header: bool = False) -> None:
        absent: dict[str, Any] = dict.fromkeys(self._losses, "")
        rows = [line._replace(losses=absent | line.losses).to_row() for line in lines]
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)


def read_lines(path: Path, up_to: int) -> list[TrainingProgress]:
    """The lines of a table up to a step; none where there is no table.

    Raises:
        CheckpointError: it is no such table.
    """
    if not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            table = csv.DictReader(file)
            if "step" not in (table.fieldnames or ()):
                raise ValueError("there is no column 'step'")
            # A run that was killed may have left half a row at the end, which comes after the checkpoint.
            rows = [row for row in table if int(row["step"]) <= up_to]
        return [TrainingProgress.from_row(row) for row in rows]
    except (csv.Error, *READING_ERRORS) as error:
        raise CheckpointError(
            f"'{path}' is no table of a run's progress ({type(error).__name__}: {error}). Remove it to go on without"
            " the lines from before."
        ) from error


# -- the figure


@drawing()
def draw_progress(
    lines: Sequence[TrainingProgress], target_l0: float | int | None = None, title: str | None = None
) -> Figure:
    """Losses, explained variance, L0 and dead share over the tokens trained on.

    Args:
        lines: at least one.
        target_l0: features per layer and token that were asked for.
        title: above it all.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, PercentFormatter

    figure = Figure(figsize=(10, 7), layout="constrained")
    (losses, explained), (l0, dead) = figure.subplots(2, 2, sharex=True)
    tokens = [line.tokens for line in lines]
    _draw_losses(losses, tokens, lines)
    _draw_by_layer(explained, tokens, [line.explained_variance_per_layer for line in lines], PALETTE[0])
    explained.axhline(0, color=GREY, linewidth=0.8)
    explained.set(title="Explained variance of the last batch", ylim=(_low_end(lines), 1.0))
    _draw_by_layer(l0, tokens, [line.l0_per_layer for line in lines], PALETTE[2])
    if target_l0 is not None:
        l0.axhline(target_l0, color="black", linestyle="--", linewidth=0.9, label=f"asked for: {target_l0:g}")
    counts = [count for line in lines for count in line.l0_per_layer] + ([] if target_l0 is None else [target_l0])
    l0.set_title("L0: active features per layer and token")
    _set_scale(l0, [max(count, LEAST_L0_SHOWN) for count in counts])
    shares = [line.dead_share for line in lines]
    most = max(0.05, 1.1 * max(shares))
    dead.plot(tokens, shares, color=PALETTE[1], marker=_marker(lines))
    dead.set(title="Share of dead features", ylim=(-0.02 * most, most))
    dead.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for axes in (l0, dead):
        axes.set_xlabel("tokens trained on")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    for axes in (losses, explained, l0):
        axes.legend(fontsize="small")
    for axes in figure.axes:
        axes.grid(alpha=0.25)
    if title is not None:
        figure.suptitle(title)
    return figure


LEAST_L0_SHOWN = 0.05
"""Where a logarithmic axis of L0 ends: a silent layer is at its foot."""
LEAST_SPREAD = 10
"""Values whose greatest is so many times the least are shown on a logarithmic axis."""


def _set_scale(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis where values spread widely. Others, a flat line above all, stand on one from 0, with numbers
    beside it: a logarithmic one would be empty but for a line at its top, or have no number beside it."""
    shown = [value for value in values if value > 0 and math.isfinite(value)]
    if shown and max(shown) >= LEAST_SPREAD * min(shown):
        axes.set(yscale="log", ylim=(min(shown) / 1.5, 1.5 * max(shown)))
    else:
        axes.set(ylim=(0, 1.25 * max(shown, default=0.8)))


def _draw_losses(axes: Axes, tokens: list[int], lines: Sequence[TrainingProgress]) -> None:
    names = dict.fromkeys(name for line in lines for name in line.losses)
    _set_scale(axes, [value for line in lines for value in line.losses.values()])
    for name in names:
        values = [line.losses.get(name, 0.0) for line in lines]
        axes.plot(tokens, [v if v > 0 else float("nan") for v in values], label=shorten(name), marker=_marker(lines))
    axes.set_title("Terms of the loss")


def _draw_by_layer(axes: Axes, tokens: list[int], values: list[list[float]], color: str) -> None:
    mean = [sum(of_layers) / len(of_layers) for of_layers in values]
    least, greatest = [min(of_layers) for of_layers in values], [max(of_layers) for of_layers in values]
    axes.fill_between(tokens, least, greatest, color=color, alpha=0.2, linewidth=0, label="least to greatest layer")
    axes.plot(tokens, mean, color=color, label="mean over layers", marker="." if len(tokens) < 3 else None)


def _low_end(lines: Sequence[TrainingProgress]) -> float:
    """Where the axis of explained variance ends: the first lines may be far below 0."""
    late = lines[len(lines) // 4 :]
    least = min(min(line.explained_variance_per_layer) for line in late)
    return max(-1.0, min(-0.05, 1.1 * least))


def _marker(lines: Sequence[TrainingProgress]) -> str | None:
    """One line alone shows as a point."""
    return "." if len(lines) < 3 else None
