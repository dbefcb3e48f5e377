"""Supernodes: features of a graph that take from the same nodes and give to the same, taken together.

Each feature i has two profiles over all nodes of the graph. With E the edges, I_t the absolute input of a node, and
o_t = influence_t + w_t its visits (see `influence`),

    in_i(s)  = E[i, s] / I_i                 what i is made of, as shares of its input
    out_i(t) = sqrt(o_t) E[t, i] / I_t       what it does, as shares of the input of others, by how much these matter

so that a feature's size does not count. (With o_t in place of its root a graph's one target outweighs all features, and
profiles say only whether a feature reaches it; with no weight, features that nothing depends on count in full.) Unless
`signed`, profiles are of |E|: where a variable has a feature for each of its values, what speaks for one speaks against
another, and signs part what belongs together. With signs, features that push an answer up and down are apart. Two
features are alike by the mean cosine of their profiles, to which the caller may add what they respond to. Groups are
made by average linkage, so that members are alike on average, and no chain of pairs joins two groups.

Between groups, as between nodes, edges are shares of input, averaged over the members of the target by their visits:

    share(G -> H) = sum_{t in H} v_t sum_{s in G} |E[t, s]| / I_t          v_t = o_t / sum_{u in H} o_u

With these weights the collapsed graph is the graph: influence computed from it, w (S + S^2 + ...), is for each group
the sum of its members' influence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from pandas import DataFrame
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from tl_clt.arguments import as_share, as_switch, as_whole, has_values, is_whole, plain, shown
from tl_clt.attribution.edges import (
    EdgeList,
    Node,
    NodeKind,
    build_adjacency,
    list_all_edges,
    take_rows,
)
from tl_clt.attribution.graph import AttributionGraph
from tl_clt.attribution.influence import Definition, GraphScores, score_graph, walk_upstream
from tl_clt.errors import ConfigError
from tl_clt.report import as_html

APART = 4.0
"""Distance of features at different positions: more than the 2 of opposite ones."""
OTHERS = {
    NodeKind.FEATURE: "other features",
    NodeKind.ERROR: "errors",
    NodeKind.POSITION: "positions",
    NodeKind.BIAS: "biases",
}
"""Nodes of a collapsed graph that stand for all nodes of a kind that are in no group."""
Responses = Float[Tensor, "n_features n"] | Sequence[str]
Features = Bool[Tensor, " n_nodes"] | Int[Tensor, " n"] | Iterable[int | Node]
"""Feature nodes: a mask of all nodes, of which the features count, or numbers, or nodes."""
Profiles = Float[Tensor, "n_chosen width"]


@dataclass(frozen=True)
class Supernodes(Mapping[str, tuple[int, ...]]):
    """Groups of a graph's feature nodes by name, each node in one at most: a mapping from names to numbers of nodes.

    `save_neuronpedia(graph, path, supernodes=...)` takes it as it is, and so do all that take groups made by hand.
    """

    names: tuple[str, ...]
    """Of the groups, each once."""

    members: tuple[tuple[int, ...], ...]
    """Numbers of each group's nodes, in order."""

    def __getitem__(self, name: str) -> tuple[int, ...]:
        return dict(zip(self.names, self.members, strict=True))[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name!r}: {len(nodes)}" for name, nodes in self.items())
        return f"Supernodes({sum(map(len, self.members))} nodes in {len(self)} groups; {sizes:.100})"

    @property
    def nodes(self) -> list[int]:
        """Numbers of the nodes of all groups together: the subgraph."""
        return sorted(number for group in self.members for number in group)


def as_supernodes(graph: object, groups: object) -> Supernodes:
    """Groups of a graph's features, however they were made.

    Raises:
        ConfigError: it is no AttributionGraph, the groups are no mapping of names to nodes, or a node is no feature, in
            no graph or in two groups.
    """
    if not isinstance(graph, AttributionGraph):
        raise ConfigError(f"The graph is {shown(graph)}: give an AttributionGraph, as `attribute` returns.")
    if not isinstance(groups, Mapping) or not groups or not all(isinstance(name, str) for name in groups):
        raise ConfigError(f"supernodes is {shown(groups)}: give a mapping of names to lists of nodes, one at least.")
    members = [as_feature_nodes(graph, f"supernodes[{name!r:.40}]", nodes) for name, nodes in groups.items()]
    for name, nodes in zip(groups, members, strict=True):
        if not nodes:
            raise ConfigError(f"Supernode {name!r:.40} has no nodes: give each at least one, or leave it out.")
    numbers = [number for nodes in members for number in nodes]
    if len(set(numbers)) < len(numbers):
        twice = next(number for number in numbers if numbers.count(number) > 1)
        raise ConfigError(f"Node {twice} is in supernodes twice: a node has one group at most.")
    return Supernodes(tuple(groups), tuple(tuple(sorted(nodes)) for nodes in members))


def as_feature_nodes(graph: AttributionGraph, name: str, chosen: Any) -> list[int]:
    """Numbers of feature nodes, from numbers, nodes, or a mask of all nodes.

    Raises:
        ConfigError: a number is of no feature, or a mask is of another graph.
    """
    n_nodes = len(graph.nodes)
    if isinstance(chosen, Tensor) and has_values(chosen) and chosen.dtype == torch.bool:
        if chosen.shape != (n_nodes,):
            raise ConfigError(
                f"{name} is a mask of shape {list(chosen.shape)}, and the graph has {n_nodes} nodes: give a mask of"
                " this graph's own nodes. Pruning numbers them anew, so that masks of the whole graph are not of the"
                " pruned one."
            )
        chosen = torch.nonzero(chosen & graph.nodes.is_kind(NodeKind.FEATURE).to(chosen.device)).flatten()
    if isinstance(chosen, (Tensor, np.ndarray)):
        chosen = chosen.tolist() if not isinstance(chosen, Tensor) or has_values(chosen) else None
    if not isinstance(chosen, Iterable) or isinstance(chosen, (str, bytes, Mapping)):
        raise ConfigError(f"{name} is {shown(chosen)}: give feature nodes of the graph, or their numbers, in a list.")
    numbers = []
    for node in chosen:
        number = plain(graph.nodes.number_of(node, ConfigError))
        if not is_whole(number) or not -n_nodes <= number < n_nodes:
            raise ConfigError(f"{name} has {shown(node)}: give numbers of nodes, which are 0 to {n_nodes - 1}.")
        kind = NodeKind(int(graph.nodes.kind[number]))
        if kind != NodeKind.FEATURE:
            raise ConfigError(
                f"{name} has node {number}, of kind {kind.name.lower()}: give feature nodes"
                " (graph.nodes.where(NodeKind.FEATURE) has their numbers)."
            )
        numbers.append(int(number) % n_nodes)
    return numbers


def find_supernodes(
    graph: AttributionGraph,
    among: Features | None = None,
    *,
    n_groups: int | None = None,
    similarity: float = 0.5,
    signed: bool = False,
    responses: Responses | None = None,
    response_weight: float = 0.5,
    across_positions: bool = False,
) -> Supernodes:
    """Group a graph's features by what they take and give, and by what they respond to (see the module).

    Time and memory grow with the square of the features grouped: prune first, or name those that pruning keeps, with
    `among=graph.prune_masks().nodes`, for groups in the numbering of the whole graph.

    Args:
        graph: whole, reduced or pruned. Features that were not traced are grouped by what they give alone.
        among: which feature nodes to group: their numbers, or a mask of all nodes; None for all.
        n_groups: as many groups, or fewer where some are equally alike; None for as many as `similarity` leaves.
        similarity: groups are joined as long as their members are alike by this on average, from 0 to 1.
        signed: whether signs of edges count (see the module), or their sizes alone.
        responses: of each feature of the graph (in the order of `graph.nodes.where(NodeKind.FEATURE)`) a vector,
            its activations over some text for example, compared by cosine; or a label, which are alike where they are
            equal, and name the groups.
        response_weight: how much responses count beside the profiles, from 0 to 1.
        across_positions: whether a group may have features of several positions.

    Returns:
        Groups, that of most influence first, named by the token, or label, of the member of most influence.

    Raises:
        ConfigError: an argument out of range, responses that are not one for each feature, or no feature to group.
    """
    if not isinstance(graph, AttributionGraph):
        raise ConfigError(f"The graph is {shown(graph)}: give an AttributionGraph, as `attribute` returns.")
    features = graph.nodes.where(NodeKind.FEATURE)
    numbers = features.tolist() if among is None else sorted(set(as_feature_nodes(graph, "among", among)))
    if not numbers:
        raise ConfigError("There is no feature to group: the graph, or what was named of it, has none.")
    chosen = torch.tensor(numbers, device=features.device)
    across = as_switch("across_positions", across_positions)
    pos = graph.nodes.pos[chosen]
    least = 1 if across else len(pos.unique())
    n_groups = as_whole("n_groups", n_groups, least, why="one for each position", none="what `similarity` leaves")
    similarity = as_share("similarity", similarity, zero=True)
    weight = as_share("response_weight", response_weight, zero=True)
    signed = as_switch("signed", signed)
    parts = [(0.5, part if signed else part.abs()) for part in _profiles(graph, chosen)]
    labels = None
    if responses is not None:
        labels, vectors = _as_responses(responses, len(features))
        row_of = {number: row for row, number in enumerate(features.tolist())}
        rows = [row_of[number] for number in numbers]
        parts = [((1 - weight) * share, part) for share, part in parts] + [(weight, vectors[rows])]
        labels = None if labels is None else [labels[row] for row in rows]
    alike = sum(share * (unit := _unit(part.cpu())) @ unit.T for share, part in parts)
    distances = (1 - torch.as_tensor(alike)).clamp(0, 2)
    if not across:
        distances[(pos[:, None] != pos).cpu()] = APART
    assigned = _cluster(distances.numpy(), n_groups, similarity)
    influence = graph.influence()[chosen].cpu()
    groups = [np.flatnonzero(assigned == group) for group in np.unique(assigned)]
    groups.sort(key=lambda rows: -float(influence[rows].sum()))
    words = [_word(graph, number) for number in numbers] if labels is None else labels
    names = [words[int(rows[int(influence[rows].argmax())])] for rows in groups]
    return Supernodes(tuple(_tell_apart(names)), tuple(tuple(numbers[row] for row in rows) for rows in groups))


def _profiles(graph: AttributionGraph, chosen: Int[Tensor, " n"]) -> tuple[Profiles, Profiles]:
    """in and out of each of some features."""
    walks = walk_upstream(graph)
    into = take_rows(graph.adjacency, chosen).double() / walks.inputs[chosen, None]
    row, col, value = list_all_edges(graph.adjacency)
    place = torch.full((len(graph.nodes),), -1, device=chosen.device)
    place[chosen] = torch.arange(len(chosen), device=chosen.device)
    ours = place[col] >= 0
    row, col, value = row[ours], place[col[ours]], value[ours].double()
    out = into.new_zeros(len(chosen), len(graph.nodes))
    out[col, row] = value * (walks.output.sqrt() / walks.inputs)[row]
    return into, out


def _unit(rows: Profiles) -> Profiles:
    """Each row at length 1; rows of zeros, which are like nothing, stay."""
    rows = rows.double()
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-30)


def _as_responses(responses: Any, n_features: int) -> tuple[list[str] | None, Profiles]:
    """Labels, where it is such that were given, and vectors: of labels, one coordinate for each different one."""
    wanted = f"give a tensor [{n_features}, n] of finite numbers or {n_features} labels, one for each feature node"
    vectors: Any = responses
    labels: list[str] | None = None
    if isinstance(responses, (list, tuple)) and responses and all(isinstance(label, str) for label in responses):
        labels, at = list(responses), {label: i for i, label in enumerate(dict.fromkeys(responses))}
        vectors = torch.eye(len(at), dtype=torch.float64)[[at[label] for label in labels]]
    else:
        ok = (
            isinstance(responses, Tensor)
            and has_values(responses)
            and responses.is_floating_point()
            and responses.ndim == 2
        )
        if not (ok and bool(torch.isfinite(vectors).all())):
            raise ConfigError(f"responses is {shown(responses)}: {wanted}.")
    if len(vectors) != n_features:
        raise ConfigError(f"responses has {len(vectors)} entries for {n_features} features: {wanted}.")
    return labels, vectors.detach()


def _cluster(distances: np.ndarray, n_groups: int | None, similarity: float) -> np.ndarray:
    """The group of each, by average linkage."""
    if len(distances) == 1:
        return np.ones(1, dtype=int)
    symmetric = (distances + distances.T) / 2
    np.fill_diagonal(symmetric, 0)
    tree = linkage(squareform(symmetric, checks=False), method="average")
    if n_groups is not None:
        return fcluster(tree, n_groups, "maxclust")
    # A hair more, so that equal profiles are one at a similarity of 1, whatever their cosine's rounding.
    return fcluster(tree, 1 - similarity + 1e-9, "distance")


def _word(graph: AttributionGraph, number: int) -> str:
    pos = int(graph.nodes.pos[number])
    return graph.prompt_tokens[pos].strip() or f"position {pos}"


def _tell_apart(names: list[str]) -> list[str]:
    """The names, with numbers where one is there already."""
    found: list[str] = []
    for name in names:
        unique, n = name, 1
        while unique in found:
            n += 1
            unique = f"{name} {n}"
        found.append(unique)
    return found


# -- the collapsed graph


class CollapsedGraph(NamedTuple):
    """A graph with groups in place of their members."""

    nodes: DataFrame
    """One row a group, token and output, and one for all else of each kind ("other features", "errors", "positions",
    "biases"): name, kind ("group", or the kind of nodes), n_nodes, influence (of all of them together)."""

    edges: DataFrame
    """One row a pair with edges between them: source, target (rows of `nodes`), label, share (of the target's input,
    see the module; with what the graph does not keep, those of each target sum to 1), signed (the same with the signs
    of edges), weight (the sum of the edges, which viewers draw), n_edges."""

    def __repr__(self) -> str:
        n_groups = int((self.nodes["kind"] == "group").sum())
        return f"CollapsedGraph({n_groups} groups among {len(self.nodes)} nodes, {len(self.edges)} edges)"

    def _repr_html_(self) -> str:
        return as_html(repr(self), {"nodes": self.nodes, "edges": self.edges})


def collapse(graph: AttributionGraph, supernodes: Mapping[str, Iterable[int | Node]]) -> CollapsedGraph:
    """The graph with each group as one node.

    Args:
        graph: any.
        supernodes: of its features, as `find_supernodes` gives them or by hand.

    Raises:
        ConfigError: the groups are not of this graph's features.
    """
    groups = as_supernodes(graph, supernodes)
    nodes, walks = graph.nodes, walk_upstream(graph)
    station = torch.full((len(nodes),), -1)
    names, kinds = list(groups.names), ["group"] * len(groups)
    for number, members in enumerate(groups.members):
        station[list(members)] = number
    labels = nodes.labels or [f"node {i}" for i in range(len(nodes))]
    for kind in (NodeKind.TOKEN, NodeKind.LOGIT):
        for node in nodes.where(kind).tolist():
            station[node] = len(names)
            names, kinds = [*names, labels[node]], [*kinds, kind.name.lower()]
    for kind, name in OTHERS.items():
        rest = (station < 0) & nodes.is_kind(kind).cpu()
        if bool(rest.any()):
            station[rest] = len(names)
            names, kinds = [*names, name], [*kinds, kind.name.lower()]

    def total(values: Tensor) -> Tensor:
        return torch.zeros(len(names), dtype=torch.float64).index_add_(0, station, values.cpu().double())

    counts, visits = total(torch.ones(len(nodes))), total(walks.output)
    # Of nodes that no walk comes to, each counts as much as the others.
    weights = torch.where(visits[station] > 0, walks.output.cpu() / visits[station], 1 / counts[station])
    row, col, value = (part.cpu() for part in list_all_edges(graph.adjacency))
    row, col, value = (part[value != 0] for part in (row, col, value.double()))
    shares = value * (weights / walks.inputs.cpu())[row]
    pair = station[row] * len(names) + station[col]
    pairs, at = pair.unique(return_inverse=True)
    sums = {
        name: torch.zeros(len(pairs), dtype=torch.float64).index_add_(0, at, values)
        for name, values in (
            *(("share", shares.abs()), ("signed", shares), ("weight", value)),
            ("n_edges", torch.ones_like(value)),
        )
    }
    target, source = (pairs // len(names)).tolist(), (pairs % len(names)).tolist()
    edge_labels = [f"{names[s]} -> {names[t]}" for s, t in zip(source, target, strict=True)]
    edges = {"source": source, "target": target, "label": edge_labels, **{k: v.numpy() for k, v in sums.items()}}
    influence = total(walks.influence).numpy()
    columns = {"name": names, "kind": kinds, "n_nodes": counts.long().numpy(), "influence": influence}
    return CollapsedGraph(DataFrame(columns), DataFrame(edges).astype({"n_edges": int}))


# -- the subgraph


def score_subgraph(
    graph: AttributionGraph, kept: Features | Supernodes, definition: Definition = "paper"
) -> GraphScores:
    """Scores of the graph in which features count as errors, where walks end, but for those kept (Neuronpedia's and the
    page's score of a subgraph).

    Args:
        graph: whole, for the scores of a subgraph of all that there is.
        kept: numbers of feature nodes, a mask, or groups.
        definition: as for `graph.scores`.

    Raises:
        ConfigError: what is kept are no features of the graph, or there is no such definition.
    """
    wanted = as_supernodes(graph, kept).nodes if isinstance(kept, Mapping) else as_feature_nodes(graph, "kept", kept)
    nodes = graph.nodes
    outside = nodes.is_kind(NodeKind.FEATURE)
    outside[wanted] = False
    row, col, value = list_all_edges(graph.adjacency)
    inside = ~outside[row]
    counted = replace(
        graph,
        nodes=replace(nodes, kind=nodes.kind.masked_fill(outside, int(NodeKind.ERROR))),
        adjacency=build_adjacency(
            EdgeList(row[inside], col[inside], value[inside]), len(nodes), sparse=graph.is_sparse
        ),
        dropped=None if graph.dropped is None else graph.dropped.masked_fill(outside, 0),
    )
    return score_graph(counted, definition)


def draw_alike(
    graph: AttributionGraph, nodes: Sequence[int], generator: torch.Generator, *, apart: bool = True
) -> list[int]:
    """For each of some features another one of the graph at random: of its layer and position where there is one that
    is not taken, else of its layer, else of its position, else any. Fewer where there are no more.

    Args:
        graph: of the features.
        nodes: their numbers.
        generator: of the draw.
        apart: whether the features drawn are none of those given.
    """
    layer, pos = graph.nodes.layer.cpu(), graph.nodes.pos.cpu()
    free = graph.nodes.is_kind(NodeKind.FEATURE).cpu()
    if apart:
        free[list(nodes)] = False
    drawn: list[int] = []
    for place in torch.randperm(len(nodes), generator=generator).tolist():
        same_layer, same_pos = layer == layer[nodes[place]], pos == pos[nodes[place]]
        for pool in (free & same_layer & same_pos, free & same_layer, free & same_pos, free):
            if bool(pool.any()):
                among = torch.nonzero(pool).flatten()
                drawn.append(int(among[torch.randint(len(among), (1,), generator=generator)]))
                free[drawn[-1]] = False
                break
    return sorted(drawn)
