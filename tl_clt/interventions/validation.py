"""`validate`: a graph's predictions against interventions.

Feature nodes s are changed one at a time, multiplied by `scale` at their position, in two kinds of intervention, whose
numbers stand side by side and are never mixed:

- constrained: all MLP outputs are held but for what s itself writes (`through_layer` the last layer). What the graph
  predicts of a target t is `(scale - 1) E[t, s]`, column `edge`. With `freeze="all"` this is exact.
- iterative: features in between react. What the graph predicts is `(scale - 1) T[t, s]`, column `total`, where T sums
  over all paths of traced features, each feature passing on in proportion to its activation. With `freeze="all"` this
  is exact as long as no feature switches on or off.

Targets are all token logits of the graph, and its traced features in later layers at the same position or later.
`change` is the measured change of t: for features of the pre-activation, for logits of the logit less the mean logit,
as the model gives them (after a soft-cap, if it has one, which graphs leave out). `act_change` is that of the feature's
activation, which differs where it switches off. Relative effects are |change| (or |act_change|) over the target's own
activation, or logit above the mean, in the clean run. Features that are active only in the changed run are in no graph;
`switched_on` is how many there are.

`influence` is the unsigned one that pruning goes by: `graph.influence()` of s for logits, and B[t, s] for features. It
is compared with the relative effect: for logits their mean, weighted by their probability, for features
|act_change| / activation, as in the paper's figure of 0.72 (Spearman).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from pandas import DataFrame, concat
from torch import Tensor
from tqdm.auto import tqdm

from tl_clt.attribution import AttributionGraph, NodeKind
from tl_clt.errors import CLTMismatch, ConfigError
from tl_clt.interventions.intervene import intervene
from tl_clt.interventions.intervention import Intervention
from tl_clt.interventions.predictions import Predictions, predict
from tl_clt.interventions.sampling import Sample, sample_features
from tl_clt.interventions.validation_report import ValidationReport
from tl_clt.lens import Freeze, HookedModel, model_name
from tl_clt.shapes import Logits
from tl_clt.transcoder import CrossLayerTranscoder

Kind = Literal["constrained", "iterative"]
KINDS: tuple[Kind, ...] = ("constrained", "iterative")
LOGITS_AT_ONCE = 2**26
"""Logits of one pass: 256 MiB in float32."""
Effects = Float[Tensor, "n_sources n_targets"]


class Measured(NamedTuple):
    """What changed at the targets."""

    change: Effects
    """Of a feature's pre-activation, or of a logit less the mean logit."""
    act_change: Effects
    """Of a feature's activation; for logits the same as `change`."""
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
) -> ValidationReport:
    """Change features of a graph one at a time, and compare what follows with what the graph predicts.

    Tested are features drawn evenly from four strata of influence (`STRATA`: those that carry the first half of all
    features' influence, up to 80%, up to 95%, the rest), and controls: for each of the first stratum a random feature
    outside of it, of the same layer, position and a similar activation where there is one. What is measured and what it
    is compared with stands at the head of this module.

    Hooks of the user's are set aside.

    Args:
        graph: of this model and CLT; not a contrastive one.
        n_features: how many to test, controls not counted; None for all.
        scale: of the changed features; 0 ablates.
        freeze: what is held at the clean run's values, as for `intervene`.
        threshold: from which relative effect (or influence) on something counts as predicted, or seen.
        batch_size: features in one pass; None for as many as make 256 MiB of logits, at most 64.
        seed: of the draw.
        progress: show a bar where it takes longer than 2 s.

    Raises:
        ConfigError: an argument out of range; a graph that is contrastive, or explains no token's logit, or has no
            feature with influence.
        CLTMismatch: the graph is of another model or CLT.
        HookNotFound, InterventionError: as for `intervene`.
    """
    _check(graph, n_features, scale, threshold, batch_size)
    sample = sample_features(graph, n_features, seed)
    if len(sample.node) == 0:
        raise ConfigError("The graph has no feature with any influence on its logits to test.")
    targets = _targets(graph)
    measure = _Measurement(graph, model, clt, targets, scale, freeze)
    rows = batch_size or max(1, min(64, LOGITS_AT_ONCE // (len(graph.tokens) * model.cfg.d_vocab)))
    found = _measure_all(measure, sample.node.split(rows), progress)
    predicted = predict(graph, sample.node.to(targets.device))
    tables = [_table(graph, sample, targets, predicted, found[kind], kind, scale) for kind in KINDS]
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
    }
    return ValidationReport(measurements=concat(tables, ignore_index=True), threshold=threshold, info=info)


def _check(
    graph: AttributionGraph, n_features: int | None, scale: float, threshold: float, batch_size: int | None
) -> None:
    for name, number in (("n_features", n_features), ("batch_size", batch_size)):
        if number is not None and number < 1:
            raise ConfigError(f"{name} is {number}: give at least 1, or None.")
    if not math.isfinite(scale) or scale == 1:
        raise ConfigError(f"scale is {scale}: give a finite number other than 1, which changes nothing.")
    if not 0 < threshold < math.inf:
        raise ConfigError(f"threshold is {threshold}: give a share of the target's activation, above 0.")
    if graph.contrast_activation is not None:
        raise ConfigError(
            "The graph is contrastive: its edges are differences of two prompts, which no change of a feature on one"
            " prompt shows. Give a graph traced without contrast."
        )
    if not bool((graph.nodes.is_kind(NodeKind.LOGIT) & (graph.nodes.index >= 0)).any()):
        raise ConfigError("The graph explains no token's logit, so that there is no influence on one to test.")


def _targets(graph: AttributionGraph) -> Int[Tensor, " n_targets"]:
    """Traced features, then token logits."""
    nodes = graph.nodes
    features = nodes.where(NodeKind.FEATURE)
    logits = nodes.where(NodeKind.LOGIT)
    # Feature targets are logit nodes of a lower layer.
    tokens = (nodes.index[logits] >= 0) & (nodes.layer[logits] == nodes.layer.max())
    return torch.cat([features[graph.expanded[features]], logits[tokens]])


class _Measurement:
    """Interventions on several feature nodes in one pass, one in each row of a batch of the same prompt."""

    def __init__(
        self,
        graph: AttributionGraph,
        model: HookedModel,
        clt: CrossLayerTranscoder,
        targets: Int[Tensor, " n_targets"],
        scale: float,
        freeze: Freeze,
    ) -> None:
        self.graph, self.model, self.clt = graph, model, clt
        self.scale = scale
        self.freeze: Freeze = freeze
        nodes = graph.nodes
        everywhere = nodes.take(nodes.where(NodeKind.FEATURE))
        if not bool(((everywhere.layer < clt.cfg.n_layers) & (everywhere.index < clt.cfg.d_transcoder)).all()):
            raise _mismatch("features that this CLT does not have")
        self.features = nodes.take(targets[nodes.kind[targets] == int(NodeKind.FEATURE)])
        self.logits = nodes.take(targets[nodes.kind[targets] == int(NodeKind.LOGIT)])

    def __call__(self, sources: Int[Tensor, " n"], kind: Kind) -> Measured:
        at = self.graph.nodes.take(sources)
        places = zip(at.layer.tolist(), at.pos.tolist(), at.index.tolist(), strict=True)
        changes = [
            Intervention(layer=layer, pos=pos, feature=feature, scale=self.scale, prompt=row)
            for row, (layer, pos, feature) in enumerate(places)
        ]
        tokens = self.graph.tokens.expand(len(sources), -1)
        through = self.clt.cfg.n_layers - 1 if kind == "constrained" else None
        bos = self.graph.info.get("bos") if kind == "constrained" else None
        effect = intervene(self.model, self.clt, tokens, changes, through, self.freeze, bos=bos)
        self._check_graph(effect.baseline_feature_acts[0])
        features = self.features
        places = (slice(None), features.pos, features.layer, features.index)
        pre = (effect.hidden_pre - effect.baseline_hidden_pre)[places]
        acts = (effect.feature_acts - effect.baseline_feature_acts)[places]
        heights = self._heights(effect.logits) - self._heights(effect.baseline_logits)
        on = ((effect.baseline_feature_acts == 0) & (effect.feature_acts != 0)).flatten(1).sum(dim=1)
        change, act_change = (torch.cat([x.double(), heights], dim=1).cpu() for x in (pre, acts))
        return Measured(change, act_change, on.double().cpu())

    def _heights(self, logits: Logits) -> Float[Tensor, "batch n_logits"]:
        """The targets' logits less the mean logit."""
        mean = logits.mean(dim=-1, dtype=torch.float64)
        return logits[:, self.logits.pos, self.logits.index].double() - mean[:, self.logits.pos]

    def _check_graph(self, feature_acts: Float[Tensor, "pos n_layers d_transcoder"]) -> None:
        at = self.features
        here = feature_acts[at.pos, at.layer, at.index].to(at.activation.dtype)
        if not torch.allclose(here, at.activation, rtol=1e-2, atol=1e-3):
            raise _mismatch("features with other activations on its prompt")


def _measure_all(measure: _Measurement, batches: Sequence[Tensor], progress: bool) -> dict[Kind, Measured]:
    found: dict[Kind, list[Measured]] = {kind: [] for kind in KINDS}
    total = len(KINDS) * sum(map(len, batches))
    with tqdm(total=total, desc="Testing features", unit=" runs", delay=2.0, disable=not progress) as bar:
        for batch in batches:
            for kind in KINDS:
                found[kind].append(measure(batch, kind))
                bar.update(len(batch))
    return {kind: Measured(*(torch.cat(x) for x in zip(*parts, strict=True))) for kind, parts in found.items()}


def _mismatch(found: str) -> CLTMismatch:
    return CLTMismatch(
        f"The graph has {found}: it was made with another model or CLT. Trace the prompt again with these."
    )


def _table(
    graph: AttributionGraph,
    sample: Sample,
    targets: Int[Tensor, " n_targets"],
    predicted: Predictions,
    measured: Measured,
    kind: Kind,
    scale: float,
) -> DataFrame:
    """One row for each source and each target downstream of it."""
    nodes = graph.nodes
    influence = graph.influence()
    errors = nodes.is_kind(NodeKind.ERROR)
    error_share = torch.tensor([float(graph.input_shares(t)[errors].sum()) for t in targets.tolist()])
    logit = nodes.kind[targets] == int(NodeKind.LOGIT)
    reached = (nodes.layer[targets] > nodes.layer[sample.node, None]) & (
        nodes.pos[targets] >= nodes.pos[sample.node, None]
    )
    s, t = torch.nonzero(reached.cpu(), as_tuple=True)
    source, target = sample.node[s], targets.cpu()[t]
    columns = {
        "prompt": 0,
        "kind": kind,
        "role": ["tested" if c < 0 else "control" for c in sample.control_of[s].tolist()],
        "control_of": sample.control_of[s],
        "stratum": sample.stratum[s],
        "source": source,
        "source_layer": nodes.layer.cpu()[source],
        "source_pos": nodes.pos.cpu()[source],
        "source_feature": nodes.index.cpu()[source],
        "source_influence": influence.cpu()[source].double(),
        "measured_at": ["logit" if x else "feature" for x in logit[t].tolist()],
        "target": target,
        "target_layer": nodes.layer.cpu()[target],
        "target_pos": nodes.pos.cpu()[target],
        "target_index": nodes.index.cpu()[target],
        "target_activation": nodes.activation.cpu()[target].double(),
        "weight": graph.logit_weights.cpu()[target].double(),
        "error_share": error_share[t],
        "edge": (scale - 1) * predicted.edge.cpu()[target, s].double(),
        "total": (scale - 1) * predicted.total.cpu()[target, s].double(),
        "influence": predicted.influence.cpu()[target, s].double(),
        "change": measured.change[s, t],
        "act_change": measured.act_change[s, t],
        "switched_on": measured.switched_on[s],
    }
    return DataFrame({name: x.numpy() if isinstance(x, Tensor) else x for name, x in columns.items()})
