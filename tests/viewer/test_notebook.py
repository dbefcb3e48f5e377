"""A graph in a notebook: what it offers a frontend, and what the widget answers."""

from __future__ import annotations

import base64
import json
import sys
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from matplotlib.axes import Axes

from tests.viewer.browser import wait_until, watch
from tl_clt import AttributionGraph, NodeKind, attribute, load_organism
from tl_clt.errors import CLTMismatch, ConfigError, ExtraMissing
from tl_clt.viewer import GraphView, notebook
from tl_clt.viewer.notebook import WIDGET

PROMPT = "the capital of the state containing Dallas is"
NASTY = "</script></iframe>\"'><img src=x onerror=alert(1)>&amp;$x^$\u2028\ud83d"

SHAPES = {"svg", "defs", "style", "g", "path", "use", "clipPath", "rect", "metadata", "RDF", "Work", "format", "type"}
"""Elements that a picture has."""


@pytest.fixture(scope="module")
def pair():
    return load_organism("atlas")


@pytest.fixture(scope="module")
def graph(pair) -> AttributionGraph:
    return attribute(*pair, PROMPT, progress=False).prune(0.5)


@pytest.fixture(scope="module")
def nasty(graph) -> AttributionGraph:
    """A graph whose texts are somebody's who means harm."""
    tokens = [NASTY] * len(graph.prompt_tokens)
    return replace(graph, prompt_tokens=tokens, logit_tokens=[NASTY] * len(graph.logit_tokens), info={"prompt": NASTY})


class Elements(HTMLParser):
    """The elements of an HTML text, with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


class Store:
    def get(self, layer: int, feature: int):
        return None


@pytest.fixture
def without_anywidget(monkeypatch):
    notebook._widget_class.cache_clear()
    monkeypatch.setitem(sys.modules, "anywidget", None)
    yield
    notebook._widget_class.cache_clear()


def test_with_anywidget_a_frontend_is_offered_the_widget_and_a_picture(graph):
    bundle = graph.show()._repr_mimebundle_()
    assert set(bundle) == {WIDGET, "image/svg+xml", "text/html", "text/plain"}
    assert bundle[WIDGET]["model_id"] and "iframe" not in bundle["text/html"]
    assert bundle["text/plain"] == f"GraphView({graph!r})"


def test_without_it_a_frame_and_a_picture(graph, without_anywidget):
    bundle = graph.show(height=500)._repr_mimebundle_()
    assert set(bundle) == {"image/svg+xml", "text/html", "text/plain"}
    [(tag, given)] = Elements(bundle["text/html"]).found
    assert tag == "iframe" and given["height"] == "500" and given["sandbox"] == "allow-scripts allow-downloads"
    with pytest.raises(ExtraMissing, match="pip install anywidget"):
        graph.show(display="widget")


def test_the_picture_is_an_image_of_its_own(graph):
    view = graph.show(display="picture")
    bundle = view._repr_mimebundle_()
    assert set(bundle) == {"image/svg+xml", "text/html", "text/plain"} and "<script" not in bundle["image/svg+xml"]
    [(tag, given)] = Elements(bundle["text/html"]).found
    kind, _, data = given["src"].partition(",")
    assert (tag, kind) == ("img", "data:image/svg+xml;base64") and bundle["text/html"] == view._repr_html_()
    assert base64.b64decode(data).decode() == bundle["image/svg+xml"]
    assert ElementTree.fromstring(bundle["image/svg+xml"]).tag.endswith("}svg")


def test_a_graph_by_itself_stays_a_light_table(graph):
    assert len(graph._repr_html_()) < 10_000 and "<script" not in graph._repr_html_()
    assert not hasattr(graph, "_repr_mimebundle_")


def test_the_picture_is_that_of_the_figures_and_says_what_is_left_out(pair, monkeypatch):
    whole = attribute(*pair, PROMPT, progress=False)
    said = []
    label = Axes.set_xlabel
    monkeypatch.setattr(
        Axes, "set_xlabel", lambda self, text, **options: (said.append(text), label(self, text, **options))
    )
    drawn = notebook.draw_picture(whole)
    pruned = whole.prune()
    assert f"of {len(whole.nodes)} nodes" in said[0]
    assert f"{len(whole.nodes) - len(pruned.nodes)} nodes and {whole.n_edges - pruned.n_edges} edges pruned" in said[0]
    assert drawn == notebook.draw_picture(whole), "the same picture each time"


def test_texts_are_texts_in_the_frame_and_the_picture(nasty):
    view = nasty.show(display="frame")
    [(tag, given)] = Elements(view.frame()).found
    assert tag == "iframe" and given["title"] == f"Attribution graph of {NASTY}".replace("\ud83d", "?")
    tags = [tag for tag, _ in Elements(given["srcdoc"]).found]
    assert tags.count("script") == 2 and not {"img", "iframe"} & set(tags)
    assert [tag for tag, _ in Elements(view._repr_html_()).found] == ["img"]
    tree = ElementTree.fromstring(view.picture)
    assert {element.tag.rpartition("}")[2] for element in tree.iter()} <= SHAPES
    assert "\ud83d" not in "".join(view._repr_mimebundle_().values()), "all of it can be written as UTF-8"


def test_the_frame_runs_the_page_alone(browser, nasty):
    watched = watch(browser)
    frame = nasty.show(display="frame").frame()
    watched.page.set_content(f"<body><script>var alerts = 0; alert = () => alerts++;</script>{frame}")
    within = watched.page.frames[1]
    wait_until(within, "window.tlclt && tlclt.firstPaint !== null")
    assert within.evaluate("tlclt.store.graph.n") == len(nasty.nodes)
    assert within.evaluate("origin") == "null", "it has nothing in common with the notebook"
    assert within.evaluate("document.querySelectorAll('img').length") == 0
    assert watched.page.evaluate("alerts") == 0 and watched.requests == [] and watched.complaints == []


# -- the widget -------------------------------------------------------------------------------------------------------


@pytest.fixture
def view(pair, graph, tmp_path) -> GraphView:
    model, clt = pair
    return graph.show(Store(), model=model, clt=clt, annotations=tmp_path / "notes.json")


def told(view: GraphView, monkeypatch, **message) -> dict:
    """What the widget answers a message of the page."""
    sent = []
    monkeypatch.setattr(view._widget, "send", sent.append)
    view._widget._handle_custom_msg({"number": 7, **message}, [])
    [answer] = sent
    assert answer.pop("number") == 7
    return answer


def test_the_widget_holds_the_page_and_its_data(view, graph):
    widget = view._widget
    assert "tlcltPage.mount" in widget._esm and "export default { render }" in widget._esm and widget._css
    data = json.loads(widget.data)
    assert data["format"] == "tl_clt.page" and len(data["graphs"][0]["nodes"]["kind"]) == len(graph.nodes)
    assert widget.can == {"features": True, "annotate": True, "steer": True} and widget.height == notebook.HEIGHT


def test_the_widget_answers_the_page(view, graph, monkeypatch, tmp_path):
    assert told(view, monkeypatch, what="feature", asked={"layer": 1, "feature": 2}) == {"answer": None}
    node = graph.top(1, NodeKind.FEATURE)[0].node
    change = {"layer": node.layer, "pos": node.pos, "feature": [node.index], "scale": 0}
    answer = told(view, monkeypatch, what="steer", asked={"graph": 0, "interventions": [change]})["answer"]
    assert {row["token"].strip() for row in answer["top"]} >= {"Austin"}
    notes = [{"pinned": ["a"], "groups": [], "places": {}, "path": None}]
    exported = {
        "format": "tl_clt.page_state",
        "version": 1,
        "prompts": [graph.info["prompt"]],
        "state": {"notes": notes},
    }
    assert view.annotations is None
    assert told(view, monkeypatch, what="annotate", asked=exported) == {"answer": {}}
    assert view.annotations == exported == json.loads((tmp_path / "notes.json").read_text())


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({}, "something that there is not"),
        ({"what": "delete", "asked": {}}, "something that there is not"),
        ({"what": "feature", "asked": 3}, "something that there is not"),
        ({"what": "feature", "asked": {"layer": -1, "feature": 2}}, "layer is -1"),
        ({"what": "steer", "asked": {"graph": 1, "interventions": []}}, "graph is 1"),
        ({"what": "steer", "asked": {"graph": 0, "interventions": [{}]}}, "interventions"),
        ({"what": "annotate", "asked": {"format": "other"}}, "no annotations of these graphs"),
        ({"what": "annotate", "asked": float("nan")}, "no finite number"),
    ],
)
def test_the_widget_says_what_is_wrong(view, monkeypatch, message, words):
    assert words in told(view, monkeypatch, **message)["error"]
    assert view.annotations is None


def test_what_cannot_be_shown_is_told_at_once(pair, graph, tmp_path, as_users_run_it):
    model, clt = pair
    for options, words in (
        ({"height": 3}, "height is 3"),
        ({"display": "pdf"}, "display is 'pdf': give one of auto, widget, frame, picture"),
        ({"display": "frame", "annotations": tmp_path / "n"}, "need the page as a widget"),
        ({"model": model}, "clt is missing"),
        ({"features": 3}, "give a FeatureStore"),
    ):
        with pytest.raises(ConfigError, match=words):
            graph.show(**options)
    with pytest.raises(ConfigError, match="graphs is empty"):
        GraphView([])
    other = attribute(model, clt, PROMPT, progress=False)
    other.nodes.activation.mul_(3)
    with pytest.raises(CLTMismatch, match="was not traced with this CLT"):
        other.show(model=model, clt=clt)


FRONTEND = """async ([esm, css, state]) => {
  // What anywidget's frontend does: import the module, and render it with a model joined to the kernel.
  const style = document.head.appendChild(document.createElement("style"));
  style.textContent = css;
  const url = URL.createObjectURL(new Blob([esm], { type: "text/javascript" }));
  const { default: widget } = await import(url);
  window.listeners = [];
  const model = {
    get: (name) => state[name],
    on: (name, listener) => name === "msg:custom" && window.listeners.push(listener),
    off: (name, listener) => (window.listeners = window.listeners.filter((known) => known !== listener)),
    send: async (message) => window.listeners.forEach(async (tell) => tell(await window.kernel(message))),
  };
  const el = document.body.appendChild(document.createElement("div"));
  window.cleanUp = widget.render({ model, el });
}"""


def test_the_widget_in_a_browser_is_the_page_joined_to_the_kernel(browser, view, graph, monkeypatch):
    watched = watch(browser)
    page = watched.page

    def kernel(message: dict) -> dict:
        number = message.pop("number")
        return {"number": number, **told(view, monkeypatch, **message)}

    page.expose_function("kernel", kernel)
    page.set_content("<body></body>")
    widget = view._widget
    page.evaluate(FRONTEND, [widget._esm, widget._css, {"data": widget.data, "can": widget.can, "height": 600}])
    wait_until(page, "window.tlclt && tlclt.firstPaint !== null")
    assert page.evaluate("tlclt.store.graph.n") == len(graph.nodes)
    assert page.evaluate("document.querySelector('.tlclt .page').getBoundingClientRect().height") == 600
    first = page.evaluate("tlclt.store.graph.kind.indexOf('feature')")
    page.evaluate(f"tlclt.store.togglePin({first})")
    page.evaluate("tlclt.store.host.saveAnnotations(tlclt.store.export())")
    assert view.annotations is not None and view.annotations["state"]["notes"][0]["pinned"]
    said = page.evaluate("tlclt.store.host.steer([], 0).catch((error) => error.message)")
    assert said.startswith("InterventionError: interventions is no list")
    assert page.evaluate("tlclt.store.host.loadFeature(0, 1)") is None
    page.evaluate("cleanUp()")
    assert page.evaluate("[listeners.length, document.querySelectorAll('.tlclt *').length]") == [0, 0]
    assert watched.complaints == [] and not [url for url in watched.requests if not url.startswith("blob:")]
