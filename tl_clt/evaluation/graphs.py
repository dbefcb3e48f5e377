"""Graphs of prompts, as numbers: how much of what a model does on them is features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tl_clt.attribution import AttributionGraph, NodeKind, PruneMasks, attribute
from tl_clt.attribution.edges import ROWS_AT_ONCE
from tl_clt.attribution.influence import SMALLEST_ROW_SUM
from tl_clt.lens import HookedModel
from tl_clt.transcoder import CrossLayerTranscoder


@dataclass(frozen=True, kw_only=True)
class GraphNumbers:
    """Of one prompt's graph, or means over prompts. "Whole" graphs are not pruned."""

    replacement: float
    """Of the whole graph, by the paper's reading: token influence / (token + error influence)."""
    completeness: float
    """Of the whole graph, by the paper's reading: inputs that are not errors, over nodes that have inputs."""
    completeness_circuit_tracer: float
    """The same by circuit-tracer's reading, which counts leaves as well. Never compare the two."""
    completeness_pruned: float
    """By the paper's reading, over the nodes that pruning at 0.8 and 0.98 keeps, where inputs that were pruned away
    count as unexplained."""
    path_length: float
    """Mean number of edges on a path from a token to a logit, paths weighted by their strength."""
    n_nodes: float
    """Of the whole graph."""
    n_nodes_pruned: float
    """Of the pruned graph."""
    unexplored: float
    """Share of influence at features that were not traced. No node's influence is off by more, nor is the numerator or
    the denominator of the replacement score; the scores are those of what is known."""
    n_tokens: float
    """Of the prompt."""


def graph_numbers(
    model: HookedModel,
    clt: CrossLayerTranscoder,
    prompts: Sequence[Tensor],
    max_unexplored: float | None = None,
    progress: bool = True,
) -> Iterator[GraphNumbers]:
    """Trace prompts, whose likeliest next tokens are the targets, one after another, keeping numbers alone.

    Raises:
        MemoryLimit, ModelUnsupported, LocalModelMismatch: as `attribute`.
    """
    for tokens in tqdm(prompts, desc="Tracing prompts", unit=" prompts", delay=2.0, disable=not progress):
        yield numbers_of(attribute(model, clt, tokens, max_unexplored=max_unexplored, progress=False))


def lacks_memory(error: Exception) -> bool:
    """Whether an error is of too little memory; torch says so of main memory in words alone."""
    said = str(error)
    in_words = "not enough memory" in said or "allocate memory" in said
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or in_words


def numbers_of(graph: AttributionGraph) -> GraphNumbers:
    """One graph's numbers."""
    scores, pruned = graph.scores("paper"), graph.prune_masks()
    return GraphNumbers(
        replacement=scores.replacement,
        completeness=scores.completeness,
        completeness_circuit_tracer=graph.scores("circuit-tracer").completeness,
        completeness_pruned=kept_completeness(graph, pruned),
        path_length=graph.path_length(),
        n_nodes=float(len(graph.nodes)),
        n_nodes_pruned=float(pruned.nodes.sum()),
        unexplored=graph.unexplored,
        n_tokens=float(len(graph.tokens)),
    )


def kept_completeness(graph: AttributionGraph, kept: PruneMasks) -> float:
    """Completeness of what pruning keeps of a graph that holds all edges.

    sum_t o_t K_t / sum_t o_t over kept features and logits t, with o = influence + w of the whole graph and K_t the
    share of t's absolute input, in the whole graph, that comes along kept edges from nodes other than errors.
    """
    nodes = graph.nodes
    rows = torch.nonzero(kept.nodes & nodes.is_kind(NodeKind.FEATURE, NodeKind.LOGIT)).flatten()
    counted = ~nodes.is_kind(NodeKind.ERROR)
    shares = []
    for some in rows.split(ROWS_AT_ONCE):
        inputs = graph.adjacency[some].abs()
        explained = (inputs * (kept.edges[some] & counted)).sum(dim=1)
        shares.append(explained / inputs.sum(dim=1).clamp_min(SMALLEST_ROW_SUM))
    share = torch.cat(shares)
    output = (graph.influence() + graph.logit_weights)[rows]
    return float((output * share).sum() / output.sum())


def mean_numbers(numbers: Sequence[GraphNumbers]) -> GraphNumbers:
    """Means over prompts; at least one."""
    return GraphNumbers(
        **{f.name: sum(getattr(n, f.name) for n in numbers) / len(numbers) for f in fields(GraphNumbers)}
    )
