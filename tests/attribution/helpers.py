"""What several tests of attribution share: prompts, random graphs, definitions that are written out, comparisons."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from tl_clt import AttributionGraph, NodeKind, attribute
from tl_clt.attribution.edges import EdgeList, Nodes, build_adjacency

TOKENS = torch.tensor([0, 7, 19, 4, 33, 50, 21])
EIGHT_TOKENS = torch.tensor([0, 7, 19, 4, 33, 50, 21, 8])
N_LAYERS, POS, PER_LAYER = 4, 5, 12
ROUNDING = 1e-12
"""Sums of at most a hundred float64 numbers up to 10."""


def normalised(adjacency: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """A of the Methods: |adjacency| with each row divided by its sum."""
    return adjacency.abs() / adjacency.abs().sum(dim=1, keepdim=True).clamp_min(1e-8)


def assert_engines_agree(model, clt, tokens=EIGHT_TOKENS, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast = attribute(model, clt, tokens, engine="sweep", **options)
    clear = attribute(model, clt, tokens, engine="autograd", **options)
    assert fast.info["engine"] == "sweep" and clear.info["engine"] == "autograd"
    assert torch.equal(fast.nodes.index, clear.nodes.index)
    assert torch.equal(fast.expanded, clear.expanded)
    largest = clear.adjacency.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)
    assert ((fast.adjacency - clear.adjacency).abs() / largest).max() < 1e-9
    return fast


def random_graph(seed: int) -> AttributionGraph:
    """A whole graph with edges of very different sizes from lower to higher layers; some nodes have no inputs."""
    generator = torch.Generator().manual_seed(seed)

    def part(kind: NodeKind, layers: list[int], pos: list[int]) -> tuple[NodeKind, Tensor, Tensor, Tensor, Tensor]:
        layer = torch.tensor(layers)
        return kind, layer, torch.tensor(pos), torch.arange(len(layer)), torch.ones(len(layer), dtype=torch.float64)

    inner = [layer for layer in range(N_LAYERS) for _ in range(PER_LAYER)]
    places = [(layer, pos) for layer in range(N_LAYERS) for pos in range(POS)]
    nodes = Nodes.build(
        [
            part(NodeKind.FEATURE, inner, [i % POS for i in range(len(inner))]),
            part(NodeKind.ERROR, [layer for layer, _ in places], [pos for _, pos in places]),
            part(NodeKind.TOKEN, [-1] * POS, list(range(POS))),
            part(NodeKind.BIAS, list(range(N_LAYERS + 1)), [-1] * (N_LAYERS + 1)),
            part(NodeKind.LOGIT, [N_LAYERS] * 3, [POS - 1] * 3),
        ]
    )
    n = len(nodes)
    sizes = torch.randn(n, n, generator=generator, dtype=torch.float64).exp().pow(1.5)
    signs = torch.randn(n, n, generator=generator, dtype=torch.float64).sign()
    has_inputs = nodes.is_kind(NodeKind.FEATURE, NodeKind.LOGIT)
    below = (nodes.layer[:, None] > nodes.layer[None]) & ~nodes.is_kind(NodeKind.LOGIT)[None] & has_inputs[:, None]
    present = torch.rand(n, n, generator=generator) < 0.6
    adjacency = sizes * signs * below * present
    adjacency[nodes.where(NodeKind.FEATURE)[3::17]] = 0
    return AttributionGraph(
        nodes=nodes,
        adjacency=adjacency,
        expanded=has_inputs,
        tokens=torch.arange(POS),
        prompt_tokens=[f" {i}" for i in range(POS)],
        logit_probs=torch.tensor([0.5, 0.2, 0.1], dtype=torch.float64),
        logit_tokens=["a", "b", "c"],
        info={"n_layers": N_LAYERS},
    )


def hold_strongest(graph: AttributionGraph, share: float) -> AttributionGraph:
    """As `keep_edges` would have traced it."""
    sizes = graph.adjacency.abs()
    ordered = sizes.sort(dim=1, descending=True)
    before = ordered.values.cumsum(dim=1) - ordered.values
    enough = (before < share * ordered.values.sum(dim=1, keepdim=True)) & (ordered.values > 0)
    kept = torch.zeros_like(enough).scatter_(1, ordered.indices, enough)
    row, col = torch.nonzero(kept, as_tuple=True)
    edges = EdgeList(row, col, graph.adjacency[row, col])
    dropped = (sizes * ~kept).sum(dim=1)
    return replace(graph, adjacency=build_adjacency(edges, len(graph.nodes), sparse=True), dropped=dropped)


def leave_untraced(graph: AttributionGraph, n_traced: int) -> AttributionGraph:
    """As `max_feature_nodes` would have traced it."""
    features = graph.nodes.where(NodeKind.FEATURE)
    rest = features[graph.influence()[features].argsort(descending=True)][n_traced:]
    adjacency, expanded = graph.adjacency.clone(), graph.expanded.clone()
    adjacency[rest], expanded[rest] = 0, False
    return replace(graph, adjacency=adjacency, expanded=expanded)


def names(graph: AttributionGraph) -> list[tuple]:
    nodes = graph.nodes
    return list(zip(*(x.tolist() for x in (nodes.kind, nodes.layer, nodes.pos, nodes.index)), strict=True))


def places_in(graph: AttributionGraph, part: AttributionGraph) -> Tensor:
    """Where the nodes of a part stand in the whole."""
    at = {name: i for i, name in enumerate(names(graph))}
    return torch.tensor([at[name] for name in names(part)])


def assert_within_bounds(whole: AttributionGraph, part: AttributionGraph) -> None:
    at = places_in(whole, part)
    true, ours, bounds = whole.influence()[at], part.influence(), part.influence_bounds()
    assert (bounds.low == ours).all()
    assert (ours <= true + ROUNDING).all() and (true <= bounds.high + ROUNDING).all()
    assert ((true - ours) / whole.logit_probs.sum() <= part.unexplored + ROUNDING).all()
    for definition in ("paper", "circuit-tracer"):
        wanted, found = whole.scores(definition), part.scores(definition)
        for score in ("replacement", "completeness"):
            low, high = getattr(found, f"{score}_bounds")
            assert 0 <= low <= high <= 1
            assert low - ROUNDING <= getattr(wanted, score) <= high + ROUNDING
            assert low - ROUNDING <= getattr(found, score) <= high + ROUNDING
    low, high = part.path_length_bounds()
    assert low - ROUNDING <= whole.path_length() <= high + ROUNDING
    assert low - ROUNDING <= part.path_length() <= high + ROUNDING
    assert sum(part.shares()) == pytest.approx(1)
