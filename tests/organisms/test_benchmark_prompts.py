"""Prompts of organisms to measure circuits on: right, never read, and each with a counterfactual of as many tokens."""

from __future__ import annotations

import pytest
import torch

from tl_clt import load_organism
from tl_clt.errors import ModelNotFound
from tl_clt.organisms import benchmark_prompts
from tl_clt.organisms.atlas.text import held_out_questions


def test_atlas_answers_its_benchmark_prompts_and_their_counterfactuals_otherwise():
    prompts = benchmark_prompts("atlas")
    held_out = {question.prompt: question.answer for question in held_out_questions()}
    assert {prompt.prompt: prompt.target for prompt in prompts} == held_out
    assert len({prompt.counterfactual for prompt in prompts[:20]}) > 10
    model, _ = load_organism("atlas")
    right = []
    for prompt, target, counterfactual in prompts[:20]:
        assert held_out[counterfactual] != target
        tokens, others = (model.to_tokens(text) for text in (prompt, counterfactual))
        # One word differs, the city.
        assert tokens.shape == others.shape and int((tokens != others).sum()) == 1
        with torch.no_grad():
            answers = [model.to_string(model(x)[0, -1].argmax()).strip() for x in (tokens, others)]
        right += [answers[0] == target, answers[1] == held_out[counterfactual]]
    assert sum(right) >= 0.95 * len(right)


def test_the_order_is_always_the_same():
    assert benchmark_prompts("atlas") == benchmark_prompts("atlas")


def test_an_unknown_organism_is_refused():
    with pytest.raises(ModelNotFound, match="Nearest: 'atlas'"):
        benchmark_prompts("atlass")
