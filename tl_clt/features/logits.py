"""What a feature does to the output directly: its decoder vectors through the unembedding (the "logit lens")."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_clt.arguments import as_whole
from tl_clt.lens import HookedModel, require_tokenizer, token_strings
from tl_clt.replacement import check_fit
from tl_clt.transcoder import CrossLayerTranscoder


@torch.no_grad()
def direct_logits(
    model: HookedModel, clt: CrossLayerTranscoder, layer: int, features: Int[Tensor, " n"] | Sequence[int]
) -> Float[Tensor, "n d_vocab"]:
    """Direction in logit space of the sum of each feature's decoder vectors, its mean over the vocabulary removed.

    ln_final's gain and scale are left out: the order of tokens is a guide, not a measurement.
    """
    check_fit(model, clt)
    written = clt.decoder_rows(layer, features).sum(dim=1).to(model.W_U.dtype)
    logits = written @ model.W_U
    return logits - logits.mean(dim=-1, keepdim=True)


def promoted_tokens(
    model: HookedModel, clt: CrossLayerTranscoder, layer: int, features: Int[Tensor, " n"] | Sequence[int], k: int = 3
) -> list[list[str]]:
    """For each feature, the k tokens that it pushes up most directly, as text."""
    check_fit(model, clt)
    require_tokenizer(model, "name tokens with")
    k = as_whole("k", k, 1, model.cfg.d_vocab, why="the size of the vocabulary")
    top = direct_logits(model, clt, layer, features).topk(k, dim=-1).indices
    return [token_strings(model, row) for row in top]
