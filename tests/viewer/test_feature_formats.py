"""Features in Neuronpedia's and circuit-tracer's files: written, read as the same records, refused where damaged."""

from __future__ import annotations

import gzip
import json
import random
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.mutations import mutate
from tests.viewer.records import a_record, some_records
from tl_clt.errors import ConfigError, FeatureNotFound, FormatError, NotFinite, OutputNotEmpty, TlCltError
from tl_clt.viewer import (
    FeatureBundles,
    load_neuronpedia_features,
    save_circuit_tracer_features,
    save_neuronpedia_features,
)


def bundle_index(folder: Path) -> dict[str, Any]:
    return json.loads(gzip.decompress((folder / "index.json.gz").read_bytes()))


def put_index(folder: Path, index: Any) -> None:
    (folder / "index.json.gz").write_bytes(gzip.compress(json.dumps(index).encode()))


def test_neuronpedia_s_files_are_named_by_pairs_and_read_as_the_same_records(tmp_path):
    folder = save_neuronpedia_features(iter(some_records()), tmp_path / "features")
    assert {path.name for path in folder.iterdir()} == {"0.json", "9.json", "7.json", "12.json"}
    values = json.loads((folder / "9.json").read_text())
    assert values["index"] == 3
    assert values["top_logits"] == [" Texas", " Ohio"] and values["bottom_logits"] == ["the"]
    names = [quantile["quantile_name"] for quantile in values["examples_quantiles"]]
    assert names == ["top", "0.5-0.75"]
    first = values["examples_quantiles"][0]["examples"][0]
    assert (first["tokens"], first["tokens_acts_list"]) == (["in", " Dal", "las"], [0.0, 7.25, 0.1])
    assert list(load_neuronpedia_features(folder)) == some_records()


def test_circuit_tracer_s_bundles_have_the_layout_its_server_reads(tmp_path, as_users_run_it):
    folder = save_circuit_tracer_features(some_records(), tmp_path / "features", d_transcoder=5)
    index = bundle_index(folder)
    assert list(index) == ["0", "2"] and index["2"]["filename"] == "layer_2.bin"
    for entry in index.values():
        data, starts = (folder / entry["filename"]).read_bytes(), entry["offsets"]
        assert len(starts) == 5 + 1 and starts[-1] == len(data)
        for start, end in pairwise(starts):
            if end > start:
                (length,) = struct.unpack("<I", data[start : start + 4])
                assert length == end - start - 4
                assert json.loads(gzip.decompress(data[start + 4 : end]))["examples_quantiles"] is not None
    bundles = FeatureBundles.open(folder)
    assert list(bundles) == [(0, 0), (0, 3), (2, 1), (2, 2)] and len(bundles) == 4
    assert [bundles[place] for place in bundles] == some_records()
    assert (0, 1) not in bundles and (9, 0) not in bundles and (0, 5) not in bundles
    for place in ((0, 1), (0, 99), (7, 0), (0, -1), 3):
        with pytest.raises(FeatureNotFound):
            bundles[place]


def test_what_a_record_has_beyond_the_shape_comes_back(tmp_path):
    record = a_record(nearest=[[1, 0.5]], n_tokens=17)
    record["examples"][0]["prompt"] = 12
    folder = save_neuronpedia_features([record], tmp_path / "n")
    assert list(load_neuronpedia_features(folder)) == [record]
    assert FeatureBundles.open(save_circuit_tracer_features([record], tmp_path / "c"))[0, 3] == record


def test_of_others_what_is_not_told_is_none(tmp_path):
    theirs = {
        "index": 3,
        "top_logits": ["a"],
        "bottom_logits": [],
        "examples_quantiles": [
            {"quantile_name": "Top", "examples": [{"tokens": ["x", "y"], "tokens_acts_list": [0.0, 2.0]}]}
        ],
        "act_min": 0,
        "act_max": 2.0,
        "histogram": [3, 1],
    }
    (tmp_path / "9.json").write_text(json.dumps(theirs))
    (record,) = load_neuronpedia_features(tmp_path)
    assert (record["layer"], record["feature"]) == (0, 3)
    assert record["label"] is record["density"] is record["label_score"] is None
    assert record["top_logits"] == [["a", None]]
    assert record["examples"] == [{"quantile": "Top", "tokens": ["x", "y"], "activations": [0.0, 2.0], "position": 1}]
    assert record["histogram"] == {"edges": [0.0, 1.0, 2.0], "counts": [3, 1]}
    again = save_circuit_tracer_features([record], tmp_path / "again")
    assert FeatureBundles.open(again)[0, 3] == record


WRONG_RECORDS = {
    "no mapping": (3, "type int"),
    "no examples": ({"layer": 0, "feature": 0}, "Field required"),
    "a label that is no text": (a_record(label=3), "label"),
    "a negative layer": (a_record(layer=-1), "layer"),
    "tokens without activations": (
        a_record(examples=[{"quantile": "top", "tokens": ["a"], "activations": [], "position": 0}]),
        "1 tokens and 0 activations",
    ),
    "a token without a value": (a_record(top_logits=[["a"]]), "for a token and its value"),
}


@pytest.mark.parametrize("case", WRONG_RECORDS)
def test_what_is_no_record_is_refused_and_nothing_is_left(case, tmp_path, as_users_run_it):
    record, words = WRONG_RECORDS[case]
    for save in (save_neuronpedia_features, save_circuit_tracer_features):
        with pytest.raises(ConfigError, match=words):
            save([a_record(0, 0), record], tmp_path / "f")
    assert list(tmp_path.iterdir()) == []


def test_records_come_in_order_once_and_within_the_layer(tmp_path):
    for records in ([a_record(0, 3), a_record(0, 3)], [a_record(1, 0), a_record(0, 3)]):
        with pytest.raises(ConfigError, match="comes after"):
            save_circuit_tracer_features(records, tmp_path / "f")
    with pytest.raises(ConfigError, match="does not exist with d_transcoder=3"):
        save_circuit_tracer_features([a_record(0, 3)], tmp_path / "f", d_transcoder=3)
    with pytest.raises(ConfigError, match="no feature to write"):
        save_circuit_tracer_features([], tmp_path / "f")
    with pytest.raises(ConfigError, match="comes twice"):
        save_neuronpedia_features([a_record(), a_record()], tmp_path / "f")
    with pytest.raises(NotFinite, match="no place"):
        save_neuronpedia_features([a_record(extra=float("nan"))], tmp_path / "f")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "mine").write_text("")
    with pytest.raises(OutputNotEmpty):
        save_circuit_tracer_features([a_record()], tmp_path / "f")


WRONG_INDEXES = {
    "a file outside": ({"0": {"filename": "../x.bin", "offsets": [0, 9]}}, "not in the folder"),
    "falling places": ({"0": {"filename": "layer_0.bin", "offsets": [9, 0]}}, "do not rise"),
    "places beyond the end": ({"0": {"filename": "layer_0.bin", "offsets": [0, 10**9]}}, "do not rise"),
    "places that are no numbers": ({"0": {"filename": "layer_0.bin", "offsets": ["0"]}}, "no places"),
    "a layer that is no number": ({"-1": {"filename": "layer_0.bin", "offsets": [0]}}, "has a layer"),
    "no mapping": (3, "AttributeError"),
}


@pytest.mark.parametrize("case", WRONG_INDEXES)
def test_a_wrong_index_is_refused(case, tmp_path, as_users_run_it):
    folder = save_circuit_tracer_features([a_record()], tmp_path / "f")
    index, words = WRONG_INDEXES[case]
    put_index(folder, index)
    with pytest.raises(FormatError, match=words):
        FeatureBundles.open(folder)


def test_few_bytes_that_stand_for_many_are_refused(tmp_path):
    folder = save_circuit_tracer_features([a_record(0, 0)], tmp_path / "f")
    packed = gzip.compress(b" " * (65 * 2**20))
    (folder / "layer_0.bin").write_bytes(struct.pack("<I", len(packed)) + packed)
    put_index(folder, [{"filename": "layer_0.bin", "offsets": [0, 4 + len(packed)]}])
    with pytest.raises(FormatError, match="more than 64 MiB"):
        FeatureBundles.open(folder)[0, 0]
    with pytest.raises(FormatError, match=r"has no index\.json\.gz"):
        FeatureBundles.open(tmp_path)
    with pytest.raises(FormatError, match="holds no features"):
        load_neuronpedia_features(tmp_path)


@pytest.mark.usefixtures("as_users_run_it")
def test_damaged_files_are_features_in_order_or_are_refused(tmp_path):
    single = save_neuronpedia_features([a_record()], tmp_path / "n") / "9.json"
    folder = save_circuit_tracer_features(some_records(), tmp_path / "c")
    layer, index = folder / "layer_0.bin", folder / "index.json.gz"
    good = {path: path.read_bytes() for path in (single, layer, index)}
    rng, refused = random.Random("features"), 0
    for number in range(300):
        path = (single, layer, index)[number % 3]
        if path == single:
            _, data = mutate("9.json", good[path], rng)
        elif path == index and rng.random() < 0.7:
            _, plain = mutate("index.json", gzip.decompress(good[path]), rng)
            data = gzip.compress(plain or b"")
        else:
            data = bytes(damaged(good[path], rng))
        path.write_bytes(data or b"")
        try:
            if path == single:
                list(load_neuronpedia_features(single.parent))
            else:
                bundles = FeatureBundles.open(folder)
                [bundles[place] for place in bundles]
        except TlCltError:
            refused += 1
        path.write_bytes(good[path])
    assert refused > 100


def damaged(data: bytes, rng: random.Random) -> bytearray:
    """Cut short, or with some bytes changed."""
    changed = bytearray(data)
    if rng.random() < 0.3:
        return changed[: rng.randrange(len(changed))]
    for _ in range(rng.randrange(1, 4)):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return changed
