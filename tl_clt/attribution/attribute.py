"""`attribute`: from a prompt to its attribution graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast, get_args, overload

import torch
from torch import Tensor

from tl_clt.attribution.engines import EngineChoice
from tl_clt.attribution.expansion import Limits
from tl_clt.attribution.graph import AttributionGraph
from tl_clt.attribution.streams import Bos
from tl_clt.attribution.targets import TargetsGiven, as_targets
from tl_clt.attribution.tracing import Tracer, TracingOptions
from tl_clt.errors import ConfigError, PromptError
from tl_clt.lens import HookedModel, Prompt, to_tokens
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
    prompts = _as_list(model, prompt_or_tokens)
    others = _contrasts(model, contrast, len(prompts))
    options = TracingOptions(
        targets=as_targets(targets),
        max_n_logits=max_n_logits,
        desired_logit_prob=desired_logit_prob,
        limits=limits,
        bos=bos,
        bias_nodes=bias_nodes,
        batch_size=batch_size,
        keep_edges=keep_edges,
        memory_limit=memory_limit,
        progress=progress,
    )
    # Gradients, and graphs whose tensors can be used anywhere, need normal tensors.
    with torch.inference_mode(False):
        tracer = Tracer(model, clt, engine, options)
        pairs = zip(prompts, others, strict=True)
        graphs = [tracer.trace(tokens.clone(), None if other is None else other.clone()) for tokens, other in pairs]
    return graphs if several else graphs[0]


def _is_several(prompts: Prompt | Prompts) -> bool:
    """Whether there is more than one prompt, or a list of one."""
    if isinstance(prompts, str):
        return False
    if isinstance(prompts, Tensor):
        return prompts.ndim == 2 and len(prompts) > 1
    return len(prompts) > 0 and not isinstance(prompts[0], int) and not _is_number(prompts[0])


def _is_number(value: object) -> bool:
    return not isinstance(value, (str, list, tuple)) and getattr(value, "ndim", 0) == 0


def _as_list(model: HookedModel, prompts: Prompt | Prompts) -> list[Tokens]:
    if _is_several(prompts):
        return [to_tokens(model, cast(Prompt, prompt)) for prompt in prompts]
    return [to_tokens(model, cast(Prompt, prompts))]


def _contrasts(model: HookedModel, contrast: Prompt | Prompts | None, n_prompts: int) -> Sequence[Tokens] | list[None]:
    if contrast is None:
        return [None] * n_prompts
    others = _as_list(model, contrast)
    if not _is_several(contrast):
        return others * n_prompts
    if len(others) != n_prompts:
        raise PromptError(f"{len(others)} contrast prompts for {n_prompts} prompts: give one, or one for each.")
    return others


def _check_choices(engine: str, bos: str, keep_edges: float | None) -> None:
    for name, value, choices in (("engine", engine, get_args(EngineChoice)), ("bos", bos, get_args(Bos))):
        if value not in choices:
            raise ConfigError(f"{name} is {value!r}: give one of {', '.join(choices)}.")
    if keep_edges is not None and not 0 < keep_edges <= 1:
        raise ConfigError(f"keep_edges is {keep_edges}: give a share, more than 0 and at most 1, or None for all.")
