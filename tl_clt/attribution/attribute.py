"""`attribute`: from a prompt to its attribution graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch

from tl_clt.attribution.engines import AutogradEngine
from tl_clt.attribution.expansion import expand
from tl_clt.attribution.graph import AttributionGraph
from tl_clt.attribution.local import Bos, build_local_model
from tl_clt.attribution.sources import build_sources
from tl_clt.attribution.targets import logit_targets
from tl_clt.errors import ConfigError
from tl_clt.lens import HookedModel, Prompt, model_name, to_tokens, token_strings
from tl_clt.replacement import check_fit, require_free
from tl_clt.shapes import Tokens
from tl_clt.transcoder import CrossLayerTranscoder

Engine = Literal["auto", "autograd"]
DEFAULT_BATCH_SIZE = 64


def attribute(
    model: HookedModel,
    clt: CrossLayerTranscoder,
    prompt_or_tokens: Prompt,
    targets: Sequence[int | str] | None = None,
    max_n_logits: int = 10,
    desired_logit_prob: float = 0.95,
    max_feature_nodes: int | None = None,
    max_unexplored: float | None = None,
    engine: Engine = "auto",
    bos: Bos = "error",
    bias_nodes: bool = True,
    batch_size: int | None = None,
    progress: bool = True,
) -> AttributionGraph:
    """Trace one prompt into an attribution graph (Methods, "Attribution Graphs").

        edge(s -> t) = act_s * sum_{target layers l of s, below t} W_dec[s -> l] . J(l, pos_s -> input of t) . W_enc[t]

    J is the linear map through the residual stream and attention's OV circuits with patterns and norm scales held.
    A logit node k reads `W_U[:, k] - mean W_U` of ln_final's output with its scale held, before any soft-cap. The
    in-edges of a traced node sum to its pre-activation minus b_enc (features) or its logit minus the mean logit,
    exactly, with `bias_nodes=True` and any `bos` but "drop".

    The model is left as it was. Hooks of the user's own are set aside while it is traced.

    Args:
        model: a HookedTransformer or TransformerBridge.
        clt: a CLT of this model.
        prompt_or_tokens: text, or token ids [pos].
        targets: token ids or one-token strings whose logits to explain; None for the most probable ones.
        max_n_logits: at most so many logit nodes.
        desired_logit_prob: as many logit nodes as reach this probability together.
        max_feature_nodes: trace in-edges of at most so many features, the most influential; None for all.
            Features without a row stay in the graph as sources.
        max_unexplored: trace until at most this share of influence ends at features without a row.
        engine: "autograd"; "auto" picks it.
        bos: what position 0 contributes: "error" its whole MLP outputs as errors, "drop" nothing (as
            circuit-tracer), "features" its features and errors.
        bias_nodes: whether position embeddings and biases have nodes.
        batch_size: targets a backward pass; 64 where left out.
        progress: show a bar where it takes longer than 2 s.

    Raises:
        CLTMismatch, HookNotFound: the CLT is of another model.
        PromptError, TokenizerMissing, TargetError, ConfigError: an argument out of range.
        ModelUnsupported, LocalModelMismatch: the architecture cannot be traced exactly.
    """
    batch_size = DEFAULT_BATCH_SIZE if batch_size is None else batch_size
    _check_choices(engine, bos, batch_size)
    check_fit(model, clt)
    require_free(model)
    tokens = to_tokens(model, prompt_or_tokens)
    local = build_local_model(model, clt, tokens, bos)
    logits = logit_targets(local, targets, max_n_logits, desired_logit_prob)
    sources = build_sources(local, logits.tokens, logits.heights, bias_nodes)
    rows = expand(AutogradEngine(local, sources, logits), max_feature_nodes, max_unexplored, batch_size, progress)
    with torch.no_grad():
        return AttributionGraph(
            nodes=sources.nodes,
            adjacency=rows.adjacency.detach(),
            expanded=rows.expanded,
            tokens=tokens,
            prompt_tokens=token_strings(model, tokens),
            logit_probs=logits.probs,
            logit_tokens=token_strings(model, logits.tokens),
            info={
                "prompt": _prompt_text(model, tokens),
                "model_name": model_name(model),
                "clt_model_name": clt.cfg.model_name,
                "n_layers": clt.cfg.n_layers,
                "d_transcoder": clt.cfg.d_transcoder,
                "bos": bos,
                "bias_nodes": bias_nodes,
                "engine": AutogradEngine.name,
            },
        )


def _check_choices(engine: str, bos: str, batch_size: int) -> None:
    for name, value, choices in (("engine", engine, get_args(Engine)), ("bos", bos, get_args(Bos))):
        if value not in choices:
            raise ConfigError(f"{name} is {value!r}: give one of {', '.join(choices)}.")
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}: give at least 1.")


def _prompt_text(model: HookedModel, tokens: Tokens) -> str:
    """The prompt as one text, spaced as the tokenizer spaces it."""
    if getattr(model, "tokenizer", None) is None:
        return " ".join(token_strings(model, tokens))
    return str(model.to_string(tokens))
