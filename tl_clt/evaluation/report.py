"""What an evaluation found, as plain values that JSON can hold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from pandas import DataFrame

from tl_clt.errors import ConfigError, FormatError
from tl_clt.files import read_json
from tl_clt.report import GREY, PALETTE, Report, finite, read_fields

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FigureName = Literal["layers", "density", "distance", "graphs"]
FIGURES: tuple[FigureName, ...] = get_args(FigureName)
PER_LAYER = (
    *("explained_variance_per_layer", "nmse_per_layer", "l0_per_layer", "dead_share_per_layer", "density_counts"),
)


@dataclass(frozen=True, kw_only=True)
class GraphNumbers:
    """Of one prompt's graph, or means over prompts. "Whole" graphs are not pruned."""

    replacement: float
    """Of the whole graph, by the paper's reading: token influence / (token + error influence)."""
    completeness: float
    """Of the whole graph, by the paper's reading: inputs that are not errors, over nodes that have inputs."""
    completeness_circuit_tracer: float
    """The same by circuit-tracer's reading, which counts leaves as well. Never compare the two."""
    completeness_pruned: float
    """By the paper's reading, over the nodes that pruning at 0.8 and 0.98 keeps, where inputs that were pruned away
    count as unexplained."""
    path_length: float
    """Mean number of edges on a path from a token to a logit, paths weighted by their strength."""
    n_nodes: float
    """Of the whole graph."""
    n_nodes_pruned: float
    """Of the pruned graph."""
    unexplored: float
    """Share of influence at features that were not traced. No node's influence is off by more, nor is the numerator or
    the denominator of the replacement score; the scores are those of what is known."""
    n_tokens: float
    """Of the prompt."""


def mean_numbers(numbers: Sequence[GraphNumbers]) -> GraphNumbers:
    """Means over prompts; at least one."""
    return GraphNumbers(
        **{f.name: sum(getattr(n, f.name) for n in numbers) / len(numbers) for f in fields(GraphNumbers)}
    )


@dataclass(frozen=True, kw_only=True, repr=False)
class EvaluationReport(Report[FigureName]):
    """How good a CLT is on held-out text. Position 0 of each prompt is left out of every number, and keeps its own MLP
    outputs in the replaced model.

    Figures: "layers" (explained variance, NMSE, L0, dead share by layer), "density" (histogram), "distance" (decoder
    norms and what is written by distance), "graphs" (scores of each prompt, where any was traced). `save` writes them
    and report.json, which `from_json` reads.
    """

    FIGURES: ClassVar[tuple[FigureName, ...]] = FIGURES

    model: str
    clt: dict[str, Any]
    """Its config."""
    n_prompts: int
    n_tokens: int
    """Positions measured: all but the first of each prompt."""

    explained_variance: float
    """Mean over layers of 1 - sum ||mlp_out - recons||^2 / sum ||mlp_out - mean mlp_out||^2 (`ExplainedVariance`)."""
    explained_variance_per_layer: list[float]
    nmse: float
    """Mean over layers of sum ||mlp_out - recons||^2 / sum ||mlp_out||^2."""
    nmse_per_layer: list[float]

    l0_per_layer: list[float]
    """Mean number of active features on a token, for each layer."""
    dead_share: float
    """Share of all features that are active on none of the `n_tokens` tokens."""
    dead_share_per_layer: list[float]
    density_edges: list[float]
    """Edges of the histogram's bins: shares of tokens on which a feature is active."""
    density_counts: list[list[int]]
    """Features of each layer in each bin, dead ones left out; those below the first edge count in the first bin."""

    top1_agreement: float
    """Share of tokens where the model with all MLPs replaced has the same most likely next token."""
    n_uncertain: int
    """Tokens whose next token the model finds, with a probability below 0.8."""
    top1_agreement_uncertain: float | None
    """Share of these where the replaced model finds it too (what the paper reports); None where there are none."""
    kl_divergence: float
    """Mean KL(model || replaced model) of next-token distributions, in nats."""
    n_predicted: int
    """Tokens whose next token is in the prompt; the cross-entropies are means over these."""
    cross_entropy: float | None
    """Of the model, in nats; None where no prompt has 3 tokens."""
    cross_entropy_replaced: float | None
    """With all MLPs replaced."""
    cross_entropy_ablated: float | None
    """With zeros in place of all MLP outputs."""

    decoder_norm_by_distance: list[float]
    """Mean norm of decoder vectors that write 0, 1, 2, ... layers ahead, over all features that write so far."""
    written_share_by_distance: list[float]
    """Share of what features write 0, 1, 2, ... layers ahead: sum over features of mean |activation| * norm of the
    decoder vector / root mean square norm of the MLP output written to."""

    graphs: list[GraphNumbers]
    """One for each prompt that was traced."""
    graphs_missing: str | None = None
    """Why there are fewer graphs than were asked for; None where there are not."""

    @property
    def l0_mean_per_layer(self) -> float:
        """Active features on a token, mean over layers."""
        return sum(self.l0_per_layer) / len(self.l0_per_layer)

    @property
    def l0_sum_over_layers(self) -> float:
        """Active features on a token, summed over layers."""
        return sum(self.l0_per_layer)

    @property
    def cross_entropy_recovered(self) -> float | None:
        """(ablated - replaced) / (ablated - model): 1 where replacing costs nothing, 0 where it is as bad as zeros."""
        if self.cross_entropy is None or self.cross_entropy_replaced is None or self.cross_entropy_ablated is None:
            return None
        span = self.cross_entropy_ablated - self.cross_entropy
        return (self.cross_entropy_ablated - self.cross_entropy_replaced) / span if span else None

    @property
    def graph_means(self) -> GraphNumbers | None:
        """Means over the prompts that were traced; None where there are none."""
        return mean_numbers(self.graphs) if self.graphs else None

    def to_dict(self) -> dict[str, Any]:
        """Fields and what follows from them, for JSON, which has None in place of what is infinite or no number."""
        derived = ("l0_mean_per_layer", "l0_sum_over_layers", "cross_entropy_recovered")
        means = self.graph_means
        return finite(
            asdict(self)
            | {name: getattr(self, name) for name in derived}
            | {"graph_means": None if means is None else asdict(means)}
        )

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> EvaluationReport:
        """The report that `to_json` wrote.

        Raises:
            FormatError: it is no such text.
        """
        try:
            graph_numbers = {"GraphNumbers": partial(read_fields, GraphNumbers)}
            report = read_fields(cls, read_json(text), graph_numbers)
            n_layers = report.clt["n_layers"]
            per_layer = [getattr(report, name) for name in PER_LAYER]
            if n_layers < 1 or any(len(values) != n_layers for values in per_layer):
                raise ValueError(f"not every list by layer has an entry for each of {n_layers} layers")
            if any(len(counts) != len(report.density_edges) - 1 for counts in report.density_counts):
                raise ValueError("density_counts are not those of the bins between density_edges")
            if len(report.decoder_norm_by_distance) != len(report.written_share_by_distance):
                raise ValueError("decoder_norm_by_distance and written_share_by_distance differ in length")
            return report
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise FormatError(f"This is no evaluation report ({error}). Give what `tl-clt evaluate` wrote.") from error

    @property
    def figures(self) -> tuple[FigureName, ...]:
        """The figures that there is something to draw for: "graphs" only where a prompt was traced."""
        return FIGURES if self.graphs else FIGURES[:-1]

    def __hash__(self) -> int:
        return hash(self.to_json())

    def _draw(self, name: str) -> Figure:
        from matplotlib.figure import Figure

        drawn = {
            "layers": (_draw_layers, (10, 6)),
            "density": (_draw_density, (8, 4.5)),
            "distance": (_draw_distance, (10, 4)),
            "graphs": (_draw_graphs, (10, 4)),
        }
        draw, size = drawn[name]
        figure = Figure(figsize=size, layout="constrained")
        draw(self, figure)
        return figure

    def _write_numbers(self, folder: Path) -> None:
        (folder / "report.json").write_text(self.to_json())

    def _in_short(self) -> str:
        return (
            f"{self.model}, {self.n_tokens} tokens: explained variance {self.explained_variance:.3f},"
            f" L0 {self.l0_mean_per_layer:.3g} a layer, same top token {self.top1_agreement:.1%}"
        )

    def _tables(self) -> dict[str, DataFrame]:
        means = self.graph_means
        numbers = {
            "explained variance, mean over layers": self.explained_variance,
            "NMSE, mean over layers": self.nmse,
            "L0, sum over layers": self.l0_sum_over_layers,
            "L0, mean per layer": self.l0_mean_per_layer,
            "share of dead features": self.dead_share,
            "same top token": self.top1_agreement,
            "KL divergence (nats)": self.kl_divergence,
            "cross-entropy recovered": self.cross_entropy_recovered,
            "replacement score": None if means is None else means.replacement,
            "completeness score": None if means is None else means.completeness,
        }
        known = {name: value for name, value in numbers.items() if value is not None}
        by_layer = {name.removesuffix("_per_layer"): getattr(self, name) for name in PER_LAYER[:-1]}
        return {
            "numbers": DataFrame({"measure": list(known), "value": list(known.values())}),
            "by layer": DataFrame({"layer": range(len(self.l0_per_layer)), **by_layer}),
        }


def _draw_layers(report: EvaluationReport, figure: Figure) -> None:
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
        _mark_whole_numbers(axes)
        mean = sum(values) / len(values)
        axes.axhline(mean, color=GREY, linewidth=0.8)
        axes.set_title(f"mean {mean:.3g}", fontsize="small", loc="right")
    for axes in figure.axes[2:]:
        axes.set(xlabel="layer")


def _draw_density(report: EvaluationReport, figure: Figure) -> None:
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


def _draw_distance(report: EvaluationReport, figure: Figure) -> None:
    figure.suptitle(f"{report.model}: how far ahead features write")
    panels = {
        "mean norm of a feature's decoder vector": report.decoder_norm_by_distance,
        "share of what is written": report.written_share_by_distance,
    }
    for axes, (label, values) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        axes.bar(range(len(values)), values)
        axes.set(xlabel="layers ahead", ylabel=label)
        _mark_whole_numbers(axes)


def _draw_graphs(report: EvaluationReport, figure: Figure) -> None:
    if not report.graphs:
        why = report.graphs_missing or "evaluate with n_graphs of at least 1."
        raise ConfigError(f"No prompt was traced: {why}")
    figure.suptitle(f"{report.model}: graphs of {len(report.graphs)} prompts (by replacement)")
    left, right = figure.subplots(1, 2)
    graphs = sorted(report.graphs, key=lambda graph: graph.replacement)
    places = range(len(graphs))
    for name, marker in (("replacement", "o"), ("completeness", "s"), ("completeness_pruned", "^")):
        left.plot(places, [getattr(g, name) for g in graphs], marker, label=name.replace("_", ", "))
    left.set(xlabel="prompt", ylabel="score", ylim=(-0.02, 1.02))
    left.legend()
    right.plot(places, [g.path_length for g in graphs], "o", color=PALETTE[3])
    right.set(xlabel="prompt", ylabel="path length (edges)", ylim=(0, 1.1 * max(g.path_length for g in graphs)))
    for axes in (left, right):
        _mark_whole_numbers(axes)


def _shade(layer: int, n_layers: int) -> tuple[float, float, float, float]:
    from matplotlib import colormaps

    return colormaps["viridis"](layer / max(1, n_layers - 1))


def _mark_whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
