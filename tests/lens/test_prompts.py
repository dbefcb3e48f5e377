"""From a prompt to token ids, and what is no prompt."""

from __future__ import annotations

import pytest
import torch

from tests.models import Model
from tl_clt.errors import PromptError, TokenizerMissing
from tl_clt.lens import require_tokenizer, to_tokens, token_strings


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
