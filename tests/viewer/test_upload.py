"""Upload to Neuronpedia through its client, whose requests are answered here."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.mutations import a_graph
from tests.viewer.records import a_record
from tl_clt import save_neuronpedia
from tl_clt.errors import ConfigError, ExtraMissing, FormatError, KeyMissing, UploadFailed
from tl_clt.viewer import upload_neuronpedia, upload_neuronpedia_features
from tl_clt.viewer.formats import neuronpedia as ours

KEY = "sk-np-secret"


class Answer:
    def __init__(self, values: Any, status: int = 200) -> None:
        self.status_code, self._values, self.text = status, values, json.dumps(values)

    def json(self) -> Any:
        return self._values

    def raise_for_status(self) -> None:
        assert self.status_code < 400


class Service:
    """What Neuronpedia answers, and what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.keys: set[str | None] = set()
        self.sent: list[Any] = []
        self.stored = b""
        self.status = 200

    def request(self, method: str, url: str, **given: Any) -> Answer:
        self.asked.append((method, url))
        self.keys.add(given["headers"].get("X-Api-Key"))
        self.sent.append(given.get("json"))
        known = {
            "signed-put": {"url": "https://store.example/put", "putRequestId": "7"},
            "save-to-db": {"url": "https://neuronpedia.org/m/graph?slug=g"},
            "g": {
                "id": "1",
                "modelId": "m",
                "slug": "g",
                "promptTokens": [],
                "prompt": "",
                "titlePrefix": "",
                "url": "u",
            },
            "upload-batch": {"ok": True},
        }
        return Answer(known[url.rsplit("/", 1)[-1]] if self.status == 200 else {"error": "no"}, self.status)

    def put(self, url: str, data: bytes, headers: dict[str, str]) -> Answer:
        assert headers == {"Content-Encoding": "gzip"} and url == "https://store.example/put"
        self.stored = data
        return Answer({})


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    found = Service()
    monkeypatch.delenv(ours.KEY, raising=False)
    monkeypatch.setattr(requests, "request", found.request)
    monkeypatch.setattr(requests, "put", found.put)
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return save_neuronpedia(a_graph(sparse=False), tmp_path / "g.json", scan="m")


def test_a_graph_arrives_as_it_is_in_the_file(service, file, capsys, monkeypatch):
    monkeypatch.setenv(ours.KEY, KEY)
    assert upload_neuronpedia(file) == "https://neuronpedia.org/m/graph?slug=g"
    assert gzip.decompress(service.stored) == file.read_bytes()
    assert service.keys == {KEY}
    assert all(url.startswith("https://neuronpedia.org/api/graph/") for _, url in service.asked)
    assert capsys.readouterr().out == ""


def test_without_a_key_nothing_is_asked(service, file):
    with pytest.raises(KeyMissing, match=r"NEURONPEDIA_API_KEY.*api_key"):
        upload_neuronpedia(file)
    with pytest.raises(KeyMissing):
        upload_neuronpedia_features([a_record()], model="m", source="0-x")
    assert service.asked == []


def test_without_the_client_the_error_says_what_to_install(service, file, monkeypatch):
    monkeypatch.setitem(sys.modules, "neuronpedia", None)
    with pytest.raises(ExtraMissing, match=r'pip install "tl_clt\[neuronpedia\]"'):
        upload_neuronpedia(file, api_key=KEY)


def test_a_file_that_is_no_graph_or_too_large_is_not_sent(service, file, tmp_path, monkeypatch):
    (tmp_path / "bad.json").write_text('{"metadata": {}}')
    with pytest.raises(FormatError):
        upload_neuronpedia(tmp_path / "bad.json", api_key=KEY)
    monkeypatch.setattr(ours, "MOST_BYTES", 100)
    with pytest.raises(FormatError, match="Neuronpedia takes"):
        upload_neuronpedia(file, api_key=KEY)
    assert service.asked == []


@pytest.mark.parametrize(
    ("status", "words"), [(401, "does not know the key"), (429, "RateLimit"), (500, "500"), (404, "404")]
)
def test_a_refusal_is_one_error_without_the_key(service, file, status, words):
    service.status = status
    with pytest.raises(UploadFailed, match=words) as refusal:
        upload_neuronpedia(file, api_key=KEY)
    assert KEY not in str(refusal.value)


def test_a_service_that_cannot_be_reached_is_one_error(service, file, monkeypatch):
    def nobody(*_: Any, **__: Any) -> None:
        raise requests.ConnectionError("no route to host")

    monkeypatch.setattr(requests, "request", nobody)
    with pytest.raises(UploadFailed, match="no route"):
        upload_neuronpedia(file, api_key=KEY)


def test_features_arrive_in_batches(service):
    records = [a_record(3, feature) for feature in range(130)]
    assert upload_neuronpedia_features(iter(records), model="m", source="3-x", api_key=KEY) == 130
    assert [len(sent["features"]) for sent in service.sent] == [128, 2]
    first = service.sent[0]["features"][0]
    assert first["topLogits"][0] == {"token": " Texas", "value": 1.5}
    assert first["activations"][0]["values"] == [0.0, 7.25, 0.1]
    assert first["explanations"][0]["text"] == 'says "Texas"'
    with pytest.raises(ConfigError, match="not of the layer of the source"):
        upload_neuronpedia_features([a_record(2, 0)], model="m", source="3-x", api_key=KEY)
