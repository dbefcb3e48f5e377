"""Circuits of neurons and of edges: each equals runs of the model written out by hand."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.models import random_tokens, tiny_bridge, tiny_clt, tiny_hooked
from tests.replacement.by_hand import clean_run, run_by_hand
from tl_clt import NodeKind, attribute, frozen_hooks
from tl_clt.attribution import DifferenceTarget, TokenTarget
from tl_clt.errors import CLTMismatch, ConfigError
from tl_clt.evaluation import Neurons, find_neurons, measure_curves
from tl_clt.evaluation.circuits import Ablation, EdgeCircuits, NeuronCircuits, NodeCircuits, PromptTask

HOW = {"metric": "logit", "errors": "nodes", "freeze": "attention", "batch_size": 7}
CLOSE = 1e-9
"""float64, sums of some hundred terms of the size 1."""


@pytest.fixture(scope="module")
def model():
    return tiny_hooked("gpt2")


def some(n: int, size: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:size]


# -- neurons ---------------------------------------------------------------------------------------------


def frozen(model, tokens, freeze):
    _, cache = model.run_with_cache(tokens)
    return [] if freeze == "none" else frozen_hooks(cache, scales=freeze == "all")


def neurons_by_hand(model, tokens, kept, ablated, freeze) -> Tensor:
    """Logits at the end; kept and ablated [pos, n_layers, d_mlp]."""

    def hook(layer: int):
        def act(x, hook):
            return torch.where(kept[:, layer], x, ablated[:, layer])

        return f"blocks.{layer}.mlp.hook_post", act

    hooks = [*frozen(model, tokens, freeze), *(hook(layer) for layer in range(model.cfg.n_layers))]
    with torch.no_grad():
        return model.run_with_hooks(tokens, fwd_hooks=hooks)[0, -1]


def values_of(model, tokens) -> Tensor:
    _, cache = model.run_with_cache(tokens)
    return torch.stack([cache["post", layer][0] for layer in range(model.cfg.n_layers)], dim=1)


@pytest.mark.parametrize("freeze", ["attention", "all", "none"])
@pytest.mark.parametrize("errors", ["nodes", "kept", "removed"])
@pytest.mark.parametrize(("arch", "other"), [("gpt2", True), ("gemma", False)])
def test_every_circuit_of_neurons_equals_a_run_by_hand(arch, other, errors, freeze):
    model = tiny_hooked(arch)
    tokens = random_tokens(model, pos=6)
    away = random_tokens(model, pos=6, seed=3) if other else None
    neurons = find_neurons(model, tokens, kept=0.4)
    how = Ablation(**{**HOW, "errors": errors, "freeze": freeze})
    circuits = NeuronCircuits(model, neurons, PromptTask(tokens[0], 7, None if away is None else away[0], None), how)
    here = values_of(model, tokens)
    ablated = torch.zeros_like(here) if away is None else values_of(model, away)
    active = (here.abs() >= neurons.thresholds) | ((ablated.abs() >= neurons.thresholds) & other)
    active[0] = False
    nodes = [("neuron", *at) for at in torch.nonzero(active).tolist()]
    if errors == "nodes":
        places = [[pos, layer] for pos in range(1, 6) for layer in range(model.cfg.n_layers)]
        nodes += [("rest", *at) for at in places]
    assert circuits.n == len(nodes)
    chosen = [some(len(nodes), size, size) for size in (0, 1, 40, len(nodes) - 3, len(nodes))]
    for circuit, logits in zip(chosen, circuits.run(chosen), strict=True):
        kept = torch.zeros_like(active)
        kept[0] = True
        for kind, pos, layer, *number in (nodes[i] for i in circuit.tolist()):
            if kind == "neuron":
                kept[pos, layer, number[0]] = True
            else:
                kept[pos, layer] |= ~active[pos, layer]
        if errors == "kept":
            kept |= ~active
        by_hand = neurons_by_hand(model, tokens, kept, ablated, freeze)
        assert torch.allclose(logits, by_hand, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("metric", ["logit", "log_prob", "difference"])
@pytest.mark.parametrize(("arch", "freeze"), [("gpt2", "attention"), ("llama", "none"), ("gemma", "all")])
def test_influence_of_neurons_is_their_effect_to_the_first_order(arch, freeze, metric):
    """Against the difference of two runs in which one neuron is moved a little; the rest of a place all together."""
    model = tiny_hooked(arch)
    tokens = random_tokens(model, pos=4)
    away = random_tokens(model, pos=4, seed=3) if metric == "difference" else None
    neurons = find_neurons(model, tokens, kept=0.5)
    how = Ablation(**{**HOW, "freeze": freeze, "metric": metric})
    task = PromptTask(tokens[0], 7, None if away is None else away[0], 9 if metric == "difference" else None)
    circuits = NeuronCircuits(model, neurons, task, how)
    here = values_of(model, tokens)
    lost = here - (0 if away is None else values_of(model, away))
    influences = circuits.influences()

    def measure(moved: Tensor) -> float:
        def hook(layer: int):
            return f"blocks.{layer}.mlp.hook_post", lambda x, hook: x + moved[:, layer]

        hooks = [*frozen(model, tokens, freeze), *(hook(layer) for layer in range(model.cfg.n_layers))]
        with torch.no_grad():
            logits = model.run_with_hooks(tokens, fwd_hooks=hooks)[0, -1]
        if metric == "log_prob":
            return float(logits.log_softmax(dim=-1)[7])
        return float(logits[7] - (logits[9] if metric == "difference" else logits.mean()))

    n_neurons = len(circuits.nodes)
    for at in [*some(n_neurons, 12, 0).tolist(), *range(n_neurons, circuits.n, 3)]:
        moved = torch.zeros_like(here)
        if at < n_neurons:
            place = tuple(circuits.nodes[at].tolist())
            moved[place] = lost[place]
        else:
            place = tuple(circuits.places[at - n_neurons].tolist())
            moved[place] = lost[place] * ~circuits.active[place]
        slope = (measure(1e-4 * moved) - measure(-1e-4 * moved)) / 2e-4
        # The third order of the difference, 1e-8, and rounding of logits, 1e-14 / 1e-4.
        assert float(influences[at]) == pytest.approx(abs(slope), abs=1e-7)


def test_of_a_model_in_which_one_neuron_writes_it_is_the_circuit():
    model = tiny_hooked("gpt2")
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.W_out[:] = 0
        model.blocks[2].mlp.W_out[7] = 3 * model.W_U[:, 5]
    tokens = random_tokens(model, pos=6)
    how = Ablation(**HOW)
    circuits = NeuronCircuits(model, find_neurons(model, tokens), PromptTask(tokens[0], 5, None, None), how)
    influences = circuits.influences()
    assert circuits.nodes[int(influences.argmax())].tolist() == [5, 2, 7]
    assert int((influences > 1e-12).sum()) == 1
    # The one writes the same amount at each position; no other anything.
    magnitudes = circuits.magnitudes()
    assert {tuple(circuits.nodes[i].tolist())[1:] for i in torch.nonzero(magnitudes).flatten()} == {(2, 7)}
    one = 1 / circuits.n
    report = measure_curves(model, find_neurons(model, tokens), tokens, [5], shares=(one, 1.0), progress=False)
    first = report.curves.query("share < 1").set_index("ranking")
    assert first.loc["influence", "faithfulness"] == pytest.approx(1.0, abs=CLOSE)
    assert report.areas.set_index("ranking").loc["influence", "n_for_90"] == 1


def test_magnitudes_of_neurons_are_norms_of_what_they_write(model):
    tokens, away = random_tokens(model, pos=5), random_tokens(model, pos=5, seed=3)
    task = PromptTask(tokens[0], 7, away[0], None)
    circuits = NeuronCircuits(model, find_neurons(model, tokens, kept=0.3), task, Ablation(**HOW))
    changes = values_of(model, tokens) - values_of(model, away)
    magnitudes = circuits.magnitudes()
    for i, (pos, layer, number) in enumerate(circuits.nodes.tolist()):
        written = changes[pos, layer, number] * model.blocks[layer].mlp.W_out[number]
        assert float(magnitudes[i]) == pytest.approx(float(written.detach().norm()), abs=CLOSE)
    for i, (pos, layer) in enumerate(circuits.places.tolist(), start=len(circuits.nodes)):
        written = (changes[pos, layer] * ~circuits.active[pos, layer]) @ model.blocks[layer].mlp.W_out
        assert float(magnitudes[i]) == pytest.approx(float(written.detach().norm()), abs=CLOSE)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_neurons_of_bridges(family, tmp_path):
    """All of them are the model, none of them leaves the MLPs' biases."""
    model = tiny_bridge(family, tmp_path, exact=True)
    tokens = random_tokens(model, pos=5)
    neurons = find_neurons(model, tokens, kept=0.5)
    report = measure_curves(model, neurons, tokens, [7], shares=(0.5, 1.0), rankings="influence", progress=False)
    assert report.areas["whole"].iloc[0] == pytest.approx(1.0, abs=1e-6)
    circuits = NeuronCircuits(model, neurons, PromptTask(tokens[0], 7, None, None), Ablation(**HOW))

    def silence(x, hook):
        out = 0 * x
        out[:, 0] = x[:, 0]
        return out

    hooks = [(f"blocks.{layer}.mlp.out.hook_in", silence) for layer in range(model.cfg.n_layers)]
    with torch.no_grad():
        by_hand = model.run_with_hooks(tokens, fwd_hooks=[*frozen(model, tokens, "attention"), *hooks])[0, -1]
    assert torch.allclose(circuits.run([torch.arange(0)])[0], by_hand, rtol=0, atol=1e-6)


def test_neurons_stand_beside_transcoders(model):
    tokens = random_tokens(model, batch=2, pos=5)
    judged = {"CLT": tiny_clt(model), "neurons": find_neurons(model, tokens)}
    report = measure_curves(model, judged, tokens, shares=(0.1, 0.5, 1.0), progress=False)
    assert report.table["transcoder"].unique().tolist() == ["CLT", "neurons"]
    assert report.areas["whole"].tolist() == pytest.approx([1.0] * 6, abs=1e-6)
    n_nodes = report.areas.groupby("transcoder")["n_nodes"].first()
    assert n_nodes["neurons"] == 4 * model.cfg.n_layers * model.cfg.d_mlp  # gelu is 0 nowhere
    assert {axes.get_title() for axes in report.plot("curves").axes} == {
        f"{name}, 2 prompts, {n:,.0f} nodes each" for name, n in n_nodes.items()
    }
    [axes] = report.plot("numbers").axes
    assert axes.get_xlabel() == "number of nodes kept (mean over prompts)"


def test_neurons_of_another_model_or_with_edges_are_refused(model):
    tokens = random_tokens(model, pos=5)
    with pytest.raises(CLTMismatch, match=r"has \[3, 64\] \(layers by neurons\)"):
        measure_curves(model, Neurons(torch.zeros(2, 5)), tokens)
    with pytest.raises(ConfigError, match="Neurons have no graph"):
        measure_curves(model, find_neurons(model, tokens), tokens, level="edges")


# -- edges -----------------------------------------------------------------------------------------------


class EdgesByHand:
    """Path patching in the model: one run for each target, with each source held at what the target sees of it."""

    def __init__(self, model, clt, tokens, graph, errors, other=None) -> None:
        self.model, self.clt, self.tokens, self.graph = model, clt, tokens, graph
        clean = clean_run(model, clt, tokens)
        self.acts, self.errors = clt.encode(clean.inputs), clean.mlp_outs - self._recons(clean)
        self.hidden_pre = torch.stack([clt.encode_layer(clean.inputs[..., t, :], t)[1] for t in clt.layers], dim=-2)
        self.acts_there, self.errors_there = torch.zeros_like(self.acts), torch.zeros_like(self.errors)
        if other is not None:
            there = clean_run(model, clt, other)
            self.acts_there, self.errors_there = clt.encode(there.inputs), there.mlp_outs - self._recons(there)
        self.hooks = frozen(model, tokens, "all")
        self.how = errors

    def _recons(self, clean) -> Tensor:
        return self.clt.decode(self.clt.encode(clean.inputs), clean.inputs)

    def seen_by(self, target: int, kept: set[tuple[int, int]], acts: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and pre-activations where each source writes what the target sees of it."""
        nodes, seen, left = self.graph.nodes, self.acts_there.clone(), self.errors_there.clone()
        seen[:, 0], left[:, 0] = self.acts[:, 0], self.errors[:, 0]
        if self.how == "kept":
            left = self.errors
        for source in range(len(nodes)):
            if (target, source) in kept:
                kind, layer, pos, index = (int(x[source]) for x in (nodes.kind, nodes.layer, nodes.pos, nodes.index))
                if kind == NodeKind.FEATURE:
                    seen[0, pos, layer, index] = acts[0, pos, layer, index]
                else:
                    left[0, pos, layer] = self.errors[0, pos, layer]
        inputs: dict[int, Tensor] = {}

        def read(x, hook):
            inputs[int(hook.name.split(".")[1])] = x

        reads = [(f"blocks.{t}.{self.clt.cfg.input_hook}", read) for t in self.clt.layers]
        logits = run_by_hand(
            self.model, self.clt, self.tokens, errors=left, edit=lambda _, layer: seen[..., layer, :],
            hooks=[*self.hooks, *reads],
        )  # fmt: skip
        hidden_pre = torch.stack([self.clt.encode_layer(inputs[t], t)[1] for t in self.clt.layers], dim=-2)
        return logits[0, -1], hidden_pre

    def logits(self, kept: set[tuple[int, int]]) -> Tensor:
        nodes, acts = self.graph.nodes, self.acts.clone()
        features = torch.nonzero(nodes.is_kind(NodeKind.FEATURE) & (nodes.pos > 0)).flatten()
        for layer in self.clt.layers:
            at = [int(i) for i in features if nodes.layer[i] == layer]
            only = torch.full_like(acts[0, :, layer], -1e6)
            for i in at:
                pos, index = int(nodes.pos[i]), int(nodes.index[i])
                only[pos, index] = self.seen_by(i, kept, acts)[1][0, pos, layer, index]
            phi = self.clt.activate(only, layer)
            for i in at:
                acts[0, int(nodes.pos[i]), layer, int(nodes.index[i])] = phi[int(nodes.pos[i]), int(nodes.index[i])]
        return self.seen_by(int(nodes.where(NodeKind.LOGIT)[0]), kept, acts)[0]


def chosen_edges(circuits: EdgeCircuits, circuit: Tensor) -> set[tuple[int, int]]:
    at = circuits.choices[circuit]
    return set(zip(circuits.edges.row[at].tolist(), circuits.edges.col[at].tolist(), strict=True))


@pytest.mark.parametrize(
    ("arch", "activation", "options", "contrast", "errors"),
    [
        ("gpt2", "jumprelu", {}, False, "nodes"),
        ("gpt2", "jumprelu", {}, False, "kept"),
        ("gpt2", "jumprelu", {"skip": True}, True, "nodes"),
        ("gpt2", "topk", {"span": 1}, True, "removed"),
        ("llama", "topk", {}, False, "nodes"),
    ],
)
def test_every_circuit_of_edges_equals_a_run_for_each_target(arch, activation, options, contrast, errors):
    model = tiny_hooked(arch)
    clt = tiny_clt(model, activation=activation, d_transcoder=12, l0=3, **options)
    tokens = random_tokens(model, pos=4)
    other = random_tokens(model, pos=4, seed=3) if contrast else None
    task = PromptTask(tokens[0], 7, None if other is None else other[0], 9 if contrast else None)
    target = DifferenceTarget(7, 9) if contrast else TokenTarget(7)
    graph = attribute(model, clt, tokens[0], [target], contrast=task.other, progress=False)
    circuits = EdgeCircuits(model, clt, task, Ablation(**{**HOW, "errors": errors, "freeze": "all"}), graph)
    by_hand = EdgesByHand(model, clt, tokens, graph, errors, other)
    n = circuits.n
    chosen = [torch.arange(0), some(n, n // 3, 1), some(n, 2 * n // 3, 2), torch.arange(n)]
    moved = [(circuits._activations(kept_mask(circuits, c)) - circuits.clean_acts).abs().max() for c in chosen]
    assert moved[1] > 1e-3  # features do change
    for circuit, logits in zip(chosen, circuits.run(chosen), strict=True):
        assert torch.allclose(logits, by_hand.logits(chosen_edges(circuits, circuit)), rtol=0, atol=CLOSE)
    with torch.no_grad():
        is_model = torch.allclose(circuits.run(chosen[-1:])[0], model(tokens)[0, -1], rtol=0, atol=CLOSE)
    assert is_model == (errors != "removed")


def kept_mask(circuits: EdgeCircuits, circuit: Tensor) -> Tensor:
    kept = torch.zeros(len(circuits.edges.row), dtype=torch.bool)
    kept[circuits.choices[circuit]] = True
    return kept


def all_edges_from_some_nodes(model, clt, errors) -> tuple[Tensor, Tensor]:
    """Logits of circuits of nodes, and of all edges from them."""
    tokens = random_tokens(model, pos=6)
    task, how = PromptTask(tokens[0], 7, None, None), Ablation(**{**HOW, "errors": errors, "freeze": "all"})
    graph = attribute(model, clt, tokens[0], [TokenTarget(7)], progress=False)
    of_nodes, of_edges = NodeCircuits(model, clt, task, how, graph), EdgeCircuits(model, clt, task, how, graph)
    chosen = [some(of_nodes.n, size, size) for size in (0, 3, 20, of_nodes.n)]
    sources = [of_nodes.candidates.number[circuit] for circuit in chosen]
    edges = [torch.nonzero(torch.isin(of_edges.edges.col[of_edges.choices], of)).flatten() for of in sources]
    assert all(len(fewer) < len(more) for fewer, more in pairwise(edges))
    with torch.no_grad():
        return of_nodes.run(chosen), of_edges.run(edges)


@pytest.mark.parametrize("errors", ["nodes", "kept", "removed"])
def test_all_edges_from_some_nodes_are_the_circuit_of_these_nodes(model, errors):
    """Of JumpReLU, where no feature stands in another's way."""
    nodes, edges = all_edges_from_some_nodes(model, tiny_clt(model), errors)
    assert torch.allclose(nodes, edges, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_edges_of_bridges(family, tmp_path):
    model = tiny_bridge(family, tmp_path, exact=True)
    nodes, edges = all_edges_from_some_nodes(model, tiny_clt(model), "nodes")
    assert torch.allclose(nodes, edges, rtol=0, atol=1e-6)  # norms keep some of float32's rounding


def test_edges_are_ranked_as_pruning_ranks_them_or_by_their_size(model):
    clt, tokens = tiny_clt(model), random_tokens(model, pos=5)
    graph = attribute(model, clt, tokens[0], [TokenTarget(7)], progress=False)
    how = Ablation(**{**HOW, "freeze": "all"})
    circuits = EdgeCircuits(model, clt, PromptTask(tokens[0], 7, None, None), how, graph)
    size, visits = graph.adjacency.abs(), graph.influence()
    visits[graph.nodes.where(NodeKind.LOGIT)] = graph.logit_probs
    row, col = circuits.edges.row[circuits.choices], circuits.edges.col[circuits.choices]
    by_hand = size[row, col] / size.sum(dim=1)[row] * visits[row]
    assert torch.allclose(circuits.influences(), by_hand, rtol=1e-9)
    assert torch.equal(circuits.magnitudes(), size[row, col])
    is_source = graph.nodes.is_kind(NodeKind.FEATURE, NodeKind.ERROR) & (graph.nodes.pos > 0)
    assert circuits.n == int((graph.adjacency[:, is_source] != 0).sum())


def test_features_that_were_not_traced_stay_what_they_are(model):
    clt, tokens = tiny_clt(model), random_tokens(model, pos=5)
    graph = attribute(model, clt, tokens[0], [TokenTarget(7)], max_feature_nodes=5, progress=False)
    how = Ablation(**{**HOW, "freeze": "all"})
    circuits = EdgeCircuits(model, clt, PromptTask(tokens[0], 7, None, None), how, graph)
    acts = circuits._activations(kept_mask(circuits, torch.arange(0)))
    traced = graph.expanded[circuits.features]
    assert torch.equal(acts[~traced], circuits.clean_acts[~traced])
    assert not torch.allclose(acts[traced], circuits.clean_acts[traced])


def test_curves_of_edges(model):
    clt, tokens = tiny_clt(model), random_tokens(model, batch=2, pos=5)
    quick = {"shares": (0.05, 0.3, 1.0), "progress": False}
    edges = measure_curves(model, clt, tokens, level="edges", **quick)
    nodes = measure_curves(model, clt, tokens, freeze="all", **quick)
    assert (edges.info["level"], edges.info["freeze"], nodes.info["level"]) == ("edges", "all", "nodes")
    assert edges.areas["whole"].tolist() == pytest.approx([1.0] * 3, abs=CLOSE)
    # None kept is the same circuit either way.
    assert np.allclose(edges.table["measure_empty"], nodes.table["measure_empty"], atol=CLOSE)
    assert (edges.table["n_nodes"] > nodes.table["n_nodes"]).all()
    [axes] = edges.plot().axes
    assert axes.get_xlabel() == "share of edges kept"


@pytest.mark.parametrize("freeze", ["attention", "none"])
def test_edges_are_measured_with_all_held(model, freeze):
    with pytest.raises(ConfigError, match="freeze is .*Give freeze='all', or leave it out"):
        measure_curves(model, tiny_clt(model), random_tokens(model), level="edges", freeze=freeze)
