"""From what a user gives as a dataset to one that SAELens's activation store reads."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from jaxtyping import Int
from torch import Tensor

from tl_clt.arguments import shown
from tl_clt.connection import hub_or_cache
from tl_clt.errors import ConfigError, DatasetError, TrainingWarning
from tl_clt.lens import HookedModel, model_name, require_tokenizer, unknown_id

AnyDataset: TypeAlias = Dataset | IterableDataset
DatasetSource: TypeAlias = str | Path | Tensor | Sequence[str] | AnyDataset | DatasetDict | IterableDatasetDict

TOKEN_COLUMNS = ("tokens", "input_ids")
TEXT_COLUMNS = ("text", "problem")
ROWS_IN_FINGERPRINT = 32
TABLE_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def open_dataset(
    source: DatasetSource,
    model: HookedModel,
    *,
    context_size: int = 1,
    batch_size: int = 1,
    prepend_bos: bool = False,
    streaming: bool = True,
) -> AnyDataset:
    """A dataset of one column, `tokens`, `input_ids`, `text` or `problem`, that is known to suit what is to be done.

    Args:
        source: token ids [n, at least context_size]; a list of texts; a `datasets` object (of a DatasetDict, the split
            "train"); a text file (rows are its paragraphs, or its lines where it has no blank line), a .json, .jsonl,
            .csv or .parquet file, a folder of such files or one saved with `save_to_disk`, or a hub dataset.
        model: whose tokenizer and vocabulary the data must fit.
        context_size: tokens of a prompt; rows of token ids must be as long.
        batch_size: tokens that the dataset must hold: one batch of training.
        prepend_bos: whether prompts made of text are to begin with the beginning-of-sequence token.
        streaming: read a hub dataset while it is used, in place of a download beforehand.

    Raises:
        DatasetError: it cannot be found or read, is empty or too small, has no column of text or tokens, or
            token ids that do not fit; the message says which.
        TokenizerMissing: it is text, and the model has no tokenizer.
        ConfigError: it is text, and the tokenizer has no beginning-of-sequence token to prepend.
    """
    dataset, name = _as_dataset(source, streaming)
    first_rows = list(islice(dataset, SAME_ROWS))
    row = next(iter(first_rows), None)
    if row is None:
        raise DatasetError(f"{name} is empty. Give a dataset with at least one row.")
    column = next((c for c in TOKEN_COLUMNS + TEXT_COLUMNS if c in row), None)
    if column is None:
        raise DatasetError(
            f"{name} has the columns {', '.join(map(repr, row))}, and none of tokens, input_ids (token ids) or text,"
            " problem (text). Rename one of them."
        )
    if column in TEXT_COLUMNS:
        if not isinstance(row[column], str):
            raise DatasetError(f"{name} has {shown(row[column])} in its column '{column}', where text is wanted.")
        require_tokenizer(model, f"read {name} with")
        _check_bos(model, prepend_bos)
        dataset = dataset.select_columns([column])
        _check_text_size(dataset, column, name, model, context_size, batch_size)
        _warn_of_same_rows(first_rows, column, name)
        _warn_of_unknown(dataset, column, name, model)
        return dataset
    _check_token_row(row[column], column, name, model, context_size)
    _warn_of_same_rows(first_rows, column, name)
    if isinstance(dataset, Dataset):
        _check_size(len(dataset) * context_size, name, context_size, batch_size)
        return dataset.select_columns([column]).with_format("torch")
    return dataset.select_columns([column])


def text_fingerprint(dataset: AnyDataset) -> str:
    """sha256 of a dataset's first rows and, where it is known, of how many there are."""
    digest = hashlib.sha256(str(len(dataset) if isinstance(dataset, Dataset) else None).encode())
    for row in islice(dataset, ROWS_IN_FINGERPRINT):
        for name, value in row.items():  # type: ignore[union-attr]
            plain = value.tolist() if isinstance(value, Tensor) else value
            digest.update(json.dumps([name, plain], default=str).encode())
    return digest.hexdigest()


def _as_dataset(source: DatasetSource, streaming: bool) -> tuple[AnyDataset, str]:
    """The dataset, and how messages call it."""
    if isinstance(source, Tensor):
        return _from_tensor(source), "The tensor of tokens"
    if isinstance(source, str | Path):
        return _from_path(source, streaming), f"Dataset '{source}'"
    if isinstance(source, (list, tuple)):
        return _from_texts(source), "The list of texts"
    if not hasattr(source, "column_names"):
        raise DatasetError(
            f"The dataset is {shown(source)}: give a text file, a folder, a hub name, a list of texts, token ids"
            " [n, at least context_size] or a `datasets` object."
        )
    return _one_split(source, "The dataset"), "The dataset"


def _from_texts(texts: Sequence[str]) -> Dataset:
    strange = [text for text in texts if not isinstance(text, str)]
    if strange:
        raise DatasetError(
            f"The list of texts holds {shown(strange[0])}: give texts; of token ids, a tensor [n, at least"
            " context_size]."
        )
    return Dataset.from_dict({"text": [text for text in texts if text.strip()]})


def _from_tensor(tokens: Tensor) -> Dataset:
    if tokens.ndim != 2 or tokens.is_floating_point():
        raise DatasetError(
            f"The tensor of tokens has shape {list(tokens.shape)} and dtype {tokens.dtype}: give whole numbers"
            " [prompts, context_size]."
        )
    return Dataset.from_dict({"tokens": list(tokens.cpu().numpy())})


def _from_path(source: str | Path, streaming: bool) -> AnyDataset:
    path = Path(source).expanduser()
    name = f"Dataset '{source}'"
    if not path.exists() and (
        isinstance(source, Path) or path.is_absolute() or str(source).startswith((".", "~")) or path.suffix
    ):
        raise DatasetError(f"{name} does not exist. Check the path of the file or folder.")
    try:
        if path.is_file():
            builder = TABLE_FORMATS.get(path.suffix)
            return _from_text(path) if builder is None else _load(builder, streaming, data_files=str(path))
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            return _one_split(load_from_disk(str(path)), name)
        if path.is_dir():
            return _one_split(_load(str(path), streaming), name)
        with hub_or_cache() as unreached:
            try:
                return _one_split(_load(str(source), streaming), name)
            except (DatasetNotFoundError, HFValidationError, HfHubHTTPError, ValueError, OSError) as error:
                raise _unreadable(name, error, unreached) from error
    except DatasetError:
        raise
    except UnicodeDecodeError as error:
        raise DatasetError(f"{name} is no UTF-8 text ({error.reason}). Give a text file, or a folder.") from error
    except (DatasetNotFoundError, DatasetGenerationError, HFValidationError, HfHubHTTPError) as error:
        raise _unreadable(name, error) from error
    except (ValueError, OSError, RuntimeError) as error:
        raise _unreadable(name, error) from error


def _load(name: str, streaming: bool, **options: Any) -> AnyDataset:
    return load_dataset(name, split="train", streaming=streaming, **options)


def _unreadable(name: str, error: Exception, unreached: str = "") -> DatasetError:
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return DatasetError(
        f"{name} could not be read ({first_line}).{unreached} It must be a text file, a .json, .jsonl, .csv or .parquet"
        " file, a folder of such files or one saved with save_to_disk, or a hub dataset that can be reached."
    )


def _from_text(path: Path) -> Dataset:
    text = path.read_text(encoding="utf-8").replace("\r\n", "\n")
    blocks = (text if "\n\n" in text.strip() else text.replace("\n", "\n\n")).split("\n\n")
    rows = [block.strip() for block in blocks if block.strip()]
    if not rows:
        raise DatasetError(f"Dataset '{path}' is empty. Give a file with some text.")
    return Dataset.from_dict({"text": rows})


def _one_split(dataset: Any, name: str) -> AnyDataset:
    if not isinstance(dataset, DatasetDict | IterableDatasetDict):
        return dataset
    if "train" not in dataset:
        raise DatasetError(
            f"{name} has the splits {', '.join(map(str, dataset))}, and no 'train'. Give one split: dataset[...]."
        )
    return dataset["train"]


def _check_token_row(row: Any, column: str, name: str, model: HookedModel, context_size: int) -> None:
    message = f"{name}: a row of '{column}' must be a list of token ids, but it is {str(row)[:60]!r}."
    try:
        tokens = torch.as_tensor(row)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DatasetError(message) from error
    if tokens.ndim != 1 or tokens.is_floating_point():
        raise DatasetError(message)
    if len(tokens) < context_size:
        raise DatasetError(
            f"{name} has rows of {len(tokens)} tokens, but context_size is {context_size}."
            f" Set context_size to {len(tokens)}, or tokenise into longer rows."
        )
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= model.cfg.d_vocab:
        raise DatasetError(
            f"{name} has token id {low if low < 0 else high}, but {model_name(model)} has ids 0 to"
            f" {model.cfg.d_vocab - 1}. Was it tokenised for another model?"
        )


def require_known_tokens(prompt: Int[Tensor, "1 _"], row: int, context_size: int, d_vocab: int) -> Int[Tensor, "1 pos"]:
    """A prompt as it was read, if a model can take it.

    Args:
        prompt: of token ids, a row of the dataset.
        row: which.
        context_size: tokens that it must have.
        d_vocab: of the model.

    Raises:
        DatasetError: it is shorter, or has a token id that the model does not know.
    """
    if prompt.shape[1] < context_size:
        raise DatasetError(
            f"Row {row} of the dataset has {prompt.shape[1]} tokens, but context_size is {context_size}: give rows"
            " as long, or a smaller context_size."
        )
    unknown = ((prompt < 0) | (prompt >= d_vocab))[0].nonzero()
    if len(unknown) > 0:
        pos = int(unknown[0])
        raise DatasetError(
            f"Row {row} of the dataset has token id {int(prompt[0, pos])} at position {pos}, but the model"
            f" has ids 0 to {d_vocab - 1}. Was it tokenised for another model?"
        )
    return prompt


SAME_ROWS = 16
"""First rows of a dataset, which are not all to be the same."""


def _warn_of_same_rows(rows: list[dict[str, Any]], column: str, name: str) -> None:
    if len(rows) > 1 and all(np.array_equal(row[column], rows[0][column]) for row in rows):
        warnings.warn(
            f"The first {len(rows)} rows of {name} are all the same: a CLT learns from what varies. Check the column,"
            " or give data with different rows.",
            TrainingWarning,
            stacklevel=3,
        )


TOKENS_LOOKED_AT, ROWS_LOOKED_AT = 65_536, 4096
"""Of the beginning of a text, in which words that the tokenizer does not know are counted."""


def _warn_of_unknown(dataset: AnyDataset, column: str, name: str, model: HookedModel) -> None:
    """Warn where a text has words that the tokenizer reads as its token for unknown ones."""
    tokenizer = cast(Any, model.tokenizer)
    unknown = unknown_id(tokenizer)
    if unknown is None:
        return
    n_tokens = n_unknown = 0
    for row in islice(cast(Iterable[dict[str, Any]], dataset), ROWS_LOOKED_AT):
        text = row[column]
        # Other values are refused where they are read; who writes the token's name means it.
        if not isinstance(text, str) or tokenizer.unk_token in text:
            continue
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        n_tokens, n_unknown = n_tokens + len(ids), n_unknown + ids.count(unknown)
        if n_tokens >= TOKENS_LOOKED_AT:
            break
    if n_unknown > 0:
        warnings.warn(
            f"Of the first {n_tokens:,} tokens of {name}, {n_unknown:,} ({n_unknown / n_tokens:.1%}) stand for what the"
            f" tokenizer of {model_name(model)} does not know, and reads as {tokenizer.unk_token!r}:"
            " model.to_str_tokens(text) shows where. Give text of words that the model knows.",
            stacklevel=3,
        )


def _check_bos(model: HookedModel, prepend_bos: bool) -> None:
    tokenizer: Any = model.tokenizer
    if prepend_bos and tokenizer.bos_token_id is None:
        raise ConfigError(
            f"prepend_bos is True, but the tokenizer of {model_name(model)} has no beginning-of-sequence token:"
            " set prepend_bos=False."
        )


def _check_text_size(
    dataset: AnyDataset, column: str, name: str, model: HookedModel, context_size: int, batch_size: int
) -> None:
    n_tokens, tokenizer = 0, cast(Any, model.tokenizer)
    for row in cast(Iterable[dict[str, Any]], dataset):
        n_tokens += len(tokenizer(row[column], add_special_tokens=False)["input_ids"])
        if n_tokens >= batch_size + context_size:
            return
    _check_size(n_tokens // context_size * context_size, name, context_size, batch_size)


def _check_size(n_tokens: int, name: str, context_size: int, batch_size: int) -> None:
    if n_tokens == 0:
        raise DatasetError(
            f"{name} does not fill one prompt of {context_size} tokens. Give more data, or a smaller context_size."
        )
    if n_tokens < batch_size:
        raise DatasetError(
            f"{name} has {n_tokens} tokens in prompts of {context_size}, fewer than one batch of"
            f" {batch_size}. Give more data, or a smaller train_batch_size_tokens."
        )
