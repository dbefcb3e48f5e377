"""What callers give to write or draw a graph, as it is used or refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tl_clt.arguments import is_whole, plain, shown
from tl_clt.attribution import AttributionGraph, Node
from tl_clt.errors import ConfigError


def as_graph(graph: object) -> AttributionGraph:
    """A graph.

    Raises:
        ConfigError: it is none.
    """
    if not isinstance(graph, AttributionGraph):
        raise ConfigError(f"The graph is {shown(graph)}: give an AttributionGraph, as `attribute` returns.")
    return graph


def as_labels(labels: object) -> dict[tuple[int, int], str]:
    """Words for features, by layer and feature.

    Raises:
        ConfigError: they are no mapping from pairs of whole numbers to text.
    """
    if labels is None:
        return {}
    wanted = 'give a mapping such as {(0, 17): "Texas"}, by layer and feature'
    if not isinstance(labels, Mapping):
        raise ConfigError(f"labels is {shown(labels)}: {wanted}.")
    for place, text in labels.items():
        pair = isinstance(place, tuple) and len(place) == 2 and all(is_whole(plain(number)) for number in place)
        if not pair or not isinstance(text, str):
            raise ConfigError(f"labels has {shown(place)} for {shown(text)}: {wanted}.")
    return {(int(layer), int(feature)): text for (layer, feature), text in labels.items()}


def as_nodes(name: str, nodes: object) -> list[Any]:
    """Nodes, or their numbers, one by one.

    Raises:
        ConfigError: they are neither.
    """
    given = nodes if isinstance(nodes, Iterable) and not isinstance(nodes, (str, bytes, Mapping)) else None
    try:
        found = None if given is None else [plain(node) for node in given]
    except (TypeError, NotImplementedError):  # tensors of no dimensions or without values
        found = None
    if found is None or not all(isinstance(node, Node) or is_whole(node) for node in found):
        raise ConfigError(f"{name} is {shown(nodes)}: give a list of nodes, or of their numbers.")
    return found


def as_groups(groups: object) -> dict[str, list[Any]]:
    """Groups of nodes by name.

    Raises:
        ConfigError: they are no mapping of names to nodes.
    """
    if groups is None:
        return {}
    if not isinstance(groups, Mapping) or not all(isinstance(name, str) for name in groups):
        raise ConfigError(f"supernodes is {shown(groups)}: give a mapping of names to lists of nodes.")
    return {name: as_nodes(f"supernodes[{name!r:.40}]", nodes) for name, nodes in groups.items()}
