"""A graph as a page: the data that the page reads, and one HTML file that holds the page and its data.

The page itself is TypeScript (`page/src`), bundled into `page/dist/page.js` and `page.css`, which ship in the package.
`tlcltPage.mount(element, data, options)` draws `page_data(...)` into an element; the file of `save_html`, notebooks and
the server all call it.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
from collections.abc import Iterable, Mapping, Sized
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from tl_clt.arguments import as_path, as_whole, shown
from tl_clt.attribution import AttributionGraph, NodeKind
from tl_clt.attribution.edges import list_all_edges
from tl_clt.attribution.influence import sum_inputs, walk_upstream
from tl_clt.errors import CLTMismatch, ConfigError
from tl_clt.files import new_file

PAGE = Path(__file__).parent / "page" / "dist"
DATA_VERSION = 1
MOST_FEATURES = 1000


@runtime_checkable
class KnownFeature(Protocol):
    """What is known of a feature."""

    def to_dict(self) -> dict[str, Any]:
        """In plain values: layer, feature, label, label_score, label_score_random, density, max_activation, histogram,
        top_logits, bottom_logits, examples, connected."""
        ...


@runtime_checkable
class FeatureSource(Protocol):
    """Where the page's features come from, a `FeatureStore` for example."""

    def get(self, layer: int, feature: int, /) -> KnownFeature | None:
        """A feature, or None where nothing is known of it."""
        ...


Graphs = AttributionGraph | Mapping[str, AttributionGraph] | Iterable[AttributionGraph]


def page_data(
    graphs: Graphs,
    features: FeatureSource | None = None,
    *,
    title: str | None = None,
    max_features: int | None = MOST_FEATURES,
) -> dict[str, Any]:
    """What the page shows, in plain values that are JSON.

    Args:
        graphs: one graph, or several of one model, by name or in a list (named by their prompts).
        features: where what is known of features comes from; anything with `get(layer, feature)` that gives an object
            with `to_dict()`, or None. Without it the page shows numbers of features alone.
        title: of the page; the first graph's prompt where none is given.
        max_features: features that are put into the data at most, those of most influence first; None for all. A shell
            that can load features gives the page the others (`options.host.loadFeature`).

    Returns:
        `format`, `version`, `title`; `graphs`, a list, each with `name`, `prompt`, `tokens`, `n_layers`, `nodes`
        (columns `kind`, `layer`, `pos`, `index`, `activation`, `influence`, `label`, `traced`, and `dropped`: the
        absolute input along edges that are not there), `edges` (three parallel lists `target`, `source`, `weight`),
        `probabilities` and `logits` (of the output nodes, in their order), `scores`, `unexplored`, `pruned` and `info`;
        `features`, by "layer/feature", None where nothing is known; `features_left_out`, how many of the graphs' were
        left out by `max_features`; `features_in_source`, how many there are in all, None where the source has no
        length.

    Raises:
        ConfigError: the graphs are none or have infinite values, `features` has no `get`, or the title is no text.
        CLTMismatch: the graphs, or the features, are of several CLTs.
    """
    named = _as_graphs(graphs)
    max_features = as_whole("max_features", max_features, 0, none="all")
    features = None if features is None else as_feature_source(features)
    if title is not None and not isinstance(title, str):
        raise ConfigError(f"title is {shown(title)}: give a text, or None for the prompt.")
    require_one_clt([graph for _, graph in named], features)
    entries = [_graph_data(name, graph) for name, graph in named]
    found, left_out = _feature_data(entries, features, max_features)
    return {
        "format": "tl_clt.page",
        "version": DATA_VERSION,
        "title": entries[0]["prompt"] if title is None else title,
        "graphs": entries,
        "features": found,
        "features_left_out": left_out,
        "features_in_source": len(features) if isinstance(features, Sized) else None,
    }


def as_feature_source(features: object) -> FeatureSource:
    """Where what is known of features comes from.

    Raises:
        ConfigError: it has no `get`.
    """
    if not isinstance(features, FeatureSource):
        raise ConfigError(f"features is {shown(features)}: give a FeatureStore, or what has get(layer, feature).")
    return features


def require_one_clt(graphs: list[AttributionGraph], features: FeatureSource | None) -> None:
    """Raise where graphs, or what is known of features, are of several CLTs, whose features mean different things. What
    does not say which CLT it is of passes.

    Raises:
        CLTMismatch: they are.
    """
    for name in ("n_layers", "d_transcoder", "clt_fingerprint"):
        of_graphs = [value for graph in graphs if (value := graph.info.get(name)) is not None]
        other = next((value for value in of_graphs if value != of_graphs[0]), None)
        if other is not None:
            raise CLTMismatch(
                f"The graphs were traced with several CLTs ({name} is {of_graphs[0]!s:.20} and {other!s:.20}): a"
                " feature of one number means different things in them. Show them on pages of their own."
            )
        of_features = getattr(features, name, None)
        if of_graphs and of_features is not None and of_features != of_graphs[0]:
            raise CLTMismatch(
                f"The features are those of another CLT than the graph's: {name} is {of_features!s:.20} there and"
                f" {of_graphs[0]!s:.20} here. Give the features of the CLT that the graph was traced with."
            )


def save_html(
    path: str | Path,
    graphs: Graphs,
    features: FeatureSource | None = None,
    *,
    title: str | None = None,
    max_features: int | None = MOST_FEATURES,
) -> Path:
    """Write one HTML file that shows graphs, with all that it needs, to be opened without a network. All or nothing; a
    file that is there is replaced, as one wants it who saves a page again from a notebook.

    Raises:
        ConfigError: as of `page_data`.
        NotWritten: the path is a folder, or the disk is full, for example; what was there stays.
    """
    path = as_path("path", path)
    text = page_html(page_data(graphs, features, title=title, max_features=max_features))
    with new_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", newline="\n")
    return path


def page_html(data: dict[str, Any], options: dict[str, Any] | None = None) -> str:
    """A whole HTML document of `page_data(...)`: script, style and data within, and a policy that allows nothing else.

    Args:
        data: what `page_data` gave.
        options: for the page's `mount`, in plain values: `hash` (whether the state stands in the address), `theme`.
    """
    title = as_characters(str(data.get("title", "")))
    script = (
        f"{page_script()}\n"
        'tlcltPage.mount(document.getElementById("page"),JSON.parse(document.getElementById("data").textContent),'
        f"{as_script_json(options or {})});\n"
    )
    style = page_style()
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; img-src data: blob:;"
        " base-uri 'none'; form-action 'none'"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{html.escape(title)}</title>\n"
        f'<style>{style}</style>\n</head>\n<body class="tlclt-body">\n<div id="page"></div>\n'
        f'<script type="application/json" id="data">{as_script_json(data)}</script>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    )


def page_script() -> str:
    """The page's script, which defines `tlcltPage.mount(element, data, options)`."""
    return (PAGE / "page.js").read_text(encoding="utf-8")


def page_style() -> str:
    """The page's style sheet. All its rules hold within the page's element alone."""
    return (PAGE / "page.css").read_text(encoding="utf-8")


def as_script_json(data: Any) -> str:
    """JSON that may stand within a script element: no text in it can end the element or begin a comment."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def as_characters(text: str) -> str:
    """Text that can be written: half a surrogate pair, as a tokenizer may give it, is no character."""
    return text.encode("utf-8", "replace").decode()


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _as_graphs(given: Any) -> list[tuple[str, AttributionGraph]]:
    if isinstance(given, AttributionGraph):
        found = [(prompt_of(given), given)]
    elif isinstance(given, Mapping):
        found = [(str(name), graph) for name, graph in given.items()]
    elif isinstance(given, Iterable) and not isinstance(given, (str, bytes)):
        graphs = list(given)
        found = [(prompt_of(graph) if isinstance(graph, AttributionGraph) else "", graph) for graph in graphs]
    else:
        raise ConfigError(f"graphs is {shown(given)}: give an AttributionGraph, or several by name or in a list.")
    for name, graph in found:
        if not isinstance(graph, AttributionGraph):
            raise ConfigError(f"The graph {name!r} is {shown(graph)}: give an AttributionGraph.")
    if not found:
        raise ConfigError("graphs is empty: give at least one AttributionGraph.")
    return found


def prompt_of(graph: AttributionGraph) -> str:
    """A graph's prompt as text."""
    return str(graph.info.get("prompt", "".join(graph.prompt_tokens)))


def _graph_data(name: str, graph: AttributionGraph) -> dict[str, Any]:
    nodes, walks, scores = graph.nodes, walk_upstream(graph), graph.scores()
    target, source, weight = list_all_edges(graph.adjacency)
    for values in (nodes.activation, weight, walks.influence, graph.logit_probs):
        if not bool(values.isfinite().all()):
            raise ConfigError(f"The graph {name!r} has values that are infinite or no numbers: trace the prompt again.")
    is_edge = weight != 0
    dropped = sum_inputs(graph) * 0 if graph.dropped is None else graph.dropped
    return {
        "name": name,
        "prompt": prompt_of(graph),
        "tokens": list(graph.prompt_tokens),
        "n_layers": int(graph.info.get("n_layers") or max(int(nodes.layer.max()), 1)),
        "nodes": {
            "kind": [NodeKind(kind).name.lower() for kind in nodes.kind.tolist()],
            "layer": nodes.layer.tolist(),
            "pos": nodes.pos.tolist(),
            "index": nodes.index.tolist(),
            "activation": _rounded(nodes.activation),
            "influence": _rounded(walks.influence),
            "label": list(nodes.labels or []),
            "traced": [int(traced) for traced in (~graph.untraced).tolist()],
            "dropped": _rounded(dropped),
        },
        "edges": {
            "target": target[is_edge].tolist(),
            "source": source[is_edge].tolist(),
            "weight": _rounded(weight[is_edge]),
        },
        "logits": list(graph.logit_tokens),
        "probabilities": _rounded(graph.logit_probs),
        "scores": {
            "replacement": scores.replacement,
            "completeness": scores.completeness,
            "replacement_bounds": list(scores.replacement_bounds),
            "completeness_bounds": list(scores.completeness_bounds),
        },
        "unexplored": graph.unexplored,
        "pruned": graph.lacks_nodes,
        "info": plain_json({key: value for key, value in graph.info.items() if isinstance(value, (str, int, float))}),
    }


def _rounded(values: Tensor) -> list[float]:
    """To 7 digits, which is what float32 holds, in as few characters."""
    return [float(f"{value:.7g}") for value in values.detach().cpu().tolist()]


def _feature_data(
    entries: list[dict[str, Any]], features: FeatureSource | None, most: int | None
) -> tuple[dict[str, Any], int]:
    """What is known of the graphs' features, by "layer/feature", and how many features were left out."""
    if features is None:
        return {}, 0
    influence: dict[tuple[int, int], float] = {}
    for entry in entries:
        nodes = entry["nodes"]
        columns = (nodes[name] for name in ("kind", "layer", "index", "influence"))
        for kind, layer, index, value in zip(*columns, strict=True):
            if kind == "feature":
                influence[layer, index] = influence.get((layer, index), 0.0) + value
    wanted = sorted(influence, key=lambda key: -influence[key])
    found = {}
    for layer, index in wanted[:most]:
        record = features.get(layer, index)
        if record is not None and not hasattr(record, "to_dict"):
            raise ConfigError(
                f"features.get({layer}, {index}) gave {shown(record)}: give a FeatureStore, or what gives objects with"
                " to_dict()."
            )
        found[f"{layer}/{index}"] = None if record is None else plain_json(record.to_dict())
    return found, max(len(wanted) - (len(wanted) if most is None else most), 0)


def plain_json(value: Any) -> Any:
    """Plain values as JSON has them: no infinite numbers, no tuples."""
    if isinstance(value, dict):
        return {str(key): plain_json(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
