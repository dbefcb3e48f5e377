"""Graphs in Neuronpedia's and circuit-tracer's layout: what is written, that it is read as an equal graph, and what
is refused."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import torch

from tests.models import random_tokens, tiny_clt, tiny_hooked
from tests.mutations import a_graph, as_others_write_it
from tl_clt import (
    AttributionGraph,
    NodeKind,
    attribute,
    load_circuit_tracer,
    load_features,
    load_neuronpedia,
    load_organism,
    save_circuit_tracer,
    save_neuronpedia,
)
from tl_clt.attribution.targets import DifferenceTarget, DirectionTarget, FeatureTarget, TokenTarget
from tl_clt.errors import CLTMismatch, ConfigError, FormatError, NodeNotFound, NotFinite, NotWritten
from tl_clt.viewer.formats.graph_json import cantor_pair, cantor_unpair

SCHEMA = json.loads((Path(__file__).parents[1] / "data" / "neuronpedia-graph-schema.json").read_text())


@pytest.fixture(scope="module")
def atlas() -> AttributionGraph:
    model, clt = load_organism("atlas")
    return attribute(model, clt, "the capital of the state containing Dallas is", progress=False)


@pytest.fixture(scope="module")
def one_layer() -> AttributionGraph:
    """Of a model of one layer, with every kind of target, two of which have no id of their own."""
    model = tiny_hooked("gpt2", n_layers=1, dtype=torch.float64)
    targets = [
        TokenTarget(3),
        DifferenceTarget(3, 5),
        DifferenceTarget(5, 3),
        FeatureTarget(0, 1, pos=-1),
        DirectionTarget(torch.ones(model.cfg.d_model, dtype=torch.float64), "blocks.0.hook_resid_post"),
    ]
    clt = tiny_clt(model, dtype=torch.float64)
    return attribute(model, clt, random_tokens(model, pos=5)[0], targets, progress=False)


GRAPHS: dict[str, Callable[[pytest.FixtureRequest], AttributionGraph]] = {
    "atlas": lambda request: request.getfixturevalue("atlas"),
    "pruned": lambda request: request.getfixturevalue("atlas").prune(),
    "one layer": lambda request: request.getfixturevalue("one_layer"),
    "dense": lambda _: a_graph(sparse=False),
    "sparse": lambda _: a_graph(sparse=True),
    "few rows": lambda _: a_graph(sparse=False, few=True),
}


@pytest.fixture(params=GRAPHS)
def graph(request: pytest.FixtureRequest) -> AttributionGraph:
    return GRAPHS[request.param](request)


def written(graph: AttributionGraph, folder: Path, **options: Any) -> dict[str, Any]:
    return json.loads(save_neuronpedia(graph, folder / "graph.json", **{"scan": "m", **options}).read_text())


def put(folder: Path, values: Any) -> Path:
    path = folder / "graph.json"
    path.write_text(json.dumps(values))
    return path


@pytest.mark.parametrize("load", [load_neuronpedia, load_circuit_tracer])
def test_what_is_no_graph_is_told_of_both_programs(tmp_path, load):
    (tmp_path / "graph.json").write_text("[")
    with pytest.raises(FormatError, match="no graph of Neuronpedia's or circuit-tracer's"):
        load(tmp_path / "graph.json")


# -- what is written -----------------------------------------------------------------------------------------------


def test_a_graph_is_read_as_it_was_written_and_fits_the_schema(graph, tmp_path):
    values = written(graph, tmp_path)
    jsonschema.Draft7Validator(SCHEMA).validate(values)
    again = load_neuronpedia(tmp_path / "graph.json")
    assert again == graph
    assert again.info == graph.info
    assert [repr(target) for target in again.targets or []] == [repr(target) for target in graph.targets or []]
    assert load_circuit_tracer(save_circuit_tracer(graph, tmp_path / "graphs", slug="g", scan="m")) == graph


def test_ids_are_given_once_and_errors_are_named_apart_from_features(graph, tmp_path):
    values = written(graph, tmp_path)
    ids = [node["node_id"] for node in (*values["nodes"], *values["metadata"]["tl_clt"]["nodes"])]
    assert len(set(ids)) == len(ids) == len(graph.nodes)
    for node in values["nodes"]:
        if node["feature_type"] == "mlp reconstruction error":
            assert node["node_id"] == f"{node['layer']}_-1_{node['ctx_idx']}"
            assert node["feature"] == -1
    features = "cross layer transcoder"  # of one feature, nodes at all positions are lit up together
    js_ids = [node["jsNodeId"] for node in values["nodes"] if node["feature_type"] != features]
    assert len(set(js_ids)) == len(js_ids)
    assert not set(js_ids) & {node["jsNodeId"] for node in values["nodes"] if node["feature_type"] == features}


def test_an_error_of_layer_1_and_feature_1_of_layer_0_at_one_position_have_two_ids(tmp_path):
    graph = a_graph(sparse=False)
    nodes = replace(graph.nodes, index=graph.nodes.index.clone(), pos=graph.nodes.pos.clone())
    nodes.index[0], nodes.pos[0] = 1, 2  # feature 0.1 at 2; node 5 is the error of layer 1 at 2
    graph = replace(graph, nodes=nodes)
    ids = {node["node_id"] for node in written(graph, tmp_path)["nodes"]}
    assert {"0_1_2", "1_-1_2"} <= ids
    assert load_neuronpedia(tmp_path / "graph.json") == graph


def test_what_viewers_trip_over(graph, tmp_path):
    values = written(graph, tmp_path)
    assert type(values["metadata"]["node_threshold"]) is float
    assert values["qParams"]["pinnedIds"] == [] and values["qParams"]["supernodes"] == []
    for node in values["nodes"]:
        if node["feature_type"] == "logit":
            probability = float(node["clerp"].split("(p=")[1].split(")")[0])
            assert probability == pytest.approx(node["token_prob"], abs=5e-4)  # it is written with 3 digits
            assert node["clerp"].count('"') == 2
        if node["feature_type"] == "cross layer transcoder":
            layer, feature = int(node["layer"]), int(node["node_id"].split("_")[1])
            assert node["feature"] == (layer + feature) * (layer + feature + 1) // 2 + feature
    assert sum(node["is_target_logit"] for node in values["nodes"]) == 1


def test_cantor_pairs_are_paired_and_unpaired():
    assert [cantor_pair(*pair) for pair in ((0, 0), (1, 0), (0, 1), (3, 4), (47, 32))] == [0, 1, 2, 32, 3192]
    for number in (*range(200), 2**62 + 7):
        assert cantor_pair(*cantor_unpair(number)) == number


def test_influence_is_the_share_of_all_nodes_up_to_there(atlas, tmp_path):
    values = written(atlas, tmp_path, node_threshold=0.7, edge_threshold=0.9)
    influence = atlas.influence()
    for node in values["nodes"]:
        if node["feature_type"] != "cross layer transcoder":
            continue
        at = int(node["node_id"].split("_")[1]), int(node["layer"]), node["ctx_idx"]
        number = next(n.number for n in atlas.nodes if (n.index, n.layer, n.pos, n.kind) == (*at, NodeKind.FEATURE))
        # Those before it have as much influence or more.
        expected = influence[influence >= influence[number]].sum() / influence.sum()
        # The one that reaches the threshold has no more; influence is in float32.
        assert node["influence"] == pytest.approx(min(float(expected), 0.7), rel=1e-5)
    assert load_neuronpedia(tmp_path / "graph.json") == atlas.prune(0.7, 0.9)
    assert values["metadata"]["pruning_settings"] == {"node_threshold": 0.7, "edge_threshold": 0.9}


@pytest.mark.parametrize("threshold", [None, 0.7])
@pytest.mark.parametrize("pruned_before", [False, True])
def test_the_threshold_is_the_one_pruned_with_and_hides_nothing(atlas, tmp_path, threshold, pruned_before):
    graph = atlas.prune(0.6, 0.9) if pruned_before else atlas
    expected = threshold or (0.6 if pruned_before else 1.0)
    values = written(graph, tmp_path, node_threshold=threshold)
    save_circuit_tracer(graph, tmp_path / "graphs", slug="g", scan="m", node_threshold=threshold)
    (listed,) = json.loads((tmp_path / "graphs" / "graph-metadata.json").read_text())["graphs"]
    assert values["metadata"]["node_threshold"] == listed["node_threshold"] == expected
    shown = [node["influence"] for node in values["nodes"] if node["influence"] is not None]
    assert 0.9 * expected < max(shown) <= expected


def test_features_are_named_by_their_labels_or_by_what_they_promote(atlas, tmp_path):
    store = load_features("atlas")
    graph = atlas.prune()
    place = next((n.layer, n.index) for n in graph.nodes if n.kind == NodeKind.FEATURE)
    values = written(graph, tmp_path, features=store, labels={place: "mine"})
    for node in values["nodes"]:
        if node["feature_type"] != "cross layer transcoder":
            continue
        layer, feature = int(node["layer"]), int(node["node_id"].split("_")[1])
        record = store[layer, feature]
        words = "promotes " + ", ".join(repr(pair.token) for pair in record.top_logits[:3])
        assert node["clerp"] == ("mine" if (layer, feature) == place else record.label or words)
    no_label = replace(store[place], label=None)
    values = written(graph, tmp_path, features=SimpleNamespace(get=lambda *_: no_label))
    assert {n["clerp"] for n in values["nodes"] if n["feature_type"] == "cross layer transcoder"} == {
        "promotes " + ", ".join(repr(pair.token) for pair in no_label.top_logits[:3])
    }
    values = written(graph, tmp_path, features=SimpleNamespace(get=lambda *_: None))
    assert {n["clerp"] for n in values["nodes"] if n["feature_type"] == "cross layer transcoder"} == {""}
    with pytest.raises(CLTMismatch, match="another CLT"):
        written(replace(graph, info={**graph.info, "clt_fingerprint": "x"}), tmp_path, features=store)


def test_position_and_bias_nodes_are_counted_and_kept_apart(atlas, tmp_path):
    values = written(atlas, tmp_path, description="Dallas.")
    kinds = {node["feature_type"] for node in values["nodes"]}
    assert kinds == {"cross layer transcoder", "mlp reconstruction error", "embedding", "logit"}
    n_positions, n_biases = (len(atlas.nodes.where(kind)) for kind in (NodeKind.POSITION, NodeKind.BIAS))
    kept = values["metadata"]["tl_clt"]
    assert kept["not_among_nodes"] == {"position": n_positions, "bias": n_biases}
    assert len(kept["nodes"]) == n_positions + n_biases
    assert len(kept["links"]) + len(values["links"]) == atlas.n_edges
    said = values["metadata"]["info"]["description"]
    assert said.startswith("Dallas. ")
    assert f"{n_positions} position and {n_biases} bias nodes with {len(kept['links'])} links" in said


def test_pins_groups_and_labels_come_back(atlas, tmp_path):
    pruned = atlas.prune()
    feature = pruned.nodes[0]
    options = {"pinned": [feature, -1], "supernodes": {"say Austin": [0, 1]}}
    values = written(pruned, tmp_path, labels={(feature.layer, feature.index): "Texas"}, **options)
    assert values["qParams"]["pinnedIds"] == [values["nodes"][0]["node_id"], values["nodes"][-1]["node_id"]]
    again = load_neuronpedia(tmp_path / "graph.json")
    assert again.info["pinned"] == [0, len(pruned.nodes) - 1]
    assert again.info["supernodes"] == {"say Austin": [0, 1]}
    assert again.info["labels"]["0"] == "Texas"
    weakest = int(atlas.influence()[: len(atlas.nodes.where(NodeKind.FEATURE))].argmin())
    with pytest.raises(ConfigError, match=r"pruning takes it out"):
        written(atlas, tmp_path, node_threshold=0.5, pinned=[weakest])
    with pytest.raises(NodeNotFound):
        written(atlas, tmp_path, pinned=[10_000])


def test_the_folder_of_circuit_tracer_s_server_lists_its_graphs(tmp_path):
    for slug in ("a", "b", "a"):
        save_circuit_tracer(a_graph(sparse=False), tmp_path, slug=slug, scan="m")
    listed = json.loads((tmp_path / "graph-metadata.json").read_text())["graphs"]
    assert [graph["slug"] for graph in listed] == ["b", "a"]
    assert set(listed[0]) == {
        *("slug", "scan", "transcoder_list", "prompt_tokens", "prompt", "node_threshold", "schema_version")
    }
    (tmp_path / "graph-metadata.json").write_text("{")
    with pytest.raises(FormatError, match="list of graphs"):
        save_circuit_tracer(a_graph(sparse=False), tmp_path, slug="c", scan="m")
    assert not (tmp_path / "c.json").exists()


@pytest.mark.parametrize("name", ["", "a b", "ä", "a/b", "a\n", 3, "a:b"])
def test_names_are_of_letters_digits_and_three_marks(name, tmp_path, as_users_run_it):
    for options in ({"slug": name}, {"scan": name}, {"source_set": name}):
        with pytest.raises(ConfigError, match="letters, digits"):
            written(a_graph(sparse=False), tmp_path, **options)
    with pytest.raises(ConfigError, match="letters, digits"):
        save_circuit_tracer(a_graph(sparse=False), tmp_path, slug=name, scan="m")
    assert list(tmp_path.iterdir()) == []


def test_the_model_s_name_is_that_of_the_hub_without_its_owner(tmp_path):
    graph = a_graph(sparse=False)
    with pytest.raises(ConfigError, match="Give scan"):
        save_neuronpedia(graph, tmp_path / "g.json")
    graph.info["model_name"] = "google/gemma-3-270m"
    assert json.loads(save_neuronpedia(graph, tmp_path / "g.json").read_text())["metadata"]["scan"] == "gemma-3-270m"


def test_what_json_has_no_place_for_is_refused_and_what_was_there_stays(tmp_path):
    (tmp_path / "graph.json").write_text("mine")
    graph = a_graph(sparse=False)
    graph.adjacency[11, 0] = float("nan")
    with pytest.raises(NotFinite, match="adjacency"):
        written(graph, tmp_path)
    graph = a_graph(sparse=False)
    with pytest.raises(NotFinite, match="no place"):
        written(replace(graph, info={"loss": float("inf")}), tmp_path)
    with pytest.raises(ConfigError, match="surrogate"):
        written(replace(graph, prompt_tokens=["a", "\ud800", "c"]), tmp_path)
    with pytest.raises(NotWritten):
        save_neuronpedia(graph, tmp_path, scan="m")
    assert (tmp_path / "graph.json").read_text() == "mine"


# -- what others write ---------------------------------------------------------------------------------------------


def test_a_graph_of_another_program_opens_and_says_what_it_does_not_tell(atlas, tmp_path):
    pruned = atlas.prune()
    values = written(pruned, tmp_path)
    path = put(tmp_path, as_others_write_it(values))
    with pytest.warns(UserWarning, match="does not tell what was pruned away"):
        found = load_circuit_tracer(path)
    is_known = ~pruned.nodes.is_kind(NodeKind.POSITION, NodeKind.BIAS)
    for name in ("kind", "layer", "pos", "index"):
        assert torch.equal(getattr(found.nodes, name), getattr(pruned.nodes, name)[is_known]), name
    assert torch.equal(found.adjacency, pruned.adjacency[is_known][:, is_known])
    assert torch.equal(found.tokens, pruned.tokens)
    assert found.logit_tokens == pruned.logit_tokens
    assert torch.allclose(found.logit_probs, pruned.logit_probs)
    assert found.info["n_layers"] == 4 and found.lacks_nodes
    found.save(tmp_path / "found.safetensors")
    assert AttributionGraph.load(tmp_path / "found.safetensors") == found
    assert load_neuronpedia(save_neuronpedia(found, tmp_path / "again.json")) == found


@pytest.mark.filterwarnings("ignore:.*does not tell:UserWarning")
def test_a_file_as_circuit_tracer_writes_it(tmp_path):
    def node(node_id: str, layer: str, pos: int, kind: str, feature: int, **rest: Any) -> dict[str, Any]:
        common = {"run_idx": 0, "reverse_ctx_idx": 0, "jsNodeId": node_id, "clerp": "", "influence": 0.5}
        found = {"node_id": node_id, "layer": layer, "ctx_idx": pos, "feature_type": kind, "feature": feature}
        return {"token_prob": 0.0, "is_target_logit": False, "activation": None, **common, **found, **rest}

    clt, error = "cross layer transcoder", "mlp reconstruction error"
    output = {"token_prob": 0.25, "is_target_logit": True, "clerp": 'Output " 4" (p=0.250)', "influence": None}
    values = {
        "metadata": {
            **{"slug": "count", "scan": "gemma-2-2b", "transcoder_list": [], "schema_version": 1},
            **{"prompt_tokens": ["<bos>", "1"], "prompt": "<bos>1", "node_threshold": 0.5},
        },
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": [
            node("0_18753_1", "0", 1, clt, cantor_pair(0, 18753), activation=5.5),
            node("13_82873_1", "13", 1, clt, cantor_pair(13, 82873), activation=2.5),
            node("25_-1_1", "25", 1, error, -1),
            node("E_2_0", "E", 0, "embedding", 0),
            node("E_235274_1", "E", 1, "embedding", 1),
            node("27_235310_1", "27", 1, "logit", 235310, **output),
        ],
        "links": [
            {"source": "E_2_0", "target": "0_18753_1", "weight": -2.25},
            {"source": "0_18753_1", "target": "13_82873_1", "weight": 1.5},
            {"source": "13_82873_1", "target": "27_235310_1", "weight": 1.25},
            {"source": "25_-1_1", "target": "27_235310_1", "weight": -0.5},
        ],
    }
    jsonschema.Draft7Validator(SCHEMA).validate(values)
    found = load_circuit_tracer(put(tmp_path, values))
    assert [(n.kind.name, n.layer, n.pos, n.index) for n in found.nodes] == [
        ("FEATURE", 0, 1, 18753),
        ("FEATURE", 13, 1, 82873),
        ("ERROR", 25, 1, 0),
        ("TOKEN", -1, 0, 2),
        ("TOKEN", -1, 1, 235274),
        ("LOGIT", 26, 1, 235310),
    ]
    assert found.tokens.tolist() == [2, 235274] and found.logit_tokens == [" 4"]
    assert found.logit_probs.tolist() == [0.25] and found.nodes.activation.tolist() == [5.5, 2.5, 0, 0, 0, 0]
    assert found.adjacency[1, 0] == 1.5 and found.adjacency[5, 2] == -0.5 and found.n_edges == 4
    assert found.info["n_layers"] == 26


@pytest.mark.filterwarnings("ignore:.*does not tell:UserWarning")
def test_older_files_give_features_their_own_numbers_and_probabilities_in_words_alone(tmp_path):
    values = as_others_write_it(written(a_graph(sparse=False), tmp_path))
    for node in values["nodes"]:
        del node["token_prob"]
        if node["feature_type"] == "cross layer transcoder":
            node["feature"] = 100 + cantor_unpair(node["feature"])[1]
            node["layer"] = int(node["layer"])
        node["node_id"] = f"node-{node['node_id']}"  # ids mean nothing
    for link in values["links"]:
        link["source"], link["target"] = f"node-{link['source']}", f"node-{link['target']}"
    random.Random(0).shuffle(values["nodes"])
    found = load_neuronpedia(put(tmp_path, values))
    features = found.nodes.where(NodeKind.FEATURE)
    assert sorted(found.nodes.index[features].tolist()) == [102, 102, 103, 105]
    assert sorted(found.logit_probs.tolist()) == pytest.approx([0.3, 0.6])
    assert sorted(found.nodes.kind.tolist()) == found.nodes.kind.tolist()


@pytest.mark.filterwarnings("ignore:.*does not tell:UserWarning")
def test_a_feature_without_links_into_it_counts_as_not_traced(tmp_path):
    values = as_others_write_it(written(a_graph(sparse=False), tmp_path))
    values["links"] = [link for link in values["links"] if link["target"] != "1_2_1"]
    found = load_neuronpedia(put(tmp_path, values))
    at = next(node.number for node in found.nodes if (node.layer, node.index, node.pos) == (1, 2, 1))
    assert found.untraced.tolist() == [number == at for number in range(len(found.nodes))]
    assert found.unexplored > 0


# -- what is refused -----------------------------------------------------------------------------------------------


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Set what stands at a place such as `nodes.0.layer`."""

    def of(values: Any) -> None:
        *parts, last = (int(part) if part.isdigit() else part for part in path.split("."))
        for part in parts:
            values = values[part]
        values[last] = value

    return of


WRONG = {
    "layer -1": (change("nodes.0.layer", "-1"), "layers count from 0"),
    "layer of another feature": (change("nodes.0.layer", "1"), "contradicts itself"),
    "a layer beyond all": (change("nodes.0.layer", "99999"), "layers count from 0"),
    "a number as text": (change("nodes.0.ctx_idx", "1"), "nodes[0].ctx_idx"),
    "a position beyond the prompt": (change("nodes.0.ctx_idx", 3), "leaves the 3 tokens"),
    "an id twice": (change("nodes.1.node_id", "0_3_1"), "two nodes have the id"),
    "a link to nowhere": (change("links.0.source", "9_9_9"), "no node of the file"),
    "a link downwards": (change("links.0.source", "3_4_2"), "does not run upwards"),
    "text for a weight": (change("links.0.weight", "1"), "links[0].weight"),
    "a weight beyond float32": (change("links.0.weight", 1e300), "more than a number can hold"),
    "null for a weight": (change("links.0.weight", None), "links[0].weight"),
    "an unknown type": (change("nodes.0.feature_type", "attention head"), "attention head"),
    "a token of 10 MB": (change("metadata.prompt_tokens.0", "x" * 10_000_000), "at most 10000 characters"),
    "a probability of 2": (change("nodes.10.token_prob", 2.0), "token_prob"),
    "a feature of another number": (change("nodes.0.feature", 7), "contradicts itself"),
    "pins as text": (change("qParams.pinnedIds", "0_3_1,0_5_2"), "pinnedIds"),
    "groups as text": (change("qParams.supernodes", "[]"), "supernodes"),
    "no links": (lambda values: values.pop("links"), "links"),
    "no logits": (
        lambda values: (values["nodes"].__delitem__(slice(-2, None)), values.update(links=[])),
        "no node|no logit",
    ),
    "nodes of a mapping": (change("nodes", {}), "nodes"),
    "a later version": (change("metadata.tl_clt.version", 9), "update"),
    "no number types": (change("metadata.tl_clt.dtypes", {}), "number types"),
    "a number type that is none": (change("metadata.tl_clt.dtypes.adjacency", "load"), "KeyError"),
    "a target that is none": (change("metadata.tl_clt.targets", [{"kind": "os"}, {}]), "KeyError"),
    "fewer target texts": (change("metadata.tl_clt.logit_tokens", []), "target texts"),
    "fewer token ids": (change("metadata.tl_clt.tokens", [1]), "token ids"),
    "a node that another program added": (change("nodes.0.tl_clt", None), "added by another program"),
    "what was dropped of one node alone": (change("nodes.0.tl_clt.dropped", 1.0), "some nodes have dropped"),
    "less than nothing dropped": (change("nodes.0.tl_clt.dropped", -1.0), "greater than or equal to 0"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_contradicts_itself_is_refused_by_name(case, tmp_path, as_users_run_it):
    how, words = WRONG[case]
    values = written(a_graph(sparse=False), tmp_path)
    how(values)
    with pytest.raises(FormatError) as refusal:
        load_neuronpedia(put(tmp_path, values))
    assert any(word in str(refusal.value) for word in words.split("|")), refusal.value
    assert "graph.json" in str(refusal.value) and len(str(refusal.value)) < 500


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "truncated"),
        ('{"nodes": [', "truncated"),
        ("[]", "at the top"),
        ("[" * 100_000, "RecursionError"),
        ('{"metadata": NaN}', "NaN is no finite number"),
        ('{"metadata": 1e999}', "1e999 is no finite number"),
        ('{"metadata": 1' + "0" * 400 + "}", "64 bits"),
        ("\ufeff{}", "BOM"),
    ],
)
def test_what_is_no_such_json_is_refused(text, words, tmp_path):
    (tmp_path / "graph.json").write_text(text)
    with pytest.raises(FormatError, match=words):
        load_neuronpedia(tmp_path / "graph.json")


def test_a_weight_that_is_no_number_is_refused(tmp_path):
    text = json.dumps(written(a_graph(sparse=False), tmp_path))
    at = text.index('"weight": ') + len('"weight": ')
    (tmp_path / "graph.json").write_text(text[:at] + "NaN" + text[text.index("}", at) :])
    with pytest.raises(FormatError, match="NaN is no finite number"):
        load_neuronpedia(tmp_path / "graph.json")


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(FormatError, match="does not exist"):
        load_neuronpedia(tmp_path / "no.json")
    with pytest.raises(FormatError, match="is a folder"):
        load_circuit_tracer(tmp_path)


def test_ids_of_errors_as_they_were_once_are_refused_where_they_are_those_of_features(tmp_path):
    values = as_others_write_it(written(a_graph(sparse=False), tmp_path))
    values["nodes"][4]["node_id"] = values["nodes"][0]["node_id"]
    with pytest.raises(FormatError, match="older programs named errors like features of layer 0"):
        load_circuit_tracer(put(tmp_path, values))
