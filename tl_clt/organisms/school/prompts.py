"""Prompts of school to measure circuits on: of every task, such as it has never read."""

from __future__ import annotations

from tl_clt.organisms.prompts import BenchmarkPrompt
from tl_clt.organisms.school.text import TASKS

N_CASES = 50
"""Of each task."""


def benchmark_prompts() -> list[BenchmarkPrompt]:
    """Held-out prompts, task by turns. The counterfactual of each is the next of its task with another answer."""
    found: dict[str, list[BenchmarkPrompt]] = {}
    for task in TASKS.values():
        cases = task.cases(N_CASES, held_out=True)
        found[task.name] = []
        for number, case in enumerate(cases):
            others = [*cases[number + 1 :], *cases[:number]]
            other = next(c for c in others if c.answer != case.answer)
            found[task.name].append(BenchmarkPrompt(case.prompt, case.answer, other.prompt))
    return [prompt for turn in zip(*found.values(), strict=True) for prompt in turn]
