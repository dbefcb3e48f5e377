"""`attribute`: from a prompt to its attribution graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args, overload

import torch
from torch import Tensor

from tl_clt.attribution.contrast import contrast as contrast_prompts
from tl_clt.attribution.engines import EngineChoice, EngineMaker
from tl_clt.attribution.expansion import Limits, expand
from tl_clt.attribution.graph import AttributionGraph
from tl_clt.attribution.local import build_local_model
from tl_clt.attribution.memory import plan_memory
from tl_clt.attribution.row_store import DenseRows, SparseRows
from tl_clt.attribution.sources import build_sources
from tl_clt.attribution.streams import Bos
from tl_clt.attribution.targets import Target, find_targets, residual_hooks
from tl_clt.errors import ConfigError, PromptError
from tl_clt.lens import HookedModel, Prompt, model_name, to_tokens, token_strings
from tl_clt.replacement import check_fit, require_free
from tl_clt.shapes import Tokens
from tl_clt.transcoder import CrossLayerTranscoder

Prompts = Sequence[str] | Sequence[Sequence[int]] | Sequence[Tensor]


@overload
def attribute(
    model: HookedModel, clt: CrossLayerTranscoder, prompt_or_tokens: Prompt, *args: Any, **options: Any
) -> AttributionGraph: ...
@overload
def attribute(
    model: HookedModel, clt: CrossLayerTranscoder, prompt_or_tokens: Prompts, *args: Any, **options: Any
) -> list[AttributionGraph]: ...
def attribute(
    model: HookedModel,
    clt: CrossLayerTranscoder,
    prompt_or_tokens: Prompt | Prompts,
    targets: Sequence[Target] | None = None,
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

    J is the linear map through the residual stream and attention's OV circuits with patterns and norm scales held.
    A logit node k reads `W_U[:, k] - mean W_U` of ln_final's output with its scale held, before any soft-cap. The
    in-edges of a traced node sum to its pre-activation minus b_enc (features) or its logit minus the mean logit,
    exactly, with `bias_nodes=True` and any `bos` but "drop".

    The model is left as it was. Hooks of the user's own are set aside while it is traced. Models in half precision
    are traced with float32 sums.

    Args:
        model: a HookedTransformer or TransformerBridge.
        clt: a CLT of this model.
        prompt_or_tokens: text, or token ids [pos]; or a list of such.
        targets: token ids or one-token strings whose logits to explain, or any of `TokenTarget`, `DifferenceTarget`,
            `FeatureTarget`, `DirectionTarget`; None for the most probable tokens.
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
        keep_edges: hold only each node's strongest in-edges that make up this share of its absolute input, as a
            sparse graph; None to hold all.
        memory_limit: GiB that tracing may take beyond what is in use; None for 80% of what is free.

    Raises:
        CLTMismatch, HookNotFound: the CLT is of another model.
        PromptError, TokenizerMissing, TargetError, ConfigError: an argument out of range.
        ModelUnsupported, LocalModelMismatch: the architecture cannot be traced exactly, or not by this engine.
        MemoryLimit: it does not fit.
    """
    _check_choices(engine, bos, keep_edges)
    limits = Limits(max_feature_nodes, max_unexplored)
    check_fit(model, clt)
    require_free(model)
    several = _is_several(prompt_or_tokens)
    prompts = [to_tokens(model, p) for p in (prompt_or_tokens if several else [prompt_or_tokens])]  # type: ignore
    others = _contrasts(model, contrast, len(prompts))
    hooks = residual_hooks(model, targets)
    maker: EngineMaker | None = None
    graphs = []
    for tokens, other in zip(prompts, others, strict=True):
        local = build_local_model(model, clt, tokens, bos, hooks)
        found = find_targets(local, targets, max_n_logits, desired_logit_prob)
        maker = maker or EngineMaker(engine, local)
        checked, there = found.readouts, None
        if other is None:
            writes = local.writes(bias_nodes)
        else:
            against = build_local_model(model, clt, other, bos, hooks)
            writes, found, there = contrast_prompts(local, against, found, bias_nodes)
        sources = build_sources(local, writes, found)
        tracer = maker.make(local, sources, checked)
        nodes = sources.nodes
        n_rows = limits.n_rows(len(writes.strengths)) + len(found.labels)
        plan = plan_memory(tracer, n_rows, keep_edges, batch_size, memory_limit)
        store = DenseRows(nodes, local.dtype) if keep_edges is None else SparseRows(nodes, local.dtype, keep_edges)
        expanded = expand(tracer, found, store, limits, plan, progress)
        graphs.append(
            AttributionGraph(
                nodes=nodes,
                adjacency=store.adjacency(),
                expanded=expanded,
                tokens=tokens,
                prompt_tokens=token_strings(model, tokens),
                logit_probs=found.weights,
                logit_tokens=found.labels,
                dropped=None if keep_edges is None else store.dropped,
                contrast_activation=None if there is None else _on_features(there, len(nodes)),
                info={
                    "prompt": _prompt_text(model, tokens),
                    "model_name": model_name(model),
                    "clt_model_name": clt.cfg.model_name,
                    "n_layers": clt.cfg.n_layers,
                    "d_transcoder": clt.cfg.d_transcoder,
                    "bos": bos,
                    "bias_nodes": bias_nodes,
                    "engine": tracer.name,
                    "planned_gib": round(plan.total / 2**30, 3),
                    **({} if keep_edges is None else {"keep_edges": keep_edges}),
                    **({} if other is None else {"contrast": _prompt_text(model, other)}),
                },
            )
        )
    return graphs if several else graphs[0]


def _on_features(values: Tensor, n_nodes: int) -> Tensor:
    """Values of the features, which are the first nodes, and 0 for the rest."""
    return torch.cat([values, values.new_zeros(n_nodes - len(values))])


def _is_several(prompts: Prompt | Prompts) -> bool:
    """Whether there is more than one prompt, or a list of one."""
    if isinstance(prompts, str):
        return False
    if isinstance(prompts, Tensor):
        return prompts.ndim == 2 and len(prompts) > 1
    return len(prompts) > 0 and not isinstance(prompts[0], int) and not _is_number(prompts[0])


def _is_number(value: object) -> bool:
    return not isinstance(value, (str, list, tuple)) and getattr(value, "ndim", 0) == 0


def _contrasts(model: HookedModel, contrast: Prompt | Prompts | None, n_prompts: int) -> list[Tokens | None]:
    if contrast is None:
        return [None] * n_prompts
    if not _is_several(contrast):
        return [to_tokens(model, contrast)] * n_prompts  # type: ignore[arg-type]
    if len(contrast) != n_prompts:
        raise PromptError(f"{len(contrast)} contrast prompts for {n_prompts} prompts: give one, or one for each.")
    return [to_tokens(model, prompt) for prompt in contrast]


def _check_choices(engine: str, bos: str, keep_edges: float | None) -> None:
    for name, value, choices in (("engine", engine, get_args(EngineChoice)), ("bos", bos, get_args(Bos))):
        if value not in choices:
            raise ConfigError(f"{name} is {value!r}: give one of {', '.join(choices)}.")
    if keep_edges is not None and not 0 < keep_edges <= 1:
        raise ConfigError(f"keep_edges is {keep_edges}: give a share, more than 0 and at most 1, or None for all.")


def _prompt_text(model: HookedModel, tokens: Tokens) -> str:
    """The prompt as one text, spaced as the tokenizer spaces it."""
    if getattr(model, "tokenizer", None) is None:
        return " ".join(token_strings(model, tokens))
    return str(model.to_string(tokens))
