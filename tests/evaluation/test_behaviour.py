"""Pruning to a share of measured behaviour: every circuit equals a run by hand, and what is found is a crossing."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import replace

import pytest
import torch

from tests.models import random_tokens, tiny_clt, tiny_hooked
from tests.replacement.by_hand import clean_run, run_by_hand
from tl_clt import NodeKind, attach, attribute, frozen_hooks, load_organism, prune_to_behaviour
from tl_clt.attribution import DifferenceTarget, FeatureTarget, TokenTarget
from tl_clt.errors import AlreadyAttached, CLTMismatch, ConfigError, PromptError, TargetError
from tl_clt.evaluation import find_consensus
from tl_clt.evaluation.behaviour import search
from tl_clt.organisms import benchmark_prompts


@pytest.fixture(scope="module")
def model():
    return tiny_hooked("gpt2")


@pytest.fixture(scope="module")
def clt(model):
    return tiny_clt(model)


@pytest.fixture(scope="module")
def graph(model, clt):
    return attribute(model, clt, random_tokens(model, pos=6)[0], max_n_logits=2, progress=False)


def logits_by_hand(model, clt, graph, kept, other=None):
    """Logits at the end with the features and errors of a pruned graph alone, without `attach`."""
    tokens = graph.tokens[None]
    clean = clean_run(model, clt, tokens)
    error = clean.mlp_outs - clt(clean.inputs)
    acts_there, errors_there = torch.zeros_like(clt.encode(clean.inputs)), torch.zeros_like(error)
    if other is not None:
        there = clean_run(model, clt, other[None])
        acts_there, errors_there = clt.encode(there.inputs), there.mlp_outs - clt(there.inputs)
    features = torch.zeros_like(acts_there, dtype=torch.bool)
    some_errors = torch.zeros(error.shape[:3], dtype=torch.bool)
    features[:, 0], some_errors[:, 0] = True, True
    for node in kept:
        if node.kind == NodeKind.FEATURE:
            features[0, node.pos, node.layer, node.index] = True
        elif node.kind == NodeKind.ERROR:
            some_errors[0, node.pos, node.layer] = True

    def edit(acts, layer):
        return torch.where(features[..., layer, :], acts, acts_there[..., layer, :])

    _, cache = model.run_with_cache(tokens)
    left = torch.where(some_errors[..., None], error, errors_there)
    hooks = frozen_hooks(cache, scales=False)
    return run_by_hand(model, clt, tokens, errors=left, edit=edit, hooks=hooks)[0, -1]


@pytest.mark.parametrize(
    ("kind", "counterfactual"), [("logit", False), ("logit", True), ("log_prob", True), ("difference", False)]
)
def test_what_is_kept_is_that_of_the_pruned_graphs_circuit_by_hand(model, clt, kind: str, counterfactual: bool):
    tokens = random_tokens(model, pos=6)[0]
    other = random_tokens(model, pos=6, seed=3)[0] if counterfactual else None
    target = DifferenceTarget(7, 9) if kind == "difference" else TokenTarget(7)
    graph = attribute(model, clt, tokens, target, contrast=other, progress=False)
    found = prune_to_behaviour(model, clt, graph, 0.8, log_prob=kind == "log_prob", counterfactual=other)

    def m(kept) -> float:
        logits = logits_by_hand(model, clt, graph, kept, other)
        if kind == "log_prob":
            return float(logits.log_softmax(dim=-1)[7])
        return float(logits[7] - (logits[9] if kind == "difference" else logits.mean()))

    empty, whole = m([]), m(graph.nodes)
    with torch.no_grad():
        assert logits_by_hand(model, clt, graph, graph.nodes, other).tolist() == pytest.approx(
            model(tokens)[0, -1].tolist(), abs=1e-9
        )
    assert found.faithfulness == pytest.approx((m(found.graph.nodes) - empty) / (whole - empty), abs=1e-9)
    assert found.reached and found.faithfulness >= 0.8
    assert found.graph == graph.prune(found.node_threshold, 0.98)
    for row in found.tried.itertuples():
        kept = graph.prune(row.node_threshold, 0.98).nodes
        assert row.faithfulness == pytest.approx((m(kept) - empty) / (whole - empty), abs=1e-9)
        in_circuit = kept.is_kind(NodeKind.FEATURE, NodeKind.ERROR) & (kept.pos > 0)
        assert row.n_kept == int(in_circuit.sum())
    assert found.n_kept == found.tried.set_index("node_threshold").loc[found.node_threshold, "n_kept"]


@pytest.mark.parametrize(("share", "batch_size"), [(0.3, 5), (0.6, 1), (0.9, 5), (0.99, 50)])
def test_the_next_smaller_graph_keeps_less(model, clt, graph, share: float, batch_size: int):
    found = prune_to_behaviour(model, clt, graph, share, edge_threshold=1.0, batch_size=batch_size)
    assert found.faithfulness >= share
    smaller = found.tried[found.tried["node_threshold"] < found.node_threshold]
    assert (smaller.iloc[-1:]["faithfulness"] < share).all()
    # Influences of the graph are all different: one node less is the next threshold.
    influence = graph.influence().sort(descending=True).values
    shares = (influence.cumsum(0) / influence.sum()).tolist()
    at = min(range(len(shares)), key=lambda i: abs(shares[i] - found.node_threshold))
    if at:
        assert smaller.iloc[-1]["node_threshold"] == pytest.approx(shares[at - 1])


def test_all_of_it_is_kept_by_all_nodes(model, clt, graph):
    """f is 1 where the threshold is, and any share up to 1 is reached."""
    found = prune_to_behaviour(model, clt, graph, 1 - 1e-9, edge_threshold=1.0)
    largest = found.tried.iloc[-1]
    assert found.reached and largest["node_threshold"] == pytest.approx(1)
    assert largest["faithfulness"] == pytest.approx(1, abs=1e-9) and largest["answer"]


def test_where_no_threshold_keeps_enough_it_says_so(model, clt, graph):
    """Features that lose all their edges to the edge threshold are missing."""
    with pytest.warns(UserWarning, match=r"No threshold keeps 0.999 of the behaviour.*or edge_threshold=1") as told:
        found = prune_to_behaviour(model, clt, graph, 0.999, edge_threshold=0.8)
    assert not found.reached and found.faithfulness < 0.999 and "not reached" in repr(found)
    assert found.graph == graph.prune(1.0, 0.8)
    # With digits enough that what falls short does not look as if it did not.
    assert f"keep f={found.faithfulness:.6g}." in str(told[0].message)


def test_on_atlas_more_behaviour_takes_more_nodes_and_far_more_at_random():
    model, clt = load_organism("atlas")
    for prompt, answer, other in benchmark_prompts("atlas")[:2]:
        graph = attribute(model, clt, prompt, [answer], progress=False)
        found = [prune_to_behaviour(model, clt, graph, share) for share in (0.5, 0.95)]
        kept = [of.n_kept for of in found]
        assert kept == sorted(kept) and kept[-1] < 0.5 * found[-1].n_nodes
        assert all(of.faithfulness >= share for of, share in zip(found, (0.5, 0.95), strict=True))
        assert all(of.n_random > 3 * of.n_kept for of in found)
        contrast = attribute(model, clt, prompt, [answer], contrast=other, progress=False)
        assert prune_to_behaviour(model, clt, contrast, 0.8, counterfactual=other).reached


@pytest.mark.parametrize("at_once", [1, 2, 7, 100])
def test_a_search_finds_the_first_number_that_keeps_enough(at_once: int):
    for n in range(1, 30):
        for first in range(n):
            asked: list[int] = []

            def keeps(numbers, first=first, asked=asked):
                asked.extend(numbers)
                return [float(number >= first) for number in numbers]

            assert search(keeps, n, 0.5, at_once) == first
            assert len(set(asked)) == len(asked) and (at_once > 1 or len(asked) <= 2 + n.bit_length())
        assert search(lambda numbers: [0.0] * len(numbers), n, 0.5, at_once) is None
    assert search(lambda numbers: [1.0] * len(numbers), 0, 0.5) is None


def test_a_search_ends_at_a_crossing_where_what_is_kept_goes_up_and_down():
    kept = [0.0, 0.9, 0.1, 0.6, 0.2, 0.8, 0.7, 1.0]
    for at_once in range(1, 9):
        found = search(lambda numbers: [kept[number] for number in numbers], len(kept), 0.5, at_once)
        assert kept[found] >= 0.5 > kept[found - 1]


def test_consensus_counts_graphs_that_have_a_feature(model, clt):
    prompts = random_tokens(model, batch=4, pos=5)
    graphs = [graph.prune(0.6, 0.9) for graph in attribute(model, clt, list(prompts), progress=False)]
    for positions in (False, True):
        names = [
            {(node.layer, node.index, node.pos - 5)[: 3 if positions else 2] for node in graph.nodes if node.kind == 0}
            for graph in graphs
        ]
        counts = Counter(name for of in names for name in of)
        for share in (0.25, 0.5, 1.0):
            table = find_consensus(graphs, share, positions=positions)
            keys = ["layer", "feature", "pos"] if positions else ["layer", "feature"]
            found = {tuple(row[keys].astype(int)): row["n_graphs"] for _, row in table.iterrows()}
            assert found == {name: n for name, n in counts.items() if n >= share * 4}
            assert table["n_graphs"].is_monotonic_decreasing
    [first] = find_consensus(graphs[:1], 1.0).head(1).itertuples()
    nodes, influence = graphs[0].nodes, graphs[0].influence()
    here = nodes.is_kind(NodeKind.FEATURE) & (nodes.layer == first.layer) & (nodes.index == first.feature)
    assert first.influence == pytest.approx(float(influence[here].sum())) and first.share == 1


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"graph": 3}, ConfigError, "The graph is 3"),
        ({"share": 0}, ConfigError, "share is 0"),
        ({"share": 1.1}, ConfigError, "share is 1.1"),
        ({"edge_threshold": 2}, ConfigError, "edge_threshold is 2"),
        ({"log_prob": "yes"}, ConfigError, "log_prob is 'yes'"),
        ({"counterfactual": [0, 1]}, PromptError, "6 tokens and the counterfactual 2"),
        ({"freeze": "some"}, ConfigError, "freeze is 'some'"),
        ({"batch_size": 0}, ConfigError, "batch_size is 0"),
        ({"clt": 3}, CLTMismatch, "CLT is 3"),
    ],
)
def test_bad_arguments_are_refused(as_users_run_it, model, clt, graph, changed, error, words):
    with pytest.raises(error, match=words):
        prune_to_behaviour(**{"model": model, "clt": clt, "graph": graph, **changed})


def test_graphs_that_cannot_be_measured_are_refused(model, clt, graph):
    with pytest.raises(CLTMismatch, match="another CLT"):
        prune_to_behaviour(model, tiny_clt(model, seed=5), graph)
    for target in (FeatureTarget(2, 1), TokenTarget(5, pos=2)):
        with pytest.raises(TargetError, match="what comes after the last position"):
            prune_to_behaviour(model, clt, attribute(model, clt, graph.tokens, target, progress=False))
    with pytest.raises(ConfigError, match="difference of two tokens"):
        difference = attribute(model, clt, graph.tokens, DifferenceTarget(5, 7), progress=False)
        prune_to_behaviour(model, clt, difference, log_prob=True)
    with attach(model, clt), pytest.raises(AlreadyAttached):
        prune_to_behaviour(model, clt, graph)
    other = graph.tokens.flip(0)
    contrast = attribute(model, clt, graph.tokens, contrast=other, progress=False)
    for one, given in ((graph, other), (contrast, None), (contrast, graph.tokens)):
        with pytest.raises(ConfigError, match="traced with as `contrast`"):
            prune_to_behaviour(model, clt, one, counterfactual=given)


def test_a_model_without_mlps_has_no_behaviour_to_keep():
    model = tiny_hooked("gpt2")
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.W_out.zero_()
            block.mlp.b_out.zero_()
    clt = tiny_clt(model)
    with torch.no_grad():
        clt.b_dec.zero_()
        for source in clt.layers:
            clt.W_dec[source].zero_()
    graph = attribute(model, clt, random_tokens(model, pos=5)[0], progress=False)
    with pytest.raises(ConfigError, match="no behaviour to keep"):
        prune_to_behaviour(model, clt, graph)


def test_consensus_refuses_graphs_of_several_clts(as_users_run_it, graph):
    with pytest.raises(CLTMismatch, match="several CLTs"):
        find_consensus([graph, replace(graph, info={**graph.info, "clt_fingerprint": "other"})])
    for graphs, words in (([], "graphs is"), ([3], r"graphs\[0\] is 3"), (5, r"graphs\[0\] is 5")):
        with pytest.raises(ConfigError, match=words):
            find_consensus(graphs)
    with pytest.raises(ConfigError, match="share is 0"):
        find_consensus([graph], 0)


def test_a_reduced_graph_is_pruned_without_warnings_of_its_own(model, clt):
    tokens = random_tokens(model, pos=6)[0]
    reduced = attribute(model, clt, tokens, max_feature_nodes=10, keep_edges=0.9, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = prune_to_behaviour(model, clt, reduced, 0.5)
    assert found.reached
