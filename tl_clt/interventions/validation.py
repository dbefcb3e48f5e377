"""`validate`: a graph's predictions against interventions, beside those of CLTs of chance.

Feature nodes s are changed one at a time, multiplied by `scale` at their position, in three kinds of intervention,
whose numbers stand side by side and are never mixed:

- constrained: all MLP outputs are held but for what s itself writes (`through_layer` the last layer). What the graph
  predicts of a target t is `(scale - 1) E[t, s]`, column `edge`. With `freeze="all"` this is exact.
- iterative: features in between react. What the graph predicts is `(scale - 1) T[t, s]`, column `total`, where T sums
  over all paths of traced features, each feature passing on in proportion to its activation. With `freeze="all"` this
  is exact as long as no feature switches on or off.
- model: nothing is held but what `freeze` says. What s writes is changed, `(scale - 1) activation W_dec[s -> l]` added
  behind each block l, and the model's own MLPs react. It is predicted as the iterative kind.

The first two hold for any CLT, also for a random one: its errors are added back and stay, so that its graph is as much
a linearisation of what is measured as that of a good one, and no MLP of the model ever reacts. The third asks whether
the features in between are the model's: for a CLT that is exactly the model's MLPs it measures the same as the second.
In each the same is measured, on the same prompt, with a random CLT and with the given one's decoders shuffled
(`baseline_clt` says how they are made): column `clt`. What the given CLT does not do better than these says nothing of
its features.

Targets are all target nodes of the graph (`measured_at` "logit"; `target_kind` says whether a token, a difference, a
feature or a direction), and its traced features (`measured_at` "feature"), in later layers at the same position or
later. `change` is the measured change of t, as what it is: for features of the pre-activation, for tokens of the logit
less the mean logit, for differences of two tokens' logits, for directions of the residual stream along them, at their
hook; logits as the model gives them (after a soft-cap, if it has one, which graphs leave out). `act_change` is that
of a traced feature's activation, which differs where it switches off. Relative effects are |change| (or |act_change|)
over the target's own activation, or height, in the clean run. Features that are active only in the changed run are in
no graph; `switched_on` is how many there are.

`influence` is the unsigned one that pruning goes by: `graph.influence()` of s for the graph's targets
(`source_influence`, with the targets' weights made to sum to 1), and B[t, s] for features. It is compared with the
relative effect: for the graph's targets their mean, weighed as influence weighs them (`weight`: tokens by their
probability, others by 1, made to sum to 1; 0 where s lies above a target), for features |act_change| / activation, as
in the paper's figure of 0.72 (Spearman).

`source_size` is how much s writes: its activation times the norm of all its decoder vectors together.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from pandas import DataFrame, concat
from torch import Tensor, nn
from tqdm.auto import tqdm

from tl_clt.arguments import as_choice, as_number, as_seed, as_switch, as_whole, shown
from tl_clt.attribution import (
    AttributionGraph,
    DifferenceTarget,
    DirectionTarget,
    FeatureTarget,
    NodeKind,
    TokenTarget,
    attribute,
)
from tl_clt.attribution.edges import Nodes as GraphNodes
from tl_clt.attribution.edges import sum_inputs_from, take_rows
from tl_clt.attribution.influence import sum_inputs, top_down
from tl_clt.attribution.targets import NamedTarget
from tl_clt.errors import CLTMismatch, ConfigError, MemoryLimit, TargetError
from tl_clt.interventions.intervene import Acts, InterventionEffect, intervene
from tl_clt.interventions.intervention import DirectionIntervention, Intervention
from tl_clt.interventions.validation_report import BASELINES, Baseline, ValidationReport, interval_note
from tl_clt.lens import Freeze, HookedModel, model_name, norm_map, run_with_cache, user_hooks_aside
from tl_clt.machine import GIB, free_memory
from tl_clt.replacement import check_fit, layer_inputs
from tl_clt.shapes import NodeValues, Tokens
from tl_clt.transcoder import CrossLayerTranscoder
from tl_clt.transcoder.decoders import DenseDecoders

InterventionKind = Literal["constrained", "iterative", "model"]
KINDS: tuple[InterventionKind, ...] = ("constrained", "iterative", "model")
TARGET_KINDS = {TokenTarget: "token", DifferenceTarget: "difference", FeatureTarget: "feature"}
LOGITS_AT_ONCE = 2**26
"""Logits of one pass: 256 MiB in float32."""
Effects = Float[Tensor, "n_sources n_targets"]
STRATA = (0.5, 0.8, 0.95, 1.0)
"""Strata end where the most influential features together carry these shares of all features' influence."""
ALIKE = 3
"""Controls are drawn from this many features of the most similar activation."""
Nodes = Int[Tensor, " n_sources"]
ByNode = Float[Tensor, "n_nodes n_sources"]
ROWS_AT_ONCE = 256
"""Rows of the graph that are dense in memory at a time."""
Inputs = Float[Tensor, "n_inputs n_layers d_model"]
Draw = Callable[..., Tensor]
"""Normal random numbers of a shape, in the CLT's dtype and on its device."""


class Measured(NamedTuple):
    """What changed at the targets."""

    change: Effects
    """Of a feature's pre-activation, a logit less the mean logit, a difference of logits, or along a direction."""
    act_change: Effects
    """Of a traced feature's activation; for the graph's targets the same as `change`."""
    switched_on: Float[Tensor, " n_sources"]
    """How many features, at all positions, are active only with the source changed."""


@torch.no_grad()
def validate(
    graph: AttributionGraph,
    model: HookedModel,
    clt: CrossLayerTranscoder,
    n_features: int | None = 64,
    scale: float = 0.0,
    freeze: Freeze = "attention",
    threshold: float = 0.01,
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
    baselines: Sequence[Baseline] = BASELINES,
) -> ValidationReport:
    """Change features of a graph one at a time, and compare what follows with what the graph predicts.

    Tested are features drawn evenly from four strata of influence (`STRATA`: those that carry the first half of all
    features' influence, up to 80%, up to 95%, the rest), and controls: for each of the first stratum another feature of
    the same layer and a similar activation, at the same position where there are some, whatever its influence. What is
    measured and what it is compared with stands at the head of this module.

    The same is then done with CLTs of chance (`baseline_clt`): the prompt is traced with them as the given graph was
    (same targets, options and at most as many features), and features of these graphs are drawn in the same way. That
    takes as long again for each, and their decoders' memory.

    Hooks of the user's are set aside.

    Args:
        graph: of this model and CLT, with targets of any kind; not a contrastive one.
        n_features: how many to test, controls not counted; None for all.
        scale: of the changed features; 0 ablates.
        freeze: what is held at the clean run's values, as for `intervene`.
        threshold: from which relative effect (or influence) on something counts as predicted, or seen.
        batch_size: features in one pass; None for as many as make 256 MiB of logits, at most 64.
        seed: of the draw.
        progress: show a bar where it takes longer than 2 s.
        baselines: which CLTs of chance to hold beside this one; () for none, which the report then says.

    Raises:
        ConfigError: an argument out of range; a graph that is contrastive, or has no feature with influence.
        TargetError: the graph does not tell what its targets are.
        CLTMismatch: the graph is of another model or CLT.
        MemoryLimit: a baseline does not fit.
        AlreadyAttached: baselines are wanted of a model in which a CLT stands.
        HookNotFound, InterventionError: as for `intervene`.
    """
    if not isinstance(graph, AttributionGraph):
        raise ConfigError(f"The graph is {shown(graph)}: give an AttributionGraph, then its model and CLT.")
    check_fit(model, clt)
    n_features, batch_size = (
        as_whole(name, n, 1, none=none)
        for name, n, none in (("n_features", n_features, "all"), ("batch_size", batch_size, "as many as fit"))
    )
    scale, threshold = as_number("scale", scale), as_number("threshold", threshold, above=0)
    seed, progress = as_seed("seed", seed), as_switch("progress", progress)
    freeze = as_choice("freeze", freeze, get_args(Freeze))
    require_testable(graph, scale)
    if isinstance(baselines, str) or len(set(baselines)) < len(baselines) or not set(baselines) <= set(BASELINES):
        raise ConfigError(f"baselines is {baselines!r}: give some of {BASELINES}, each once, or () for none.")
    named = targets_of(graph)
    sample = sample_features(graph, n_features, seed)
    if len(sample.node) == 0:
        raise ConfigError("The graph has no feature with any influence on its targets to test.")
    rows = batch_size or max(1, min(64, LOGITS_AT_ONCE // (len(graph.tokens) * model.cfg.d_vocab)))
    tables = []
    for which, its_graph, its_clt in _with_baselines(graph, model, clt, named, baselines, seed, progress):
        its_sample = sample if which == "given" else sample_features(its_graph, n_features, seed)
        measure = _Measurement(its_graph, model, its_clt, named, scale, freeze)
        tables += [table.assign(clt=which) for table in _measured_tables(measure, its_sample, rows, progress, which)]
    controls = int((sample.control_of >= 0).sum())
    info = {
        "model_name": model_name(model),
        "clt_model_name": clt.cfg.model_name,
        "prompts": [graph.info.get("prompt", " ".join(graph.prompt_tokens))],
        "scale": scale,
        "freeze": freeze,
        "seed": seed,
        "n_features": len(sample.node) - controls,
        "n_controls": controls,
        "baselines": list(baselines),
        "intervals": interval_note(1),
    }
    return ValidationReport(measurements=concat(tables, ignore_index=True), threshold=threshold, info=info)


def require_testable(graph: AttributionGraph, scale: float) -> None:
    """Raise unless what a graph predicts can be held against features multiplied by a number.

    Raises:
        ConfigError: the number changes nothing, or the graph is contrastive.
    """
    if scale == 1:
        raise ConfigError(f"scale is {scale}: give a finite number other than 1, which changes nothing.")
    if graph.contrast_activation is not None:
        raise ConfigError(
            "The graph is contrastive: its edges are differences of two prompts, which no change of a feature on one"
            " prompt shows. Give a graph traced without contrast."
        )


def targets_of(graph: AttributionGraph) -> list[NamedTarget]:
    """What each target node of a graph is.

    Raises:
        TargetError: the graph does not say it: graphs of older files name no tokens of differences, and no directions.
    """
    if graph.targets is not None:
        return graph.targets
    nodes = graph.nodes.take(graph.nodes.where(NodeKind.LOGIT))
    n_layers = graph.info.get("n_layers")
    if n_layers is None or bool((nodes.index < 0).any()):
        raise TargetError(
            "The graph does not tell what its targets are, as graphs saved by an earlier version: differences and"
            " directions cannot be measured. Trace the prompt again."
        )
    at = zip(nodes.layer.tolist(), nodes.pos.tolist(), nodes.index.tolist(), strict=True)
    # Feature targets are target nodes of a lower layer.
    return [TokenTarget(i, pos) if layer == n_layers else FeatureTarget(layer, i, pos) for layer, pos, i in at]


def _with_baselines(
    graph: AttributionGraph,
    model: HookedModel,
    clt: CrossLayerTranscoder,
    targets: list[NamedTarget],
    baselines: Sequence[Baseline],
    seed: int,
    progress: bool,
) -> Iterator[tuple[str, AttributionGraph, CrossLayerTranscoder]]:
    """The given graph and CLT, then those of chance, traced as the given graph was."""
    yield "given", graph, clt
    features = graph.nodes.where(NodeKind.FEATURE)
    n_traced = graph.info.get("n_traced_features", int(graph.expanded[features].sum()))
    all_traced = n_traced >= graph.info.get("n_active_features", len(features))
    for which in baselines:
        its_clt = baseline_clt(which, model, clt, graph.tokens, seed)
        traced = attribute(
            model,
            its_clt,
            graph.tokens,
            targets=targets,
            max_feature_nodes=None if all_traced else n_traced,
            bos=graph.info["bos"],
            bias_nodes=graph.info["bias_nodes"],
            keep_edges=graph.info.get("keep_edges"),
            progress=progress,
        )
        if "node_threshold" in graph.info:
            traced = traced.prune(graph.info["node_threshold"], graph.info["edge_threshold"])
        yield which, traced, its_clt


class _Measurement:
    """Interventions on several feature nodes in one pass, one in each row of a batch of the same prompt."""

    def __init__(
        self,
        graph: AttributionGraph,
        model: HookedModel,
        clt: CrossLayerTranscoder,
        named: list[NamedTarget],
        scale: float,
        freeze: Freeze,
    ) -> None:
        self.graph, self.model, self.clt, self.named = graph, model, clt, named
        self.scale = scale
        self.freeze: Freeze = freeze
        nodes = graph.nodes
        everywhere = nodes.take(nodes.where(NodeKind.FEATURE))
        if not bool(((everywhere.layer < clt.cfg.n_layers) & (everywhere.index < clt.cfg.d_transcoder)).all()):
            raise _mismatch("features that this CLT does not have")
        features = nodes.where(NodeKind.FEATURE)
        traced = features[graph.expanded[features]]
        self.features = nodes.take(traced)
        self.targets: Int[Tensor, " n_targets"] = torch.cat([traced, nodes.where(NodeKind.LOGIT)])
        """Traced features, then the graph's targets."""
        self.kinds = ["feature"] * len(traced) + [TARGET_KINDS.get(type(t), "direction") for t in named]
        self.scales: Mapping[str, Tensor] = {}
        """Of norms behind the MLPs, once they are needed."""
        self.hooks = list(dict.fromkeys(t.hook for t in named if isinstance(t, DirectionTarget)))

    def __call__(self, sources: Int[Tensor, " n"], kind: InterventionKind) -> Measured:
        changes = self._written(sources) if kind == "model" else self._changes(sources)
        tokens = self.graph.tokens.expand(len(sources), -1)
        through = {"constrained": self.clt.cfg.n_layers - 1, "iterative": None, "model": -1}[kind]
        bos = None if kind == "iterative" else self.graph.info.get("bos")
        effect = intervene(self.model, self.clt, tokens, changes, through, self.freeze, record=self.hooks, bos=bos)
        require_same_features(self.features, effect)
        hidden_change = effect.hidden_pre - effect.baseline_hidden_pre
        features = self.features
        places = (slice(None), features.pos, features.layer, features.index)
        pre = hidden_change[places]
        acts = (effect.feature_acts - effect.baseline_feature_acts)[places]
        heights = torch.stack([change_of_target(effect, hidden_change, target) for target in self.named], dim=1)
        on = ((effect.baseline_feature_acts == 0) & (effect.feature_acts != 0)).flatten(1).sum(dim=1)
        change, act_change = (torch.cat([x.double(), heights], dim=1).cpu() for x in (pre, acts))
        return Measured(change, act_change, on.double().cpu())

    def _changes(self, sources: Int[Tensor, " n"]) -> list[Intervention]:
        at = self.graph.nodes.take(sources)
        places = zip(at.layer.tolist(), at.pos.tolist(), at.index.tolist(), strict=True)
        return [
            Intervention(layer=layer, pos=pos, feature=feature, scale=self.scale, prompt=row)
            for row, (layer, pos, feature) in enumerate(places)
        ]

    def _written(self, sources: Int[Tensor, " n"]) -> list[DirectionIntervention]:
        """What the changed features write less, or more, into the residual stream behind each block."""
        at = self.graph.nodes.take(sources)
        interventions = []
        for row, (layer, pos) in enumerate(zip(at.layer.tolist(), at.pos.tolist(), strict=True)):
            by = (self.scale - 1) * at.activation[row]
            vectors = self.clt.decoder_rows(layer, at.index[row : row + 1])[0].detach() * by
            for block, vector in zip(self.clt.cfg.targets(layer), vectors, strict=True):
                in_stream = self._in_stream(vector, block, pos)
                if bool(in_stream.any()):
                    interventions.append(
                        DirectionIntervention(layer=block, pos=pos, vector=in_stream, add=1, prompt=row)
                    )
        return interventions

    def _in_stream(self, vector: Float[Tensor, " d_model"], block: int, pos: int) -> Float[Tensor, " d_model"]:
        """What a vector at the CLT's output hook is in the residual stream, through the norm behind it if there is one,
        with its scale as in the clean run."""
        name = f"blocks.{block}.ln2_post"
        norm = norm_map(self.model, name) if self.clt.cfg.output_hook == "mlp.hook_out" else None
        if norm is None:
            return vector
        if not self.scales:
            with user_hooks_aside(self.model):
                self.scales = dict(run_with_cache(self.model, self.graph.tokens[None], _is_scale_behind)[1].items())
        centred = vector - vector.mean() if norm.centred else vector
        scaled = centred / self.scales[f"{name}.hook_scale"][0, pos].to(vector)
        return scaled if norm.gain is None else scaled * norm.gain.to(vector)


def require_same_features(features: GraphNodes, effect: InterventionEffect) -> None:
    """Raise unless features are active on the prompt of an effect as they are in their graph.

    Raises:
        CLTMismatch: they are not.
    """
    acts = effect.baseline_feature_acts[0]
    if bool(((features.layer >= acts.shape[1]) | (features.index >= acts.shape[2])).any()):
        raise _mismatch("features that this CLT does not have")
    here = acts[features.pos, features.layer, features.index].to(features.activation.dtype)
    if not torch.allclose(here, features.activation, rtol=1e-2, atol=1e-3):
        raise _mismatch("features with other activations on its prompt")


def change_of_target(effect: InterventionEffect, hidden_change: Acts, target: NamedTarget) -> Float[Tensor, " batch"]:
    """The change of a target, in the terms of its kind: see the head of this module.

    Args:
        effect: which recorded the hooks of directions.
        hidden_change: of pre-activations.
        target: of a graph.
    """
    if isinstance(target, FeatureTarget):
        return hidden_change[:, target.pos, target.layer, target.feature].double()
    if isinstance(target, DirectionTarget):
        recorded = effect.recorded[target.hook]
        change = (recorded.value - recorded.baseline)[:, target.pos].double()
        return change @ torch.as_tensor(target.direction).to(change)
    after, before = (logits[:, target.pos].double() for logits in (effect.logits, effect.baseline_logits))
    if isinstance(target, DifferenceTarget):
        return (after - before)[:, int(target.plus)] - (after - before)[:, int(target.minus)]
    return (after - before)[:, int(target.token)] - (after - before).mean(dim=-1)


def _is_scale_behind(name: str) -> bool:
    return name.endswith("ln2_post.hook_scale")


def _measured_tables(
    measure: _Measurement, sample: Sample, batch_size: int, progress: bool, which: str
) -> Iterator[DataFrame]:
    """A table of each kind of intervention."""
    # A control may stand beside several, and be tested itself.
    nodes, at = torch.unique(sample.node, return_inverse=True)
    by_kind: dict[InterventionKind, list[Measured]] = {kind: [] for kind in KINDS}
    desc = f"Testing features of the {which} CLT"
    with tqdm(total=len(KINDS) * len(nodes), desc=desc, unit=" runs", delay=2.0, disable=not progress) as bar:
        for batch in nodes.split(batch_size):
            for kind in KINDS:
                by_kind[kind].append(measure(batch, kind))
                bar.update(len(batch))
    predicted = predict(measure.graph, sample.node.to(measure.targets.device))
    for kind in KINDS if len(nodes) else ():
        measured = Measured(*(torch.cat(x)[at] for x in zip(*by_kind[kind], strict=True)))
        yield _table(measure, sample, predicted, measured, kind)


def _mismatch(difference: str) -> CLTMismatch:
    return CLTMismatch(
        f"The graph has {difference}: it was made with another model or CLT. Trace the prompt again with these."
    )


def _table(
    measure: _Measurement, sample: Sample, predicted: Predictions, measured: Measured, kind: InterventionKind
) -> DataFrame:
    """One row for each source and each target downstream of it."""
    graph, targets, scale = measure.graph, measure.targets, measure.scale
    nodes = graph.nodes
    whole = graph.logit_weights.sum()
    influence = graph.influence() / whole
    errors = nodes.is_kind(NodeKind.ERROR)
    error_share = (sum_inputs_from(graph.adjacency, targets, errors) / sum_inputs(graph)[targets]).float().cpu()
    logit = nodes.kind[targets] == int(NodeKind.LOGIT)
    reached = (nodes.layer[targets] > nodes.layer[sample.node, None]) & (
        nodes.pos[targets] >= nodes.pos[sample.node, None]
    )
    s, t = torch.nonzero(reached.cpu(), as_tuple=True)
    source, target = sample.node[s], targets.cpu()[t]
    columns = {
        "prompt": 0,
        "clt": "",
        "kind": kind,
        "role": ["tested" if c < 0 else "control" for c in sample.control_of[s].tolist()],
        "control_of": sample.control_of[s],
        "stratum": sample.stratum[s],
        "source": source,
        "source_layer": nodes.layer.cpu()[source],
        "source_pos": nodes.pos.cpu()[source],
        "source_feature": nodes.index.cpu()[source],
        "source_size": _sizes(measure, sample.node)[s],
        "source_influence": influence.cpu()[source].double(),
        "measured_at": ["logit" if x else "feature" for x in logit[t].tolist()],
        "target_kind": [measure.kinds[i] for i in t.tolist()],
        "target": target,
        "target_layer": nodes.layer.cpu()[target],
        "target_pos": nodes.pos.cpu()[target],
        "target_index": nodes.index.cpu()[target],
        "target_activation": nodes.activation.cpu()[target].double(),
        "weight": (graph.logit_weights / whole).cpu()[target].double(),
        "error_share": error_share[t],
        "edge": (scale - 1) * predicted.edge.cpu()[target, s].double(),
        "total": (scale - 1) * predicted.total.cpu()[target, s].double(),
        "influence": predicted.influence.cpu()[target, s].double(),
        "change": measured.change[s, t],
        "act_change": measured.act_change[s, t],
        "switched_on": measured.switched_on[s],
    }
    return DataFrame({name: x.numpy() if isinstance(x, Tensor) else x for name, x in columns.items()})


def _sizes(measure: _Measurement, sources: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Activation times the norm of all decoder vectors together."""
    at = measure.graph.nodes.take(sources)
    sizes = torch.zeros(len(sources), dtype=torch.float64)
    for layer in at.layer.unique().tolist():
        here = torch.nonzero(at.layer == layer).flatten()
        rows = measure.clt.decoder_rows(layer, at.index[here]).detach().double()
        sizes[here.cpu()] = (at.activation[here].abs().double() * rows.flatten(start_dim=1).norm(dim=1)).cpu()
    return sizes


class Sample(NamedTuple):
    """Feature nodes to test, controls after the rest."""

    node: Int[Tensor, " n_sources"]
    stratum: Int[Tensor, " n_sources"]
    """0 the most influential."""
    control_of: Int[Tensor, " n_sources"]
    """The node that a control stands beside; -1 for the others. One control may stand beside several."""


def sample_features(graph: AttributionGraph, n_features: int | None, seed: int) -> Sample:
    """Draw features of a graph, as many of each stratum as there are to be had, and controls.

    Each feature drawn from the first stratum has a control: a random one of the three other features, whatever their
    influence, with the most similar activation at its layer and position, or, where there are fewer, at its layer.

    Args:
        graph: of which nodes with some influence count.
        n_features: how many to draw, controls not counted; None for all.
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    influence = graph.influence().cpu()
    everything = graph.nodes.where(NodeKind.FEATURE).cpu()
    features = everything[influence[everything].argsort(descending=True)]
    features = features[influence[features] > 0]
    stratum = _strata(influence[features].double())
    chosen = _draw(stratum, len(features) if n_features is None else n_features, generator)
    tested = features[chosen]
    top = tested[stratum[chosen] == 0]
    pairs = [(c, int(n)) for n in top if (c := _control(graph, everything, int(n), generator)) is not None]
    stratum_of = dict(zip(features.tolist(), stratum.tolist(), strict=True))
    nodes = [*tested.tolist(), *(c for c, _ in pairs)]
    return Sample(
        torch.tensor(nodes, dtype=torch.long),
        torch.tensor([stratum_of.get(n, len(STRATA) - 1) for n in nodes], dtype=torch.long),
        torch.tensor([-1] * len(tested) + [n for _, n in pairs], dtype=torch.long),
    )


def _strata(influence: Tensor) -> Int[Tensor, " n"]:
    """The stratum of each feature, of influences in falling order."""
    before = (influence.cumsum(0) - influence) / influence.sum().clamp_min(torch.finfo(influence.dtype).tiny)
    return torch.bucketize(before, torch.tensor(STRATA[:-1], dtype=influence.dtype), right=True)


def _draw(stratum: Tensor, n_features: int, generator: torch.Generator) -> Int[Tensor, " n_drawn"]:
    """Places of as many of each stratum as there are to be had; what small ones lack is made up by the next."""
    drawn: list[Tensor] = []
    left = n_features
    by_size = sorted(range(len(STRATA)), key=lambda s: int((stratum == s).sum()))
    for strata_left, s in zip(range(len(STRATA), 0, -1), by_size, strict=True):
        members = torch.nonzero(stratum == s).flatten()
        take = min(len(members), left // strata_left)
        drawn.append(members[torch.randperm(len(members), generator=generator)[:take]])
        left -= take
    return torch.cat(drawn).sort().values


def _control(graph: AttributionGraph, features: Tensor, node: int, generator: torch.Generator) -> int | None:
    """A random one of the `ALIKE` most like a node."""
    layer, pos, activation = (x.cpu() for x in (graph.nodes.layer, graph.nodes.pos, graph.nodes.activation))
    others = features[(layer[features] == layer[node]) & (features != node)]
    here = others[pos[others] == pos[node]]
    candidates = here if len(here) >= ALIKE else others
    if len(candidates) == 0:
        return None
    alike = candidates[(activation[candidates] - activation[node]).abs().argsort()[:ALIKE]]
    return int(alike[torch.randint(len(alike), (1,), generator=generator)])


class Predictions(NamedTuple):
    """Of each source node, on every node. Rows of nodes that were not traced are 0."""

    edge: ByNode
    """E[t, s]: the direct edge, which is how much t falls when s is ablated and nothing between them reacts."""
    total: ByNode
    """T[t, s] = E[t, s] + sum_u E[t, u] / act_u T[u, s] over traced features u: the same where the features between
    react in proportion, none switches on or off, and attention and norms stay."""
    influence: ByNode
    """B[t, s], with B = A + A^2 + ... and A the |edges| as shares of each node's input: how often a walk upstream from
    t visits s. The nodes' influence is w B with w the logit probabilities."""


def predict(graph: AttributionGraph, sources: Nodes) -> Predictions:
    """The three predictions, by one pass from the bottom layer up each."""
    per_unit = _per_unit(graph)
    everything = torch.ones_like(per_unit)
    share = 1 / sum_inputs(graph)
    return Predictions(
        _carried(graph, sources, everything, torch.zeros_like(per_unit)),
        _carried(graph, sources, everything, per_unit),
        _carried(graph, sources, share, everything, absolute=True),
    )


def predict_joint(graph: AttributionGraph, sources: Nodes, scale: float) -> NodeValues:
    """Change of every node where several features are multiplied by a number at once, the others reacting as for
    `total`: (scale - 1) times what comes through all paths, of which those that lead through a source pass on `scale`
    times as much there, and nothing where they are ablated."""
    through = _per_unit(graph)
    through[sources] *= scale
    return (scale - 1) * _carried(graph, sources, torch.ones_like(through), through).sum(dim=1)


def _per_unit(graph: AttributionGraph) -> NodeValues:
    """1 / activation of each feature; 0 of other nodes."""
    nodes = graph.nodes
    features = nodes.is_kind(NodeKind.FEATURE) & (nodes.activation != 0)
    return torch.where(features, 1 / torch.where(features, nodes.activation, 1), 0).to(graph.adjacency.dtype)


def _carried(
    graph: AttributionGraph, sources: Nodes, scale: NodeValues, through: NodeValues, absolute: bool = False
) -> ByNode:
    """X[t] = scale_t (E[t, sources] + sum_u E[t, u] through_u X[u]), or with |E|."""
    carried = graph.adjacency.new_zeros(len(graph.nodes), len(sources), layout=torch.strided)
    for layer in reversed(list(top_down(graph.nodes))):
        for rows in layer.split(ROWS_AT_ONCE):
            edges = take_rows(graph.adjacency, rows)
            edges = (edges.abs() if absolute else edges) * scale[rows, None]
            carried[rows] = edges[:, sources] + (edges * through) @ carried
    return carried


@torch.no_grad()
def baseline_clt(
    which: Baseline, model: HookedModel, clt: CrossLayerTranscoder, tokens: Tokens, seed: int
) -> CrossLayerTranscoder:
    """A CLT of chance, of the given one's shape, activation, hooks, b_dec and W_skip, which it shares.

    random: of no learned direction at all. W_enc's columns point anywhere, with norms as the given ones' times one
    factor a layer; b_enc takes each feature's mean over the prompt away, so that features fire where their input is
    unlike the rest of the prompt; one threshold a layer (or k) lets as many through on this prompt as fire in the given
    CLT there, and the factor makes their mean activation the same. Decoder vectors point anywhere, each with the norm
    of the given one. Position 0 is left out of all these counts.

    shuffled: the given encoder, thus the same activations, and decoder vectors that point where those of another
    feature of the same layer do (none keeps its own), each with the norm that it had: what activations and norms
    alone make of it.

    Each prompt has a draw of its own.

    Raises:
        MemoryLimit: the decoders, which either needs once more in memory, do not fit.
    """
    _require_room(clt)
    # Over several prompts, several CLTs are drawn: one may be lucky.
    key = f"{seed} {which} {tokens.tolist()}"
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    # Tensors are shared: the memo says that they are copied already.
    made = copy.deepcopy(clt, {id(tensor): tensor for tensor in (*clt.parameters(), *clt.buffers())})
    if which == "shuffled":
        made.W_dec = DenseDecoders(list(_shuffled_decoders(clt, generator)))
    else:
        dtype = torch.float64 if clt.W_enc.dtype == torch.float64 else torch.float32

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=dtype).to(clt.W_enc)

        _randomise_encoder(made, clt, layer_inputs(model, clt, tokens[None])[0, min(1, len(tokens) - 1) :], draw)
        norms = (clt.W_dec[source].norm(dim=-1, keepdim=True) for source in clt.layers)
        made.W_dec = DenseDecoders([_unit_vectors(draw(*norm.shape[:2], clt.cfg.d_model)) * norm for norm in norms])
    return made.requires_grad_(False)


def _require_room(clt: CrossLayerTranscoder) -> None:
    writes = sum(len(clt.cfg.targets(source)) for source in clt.layers)
    needed = (writes + clt.cfg.n_layers) * clt.cfg.d_transcoder * clt.cfg.d_model * clt.W_enc.element_size()
    free = free_memory(clt.W_enc.device)
    if free is not None and needed > free:
        raise MemoryLimit(
            f"A baseline of this CLT takes {needed / GIB:.2f} GiB and {free / GIB:.2f} are free: give baselines=() and"
            " say that none was taken, or free some memory."
        )


def _shuffled_decoders(clt: CrossLayerTranscoder, generator: torch.Generator) -> Iterator[Tensor]:
    for source in clt.layers:
        W_dec = clt.W_dec[source].detach()
        order = torch.randperm(len(W_dec), generator=generator)
        other = torch.empty_like(order)
        other[order] = order.roll(1)
        yield _unit_vectors(W_dec[other.to(W_dec.device)]) * W_dec.norm(dim=-1, keepdim=True)


def _unit_vectors(vectors: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
    """Vectors scaled to length 1; zeros stay zeros."""
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(vectors.dtype).tiny)


def _randomise_encoder(made: CrossLayerTranscoder, clt: CrossLayerTranscoder, inputs: Inputs, draw: Draw) -> None:
    _, d_model, d_transcoder = clt.W_enc.shape
    made.W_enc = nn.Parameter(torch.empty_like(clt.W_enc))
    made.b_enc = nn.Parameter(torch.empty_like(clt.b_enc))
    made.threshold = None if clt.threshold is None else nn.Parameter(torch.zeros_like(clt.threshold))
    for layer in clt.layers:
        x = inputs[:, layer]
        acts_of_clt = clt.encode_layer(x, layer).feature_acts
        W_enc = _unit_vectors(draw(d_transcoder, d_model)).T * clt.W_enc[layer].norm(dim=0)
        hidden_pre = x @ W_enc
        mean = hidden_pre.mean(dim=0) if len(x) > 1 else torch.zeros_like(hidden_pre[0])
        limit = _limit(hidden_pre - mean, int(acts_of_clt.count_nonzero())) if clt.cfg.activation != "topk" else 0.0
        made.b_enc[layer] = -mean - limit if clt.cfg.activation == "relu" else -mean
        if made.threshold is not None:
            made.threshold[layer] = limit
        made.W_enc[layer] = W_enc
        acts_made = made.encode_layer(x, layer).feature_acts
        factor = (
            _mean_active(acts_of_clt) / _mean_active(acts_made)
            if bool(acts_of_clt.any()) and bool(acts_made.any())
            else 1.0
        )
        for weight in (made.W_enc, made.b_enc, made.threshold):
            if weight is not None:
                weight[layer] *= factor


def _limit(hidden_pre: Float[Tensor, "n_inputs d_transcoder"], count: int) -> float:
    """A threshold, not below 0, that so many pre-activations are above: half-way to the next, so that rounding decides
    nothing."""
    falling = hidden_pre.flatten().sort(descending=True).values
    around = falling[max(0, count - 1) : count + 1]
    return max(0.0, float(around.mean() if count else around[0]))


def _mean_active(feature_acts: Float[Tensor, "n_inputs d_transcoder"]) -> Float[Tensor, ""]:
    return feature_acts[feature_acts != 0].mean()
