"""`AttributionGraph`: the nodes and edges of one prompt, what can be asked of them, and the file that they are kept in.

A file is one safetensors file with JSON metadata. What is read is checked before it is a graph: its parts fit each
other, and its edges run from lower layers to higher.
"""

from __future__ import annotations

import json
import warnings
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from pandas import DataFrame
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tl_clt.arguments import as_choice, as_path, as_whole
from tl_clt.attribution.edges import (
    CSR,
    NODE_TENSORS,
    ROWS_AT_ONCE,
    EdgeList,
    Node,
    NodeKind,
    Nodes,
    WeightedGraph,
    build_adjacency,
    csr_parts,
    from_csr,
    is_sparse,
    list_all_edges,
    list_edges,
    same_adjacency,
    same_values,
    sum_rows,
    zero_rows,
)
from tl_clt.attribution.influence import (
    SMALLEST_ROW_SUM,
    Bounds,
    Definition,
    GraphScores,
    InfluenceBounds,
    InfluenceShares,
    bound_influence,
    measure_path_length,
    score_graph,
    share_influence,
    walk_upstream,
)
from tl_clt.attribution.pruning import PruneMasks, check_thresholds, prune_graph
from tl_clt.attribution.targets import NAMED_TARGETS, DirectionTarget, NamedTarget, TokenTarget
from tl_clt.errors import FormatError, NodeNotFound
from tl_clt.files import new_file, read_json, reading
from tl_clt.report import as_html
from tl_clt.shapes import NodeValues

if TYPE_CHECKING:
    from tl_clt.viewer.html import FeatureSource
    from tl_clt.viewer.notebook import GraphView

FORMAT = "tl_clt.attribution_graph"
VERSION = 3
"""1: all rows of dense graphs. 2: of those with few traced rows, these alone. 3: of pruned graphs, what was cut."""
SPARSE = {"adjacency_starts": "starts", "adjacency_cols": "cols", "adjacency_values": "values"}
WHOLE = (torch.int32, torch.int64)
ADJACENCIES = ("adjacency", "adjacency_of_expanded", "adjacency_values")
PER_NODE = ("kind", "layer", "pos", "index", "activation", "expanded", "dropped", "contrast_activation")
PARTS = {*PER_NODE, *ADJACENCIES, "adjacency_starts", "adjacency_cols", "tokens", "logit_probs"}
"""Names of tensors, beside the directions of targets."""


class RankedNode(NamedTuple):
    """A node, and what it was ranked by: its influence, or the weight of its edge."""

    node: Node
    value: float


class GraphTables(NamedTuple):
    """A graph as two tables."""

    nodes: DataFrame
    """One row a node, in order: kind, layer, pos, index, activation, influence, expanded, label; where the graph has
    them also dropped and contrast_activation."""
    edges: DataFrame
    """One row an edge: source, target (numbers of nodes, the rows of `nodes`) and weight."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class AttributionGraph(WeightedGraph):
    """The attribution graph of one prompt. `adjacency[target, source]` is the edge source -> target.

    A graph is whole, or reduced: features were not traced, `keep_edges` dropped edges, or `prune` cut some. What a
    reduced graph says of the whole one is bounded, see `unexplored`, `influence_bounds` and `scores`.

    Graphs are equal where all tensors and token strings are, number for number; `info`, which says how a graph was
    made, is not compared. A graph copied, pickled or read from a file equals the one it was made of, has the same
    hash, and so may stand for it in sets and dictionaries. Changing a graph's tensors in place changes what it equals.
    """

    tokens: Int[Tensor, " pos"]
    """Token ids of the prompt."""

    prompt_tokens: list[str]
    """The same as text."""

    logit_tokens: list[str]
    """The target nodes as text: tokens, or what else was asked for."""

    targets: list[NamedTarget] | None = None
    """What each target node is: tokens as ids, positions counted from the first. None in graphs of older files."""

    contrast_activation: NodeValues | None = None
    """Of a contrastive graph: each feature's activation on the other prompt."""

    info: dict[str, Any] = field(default_factory=dict)
    """Model, CLT and options that it was made with. Of a pruned graph also its thresholds, and as
    `thresholds_out_of_reach` those that the edges kept could not be sure to reach, so that pruning kept all of them."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "nodes", replace(self.nodes, labels=_label_nodes(self)))

    def __repr__(self) -> str:
        return (
            f"AttributionGraph({len(self.nodes)} nodes, {self.n_edges} edges, prompt {self.info.get('prompt', '')!r})"
        )

    def __str__(self) -> str:
        scores = self.scores()
        scores_text = f"replacement {scores.replacement_text()}, completeness {scores.completeness_text()}"
        return f"{self!r}: {scores_text}{f'; {self.unexplored:.1%} unexplored' if self.is_reduced else ''}"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AttributionGraph):
            return NotImplemented
        return self is other or (
            self.nodes == other.nodes
            and (self.prompt_tokens, self.logit_tokens) == (other.prompt_tokens, other.logit_tokens)
            and same_adjacency(self.adjacency, other.adjacency)
            and all(
                same_values(getattr(self, name), getattr(other, name))
                for name in ("expanded", "tokens", "logit_probs", "dropped", "contrast_activation")
            )
        )

    def __hash__(self) -> int:
        return hash((tuple(self.tokens.tolist()), tuple(self.logit_tokens), len(self.nodes)))

    def __deepcopy__(self, memo: dict[int, Any]) -> AttributionGraph:
        # torch copies sparse tensors by `clone` alone.
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "adjacency"}
        return replace(self, adjacency=self.adjacency.clone(), **deepcopy(values, memo))

    @property
    def n_edges(self) -> int:
        """Edges that are kept and not 0."""
        return int((self.adjacency.values() if self.is_sparse else self.adjacency).count_nonzero())

    @property
    def is_reduced(self) -> bool:
        """Whether something is unknown: features that were not traced, or edges that are not kept."""
        if bool(self.untraced.any()):
            return True
        return self.dropped is not None and bool(self.dropped.any())

    @property
    def lacks_nodes(self) -> bool:
        """Whether pruning took nodes out."""
        return "node_threshold" in self.info

    def influence(self) -> NodeValues:
        """Each node's influence on the logits through all paths that are kept: w (A + A^2 + ...).

        Of a reduced graph, a lower bound of the whole graph's; see `influence_bounds`.
        """
        return walk_upstream(self).influence

    def influence_bounds(self) -> InfluenceBounds:
        """Between which values each node's influence in the whole graph lies."""
        return bound_influence(self)

    def shares(self) -> InfluenceShares:
        """Share of influence from each kind of leaf, from untraced features, and along edges that are not kept."""
        return share_influence(self)

    @property
    def unexplored(self) -> float:
        """Share of walks that end at features without a row, or at edges that are not kept. With w summing to 1, no
        node's influence can be off by more, nor can that of all tokens or of all errors."""
        shares = self.shares()
        return shares.unexplored + shares.dropped

    def input_shares(self, node: int | Node) -> NodeValues:
        """|in-edges| of one node as shares of its absolute input, what is not kept included."""
        row = self.in_edges(node).abs()
        whole = row.sum() if self.dropped is None else row.sum() + self.dropped[self._number_of(node)]
        return row / whole.clamp_min(SMALLEST_ROW_SUM)

    def in_edges(self, node: int | Node) -> NodeValues:
        """One row of the adjacency, dense."""
        number = self._number_of(node)
        if not self.is_sparse:
            return self.adjacency[number]
        _, col, value = list_edges(self.adjacency, torch.tensor([number], device=self.nodes.kind.device))
        return value.new_zeros(len(self.nodes)).index_add_(0, col, value)

    def out_edges(self, node: int | Node) -> NodeValues:
        """One column of the adjacency, dense."""
        number = self._number_of(node)
        if not self.is_sparse:
            return self.adjacency[:, number]
        starts, cols, values = csr_parts(self.adjacency)
        at = torch.nonzero(cols == number).flatten()
        rows = torch.searchsorted(starts.long(), at, right=True) - 1
        return values.new_zeros(len(self.nodes)).index_add_(0, rows, values[at])

    def inputs(self, node: int | Node, n: int = 10) -> list[RankedNode]:
        """The nodes with the strongest edges into one, each with its edge; the strongest first."""
        return self._rank(self.in_edges(node), n)

    def outputs(self, node: int | Node, n: int = 10) -> list[RankedNode]:
        """The nodes with the strongest edges from one, each with its edge; the strongest first."""
        return self._rank(self.out_edges(node), n)

    def top(self, n: int = 10, kind: NodeKind | str | None = None) -> list[RankedNode]:
        """The nodes of most influence on the targets, each with its influence; the most influential first.

        Args:
            n: at most so many.
            kind: of one kind alone: a `NodeKind`, or its name ("feature", "error", "token", ...); None for all.
        """
        influence = self.influence()
        if kind is not None:
            influence = influence * self.nodes.is_kind(_as_kind(kind))
        return self._rank(influence, n)

    def _rank(self, values: NodeValues, n: int) -> list[RankedNode]:
        """The nodes of the largest absolute values, none of them 0."""
        n = min(as_whole("n", n, 1), int(values.count_nonzero()))
        chosen = values.abs().topk(n).indices.tolist()
        return [RankedNode(self.nodes[i], float(values[i])) for i in chosen]

    def _number_of(self, node: object) -> int:
        number = self.nodes.number_of(node)
        last = len(self.nodes) - 1
        return as_whole("node", number, -last - 1, last, why="the nodes", error=NodeNotFound) % len(self.nodes)

    def to_pandas(self) -> GraphTables:
        """All nodes, and all edges that are kept and not 0, as tables."""
        node_columns: dict[str, Any] = {"kind": [NodeKind(kind).name.lower() for kind in self.nodes.kind.tolist()]}
        columns = {name: values for name, values in self.nodes.tensors().items() if name != "kind"}
        columns |= {"influence": self.influence(), "expanded": self.expanded}
        for name in ("dropped", "contrast_activation"):
            if getattr(self, name) is not None:
                columns[name] = getattr(self, name)
        node_columns |= {name: values.detach().cpu().numpy() for name, values in columns.items()}
        nodes = DataFrame({**node_columns, "label": self.nodes.labels})
        target, source, weight = list_all_edges(self.adjacency)
        is_edge = weight != 0
        parts = {"source": source[is_edge], "target": target[is_edge], "weight": weight[is_edge]}
        return GraphTables(nodes, DataFrame({name: values.detach().cpu().numpy() for name, values in parts.items()}))

    def _repr_html_(self) -> str:
        scores = self.scores()
        rows = {"targets": ", ".join(self.logit_tokens)}
        if "contrast" in self.info:
            rows["beyond the prompt"] = str(self.info["contrast"])
        rows |= {"replacement": scores.replacement_text(), "completeness": scores.completeness_text()}
        if self.is_reduced:
            rows["not in this graph"] = f"{self.unexplored:.1%} of influence"
        top = [(node.number, node.label, influence) for node, influence in self.top(5, NodeKind.FEATURE)]
        tables = {
            "What it says": DataFrame({"": list(rows), "value": list(rows.values())}),
            "Most influential features": DataFrame(top, columns=["node", "label", "influence"]),
        }
        return as_html(repr(self), tables)

    def scores(self, definition: Definition = "paper") -> GraphScores:
        """Replacement and completeness, by the paper's reading or circuit-tracer's. Never compare the two.

        Two numbers, of what the graph keeps, with `replacement_bounds` and `completeness_bounds`: between these lie the
        scores of the whole graph, however much of it was not traced, dropped or pruned away. Of a whole graph the
        bounds are the number itself.
        """
        return score_graph(self, definition)

    def path_length(self) -> float:
        """Mean number of edges on a path from a token to a logit, paths weighted by their strength (Methods).

        Of the paths that the graph keeps; see `path_length_bounds`.
        """
        return measure_path_length(self).mean

    def path_length_bounds(self) -> Bounds:
        """Between which values the whole graph's path length lies."""
        return measure_path_length(self).bounds

    def prune_masks(self, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> PruneMasks:
        """Which nodes and edges `prune` keeps."""
        kept = prune_graph(self, node_threshold, edge_threshold)
        edges = torch.zeros(len(self.nodes), len(self.nodes), dtype=torch.bool, device=self.nodes.kind.device)
        edges[kept.edges.row, kept.edges.col] = True
        return PruneMasks(kept.nodes, edges)

    def prune(self, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> AttributionGraph:
        """The smaller graph of the nodes and edges that carry these shares of the influence.

        What is cut stays in the sums of rows, as `dropped`, so that the smaller graph's influence, scores and path
        length are those of this one as far as its edges tell, with bounds. Of a reduced graph the shares are of all
        influence that there may be; where the edges kept cannot be sure to carry as much, all of them stay, and `info`
        says so.

        Raises:
            ConfigError: a threshold is not between 0 and 1.
        """
        node_threshold, edge_threshold = check_thresholds(node_threshold, edge_threshold)
        mask, edges, cut, out_of_reach = prune_graph(self, node_threshold, edge_threshold)
        new = mask.cumsum(0) - 1
        adjacency = build_adjacency(
            EdgeList(new[edges.row], new[edges.col], edges.value), int(mask.sum()), sparse=self.is_sparse
        )
        dropped = cut if self.dropped is None else self.dropped + cut
        info = {**self.info, "node_threshold": node_threshold, "edge_threshold": edge_threshold}
        return replace(
            self,
            nodes=self.nodes.take(mask),
            adjacency=adjacency,
            expanded=self.expanded[mask],
            dropped=dropped[mask],
            contrast_activation=None if self.contrast_activation is None else self.contrast_activation[mask],
            info={**info, "thresholds_out_of_reach": out_of_reach},
        )

    def save_html(
        self,
        path: str | Path,
        features: FeatureSource | None = None,
        title: str | None = None,
        *,
        max_features: int | None = 1000,
    ) -> Path:
        """Write the graph as a page to look at: one HTML file with all that it needs, opened without a network.

        Args:
            path: the file; one that is there is replaced.
            features: what is known of features: a `FeatureStore`, or anything with `get(layer, feature)` that gives an
                object with `to_dict()`, or None.
            title: of the page; the prompt where none is given.
            max_features: what so many features mean is put into the file, those of most influence first, and the page
                says how many were left out; None for all.

        Raises:
            ConfigError: `features`, `title` or `max_features` is something else.
            NotWritten: the path is a folder, or the disk is full, for example; what was there stays.
        """
        # Here, since the viewer stands on graphs: only one who asks for a page loads it.
        from tl_clt.viewer.html import save_html

        return save_html(path, self, features, title=title, max_features=max_features)

    def show(self, features: FeatureSource | None = None, **options: Any) -> GraphView:
        """The graph as a page in a notebook, where this is the last line of a cell.

        With anywidget the page is joined to the kernel; without, it stands in a frame alone; where a notebook shows
        neither, there is a picture.

        Args:
            features: as of `save_html`; looked up as the page needs them.
            options: `height` of the page in pixels; `model` and `clt`, to change features from the page;
                `annotations`, a file to keep pins, groups and labels in; `display`, one of "auto", "widget", "frame"
                and "picture".

        Raises:
            ConfigError: an argument is something else.
            ExtraMissing, CLTMismatch, FormatError, NotWritten: as of `tl_clt.viewer.GraphView`.
        """
        from tl_clt.viewer.notebook import GraphView

        return GraphView(self, features, **options)

    def save(self, path: str | Path) -> Path:
        """Write the graph to one safetensors file, all or nothing; a file that is there is replaced.

        Raises:
            NotWritten: the path is a folder, or the disk is full, for example; what was there stays.
        """
        path = as_path("path", path)
        tensors = {
            **self.nodes.tensors(),
            **_edges_out(self.adjacency, self.expanded),
            "expanded": self.expanded,
            "tokens": self.tokens,
            "logit_probs": self.logit_probs,
        }
        targets = self.targets or []
        for number, target in enumerate(targets):
            if isinstance(target, DirectionTarget):
                # safetensors takes no tensor twice, and two targets may read along the same one.
                tensors[f"direction_{number}"] = torch.as_tensor(target.direction).clone()
        for name in ("dropped", "contrast_activation"):
            if getattr(self, name) is not None:
                tensors[name] = getattr(self, name)
        metadata = {
            "version": VERSION,
            "prompt_tokens": self.prompt_tokens,
            "logit_tokens": self.logit_tokens,
            "info": self.info,
            "targets": None if self.targets is None else [_target_out(target) for target in self.targets],
        }
        ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with new_file(path) as unfinished:
            save_file(ready, unfinished, metadata={"format": FORMAT, "about": json.dumps(metadata)})
        return path

    @staticmethod
    def load(path: str | Path) -> AttributionGraph:
        """Read a graph that `save` wrote.

        Raises:
            ConfigError: `path` is no path.
            FormatError: the path is missing or a folder, or the file truncated, no graph, or one whose parts contradict
                each other.
        """
        path = as_path("path", path)
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
            _require_parts(tensors, about)
            graph = AttributionGraph(
                nodes=Nodes(**{name: tensors[name] for name in NODE_TENSORS}),
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
            _require_acyclic(graph)
        if version < 3 and "node_threshold" in graph.info:
            warnings.warn(
                f"'{path}' is a pruned graph that does not tell what was cut, as files had it before graph version 3:"
                " its influence and scores are those of what is left, with bounds that leave out what was cut. Prune"
                " the whole graph again.",
                stacklevel=2,
            )
        return graph


def _label_nodes(graph: AttributionGraph) -> list[str]:
    """Every node in words, for example `feature 1.214 at "Dallas"`."""
    n_pos, n_layers = len(graph.prompt_tokens), graph.info.get("n_layers")
    named = graph.targets or [None] * len(graph.logit_tokens)
    targets = iter(zip(graph.logit_tokens, graph.logit_probs.tolist(), named, strict=False))
    nodes, labels = graph.nodes, []
    for kind, layer, pos, index in zip(*(getattr(nodes, name).tolist() for name in NODE_TENSORS[:4]), strict=True):
        at = f'"{graph.prompt_tokens[pos].strip()}"' if 0 <= pos < n_pos else f"position {pos}"
        if kind == NodeKind.FEATURE:
            label = f"feature {layer}.{index} at {at}"
        elif kind == NodeKind.ERROR:
            label = f"error of MLP {layer} at {at}"
        elif kind == NodeKind.TOKEN:
            label = f"token {at}"
        elif kind == NodeKind.POSITION:
            label = f"position {pos}"
        elif kind == NodeKind.BIAS:
            label = "biases of the output" if layer == n_layers else f"biases of block {layer}"
        else:
            text, prob, target = next(targets, ("", 0.0, None))
            # Of what is no token (a difference, a direction, a feature) there is no probability.
            is_token = target is None or isinstance(target, TokenTarget)
            label = f'output "{text.strip()}"' + (f", probability {prob:.3f}" if is_token else "")
        labels.append(label)
    return labels


def _as_kind(kind: NodeKind | str) -> NodeKind:
    """A kind of nodes, as that or by its name."""
    if isinstance(kind, NodeKind):
        return kind
    return NodeKind[as_choice("kind", kind, [one_kind.name.lower() for one_kind in NodeKind]).upper()]


def _target_out(target: NamedTarget) -> dict[str, Any]:
    """A target in plain values; a direction's vector is a tensor of its own."""
    values = {f.name: getattr(target, f.name) for f in fields(target) if f.name != "direction"}
    return {"kind": type(target).__name__, **values}


def _targets_in(entries: list[dict[str, Any]] | None, tensors: dict[str, Tensor]) -> list[NamedTarget] | None:
    if entries is None:
        return None
    kinds = {kind.__name__: kind for kind in NAMED_TARGETS}
    targets: list[NamedTarget] = []
    for number, values in enumerate(entries):
        arguments = {name: value for name, value in values.items() if name != "kind"}
        if f"direction_{number}" in tensors:
            arguments["direction"] = tensors[f"direction_{number}"]
        targets.append(kinds[values["kind"]](**arguments))
    return targets


def _edges_out(adjacency: Tensor, expanded: Tensor) -> dict[str, Tensor]:
    if not is_sparse(adjacency):
        few = int(expanded.sum()) < len(expanded) / 2
        return {"adjacency_of_expanded": adjacency[expanded]} if few else {"adjacency": adjacency}
    parts = csr_parts(adjacency)
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
    _require_csr(parts, len(tensors["kind"]))
    return from_csr(parts)


def _require_parts(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Raise unless all parts are there, of the right types, and of numbers of entries that agree."""
    if type(metadata["version"]) is not int or metadata["version"] < 1 or not isinstance(metadata["info"], dict):
        raise ValueError(f"version {metadata['version']!r} with info of type {type(metadata['info']).__name__}")
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
    _require_tokens(tensors, metadata)


def _require_tokens(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    kind, layer, pos, index, tokens = (tensors[name] for name in ("kind", "layer", "pos", "index", "tokens"))
    for name in ("prompt_tokens", "logit_tokens"):
        _require(
            isinstance(metadata[name], list) and all(isinstance(text, str) for text in metadata[name]),
            f"{name} is no list of texts",
        )
    _require_vector("tokens", tokens, len(metadata["prompt_tokens"]), "prompt_tokens")
    _require(tokens.dtype in WHOLE, f"tokens holds {tokens.dtype}, not whole numbers")
    n_logits = int((kind == int(NodeKind.LOGIT)).sum())
    _require(n_logits > 0, "it has no logit node")
    _require_vector("logit_probs", tensors["logit_probs"], n_logits, "logit nodes")
    probs = tensors["logit_probs"]
    _require_numbers("logit_probs", probs)
    # A probability, or 1: rounded, in the shortest floats there are.
    _require(bool(((probs >= 0) & (probs < 1.01)).all()), "logit_probs has values that are no probabilities")
    _require(
        len(metadata["logit_tokens"]) == n_logits,
        f"{len(metadata['logit_tokens'])} logit_tokens for {n_logits} logit nodes",
    )
    targets = metadata.get("targets")
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


def _require_csr(parts: CSR, n_nodes: int) -> None:
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


def _require_acyclic(graph: AttributionGraph) -> None:
    """Raise unless all edges are finite and run upwards: into features of higher layers and into logits alone.

    Reads each row once; rows of a dense graph that were not traced and were not in its file are left alone.
    """
    rank = _rank(graph.nodes)
    if graph.is_sparse:
        starts, cols, values = csr_parts(graph.adjacency)
        targets = torch.repeat_interleave(torch.arange(len(rank)), starts.diff().long())
        _require_numbers("adjacency", sum_rows(graph.adjacency))
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


def _require(is_so: bool, message: str) -> None:
    if not is_so:
        raise ValueError(message)
