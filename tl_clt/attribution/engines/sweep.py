"""All targets' adjoints in one pass from the top layer down, without autograd.

R [n_targets, pos, d_model] is the adjoint of the residual stream: how much each target would change with what is
written there. At layer t, top-down: contract R with the vectors written at its MLP, one matrix product a position;
let the targets that read there join; then R += the transpose of the layer's held attention.

Targets are ordered by the depth at which they read, so that those at work are always the first rows of R; a batch
holds targets of near positions, so that R ends at the last of them. A target that has just joined has an adjoint at
its own position only, and its first attention layer touches that one alone. Below the first attention layer there
are only embeddings: what they write through it is found once, forward, and R stops above it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from tl_clt.attribution.engines.engine import EdgeRows, Engine
from tl_clt.attribution.engines.held_maps import FoldedModel, HeldMaps
from tl_clt.attribution.local import LocalReplacementModel, skipped_positions
from tl_clt.attribution.nodes import NodeKind, Nodes
from tl_clt.attribution.sources import Segment, Sources
from tl_clt.attribution.streams import Readouts

FEW_TARGETS = 128
"""Batches of neighbouring positions grow to this many targets: fewer make poor matrix products."""
CHUNK_ROWS = 1024
"""Rows (target, position) of R that go through attention together, so that what lies between stays in the cache."""
CARRIED_NUMBERS = 2**26
"""Embeddings are carried through the first attention layer where that takes at most so many numbers."""


class Columns(NamedTuple):
    """Where edges lie while a batch is at work: features by (position, layer), so that all that is written at one
    position from a range of layers is one stretch; then all other nodes, as they are numbered."""

    of_node: Int[Tensor, " n_nodes"]
    n_features: int

    @classmethod
    def of(cls, nodes: Nodes) -> Columns:
        features = nodes.where(NodeKind.FEATURE)
        of_node = torch.arange(len(nodes), device=nodes.pos.device)
        order = torch.argsort(nodes.pos[features], stable=True)
        of_node[order] = torch.arange(len(order), device=order.device)
        return cls(of_node, len(features))


class Placed(NamedTuple):
    """A segment with the columns that its edges go to: one stretch, and then some others."""

    pos: int
    vectors: Float[Tensor, "n d_model"]
    start: int
    n_stretch: int
    others: Int[Tensor, " n_others"]


class Run(NamedTuple):
    """Targets that read at one depth and position."""

    depth: int
    pos: int
    start: int
    stop: int


@dataclass
class Batch:
    """Targets on their way down."""

    R: Float[Tensor, "n_targets n_pos d_model"]
    edges: Float[Tensor, "n_targets n_columns"]
    runs: list[Run]
    """In the order of rows, deepest first."""
    seeds: Float[Tensor, "n_targets d_model"]
    full: int = 0
    """Rows with an adjoint at every position."""
    joined: int = 0
    fresh: list[Run] = field(default_factory=list)
    """Runs with an adjoint at their own position only."""

    def join(self, depth: int) -> None:
        """Let the targets that read at a depth in."""
        while self.runs and self.runs[0].depth >= depth:
            run = self.runs.pop(0)
            self.R[run.start : run.stop, run.pos] = self.seeds[run.start : run.stop]
            self.fresh.append(run)
            self.joined = run.stop

    def settle(self) -> None:
        """All that have joined have an adjoint at every position now."""
        self.full, self.fresh = self.joined, []

    def contract(self, segments: list[Placed]) -> None:
        """Edges of what is written at one site."""
        n_pos = self.R.shape[1]
        fresh: dict[int, list[Run]] = {}
        for run in self.fresh:
            fresh.setdefault(run.pos, []).append(run)
        for segment in segments[:n_pos]:
            stretches = [(0, self.full)] if self.full else []
            stretches += [(run.start, run.stop) for run in fresh.get(segment.pos, ())]
            for start, stop in stretches:
                given = self.R[start:stop, segment.pos] @ segment.vectors.T
                edges, m = self.edges[start:stop], segment.n_stretch
                edges[:, segment.start : segment.start + m] += given[:, :m]
                if len(segment.others):
                    edges.index_add_(1, segment.others, given[:, m:])


class SweepEngine(Engine):
    """Edges by one pass down the model for a batch of targets."""

    name = "sweep"

    def __init__(self, local: LocalReplacementModel, sources: Sources, folded: FoldedModel) -> None:
        super().__init__(local, sources)
        self.folded = folded
        self.maps = HeldMaps(local, folded)
        self.columns = Columns.of(sources.nodes)
        at, n_pos = sources.sites, len(local.tokens)
        self.carries = n_pos * n_pos * at.embed[0].vectors.shape[1] <= CARRIED_NUMBERS
        self.mlp = [self._placed(self._behind_norm(segments, t)) for t, segments in enumerate(at.mlp)]
        self.attn = [self._placed(segments) for segments in at.attn]
        embed = at.embed
        if local.embed_scale != 1:
            embed = [s._replace(vectors=local.embed_scale * s.vectors) for s in embed]
        self.embed = [self._placed(embed), self._placed(at.pos_embed)]
        self.carried = [self._carried(embed), self._carried(at.pos_embed)] if self.carries else []

    def batches(
        self, point: Int[Tensor, " n_targets"], pos: Int[Tensor, " n_targets"], size: int
    ) -> list[Int[Tensor, " n"]]:
        """Targets of one position together, or of neighbouring ones where they are few."""
        order = torch.argsort(pos, stable=True)
        found: list[Tensor] = []
        waiting: list[Tensor] = []
        for group in order.split(torch.unique_consecutive(pos[order], return_counts=True)[1].tolist()):
            waiting.append(group)
            if sum(map(len, waiting)) >= min(size, FEW_TARGETS):
                found += torch.cat(waiting).split(size)
                waiting = []
        return found + (list(torch.cat(waiting).split(size)) if waiting else [])

    def _written(self, readouts: Readouts) -> EdgeRows:
        depth = self.maps.depths(readouts.point)
        n_pos = int(readouts.pos.max()) + 1
        order = torch.argsort(depth * n_pos - readouts.pos, descending=True, stable=True)
        batch = self._batch(readouts.take(order), depth[order], n_pos)
        for t in reversed(range(self.local.n_layers)):
            self._layer(batch, t)
        batch.join(0)
        for segments in self.embed:
            batch.contract(segments)
        rows = torch.empty_like(batch.edges)
        rows[order] = batch.edges[:, self.columns.of_node]
        return rows

    def _batch(self, readouts: Readouts, depth: Int[Tensor, " n_targets"], n_pos: int) -> Batch:
        seeds = self.maps.seeds(readouts.point, readouts.pos, readouts.directions)
        changes = torch.stack([depth, readouts.pos], dim=1)
        values, counts = torch.unique_consecutive(changes, dim=0, return_counts=True)
        runs, start = [], 0
        for (at, pos), count in zip(values.tolist(), counts.tolist(), strict=True):
            runs.append(Run(at, pos, start, start + count))
            start += count
        return Batch(
            R=seeds.new_zeros(len(seeds), n_pos, seeds.shape[1]),
            edges=seeds.new_zeros(len(seeds), len(self.columns.of_node)),
            runs=runs,
            seeds=seeds,
        )

    def _layer(self, batch: Batch, t: int) -> None:
        """One block, from its output to its input."""
        batch.join(2 * t + 2)
        batch.contract(self.mlp[t])
        skipped = self._through_skip(batch, t)
        if self.folded.reads_mid:
            batch.R[: len(skipped)] += skipped
        batch.join(2 * t + 1)
        batch.contract(self.attn[t])
        if t == 0 and self.carries:
            for segments in self.carried:
                batch.contract(segments)
        else:
            self._through_attention(batch, t)
            batch.settle()
        if not self.folded.reads_mid:
            batch.R[: len(skipped)] += skipped

    def _through_skip(self, batch: Batch, t: int) -> Float[Tensor, "n n_pos d_model"]:
        """From an MLP's output through the CLT's skip connection to the residual stream; no rows where it has none."""
        W_skip = self.local.clt.W_skip
        if W_skip is None:
            return batch.R[:0]
        back = self.maps.output_transposed(t, batch.R[: batch.joined]) @ W_skip[t].detach().to(batch.R.dtype).T
        back[:, : skipped_positions(self.local.bos).start] = 0
        return self.maps.input_transposed(t, back, slice(0, back.shape[1]))

    def _through_attention(self, batch: Batch, t: int) -> None:
        """R += the transpose of a layer's held attention."""
        if batch.full:
            n_pos = batch.R.shape[1]
            for rows in batch.R[: batch.full].split(max(1, CHUNK_ROWS // n_pos)):
                self._add_attention(rows, t)
        if batch.fresh:
            self._add_first_attention(batch, t)

    def _add_attention(self, R: Float[Tensor, "n n_pos d_model"], t: int) -> None:
        n, n_pos, d_model = R.shape
        ov, groups = self.folded.attention[t], self.folded.attention[t].n_key_value_heads
        pattern = rearrange(self.maps.patterns[t][:, :n_pos, :n_pos], "(g h) key query -> g key (h query)", g=groups)
        z = R.reshape(n * n_pos, d_model) @ ov.from_out
        z = rearrange(z, "(n query) (g h d_head) -> n g (h query) d_head", n=n, g=groups, h=ov.n_heads // groups)
        # Heads that share keys and values are summed here, before W_V.
        values = rearrange(pattern @ z, "n g key d_head -> (n key) (g d_head)")
        R.view(n * n_pos, d_model).addmm_(values, ov.to_in)

    def _add_first_attention(self, batch: Batch, t: int) -> None:
        """Of targets with an adjoint at one position: W_V before the pattern, so that one position is multiplied."""
        ov, groups = self.folded.attention[t], self.folded.attention[t].n_key_value_heads
        to_in = rearrange(ov.to_in, "(g d_head) d_model -> g d_head d_model", g=groups)
        for pos, start, stop in _pieces(batch.fresh, CHUNK_ROWS // 4):
            z = batch.R[start:stop, pos] @ ov.from_out
            z = rearrange(z, "n (g h d_head) -> g (n h) d_head", g=groups, h=ov.n_heads // groups)
            by_head = rearrange(z @ to_in, "g (n h) d_model -> n (g h) d_model", n=stop - start)
            batch.R[start:stop, : pos + 1] += self.maps.patterns[t][:, : pos + 1, pos].T @ by_head

    def _behind_norm(self, segments: list[Segment], t: int) -> list[Segment]:
        """What is written at a CLT's output, as the norm behind it (if there is one) passes it on."""
        return [s._replace(vectors=self.maps.written(t, s.vectors, s.pos)) for s in segments]

    def _placed(self, segments: list[Segment]) -> list[Placed]:
        return [self._place(s.pos, s.nodes, s.vectors, s.n_features) for s in segments]

    def _place(self, pos: int, nodes: Int[Tensor, " n"], vectors: Float[Tensor, "n d_model"], stretch: int) -> Placed:
        columns = self.columns.of_node[nodes]
        return Placed(pos, vectors, int(columns[0]) if stretch else 0, stretch, columns[stretch:])

    def _carried(self, segments: list[Segment]) -> list[Placed]:
        """What embeddings write through the first attention layer."""
        if not segments:
            return []
        nodes = torch.cat([segment.nodes for segment in segments])
        written = self.maps.carried(torch.cat([segment.vectors for segment in segments]))
        one_each = bool((nodes.diff() == 1).all())
        return [self._place(q, nodes[: q + 1], v, q + 1 if one_each else 0) for q, v in enumerate(written)]


def _pieces(runs: list[Run], size: int) -> list[tuple[int, int, int]]:
    """(pos, start, stop) of runs, none longer than `size`."""
    return [(run.pos, start, min(start + size, run.stop)) for run in runs for start in range(run.start, run.stop, size)]
