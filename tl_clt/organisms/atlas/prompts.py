"""Prompts of atlas to measure circuits on: the two-hop questions that it has never read."""

from __future__ import annotations

import random

from tl_clt.organisms.atlas.text import held_out_questions
from tl_clt.organisms.prompts import BenchmarkPrompt

SEED = 0
"""Of the order of the prompts."""


def benchmark_prompts() -> list[BenchmarkPrompt]:
    """The held-out questions in a random order that is always the same.

    The counterfactual of each is the next question there that asks the same of another city, and has another answer.
    """
    questions = held_out_questions()
    random.Random(SEED).shuffle(questions)
    found = []
    for number, question in enumerate(questions):
        others = [*questions[number + 1 :], *questions[:number]]
        other = next(q for q in others if q.relation == question.relation and q.answer != question.answer)
        found.append(BenchmarkPrompt(question.prompt, question.answer, other.prompt))
    return found
