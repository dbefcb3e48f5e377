"""Which features get a row: all, the most influential so far, or as many as a bound on the rest asks for."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_clt.arguments import as_share, as_whole
from tl_clt.attribution.autograd import Engine
from tl_clt.attribution.edges import NodeKind, place_logit_weights
from tl_clt.attribution.influence import SMALLEST_ROW_SUM
from tl_clt.attribution.memory import MemoryPlan, RowStore, SparseRows
from tl_clt.attribution.targets import Targets, feature_readouts
from tl_clt.errors import MemoryLimit
from tl_clt.shapes import NodeMask, NodeValues

ROUND_SHARE, FIRST_ROUND = 0.25, 64
"""A round traces at most this share of what is traced already (at first, so many): the ranking is renewed between."""


@dataclass(frozen=True)
class Limits:
    """How far to trace."""

    max_feature_nodes: int | None = None
    max_unexplored: float | None = None

    def __post_init__(self) -> None:
        most = as_whole("max_feature_nodes", self.max_feature_nodes, 0, none="all")
        share = as_share("max_unexplored", self.max_unexplored, zero=True, none="all")
        object.__setattr__(self, "max_feature_nodes", most)
        object.__setattr__(self, "max_unexplored", share)

    def n_rows(self, n_features: int) -> int:
        """At most so many features get a row."""
        return n_features if self.max_feature_nodes is None else min(self.max_feature_nodes, n_features)


class Expansion:
    """The adjacency as far as it is traced, with the influence that its rows give."""

    def __init__(self, engine: Engine, targets: Targets, store: RowStore) -> None:
        self.engine = engine
        self.store = store
        self.nodes = engine.sources.nodes
        self.features = self.nodes.where(NodeKind.FEATURE)
        self.expanded: Bool[Tensor, " n_nodes"] = torch.zeros_like(self.nodes.kind, dtype=torch.bool)
        weights = place_logit_weights(self.nodes, targets.weights)
        self.visits: NodeValues = weights / weights.sum()
        """The probability that a walk from the targets upstream along normalised |edges| visits each node."""
        ends = self.nodes.where(NodeKind.LOGIT)
        put = store.put(ends, engine.rows(targets.readouts))
        if not bool(put[ends].all()):
            raise MemoryLimit(
                f"memory_limit leaves no room for the in-edges of the {len(ends)} targets: raise it, or ask for fewer."
            )
        self._reached(ends)

    def trace(self, features: Int[Tensor, " n"], batch_size: int, bar: tqdm, ranked: bool) -> int:
        """Trace the in-edges of some features; where `ranked`, bring `visits` up to date.

        Returns:
            How many there was room for.
        """
        put = torch.zeros_like(self.expanded)
        for batch in self.engine.batches(self.nodes.layer[features], self.nodes.pos[features], batch_size):
            at = self.nodes.take(features[batch])
            readouts = feature_readouts(self.engine.local, at.layer, at.pos, at.index)
            kept = self.store.put(features[batch], self.engine.rows(readouts))
            put |= kept
            bar.update(len(batch))
            if not bool(kept[features[batch]].all()):
                break
        if ranked:
            self._reached(torch.nonzero(put).flatten())
        else:
            self.expanded |= put
        return int(put.sum())

    def open_shares(self) -> Float[Tensor, " n_features"]:
        """For each feature, the share of walks that end there for want of a row."""
        return (self.visits * ~self.expanded)[self.features]

    def _reached(self, targets: Int[Tensor, " n"]) -> None:
        """Walks that ended at these go on: hand their visits on, top-down, through all rows that there are."""
        self.expanded[targets] = True
        new = torch.zeros_like(self.visits)
        new[targets] = self.visits[targets]
        layers = self.nodes.layer
        logits = self.nodes.is_kind(NodeKind.LOGIT)
        self._hand_on(new, targets[logits[targets]])
        top = int(layers[targets].max()) if len(targets) else -1
        inner = self.expanded & ~logits
        for layer in range(top, -1, -1):
            self._hand_on(new, torch.nonzero(inner & (layers == layer)).flatten())

    def _hand_on(self, new: NodeValues, rows: Int[Tensor, " n"]) -> None:
        if len(rows):
            given = self.store.pass_upstream(rows, new[rows] / self.store.sums[rows].clamp_min(SMALLEST_ROW_SUM))
            new += given
            self.visits += given


def expand(
    engine: Engine,
    targets: Targets,
    store: RowStore,
    limits: Limits,
    plan: MemoryPlan,
    progress: bool,
) -> NodeMask:
    """Trace the targets, then features in the order of their influence so far until a limit is met.

    Args:
        store: where the rows go.
        plan: batch size, and whether all rows are sure to fit; tracing ends with a warning where they do not.

    Returns:
        Which nodes have a row.
    """
    traced = Expansion(engine, targets, store)
    features = traced.features
    limit = limits.n_rows(len(features))
    # Where room may end before the features do, the most influential come first.
    ranked = limit < len(features) or limits.max_unexplored is not None or not plan.all_fit
    done = 0
    desc = f"Tracing features ({plan})"
    with tqdm(total=limit, desc=desc, unit=" rows", delay=2.0, disable=not progress) as bar:
        while done < limit:
            if ranked:
                count = max(min(plan.batch_size, FIRST_ROUND), int(ROUND_SHARE * done))
                chosen = _next(traced.open_shares(), min(count, limit - done), limits)
            else:
                chosen = features[:limit]
            if len(chosen) == 0:
                break
            n_traced = traced.trace(chosen, plan.batch_size, bar, ranked)
            done += n_traced
            if n_traced < len(chosen):
                warnings.warn(
                    f"Tracing ended after {done} of {limit} features: their edges take {store.nbytes / 2**30:.2f} GiB,"
                    " which is what memory_limit leaves. The graph's unexplored share says what that means;"
                    f" {'a smaller' if isinstance(store, SparseRows) else 'keep_edges=0.9 or a higher'}"
                    f" {'keep_edges' if isinstance(store, SparseRows) else 'memory_limit'} makes room for more.",
                    stacklevel=3,
                )
                break
    return traced.expanded


def _next(shares: Float[Tensor, " n"], count: int, limits: Limits) -> Int[Tensor, " n_next"]:
    """The features on which most walks end, no more than it takes to meet the bound if nothing lay behind them."""
    excess = float(shares.sum()) - (limits.max_unexplored or 0.0)
    count = min(count, int(shares.count_nonzero()))
    if excess <= 0 or count == 0:
        return torch.zeros(0, dtype=torch.long, device=shares.device)
    top = shares.topk(count)
    needed = int((top.values.cumsum(0) < excess).sum()) + 1
    return top.indices[:needed]
