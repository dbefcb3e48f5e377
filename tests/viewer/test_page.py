"""The page opens from a file, alone, and shows what the graph holds."""

from __future__ import annotations

import pytest

from tests.viewer.browser import watch
from tl_clt import attribute, load_organism


@pytest.fixture(scope="module")
def graph():
    model, clt = load_organism("atlas")
    return attribute(model, clt, "Fact: the capital of the state containing Dallas is", progress=False).prune()


@pytest.fixture(scope="module")
def opened(browser, graph, tmp_path_factory):
    path = graph.save_html(tmp_path_factory.mktemp("page") / "graph.html")
    watched = watch(browser)
    watched.page.goto(path.as_uri())
    watched.page.wait_for_function("tlclt.firstPaint !== null")
    return watched


def test_it_shows_all_of_the_graph_without_a_network(opened, graph):
    found = opened.page.evaluate("({nodes: tlclt.store.graph.n, edges: tlclt.scene().visible.edges.length})")
    assert found == {"nodes": len(graph.nodes), "edges": graph.n_edges}
    assert len(opened.requests) == 1 and opened.requests[0].startswith("file://")
    assert opened.complaints == []
