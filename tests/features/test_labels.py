"""Labels by rule, by a function and by a language model, and what their scores tell."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.features import cases
from tests.features.cases import Case, collect
from tests.training.distributed.processes import Processes
from tl_clt import FeatureStore, label_features, load_features, load_organism
from tl_clt.errors import ConfigError, DatasetError, FeatureNotFound, FormatError, LabellerError
from tl_clt.features import EndpointLabeller, RuleLabeller
from tl_clt.features import labels as module
from tl_clt.features.collect import require_text_for_labels
from tl_clt.features.contexts import Contexts, Firing, as_activations, read_contexts
from tl_clt.features.rules import label_here
from tl_clt.features.store import FeatureRecord, Histogram, TokenValue
from tl_clt.organisms import known_variables
from tl_clt.organisms.atlas.text import PLAIN_WORDS
from tl_clt.organisms.atlas.variables import VARIABLES, state_in_mind


@pytest.fixture(scope="module")
def case() -> Case:
    return cases.make_long_case()


@pytest.fixture
def store(case: Case, tmp_path: Path) -> FeatureStore:
    return collect(case, tmp_path / "s", label_tokens=600)


def record(**values) -> FeatureRecord:
    known = {"layer": 0, "feature": 0, "density": 0.1, "n_active": 1, "max_activation": 1.0, "decoder_norm": 1.0}
    empty = {"histogram": Histogram([], []), "top_logits": [], "bottom_logits": [], "examples": [], "connected": []}
    return FeatureRecord(**{**known, **empty, **values})


def contexts_of(sentences: list[str]) -> Contexts:
    """All words but the first of each."""
    strings = [["<bos>", *sentence.split()] for sentence in sentences]
    where = [(p, i) for p, words in enumerate(strings) for i in range(1, len(words))]
    prompts = [torch.zeros(len(words), dtype=torch.long) for words in strings]
    return Contexts(prompts, strings, *(np.array(column) for column in zip(*where, strict=True)))


def firing_where(contexts: Contexts, activation) -> Firing:
    values = [activation(contexts.strings[p], i) for p, i in zip(contexts.prompt, contexts.position, strict=True)]
    active = [(c, v) for c, v in enumerate(values) if v > 0]
    return Firing(np.array([c for c, _ in active]), np.array([float(v) for _, v in active]))


CITIES = ("Dallas", "Waco", "Oakland", "Fresno", "Seattle", "Tacoma", "Chicago", "Boise")
SENTENCES = [
    f"{prefix}the {relation} of the state containing {city} is {answer} ."
    for prefix in ("", "Fact : ")
    for city in CITIES
    for relation, answer in (("capital", "Austin"), ("region", "South"), ("abbreviation", "TX"))
]


@pytest.mark.parametrize(
    ("activation", "label"),
    [
        (lambda words, i: words[i] == "Dallas", '"Dallas"'),
        (lambda words, i: 3 * (words[i] == "Waco") + (words[i] == "Fact"), '"Waco" or "Fact"'),
        (lambda words, i: words[i - 1 : i + 1] == ["Dallas", "is"], '"Dallas is"'),
        (lambda words, i: words[i : i + 2] == ["is", "Austin"], "say Austin"),
        (lambda words, i: words[i : i + 2] == ["is", "South"], 'before "South"'),
        (lambda words, i: state_in_mind(words)[i] == "Texas", "Texas"),
    ],
)
def test_a_rule_finds_what_a_feature_is_active_at(activation, label: str):
    contexts = contexts_of(SENTENCES)
    firing = firing_where(contexts, activation)
    variables = [v for v in VARIABLES if v.name == "the state the sentence is about"] if label == "Texas" else []
    labeller = RuleLabeller(variables)
    found = labeller.label(record(top_logits=[TokenValue("Austin", 1.0)]), firing, contexts)
    assert found is not None and found.text == label
    fits = labeller.fits(label, contexts, np.arange(len(contexts)))
    active = np.isin(np.arange(len(contexts)), firing.contexts)
    assert fits[active].all()
    assert not fits[~active].any()
    assert sum(part.share for part in found.parts) == pytest.approx(1)


def test_what_a_feature_is_most_active_at_comes_first_and_is_what_is_meant_there():
    contexts = contexts_of(SENTENCES)

    def activation(words, i):
        return 2.0 * (words[i] == "Fact") + 5.0 * (state_in_mind(words)[i] == "Texas")

    found = RuleLabeller(VARIABLES[:1]).label(record(), firing_where(contexts, activation), contexts)
    assert found is not None and found.text == 'Texas; "Fact"'
    of_feature = record(label=found.text, label_parts=found.parts)
    words = ["<bos>", "Fact", ":", "the", "capital", "of", "the", "state", "containing", "Dallas", "is"]
    assert label_here(of_feature, words, len(words) - 1, VARIABLES) == "Texas"
    assert label_here(of_feature, words, 1, VARIABLES) == '"Fact"'
    assert label_here(of_feature, words, 4, VARIABLES) == found.text


def test_no_rule_is_given_where_there_is_too_little_or_nothing_to_tell():
    contexts = contexts_of(SENTENCES)
    two = Firing(np.array([3, 9]), np.ones(2))
    assert RuleLabeller().label(record(), two, contexts) is None
    rng = np.random.default_rng(0)
    anywhere = np.sort(rng.choice(len(contexts), len(contexts) // 2, replace=False))
    assert RuleLabeller().label(record(), Firing(anywhere, np.ones(len(anywhere))), contexts) is None


def test_what_is_known_of_atlas_at_each_word():
    words = [
        "<bos>",
        "Fact",
        ":",
        "the",
        "capital",
        "of",
        "the",
        "state",
        "containing",
        "Dallas",
        "is",
        "Austin",
        ".",
        "Boise",
        "is",
        "a",
        "city",
        "in",
        "Idaho",
    ]
    known = {variable.name: variable.values(words) for variable in VARIABLES}
    assert known["the state the sentence is about"][9:16] == [
        "Texas",
        "Texas",
        "Texas",
        None,
        "Idaho",
        "Idaho",
        "Idaho",
    ]
    assert known["the relation asked for"][3:14] == [None, *["capital"] * 8, None, None]
    assert known["the kind of the next word"][8] == "city" and known["the kind of the next word"][10] == "capital"
    assert known["the state that the answer belongs to"][10] == "Texas"
    assert known["the region the sentence is about"][9] == "South"
    assert all(len(values) == len(words) for values in known.values())
    assert known_variables("gpt2") == () and known_variables("atlas") == VARIABLES
    assert not set(PLAIN_WORDS) & {v for values in known.values() for v in values if v} - {"capital", "state", "city"}


# -- scores


def test_a_score_is_balanced_accuracy_on_contexts_drawn_by_activation():
    contexts = contexts_of(SENTENCES)
    firing = firing_where(contexts, lambda words, i: words[i] == "is")
    of_is = (np.ones(len(firing.contexts)), firing.contexts, np.zeros(len(firing.contexts), dtype=int))
    others = np.setdiff1d(np.arange(len(contexts)), firing.contexts)
    shared = (np.ones(len(contexts)), np.arange(len(contexts)), np.ones(len(contexts), dtype=int))
    activations = as_activations(contexts, [tuple(np.concatenate(p) for p in zip(of_is, shared, strict=True))], 2)
    assert activations.firing(0, 0).contexts.tolist() == firing.contexts.tolist()
    labeller = module.PlainLabeller(lambda record: "is")
    rng = np.random.default_rng(0)
    score = module._score(labeller, "is", firing, activations, 0, rng)
    # Read literally, the label takes in what stands before "is" or within three words behind it as well.
    near = np.array(labeller.fits("is", contexts, others))
    assert score.random == pytest.approx((1 + 1 - near.mean()) / 2, abs=0.1)
    assert module._score(labeller, "nonsense", firing, activations, 0, rng) == (0.5, 0.5)


def test_nearest_contexts_share_features():
    contexts = contexts_of(["a b c d e f"])
    rows, columns = np.array([0, 1, 1, 2, 3]), np.array([0, 0, 1, 1, 2])
    activations = as_activations(contexts, [(np.array([1.0, 3.0, 1.0, 2.0, 1.0]), rows, columns)], 3)
    found = activations.nearest(0, np.array([0]), np.array([1, 2, 3, 4]), 4)
    assert found.tolist() == [1]  # the only other one with feature 0
    assert activations.nearest(0, np.array([1]), np.array([0, 2, 3]), 4).tolist() == [0, 2]


def test_a_feature_that_is_always_active_is_looked_at_where_it_is_most():
    contexts = contexts_of(["a b c d"])
    activations = as_activations(contexts, [(np.array([1.0, 4.0, 2.0, 3.0]), np.arange(4), np.zeros(4, dtype=int))], 1)
    assert activations.firing(0, 0).contexts.tolist() == [1, 3]


def test_activations_read_for_labels_are_the_features_own(case: Case, store: FeatureStore):
    contexts = Contexts.of(case.model, store.held_out("scoring"))
    directions = torch.randn(3, 32, 2, generator=torch.Generator().manual_seed(0))
    reading = read_contexts(case.model, case.clt, contexts, directions)
    from tl_clt.replacement import feature_acts, layer_inputs

    for prompt in (0, 7):
        tokens = contexts.prompts[prompt]
        own = np.nonzero(contexts.prompt == prompt)[0]
        acts = feature_acts(case.model, case.clt, tokens)[1:]
        x = layer_inputs(case.model, case.clt, tokens[None])[0, 1:]
        for layer in range(3):
            np.testing.assert_allclose(
                reading.features.by_feature[layer][own].toarray(), acts[:, layer], rtol=1e-4, atol=1e-5
            )
            np.testing.assert_allclose(
                reading.projections[layer][own], x[:, layer] @ directions[layer], rtol=1e-4, atol=1e-5
            )


def test_random_weights_score_no_better_than_the_random_dictionary(case: Case, store: FeatureStore):
    """Of a random CLT of a random model, labels tell nothing that those of random directions do not."""
    label_features(case.model, case.clt, store, progress=False)
    layers = store.label_summary()["layers"]
    own = np.mean([layer["score"] for layer in layers])
    random = np.mean([layer["score_random"] for layer in layers])
    # 12 features and 64 directions a layer, 50 contexts each: the means have standard errors of about 0.02.
    assert abs(own - random) < 0.08
    assert all(layer["n_labels"] > 5 and layer["n_random"] > 30 for layer in layers)


def test_labels_of_other_features_stay_where_some_are_named(case: Case, store: FeatureStore):
    label_features(case.model, case.clt, store, progress=False)
    before = store.labels().set_index(["layer", "feature"])["label"].to_dict()
    place = next(iter(before))

    def other(record: FeatureRecord) -> str:
        return "another label"

    label_features(case.model, case.clt, store, other, features=[place], progress=False)
    table = store.labels().set_index(["layer", "feature"])
    assert table["label"].to_dict() == {**before, place: "another label"} and len(before) > 1
    about = store.label_summary()
    assert about["labeller"] == "rules and other" and about["features"] is None
    for layer in about["layers"]:
        scores = table.loc[layer["layer"]]["score"].dropna()
        assert layer["n_labels"] == len(table.loc[layer["layer"]]) and layer["score"] == pytest.approx(scores.mean())
    label_features(case.model, case.clt, store, other, progress=False)
    assert set(store.labels()["label"]) == {"another label"} and store.label_summary()["labeller"] == "other"


def test_labels_of_atlas_are_worth_more_than_those_of_random_directions():
    """In every layer where they are told from the nearest other contexts. Told from random ones, which are easy, they
    are so in the mean; labels of random directions do as well in the last layer, as the card says."""
    layers = load_features("atlas").label_summary()["layers"]
    nearest, random = (
        [layer[kind] - layer[kind.replace("score", "score_random")] for layer in layers]
        for kind in ("score_nearest", "score")
    )
    assert min(nearest) > 0.05 and np.mean(random) > 0.02


def test_shuffled_activations_leave_a_label_at_chance():
    """A rule found where a feature is active at random scores 0.5 on other text, however well it fitted its own."""
    contexts, other = contexts_of(SENTENCES), contexts_of(SENTENCES[::-1])
    rng = np.random.default_rng(1)
    scores = []
    for _ in range(20):
        firing = Firing(np.sort(rng.choice(len(contexts), 6, replace=False)), np.ones(6))
        labeller = RuleLabeller()
        found = labeller.label(record(), firing, contexts)
        if found is not None:
            where = np.sort(rng.choice(len(other), 60, replace=False))
            activations = as_activations(other, [(np.ones(60), where, np.zeros(60, dtype=int))], 1)
            score = module._score(labeller, found.text, Firing(where, np.ones(60)), activations, 0, rng).random
            assert score is not None
            scores.append(score)
    assert len(scores) > 10 and abs(np.mean(scores) - 0.5) < 0.05


# -- labellers


def test_a_function_labels_and_is_read_literally(case: Case, store: FeatureStore):
    given = []

    def top_token(record: FeatureRecord) -> str | None:
        given.append((record.layer, record.feature))
        return record.examples[0].tokens[record.examples[0].position] if record.examples else None

    label_features(case.model, case.clt, store, top_token, features=[(1, 2), (0, 3), (1, 2)], progress=False)
    assert set(store.labels()[["layer", "feature"]].itertuples(index=False, name=None)) == {(0, 3), (1, 2)}
    assert store.label_summary()["labeller"] == "top_token"
    found = store[1, 2]
    assert found.label is not None and found.label_score is not None and found.label_score_random is not None


def test_the_same_call_gives_the_same_labels(case: Case, store: FeatureStore):
    label_features(case.model, case.clt, store, progress=False)
    first = (store.folder / "labels.safetensors").read_bytes()
    label_features(case.model, case.clt, store, progress=False)
    assert (store.folder / "labels.safetensors").read_bytes() == first


def test_which_others_are_labelled_changes_no_label(case: Case, store: FeatureStore):
    label_features(case.model, case.clt, store, progress=False)
    all_of_them = {(layer, feature): store[layer, feature] for layer, feature in cases.PLACES}
    n_labels = len(store.labels())
    label_features(case.model, case.clt, store, features=cases.PLACES[::-1], progress=False)
    assert {place: store[place] for place in cases.PLACES} == all_of_them
    assert len(store.labels()) == n_labels
    assert store.label_summary()["features"] is None


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    started = Processes(2, tmp_path_factory.mktemp("meeting-points"))
    yield started
    started.close()


def test_two_processes_give_the_labels_of_one(processes: Processes, case: Case, store: FeatureStore, tmp_path: Path):
    shutil.copytree(store.folder, tmp_path / "two")
    label_features(case.model, case.clt, store, features=cases.PLACES, progress=False)
    processes.run(2, cases.label_on_rank, str(tmp_path / "two"))
    cases.same_files(tmp_path / "two", store.folder)


def test_what_cannot_be_labelled_is_told(case: Case, store: FeatureStore, tmp_path: Path):
    with pytest.raises(FeatureNotFound, match="feature is 12"):
        label_features(case.model, case.clt, store, features=[(0, 12)], progress=False)
    with pytest.raises(LabellerError, match="gave 3, of type int"):
        label_features(case.model, case.clt, store, lambda record: 3, progress=False)  # type: ignore
    assert not store.is_labelled
    bare = collect(case, tmp_path / "bare", label_tokens=0)
    with pytest.raises(DatasetError, match="label_tokens=0"):
        label_features(case.model, case.clt, bare, progress=False)
    with pytest.raises(Exception, match="another CLT"):
        label_features(*load_organism("atlas"), store, progress=False)


def test_a_text_too_short_for_labels_is_told_before_it_is_read_through(case: Case):
    prompts = [torch.arange(1, 6)] * 4
    require_text_for_labels(case.model, prompts, None, None, 1)
    few, cut, none = (3, None, 9, "it has 3 prompts"), (4, 8, 9, "it has 2 prompts"), (4, None, 0, "label_tokens is 0")
    for n, most, label_tokens, why in (few, cut, none):
        with pytest.raises(DatasetError, match=f"none to choose and score labels on: {why}.*`--labels none`"):
            require_text_for_labels(case.model, prompts[:n], most, None, label_tokens)


# -- a language model


class Server:
    """A fake endpoint: answers by a function of the request, and keeps the requests."""

    def __init__(self) -> None:
        self.requests: list[dict] = []
        self.headers: list[dict] = []
        self.answer = lambda request: {"choices": [{"message": {"content": "a label"}}]}
        self.statuses: list[int] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append({"path": self.path, **request})
                outer.headers.append(dict(self.headers))
                status = outer.statuses.pop(0) if outer.statuses else 200
                answer = outer.answer(request)
                body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
                self.send_response(status)
                if 300 <= status < 400:
                    self.send_header("Location", "http://127.0.0.1:9/elsewhere")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                """Nothing on the screen of tests."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.server.shutdown()
    made.server.server_close()


def said(text: str) -> dict:
    return {"choices": [{"message": {"content": text}}]}


def test_an_endpoint_labels_and_scores(case: Case, store: FeatureStore, server: Server, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")

    def answer(request: dict) -> dict:
        asked = request["messages"][1]["content"]
        return said("1, 3" if asked.startswith("Label: ") else ' "<b>A\nlabel\x07</b> ' + "long " * 40 + '"')

    server.answer = answer
    labeller = EndpointLabeller(server.url, "some-model", key_from="MY_KEY")
    labeller.n_random = 1
    label_features(case.model, case.clt, store, labeller, features=[(1, 2)], progress=False)
    found = store[1, 2]
    assert found.label is not None and found.label.startswith("<b>A label </b> long") and len(found.label) <= 80
    assert "&lt;b&gt;A label" in found._repr_html_()
    assert found.label_score is not None and found.label_score_random is not None
    assert {request["path"] for request in server.requests} == {"/v1/chat/completions"}
    assert {request["model"] for request in server.requests} == {"some-model"}
    assert all(headers["Authorization"] == "Bearer secret" for headers in server.headers)
    of_contexts = [r["messages"][1]["content"] for r in server.requests if "<<#" in r["messages"][1]["content"]]
    assert of_contexts and "secret" not in repr(labeller) + json.dumps(store.label_summary())


def content_of(request: dict) -> str:
    return request["messages"][1]["content"]


def test_an_endpoint_that_fails_midway_loses_nothing(case: Case, store: FeatureStore, server: Server, tmp_path: Path):
    server.answer = lambda request: said("1, 3" if content_of(request).startswith("Label: ") else content_of(request))
    shutil.copytree(store.folder, tmp_path / "at-once")
    cases.label_on_rank(str(tmp_path / "at-once"), server.url)
    asked = [content_of(request) for request in server.requests]
    assert len(asked) == len(set(asked)) > 20

    server.requests.clear()
    server.statuses = [*[200] * 11, 500]
    with pytest.raises(LabellerError, match=r"status 500 .*kept in .*answers': the same call again .*--resume"):
        cases.label_on_rank(str(store.folder), server.url)
    assert not store.is_labelled and len(server.requests) == 12
    # A process that is stopped may leave a line without an end, which is asked for again.
    (file,) = (store.folder / "answers").iterdir()
    whole = file.read_text()
    file.write_text(whole[:-7])
    cases.label_on_rank(str(store.folder), server.url)
    assert [content_of(request) for request in server.requests[12:]] == asked[10:]
    for name in ("labels.safetensors", "labels.json"):
        assert (store.folder / name).read_bytes() == (tmp_path / "at-once" / name).read_bytes()
    cases.label_on_rank(str(store.folder), server.url)
    assert len(server.requests) == 12 + len(asked) - 10  # nothing more
    kept = "".join(path.read_text() for path in (store.folder / "answers").iterdir())
    assert "Label: " not in kept and "127.0.0.1" not in kept

    (store.folder / "answers" / "x.jsonl").write_text("{}\n")
    with pytest.raises(FormatError, match=r"x\.jsonl.*Remove it: what it holds is asked for again"):
        cases.label_on_rank(str(store.folder), server.url)


def test_an_answer_without_meaning_is_asked_for_again(server: Server, tmp_path: Path):
    contexts, answers = contexts_of(["a b c"]), [said("Sure!"), said("2")]
    server.answer = lambda request: answers.pop(0)
    for _ in range(2):
        labeller = EndpointLabeller(server.url, "m", key_from=None)
        labeller.keep_in(tmp_path / "answers")
        if len(answers) == 2:
            with pytest.raises(LabellerError, match="neither numbers nor"):
                labeller.fits("label", contexts, np.array([0, 1]))
        else:
            assert labeller.fits("label", contexts, np.array([0, 1])) == [False, True]


def test_processes_share_an_endpoint(processes: Processes, store: FeatureStore, server: Server, tmp_path: Path):
    server.answer = lambda request: said("1, 3" if content_of(request).startswith("Label: ") else content_of(request))
    shutil.copytree(store.folder, tmp_path / "one")
    cases.label_on_rank(str(tmp_path / "one"), server.url)
    n_asked = len(server.requests)
    server.requests.clear()
    server.statuses = [*[200] * 8, 500]
    with pytest.raises(AssertionError, match="LabellerError"):
        processes.run(2, cases.label_on_rank, str(store.folder), server.url)
    processes.run(2, cases.label_on_rank, str(store.folder), server.url)
    assert len(server.requests) == n_asked + 1  # the one that failed
    for name in ("labels.safetensors", "labels.json"):
        assert (store.folder / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_a_busy_endpoint_is_asked_again(server: Server, monkeypatch):
    monkeypatch.setattr("tl_clt.features.endpoint.time.sleep", lambda seconds: None)
    server.statuses = [429, 503]
    labeller = EndpointLabeller(server.url, "m", key_from=None)
    assert labeller._ask("task", "content", str) == "a label" and len(server.requests) == 3
    assert "Authorization" not in server.headers[0]


@pytest.mark.parametrize(
    ("status", "answer", "message"),
    [
        (401, b"no key", "status 401 (no key). Put a valid key into the environment variable MY_KEY"),
        (404, b"", "does it have a model 'm'"),
        (302, b"", "give the address it points to as base_url"),
        (400, b"bad", "Does it take chat completions"),
        (200, b"<html>", "something else than a chat completion"),
        (200, b'{"choices": []}', "something else than a chat completion"),
        (200, b'{"choices": [{"message": {"content": 3}}]}', "content of type int"),
        (200, b"[" * 2**20 + b"[", "more than 1048576 bytes"),
        (200, b"[" * 100_000, "RecursionError"),
    ],
)
def test_what_an_endpoint_does_wrong_is_told_with_the_mend(server: Server, status: int, answer: bytes, message: str):
    server.statuses, server.answer = [status], lambda request: answer
    with pytest.raises(LabellerError) as error:
        EndpointLabeller(server.url, "m", key_from="MY_KEY", retries=0)._ask("task", "content", str)
    assert message in str(error.value)


def test_silence_and_nonsense_are_told(server: Server):
    with pytest.raises(LabellerError, match=r"cannot be reached \(.*refused\)\. Is it running"):
        EndpointLabeller("http://127.0.0.1:9/v1", "m", timeout=0.2)._ask("task", "content", str)
    hang = threading.Event()
    server.answer = lambda request: said(str(hang.wait(2)))
    with pytest.raises(LabellerError, match=r"no answer within 0\.1 s"):
        EndpointLabeller(server.url, "m", timeout=0.1)._ask("task", "content", str)
    hang.set()
    server.answer = lambda request: said("Sure! I would be happy to help.")
    contexts = contexts_of(["a b c"])
    with pytest.raises(LabellerError, match="neither numbers nor"):
        EndpointLabeller(server.url, "m").fits("label", contexts, np.array([0, 1]))
    server.answer = lambda request: said("none")
    assert EndpointLabeller(server.url, "m").fits("label", contexts, np.array([0, 1])) == [False, False]


@pytest.mark.parametrize("url", ["localhost:8000", "file:///etc/passwd", "", "ftp://host/v1", "http://"])
def test_what_is_no_address_is_refused(url: str):
    with pytest.raises(ConfigError, match="OpenAI-compatible"):
        EndpointLabeller(url, "m")
    with pytest.raises(ConfigError, match="model is ''"):
        EndpointLabeller("http://localhost/v1", "")
