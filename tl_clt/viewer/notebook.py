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
from warnings import catch_warnings, simplefilter

from tl_clt.arguments import as_choice, as_whole
from tl_clt.attribution import AttributionGraph
from tl_clt.errors import ConfigError, ExtraMissing, TlCltError
from tl_clt.viewer.figures import graph_figures
from tl_clt.viewer.host import Host, read_page_json
from tl_clt.viewer.html import as_characters, page_html, page_script, page_style, prompt_of

if TYPE_CHECKING:
    from tl_clt.lens import HookedModel
    from tl_clt.transcoder import CrossLayerTranscoder
    from tl_clt.viewer.html import FeatureSource, Graphs

Display = Literal["auto", "widget", "frame", "picture"]
DISPLAYS = ("auto", "widget", "frame", "picture")
WIDGET = "application/vnd.jupyter.widget-view+json"
HEIGHT = 720
"""Of the page, in pixels."""


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
        return escape(as_characters(f"Attribution graph of {prompt_of(self._host.graphs[0])}"), quote=True)

    @cached_property
    def picture(self) -> str:
        """The first graph as an SVG image: pruned, tokens along x, layers along y."""
        return draw_picture(self._host.graphs[0])


def draw_picture(graph: AttributionGraph) -> str:
    """The picture of a graph that `graph_figures` draws, pruned, as an SVG image."""
    from matplotlib import rc_context

    with catch_warnings():
        # The picture says itself how much of the influence is not in it.
        simplefilter("ignore", UserWarning)
        figure = graph_figures(graph).plot("graph")
    text = io.StringIO()
    # Text as outlines: the picture looks the same wherever it is shown.
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "tl_clt"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


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
