"""A hub that cannot be reached is told at once, and what is cached is read all the same."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_hub_download

from tl_clt import CrossLayerTranscoder, connection, load_model
from tl_clt.connection import hub_or_cache
from tl_clt.errors import DatasetError, FormatError, ModelNotFound
from tl_clt.lens.loading import model_shape
from tl_clt.training.data.dataset import open_dataset


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path):
    """A hub that refuses connections; asked for a second time in one call, it would be waited for."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(connection, "_found", {})
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"tried again after {seconds} s"))


SAID = "http://127.0.0.1:9 cannot be reached"


@pytest.mark.parametrize("name", ["nope", "own/er"])
def test_a_model_that_is_nowhere_is_told_without_trying_again(no_hub, name):
    with pytest.raises(ModelNotFound, match=SAID):
        load_model(name, backend="bridge")
    with pytest.raises(ModelNotFound, match="no model that HookedTransformer knows"):
        load_model(name)
    with pytest.raises(ModelNotFound, match=SAID):
        load_model("gpt2")
    assert model_shape(name) is None


@pytest.mark.parametrize("name", ["own/er", "hf://own/er/file.safetensors", "gemma-2-2b-plt", "own/er/sub@main"])
def test_a_clt_that_is_nowhere_is_told_without_trying_again(no_hub, name):
    with pytest.raises(FormatError, match=SAID):
        CrossLayerTranscoder.from_pretrained(name)


def test_a_dataset_that_is_nowhere_is_told_without_trying_again(no_hub):
    with pytest.raises(DatasetError, match=SAID):
        open_dataset("own/er", load_model("atlas"))


def test_what_is_cached_is_read_and_the_mode_is_as_before(no_hub, tmp_path):
    commit = "0" * 40
    snapshot = tmp_path / "models--own--er" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "file.txt").write_text("cached")
    (tmp_path / "models--own--er" / "refs").mkdir()
    (tmp_path / "models--own--er" / "refs" / "main").write_text(commit)
    with hub_or_cache() as unreached:
        assert SAID in unreached and constants.HF_HUB_OFFLINE
        assert Path(hf_hub_download("own/er", "file.txt", cache_dir=tmp_path)).read_text() == "cached"
    assert not constants.HF_HUB_OFFLINE


def test_a_hub_that_answers_is_asked(no_hub, monkeypatch):
    class Session:
        def head(self, url: str, timeout: float) -> None:
            assert url == constants.ENDPOINT

    monkeypatch.setattr(connection, "get_session", Session)
    with hub_or_cache() as unreached:
        assert unreached == "" and not constants.HF_HUB_OFFLINE
