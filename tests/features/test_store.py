"""A store as it is read: records, what a page gets, damage, and another CLT's."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.features import cases
from tests.features.cases import Case, collect
from tests.models import tiny_clt
from tl_clt import CrossLayerTranscoder, FeatureStore, load_features
from tl_clt.errors import CLTMismatch, FeatureNotFound, FormatError
from tl_clt.features import checksums
from tl_clt.features.checksums import write_checksums
from tl_clt.features.store import PARTS, FeatureRecord, Histogram, Label, LabelPart, TokenValue


@pytest.fixture(scope="module")
def case() -> Case:
    return cases.make_case()


@pytest.fixture(scope="module")
def made(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return collect(case, tmp_path_factory.mktemp("stores") / "s").folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(made, tmp_path / "store"))


KEYS = {
    *("layer", "feature", "label", "label_score", "label_score_random", "density", "max_activation", "histogram"),
    *("top_logits", "bottom_logits", "examples", "connected"),
}


def test_a_record_as_a_dictionary_is_json_of_one_shape(folder: Path):
    store = FeatureStore.open(folder)
    store.write_labels({(1, 2): Label("two words", [], 0.75, None, 0.5, 0.25)}, {"labeller": "me", "layers": []})
    for feature in range(12):
        values = json.loads(json.dumps(store[1, feature].to_dict(), allow_nan=False))
        assert set(values) == KEYS
        assert len(values["histogram"]["edges"]) == (len(values["histogram"]["counts"]) + 1 if values["density"] else 0)
        for example in values["examples"]:
            assert set(example) == {"quantile", "tokens", "activations", "position"}
            assert len(example["tokens"]) == len(example["activations"])
            assert max(example["activations"]) == example["activations"][example["position"]]
        assert all(set(c) == {"layer", "feature", "weight"} for c in values["connected"])
        assert all(isinstance(token, str) for token, _ in values["top_logits"] + values["bottom_logits"])
    record = store[1, 2].to_dict()
    assert (record["label"], record["label_score"], record["label_score_random"]) == ("two words", 0.75, 0.5)
    assert store[1, 3].to_dict()["label"] is None


def test_get_gives_none_where_there_is_no_such_feature(made: Path):
    store = FeatureStore.open(made)
    assert store.get(2, 11) is not None and store.get(3, 0) is None and store.get(0, 12) is None
    with pytest.raises(FeatureNotFound, match="feature is 12"):
        store[0, 12]


def test_labels_are_replaced_and_keep_their_parts(folder: Path):
    store = FeatureStore.open(folder)
    parts = [LabelPart("Texas", "the state", "Texas", 0.5)]
    store.write_labels({(0, 1): Label("é <b>", parts, None, None, None, None)}, {"labeller": "me", "layers": []})
    store.write_labels({(2, 0): Label("é <b>", parts, 1.0, None, None, 0.5)}, {"labeller": "me", "layers": []})
    again = FeatureStore.open(folder)
    assert again[0, 1].label is None and again[2, 0].label_parts == parts
    assert again.labels()[["layer", "feature", "label", "score"]].values.tolist() == [[2, 0, "é <b>", 1.0]]
    assert again[2, 0].label_score_nearest is None and again[2, 0].label_score_random_nearest == 0.5


def test_what_a_notebook_shows_is_escaped():
    evil = "<script>alert(1)</script>"
    record = FeatureRecord(
        layer=0,
        feature=1,
        label=evil,
        density=0.1,
        n_active=1,
        max_activation=1.0,
        decoder_norm=1.0,
        histogram=Histogram([], []),
        top_logits=[TokenValue(evil, 1.0)],
        bottom_logits=[TokenValue(evil, 1.0)],
        examples=[],
        connected=[],
    )
    shown = record._repr_html_()
    assert "<script" not in shown and "&lt;script&gt;" in shown
    assert "balanced accuracy not scored" in repr(record) and "active on 10.000% of tokens" in str(record)


def test_a_store_of_another_clt_is_refused(case: Case, made: Path):
    assert FeatureStore.open(made, case.clt).n_layers == 3
    other = tiny_clt(case.model, d_transcoder=12, l0=2, dtype=torch.float32, seed=1)
    with pytest.raises(CLTMismatch, match="another CLT of 'custom'.*3 layers x 12 features"):
        FeatureStore.open(made, other)


def test_a_fingerprint_is_of_weights_and_not_of_where_or_how_they_lie(case: Case, tmp_path: Path):
    clt = case.clt
    clt.save_pretrained(tmp_path / "clt")
    for options in ({}, {"lazy_decoder": True}, {"dtype": "float64"}):
        assert CrossLayerTranscoder.from_pretrained(tmp_path / "clt", **options).fingerprint() == clt.fingerprint()
    changed = CrossLayerTranscoder.from_pretrained(tmp_path / "clt")
    with torch.no_grad():
        changed.W_enc[1, 2, 3] += 1e-3
    assert changed.fingerprint() != clt.fingerprint()


FILES = ("features.json", "tokens.json", "statistics.safetensors", "examples.safetensors", "held_out.safetensors")


@pytest.mark.parametrize("name", FILES)
def test_truncated_and_missing_files_are_named(folder: Path, name: str):
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FormatError, match=name):
        FeatureStore.open(folder)
    (folder / name).unlink()
    with pytest.raises(FormatError, match=name):
        FeatureStore.open(folder)


LABELS = ("labels.json", "labels.safetensors")


@pytest.fixture
def labelled(folder: Path) -> Path:
    values = {(l, f): Label(f"{l} {f}", [], 0.75, None, 0.5, 0.25) for l in range(3) for f in range(12)}  # noqa: E741
    FeatureStore.open(folder).write_labels(values, {"labeller": "me", "layers": []})
    return folder


def read_all(folder: Path) -> None:
    store = FeatureStore.open(folder)
    assert store.is_labelled
    _ = list(store), store.labels(), store.statistics(), store.label_summary(), [store.held_out(p) for p in PARTS]


@pytest.mark.parametrize("name", (*FILES, *LABELS))
def test_a_flipped_bit_is_noticed_wherever_it_is(labelled: Path, name: str):
    whole = (labelled / name).read_bytes()
    read_all(labelled)
    for at in range(0, len(whole), max(1, len(whole) // 97)):
        (labelled / name).write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(
            FormatError, match=rf"{re.escape(name)}' is damaged: bytes \d+ to \d+.*Copy the folder again"
        ):
            read_all(labelled)
    (labelled / name).write_bytes(whole)
    read_all(labelled)


def test_what_was_read_before_is_checked_again_when_it_changes(labelled: Path):
    store, path = FeatureStore.open(labelled), labelled / "examples.safetensors"
    _ = store[2, 11]
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(FormatError, match="is damaged"):
        _ = list(store)


def test_one_feature_is_read_without_the_rest_of_a_large_file(labelled: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checksums, "BLOCK_BYTES", 64)
    (labelled / "checksums.json").unlink()
    write_checksums(labelled)
    whole = (labelled / "examples.safetensors").read_bytes()
    (labelled / "examples.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    store = FeatureStore.open(labelled)
    places = [(layer, feature) for layer in range(3) for feature in range(12)]
    damaged = []
    for place in places:
        try:
            _ = store[place]
        except FormatError:
            damaged.append(place)
    assert 1 <= len(damaged) < 6


@pytest.mark.parametrize("missing", LABELS)
@pytest.mark.parametrize("has_checksums", [True, False])
def test_labels_that_are_half_there_are_damage(labelled: Path, missing: str, has_checksums: bool):
    if not has_checksums:
        (labelled / "checksums.json").unlink()
    (labelled / missing).unlink()
    with pytest.raises(FormatError, match=f"is damaged: it lacks {missing}.*remove labels.json and labels.safetensors"):
        FeatureStore.open(labelled)
    (labelled / next(name for name in LABELS if name != missing)).unlink()
    assert not FeatureStore.open(labelled).is_labelled


def test_a_store_of_an_older_release_has_no_checksums(labelled: Path):
    (labelled / "checksums.json").unlink()
    read_all(labelled)
    store = FeatureStore.open(labelled)
    store.write_labels({(1, 2): Label("new", [], None, None, None, None)}, {"labeller": "me", "layers": []})
    assert list(json.loads((labelled / "checksums.json").read_text())["files"]) == list(LABELS)
    assert store[1, 2].label == "new"
    read_all(labelled)


def test_damaged_checksums_are_told(labelled: Path):
    path = labelled / "checksums.json"
    whole = path.read_text()
    for content in (
        whole[:40],
        "[]",
        whole.replace("16384", "0"),
        whole.replace('"features.json": "', '"features.json": "0'),
    ):
        path.write_text(content)
        with pytest.raises(FormatError, match="checksums.json"):
            FeatureStore.open(labelled)


def test_files_of_two_stores_are_told(case: Case, folder: Path, tmp_path: Path):
    (folder / "checksums.json").unlink()
    smaller = tiny_clt(case.model, d_transcoder=10, l0=2, dtype=torch.float32)
    other = collect(case._replace(clt=smaller), tmp_path / "other").folder
    for name in ("statistics.safetensors", "examples.safetensors"):
        shutil.copy(other / name, folder / name)
        with pytest.raises(FormatError, match="Files of two stores are mixed"):
            FeatureStore.open(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"format": "other"}', "this release reads tl_clt.features"),
        ('{"format": "tl_clt.features", "version": 2}', "version 2"),
        ('{"format": "tl_clt.features", "version": 1}', "no index of a feature store"),
        ("[1]", "it holds list"),
        ("[" * 100_000, "truncated or no JSON"),
    ],
)
def test_foreign_indices_are_refused(folder: Path, content: str, message: str):
    (folder / "features.json").write_text(content)
    (folder / "checksums.json").unlink()
    with pytest.raises(FormatError, match=message):
        FeatureStore.open(folder)


@pytest.mark.parametrize(
    ("tensor", "change"),
    [
        ("bands", lambda t: t + 9),
        ("positions", lambda t: t + 99),
        ("first_token", lambda t: t.flip(0)),
        ("first_example", lambda t: t + 10**6),
    ],
)
def test_numbers_that_point_beyond_are_an_error_of_the_file(folder: Path, tensor: str, change):
    tensors = load_file(folder / "examples.safetensors")
    tensors[tensor] = change(tensors[tensor]).contiguous()
    save_file(tensors, folder / "examples.safetensors")
    (folder / "checksums.json").unlink()
    store = FeatureStore.open(folder)
    with pytest.raises(FormatError, match=r"examples\.safetensors"):
        for feature in range(12):
            _ = store[1, feature]


def test_no_store_is_told_from_an_unfinished_one(tmp_path: Path):
    with pytest.raises(FormatError, match="is no feature store"):
        FeatureStore.open(tmp_path)
    (tmp_path / "unfinished").mkdir()
    with pytest.raises(FormatError, match="unfinished store"):
        FeatureStore.open(tmp_path)
    with pytest.raises(FormatError, match="give a path"):
        FeatureStore.open("")


def test_all_of_an_organisms_store_is_as_it_was_written():
    folder = load_features("atlas").folder
    of_files = json.loads((folder / "checksums.json").read_text())["files"]
    assert sorted(of_files) == sorted((*FILES, *LABELS))
    read_all(folder)


def test_an_organisms_store_is_opened_by_its_name():
    assert FeatureStore.open("atlas").folder == load_features("atlas").folder
    with pytest.raises(FormatError, match="'atlass' is no feature store"):
        FeatureStore.open("atlass")
