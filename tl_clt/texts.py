"""Texts as prompts, read no further than they are needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from tl_clt.arguments import as_path, as_whole, shown
from tl_clt.errors import ConfigError, DatasetError
from tl_clt.lens import HookedModel, Prompt, at_fault, model_name, one_after_another, to_tokens
from tl_clt.shapes import TokenBatch, Tokens

if TYPE_CHECKING:
    from tl_clt.training.data.dataset import DatasetSource

    HeldOut: TypeAlias = Sequence[Prompt] | DatasetSource
else:
    HeldOut: TypeAlias = Any

DEFAULT_CONTEXT = 128
PROMPTS_AT_ONCE = 256
"""Prompts among which those of one length are put together."""
MOST_ROWS = 32
LOGITS_AT_ONCE = 2**25
"""Logits of one pass: 128 MiB in float32."""


def held_out_prompts(model: HookedModel, dataset: HeldOut, context_size: int | None = None) -> Iterator[Tokens]:
    """Token ids [pos] of one prompt after another.

    A list of prompts (text or ids), or ids [n_prompts, pos], are taken as they are. Of what else `tl-clt train` takes
    (a text file, a folder, a hub name, a `datasets` object), every row of text becomes prompts of at most
    `context_size` tokens, each with the beginning-of-sequence token first where the tokenizer has one; rows of token
    ids are cut to it. No prompt runs on into the next row, and none is padded.

    Args:
        context_size: None for 128, or the model's own where that is less.

    Raises:
        DatasetError: there is nothing in it of at least two tokens, or it cannot be read.
        PromptError, TokenizerMissing: a prompt that the model cannot take; it says which.
        ConfigError: context_size is out of range.
    """
    size = _context_size(model, context_size)
    if isinstance(dataset, np.ndarray):
        dataset = dataset.tolist() if dataset.ndim < 2 else torch.as_tensor(dataset)
    if isinstance(dataset, Tensor) and dataset.ndim != 2:
        raise DatasetError(f"The tensor of tokens has shape {list(dataset.shape)}: give ids [n_prompts, pos].")
    if isinstance(dataset, (list, tuple, Tensor)):
        if len(dataset) == 0:
            raise DatasetError("There are no prompts to evaluate on: give at least one.")
        return one_after_another(model, dataset)
    if not isinstance(dataset, (str, Path)) and not hasattr(dataset, "column_names"):
        raise DatasetError(
            f"The held-out text is {shown(dataset)}: give a list of prompts, ids [n_prompts, pos], a text file, a"
            " folder, a hub name or a `datasets` object."
        )
    if isinstance(dataset, (str, Path)):
        as_path("The held-out text", dataset, DatasetError)
    return _nonempty(_rows(model, dataset, size), dataset)


def read_held_out(
    model: HookedModel, dataset: HeldOut, max_tokens: int | None, context_size: int | None = None
) -> list[Tokens]:
    """All prompts that will be measured on, read and checked before a model runs.

    Args:
        max_tokens: stop after the prompt that reaches so many tokens; None for all.

    Raises:
        DatasetError, PromptError, TokenizerMissing, ConfigError: as `held_out_prompts`; or fewer than two tokens to
            measure on.
    """
    most = as_whole("max_tokens", max_tokens, 1, none="all")
    prompts = list(up_to(held_out_prompts(model, dataset, context_size), most))
    if sum(len(tokens) - 1 for tokens in prompts) < 2:
        raise DatasetError(
            "There is one token to measure on, beside position 0: what a CLT explains of how outputs vary takes two at"
            " least. Give more or longer prompts."
        )
    return prompts


def batches(model: HookedModel, prompts: Iterator[Tokens]) -> Iterator[TokenBatch]:
    """The prompts in batches of equal length, each small enough that its logits fit in 128 MiB."""
    return (batch.tokens for batch in numbered_batches(model, enumerate(prompts)))


class NumberedBatch(NamedTuple):
    """Prompts of one length."""

    numbers: Int[Tensor, " batch"]
    """Which prompts they are."""

    tokens: TokenBatch


def numbered_batches(
    model: HookedModel, prompts: Iterable[tuple[int, Tokens]], values_per_token: int = 0
) -> Iterator[NumberedBatch]:
    """As `batches`, of prompts with their numbers. Which prompts come together depends on nothing but their lengths.

    Args:
        values_per_token: numbers that the caller makes of each token, if these are more than its logits.
    """
    rest = iter(prompts)
    per_token = max(model.cfg.d_vocab, values_per_token)
    while some := list(islice(rest, PROMPTS_AT_ONCE)):
        for length, group in groupby(sorted(some, key=lambda one: len(one[1])), key=lambda one: len(one[1])):
            alike = list(group)
            rows = max(1, min(MOST_ROWS, LOGITS_AT_ONCE // (length * per_token)))
            for start in range(0, len(alike), rows):
                numbers, tokens = zip(*alike[start : start + rows], strict=True)
                yield NumberedBatch(torch.tensor(numbers), torch.stack(tokens))


def up_to(prompts: Iterator[Tokens], max_tokens: int | None) -> Iterator[Tokens]:
    """Whole prompts, until they have at least `max_tokens` positions after the first of each."""
    n_tokens = 0
    for tokens in prompts:
        yield tokens
        n_tokens += len(tokens) - 1
        if max_tokens is not None and n_tokens >= max_tokens:
            return


def _context_size(model: HookedModel, context_size: int | None) -> int:
    longest = model.cfg.n_ctx
    given = as_whole("context_size", context_size, none=f"{DEFAULT_CONTEXT} or the model's own")
    size = min(DEFAULT_CONTEXT, longest) if given is None else given
    if not 2 <= size <= longest:
        raise ConfigError(f"context_size is {size}, but {model_name(model)} takes 2 to {longest} tokens: give that.")
    return size


def _rows(model: HookedModel, source: Any, size: int) -> Iterator[Tokens]:
    # Only here, since it loads sae_lens.
    from tl_clt.training.data.dataset import TEXT_COLUMNS, open_dataset

    tokenizer: Any = getattr(model, "tokenizer", None)
    bos = None if tokenizer is None else tokenizer.bos_token_id
    # Any dataset of a token or more: how long its rows are is looked at here.
    opened = open_dataset(source, model, prepend_bos=bos is not None)
    start = [] if bos is None else [bos]
    for number, row in enumerate(opened):
        (column, value), *_ = row.items()  # type: ignore[union-attr]
        if column not in TEXT_COLUMNS:
            yield from _long_enough(model, torch.as_tensor(value)[:size], number)
            continue
        assert tokenizer is not None
        if not isinstance(value, str):
            raise DatasetError(f"The column '{column}' holds {shown(value)} where text is wanted. Give texts.")
        ids = tokenizer(value, add_special_tokens=False, verbose=False)["input_ids"]
        step = size - len(start)
        for at in range(0, len(ids), step):
            yield from _long_enough(model, torch.tensor(start + ids[at : at + step]), number)


def _long_enough(model: HookedModel, tokens: Tensor, row: int) -> Iterator[Tokens]:
    """Nothing, where there would be no position to measure."""
    if len(tokens) >= 2:
        with at_fault(f"Row {row} of the dataset"):
            prompt = to_tokens(model, tokens)
        yield prompt


def _nonempty(prompts: Iterator[Tokens], source: Any) -> Iterator[Tokens]:
    first = next(prompts, None)
    if first is None:
        name = f"Dataset '{source}'" if isinstance(source, (str, Path)) else "The dataset"
        raise DatasetError(
            f"{name} is too short: none of its rows makes a prompt of 2 tokens, and position 0 of each is left out."
            " Give longer texts."
        )
    yield first
    yield from prompts
