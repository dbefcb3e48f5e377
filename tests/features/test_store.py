"""A store as it is read: records, what a page gets, damage, and another CLT's."""

from __future__ import annotations

import json
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
from tl_clt.features.store import FeatureRecord, Histogram, Label, LabelPart, TokenValue


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


def test_files_of_two_stores_are_told(case: Case, folder: Path, tmp_path: Path):
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


def test_an_organisms_store_is_opened_by_its_name():
    assert FeatureStore.open("atlas").folder == load_features("atlas").folder
    with pytest.raises(FormatError, match="'atlass' is no feature store"):
        FeatureStore.open("atlass")
