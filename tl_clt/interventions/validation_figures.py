"""Figures of a validation: constrained interventions on the left, iterative ones on the right."""

from __future__ import annotations

from typing import get_args

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tl_clt.errors import ConfigError
from tl_clt.interventions.validation_report import PREDICTIONS, Compared, FigureName, ValidationReport

QUADRANTS = ("predicted_seen", "predicted_only", "seen_only", "neither")


def draw(report: ValidationReport, name: FigureName) -> Figure:
    """One figure by its name.

    Raises:
        ConfigError: there is no such figure.
    """
    if name not in get_args(FigureName):
        raise ConfigError(f"There is no figure {name!r}: give one of {', '.join(get_args(FigureName))}.")
    if name in ("logits", "features"):
        return _scatters(report, name.removesuffix("s"))
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), PREDICTIONS, strict=True):
        axes.set_title(kind)
        {"signs": _signs, "quadrants": _quadrants, "errors": _errors}[name](report, axes, kind)
    return figure


def _scatters(report: ValidationReport, at: str) -> Figure:
    """Above, the signed prediction of this kind against the change; below, influence against the relative effect."""
    figure = Figure(figsize=(10, 8), layout="constrained")
    axes = figure.subplots(2, 2)
    for kind, where, prediction, compared in report.comparisons():
        if where == at and prediction in (PREDICTIONS[kind][0], "influence"):
            column = list(PREDICTIONS).index(kind)
            _scatter(axes[int(prediction == "influence"), column], compared, kind, prediction, report.threshold)
    return figure


def _scatter(axes: Axes, compared: Compared, kind: str, prediction: str, threshold: float) -> None:
    high = compared.error_share > compared.error_share.median()
    for part, label in ((~high, "errors carry less"), (high, "errors carry more")):
        axes.scatter(compared.predicted[part], compared.measured[part], s=8, alpha=0.5, label=label)
    axes.set_title(kind)
    if prediction == "influence":
        axes.set(xlabel="influence", ylabel="relative effect")
        axes.set_xscale("symlog", linthresh=threshold / 100)
        axes.set_yscale("symlog", linthresh=threshold / 100)
        axes.axvline(threshold, color="grey", linewidth=0.5)
        axes.axhline(threshold, color="grey", linewidth=0.5)
    else:
        axes.axline((0, 0), slope=1, color="grey", linewidth=0.5)
        axes.set(xlabel=f"predicted change ({prediction})", ylabel="measured change")
    axes.legend()


def _signs(report: ValidationReport, axes: Axes, kind: str) -> None:
    rows = _whole(report, kind, PREDICTIONS[kind][0])
    for offset, column in ((-0.2, "sign_agreement"), (0.2, "sign_agreement_predicted")):
        axes.bar([i + offset for i in range(len(rows))], rows[column], width=0.4, label=column)
    axes.set_xticks(range(len(rows)), rows["measured_at"])
    axes.set(ylim=(0, 1), ylabel="share of equal signs")
    axes.legend()


def _quadrants(report: ValidationReport, axes: Axes, kind: str) -> None:
    rows = _whole(report, kind, PREDICTIONS[kind][0])
    for offset, (_, row) in zip((-0.2, 0.2), rows.iterrows(), strict=True):
        counts = [row[quadrant] for quadrant in QUADRANTS]
        places = [i + offset for i in range(len(QUADRANTS))]
        axes.bar_label(axes.bar(places, counts, width=0.4, label=row["measured_at"]))
    axes.set_xticks(range(len(QUADRANTS)), [quadrant.replace("_", "\n") for quadrant in QUADRANTS])
    axes.set(yscale="symlog", ylabel=f"pairs (threshold {report.threshold:g})")
    axes.legend()


def _errors(report: ValidationReport, axes: Axes, kind: str) -> None:
    rows = report.summary[(report.summary["kind"] == kind) & (report.summary["errors"] != "all")]
    rows = rows[rows["prediction"].isin((PREDICTIONS[kind][0], "influence"))]
    groups = list(rows.groupby(["measured_at", "prediction"], sort=False))
    for offset, part in ((-0.2, "low"), (0.2, "high")):
        values = [float(group.loc[group["errors"] == part, "spearman"].iloc[0]) for _, group in groups]
        axes.bar([i + offset for i in range(len(groups))], values, width=0.4, label=f"errors carry a {part} share")
    axes.set_xticks(range(len(groups)), [f"{at}\n{prediction}" for (at, prediction), _ in groups])
    axes.set(ylabel="Spearman")
    axes.legend()


def _whole(report: ValidationReport, kind: str, prediction: str):
    table = report.summary
    return table[(table["kind"] == kind) & (table["errors"] == "all") & (table["prediction"] == prediction)]
