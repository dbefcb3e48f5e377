"""Figures of a validation: constrained interventions on the left, iterative ones in the middle, the model's right."""

from __future__ import annotations

from typing import get_args

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pandas import DataFrame

from tl_clt.errors import ConfigError
from tl_clt.interventions.validation_report import PREDICTIONS, Compared, FigureName, ValidationReport, select

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


def draw(report: ValidationReport, name: FigureName) -> Figure:
    """One figure by its name.

    Raises:
        ConfigError: there is no such figure.
    """
    if not isinstance(name, str) or name not in get_args(FigureName):
        raise ConfigError(f"There is no figure {name!r:.60}: give one of {', '.join(get_args(FigureName))}.")
    figure = Figure(figsize=(14, 8.4 if name in ("logits", "features", "chance") else 4.4), layout="constrained")
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
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, markerscale=3)
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1)
    return figure


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
            axes.scatter(part.predicted, part.measured, s=8, alpha=0.4, linewidths=0, label=label)
    if prediction == "influence":
        axes.set(xlabel=f"influence on {where}", ylabel=f"relative effect on {where}")
        axes.set_xscale("symlog", linthresh=LINEAR_BELOW)
        axes.set_yscale("symlog", linthresh=LINEAR_BELOW)
        axes.axvline(threshold, color="grey", linewidth=0.5)
        axes.axhline(threshold, color="grey", linewidth=0.5)
    else:
        axes.axline((0, 0), slope=1, color="grey", linewidth=0.5)
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
        axes.scatter(values, height, s=14, label=clt, color=f"C{number}")
        axes.hlines(height, low, high, color=f"C{number}", linewidth=1.5)
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
    axes.axhline(0, color="grey", linewidth=0.5)
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
