"""The figure of a trade-off table."""

from __future__ import annotations

from itertools import cycle

from matplotlib.figure import Figure
from pandas import DataFrame

PANELS = {
    "nmse": "NMSE",
    "top1_agreement": "same top token",
    "replacement": "replacement score",
    "completeness": "completeness score",
    "path_length": "path length (edges)",
}
SMALLEST_NMSE = 1e-6
COLOURS = {"neurons": "grey", "PLT": "C1", "CLT": "C0"}


def draw_tradeoff(table: DataFrame) -> Figure:
    """Lines join transcoders of one kind and size; colours are kinds, markers sizes."""
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    axes = figure.subplots(2, 3).flat
    markers = dict(zip(sorted(table["d_transcoder"].unique()), cycle("os^Dv*P"), strict=False))
    for panel, (column, label) in zip(axes, PANELS.items(), strict=False):
        for kind, size in table[["kind", "d_transcoder"]].drop_duplicates().itertuples(index=False):
            line = table.query("kind == @kind and d_transcoder == @size").sort_values("l0_sum_over_layers")
            name = f"{kind}, {size} a layer"
            values = line[column].astype(float)
            panel.plot(
                line["l0_sum_over_layers"], values, marker=markers[size], color=COLOURS.get(kind, "C2"), label=name
            )
        panel.set(xscale="log", xlabel="L0 (active features a token, sum over layers)", ylabel=label)
    figure.axes[0].set_yscale("log")
    # Below lies rounding, of neurons that all pass.
    figure.axes[0].set_ylim(bottom=max(figure.axes[0].get_ylim()[0], SMALLEST_NMSE))
    figure.axes[-1].axis("off")
    figure.axes[-1].legend(*figure.axes[0].get_legend_handles_labels(), loc="center")
    return figure
