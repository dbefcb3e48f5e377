"""Pictures of a graph: the numbers they show against sums made otherwise, and what is drawn of them."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace

import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from tests.models import random_tokens, tiny_clt, tiny_hooked
from tests.mutations import a_graph
from tl_clt import NodeKind, attribute, graph_figures
from tl_clt.attribution import find_direct_edges
from tl_clt.errors import ConfigError, NotWritten
from tl_clt.report import NEGATIVE, POSITIVE
from tl_clt.viewer import GraphFigures, save_figure
from tl_clt.viewer.figures import MOST_EDGES


@pytest.fixture(scope="module")
def traced():
    model = tiny_hooked("gpt2")
    clt = tiny_clt(model)
    graph = attribute(model, clt, random_tokens(model, pos=5)[0], [3, 5], progress=False)
    return model, clt, graph


@pytest.fixture(scope="module")
def figures(traced) -> GraphFigures:
    model, clt, graph = traced
    return graph_figures(graph, model=model, clt=clt, labels={(graph.nodes[0].layer, graph.nodes[0].index): "say w3"})


def normalised(graph) -> torch.Tensor:
    edges = graph.adjacency.abs().double()
    return edges / edges.sum(dim=1, keepdim=True).clamp_min(1e-30)


def influence_of(graph) -> torch.Tensor:
    """w (A + A^2 + ...) by the inverse of 1 - A."""
    shares = normalised(graph)
    return graph.logit_weights.double() @ (torch.linalg.inv(torch.eye(len(shares)).double() - shares)) - (
        graph.logit_weights.double()
    )


def texts(figure: Figure) -> str:
    return " ".join(text.get_text() for axes in figure.axes for text in axes.texts) + " ".join(
        axes.get_xlabel() for axes in figure.axes
    )


def test_shares_by_layer_and_kind_are_those_of_influence(figures, traced):
    graph, table = traced[2], figures.shares
    influence = influence_of(graph)
    assert table["share"].sum() == pytest.approx(1)
    assert table["n"].sum() == len(graph.nodes) - len(graph.logit_tokens)
    for row in table.itertuples():
        at = graph.nodes.is_kind(NodeKind[row.kind.upper()]) & (graph.nodes.layer == row.layer)
        assert row.share == pytest.approx(float(influence[at].sum() / influence.sum()))
    drawn = figures.plot("shares").axes[0]
    assert sum(bar.get_height() for bar in drawn.patches) == pytest.approx(1)
    ends = sum(bar.get_width() for bar in figures.plot("shares").axes[1].patches)
    assert ends == pytest.approx(1)


def test_what_tokens_give_is_influence_and_the_effect_along_all_paths(figures, traced):
    graph, table = traced[2], figures.tokens
    shares, n = normalised(graph), len(graph.nodes)
    walks = torch.linalg.inv(torch.eye(n).double() - shares)
    features = graph.nodes.is_kind(NodeKind.FEATURE)
    passed_on = torch.where(features, 1 / graph.nodes.activation.where(features, torch.ones(1).double()), 0)
    edges = graph.adjacency.double()
    effects = torch.linalg.inv(torch.eye(n).double() - edges * passed_on) @ edges
    tokens = graph.nodes.where(NodeKind.TOKEN)
    for row in table.itertuples():
        token = next(int(at) for at in tokens if int(graph.nodes.pos[at]) == row.pos)
        assert row.influence == pytest.approx(float(walks[row.node, token]), abs=1e-12)
        assert row.effect == pytest.approx(float(effects[row.node, token]), rel=1e-6, abs=1e-9)
    assert set(graph.nodes.where(NodeKind.LOGIT).tolist()) <= set(table["node"])
    left, right = (axes.images[0].get_array() for axes in figures.plot("tokens").axes[:2])
    assert left.shape == right.shape == (table["node"].nunique(), len(tokens))
    assert float(abs(right).max()) == pytest.approx(1)


def test_positions_part_all_of_the_input(figures, traced):
    graph, table = traced[2], figures.positions.set_index("layer")
    assert table[["same", "other", "biases", "unknown"]].sum(axis=1).tolist() == pytest.approx([1] * len(table))
    # Of the outputs, which all stand at the last position.
    rows = graph.nodes.where(NodeKind.LOGIT)
    shares = normalised(graph)[rows]
    weights = graph.logit_probs.double() / graph.logit_probs.double().sum()
    same = graph.nodes.pos == 4
    assert table.loc["output", "same"] == pytest.approx(float(weights @ shares[:, same].sum(dim=1)))
    assert table.loc["output", "biases"] == pytest.approx(float(weights @ shares[:, graph.nodes.pos < 0].sum(dim=1)))
    heights = [bar.get_height() for bar in figures.plot("positions").axes[0].patches]
    assert sum(heights) == pytest.approx(len(table))


def test_attention_parts_edges_into_what_no_head_passes_on_and_the_rest(figures, traced):
    model, clt, _ = traced
    pruned, table = figures.pruned, figures.attention
    direct = find_direct_edges(pruned, model, clt)
    rows = pruned.nodes.where(NodeKind.LOGIT)
    along = direct[rows].abs().sum(dim=1)
    through = (pruned.adjacency - direct)[rows].abs().sum(dim=1)
    weights = pruned.logit_probs / pruned.logit_probs.sum()
    found = table.set_index("layer")
    assert found.loc["output", "direct"] == pytest.approx(float(weights @ (along / (along + through))))
    assert (table["direct"] + table["mediated"]).tolist() == pytest.approx([1] * len(table))
    weighed = (table["direct"] * table["visits"])[:-1].sum() / table["visits"][:-1].sum()
    assert found.loc["all", "direct"] == pytest.approx(weighed)


def test_influence_flows_and_is_not_lost_on_the_way(figures, traced):
    graph, table = traced[2], figures.flow
    ends = graph.shares()
    out = table.groupby("source")["share"].sum()
    into = table.groupby("target")["share"].sum()
    tokens = sum(share for name, share in out.items() if "token" in name)
    assert tokens == pytest.approx(ends.token)
    assert out["errors"] == pytest.approx(ends.error)
    assert out["positions and biases"] == pytest.approx(ends.position + ends.bias)
    for band in (name for name in out.index if name.startswith("layer")):
        assert out[band] == pytest.approx(into[band]), "what comes in at a band goes out of it"
    assert sum(share for name, share in into.items() if name.startswith("output")) == pytest.approx(1)
    axes = figures.plot("flow").axes[0]
    assert len([patch for patch in axes.patches if patch.get_gid() == "ribbon"]) == len(table)


def test_what_a_reduced_graph_does_not_know_flows_from_unknown():
    graph = a_graph(sparse=True)
    shown = graph_figures(graph, node_threshold=0.4)
    lost = shown.flow[shown.flow["source"] == "unknown"]["share"].sum()
    assert lost == pytest.approx(graph.unexplored, rel=1e-5)  # both in float32
    assert "not in the graph" in texts(shown.plot("flow"))
    assert shown.positions["unknown"].max() > 0.01


def test_the_graph_is_drawn_with_signs_by_colour_and_dash_and_counts_what_is_left_out(figures):
    pruned = figures.pruned
    axes = figures.plot("graph").axes[0]
    edges = [line for line in axes.lines if line.get_gid() == "edge"]
    assert len(edges) == min(MOST_EDGES, pruned.n_edges)
    for line in edges:
        assert to_hex(line.get_color()) == (POSITIVE if line.get_linestyle() == "-" else NEGATIVE)
    signs = {line.get_linestyle() for line in edges}
    assert signs == {"-", "--"}
    markers = {group.get_gid(): len(group.get_offsets()) for group in axes.collections}
    for kind in NodeKind:
        assert markers.get(kind.name.lower(), 0) == len(pruned.nodes.where(kind))
    said = axes.get_xlabel()
    assert f"{len(pruned.nodes)} of {len(figures.graph.nodes)} nodes and {len(edges)} of" in said
    assert f"{len(figures.graph.nodes) - len(pruned.nodes)} nodes and" in said and "pruned away" in said


def test_names_do_not_overlap_and_those_without_room_are_counted(figures):
    figure = figures.plot("graph")
    axes = figure.axes[0]
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in axes.texts if text.get_gid() == "name"]
    assert len(boxes) > 3
    for at, one in enumerate(boxes):
        for other in boxes[:at]:
            # Constrained layout may move the axes by a pixel once more.
            assert (
                min(one.x1, other.x1) - max(one.x0, other.x0) <= 1 or min(one.y1, other.y1) - max(one.y0, other.y0) <= 1
            )
    shown = sum(len(figures.pruned.nodes.where(kind)) for kind in (NodeKind.FEATURE, NodeKind.LOGIT))
    missing = re.search(r"(\d+) nodes without a name", axes.get_xlabel())
    assert shown - len(boxes) == (int(missing[1]) if missing else 0)
    first = figures.graph.nodes[0]
    if any((node.layer, node.index) == (first.layer, first.index) for node in figures.pruned.nodes):
        assert "say w3" in texts(figure)


def test_a_crowded_cell_shows_the_most_influential_and_counts_the_rest(traced):
    graph = traced[2]
    everything = graph_figures(graph, node_threshold=1.0, edge_threshold=1.0)
    said = everything.plot("graph").axes[0].get_xlabel()
    drawn, _, n_edges = map(int, re.findall(r"\d+", said)[:3])
    crowded, weak = map(int, re.search(r"(\d+) nodes in crowded cells and (\d+) weaker", said).groups())
    assert drawn + crowded == len(everything.pruned.nodes)
    assert n_edges + weak == everything.pruned.n_edges


def test_any_token_can_be_drawn(traced):
    graph = traced[2]
    rude = replace(graph, prompt_tokens=["$x$ \\frac{", "漢字", "\n", "</script>", "🙂" * 40], logit_tokens=["$", "_^"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shown = graph_figures(rude)
        for name in shown.figures:
            shown.plot(name).draw_without_rendering()


def test_without_a_model_attention_is_no_figure_and_what_is_wrong_is_said(traced, tmp_path):
    model, _, graph = traced
    shown = graph_figures(graph)
    assert "attention" not in shown.figures
    with pytest.raises(ConfigError, match="give graph_figures model and clt"):
        shown.plot("attention")
    with pytest.raises(ConfigError, match="give both, or neither"):
        graph_figures(graph, model=model)
    with pytest.raises(ConfigError, match="node_threshold"):
        graph_figures(graph, node_threshold=3.0)
    with pytest.raises(ConfigError, match="give one of png, svg, pdf"):
        save_figure(shown.plot("shares"), tmp_path / "figure.exe")
    with pytest.raises(NotWritten):
        (tmp_path / "f.png").mkdir()
        save_figure(shown.plot("shares"), tmp_path / "f.png")
    starts = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
    for kind, start in starts.items():
        path = save_figure(shown.plot("shares"), tmp_path / f"g.{kind}")
        assert path.read_bytes().startswith(start)


def test_figures_leave_matplotlib_as_it_was(figures):
    import matplotlib

    before = dict(matplotlib.rcParams)
    figures.plot("graph")
    assert dict(matplotlib.rcParams) == before
