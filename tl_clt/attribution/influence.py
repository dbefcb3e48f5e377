"""Influence and scores (Methods, "Graph Pruning" and "Evaluating Graphs"), and what is known of them.

A = |adjacency| with each row divided by its sum; influence = w (A + A^2 + ...) with w the target weights (logit
probabilities). Edges run from lower to higher layers only, so that the series is one pass from the top layer down.

With w summing to 1, a node's influence is the probability that a walk from the targets upstream, along edges drawn by
their share of each node's input, visits it. A reduced graph does not keep every edge: of features that were not traced
it has no row, and of other nodes what `keep_edges` dropped or pruning cut is known by its size alone, which counts in
the row's sum. A walk that goes there is lost: it ends, for this graph, at the node it went from. The walks that are not
lost are those of the whole graph, so with u the share of walks lost,

    influence here <= influence in the whole graph <= influence here + u,

and what else is made of walks is bounded by what lost walks could do: each ends once, at a token, an error or another
leaf, and from a node of layer l it visits at most l further features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Int
from pandas import DataFrame
from torch import Tensor

from tl_clt.arguments import as_choice
from tl_clt.attribution.edges import NodeKind, Nodes, WeightedGraph, pass_upstream, sum_inputs_from, sum_rows
from tl_clt.report import as_html
from tl_clt.shapes import NodeValues

Definition = Literal["paper", "circuit-tracer"]
SMALLEST_ROW_SUM = 1e-8


class Bounds(NamedTuple):
    """Between these lies the whole graph's number. Alike where nothing is unknown."""

    low: float
    high: float


class _TwoScores(NamedTuple):
    replacement: float
    """Share of influence that starts at tokens rather than errors."""
    completeness: float
    """Share of inputs, weighted by the receiving node's influence, that come from features or tokens."""


class GraphScores(_TwoScores):
    """How much of a graph is explained by features: two numbers, with their bounds. Never compare across definitions.

    The numbers are those of what the graph keeps: what is unknown stays out of numerator and denominator. The bounds
    count it as error (low) and as explained (high); the whole graph's scores lie between them, and so do the numbers.
    """

    replacement_bounds: Bounds
    completeness_bounds: Bounds

    def __new__(
        cls, replacement: float, completeness: float, replacement_bounds: Bounds, completeness_bounds: Bounds
    ) -> GraphScores:
        scores = super().__new__(cls, replacement, completeness)
        scores.replacement_bounds, scores.completeness_bounds = replacement_bounds, completeness_bounds
        return scores

    def __getnewargs__(self) -> tuple:
        return (*self, self.replacement_bounds, self.completeness_bounds)

    def __repr__(self) -> str:
        return f"GraphScores(replacement={self.replacement_text(4)}, completeness={self.completeness_text(4)})"

    def _repr_html_(self) -> str:
        texts = [self.replacement_text(4), self.completeness_text(4)]
        return as_html("Scores of a graph", {"": DataFrame({"score": self._fields, "value": texts})})

    def replacement_text(self, digits: int = 3) -> str:
        """The number, with its bounds where these differ."""
        return _text(self.replacement, self.replacement_bounds, digits)

    def completeness_text(self, digits: int = 3) -> str:
        """The number, with its bounds where these differ."""
        return _text(self.completeness, self.completeness_bounds, digits)


def _text(number: float, bounds: Bounds, digits: int) -> str:
    text = f"{number:.{digits}f}"
    return text if bounds.low == bounds.high else f"{text} [{bounds.low:.{digits}f} to {bounds.high:.{digits}f}]"


class InfluenceShares(NamedTuple):
    """Share of the influence by where walks end; they sum to 1."""

    token: float
    error: float
    position: float
    bias: float
    unexplored: float
    """At features whose in-edges were not traced."""
    dropped: float = 0.0
    """At edges that the graph does not keep: dropped by `keep_edges`, or cut by pruning."""

    def _repr_html_(self) -> str:
        shares = DataFrame({"where walks end": self._fields, "share": list(self)})
        return as_html("Shares of a graph's influence", {"": shares})


class Walks(NamedTuple):
    """How often walks visit each node, where as many walks begin at the targets as w sums to."""

    inputs: NodeValues
    """Each node's absolute input, which the shares of its in-edges are taken of."""
    influence: NodeValues
    """w (A + A^2 + ...): visits of each node on the way upstream."""
    output: NodeValues
    """influence + w: visits, the start included."""
    lost: NodeValues
    """The part of `output` that goes on along edges which the graph does not keep."""
    unknown_visits: float
    """How many further nodes lost walks visit at most."""


def sum_inputs(graph: WeightedGraph) -> NodeValues:
    """Each node's absolute input, edges that are not kept included; never quite 0."""
    sums = sum_rows(graph.adjacency)
    return (sums if graph.dropped is None else sums + graph.dropped).clamp_min(SMALLEST_ROW_SUM)


def top_down(nodes: Nodes) -> Iterator[Int[Tensor, " n"]]:
    """Nodes with inputs, so that each comes before all that writes to it: targets, then features by layer."""
    yield nodes.where(NodeKind.LOGIT)
    features = nodes.where(NodeKind.FEATURE)
    layers = nodes.layer[features]
    for layer in sorted(layers.unique().tolist(), reverse=True):
        yield features[layers == layer]


def walk_upstream(graph: WeightedGraph) -> Walks:
    """Walks from the targets upstream, and where they are lost: along edges that are not kept, at untraced features."""
    nodes, weights, sums = graph.nodes, graph.logit_weights, sum_inputs(graph)
    influence = torch.zeros_like(weights)
    for rows in top_down(nodes):
        influence += pass_upstream(graph.adjacency, rows, (influence[rows] + weights[rows]) / sums[rows])
    output, unknown = influence + weights, _unknown_shares(graph, sums)
    lost = output * unknown
    visits = 0.0
    if bool(lost.any()):
        most = nodes.layer.clamp_min(0) + 1 if graph.lacks_nodes else _most_visits(graph, sums, unknown)
        visits = float((lost.double() * most).sum())
    return Walks(sums, influence, output, lost, visits)


def _most_visits(graph: WeightedGraph, sums: NodeValues, unknown: NodeValues) -> NodeValues:
    """For each node, how many nodes a walk visits at most, on average, once it leaves the node by an unknown edge.

    Layers are taken from the lowest up. At worst, an unknown edge leads to the node of a lower layer from which most
    visits are expected: those along the edges that it keeps and, where it has unknown ones, again the worst case.
    """
    features, layers = graph.nodes.is_kind(NodeKind.FEATURE), graph.nodes.layer.clamp_min(0)
    # A walk ends at one leaf; features into which nothing comes count as if there were one behind them.
    dead_end = features & (sums <= SMALLEST_ROW_SUM) & (unknown == 0)
    expected = torch.ones_like(sums) + dead_end
    most, best = torch.ones_like(sums), 1.0
    for layer in layers.unique().tolist():
        at = layers == layer
        most[at] = best
        here = torch.nonzero(features & at).flatten()
        if len(here):
            along_edges = sum_inputs_from(graph.adjacency, here, expected) / sums[here]
            expected[here] += along_edges + unknown[here] * best
            best = max(best, float(expected[here].amax()))
    return most


def _unknown_shares(graph: WeightedGraph, sums: NodeValues) -> NodeValues:
    """The share of each node's input that the graph does not know."""
    unknown = torch.zeros_like(sums) if graph.dropped is None else graph.dropped / sums
    return unknown.masked_fill(graph.untraced, 1.0)


class InfluenceBounds(NamedTuple):
    """Between these lies each node's influence in the whole graph."""

    low: NodeValues
    high: NodeValues


def bound_influence(graph: WeightedGraph) -> InfluenceBounds:
    """Between which values each node's influence in the whole graph lies."""
    walks = walk_upstream(graph)
    most = (walks.influence + walks.lost.sum()).minimum(graph.logit_weights.sum())
    return InfluenceBounds(walks.influence, most.maximum(walks.influence))


def share_influence(graph: WeightedGraph) -> InfluenceShares:
    """Where walks upstream along normalised edges end, by kind."""
    walks, nodes, untraced = walk_upstream(graph), graph.nodes, graph.untraced
    kinds = (NodeKind.TOKEN, NodeKind.ERROR, NodeKind.POSITION, NodeKind.BIAS)
    shares = [float(walks.influence[nodes.is_kind(kind)].sum()) for kind in kinds]
    shares += [float(walks.lost[untraced].sum()), float(walks.lost[~untraced].sum())]
    whole = sum(shares) or 1.0
    return InfluenceShares(*(share / whole for share in shares))


def score_graph(graph: WeightedGraph, definition: Definition) -> GraphScores:
    """Replacement and completeness (Methods, "Evaluating Graphs"), with bounds.

    With T and E the influence of tokens and errors, o = influence + w, D = sum_t o_t, and u the walks lost:

        replacement  = T / (T + E)       from T / (T + E + u) to (T + u) / (T + E + u)
        completeness = 1 - E / (D - u)   from 1 - (E + u) / D to 1 - E / (D + further visits of lost walks)

    which is sum_t o_t (1 - A[t, errors]) / sum_t o_t, since sum_t o_t A[t, errors] = E, over the inputs that are known.
    "paper" sums over nodes that have inputs (features and logits), "circuit-tracer" over all, leaves included, which
    flatters.
    """
    definition = as_choice("definition", definition, get_args(Definition))
    walks, nodes = walk_upstream(graph), graph.nodes
    output = walks.output.double()
    counts = nodes.is_kind(NodeKind.FEATURE, NodeKind.LOGIT) if definition == "paper" else torch.ones_like(output)
    token = float(output[nodes.is_kind(NodeKind.TOKEN)].sum())
    error = float(output[nodes.is_kind(NodeKind.ERROR)].sum())
    counted, lost = float((output * counts).sum()), float(walks.lost.double().sum())
    further = walks.unknown_visits
    # A lost walk ends at a leaf, which circuit-tracer counts and the paper does not.
    at_least, at_most = (0.0, further - lost) if definition == "paper" else (lost, further)
    return GraphScores(
        _share(token, token + error),
        1 - _share(error, counted - lost),
        Bounds(_share(token, token + error + lost), _share(token + lost, token + error + lost)),
        Bounds(1 - _share(error + lost, counted + at_least), 1 - _share(error, counted + at_most)),
    )


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


class PathLength(NamedTuple):
    """Mean number of edges on a path from a token to a logit, each path weighted by its strength."""

    mean: float
    """Of the paths that the graph keeps."""
    bounds: Bounds
    """Of the whole graph's mean."""


def measure_path_length(graph: WeightedGraph) -> PathLength:
    """Mean number of edges on a path from a token to a logit, each path weighted by its strength.

    With P_l the tokens' sum of w (A + ... + A^l): sum_l l (P_l - P_{l-1}) / P_inf; 0 where no path leads to a token.
    A lost walk may end at a token after 1 edge in all at least, and n_layers + 1 at most.
    """
    nodes, weights, sums = graph.nodes, graph.logit_weights, sum_inputs(graph)
    tokens = nodes.is_kind(NodeKind.TOKEN)
    every = torch.arange(len(nodes), device=weights.device)
    unknown = _unknown_shares(graph, sums)
    at, steps, whole, weighted, lost = weights, 0, 0.0, 0.0, 0.0
    while bool((at > 0).any()):
        lost += float((at * unknown).sum())
        at, steps = pass_upstream(graph.adjacency, every, at / sums), steps + 1
        arrived = float(at[tokens].sum())
        whole, weighted = whole + arrived, weighted + steps * arrived
    longest = int(nodes.layer.max()) + 1
    # Where no path is known to lead to a token, the whole graph's mean may be the 0 that stands for none.
    low = (weighted + lost) / (whole + lost) if whole > 0 else 0.0
    return PathLength(_share(weighted, whole), Bounds(low, _share(weighted + longest * lost, whole + lost)))
