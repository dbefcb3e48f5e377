"""Which features of a graph to test: some of every stratum of influence, and matched controls."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from tl_clt.attribution import AttributionGraph, NodeKind

STRATA = (0.5, 0.8, 0.95, 1.0)
"""Strata end where the most influential features together carry these shares of all features' influence."""

ALIKE = 3
"""Controls are drawn from this many features of the most similar activation."""


class Sample(NamedTuple):
    """Feature nodes to test, controls after the rest."""

    node: Int[Tensor, " n_sources"]
    stratum: Int[Tensor, " n_sources"]
    """0 the most influential."""
    control_of: Int[Tensor, " n_sources"]
    """The node that a control stands beside; -1 for the others. One control may stand beside several."""


def sample_features(graph: AttributionGraph, n_features: int | None, seed: int) -> Sample:
    """Draw features of a graph, as many of each stratum as there are to be had, and controls.

    Each feature drawn from the first stratum has a control: a random one of the three other features, whatever their
    influence, with the most similar activation at its layer and position, or, where there are fewer, at its layer.

    Args:
        graph: of which nodes with some influence count.
        n_features: how many to draw, controls not counted; None for all.
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    influence = graph.influence().cpu()
    everything = graph.nodes.where(NodeKind.FEATURE).cpu()
    features = everything[influence[everything].argsort(descending=True)]
    features = features[influence[features] > 0]
    stratum = _strata(influence[features].double())
    chosen = _draw(stratum, len(features) if n_features is None else n_features, generator)
    tested = features[chosen]
    top = tested[stratum[chosen] == 0]
    pairs = [(c, int(n)) for n in top if (c := _control(graph, everything, int(n), generator)) is not None]
    stratum_of = dict(zip(features.tolist(), stratum.tolist(), strict=True))
    nodes = [*tested.tolist(), *(c for c, _ in pairs)]
    return Sample(
        torch.tensor(nodes, dtype=torch.long),
        torch.tensor([stratum_of.get(n, len(STRATA) - 1) for n in nodes], dtype=torch.long),
        torch.tensor([-1] * len(tested) + [n for _, n in pairs], dtype=torch.long),
    )


def _strata(influence: Tensor) -> Int[Tensor, " n"]:
    """The stratum of each feature, of influences in falling order."""
    before = (influence.cumsum(0) - influence) / influence.sum().clamp_min(torch.finfo(influence.dtype).tiny)
    return torch.bucketize(before, torch.tensor(STRATA[:-1], dtype=influence.dtype), right=True)


def _draw(stratum: Tensor, n_features: int, generator: torch.Generator) -> Int[Tensor, " n_drawn"]:
    """Places of as many of each stratum as there are to be had; what small ones lack is made up by the next."""
    drawn: list[Tensor] = []
    left = n_features
    by_size = sorted(range(len(STRATA)), key=lambda s: int((stratum == s).sum()))
    for strata_left, s in zip(range(len(STRATA), 0, -1), by_size, strict=True):
        members = torch.nonzero(stratum == s).flatten()
        take = min(len(members), left // strata_left)
        drawn.append(members[torch.randperm(len(members), generator=generator)[:take]])
        left -= take
    return torch.cat(drawn).sort().values


def _control(graph: AttributionGraph, features: Tensor, node: int, generator: torch.Generator) -> int | None:
    """A random one of the `ALIKE` most like a node."""
    layer, pos, activation = (x.cpu() for x in (graph.nodes.layer, graph.nodes.pos, graph.nodes.activation))
    others = features[(layer[features] == layer[node]) & (features != node)]
    here = others[pos[others] == pos[node]]
    candidates = here if len(here) >= ALIKE else others
    if len(candidates) == 0:
        return None
    alike = candidates[(activation[candidates] - activation[node]).abs().argsort()[:ALIKE]]
    return int(alike[torch.randint(len(alike), (1,), generator=generator)])
