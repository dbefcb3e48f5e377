"""Every source of data, and every way in which one can be wrong."""

from __future__ import annotations

import copy
from contextlib import closing
from itertools import islice
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset

from tests.training.conftest import batches_of, opened, tiny_model
from tl_clt.errors import (
    ConfigError,
    DatasetError,
    HookNotFound,
    ModelUnsupported,
    TokenizerMissing,
    TrainingWarning,
)
from tl_clt.training.data.batches import check_fits, estimate_scale, without_store_noise
from tl_clt.training.data.dataset import SAME_ROWS

LINES = [
    f"the {colour} {animal} sees a {other} ."
    for colour in ("red", "blue")
    for animal in ("cat", "dog")
    for other in ("cat", "dog")
] * 20


def first_batch(model, dataset, cfg) -> torch.Tensor:
    with without_store_noise(), closing(batches_of(model, dataset, cfg)) as batches:
        return next(batches)


@pytest.fixture
def sources(tmp_path: Path, tokens: torch.Tensor) -> dict:
    rows = Dataset.from_dict({"tokens": tokens.tolist()})
    rows.save_to_disk(tmp_path / "saved")
    DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "saved_splits")
    (tmp_path / "tables").mkdir()
    rows.rename_column("tokens", "input_ids").to_parquet(tmp_path / "tables" / "train.parquet")
    rows.to_json(tmp_path / "rows.jsonl")
    return {
        "tensor": tokens,
        "dataset": rows,
        "input_ids": rows.rename_column("tokens", "input_ids"),
        "splits": DatasetDict(train=rows),
        "stream": rows.to_iterable_dataset(),
        "saved": tmp_path / "saved",
        "saved_splits": str(tmp_path / "saved_splits"),
        "table_folder": str(tmp_path / "tables"),
        "jsonl": tmp_path / "rows.jsonl",
    }


@pytest.mark.parametrize(
    "name",
    ["tensor", "dataset", "input_ids", "splits", "stream", "saved", "saved_splits", "table_folder", "jsonl"],
)
def test_every_source_of_tokens_gives_the_same_tokens(model, make_config, tokens, sources, name: str) -> None:
    dataset = opened(sources[name], model, make_config())
    column = next(iter(next(iter(dataset))))
    rows = [torch.as_tensor(row[column]) for row in dataset]
    assert torch.equal(torch.stack(rows), tokens)
    batch = first_batch(model, dataset, make_config())
    assert batch.shape == (64, 2, 3, 16)


def test_the_users_dataset_keeps_its_format(model, make_config, sources) -> None:
    dataset = sources["dataset"].add_column("note", ["x"] * len(sources["dataset"]))
    first_batch(model, opened(dataset, model, make_config()), make_config())
    assert dataset.format["type"] is None and "note" in dataset[0]


def test_text_file_rows_are_paragraphs_or_else_lines(model_with_tokenizer, make_config, tmp_path: Path) -> None:
    lines, paragraphs = tmp_path / "lines.txt", tmp_path / "paragraphs.txt"
    lines.write_text("\n".join(LINES))
    paragraphs.write_text("\n\n".join(f"{a}\n{b}" for a, b in zip(LINES[::2], LINES[1::2], strict=True)))
    cfg = make_config()
    assert opened(lines, model_with_tokenizer, cfg)[0] == {"text": LINES[0]}
    assert opened(str(paragraphs), model_with_tokenizer, cfg)[0] == {"text": f"{LINES[0]}\n{LINES[1]}"}


def test_text_becomes_activations_of_its_tokens(model_with_tokenizer, make_config, tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(LINES))
    cfg = make_config(exclude_special_tokens=True)
    batch = first_batch(model_with_tokenizer, opened(path, model_with_tokenizer, cfg), cfg)
    _, cache = model_with_tokenizer.run_with_cache(torch.tensor([[0]]))
    bos = cache["blocks.0.hook_resid_mid"][0, 0]
    distance = (batch[:, 0, 0] - bos).norm(dim=-1)
    assert batch.shape == (64, 2, 3, 16) and distance.min() > 1e-3


def test_batches_are_aligned_over_hooks(model, make_config, tokens) -> None:
    batch = first_batch(model, opened(tokens, model, make_config()), make_config())
    for layer in range(3):
        block = model.blocks[layer]
        x = batch[:8, 0, layer][None]
        torch.testing.assert_close(block.mlp(block.ln2(x))[0], batch[:8, 1, layer], rtol=1e-4, atol=1e-4)


def test_positions_can_be_left_out(model, make_config, tokens) -> None:
    cfg = make_config(seqpos_slice=(1, None))
    batch = first_batch(model, opened(tokens, model, cfg), cfg)
    first = model.run_with_cache(tokens)[1]["blocks.0.hook_resid_mid"][:, 0]
    assert torch.cdist(batch[:, 0, 0], first).min() > 1e-3


def test_small_datasets_repeat_without_noise(model, make_config, tokens, recwarn) -> None:
    cfg = make_config()
    dataset = opened(tokens, model, cfg)
    with without_store_noise(), closing(batches_of(model, dataset, cfg)) as batches:
        n = sum(len(b) for b in islice(batches, 20))
    assert n > 2 * tokens.numel()
    assert not recwarn.list


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("/no/such/file.txt", "'/no/such/file.txt' does not exist. Check the path"),
        ("./nowhere", "does not exist"),
        (Dataset.from_dict({"tokens": []}), "is empty"),
        (Dataset.from_dict({"body": ["a"]}), "has the columns 'body', and none of tokens"),
        (DatasetDict(test=Dataset.from_dict({"text": ["a"]})), "has the splits test, and no 'train'"),
        (
            torch.zeros(4, 7, dtype=torch.long),
            "rows of 7 tokens, but context_size is 8. Set context_size to 7",
        ),
        (torch.zeros(4, 8, dtype=torch.long), "has 32 tokens in prompts of 8, fewer than one batch of 64"),
        (torch.full((9, 8), 30), "token id 30, but .* has ids 0 to 29"),
        (torch.full((9, 8), -1), "token id -1"),
        (torch.zeros(9, 8), "give whole numbers"),
        (torch.zeros(9, dtype=torch.long), "has shape \\[9\\]"),
        (Dataset.from_dict({"tokens": ["the cat"] * 9}), "must be a list of token ids, but it is 'the cat'"),
        ([], "The list of texts is empty"),
    ],
)
def test_bad_data_names_cause_and_mend(model, make_config, dataset, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        opened(dataset, model, make_config())


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([[1, 2, 3]] * 9, "The list of texts holds .1, 2, 3., of type list: give texts; of token ids, a tensor"),
        ({"text": ["a"]}, "The dataset is {'text': .'a'.}, of type dict: give a text file, a folder"),
        (7, "The dataset is 7, of type int: give a text file"),
    ],
)
def test_what_is_no_data_is_told(model, make_config, as_users_run_it, dataset, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        opened(dataset, model, make_config())


def test_words_that_the_tokenizer_does_not_know_are_counted_once(model_with_tokenizer, make_config, recwarn) -> None:
    opened(LINES, model_with_tokenizer, make_config())
    assert not recwarn.list
    strange = [*LINES, "the zebra sees a gnu .", "who writes <unk> , and means it"]
    opened(strange, model_with_tokenizer, make_config())
    (told,) = recwarn.list
    n = sum(len(line.split()) for line in strange[:-1])
    assert f"Of the first {n:,} tokens of The list of texts, 2 ({2 / n:.1%}) stand for what" in str(told.message)
    assert "and reads as '<unk>': model.to_str_tokens(text) shows where" in str(told.message)


def test_a_list_of_texts_is_read_as_the_file_of_them_is(model_with_tokenizer, make_config, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(LINES))
    of_file, of_list = (opened(x, model_with_tokenizer, make_config()) for x in (tmp_path / "text.txt", [*LINES, " "]))
    assert list(of_file) == list(of_list)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b" \n\n ", "is empty. Give a file with some text"),
        (b"\xff\xfe\x00\x81", "is no UTF-8 text"),
        (b"the cat sees a dog .", "does not fill one prompt of 8 tokens. Give more data, or a smaller context_size"),
        (b"the cat sees a dog . " * 3, "fewer than one batch of 64"),
    ],
)
def test_bad_text_file_names_cause_and_mend(
    model_with_tokenizer, make_config, tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        opened(path, model_with_tokenizer, make_config())


def test_broken_table_and_empty_folder_are_told(model, make_config, tmp_path: Path) -> None:
    broken = tmp_path / "rows.parquet"
    broken.write_bytes(b"nonsense")
    (tmp_path / "empty").mkdir()
    for path in (broken, tmp_path / "empty"):
        with pytest.raises(DatasetError, match="could not be read"):
            opened(path, model, make_config())


def test_text_needs_a_tokenizer(model, make_config) -> None:
    with pytest.raises(TokenizerMissing, match="no tokenizer to read The dataset with"):
        opened(Dataset.from_dict({"text": LINES}), model, make_config())


def test_without_a_tokenizer_no_token_is_special(model, make_config, tokens) -> None:
    cfg = make_config(exclude_special_tokens=True)
    with closing(batches_of(model, opened(tokens, model, cfg), cfg)) as batches:
        next(batches)
        assert batches.position.counts.special_tokens == 0


def test_text_needs_a_beginning_token_to_prepend(model_with_tokenizer, make_config, monkeypatch) -> None:
    dataset = Dataset.from_dict({"text": LINES})
    without_bos = copy.deepcopy(model_with_tokenizer.tokenizer)
    without_bos.bos_token = None
    monkeypatch.setattr(model_with_tokenizer, "tokenizer", without_bos)
    with pytest.raises(ConfigError, match="set prepend_bos=False"):
        opened(dataset, model_with_tokenizer, make_config())
    assert len(opened(dataset, model_with_tokenizer, make_config(prepend_bos=False))) == len(LINES)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"output_hook": "hook_mlp_ot"}, HookNotFound, "Nearest: 'blocks.0.hook_mlp_out'"),
        ({"context_size": 9}, ConfigError, "takes 8 tokens: give at most 8"),
        ({"span": 4}, ConfigError, "has 3 layers"),
        ({"far_rank": 17}, ConfigError, "far_rank is 17, but d_model of .* is 16"),
        ({"exclude_special_tokens": (3, 30)}, ConfigError, "has the token id 30, but .* has ids 0 to 29"),
    ],
)
def test_model_that_does_not_fit_is_told(model, make_config, changes: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        cfg = make_config(**changes)
        check_fits(model, cfg.clt, cfg.data)


def test_a_hook_that_a_flag_keeps_off_is_told(model, make_config, tokens) -> None:
    cfg = make_config(input_hook="hook_mlp_in")
    with pytest.raises(HookNotFound, match="'blocks.0.hook_mlp_in' is a hook of .* Set the flag, or give another hook"):
        first_batch(model, opened(tokens, model, cfg), cfg)


def test_hook_of_another_width_is_told(model, make_config, tokens) -> None:
    cfg = make_config(output_hook="mlp.hook_pre")
    with pytest.raises(ConfigError, match="'blocks.0.mlp.hook_pre' has width 64"):
        first_batch(model, opened(tokens, model, cfg), cfg)


def test_silent_layer_is_told() -> None:
    batch = torch.ones(4, 2, 3, 5)
    batch[:, 1, 2] = 0
    with pytest.raises(ModelUnsupported, match="The output of layer 2 has median norm 0.0"):
        estimate_scale([batch])
    batch[0, 0, 0, 0] = float("inf")
    with pytest.raises(ModelUnsupported, match="The input of layer 0 has median norm nan"):
        estimate_scale([batch])


def rows_with(row: object, at: int) -> list[list[int]]:
    rows = [[i % 7, 3, 1, 4, 1, 5, 9, 2] for i in range(30)]
    rows[at] = row
    return rows


@pytest.mark.parametrize("kind", ["kept", "stream"])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            [1, 2, 3, 4, 5, 30, 7, 8],
            "Row 10 of the dataset has token id 30 at position 5, .* ids 0 to 29",
        ),
        ([1, 2, 3, -4, 5, 6, 7, 8], "Row 10 of the dataset has token id -4 at position 3"),
        ([1, 2, 3], "Row 10 of the dataset has 3 tokens, but context_size is 8"),
        (None, "Row 10 of the dataset is no list of token ids .*: mend it or leave it out"),
    ],
)
def test_a_later_row_of_tokens_is_checked_as_it_is_read(model, make_config, kind: str, row, message: str) -> None:
    dataset = Dataset.from_dict({"tokens": rows_with(row, at=10)})
    dataset = dataset.to_iterable_dataset() if kind == "stream" else dataset
    cfg = make_config()
    with pytest.raises(DatasetError, match=message):
        first_batch(model, opened(dataset, model, cfg), cfg)


def test_what_is_not_read_is_not_checked(model, make_config) -> None:
    read: list[int] = []

    def rows():
        for index, row in enumerate(rows_with([99] * 8, at=SAME_ROWS)):
            read.append(index)
            yield {"tokens": row}

    cfg = make_config()
    opened(IterableDataset.from_generator(rows), model, cfg)
    assert max(read) < SAME_ROWS


@pytest.mark.parametrize(
    "dataset", [torch.full((20, 8), 3), Dataset.from_dict({"text": ["the cat sees a dog ."] * 40})]
)
def test_rows_that_are_all_the_same_are_warned_of(model_with_tokenizer, make_config, dataset) -> None:
    with pytest.warns(
        TrainingWarning, match="The first 16 rows of .* are all the same: .* give data with different rows"
    ):
        opened(dataset, model_with_tokenizer, make_config())


def test_hooks_of_the_users_own_change_no_activations_and_stay(make_config, tokens) -> None:
    model, cfg = tiny_model(), make_config()
    plain = first_batch(model, opened(tokens, model, cfg), cfg)
    called: list[str] = []

    def silence(x: torch.Tensor, hook: object) -> torch.Tensor:
        called.append("here")
        return torch.zeros_like(x)

    model.add_hook("blocks.0.hook_resid_mid", silence)
    assert torch.equal(first_batch(model, opened(tokens, model, cfg), cfg), plain)
    assert not called
    model(tokens[:1])
    assert called
