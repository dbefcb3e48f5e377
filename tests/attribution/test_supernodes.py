"""Supernodes: groups that were planted are found, the collapsed graph is the graph, a subgraph's score is a walk's."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from tests.attribution.helpers import hold_strongest, leave_untraced, normalised, random_graph
from tests.benchmarks.supernodes import adjusted_rand, group_of, join
from tl_clt import AttributionGraph, NodeKind, attribute, load_neuronpedia, save_neuronpedia
from tl_clt.attribution import Supernodes, collapse, find_supernodes, score_subgraph
from tl_clt.attribution.edges import Nodes
from tl_clt.attribution.supernodes import as_supernodes, draw_alike
from tl_clt.benchmark import neurons_as_transcoder
from tl_clt.errors import ConfigError, NodeNotFound
from tl_clt.organisms import load_circuit

N_KINDS, N_EACH = 3, 6
N_PLANTED = N_KINDS * N_EACH
ROUNDING = 1e-12


def planted(seed: int = 0, *, noise: float = 0.1, pos: list[int] | None = None) -> AttributionGraph:
    """Features of layers 0 and 1, of three kinds: each kind reads its own token and writes to its own output, by sizes
    that differ from feature to feature a hundredfold."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.arange(N_PLANTED) % N_KINDS
    sizes = torch.rand(N_PLANTED, generator=generator, dtype=torch.float64) * 4.6 - 2.3
    one = torch.ones(N_PLANTED, dtype=torch.float64)
    token, logit = torch.arange(N_KINDS), torch.full((N_KINDS,), N_KINDS)
    of_three = torch.ones(N_KINDS, dtype=torch.float64)
    where = torch.full((N_PLANTED,), N_KINDS) if pos is None else torch.tensor(pos)
    nodes = Nodes.build(
        [
            (NodeKind.FEATURE, torch.arange(N_PLANTED) // (N_PLANTED // 2), where, torch.arange(N_PLANTED), one),
            (NodeKind.TOKEN, torch.full((N_KINDS,), -1), token, token, of_three),
            (NodeKind.LOGIT, torch.full((N_KINDS,), 2), logit, token, of_three),
        ]
    )
    n = len(nodes)
    features, tokens, logits = (nodes.where(kind) for kind in (NodeKind.FEATURE, NodeKind.TOKEN, NodeKind.LOGIT))
    adjacency = torch.zeros(n, n, dtype=torch.float64)
    fill = noise * torch.randn(n, n, generator=generator, dtype=torch.float64)
    own = (kinds[:, None] == torch.arange(N_KINDS)).double()
    adjacency[features[:, None], tokens] = (own + fill[features[:, None], tokens]) * sizes.exp()[:, None]
    adjacency[logits[:, None], features] = (own.T + fill[logits[:, None], features]) * sizes.exp()
    return AttributionGraph(
        nodes=nodes,
        adjacency=adjacency,
        expanded=nodes.is_kind(NodeKind.FEATURE, NodeKind.LOGIT),
        tokens=torch.arange(N_KINDS + 1),
        prompt_tokens=[f" w{i}" for i in range(N_KINDS + 1)],
        logit_probs=torch.full((N_KINDS,), 0.3, dtype=torch.float64),
        logit_tokens=["a", "b", "c"],
        info={"n_layers": 2},
    )


def kinds_of(groups: Supernodes) -> list[set[int]]:
    """The planted kinds in each group."""
    return [{number % N_KINDS for number in members} for members in groups.members]


@pytest.mark.parametrize("seed", range(5))
def test_planted_groups_are_found_whatever_the_sizes(seed: int):
    groups = find_supernodes(planted(seed))
    assert len(groups) == N_KINDS and all(len(kinds) == 1 for kinds in kinds_of(groups))
    assert sorted(map(len, groups.members)) == [N_EACH] * N_KINDS
    assert find_supernodes(planted(seed), n_groups=N_KINDS) == groups
    assert groups.nodes == list(range(N_PLANTED))


def test_groups_are_not_found_where_edges_are_shuffled():
    """The control: the same edges, but each feature's at another's place."""
    graph = planted()
    mixed = torch.randperm(N_PLANTED, generator=torch.Generator().manual_seed(3))
    adjacency = graph.adjacency.clone()
    adjacency[:N_PLANTED] = adjacency[:N_PLANTED][mixed]
    groups = find_supernodes(replace(graph, adjacency=adjacency), n_groups=N_KINDS)
    assert any(len(kinds) > 1 for kinds in kinds_of(groups))


def test_on_a_known_circuit_neurons_are_grouped_by_the_variable_that_they_write():
    """`equal`: layer 0 computes a product and a sum by nine neurons each, layer 1 what is made of both. Groups by layer
    would have half of it."""
    circuit = load_circuit("equal")
    neurons, at = neurons_as_transcoder(circuit), circuit.answer_position
    graph = join(
        [
            attribute(circuit.model, neurons, prompt, [int(answer)], 1, bos="features", progress=False)
            for prompt, answer in zip(circuit.prompts, circuit.answers, strict=True)
        ]
    )
    nodes = graph.nodes
    among = torch.nonzero(nodes.is_kind(NodeKind.FEATURE) & (nodes.pos == at)).flatten().tolist()
    variable = {}
    for number in among:
        layer, feature = int(nodes.layer[number]), int(nodes.index[number])
        vector = neurons.W_dec[layer][feature, 0]
        [variable[number]] = [
            v.name for v in circuit.variables if v.layer == layer and float((v.subspace @ vector).norm()) > 1e-6
        ]
    found = group_of(find_supernodes(graph, among), among)
    truth = [variable[number] for number in among]
    assert len(among) == 27 and adjusted_rand(truth, found) == 1
    assert adjusted_rand(truth, nodes.layer[among].tolist()) < 0.6
    shuffled = [truth[i] for i in torch.randperm(27, generator=torch.Generator().manual_seed(0)).tolist()]
    assert abs(adjusted_rand(shuffled, found)) < 0.2


def test_a_feature_that_pushes_the_other_way_is_another_group():
    """Where signs count: absolute profiles are the same; signed ones are opposite."""
    graph = planted(noise=0)
    adjacency = graph.adjacency.clone()
    adjacency[:, 0] *= -1
    adjacency[0] *= -1
    groups = find_supernodes(replace(graph, adjacency=adjacency), signed=True)
    assert (0,) in groups.members and len(groups) == N_KINDS + 1
    assert find_supernodes(replace(graph, adjacency=adjacency)).members == find_supernodes(graph).members
    # What takes from the same and pushes the other way is alike by 1 and by -1: by 0 on average.
    adjacency[0] *= -1
    assert (0,) in find_supernodes(replace(graph, adjacency=adjacency), signed=True, similarity=0.1).members


def test_equal_profiles_are_one_group_at_a_similarity_of_1_and_all_are_at_0():
    graph = planted(noise=0)
    assert len(find_supernodes(graph, similarity=1.0)) == N_KINDS
    assert len(find_supernodes(planted(noise=0.1), similarity=1.0)) == N_PLANTED
    # Profiles of different kinds have nothing in common: they are alike by exactly 0.
    assert len(find_supernodes(graph, similarity=0.0)) == 1


def test_groups_keep_to_positions_unless_they_may_not():
    pos = [1 + i % 2 for i in range(N_PLANTED)]
    graph = planted(pos=pos)
    apart, across = find_supernodes(graph), find_supernodes(graph, across_positions=True)
    assert len(apart) == 2 * N_KINDS and all(len({pos[n] for n in members}) == 1 for members in apart.members)
    assert len(across) == N_KINDS
    assert set(apart) == {"w1", "w1 2", "w1 3", "w2", "w2 2", "w2 3"}
    with pytest.raises(ConfigError, match=r"n_groups is 1: give at least 2, one for each position"):
        find_supernodes(graph, n_groups=1)


def test_responses_count_as_much_as_they_are_to():
    graph = planted()
    labels = ["even" if i % 2 == 0 else "odd" for i in range(N_PLANTED)]
    by_label = find_supernodes(graph, responses=labels, response_weight=1.0)
    assert dict(by_label) == {"even": tuple(range(0, N_PLANTED, 2)), "odd": tuple(range(1, N_PLANTED, 2))}
    vectors = torch.tensor([[1.0, 5.0] if label == "even" else [7.0, -1.0] for label in labels])
    by_vector = find_supernodes(graph, responses=vectors, response_weight=1.0)
    assert set(by_vector.members) == set(by_label.members)
    ignored = find_supernodes(graph, responses=vectors, response_weight=0.0)
    assert ignored.members == find_supernodes(graph).members
    both = find_supernodes(graph, responses=labels, similarity=0.75)
    assert len(both) == 2 * N_KINDS and all(len(kinds) == 1 for kinds in kinds_of(both))
    assert {name.split()[0] for name in both} == {"even", "odd"}


def test_some_features_of_a_whole_graph_and_one_alone():
    graph = random_graph(1)
    masks = graph.prune_masks(0.5, 0.9)
    groups = find_supernodes(graph, masks.nodes)
    kept = masks.nodes & graph.nodes.is_kind(NodeKind.FEATURE)
    assert groups.nodes == torch.nonzero(kept).flatten().tolist()
    assert (
        find_supernodes(graph, groups.nodes) == groups == find_supernodes(graph, [graph.nodes[n] for n in groups.nodes])
    )
    assert find_supernodes(graph, [3]).members == ((3,),)
    influence = graph.influence()
    sums = [float(influence[list(members)].sum()) for members in groups.members]
    assert sums == sorted(sums, reverse=True)
    sparse = hold_strongest(graph, 1.0)
    assert find_supernodes(sparse, groups.nodes) == groups


def test_supernodes_are_a_mapping_that_does_not_change_and_goes_into_files(tmp_path):
    graph = planted()
    groups = find_supernodes(graph)
    assert isinstance(hash(groups), int) and groups == find_supernodes(graph) and len({groups, groups}) == 1
    with pytest.raises(FrozenInstanceError):
        groups.names = ("a",)  # type: ignore[misc]
    save_neuronpedia(graph, tmp_path / "graph.json", scan="model", supernodes=groups)
    read = load_neuronpedia(tmp_path / "graph.json").info["supernodes"]
    assert {name: tuple(sorted(members)) for name, members in read.items()} == dict(groups)
    assert as_supernodes(graph, {"by hand": [graph.nodes[2], 1]}).members == ((1, 2),)


# -- the collapsed graph


def some_groups(graph: AttributionGraph, n_groups: int = 5) -> dict[str, list[int]]:
    """Groups that mean nothing, of half of the features and of all layers."""
    features = graph.nodes.where(NodeKind.FEATURE).tolist()[::2]
    return {f"group {i}": features[i::n_groups] for i in range(n_groups)}


@pytest.fixture(params=["whole", "sparse", "untraced", "pruned"])
def graph(request) -> AttributionGraph:
    whole = random_graph(2)
    make = {
        "whole": lambda: whole,
        "sparse": lambda: hold_strongest(whole, 0.8),
        "untraced": lambda: leave_untraced(whole, 20),
        "pruned": lambda: whole.prune(0.8, 0.9),
    }
    return make[request.param]()


def test_the_collapsed_graphs_influence_is_the_sum_of_the_members(graph: AttributionGraph):
    groups = some_groups(graph)
    collapsed = nodes, edges = collapse(graph, groups)
    said = f"CollapsedGraph({len(groups)} groups among {len(nodes)} nodes, {len(edges)} edges)"
    assert repr(collapsed) == said and said in collapsed._repr_html_()
    n = len(nodes)
    S = torch.zeros(n, n, dtype=torch.float64)
    S[edges["target"].tolist(), edges["source"].tolist()] = torch.tensor(edges["share"].to_numpy())
    w = torch.zeros(n, dtype=torch.float64)
    w[torch.tensor((nodes["kind"] == "logit").to_numpy())] = graph.logit_probs
    # w (S + S^2 + ...); members of a group may write to each other, so that the series does not end.
    influence = torch.linalg.solve((torch.eye(n) - S).T, w) - w
    assert influence.tolist() == pytest.approx(nodes["influence"].tolist(), abs=1e-9)
    own = graph.influence()
    for row, members in enumerate(groups.values()):
        assert nodes["influence"][row] == pytest.approx(float(own[members].sum()))
    assert nodes["n_nodes"].sum() == len(graph.nodes) and nodes["influence"].sum() == pytest.approx(float(own.sum()))
    sums = S.sum(dim=1)
    assert (sums <= 1 + ROUNDING).all()
    if not graph.is_reduced:
        assert sums[w > 0].tolist() == pytest.approx([1.0] * len(graph.logit_probs))


def test_weights_are_the_sums_of_edges_that_viewers_draw(graph: AttributionGraph):
    groups = some_groups(graph)
    nodes, edges = collapse(graph, groups)
    adjacency = graph.adjacency.to_dense()
    names, members = nodes["name"].tolist(), list(groups.values())
    logit = graph.nodes.where(NodeKind.LOGIT).tolist()
    for edge in edges.itertuples():
        if edge.target < len(groups) and edge.source < len(groups):
            between = adjacency[members[edge.target]][:, members[edge.source]]
            assert edge.weight == pytest.approx(float(between.sum()))
            assert edge.n_edges == int(between.count_nonzero())
            assert edge.label == f"{names[edge.source]} -> {names[edge.target]}"
            assert abs(edge.signed) <= edge.share + ROUNDING
    # Into an output, which is a node by itself, shares are those of its row.
    of_logit = edges[(edges["target"] == names.index(graph.nodes[logit[0]].label)) & (edges["source"] < len(groups))]
    for edge in of_logit.itertuples():
        assert edge.share == pytest.approx(float(graph.input_shares(logit[0])[members[edge.source]].sum()))


# -- the subgraph


def scores_by_definition(graph: AttributionGraph, kept: list[int]) -> tuple[float, float]:
    """Replacement and completeness by matrices, of a whole graph."""
    A = normalised(graph.adjacency)
    features = graph.nodes.is_kind(NodeKind.FEATURE)
    outside = features.clone()
    outside[kept] = False
    A[outside] = 0
    w, at, influence = graph.logit_weights, graph.logit_weights, torch.zeros(len(A), dtype=A.dtype)
    while bool(at.any()):
        at = at @ A
        influence += at
    errors = outside | graph.nodes.is_kind(NodeKind.ERROR)
    token, error = (float(influence[of].sum()) for of in (graph.nodes.is_kind(NodeKind.TOKEN), errors))
    counts = (features & ~outside) | graph.nodes.is_kind(NodeKind.LOGIT)
    o = (influence + w) * counts
    return token / (token + error), float((o * (1 - A[:, errors].sum(dim=1))).sum() / o.sum())


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_a_subgraphs_scores_count_other_features_as_errors(share: float):
    whole = random_graph(3)
    features = whole.nodes.where(NodeKind.FEATURE)
    kept = features[: int(share * len(features))].tolist()
    wanted = scores_by_definition(whole, kept)
    assert tuple(score_subgraph(whole, kept)) == pytest.approx(wanted)
    mask = torch.zeros(len(whole.nodes), dtype=torch.bool)
    mask[kept] = True
    assert score_subgraph(whole, mask) == score_subgraph(whole, kept)
    if share == 1:
        assert wanted == pytest.approx(tuple(whole.scores()))
        assert score_subgraph(whole, kept, "circuit-tracer") == whole.scores("circuit-tracer")
    # Of what does not keep every edge, the bounds hold the whole graph's score.
    for part in (hold_strongest(whole, 0.8), leave_untraced(whole, 25)):
        found = score_subgraph(part, kept)
        for number, bounds in zip(wanted, (found.replacement_bounds, found.completeness_bounds), strict=True):
            assert bounds.low - 1e-9 <= number <= bounds.high + 1e-9


def test_groups_of_chance_are_of_the_same_layers_and_positions_where_there_are_such():
    graph = random_graph(4)
    features = graph.nodes.where(NodeKind.FEATURE).tolist()
    layer, pos = graph.nodes.layer.tolist(), graph.nodes.pos.tolist()
    generator = torch.Generator().manual_seed(0)
    drawn = draw_alike(graph, [0, 20], generator)
    # Twelve features of a layer at five positions: each has another at its own.
    assert sorted((layer[n], pos[n]) for n in drawn) == sorted((layer[n], pos[n]) for n in (0, 20))
    assert not {0, 20} & set(drawn) and len(set(drawn)) == 2
    most = features[: len(features) * 3 // 4]
    assert len(draw_alike(graph, most, generator)) == len(features) - len(most)
    assert sorted(draw_alike(graph, features, generator, apart=False)) == features
    assert len({tuple(draw_alike(graph, [0, 20], generator)) for _ in range(20)}) > 1


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"graph": 3}, "The graph is 3"),
        ({"among": "all"}, "among is 'all'"),
        ({"among": [999]}, "among has 999"),
        ({"among": [-1]}, "of kind logit"),
        ({"among": []}, "no feature to group"),
        ({"among": torch.ones(3, dtype=torch.bool)}, r"among is a mask of shape \[3\], and the graph has"),
        ({"n_groups": 0}, "n_groups is 0"),
        ({"n_groups": 1.5}, "n_groups is 1.5"),
        ({"similarity": 2}, "similarity is 2"),
        ({"response_weight": -1}, "response_weight is -1"),
        ({"responses": torch.zeros(3, 2)}, f"responses has 3 entries for {N_PLANTED} features"),
        ({"responses": torch.full((N_PLANTED, 1), float("nan"))}, "finite numbers"),
        ({"responses": ["a"]}, "responses has 1 entries"),
        ({"responses": 5}, "responses is 5"),
        ({"signed": "no"}, "signed is 'no'"),
        ({"across_positions": "yes"}, "across_positions is 'yes'"),
    ],
)
def test_what_cannot_be_grouped_is_refused(as_users_run_it, changed, words):
    with pytest.raises(ConfigError, match=words):
        find_supernodes(**{"graph": planted(), **changed})


def test_nodes_of_another_graph_are_refused_whoever_takes_them(tmp_path):
    """Pruning numbers nodes anew, so that a node's number is another node in the whole graph."""
    whole = planted()
    last = whole.nodes.where(NodeKind.FEATURE)[-1]
    node = replace(whole.nodes[int(last)], number=0)
    for call, error in (
        (lambda: collapse(whole, {"a": [node]}), ConfigError),
        (lambda: find_supernodes(whole, [node]), ConfigError),
        (lambda: whole.inputs(node), NodeNotFound),
        (lambda: save_neuronpedia(whole, tmp_path / "graph.json", scan="tiny", pinned=[node]), NodeNotFound),
    ):
        with pytest.raises(error, match="was taken from another graph: in this one node 0 is"):
            call()
    with pytest.raises(NodeNotFound, match="is not there"):
        whole.inputs(replace(node, number=len(whole.nodes)))
    assert collapse(whole, {"a": [whole.nodes[int(last)]]}).nodes["name"][0] == "a"


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([1], "give a mapping"),
        ({}, "one at least"),
        ({1: [0]}, "give a mapping"),
        ({"b": [0], "a": []}, "Supernode 'a' has no nodes"),
        ({"a": [0], "b": [0, 1]}, "Node 0 is in supernodes twice"),
        ({"a": [N_PLANTED]}, "of kind token"),
        ({"a": [None]}, "has None"),
        ({"a": 3}, "is 3"),
    ],
)
def test_groups_that_are_none_are_refused(as_users_run_it, groups, words):
    with pytest.raises(ConfigError, match=words):
        collapse(planted(), groups)
