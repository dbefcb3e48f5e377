"""A graph in a notebook: the page as a widget, as a frame where there are no widgets, and a picture where neither is.

A notebook's frontend chooses from what it is offered. With anywidget that is the page itself, joined to the kernel,
which gives it features, keeps annotations and runs a live model; without, the page in a frame that can do nothing but
show it. Both come with a picture for places that show neither: viewers of notebooks on the web, exports, terminals.
"""

from __future__ import annotations

import base64
import io
import json
from functools import cache, cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from warnings import catch_warnings, filterwarnings

from tl_clt.arguments import as_choice, as_whole
from tl_clt.attribution import AttributionGraph, NodeKind
from tl_clt.attribution.edges import list_all_edges
from tl_clt.errors import ConfigError, ExtraMissing, TlCltError
from tl_clt.viewer.host import Host, prompt_of, read_page_json
from tl_clt.viewer.html import page_html, page_script, page_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from tl_clt.lens import HookedModel
    from tl_clt.transcoder import CrossLayerTranscoder
    from tl_clt.viewer.html import FeatureSource, Graphs

Display = Literal["auto", "widget", "frame", "picture"]
DISPLAYS = ("auto", "widget", "frame", "picture")
WIDGET = "application/vnd.jupyter.widget-view+json"
HEIGHT = 720
"""Of the page, in pixels."""
MOST_DRAWN = 60
"""Nodes of a picture; those of most influence are drawn."""
MOST_LINES = 400
"""Edges of a picture; the strongest are drawn."""
POSITIVE, NEGATIVE, QUIET = "#1f6fb4", "#c2570c", "#5b6876"
MARKERS = {"feature": "o", "error": "D", "token": "s", "position": "v", "bias": "^", "logit": "p"}


class GraphView:
    """Graphs as a notebook shows them: what the last line of a cell gives, or `display(view)`.

    Args:
        graphs: one graph, or several of one model, by name or in a list.
        features: what is known of features: a `FeatureStore`, or anything with `get(layer, feature)`.
        model, clt: the model and the CLT that the graphs were traced with, to change features from the page and see
            what follows; both or neither. For this the page must be a widget.
        annotations: file to keep pins, groups and labels in. For this the page must be a widget.
        height: of the page, in pixels.
        display: "widget" (needs anywidget), "frame" (the page in a frame, alone), "picture" (no script at all), or
            "auto" for a widget where anywidget is installed, else a frame.

    Raises:
        ConfigError: there is no graph, or an argument is something else.
        ExtraMissing: a widget is asked for, and anywidget is not installed.
        CLTMismatch: the graphs were not traced with this model and CLT.
        FormatError, NotWritten: the file of annotations is damaged, or cannot be written.
    """

    def __init__(
        self,
        graphs: Graphs,
        features: FeatureSource | None = None,
        *,
        model: HookedModel | None = None,
        clt: CrossLayerTranscoder | None = None,
        annotations: str | Path | None = None,
        height: int = HEIGHT,
        display: Display = "auto",
    ) -> None:
        self.height = as_whole("height", height, 100, 10_000)
        chosen = as_choice("display", display, DISPLAYS)
        if chosen == "auto":
            chosen = "widget" if _widget_class(required=False) is not None else "frame"
        if chosen != "widget" and (model is not None or annotations is not None):
            raise ConfigError(
                "Steering and a file of annotations need the page as a widget: pip install anywidget, and give"
                " display='widget' or 'auto'."
            )
        self.display: str = chosen
        self._host = Host(graphs, features, model, clt, annotations)
        self._widget = _widget_class(required=True)(self._host, self.height) if chosen == "widget" else None

    @property
    def annotations(self) -> dict[str, Any] | None:
        """Pins, groups and labels made in the widget so far, as the page exports them; None where there are none."""
        return None if self._widget is None else self._widget.exported

    def __repr__(self) -> str:
        graphs = self._host.graphs
        more = "" if len(graphs) == 1 else f" and {len(graphs) - 1} more"
        return f"GraphView({graphs[0]!r}{more})"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        bundle: dict[str, Any] = {"text/plain": repr(self), "image/svg+xml": self.picture}
        if self._widget is not None:
            bundle |= {key: value for key, value in _bundle_of(self._widget).items() if key == WIDGET}
        bundle["text/html"] = self.frame() if self.display == "frame" else self._repr_html_()
        return bundle

    def _repr_html_(self) -> str:
        """The picture, as an image, in which nothing can run."""
        data = base64.b64encode(self.picture.encode()).decode()
        return f'<img alt="{self._title}" src="data:image/svg+xml;base64,{data}">'

    def frame(self) -> str:
        """The page in a frame without a name, an origin or a network: it can show itself, and save files."""
        text = page_html(self._host.data()["data"])
        return (
            f'<iframe title="{self._title}" width="100%" height="{self.height}" frameborder="0"'
            ' referrerpolicy="no-referrer" sandbox="allow-scripts allow-downloads"'
            f' srcdoc="{escape(text, quote=True)}"></iframe>'
        )

    @property
    def _title(self) -> str:
        return escape(_characters(f"Attribution graph of {prompt_of(self._host.graphs[0])}"), quote=True)

    @cached_property
    def picture(self) -> str:
        """The first graph as an SVG image: tokens along x, layers along y, the nodes of most influence."""
        return draw_picture(self._host.graphs[0])


def draw_picture(graph: AttributionGraph) -> str:
    """A graph as an SVG image, at most `MOST_DRAWN` nodes and `MOST_LINES` edges of it."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    order = graph.influence().argsort(descending=True).tolist()
    is_end = graph.nodes.is_kind(NodeKind.TOKEN) | graph.nodes.is_kind(NodeKind.LOGIT)
    drawn = set(order[:MOST_DRAWN]) | set(is_end.nonzero().flatten().tolist())
    places = _places(graph, drawn)
    left_out = len(graph.nodes) - len(drawn)
    n_rows = 2 + max(y for _, y in places.values())
    width = min(max(6.0, 0.9 * len(graph.prompt_tokens)), 24)
    # Text as outlines: the picture looks the same wherever it is shown.
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "tl_clt", "text.parse_math": False}):
        figure = Figure(figsize=(width, min(2 + 0.6 * n_rows, 14)), layout="constrained")
        axes = figure.subplots()
        _draw_edges(axes, graph, places)
        _draw_nodes(axes, graph, places)
        said = f"; {left_out} nodes of less influence are not drawn" if left_out else ""
        axes.set_title(f"{_short(graph.logit_tokens[0])} after: {_short(prompt_of(graph), 120)}{said}", fontsize=9)
        text = io.StringIO()
        with catch_warnings():
            # Scripts that the font lacks are drawn as boxes; the page shows them.
            filterwarnings("ignore", message="Glyph")
            figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def _short(text: str, most: int = 14) -> str:
    """A token or prompt on one line, of characters alone (half a surrogate pair is none)."""
    return f"{' '.join(_characters(text).split()) or '␣':.{most}}"


def _characters(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _places(graph: AttributionGraph, drawn: set[int]) -> dict[int, tuple[float, float]]:
    """Where nodes stand: by position and layer, those of one place side by side."""
    nodes = graph.nodes
    top = max(int(nodes.layer.max()), int(graph.info.get("n_layers") or 0)) + 1
    cells: dict[tuple[int, int], list[int]] = {}
    for node in sorted(drawn):
        kind, layer, pos = NodeKind(int(nodes.kind[node])), int(nodes.layer[node]), int(nodes.pos[node])
        row = {NodeKind.LOGIT: top, NodeKind.TOKEN: -1, NodeKind.POSITION: -1}.get(kind, layer)
        cells.setdefault((pos, row), []).append(node)
    places = {}
    for (pos, row), members in cells.items():
        for i, node in enumerate(members):
            places[node] = (pos + 0.8 * ((i + 0.5) / len(members) - 0.5), float(row))
    return places


def _draw_edges(axes: Axes, graph: AttributionGraph, places: dict[int, tuple[float, float]]) -> None:
    """The strongest edges among the nodes drawn; positive ones solid, negative ones dashed."""
    target, source, weight = (values.tolist() for values in list_all_edges(graph.adjacency))
    known = [edge for edge in zip(target, source, weight, strict=True) if edge[2] and {*edge[:2]} <= set(places)]
    strongest = sorted(known, key=lambda edge: -abs(edge[2]))[:MOST_LINES]
    for t, s, value in strongest:
        (x0, y0), (x1, y1) = places[s], places[t]
        share = abs(value) / abs(strongest[0][2])
        colour, dash = (POSITIVE, "solid") if value > 0 else (NEGATIVE, "dashed")
        axes.plot([x0, x1], [y0, y1], color=colour, linestyle=dash, alpha=0.15 + 0.85 * share, lw=0.3 + 2 * share)


def _draw_nodes(axes: Axes, graph: AttributionGraph, places: dict[int, tuple[float, float]]) -> None:
    for kind in NodeKind:
        members = [node for node in places if int(graph.nodes.kind[node]) == kind]
        if members:
            x, y = zip(*(places[node] for node in members), strict=True)
            name = kind.name.lower()
            label = "output" if name == "logit" else name
            axes.scatter(x, y, marker=MARKERS[name], s=34, color=QUIET, edgecolors="white", zorder=3, label=label)
    at = sorted({round(x) for x, _ in places.values()})
    tokens = ["biases" if pos < 0 else _short(graph.prompt_tokens[pos]) for pos in at]
    axes.set_xticks(at, tokens, rotation=45, ha="right", fontsize=8)
    rows = sorted({round(row) for _, row in places.values()})
    names = {-1: "tokens", rows[-1]: "output", rows[-1] - 1: "output biases"}
    axes.set_yticks(rows, [names.get(row, f"layer {row}") for row in rows], fontsize=8)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    axes.plot([], [], color=POSITIVE, label="raises")
    axes.plot([], [], color=NEGATIVE, linestyle="dashed", label="lowers")
    if axes.figure is not None:
        axes.figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)


# -- the widget -------------------------------------------------------------------------------------------------------


@cache
def _widget_class(required: bool) -> Any:
    """The class of the widget, made when it is first used: anywidget is not installed everywhere.

    Raises:
        ExtraMissing: it is not, and is required.
    """
    try:
        import anywidget
        import traitlets
    except ImportError as error:
        if not required:
            return None
        raise ExtraMissing("The page as a widget needs anywidget: pip install anywidget.") from error

    class PageWidget(anywidget.AnyWidget):
        """The page, and its host in the kernel, which answers what the page asks in messages."""

        _esm = page_script() + "\n" + (Path(__file__).parent / "notebook.js").read_text(encoding="utf-8")
        _css = page_style() + "\n.tlclt.tlclt-notebook, .tlclt.tlclt-notebook .page { height: 100%; }"
        data = traitlets.Unicode().tag(sync=True)
        can = traitlets.Dict().tag(sync=True)
        height = traitlets.Int().tag(sync=True)

        def __init__(self, host: Host, height: int) -> None:
            given = host.data()
            super().__init__(data=json.dumps(given["data"], allow_nan=False), can=given["can"], height=height)
            self.exported: dict[str, Any] | None = given["data"]["annotations"]
            self._page_host = host
            self.on_msg(self._answer)

        def _answer(self, _: Any, message: Any, __: Any) -> None:
            """Answer one question of the page: its number comes back with the answer, or with what is wrong."""
            if isinstance(message, dict):
                try:
                    self.send({"number": message.get("number"), "answer": self._find(message)})
                except TlCltError as error:
                    self.send({"number": message.get("number"), "error": f"{type(error).__name__}: {error}"})

        def _find(self, message: dict[str, Any]) -> Any:
            asked = read_page_json(json.dumps(message.get("asked")))
            if message.get("what") == "annotate":
                if self._page_host.annotations is not None:
                    self._page_host.annotate(asked)
                self.exported = asked
                return {}
            if message.get("what") == "steer" and isinstance(asked, dict):
                number = as_whole("graph", asked.get("graph"), 0, len(self._page_host.graphs) - 1)
                return self._page_host.steer(number, asked.get("interventions"))
            if message.get("what") == "feature" and isinstance(asked, dict):
                layer, feature = (as_whole(name, asked.get(name), 0) for name in ("layer", "feature"))
                return self._page_host.feature(layer, feature)
            raise ConfigError("The page asked for something that there is not. Show the graph again.")

    return PageWidget


def _bundle_of(widget: Any) -> dict[str, Any]:
    """What the widget offers to a frontend."""
    bundle = widget._repr_mimebundle_()
    return bundle[0] if isinstance(bundle, tuple) else bundle or {}
