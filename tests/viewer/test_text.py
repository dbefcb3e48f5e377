"""The tree of a graph in words."""

from __future__ import annotations

import io
from collections import Counter

import pytest
from rich.console import Console

from tl_clt import NodeKind, attribute, load_organism
from tl_clt.viewer import graph_tree, node_name


@pytest.fixture(scope="module")
def graph():
    model, clt = load_organism("atlas")
    return attribute(model, clt, "the capital of the state containing Dallas is")


def as_text(tree) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(tree)
    return console.export_text()


def test_every_kind_of_node_has_a_name(graph):
    names = {kind: node_name(graph, int(graph.nodes.where(kind)[-1])) for kind in NodeKind}
    assert names[NodeKind.TOKEN] == 'token "is"'
    assert names[NodeKind.ERROR] == 'error of MLP 3 at "is"'
    assert names[NodeKind.BIAS] == "biases of the output"
    assert names[NodeKind.POSITION] == "position 8"
    assert names[NodeKind.LOGIT].startswith('output "')
    assert names[NodeKind.FEATURE].startswith("feature 3.")
    assert "(two words)" in node_name(graph, 0, label=lambda node: "two words")


def test_the_strongest_inputs_come_first_with_their_share(graph):
    logit = int(graph.nodes.where(NodeKind.LOGIT)[0])
    row = graph.adjacency[logit].abs() / graph.adjacency[logit].abs().sum()
    first = int(row.argmax())
    lines = as_text(graph_tree(graph, depth=1)).splitlines()
    assert "Dallas" in lines[0]
    assert "Austin" in lines[1]
    assert f"{float(row[first]):.0%}  {node_name(graph, first)}" in lines[2]
    assert len(lines) == 1 + len(graph.logit_tokens) * 4


def test_a_node_is_opened_once(graph):
    seen, opened = Counter(), Counter()

    def visit(branch) -> None:
        name = str(branch.label).split("  ")[-1].removesuffix(" (see above)")
        seen[name] += 1
        opened[name] += bool(branch.children)
        for child in branch.children:
            visit(child)

    visit(graph_tree(graph.prune(), width=4, depth=6))
    assert max(seen.values()) > 1 and max(opened.values()) == 1
