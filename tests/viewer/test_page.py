"""The page in a browser: every way to look at a graph, asserted on the page's state."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from urllib.parse import quote

import pytest
import torch

from tests.viewer.browser import PLACE, wait_until, watch
from tests.viewer.page_cases import EVIL, PROMPT, Records, large_graph
from tl_clt import AttributionGraph, Intervention, NodeKind, attribute, intervene, load_features, load_organism

MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"
ROUNDING = 2e-6
"""The page's numbers have 7 digits, and sums of them are as good."""


@pytest.fixture(scope="module")
def organism():
    return load_organism("atlas")


@pytest.fixture(scope="module")
def whole(organism) -> AttributionGraph:
    return attribute(*organism, PROMPT, progress=False)


@pytest.fixture(scope="module")
def graph(whole) -> AttributionGraph:
    return whole.prune()


@pytest.fixture(scope="module")
def path(graph, tmp_path_factory):
    return graph.save_html(tmp_path_factory.mktemp("page") / "graph.html", features=Records())


@pytest.fixture(scope="module")
def watched(browser):
    return watch(browser)


@pytest.fixture
def page(watched, path):
    """The page as it opens. Whatever a test does, nothing is asked of the network, and nothing complained of."""
    show(watched.page, path.as_uri())
    yield watched.page
    assert watched.complaints == []
    assert {url.split(":")[0] for url in watched.requests} <= {"file", "blob", "data", "about"}


def show(page, url: str) -> None:
    page.goto("about:blank")
    page.goto(url)
    wait_until(page, "window.tlclt?.firstPaint !== null")


def state(page):
    return page.evaluate("tlclt.store.state")


def notes(page):
    return page.evaluate("tlclt.store.notes")


def ids(page, *nodes: int) -> list[str]:
    return page.evaluate("nodes => nodes.map(i => tlclt.store.graph.ids[i])", list(nodes))


def settle(page) -> None:
    """Wait until the page is drawn as its state has it: what is pinned changes the graph's room, and so its layout."""
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 30))))")


def point_at(page, node: int) -> None:
    settle(page)
    page.mouse.move(*page.evaluate("i => tlclt.positionOf(i)", node))


def click(page, node: int, *, shift: bool = False) -> None:
    point_at(page, node)
    if shift:
        page.keyboard.down("Shift")
    page.mouse.click(*page.evaluate("i => tlclt.positionOf(i)", node))
    if shift:
        page.keyboard.up("Shift")


def pin(page, *nodes: int) -> None:
    page.evaluate("nodes => nodes.forEach(i => tlclt.store.togglePin(i))", list(nodes))


def test_it_shows_all_of_the_graph_without_a_network(page, graph, watched):
    found = page.evaluate("({nodes: tlclt.store.graph.n, edges: tlclt.scene().visible.edges.length})")
    assert found == {"nodes": len(graph.nodes), "edges": graph.n_edges}
    assert page.title() == graph.info["prompt"]
    scores = page.get_by_test_id("scores").inner_text()
    assert f"{graph.scores().replacement:.3f}" in scores and f"{graph.unexplored:.1%} unexplored" in scores


def test_tokens_stand_along_x_and_layers_along_y(page, graph):
    places = page.evaluate("[...tlclt.store.graph.kind.keys()].map(i => tlclt.positionOf(i))")
    nodes = list(graph.nodes)
    for low in nodes:
        for high in nodes:
            if low.kind == high.kind == NodeKind.FEATURE and low.layer < high.layer:
                assert places[low.number][1] > places[high.number][1]
            if 0 <= low.pos < high.pos:
                assert places[low.number][0] < places[high.number][0]
    assert len({tuple(place) for place in places}) == len(nodes)


def test_no_node_hides_another(page, graph):
    places = torch.tensor(page.evaluate("[...tlclt.store.graph.kind.keys()].map(i => tlclt.positionOf(i))"))
    distance = torch.cdist(places, places) + 1e9 * torch.eye(len(places))
    assert distance.min() > 12


def test_the_node_pointed_at_tells_what_it_is(page, graph):
    node = graph.top(1, "feature")[0].node
    point_at(page, node.number)
    assert page.evaluate("tlclt.store.hovered") == node.number
    tip = page.locator(".tip").inner_text()
    assert f"about {node.index}" in tip and node.label in tip
    page.mouse.move(2, 2)
    assert page.evaluate("tlclt.store.hovered") is None


def test_a_click_selects_and_ranks_inputs_and_outputs_with_their_sign(page, graph):
    node = graph.top(1, "feature")[0].node
    click(page, node.number)
    assert state(page)["selected"] == ids(page, node.number)[0]
    for name, ranked in (("inputs", graph.inputs(node, 5)), ("outputs", graph.outputs(node, 5))):
        rows = page.get_by_test_id(name).locator(".rows .row").all_inner_texts()
        for row, (_, weight) in zip(rows, ranked, strict=False):
            assert ("+" if weight > 0 else MINUS) + f"{abs(weight):.3g}" in row
    page.get_by_test_id("inputs").locator(".rows .row").first.click()
    assert state(page)["selected"] == ids(page, graph.inputs(node, 1)[0].node.number)[0]


def test_pinning_by_key_button_and_shift_click(page, graph):
    first, second, third = (ranked.node.number for ranked in graph.top(3, "feature"))
    click(page, first, shift=True)
    click(page, second)
    page.get_by_test_id("pin").click()
    point_at(page, third)
    page.keyboard.press("p")
    assert notes(page)["pinned"] == ids(page, first, second, third)
    page.keyboard.press("p")
    assert notes(page)["pinned"] == ids(page, first, second)


@pytest.mark.parametrize("kept_share", [0.0, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("which", ["pruned", "whole"])
def test_scores_of_the_subgraph_are_those_of_a_graph_whose_other_features_are_errors(
    page, graph, whole, which, kept_share, tmp_path
):
    shown = graph if which == "pruned" else whole
    if which == "whole":
        show(page, whole.save_html(tmp_path / "whole.html").as_uri())
    features = shown.nodes.where(NodeKind.FEATURE)
    chosen = torch.rand(len(features), generator=torch.Generator().manual_seed(1)) < kept_share
    others = features[~chosen]
    kind, dropped = shown.nodes.kind.clone(), shown.dropped
    kind[others] = int(NodeKind.ERROR)
    adjacency = shown.adjacency.clone()
    adjacency[others] = 0
    if dropped is not None:
        dropped = dropped.clone()
        dropped[others] = 0
    oracle = replace(shown, nodes=replace(shown.nodes, kind=kind), adjacency=adjacency, dropped=dropped).scores()
    found = page.evaluate("kept => tlclt.scoresOf(kept)", features[chosen].tolist())
    assert found["replacement"] == pytest.approx(oracle.replacement, abs=ROUNDING)
    assert found["completeness"] == pytest.approx(oracle.completeness, abs=ROUNDING)
    assert found["replacement_bounds"] == pytest.approx(list(oracle.replacement_bounds), abs=ROUNDING)
    assert found["completeness_bounds"] == pytest.approx(list(oracle.completeness_bounds), abs=ROUNDING)


def test_the_score_of_the_subgraph_follows_the_pins(page, graph):
    everything = graph.nodes.where(NodeKind.FEATURE).tolist()
    pin(page, everything[0])
    low = page.evaluate("tlclt.pinnedScores()")
    pin(page, *everything[1:])
    scores = graph.scores()
    assert page.evaluate("tlclt.pinnedScores().replacement") == pytest.approx(scores.replacement, abs=ROUNDING)
    assert page.evaluate("tlclt.pinnedScores().completeness") == pytest.approx(scores.completeness, abs=ROUNDING)
    assert low["replacement"] < scores.replacement and low["completeness"] < scores.completeness
    assert f"{scores.replacement:.3f}" in page.get_by_test_id("pinned-scores").inner_text()


def test_marked_nodes_become_a_named_group_that_can_be_renamed_and_dissolved(page, graph):
    first, second, third = (ranked.node.number for ranked in graph.top(3, "feature"))
    pin(page, third)
    for node in (first, second):
        point_at(page, node)
        page.keyboard.press("x")
    page.keyboard.press("g")
    page.get_by_test_id("asked").fill(f"say Austin {EVIL}")
    page.keyboard.press("Enter")
    assert notes(page)["groups"] == [{"name": f"say Austin {EVIL}", "members": ids(page, first, second)}]
    assert notes(page)["pinned"] == ids(page, third, first, second)
    boxes = page.evaluate("tlclt.subgraph().boxes.map(box => box.members)")
    assert sorted(map(sorted, boxes)) == sorted([[third], sorted([first, second])])
    page.locator(".box.group").focus()
    page.keyboard.press("e")
    page.get_by_test_id("asked").fill("Austin")
    page.keyboard.press("Enter")
    assert notes(page)["groups"][0]["name"] == "Austin"
    page.locator(".box.group").focus()
    page.keyboard.press("Delete")
    assert notes(page)["groups"] == []


def test_an_edge_between_groups_is_the_sum_of_its_edges(page, graph):
    logit = int(graph.nodes.where(NodeKind.LOGIT)[0])
    first, second = (ranked.node.number for ranked in graph.inputs(logit, 2))
    pin(page, first, second, logit)
    page.evaluate("nodes => tlclt.store.group(nodes.map(i => tlclt.store.graph.ids[i]), 'both')", [first, second])
    links = page.evaluate("tlclt.subgraph().links.map(({from, to, weight}) => [from.title, to.members[0], weight])")
    expected = float(graph.adjacency[logit, first] + graph.adjacency[logit, second])
    assert links == [["both", logit, pytest.approx(expected, rel=1e-6)]]


def test_a_label_given_by_hand_shows_everywhere_and_can_be_taken_back(page, graph):
    node = graph.top(1, "feature")[0].node
    click(page, node.number)
    page.get_by_test_id("label").fill(f"Texas {EVIL}")
    page.keyboard.press("Enter")
    assert state(page)["labels"] == {f"{node.layer}/{node.index}": f"Texas {EVIL}"}
    pin(page, node.number)
    assert page.evaluate("tlclt.subgraph().boxes[0].title") == f"Texas {EVIL}"
    page.get_by_test_id("label").fill("")
    page.keyboard.press("Enter")
    assert state(page)["labels"] == {}
    settle(page)
    assert page.get_by_test_id("label").input_value() == f"about {node.index}"


def test_boxes_are_laid_out_upwards_dragged_and_laid_out_again(page, graph):
    logit = int(graph.nodes.where(NodeKind.LOGIT)[0])
    feature = graph.top(1, "feature")[0].node.number
    token = next(ranked.node.number for ranked in graph.inputs(feature) if ranked.node.kind == NodeKind.TOKEN)
    pin(page, logit, feature, token)
    heights = page.evaluate("tlclt.subgraph().boxes.map(box => box.y)")
    assert heights == sorted(heights)
    box = page.locator(f'.box[data-box="{ids(page, feature)[0]}"]')
    bounds = box.bounding_box()
    x, y = bounds["x"] + bounds["width"] / 2, bounds["y"] + bounds["height"] / 2
    before = page.evaluate("tlclt.subgraph().boxes[1]")
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 30, y + 5)
    page.mouse.move(x + 60, y + 10)
    page.mouse.up()
    after = page.evaluate("tlclt.subgraph().boxes[1]")
    assert after["x"] > before["x"] + 20 and list(notes(page)["places"]) == ids(page, feature)
    page.keyboard.press("u")
    assert notes(page)["places"] == {}
    box.focus()
    page.keyboard.press("ArrowRight")
    assert notes(page)["places"] != {}
    page.get_by_test_id("auto-layout").click()
    assert notes(page)["places"] == {}
    assert page.evaluate("tlclt.subgraph().boxes[1].x") == before["x"]


def slide(page, name: str, value: float) -> None:
    page.get_by_test_id(name).evaluate(
        "(input, value) => { input.value = value; input.dispatchEvent(new Event('input', {bubbles: true})); }", value
    )


def test_the_influence_slider_keeps_what_pruning_keeps_and_counts_the_rest(page, graph):
    slide(page, "influence", 0.6)
    influence, always = graph.influence(), graph.nodes.is_kind(NodeKind.TOKEN, NodeKind.LOGIT)
    strongest = influence.sort(descending=True).values
    n = int((strongest.cumsum(0) < 0.6 * strongest.sum()).sum()) + 1
    kept = (influence >= strongest[n - 1]) | always
    assert page.evaluate("tlclt.scene().visible.nodes") == torch.nonzero(kept).flatten().tolist()
    assert f"{int((~kept).sum())} of too little influence" in page.get_by_test_id("summary").inner_text()


def test_weak_edges_are_left_out_and_counted(page, graph):
    slide(page, "min-weight", 0.8)
    least = page.evaluate("tlclt.scene().visible.minWeight")
    weights = graph.adjacency[graph.adjacency != 0].abs()
    assert 0 < least < weights.max()
    assert page.evaluate("tlclt.scene().visible.edges.length") == int((weights >= least).sum())
    assert f"{int((weights < least).sum())} of |weight| under" in page.get_by_test_id("summary").inner_text()


def test_where_nodes_stand_closely_the_likeliest_output_and_the_one_selected_have_their_names(page, tmp_path):
    many = large_graph(300, 600, n_layers=6, n_pos=8)
    many.save_html(tmp_path / "many.html")
    show(page, (tmp_path / "many.html").as_uri())
    names = page.evaluate("tlclt.svg('graph')")
    assert "out0 50%" in names and "out1" not in names
    node = next(n for n in many.nodes if n.kind == NodeKind.FEATURE and n.layer == 3)
    page.evaluate("i => tlclt.store.select(i)", node.number)
    settle(page)
    assert f"{node.layer}.{node.index}" in page.evaluate("tlclt.svg('graph')")


def test_of_very_many_edges_the_strongest_are_drawn_and_the_rest_counted(page, tmp_path):
    large = large_graph(600, 60_000, n_layers=6, n_pos=8)
    show(page, large.save_html(tmp_path / "large.html").as_uri())
    weights = large.to_pandas().edges["weight"].abs().sort_values(ascending=False).reset_index(drop=True)
    summary = page.get_by_test_id("summary")
    assert page.evaluate("tlclt.scene().visible.edges.length") == 2000
    assert f"{len(weights) - 2000} of |weight| under" in summary.inner_text()
    page.evaluate("tlclt.store.set({minWeight: 0})")
    settle(page)
    drawn = page.evaluate("[...tlclt.scene().visible.edges].map(e => Math.abs(tlclt.store.graph.weight[e]))")
    assert len(drawn) == 10_000 and min(drawn) == pytest.approx(weights[9_999], rel=1e-6)
    assert f"{len(weights) - 10_000} beyond the 10000 strongest" in summary.inner_text()


def test_filters_by_kind_layer_token_and_sign_say_what_they_hide(page, graph):
    nodes, edges = graph.nodes, graph.to_pandas().edges
    hidden = {}
    for kind in ("error", "bias", "position"):
        page.get_by_test_id(f"kind-{kind}").click()
        hidden[kind] = int(nodes.is_kind(NodeKind[kind.upper()]).sum())
    summary = page.get_by_test_id("summary")
    for kind, name in (("error", "errors"), ("bias", "biases"), ("position", "positions")):
        assert f"{hidden[kind]} {name} switched off" in summary.inner_text()
    page.get_by_test_id("show-all").click()
    page.get_by_test_id("first-layer").select_option("1")
    of_layers = nodes.is_kind(NodeKind.FEATURE, NodeKind.ERROR, NodeKind.BIAS) & (nodes.layer < 1)
    assert f"{int(of_layers.sum())} of other layers" in summary.inner_text()
    page.get_by_test_id("show-all").click()
    page.get_by_test_id("token-9").click()
    assert f"{int((nodes.pos == 9).sum())} at tokens switched off" in summary.inner_text()
    page.get_by_test_id("token-9").click()
    page.get_by_test_id("sign").select_option("negative")
    assert page.evaluate("tlclt.scene().visible.edges.length") == int((edges["weight"] < 0).sum())
    assert f"{int((edges['weight'] > 0).sum())} of the other sign" in summary.inner_text()
    page.get_by_test_id("show-all").click()
    assert "hidden" not in summary.inner_text()


def test_search_finds_by_label_number_and_token(page, graph):
    node = graph.top(1, "feature")[0].node
    page.keyboard.press("/")
    page.keyboard.type(f"about {node.index} dallas" if "Dallas" in node.label else f"about {node.index}")
    page.keyboard.press("Enter")
    assert state(page)["selected"] in ids(page, *[n.number for n in graph.nodes if n.index == node.index])
    page.get_by_test_id("search").fill(f"feature {node.layer}.{node.index}")
    assert node.number in page.evaluate("[...tlclt.scene().found]")
    page.get_by_test_id("search").fill("token dallas")
    page.keyboard.press("Enter")
    token = next(n.number for n in graph.nodes if n.label == 'token "Dallas"')
    assert state(page)["selected"] == ids(page, token)[0]
    page.keyboard.press("Escape")
    assert page.evaluate("tlclt.scene().found.size") == 0


def test_the_strongest_path_is_the_one_of_the_largest_product(page, graph):
    share = graph.adjacency.abs() / (graph.adjacency.abs().sum(1) + graph.dropped).clamp_min(1e-8)[:, None]
    token = next(n.number for n in graph.nodes if n.label == 'token "Dallas"')
    logit = int(graph.nodes.where(NodeKind.LOGIT)[0])
    best = share[:, token].double()
    for _ in range(5):
        best = torch.maximum(best, (share.double() * best).amax(dim=1))
    click(page, token)
    page.keyboard.press("t")
    click(page, logit)
    page.get_by_test_id("path-to").click()
    path = page.evaluate("tlclt.path()")
    product = torch.stack([share[to, at] for at, to in pairwise(path)]).double().prod()
    assert path[0] == token and path[-1] == logit
    assert float(product) == pytest.approx(float(best[logit]), rel=1e-5)
    page.get_by_test_id("pin-path").click()
    assert notes(page)["pinned"] == ids(page, *path)
    page.get_by_test_id("path-close").click()
    assert notes(page)["path"] is None


def test_two_graphs_of_one_model_are_compared(page, organism, graph, tmp_path):
    from tl_clt.viewer import save_html

    other = attribute(*organism, "Fact: the capital of the state containing Oakland is", progress=False).prune()
    show(page, save_html(tmp_path / "two.html", {"Dallas": graph, "Oakland": other}, Records()).as_uri())
    page.get_by_test_id("tab-compare").click()
    page.get_by_test_id("compare-with").select_option("1")
    ours, theirs = ({(n.layer, n.index) for n in g.nodes if n.kind == NodeKind.FEATURE} for g in (graph, other))
    words = page.get_by_test_id("compare").inner_text()
    assert f"{len(ours & theirs)} features in both, {len(ours - theirs)} here alone" in words
    shared = page.evaluate("[...tlclt.scene().shared]")
    assert {(graph.nodes[i].layer, graph.nodes[i].index) for i in shared} == ours & theirs
    rows = page.get_by_test_id("compared").locator(".rows .row")
    assert rows.count() > 0
    pin(page, 0)
    page.get_by_test_id("which-graph").select_option("1")
    assert page.evaluate("tlclt.store.graph.n") == len(other.nodes)
    assert notes(page)["pinned"] == [] and state(page)["compare"] == 0


def test_the_feature_card_says_what_is_known_as_text_alone(page, graph):
    node = next(n for n in graph.nodes if n.kind == NodeKind.FEATURE and n.index % 2 == 1)
    click(page, node.number)
    card = page.get_by_test_id("card").inner_text()
    for words in ("Promotes", "Austin", "Suppresses", "Boston", "Strongest contexts", "0.91", "0.55", EVIL):
        assert words in card
    assert page.get_by_test_id("feature").locator(".context .here").first.inner_text() == EVIL
    assert page.locator("img").count() == 0 and page.title() == graph.info["prompt"]
    page.get_by_role("button", name="All 7 contexts").click()
    assert page.locator(".context").count() == 7


def test_what_features_are_left_out_and_why_is_told(page, graph, tmp_path):
    summary = page.get_by_test_id("summary")
    of_graph = {(n.layer, n.index) for n in graph.nodes if n.kind == NodeKind.FEATURE}
    assert f"{len(of_graph)} of {len(of_graph)} features described." in summary.inner_text()
    features = load_features("atlas")
    cut = tmp_path / "cut.html"
    graph.save_html(cut, features=features, max_features=3)
    show(page, cut.as_uri())
    left, elsewhere = len(of_graph) - 3, len(features) - len(of_graph)
    said = f"3 of {len(of_graph)} features described; {left} left out as of least influence (max_features)"
    assert f"{said}; {elsewhere} others of the store in no graph here." in summary.inner_text()
    known = page.evaluate("Object.keys(tlclt.store.features)")
    other = next(n.number for n in graph.nodes if n.kind == NodeKind.FEATURE and f"{n.layer}/{n.index}" not in known)
    page.evaluate("i => tlclt.store.select(i)", other)
    assert "left out of this file: save_html(..., max_features=None)" in page.locator(".card").inner_text()


CONTEXTS = [
    (["Fact", ":", " the", " capital", "\n\n", "Dallas"], "Fact: the capital\n\nDallas"),
    ([" leading", " spaces", "\n", "  two"], " leading spaces\n  two"),
    (["<bos>", "the", "New York", "is"], "<bos> the New York is"),
    (["sub", "word", "s", " stay", " whole"], "subwords stay whole"),
    (["it", "\t", "is"], "it\tis"),
]
"""Tokens as tokenizers give them, and how they are read: those without any space at an end are whole words."""


@pytest.mark.parametrize(("tokens", "text"), CONTEXTS)
def test_contexts_are_read_as_the_text_they_are_from(page, graph, tmp_path, tokens, text):
    example = {"tokens": tokens, "activations": [*[0.0] * (len(tokens) - 1), 2.0], "position": len(tokens) - 1}
    node = graph.top(1, "feature")[0].node
    record = {**Records().get(node.layer, node.index).to_dict(), "examples": [{**example, "quantile": "top"}]}
    source = SimpleNamespace(get=lambda *_: SimpleNamespace(to_dict=lambda: record))
    show(page, graph.save_html(tmp_path / "contexts.html", features=source).as_uri())
    page.evaluate("i => tlclt.store.select(i)", node.number)
    context = page.locator(".card .context").first
    assert context.evaluate("e => e.textContent") == text
    assert context.evaluate("e => getComputedStyle(e).whiteSpace") == "pre-wrap"
    assert [span.inner_text() for span in context.locator(".here").all()] == [tokens[-1]]
    # A line break is one on the page: the lines are as many as the text's.
    height = context.evaluate("e => e.clientHeight - 8")
    line = context.evaluate("e => parseFloat(getComputedStyle(e).lineHeight)")
    assert round(height / line) == len(text.split("\n"))


def test_without_features_the_card_says_how_to_add_them(page, graph, tmp_path):
    show(page, graph.save_html(tmp_path / "plain.html").as_uri())
    click(page, graph.top(1, "feature")[0].node.number)
    assert "save_html(path, features=store)" in page.get_by_test_id("card").inner_text()


def test_undo_and_redo(page, graph):
    first, second = (ranked.node.number for ranked in graph.top(2, "feature"))
    pin(page, first, second)
    for value in (0.9, 0.8, 0.7):
        slide(page, "influence", value)
    page.keyboard.press("Control+z")
    assert state(page)["influence"] == 1 and len(notes(page)["pinned"]) == 2
    page.keyboard.press("u")
    assert notes(page)["pinned"] == ids(page, first)
    page.keyboard.press("Control+Shift+z")
    page.get_by_test_id("redo").click()
    assert state(page)["influence"] == 0.7 and notes(page)["pinned"] == ids(page, first, second)
    assert page.get_by_test_id("redo").is_disabled()


def test_the_state_stands_in_the_address_and_in_a_file(page, graph, path, tmp_path):
    first, second = (ranked.node.number for ranked in graph.top(2, "feature"))
    pin(page, first, second)
    page.evaluate(
        "([i]) => { tlclt.store.group([tlclt.store.graph.ids[i]], 'one & \"two\"'); tlclt.store.relabel(i, 'ü'); }",
        [first],
    )
    page.get_by_test_id("kind-bias").click()
    page.evaluate("tlclt.store.save()")
    before, url = state(page), page.url
    assert "#" in url
    page.get_by_test_id("export").click()
    with page.expect_download() as download:
        page.get_by_test_id("state-json").click()
    download.value.save_as(tmp_path / "state.json")
    exported = json.loads((tmp_path / "state.json").read_text(encoding="utf-8"))
    assert exported["state"] == before
    assert {node["number"] for node in exported["subgraph"]["nodes"]} == {first, second}

    show(page, url)
    assert state(page) == before
    show(page, path.as_uri())
    assert state(page) != before
    page.get_by_test_id("export").click()
    page.get_by_test_id("import").set_input_files(tmp_path / "state.json")
    wait_until(page, "tlclt.store.notes.groups.length === 1")
    assert state(page) == before
    assert page.get_by_test_id("said").inner_text() == "The state was read."


def test_a_state_with_pins_of_other_graphs_says_how_many_it_does_not_know(page, path, tmp_path):
    (known,) = ids(page, 0)
    for unknown, said in (["x"], "1 of its pinned nodes is unknown here."), (["x", "y"], "2 of its pinned nodes are"):
        given = {"notes": [{"pinned": [known, *unknown]}]}
        show(page, f"{path.as_uri()}#{quote(json.dumps(given))}")
        wait_until(page, "tlclt.store.pinned.length === 1")
        assert said in page.get_by_test_id("said").inner_text()
        assert f"{len(unknown)} pinned node" in page.get_by_test_id("summary").inner_text()
    show(page, path.as_uri())
    exported = {**page.evaluate("tlclt.store.export()"), "state": given}
    (tmp_path / "state.json").write_text(json.dumps(exported))
    page.get_by_test_id("export").click()
    page.get_by_test_id("import").set_input_files(tmp_path / "state.json")
    wait_until(page, "tlclt.store.pinned.length === 1")
    assert page.get_by_test_id("said").inner_text() == "The state was read. 2 of its pinned nodes are unknown here."


LONG = "a label that says in many words what a feature is active at, with a_word_without_a_break_" + "that_goes_on_" * 5


def test_long_labels_are_read_in_full_and_nothing_overflows(page, graph):
    page.set_viewport_size({"width": 1400, "height": 900})
    first = int(graph.nodes.where(NodeKind.FEATURE)[0])
    (edge,) = page.evaluate(
        "i => [...tlclt.store.graph.inEdges(i), ...tlclt.store.graph.outEdges(i)].slice(0, 1)", first
    )
    page.evaluate("([i, text]) => { tlclt.store.relabel(i, text); tlclt.store.select(i); }", [first, LONG])
    pin(page, *graph.nodes.where(NodeKind.FEATURE)[:7].tolist())
    settle(page)
    field = page.get_by_test_id("label")
    assert field.input_value() == LONG
    assert field.evaluate("e => e.scrollHeight <= e.clientHeight && e.scrollWidth <= e.clientWidth")
    boxes = page.evaluate("[...document.querySelectorAll('[data-box] title')].map(t => t.textContent)")
    assert any(box.startswith(LONG) for box in boxes)
    other = page.evaluate(
        "([e, i]) => { const g = tlclt.store.graph; return g.source[e] === i ? g.target[e] : g.source[e]; }",
        [edge, first],
    )
    page.evaluate("i => tlclt.store.select(i)", other)
    settle(page)
    titles = page.evaluate("[...document.querySelectorAll('aside .cell.name')].map(e => e.title)")
    assert any(title.startswith(LONG) for title in titles)
    for wide in (1400, 1000):
        page.set_viewport_size({"width": wide, "height": 900})
        settle(page)
        rights = page.evaluate("[...document.querySelectorAll('.tlclt *')].map(e => e.getBoundingClientRect().right)")
        assert max(rights) <= wide + 1
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.set_viewport_size({"width": 1280, "height": 800})


@pytest.mark.parametrize("rubbish", ["%", "{", "[]", '{"notes":7,"kinds":[],"layers":"x","graph":9,"selected":5}'])
def test_a_damaged_address_leaves_the_page_as_it_starts(page, path, rubbish):
    start = state(page)
    show(page, f"{path.as_uri()}#{rubbish}")
    assert state(page) == start


def test_a_file_that_is_no_state_is_refused_in_words(page, tmp_path):
    (tmp_path / "other.json").write_text('{"format": "something else"}')
    page.get_by_test_id("export").click()
    page.get_by_test_id("import").set_input_files(tmp_path / "other.json")
    assert "no state that the page has exported" in page.locator("dialog .alert").inner_text()


def test_pictures_are_exported_with_text_that_stays_text(page, graph, tmp_path):
    from xml.etree import ElementTree

    for what in ("graph", "subgraph"):
        if what == "subgraph":  # which takes room of the graph: drawn smaller, it names no nodes
            pin(page, *graph.nodes.where(NodeKind.FEATURE).tolist())
        picture = ElementTree.fromstring(page.evaluate("what => tlclt.svg(what)", what))
        tags = {element.tag.split("}")[1] for element in picture.iter()}
        assert tags <= {"svg", "title", "rect", "path", "circle", "polygon", "text"}
        # Where nodes stand closely, the graph names its likeliest output alone.
        named = {"graph": graph.logit_tokens[0].strip(), "subgraph": "about "}[what]
        assert any((element.text or "").startswith(named) for element in picture.iter())
    dashed = page.evaluate("tlclt.svg('graph')").count("stroke-dasharray")
    assert dashed == int((graph.adjacency < 0).sum())
    node = graph.top(1, "feature")[0].node.number
    page.evaluate("i => tlclt.store.select(i)", node)
    own = int((graph.adjacency[node] < 0).sum() + (graph.adjacency[:, node] < 0).sum())
    assert page.evaluate("tlclt.svg('graph')").count("stroke-dasharray") == dashed + own  # and once more, lit
    page.get_by_test_id("export").click()
    for name in ("graph-png", "subgraph-png", "graph-svg"):
        with page.expect_download() as download:
            page.get_by_test_id(name).click()
        download.value.save_as(tmp_path / name)
    assert (tmp_path / "graph-png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "subgraph-png").read_bytes().startswith(b"\x89PNG")


def test_the_python_snippet_makes_the_interventions(page, organism, graph):
    first, second, third = (ranked.node for ranked in graph.top(3, "feature"))
    pin(page, first.number, second.number, third.number)
    page.evaluate('i => tlclt.store.relabel(i, \'one\\nraise SystemExit  # \\u2028 """\')', first.number)
    page.evaluate(
        "([a, b]) => tlclt.store.group([a, b].map(i => tlclt.store.graph.ids[i]), 'two\\nraise SystemExit')",
        [first.number, second.number],
    )
    model, clt = organism
    names = {"model": model, "clt": clt}
    written = page.evaluate("tlclt.python()")
    assert "# model = load_model(" in written and "from_pretrained(" in written
    exec(written, names)
    changed = {(i.layer, i.pos, f) for i in names["interventions"] for f in i.features}
    assert changed == {(n.layer, n.pos, n.index) for n in (first, second, third)}
    assert all(isinstance(i, Intervention) and i.scale == 0 for i in names["interventions"])
    expected = intervene(model, clt, graph.tokens, [Intervention.of(graph, n) for n in (first, second, third)])
    assert torch.allclose(names["effect"].logits, expected.logits, atol=1e-4)


def test_a_live_model_is_steered_from_the_page(page, graph):
    node = graph.top(1, "feature")[0].node
    page.evaluate(
        """() => {
            window.asked = [];
            const host = {steer: async (interventions, graph) => {
                window.asked.push([interventions, graph]);
                if (interventions[0].scale === 7) throw new Error("too strong");
                return {top: [{token: " Austin", before: 0.9, after: 0.2}, {token: "<b>", before: 0.1, after: 0.8}]};
            }};
            const data = JSON.parse(document.getElementById("data").textContent);
            tlclt.unmount();
            tlcltPage.mount(document.getElementById("page"), data, {host, hash: false});
        }"""
    )
    page.evaluate("i => tlclt.store.select(i)", node.number)
    page.get_by_test_id("tab-steer").click()
    page.get_by_test_id("amount").fill("-2")
    page.get_by_test_id("run-steer").click()
    rows = page.get_by_test_id("steered").locator("tbody tr")
    rows.first.wait_for()
    change = {"layer": node.layer, "pos": node.pos, "feature": [node.index], "scale": -2}
    assert page.evaluate("asked") == [[[change], 0]]
    assert rows.first.inner_text().split() == ["Austin", "0.900", "0.200", f"{MINUS}0.700"]
    page.get_by_test_id("amount").fill("7")
    page.get_by_test_id("run-steer").click()
    page.locator(".steer .alert").wait_for()
    assert page.locator(".steer .alert").inner_text() == "too strong"


def test_a_shell_loads_features_as_they_are_selected_and_keeps_annotations(page, graph):
    node = graph.top(1, "feature")[0].node
    page.evaluate(
        """record => {
            window.saved = [];
            const host = {
                loadFeature: async (layer, feature) => ({...record, layer, feature, label: "loaded"}),
                saveAnnotations: async (state) => { window.saved.push(state); },
            };
            const data = {...JSON.parse(document.getElementById("data").textContent), features: {}};
            tlclt.unmount();
            tlcltPage.mount(document.getElementById("page"), data, {host, hash: false});
        }""",
        Records().get(node.layer, node.index).to_dict(),
    )
    page.evaluate("i => tlclt.store.select(i)", node.number)
    wait_until(page, "document.querySelector('[data-testid=label]').value === 'loaded'")
    page.evaluate("tlclt.store.save()")
    assert page.evaluate("saved") == []  # nothing was made yet
    page.get_by_test_id("graph").focus()
    page.keyboard.press("p")
    wait_until(page, "saved.length > 0")
    saved = page.evaluate("saved.at(-1)")
    assert saved["state"]["notes"][0]["pinned"] == ids(page, node.number)


def test_the_keyboard_reaches_every_node(page, graph):
    page.get_by_test_id("graph").focus()
    page.keyboard.press("ArrowUp")
    seen = {page.evaluate("tlclt.store.hovered")}
    for _ in range(7):
        page.keyboard.press("ArrowDown")
    rows = page.evaluate("tlclt.scene().layout.rows.length")
    for _ in range(rows):
        for direction in ("ArrowLeft", "ArrowRight"):
            before = None
            while before != page.evaluate("tlclt.store.hovered"):
                before = page.evaluate("tlclt.store.hovered")
                seen.add(before)
                page.keyboard.press(direction)
        page.keyboard.press("ArrowUp")
    assert seen == set(range(len(graph.nodes)))
    assert "influence" in page.get_by_test_id("said").inner_text()
    page.keyboard.press("Enter")
    assert page.evaluate("tlclt.store.selected === tlclt.store.hovered")
    page.keyboard.press("?")
    page.locator("dialog").wait_for()
    page.keyboard.press("Escape")
    page.locator("dialog").wait_for(state="detached")
    assert page.evaluate("document.activeElement.dataset.testid") == "graph"


def test_the_table_has_the_same_nodes_sorted_and_by_keyboard(page, graph):
    page.keyboard.press("v")
    table = page.get_by_test_id("table")
    assert table.get_attribute("aria-rowcount") == str(len(graph.nodes) + 1)
    strongest = [ranked.node for ranked in graph.top(3)]
    table.locator(".rows").focus()
    page.keyboard.press("ArrowDown")
    assert state(page)["selected"] == ids(page, strongest[0].number)[0]
    page.keyboard.press("ArrowDown")
    assert state(page)["selected"] == ids(page, strongest[1].number)[0]
    table.get_by_role("button", name="Layer").click()
    assert table.get_by_role("columnheader", name="Layer").get_attribute("aria-sort") == "ascending"
    layers = [row.split("\n")[2] for row in table.locator(".rows .row").all_inner_texts()]
    assert layers[0] == DASH and len(layers) > 5
    page.get_by_test_id("kind-token").click()
    assert table.get_attribute("aria-rowcount") == str(len(graph.nodes) + 1 - 11)


def test_the_graph_is_moved_and_zoomed_without_losing_the_selection(page, graph):
    click(page, graph.top(1, "feature")[0].node.number)
    start, selected = page.evaluate("tlclt.scene().view"), state(page)["selected"]
    bounds = page.get_by_test_id("graph").bounding_box()
    x, y = bounds["x"] + 100, bounds["y"] + bounds["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 20, y + 5)
    page.mouse.move(x + 40, y + 10)
    page.mouse.up()
    wait_until(page, f"Math.abs(tlclt.scene().view.x - {start['x'] + 40}) < 0.01")
    page.mouse.wheel(0, -300)
    wait_until(page, f"tlclt.scene().view.k > {start['k']}")
    assert state(page)["selected"] == selected
    page.get_by_test_id("graph").focus()
    page.keyboard.press("0")
    wait_until(page, f"Math.abs(tlclt.scene().view.k - {start['k']}) < 1e-6")


def test_nothing_moves_by_itself_where_the_reader_asks_so(page):
    transition = "getComputedStyle(document.querySelector('button')).transitionDuration"
    page.emulate_media(reduced_motion="no-preference")
    assert page.evaluate(transition) != "0s"
    page.emulate_media(reduced_motion="reduce")
    assert page.evaluate(transition) == "0s"


def test_the_subgraph_can_have_the_room_of_the_graph(page, graph):
    pin(page, 0)
    page.get_by_test_id("enlarge").click()
    page.get_by_test_id("graph").wait_for(state="hidden")
    page.get_by_test_id("enlarge").click()
    page.get_by_test_id("graph").wait_for(state="visible")


def test_light_and_dark_by_the_system_and_by_hand(page):
    colour = "getComputedStyle(document.querySelector('.page')).backgroundColor"
    light = page.evaluate(colour)
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(colour)
    assert light == "rgb(255, 255, 255)" and dark != light
    page.get_by_test_id("theme").click()
    page.get_by_test_id("theme").click()
    assert state(page)["theme"] == "light" and page.evaluate(colour) == light
    page.emulate_media(color_scheme="light")
    page.get_by_test_id("theme").click()
    page.get_by_test_id("theme").click()
    assert state(page)["theme"] == "dark" and page.evaluate(colour) == dark


def test_two_pages_in_one_document(page):
    page.evaluate(
        """() => {
            const second = document.body.appendChild(document.createElement("div"));
            window.first = tlclt;
            const data = JSON.parse(document.getElementById("data").textContent);
            tlcltPage.mount(second, data, {hash: false});
        }"""
    )
    page.evaluate("tlclt.store.togglePin(0)")
    assert page.evaluate("[first.store.notes.pinned.length, tlclt.store.notes.pinned.length]") == [0, 1]
    found = page.evaluate("[...document.querySelectorAll('[id]')].map(element => element.id)")
    assert len(found) == len(set(found))


def test_axe_finds_no_serious_fault(page, graph):
    axe = PLACE / "node_modules" / "axe-core" / "axe.min.js"
    if not axe.is_file():
        pytest.skip("no axe-core here: npm ci in tl_clt/viewer/page")
    page.evaluate(axe.read_text(encoding="utf-8"))
    pin(page, *(ranked.node.number for ranked in graph.top(4, "feature")))
    page.evaluate("i => tlclt.store.select(i)", graph.top(1, "feature")[0].node.number)

    def faults() -> list[str]:
        page.wait_for_timeout(200)  # colours pass over into each other
        found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
        return [
            f"{fault['impact']}: {fault['id']} at {[node['html'][:120] for node in fault['nodes']]}"
            for fault in found
            if fault["impact"] in ("serious", "critical", "moderate")
        ]

    assert faults() == []
    page.evaluate("tlclt.store.set({theme: 'dark', view: 'table'})")
    assert faults() == []
    for name in ("help", "export"):
        page.get_by_test_id(name).click()
        assert faults() == []
        page.keyboard.press("Escape")
