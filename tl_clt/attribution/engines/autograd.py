"""The definition: run the local replacement model once with gradients on, then one backward pass a target.

The adjoint of a target is the gradient of what it reads with respect to each site, which autograd gives for a
batch of targets at a time; its products with the source vectors are the edges.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_clt.attribution.local import LocalReplacementModel, Sites
from tl_clt.attribution.nodes import NodeKind
from tl_clt.attribution.sources import Sources, contract
from tl_clt.attribution.targets import LogitTargets


class AutogradEngine:
    """Edges by backward passes through the held model."""

    name = "autograd"

    def __init__(self, local: LocalReplacementModel, sources: Sources, logits: LogitTargets) -> None:
        self.local = local
        self.sources = sources
        self.logits = logits
        with torch.enable_grad():
            at = local.sites
            self.sites = Sites(
                at.embed.clone().requires_grad_(),
                None if at.pos_embed is None else at.pos_embed.clone().requires_grad_(),
                [x.clone().requires_grad_() for x in at.attn],
                [x.clone().requires_grad_() for x in at.mlp],
            )
            self.reads = local.run(self.sites)

    def feature_rows(self, features: Int[Tensor, " n_targets"]) -> Float[Tensor, "n_targets n_nodes"]:
        """In-edges of feature nodes, which must all read the same layer: `W_enc[l][:, f]` at their positions."""
        active = self.local.features
        layers = active.layer[features].unique().tolist()
        assert len(layers) == 1, f"one batch of targets reads layers {layers}"
        layer = int(layers[0])
        directions = self.local.clt.W_enc[layer].detach()[:, active.feature[features]].T
        rows = self._rows(self.reads.inputs[layer], directions, active.pos[features])
        self._add_read_bias(rows, layer, directions, active.pos[features])
        return rows

    def logit_rows(self) -> Float[Tensor, "n_logits n_nodes"]:
        """In-edges of the logit nodes, at the last position."""
        pos = torch.full_like(self.logits.tokens, len(self.local.tokens) - 1)
        rows = self._rows(self.reads.final, self.logits.directions, pos)
        self._add_read_bias(rows, self.local.n_layers, self.logits.directions, pos)
        return rows

    def _rows(
        self,
        read: Float[Tensor, "pos d_model"],
        directions: Float[Tensor, "n_targets d_model"],
        pos: Int[Tensor, " n_targets"],
    ) -> Float[Tensor, "n_targets n_nodes"]:
        seeds = directions.new_zeros(len(pos), *read.shape)
        seeds[torch.arange(len(pos)), pos] = directions
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
            seeds.to(read.dtype),
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=True,
        )
        rows = directions.new_zeros(len(pos), len(self.sources.nodes))
        for adjoint, (_, segments) in zip(adjoints, written, strict=True):
            if adjoint is not None:
                contract(adjoint, segments, rows)
        return rows

    def _add_read_bias(
        self,
        rows: Float[Tensor, "n_targets n_nodes"],
        layer: int,
        directions: Float[Tensor, "n_targets d_model"],
        pos: Int[Tensor, " n_targets"],
    ) -> None:
        """What the norm's bias on the way to the read-out (and b_U for logits) gives, to that layer's bias node."""
        biases = self.sources.biases
        if biases is None:
            return
        at_end = layer == self.local.n_layers
        read_bias = biases.final if at_end else biases.inputs[layer]
        given = (read_bias[pos] * directions).sum(dim=-1) + (self.logits.biases if at_end else 0)
        rows[:, self.sources.nodes.where(NodeKind.BIAS)[layer]] += given
