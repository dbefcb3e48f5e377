"""A model's own neurons, which transcoders are to beat: what is active of them, and what they write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tl_clt.arguments import as_share, shown
from tl_clt.errors import CLTMismatch, ModelUnsupported
from tl_clt.evaluation.faithfulness import read_prompts
from tl_clt.lens import HookedModel, Prompt, block_hook, model_name, require_model, run_with_cache, user_hooks_aside
from tl_clt.shapes import TokenBatch

NEURONS = "mlp.hook_post"
"""Where a neuron's value is, just before the MLP's output weights."""


class Neurons(NamedTuple):
    """The neurons of a model's MLPs in the place of a transcoder's features: what is judged beside transcoders."""

    thresholds: Float[Tensor, "n_layers d_mlp"]
    """Absolute values from which on a neuron counts as active; what is less is 0, and the rest of the MLP's output."""


@torch.no_grad()
def find_neurons(model: HookedModel, prompts: Prompt | Sequence[Prompt], kept: float = 1.0) -> Neurons:
    """The neurons of a model, with one threshold a layer of what a neuron writes: its absolute value times the norm of
    its output weights.

    Args:
        model: a HookedTransformer or TransformerBridge.
        prompts: texts or token ids, one or several, that thresholds are set by; position 0 is left out.
        kept: share of values on them that stay.

    Raises:
        ConfigError: kept is no share.
        DatasetError, PromptError, TokenizerMissing: no prompts, or one that the model cannot take.
        ModelUnsupported: the MLPs have no neurons that a hook shows (mixtures of experts).
    """
    kept = as_share("kept", kept)
    require_neurons(model)
    norms, texts = output_norms(model), read_prompts(model, prompts)
    if kept == 1:
        return Neurons(torch.zeros_like(norms))
    written = torch.cat([neuron_values(model, tokens[None])[0, 1:].abs() * norms for tokens in texts])
    limits = [written[:, layer].flatten().quantile(1 - kept) for layer in range(model.cfg.n_layers)]
    return Neurons(torch.stack(limits)[:, None] / norms.clamp_min(torch.finfo(norms.dtype).tiny))


def require_neurons(model: HookedModel, neurons: Neurons | None = None) -> None:
    """Raise unless hooks show the model's neurons, and these are of it.

    Raises:
        ModelUnsupported: it is no model, or its MLPs have no neurons that a hook shows.
        CLTMismatch: the neurons are of another model.
    """
    require_model(model)
    known = model.hook_dict
    layers = range(model.cfg.n_layers)
    if not all(block_hook(t, NEURONS) in known and hasattr(_mlp(model, t), "W_out") for t in layers):
        raise ModelUnsupported(
            f"{model_name(model)} has no {block_hook(0, NEURONS)} with output weights in every block, so that it has no"
            " neurons that could stand beside transcoders. Leave neurons out."
        )
    if neurons is None:
        return
    thresholds, wanted = neurons.thresholds, output_norms(model)
    if not isinstance(thresholds, Tensor) or (thresholds.shape, thresholds.device) != (wanted.shape, wanted.device):
        raise CLTMismatch(
            f"The neurons' thresholds are {shown(thresholds)}, but {model_name(model)} has {list(wanted.shape)} (layers"
            f" by neurons) on {wanted.device}: give find_neurons(model, ...) of this model."
        )


def _mlp(model: HookedModel, layer: int) -> Any:
    block: Any = model.blocks[layer]
    return getattr(block, "mlp", None)


def output_weights(model: HookedModel) -> list[Float[Tensor, "d_mlp d_model"]]:
    """What each neuron writes when its value is 1, by layer."""
    return [_mlp(model, layer).W_out.detach() for layer in range(model.cfg.n_layers)]


def output_norms(model: HookedModel) -> Float[Tensor, "n_layers d_mlp"]:
    """The norms of `output_weights`."""
    return torch.stack([W_out.norm(dim=-1) for W_out in output_weights(model)])


def neuron_values(model: HookedModel, tokens: TokenBatch) -> Float[Tensor, "batch pos n_layers d_mlp"]:
    """The value of each neuron; hooks of the user's own are set aside."""
    names = [block_hook(layer, NEURONS) for layer in range(model.cfg.n_layers)]
    with user_hooks_aside(model):
        _, cache = run_with_cache(model, tokens, lambda name: name in names)
    return torch.stack([cache[name] for name in names], dim=2)
