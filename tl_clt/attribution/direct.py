"""What of each edge goes through no attention head, and what goes through each head.

An edge is what a source's vector gives to what a target reads, through the residual stream and through attention's OV
circuits with patterns held. With all patterns 0 instead, attention passes nothing on, and what is left of the edge is
its direct part: along the residual stream of one position, with the same norm scales. The rest is attention-mediated.
Between different positions all of an edge is; at one position attention to the position itself, and by way of others,
has a part as well.

With patterns and scales held, what head h of a layer writes at a position is linear in the residual stream x before it,

    head_h[query] = sum over keys of pattern_h[query, key] . norm(x[key]) W_V,h W_O,h

(norm without its bias), and all that an attention layer writes is the sum over its heads and what its biases write.
What goes through a head to a target is what the target would lose without it,

    through_h(t) = sum over queries of head_h[query] . J(query, behind attention -> what t reads)

where J is again the map through residual stream and attention (`total`), or through the residual stream alone
(`direct`). Direct parts of all heads, nodes and biases sum to the target's value; total ones count what passes several
heads once for each.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from tl_clt.attribution.autograd import AutogradEngine
from tl_clt.attribution.edges import NodeKind, Nodes
from tl_clt.attribution.graph import AttributionGraph
from tl_clt.attribution.local import LocalReplacementModel, Readouts, Sources, build_local_model, build_sources
from tl_clt.attribution.supernodes import Features, as_feature_nodes
from tl_clt.attribution.sweep import FoldedModel, FrozenMaps, fold_model
from tl_clt.attribution.targets import feature_readouts, find_targets, residual_hooks
from tl_clt.errors import CLTMismatch, ConfigError
from tl_clt.lens import HookedModel, block_hook
from tl_clt.transcoder import CrossLayerTranscoder

ROWS_AT_ONCE = 64


def find_direct_edges(
    graph: AttributionGraph, model: HookedModel, clt: CrossLayerTranscoder
) -> Float[Tensor, "n_nodes n_nodes"]:
    """The part of each edge of a graph that goes through no attention head, [target, source]; 0 where there is no edge.

    By the definition of edges: one backward pass a traced node. Take a pruned graph where there are many.

    Args:
        graph: of one prompt, whole or pruned; not contrastive.
        model: the model that it was traced in.
        clt: the CLT that it was traced with.

    Raises:
        ConfigError: the graph is contrastive, or of an older file that does not tell its targets.
        CLTMismatch: model and CLT do not have the graph's nodes on its prompt.
    """
    with torch.inference_mode(False):
        again = _retrace(graph, model, clt)
        engine = AutogradEngine(_silence(again.local), again.sources)
        direct = graph.logit_probs.new_zeros(len(graph.nodes), len(graph.nodes), dtype=again.local.dtype)
        rows = torch.nonzero(graph.expanded & graph.nodes.is_kind(NodeKind.FEATURE)).flatten()
        for some, readouts in ((rows, _reads(again.local, graph, rows)), (again.logits, again.readouts)):
            for at in torch.arange(len(some)).split(ROWS_AT_ONCE):
                direct[some[at]] = engine.find_rows(readouts.take(at))[:, again.numbers]
        # What the graph does not keep is not of its edges.
        kept = graph.adjacency.to_dense() if graph.is_sparse else graph.adjacency
        return direct * (kept != 0)


class HeadEffects(NamedTuple):
    """What goes through each attention head to some nodes of a graph."""

    nodes: Int[Tensor, " n"]
    """Their numbers: features first, then the targets."""

    total: Float[Tensor, "n n_layers n_heads"]
    """Through each head, whatever comes behind it."""

    direct: Float[Tensor, "n_logits n_layers n_heads"]
    """To the targets, through each head and then no other."""

    direct_nodes: Float[Tensor, "n_logits n_nodes"]
    """To the targets from each node, through no head."""


def find_head_effects(
    graph: AttributionGraph, model: HookedModel, clt: CrossLayerTranscoder, nodes: Features
) -> HeadEffects:
    """What goes through each attention head to the targets of a graph and to some of its features.

    Args:
        graph: of one prompt, not contrastive; whole, if the direct parts are to sum to the targets' values.
        model, clt: those that it was traced with.
        nodes: numbers of feature nodes, or a mask of all nodes, of which the features count.

    Raises:
        ConfigError: the graph is contrastive, or of an older file that does not tell its targets; nodes are none of
            its features.
        CLTMismatch: model and CLT do not have the graph's nodes on its prompt.
        ModelUnsupported: attention has no W_V and W_O, or norms of an unknown kind.
    """
    chosen = as_feature_nodes(graph, "nodes", nodes)
    with torch.inference_mode(False):
        again = _retrace(graph, model, clt, [block_hook(t, "hook_resid_pre") for t in clt.layers])
        features = torch.tensor(chosen, dtype=torch.long, device=again.logits.device)
        written = _write_heads(again, fold_model(model, clt))
        engine = AutogradEngine(again.local, again.sources)
        silent = AutogradEngine(_silence(again.local), again.sources)
        return HeadEffects(
            nodes=torch.cat([features, again.logits]),
            total=torch.cat(
                [
                    _pass_heads(engine, _reads(again.local, graph, features), written),
                    _pass_heads(engine, again.readouts, written),
                ]
            ),
            direct=_pass_heads(silent, again.readouts, written),
            direct_nodes=silent.find_rows(again.readouts)[:, again.numbers],
        )


class _Retraced(NamedTuple):
    """A graph's prompt, run again."""

    local: LocalReplacementModel
    sources: Sources
    readouts: Readouts
    """Of the targets."""
    logits: Int[Tensor, " n_logits"]
    """The targets' numbers in the graph."""
    numbers: Int[Tensor, " n_nodes"]
    """Of each of the graph's nodes, its number among the sources."""
    points: list[int]
    """Read points of the residual-stream hooks that were asked for."""


def _retrace(
    graph: AttributionGraph, model: HookedModel, clt: CrossLayerTranscoder, read: list[str] | None = None
) -> _Retraced:
    if graph.contrast_activation is not None:
        raise ConfigError(
            "The graph is contrastive: its edges are differences of two prompts. Trace one prompt, without contrast."
        )
    if graph.targets is None:
        raise ConfigError("The graph's file is too old to tell its targets. Trace the prompt again.")
    bos, read = graph.info.get("bos", "error"), read or []
    hooks = list(dict.fromkeys([*residual_hooks(model, graph.targets), *read]))
    local = build_local_model(model, clt, graph.tokens.clone(), bos, hooks)
    has_biases = bool(graph.nodes.is_kind(NodeKind.BIAS, NodeKind.POSITION).any())
    targets = find_targets(local, graph.targets, 1, 1.0)
    sources = build_sources(local, local.writes(has_biases), targets.nodes)
    points = [local.n_layers + 1 + hooks.index(name) for name in read]
    numbers = _numbers_in(graph, sources.nodes)
    return _Retraced(local, sources, targets.readouts, graph.nodes.where(NodeKind.LOGIT), numbers, points)


def _silence(local: LocalReplacementModel) -> LocalReplacementModel:
    """The local replacement model with all attention patterns 0."""
    patterns = {name for name in local.frozen if name.endswith("attn.hook_pattern")}
    return replace(local, frozen={n: torch.zeros_like(v) if n in patterns else v for n, v in local.frozen.items()})


def _reads(local: LocalReplacementModel, graph: AttributionGraph, features: Int[Tensor, " n"]) -> Readouts:
    nodes = graph.nodes
    return feature_readouts(local, nodes.layer[features], nodes.pos[features], nodes.index[features])


@torch.no_grad()
def _write_heads(again: _Retraced, folded: FoldedModel) -> list[Float[Tensor, "n_heads pos d_model"]]:
    """What each head of each layer writes, but for biases."""
    patterns, found = FrozenMaps(again.local, folded).patterns, []
    for t, (ov, pattern) in enumerate(zip(folded.attention, patterns, strict=True)):
        x = again.local.clean.points[again.points[t]]
        values = rearrange(x @ ov.to_in.T, "pos (group d_head) -> group pos d_head", group=ov.n_key_value_heads)
        values = values.repeat_interleave(ov.n_heads // ov.n_key_value_heads, dim=0)
        z = einsum(pattern, values, "head key query, head key d_head -> head query d_head")
        W_O = rearrange(ov.from_out, "d_model (head d_head) -> head d_head d_model", head=ov.n_heads)
        found.append(z @ W_O)
    return found


@torch.no_grad()
def _pass_heads(
    engine: AutogradEngine, readouts: Readouts, written: list[Float[Tensor, "n_heads pos d_model"]]
) -> Float[Tensor, "n_targets n_layers n_heads"]:
    effects = readouts.directions.new_zeros(len(readouts.pos), len(written), len(written[0]))
    first = 1 if engine.written.pos_embed is None else 2  # attention comes behind the embeddings
    for at in engine.batches(readouts.point, readouts.pos, ROWS_AT_ONCE):
        adjoints = engine.find_adjoints(readouts.take(at))
        for t, (adjoint, of) in enumerate(zip(adjoints[first : first + len(written)], written, strict=True)):
            if adjoint is not None:
                effects[at, t] = einsum(adjoint, of, "target pos d_model, head pos d_model -> target head")
    return effects


def _numbers_in(graph: AttributionGraph, nodes: Nodes) -> Int[Tensor, " n_nodes"]:
    """Of each node of a graph, its number among all nodes of the prompt."""

    def places(of: Nodes) -> list[tuple[int, ...]]:
        return list(zip(*(getattr(of, name).tolist() for name in ("kind", "layer", "pos", "index")), strict=True))

    number_of = {place: number for number, place in enumerate(places(nodes))}
    found = [number_of.get(place) for place in places(graph.nodes)]
    if None in found:
        missing = graph.nodes[found.index(None)]
        raise CLTMismatch(
            f"Model and CLT have no {missing.label} on the graph's prompt. Give those that it was traced with."
        )
    return torch.tensor(found, device=graph.nodes.kind.device)
