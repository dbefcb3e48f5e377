"""Graphs on disk: one safetensors file with JSON metadata."""

from __future__ import annotations

import json
import warnings
from dataclasses import fields
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tl_clt.attribution.edges import CSR, csr, from_csr, is_sparse
from tl_clt.attribution.graph import AttributionGraph
from tl_clt.attribution.nodes import Nodes
from tl_clt.attribution.row_store import zero_rows
from tl_clt.errors import FormatError
from tl_clt.transcoder.formats.writing import new_file

FORMAT = "tl_clt.attribution_graph"
VERSION = 3
"""1: all rows of dense graphs. 2: of those with few traced rows, these alone. 3: of pruned graphs, what was cut."""
SPARSE = {"adjacency_starts": "starts", "adjacency_cols": "cols", "adjacency_values": "values"}


def save_graph(graph: AttributionGraph, path: Path) -> Path:
    """Write a graph, all or nothing."""
    tensors = {
        **graph.nodes.tensors(),
        **_edges_out(graph.adjacency, graph.expanded),
        "expanded": graph.expanded,
        "tokens": graph.tokens,
        "logit_probs": graph.logit_probs,
    }
    for name in ("dropped", "contrast_activation"):
        if getattr(graph, name) is not None:
            tensors[name] = getattr(graph, name)
    about = {
        "version": VERSION,
        "prompt_tokens": graph.prompt_tokens,
        "logit_tokens": graph.logit_tokens,
        "info": graph.info,
    }
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with new_file(path) as unfinished:
        save_file(ready, unfinished, metadata={"format": FORMAT, "about": json.dumps(about)})
    return path


def load_graph(path: Path) -> AttributionGraph:
    """Read a graph."""
    if not path.is_file():
        raise FormatError(f"'{path}' does not exist. Check the path of the graph file.")
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise FormatError(f"'{path}' is a safetensors file, but no attribution graph.")
            about = json.loads(metadata["about"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    except (SafetensorError, OSError) as error:
        raise FormatError(f"'{path}' is truncated or no graph file ({error}). Copy it again.") from error
    if about["version"] > VERSION:
        raise FormatError(
            f"'{path}' is of graph version {about['version']}, this tl_clt reads up to {VERSION}: update tl_clt."
        )
    if about["version"] < 3 and "node_threshold" in about["info"]:
        warnings.warn(
            f"'{path}' is a pruned graph that does not tell what was cut, as files had it before graph version 3: its"
            " influence and scores are those of what is left, with bounds that leave out what was cut. Prune the whole"
            " graph again.",
            stacklevel=3,
        )
    return AttributionGraph(
        nodes=Nodes(**{f.name: tensors[f.name] for f in fields(Nodes)}),
        adjacency=_edges_in(tensors),
        expanded=tensors["expanded"],
        tokens=tensors["tokens"],
        logit_probs=tensors["logit_probs"],
        prompt_tokens=about["prompt_tokens"],
        logit_tokens=about["logit_tokens"],
        dropped=tensors.get("dropped"),
        contrast_activation=tensors.get("contrast_activation"),
        info=about["info"],
    )


def _edges_out(adjacency: Tensor, expanded: Tensor) -> dict[str, Tensor]:
    if not is_sparse(adjacency):
        few = int(expanded.sum()) < len(expanded) / 2
        return {"adjacency_of_expanded": adjacency[expanded]} if few else {"adjacency": adjacency}
    parts = csr(adjacency)
    return {name: getattr(parts, part) for name, part in SPARSE.items()}


def _edges_in(tensors: dict[str, Tensor]) -> Tensor:
    if "adjacency" in tensors:
        return tensors["adjacency"]
    if "adjacency_of_expanded" in tensors:
        expanded, rows = tensors["expanded"], tensors["adjacency_of_expanded"]
        adjacency = zero_rows(len(expanded), rows.dtype, rows.device)
        adjacency[expanded] = rows
        return adjacency
    return from_csr(CSR(*(tensors[name] for name in SPARSE)))
