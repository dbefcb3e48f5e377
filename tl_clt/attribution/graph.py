"""`AttributionGraph`: what wrote what into what, on one prompt."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_clt.arguments import as_path, as_whole, plain
from tl_clt.attribution.edges import Entries, assemble, entries, is_sparse
from tl_clt.attribution.influence import (
    SMALLEST_ROW_SUM,
    Definition,
    GraphScores,
    InfluenceShares,
    graph_scores,
    influence_shares,
    logit_weights,
    node_influence,
    path_length,
)
from tl_clt.attribution.nodes import Nodes
from tl_clt.attribution.pruning import Pruned, PruneMasks, check_thresholds, prune_graph
from tl_clt.attribution.targets import NamedTarget
from tl_clt.shapes import Adjacency, NodeValues


@dataclass(frozen=True, kw_only=True)
class AttributionGraph:
    """The attribution graph of one prompt. `adjacency[target, source]` is the edge source -> target."""

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
    """Absolute input of each node in edges that a sparse graph does not hold."""

    contrast_activation: NodeValues | None = None
    """Of a contrastive graph: each feature's activation on the other prompt."""

    info: dict[str, Any] = field(default_factory=dict)
    """Model, CLT and options that it was made with."""

    def __repr__(self) -> str:
        return (
            f"AttributionGraph({len(self.nodes)} nodes, {self.n_edges} edges, prompt {self.info.get('prompt', '')!r})"
        )

    @property
    def n_edges(self) -> int:
        """Edges that are held and not 0."""
        return int((self.adjacency.values() if self.is_sparse else self.adjacency).count_nonzero())

    @property
    def is_sparse(self) -> bool:
        """Whether only the strongest edges are held."""
        return is_sparse(self.adjacency)

    @property
    def logit_weights(self) -> NodeValues:
        """w: logit probabilities on the logit nodes, 0 elsewhere."""
        return logit_weights(self.nodes, self.logit_probs.to(self.adjacency.dtype))

    def influence(self) -> NodeValues:
        """Each node's influence on the logits through all paths: w (A + A^2 + ...)."""
        return node_influence(self.adjacency, self.nodes, self.logit_weights, self.dropped)

    def shares(self) -> InfluenceShares:
        """Share of influence that starts at tokens, errors, positions, biases, at untraced features, and is dropped."""
        return influence_shares(self.adjacency, self.nodes, self.logit_weights, self.dropped)

    @property
    def unexplored(self) -> float:
        """Share of walks that end at features without a row, or at edges that are not held. No node's influence, with
        w summing to 1, can be off by more."""
        shares = self.shares()
        return shares.unexplored + shares.dropped

    def input_shares(self, node: int) -> NodeValues:
        """|in-edges| of one node as shares of its absolute input."""
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
        """Replacement and completeness, by the paper's reading or circuit-tracer's. Never compare the two."""
        return graph_scores(self.adjacency, self.nodes, self.logit_weights, definition, self.dropped)

    def path_length(self) -> float:
        """Mean number of edges on a path from a token to a logit, paths weighted by their strength (Methods)."""
        return path_length(self.adjacency, self.nodes, self.logit_weights, self.dropped)

    def prune_masks(self, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> PruneMasks:
        """Which nodes and edges `prune` keeps."""
        kept = self._pruned(node_threshold, edge_threshold)
        edges = torch.zeros(len(self.nodes), len(self.nodes), dtype=torch.bool, device=self.nodes.kind.device)
        edges[kept.edges.row, kept.edges.col] = True
        return PruneMasks(kept.nodes, edges)

    def prune(self, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> AttributionGraph:
        """The smaller graph of the nodes and edges that carry these shares of the influence."""
        node_threshold, edge_threshold = check_thresholds(node_threshold, edge_threshold)
        mask, edges = self._pruned(node_threshold, edge_threshold)
        new = mask.cumsum(0) - 1
        adjacency = assemble(
            Entries(new[edges.row], new[edges.col], edges.value), int(mask.sum()), sparse=self.is_sparse
        )
        return replace(
            self,
            nodes=self.nodes.take(mask),
            adjacency=adjacency,
            expanded=self.expanded[mask],
            dropped=None if self.dropped is None else self.dropped[mask],
            contrast_activation=None if self.contrast_activation is None else self.contrast_activation[mask],
            info={**self.info, "node_threshold": node_threshold, "edge_threshold": edge_threshold},
        )

    def _pruned(self, node_threshold: float, edge_threshold: float) -> Pruned:
        return prune_graph(self.adjacency, self.nodes, self.logit_weights, node_threshold, edge_threshold, self.dropped)

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
