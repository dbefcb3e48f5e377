"""A graph in words: features with one meaning as a group, and the strongest path from a word of the prompt through
groups to the output."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from tl_clt.attribution import AttributionGraph, NodeKind
from tl_clt.attribution.edges import Node

Meaning = Callable[[Node], str]
"""A feature node -> what it stands for here, in a few words."""
GROUPS_ON_A_PATH = 2
"""At most so many, so that a path can be said in one breath."""


class Group(NamedTuple):
    """The features of a graph that mean one thing at one position."""

    meaning: str
    pos: int
    nodes: list[Node]
    share: float
    """Of the influence of all features that the graph holds."""

    @property
    def layers(self) -> tuple[int, int]:
        """The lowest and the highest layer of its features."""
        layers = [node.layer for node in self.nodes]
        return min(layers), max(layers)


class Step(NamedTuple):
    """One station of a path: a word of the prompt, a group, or the output."""

    words: str
    group: Group | None


class Path(NamedTuple):
    """From a word of the prompt to the output."""

    steps: list[Step]
    share: float
    """Geometric mean, over the path's steps, of what each contributes of the absolute input of the next."""

    def __str__(self) -> str:
        return " -> ".join(step.words for step in self.steps)


def group_features(graph: AttributionGraph, meaning: Meaning) -> list[Group]:
    """A graph's features by meaning and position; the group of most influence first."""
    influence = graph.influence()
    found: dict[tuple[str, int], list[Node]] = {}
    features = graph.nodes.where(NodeKind.FEATURE)
    for number in features.tolist():
        node = graph.nodes[number]
        found.setdefault((meaning(node), node.pos), []).append(node)
    total = max(float(influence[features].sum()), 1e-30)
    groups = [
        Group(words, pos, nodes, float(influence[[node.number for node in nodes]].sum()) / total)
        for (words, pos), nodes in found.items()
    ]
    return sorted(groups, key=lambda group: -group.share)


def strongest_paths(graph: AttributionGraph, groups: list[Group]) -> list[Path]:
    """The path from a word of the prompt to the likeliest output along which most flows: with one group on the way, and
    with two, where there are such.

    What flows from one station to the next is the sum of the positive edges between them, as a share of the absolute
    input of the latter (of its features, weighted by their influence).
    """
    stations = [[node.number for node in group.nodes] for group in groups]
    logit = int(graph.nodes.where(NodeKind.LOGIT)[0])
    output = f"say {graph.logit_tokens[0].strip()}"
    tokens = [n for n in graph.nodes.where(NodeKind.TOKEN).tolist() if graph.nodes[n].pos > 0]
    influence = graph.influence()
    into_output = _inflow(graph, [logit], torch.ones(1))
    inflows = [_inflow(graph, numbers, influence[numbers]) for numbers in stations]

    paths: list[Path] = []
    for n_groups in range(1, GROUPS_ON_A_PATH + 1):
        ends = [([i], float(into_output[stations[i]].sum())) for i in range(len(groups))]
        for _ in range(n_groups - 1):
            ends = [
                ([j, *on], flow * float(inflows[on[0]][stations[j]].sum()))
                for on, flow in ends
                for j in range(len(groups))
                if groups[j].meaning not in {groups[i].meaning for i in on}
            ]
        whole = [(n, on, flow * float(inflows[on[0]][n])) for on, flow in ends for n in tokens]
        best = max(whole, key=lambda one: one[2], default=None)
        if best is None or best[2] <= 0:
            continue
        word, on, flow = best
        first = Step(graph.prompt_tokens[graph.nodes[word].pos].strip(), None)
        steps = [first, *(Step(groups[i].meaning, groups[i]) for i in on), Step(output, None)]
        paths.append(Path(steps, flow ** (1 / (n_groups + 1))))
    return paths


def _inflow(graph: AttributionGraph, numbers: list[int], weights: torch.Tensor) -> torch.Tensor:
    """What each node contributes, with a positive edge, of the input of some nodes."""
    weights = weights / weights.sum().clamp_min(1e-30)
    shares = [graph.input_shares(n) * (graph.in_edges(n) > 0) for n in numbers]
    return (torch.stack(shares) * weights[:, None]).sum(dim=0)
