"""From the tokens of one prompt to its graph, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from tl_clt.attribution.autograd import Engine
from tl_clt.attribution.contrast import contrast
from tl_clt.attribution.expansion import Limits, expand
from tl_clt.attribution.graph import AttributionGraph
from tl_clt.attribution.local import LocalReplacementModel, build_local_model
from tl_clt.attribution.memory import Budget, DenseRows, MemoryPlan, SparseRows, plan_memory
from tl_clt.attribution.sources import build_sources
from tl_clt.attribution.streams import Bos
from tl_clt.attribution.sweep import EngineChoice, EngineMaker
from tl_clt.attribution.targets import Target, find_targets, residual_hooks
from tl_clt.lens import HookedModel, model_name, token_strings
from tl_clt.shapes import Tokens
from tl_clt.transcoder import CrossLayerTranscoder


@dataclass(frozen=True, kw_only=True)
class TracingOptions:
    """The arguments of `attribute` that hold for every prompt of a call."""

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
        local = self._local(tokens)
        targets = find_targets(local, options.targets, options.max_n_logits, options.desired_logit_prob)
        read, elsewhere = targets.readouts, None
        if other is None:
            writes = local.writes(options.bias_nodes)
        else:
            writes, targets, elsewhere = contrast(local, self._local(other), targets, options.bias_nodes)
        budget.require_sources(self.clt, writes, local.has_norm_behind)
        sources = build_sources(local, writes, targets)
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
                **self._info(tokens, other, engine, plan),
                "n_active_features": len(writes.strengths),
                "n_traced_features": int(expanded.sum()) - len(targets.labels),
            },
        )

    def _local(self, tokens: Tokens) -> LocalReplacementModel:
        return build_local_model(self.model, self.clt, tokens, self.options.bos, self.hooks)

    def _info(self, tokens: Tokens, other: Tensor | None, engine: Engine, plan: MemoryPlan) -> dict[str, Any]:
        info = {
            "prompt": self._text(tokens),
            "model_name": model_name(self.model),
            "clt_model_name": self.clt.cfg.model_name,
            "n_layers": self.clt.cfg.n_layers,
            "d_transcoder": self.clt.cfg.d_transcoder,
            "bos": self.options.bos,
            "bias_nodes": self.options.bias_nodes,
            "engine": engine.name,
            "planned_gib": round(plan.total / 2**30, 3),
        }
        if self.options.keep_edges is not None:
            info["keep_edges"] = self.options.keep_edges
        if other is not None:
            info["contrast"] = self._text(other)
        return info

    def _text(self, tokens: Tokens) -> str:
        """A prompt as one text, spaced as the tokenizer spaces it."""
        if getattr(self.model, "tokenizer", None) is None:
            return " ".join(token_strings(self.model, tokens))
        return str(self.model.to_string(tokens))
