"""What a graph explains: logits of the last position, and the features that they depend on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_clt.attribution.local import LocalReplacementModel
from tl_clt.errors import TargetError
from tl_clt.lens import require_tokenizer, unembedding_biases, unembedding_directions


class LogitTargets(NamedTuple):
    """Logit nodes at the last position."""

    tokens: Int[Tensor, " n_logits"]
    probs: Float[Tensor, " n_logits"]
    """Probabilities over the whole vocabulary; their sum is at most 1."""
    directions: Float[Tensor, "n_logits d_model"]
    """`W_U[:, k] - mean W_U`: what each logit reads of ln_final's output."""
    biases: Float[Tensor, " n_logits"]
    """`b_U[k] - mean b_U`."""
    heights: Float[Tensor, " n_logits"]
    """Logit minus mean logit, before any soft-cap: what the in-edges of each sum to."""


def logit_targets(
    local: LocalReplacementModel,
    targets: Sequence[int | str] | None,
    max_n_logits: int,
    desired_logit_prob: float,
) -> LogitTargets:
    """The smallest set of top logits with the wanted probability, at most `max_n_logits`; or the tokens named.

    Raises:
        TargetError: a count, probability or token out of range; or a string that is not one token.
    """
    d_vocab = local.model.cfg.d_vocab
    if not 1 <= max_n_logits <= d_vocab:
        raise TargetError(f"max_n_logits is {max_n_logits}: give 1 to {d_vocab}, the size of the vocabulary.")
    if not 0 < desired_logit_prob <= 1:
        raise TargetError(f"desired_logit_prob is {desired_logit_prob}: give more than 0 and at most 1.")
    probs = local.logits[-1].detach().double().softmax(dim=-1)
    if targets is None:
        top = probs.topk(max_n_logits)
        below = top.values.cumsum(dim=0) < desired_logit_prob
        tokens = top.indices[: int(below.sum()) + 1]
    else:
        tokens = _named_tokens(local, targets)
    logits = local.clean.logits[-1]
    return LogitTargets(
        tokens,
        probs[tokens].to(logits.dtype),
        unembedding_directions(local.model, tokens),
        unembedding_biases(local.model, tokens),
        logits[tokens] - logits.mean(),
    )


def _named_tokens(local: LocalReplacementModel, targets: Sequence[int | str]) -> Int[Tensor, " n"]:
    if len(targets) == 0:
        raise TargetError("targets is empty: name at least one token, or leave it out for the top logits.")
    ids = [t if isinstance(t, int) else _single_token(local, t) for t in targets]
    d_vocab = local.model.cfg.d_vocab
    for token in ids:
        if not 0 <= token < d_vocab:
            raise TargetError(f"Target token {token} is out of range: ids run from 0 to {d_vocab - 1}.")
    if len(set(ids)) < len(ids):
        raise TargetError("targets names a token twice: name each once.")
    return torch.tensor(ids, device=local.tokens.device)


def _single_token(local: LocalReplacementModel, text: str) -> int:
    require_tokenizer(local.model, "read target strings with")
    ids = local.model.to_tokens(text, prepend_bos=False)[0].tolist()
    if len(ids) != 1:
        raise TargetError(
            f"Target '{text}' is {len(ids)} tokens: name one token, perhaps with a leading space (' {text.strip()}')."
        )
    return int(ids[0])
