"""The server of the page: whom it answers, what it keeps and computes, and that nothing sent to it breaks it."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from http.client import HTTPConnection
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import tl_clt.viewer.host
from tests.conftest import small_disk
from tests.test_interruption import check_end, environment
from tests.viewer.browser import wait_until, watch
from tl_clt import AttributionGraph, CrossLayerTranscoder, Intervention, NodeKind, attribute, intervene, load_organism
from tl_clt.cli import app
from tl_clt.errors import CLTMismatch, ConfigError, FormatError, NotWritten
from tl_clt.organisms import organism_folder
from tl_clt.viewer.server import MOST_BYTES, PageServer, serve

PROMPT = "the capital of the state containing Dallas is"

NASTY = "</script><img src=x onerror=alert(1)>\u2028\ud83d"


class Record(NamedTuple):
    """What the store of these tests knows of a feature."""

    layer: int
    feature: int

    def to_dict(self) -> dict[str, Any]:
        return {
            **{"layer": self.layer, "feature": self.feature, "label": f"</script>{self.feature}"},
            **{"label_score": np.nan, "label_score_random": 0.5, "density": 0.01, "max_activation": 2.0},
            **{"histogram": {"edges": [0, 1, 2], "counts": [3, 1]}, "connected": []},
            **{"top_logits": [(NASTY, 1.0)], "bottom_logits": [(NASTY, -1.0)]},
            "examples": [{"quantile": "top", "tokens": [NASTY], "activations": [2.0], "position": 0}],
        }


class Store:
    """Features of even numbers."""

    def get(self, layer: int, feature: int) -> Record | None:
        return None if feature % 2 else Record(layer, feature)


@pytest.fixture(scope="module")
def pair():
    return load_organism("atlas")


@pytest.fixture(scope="module")
def graph(pair) -> AttributionGraph:
    return attribute(*pair, PROMPT, progress=False).prune()


@pytest.fixture(scope="module")
def other(pair) -> AttributionGraph:
    return attribute(*pair, PROMPT.replace("Dallas", "Oakland"), progress=False).prune()


@pytest.fixture(scope="module")
def server(pair, graph, other, tmp_path_factory):
    path = tmp_path_factory.mktemp("annotations") / "notes.json"
    with PageServer([graph, other], Store(), *pair, annotations=path) as made:
        made.notes = path
        made.start()
        yield made


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(
    server: PageServer, path: str, body: Any = None, method: str = "", token: bool = True, **headers: str
) -> Answer:
    """Send a request as the page does. `body` is bytes, or a value to be sent as JSON."""
    sent = {"Authorization": f"Bearer {server.token}"} if token else {}
    if body is not None:
        sent["Content-Type"] = "application/json"
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    connection = HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        connection.request(method or ("GET" if body is None else "POST"), path, body, sent)
        response = connection.getresponse()
        return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
    finally:
        connection.close()


def raw(server: PageServer, request: bytes) -> bytes:
    """What comes back for bytes sent as they are: one answer, and all behind it where the server closes."""
    got = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        # It hangs up on what it does not want to read.
        with suppress(ConnectionError):
            connection.sendall(request)
        with suppress(ConnectionError):
            while part := connection.recv(65536):
                got += part
                head, _, body = got.partition(b"\r\n\r\n")
                length = re.search(rb"(?im)^content-length: (\d+)", head)
                if length and len(body) >= int(length[1]) and b"connection: close" not in head.lower():
                    break
    return got


def export(server_graphs: list[AttributionGraph], **state: Any) -> dict[str, Any]:
    """Annotations as the page sends them."""
    notes = [{"pinned": [], "groups": [], "places": {}, "path": None} for _ in server_graphs]
    prompts = [g.info["prompt"] for g in server_graphs]
    return {"format": "tl_clt.page_state", "version": 1, "prompts": prompts, "state": {"notes": notes, **state}}


# -- whom it answers -------------------------------------------------------------------------------------------------

ROUTES = ("/", "/page.js", "/page.css", "/served.js", "/data", "/features/1/2", "/annotations", "/steer/0")


def test_it_listens_on_loopback_alone(server):
    assert server._socket.getsockname()[0] == "127.0.0.1"
    assert re.fullmatch(rf"http://127\.0\.0\.1:{server.port}/\?token=[\w-]{{40,}}", server.url)


@pytest.mark.parametrize("path", ROUTES)
def test_every_route_wants_the_token(server, path):
    body = {} if path in ("/annotations", "/steer/0") else None
    wrong = server.token[:-1] + ("A" if server.token[-1] != "A" else "B")
    for given in ({}, {"Authorization": f"Bearer {wrong}"}, {"Authorization": ""}, {"Authorization": "Bearer ü€"[:8]}):
        for query in ("", f"?token={wrong}", "?token=", "?token=%ff%fe", "?tokens=" + server.token):
            answer = ask(server, path + query, body, token=False, **given)
            assert answer.status == 403 and "token is missing or wrong" in answer.json["error"]
            assert server.token.encode() not in answer.body


@pytest.mark.parametrize("path", ROUTES[:4])
def test_what_the_browser_fetches_has_the_token_in_its_address_alone(server, path):
    assert ask(server, f"{path}?token={server.token}", token=False).status == 200
    assert ask(server, path).status == 403


@pytest.mark.parametrize("path", ROUTES[4:])
def test_what_the_script_fetches_has_the_token_in_a_header_alone(server, path):
    """So that no address that another page can make a browser fetch means anything."""
    assert ask(server, f"{path}?token={server.token}", token=False).status == 403


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "localhost", "127.0.0.1:{port}.evil", ""],
)
def test_other_names_are_refused(server, host):
    """DNS rebinding: a name of somebody's that leads to this machine."""
    answer = ask(server, "/data", Host=host.format(port=server.port))
    assert answer.status == 403 and "another name" in answer.json["error"]


def test_two_names_or_none_are_refused(server):
    head = f"GET /data HTTP/1.1\r\nAuthorization: Bearer {server.token}\r\nConnection: close\r\n".encode()
    mine = f"Host: 127.0.0.1:{server.port}\r\n".encode()
    assert b" 200 OK" in raw(server, head + mine + b"\r\n").splitlines()[0]
    for hosts in (b"", mine + b"Host: evil.example\r\n", b"Host: evil.example\r\n" + mine):
        assert raw(server, head + hosts + b"\r\n").split()[1] in (b"400", b"403")
    old = head.replace(b"1.1", b"1.0")
    assert raw(server, old + b"\r\n").split()[1] in (b"400", b"403")


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "https://127.0.0.1:{port}", "http://localhost:{port}", ""]
)
def test_other_pages_are_refused(server, origin):
    answer = ask(server, "/data", Origin=origin.format(port=server.port))
    assert answer.status == 403 and "Another page" in answer.json["error"]


def test_the_page_itself_is_answered_by_either_name(server):
    for name in ("127.0.0.1", "localhost"):
        here = f"{name}:{server.port}"
        assert ask(server, "/data", Host=here, Origin=f"http://{here}").status == 200


def test_no_answer_lets_other_pages_read_or_frame_it(server):
    for answer in (
        ask(server, f"/?token={server.token}", token=False),
        ask(server, "/data"),
        ask(server, "/data", token=False),
        ask(server, "/nowhere"),
        ask(server, "/data", method="OPTIONS", Origin=f"http://127.0.0.1:{server.port}"),
        ask(server, "/steer/0", b"{"),
    ):
        headers = answer.headers
        assert not [name for name in headers if name.startswith("access-control-")]
        assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"
        assert headers["cross-origin-opener-policy"] == headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["referrer-policy"] == "no-referrer" and "server" not in headers
        policy = dict(part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'" and policy["frame-ancestors"] == "'none'"
        assert policy["script-src"] == policy["connect-src"] == policy["style-src"] == "'self'"
        assert "unsafe" not in headers["content-security-policy"] and "*" not in headers["content-security-policy"]


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/..%2f..%2fetc%2fpasswd",
        "//etc/passwd",
        "/etc/passwd",
        "/page.js/../server.py",
        "/%5c..%5cserver.py",
        "/server.py",
        "/page.js%00.py",
        "/features/../../server.py",
        "/features/%2e%2e/%2fetc%2fpasswd",
        "/features/1/..%2f..%2f..%2fetc%2fpasswd",
        "/linked/passwd",
        "http://evil.example/data",
        "/data/",
        "/Data",
        "/openapi.json",
    ],
)
def test_no_path_is_one_of_the_file_system(server, path, tmp_path, monkeypatch):
    (tmp_path / "linked").symlink_to("/etc")
    monkeypatch.chdir(tmp_path)
    for given in (path, f"{path}?token={server.token}"):
        answer = ask(server, given)
        assert answer.status in (403, 404) and b"root:" not in answer.body and b"import" not in answer.body


# -- what it gives ---------------------------------------------------------------------------------------------------


def test_it_gives_the_graphs_and_says_what_may_be_asked(server, graph, other):
    given = ask(server, "/data").json
    assert given["can"] == {"features": True, "annotate": True, "steer": True}
    assert [g["prompt"] for g in given["data"]["graphs"]] == [graph.info["prompt"], other.info["prompt"]]
    assert len(given["data"]["graphs"][0]["nodes"]["kind"]) == len(graph.nodes)


def test_features_are_given_one_by_one(server):
    answer = ask(server, "/features/1/12")
    assert answer.json["label"] == "</script>12" and answer.json["label_score"] is None
    assert answer.json["top_logits"] == [[NASTY, 1.0]]
    assert ask(server, "/features/1/13").json is None
    for path in (
        "/features/x/1",
        "/features/-1/1",
        "/features/1/1.5",
        "/features/1/" + "9" * 5000,
        "/features/1/%d9%a1",
    ):
        assert ask(server, path).status == 404


def test_a_page_without_more_can_ask_for_nothing(graph):
    with PageServer(graph) as server:
        server.start()
        assert ask(server, "/data").json["can"] == {"features": False, "annotate": False, "steer": False}
        assert ask(server, "/features/0/0").json is None
        assert "--annotations" in ask(server, "/annotations", export([graph])).json["error"]
        answer = ask(server, "/steer/0", {"interventions": [{"layer": 0, "pos": 1, "feature": 2, "scale": 0}]})
        assert answer.status == 400 and "--model" in answer.json["error"]


# -- annotations -----------------------------------------------------------------------------------------------------


def test_annotations_come_back(server, graph, other):
    sent = export([graph, other], labels={"1/2": "</script><img src=x onerror=alert(1)> \ud83d"})
    sent["state"]["notes"][1]["pinned"] = ["x"]
    assert ask(server, "/annotations", sent).json == {}
    assert ask(server, "/data").json["data"]["annotations"] == sent
    assert json.loads(server.notes.read_text()) == sent


def test_annotations_of_other_graphs_in_the_file_stay(graph, other, tmp_path):
    path = tmp_path / "notes.json"
    for graphs in ([graph], [other, graph]):
        host = tl_clt.viewer.host.Host(graphs, annotations=path)
        sent = export(graphs)
        for g, notes in zip(graphs, sent["state"]["notes"], strict=True):
            notes["pinned"] = [g.info["prompt"]]
        host.annotate(sent)
    host = tl_clt.viewer.host.Host([graph], annotations=path)
    host.annotate(host.data()["data"]["annotations"])
    kept = json.loads(path.read_text())
    assert kept["prompts"] == [graph.info["prompt"], other.info["prompt"]]
    assert [notes["pinned"] for notes in kept["state"]["notes"]] == [[prompt] for prompt in kept["prompts"]]


def test_a_full_disk_leaves_the_annotations_as_they_were(server, graph, other):
    assert ask(server, "/annotations", export([graph, other])).status == 200
    before = server.notes.read_bytes()
    with small_disk():
        answer = ask(server, "/annotations", export([graph, other], labels={"1/2": "long" * 5000}))
    assert answer.status == 507 and "could not be written" in answer.json["error"]
    assert server.notes.read_bytes() == before and [server.notes] == list(server.notes.parent.iterdir())


@pytest.mark.parametrize(
    "sent",
    [
        *(None, [], 1, "x", {}, {"format": "tl_clt.page_state"}, {"format": "tl_clt.page_state", "version": 1}),
        {"format": "tl_clt.page_state", "version": 1, "prompts": ["another"], "state": {"notes": [{}]}},
        {"format": "tl_clt.page_state", "version": 1, "prompts": 3, "state": {"notes": []}},
        {"format": "tl_clt.page_state", "version": True, "prompts": [[]], "state": []},
    ],
)
def test_what_are_no_annotations_is_refused(server, sent):
    before = server.notes.read_bytes() if server.notes.exists() else None
    answer = ask(server, "/annotations", json.dumps(sent).encode())
    assert answer.status == 400 and "no annotations of these graphs" in answer.json["error"]
    assert (server.notes.read_bytes() if server.notes.exists() else None) == before


def test_a_file_of_annotations_is_checked_before_anything_is_served(graph, other, tmp_path):
    path = tmp_path / "notes.json"
    tl_clt.viewer.host.Host([other], annotations=path).annotate(export([other]))
    with pytest.raises(ConfigError, match="annotations of another graph.*Oakland"):
        PageServer(graph, annotations=path)
    for text in (
        "",
        "{",
        "[]",
        '{"format": "tl_clt.page_state"}',
        "\0",
        path.read_text().replace('"version": 1', '"version": 9'),
    ):
        path.write_text(text)
        with pytest.raises(FormatError, match=r"notes\.json.*Give another file, or remove it"):
            PageServer(graph, annotations=path)
        assert path.read_text() == text
    with pytest.raises(NotWritten, match="is a folder"):
        PageServer(graph, annotations=tmp_path)


# -- steering --------------------------------------------------------------------------------------------------------


def strongest(graph: AttributionGraph) -> dict[str, int]:
    node = graph.top(1, NodeKind.FEATURE)[0].node
    return {"layer": node.layer, "pos": node.pos, "feature": node.index}


@pytest.mark.parametrize("amount", [{"scale": -20}, {"value": 0.5}, {"add": 30.0}])
def test_steering_gives_what_intervene_gives(server, pair, graph, amount):
    where = strongest(graph)
    answer = ask(server, "/steer/0", {"interventions": [{**where, "feature": [where["feature"]], **amount}]})
    assert answer.status == 200, answer.body
    expected = intervene(*pair, graph.tokens, [Intervention(**where, **amount)]).top_changes(10)
    given = answer.json["top"]
    assert [row["token"] for row in given] == list(expected["token"]) and answer.json["inactive"] == []
    # The same numbers in JSON; the forward pass may be split differently among threads.
    np.testing.assert_allclose([[r["before"], r["after"]] for r in given], expected[["before", "after"]], atol=1e-5)


def test_steering_says_which_features_are_not_active(server, graph):
    answer = ask(server, "/steer/1", {"interventions": [{"layer": 0, "pos": 1, "feature": 255, "scale": 0}]})
    assert answer.json["inactive"] == ["feature 0.255 is not active there in prompt 0"]


ENTRY = {"layer": 1, "pos": 2, "feature": 3, "scale": 0}


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        *((sent, "interventions") for sent in ([], None, 3, {}, {"interventions": []}, {"interventions": {}})),
        ({"interventions": [ENTRY], "more": 1}, "interventions"),
        ({"interventions": [ENTRY] * 1001}, "list of 1 to 1000"),
        ({"interventions": [1]}, r"interventions\[0\]"),
        ({"interventions": [{**ENTRY, "noise": 1}]}, r"interventions\[0\]"),
        ({"interventions": [{"layer": 1, "pos": 2, "scale": 0}]}, r"interventions\[0\]"),
        ({"interventions": [{**ENTRY, "layer": "1"}]}, "layer is '1'"),
        ({"interventions": [{**ENTRY, "layer": True}]}, "layer is True"),
        ({"interventions": [{**ENTRY, "layer": 99}]}, "no layer 99"),
        ({"interventions": [{**ENTRY, "pos": None}]}, "pos is None"),
        ({"interventions": [{**ENTRY, "pos": 1e300}]}, "pos is 1e"),
        ({"interventions": [{**ENTRY, "pos": 99}]}, "no position 99"),
        ({"interventions": [{**ENTRY, "feature": {"a": 1}}]}, "feature is"),
        ({"interventions": [{**ENTRY, "feature": []}]}, "at least one feature"),
        ({"interventions": [{**ENTRY, "feature": 2**63}]}, "feature is"),
        ({"interventions": [{**ENTRY, "feature": 256}]}, "no feature 256"),
        ({"interventions": [{**ENTRY, "scale": "0"}]}, "scale is '0'"),
        ({"interventions": [{**ENTRY, "scale": None}]}, "sets nothing"),
        ({"interventions": [{**ENTRY, "value": 1}]}, "sets value and scale"),
    ],
)
def test_what_is_no_intervention_is_refused(server, as_users_run_it, sent, words):
    answer = ask(server, "/steer/0", json.dumps(sent).encode())
    assert answer.status == 400 and re.search(words, answer.json["error"]), answer.body


def test_one_change_is_computed_at_a_time(server, graph, monkeypatch):
    begun, done = threading.Event(), threading.Event()

    def slow(*args: Any) -> Any:
        begun.set()
        assert done.wait(60)
        return intervene(*args)

    monkeypatch.setattr(tl_clt.viewer.host, "intervene", slow)
    sent = {"interventions": [{**strongest(graph), "scale": 0}]}
    answers: list[Answer] = []
    first = threading.Thread(target=lambda: answers.append(ask(server, "/steer/0", sent)))
    first.start()
    assert begun.wait(60)
    second = ask(server, "/steer/0", sent)
    assert second.status == 409 and "Another change" in second.json["error"]
    assert ask(server, "/data").status == 200, "all else is answered meanwhile"
    done.set()
    first.join()
    assert answers[0].status == 200 and ask(server, "/steer/0", sent).status == 200


def test_an_error_of_the_model_is_told_without_its_place(server, graph, monkeypatch, caplog):
    def broken(*args: Any) -> None:
        raise RuntimeError("a secret of /this/machine.py")

    monkeypatch.setattr(tl_clt.viewer.host, "intervene", broken)
    answer = ask(server, "/steer/0", {"interventions": [{**strongest(graph), "scale": 0}]})
    assert answer.status == 500 and answer.json == {
        "error": "The server failed (RuntimeError); its terminal says more."
    }
    monkeypatch.undo()
    assert ask(server, "/steer/0", {"interventions": [{**strongest(graph), "scale": 0}]}).status == 200
    assert "a secret of" in caplog.text, "the terminal does say more"


def test_a_model_or_clt_of_other_graphs_is_refused(pair, graph):
    model, clt = pair
    with pytest.raises(ConfigError, match="model is missing"):
        PageServer(graph, clt=clt)
    with pytest.raises(ConfigError, match="clt is missing"):
        PageServer(graph, model=model)
    shuffled = CrossLayerTranscoder(clt.cfg)
    shuffled.load_state_dict(clt.state_dict())
    with torch.no_grad():
        shuffled.W_enc.copy_(shuffled.W_enc.roll(1, dims=-1))
    with pytest.raises(CLTMismatch, match="was not traced with this CLT and atlas"):
        PageServer(graph, None, model, shuffled)
    fewer = CrossLayerTranscoder(replace(clt.cfg, d_transcoder=8, input_scale=None, output_scale=None))
    with pytest.raises(CLTMismatch, match="was not traced with this CLT"):
        PageServer(graph, None, model, fewer)


# -- what is sent ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        *(
            b"",
            b"{",
            b"nul",
            b"\xff",
            b"\xef\xbb\xbf{}",
            b"NaN",
            b'{"interventions": [NaN]}',
            b"[Infinity]",
            b"[1e999]",
        ),
        *(b"[" * 100_000, b'{"a":' * 50_000, b"[" * 40 + b"]" * 40, b"1" * 6000, b"[18446744073709551616]", b'"\x00"'),
    ],
)
@pytest.mark.parametrize("path", ["/annotations", "/steer/0"])
def test_what_is_no_json_is_refused(server, path, body):
    answer = ask(server, path, body)
    assert answer.status == 400 and len(answer.json["error"]) < 500


def test_only_json_is_read(server):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/jsonp", ""):
        assert ask(server, "/steer/0", b"{}", Content_Type=kind).status == 415
    assert ask(server, "/steer/0", b"{}", Content_Type="application/json; charset=utf-8").status == 400


def head_of(server: PageServer, *lines: str) -> bytes:
    own = (f"Host: 127.0.0.1:{server.port}", f"Authorization: Bearer {server.token}", "Content-Type: application/json")
    return "\r\n".join(["POST /annotations HTTP/1.1", *own, *lines, "", ""]).encode()


def test_large_requests_are_refused_however_they_state_their_length(server):
    large = b"[" + b" " * MOST_BYTES + b"]"
    assert ask(server, "/annotations", large).status == 413
    # None stated: in chunks.
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    assert raw(server, head_of(server, "Transfer-Encoding: chunked") + chunk * 40 + b"0\r\n\r\n").split()[1] == b"413"
    # More stated than is sent, or more sent than is stated: what is behind is no request of its own that is answered.
    assert raw(server, head_of(server, f"Content-Length: {10**12}") + b"[]").split()[1] == b"413"
    got = raw(server, head_of(server, "Content-Length: 2", "Connection: close") + large)
    assert got.split()[1] == b"400" and got.count(b"HTTP/1.1") == 1
    for stated in ("-1", "1e3", "2\r\nContent-Length: 3", "9" * 30, "2, 2", "\u0662"):
        got = raw(server, head_of(server, f"Content-Length: {stated}") + b"[]")
        assert got.split()[1] in (b"400", b"413"), stated
    both = head_of(server, "Content-Length: 4", "Transfer-Encoding: chunked")
    assert raw(server, both + b"0\r\n\r\n").split()[1] == b"400"


def test_a_request_that_never_ends_is_given_up(server, monkeypatch):
    monkeypatch.setattr("tl_clt.viewer.server.MOST_SECONDS", 0.05)
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(head_of(server, "Content-Length: 100") + b"[")
        assert connection.recv(65536).split()[1] == b"408"


def test_a_page_that_closes_before_it_has_sent_all_does_no_harm(server, caplog):
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(head_of(server, "Content-Length: 100") + b"[")
    assert ask(server, "/data").status == 200 and "Traceback" not in caplog.text


def test_no_random_request_breaks_it(server, as_users_run_it, caplog):
    """A few hundred requests of parts that mean something and parts that do not."""
    draw = np.random.default_rng(0)

    def pick(*choices: Any) -> Any:
        return choices[int(draw.integers(len(choices)))]

    def value(depth: int = 0) -> Any:
        kinds = [None, True, 0, -1, 3, 1.5, 2**63, 1e308, "", "x", "\ud83d", "layer", "../..", [], {}]
        if depth > 3 or draw.random() < 0.5:
            return pick(*kinds)
        if draw.random() < 0.5:
            return [value(depth + 1) for _ in range(draw.integers(4))]
        names = (
            "layer",
            "pos",
            "feature",
            "scale",
            "value",
            "interventions",
            "format",
            "version",
            "prompts",
            "state",
            "notes",
        )
        return {pick(*names): value(depth + 1) for _ in range(draw.integers(5))}

    for _ in range(300):
        segments = [
            pick(*ROUTES, "/features", "/steer", "/0", "/1", "/-1", "/x", "/%00", "/..", "/%ff", "/99999999999")
            for _ in range(draw.integers(1, 3))
        ]
        path = "".join(segments) + pick("", "", "?", f"?token={server.token}", "?token=%00")
        sent = pick(
            None,
            b"",
            bytes(draw.integers(0, 256, 40, dtype=np.uint8)),
            value(),
            {"interventions": [{**ENTRY, pick(*ENTRY): value()}]},
        )
        answer = ask(server, path, sent, pick("", "", "GET", "POST", "PUT", "DELETE", "HEAD", "PATCH", "TRACE"))
        assert answer.status < 500, (path, sent, answer)
        if answer.status >= 400 and answer.body:
            assert set(answer.json) == {"error"} and "Traceback" not in answer.json["error"]
    assert "Traceback" not in caplog.text
    assert ask(server, "/data").status == 200


# -- in a browser ----------------------------------------------------------------------------------------------------


def opened(browser, url: str):
    """A page, once it is drawn, that counts alerts."""
    watched = watch(browser)
    watched.page.add_init_script("window.alerts = 0; window.alert = () => window.alerts++;")
    watched.page.goto(url)
    wait_until(watched.page, "window.tlclt && tlclt.firstPaint !== null")
    return watched


def test_the_page_opens_and_talks_to_its_server_alone(browser, server, graph):
    watched = opened(browser, server.url)
    assert watched.page.evaluate("tlclt.store.graphs.map((graph) => graph.n)")[0] == len(graph.nodes)
    assert len(watched.requests) == 5
    assert all(url.startswith(f"http://127.0.0.1:{server.port}/") for url in watched.requests)
    assert watched.complaints == []


def test_the_token_is_in_no_referrer(browser, server):
    watched = watch(browser)
    sent: list[dict[str, str]] = []
    watched.page.on("request", lambda request: sent.append(request.all_headers()))
    watched.page.goto(server.url)
    wait_until(watched.page, "window.tlclt && tlclt.firstPaint !== null")
    assert len(sent) == 5 and not [headers for headers in sent if "referer" in headers]


def test_what_a_person_notes_is_there_when_the_page_is_opened_again(browser, pair, graph, tmp_path):
    path = tmp_path / "notes.json"
    for label in (None, NASTY.replace("\ud83d", "")):
        with PageServer(graph, Store(), *pair, annotations=path) as server:
            server.start()
            watched = opened(browser, server.url)
            page = watched.page
            first = page.evaluate("tlclt.store.graph.kind.indexOf('feature')")
            if label is None:
                page.evaluate(f"tlclt.store.togglePin({first})")
                page.evaluate(f"tlclt.store.relabel({first}, {json.dumps(NASTY)})")
                with page.expect_response("**/annotations"):
                    pass
            assert page.evaluate("tlclt.store.pinned") == [first]
            assert page.evaluate(f"tlclt.store.labelOf({first})").startswith(NASTY[:-1])
            assert page.evaluate("alerts + document.querySelectorAll('img').length") == 0
            assert watched.complaints == []
    assert json.loads(path.read_text())["prompts"] == [graph.info["prompt"]]


def test_features_are_loaded_and_changed_from_the_page(browser, server, graph):
    page = opened(browser, server.url).page
    where = strongest(graph)
    answer = page.evaluate(f"tlclt.store.host.steer([{json.dumps({**where, 'scale': 0})}], 0)")
    assert {row["token"].strip() for row in answer["top"]} >= {"Austin"}
    assert page.evaluate("tlclt.store.host.loadFeature(2, 6)")["label"] == "</script>6"
    assert page.evaluate("tlclt.store.host.loadFeature(2, 7)") is None
    said = page.evaluate("tlclt.store.host.steer([], 0).catch((error) => error.message)")
    assert said.startswith("InterventionError: interventions is no list")


def test_scripts_in_tokens_reach_the_page_as_text(browser, graph):
    tokens = [NASTY] * len(graph.prompt_tokens)
    nasty = replace(graph, prompt_tokens=tokens, logit_tokens=[NASTY] * len(graph.logit_tokens), info={"prompt": NASTY})
    with PageServer({NASTY: nasty}, Store()) as server:
        server.start()
        watched = opened(browser, server.url)
        page = watched.page
        for node in range(len(nasty.nodes)):
            page.evaluate(f"tlclt.store.select({node})")
        page.evaluate("new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)))")
        assert page.evaluate("alerts + document.querySelectorAll('img').length") == 0
        assert NASTY[:-2] in page.text_content("#page") and page.title().startswith(NASTY[:20])
        assert watched.complaints == []


def test_a_page_whose_server_is_gone_says_so(browser, graph):
    with PageServer(graph) as server:
        server.start()
        page = watch(browser).page
        page.route("**/data", lambda route: route.abort())
        page.goto(server.url)
        wait_until(page, "document.getElementById('page').textContent !== ''")
        assert "The server does not answer" in page.text_content("[role=alert]")
        page.unroute("**/data")
        page.goto(server.url.replace("token=", "token=x"))
        assert "The token is missing or wrong" in page.text_content("body")


# -- starting --------------------------------------------------------------------------------------------------------


def test_a_port_that_is_taken_is_told(server, graph):
    with pytest.raises(ConfigError, match=rf"port {server.port} .* cannot be had .*Give another, or 0"):
        PageServer(graph, port=server.port)
    with pytest.raises(ConfigError, match="port is 99999"):
        PageServer(graph, port=99999)


def test_what_are_no_graphs_is_told(as_users_run_it):
    for given in ([], {}, None, 3, "graph", [3], {"a": None}):
        with pytest.raises(ConfigError, match="graph"):
            PageServer(given)


def test_serve_does_not_start_within_a_notebook(graph):
    async def cell() -> None:
        serve(graph, open_browser=False)

    # In a thread of its own: the browser of other tests has a loop in this one.
    with ThreadPoolExecutor(1) as pool, pytest.raises(ConfigError, match=r"graph\.show\(\)"):
        pool.submit(asyncio.run, cell()).result()


def test_features_of_another_clt_are_refused(graph):
    store = Store()
    store.n_layers, store.d_transcoder = 4, 99
    with pytest.raises(CLTMismatch, match="d_transcoder is 99 there and 256 here"):
        PageServer(graph, store)
    store.d_transcoder = 256
    PageServer(graph, store).close()


# -- the command -----------------------------------------------------------------------------------------------------


def view(*arguments: str, status: int = 1) -> str:
    """Output of `tl-clt view`, whose exit status must be as given."""
    result = CliRunner().invoke(app, ["view", *arguments], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == status, (result.output, result.exception)
    return " ".join(result.output.split())


@pytest.fixture
def file(graph, tmp_path) -> str:
    return str(graph.save(tmp_path / "dallas.safetensors"))


def test_the_command_says_where_the_page_is_and_opens_it(file, other, tmp_path, monkeypatch):
    served, opened_at = [], []
    monkeypatch.setattr(PageServer, "run", lambda self: served.append(self))
    monkeypatch.setattr("webbrowser.open", opened_at.append)
    (tmp_path / "elsewhere").mkdir()
    others = [str(other.save(tmp_path / name)) for name in ("b.safetensors", "elsewhere/b.safetensors")]
    said = view(file, *others, status=0)
    [server] = served
    assert f"The page is at {server.url} Ctrl-C ends it." in said and opened_at == [server.url]
    data = server.host.data()
    assert [graph["name"] for graph in data["data"]["graphs"]] == ["dallas", *others]
    assert data["can"] == {"features": False, "annotate": False, "steer": False}
    clt = str(organism_folder("atlas") / "clt")
    view(file, "--clt", clt, "--annotations", str(tmp_path / "n.json"), "--no-browser", status=0)
    assert served[1].host.data()["can"] == {"features": False, "annotate": True, "steer": True} and len(opened_at) == 1


def test_the_command_says_what_is_wrong_in_one_message(server, graph, other, file, tmp_path, as_users_run_it):
    (tmp_path / "short").write_bytes((tmp_path / "dallas.safetensors").read_bytes()[:500])
    tl_clt.viewer.host.Host([other], annotations=tmp_path / "other.json").annotate(export([other]))
    shape = {"n_layers": 3, "span": 3, "input_scale": None, "output_scale": None}
    CrossLayerTranscoder(replace(server.host.clt.cfg, **shape)).save_pretrained(tmp_path / "fewer")
    before = sorted(tmp_path.rglob("*"))
    for arguments, error in (
        (("nowhere",), "FormatError: 'nowhere' does not exist"),
        ((str(tmp_path / "short"),), "FormatError: .*short' is truncated or no graph file"),
        ((str(tmp_path),), "FormatError: .* is a folder. Give the graph file within it"),
        ((file, "--model", "atlas"), "ConfigError: --model is for steering.*give --clt"),
        ((file, "--clt", "nowhere"), "FormatError: 'nowhere' is neither a folder here nor a hub repository"),
        ((file, "--model", "atlas", "--clt", str(tmp_path / "fewer")), "CLTMismatch: .*3 layers, but atlas has 4"),
        ((file, "--port", str(server.port)), f"ConfigError: port {server.port} of 127.0.0.1 cannot be had"),
        ((file, "--port", "-1"), "ConfigError: port is -1"),
        (
            (file, "--annotations", str(tmp_path / "other.json")),
            "ConfigError: .*annotations of another graph .*Oakland",
        ),
        ((file, "--annotations", file), "FormatError: .*dallas.safetensors' is truncated or no file of annotations"),
        ((file, "--annotations", str(tmp_path)), "NotWritten: .* is a folder"),
        ((file, "--annotations", f"{file}/n.json"), "NotWritten: .* is no folder"),
    ):
        said = view(*arguments, "--no-browser")
        # A long path is broken where the terminal's line ends, wherever that is.
        assert re.search(error.replace(" ", ""), re.sub(r"\s", "", said)) and "Traceback" not in said, said
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("missing", ["starlette", "uvicorn"])
def test_without_its_libraries_the_command_names_what_to_install(file, monkeypatch, missing):
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "tl_clt.viewer.server")
    assert re.search(rf"ExtraMissing: tl-clt view needs {missing}.*: pip install starlette uvicorn", view(file))


def test_ctrl_c_is_one_line(file, tmp_path):
    notes = str(tmp_path / "notes.json")
    command = [sys.executable, "-m", "tl_clt.cli", "view", file, "--no-browser", "--annotations", notes]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment(), **pipes) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        where = re.fullmatch(r"The page is at http://127\.0\.0\.1:(\d+)/\?token=([\w-]+)\n", line)
        assert where, (line, process.communicate(timeout=60))
        # communicate() reads from the pipe itself and would lose what readline() has read ahead.
        assert process.stdout.readline() == "Ctrl-C ends it.\n"
        connection = HTTPConnection("127.0.0.1", int(where[1]), timeout=60)
        connection.request("GET", f"/?token={where[2]}")
        assert connection.getresponse().status == 200
        process.send_signal(signal.SIGINT)
        said, stderr = process.communicate(timeout=600)
    assert check_end(process.returncode, stderr) == "Interrupted. Nothing was annotated."
    assert said == "" and not (tmp_path / "notes.json").exists()
