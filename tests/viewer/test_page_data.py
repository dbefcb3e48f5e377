"""The page's data and file: what is in them, and that no text in them can become anything else."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace

import pytest
import torch

from tests.viewer.browser import PLACE
from tests.viewer.page_cases import EVIL, Records, large_graph
from tl_clt import report
from tl_clt.errors import CLTMismatch, ConfigError, NotWritten
from tl_clt.viewer import page_data, page_html, save_html
from tl_clt.viewer.html import page_script, page_style


@pytest.fixture(scope="module")
def graph():
    return large_graph(60, 900, n_layers=3, n_pos=6)


def test_data_has_all_of_a_graph_and_is_json(graph):
    data = json.loads(json.dumps(page_data(graph, Records(), title="A title"), allow_nan=False))
    [entry] = data["graphs"]
    tables = graph.to_pandas()
    assert data["title"] == "A title" and entry["tokens"] == graph.prompt_tokens
    for column in ("kind", "layer", "pos", "index", "label"):
        assert entry["nodes"][column] == tables.nodes[column].tolist()
    assert entry["nodes"]["influence"] == pytest.approx(tables.nodes["influence"].tolist(), rel=1e-6)
    for column in ("target", "source"):
        assert entry["edges"][column] == tables.edges[column].tolist()
    assert entry["edges"]["weight"] == pytest.approx(tables.edges["weight"].tolist(), rel=1e-6)
    assert entry["scores"]["replacement"] == graph.scores().replacement
    features = {(n.layer, n.index) for n in graph.nodes if n.kind.name == "FEATURE"}
    assert set(data["features"]) == {f"{layer}/{index}" for layer, index in features}


def test_a_reduced_graph_tells_what_it_lacks(graph):
    pruned = graph.prune(0.6, 0.8)
    [entry] = page_data(pruned)["graphs"]
    assert entry["pruned"] and entry["unexplored"] == pruned.unexplored > 0
    assert entry["nodes"]["dropped"] == pytest.approx(pruned.dropped.tolist(), rel=1e-6)


def test_the_most_influential_features_are_put_in_where_not_all_are(graph):
    data = page_data(graph, Records(), max_features=3)
    strongest = [f"{ranked.node.layer}/{ranked.node.index}" for ranked in graph.top(3, "feature")]
    assert list(data["features"]) == strongest
    assert data["features_left_out"] == 57 and data["features_in_source"] is None


def test_features_that_nothing_is_known_of_are_told_and_so_are_those_of_no_node(graph):
    class Sized(Records):
        def __len__(self) -> int:
            return 5000

    data = page_data(graph, Sized(range(2)))
    unknown = {f"{n.layer}/{n.index}" for n in graph.nodes if n.kind.name == "FEATURE" and n.layer >= 2}
    assert unknown and {name for name, record in data["features"].items() if record is None} == unknown
    assert len(data["features"]) == 60 and data["features_left_out"] == 0 and data["features_in_source"] == 5000


def test_the_page_has_the_colours_of_signs_that_figures_have():
    light, *dark = re.findall(
        r"--positive: *(\S+?);.*?--negative: *(\S+?)[;}]", (PLACE / "src/style.css").read_text(), re.S
    )
    assert light == (report.POSITIVE, report.NEGATIVE)
    # By the system's setting, and by hand.
    assert dark == [(report.POSITIVE_ON_DARK, report.NEGATIVE_ON_DARK)] * 2


def test_several_graphs_by_name_or_in_a_list(graph):
    assert [entry["name"] for entry in page_data({"one": graph, "two": graph})["graphs"]] == ["one", "two"]
    assert [entry["name"] for entry in page_data([graph, graph])["graphs"]] == [graph.info["prompt"]] * 2


def test_numbers_that_json_does_not_have_become_null(graph):
    class Unsure(Records):
        def get(self, layer, feature):
            record = super().get(layer, feature).to_dict() | {"label_score": float("nan"), "density": float("inf")}
            return type("Record", (), {"to_dict": lambda self: record})()

    record = next(iter(page_data(graph, Unsure())["features"].values()))
    assert record["label_score"] is None and record["density"] is None


def test_no_text_ends_the_script(graph):
    evil = replace(graph, prompt_tokens=[EVIL] * 6, logit_tokens=[EVIL] * 5, info={**graph.info, "prompt": EVIL})
    text = page_html(page_data(evil, Records(), title=f"<b>{EVIL}"))
    assert text.count("</script>") == 2 and text.count("<script") == 2 and "<!--" not in text
    assert "<img" not in text and "<title>&lt;b&gt;&lt;/script&gt;" in text
    [embedded] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert json.loads(embedded)["graphs"][0]["tokens"] == [EVIL] * 6


def test_the_policy_allows_this_script_and_this_style_alone(graph):
    text = page_html(page_data(graph))
    [policy] = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "http" not in policy
    for tag, rule in (("script", "script-src"), ("style", "style-src")):
        [content] = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.S)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{rule} 'sha256-{digest}';" in policy
    assert not re.findall(r"\son[a-z]+=|\sstyle=|javascript:", text.split("<script", 1)[0])


def test_what_ships_names_no_other_place():
    shipped = page_script() + page_style()
    hosts = set(re.findall(r"https?://([\w.-]+)", shipped))
    assert hosts <= {"www.w3.org"}  # names of XML, which nothing fetches
    assert "</script" not in shipped and "<!--" not in shipped and "@import" not in shipped
    lock = (PLACE / "package-lock.json").read_text(encoding="utf-8")
    assert set(re.findall(r'"resolved": "https?://([^/"]+)', lock)) <= {"registry.npmjs.org"}


def test_no_source_of_the_page_makes_elements_of_text():
    for path in (PLACE / "src").iterdir():
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", path.read_text("utf-8")
        ), path


@pytest.mark.parametrize(
    ("graphs", "options", "words"),
    [
        ("graph", {}, "give an AttributionGraph"),
        ([], {}, "at least one"),
        ([1], {}, "give an AttributionGraph"),
        (None, {"features": 7}, "get(layer, feature)"),
        (None, {"features": {(0, 0): "x"}}, "to_dict()"),
        (None, {"title": 7}, "give a text"),
        (None, {"max_features": -1}, "max_features"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(as_users_run_it, graph, tmp_path, graphs, options, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        save_html(tmp_path / "page.html", graph if graphs is None else graphs, **options)
    assert list(tmp_path.iterdir()) == []


def test_infinite_weights_are_refused(graph):
    activation = graph.nodes.activation.clone()
    activation[0] = torch.inf
    with pytest.raises(ConfigError, match="infinite"):
        page_data(replace(graph, nodes=replace(graph.nodes, activation=activation)))


def test_half_a_character_is_written_as_a_question_mark(graph, tmp_path):
    half = replace(graph, prompt_tokens=["\ud83d"] * 6)
    path = half.save_html(tmp_path / "page.html", title="half \ud83d")
    assert "<title>half ?</title>" in path.read_text(encoding="utf-8")


def test_a_folder_is_no_file(graph, tmp_path):
    with pytest.raises(NotWritten, match="is a folder"):
        graph.save_html(tmp_path)
    assert (
        graph.save_html(str(tmp_path / "new" / "page.html")).read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    )


def test_graphs_and_features_of_several_clts_are_refused(graph, tmp_path):
    """A number names another feature in each."""
    mine, other, unknown = (replace(graph, info={**graph.info, **of}) for of in (OWN, OTHER, {}))
    records = Records()
    with pytest.raises(CLTMismatch, match="traced with several CLTs"):
        save_html(tmp_path / "page.html", [mine, other])
    page_data([mine, unknown])
    for of in (OTHER, {"n_layers": 7}, {"d_transcoder": 7}):
        for name, value in of.items():
            setattr(records, name, value)
        with pytest.raises(CLTMismatch, match="features are those of another CLT"):
            save_html(tmp_path / "page.html", replace(mine, info={**mine.info, **{n: 3 for n in of}}), records)
        for name in of:
            delattr(records, name)
    assert not (tmp_path / "page.html").exists()


OWN, OTHER = {"clt_fingerprint": "a" * 64}, {"clt_fingerprint": "b" * 64}
