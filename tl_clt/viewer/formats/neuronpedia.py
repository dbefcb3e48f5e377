"""Neuronpedia's files: attribution graphs and features as JSON, and their upload.

The graph's layout is its `graph-schema.json` (draft-07). A feature has a file of its own, named by the number that
graphs give it, the Cantor pairing of layer and feature: `12.json`.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from itertools import islice
from pathlib import Path
from typing import Any

from tl_clt.arguments import as_path
from tl_clt.attribution import AttributionGraph
from tl_clt.attribution.edges import Node
from tl_clt.errors import ConfigError, ExtraMissing, FormatError, KeyMissing, UploadFailed
from tl_clt.files import new_file, new_folder, require_file, require_new
from tl_clt.viewer.formats.feature_json import (
    RecordValues,
    check_record,
    parse_feature,
    read_feature_file,
    write_feature,
)
from tl_clt.viewer.formats.graph_json import (
    as_json,
    cantor_pair,
    cantor_unpair,
    model_of,
    read_graph,
    require_name,
    write_graph,
)
from tl_clt.viewer.html import FeatureSource

KEY = "NEURONPEDIA_API_KEY"
MOST_BYTES = 100 * 2**20
"""Of a graph's file, as the service takes it."""
FEATURES_AT_ONCE = 128


def save_neuronpedia(
    graph: AttributionGraph,
    path: str | Path,
    *,
    slug: str | None = None,
    scan: str | None = None,
    node_threshold: float | None = None,
    edge_threshold: float | None = None,
    source_set: str | None = None,
    features: FeatureSource | None = None,
    labels: Mapping[tuple[int, int], str] | None = None,
    pinned: Iterable[int | Node] = (),
    supernodes: Mapping[str, Iterable[int | Node]] | None = None,
    description: str | None = None,
) -> Path:
    """Write a graph as Neuronpedia reads it, all or nothing; a file that is there is replaced.

    `load_neuronpedia` makes an equal graph of it. Position and bias nodes, which Neuronpedia does not know, are in the
    file's metadata and counted in its description. Its page, as published, shows no graph of a model of one layer.

    Args:
        graph: whole, reduced or pruned.
        path: a JSON file.
        slug: the graph's name there, of letters, digits, `_`, `.`, `-`; None for the file's name.
        scan: the model's name there; None for the last part of the name it was traced by.
        node_threshold: prune first, and write the shares of influence in the whole graph; None for the graph as it is.
        edge_threshold: likewise.
        source_set: the name there of the set of features, whose pages are shown; None where it has none.
        features: what is known of features, a `FeatureStore` for example: each gets its label, or the tokens that it
            promotes where it has none. Without it, and without labels, the viewer has its own words or none.
        labels: words for features, by layer and feature, that go before those.
        pinned: nodes that the viewer's subgraph starts with.
        supernodes: groups of nodes by name.
        description: a line about the graph.

    Raises:
        ConfigError: a name has other characters, or a node to be pinned was pruned away.
        CLTMismatch: the features are of another CLT.
        NotFinite: the graph has values that are infinite or no numbers.
        NotWritten: the path is a folder, or the disk is full, for example; what was there stays.
    """
    path = as_path("path", path)
    require_file(path)
    values = write_graph(
        graph,
        slug=path.stem if slug is None else slug,
        scan=model_of(graph) if scan is None else scan,
        node_threshold=node_threshold,
        edge_threshold=edge_threshold,
        features=features,
        labels=labels,
        pinned=pinned,
        supernodes=supernodes,
        description=description,
    )
    if source_set is not None:
        values["metadata"]["feature_details"] = {"neuronpedia_source_set": require_name("source_set", source_set)}
    text = as_json(values)
    with new_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    return path


def load_neuronpedia(path: str | Path) -> AttributionGraph:
    """Read a graph in Neuronpedia's layout: the equal graph of one that this package wrote, and others' as well.

    Other programs do not tell what they pruned away, nor which features were not traced; a warning says so. What was
    pinned and grouped, and the words for features, are in the graph's `info`.

    Raises:
        FormatError: the path is missing or a folder, or the file truncated, no such graph, or one whose parts
            contradict each other.
        MemoryLimit: its edges do not fit in the memory there is.
    """
    return read_graph(as_path("path", path))


def save_neuronpedia_features(records: Iterable[RecordValues], folder: str | Path) -> Path:
    """Write features as Neuronpedia reads them, one file each, to a new or empty folder, all or nothing.

    Put where the web can reach it, the folder's address is a graph's `feature_json_base_url`.

    Args:
        records: as `record.to_dict()` of a store of features gives them, one at a time.
        folder: new or empty.

    Raises:
        ConfigError: a record is not of that shape, or two are of one feature.
        NotFinite: a record has values that are infinite or no numbers.
        OutputNotEmpty: the folder holds something already, or is a file.
        NotWritten: the disk is full, for example; nothing is left.
    """
    folder = as_path("folder", folder)
    require_new(folder)
    with new_folder(folder) as unfinished:
        for record in records:
            values = write_feature(check_record(record))
            file = unfinished / f"{cantor_pair(values['layer'], values['index'])}.json"
            if file.exists():
                raise ConfigError(f"Feature {values['layer']}.{values['index']} comes twice. Give each once.")
            file.write_text(as_json(values), encoding="utf-8")
    return folder


def load_neuronpedia_features(folder: str | Path) -> Iterator[RecordValues]:
    """Read the features of a folder, by layer and feature, one file at a time.

    Of features that this package wrote, the records given; of others', what is in their files, and None for the rest.

    Raises:
        FormatError: the folder is missing or holds no features, or a file is truncated or none.
    """
    folder = as_path("folder", folder)
    files = sorted(
        (cantor_unpair(int(file.stem)), file)
        for file in folder.glob("*.json")
        if file.stem.isascii() and file.stem.isdigit() and len(file.stem) < 19
    )
    if not files:
        raise FormatError(f"'{folder}' holds no features: files such as '12.json'. Check the path.")
    return (parse_feature(file, read_feature_file(file), layer, feature) for (layer, feature), file in files)


# -- upload ---------------------------------------------------------------------------------------------------------


def require_upload(api_key: str | None = None) -> None:
    """Check that something could be uploaded, before any work.

    Raises:
        KeyMissing: there is no key.
        ExtraMissing: the package `neuronpedia` is not installed.
    """
    _client()
    _key(api_key)


def upload_neuronpedia(path: str | Path, *, api_key: str | None = None) -> str:
    """Upload a graph that `save_neuronpedia` wrote, where everybody can see it.

    Args:
        path: the JSON file. It is read and checked before anything is sent.
        api_key: yours, from your account's settings there; None for what the variable NEURONPEDIA_API_KEY holds.

    Returns:
        The address of the graph's page.

    Raises:
        KeyMissing: there is no key.
        ExtraMissing: the package `neuronpedia` is not installed.
        FormatError: the file is no graph, or larger than the service takes.
        UploadFailed: the service refused it, or could not be reached.
    """
    path = as_path("path", path)
    client = _client()
    key = _key(api_key)
    load_neuronpedia(path)
    if path.stat().st_size > MOST_BYTES:
        raise FormatError(
            f"'{path}' has {path.stat().st_size / 2**20:.0f} MiB, and Neuronpedia takes {MOST_BYTES // 2**20}. Export"
            " it with a lower node_threshold or edge_threshold."
        )
    with _sending(f"'{path}'"):
        return str(client.GraphRequest(api_key=key).upload(path.read_text(encoding="utf-8")).url)


def upload_neuronpedia_features(
    records: Iterable[RecordValues], *, model: str, source: str, api_key: str | None = None
) -> int:
    """Upload features of one layer to a source of yours that is there.

    Args:
        records: as `record.to_dict()` of a store of features gives them; those of the source's layer.
        model: the model's name there.
        source: the source's name there, such as "3-my-clt": a layer's number and the set's name.
        api_key: as for `upload_neuronpedia`.

    Returns:
        How many were uploaded.

    Raises:
        KeyMissing: there is no key.
        ExtraMissing: the package `neuronpedia` is not installed.
        ConfigError: a record is not of the shape, or one is of another layer than the source.
        UploadFailed: the service refused some, or could not be reached; the message says how many arrived.
    """
    model, source = require_name("model", model), require_name("source", source)
    client = _client()
    request = client.FeatureRequest(api_key=_key(api_key))
    sent, left = 0, iter(records)
    while batch := [check_record(record) for record in islice(left, FEATURES_AT_ONCE)]:
        for record in batch:
            if not source.startswith(f"{record['layer']}-"):
                raise ConfigError(
                    f"Feature {record['layer']}.{record['feature']} is not of the layer of the source '{source}'."
                    f" Give the features of one layer. {sent} are uploaded."
                )
        with _sending(f"features after the first {sent}"):
            request.upload_batch(model, source, [_as_theirs(record, model, source) for record in batch])
        sent += len(batch)
    return sent


def _as_theirs(record: dict[str, Any], model: str, source: str) -> Any:
    """A record as the client's own."""
    from neuronpedia.np_activation import Activation
    from neuronpedia.np_explanation import Explanation
    from neuronpedia.np_feature import Feature, Logit

    where = {"modelId": model, "source": source, "index": record["feature"]}
    return Feature(
        **where,
        density=record["density"],
        top_logits=[Logit(token, value or 0.0) for token, value in record["top_logits"]],
        bottom_logits=[Logit(token, value or 0.0) for token, value in record["bottom_logits"]],
        explanations=[Explanation(**where, text=record["label"])] if record["label"] else [],
        activations=[
            Activation(**where, tokens=list(example["tokens"]), values=list(example["activations"]))
            for example in record["examples"]
        ],
    )


def _client() -> Any:
    try:
        import neuronpedia
    except ImportError as error:
        raise ExtraMissing(
            'Uploading takes the package neuronpedia, which is not installed: pip install "tl_clt[neuronpedia]".'
        ) from error
    return neuronpedia


def _key(given: str | None) -> str:
    key = given or os.environ.get(KEY)
    if not key:
        raise KeyMissing(
            f"There is no key for Neuronpedia. Make one in your account's settings there, and set {KEY} to it or give"
            " api_key."
        )
    return key


@contextmanager
def _sending(what: str) -> Iterator[None]:
    """Within, the client says nothing on the terminal, and what fails is told as an error of ours without the key."""
    import requests
    from neuronpedia.requests import base_request as theirs

    refusals = (theirs.NPUnauthorizedError, theirs.NPRateLimitError, theirs.NPInvalidResponseError)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    except theirs.NPUnauthorizedError as error:
        raise UploadFailed(
            f"Neuronpedia does not know the key, so that {what} was not uploaded. Check {KEY}."
        ) from error
    except (*refusals, requests.RequestException, ValueError, LookupError, TypeError) as error:
        raise UploadFailed(
            f"{what} was not uploaded ({type(error).__name__}: {error!s:.300}). Try again later, or check its names."
        ) from error
