"""What counts as held-out text, and how it becomes prompts."""

from __future__ import annotations

import json
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from datasets import Dataset, DatasetDict

from tests.models import random_tokens, save_hf, tiny_clt, tiny_hf, tiny_hooked
from tl_clt import attribute, evaluate, load_model
from tl_clt import texts as module
from tl_clt.errors import DatasetError, PromptError, TokenizerMissing
from tl_clt.evaluation import measure_faithfulness
from tl_clt.evaluation.tradeoff import compare
from tl_clt.lens import to_token_batch
from tl_clt.texts import batches, held_out_prompts, up_to


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(save_hf(tiny_hf("gpt2"), tmp_path_factory.mktemp("gpt2")))


def ids(model, dataset, context_size=None) -> list[list[int]]:
    return [tokens.tolist() for tokens in held_out_prompts(model, dataset, context_size)]


def test_prompts_are_taken_as_they_are(model):
    assert ids(model, ["w5 w6 w7", [0, 9, 9, 9], torch.tensor([0, 4])], 3) == [[0, 5, 6, 7], [0, 9, 9, 9], [0, 4]]
    tokens = random_tokens(model, batch=2)
    assert ids(model, tokens) == tokens.tolist()


ROWS = ["w5 w6 w7 w8 w9", "", "w30"]
CUT = [[0, 5, 6], [0, 7, 8], [0, 9], [0, 30]]
"""In prompts of 3."""


def test_rows_of_text_are_cut_and_never_joined(model, tmp_path):
    (tmp_path / "rows.txt").write_text("\n\n".join(ROWS))
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": row, "n": 1}) for row in ROWS))
    Dataset.from_dict({"text": ROWS}).save_to_disk(tmp_path / "saved")
    whole = Dataset.from_dict({"text": ROWS})
    for source in (tmp_path / "rows.txt", str(tmp_path / "rows.jsonl"), tmp_path / "saved", whole):
        assert ids(model, source, 3) == CUT
    assert ids(model, DatasetDict(train=whole), 64) == [[0, 5, 6, 7, 8, 9], [0, 30]]


def test_rows_of_tokens_are_cut(model):
    assert ids(model, Dataset.from_dict({"tokens": [[0, 5, 6, 7], [3], [0, 9]]}), 3) == [[0, 5, 6], [0, 9]]


def test_batches_are_of_one_length_and_small_enough(model, monkeypatch):
    prompts = [torch.zeros(n, dtype=torch.long) for n in (3, 5, 3, 3, 5, 3, 3)]
    assert [list(b.shape) for b in batches(model, iter(prompts))] == [[5, 3], [2, 5]]
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 2 * 3 * model.cfg.d_vocab)
    assert [list(b.shape) for b in batches(model, iter(prompts))] == [[2, 3], [2, 3], [1, 3], [1, 5], [1, 5]]
    monkeypatch.setattr(module, "PROMPTS_AT_ONCE", 2)
    assert sum(len(b) for b in batches(model, iter(prompts))) == 7


def test_what_is_not_needed_is_not_read():
    def endless():
        while True:
            yield torch.zeros(5, dtype=torch.long)

    assert len(list(up_to(endless(), 9))) == 3


def test_a_file_is_evaluated_as_its_prompts_are(model, tmp_path):
    (tmp_path / "rows.txt").write_text("\n\n".join(ROWS))
    clt = tiny_clt(model, dtype=torch.float32)
    assert evaluate(model, clt, tmp_path / "rows.txt", context_size=3) == evaluate(model, clt, CUT)


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "is empty"), ("\n\n \n", "is empty")],
)
def test_empty_text(model, tmp_path, text, words):
    (tmp_path / "rows.txt").write_text(text)
    with pytest.raises(DatasetError, match=words):
        ids(model, tmp_path / "rows.txt")


def test_texts_that_are_too_short(model, tmp_path):
    with pytest.raises(DatasetError, match="The dataset is too short: none of its rows makes a prompt of 2 tokens"):
        ids(model, Dataset.from_dict({"tokens": [[3], [4]]}))
    with pytest.raises(PromptError, match="out of range"):
        ids(model, Dataset.from_dict({"tokens": [[0, 3], [0, 64]]}))
    with pytest.raises(DatasetError, match="does not exist"):
        ids(model, tmp_path / "none.txt")


def test_numbers_in_a_column_of_text_are_refused(model):
    with pytest.raises(DatasetError, match="where text is wanted"):
        ids(model, Dataset.from_dict({"text": [1, 2]}))


def test_one_token_is_too_little_to_measure_on(model):
    with pytest.raises(DatasetError, match="There is one token to measure on"), never_run(model):
        evaluate(model, tiny_clt(model, dtype=torch.float32), [[0, 3]], n_graphs=0)


@contextmanager
def never_run(model):
    """Within, a pass of the model is an error."""

    def fail(*_):
        raise AssertionError("the model ran")

    handle = model.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize(("wrong", "words"), [("", "is empty"), ([5], "1 token long"), ([5, 64], "out of range")])
def test_the_prompt_at_fault_is_named_before_the_model_runs(model, wrong, words):
    clt, prompts = tiny_clt(model, dtype=torch.float32), ["w5 w6 w7", *[[0, 9, 9, 9]] * 300, wrong, "w5 w6"]
    for measure in (partial(evaluate, model, clt), partial(compare, model, transcoders={"a": clt}, neuron_l0s=[2])):
        with pytest.raises(PromptError, match=rf"^prompts\[301\]: .*{words}"), never_run(model):
            measure(dataset=prompts)
    for several in (attribute, measure_faithfulness):
        with pytest.raises(PromptError, match=rf"^prompts\[301\]: .*{words}"), never_run(model):
            several(model, clt, prompts)


def test_the_prompt_at_fault_is_named_in_what_is_given_otherwise(model):
    rows = Dataset.from_dict({"tokens": [[0, 5, 6], [3], [0, 64]]})
    with pytest.raises(PromptError, match=r"^Row 2 of the dataset: Token id 64 is out of range"):
        ids(model, rows)
    padded = {"input_ids": [[0, 5, 6], [0, 5, 6]], "attention_mask": [[1, 1, 1], [1, 0, 0]]}
    with pytest.raises(PromptError, match=r"^prompts\[1\]: The prompt is 1 token long"):
        to_token_batch(model, padded)


def test_text_needs_a_tokenizer(tmp_path):
    (tmp_path / "rows.txt").write_text("w1 w2")
    with pytest.raises(TokenizerMissing):
        ids(tiny_hooked("gpt2"), tmp_path / "rows.txt")
