"""The nodes that write into the residual stream, as vectors: activation times decoder vector, error, embedding, bias.

edge(s -> t) = sum over the sites where s writes of vector . J(site, pos -> what t reads). An engine finds J's
transpose applied to t's read-out direction (the adjoint), and contracts it with the vectors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_clt.attribution.edges import NodeKind, Nodes
from tl_clt.attribution.local import LocalReplacementModel
from tl_clt.attribution.streams import Stream, Writes
from tl_clt.attribution.targets import Targets
from tl_clt.transcoder import CrossLayerTranscoder

NUMBERS_AT_ONCE = 2**22
"""Of decoder rows in memory besides the vectors that are made of them."""


class Segment(NamedTuple):
    """Vectors that are written at one position of one site."""

    pos: int
    nodes: Int[Tensor, " n"]
    """Features first, in order."""
    vectors: Tensor
    """[n, d_model]"""
    n_features: int


class SiteVectors(NamedTuple):
    """Everything written at each site, as segments ordered by position."""

    embed: list[Segment]
    pos_embed: list[Segment]
    attn: list[list[Segment]]
    mlp: list[list[Segment]]


class Sources(NamedTuple):
    """All nodes, and what they write."""

    nodes: Nodes
    sites: SiteVectors
    writes: Writes


def build_sources(local: LocalReplacementModel, writes: Writes, targets: Targets) -> Sources:
    """Number the nodes and gather the vectors that they write.

    Args:
        local: the prompt's local replacement model.
        writes: what its nodes write, or how that differs from another prompt's.
        targets: the target nodes.
    """
    nodes = _number_nodes(local, writes, targets)
    n_layers, biases = local.n_layers, writes.biases
    errors = nodes.where(NodeKind.ERROR).reshape(n_layers, -1)
    bias_nodes = nodes.where(NodeKind.BIAS)
    mlp, attn, pos_embed = [], [], []
    for t in range(n_layers):
        others = [(errors[t], writes.errors[t])]
        if biases is not None:
            of_block = bias_nodes[t].expand(len(local.tokens))
            others.append((of_block, biases.mlp[t]))
            attn.append(_everywhere(of_block, biases.attn[t]))
        mlp.append(_MLPSite(writes, local.clt.cfg.sources(t), others))
    _put_features(local.clt, writes, mlp)
    if writes.pos_embed is not None:
        pos_embed = _everywhere(nodes.where(NodeKind.POSITION), writes.pos_embed)
    embed = _everywhere(nodes.where(NodeKind.TOKEN), writes.embed)
    segments = [site.segments() for site in mlp]
    return Sources(nodes, SiteVectors(embed, pos_embed, attn or [[] for _ in range(n_layers)], segments), writes)


def _number_nodes(local: LocalReplacementModel, writes: Writes, targets: Targets) -> Nodes:
    n_layers, n_pos, device = local.n_layers, len(local.tokens), local.tokens.device
    features, biases = writes.features, writes.biases
    pos = torch.arange(n_pos, device=device)
    error_layers = torch.arange(n_layers, device=device).repeat_interleave(n_pos)
    none = torch.zeros_like(error_layers)
    parts = [
        (NodeKind.FEATURE, features.layer, features.pos, features.feature, features.activation),
        (NodeKind.ERROR, error_layers, pos.repeat(n_layers), none, writes.errors.norm(dim=-1).flatten()),
        (NodeKind.TOKEN, torch.full_like(pos, -1), pos, local.tokens, writes.embed.norm(dim=-1)),
    ]
    if writes.pos_embed is not None:
        norms = writes.pos_embed.norm(dim=-1)
        parts.append((NodeKind.POSITION, torch.full_like(pos, -1), pos, torch.zeros_like(pos), norms))
    if biases is not None:
        layers = torch.arange(n_layers + 1, device=device)
        blocks = (biases.attn.square() + biases.mlp.square()).sum(dim=(1, 2)).sqrt()
        norms = torch.cat([blocks, biases.reads[n_layers][-1:].norm(dim=-1)])
        parts.append((NodeKind.BIAS, layers, torch.full_like(layers, -1), torch.zeros_like(layers), norms))
    parts.append((NodeKind.LOGIT, targets.layers, targets.readouts.pos, targets.index, targets.heights))
    return Nodes.build(parts)


class _MLPSite:
    """The vectors of one MLP site, straight in their final place: by position; there features, then the rest."""

    def __init__(self, writes: Writes, sources: range, others: list[tuple[Tensor, Stream]]) -> None:
        layers, device = writes.features.layer, writes.embed.device
        bounds = torch.searchsorted(layers, torch.tensor([sources.start, sources.stop], device=device)).tolist()
        self.first_node, stop = bounds
        feature_nodes = torch.arange(*bounds, device=device)
        everywhere = torch.arange(len(writes.embed), device=device)
        pos = torch.cat([writes.features.pos[self.first_node : stop], *(everywhere for _ in others)])
        order = torch.argsort(pos, stable=True)
        self.nodes = torch.cat([feature_nodes, *(nodes for nodes, _ in others)])[order]
        self.place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=device))
        self.sizes = torch.bincount(pos, minlength=len(everywhere)).tolist()
        self.n_others = len(others)
        self.vectors = writes.embed.new_empty(len(pos), writes.embed.shape[1])
        for i, (_, vectors) in enumerate(others):
            start = len(feature_nodes) + i * len(everywhere)
            self.vectors[self.place[start : start + len(everywhere)]] = vectors

    def put(self, nodes: Int[Tensor, " n"], vectors: Float[Tensor, "n d_model"]) -> None:
        """The vectors that some feature nodes write here."""
        self.vectors[self.place[nodes - self.first_node]] = vectors

    def segments(self) -> list[Segment]:
        """One a position."""
        parts = zip(self.nodes.split(self.sizes), self.vectors.split(self.sizes), strict=True)
        return [Segment(p, n, v, len(n) - self.n_others) for p, (n, v) in enumerate(parts)]


@torch.no_grad()
def _put_features(clt: CrossLayerTranscoder, writes: Writes, mlp: list[_MLPSite]) -> None:
    """Decoder vectors times strengths, to every layer that each source layer writes; decoders are read once."""
    features = writes.features
    for source in clt.layers:
        nodes = torch.nonzero(features.layer == source).flatten()
        nodes = nodes[torch.argsort(features.feature[nodes], stable=True)]
        for some in nodes.split(max(1, NUMBERS_AT_ONCE // (len(clt.cfg.targets(source)) * clt.cfg.d_model))):
            unique, back = torch.unique_consecutive(features.feature[some], return_inverse=True)
            rows = clt.decoder_rows(source, unique)
            for slot, target in enumerate(clt.cfg.targets(source)):
                vectors = rows[:, slot].to(writes.strengths.dtype)[back]
                mlp[target].put(some, vectors.mul_(writes.strengths[some, None]))


def _everywhere(nodes: Int[Tensor, " pos"], vectors: Stream) -> list[Segment]:
    """One node's vector at each position."""
    return [Segment(p, nodes[p : p + 1], vectors[p : p + 1], 0) for p in range(len(nodes))]
