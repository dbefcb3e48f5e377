"""What `measure_faithfulness` found: a tidy table, its means, a figure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pandas import DataFrame

from tl_clt.evaluation.perturbations import KINDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GROUPS = ["transcoder", "kind", "real_freeze", "frozen_norms", "distance"]
MEASURES = ["cosine", "normalised_error", "carried_cosine", "carried_error"]
COLUMNS = [
    *("transcoder", "prompt", "kind", "layer", "position", "source_layer", "feature", "size"),
    *("real_freeze", "frozen_norms", "distance", *MEASURES),
]


@dataclass(frozen=True, kw_only=True, eq=False)
class FaithfulnessReport:
    """How the changes that follow a perturbation compare in the model and in its local replacement model."""

    table: DataFrame
    """One row for each perturbation, way of holding things and later layer: transcoder (its name), prompt (number),
    kind, layer (after whose block the stream is moved), position, source_layer and feature (whose direction; -1
    for random ones), size (norm, as a share of the stream's there), real_freeze (what was held in the model's own
    run), frozen_norms (whether norms were held in the replacement model's), distance (blocks between), cosine,
    normalised_error, carried_cosine, carried_error."""

    @property
    def by_distance(self) -> DataFrame:
        """Means over perturbations for each transcoder, kind, real_freeze, frozen_norms and distance. n is their
        number; the median stands beside the mean of the normalised error, which few large values can carry."""
        means = {measure: (measure, "mean") for measure in MEASURES}
        groups = self.table.groupby(GROUPS, sort=False)
        median = ("normalised_error", "median")
        return groups.agg(n=("cosine", "size"), **means, median_error=median).reset_index()

    def plot(self) -> Figure:
        """Cosine and normalised error against distance, a row of panels for each transcoder and real_freeze, beside
        what the perturbation alone would score. Needs matplotlib."""
        from matplotlib.figure import Figure

        means = self.by_distance
        parts = [part for _, part in means.groupby(["transcoder", "real_freeze"], sort=False)]
        figure = Figure(figsize=(10, 3.4 * len(parts) + 0.8), layout="constrained")
        panels = figure.subplots(len(parts), 2, squeeze=False, sharex=True, sharey="col")
        # Errors of 0.1 and of 10 are to be told apart, and an error of 0 drawn.
        panels[0][1].set_yscale("symlog", linthresh=0.1)
        for ours, row in zip(parts, panels, strict=True):
            name, freeze = ours["transcoder"].iloc[0], ours["real_freeze"].iloc[0]
            _lines(row[0], ours, "cosine", "carried_cosine")
            _lines(row[1], ours, "normalised_error", "carried_error")
            against = f"{name} against the model" + ("" if freeze == "none" else f" with {freeze} held")
            row[0].set(title=against, ylabel="cosine (mean)", ylim=(None, 1.02))
            row[1].set(title=against, ylabel="normalised error (mean)")
        panels[0][1].set_ylim(bottom=0)
        for axes in panels[-1]:
            axes.set_xlabel("distance (layers)")
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=means["kind"].nunique())
        return figure


def _lines(axes: Axes, means: DataFrame, measure: str, carried: str) -> None:
    """One line for each kind and way of holding norms; dotted, the perturbation alone."""
    distances = sorted(means["distance"].unique())
    for i, kind in enumerate(KINDS):
        ours = means[means["kind"] == kind]
        for frozen, held in ours.groupby("frozen_norms"):
            label, style = f"{kind}, norms {'held' if frozen else 'free'}", f"C{i}s--" if frozen else f"C{i}o-"
            axes.plot(held["distance"], held[measure], style, label=label, markersize=4)
        if len(ours) > 0:
            alone = ours.groupby("distance")[carried].first()
            axes.plot(alone.index, alone, f"C{i}:", linewidth=1, label=f"{kind}, carried alone")
    step = -(-len(distances) // 12)
    axes.set_xticks(distances[::step])
    axes.grid(axis="y", linewidth=0.3)
