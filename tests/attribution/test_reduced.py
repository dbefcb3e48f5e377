"""What a graph of which some is unknown says of the whole: bounds, after every way of making it smaller."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tests.attribution.helpers import (
    ROUNDING,
    TOKENS,
    assert_within_bounds,
    hold_strongest,
    leave_untraced,
    names,
    places_in,
    random_graph,
)
from tl_clt import AttributionGraph, NodeKind, attribute
from tl_clt.attribution import graph as graph_module
from tl_clt.attribution.influence import GraphScores, walk_upstream
from tl_clt.attribution.pruning import _smallest_of_share
from tl_clt.viewer import graph_tree
from tl_clt.viewer.tables import graph_table


def pruned(graph: AttributionGraph, *thresholds: float) -> AttributionGraph:
    return graph.prune(*thresholds)


REDUCTIONS: dict[str, Callable[[AttributionGraph], AttributionGraph]] = {
    "keep_edges=0.95": lambda g: hold_strongest(g, 0.95),
    "keep_edges=0.5": lambda g: hold_strongest(g, 0.5),
    "max_feature_nodes=20": lambda g: leave_untraced(g, 20),
    "max_feature_nodes=0": lambda g: leave_untraced(g, 0),
    "prune": pruned,
    "prune to little": lambda g: pruned(g, 0.3, 0.4),
    "prune twice": lambda g: pruned(pruned(g, 0.9, 0.9), 0.5, 0.8),
    "prune nodes alone": lambda g: pruned(g, 0.6, 1.0),
    "untraced, strongest": lambda g: hold_strongest(leave_untraced(g, 25), 0.9),
    "strongest, pruned": lambda g: pruned(hold_strongest(g, 0.9), 0.4, 0.5),
    "untraced, pruned": lambda g: pruned(leave_untraced(g, 25), 0.5, 0.7),
    "untraced, strongest, pruned twice": lambda g: pruned(
        pruned(hold_strongest(leave_untraced(g, 40), 0.95), 0.5, 0.9), 0.3, 0.5
    ),
}


@pytest.mark.parametrize("how", REDUCTIONS)
@pytest.mark.parametrize("seed", range(6))
def test_the_whole_graphs_numbers_lie_within_the_bounds(how: str, seed: int):
    whole = random_graph(seed)
    part = REDUCTIONS[how](whole)
    assert part.is_reduced and 0 < part.unexplored <= 1
    assert_within_bounds(whole, part)


@pytest.mark.parametrize(
    "options", [{"keep_edges": 0.95}, {"keep_edges": 0.8}, {"max_feature_nodes": 15}, {"max_unexplored": 0.2}], ids=str
)
def test_the_same_holds_of_graphs_as_they_are_traced(model, clt, graph, options):
    part = attribute(model, clt, TOKENS, **options)
    assert part.is_reduced
    for reduced in (part, part.prune(), part.prune(0.5, 0.6).prune(0.4, 0.5)):
        assert_within_bounds(graph, reduced)


def test_bounds_are_reached():
    """Nothing tighter would be true: unknown inputs that are all errors, or all a token, meet the bounds of both."""
    whole = random_graph(0)
    part = leave_untraced(whole, 20)
    rest = part.nodes.where(NodeKind.FEATURE)[~part.expanded[part.nodes.where(NodeKind.FEATURE)]]
    token, error = (int(whole.nodes.where(kind)[0]) for kind in (NodeKind.TOKEN, NodeKind.ERROR))
    for source, which in ((error, 0), (token, 1)):
        adjacency = part.adjacency.clone()
        adjacency[rest, source] = 1
        other = replace(whole, adjacency=adjacency)
        scores, bounds = other.scores(), part.scores()
        assert scores.replacement == pytest.approx(bounds.replacement_bounds[which], abs=ROUNDING)
        if source == error:
            assert scores.completeness == pytest.approx(bounds.completeness_bounds.low, abs=ROUNDING)


def test_a_whole_graph_is_its_own_bounds(graph):
    scores = graph.scores()
    assert not graph.is_reduced
    assert scores.replacement_bounds == (scores.replacement,) * 2
    assert scores.completeness_bounds == (scores.completeness,) * 2
    assert graph.path_length_bounds() == (graph.path_length(),) * 2
    assert all(torch.equal(bound, graph.influence()) for bound in graph.influence_bounds())
    replacement, completeness = scores
    assert (replacement, completeness) == tuple(scores) == (scores.replacement, scores.completeness)


def test_what_pruning_cut_is_carried_along(graph):
    part = graph.prune()
    at = places_in(graph, part)
    whole_input = graph.adjacency.abs().sum(dim=1)[at]
    torch.testing.assert_close(part.adjacency.abs().sum(dim=1) + part.dropped, whole_input)
    true, ours = (g.influence() / g.logit_probs.sum() for g in (graph, part))
    assert 0 < float((true[at] - ours).abs().max()) <= part.unexplored
    again = part.prune(0.6, 0.7)
    at = places_in(graph, again)
    torch.testing.assert_close(again.adjacency.abs().sum(dim=1) + again.dropped, graph.adjacency.abs().sum(dim=1)[at])
    node = int(part.nodes.where(NodeKind.LOGIT)[0])
    assert float(part.input_shares(node).sum()) == pytest.approx(
        1 - float(part.dropped[node] / whole_input[places_in(part, part) == node]), abs=1e-9
    )


def test_pruning_that_cuts_nothing_leaves_a_whole_graph(graph):
    assert not graph.prune(1.0, 1.0).is_reduced


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.5, 0.8, 0.9, 0.99])
@pytest.mark.parametrize("how", ["keep_edges=0.95", "max_feature_nodes=20", "untraced, strongest"])
def test_pruning_a_reduced_graph_keeps_the_share_asked_for_of_the_whole(how: str, share: float, seed: int):
    whole = random_graph(seed)
    part = REDUCTIONS[how](whole)
    influence, ours = whole.influence(), part.influence()
    # What the node threshold keeps, before loose ends go.
    unknown = walk_upstream(part).unknown_visits
    theirs = influence >= _smallest_of_share(influence, share).value
    least = _smallest_of_share(ours, share, unknown)
    kept = ours >= least.value
    assert int(kept.sum()) >= int(theirs.sum())
    if least.reached:
        assert influence[kept].sum() >= share * influence.sum() - ROUNDING
    assert ("node_threshold" in part.prune(share).info["thresholds_out_of_reach"]) == (not least.reached)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.5, 0.8, 0.9, 0.95])
@pytest.mark.parametrize("how", ["keep_edges=0.95", "max_feature_nodes=20"])
def test_what_pruning_the_whole_graph_keeps_stays_when_a_reduced_one_is_pruned(how: str, share: float, seed: int):
    whole = random_graph(seed)
    assert set(names(whole.prune(share))) <= set(names(REDUCTIONS[how](whole).prune(share)))


def test_influential_features_that_were_not_traced_stay(graph):
    part = leave_untraced(graph, 5)
    kept = part.prune()
    features = kept.nodes.where(NodeKind.FEATURE)
    assert (~kept.expanded[features]).any()
    assert kept.adjacency[features[kept.expanded[features]]].any(dim=1).all()


def test_what_is_unknown_survives_the_disk(graph, tmp_path):
    for part in (graph.prune(), leave_untraced(graph, 20).prune(), hold_strongest(graph, 0.9).prune()):
        loaded = AttributionGraph.load(part.save(tmp_path / "graph.safetensors"))
        assert loaded == part
        assert (loaded.unexplored, loaded.scores()) == (part.unexplored, part.scores())
        assert loaded.scores().completeness_bounds == part.scores().completeness_bounds
        assert loaded.prune(0.5) == part.prune(0.5)


def test_older_files_are_read_and_pruned_ones_named(graph, tmp_path, monkeypatch):
    monkeypatch.setattr(graph_module, "VERSION", 2)
    whole = graph.save(tmp_path / "whole.safetensors")
    smaller = replace(graph.prune(), dropped=None).save(tmp_path / "pruned.safetensors")
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert AttributionGraph.load(whole) == graph
    with pytest.warns(UserWarning, match="does not tell what was cut"):
        assert not AttributionGraph.load(smaller).is_reduced


def test_texts_state_the_bounds(graph):
    part = graph.prune()
    low, high = part.scores().replacement_bounds
    assert f"{part.scores().replacement:.3f} [{low:.3f} to {high:.3f}]" in str(part)
    assert f"{part.unexplored:.1%} unexplored" in str(part)
    assert f"{part.unexplored:.1%} of influence is not in this graph" in str(graph_tree(part).label)
    assert "[" not in str(graph).partition(":")[2] and "influence" not in str(graph_tree(graph).label)
    rows = list(graph_table(part, part.prune(0.5)).columns[1].cells)
    assert any(f"[{low:.3f} to {high:.3f}]" in str(cell) for cell in rows)


KINDS: dict[str, Callable[[AttributionGraph], AttributionGraph]] = {
    "whole": lambda g: g,
    "pruned": lambda g: g.prune(),
    "few rows": lambda g: leave_untraced(g, 5),
    "sparse": lambda g: hold_strongest(g, 0.9),
    "sparse, pruned": lambda g: hold_strongest(g, 0.9).prune(),
    "contrastive": lambda g: replace(g, contrast_activation=torch.rand_like(g.nodes.activation)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_graphs_equal_what_is_made_of_them(graph, kind: str, tmp_path):
    made = KINDS[kind](graph)
    path = made.save(tmp_path / "graph.safetensors")
    read = [AttributionGraph.load(path) for _ in range(2)]
    for same in (made, copy.copy(made), copy.deepcopy(made), pickle.loads(pickle.dumps(made)), *read):
        assert same == made and hash(same) == hash(made)
        assert same.nodes == made.nodes and hash(same.nodes) == hash(made.nodes)
        assert same.scores() == made.scores() and same.info == made.info
    assert len({made, *read}) == 1
    deep = copy.deepcopy(made)
    values = deep.adjacency.values() if deep.is_sparse else deep.adjacency
    values *= 2
    assert deep != made and read[0] == made


def test_graphs_differ_by_any_tensor_or_text(graph):
    flipped = replace(graph.nodes, activation=graph.nodes.activation + 1)
    for change in (
        {"nodes": flipped},
        {"adjacency": graph.adjacency * (1 + 1e-15) + 1e-300},
        {"adjacency": graph.adjacency.to_sparse_csr()},
        {"adjacency": graph.adjacency.float()},
        {"expanded": ~graph.expanded},
        {"dropped": torch.zeros_like(graph.nodes.activation)},
        {"contrast_activation": graph.nodes.activation},
        {"logit_tokens": ["x", *graph.logit_tokens[1:]]},
    ):
        assert replace(graph, **change) != graph, change.keys()
    assert replace(graph, info={}) == graph
    assert graph != "graph" and graph.nodes != 3
    assert graph.prune() != graph


def test_scores_survive_pickling(graph):
    scores = graph.prune().scores()
    read = pickle.loads(pickle.dumps(scores))
    assert isinstance(read, GraphScores) and read == scores and repr(read) == repr(scores)
    assert read.replacement_bounds == scores.replacement_bounds
