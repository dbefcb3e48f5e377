"""Figures of an evaluation."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, get_args

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tl_clt.errors import ConfigError
from tl_clt.evaluation.report import EvaluationReport, FigureName

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(report: EvaluationReport, name: FigureName) -> Figure:
    """One figure by its name.

    Raises:
        ConfigError: there is no such figure, or no prompt was traced.
    """
    makers = {"layers": _layers, "density": _density, "distance": _distance, "graphs": _graphs}
    if not isinstance(name, str) or name not in makers:
        raise ConfigError(f"There is no figure {name!r:.60}: give one of {', '.join(get_args(FigureName))}.")
    return makers[name](report)


def _layers(report: EvaluationReport) -> Figure:
    figure = Figure(figsize=(10, 6), layout="constrained")
    figure.suptitle(f"{report.model}: by layer, {report.n_tokens} tokens")
    panels = {
        "explained variance": report.explained_variance_per_layer,
        "NMSE": report.nmse_per_layer,
        "L0 (active features a token)": report.l0_per_layer,
        "share of dead features": report.dead_share_per_layer,
    }
    for axes, (label, values) in zip(figure.subplots(2, 2, sharex=True).flat, panels.items(), strict=True):
        axes.bar(range(len(values)), values)
        axes.set(ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        mean = sum(values) / len(values)
        axes.axhline(mean, color="grey", linewidth=0.8)
        axes.set_title(f"mean {mean:.3g}", fontsize="small", loc="right")
    for axes in figure.axes[2:]:
        axes.set(xlabel="layer")
    return figure


def _density(report: EvaluationReport) -> Figure:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes: Axes = figure.subplots()
    edges, counts = report.density_edges, report.density_counts
    below = [0] * len(counts[0])
    for layer, of_layer in enumerate(counts):
        colour = _shade(layer, len(counts))
        widths = [b - a for a, b in pairwise(edges)]
        axes.bar(edges[:-1], of_layer, widths, bottom=below, align="edge", color=colour)
        below = [a + b for a, b in zip(below, of_layer, strict=True)]
    axes.set_xscale("log")
    seen = [i for i, n in enumerate(below) if n]
    if seen:
        axes.set_xlim(edges[seen[0]], edges[seen[-1] + 1])
    axes.set(xlabel=f"share of {report.n_tokens} tokens on which a feature is active", ylabel="features")
    axes.set_title(f"{report.model}: feature density ({report.dead_share:.1%} of features are dead, not shown)")
    shown = range(len(counts)) if len(counts) <= 8 else (0, len(counts) - 1)
    axes.legend([axes.containers[i] for i in shown], [f"layer {i}" for i in shown], loc="upper left")
    return figure


def _distance(report: EvaluationReport) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(f"{report.model}: how far ahead features write")
    panels = {
        "mean norm of a feature's decoder vector": report.decoder_norm_by_distance,
        "share of what is written": report.written_share_by_distance,
    }
    for axes, (label, values) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        axes.bar(range(len(values)), values)
        axes.set(xlabel="layers ahead", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _graphs(report: EvaluationReport) -> Figure:
    if not report.graphs:
        why = report.graphs_missing or "evaluate with n_graphs of at least 1."
        raise ConfigError(f"No prompt was traced: {why}")
    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(f"{report.model}: graphs of {len(report.graphs)} prompts (by replacement)")
    left, right = figure.subplots(1, 2)
    graphs = sorted(report.graphs, key=lambda graph: graph.replacement)
    places = range(len(graphs))
    for name, marker in (("replacement", "o"), ("completeness", "s"), ("completeness_pruned", "^")):
        left.plot(places, [getattr(g, name) for g in graphs], marker, label=name.replace("_", ", "))
    left.set(xlabel="prompt", ylabel="score", ylim=(-0.02, 1.02))
    left.legend()
    right.plot(places, [g.path_length for g in graphs], "o", color="C3")
    right.set(xlabel="prompt", ylabel="path length (edges)", ylim=(0, 1.1 * max(g.path_length for g in graphs)))
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _shade(layer: int, n_layers: int) -> tuple[float, float, float, float]:
    from matplotlib import colormaps

    return colormaps["viridis"](layer / max(1, n_layers - 1))
