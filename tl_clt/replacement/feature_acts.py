"""Feature activations of a prompt: what a CLT makes of the model's own activations."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_clt.lens import (
    HookedModel,
    PromptBatch,
    block_hook,
    is_several,
    run_blocks_with_cache,
    to_token_batch,
    user_hooks_aside,
)
from tl_clt.replacement.fit import check_fit
from tl_clt.shapes import LayerInputs, TokenBatch
from tl_clt.transcoder import CrossLayerTranscoder


@torch.no_grad()
def feature_acts(
    model: HookedModel,
    clt: CrossLayerTranscoder,
    prompt: PromptBatch,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, "*batch pos n_layers d_transcoder"]:
    """Activations of every feature of a CLT on a prompt, or on several.

    Hooks of the user's own are set aside, as in `attribute` and `intervene`.

    Args:
        model: a HookedTransformer or TransformerBridge.
        clt: a CLT of this model.
        prompt: text or token ids; or several of either, as for `intervene`.
        attention_mask: where token ids [batch, pos] are padded already, 1 at their own tokens.

    Returns:
        [pos, n_layers, d_transcoder] for one prompt. For several [batch, pos, n_layers, d_transcoder], padded on the
        tokenizer's side where their lengths differ, with 0 at padding.

    Raises:
        CLTMismatch, HookNotFound: the CLT is of another model.
        PromptError, TokenizerMissing: a prompt that the model cannot take.
    """
    check_fit(model, clt)
    prompts = to_token_batch(model, prompt, attention_mask)
    acts = clt.encode(layer_inputs(model, clt, prompts.tokens, prompts.mask))
    if prompts.mask is not None:
        acts = acts * prompts.mask[..., None, None].to(acts)
    return acts if is_several(prompt) else acts[0]


@torch.no_grad()
def layer_inputs(
    model: HookedModel, clt: CrossLayerTranscoder, tokens: TokenBatch, mask: Int[Tensor, "batch pos"] | None = None
) -> LayerInputs:
    """What features read on prompts, [batch, pos, n_layers, d_model] in the CLT's number type; users' hooks aside."""
    names = [block_hook(t, clt.cfg.input_hook) for t in clt.layers]
    call = {} if mask is None else {"attention_mask": mask}
    with user_hooks_aside(model):
        cache = run_blocks_with_cache(model, tokens, lambda name: name in names, **call)
    return torch.stack([cache[name] for name in names], dim=-2).to(clt.W_enc.dtype)
