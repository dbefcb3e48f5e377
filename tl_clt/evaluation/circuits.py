"""Circuits of one prompt, and what stays of the answer when all that is no part of them is ablated.

A circuit is of nodes of an attribution graph, of its edges, or of the model's own neurons. What is ablated becomes 0;
or, with a counterfactual prompt of the same length, what it is there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_clt.attribution import AttributionGraph, NodeKind
from tl_clt.attribution.edges import EdgeList, list_all_edges
from tl_clt.attribution.pruning import score_edges
from tl_clt.evaluation.neurons import NEURONS, Neurons, neuron_values, output_norms, output_weights
from tl_clt.interventions import Freeze, intervention_hooks
from tl_clt.lens import (
    CleanRun,
    FwdHook,
    HookedModel,
    block_hook,
    require_held,
    run_with_cache,
    run_with_hooks,
    user_hooks_aside,
)
from tl_clt.replacement import attach
from tl_clt.replacement.feature_acts import layer_inputs
from tl_clt.shapes import TokenBatch, Tokens
from tl_clt.transcoder import CrossLayerTranscoder

Errors = Literal["nodes", "kept", "removed"]
Metric = Literal["logit", "difference", "log_prob"]
Circuit = Int[Tensor, " _"]
"""Places of what a circuit has among all that it could have."""


class PromptTask(NamedTuple):
    """One prompt."""

    tokens: Tokens
    target: int
    other: Tokens | None
    """The counterfactual prompt."""

    against: int | None
    """The token that the target is to be told apart from, of a difference."""


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """How circuits are measured: arguments of `measure_curves`."""

    metric: Metric
    errors: Errors
    freeze: Freeze
    batch_size: int


class Measured(NamedTuple):
    """What comes of one circuit."""

    value: float
    """m of the circuit."""
    answer: bool
    """Whether the likeliest token is the model's."""


class Circuits(ABC):
    """Circuits of one prompt, each of some of `n` nodes or edges, with the others ablated.

    Args:
        model: what runs.
        task: the prompt, and what is measured on it.
        how: what is ablated to what, and what is measured.
        logits: the model's own after the last position.
    """

    n: int
    """How many nodes or edges a circuit may have."""

    def __init__(self, model: HookedModel, task: PromptTask, how: Ablation, logits: Float[Tensor, " d_vocab"]) -> None:
        self.model, self.task, self.how, self.logits = model, task, how, logits

    @abstractmethod
    def influences(self) -> Float[Tensor, " n"]:
        """How much each node or edge is said to matter to the target, whatever its sign."""

    @abstractmethod
    def magnitudes(self) -> Float[Tensor, " n"]:
        """How large each is by itself."""

    @abstractmethod
    def run(self, circuits: Sequence[Circuit]) -> Float[Tensor, "n_circuits d_vocab"]:
        """Logits after the last position, with all ablated but what is in each circuit."""

    @property
    def whole(self) -> float:
        """m of the model as it is."""
        return float(self._value(self.logits[None])[0])

    def measure(self, circuits: Sequence[Circuit]) -> list[Measured]:
        """Measure circuits, as many at once as a batch has."""
        found: list[Measured] = []
        for start in range(0, len(circuits), self.how.batch_size):
            logits = self.run(circuits[start : start + self.how.batch_size])
            answers = logits.argmax(dim=-1) == self.logits.argmax()
            found += map(Measured, self._value(logits).tolist(), answers.tolist())
        return found

    def _value(self, logits: Float[Tensor, "n d_vocab"]) -> Float[Tensor, " n"]:
        logits, task = logits.double(), self.task
        if self.how.metric == "log_prob":
            return logits.log_softmax(dim=-1)[:, task.target]
        return logits[:, task.target] - (logits.mean(dim=-1) if task.against is None else logits[:, task.against])


class Clean(NamedTuple):
    """What features and errors are on a prompt."""

    acts: Float[Tensor, "pos n_layers d_transcoder"]
    errors: Float[Tensor, "pos n_layers d_model"]
    logits: Float[Tensor, " d_vocab"]
    """After the last position."""


def _clean(model: HookedModel, clt: CrossLayerTranscoder, tokens: Tokens) -> Clean:
    with user_hooks_aside(model), attach(model, clt):
        names = {
            point: [block_hook(t, f"clt.{point}") for t in clt.layers] for point in ("hook_acts_post", "hook_error")
        }
        wanted = {name for of in names.values() for name in of}
        logits, cache = run_with_cache(model, tokens[None], lambda name: name in wanted)
        acts, errors = (torch.stack([cache[name][0] for name in of], dim=1) for of in names.values())
    return Clean(acts, errors, logits[0, -1])


class _TranscoderCircuits(Circuits):
    """Circuits of a graph, run in the model with the CLT in place of its MLPs and their errors added."""

    def __init__(
        self,
        model: HookedModel,
        clt: CrossLayerTranscoder,
        task: PromptTask,
        how: Ablation,
        graph: AttributionGraph,
    ) -> None:
        self.clt, self.graph = clt, graph
        self.here = _clean(model, clt, task.tokens)
        self.away = None if task.other is None else _clean(model, clt, task.other)
        self.ablated_acts = torch.zeros_like(self.here.acts) if self.away is None else self.away.acts
        self.ablated_errors = torch.zeros_like(self.here.errors) if self.away is None else self.away.errors
        super().__init__(model, task, how, self.here.logits)

    def _run_with(
        self, n_circuits: int, on_acts: Callable[[int], Callable], errors: Bool[Tensor, "n_circuits pos n_layers"]
    ) -> Float[Tensor, "n_circuits d_vocab"]:
        """Logits with a hook on each layer's activations, and these errors in place, others ablated."""
        model, clt, freeze = self.model, self.clt, self.how.freeze
        batch = self.task.tokens.expand(n_circuits, -1)
        hooks = [] if freeze == "none" else intervention_hooks(model, clt, batch, [], None, freeze)
        for layer in clt.layers:
            kept = errors[:, :, layer, None].to(self.here.errors.device)
            hooks.append((block_hook(layer, "clt.hook_acts_post"), on_acts(layer)))
            hooks.append((block_hook(layer, "clt.hook_error"), keep(kept, self.ablated_errors[:, layer])))
        with user_hooks_aside(model), attach(model, clt, mode="replace_with_error"):
            return run_with_hooks(model, batch, hooks)[:, -1]


class Candidates(NamedTuple):
    """Nodes of a prompt's graph that a circuit may have."""

    number: Int[Tensor, " n"]
    """Of the node in the graph."""
    layer: Int[Tensor, " n"]
    pos: Int[Tensor, " n"]
    feature: Int[Tensor, " n"]
    """-1 for errors."""


def list_candidates(graph: AttributionGraph, errors: Errors) -> Candidates:
    """The features of a graph, and with errors="nodes" its errors, at positions after 0."""
    nodes = graph.nodes
    kinds = [NodeKind.FEATURE, NodeKind.ERROR] if errors == "nodes" else [NodeKind.FEATURE]
    chosen = torch.nonzero(nodes.is_kind(*kinds) & (nodes.pos > 0)).flatten()
    feature = nodes.index[chosen].masked_fill(nodes.is_kind(NodeKind.ERROR)[chosen], -1)
    return Candidates(chosen, nodes.layer[chosen], nodes.pos[chosen], feature)


class NodeCircuits(_TranscoderCircuits):
    """Circuits of a graph's features and errors. Features above are computed anew from what the circuit leaves."""

    def __init__(
        self,
        model: HookedModel,
        clt: CrossLayerTranscoder,
        task: PromptTask,
        how: Ablation,
        graph: AttributionGraph,
    ) -> None:
        super().__init__(model, clt, task, how, graph)
        self.candidates = list_candidates(graph, how.errors)
        self.n = len(self.candidates.number)

    def influences(self) -> Float[Tensor, " n"]:
        """Influence on the target in the graph."""
        return self.graph.influence()[self.candidates.number]

    def magnitudes(self) -> Float[Tensor, " n"]:
        """How much of each node is written, or changes: activation times the norm of all its decoder vectors, or the
        norm of an error."""
        _, layer, pos, feature = self.candidates
        sizes = (self.here.errors - self.ablated_errors)[pos, layer].norm(dim=-1)
        for source in self.clt.layers:
            at = torch.nonzero((layer == source) & (feature >= 0)).flatten()
            rows = self.clt.decoder_rows(source, feature[at]).detach()
            acts = (self.here.acts - self.ablated_acts)[pos[at], source, feature[at]]
            sizes[at] = acts.abs() * rows.flatten(start_dim=1).norm(dim=1)
        return sizes

    def run(self, circuits: Sequence[Circuit]) -> Float[Tensor, "n_circuits d_vocab"]:
        """In the model itself. Features that are no nodes are ablated always."""
        acts, device = self.here.acts, self.here.acts.device
        features = torch.zeros(len(circuits), *acts.shape, dtype=torch.bool)
        errors = torch.zeros(len(circuits), *acts.shape[:2], dtype=torch.bool)
        for row, circuit in enumerate(circuits):
            layer, pos, feature = (values.cpu()[circuit] for values in self.candidates[1:])
            is_error = feature < 0
            features[row, pos[~is_error], layer[~is_error], feature[~is_error]] = True
            errors[row, pos[is_error], layer[is_error]] = True
        if self.how.errors == "kept":
            errors[:] = True
        # Position 0 stays as it is.
        features[:, 0], errors[:, 0] = True, True
        return self._run_with(
            len(circuits),
            lambda layer: keep(features[:, :, layer].to(device), self.ablated_acts[:, layer]),
            errors,
        )


class EdgeCircuits(_TranscoderCircuits):
    """Circuits of a graph's edges from features and errors at positions after 0.

    An edge that is kept means that its target sees what its source writes in the circuit; one that is not, that the
    target sees the source ablated, while other targets may see it as it is. So each feature has one activation,

        act_t = phi(pre-activation on the clean run + sum over edges s -> t of edge * (kept * carried_s - 1))
        carried_s = (act_s - ablated act_s) / (clean act_s - ablated act_s),   1 for errors

    computed from the lowest layer up, phi the CLT's own activation function among the nodes of the graph (of TopK, no
    other feature takes part). The logits are those of the model in which each feature and error writes what the edge
    from it to the target lets through. This is what runs of the model give, one for each target with its sources held
    accordingly, attention patterns and the scales of norms being held; without these held there are no edges.

    Features that were not traced have no in-edges and keep the clean run's pre-activation.
    """

    def __init__(
        self,
        model: HookedModel,
        clt: CrossLayerTranscoder,
        task: PromptTask,
        how: Ablation,
        graph: AttributionGraph,
    ) -> None:
        super().__init__(model, clt, task, how, graph)
        nodes, edges = graph.nodes, list_all_edges(graph.adjacency)
        is_error = nodes.is_kind(NodeKind.ERROR)
        sources = (nodes.is_kind(NodeKind.FEATURE) | (is_error & (how.errors != "kept"))) & (nodes.pos > 0)
        self.edges = EdgeList(*(part[sources[edges.col]] for part in edges))
        if how.errors == "removed":
            self.choices = torch.nonzero(~is_error[self.edges.col]).flatten()
        else:
            self.choices = torch.arange(len(self.edges.col), device=edges.col.device)
        self.n = len(self.choices)
        self.errors = torch.nonzero(is_error & (nodes.pos > 0)).flatten()
        self.features = torch.nonzero(nodes.is_kind(NodeKind.FEATURE) & (nodes.pos > 0)).flatten()
        at = nodes.take(self.features)
        self.clean_acts, self.ablated = (
            acts[at.pos, at.layer, at.index].to(graph.adjacency.dtype) for acts in (self.here.acts, self.ablated_acts)
        )
        self.hidden_pre = clt.hidden_pre(layer_inputs(model, clt, task.tokens[None])[0])
        self.target = nodes.where(NodeKind.LOGIT)[0]
        into_features = nodes.is_kind(NodeKind.FEATURE)[self.edges.row]
        at_layer = nodes.layer[self.edges.row]
        self.into = [torch.nonzero(into_features & (at_layer == layer)).flatten() for layer in clt.layers]
        """Edges into the features of each layer."""

    def influences(self) -> Float[Tensor, " n"]:
        """Share of the influence that runs along each edge, as pruning scores edges."""
        return score_edges(self.graph, self.edges).known[self.choices]

    def magnitudes(self) -> Float[Tensor, " n"]:
        """The edge without its sign: what the source adds to its target."""
        return self.edges.value[self.choices].abs()

    def run(self, circuits: Sequence[Circuit]) -> Float[Tensor, "n_circuits d_vocab"]:
        """In the graph up to the last features, then in the model."""
        device, nodes = self.here.acts.device, self.graph.nodes
        acts = self.ablated.repeat(len(circuits), 1)
        errors = torch.ones(len(circuits), *self.here.acts.shape[:2], dtype=torch.bool, device=device)
        into_target = self.edges.row == self.target
        if self.how.errors == "removed":
            errors[:, nodes.pos[self.errors], nodes.layer[self.errors]] = False
        for row, circuit in enumerate(circuits):
            kept = torch.zeros_like(self.edges.row, dtype=torch.bool)
            kept[self.choices[circuit.to(device)]] = True
            reaches = torch.ones_like(nodes.kind, dtype=torch.bool)
            reaches[self.edges.col[into_target]] = kept[into_target]
            through = reaches[self.features]
            acts[row, through] = self._activations(kept)[through]
            errors[row, nodes.pos[self.errors], nodes.layer[self.errors]] &= reaches[self.errors]
        return self._run_with(len(circuits), lambda layer: self._put(acts, layer), errors)

    def _activations(self, kept: Bool[Tensor, " n_edges"]) -> Float[Tensor, " n_features"]:
        """Of each feature, layer after layer."""
        nodes, edges = self.graph.nodes, self.edges
        acts, carried = self.clean_acts.clone(), torch.ones_like(nodes.activation, dtype=edges.value.dtype)
        at_layer = nodes.layer[self.features]
        for layer in self.clt.layers:
            here = torch.nonzero(at_layer == layer).flatten()
            if not len(here):
                continue
            numbers = self.features[here]
            into = self.into[layer]
            changes = edges.value[into] * (kept[into] * carried[edges.col[into]] - 1)
            change = torch.zeros_like(carried).index_add_(0, edges.row[into], changes)[numbers]
            pos, feature = nodes.pos[numbers], nodes.index[numbers]
            hidden_pre = self.hidden_pre[:, layer]
            of_nodes = torch.full_like(hidden_pre, torch.finfo(hidden_pre.dtype).min)
            of_nodes[pos, feature] = hidden_pre[pos, feature] + change.to(hidden_pre.dtype)
            acts[here] = self.clt.activate(of_nodes, layer)[pos, feature].to(acts.dtype)
            beyond = self.clean_acts[here] - self.ablated[here]
            shares = (acts[here] - self.ablated[here]) / torch.where(beyond == 0, 1, beyond)
            carried[numbers] = torch.where(beyond == 0, 1, shares)
        return acts

    def _put(self, acts: Float[Tensor, "n_circuits n_features"], layer: int) -> Callable:
        """A hook that puts activations of nodes in place, and ablates other features, but for position 0."""
        nodes = self.graph.nodes
        at = torch.nonzero(nodes.layer[self.features] == layer).flatten()
        pos, feature = nodes.pos[self.features[at]], nodes.index[self.features[at]]
        ablated = self.ablated_acts[:, layer]

        def put(x: Float[Tensor, "n_circuits pos d_transcoder"], hook: object) -> Tensor:
            out = ablated.to(x.dtype).repeat(len(x), 1, 1)
            out[:, pos, feature] = acts[:, at].to(x.dtype)
            out[:, 0] = x[:, 0]
            return out

        return put


class NeuronCircuits(Circuits):
    """Circuits of the model's own neurons at positions after 0, run in the model.

    Nodes are the neurons that are active (on either prompt, where there are two). With thresholds, what all others of
    a place write is a node as a CLT's error is: it stands or falls together, and `errors` says whether it is ranked.
    Neurons above are computed anew from what the circuit leaves.
    """

    def __init__(self, model: HookedModel, neurons: Neurons, task: PromptTask, how: Ablation) -> None:
        self.here = neuron_values(model, task.tokens[None])[0]
        away = None if task.other is None else neuron_values(model, task.other[None])[0]
        self.ablated = torch.zeros_like(self.here) if away is None else away
        either = [self.here, self.ablated]
        written = torch.stack([values != 0 for values in either]).any(dim=0)
        written[0] = False  # Position 0 stays as it is.
        self.active = written & torch.stack([values.abs() >= neurons.thresholds for values in either]).any(dim=0)
        self.rest = (written & ~self.active).any(dim=-1)
        """Places where a neuron below its threshold writes something."""
        self.nodes = torch.nonzero(self.active)
        """pos, layer and number of each neuron."""
        self.places = torch.nonzero(self.rest & (how.errors == "nodes"))
        """pos and layer of what else is a node."""
        self.n = len(self.nodes) + len(self.places)
        with torch.no_grad(), user_hooks_aside(model) as known:
            logits = run_with_hooks(model, task.tokens[None], [], known)[0, -1]
        super().__init__(model, task, how, logits)

    def influences(self) -> Float[Tensor, " n"]:
        """|d m / d neuron times what ablating the neuron takes from it|: what the first order says that it does to
        m, through all that comes after. Of what else is a node, the sum over its neurons."""
        nudges = [torch.zeros_like(of).requires_grad_() for of in self.here.unbind(dim=1)]

        def nudge(by: Tensor) -> Callable:
            return lambda x, hook: x + by

        hooks = [(block_hook(layer, NEURONS), nudge(by)) for layer, by in enumerate(nudges)]
        with torch.enable_grad():
            value = self._value(self._run(hooks, self.task.tokens[None]))[0]
            gradients = torch.stack(torch.autograd.grad(value, nudges), dim=1)
        return self._by_node(gradients * (self.here - self.ablated)).abs()

    def magnitudes(self) -> Float[Tensor, " n"]:
        """The norm of what each neuron writes, or of what changes of it; of what else is a node, of their sum."""
        changes, norms = self.here - self.ablated, output_norms(self.model)
        sizes = changes[self.nodes.unbind(dim=1)].abs() * norms[self.nodes[:, 1], self.nodes[:, 2]]
        together = (changes * ~self.active)[self.places.unbind(dim=1)]
        weights = output_weights(self.model)
        written = [values @ weights[at] for values, at in zip(together, self.places[:, 1].tolist(), strict=True)]
        return torch.cat([sizes, *(vector.norm()[None] for vector in written)])

    def run(self, circuits: Sequence[Circuit]) -> Float[Tensor, "n_circuits d_vocab"]:
        """In the model itself. Neurons that are no nodes, and belong to none, are ablated always."""
        kept = torch.zeros(len(circuits), *self.here.shape, dtype=torch.bool, device=self.here.device)
        rest = torch.zeros(len(circuits), *self.rest.shape, dtype=torch.bool, device=self.here.device)
        for row, circuit in enumerate(circuits):
            chosen = circuit.to(self.here.device)
            neurons, places = chosen[chosen < len(self.nodes)], chosen[chosen >= len(self.nodes)] - len(self.nodes)
            kept[row][self.nodes[neurons].unbind(dim=1)] = True
            rest[row][self.places[places].unbind(dim=1)] = True
        if self.how.errors == "kept":
            rest[:] = self.rest
        kept |= rest[..., None] & ~self.active
        kept[:, 0] = True
        hooks = [
            (block_hook(layer, NEURONS), keep(kept[:, :, layer], self.ablated[:, layer]))
            for layer in range(self.model.cfg.n_layers)
        ]
        return self._run(hooks, self.task.tokens.expand(len(circuits), -1))

    def _run(self, hooks: Sequence[FwdHook], batch: TokenBatch) -> Float[Tensor, "n_circuits d_vocab"]:
        """Logits after the last position with what is to be held at the values of a clean run held."""
        model = self.model
        with user_hooks_aside(model) as known:
            if self.how.freeze == "none":
                return run_with_hooks(model, batch, hooks, known)[:, -1]
            require_held(model, batch[:1])
            clean = CleanRun(model, [], self.how.freeze, known)
            return run_with_hooks(model, batch, [*clean.begin, *clean.frozen, *hooks], known)[:, -1]

    def _by_node(self, values: Float[Tensor, "pos n_layers d_mlp"]) -> Float[Tensor, " n"]:
        """Values of neurons, and sums over those that are one node together."""
        together = (values * ~self.active).sum(dim=-1)
        return torch.cat([values[self.nodes.unbind(dim=1)], together[self.places.unbind(dim=1)]])


def keep(kept: Bool[Tensor, "batch pos _"], ablated: Float[Tensor, "pos n"]) -> Callable:
    """A hook that leaves what is kept and puts other values in place of the rest.

    A plain function: TransformerLens prints each hook that it adds, and a printed partial prints its tensors.
    """

    def keep_some(x: Float[Tensor, "batch pos n"], hook: object) -> Float[Tensor, "batch pos n"]:
        return torch.where(kept, x, ablated.to(x.dtype))

    return keep_some
