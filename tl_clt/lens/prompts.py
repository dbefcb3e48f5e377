"""From what a user gives as a prompt to token ids that the model can take."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from tl_clt.arguments import has_values, is_whole, lone_surrogate, plain, shown
from tl_clt.errors import PromptError, TokenizerMissing
from tl_clt.lens.hooks import HookedModel, model_name
from tl_clt.shapes import TokenBatch, Tokens

Prompt: TypeAlias = str | Sequence[int] | Tensor | np.ndarray | Mapping[str, Any]
"""Text; or token ids, in a list, tensor, array or a tokenizer's encoding (its `input_ids`)."""
PromptBatch: TypeAlias = Prompt | Sequence[str] | Sequence[Sequence[int]] | Sequence[Tensor]
"""One prompt, or several: texts, lists of ids, or ids [batch, pos]."""
WANTED = "text, or token ids in a list, tensor, array or a tokenizer's encoding"


def require_tokenizer(model: HookedModel, purpose: str) -> None:
    """Raise `TokenizerMissing` where the model has no tokenizer."""
    if getattr(model, "tokenizer", None) is None:
        raise TokenizerMissing(
            f"{model_name(model)} has no tokenizer to {purpose}. Give token ids, or load the model with its"
            " tokenizer: load_model(folder) reads tokenizer files that lie beside the weights."
        )


def to_tokens(model: HookedModel, prompt: Prompt) -> Tokens:
    """Token ids [pos] of a prompt, the beginning-of-sequence token first where the model uses one.

    Text that begins with that token itself gets no second one. Of a tokenizer's encoding the `input_ids` are taken,
    without what its `attention_mask` marks as padding.

    Args:
        prompt: text, or token ids [pos] or [1, pos] taken as they are.

    Raises:
        TokenizerMissing: text for a model without a tokenizer.
        PromptError: no text and no ids; empty, one token long, longer than the context, or with ids out of range.
    """
    if isinstance(prompt, str):
        tokens = _read(model, prompt)
    elif isinstance(prompt, Mapping):
        batch = _masked(model, *_unpacked(prompt))
        if len(batch.tokens) > 1:
            raise PromptError(f"The prompt is an encoding of {len(batch.tokens)} prompts: give one.")
        tokens = batch.tokens[0] if batch.mask is None else batch.tokens[0][batch.mask[0].bool()]
    else:
        tokens = _as_ids(prompt)
        if tokens.ndim == 2 and tokens.shape[0] == 1:
            tokens = tokens[0]
    tokens = tokens.to(device=model.cfg.device, dtype=torch.long)
    _check(model, tokens)
    return tokens


def is_several(prompts: PromptBatch) -> bool:
    """Whether this is several prompts, or a list of one; ids [1, pos] are one prompt."""
    if isinstance(prompts, Mapping):
        prompts = prompts.get("input_ids", ())
    if isinstance(prompts, Tensor) or (isinstance(prompts, np.ndarray) and prompts.dtype.kind not in "OUS"):
        return prompts.ndim == 2 and len(prompts) > 1
    ordered = hasattr(prompts, "__getitem__") and hasattr(prompts, "__len__")
    if isinstance(prompts, (str, bytes)) or not ordered or len(prompts) == 0:
        return False
    return not isinstance(plain(next(iter(prompts))), (int, float, complex, bytes, type(None)))


def to_prompts(model: HookedModel, prompts: PromptBatch) -> list[Tokens]:
    """Token ids [pos] of each of several prompts, or of one.

    Raises:
        TokenizerMissing, PromptError: as `to_tokens`; of several, it says which is at fault.
    """
    if not is_several(prompts):
        return [to_tokens(model, prompts)]  # type: ignore[arg-type]
    if isinstance(prompts, Mapping):
        rows = _masked(model, *_unpacked(prompts))
        masks = [row.new_ones(len(row)) for row in rows.tokens] if rows.mask is None else rows.mask
        return [row[mask.bool()] for row, mask in zip(rows.tokens, masks, strict=True)]
    return list(one_after_another(model, prompts))  # type: ignore[arg-type]


def one_after_another(model: HookedModel, prompts: Iterable[Prompt], name: str = "prompts") -> Iterator[Tokens]:
    """Token ids [pos] of each of several prompts.

    Args:
        name: what the prompts are called in an error, which says which of them is at fault: "prompts[3]".

    Raises:
        TokenizerMissing, PromptError: as `to_tokens`.
    """
    for number, prompt in enumerate(prompts):
        with at_fault(f"{name}[{number}]"):
            tokens = to_tokens(model, prompt)
        yield tokens


@contextmanager
def at_fault(name: str) -> Iterator[None]:
    """Within the block, an error names the prompt that it is about."""
    try:
        yield
    except PromptError as error:
        raise PromptError(f"{name}: {error}") from error


def _read(model: HookedModel, text: str) -> Tensor:
    if not text.strip():
        raise PromptError("The prompt is empty. Give some text, or at least two token ids.")
    half = lone_surrogate(text)
    if half is not None:
        raise PromptError(
            f"The prompt holds {half!r}, half of a surrogate pair, which is no character. Read the text as UTF-8, or"
            " replace such halves: text.encode('utf-8', 'replace').decode()."
        )
    require_tokenizer(model, "read text with")
    # TransformerLens would cut a long prompt to the context by itself.
    tokens = model.to_tokens(text, truncate=False)[0]
    tokenizer: Any = model.tokenizer
    bos = tokenizer.bos_token_id
    if bos is not None and tokens[:2].tolist() == [bos, bos]:
        without_bos = model.to_tokens(text, prepend_bos=False, truncate=False)[0]
        tokens = without_bos if int(without_bos[0]) == bos else tokens
    if _has_unknown(tokenizer, tokens, text):
        warnings.warn(
            f"The tokenizer of {model_name(model)} reads a part of the prompt that it does not know as"
            f" {tokenizer.unk_token!r}; model.to_str_tokens(prompt) shows where.",
            stacklevel=4,
        )
    return tokens


def _has_unknown(tokenizer: Any, tokens: Tensor, text: str) -> bool:
    """Whether a text has parts that the tokenizer does not know, other than its name for these."""
    unknown = unknown_id(tokenizer)
    return unknown is not None and unknown in tokens and tokenizer.unk_token not in text


def unknown_id(tokenizer: Any) -> int | None:
    """Token id that a tokenizer gives to what it does not know; None where it knows everything."""
    # By name: an end-of-sequence token that is not in the vocabulary has the id of unknown ones, and says nothing.
    ends = (tokenizer.bos_token, tokenizer.eos_token)
    return None if tokenizer.unk_token in ends else tokenizer.unk_token_id


def _as_ids(prompt: Any) -> Tensor:
    """Whole numbers of a tensor, array, list or the like."""
    if hasattr(prompt, "tolist") and not isinstance(prompt, (Tensor, np.ndarray)):
        prompt = prompt.tolist()
    if isinstance(prompt, np.ndarray):
        prompt = prompt.tolist() if prompt.dtype == object else prompt
    elif isinstance(prompt, Sequence) and not isinstance(prompt, (str, bytes, bytearray)):
        prompt = [_as_id_or_ids(entry) for entry in prompt]
    elif not isinstance(prompt, Tensor):
        raise PromptError(f"The prompt is {shown(prompt)}: give {WANTED}.")
    try:
        # An empty list would become floats.
        tokens = (
            torch.zeros(0, dtype=torch.long) if isinstance(prompt, list) and not prompt else torch.as_tensor(prompt)
        )
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise PromptError(f"The prompt is neither text nor one list of token ids ({error}). Give {WANTED}.") from error
    if not has_values(tokens):
        raise PromptError(f"The prompt is {shown(tokens)} on {tokens.device}, without values: give {WANTED}.")
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise PromptError(f"Token ids must be whole numbers, but the prompt has dtype {tokens.dtype}.")
    return tokens


def _as_id_or_ids(entry: Any) -> Any:
    """An id, or a row of ids."""
    value = plain(entry)
    if isinstance(value, (bool, float, complex)):
        raise PromptError(f"Token ids must be whole numbers, but the prompt holds {shown(entry)}.")
    if isinstance(value, Tensor) and not has_values(value):
        raise PromptError(f"The prompt holds {shown(value)} on {value.device}, without values: give {WANTED}.")
    if isinstance(value, (Tensor, np.ndarray)):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_as_id_or_ids(inner) for inner in value]
    if not is_whole(value):
        raise PromptError(f"The prompt is neither text nor one list of token ids: it holds {shown(entry)}.")
    return value


def _unpacked(encoding: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """Ids [batch, pos] of a tokenizer's encoding, and its mask where it marks padding."""
    if "input_ids" not in encoding:
        raise PromptError(f"The prompt is {shown(encoding)}, without input_ids: give {WANTED}.")
    ids = _as_ids(encoding["input_ids"])
    ids = ids[None] if ids.ndim == 1 else ids
    mask = encoding.get("attention_mask")
    mask = None if mask is None else _as_mask(mask)
    return ids, mask[None] if mask is not None and mask.ndim == 1 else mask


def _as_mask(attention_mask: Any) -> Tensor:
    """An attention mask as a tensor."""
    try:
        mask = torch.as_tensor(attention_mask)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PromptError(f"attention_mask is {shown(attention_mask)}: give a tensor of 1 and 0 ({error}).") from error
    if not has_values(mask) or not bool(((mask == 0) | (mask == 1)).all()):
        raise PromptError(f"attention_mask is {shown(attention_mask)}: give a tensor of 1 and 0.")
    return mask


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
    if isinstance(prompts, Mapping):
        ids, mask = _unpacked(prompts)
        mask = mask if attention_mask is None else _as_mask(attention_mask)
        batch = _masked(model, ids, mask)
        return batch if mask is not None else PromptRows(batch.tokens, None)
    if attention_mask is not None:
        if not isinstance(prompts, (Tensor, np.ndarray)) or prompts.ndim != 2:
            raise PromptError(
                "attention_mask is for token ids [batch, pos] that are padded already: give such a tensor."
            )
        return _masked(model, _as_ids(prompts), _as_mask(attention_mask))
    rows = to_prompts(model, prompts)
    longest = max(map(len, rows))
    if min(map(len, rows)) == longest:
        return PromptRows(torch.stack(rows), None)
    tokenizer = getattr(model, "tokenizer", None)
    left = getattr(tokenizer, "padding_side", "right") == "left"
    pad = getattr(tokenizer, "pad_token_id", None) or 0
    padded, masks = [], []
    for row in rows:
        padding = row.new_full((longest - len(row),), pad)
        ones, zeros = torch.ones_like(row), torch.zeros_like(padding)
        padded.append(torch.cat([padding, row] if left else [row, padding]))
        masks.append(torch.cat([zeros, ones] if left else [ones, zeros]))
    return PromptRows(torch.stack(padded), torch.stack(masks))


def _masked(model: HookedModel, prompts: Tensor, attention_mask: Tensor | None) -> PromptRows:
    """Prompts that are padded already."""
    if attention_mask is None:
        attention_mask = torch.ones_like(prompts)
    if attention_mask.shape != prompts.shape or prompts.ndim != 2:
        raise PromptError(
            f"attention_mask has shape {list(attention_mask.shape)}, but the token ids have {list(prompts.shape)}: give"
            " both as [batch, pos]."
        )
    _check_range(model, prompts)
    device = model.W_E.device
    tokens, mask = prompts.to(device, torch.long), (attention_mask != 0).long().to(device)
    for number, (row, is_token) in enumerate(zip(tokens, mask.bool(), strict=True)):
        columns = torch.nonzero(is_token).flatten()
        with at_fault(f"prompts[{number}]") if len(tokens) > 1 else nullcontext():
            if len(columns) and len(columns) != int(columns[-1] - columns[0]) + 1:
                raise PromptError("attention_mask has a gap: padding is before a prompt, or behind it.")
            to_tokens(model, row[is_token])
    return PromptRows(tokens, mask)


def _check(model: HookedModel, tokens: Tensor) -> None:
    if tokens.ndim == 2 and len(tokens) == 0:
        raise PromptError("There is no prompt in the batch: give at least one.")
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
    _check_range(model, tokens)


def _check_range(model: HookedModel, tokens: Tensor) -> None:
    if tokens.numel() == 0:
        return
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= model.cfg.d_vocab:
        wrong = low if low < 0 else high
        raise PromptError(
            f"Token id {wrong} is out of range: {model_name(model)} has ids 0 to {model.cfg.d_vocab - 1}."
            " Was the prompt tokenised for another model?"
        )


def as_text(model: HookedModel, tokens: Tokens) -> str:
    """A prompt as one text, spaced as the tokenizer spaces it."""
    if getattr(model, "tokenizer", None) is None:
        return " ".join(token_strings(model, tokens))
    return str(model.to_string(tokens))


def token_strings(model: HookedModel, tokens: Tokens) -> list[str]:
    """Each token as text, or its number where the model has no tokenizer."""
    if getattr(model, "tokenizer", None) is None:
        return [f"#{int(t)}" for t in tokens]
    return [str(model.to_string(t.reshape(1))) for t in tokens]


def special_token_ids(model: HookedModel) -> list[int]:
    """The ids of the tokenizer that mark structure and are no text: beginning and end of a sequence, padding, a
    separator. They are those that training leaves out; none without a tokenizer."""
    tokenizer = getattr(model, "tokenizer", None)
    named = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id")
    ids = (getattr(tokenizer, name, None) for name in named)
    return sorted({int(i) for i in ids if i is not None})
