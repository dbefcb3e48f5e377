"""Which features get a row: all, the most influential so far, or as many as a bound on the rest asks for."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_clt.attribution.engines import AutogradEngine
from tl_clt.attribution.influence import logit_weights, node_influence, normalised
from tl_clt.attribution.nodes import NodeKind
from tl_clt.errors import ConfigError


class Rows:
    """The adjacency as far as it is traced."""

    def __init__(self, engine: AutogradEngine) -> None:
        nodes = engine.sources.nodes
        dtype = engine.logits.directions.dtype
        self.engine = engine
        self.nodes = nodes
        self.adjacency: Float[Tensor, "n_nodes n_nodes"] = torch.zeros(
            len(nodes), len(nodes), dtype=dtype, device=nodes.kind.device
        )
        self.expanded: Bool[Tensor, " n_nodes"] = nodes.is_kind(NodeKind.LOGIT)
        self.adjacency[nodes.where(NodeKind.LOGIT)] = engine.logit_rows()

    def expand(self, features: Tensor, batch_size: int, bar: tqdm) -> None:
        """Trace the in-edges of some features, layer by layer."""
        layers = self.nodes.layer[features]
        for layer in layers.unique().tolist():
            for batch in features[layers == layer].split(batch_size):
                self.adjacency[batch] = self.engine.feature_rows(batch)
                self.expanded[batch] = True
                bar.update(len(batch))

    def unexplored(self) -> Float[Tensor, " n_features"]:
        """For each feature node, the share of walks from the logits that end there for want of a row."""
        weights = logit_weights(self.nodes, self.engine.logits.probs)
        influence = node_influence(normalised(self.adjacency), weights / weights.sum())
        n_features = len(self.nodes.where(NodeKind.FEATURE))
        return (influence * ~self.expanded)[:n_features]


def expand(
    engine: AutogradEngine,
    max_feature_nodes: int | None,
    max_unexplored: float | None,
    batch_size: int,
    progress: bool,
) -> Rows:
    """Trace the logits, then features in the order of their influence so far until a limit is met.

    Raises:
        ConfigError: a limit is out of range.
    """
    if max_feature_nodes is not None and max_feature_nodes < 0:
        raise ConfigError(f"max_feature_nodes is {max_feature_nodes}: give 0 or more, or None for all.")
    if max_unexplored is not None and not 0 <= max_unexplored <= 1:
        raise ConfigError(f"max_unexplored is {max_unexplored}: give a share from 0 to 1, or None for all.")
    rows = Rows(engine)
    features = rows.nodes.where(NodeKind.FEATURE)
    limit = len(features) if max_feature_nodes is None else min(max_feature_nodes, len(features))
    with tqdm(total=limit, desc="Tracing features", unit=" rows", delay=2.0, disable=not progress) as bar:
        if limit == len(features) and max_unexplored is None:
            rows.expand(features, batch_size, bar)
            return rows
        while (done := int(rows.expanded[features].sum())) < limit:
            open_shares = rows.unexplored()
            if float(open_shares.sum()) <= (max_unexplored or 0.0):
                break
            count = min(batch_size, limit - done, int(open_shares.count_nonzero()))
            rows.expand(open_shares.topk(count).indices, batch_size, bar)
    return rows
