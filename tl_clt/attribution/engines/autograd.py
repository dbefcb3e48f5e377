"""The definition: run the local replacement model once with gradients on, then one backward pass a target.

The adjoint of a target is the gradient of what it reads with respect to each site, which autograd gives for a
batch of targets at a time; its products with the source vectors are the edges.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_clt.attribution.engines.engine import EdgeRows, Engine
from tl_clt.attribution.local import LocalReplacementModel
from tl_clt.attribution.sources import Segment, Sources
from tl_clt.attribution.streams import Readouts, Sites, Stream
from tl_clt.errors import ModelUnsupported


class AutogradEngine(Engine):
    """Edges by backward passes through the held model."""

    name = "autograd"

    def __init__(self, local: LocalReplacementModel, sources: Sources) -> None:
        super().__init__(local, sources)
        if any(weight.is_inference() for of in (local.model, local.clt) for weight in of.parameters()):
            raise ModelUnsupported(
                "Weights that were made within torch.inference_mode() let no gradients through. Load model and CLT"
                " outside of it, or trace with engine='sweep'."
            )
        with torch.enable_grad():
            at = local.sites
            self.sites = Sites(
                _elsewhere(at.embed),
                None if at.pos_embed is None else _elsewhere(at.pos_embed),
                [_elsewhere(x) for x in at.attn],
                [_elsewhere(x) for x in at.mlp],
            )
            self.reads = local.run(self.sites)

    def batches(
        self, point: Int[Tensor, " n_targets"], pos: Int[Tensor, " n_targets"], size: int
    ) -> list[Int[Tensor, " n"]]:
        """Targets of one read point together: one backward pass starts at one place."""
        found = []
        for one in point.unique().tolist():
            found += torch.nonzero(point == one).flatten().split(size)
        return found

    def _written(self, readouts: Readouts) -> EdgeRows:
        rows = readouts.directions.new_zeros(len(readouts.pos), len(self.sources.nodes))
        for at in self.batches(readouts.point, readouts.pos, len(readouts.pos) or 1):
            rows[at] = self._from_one_point(readouts.take(at))
        return rows

    def _from_one_point(self, readouts: Readouts) -> EdgeRows:
        read = self.reads.points[int(readouts.point[0])]
        n_targets = len(readouts.pos)
        seeds = readouts.directions.new_zeros(n_targets, *read.shape)
        seeds[torch.arange(n_targets), readouts.pos] = readouts.directions
        at, vectors = self.sites, self.sources.sites
        written = [
            (at.embed, vectors.embed),
            *zip(at.attn, vectors.attn, strict=True),
            *zip(at.mlp, vectors.mlp, strict=True),
        ]
        if at.pos_embed is not None:
            written.append((at.pos_embed, vectors.pos_embed))
        adjoints = torch.autograd.grad(
            read,
            [leaf for leaf, _ in written],
            seeds,
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=True,
        )
        rows = readouts.directions.new_zeros(n_targets, len(self.sources.nodes))
        for adjoint, (_, segments) in zip(adjoints, written, strict=True):
            if adjoint is not None:
                _contract(adjoint, segments, rows)
        return rows


def _elsewhere(x: Stream) -> Stream:
    """A leaf for gradients. A linear map has one gradient everywhere; it is not taken at the clean values, since some
    bridges (Granite's) leave out a write that equals what is there, and with it the way back."""
    return (2 * x + 1).requires_grad_()


def _contract(adjoint: Float[Tensor, "n_targets pos d_model"], segments: list[Segment], edges: EdgeRows) -> None:
    """Add to `edges` what the vectors of one site give, one matrix product a position."""
    for segment in segments:
        edges.index_add_(1, segment.nodes, adjoint[:, segment.pos] @ segment.vectors.T)
