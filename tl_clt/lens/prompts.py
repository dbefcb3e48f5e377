"""From what a user gives as a prompt to token ids that the model can take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from tl_clt.errors import PromptError, TokenizerMissing
from tl_clt.lens.hooks import model_name
from tl_clt.lens.types import HookedModel
from tl_clt.shapes import TokenBatch, Tokens

Prompt: TypeAlias = str | Sequence[int] | Tensor
PromptBatch: TypeAlias = Prompt | Sequence[str] | Sequence[Sequence[int]]
"""One prompt, or several: texts, lists of ids, or ids [batch, pos]."""


def require_tokenizer(model: HookedModel, purpose: str) -> None:
    """Raise `TokenizerMissing` where the model has no tokenizer."""
    if getattr(model, "tokenizer", None) is None:
        raise TokenizerMissing(
            f"{model_name(model)} has no tokenizer to {purpose}. Give token ids, or load the model with its"
            " tokenizer: load_model(folder) reads tokenizer files that lie beside the weights."
        )


def to_tokens(model: HookedModel, prompt: Prompt) -> Tokens:
    """Token ids [pos] of a prompt, the beginning-of-sequence token first where the model uses one.

    Args:
        prompt: text, or token ids [pos] or [1, pos] taken as they are.

    Raises:
        TokenizerMissing: text for a model without a tokenizer.
        PromptError: empty, one token long, longer than the context, or with ids out of range.
    """
    if isinstance(prompt, str):
        if not prompt.strip():
            raise PromptError("The prompt is empty. Give some text, or at least two token ids.")
        require_tokenizer(model, "read text with")
        # TransformerLens would cut a long prompt to the context by itself.
        tokens = model.to_tokens(prompt, truncate=False)[0]
    else:
        try:
            tokens = torch.as_tensor(prompt)
        except (TypeError, ValueError, RuntimeError) as error:
            raise PromptError(f"The prompt is neither text nor one list of token ids ({error}).") from error
        whole = not tokens.is_floating_point() and not tokens.is_complex() and tokens.dtype != torch.bool
        if not whole and tokens.numel() > 0:
            raise PromptError(f"Token ids must be whole numbers, but the prompt has dtype {tokens.dtype}.")
        if tokens.ndim == 2 and tokens.shape[0] == 1:
            tokens = tokens[0]
    tokens = tokens.to(device=model.cfg.device, dtype=torch.long)
    _check(model, tokens)
    return tokens


class PromptRows(NamedTuple):
    """Several prompts as rows of one batch."""

    tokens: TokenBatch
    mask: Int[Tensor, "batch pos"] | None
    """1 where a row has its own tokens, 0 where it is padded; None where nothing is known to be padded."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt, padding not counted."""
        batch, n_pos = self.tokens.shape
        return [n_pos] * batch if self.mask is None else self.mask.sum(dim=1).tolist()

    @property
    def offsets(self) -> list[int]:
        """Columns of padding before each prompt."""
        return padding_before(self.mask, len(self.tokens))


def padding_before(mask: Int[Tensor, "batch pos"] | None, n_prompts: int) -> list[int]:
    """Columns of padding before each prompt's first token."""
    return [0] * n_prompts if mask is None else (mask != 0).long().argmax(dim=1).tolist()


def to_token_batch(
    model: HookedModel, prompts: PromptBatch, attention_mask: Int[Tensor, "batch pos"] | None = None
) -> PromptRows:
    """Token ids [batch, pos] of one prompt or of several. Unequal ones are padded on the tokenizer's side.

    Args:
        prompts: text, token ids, or several of either.
        attention_mask: for prompts that are padded already, as a tensor: 1 at their own tokens, 0 at padding.

    Raises:
        TokenizerMissing, PromptError: as `to_tokens`; or a mask of another shape, or with gaps.
    """
    if attention_mask is not None:
        return _masked(model, prompts, attention_mask)
    several = isinstance(prompts, Tensor) and prompts.ndim == 2
    several = several or (isinstance(prompts, Sequence) and len(prompts) > 0 and not isinstance(prompts[0], int))
    if isinstance(prompts, str) or not several:
        return PromptRows(to_tokens(model, prompts)[None], None)  # type: ignore[arg-type]
    rows = [to_tokens(model, prompt) for prompt in prompts]  # type: ignore[arg-type]
    if not rows:
        raise PromptError("There is no prompt in the batch.")
    longest = max(map(len, rows))
    if min(map(len, rows)) == longest:
        return PromptRows(torch.stack(rows), None)
    tokenizer = getattr(model, "tokenizer", None)
    left = getattr(tokenizer, "padding_side", "right") == "left"
    pad = getattr(tokenizer, "pad_token_id", None) or 0
    padded, masks = [], []
    for row in rows:
        padding = row.new_full((longest - len(row),), pad)
        own, none = torch.ones_like(row), torch.zeros_like(padding)
        padded.append(torch.cat([padding, row] if left else [row, padding]))
        masks.append(torch.cat([none, own] if left else [own, none]))
    return PromptRows(torch.stack(padded), torch.stack(masks))


def _masked(model: HookedModel, prompts: PromptBatch, attention_mask: Tensor) -> PromptRows:
    """Prompts that are padded already."""
    if not isinstance(prompts, Tensor) or prompts.ndim != 2:
        raise PromptError("attention_mask is for token ids [batch, pos] that are padded already: give such a tensor.")
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != prompts.shape:
        shape = list(getattr(attention_mask, "shape", []))
        raise PromptError(f"attention_mask has shape {shape}, but the token ids have {list(prompts.shape)}.")
    tokens, mask = prompts.to(model.W_E.device), (attention_mask != 0).long().to(model.W_E.device)
    for row, own in zip(tokens, mask.bool(), strict=True):
        where = torch.nonzero(own).flatten()
        if len(where) and len(where) != int(where[-1] - where[0]) + 1:
            raise PromptError("attention_mask has a gap: padding is before a prompt, or behind it.")
        to_tokens(model, row[own])
    return PromptRows(tokens, mask)


def _check(model: HookedModel, tokens: Tensor) -> None:
    if tokens.ndim != 1:
        raise PromptError(f"The prompt has shape {list(tokens.shape)}: give one prompt, token ids [pos] or [1, pos].")
    if len(tokens) < 2:
        count = "1 token" if len(tokens) == 1 else "0 tokens"
        raise PromptError(
            f"The prompt is {count} long: give at least 2. At the first position a model has seen"
            " nothing, and there is nothing to trace."
        )
    if len(tokens) > model.cfg.n_ctx:
        raise PromptError(
            f"The prompt has {len(tokens)} tokens, but the context of {model_name(model)} is {model.cfg.n_ctx}."
            " Shorten it: nothing is cut off silently."
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= model.cfg.d_vocab:
        wrong = low if low < 0 else high
        raise PromptError(
            f"Token id {wrong} is out of range: {model_name(model)} has ids 0 to {model.cfg.d_vocab - 1}."
            " Was the prompt tokenised for another model?"
        )


def token_strings(model: HookedModel, tokens: Tokens) -> list[str]:
    """Each token as text, or its number where the model has no tokenizer."""
    if getattr(model, "tokenizer", None) is None:
        return [f"#{int(t)}" for t in tokens]
    return [str(model.to_string(t.reshape(1))) for t in tokens]
