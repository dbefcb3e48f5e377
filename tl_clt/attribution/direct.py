"""What of each edge goes through no attention head.

An edge is what a source's vector gives to what a target reads, through the residual stream and through attention's OV
circuits with patterns held. With all patterns 0 instead, attention passes nothing on, and what is left of the edge is
its direct part: along the residual stream of one position, with the same norm scales. The rest is attention-mediated.
Between different positions all of an edge is; at one position attention to the position itself, and by way of others,
has a part as well.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_clt.attribution.autograd import AutogradEngine
from tl_clt.attribution.edges import NodeKind, Nodes
from tl_clt.attribution.graph import AttributionGraph
from tl_clt.attribution.local import build_local_model, build_sources
from tl_clt.attribution.targets import feature_readouts, find_targets, residual_hooks
from tl_clt.errors import CLTMismatch, ConfigError
from tl_clt.lens import HookedModel
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
    if graph.contrast_activation is not None:
        raise ConfigError(
            "The graph is contrastive: its edges are differences of two prompts. Trace one prompt, without contrast."
        )
    if graph.targets is None:
        raise ConfigError("The graph's file is too old to tell its targets. Trace the prompt again.")
    with torch.inference_mode(False):
        bos, hooks = graph.info.get("bos", "error"), residual_hooks(model, graph.targets)
        local = build_local_model(model, clt, graph.tokens.clone(), bos, hooks)
        has_biases = bool(graph.nodes.is_kind(NodeKind.BIAS, NodeKind.POSITION).any())
        targets = find_targets(local, graph.targets, 1, 1.0)
        sources = build_sources(local, local.writes(has_biases), targets.nodes)
        numbers = _numbers_in(graph, sources.nodes)
        silent = {
            name: torch.zeros_like(held) if name.endswith("attn.hook_pattern") else held
            for name, held in local.frozen.items()
        }
        engine = AutogradEngine(replace(local, frozen=silent), sources)
        direct = graph.logit_probs.new_zeros(len(graph.nodes), len(graph.nodes), dtype=local.dtype)
        rows = torch.nonzero(graph.expanded & graph.nodes.is_kind(NodeKind.FEATURE)).flatten()
        nodes = graph.nodes
        reads = [(rows, feature_readouts(local, nodes.layer[rows], nodes.pos[rows], nodes.index[rows]))]
        reads.append((nodes.where(NodeKind.LOGIT), targets.readouts))
        for some, readouts in reads:
            for at in torch.arange(len(some)).split(ROWS_AT_ONCE):
                direct[some[at]] = engine.find_rows(readouts.take(at))[:, numbers]
        # What the graph does not keep is not of its edges.
        kept = graph.adjacency.to_dense() if graph.is_sparse else graph.adjacency
        return direct * (kept != 0)


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
