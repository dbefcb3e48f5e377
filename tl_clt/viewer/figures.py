"""Pictures of a graph without a browser: for a paper, a terminal, a report.

All numbers that a picture shows are tables beside it, and are written with it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from pandas import DataFrame
from torch import Tensor

from tl_clt.arguments import as_choice, as_path
from tl_clt.attribution import AttributionGraph, Node, NodeKind, check_thresholds, find_direct_edges
from tl_clt.attribution.edges import list_all_edges
from tl_clt.attribution.influence import walk_upstream
from tl_clt.errors import ConfigError
from tl_clt.files import new_file, require_unused
from tl_clt.interventions.validation import predict
from tl_clt.lens import HookedModel
from tl_clt.report import GREY, NEGATIVE, PALETTE, POSITIVE, Report, diverging_colours
from tl_clt.transcoder import CrossLayerTranscoder
from tl_clt.viewer.checks import as_graph, as_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FigureName = Literal["graph", "tokens", "shares", "positions", "attention", "flow"]
IMAGES = ("png", "svg", "pdf")
MOST_EDGES = 120
"""Drawn in the picture of a graph, those that most influence passes along; what is left out is counted below it."""
MOST_IN_CELL = 6
"""Nodes side by side at one token and layer, the most influential."""
MOST_FEATURES = 12
"""Rows of features in the heatmap of tokens."""
MOST_TOKENS = 16
"""Drawn one by one where influence flows; the others together."""
LEAST_STEP = 0.022
"""Height of a group where influence flows, with its name, at least."""
MOST_BANDS = 5
"""Of layers, where influence flows."""
COLOURS = {
    NodeKind.FEATURE: PALETTE[0],
    NodeKind.ERROR: PALETTE[1],
    NodeKind.TOKEN: PALETTE[2],
    NodeKind.POSITION: PALETTE[3],
    NodeKind.BIAS: PALETTE[4],
    NodeKind.LOGIT: PALETTE[6],
}
MARKERS = {
    NodeKind.FEATURE: "o",
    NodeKind.ERROR: "D",
    NodeKind.TOKEN: "s",
    NodeKind.POSITION: "^",
    NodeKind.BIAS: "v",
    NodeKind.LOGIT: "s",
}
PLURALS = {
    NodeKind.FEATURE: "features",
    NodeKind.ERROR: "errors",
    NodeKind.TOKEN: "tokens",
    NodeKind.POSITION: "positions",
    NodeKind.BIAS: "biases",
    NodeKind.LOGIT: "outputs",
}


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class GraphFigures(Report[FigureName]):
    """A graph as pictures, with the numbers that they show.

    Figures: "graph" (the pruned graph: tokens from left to right, layers upwards), "tokens" (what each token gives to
    each output and to the most influential features), "shares" (of influence, by layer and by kind of node),
    "positions" (what nodes receive from their own position and from others), "attention" (what nodes receive along the
    residual stream and through attention heads; where model and CLT were given), "flow" (of influence, from tokens
    through bands of layers to the outputs). `save` writes them and a table for each.
    """

    FIGURES: ClassVar[tuple[FigureName, ...]] = get_args(FigureName)

    graph: AttributionGraph
    """The graph given."""
    pruned: AttributionGraph
    """The same, pruned: what "graph" draws."""
    labels: Mapping[tuple[int, int], str] = field(default_factory=dict)
    """Words for features, by layer and feature."""
    attention: DataFrame | None = None
    """Of the pruned graph, one row for each layer of receiving nodes ("output" for what is explained) and one for all:
    layer, direct (share of input that goes through no attention head), mediated (the rest), visits (how much influence
    the nodes have, which is what they are weighed by). Shares are of sum_s |direct part| + |mediated part|, over edges
    that the graph keeps. None without model and CLT."""

    @property
    def figures(self) -> tuple[FigureName, ...]:
        """All, but "attention" without model and CLT."""
        return tuple(name for name in self.FIGURES if name != "attention" or self.attention is not None)

    @cached_property
    def tokens(self) -> DataFrame:
        """What each token gives to targets: one row for each target node, the most influential features among them,
        and token: node (number), target (in words), pos, token, influence (how often a walk upstream from the target
        ends at the token, as a share of 1) and effect (signed: the sum over all paths of traced features, each passing
        on in proportion to its activation, in units of the target)."""
        graph = self.graph
        at_tokens = graph.nodes.where(NodeKind.TOKEN)
        found = predict(graph, at_tokens)
        outputs = graph.nodes.where(NodeKind.LOGIT).tolist()
        traced = [
            rank.node.number for rank in graph.top(MOST_FEATURES, NodeKind.FEATURE) if graph.expanded[rank.node.number]
        ]
        rows = []
        for number in (*outputs, *traced):
            node = graph.nodes[number]
            words = self.labels.get((node.layer, node.index)) if node.kind == NodeKind.FEATURE else None
            target = f"{node.label} ({words})" if words else node.label
            for column, token in enumerate(at_tokens.tolist()):
                pos = int(graph.nodes.pos[token])
                given = float(found.influence[number, column]), float(found.total[number, column])
                rows.append((number, target, pos, graph.prompt_tokens[pos], *given))
        return DataFrame(rows, columns=["node", "target", "pos", "token", "influence", "effect"])

    @cached_property
    def shares(self) -> DataFrame:
        """Share of the influence of all nodes: one row for each layer (-1 for tokens and positions, below all) and kind
        of node; layer, kind, n (nodes), share. They sum to 1."""
        influence, nodes = self.graph.influence().double(), self.graph.nodes
        whole = float(influence.sum()) or 1.0
        rows = []
        for kind in (kind for kind in NodeKind if kind != NodeKind.LOGIT):
            of_kind = nodes.is_kind(kind)
            for layer in sorted(set(nodes.layer[of_kind].tolist())):
                at = of_kind & (nodes.layer == layer)
                rows.append((layer, kind.name.lower(), int(at.sum()), float(influence[at].sum()) / whole))
        return DataFrame(rows, columns=["layer", "kind", "n", "share"])

    @cached_property
    def positions(self) -> DataFrame:
        """Where nodes' inputs come from: one row for each layer of receiving nodes ("output" for what is explained)
        and one for all: layer, same (share of the absolute input from nodes at the receiver's own position), other
        (from other positions, all of which goes through attention), biases (which act at all positions), unknown (along
        edges that the graph does not keep), visits (how much influence the nodes have, by which they are weighed).

        What comes from the same position may go through attention too, see `attention`."""
        graph, walks = self.graph, walk_upstream(self.graph)
        row, col, value = list_all_edges(graph.adjacency)
        pos = graph.nodes.pos
        kinds = {"same": pos[row] == pos[col], "biases": pos[col] < 0}
        kinds["other"] = ~kinds["same"] & ~kinds["biases"]
        shares = (value.abs() / walks.inputs[row]).double()
        by_node = {
            name: shares.new_zeros(len(pos)).index_add_(0, row[mask], shares[mask])
            for name, mask in (
                ("same", kinds["same"] & ~kinds["biases"]),
                *((n, kinds[n]) for n in ("other", "biases")),
            )
        }
        by_node["unknown"] = (1 - torch.stack(list(by_node.values())).sum(dim=0)).clamp_min(0)
        return _by_layer(graph, by_node, walks.output.double())

    @cached_property
    def flow(self) -> DataFrame:
        """How much influence flows between groups of nodes: one row for each pair; source, target, share.

        Groups are tokens by position ("token 3", beyond `MOST_TOKENS` the least together as "other tokens"), "errors",
        "positions and biases", features by bands of layers ("layers 0 to 2"), outputs ("output 0"). The walks that
        arrive at a band from above leave it again below; what passes within a band is the row with the same source and
        target. "unknown" is where walks are lost: at features that were not traced, along edges that are not kept.
        """
        graph, walks = self.graph, walk_upstream(self.graph)
        groups = _Groups.of(graph)
        row, col, value = list_all_edges(graph.adjacency)
        amounts = (value.abs() * (walks.output / walks.inputs)[row]).double()
        whole = float(graph.logit_weights.sum()) or 1.0
        pairs = groups.of_node[row] * len(groups.names) + groups.of_node[col]
        sums = amounts.new_zeros(len(groups.names) ** 2).index_add_(0, pairs, amounts)
        rows = [
            (groups.names[pair % len(groups.names)], groups.names[pair // len(groups.names)], float(sums[pair]) / whole)
            for pair in torch.nonzero(sums).flatten().tolist()
        ]
        lost = sums.new_zeros(len(groups.names)).index_add_(0, groups.of_node, walks.lost.double())
        rows += [
            ("unknown", groups.names[at], float(lost[at]) / whole) for at in torch.nonzero(lost).flatten().tolist()
        ]
        return DataFrame(rows, columns=["source", "target", "share"])

    def _draw(self, name: str) -> Figure:
        from matplotlib.figure import Figure

        if name == "attention" and self.attention is None:
            raise ConfigError("What attention passes on takes the model: give graph_figures model and clt.")
        n_tokens = len(self.graph.prompt_tokens)
        wide = min(24.0, max(8.0, 1.15 * n_tokens + 1))
        drawn = {
            "graph": (_draw_graph, wide, min(24.0, 1.05 * (_top_layer(self.pruned) + 3) + 1.6)),
            "tokens": (_draw_tokens, wide + 3, 3.4),
            "shares": (_draw_shares, 10, 4.2),
            "positions": (_draw_positions, 8, 4.2),
            "attention": (_draw_attention, 8, 4.2),
            "flow": (_draw_flow, 11, 6),
        }
        draw, width, height = drawn[name]
        if name == "tokens":  # a row each; the table takes a while on large graphs, and other figures do not need it
            height += 0.34 * self.tokens["node"].nunique()
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(self, figure)
        return figure

    def _write_numbers(self, folder: Path) -> None:
        for name, table in self._tables().items():
            table.to_csv(folder / f"{name}.csv", index=False)

    def _in_short(self) -> str:
        return f"{self.graph!r}, pruned to {len(self.pruned.nodes)} nodes and {self.pruned.n_edges} edges"

    def _tables(self) -> dict[str, DataFrame]:
        found = {"shares": self.shares, "positions": self.positions, "flow": self.flow, "tokens": self.tokens}
        return found if self.attention is None else {**found, "attention": self.attention}


def graph_figures(
    graph: AttributionGraph,
    *,
    model: HookedModel | None = None,
    clt: CrossLayerTranscoder | None = None,
    node_threshold: float = 0.8,
    edge_threshold: float = 0.98,
    labels: Mapping[tuple[int, int], str] | None = None,
) -> GraphFigures:
    """A graph as pictures: `graph_figures(graph).plot("graph")`, or `.save(folder)` for all.

    Args:
        graph: whole, reduced or pruned; one that is pruned is drawn as it is.
        model: where given with `clt`, what goes through attention heads is measured, on the pruned graph.
        clt: the CLT that the graph was traced with.
        node_threshold: share of influence that the nodes drawn keep.
        edge_threshold: share of influence that the edges drawn keep.
        labels: words for features, by layer and feature.

    Raises:
        ConfigError: a threshold is no share, one of model and CLT is given without the other, or `find_direct_edges`
            does not take the graph.
        CLTMismatch: model or CLT are others than those that the graph was traced with.
    """
    graph, words = as_graph(graph), as_labels(labels)
    thresholds = check_thresholds(node_threshold, edge_threshold)
    if (model is None) != (clt is None):
        raise ConfigError("What attention passes on takes model and clt both: give both, or neither.")
    pruned = graph if graph.lacks_nodes else graph.prune(*thresholds)
    attention = None
    if model is not None and clt is not None:
        attention = _share_attention(pruned, find_direct_edges(pruned, model, clt))
    return GraphFigures(graph=graph, pruned=pruned, labels=words, attention=attention)


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure as the picture that the file's ending names: png, svg or pdf. All or nothing; a file that is there
    is replaced.

    Raises:
        ConfigError: the file's name ends otherwise.
        NotWritten: the path is a folder, or the disk is full, for example.
    """
    path = as_path("path", path)
    kind = _image_kind(path)
    with new_file(path) as unfinished:
        figure.savefig(unfinished, format=kind, dpi=150)
    return path


def require_figure(path: str | Path) -> None:
    """Check that a picture can be written at a path, before any work; one that is there is refused.

    Raises:
        ConfigError: the file's name ends otherwise than in png, svg or pdf.
        OutputNotEmpty: something is there.
        NotWritten: it lies below a file, or where nothing may be written.
    """
    path = as_path("path", path)
    _image_kind(path)
    require_unused(path)


def _image_kind(path: Path) -> str:
    return as_choice("The ending of the picture's name", path.suffix.removeprefix(".").lower(), IMAGES)


def _by_layer(graph: AttributionGraph, by_node: Mapping[str, Tensor], visits: Float[Tensor, " n_nodes"]) -> DataFrame:
    """Means over the nodes of each layer that have inputs, and over all, weighed by their visits."""
    nodes = graph.nodes
    outputs = nodes.is_kind(NodeKind.LOGIT)
    traced = nodes.is_kind(NodeKind.FEATURE) & graph.expanded
    groups = {str(layer): traced & (nodes.layer == layer) for layer in sorted(set(nodes.layer[traced].tolist()))}
    groups |= {"output": outputs, "all": traced | outputs}
    rows = []
    for name, at in groups.items():
        weight = float(visits[at].sum())
        means = (float((values[at] * visits[at]).sum()) / weight if weight else 0.0 for values in by_node.values())
        rows.append((name, *means, weight))
    return DataFrame(rows, columns=["layer", *by_node, "visits"])


def _share_attention(graph: AttributionGraph, direct: Float[Tensor, "n_nodes n_nodes"]) -> DataFrame:
    edges = graph.adjacency.to_dense() if graph.is_sparse else graph.adjacency
    along, through = direct.abs().double().sum(dim=1), (edges.double() - direct).abs().sum(dim=1)
    whole = (along + through).clamp_min(torch.finfo(torch.float64).tiny)
    return _by_layer(
        graph, {"direct": along / whole, "mediated": through / whole}, walk_upstream(graph).output.double()
    )


class _Groups(NamedTuple):
    """Nodes in groups, for the flow of influence."""

    names: list[str]
    of_node: Tensor
    column: list[int]
    """Of each group: 0 for what has no inputs, then bands of layers, then outputs."""

    @classmethod
    def of(cls, graph: AttributionGraph) -> _Groups:
        nodes, influence = graph.nodes, graph.influence()
        at_tokens = nodes.where(NodeKind.TOKEN)
        alone = at_tokens[influence[at_tokens].argsort(descending=True, stable=True)[:MOST_TOKENS]]
        n_layers = _top_layer(graph) + 1
        n_bands = min(MOST_BANDS, n_layers)
        starts = [round(band * n_layers / n_bands) for band in range(n_bands + 1)]
        names: list[str] = []
        column: list[int] = []
        of_node = torch.zeros_like(nodes.kind, dtype=torch.long)

        def put(name: str, at: Tensor, place: int) -> None:
            if len(at):
                of_node[at] = len(names)
                names.append(name)
                column.append(place)

        for token in sorted(alone.tolist(), key=lambda number: int(nodes.pos[number])):
            put(f"token {int(nodes.pos[token])}", torch.tensor([token]), 0)
        put("other tokens", at_tokens[~torch.isin(at_tokens, alone)], 0)
        put("errors", nodes.where(NodeKind.ERROR), 0)
        put("positions and biases", torch.nonzero(nodes.is_kind(NodeKind.POSITION, NodeKind.BIAS)).flatten(), 0)
        features = nodes.is_kind(NodeKind.FEATURE)
        for band, (first, end) in enumerate(pairwise(starts)):
            name = f"layer {first}" if end == first + 1 else f"layers {first} to {end - 1}"
            put(name, torch.nonzero(features & (nodes.layer >= first) & (nodes.layer < end)).flatten(), band + 1)
        for number, output in enumerate(nodes.where(NodeKind.LOGIT).tolist()):
            put(f"output {number}", torch.tensor([output]), n_bands + 1)
        return cls(names, of_node, column)


# -- drawing -------------------------------------------------------------------------------------------------------


def _top_layer(graph: AttributionGraph) -> int:
    inner = graph.nodes.layer[graph.nodes.is_kind(NodeKind.FEATURE, NodeKind.ERROR)]
    known = graph.info.get("n_layers")
    return max(int(inner.max()) if len(inner) else 0, known - 1 if type(known) is int else 0)


def _short(text: str, most: int = 28) -> str:
    """Text on one line that matplotlib sets as it is: a dollar sign starts a formula otherwise. A box stands for what
    its font does not have."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    one_line = " ".join(text.split()) or repr(text)[1:-1]
    one_line = "".join(character if font.get_char_index(ord(character)) else "□" for character in one_line)
    return (one_line if len(one_line) <= most else one_line[: most - 1] + "…").replace("$", r"\$")


def _token(graph: AttributionGraph, pos: int, most: int = 14) -> str:
    return f'"{_short(graph.prompt_tokens[pos], most)}"' if 0 <= pos < len(graph.prompt_tokens) else f"position {pos}"


class _Places(NamedTuple):
    """Where nodes are drawn."""

    x: dict[int, float]
    y: dict[int, float]
    centres: dict[int, float]
    """Of columns, by position; -1 for biases."""
    crowded: int
    """Nodes that have no place in a crowded cell."""


def _place_nodes(graph: AttributionGraph, influence: Sequence[float]) -> _Places:
    """A column for each token, as wide as the most nodes in one of its layers, and one for biases."""
    top = _top_layer(graph) + 1
    cells: dict[tuple[int, float], list[int]] = defaultdict(list)
    for node in graph.nodes:
        height = {NodeKind.TOKEN: -1.0, NodeKind.POSITION: -1.0, NodeKind.LOGIT: float(top)}.get(node.kind, node.layer)
        cells[node.pos, float(height)].append(node.number)
    kept = {
        place: sorted(sorted(numbers, key=lambda number: -influence[number])[:MOST_IN_CELL])
        for place, numbers in cells.items()
    }
    columns = sorted({pos for pos, _ in cells} | set(range(len(graph.prompt_tokens))))
    x: dict[int, float] = {}
    y: dict[int, float] = {}
    centres: dict[int, float] = {}
    left = 0.0
    for pos in columns:
        width = max(1.6, *(len(numbers) for place, numbers in kept.items() if place[0] == pos), 0)
        centres[pos] = left + width / 2
        for (_, height), numbers in ((p, n) for p, n in kept.items() if p[0] == pos):
            for at, number in enumerate(numbers):
                x[number] = centres[pos] + (at - (len(numbers) - 1) / 2) * min(1.0, width / max(len(numbers), 1))
                # Biases are written before what the features of their block read.
                y[number] = height - 0.4 if pos < 0 else height
        left += width + 0.5
    return _Places(x, y, centres, len(graph.nodes) - len(x))


def _draw_graph(report: GraphFigures, figure: Figure) -> None:
    from matplotlib.lines import Line2D

    graph = report.pruned
    axes: Axes = figure.subplots()
    walks = walk_upstream(graph)
    influence = walks.influence.tolist()
    places = _place_nodes(
        graph,
        [1.0 if kind == NodeKind.LOGIT else i for kind, i in zip(graph.nodes.kind.tolist(), influence, strict=True)],
    )
    row, col, value = list_all_edges(graph.adjacency)
    flows = value.abs() * (walks.output / walks.inputs)[row]
    drawable = [
        at
        for at in flows.argsort(descending=True, stable=True).tolist()
        if int(row[at]) in places.x and int(col[at]) in places.x and float(value[at]) != 0
    ]
    drawn = drawable[:MOST_EDGES]
    strongest = float(flows[drawn[0]]) if drawn else 1.0
    for at in reversed(drawn):  # the strongest on top
        target, source, weight = int(row[at]), int(col[at]), float(value[at])
        share = (float(flows[at]) / strongest) ** 0.5 if strongest > 0 else 0.0
        axes.plot(
            [places.x[source], places.x[target]],
            [places.y[source], places.y[target]],
            color=POSITIVE if weight > 0 else NEGATIVE,
            linestyle="-" if weight > 0 else (0, (3, 2)),
            linewidth=0.4 + 2.8 * share,
            alpha=0.25 + 0.6 * share,
            zorder=1,
            gid="edge",
            solid_capstyle="round",
        )
    for kind in NodeKind:
        numbers = [number for number in graph.nodes.where(kind).tolist() if number in places.x]
        if numbers:
            axes.scatter(
                [places.x[number] for number in numbers],
                [places.y[number] for number in numbers],
                s=46 if kind != NodeKind.LOGIT else 70,
                marker=MARKERS[kind],
                color=COLOURS[kind],
                edgecolors="white",
                linewidths=0.8,
                zorder=2,
                gid=kind.name.lower(),
            )
    top = _top_layer(graph) + 1
    axes.set_yticks(range(-1, top + 1), ["embeddings", *map(str, range(top)), "output"])
    axes.set_ylabel("layer")
    at_columns = sorted(places.centres)
    axes.set_xticks(
        [places.centres[pos] for pos in at_columns],
        ["biases" if pos < 0 else _token(graph, pos) for pos in at_columns],
        rotation=30 if len(at_columns) > 6 else 0,
        rotation_mode="anchor",
        ha="right" if len(at_columns) > 6 else "center",
    )
    axes.set_ylim(-1.6, top + 0.7)
    axes.margins(x=0.02)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="x", length=0)
    for height in range(-1, top + 1):
        axes.axhline(height, color="#eeeeee", linewidth=0.8, zorder=0)
    kinds = [kind for kind in NodeKind if len(graph.nodes.where(kind))]
    handles = [
        Line2D([], [], linestyle="", marker=MARKERS[kind], color=COLOURS[kind], label=PLURALS[kind]) for kind in kinds
    ]
    handles += [
        Line2D([], [], color=POSITIVE, linewidth=2, label="raises"),
        Line2D([], [], color=NEGATIVE, linewidth=2, linestyle=(0, (3, 2)), label="lowers"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize="small")
    unnamed = _name_nodes(report, figure, axes, places, influence)
    axes.set_xlabel(_left_out(report, places, len(drawn), unnamed), fontsize="small", color="#444444")


def _left_out(report: GraphFigures, places: _Places, n_edges: int, unnamed: int) -> str:
    """What the picture does not show, in words."""
    graph, pruned = report.graph, report.pruned
    parts = [f"{len(places.x)} of {len(graph.nodes)} nodes and {n_edges} of {graph.n_edges} edges drawn"]
    cut = len(graph.nodes) - len(pruned.nodes)
    if cut or graph.n_edges != pruned.n_edges:
        parts.append(f"{cut} nodes and {graph.n_edges - pruned.n_edges} edges pruned away")
    weak = pruned.n_edges - n_edges
    if places.crowded or weak:
        parts.append(f"{places.crowded} nodes in crowded cells and {weak} weaker edges left out")
    if pruned.is_reduced:
        parts.append(f"{pruned.unexplored:.0%} of influence is not in what is left")
    if unnamed:
        parts.append(f"{unnamed} nodes without a name for want of room")
    lines = [parts[0], "; ".join(parts[1:])]
    return "\n".join(filter(None, lines))


def _name_nodes(report: GraphFigures, figure: Figure, axes: Axes, places: _Places, influence: Sequence[float]) -> int:
    """Write names of features and outputs where they overlap neither each other nor nodes; how many have none."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    graph = report.pruned
    canvas = FigureCanvasAgg(figure)
    figure.draw_without_rendering()
    renderer = canvas.get_renderer()
    to_pixels = axes.transData.transform
    pixel = figure.dpi / 72
    nodes = [node for node in graph.nodes if node.number in places.x]
    centres = to_pixels([(places.x[node.number], places.y[node.number]) for node in nodes])
    taken = [Bbox([(x - 5 * pixel, y - 5 * pixel), (x + 5 * pixel, y + 5 * pixel)]) for x, y in centres.tolist()]
    inside = axes.get_window_extent(renderer)
    unnamed = 0
    named = [node for node in nodes if node.kind in (NodeKind.FEATURE, NodeKind.LOGIT)]
    for node in sorted(named, key=lambda node: (node.kind != NodeKind.LOGIT, -influence[node.number])):
        x, y = places.x[node.number], places.y[node.number]
        for dx, dy, ha, va in (
            (0, 7, "center", "bottom"),
            (0, -7, "center", "top"),
            (7, 0, "left", "center"),
            (-7, 0, "right", "center"),
        ):
            text = axes.annotate(
                _name(graph, node, report.labels),
                (x, y),
                xytext=(dx, dy),
                textcoords="offset points",
                ha=ha,
                va=va,
                fontsize=8 if node.kind == NodeKind.LOGIT else 6.5,
                zorder=3,
                gid="name",
                bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "alpha": 0.75, "linewidth": 0},
            )
            text.set_in_layout(False)
            box = text.get_window_extent(renderer).padded(pixel)
            within = box.x0 >= inside.x0 and box.x1 <= inside.x1 and box.y1 <= inside.y1
            if within and not box.count_overlaps(taken):
                taken.append(box)
                break
            text.remove()
        else:
            unnamed += 1
    return unnamed


def _name(graph: AttributionGraph, node: Node, labels: Mapping[tuple[int, int], str]) -> str:
    """A feature's words or number, an output's text."""
    if node.kind == NodeKind.LOGIT:
        return f'"{_short(graph.logit_tokens[node.number - len(graph.nodes)])}"'
    return _short(labels.get((node.layer, node.index)) or f"{node.layer}.{node.index}", 22)


def _draw_tokens(report: GraphFigures, figure: Figure) -> None:
    table, graph = report.tokens, report.graph
    if table.empty:
        raise ConfigError("The graph has no token nodes: there is nothing to draw. Trace the prompt again.")
    order = table["node"].drop_duplicates()
    names = []
    for node in (graph.nodes[int(number)] for number in order):
        at = f" at {_token(graph, node.pos)}" if node.kind == NodeKind.FEATURE else ""
        names.append(_name(graph, node, report.labels) + at)
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, column in ((left, "influence"), (right, "effect")):
        values = table.pivot(index="node", columns="pos", values=column).loc[order]
        if column == "effect":
            # Rows have units of their own: each is drawn as a share of its greatest effect.
            sizes = values.abs().max(axis=1).replace(0, 1)
            shown, bounds, colours = values.div(sizes, axis=0), (-1, 1), diverging_colours()
            title = "signed effect along all paths,\nas a share of the row's greatest"
        else:
            shown, bounds, colours = values, (0, max(float(values.to_numpy().max()), 1e-12)), "Blues"
            title = "influence: share of walks\nfrom the row that end at the token"
        image = axes.imshow(shown, aspect="auto", cmap=colours, vmin=bounds[0], vmax=bounds[1], interpolation="none")
        figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
        axes.set_title(title, fontsize="medium")
        axes.set_xticks(
            range(values.shape[1]),
            [_token(graph, pos) for pos in values.columns],
            rotation=45,
            rotation_mode="anchor",
            ha="right",
            fontsize="small",
        )
        axes.set_yticks(range(len(order)), names, fontsize="small")
        if values.size <= 400:
            for at, line in enumerate(shown.to_numpy().tolist()):
                for column_at, value in enumerate(line):
                    strong = abs(value) > 0.6 * bounds[1]
                    written = f"{value:.2f}" if column == "influence" else f"{value:+.1f}"
                    if abs(value) >= 0.05 * bounds[1]:
                        axes.text(
                            column_at,
                            at,
                            written,
                            ha="center",
                            va="center",
                            fontsize=6,
                            color="white" if strong else "black",
                        )
        n_outputs = len(graph.nodes.where(NodeKind.LOGIT))
        axes.axhline(n_outputs - 0.5, color="black", linewidth=0.8)
        for side in axes.spines.values():
            side.set_visible(False)
    figure.suptitle("What each token gives to the outputs (above the line) and to the most influential features")


def _draw_shares(report: GraphFigures, figure: Figure) -> None:
    table = report.shares
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    layers = sorted(table["layer"].unique())
    below = dict.fromkeys(layers, 0.0)
    for kind in table["kind"].unique():
        rows = table[table["kind"] == kind].set_index("layer")["share"]
        heights = [float(rows.get(layer, 0.0)) for layer in layers]
        kind_of = NodeKind[str(kind).upper()]
        left.bar(
            range(len(layers)),
            heights,
            bottom=[below[layer] for layer in layers],
            color=COLOURS[kind_of],
            label=PLURALS[kind_of],
        )
        below = {layer: below[layer] + height for layer, height in zip(layers, heights, strict=True)}
    top = _top_layer(report.graph) + 1
    names = ["embed-\ndings" if layer < 0 else "out-\nput" if layer == top else str(layer) for layer in layers]
    step = -(-len(layers) // 20)
    left.set_xticks(range(0, len(layers), step), names[::step])
    left.set(xlabel="layer", ylabel="share of the influence of all nodes")
    left.legend(fontsize="small")
    ends = report.graph.shares()._asdict()
    shown = {name: share for name, share in ends.items() if share > 0}
    named = {"token": "tokens", "error": "errors", "position": "positions", "bias": "biases"}
    named |= {"unexplored": "not traced", "dropped": "not kept"}
    colours = [COLOURS[NodeKind[name.upper()]] if name.upper() in NodeKind.__members__ else GREY for name in shown]
    bars = right.barh(range(len(shown)), list(shown.values()), color=colours)
    right.bar_label(bars, [f"{share:.1%}" for share in shown.values()], padding=2, fontsize="small")
    right.set_yticks(range(len(shown)), [named[name] for name in shown])
    right.invert_yaxis()
    right.set(xlabel="share of walks that end there", xlim=(0, 1.25 * max(shown.values(), default=1)))


def _stacked(axes: Axes, table: DataFrame, parts: Mapping[str, tuple[str, str]]) -> None:
    """Bars of shares by layer, one for all at the right."""
    below = [0.0] * len(table)
    for column, (label, colour) in parts.items():
        axes.bar(range(len(table)), table[column], bottom=below, color=colour, label=label)
        below = [a + b for a, b in zip(below, table[column], strict=True)]
    last = len(table) - 1
    axes.axvline(last - 0.5, color=GREY, linewidth=0.8)
    step = -(-len(table) // 24)
    ticks = sorted({*range(0, last - 1, step), last - 1, last})
    axes.set_xticks(ticks, [str(table["layer"].iloc[at]) for at in ticks])
    axes.set(xlabel="layer of the receiving nodes", ylim=(0, 1))


def _draw_positions(report: GraphFigures, figure: Figure) -> None:
    axes = figure.subplots()
    parts = {
        "same": ("same position (residual stream and attention)", PALETTE[0]),
        "other": ("other positions (through attention)", PALETTE[1]),
        "biases": ("biases", PALETTE[4]),
        "unknown": ("not kept", GREY),
    }
    known = {name: part for name, part in parts.items() if report.positions[name].max() > 1e-6}
    _stacked(axes, report.positions, known)
    axes.set_title("edges of the whole graph", fontsize="medium")
    axes.set_ylabel("share of input, weighed by influence")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)


def _draw_attention(report: GraphFigures, figure: Figure) -> None:
    assert report.attention is not None
    axes = figure.subplots()
    parts = {
        "direct": ("along the residual stream, through no head", PALETTE[0]),
        "mediated": ("through attention heads", PALETTE[1]),
    }
    _stacked(axes, report.attention, parts)
    axes.set_title("edges of the pruned graph", fontsize="medium")
    axes.set_ylabel("share of input, weighed by influence")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)


def _draw_flow(report: GraphFigures, figure: Figure) -> None:
    axes: Axes = figure.subplots()
    graph, table = report.graph, report.flow
    groups = _Groups.of(graph)
    column = dict(zip(groups.names, groups.column, strict=True))
    within = float(table[table["source"] == table["target"]]["share"].sum())
    lost = float(table[table["source"] == "unknown"]["share"].sum())
    moves = table.query("source != target and source != 'unknown'")
    sizes = {
        name: max(float(moves[moves[side] == name]["share"].sum()) for side in ("source", "target"))
        for name in groups.names
    }
    gap, bottoms = 0.02, {}
    n_columns = max(groups.column) + 1
    for place in range(n_columns):
        here = [name for name in groups.names if column[name] == place and sizes[name] > 0]
        # Names need room, however little flows.
        steps = {name: max(sizes[name], LEAST_STEP) for name in here}
        height = sum(steps.values()) + gap * max(len(here) - 1, 0)
        at = max(0.0, (1 + gap * 8 - height) / 2) if place else 0.0
        for name in reversed(here):
            bottoms[name] = at
            at += steps[name] + gap
    _draw_ribbons(axes, moves, column, bottoms)
    for name, bottom in bottoms.items():
        place, size = column[name], sizes[name]
        axes.bar(place, size, 0.12, bottom=bottom, color=_colour_of(name), zorder=3, gid="group")
        first, last = place == 0, place == n_columns - 1
        at, ha = (place - 0.09, "right") if first else (place + 0.09, "left")
        where = (at, bottom + size / 2) if first or last else (place, bottom + size + 0.008)
        axes.text(
            *where,
            f"{_group_name(graph, name)}  {size:.0%}" if size >= 0.005 else _group_name(graph, name),
            ha=ha if first or last else "center",
            va="center" if first or last else "bottom",
            fontsize="small",
            zorder=4,
            clip_on=False,
        )
    axes.set_xlim(-1.1, n_columns - 0.1)
    axes.set_axis_off()
    said = f"within bands of layers: {within:.0%} of the influence on the outputs"
    if lost > 0.0005:
        said += f"; not in the graph: {lost:.1%}"
    axes.set_title("Influence on the outputs: where walks upstream pass and end", fontsize="medium")
    axes.text(
        0.5, -0.03, f"Not drawn: {said}", transform=axes.transAxes, ha="center", fontsize="small", color="#444444"
    )


class _Move(NamedTuple):
    source: str
    target: str
    share: float


def _draw_ribbons(axes: Axes, moves: DataFrame, column: Mapping[str, int], bottoms: Mapping[str, float]) -> None:
    """One ribbon for each pair of groups, as wide as what flows; those from above are stacked from above."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Line

    left_at, right_at = dict(bottoms), dict(bottoms)
    rows = [_Move(*row) for row in moves[["source", "target", "share"]].to_numpy().tolist()]
    ends = {}
    for row in sorted(rows, key=lambda row: (column[row.target], bottoms[row.target])):
        ends[row.source, row.target] = left_at[row.source]
        left_at[row.source] += row.share
    for row in sorted(rows, key=lambda row: (column[row.source], bottoms[row.source])):
        low, high = ends[row.source, row.target], right_at[row.target]
        right_at[row.target] += row.share
        start, end = column[row.source] + 0.06, column[row.target] - 0.06
        middle = (start + end) / 2
        points = [(start, low), (middle, low), (middle, high), (end, high)]
        points += [
            (end, high + row.share),
            (middle, high + row.share),
            (middle, low + row.share),
            (start, low + row.share),
        ]
        codes = [Line.MOVETO, *[Line.CURVE4] * 3, Line.LINETO, *[Line.CURVE4] * 3, Line.CLOSEPOLY]
        patch = PathPatch(
            Line([*points, points[0]], codes), facecolor=_colour_of(row.source), alpha=0.35, linewidth=0, gid="ribbon"
        )
        axes.add_patch(patch)
    axes.autoscale_view()


def _colour_of(group: str) -> str:
    for start, kind in (("layer", NodeKind.FEATURE), ("error", NodeKind.ERROR), ("position", NodeKind.BIAS)):
        if group.startswith(start):
            return COLOURS[kind]
    return COLOURS[NodeKind.LOGIT] if group.startswith("output") else COLOURS[NodeKind.TOKEN]


def _group_name(graph: AttributionGraph, group: str) -> str:
    kind, _, number = group.rpartition(" ")
    if kind == "token":
        return _token(graph, int(number))
    return f'"{_short(graph.logit_tokens[int(number)])}"' if kind == "output" else group
