"""What came of putting a graph to the test: measurements, their statistics, figures and files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Float, Int
from pandas import DataFrame, Series, concat
from scipy.stats import pearsonr, spearmanr

from tl_clt.errors import ConfigError
from tl_clt.report import GREY, PALETTE, Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FigureName = Literal["chance", "logits", "features", "signs", "quadrants", "errors"]
Baseline = Literal["random", "shuffled"]
BASELINES: tuple[Baseline, ...] = ("random", "shuffled")
CLTS = ("given", *BASELINES)
"""Values of the column `clt`."""
PREDICTIONS = {
    "constrained": ("edge", "influence"),
    "iterative": ("total", "edge", "influence"),
    "model": ("total", "edge", "influence"),
}
"""What each kind is compared with; first the one that says of this kind what will happen."""
ROUNDING = 1e-5
"""Effects below this share of the target's activation have no sign."""
SPLITS = ("all", "low", "high")
SHARED = ("model_name", "clt_model_name", "scale", "freeze", "baselines")
"""What reports that are joined must have in common."""


class Compared(NamedTuple):
    """One prediction beside what was measured, entry by entry."""

    predicted: Series
    measured: Series
    predicted_share: Series
    """|predicted| as a share of the target's activation, or the influence."""
    measured_share: Series
    """|measured| as a share of the target's activation."""
    error_share: Series
    prompt: Series
    source: Series
    target: Series
    """-1 for all targets of the graph together."""
    size: Series
    """How much the source writes."""

    def part(self, split: str) -> Compared:
        """Entries whose targets get a low or high share of their input from error nodes; split at the median."""
        if split == "all":
            return self
        high = (self.error_share > self.error_share.median()).to_numpy()
        return Compared(*(values.iloc[np.flatnonzero(high if split == "high" else ~high)] for values in self))


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ValidationReport(Report[FigureName]):
    """What `validate` gives. Constrained, iterative and model interventions are never put together.

    Figures: "chance" (rank correlations beside those of baselines), and of the given CLT alone "logits", "features"
    (prediction and influence against effects), "signs", "quadrants", "errors" (correlations by how much error nodes
    carry). Constrained on the left, iterative in the middle, model on the right. `save` writes them, measurements.csv
    (one row a measurement) and report.json (info, threshold, chance, summary, controls and switched_on).
    """

    FIGURES: ClassVar[tuple[FigureName, ...]] = get_args(FigureName)

    measurements: DataFrame
    """One row for each kind of intervention, source and target; columns as the head of validation.py has them."""

    threshold: float
    """Share of a target's activation from which an effect counts as predicted, or as seen; also of influence."""

    info: dict[str, Any]
    """Model, CLT, options, how many features and controls (of the given CLT); `prompts`, of which the column `prompt`
    has the numbers; `baselines` that were taken; `intervals`, or why there are none."""

    @classmethod
    def concat(cls, reports: Sequence[ValidationReport]) -> ValidationReport:
        """One report of all prompts of several.

        Raises:
            ConfigError: there is none, or they are of different models or options.
        """
        if not reports:
            raise ConfigError("There is no report to join. Give at least one.")
        for name in ("threshold", *SHARED):
            values = list({str(r.threshold if name == "threshold" else r.info[name]): None for r in reports})
            if len(values) > 1:
                raise ConfigError(f"{name} differs ({', '.join(values)}): join reports that share it.")
        prompts: list[str] = []
        tables = []
        for report in reports:
            tables.append(report.measurements.assign(prompt=report.measurements["prompt"] + len(prompts)))
            prompts += report.info["prompts"]
        sums = {name: sum(r.info[name] for r in reports) for name in ("n_features", "n_controls")}
        return cls(
            measurements=concat(tables, ignore_index=True),
            threshold=reports[0].threshold,
            info={**reports[0].info, "prompts": prompts, **sums, "intervals": interval_note(len(prompts))},
        )

    @cached_property
    def summary(self) -> DataFrame:
        """One row for each kind, `measured_at` (logit or feature), prediction, `errors` and `clt` (given, random,
        shuffled); controls left out.

        `errors` splits at the median: targets of which error nodes carry a low share of the absolute input (`low`, the
        median included), or a high one (`high`, left out where it is empty: one prompt with one logit); error_share is
        the mean share. Columns n; spearman and pearson of prediction and measurement (of their signed values, or of
        influence and relative effect), nan where one of them is constant; sign_agreement among effects that both are
        above rounding, and sign_agreement_predicted among those predicted from the threshold on; the counts of the
        four quadrants predicted_seen, predicted_only, seen_only and neither; threshold.
        """
        rows = [
            {
                **{"kind": kind, "measured_at": at, "prediction": prediction, "errors": split, "clt": clt},
                "error_share": float(part.error_share.mean()),
                **_agreement(part, self.threshold, signed=prediction != "influence"),
                "threshold": self.threshold,
            }
            for kind, at, prediction, of_clts in self._side_by_side
            for split in SPLITS
            for clt, compared in of_clts.items()
            if len((part := compared.part(split)).predicted)
        ]
        return DataFrame(rows)

    @cached_property
    def _side_by_side(self) -> list[tuple[str, str, str, dict[str, Compared]]]:
        """(kind, measured_at, prediction, by CLT what is compared)."""
        of_clt, *others = ([*self.comparisons(clt)] for clt in self.clts)
        return [
            (kind, at, prediction, dict(zip(self.clts, [one, *(other[i][3] for other in others)], strict=True)))
            for i, (kind, at, prediction, one) in enumerate(of_clt)
        ]

    @cached_property
    def chance(self) -> DataFrame:
        """Rank correlations of the given CLT beside those of CLTs of chance, with 95% intervals by bootstrap over
        prompts; controls left out. One row for each kind, `measured_at`, prediction and statistic:

        - spearman: of all pairs together, as in `summary`.
        - partial: of the sizes |prediction| and |measurement|, with how much the source writes (`source_size`) given: a
          feature's activation alone has no unit of its own, since its decoder may make up for it.
        - within_target: within each target, over sources, so that targets' own scales play no part.
        - within_target_partial: the two together.
        - within_source: within each source, over targets, so that the source's size plays no part.

        The ones within are means over targets (or sources) of at least 5 pairs, each counted with its pairs. The
        influence on the graph's targets is one number a source, so that "within target" is within a prompt, and there
        is nothing within a source. Partial ones are those of ranks, with the ranks of the size given (linearly).

        For each CLT that was measured (given, random, shuffled): its name is the value; `_n` the number of pairs (or
        of targets or sources counted), `_low` and `_high` the interval. `above_random` and `above_shuffled` are the
        given CLT's value less the baseline's, their intervals from the same resamples of prompts. Intervals are nan
        where fewer than 10 prompts have pairs; they tell of other prompts, not of another CLT trained alike.
        """
        rows = []
        for kind, at, prediction, of_clts in self._side_by_side:
            statistics = {clt: self._rank_statistics(compared) for clt, compared in of_clts.items()}
            for name in statistics["given"]:
                where = {"kind": kind, "measured_at": at, "prediction": prediction, "statistic": name}
                rows.append({**where, **self._beside_chance({clt: of[name] for clt, of in statistics.items()})})
        return DataFrame(rows)

    def _rank_statistics(self, compared: Compared) -> dict[str, Statistic]:
        prompt, x, y, size = (
            np.asarray(v) for v in (compared.prompt, compared.predicted, compared.measured, compared.size)
        )
        n, (target, source) = (
            self.n_prompts,
            ((v + 1) * self.n_prompts + prompt for v in (compared.target, compared.source)),
        )
        return {
            "spearman": pooled(prompt, n, x, y),
            "partial": pooled(prompt, n, abs(x), abs(y), size),
            "within_target": within(target.to_numpy(), prompt, n, x, y),
            "within_target_partial": within(target.to_numpy(), prompt, n, abs(x), abs(y), size),
            "within_source": within(source.to_numpy(), prompt, n, x, y),
        }

    def _beside_chance(self, of: dict[str, Statistic]) -> dict[str, int | float]:
        """Each CLT's number with its interval, then what the given one has above the others."""
        columns: dict[str, int | float] = {}
        for clt, statistic in of.items():
            low, high = interval(statistic, self._times)
            columns |= {clt: statistic.value(self.n_prompts), f"{clt}_low": low, f"{clt}_high": high}
            columns[f"{clt}_n"] = statistic.n
        for clt in list(of)[1:]:
            low, high = interval(of["given"], self._times, less=of[clt])
            columns |= {
                f"above_{clt}": columns["given"] - columns[clt],
                f"above_{clt}_low": low,
                f"above_{clt}_high": high,
            }
        return columns

    @property
    def n_prompts(self) -> int:
        """How many prompts are joined."""
        return int(self.measurements["prompt"].max()) + 1

    @property
    def clts(self) -> list[str]:
        """The given CLT, and the baselines that were measured."""
        return [clt for clt in CLTS if (self.measurements["clt"] == clt).any()]

    @cached_property
    def _times(self) -> Times:
        return resample(self.n_prompts)

    @cached_property
    def controls(self) -> DataFrame:
        """Features of the first stratum beside their controls: relative effect on the graph's targets, weighed as
        influence weighs them.

        Columns kind, clt, n (pairs), n_distinct (controls, of which one may stand beside several features),
        tested_mean, control_mean, tested_median, control_median, larger (share of the pairs in which the tested
        feature's effect is the larger), with the interval larger_low and larger_high by bootstrap over prompts.
        """
        rows = []
        for kind in PREDICTIONS:
            for clt in self.clts:
                effects = _logit_effects(select(self.measurements, clt=clt, kind=kind, measured_at="logit"))
                control, tested = select(effects, role="control"), select(effects, role="tested")
                columns = {"prompt": tested["prompt"], "control_of": tested["source"], "tested": tested["effect"]}
                pairs = control.merge(DataFrame(columns), on=["prompt", "control_of"])
                counts = {"n": len(pairs), "n_distinct": len(pairs[["prompt", "source"]].drop_duplicates())}
                rows.append({"kind": kind, "clt": clt, **counts, **self._beside_controls(pairs)})
        return DataFrame(rows)

    def _beside_controls(self, pairs: DataFrame) -> dict[str, float]:
        tested, control = pairs["tested"], pairs["effect"]
        larger = mean_of(pairs["prompt"].to_numpy(dtype=int), self.n_prompts, (tested > control).to_numpy(dtype=float))
        low, high = interval(larger, self._times)
        return {
            "tested_mean": float(tested.mean()),
            "control_mean": float(control.mean()),
            "tested_median": float(tested.median()),
            "control_median": float(control.median()),
            "larger": larger.value(self.n_prompts),
            "larger_low": low,
            "larger_high": high,
        }

    @cached_property
    def switched_on(self) -> DataFrame:
        """Columns kind, clt and switched_on: how many features a change of one switches on, mean without controls.

        They are not active on the prompt, so no graph of it has them: effects that are seen and not predicted.
        """
        each = select(self.measurements, role="tested").drop_duplicates(["kind", "clt", "prompt", "source"])
        return each.groupby(["kind", "clt"], as_index=False).agg(switched_on=("switched_on", "mean"))

    def comparisons(self, clt: str = "given") -> Iterator[tuple[str, str, str, Compared]]:
        """(kind, measured_at, prediction, what is compared) of one of the CLTs, without controls."""
        of_clt = select(self.measurements, clt=clt, role="tested")
        for kind, predictions in PREDICTIONS.items():
            for at in ("logit", "feature"):
                rows = select(of_clt, kind=kind, measured_at=at)
                for prediction in predictions:
                    yield kind, at, prediction, _compared(rows, at, prediction)

    def _draw(self, name: str) -> Figure:
        from matplotlib.figure import Figure

        large = name in ("logits", "features", "chance")
        figure = Figure(figsize=(14, 8.4 if large else 4.4), layout="constrained")
        _draw_validation(self, figure, name)
        return figure

    def _write_numbers(self, folder: Path) -> None:
        names = ("chance", "summary", "controls", "switched_on")
        tables = {name: json.loads(getattr(self, name).to_json(orient="records")) for name in names}
        self.measurements.to_csv(folder / "measurements.csv", index=False)
        text = json.dumps({"info": self.info, "threshold": self.threshold, **tables}, indent=2)
        (folder / "report.json").write_text(text, encoding="utf-8")

    def _in_short(self) -> str:
        return f"{len(self.measurements)} measurements of {self.info['n_features']} features"

    def _tables(self) -> dict[str, DataFrame]:
        # Splits of the given CLT alone.
        wanted = (self.summary["errors"] == "all") | (self.summary["clt"] == "given")
        return {
            "rank correlations beside chance": brief(self.chance),
            "agreement": self.summary.iloc[np.flatnonzero(wanted)].drop(columns="threshold"),
            "the most influential features beside their controls": self.controls,
            "features switched on by a change, mean": self.switched_on,
        }

    def __str__(self) -> str:
        head = ", ".join(f"{name} {value}" for name, value in self.info.items() if name != "prompts")
        head = f"{len(self.info['prompts'])} prompts, {head}, threshold {self.threshold:g}"
        if not self.info["baselines"]:
            head += "\nNo baseline was taken: what these numbers would be by chance is not known."
        parts = [
            f"{title}\n{table.to_string(index=False, float_format=lambda x: f'{x:.3g}')}"
            for title, table in self._tables().items()
        ]
        return "\n\n".join([head, *parts])


def interval_note(n_prompts: int) -> str:
    """What intervals a report of so many prompts has."""
    if n_prompts < FEWEST_PROMPTS:
        return f"none: {n_prompts} prompts are joined, and it takes {FEWEST_PROMPTS}"
    return f"95%, by bootstrap over {n_prompts} prompts"


def brief(chance: DataFrame) -> DataFrame:
    """The table `chance` with intervals beside the values, as text."""
    names = [name for name in chance.columns if f"{name}_low" in chance.columns]
    columns = [chance[name] for name in ("kind", "measured_at", "prediction", "statistic")]
    columns.append(chance["given_n"].rename("n"))
    for name in names:
        at = zip(chance[name], chance[f"{name}_low"], chance[f"{name}_high"], strict=True)
        texts = [
            "" if x != x else f"{x:.2f}" + (f" [{low:.2f}, {high:.2f}]" if low == low else "") for x, low, high in at
        ]
        columns.append(Series(texts, name=name))
    return concat(columns, axis=1)


def select(table: DataFrame, **equal: str | int) -> DataFrame:
    """The rows that have these values in these columns."""
    for name, value in equal.items():
        table = table.iloc[np.flatnonzero(table[name] == value)]
    return table


def _compared(rows: DataFrame, at: str, prediction: str) -> Compared:
    activation = rows["target_activation"].abs()
    if prediction != "influence":
        predicted, measured = rows[prediction], rows["change"]
        columns = predicted, measured, predicted.abs() / activation, measured.abs() / activation
    elif at == "logit":
        rows = _logit_effects(rows).assign(target=-1)
        columns = rows["source_influence"], rows["effect"], rows["source_influence"], rows["effect"]
    else:
        effect = rows["act_change"].abs() / activation
        columns = rows["influence"], effect, rows["influence"], effect
    return Compared(
        *columns, rows["error_share"], *(rows[name] for name in ("prompt", "source", "target", "source_size"))
    )


def _logit_effects(rows: DataFrame) -> DataFrame:
    """One row a source: relative effects on the graph's targets, summed with their weights (which sum to 1 over all of
    them: where a source does not reach one, its effect there is 0), and the error shares of those that it reaches."""
    keys = ["prompt", "role", "control_of", "source", "source_influence", "source_size"]
    weighed = rows.assign(
        effect=rows["weight"] * rows["change"].abs() / rows["target_activation"].abs(),
        error_share=rows["weight"] * rows["error_share"],
    )
    sums = weighed.groupby(keys, as_index=False).agg(
        effect=("effect", "sum"), error_share=("error_share", "sum"), weight=("weight", "sum")
    )
    return sums.assign(error_share=sums["error_share"] / sums["weight"])


def _agreement(compared: Compared, threshold: float, *, signed: bool) -> dict[str, int | float]:
    predicted, seen = compared.predicted_share >= threshold, compared.measured_share >= threshold
    found: dict[str, int | float] = {
        "n": len(predicted),
        "spearman": _correlation(spearmanr, compared),
        "pearson": _correlation(pearsonr, compared),
        "sign_agreement": float("nan"),
        "sign_agreement_predicted": float("nan"),
    }
    if signed:
        same = np.sign(compared.predicted) == np.sign(compared.measured)
        counted = (compared.predicted_share > ROUNDING) & (compared.measured_share > ROUNDING)
        found["sign_agreement"] = float(same[counted].mean())
        found["sign_agreement_predicted"] = float(same[predicted].mean())
    return found | {
        "predicted_seen": int((predicted & seen).sum()),
        "predicted_only": int((predicted & ~seen).sum()),
        "seen_only": int((~predicted & seen).sum()),
        "neither": int((~predicted & ~seen).sum()),
    }


def _correlation(of: Any, compared: Compared) -> float:
    if compared.predicted.nunique() < 2 or compared.measured.nunique() < 2:
        return float("nan")
    return float(of(compared.predicted, compared.measured).statistic)


QUADRANTS = ("predicted_seen", "predicted_only", "seen_only", "neither")
LINEAR_BELOW = 1e-4
"""Shares from here up have a logarithmic axis."""
BESIDE = (-0.2, 0.2)
"""Places of two bars of one group."""
SHOWN = {
    ("logit", "influence", "spearman"): "logit, influence",
    ("logit", "influence", "partial"): "logit, influence\ngiven size",
    ("logit", "signed", "spearman"): "logit, {signed}",
    ("feature", "influence", "spearman"): "feature, influence",
    ("feature", "influence", "within_target_partial"): "feature, influence\nwithin a target,\ngiven size",
    ("feature", "influence", "within_source"): "feature, influence\nwithin a source",
    ("feature", "signed", "spearman"): "feature, {signed}",
    ("feature", "signed", "within_target_partial"): "feature, {signed}\nwithin a target,\ngiven size",
}
"""Which rows of the table `chance` a figure shows, and what it calls them."""


def _draw_validation(report: ValidationReport, figure: Figure, name: str) -> None:
    """Draw the figure of a name."""
    if name in ("logits", "features"):
        _scatters(report, figure, name.removesuffix("s"))
    elif name == "chance":
        for axes, kind in zip(figure.subplots(1, len(PREDICTIONS), sharex=True, sharey=True), PREDICTIONS, strict=True):
            _chance(report, axes, kind)
        figure.suptitle(f"intervals: {report.info['intervals']}")
    else:
        for axes, kind in zip(figure.subplots(1, len(PREDICTIONS), sharey=True), PREDICTIONS, strict=True):
            axes.set_title(kind)
            {"signs": _signs, "quadrants": _quadrants, "errors": _errors}[name](report, axes, kind)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, markerscale=2)
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1)


FEW_POINTS = 60
"""Fewer are drawn larger and darker: small faint ones are there for crowds."""


def _scatters(report: ValidationReport, figure: Figure, at: str) -> None:
    """Above, the signed prediction of this kind against the change; below, influence against the relative effect."""
    axes = figure.subplots(2, len(PREDICTIONS))
    for kind, where, prediction, compared in report.comparisons():
        if where == at and prediction in (PREDICTIONS[kind][0], "influence"):
            here = axes[int(prediction == "influence"), list(PREDICTIONS).index(kind)]
            row = _rows(report, kind, prediction).set_index("measured_at").loc[at]
            here.set_title(f"{kind}: Spearman {row['spearman']:.2f}, Pearson {row['pearson']:.2f}")
            _scatter(here, compared, f"{at}s", prediction, report.threshold)


def _scatter(axes: Axes, compared: Compared, where: str, prediction: str, threshold: float) -> None:
    for split in ("low", "high"):
        part = compared.part(split)
        if len(part.predicted):
            label = f"error nodes carry {part.error_share.mean():.0%} of the target's input, on average"
            few = len(compared.predicted) < FEW_POINTS
            look = {"s": 22, "alpha": 0.8} if few else {"s": 8, "alpha": 0.4}
            axes.scatter(part.predicted, part.measured, linewidths=0, label=label, **look)
    if prediction == "influence":
        axes.set(xlabel=f"influence on {where}", ylabel=f"relative effect on {where}")
        axes.set_xscale("symlog", linthresh=LINEAR_BELOW)
        axes.set_yscale("symlog", linthresh=LINEAR_BELOW)
        axes.axvline(threshold, color=GREY, linewidth=0.5)
        axes.axhline(threshold, color=GREY, linewidth=0.5)
    else:
        axes.axline((0, 0), slope=1, color=GREY, linewidth=0.5)
        axes.set(xlabel=f"predicted change of {where} ({prediction})", ylabel=f"measured change of {where}")


def _chance(report: ValidationReport, axes: Axes, kind: str) -> None:
    """Rank correlations of each CLT, with their intervals where there are some."""
    signed = PREDICTIONS[kind][0]
    table = select(report.chance, kind=kind).set_index(["measured_at", "prediction", "statistic"])
    rows = {
        (at, signed if p == "signed" else p, s): text.format(signed="edge or total")
        for (at, p, s), text in SHOWN.items()
    }
    for number, clt in enumerate(report.clts):
        values, low, high = (table[clt + part].reindex(list(rows)).to_numpy() for part in ("", "_low", "_high"))
        height = [place + 0.22 * (number - (len(report.clts) - 1) / 2) for place in range(len(rows))]
        axes.scatter(values, height, s=14, label=clt, color=PALETTE[number % len(PALETTE)])
        axes.hlines(height, low, high, color=PALETTE[number % len(PALETTE)], linewidth=1.5)
    axes.set_yticks(range(len(rows)), list(rows.values()))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x", linewidth=0.3)
    axes.set(title=kind, xlabel="Spearman")


def _signs(report: ValidationReport, axes: Axes, kind: str) -> None:
    rows = _rows(report, kind, PREDICTIONS[kind][0])
    columns = {"sign_agreement": "all effects", "sign_agreement_predicted": f"predicted >= {report.threshold:g}"}
    _bars(axes, {label: rows[column] for column, label in columns.items()}, list(rows["measured_at"]), "{:.2f}")
    axes.set(ylim=(0, 1.08), ylabel="share of equal signs")


def _quadrants(report: ValidationReport, axes: Axes, kind: str) -> None:
    rows = _rows(report, kind, PREDICTIONS[kind][0]).set_index("measured_at")
    counts = {f"on a {at}": [row[quadrant] for quadrant in QUADRANTS] for at, row in rows.iterrows()}
    _bars(axes, counts, [quadrant.replace("_", "\n") for quadrant in QUADRANTS], "{:.0f}")
    axes.set_yscale("symlog", linthresh=1)
    axes.set(ylabel=f"pairs (threshold {report.threshold:g} of the target)")
    axes.margins(y=0.1)


def _errors(report: ValidationReport, axes: Axes, kind: str) -> None:
    groups = [(at, prediction) for at in ("logit", "feature") for prediction in (PREDICTIONS[kind][0], "influence")]
    found = {
        f"error nodes carry a {split} share": [
            next(iter(select(_rows(report, kind, prediction, split), measured_at=at)["spearman"]), float("nan"))
            for at, prediction in groups
        ]
        for split in ("low", "high")
    }
    _bars(axes, found, [f"{at}\n{prediction}" for at, prediction in groups], "{:.2f}")
    axes.axhline(0, color=GREY, linewidth=0.5)
    axes.set(ylabel="Spearman")
    axes.margins(y=0.1)


def _bars(axes: Axes, heights: dict, groups: list[str], form: str) -> None:
    """Two bars a group, with their numbers above; none where there is no number."""
    for offset, (label, values) in zip(BESIDE, heights.items(), strict=True):
        drawn = [(i + offset, float(value)) for i, value in enumerate(values) if value == value]
        bars = axes.bar([x for x, _ in drawn], [y for _, y in drawn], width=0.4, label=label)
        axes.bar_label(bars, labels=[form.format(y) for _, y in drawn])
    axes.set_xticks(range(len(groups)), groups)


def _rows(report: ValidationReport, kind: str, prediction: str, split: str = "all") -> DataFrame:
    return select(report.summary, clt="given", kind=kind, prediction=prediction, errors=split)


FEWEST_ENTRIES = 5
"""Of a target or source, for a correlation within it."""
FEWEST_PROMPTS = 10
"""For an interval."""
RESAMPLES = 1000
LEVEL = 0.95
Values = Float[np.ndarray, " n"]
Numbers = Int[np.ndarray, " n"]
Times = Float[np.ndarray, "n_resamples n_prompts"]
"""How often each prompt counts."""


class Interval(NamedTuple):
    """Between which numbers a statistic lies in 95% of resamples; nan where there are fewer than 10 prompts."""

    low: float
    high: float


@dataclass(frozen=True)
class Statistic:
    """A number as a function of how often each prompt counts."""

    n: int
    """Pairs, or targets or sources, that it is taken of."""
    n_prompts: int
    """Prompts that have any of them."""
    at: Callable[[Times], Float[np.ndarray, " n_resamples"]]

    def value(self, n_prompts: int) -> float:
        """With each of all prompts counted once."""
        return float(self.at(np.ones((1, n_prompts)))[0])


def resample(n_prompts: int, seed: int = 0) -> Times:
    """How often each prompt counts in draws of as many prompts, with replacement."""
    return (
        np.random.default_rng(seed).multinomial(n_prompts, np.full(n_prompts, 1 / n_prompts), RESAMPLES).astype(float)
    )


def interval(of: Statistic, times: Times, less: Statistic | None = None) -> Interval:
    """The percentile interval of a statistic, or of one less another on the same resamples."""
    if min(s.n_prompts for s in (of, less) if s is not None) < FEWEST_PROMPTS:
        return Interval(float("nan"), float("nan"))
    drawn = of.at(times) if less is None else of.at(times) - less.at(times)
    if np.isnan(drawn).all():
        return Interval(float("nan"), float("nan"))
    outside = 100 * (1 - LEVEL) / 2
    return Interval(*(float(x) for x in np.nanpercentile(drawn, [outside, 100 - outside])))


def pooled(prompt: Numbers, n_prompts: int, x: Values, y: Values, third: Values | None = None) -> Statistic:
    """Spearman's correlation of all pairs together, or the partial one with the ranks of a third thing given.

    With prompts counted m times, an item's rank is `sum_q m_q c_q`, c_q the items of prompt q below it and half of
    those that are equal. Sums of products of two ranks are then `sum_pqr m_p m_q m_r T_pqr`, with T taken once.
    """
    below = [_below(prompt, n_prompts, values) for values in ((x, y) if third is None else (x, y, third))]
    pairs = [(a, b) for b in range(len(below)) for a in range(b + 1)]
    products = {(a, b): _products(prompt, n_prompts, below[a], below[b]) for a, b in pairs}
    counts = np.bincount(prompt, minlength=n_prompts).astype(float)

    def at(times: Times) -> Float[np.ndarray, " n_resamples"]:
        whole = times @ counts

        def covariance(a: int, b: int) -> Float[np.ndarray, " n_resamples"]:
            sums = (times @ products[a, b].reshape(n_prompts, -1)).reshape(-1, n_prompts, n_prompts)
            with np.errstate(divide="ignore", invalid="ignore"):
                return np.einsum("nq,nqr,nr->n", times, sums, times) / whole**3 - 1 / 4

        return _correlation_of_ranks(covariance, third is not None)

    return Statistic(len(x), int((counts > 0).sum()), at)


def within(
    groups: Numbers, prompt: Numbers, n_prompts: int, x: Values, y: Values, third: Values | None = None
) -> Statistic:
    """The mean of Spearman's correlations within groups, each counted with its entries.

    Groups of fewer than 5 entries, and those in which x or y (or what is left of them, with a third thing given) is
    constant, are left out. A group lies within one prompt.
    """
    _, group = np.unique(groups, return_inverse=True)
    counts = np.bincount(group)
    values = [Series(v).groupby(group).rank().to_numpy() for v in ((x, y) if third is None else (x, y, third))]
    ranks = [rank - (counts[group] + 1) / 2 for rank in values]

    def covariance(a: int, b: int) -> Values:
        return np.bincount(group, weights=ranks[a] * ranks[b]) / counts**3

    found = _correlation_of_ranks(covariance, third is not None) if len(group) else np.zeros(0)
    used = (counts >= FEWEST_ENTRIES) & ~np.isnan(found)
    of_prompt = np.zeros(len(counts), dtype=int)
    of_prompt[group] = prompt
    weight = np.bincount(of_prompt[used], weights=counts[used], minlength=n_prompts)
    weighed = np.bincount(of_prompt[used], weights=(counts * found)[used], minlength=n_prompts)

    def at(times: Times) -> Float[np.ndarray, " n_resamples"]:
        with np.errstate(divide="ignore", invalid="ignore"):
            return (times @ weighed) / (times @ weight)

    return Statistic(int(used.sum()), int((weight > 0).sum()), at)


def mean_of(prompt: Numbers, n_prompts: int, values: Values) -> Statistic:
    """The mean of all values."""
    counts = np.bincount(prompt, minlength=n_prompts)
    sums = np.bincount(prompt, weights=values, minlength=n_prompts)

    def at(times: Times) -> Float[np.ndarray, " n_resamples"]:
        with np.errstate(divide="ignore", invalid="ignore"):
            return (times @ sums) / (times @ counts)

    return Statistic(len(prompt), int((counts > 0).sum()), at)


def _below(prompt: Numbers, n_prompts: int, values: Values) -> Float[np.ndarray, "n n_prompts"]:
    """Of each prompt, the items below each item, and half of those that are equal."""
    levels, level = np.unique(values, return_inverse=True)
    found = np.empty((len(values), n_prompts))
    for q in range(n_prompts):
        here = np.bincount(level[prompt == q], minlength=len(levels))
        found[:, q] = (np.cumsum(here) - here / 2)[level]
    return found


def _products(
    prompt: Numbers, n_prompts: int, a: Float[np.ndarray, "n n_prompts"], b: Float[np.ndarray, "n n_prompts"]
) -> Float[np.ndarray, "n_prompts n_prompts n_prompts"]:
    return np.stack([a[prompt == p].T @ b[prompt == p] for p in range(n_prompts)])


def _correlation_of_ranks(
    covariance: Callable[[int, int], Float[np.ndarray, " n"]], partial: bool
) -> Float[np.ndarray, " n"]:
    """Of the first two of what was ranked, with the third given where there is one; nan where one is constant."""

    def of(a: int, b: int) -> Float[np.ndarray, " n"]:
        x, y = covariance(a, a), covariance(b, b)
        # Of ranks as shares of all n entries: 0 up to rounding, or at least about 1 / 4n.
        varies = (x > 1e-12) & (y > 1e-12)
        return np.where(varies, covariance(a, b) / np.sqrt(np.where(varies, x * y, 1)), np.nan)

    xy = of(0, 1)
    if not partial:
        return xy
    xz, yz = of(0, 2), of(1, 2)
    # What is not ranked apart by the third thing is not explained by it.
    xz, yz = np.nan_to_num(xz), np.nan_to_num(yz)
    left = (1 - xz**2) * (1 - yz**2)
    enough = left > 1e-9
    return np.where(enough, (xy - xz * yz) / np.sqrt(np.where(enough, left, 1)), np.nan)
