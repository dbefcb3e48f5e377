"""The nodes that write into the residual stream, as vectors: activation times decoder vector, error, embedding, bias.

edge(s -> t) = sum over the sites where s writes of vector . J(site, pos -> what t reads). An engine finds J's
transpose applied to t's read-out direction (the adjoint); `Sources.edges` contracts it with the vectors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_clt.attribution.local import Biases, LocalReplacementModel
from tl_clt.attribution.nodes import NodeKind, Nodes

Adjoint = Float[Tensor, "n_targets pos d_model"]


class Segment(NamedTuple):
    """Vectors that are written at one position of one site."""

    pos: int
    nodes: Int[Tensor, " n"]
    vectors: Float[Tensor, "n d_model"]


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
    biases: Biases | None
    """Where bias nodes are wanted."""


def contract(adjoint: Adjoint, segments: list[Segment], edges: Float[Tensor, "n_targets n_nodes"]) -> None:
    """Add to `edges` what the vectors of one site give, one matrix product a position."""
    for segment in segments:
        edges.index_add_(1, segment.nodes, adjoint[:, segment.pos] @ segment.vectors.T)


def build_sources(
    local: LocalReplacementModel,
    logit_tokens: Int[Tensor, " n_logits"],
    logit_heights: Float[Tensor, " n_logits"],
    bias_nodes: bool,
) -> Sources:
    """Number the nodes and gather the vectors that they write.

    Args:
        local: the prompt's local replacement model.
        logit_tokens: token ids of the logit nodes, and `logit_heights`, their logits minus the mean logit.
        bias_nodes: whether there are position and bias nodes.
    """
    biases = local.biases() if bias_nodes else None
    nodes = _number_nodes(local, logit_tokens, logit_heights, biases)
    n_layers, n_pos = local.n_layers, len(local.tokens)
    everywhere = torch.arange(n_pos, device=local.tokens.device)
    mlp: list[list[tuple[Tensor, Tensor, Tensor]]] = [_feature_writes(local, t) for t in range(n_layers)]
    errors = nodes.where(NodeKind.ERROR).reshape(n_layers, n_pos)
    for t in range(n_layers):
        mlp[t].append((everywhere, errors[t], local.errors[t]))
    embed = [(everywhere, nodes.where(NodeKind.TOKEN), local.sites.embed)]
    attn: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in range(n_layers)]
    pos_embed = []
    if biases is not None:
        if local.sites.pos_embed is not None:
            pos_embed = [(everywhere, nodes.where(NodeKind.POSITION), local.sites.pos_embed)]
        for t, node in enumerate(nodes.where(NodeKind.BIAS)[:n_layers]):
            attn[t].append((everywhere, node.expand(n_pos), biases.attn[t]))
            mlp[t].append((everywhere, node.expand(n_pos), biases.mlp[t]))
    sites = SiteVectors(
        _segments(embed), _segments(pos_embed), [_segments(w) for w in attn], [_segments(w) for w in mlp]
    )
    return Sources(nodes, sites, biases)


def _number_nodes(
    local: LocalReplacementModel, logit_tokens: Tensor, logit_heights: Tensor, biases: Biases | None
) -> Nodes:
    n_layers, n_pos, device = local.n_layers, len(local.tokens), local.tokens.device
    features = local.features
    pos = torch.arange(n_pos, device=device)
    error_layers = torch.arange(n_layers, device=device).repeat_interleave(n_pos)
    none = torch.zeros_like(error_layers)
    parts = [
        (NodeKind.FEATURE, features.layer, features.pos, features.feature, features.activation),
        (NodeKind.ERROR, error_layers, pos.repeat(n_layers), none, local.errors.norm(dim=-1).flatten()),
        (NodeKind.TOKEN, torch.full_like(pos, -1), pos, local.tokens, local.sites.embed.norm(dim=-1)),
    ]
    if biases is not None:
        if local.sites.pos_embed is not None:
            norms = local.sites.pos_embed.norm(dim=-1)
            parts.append((NodeKind.POSITION, torch.full_like(pos, -1), pos, torch.zeros_like(pos), norms))
        layers = torch.arange(n_layers + 1, device=device)
        blocks = (biases.attn.square() + biases.mlp.square()).sum(dim=(1, 2)).sqrt()
        norms = torch.cat([blocks, biases.final[-1:].norm(dim=-1)])
        parts.append((NodeKind.BIAS, layers, torch.full_like(layers, -1), torch.zeros_like(layers), norms))
    at_end = torch.full_like(logit_tokens, n_pos - 1)
    parts.append((NodeKind.LOGIT, torch.full_like(logit_tokens, n_layers), at_end, logit_tokens, logit_heights))
    return Nodes.build(parts)


@torch.no_grad()
def _feature_writes(local: LocalReplacementModel, target: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(pos, nodes, vectors) that the features of every source layer write to one target layer."""
    features, clt = local.features, local.clt
    writes = []
    for source in clt.cfg.sources(target):
        nodes = torch.nonzero(features.layer == source).flatten()
        unique, back = torch.unique(features.feature[nodes], return_inverse=True)
        rows = clt.decoder_rows(source, unique)[:, target - source][back]
        writes.append((features.pos[nodes], nodes, rows * features.activation[nodes, None]))
    return writes


def _segments(writes: list[tuple[Tensor, Tensor, Tensor]]) -> list[Segment]:
    """Order (pos, nodes, vectors) by position and cut them into one segment a position."""
    if not writes:
        return []
    pos, nodes, vectors = (torch.cat([w[i] for w in writes]) for i in range(3))
    order = torch.argsort(pos, stable=True)
    counts = torch.bincount(pos).tolist()
    parts = zip(nodes[order].split(counts), vectors[order].split(counts), strict=True)
    return [Segment(p, n, v) for p, (n, v) in enumerate(parts) if len(n)]
