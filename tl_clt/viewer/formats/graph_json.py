"""The JSON that attribution-graph viewers read: nodes, links, metadata and what is pinned.

Neuronpedia and circuit-tracer share one layout of nodes and links. A graph of ours has more than it has a place for:
which features were traced, what pruning cut, position and bias nodes, number types. Each node has that under the key
`tl_clt`, which viewers elsewhere pass over, and the graph under `metadata.tl_clt`; so a graph that was written is read
as an equal one. Position and bias nodes, which no other viewer knows, stand there as well: not among the nodes, but
counted in the description that viewers show.

A node's `influence` is a cumulative share: of all nodes, ordered from the most to the least influential, the share of
influence that this node and those before it have. `node_threshold` is the share that the graph was pruned to, and 1 for
one that was not; viewers hide nodes whose influence is above it, so the node that reaches the share, and those that
pruning keeps whatever their influence (tokens), have no more. Of a graph that was pruned before, the whole is not
known: what it keeps counts as that share. `feature` is the Cantor pairing of layer and feature,
(l + f)(l + f + 1) / 2 + f. Node ids name a node and mean nothing: reading takes layers and positions from their fields.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from tl_clt.arguments import as_whole, lone_surrogate, shown
from tl_clt.attribution import AttributionGraph, NodeKind
from tl_clt.attribution.edges import EdgeList, Node, Nodes, build_adjacency, list_all_edges, sum_rows, zero_rows
from tl_clt.attribution.pruning import prune_graph
from tl_clt.attribution.targets import NAMED_TARGETS, DirectionTarget, NamedTarget
from tl_clt.errors import ConfigError, FormatError, MemoryLimit, NodeNotFound, NotFinite
from tl_clt.files import read_json, reading
from tl_clt.machine import GIB, free_memory
from tl_clt.viewer.checks import as_graph, as_groups, as_labels, as_nodes
from tl_clt.viewer.html import FeatureSource, as_feature_source, require_one_clt

VERSION = 1
NAME = re.compile(r"[a-zA-Z0-9_.-]+")
"""What names of graphs and of what they were made with are made of."""
OF_OTHERS = {NodeKind.POSITION, NodeKind.BIAS}
"""Kinds of nodes that no viewer elsewhere knows."""
TYPES = {
    NodeKind.FEATURE: "cross layer transcoder",
    NodeKind.ERROR: "mlp reconstruction error",
    NodeKind.TOKEN: "embedding",
    NodeKind.POSITION: "position embedding",
    NodeKind.BIAS: "bias",
    NodeKind.LOGIT: "logit",
}
KINDS = {name: kind for kind, name in TYPES.items()} | {
    name: NodeKind.FEATURE for name in ("transcoder", "per layer transcoder", "unexplored node")
}
"""What a node is, by its `feature_type`: of the names that others give features, those that read an MLP's input."""
INTEGERS = ("kind", "layer", "pos", "index", "tokens")
FLOATS = ("activation", "adjacency", "logit_probs", "dropped", "contrast_activation")
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.int32, torch.int64)} | {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}
COLUMNS = ("layer", "pos", "index", "activation")
N_PROMOTED = 3
"""Output tokens that stand for a feature without a label."""
MOST_LAYERS = 10_000
MOST_DENSE = 4096
"""Nodes up to which edges that come from elsewhere are held as a dense matrix."""


def cantor_pair(layer: int, feature: int) -> int:
    """(l + f)(l + f + 1) / 2 + f, one number for both."""
    return (layer + feature) * (layer + feature + 1) // 2 + feature


def cantor_unpair(number: int) -> tuple[int, int]:
    """The layer and the feature that a number stands for."""
    diagonal = (math.isqrt(8 * number + 1) - 1) // 2
    feature = number - diagonal * (diagonal + 1) // 2
    return diagonal - feature, feature


def require_name(what: str, name: object) -> str:
    """A name as viewers elsewhere take it.

    Raises:
        ConfigError: it has other characters than letters, digits, and `_`, `.`, `-`.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ConfigError(f"{what} is {shown(name)}: give letters, digits, '_', '.' and '-' alone, at least one.")
    return name


def model_of(graph: AttributionGraph) -> str:
    """The name of the model that a graph was traced in, without the owner that hub names start with.

    Raises:
        ConfigError: the graph does not tell, or it has other characters than viewers elsewhere take.
    """
    name = as_graph(graph).info.get("model_name")
    if name is None:
        raise ConfigError("The graph does not say which model it was traced in. Give scan, the model's name.")
    return require_name("scan, the graph's model,", str(name).rsplit("/", 1)[-1])


# -- writing --------------------------------------------------------------------------------------------------------


class Selection(NamedTuple):
    """The graph that is written, of the one given."""

    graph: AttributionGraph
    numbers: list[int]
    """Of each node that is written, its number in the graph given."""
    influence: list[float]
    """Of each node that is written, its cumulative share of the influence in the graph given; at most `threshold`."""
    threshold: float
    """The share of influence that nodes were pruned to, now or before; 1 where they were not."""


def select(graph: AttributionGraph, node_threshold: float | None, edge_threshold: float | None) -> Selection:
    """A graph, pruned where a threshold is given, with cumulative shares of the whole's influence."""
    influence = graph.influence().detach().double().cpu()
    order = influence.argsort(descending=True, stable=True)
    shares = torch.zeros_like(influence)
    shares[order] = influence[order].cumsum(0) / influence.sum().clamp_min(torch.finfo(torch.float64).tiny)
    shares = shares.clamp_max(1.0)  # sums of many shares may round up
    if node_threshold is None and edge_threshold is None:
        before = graph.info.get("node_threshold")
        threshold = float(before) if isinstance(before, (int, float)) and 0 < before <= 1 else 1.0
        return Selection(graph, list(range(len(graph.nodes))), (shares * threshold).tolist(), threshold)
    thresholds = (0.8 if node_threshold is None else node_threshold, 0.98 if edge_threshold is None else edge_threshold)
    kept = prune_graph(graph, *thresholds).nodes.cpu()
    numbers = torch.nonzero(kept).flatten().tolist()
    return Selection(graph.prune(*thresholds), numbers, shares[kept].clamp_max(thresholds[0]).tolist(), thresholds[0])


def write_graph(
    graph: AttributionGraph,
    *,
    slug: str,
    scan: str,
    node_threshold: float | None = None,
    edge_threshold: float | None = None,
    features: FeatureSource | None = None,
    labels: Mapping[tuple[int, int], str] | None = None,
    pinned: Iterable[int | Node] = (),
    supernodes: Mapping[str, Iterable[int | Node]] | None = None,
    description: str | None = None,
) -> dict[str, Any]:
    """A graph in the layout that Neuronpedia and circuit-tracer share, as plain values.

    Args:
        graph: any.
        slug: name of the graph.
        scan: name of the model, as the viewer knows it.
        node_threshold: prune the graph first, see `AttributionGraph.prune`; None for the graph as it is.
        edge_threshold: likewise.
        features: what is known of features, see `words_for`.
        labels: words for features, by layer and feature, that go before those.
        pinned: nodes of the graph that the viewer's subgraph starts with.
        supernodes: groups of nodes by name.
        description: a line about the graph; what is not among its nodes is added to it.

    Raises:
        ConfigError: `slug` or `scan` has characters that viewers elsewhere refuse, a text is no text, or a node that
            is to be pinned was pruned away.
        NotFinite: the graph has values that are infinite or no numbers, which JSON has no place for.
    """
    slug, scan = require_name("slug", slug), require_name("scan", scan)
    words, pins, groups = as_labels(labels), as_nodes("pinned", pinned), as_groups(supernodes)
    if description is not None:
        description = _text("description", description)
    chosen = select(as_graph(graph), node_threshold, edge_threshold)
    written = chosen.graph
    _require_finite(written)
    words = words_for(written, features) | words
    ids = _node_ids(written)
    nodes = _nodes_out(written, ids, chosen.influence, words)
    kinds = [NodeKind(kind) for kind in written.nodes.kind.tolist()]
    target, source, weight = (part.tolist() for part in list_all_edges(written.adjacency))
    links = [
        {"source": ids[start], "target": ids[end], "weight": value}
        for start, end, value in zip(source, target, weight, strict=True)
    ]
    is_other = [kind in OF_OTHERS for kind in kinds]
    of_other = [is_other[start] for start in source]
    thresholds = {name: written.info[name] for name in ("node_threshold", "edge_threshold") if name in written.info}
    metadata: dict[str, Any] = {
        "slug": slug,
        "scan": scan,
        "transcoder_list": [],
        "prompt_tokens": [_text("a token of the prompt", token) for token in written.prompt_tokens],
        "prompt": _text("the prompt", written.info.get("prompt", "".join(written.prompt_tokens))),
        "node_threshold": float(chosen.threshold),
        "schema_version": 1,
        "info": {
            "description": " ".join(filter(None, (description, _said_of_rest(written, of_other)))),
            "generator": {"name": "tl_clt"},
        },
        "generation_settings": {
            name: written.info[name]
            for name in ("bos", "bias_nodes", "engine", "n_active_features", "n_traced_features")
            if written.info.get(name) is not None
        },
        "pruning_settings": thresholds,
        "tl_clt": {
            **_about(written),
            "nodes": [node for node, other in zip(nodes, is_other, strict=True) if other],
            "links": [link for link, other in zip(links, of_other, strict=True) if other],
        },
    }
    number_of = {number: at for at, number in enumerate(chosen.numbers)}
    values = {
        "metadata": metadata,
        "qParams": {
            "pinnedIds": [ids[_at(graph, node, number_of)] for node in pins],
            "supernodes": [
                [_text("a supernode's name", name), *(ids[_at(graph, node, number_of)] for node in group)]
                for name, group in groups.items()
            ],
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": [node for node, other in zip(nodes, is_other, strict=True) if not other],
        "links": [link for link, other in zip(links, of_other, strict=True) if not other],
    }
    return values


def words_for(graph: AttributionGraph, features: FeatureSource | None) -> dict[tuple[int, int], str]:
    """Words for a graph's features, by layer and feature: the label, or where one has none the tokens that it pushes up
    most. None are made up for what nothing is known of: viewers have their own words for it, or show its number.

    Args:
        features: a `FeatureStore`, or what has `get(layer, feature)`.

    Raises:
        ConfigError, CLTMismatch: it is something else, or of another CLT.
    """
    if features is None:
        return {}
    require_one_clt([graph], as_feature_source(features))
    nodes, found = graph.nodes, {}
    is_feature = nodes.is_kind(NodeKind.FEATURE)
    places = zip(nodes.layer[is_feature].tolist(), nodes.index[is_feature].tolist(), strict=True)
    for layer, feature in sorted(set(places)):
        record = features.get(layer, feature)
        if record is None:
            continue
        known = record.to_dict()
        promoted = ", ".join(repr(str(token)) for token, _ in (known.get("top_logits") or ())[:N_PROMOTED])
        words = known.get("label") or (f"promotes {promoted}" if promoted else "")
        if words:
            found[layer, feature] = words
    return found


def as_json(values: Any) -> str:
    """Plain values as JSON.

    Raises:
        NotFinite: one is infinite or no number.
        ConfigError: one is no plain value.
    """
    try:
        return json.dumps(values, allow_nan=False, separators=(",", ":"))
    except ValueError as error:
        raise NotFinite(
            "Something to be written is infinite or no number, which JSON has no place for. Trace the prompt again."
        ) from error
    except TypeError as error:
        raise ConfigError(
            f"Something to be written is no plain value ({error}). Give text, numbers and lists."
        ) from error


def _at(graph: AttributionGraph, node: int | Node, number_of: Mapping[int, int]) -> int:
    """Where a node of the graph given stands among those that are written."""
    number = graph.nodes.number_of(node)
    last = len(graph.nodes) - 1
    number = as_whole("A node to be pinned", number, -last - 1, last, why="the nodes", error=NodeNotFound)
    number %= len(graph.nodes)
    if number not in number_of:
        raise ConfigError(
            f"Node {number} ({graph.nodes[number].label}) is to be pinned, but pruning takes it out. Give a higher"
            " node_threshold, or do not pin it."
        )
    return number_of[number]


def _text(what: str, text: object) -> str:
    if not isinstance(text, str):
        raise ConfigError(f"{what} is {shown(text)}: give text.")
    half = lone_surrogate(text)
    if half is not None:
        raise ConfigError(f"{what} holds {half!r}, half of a surrogate pair, which cannot be written as UTF-8.")
    return text


def _require_finite(graph: AttributionGraph) -> None:
    for name, values in _tensors(graph).items():
        if values.dtype.is_floating_point:
            held = values.values() if name == "adjacency" and graph.is_sparse else values
            if not bool(held.isfinite().all()):
                raise NotFinite(
                    f"The graph's {name} has values that are infinite or no numbers, which JSON has no place for."
                    " Trace the prompt again."
                )


def _tensors(graph: AttributionGraph) -> dict[str, Tensor]:
    """The tensors of a graph by name, but for `expanded`."""
    found = {
        **graph.nodes.tensors(),
        "adjacency": graph.adjacency,
        "logit_probs": graph.logit_probs,
        "tokens": graph.tokens,
        "dropped": graph.dropped,
        "contrast_activation": graph.contrast_activation,
    }
    return {name: values for name, values in found.items() if values is not None}


def _node_ids(graph: AttributionGraph) -> list[str]:
    """An id for each node, none twice."""
    nodes = graph.nodes
    above = _n_layers(graph) + 1
    forms = {
        NodeKind.FEATURE: "{layer}_{index}_{pos}",
        NodeKind.ERROR: "{layer}_-1_{pos}",
        NodeKind.TOKEN: "E_{index}_{pos}",
        NodeKind.POSITION: "P_{pos}",
        NodeKind.BIAS: "B_{layer}",
        NodeKind.LOGIT: "{above}_{index}_{pos}",
    }
    ids: dict[str, None] = {}
    columns = (nodes.kind, nodes.layer, nodes.pos, nodes.index)
    for kind, layer, pos, index in zip(*(values.tolist() for values in columns), strict=True):
        name = form = forms[NodeKind(kind)].format(layer=layer, index=index, pos=pos, above=above)
        again = 1
        while name in ids:  # two differences of logits, for example
            again += 1
            name = f"{form}_{again}"
        ids[name] = None
    return list(ids)


def _n_layers(graph: AttributionGraph) -> int:
    """The model's layers; the node of its last biases and token targets stand at this layer."""
    known = graph.info.get("n_layers")
    inner = graph.nodes.layer[graph.nodes.is_kind(NodeKind.FEATURE, NodeKind.ERROR)]
    least = int(inner.max()) + 1 if len(inner) else 0
    return max(known, least) if type(known) is int else max(least, int(graph.nodes.layer.max()))


def _nodes_out(
    graph: AttributionGraph, ids: list[str], influence: list[float], labels: Mapping[tuple[int, int], str]
) -> list[dict[str, Any]]:
    above = _n_layers(graph) + 1
    targets = list(zip(graph.logit_tokens, graph.logit_probs.tolist(), strict=True))
    first = len(ids) - len(targets)
    own = {"expanded": graph.expanded.tolist()}
    for name in ("dropped", "contrast_activation"):
        values = getattr(graph, name)
        if values is not None:
            own[name] = values.tolist()
    found = []
    for number, (node, node_id) in enumerate(zip(graph.nodes, ids, strict=True)):
        kept = {"layer": node.layer, "index": node.index, "activation": node.activation}
        entry: dict[str, Any] = {
            "node_id": node_id,
            "feature": -1,
            "layer": str(node.layer),
            "ctx_idx": max(node.pos, 0),
            "feature_type": TYPES[node.kind],
            "token_prob": 0.0,
            "is_target_logit": False,
            "run_idx": 0,
            "reverse_ctx_idx": 0,
            "jsNodeId": node_id,
            "clerp": "",
            "influence": None if node.kind == NodeKind.LOGIT else influence[number],
            "activation": None,
            "tl_clt": kept | {name: values[number] for name, values in own.items()},
        }
        if node.kind == NodeKind.FEATURE:
            entry["feature"] = cantor_pair(node.layer, node.index)
            # One feature at several positions is lit up together.
            entry["jsNodeId"] = f"{node.layer}_{node.index}-0"
            entry["clerp"] = _text("a label", labels.get((node.layer, node.index), ""))
            entry["activation"] = node.activation
        elif node.kind == NodeKind.ERROR:
            entry["jsNodeId"] = f"{node.layer}_-1-{node.pos}"
            entry["clerp"] = node.label
        elif node.kind == NodeKind.TOKEN:
            entry |= {"feature": node.pos, "layer": "E", "jsNodeId": f"E_{node.index}-{node.pos}"}
            entry["clerp"] = f'Emb: "{graph.prompt_tokens[node.pos]}"'
        elif node.kind == NodeKind.LOGIT:
            text, prob = targets[number - first]
            entry |= {
                "feature": node.index,
                "layer": str(above),
                "token_prob": prob,
                "is_target_logit": number == first,
                "jsNodeId": f"L_{node_id}",
            }
            # The token stands between the first quotation mark and the next.
            quoted = text.replace('"', "'")
            entry["clerp"] = f'Output "{quoted}" (p={prob:.3f})'
        else:
            entry |= {"layer": "E"} if node.kind == NodeKind.POSITION else {}
            entry["clerp"] = node.label
        found.append(entry)
    return found


def _said_of_rest(graph: AttributionGraph, of_other: list[bool]) -> str:
    """What of a graph its nodes and links do not show, in words."""
    said = []
    counts = {kind: len(graph.nodes.where(kind)) for kind in (NodeKind.POSITION, NodeKind.BIAS)}
    if any(counts.values()):
        shares = graph.shares()
        said.append(
            f"Not among the nodes: {counts[NodeKind.POSITION]} position and {counts[NodeKind.BIAS]} bias nodes with"
            f" {sum(of_other)} links, where {shares.position + shares.bias:.1%} of the influence starts."
        )
    if graph.is_reduced:
        said.append(f"{graph.unexplored:.1%} of the influence ends at what was not traced, dropped, or pruned away.")
    return " ".join(said)


def _about(graph: AttributionGraph) -> dict[str, Any]:
    """What the layout has no place for, of the graph as a whole."""
    counts = {kind.name.lower(): len(graph.nodes.where(kind)) for kind in sorted(OF_OTHERS)}
    return {
        "version": VERSION,
        "n_layers": _n_layers(graph),
        "is_sparse": graph.is_sparse,
        "dtypes": {name: str(values.dtype).removeprefix("torch.") for name, values in _tensors(graph).items()},
        "tokens": graph.tokens.tolist(),
        "logit_tokens": [_text("a target", text) for text in graph.logit_tokens],
        "targets": None if graph.targets is None else [_target_out(target) for target in graph.targets],
        "info": graph.info,
        "not_among_nodes": counts,
    }


def _target_out(target: NamedTarget) -> dict[str, Any]:
    values = {f.name: getattr(target, f.name) for f in fields(target)}
    if isinstance(target, DirectionTarget):
        vector = torch.as_tensor(target.direction)
        values |= {"direction": vector.tolist(), "dtype": str(vector.dtype).removeprefix("torch.")}
    return {"kind": type(target).__name__, **values}


# -- reading --------------------------------------------------------------------------------------------------------

Line = Annotated[str, Field(max_length=10_000)]
"""Text of a token or a label. What is longer is none, and would fill a viewer's page."""
Number = Annotated[float, Field(allow_inf_nan=False)]
Whole = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class _Strict(BaseModel):
    """Values of exactly these types; keys that are not named are passed over."""

    model_config = ConfigDict(strict=True, extra="ignore")


class _OwnNode(_Strict):
    layer: Annotated[int, Field(ge=-1, le=MOST_LAYERS)]
    index: Annotated[int, Field(ge=-1, lt=2**63)]
    activation: Number
    expanded: bool
    dropped: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    contrast_activation: Number | None = None


class _Node(_Strict):
    node_id: Line
    feature: Whole | None = None
    layer: Line | Whole
    ctx_idx: Annotated[int, Field(ge=0, lt=2**31)]
    feature_type: Line
    clerp: Line | None = None
    token_prob: Annotated[float, Field(ge=0, le=1.01, allow_inf_nan=False)] | None = None
    activation: Number | None = None
    tl_clt: _OwnNode | None = None


class _Link(_Strict):
    source: Line
    target: Line
    weight: Number


class _About(_Strict):
    version: int
    n_layers: Annotated[int, Field(ge=0, le=MOST_LAYERS)]
    is_sparse: bool
    dtypes: dict[Line, Line]
    tokens: list[Annotated[int, Field(ge=0, lt=2**63)]]
    logit_tokens: list[Line]
    targets: list[dict[str, Any]] | None
    info: dict[str, Any]
    nodes: list[_Node]
    links: list[_Link]


class _Metadata(_Strict):
    slug: str
    scan: str
    prompt_tokens: list[Line]
    prompt: str
    node_threshold: Number | None = None
    tl_clt: _About | None = None


class _Params(_Strict):
    pinnedIds: list[Line] = []
    supernodes: list[list[Line]] = []


class _File(_Strict):
    metadata: _Metadata
    qParams: _Params
    nodes: list[_Node]
    links: list[_Link]


MEND = "Export the graph again, or copy the file again."


def read_graph(path: Path) -> AttributionGraph:
    """Read a graph in the layout that Neuronpedia and circuit-tracer share. Nothing in the file is trusted.

    Of a graph that this package wrote, the equal graph. Others tell neither what was pruned away nor which features
    were not traced: a feature without a link into it counts as not traced, and a warning says what stays unknown. What
    is pinned is in the graph's `info`, as numbers of nodes, and so are the words for features.

    Raises:
        FormatError: the path is missing or a folder, or the file truncated, no such graph, or one whose parts
            contradict each other.
        MemoryLimit: its edges do not fit in the memory there is.
    """
    if path.is_dir():
        raise FormatError(f"'{path}' is a folder. Give the JSON file within it.")
    if not path.is_file():
        raise FormatError(f"'{path}' does not exist. Check the path.")
    with reading(path, "graph of Neuronpedia's or circuit-tracer's", MEND):
        file = _validate(path, _File, read_json(path.read_text(encoding="utf-8"), finite=True))
        about = file.metadata.tl_clt
        if about is not None and about.version > VERSION:
            raise FormatError(
                f"'{path}' holds what a later tl_clt wrote (version {about.version}, this one reads {VERSION}): update."
            )
        nodes = [*file.nodes, *(about.nodes if about else ())]
        links = [*file.links, *(about.links if about else ())]
        order = sorted(range(len(nodes)), key=lambda at: _kind(nodes[at]))
        nodes = [nodes[at] for at in order]
        numbers = {node.node_id: number for number, node in enumerate(nodes)}
        if len(numbers) != len(nodes):
            _refuse_twice(nodes)
        kept = _own_columns(nodes, about) if about else _foreign_columns(nodes, file)
        edges = _edges_in(links, numbers, kept, nodes, dense=not about.is_sparse if about else None)
        graph = _assemble(file, nodes, kept, edges)
        graph.info.update(_subgraph(file, numbers))
    if about is None:
        warnings.warn(
            f"'{path}' does not tell what was pruned away, nor which features were not traced: influence and scores are"
            " those of what is in the file, with bounds that leave out what is not.",
            stacklevel=3,
        )
    return graph


def _validate(path: Path, kind: type[_File], values: Any) -> _File:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
        more = f" and {error.error_count() - 1} more" if error.error_count() > 1 else ""
        raise FormatError(
            f"'{path}' is no graph that can be read: {first['msg']} at {where or 'the top'}{more}. {MEND}"
        ) from None


def _kind(node: _Node) -> NodeKind:
    if node.feature_type not in KINDS:
        raise ValueError(
            f"node {node.node_id!r:.60} is of the type {node.feature_type!r:.60}, and a graph has {', '.join(KINDS)}"
        )
    return KINDS[node.feature_type]


def _refuse_twice(nodes: list[_Node]) -> None:
    """Raise for an id that two nodes have, so that links to them tell nothing."""
    counts = Counter(node.node_id for node in nodes)
    twice, _ = counts.most_common(1)[0]
    of_error = any(node.node_id == twice and _kind(node) == NodeKind.ERROR for node in nodes)
    why = ", as older programs named errors like features of layer 0: export it with a later one" if of_error else ""
    raise ValueError(f"two nodes have the id {twice!r:.60}{why}")


class _Columns(NamedTuple):
    """What a graph's nodes are, one entry a node."""

    layer: list[int]
    pos: list[int]
    index: list[int]
    activation: list[float]
    expanded: list[bool] | None
    """None where the links tell."""
    n_layers: int
    dtypes: dict[str, torch.dtype]


def _layer_of(node: _Node) -> int:
    text = str(node.layer)
    if not re.fullmatch(r"[0-9]{1,6}", text) or int(text) > MOST_LAYERS:
        raise ValueError(f"node {node.node_id!r:.60} is at the layer {text!r:.60}: layers count from 0")
    return int(text)


def _own_columns(nodes: list[_Node], about: _About) -> _Columns:
    """Of a graph that this package wrote."""
    layer, pos, index, activation, expanded = [], [], [], [], []
    for node in nodes:
        own, kind = node.tl_clt, _kind(node)
        if own is None:
            raise ValueError(f"node {node.node_id!r:.60} was added by another program: it has no 'tl_clt'")
        if kind == NodeKind.FEATURE and (own.layer != _layer_of(node) or own.index < 0):
            raise ValueError(f"node {node.node_id!r:.60} contradicts itself about its layer")
        if kind == NodeKind.FEATURE and node.feature != cantor_pair(own.layer, own.index):
            raise ValueError(f"node {node.node_id!r:.60} contradicts itself about its feature")
        if kind not in (NodeKind.LOGIT, NodeKind.FEATURE) and own.index < 0:
            raise ValueError(f"node {node.node_id!r:.60} has a negative index")
        layer.append(own.layer)
        pos.append(-1 if kind == NodeKind.BIAS else node.ctx_idx)
        index.append(own.index)
        activation.append(own.activation)
        expanded.append(own.expanded)
    wanted = {*INTEGERS, "activation", "adjacency", "logit_probs"}
    dtypes = {name: DTYPES[about.dtypes[name]] for name in about.dtypes if name in (*INTEGERS, *FLOATS)}
    if not wanted <= set(dtypes) or any(dtypes[name].is_floating_point != (name in FLOATS) for name in dtypes):
        raise ValueError("it does not tell the number types of the graph's parts")
    return _Columns(layer, pos, index, activation, expanded, about.n_layers, dtypes)


def _foreign_columns(nodes: list[_Node], file: _File) -> _Columns:
    """Of a graph that another program wrote, whose node ids mean nothing."""
    kinds = [_kind(node) for node in nodes]
    features = [node for node, kind in zip(nodes, kinds, strict=True) if kind == NodeKind.FEATURE]
    for node in features:
        if node.feature is None or node.feature < 0:
            raise ValueError(f"node {node.node_id!r:.60} is a feature without a number")
    # Older files give the feature's number itself, newer ones the pairing of it and its layer.
    is_paired = all(cantor_unpair(node.feature or 0)[0] == _layer_of(node) for node in features)
    inner = [
        _layer_of(node) for node, kind in zip(nodes, kinds, strict=True) if kind in (NodeKind.FEATURE, NodeKind.ERROR)
    ]
    outputs = [_layer_of(node) for node, kind in zip(nodes, kinds, strict=True) if kind == NodeKind.LOGIT]
    # Logits stand at the number of layers and one.
    n_layers = max([0, *(layer + 1 for layer in inner), *(layer - 1 for layer in outputs)])
    layer, index, activation = [], [], []
    for node, kind in zip(nodes, kinds, strict=True):
        if kind in OF_OTHERS:
            raise ValueError(f"node {node.node_id!r:.60} is of a type that this package alone writes, without the rest")
        number = node.feature or 0
        if kind == NodeKind.FEATURE:
            layer.append(_layer_of(node))
            index.append(cantor_unpair(number)[1] if is_paired else number)
        elif kind == NodeKind.ERROR:
            layer.append(_layer_of(node))
            index.append(0)
        elif kind == NodeKind.TOKEN:
            layer.append(-1)
            index.append(_token_id(node))
        else:
            layer.append(n_layers)
            index.append(max(number, -1))
        activation.append(node.activation or 0.0)
    dtypes = {name: torch.int64 for name in INTEGERS} | {name: torch.float32 for name in FLOATS}
    return _Columns(layer, [node.ctx_idx for node in nodes], index, activation, None, n_layers, dtypes)


def _token_id(node: _Node) -> int:
    """A token's id, where the node's id holds one as circuit-tracer's do; else 0, since no field has it."""
    found = re.fullmatch(rf"E_([0-9]{{1,18}})_{node.ctx_idx}", node.node_id)
    return int(found[1]) if found else 0


class _Edges(NamedTuple):
    adjacency: Tensor
    has_input: Int[Tensor, " n_nodes"]
    """How many edges come into each node."""


def _edges_in(
    links: list[_Link], numbers: Mapping[str, int], kept: _Columns, nodes: list[_Node], dense: bool | None
) -> _Edges:
    """The edges, each from a node that is there to one that is there and higher up."""
    kinds = [_kind(node) for node in nodes]
    # Features by layer, above them what is explained, below them what has no inputs.
    rank = [
        kept.layer[at] if kind == NodeKind.FEATURE else MOST_LAYERS + 1 if kind == NodeKind.LOGIT else -1
        for at, kind in enumerate(kinds)
    ]
    row, col, value = [], [], []
    for link in links:
        for end in (link.source, link.target):
            if end not in numbers:
                raise ValueError(f"a link leads to or from {end!r:.60}, which is no node of the file")
        source, target = numbers[link.source], numbers[link.target]
        if rank[source] >= rank[target]:
            raise ValueError(f"the link from {link.source!r:.60} to {link.target!r:.60} does not run upwards")
        row.append(target)
        col.append(source)
        value.append(link.weight)
    n, dtype = len(nodes), kept.dtypes["adjacency"]
    dense = n <= MOST_DENSE if dense is None else dense
    free = free_memory(torch.device("cpu"))
    if dense and free is not None and n * n * dtype.itemsize > free:
        raise MemoryLimit(
            f"The edges among {n} nodes take {n * n * dtype.itemsize / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free."
            " Export a sparse graph (keep_edges), or a pruned one."
        )
    rows, cols = torch.tensor(row, dtype=torch.long), torch.tensor(col, dtype=torch.long)
    order = (rows * max(n, 1) + cols).argsort(stable=True)
    rows, cols, values = rows[order], cols[order], torch.tensor(value, dtype=dtype)[order]
    again = (rows.diff() == 0) & (cols.diff() == 0)
    if bool(again.any()):
        at = int(torch.nonzero(again)[0])
        raise ValueError(
            f"two links lead from {nodes[int(cols[at])].node_id!r:.60} to {nodes[int(rows[at])].node_id!r:.60}"
        )
    if dense:
        adjacency = zero_rows(n, dtype, torch.device("cpu"))
        adjacency[rows, cols] = values
    else:
        adjacency = build_adjacency(EdgeList(rows, cols, values), n, sparse=True)
    if not bool(sum_rows(adjacency).isfinite().all()):
        raise ValueError("weights of links sum to more than a number can hold")
    return _Edges(adjacency, torch.bincount(rows, minlength=n))


def _assemble(file: _File, nodes: list[_Node], kept: _Columns, edges: _Edges) -> AttributionGraph:
    about, tokens = file.metadata.tl_clt, file.metadata.prompt_tokens
    kinds = [_kind(node) for node in nodes]
    if any(pos >= len(tokens) for pos in kept.pos):
        raise ValueError(f"a node's ctx_idx leaves the {len(tokens)} tokens of the prompt")
    outputs = [node for node, kind in zip(nodes, kinds, strict=True) if kind == NodeKind.LOGIT]
    if not outputs:
        raise ValueError("it has no logit node")
    probs = [_probability(node) for node in outputs]
    columns: dict[str, Any] = {"kind": _column([int(kind) for kind in kinds], kept.dtypes["kind"], "kind")}
    columns |= {name: _column(getattr(kept, name), kept.dtypes[name], name) for name in COLUMNS}
    ids = [0] * len(tokens)
    for kind, pos, index in zip(kinds, kept.pos, kept.index, strict=True):
        if kind == NodeKind.TOKEN:
            ids[pos] = index
    if about is not None and len(about.tokens) != len(tokens):
        raise ValueError(f"it has {len(about.tokens)} token ids for {len(tokens)} tokens")
    if about is not None and len(about.logit_tokens) != len(outputs):
        raise ValueError(f"it has {len(about.logit_tokens)} target texts for {len(outputs)} logit nodes")
    targets = _targets_in(about.targets) if about else None
    if targets is not None and len(targets) != len(outputs):
        raise ValueError(f"it describes {len(targets)} targets, but has {len(outputs)} logit nodes")
    is_output = torch.tensor([kind == NodeKind.LOGIT for kind in kinds])
    has_input = edges.has_input > 0
    of_elsewhere = {"prompt": file.metadata.prompt, "model_name": file.metadata.scan, "n_layers": kept.n_layers}
    if about is None and file.metadata.node_threshold is not None:
        of_elsewhere["node_threshold"] = file.metadata.node_threshold
    return AttributionGraph(
        nodes=Nodes(**columns),
        adjacency=edges.adjacency,
        expanded=torch.tensor(kept.expanded) if kept.expanded is not None else has_input | is_output,
        tokens=_column(about.tokens if about else ids, kept.dtypes["tokens"], "tokens"),
        prompt_tokens=tokens,
        logit_tokens=about.logit_tokens if about else [_target_text(node) for node in outputs],
        logit_probs=_column(probs, kept.dtypes["logit_probs"], "token_prob"),
        targets=targets,
        dropped=_own_column(nodes, kept, "dropped"),
        contrast_activation=_own_column(nodes, kept, "contrast_activation"),
        info=dict(about.info) if about else of_elsewhere,
    )


def _column(values: Sequence[int] | Sequence[float], dtype: torch.dtype, name: str) -> Tensor:
    column = torch.tensor(values, dtype=dtype)
    if dtype.is_floating_point and not bool(column.isfinite().all()):
        raise ValueError(f"{name} has values that are more than a number of type {dtype} can hold")
    return column


def _own_column(nodes: list[_Node], kept: _Columns, name: str) -> Float[Tensor, " n_nodes"] | None:
    """What a graph may have of every node, or of none."""
    values = [getattr(node.tl_clt, name) for node in nodes if node.tl_clt is not None]
    held = [value for value in values if value is not None]
    if not held or kept.expanded is None:
        return None
    if len(held) != len(nodes) or name not in kept.dtypes:
        raise ValueError(f"some nodes have {name}, and others have not")
    return _column(held, kept.dtypes["adjacency" if name == "dropped" else name], name)


def _targets_in(entries: list[dict[str, Any]] | None) -> list[NamedTarget] | None:
    if entries is None:
        return None
    kinds = {kind.__name__: kind for kind in NAMED_TARGETS}
    found: list[NamedTarget] = []
    for values in entries:
        arguments = {name: value for name, value in values.items() if name not in ("kind", "dtype")}
        if "direction" in arguments:
            arguments["direction"] = torch.tensor(arguments["direction"], dtype=DTYPES[values["dtype"]])
        found.append(kinds[values["kind"]](**arguments))
    return found


def _probability(node: _Node) -> float:
    """Of a target: the field that has it in full, or what its label says."""
    if node.token_prob is not None and (node.token_prob > 0 or node.tl_clt is not None):
        return node.token_prob
    said = re.search(r"\(p=([0-9.]{1,20})\)", node.clerp or "")
    prob = float(said[1]) if said else node.token_prob
    if prob is None or not prob <= 1.01:
        raise ValueError(f"the logit node {node.node_id!r:.60} has no probability")
    return prob


def _target_text(node: _Node) -> str:
    """The token in a label such as `Output "Austin" (p=0.412)`."""
    said = re.search(r'"(.*)"', node.clerp or "", flags=re.DOTALL)
    return said[1] if said else node.clerp or f"token {node.feature}"


def _subgraph(file: _File, numbers: Mapping[str, int]) -> dict[str, Any]:
    """What is pinned and grouped, as numbers of nodes, and the words for features. Ids of nodes that the file does not
    have are passed over, since viewers keep those of nodes that were pruned away."""
    params = file.qParams
    found: dict[str, Any] = {}
    pinned = [numbers[node] for node in params.pinnedIds if node in numbers]
    groups = {
        group[0]: [numbers[node] for node in group[1:] if node in numbers] for group in params.supernodes if group
    }
    if pinned:
        found["pinned"] = pinned
    if groups:
        found["supernodes"] = groups
    labels = {
        node.node_id: node.clerp for node in file.nodes if KINDS[node.feature_type] == NodeKind.FEATURE and node.clerp
    }
    if labels:
        found["labels"] = {str(numbers[node_id]): text for node_id, text in labels.items()}
    return found
