"""Influence, pruning, scores and files of a graph."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.attribution.helpers import TOKENS, normalised
from tl_clt import AttributionGraph
from tl_clt.attribution.edges import NodeKind
from tl_clt.errors import ConfigError, FormatError


def test_influence_is_the_matrix_inverse(graph):
    A = normalised(graph.adjacency)
    identity = torch.eye(len(A), dtype=A.dtype)
    wanted = graph.logit_weights @ (torch.linalg.inv(identity - A) - identity)
    torch.testing.assert_close(graph.influence(), wanted)


def test_shares_of_influence_sum_to_one_and_all_walks_end_at_leaves(graph):
    shares = graph.shares()
    assert sum(shares) == pytest.approx(1)
    assert min(shares[:4]) > 0
    assert shares.unexplored == 0
    leaves = graph.influence()[~graph.adjacency.any(dim=1)].sum()
    torch.testing.assert_close(leaves, graph.logit_probs.sum())


def test_scores_follow_their_definitions(graph):
    A, influence = normalised(graph.adjacency), graph.influence()
    kind = graph.nodes.kind
    token, error = influence[kind == NodeKind.TOKEN].sum(), influence[kind == NodeKind.ERROR].sum()
    output = influence + graph.logit_weights
    explained = 1 - A[:, kind == NodeKind.ERROR].sum(dim=1)
    inner = (kind == NodeKind.FEATURE) | (kind == NodeKind.LOGIT)
    paper, peer = graph.scores("paper"), graph.scores("circuit-tracer")
    assert paper.replacement == peer.replacement == pytest.approx(float(token / (token + error)))
    assert paper.completeness == pytest.approx(float((output * explained)[inner].sum() / output[inner].sum()))
    assert peer.completeness == pytest.approx(float((output * explained).sum() / output.sum()))
    assert peer.completeness > paper.completeness


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95])
def test_pruning_keeps_the_fewest_nodes_of_the_share_of_influence_asked_for(graph, threshold):
    influence, kept = graph.influence(), set()
    for node in influence.argsort(descending=True).tolist():
        if float(influence[list(kept)].sum()) < threshold * float(influence.sum()):
            kept.add(node)
    stays = set(torch.nonzero(graph.nodes.is_kind(NodeKind.TOKEN, NodeKind.LOGIT)).flatten().tolist())
    features = set(graph.nodes.where(NodeKind.FEATURE).tolist())
    kept |= stays
    while True:
        at = sorted(kept)
        among = graph.adjacency[at][:, at] != 0
        loose = {n for n, has_output in zip(at, among.any(dim=0), strict=True) if not has_output} - stays
        loose |= {n for n, has_input in zip(at, among.any(dim=1), strict=True) if not has_input} & features
        if not loose:
            break
        kept -= loose
    masks = graph.prune_masks(threshold, 1.0)
    assert torch.nonzero(masks.nodes).flatten().tolist() == sorted(kept)
    assert torch.equal(masks.edges, (graph.adjacency != 0) & masks.nodes & masks.nodes[:, None])
    assert len(kept) < len(graph.nodes)


def test_a_pruned_graph_is_a_smaller_graph_without_loose_ends(graph):
    pruned = graph.prune()
    assert isinstance(pruned, AttributionGraph)
    assert len(pruned.nodes) < len(graph.nodes)
    inner = pruned.nodes.is_kind(NodeKind.FEATURE)
    assert pruned.adjacency[inner].any(dim=1).all()
    assert pruned.adjacency[:, ~pruned.nodes.is_kind(NodeKind.TOKEN, NodeKind.LOGIT)].any(dim=0).all()
    assert len(pruned.nodes.where(NodeKind.TOKEN)) == len(TOKENS)
    assert len(pruned.logit_probs) == len(pruned.nodes.where(NodeKind.LOGIT))


def test_save_and_load_give_the_same_graph(graph, tmp_path):
    for saved in (graph, graph.prune()):
        path = saved.save(tmp_path / "sub" / "graph.safetensors")
        loaded = AttributionGraph.load(path)
        for name in ("adjacency", "expanded", "tokens", "logit_probs"):
            assert torch.equal(getattr(loaded, name), getattr(saved, name))
        for name, values in saved.nodes.tensors().items():
            assert torch.equal(getattr(loaded.nodes, name), values)
        assert (loaded.prompt_tokens, loaded.logit_tokens, loaded.info) == (
            saved.prompt_tokens,
            saved.logit_tokens,
            saved.info,
        )
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["graph.safetensors"]


def test_bad_graph_files_are_named(graph, tmp_path):
    whole = graph.save(tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    for name, words in (("none", "does not exist"), ("cut", "truncated"), ("other", "no attribution graph")):
        with pytest.raises(FormatError, match=words):
            AttributionGraph.load(tmp_path / f"{name}.safetensors")


def renamed(tensors, about):
    tensors["activations"] = tensors.pop("contrast_activation")


def neither_true_nor_false(tensors, about):
    tensors["expanded"].view(torch.uint8)[0] = 2


def a_feature_nowhere(tensors, about):
    tensors["pos"][0] = -1


def a_negative_feature(tensors, about):
    tensors["index"][0] = -5


def a_target_too_few(tensors, about):
    about["targets"] = about["targets"][1:]


def a_target_that_is_none(tensors, about):
    about["targets"][0] = 3


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (renamed, "a tensor 'activations', for which a graph has no place"),
        (neither_true_nor_false, "not true and false alone"),
        (a_feature_nowhere, "pos leaves the"),
        (a_negative_feature, "index or tokens has negative values"),
        (a_target_too_few, "targets are not one for each"),
        (a_target_that_is_none, "is truncated or no graph file"),
    ],
)
def test_a_graph_file_that_contradicts_itself_is_refused(graph, tmp_path, damage, words):
    path = replace(graph, contrast_activation=graph.nodes.activation.clone()).save(tmp_path / "graph")
    with safe_open(path, framework="pt") as opened:
        metadata, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}
    about = json.loads(metadata["about"])
    damage(tensors, about)
    save_file(tensors, path, {**metadata, "about": json.dumps(about)})
    with pytest.raises(FormatError, match=words):
        AttributionGraph.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(layer=t["layer"][1:]), r"layer has shape .* one for each of \d+ nodes"),
        (lambda t: t.update(kind=t["kind"] + 9), "kind has values that no node kind has"),
        (lambda t: t.update(logit_probs=t["logit_probs"][:1]), r"logit_probs has shape \[1\], .* logit nodes"),
        (lambda t: t.update(tokens=t["tokens"][1:]), "tokens has shape .* prompt_tokens"),
        (lambda t: t.update(adjacency=t["adjacency"][:, 1:]), "adjacency has shape"),
        (lambda t: t.update(adjacency=t["adjacency"].T), "edges to nodes without inputs, or from a layer to the same"),
        (lambda t: t["adjacency"][0].fill_(torch.nan), "adjacency has values that are infinite or no numbers"),
        (lambda t: t.pop("expanded"), "KeyError: 'expanded'"),
    ],
)
def test_a_graph_file_whose_parts_disagree_is_refused_with_what_disagrees(graph, tmp_path, change, message):
    path = graph.save(tmp_path / "graph.safetensors")
    with safe_open(path, framework="pt") as opened:
        metadata, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    with pytest.raises(FormatError, match=message):
        AttributionGraph.load(path)


def test_a_full_disk_leaves_the_old_graph(graph, tmp_path, monkeypatch):
    path = graph.save(tmp_path / "graph.safetensors")
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tl_clt.attribution.graph.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        graph.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["graph.safetensors"]


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.5])
def test_thresholds_out_of_range(graph, threshold):
    with pytest.raises(ConfigError, match="node_threshold"):
        graph.prune(node_threshold=threshold)
    with pytest.raises(ConfigError, match="edge_threshold"):
        graph.prune(edge_threshold=threshold)


def test_unknown_score_definition(graph, as_users_run_it):
    with pytest.raises(ConfigError, match="definition is 'mine': give one of paper, circuit-tracer"):
        graph.scores("mine")
