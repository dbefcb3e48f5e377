"""Whether what a graph file holds is a graph: its parts fit each other, and its edges run from lower layers to higher.

Each check raises ValueError with what disagrees; the reader of files adds which file it is.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_clt.attribution.edges import CSR, ROWS_AT_ONCE, csr, row_sums
from tl_clt.attribution.graph import AttributionGraph
from tl_clt.attribution.nodes import NodeKind, Nodes

WHOLE = (torch.int32, torch.int64)
ADJACENCIES = ("adjacency", "adjacency_of_expanded", "adjacency_values")
PER_NODE = ("kind", "layer", "pos", "index", "activation", "expanded", "dropped", "contrast_activation")
PARTS = {*PER_NODE, *ADJACENCIES, "adjacency_starts", "adjacency_cols", "tokens", "logit_probs"}
"""Names of tensors, beside the directions of targets."""


def require_parts(tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Raise unless all parts are there, of the right types, and of numbers of entries that agree."""
    if type(about["version"]) is not int or about["version"] < 1 or not isinstance(about["info"], dict):
        raise ValueError(f"version {about['version']!r} with info of type {type(about['info']).__name__}")
    unknown = {name for name in tensors if name not in PARTS and not name.startswith("direction_")}
    _require(not unknown, f"it has a tensor {min(unknown, default='')!r}, for which a graph has no place")
    kind, n = tensors["kind"], len(tensors["kind"])
    for name in ("kind", "layer", "pos", "index"):
        _require_vector(name, tensors[name], n, "nodes")
        _require(tensors[name].dtype in WHOLE, f"{name} holds {tensors[name].dtype}, not whole numbers")
    edges = [name for name in ADJACENCIES if name in tensors]
    _require(len(edges) == 1, f"it has {len(edges)} adjacencies ({', '.join(edges)}), where one was expected")
    dtype = tensors[edges[0]].dtype
    for name in ("activation", "dropped", "contrast_activation"):
        if name in tensors:
            _require_vector(name, tensors[name], n, "nodes")
            _require_numbers(name, tensors[name])
    _require("dropped" not in tensors or tensors["dropped"].dtype == dtype, f"dropped and {edges[0]} differ in dtype")
    _require("dropped" not in tensors or bool((tensors["dropped"] >= 0).all()), "dropped has negative values")
    _require(dtype.is_floating_point, f"{edges[0]} holds {dtype}, not floats")
    expanded = tensors["expanded"]
    _require_vector("expanded", expanded, n, "nodes")
    is_binary = expanded.dtype == torch.bool and bool((expanded.view(torch.uint8) <= 1).all())
    _require(is_binary, f"expanded holds {expanded.dtype}, not true and false alone")
    if edges[0] != "adjacency_values":
        rows, shape = n if edges[0] == "adjacency" else int(expanded.sum()), list(tensors[edges[0]].shape)
        _require(shape == [rows, n], f"{edges[0]} has shape {shape}, where [{rows}, {n}] was expected")
    _require(bool(torch.isin(kind, torch.tensor(list(NodeKind))).all()), "kind has values that no node kind has")
    _require_tokens(tensors, about)


def _require_tokens(tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    kind, layer, pos, index, tokens = (tensors[name] for name in ("kind", "layer", "pos", "index", "tokens"))
    for name in ("prompt_tokens", "logit_tokens"):
        _require(
            isinstance(about[name], list) and all(isinstance(text, str) for text in about[name]),
            f"{name} is no list of texts",
        )
    _require_vector("tokens", tokens, len(about["prompt_tokens"]), "prompt_tokens")
    _require(tokens.dtype in WHOLE, f"tokens holds {tokens.dtype}, not whole numbers")
    n_logits = int((kind == int(NodeKind.LOGIT)).sum())
    _require(n_logits > 0, "it has no logit node")
    _require_vector("logit_probs", tensors["logit_probs"], n_logits, "logit nodes")
    probs = tensors["logit_probs"]
    _require_numbers("logit_probs", probs)
    # A probability, or 1: rounded, in the shortest floats there are.
    _require(bool(((probs >= 0) & (probs < 1.01)).all()), "logit_probs has values that are no probabilities")
    _require(
        len(about["logit_tokens"]) == n_logits, f"{len(about['logit_tokens'])} logit_tokens for {n_logits} logit nodes"
    )
    targets = about.get("targets")
    _require(
        targets is None or (isinstance(targets, list) and len(targets) == n_logits),
        f"its targets are not one for each of {n_logits} logit nodes",
    )
    # Biases act at all positions; differences and directions are no token.
    first = torch.where(kind == int(NodeKind.BIAS), -1, 0)
    _require(bool(((pos >= first) & (pos < len(tokens))).all()), f"pos leaves the {len(tokens)} tokens of the prompt")
    first = torch.where(kind == int(NodeKind.LOGIT), -1, 0)
    _require(bool((index >= first).all()) and bool((tokens >= 0).all()), "index or tokens has negative values")
    of_features = layer[kind == int(NodeKind.FEATURE)]
    _require(bool((of_features >= 0).all()) and bool((layer >= -1).all()), "layer has negative values")


def require_csr(parts: CSR, n_nodes: int) -> None:
    """Raise unless these are the parts of a sparse matrix of as many rows and columns as there are nodes."""
    starts, cols, values = parts
    _require_vector("adjacency_starts", starts, n_nodes + 1, "nodes and one")
    _require_vector("adjacency_values", values, len(cols), "adjacency_cols")
    _require_vector("adjacency_cols", cols, len(values), "adjacency_values")
    _require(
        starts.dtype in WHOLE and starts.dtype == cols.dtype,
        f"adjacency_starts and adjacency_cols hold {starts.dtype} and {cols.dtype}, not whole numbers of one kind",
    )
    _require(
        int(starts[0]) == 0 and int(starts[-1]) == len(cols) and bool((starts[1:] >= starts[:-1]).all()),
        f"adjacency_starts does not rise from 0 to the {len(cols)} edges that there are",
    )
    _require(
        bool(((cols >= 0) & (cols < n_nodes)).all()), f"adjacency_cols has numbers that none of {n_nodes} nodes has"
    )
    rising = cols.diff() > 0
    firsts = starts[1:-1].long()
    rising[firsts[(firsts > 0) & (firsts < len(cols))] - 1] = True
    _require(bool(rising.all()), "adjacency_cols does not rise within each row")


def require_acyclic(graph: AttributionGraph) -> None:
    """Raise unless all edges are finite and run upwards: into features of higher layers and into logits alone.

    Reads each row once; rows of a dense graph that were not traced and were not in its file are left alone.
    """
    rank = _rank(graph.nodes)
    if graph.is_sparse:
        starts, cols, values = csr(graph.adjacency)
        targets = torch.repeat_interleave(torch.arange(len(rank)), starts.diff().long())
        _require_numbers("adjacency", row_sums(graph.adjacency))
        _require_upwards((rank[targets] <= rank[cols.long()]) & (values != 0))
        return
    for rows, ranks in zip(graph.adjacency.split(ROWS_AT_ONCE), rank.split(ROWS_AT_ONCE), strict=True):
        _require_numbers("adjacency", rows.abs().sum(dim=1))
        _require_upwards((ranks[:, None] <= rank) & (rows != 0))


def _rank(nodes: Nodes) -> Int[Tensor, " n_nodes"]:
    """Edges run from lower to higher ranks: features by layer, above them logits, below them what has no inputs."""
    is_feature, is_logit = nodes.is_kind(NodeKind.FEATURE), nodes.is_kind(NodeKind.LOGIT)
    above = int(nodes.layer.max()) + 1
    return torch.where(is_feature, nodes.layer, torch.where(is_logit, above, -1))


def _require_upwards(wrong: Tensor) -> None:
    _require(
        not bool(wrong.any()), "the adjacency has edges to nodes without inputs, or from a layer to the same or a lower"
    )


def _require_vector(name: str, values: Tensor, n: int, of: str) -> None:
    _require(
        values.shape == (n,), f"{name} has shape {list(values.shape)}, where one for each of {n} {of} was expected"
    )


def _require_numbers(name: str, values: Float[Tensor, " n"]) -> None:
    _require(
        values.dtype.is_floating_point and bool(values.isfinite().all()),
        f"{name} has values that are infinite or no numbers",
    )


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
