"""A graph as text: a tree from the answer down to the prompt."""

from __future__ import annotations

from collections.abc import Callable

from rich.text import Text
from rich.tree import Tree

from tl_clt.attribution import AttributionGraph, NodeKind
from tl_clt.attribution.edges import Node

FeatureLabel = Callable[[Node], str]
"""A feature node -> a few words on what the feature does, or means there."""


def node_name(graph: AttributionGraph, node: int, label: FeatureLabel | None = None) -> str:
    """A node in words, for example `feature 1.214 at " Dallas"`."""
    found = graph.nodes[node]
    words = f" ({label(found)})" if label and found.kind == NodeKind.FEATURE else ""
    return found.label + words


def graph_tree(graph: AttributionGraph, *, width: int = 3, depth: int = 4, label: FeatureLabel | None = None) -> Tree:
    """The strongest inputs of each output, their strongest inputs, and so on.

    Each branch gives the share of the node above's absolute input, with its sign; what the graph does not hold counts
    in the whole, and the first line says how much influence is lost there. A node that is already shown elsewhere is
    named again, but not opened again.

    Args:
        graph: a pruned graph, or any.
        width: inputs shown of each node.
        depth: steps from the output.
        label: words for a feature.
    """
    shown: set[int] = set()

    def grow(branch: Tree, node: int, steps: int) -> None:
        if steps == 0 or node in shown:
            return
        shown.add(node)
        edges = graph.in_edges(node)
        strongest = graph.input_shares(node).topk(min(width, len(graph.nodes)))
        for share, source in zip(strongest.values.tolist(), strongest.indices.tolist(), strict=True):
            if share > 0:
                sign = "+" if edges[source] > 0 else "-"
                words = f"{sign}{share:.0%}  {node_name(graph, source, label)}"
                again = " (see above)" if source in shown and steps > 1 else ""
                grow(branch.add(Text(words + again)), source, steps - 1)

    prompt = str(graph.info.get("prompt", "".join(graph.prompt_tokens)))
    unknown = f"  [{graph.unexplored:.1%} of influence is not in this graph]" if graph.is_reduced else ""
    root = Tree(Text(prompt + unknown))
    for logit in graph.nodes.where(NodeKind.LOGIT).tolist():
        grow(root.add(Text(node_name(graph, logit))), logit, depth)
    return root
