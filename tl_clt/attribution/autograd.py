"""What an engine is, and the definition of one: run the local replacement model once with gradients on, then one
backward pass a target.

    edge(feature i of layer s at pos p -> feature j of layer l at pos q)
        = a_i * sum over targets t of W_dec[s -> t]_i . J(t, p -> l, q) . W_enc[l]_j

(Methods, "Constructing an Attribution Graph for a Prompt"), with W_dec and W_enc [d_model] and J [d_model, d_model] as
`local` has it; other nodes write other vectors in the place of a_i W_dec, and other targets read other vectors in that
of W_enc.

An engine finds rows of the adjacency: the in-edges of target nodes, by what they read. All engines give the same
numbers. The adjoint of a target is the gradient of what it reads with respect to each place that is written into, which
autograd gives for a batch of targets at a time; its products with the source vectors are the edges.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_clt.attribution.edges import NodeKind
from tl_clt.attribution.local import LocalReplacementModel, Readouts, Sources, Stream
from tl_clt.errors import ModelUnsupported

EdgeRows = Float[Tensor, "n_targets n_nodes"]


class Engine(ABC):
    """Finds rows of the adjacency."""

    name: str

    def __init__(self, local: LocalReplacementModel, sources: Sources) -> None:
        self.local = local
        self.sources = sources

    @torch.no_grad()
    def find_rows(self, readouts: Readouts) -> EdgeRows:
        """The in-edges of the targets that have these readouts."""
        rows = self._find_written_edges(readouts)
        self._add_read_biases(rows, readouts)
        return rows

    @abstractmethod
    def batches(
        self, point: Int[Tensor, " n_targets"], pos: Int[Tensor, " n_targets"], size: int
    ) -> list[Int[Tensor, " n"]]:
        """Numbers of the targets with these read points and positions, in the engine's batches of at most `size`."""

    @abstractmethod
    def work_bytes(self, batch_size: int) -> int:
        """Bytes that a batch of targets takes while it is at work."""

    @abstractmethod
    def _find_written_edges(self, readouts: Readouts) -> EdgeRows:
        """Edges of everything that is written into the residual stream."""

    def _add_read_biases(self, rows: EdgeRows, readouts: Readouts) -> None:
        """What biases on the way to the read-out (of norms, and b_U) give, to that layer's bias node."""
        read_biases = self.sources.read_biases
        if read_biases is None:
            return
        bias_nodes = self.sources.nodes.where(NodeKind.BIAS)
        for point in readouts.point.unique().tolist():
            at = torch.nonzero(readouts.point == point).flatten()
            if point < len(bias_nodes):
                read = read_biases[point][readouts.pos[at]]
                rows[at, bias_nodes[point]] += (read * readouts.directions[at]).sum(dim=-1) + readouts.constants[at]


class AutogradEngine(Engine):
    """Edges by backward passes through the local replacement model."""

    name = "autograd"

    def __init__(self, local: LocalReplacementModel, sources: Sources) -> None:
        super().__init__(local, sources)
        if any(weight.is_inference() for of in (local.model, local.clt) for weight in of.parameters()):
            raise ModelUnsupported(
                "Weights that were made within torch.inference_mode() let no gradients through. Load model and CLT"
                " outside of it, or trace with engine='sweep'."
            )
        with torch.enable_grad():
            self.written = local.written.map(_leaf_elsewhere)
            self.reads = local.run(self.written)

    def batches(
        self, point: Int[Tensor, " n_targets"], pos: Int[Tensor, " n_targets"], size: int
    ) -> list[Int[Tensor, " n"]]:
        """Targets of one read point together: one backward pass starts at one place."""
        groups = []
        for read_point in point.unique().tolist():
            groups += torch.nonzero(point == read_point).flatten().split(size)
        return groups

    def work_bytes(self, batch_size: int) -> int:
        n_pos, d_model = self.local.written.embed.shape
        # Three copies of the edges, and gradients with respect to every place of every layer, and those on the way.
        numbers = 3 * len(self.sources.nodes) + n_pos * d_model * (4 * self.local.n_layers + 8)
        return self.local.dtype.itemsize * batch_size * numbers

    def _find_written_edges(self, readouts: Readouts) -> EdgeRows:
        rows = readouts.directions.new_zeros(len(readouts.pos), len(self.sources.nodes))
        for at in self.batches(readouts.point, readouts.pos, len(readouts.pos) or 1):
            rows[at] = self._from_one_point(readouts.take(at))
        return rows

    def find_adjoints(self, readouts: Readouts) -> tuple[Float[Tensor, "n_targets pos d_model"] | None, ...]:
        """How targets of one read point change with what is written at each place, in the order of `Places.values`;
        None where nothing that is written reaches them."""
        read = self.reads.points[int(readouts.point[0])]
        n_targets = len(readouts.pos)
        seeds = readouts.directions.new_zeros(n_targets, *read.shape)
        seeds[torch.arange(n_targets), readouts.pos] = readouts.directions
        return torch.autograd.grad(
            read, self.written.values(), seeds, retain_graph=True, allow_unused=True, is_grads_batched=True
        )

    def _from_one_point(self, readouts: Readouts) -> EdgeRows:
        rows = readouts.directions.new_zeros(len(readouts.pos), len(self.sources.nodes))
        for adjoint, segments in zip(self.find_adjoints(readouts), self.sources.vectors.values(), strict=True):
            if adjoint is not None:
                for segment in segments:
                    segment.add_edges(adjoint[:, segment.pos], rows)
        return rows


def _leaf_elsewhere(x: Stream) -> Stream:
    """A leaf for gradients. A linear map has one gradient everywhere; it is not taken at the clean values, since some
    bridges (Granite's) leave out a write that equals what is there, and with it the way back."""
    return (2 * x + 1).requires_grad_()
