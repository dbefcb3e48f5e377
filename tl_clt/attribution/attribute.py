"""`attribute`: from a prompt to its attribution graph, step by step, and which features of it get a row.

With a contrast, two prompts of the same length are compared, position by position (Methods, "inactive features").
Through the first prompt's frozen patterns and scales, x - x' is what the differences of all that is written carry to
it: features active on either prompt write `(act - act') W_dec`, errors and embeddings their differences. What the
other prompt's own attention patterns and norm scales gave beyond that is a constant, and stands in the bias nodes.
The in-edges of a node then sum to the difference of its pre-activations, or logits, on the two prompts.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, get_args, overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_clt.arguments import as_choice, as_number, as_share, as_switch, as_whole
from tl_clt.attribution.autograd import Engine
from tl_clt.attribution.edges import NodeKind, place_logit_weights
from tl_clt.attribution.graph import AttributionGraph
from tl_clt.attribution.influence import SMALLEST_ROW_SUM
from tl_clt.attribution.local import (
    ActiveFeatures,
    Bos,
    LocalReplacementModel,
    Writes,
    build_local_model,
    build_sources,
)
from tl_clt.attribution.memory import Budget, DenseRows, MemoryPlan, RowStore, SparseRows, plan_memory
from tl_clt.attribution.sweep import EngineChoice, EngineMaker
from tl_clt.attribution.targets import (
    Target,
    Targets,
    TargetsGiven,
    as_targets,
    feature_readouts,
    find_targets,
    read_values,
    residual_hooks,
)
from tl_clt.errors import MemoryLimit, PromptError, TargetError
from tl_clt.lens import HookedModel, Prompt, as_text, is_several, model_name, to_prompts, token_strings
from tl_clt.replacement import check_fit, require_free
from tl_clt.shapes import NodeMask, NodeValues, Tokens
from tl_clt.transcoder import CrossLayerTranscoder

Prompts = Sequence[str] | Sequence[Sequence[int]] | Sequence[Tensor]
ROUND_SHARE, FIRST_ROUND = 0.25, 64
"""Features are traced in rounds, and ranked anew by influence in between. A round has a share `ROUND_SHARE` of as many
features as are traced already, and at first `FIRST_ROUND`."""


@overload
def attribute(
    model: HookedModel,
    clt: CrossLayerTranscoder,
    prompt: Prompt,
    targets: TargetsGiven = None,
    max_n_logits: int = 10,
    desired_logit_prob: float = 0.95,
    max_feature_nodes: int | None = None,
    max_unexplored: float | None = None,
    engine: EngineChoice = "auto",
    bos: Bos = "error",
    bias_nodes: bool = True,
    batch_size: int | None = None,
    progress: bool = True,
    contrast: Prompt | None = None,
    keep_edges: float | None = None,
    memory_limit: float | None = None,
) -> AttributionGraph: ...
@overload
def attribute(
    model: HookedModel,
    clt: CrossLayerTranscoder,
    prompt: Prompts,
    targets: TargetsGiven = None,
    max_n_logits: int = 10,
    desired_logit_prob: float = 0.95,
    max_feature_nodes: int | None = None,
    max_unexplored: float | None = None,
    engine: EngineChoice = "auto",
    bos: Bos = "error",
    bias_nodes: bool = True,
    batch_size: int | None = None,
    progress: bool = True,
    contrast: Prompt | Prompts | None = None,
    keep_edges: float | None = None,
    memory_limit: float | None = None,
) -> list[AttributionGraph]: ...
def attribute(
    model: HookedModel,
    clt: CrossLayerTranscoder,
    prompt: Prompt | Prompts,
    targets: TargetsGiven = None,
    max_n_logits: int = 10,
    desired_logit_prob: float = 0.95,
    max_feature_nodes: int | None = None,
    max_unexplored: float | None = None,
    engine: EngineChoice = "auto",
    bos: Bos = "error",
    bias_nodes: bool = True,
    batch_size: int | None = None,
    progress: bool = True,
    contrast: Prompt | Prompts | None = None,
    keep_edges: float | None = None,
    memory_limit: float | None = None,
) -> AttributionGraph | list[AttributionGraph]:
    """Trace one prompt into an attribution graph (Methods, "Attribution Graphs"), or several into a list of graphs.

        edge(s -> t) = act_s * sum_{target layers l of s, below t} W_dec[s -> l] . J(l, pos_s -> input of t) . W_enc[t]

    Two identical calls in one process give identical graphs.

    J is the linear map through the residual stream and attention's OV circuits with patterns and norm scales frozen.
    A logit node k reads `W_U[:, k] - mean W_U` of ln_final's output with its scale frozen, before any soft-cap. The
    in-edges of a traced node sum to its pre-activation minus b_enc (features) or its logit minus the mean logit,
    exactly, with `bias_nodes=True` and any `bos` but "drop".

    The model is left as it was. Hooks of the user's own are set aside while it is traced. Models in half precision
    are traced with float32 sums.

    Args:
        model: a HookedTransformer or TransformerBridge.
        clt: a CLT of this model.
        prompt: text, or token ids [pos]; or a list of such.
        targets: token ids or one-token strings whose logits to explain, or any of `TokenTarget`, `DifferenceTarget`,
            `FeatureTarget`, `DirectionTarget`; one or several; None for the most probable tokens.
        max_n_logits: at most so many logit nodes.
        desired_logit_prob: as many logit nodes as reach this probability together.
        max_feature_nodes: trace in-edges of at most so many features, the most influential; None for all.
            Features without a row stay in the graph as sources.
        max_unexplored: trace until at most this share of influence ends at features without a row.
        engine: "sweep" is fast; "autograd" is its definition, and knows every architecture that tracing knows;
            "auto" picks the sweep wherever it passes its test on the prompt, and warns where it does not.
        bos: what position 0 contributes: "error" its whole MLP outputs as errors, "drop" nothing (as
            circuit-tracer), "features" its features and errors.
        bias_nodes: whether position embeddings and biases have nodes.
        batch_size: targets at a time; None for as many as help and fit.
        progress: show a bar where it takes longer than 2 s, with the memory it may take.
        contrast: another prompt of the same length (or one for each prompt): nodes are the features active on either,
            and edges carry the difference of the two, through this prompt's attention and norms.
        keep_edges: keep only each node's strongest in-edges that make up this share of its absolute input, as a
            sparse graph; None to keep all.
        memory_limit: GiB that tracing may take beyond what is in use; None for 80% of what is free.

    Raises:
        CLTMismatch, HookNotFound: the CLT is of another model.
        PromptError, TokenizerMissing, TargetError, ConfigError: an argument out of range.
        ModelUnsupported, LocalModelMismatch: the architecture cannot be traced exactly, or not by this engine.
        MemoryLimit: it does not fit.
    """
    check_fit(model, clt)
    require_free(model)
    options = TracingOptions(
        targets=as_targets(targets),
        max_n_logits=as_whole(
            "max_n_logits", max_n_logits, 1, model.cfg.d_vocab, why="the size of the vocabulary", error=TargetError
        ),
        desired_logit_prob=as_share("desired_logit_prob", desired_logit_prob, error=TargetError),
        limits=Limits(max_feature_nodes, max_unexplored),
        bos=as_choice("bos", bos, get_args(Bos)),
        bias_nodes=as_switch("bias_nodes", bias_nodes),
        batch_size=as_whole("batch_size", batch_size, 1, none="as many as fit"),
        keep_edges=as_share("keep_edges", keep_edges, none="all"),
        memory_limit=as_number("memory_limit", memory_limit, above=0, none="80% of what is free"),
        progress=as_switch("progress", progress),
    )
    chosen: EngineChoice = as_choice("engine", engine, get_args(EngineChoice))
    several = is_several(prompt)
    prompts = to_prompts(model, prompt)
    others = _match_contrasts(model, contrast, prompts)
    # Gradients, and graphs whose tensors can be used anywhere, need normal tensors.
    with torch.inference_mode(False):
        tracer = Tracer(model, clt, chosen, options)
        pairs = zip(prompts, others, strict=True)
        graphs = [tracer.trace(tokens.clone(), None if other is None else other.clone()) for tokens, other in pairs]
    return graphs if several else graphs[0]


def _match_contrasts(
    model: HookedModel, contrast: Prompt | Prompts | None, prompts: Sequence[Tensor]
) -> Sequence[Tensor] | list[None]:
    """For each prompt the one it is compared with."""
    if contrast is None:
        return [None] * len(prompts)
    others = to_prompts(model, contrast)
    if not is_several(contrast):
        others = others * len(prompts)
    if len(others) != len(prompts):
        raise PromptError(f"{len(others)} contrast prompts for {len(prompts)} prompts: give one, or one for each.")
    for tokens, other in zip(prompts, others, strict=True):
        if len(tokens) != len(other):
            raise PromptError(
                f"The prompt has {len(tokens)} tokens and the contrast {len(other)}: contrastive prompts are compared"
                " position by position, so give two of the same length."
            )
        if torch.equal(tokens, other):
            raise PromptError(
                "The contrast is the prompt itself, so that nothing differs and there is nothing to trace: give another"
                " prompt of the same length, or leave contrast out."
            )
    return others


@dataclass(frozen=True, kw_only=True)
class TracingOptions:
    """The arguments of `attribute` that are the same for every prompt of a call."""

    targets: Sequence[Target] | None
    max_n_logits: int
    desired_logit_prob: float
    limits: Limits
    bos: Bos
    bias_nodes: bool
    batch_size: int | None
    keep_edges: float | None
    memory_limit: float | None
    progress: bool


@dataclass(frozen=True)
class Limits:
    """How far to trace."""

    max_feature_nodes: int | None = None
    max_unexplored: float | None = None

    def __post_init__(self) -> None:
        most = as_whole("max_feature_nodes", self.max_feature_nodes, 0, none="all")
        share = as_share("max_unexplored", self.max_unexplored, zero=True, none="all")
        object.__setattr__(self, "max_feature_nodes", most)
        object.__setattr__(self, "max_unexplored", share)

    def n_rows(self, n_features: int) -> int:
        """At most so many features get a row."""
        return n_features if self.max_feature_nodes is None else min(self.max_feature_nodes, n_features)


class Tracer:
    """Traces the prompts of one call; what depends on the model alone is made once."""

    def __init__(
        self, model: HookedModel, clt: CrossLayerTranscoder, engine: EngineChoice, options: TracingOptions
    ) -> None:
        self.model = model
        self.clt = clt
        self.options = options
        self.hooks = residual_hooks(model, options.targets)
        self.engines = EngineMaker(engine, model, clt)

    def trace(self, tokens: Tokens, other: Int[Tensor, " other_pos"] | None) -> AttributionGraph:
        """The graph of one prompt, or of what it has beyond another."""
        options = self.options
        budget = Budget(tokens.device, options.memory_limit)
        local = self._build_local(tokens)
        targets = find_targets(local, options.targets, options.max_n_logits, options.desired_logit_prob)
        read, elsewhere = targets.readouts, None
        if other is None:
            writes = local.writes(options.bias_nodes)
        else:
            writes, targets, elsewhere = compare_prompts(local, self._build_local(other), targets, options.bias_nodes)
        budget.require_sources(self.clt, writes, local.has_norm_behind)
        sources = build_sources(local, writes, targets.nodes)
        engine = self.engines.make(local, sources, read)
        n_rows = options.limits.n_rows(len(writes.strengths)) + len(targets.labels)
        adaptive = options.limits.max_unexplored is not None
        plan = plan_memory(engine, n_rows, options.keep_edges, options.batch_size, budget, adaptive)
        if options.keep_edges is None:
            store = DenseRows(sources.nodes, local.dtype, plan.rows)
        else:
            store = SparseRows(sources.nodes, local.dtype, plan.rows, options.keep_edges)
        expanded = expand(engine, targets, store, options.limits, plan, options.progress)
        if elsewhere is not None:
            # Features are the first nodes.
            elsewhere = torch.cat([elsewhere, elsewhere.new_zeros(len(sources.nodes) - len(elsewhere))])
        return AttributionGraph(
            nodes=sources.nodes,
            adjacency=store.adjacency(),
            expanded=expanded,
            tokens=tokens,
            prompt_tokens=token_strings(self.model, tokens),
            logit_probs=targets.weights,
            logit_tokens=targets.labels,
            targets=targets.named,
            dropped=None if options.keep_edges is None else store.dropped,
            contrast_activation=elsewhere,
            info={
                **self._describe(tokens, other, engine, plan),
                "n_active_features": len(writes.strengths),
                "n_traced_features": int(expanded.sum()) - len(targets.labels),
            },
        )

    def _build_local(self, tokens: Tokens) -> LocalReplacementModel:
        return build_local_model(self.model, self.clt, tokens, self.options.bos, self.hooks)

    def _describe(self, tokens: Tokens, other: Tensor | None, engine: Engine, plan: MemoryPlan) -> dict[str, Any]:
        info = {
            "prompt": as_text(self.model, tokens),
            "model_name": model_name(self.model),
            "clt_model_name": self.clt.cfg.model_name,
            "n_layers": self.clt.cfg.n_layers,
            "d_transcoder": self.clt.cfg.d_transcoder,
            "clt_fingerprint": self.clt.fingerprint(),
            "bos": self.options.bos,
            "bias_nodes": self.options.bias_nodes,
            "engine": engine.name,
            "planned_gib": round(plan.total / 2**30, 3),
        }
        if self.options.keep_edges is not None:
            info["keep_edges"] = self.options.keep_edges
        if other is not None:
            info["contrast"] = as_text(self.model, other)
        return info


class Contrast(NamedTuple):
    """The differences of two prompts."""

    writes: Writes
    targets: Targets
    other_activations: Float[Tensor, " n_active"]
    """Of each feature, on the other prompt."""


@torch.no_grad()
def compare_prompts(
    local: LocalReplacementModel, other: LocalReplacementModel, targets: Targets, bias_nodes: bool
) -> Contrast:
    """What a prompt's nodes write beyond another prompt's of the same length."""
    ours, theirs, d_transcoder = local.features, other.features, local.clt.cfg.d_transcoder
    keys = torch.cat(
        [
            _number_features(ours, len(local.tokens), d_transcoder),
            _number_features(theirs, len(local.tokens), d_transcoder),
        ]
    )
    either, place = torch.unique(keys, return_inverse=True)
    here = local.written.embed.new_zeros(len(either))
    there = here.clone()
    here[place[: len(ours.layer)]] = ours.activation
    there[place[len(ours.layer) :]] = theirs.activation
    at = either // d_transcoder
    n_pos = len(local.tokens)
    features = ActiveFeatures(at // n_pos, at % n_pos, either % d_transcoder, here)
    pos_embed = local.written.pos_embed if bias_nodes else None
    writes = Writes(
        features=features,
        strengths=here - there,
        errors=local.errors - other.errors,
        embed=local.written.embed - other.written.embed,
        pos_embed=None if pos_embed is None else torch.zeros_like(pos_embed),
        biases=local.biases_beyond(other) if bias_nodes else None,
    )
    readouts = targets.readouts._replace(constants=torch.zeros_like(targets.readouts.constants))
    heights = read_values(local, readouts) - read_values(other, readouts)
    nodes = replace(targets.nodes, activation=heights)
    return Contrast(writes, targets._replace(readouts=readouts, nodes=nodes), there)


def _number_features(features: ActiveFeatures, n_pos: int, d_transcoder: int) -> Int[Tensor, " n_active"]:
    """A number that orders features by (layer, pos, feature)."""
    return (features.layer * n_pos + features.pos) * d_transcoder + features.feature


class Expansion:
    """The adjacency as far as it is traced, with the influence that its rows give."""

    def __init__(self, engine: Engine, targets: Targets, store: RowStore) -> None:
        self.engine = engine
        self.store = store
        self.nodes = engine.sources.nodes
        self.features = self.nodes.where(NodeKind.FEATURE)
        self.expanded: Bool[Tensor, " n_nodes"] = torch.zeros_like(self.nodes.kind, dtype=torch.bool)
        weights = place_logit_weights(self.nodes, targets.weights)
        self.visits: NodeValues = weights / weights.sum()
        """The probability that a walk from the targets upstream along normalised |edges| visits each node."""
        ends = self.nodes.where(NodeKind.LOGIT)
        put = store.put(ends, engine.find_rows(targets.readouts))
        if not bool(put[ends].all()):
            raise MemoryLimit(
                f"memory_limit leaves no room for the in-edges of the {len(ends)} targets: raise it, or ask for fewer."
            )
        self._add_rows_of(ends)

    def trace(self, features: Int[Tensor, " n"], batch_size: int, bar: tqdm, ranked: bool) -> int:
        """Trace the in-edges of some features; where `ranked`, bring `visits` up to date.

        Returns:
            How many there was room for.
        """
        put = torch.zeros_like(self.expanded)
        for batch in self.engine.batches(self.nodes.layer[features], self.nodes.pos[features], batch_size):
            at = self.nodes.take(features[batch])
            readouts = feature_readouts(self.engine.local, at.layer, at.pos, at.index)
            kept = self.store.put(features[batch], self.engine.find_rows(readouts))
            put |= kept
            bar.update(len(batch))
            if not bool(kept[features[batch]].all()):
                break
        if ranked:
            self._add_rows_of(torch.nonzero(put).flatten())
        else:
            self.expanded |= put
        return int(put.sum())

    def open_shares(self) -> Float[Tensor, " n_features"]:
        """For each feature, the share of walks that end there because it has no row."""
        return (self.visits * ~self.expanded)[self.features]

    def _add_rows_of(self, targets: Int[Tensor, " n"]) -> None:
        """Let the walks that ended at these go on: pass their visits upstream, top layer first, along all rows."""
        self.expanded[targets] = True
        new = torch.zeros_like(self.visits)
        new[targets] = self.visits[targets]
        layers = self.nodes.layer
        logits = self.nodes.is_kind(NodeKind.LOGIT)
        self._pass_on(new, targets[logits[targets]])
        top = int(layers[targets].max()) if len(targets) else -1
        inner = self.expanded & ~logits
        for layer in range(top, -1, -1):
            self._pass_on(new, torch.nonzero(inner & (layers == layer)).flatten())

    def _pass_on(self, new: NodeValues, rows: Int[Tensor, " n"]) -> None:
        if len(rows):
            received = self.store.pass_upstream(rows, new[rows] / self.store.sums[rows].clamp_min(SMALLEST_ROW_SUM))
            new += received
            self.visits += received


def expand(
    engine: Engine,
    targets: Targets,
    store: RowStore,
    limits: Limits,
    plan: MemoryPlan,
    progress: bool,
) -> NodeMask:
    """Trace the targets, then features in the order of their influence so far until a limit is met.

    Args:
        store: where the rows go.
        plan: batch size, and whether all rows are sure to fit; tracing ends with a warning where they do not.

    Returns:
        Which nodes have a row.
    """
    traced = Expansion(engine, targets, store)
    features = traced.features
    limit = limits.n_rows(len(features))
    # Where room may end before the features do, the most influential come first.
    ranked = limit < len(features) or limits.max_unexplored is not None or not plan.all_fit
    done = 0
    desc = f"Tracing features ({plan})"
    with tqdm(total=limit, desc=desc, unit=" rows", delay=2.0, disable=not progress) as bar:
        while done < limit:
            if ranked:
                count = max(min(plan.batch_size, FIRST_ROUND), int(ROUND_SHARE * done))
                chosen = _choose_next(traced.open_shares(), min(count, limit - done), limits)
            else:
                chosen = features[:limit]
            if len(chosen) == 0:
                break
            n_traced = traced.trace(chosen, plan.batch_size, bar, ranked)
            done += n_traced
            if n_traced < len(chosen):
                warnings.warn(
                    f"Tracing ended after {done} of {limit} features: their edges take {store.nbytes / 2**30:.2f} GiB,"
                    " which is what memory_limit leaves. The graph's unexplored share says what that means;"
                    f" {'a smaller' if isinstance(store, SparseRows) else 'keep_edges=0.9 or a higher'}"
                    f" {'keep_edges' if isinstance(store, SparseRows) else 'memory_limit'} makes room for more.",
                    stacklevel=3,
                )
                break
    return traced.expanded


def _choose_next(shares: Float[Tensor, " n"], count: int, limits: Limits) -> Int[Tensor, " n_next"]:
    """The features at which most walks end: no more than would meet the bound if their walks all went on to leaves."""
    excess = float(shares.sum()) - (limits.max_unexplored or 0.0)
    count = min(count, int(shares.count_nonzero()))
    if excess <= 0 or count == 0:
        return torch.zeros(0, dtype=torch.long, device=shares.device)
    top = shares.topk(count)
    needed = int((top.values.cumsum(0) < excess).sum()) + 1
    return top.indices[:needed]
