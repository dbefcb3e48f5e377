"""From a prompt to token ids, and what is no prompt."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import BatchEncoding

from tests.models import Model
from tl_clt import load_organism
from tl_clt.errors import PromptError, TokenizerMissing
from tl_clt.lens import as_text, require_tokenizer, to_tokens, token_strings


@pytest.fixture(params=["bridge-gpt2", "bridge-llama"])
def reader(request: pytest.FixtureRequest, session_models) -> Model:
    """A model with a tokenizer."""
    return session_models(request.param)


@pytest.fixture
def wordless(session_models) -> Model:
    """A model without a tokenizer."""
    return session_models("hooked-gpt2")


def test_text_becomes_ids_with_the_beginning_of_sequence_first(reader: Model):
    assert to_tokens(reader, "w3 w4 w5").tolist() == [0, 3, 4, 5]


@pytest.mark.parametrize("prompt", [[5, 6, 7], (5, 6, 7), torch.tensor([5, 6, 7]), torch.tensor([[5, 6, 7]])])
@pytest.mark.parametrize("dtype", [None, torch.int32])
def test_ids_are_taken_as_they_are(wordless: Model, prompt, dtype):
    if isinstance(prompt, torch.Tensor):
        prompt = prompt.to(dtype)
    tokens = to_tokens(wordless, prompt)
    assert tokens.tolist() == [5, 6, 7] and tokens.dtype == torch.long


@pytest.mark.parametrize("prompt", ["", " ", "\n\t "])
def test_empty_text_raises(reader: Model, wordless: Model, prompt: str):
    for model in (reader, wordless):
        with pytest.raises(PromptError, match="The prompt is empty"):
            to_tokens(model, prompt)


@pytest.mark.parametrize("prompt", [[], torch.zeros(0, dtype=torch.long)])
def test_no_ids_raise(wordless: Model, prompt):
    with pytest.raises(PromptError, match="0 token.* long: give at least 2"):
        to_tokens(wordless, prompt)


@pytest.mark.parametrize("prompt", [[3], torch.tensor([3]), torch.tensor([[3]])])
def test_one_token_raises(wordless: Model, prompt):
    with pytest.raises(PromptError, match="1 token long: give at least 2"):
        to_tokens(wordless, prompt)


@pytest.mark.parametrize("prompt", [[3] * 65, " ".join(["w3"] * 64)])
def test_a_prompt_longer_than_the_context_raises_and_is_not_cut(reader: Model, prompt):
    with pytest.raises(PromptError, match="has 65 tokens, but the context of .* is 64"):
        to_tokens(reader, prompt)


def test_a_prompt_as_long_as_the_context_is_taken(reader: Model):
    assert len(to_tokens(reader, " ".join(["w3"] * 63))) == 64


@pytest.mark.parametrize(("prompt", "wrong"), [([0, 64], 64), ([0, -1], -1), ([-7, 99], -7)])
def test_ids_out_of_range_raise(wordless: Model, prompt: list[int], wrong: int):
    with pytest.raises(PromptError, match=f"Token id {wrong} is out of range: .* has ids 0 to 63"):
        to_tokens(wordless, prompt)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("prompt", [[1.0, 2.0], torch.tensor([1.0, 2.0])])
def test_floats_are_no_ids(wordless: Model, prompt):
    with pytest.raises(PromptError, match="Token ids must be whole numbers"):
        to_tokens(wordless, prompt)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("prompt", [torch.tensor([True, False]), ["w3", "w4"], [[1, 2], [3]], None, 5])
def test_what_is_no_prompt_raises(wordless: Model, prompt):
    with pytest.raises(PromptError):
        to_tokens(wordless, prompt)


def test_a_batch_of_prompts_raises(wordless: Model):
    with pytest.raises(PromptError, match=r"shape \[2, 3\]: give one prompt"):
        to_tokens(wordless, torch.ones(2, 3, dtype=torch.long))


def test_text_for_a_model_without_a_tokenizer_raises(wordless: Model):
    with pytest.raises(TokenizerMissing, match="has no tokenizer to read text with. Give token ids"):
        to_tokens(wordless, "w3 w4")
    with pytest.raises(TokenizerMissing, match="has no tokenizer to write words"):
        require_tokenizer(wordless, "write words")


def test_token_strings_are_words_or_numbers(reader: Model, wordless: Model):
    tokens = torch.tensor([0, 3, 4])
    assert [s.strip() for s in token_strings(reader, tokens)] == ["w0", "w3", "w4"]
    assert token_strings(wordless, tokens) == ["#0", "#3", "#4"]


# -- what is meant -----------------------------------------------------------------------------------------


def test_text_that_begins_with_the_beginning_of_sequence_gets_no_second_one(reader: Model):
    for text in ("w0 w3 w4", " w0 w3 w4", "w3 w4"):
        assert to_tokens(reader, text).tolist() == [0, 3, 4]
    assert to_tokens(reader, "w0 w0 w3").tolist() == [0, 0, 3]


def test_the_same_of_a_hooked_transformer():
    model, _ = load_organism("atlas")
    bos = model.tokenizer.bos_token
    plain = to_tokens(model, "the capital of Texas is").tolist()
    assert to_tokens(model, f"{bos} the capital of Texas is").tolist() == plain
    assert plain.count(model.tokenizer.bos_token_id) == 1


@pytest.mark.usefixtures("as_users_run_it")
def test_ids_of_numpy_pandas_and_tokenizers_are_taken(reader: Model):
    encoding = {"input_ids": [[2, 2, 5, 6]], "attention_mask": [[0, 0, 1, 1]]}
    ways = [np.array([5, 6]), pd.Series([5, 6]), [np.int64(5), torch.tensor(6)], range(5, 7), {"input_ids": [5, 6]}]
    for given in (*ways, BatchEncoding(encoding), BatchEncoding({k: torch.tensor(v) for k, v in encoding.items()})):
        assert to_tokens(reader, given).tolist() == [5, 6]
    assert to_tokens(reader, reader.tokenizer("w5 w6")).tolist()[-2:] == [5, 6]


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("w3 \ud83d w4", "half of a surrogate pair"),
        (None, "The prompt is None: give text, or token ids"),
        (5, "The prompt is 5, of type int"),
        (Path("w3"), "of type PosixPath"),
        ({3, 4}, "of type set"),
        ({"a": 3}, "without input_ids"),
        ([3, True], "holds True"),
        (torch.zeros(4, dtype=torch.long, device="meta"), "without values"),
        ({"input_ids": [3, 4, 5], "attention_mask": [1, 0, 1]}, "has a gap"),
        ({"input_ids": [[3, 4], [5, 6]]}, "an encoding of 2 prompts"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_else_is_no_prompt_is_refused_with_the_cause(reader: Model, prompt, message: str):
    with pytest.raises(PromptError, match=message):
        to_tokens(reader, prompt)


def test_words_that_the_tokenizer_does_not_know_are_warned_of(reader: Model):
    with pytest.warns(UserWarning, match="a part of the prompt that it does not know as 'w1'"):
        to_tokens(reader, "w3 Dallas")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_tokens(reader, "w3 w1")


@pytest.mark.parametrize("name", ["atlas", "school"])
def test_words_that_a_bundled_model_does_not_know_are_warned_of(name: str):
    """Their end-of-sequence token is not in the vocabulary, and so has the unknown token's id."""
    model, _ = load_organism(name)
    with pytest.warns(UserWarning, match="does not know as '<unk>'"):
        to_tokens(model, "the Zanzibar of")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_tokens(model, "the of <unk>")


def test_a_prompt_as_text_has_its_spaces():
    model, _ = load_organism("atlas")
    assert as_text(model, to_tokens(model, "the capital of Texas is")) == "<bos> the capital of Texas is"
