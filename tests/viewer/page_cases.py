"""What the tests of the page and its benchmark show on it: records of features, and graphs of any size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tl_clt import AttributionGraph, NodeKind
from tl_clt.attribution.edges import EdgeList, Nodes, build_adjacency

PROMPT = "Fact: the capital of the state containing Dallas is"
EVIL = "</script><img src=x onerror=\"document.title='broken in'\"><!--"
"""What must stay text wherever it is shown."""


@dataclass
class Record:
    """What is known of a feature, made up."""

    layer: int
    feature: int

    def to_dict(self) -> dict[str, Any]:
        words = [" the", " capital", " of", EVIL if self.feature % 2 else " Dallas"]
        example = {"tokens": words, "activations": [0.0, 1.5, 0.0, 3.0], "position": 3}
        return {
            "layer": self.layer,
            "feature": self.feature,
            "label": f"about {self.feature} {EVIL}" if self.feature % 3 == 0 else f"about {self.feature}",
            "label_score": 0.91,
            "label_score_random": 0.55,
            "density": 0.012,
            "max_activation": 3.0,
            "histogram": {"edges": [0.0, 1.0, 2.0, 3.0], "counts": [100, 10, 1]},
            "top_logits": [[" Austin", 2.5], [EVIL, 1.0]],
            "bottom_logits": [[" Boston", -1.5]],
            "examples": [{**example, "quantile": "top"}] * 2 + [{**example, "quantile": "0.5-0.75"}] * 5,
            "connected": [{"layer": self.layer, "feature": 1, "weight": -0.25}],
        }


class Records:
    """A source of features that knows all of them, or all of some layers."""

    def __init__(self, layers: range = range(100)) -> None:
        self.layers = layers

    def get(self, layer: int, feature: int) -> Record | None:
        return Record(layer, feature) if layer in self.layers else None


def large_graph(n_features: int, n_edges: int, n_layers: int = 18, n_pos: int = 32, seed: int = 0) -> AttributionGraph:
    """A graph of so many features and about so many edges, at random, from lower layers to higher."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, n: int) -> torch.Tensor:
        return torch.randint(high, (n,), generator=generator)

    def part(kind: NodeKind, layer: torch.Tensor, pos: torch.Tensor, index: torch.Tensor):
        return kind, layer, pos, index, torch.rand(len(layer), generator=generator) + 0.5

    n_errors = n_layers * n_pos
    places = torch.arange(n_errors)
    every = torch.arange(n_pos)
    nodes = Nodes.build(
        [
            part(NodeKind.FEATURE, draw(n_layers, n_features), draw(n_pos, n_features), torch.arange(n_features)),
            part(NodeKind.ERROR, places // n_pos, places % n_pos, torch.zeros_like(places)),
            part(NodeKind.TOKEN, torch.full((n_pos,), -1), every, every),
            part(NodeKind.LOGIT, torch.full((5,), n_layers), torch.full((5,), n_pos - 1), torch.arange(5)),
        ]
    )
    n = len(nodes)
    targets = torch.cat([torch.arange(n_features), torch.arange(n - 5, n)])
    target = targets[draw(len(targets), n_edges)]
    # From errors and features of lower layers, and from tokens.
    source = draw(n - 5, n_edges)
    above = torch.where(nodes.is_kind(NodeKind.LOGIT), n_layers, nodes.layer)
    upwards = nodes.layer[source] < above[target]
    pairs = torch.unique(torch.stack([target[upwards], source[upwards]], dim=1), dim=0)
    weight = torch.randn(len(pairs), generator=generator) * torch.rand(len(pairs), generator=generator) ** 2
    return AttributionGraph(
        nodes=nodes,
        adjacency=build_adjacency(EdgeList(pairs[:, 0], pairs[:, 1], weight), n, sparse=True),
        expanded=torch.ones(n, dtype=torch.bool),
        tokens=every,
        prompt_tokens=[f" word{i}" for i in range(n_pos)],
        logit_tokens=[f" out{i}" for i in range(5)],
        logit_probs=torch.tensor([0.5, 0.2, 0.1, 0.1, 0.05]),
        info={"n_layers": n_layers, "prompt": "".join(f" word{i}" for i in range(n_pos))},
    )
