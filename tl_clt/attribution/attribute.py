"""`attribute`: from a prompt to its attribution graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args, overload

import torch
from torch import Tensor

from tl_clt.arguments import as_choice, as_number, as_share, as_switch, as_whole
from tl_clt.attribution.expansion import Limits
from tl_clt.attribution.graph import AttributionGraph
from tl_clt.attribution.streams import Bos
from tl_clt.attribution.sweep import EngineChoice
from tl_clt.attribution.targets import TargetsGiven, as_targets
from tl_clt.attribution.tracing import Tracer, TracingOptions
from tl_clt.errors import PromptError, TargetError
from tl_clt.lens import HookedModel, Prompt, is_several, to_prompts
from tl_clt.replacement import check_fit, require_free
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
    several = is_several(prompt_or_tokens)
    prompts = to_prompts(model, prompt_or_tokens)
    others = _contrasts(model, contrast, prompts)
    # Gradients, and graphs whose tensors can be used anywhere, need normal tensors.
    with torch.inference_mode(False):
        tracer = Tracer(model, clt, chosen, options)
        pairs = zip(prompts, others, strict=True)
        graphs = [tracer.trace(tokens.clone(), None if other is None else other.clone()) for tokens, other in pairs]
    return graphs if several else graphs[0]


def _contrasts(
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
