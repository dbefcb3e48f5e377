"""Graphs on disk: one safetensors file with JSON metadata."""

from __future__ import annotations

import json
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tl_clt.attribution import checks
from tl_clt.attribution.edges import CSR, csr, from_csr, is_sparse
from tl_clt.attribution.graph import AttributionGraph
from tl_clt.attribution.nodes import Nodes
from tl_clt.attribution.row_store import zero_rows
from tl_clt.attribution.targets import NAMED_TARGETS, DirectionTarget, NamedTarget
from tl_clt.errors import FormatError
from tl_clt.files import new_file, read_json, reading

FORMAT = "tl_clt.attribution_graph"
VERSION = 3
"""1: all rows of dense graphs. 2: of those with few traced rows, these alone. 3: of pruned graphs, what was cut."""
SPARSE = {"adjacency_starts": "starts", "adjacency_cols": "cols", "adjacency_values": "values"}


def save_graph(graph: AttributionGraph, path: Path) -> Path:
    """Write a graph, all or nothing.

    Raises:
        NotWritten: the path is a folder, or the disk is full, for example; nothing half-written is left.
    """
    tensors = {
        **graph.nodes.tensors(),
        **_edges_out(graph.adjacency, graph.expanded),
        "expanded": graph.expanded,
        "tokens": graph.tokens,
        "logit_probs": graph.logit_probs,
    }
    targets = graph.targets or []
    for number, target in enumerate(targets):
        if isinstance(target, DirectionTarget):
            # safetensors takes no tensor twice, and two targets may read along the same one.
            tensors[f"direction_{number}"] = torch.as_tensor(target.direction).clone()
    for name in ("dropped", "contrast_activation"):
        if getattr(graph, name) is not None:
            tensors[name] = getattr(graph, name)
    about = {
        "version": VERSION,
        "prompt_tokens": graph.prompt_tokens,
        "logit_tokens": graph.logit_tokens,
        "info": graph.info,
        "targets": None if graph.targets is None else [_target_out(target) for target in graph.targets],
    }
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with new_file(path) as unfinished:
        save_file(ready, unfinished, metadata={"format": FORMAT, "about": json.dumps(about)})
    return path


def load_graph(path: Path) -> AttributionGraph:
    """Read a graph.

    Raises:
        FormatError: the file is missing, a folder, truncated, no graph, or one whose parts contradict each other.
        MemoryLimit: the system does not give the room for its adjacency.
    """
    if path.is_dir():
        raise FormatError(f"'{path}' is a folder. Give the graph file within it.")
    if not path.is_file():
        raise FormatError(f"'{path}' does not exist. Check the path of the graph file.")
    with reading(path, "graph file", "Copy it again."):
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise FormatError(f"'{path}' is a safetensors file, but no attribution graph.")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
        about = read_json(metadata["about"])
        version = about["version"]
        if type(version) is int and version > VERSION:
            raise FormatError(
                f"'{path}' is of graph version {version}, this tl_clt reads up to {VERSION}: update tl_clt."
            )
        checks.require_parts(tensors, about)
        graph = AttributionGraph(
            nodes=Nodes(**{f.name: tensors[f.name] for f in fields(Nodes)}),
            adjacency=_edges_in(tensors),
            expanded=tensors["expanded"],
            tokens=tensors["tokens"],
            logit_probs=tensors["logit_probs"],
            prompt_tokens=about["prompt_tokens"],
            logit_tokens=about["logit_tokens"],
            targets=_targets_in(about.get("targets"), tensors),
            dropped=tensors.get("dropped"),
            contrast_activation=tensors.get("contrast_activation"),
            info=about["info"],
        )
        if graph.targets is not None and len(graph.targets) != len(graph.logit_tokens):
            raise FormatError(
                f"'{path}' describes {len(graph.targets)} targets, but has {len(graph.logit_tokens)} target nodes."
            )
        checks.require_acyclic(graph)
    if version < 3 and "node_threshold" in graph.info:
        warnings.warn(
            f"'{path}' is a pruned graph that does not tell what was cut, as files had it before graph version 3: its"
            " influence and scores are those of what is left, with bounds that leave out what was cut. Prune the whole"
            " graph again.",
            stacklevel=3,
        )
    return graph


def _target_out(target: NamedTarget) -> dict[str, Any]:
    """A target in plain values; a direction's vector is a tensor of its own."""
    values = {f.name: getattr(target, f.name) for f in fields(target) if f.name != "direction"}
    return {"kind": type(target).__name__, **values}


def _targets_in(given: list[dict[str, Any]] | None, tensors: dict[str, Tensor]) -> list[NamedTarget] | None:
    if given is None:
        return None
    kinds = {kind.__name__: kind for kind in NAMED_TARGETS}
    found: list[NamedTarget] = []
    for number, values in enumerate(given):
        arguments = {name: value for name, value in values.items() if name != "kind"}
        if f"direction_{number}" in tensors:
            arguments["direction"] = tensors[f"direction_{number}"]
        found.append(kinds[values["kind"]](**arguments))
    return found


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
    parts = CSR(*(tensors[name] for name in SPARSE))
    checks.require_csr(parts, len(tensors["kind"]))
    return from_csr(parts)
