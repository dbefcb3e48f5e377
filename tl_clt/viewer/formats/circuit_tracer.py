"""circuit-tracer's files: the graph that its server shows, and its bundles of features.

Its server is given a folder of graphs, each a JSON file by the graph's name, listed in `graph-metadata.json`. Features
of a layer are one file `features/layer_3.bin`: for each feature the length of what follows as 4 bytes, little-endian,
then its JSON, compressed by gzip. `features/index.json.gz` has, by layer, the file's name and where each feature
starts, with the file's size at the end; a feature without a record starts where the next one does.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tl_clt.arguments import as_path, as_whole
from tl_clt.attribution import AttributionGraph
from tl_clt.attribution.edges import Node
from tl_clt.errors import ConfigError, FeatureNotFound, FormatError
from tl_clt.files import files_into, new_folder, read_json, reading, require_new
from tl_clt.viewer.formats.feature_json import MEND, RecordValues, check_record, parse_feature, write_feature
from tl_clt.viewer.formats.graph_json import as_json, model_of, read_graph, require_name, write_graph
from tl_clt.viewer.html import FeatureSource

LISTING = "graph-metadata.json"
INDEX = "index.json.gz"
MOST_INFLATED = 64 * 2**20
"""Bytes of one feature's JSON, and of the index, once inflated: a few compressed bytes can stand for any number."""


def save_circuit_tracer(
    graph: AttributionGraph,
    folder: str | Path,
    *,
    slug: str,
    scan: str | None = None,
    node_threshold: float | None = None,
    edge_threshold: float | None = None,
    features: FeatureSource | None = None,
    labels: Mapping[tuple[int, int], str] | None = None,
    pinned: Iterable[int | Node] = (),
    supernodes: Mapping[str, Iterable[int | Node]] | None = None,
) -> Path:
    """Write a graph into a folder that circuit-tracer's server shows: its file, and its entry in the list of graphs.

    Other graphs of the folder stay, and one of the same name is replaced. `load_circuit_tracer` makes an equal graph
    of the file. Position and bias nodes, which circuit-tracer does not know, are in the file's metadata.

    Args:
        graph: whole, reduced or pruned.
        folder: of graphs; made where it is missing.
        slug: the graph's name, of letters, digits, `_`, `.`, `-`.
        scan: the model's name; None for the last part of the name that it was traced by.
        node_threshold: prune first, and write the shares of influence in the whole graph; None for the graph as it is.
        edge_threshold: likewise.
        features: what is known of features, a `FeatureStore` for example: each gets its label, or the tokens that it
            promotes where it has none. Without it, and without labels, the viewer has its own words or none.
        labels: words for features, by layer and feature, that go before those.
        pinned: nodes that the viewer's subgraph starts with.
        supernodes: groups of nodes by name.

    Returns:
        The graph's file.

    Raises:
        ConfigError: a name has other characters, or a node to be pinned was pruned away.
        CLTMismatch: the features are of another CLT.
        NotFinite: the graph has values that are infinite or no numbers.
        FormatError: the folder's list of graphs is damaged.
        NotWritten: the disk is full, for example; what was there stays.
    """
    folder, slug = as_path("folder", folder), require_name("slug", slug)
    if f"{slug}.json" == LISTING:
        raise ConfigError(f"slug is {slug!r}, the name of the folder's list of graphs. Give another.")
    values = write_graph(
        graph,
        slug=slug,
        scan=model_of(graph) if scan is None else scan,
        node_threshold=node_threshold,
        edge_threshold=edge_threshold,
        features=features,
        labels=labels,
        pinned=pinned,
        supernodes=supernodes,
    )
    listed = ("slug", "scan", "transcoder_list", "prompt_tokens", "prompt", "node_threshold", "schema_version")
    entry = {key: values["metadata"][key] for key in listed}
    others = [other for other in _read_listing(folder / LISTING) if other.get("slug") != slug]
    with files_into(folder) as unfinished:
        (unfinished / f"{slug}.json").write_text(as_json(values), encoding="utf-8")
        (unfinished / LISTING).write_text(as_json({"graphs": [*others, entry]}), encoding="utf-8")
    return folder / f"{slug}.json"


def _read_listing(path: Path) -> list[dict[str, Any]]:
    """The graphs of a folder; none where it has no list."""
    if not path.exists():
        return []
    with reading(path, "list of graphs", "Remove it, and save the graphs of the folder again."):
        graphs = read_json(path.read_text(encoding="utf-8"), finite=True)["graphs"]
        if not isinstance(graphs, list) or not all(isinstance(graph, dict) for graph in graphs):
            raise ValueError("its graphs are no list of mappings")
        return graphs


def load_circuit_tracer(path: str | Path) -> AttributionGraph:
    """Read a graph that circuit-tracer or `save_circuit_tracer` wrote.

    circuit-tracer does not tell what was pruned away, nor which features were not traced; a warning says so. What was
    pinned and grouped, and the words for features, are in the graph's `info`.

    Raises:
        FormatError: the path is missing or a folder, or the file truncated, no such graph, or one whose parts
            contradict each other.
        MemoryLimit: its edges do not fit in the memory there is.
    """
    return read_graph(as_path("path", path))


# -- bundles of features ----------------------------------------------------------------------------------------------


def save_circuit_tracer_features(
    records: Iterable[RecordValues], folder: str | Path, *, d_transcoder: int | None = None
) -> Path:
    """Write features as circuit-tracer reads them, `layer_0.bin` and so on with their index, all or nothing.

    Args:
        records: as `record.to_dict()` of a store of features gives them, ordered by layer and feature; one is in memory
            at a time.
        folder: new or empty; circuit-tracer looks for it as `features` beside the transcoders.
        d_transcoder: features of a layer; None for as many as the last record of each layer tells of.

    Raises:
        ConfigError: there is no record, one is not of that shape or beyond `d_transcoder`, or they are out of order.
        NotFinite: a record has values that are infinite or no numbers.
        OutputNotEmpty: the folder holds something already, or is a file.
        NotWritten: the disk is full, for example; nothing is left.
    """
    folder = as_path("folder", folder)
    n_features = as_whole("d_transcoder", d_transcoder, 1, none="as many as there are records")
    require_new(folder)
    offsets: dict[int, list[int]] = {}
    last = (-1, -1)
    with new_folder(folder) as unfinished:
        for given in records:
            record = check_record(given)
            layer, feature = record["layer"], record["feature"]
            if (layer, feature) <= last:
                raise ConfigError(
                    f"Feature {layer}.{feature} comes after {last[0]}.{last[1]}. Give them in order, each once."
                )
            if n_features is not None and feature >= n_features:
                raise ConfigError(f"Feature {layer}.{feature} does not exist with d_transcoder={n_features}.")
            last = (layer, feature)
            text = as_json(write_feature(record)).encode()
            packed = gzip.compress(text, mtime=0)
            starts = offsets.setdefault(layer, [0])
            # Features without a record start where this one does.
            starts += [starts[-1]] * (feature - (len(starts) - 1))
            with open(unfinished / _file_of(layer), "ab") as file:
                file.write(struct.pack("<I", len(packed)) + packed)
            starts.append(starts[-1] + 4 + len(packed))
        if not offsets:
            raise ConfigError("There is no feature to write. Give at least one record.")
        for starts in offsets.values():
            starts += [starts[-1]] * ((n_features or 0) - (len(starts) - 1))
        index = {str(layer): {"filename": _file_of(layer), "offsets": starts} for layer, starts in offsets.items()}
        (unfinished / INDEX).write_bytes(gzip.compress(as_json(index).encode(), mtime=0))
    return folder


def _file_of(layer: int) -> str:
    return f"layer_{layer}.bin"


class FeatureBundles(Mapping[tuple[int, int], dict[str, Any]]):
    """The features of a folder that circuit-tracer reads, each read from its place in its file when it is asked for.

    `bundles[layer, feature]` is a record; a loop goes over the layer and feature of all that there are, in order.
    """

    def __init__(self, folder: Path, offsets: dict[int, tuple[Path, list[int]]]) -> None:
        self.folder = folder
        self._offsets = offsets

    @staticmethod
    def open(folder: str | Path) -> FeatureBundles:
        """Read the index of a folder, and check it against the files.

        Raises:
            FormatError: the folder or its index is missing, truncated or damaged.
        """
        folder = as_path("folder", folder)
        path = folder / INDEX
        if not path.is_file():
            raise FormatError(f"'{folder}' has no {INDEX}. Give the folder that holds it and the layers' .bin files.")
        offsets: dict[int, tuple[Path, list[int]]] = {}
        with reading(path, "index of features", MEND):
            index = read_json(_inflate(path.read_bytes()).decode(), finite=True)
            entries = enumerate(index) if isinstance(index, list) else index.items()
            for layer, entry in entries:
                if not str(layer).isascii() or not str(layer).isdigit() or len(str(layer)) > 6:
                    raise ValueError(f"it has a layer {layer!r:.60}")
                name, starts = entry["filename"], entry["offsets"]
                file = folder / name
                if Path(name).name != name or not file.is_file():
                    raise ValueError(f"it names the file {name!r:.60}, which is not in the folder")
                if not starts or any(type(start) is not int for start in starts) or starts[0] < 0:
                    raise ValueError(f"it has no places of features in {name!r:.60}")
                if starts != sorted(starts) or starts[-1] > file.stat().st_size:
                    raise ValueError(f"its places of features do not rise to the end of {name!r:.60}")
                offsets[int(layer)] = (file, starts)
        return FeatureBundles(folder, offsets)

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        """The record of a layer's feature.

        Raises:
            FeatureNotFound: there is none.
            FormatError: it is damaged.
        """
        if not isinstance(place, tuple) or len(place) != 2:
            raise FeatureNotFound(f"{place!r:.60} is no feature. Give a layer and a feature: bundles[0, 17].")
        layer, feature = (
            as_whole(name, at, 0, error=FeatureNotFound) for name, at in zip(("layer", "feature"), place, strict=True)
        )
        if (layer, feature) not in self:
            raise FeatureNotFound(f"'{self.folder}' has no record of feature {layer}.{feature}.")
        file, starts = self._offsets[layer]
        with reading(file, "bundle of features", MEND):
            with open(file, "rb") as opened:
                opened.seek(starts[feature])
                chunk = opened.read(starts[feature + 1] - starts[feature])
            (length,) = struct.unpack("<I", chunk[:4])
            if length > len(chunk) - 4:
                raise ValueError(f"feature {layer}.{feature} has {len(chunk) - 4} bytes of {length}")
            values = read_json(_inflate(chunk[4 : 4 + length]).decode(), finite=True)
        return parse_feature(file, values, layer, feature)

    def __contains__(self, place: object) -> bool:
        if not isinstance(place, tuple) or len(place) != 2 or place[0] not in self._offsets:
            return False
        _, starts = self._offsets[place[0]]
        feature = place[1]
        return isinstance(feature, int) and 0 <= feature < len(starts) - 1 and starts[feature + 1] > starts[feature]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for layer in sorted(self._offsets):
            starts = self._offsets[layer][1]
            yield from ((layer, feature) for feature in range(len(starts) - 1) if (layer, feature) in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return f"FeatureBundles('{self.folder}', {len(self)} features of {len(self._offsets)} layers)"


def _inflate(data: bytes) -> bytes:
    """What gzip compressed, up to a size.

    Raises:
        ValueError, zlib.error: it is damaged, truncated, or more than that.
    """
    inflater = zlib.decompressobj(wbits=31)
    found = inflater.decompress(data, MOST_INFLATED)
    if not inflater.eof:
        raise ValueError(f"it is truncated, or holds more than {MOST_INFLATED // 2**20} MiB")
    return found
