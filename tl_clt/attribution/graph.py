"""`AttributionGraph`: what wrote what into what, on one prompt."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_clt.arguments import as_path, as_whole, plain
from tl_clt.attribution.edges import Entries, assemble, entries, is_sparse, same_adjacency
from tl_clt.attribution.influence import (
    SMALLEST_ROW_SUM,
    Bounds,
    Definition,
    GraphScores,
    InfluenceShares,
    Walks,
    graph_scores,
    influence_shares,
    logit_weights,
    path_length,
    untraced,
    walk,
)
from tl_clt.attribution.nodes import Nodes, same_values
from tl_clt.attribution.pruning import Pruned, PruneMasks, check_thresholds, prune_graph
from tl_clt.attribution.targets import NamedTarget
from tl_clt.shapes import Adjacency, NodeValues


class InfluenceBounds(NamedTuple):
    """Between these lies each node's influence in the whole graph."""

    low: NodeValues
    high: NodeValues


@dataclass(frozen=True, kw_only=True, eq=False)
class AttributionGraph:
    """The attribution graph of one prompt. `adjacency[target, source]` is the edge source -> target.

    A graph is whole, or reduced: features were not traced, `keep_edges` dropped edges, or `prune` cut some. What a
    reduced graph says of the whole one is bounded, see `unexplored`, `influence_bounds` and `scores`.

    Graphs are equal where all tensors and token strings are, number for number; `info`, which says how a graph was
    made, is not compared. A graph copied, pickled or read from a file equals the one it was made of, has the same
    hash, and so may stand for it in sets and dictionaries. Changing a graph's tensors in place changes what it equals.
    """

    nodes: Nodes
    """kind, layer, pos, index and activation of every node: features, errors, tokens, positions, biases, logits."""

    adjacency: Adjacency
    """Linear effect of each source node on each target's pre-activation or logit. Rows that were not traced are 0.
    A torch CSR tensor where the graph was traced with `keep_edges`."""

    expanded: Bool[Tensor, " n_nodes"]
    """Nodes whose in-edges were traced."""

    tokens: Int[Tensor, " pos"]
    """Token ids of the prompt."""

    prompt_tokens: list[str]
    """The same as text."""

    logit_probs: Float[Tensor, " n_logits"]
    """Weights of the target nodes: probabilities of tokens, 1 for other targets."""

    logit_tokens: list[str]
    """The target nodes as text: tokens, or what else was asked for."""

    targets: list[NamedTarget] | None = None
    """What each target node is: tokens as ids, positions counted from the first. None in graphs of older files."""

    dropped: NodeValues | None = None
    """Absolute input of each node along edges that the graph does not hold: dropped by `keep_edges`, or cut by `prune`.
    None where every edge of the nodes traced is held."""

    contrast_activation: NodeValues | None = None
    """Of a contrastive graph: each feature's activation on the other prompt."""

    info: dict[str, Any] = field(default_factory=dict)
    """Model, CLT and options that it was made with. Of a pruned graph also its thresholds, and as
    `thresholds_out_of_reach` those that the edges held could not be sure to reach, so that pruning kept all of them."""

    def __repr__(self) -> str:
        return (
            f"AttributionGraph({len(self.nodes)} nodes, {self.n_edges} edges, prompt {self.info.get('prompt', '')!r})"
        )

    def __str__(self) -> str:
        scores = self.scores()
        known = f"replacement {scores.replacement_text()}, completeness {scores.completeness_text()}"
        return f"{self!r}: {known}{f'; {self.unexplored:.1%} unexplored' if self.is_reduced else ''}"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AttributionGraph):
            return NotImplemented
        return self is other or (
            self.nodes == other.nodes
            and (self.prompt_tokens, self.logit_tokens) == (other.prompt_tokens, other.logit_tokens)
            and same_adjacency(self.adjacency, other.adjacency)
            and all(
                same_values(getattr(self, name), getattr(other, name))
                for name in ("expanded", "tokens", "logit_probs", "dropped", "contrast_activation")
            )
        )

    def __hash__(self) -> int:
        return hash((tuple(self.tokens.tolist()), tuple(self.logit_tokens), len(self.nodes)))

    def __deepcopy__(self, memo: dict[int, Any]) -> AttributionGraph:
        # torch copies sparse tensors by `clone` alone.
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "adjacency"}
        return replace(self, adjacency=self.adjacency.clone(), **deepcopy(values, memo))

    @property
    def n_edges(self) -> int:
        """Edges that are held and not 0."""
        return int((self.adjacency.values() if self.is_sparse else self.adjacency).count_nonzero())

    @property
    def is_sparse(self) -> bool:
        """Whether only the strongest edges are held."""
        return is_sparse(self.adjacency)

    @property
    def is_reduced(self) -> bool:
        """Whether something is unknown: features that were not traced, or edges that are not held."""
        if bool(untraced(self.nodes, self.expanded).any()):
            return True
        return self.dropped is not None and bool(self.dropped.any())

    @property
    def logit_weights(self) -> NodeValues:
        """w: logit probabilities on the logit nodes, 0 elsewhere."""
        return logit_weights(self.nodes, self.logit_probs.to(self.adjacency.dtype))

    def influence(self) -> NodeValues:
        """Each node's influence on the logits through all paths that are held: w (A + A^2 + ...).

        Of a reduced graph, a lower bound of the whole graph's; see `influence_bounds`.
        """
        return self._walks().influence

    def influence_bounds(self) -> InfluenceBounds:
        """Between which values each node's influence in the whole graph lies."""
        walks = self._walks()
        most = (walks.influence + walks.lost.sum()).minimum(self.logit_weights.sum())
        return InfluenceBounds(walks.influence, most.maximum(walks.influence))

    def shares(self) -> InfluenceShares:
        """Share of influence that starts at each kind of leaf and at untraced features, or along edges not held."""
        return influence_shares(self._walks(), self.nodes, self.expanded)

    @property
    def unexplored(self) -> float:
        """Share of walks that end at features without a row, or at edges that are not held. With w summing to 1, no
        node's influence can be off by more, nor can that of all tokens or of all errors."""
        shares = self.shares()
        return shares.unexplored + shares.dropped

    def input_shares(self, node: int) -> NodeValues:
        """|in-edges| of one node as shares of its absolute input, what is not held included."""
        row = self.in_edges(node).abs()
        whole = row.sum() if self.dropped is None else row.sum() + self.dropped[plain(node)]
        return row / whole.clamp_min(SMALLEST_ROW_SUM)

    def in_edges(self, node: int) -> NodeValues:
        """One row of the adjacency, dense."""
        node = as_whole("node", node, -len(self.nodes), len(self.nodes) - 1) % len(self.nodes)
        if not self.is_sparse:
            return self.adjacency[node]
        _, col, value = entries(self.adjacency, torch.tensor([node], device=self.nodes.kind.device))
        return value.new_zeros(len(self.nodes)).index_add_(0, col, value)

    def scores(self, definition: Definition = "paper") -> GraphScores:
        """Replacement and completeness, by the paper's reading or circuit-tracer's. Never compare the two.

        Two numbers, of what the graph holds, with `replacement_bounds` and `completeness_bounds`: between these lie the
        scores of the whole graph, however much of it was not traced, dropped or pruned away. Of a whole graph the
        bounds are the number itself.
        """
        return graph_scores(self._walks(), self.nodes, definition)

    def path_length(self) -> float:
        """Mean number of edges on a path from a token to a logit, paths weighted by their strength (Methods).

        Of the paths that the graph holds; see `path_length_bounds`.
        """
        return path_length(self.adjacency, self.nodes, self.logit_weights, self.dropped, self.expanded).mean

    def path_length_bounds(self) -> Bounds:
        """Between which values the whole graph's path length lies."""
        return path_length(self.adjacency, self.nodes, self.logit_weights, self.dropped, self.expanded).bounds

    def prune_masks(self, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> PruneMasks:
        """Which nodes and edges `prune` keeps."""
        kept = self._pruned(node_threshold, edge_threshold)
        edges = torch.zeros(len(self.nodes), len(self.nodes), dtype=torch.bool, device=self.nodes.kind.device)
        edges[kept.edges.row, kept.edges.col] = True
        return PruneMasks(kept.nodes, edges)

    def prune(self, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> AttributionGraph:
        """The smaller graph of the nodes and edges that carry these shares of the influence.

        What is cut stays in the sums of rows, as `dropped`, so that the smaller graph's influence, scores and path
        length are those of this one as far as its edges tell, with bounds. Of a reduced graph the shares are of all
        influence that there may be; where the edges held cannot be sure to carry as much, all of them stay, and `info`
        says so.

        Raises:
            ConfigError: a threshold is not between 0 and 1.
        """
        node_threshold, edge_threshold = check_thresholds(node_threshold, edge_threshold)
        mask, edges, cut, out_of_reach = self._pruned(node_threshold, edge_threshold)
        new = mask.cumsum(0) - 1
        adjacency = assemble(
            Entries(new[edges.row], new[edges.col], edges.value), int(mask.sum()), sparse=self.is_sparse
        )
        dropped = cut if self.dropped is None else self.dropped + cut
        info = {**self.info, "node_threshold": node_threshold, "edge_threshold": edge_threshold}
        return replace(
            self,
            nodes=self.nodes.take(mask),
            adjacency=adjacency,
            expanded=self.expanded[mask],
            dropped=dropped[mask],
            contrast_activation=None if self.contrast_activation is None else self.contrast_activation[mask],
            info={**info, "thresholds_out_of_reach": out_of_reach},
        )

    @property
    def _lacks_nodes(self) -> bool:
        """Whether pruning took nodes out."""
        return "node_threshold" in self.info

    def _walks(self) -> Walks:
        return walk(self.adjacency, self.nodes, self.logit_weights, self.dropped, self.expanded, self._lacks_nodes)

    def _pruned(self, node_threshold: float, edge_threshold: float) -> Pruned:
        return prune_graph(
            self.adjacency,
            self.nodes,
            self.logit_weights,
            node_threshold,
            edge_threshold,
            self.dropped,
            self.expanded,
            self._lacks_nodes,
        )

    def save(self, path: str | Path) -> Path:
        """Write the graph to one safetensors file, all or nothing; a file that is there is replaced.

        Raises:
            NotWritten: the path is a folder, or the disk is full, for example; what was there stays.
        """
        from tl_clt.attribution.files import save_graph

        return save_graph(self, as_path("path", path))

    @staticmethod
    def load(path: str | Path) -> AttributionGraph:
        """Read a graph that `save` wrote.

        Raises:
            ConfigError: the path is none.
            FormatError: the path is missing or a folder, or the file truncated, no graph, or one whose parts contradict
                each other.
        """
        from tl_clt.attribution.files import load_graph

        return load_graph(as_path("path", path))
