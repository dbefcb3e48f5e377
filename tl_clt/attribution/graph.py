"""`AttributionGraph`: what wrote what into what, on one prompt."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_clt.attribution.influence import (
    Definition,
    GraphScores,
    InfluenceShares,
    PruneMasks,
    graph_scores,
    influence_shares,
    logit_weights,
    node_influence,
    normalised,
    prune_masks,
)
from tl_clt.attribution.nodes import Nodes
from tl_clt.shapes import Adjacency, NodeValues


@dataclass(frozen=True, kw_only=True)
class AttributionGraph:
    """The attribution graph of one prompt. `adjacency[target, source]` is the edge source -> target."""

    nodes: Nodes
    """kind, layer, pos, index and activation of every node: features, errors, tokens, positions, biases, logits."""

    adjacency: Adjacency
    """Linear effect of each source node on each target's pre-activation or logit. Rows that were not traced are 0."""

    expanded: Bool[Tensor, " n_nodes"]
    """Nodes whose in-edges were traced."""

    tokens: Int[Tensor, " pos"]
    """Token ids of the prompt."""

    prompt_tokens: list[str]
    """The same as text."""

    logit_probs: Float[Tensor, " n_logits"]
    """Probabilities of the logit nodes."""

    logit_tokens: list[str]
    """The logit nodes' tokens as text."""

    info: dict[str, Any] = field(default_factory=dict)
    """Model, CLT and options that it was made with."""

    def __repr__(self) -> str:
        return (
            f"AttributionGraph({len(self.nodes)} nodes, {int(self.adjacency.count_nonzero())} edges,"
            f" prompt {self.info.get('prompt', '')!r})"
        )

    @property
    def logit_weights(self) -> NodeValues:
        """w: logit probabilities on the logit nodes, 0 elsewhere."""
        return logit_weights(self.nodes, self.logit_probs.to(self.adjacency.dtype))

    def influence(self) -> NodeValues:
        """Each node's influence on the logits through all paths: w (A + A^2 + ...)."""
        return node_influence(normalised(self.adjacency), self.logit_weights)

    def shares(self) -> InfluenceShares:
        """Share of influence that starts at tokens, errors, positions, biases, and at untraced features."""
        return influence_shares(self.adjacency, self.nodes, self.logit_weights)

    @property
    def unexplored(self) -> float:
        """Share of walks that end at features without a row. No node's influence, with w summing to 1, can be off
        by more."""
        return self.shares().unexplored

    def scores(self, definition: Definition = "paper") -> GraphScores:
        """Replacement and completeness, by the paper's reading or circuit-tracer's. Never compare the two."""
        return graph_scores(self.adjacency, self.nodes, self.logit_weights, definition)

    def prune_masks(self, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> PruneMasks:
        """Which nodes and edges `prune` keeps."""
        return prune_masks(self.adjacency, self.nodes, self.logit_weights, node_threshold, edge_threshold)

    def prune(self, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> AttributionGraph:
        """The smaller graph of the nodes and edges that carry these shares of the influence."""
        masks = self.prune_masks(node_threshold, edge_threshold)
        kept = masks.nodes
        return replace(
            self,
            nodes=self.nodes.take(kept),
            adjacency=(self.adjacency * masks.edges)[kept][:, kept],
            expanded=self.expanded[kept],
            info={**self.info, "node_threshold": node_threshold, "edge_threshold": edge_threshold},
        )

    def save(self, path: str | Path) -> Path:
        """Write the graph to one safetensors file, all or nothing."""
        from tl_clt.attribution.files import save_graph

        return save_graph(self, Path(path))

    @staticmethod
    def load(path: str | Path) -> AttributionGraph:
        """Read a graph that `save` wrote.

        Raises:
            FormatError: the file is missing, truncated, or no graph.
        """
        from tl_clt.attribution.files import load_graph

        return load_graph(Path(path))
