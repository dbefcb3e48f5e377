"""What every engine does: in-edges of target nodes, given what they read."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_clt.attribution.local import LocalReplacementModel
from tl_clt.attribution.nodes import NodeKind
from tl_clt.attribution.sources import Sources
from tl_clt.attribution.streams import Readouts

EdgeRows = Float[Tensor, "n_targets n_nodes"]


class Engine(ABC):
    """Finds rows of the adjacency."""

    name: str

    def __init__(self, local: LocalReplacementModel, sources: Sources) -> None:
        self.local = local
        self.sources = sources

    @torch.no_grad()
    def rows(self, readouts: Readouts) -> EdgeRows:
        """In-edges of targets that read these."""
        rows = self._written(readouts)
        self._add_read_biases(rows, readouts)
        return rows

    @abstractmethod
    def batches(
        self, point: Int[Tensor, " n_targets"], pos: Int[Tensor, " n_targets"], size: int
    ) -> list[Int[Tensor, " n"]]:
        """Targets, by read point and position, in batches of at most `size` that this engine does well together."""

    @abstractmethod
    def _written(self, readouts: Readouts) -> EdgeRows:
        """Edges of everything that is written into the residual stream."""

    def _add_read_biases(self, rows: EdgeRows, readouts: Readouts) -> None:
        """What biases on the way to the read-out (of norms, and b_U) give, to that layer's bias node."""
        biases = self.sources.writes.biases
        if biases is None:
            return
        bias_nodes = self.sources.nodes.where(NodeKind.BIAS)
        for point in readouts.point.unique().tolist():
            at = torch.nonzero(readouts.point == point).flatten()
            if point < len(bias_nodes):
                read = biases.reads[point][readouts.pos[at]]
                given = (read * readouts.directions[at]).sum(dim=-1) + readouts.constants[at]
                rows[at, bias_nodes[point]] += given
