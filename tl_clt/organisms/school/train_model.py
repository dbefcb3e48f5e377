"""Train the school organism from scratch: `python -m tl_clt.organisms.school.train_model --output FOLDER`.

A small GPT-2 (`tl_clt.organisms.word_model`) on the text of `tl_clt.organisms.school.text`. The folder written holds
a Hugging Face model with its tokenizer, and `metrics.json`: for each task, accuracy on prompts of the text and on those
held out, and for the names that it misfires on what it says.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from tl_clt.organisms.school.text import FACTS, HALF_KNOWN, TASKS, sentences, vocabulary
from tl_clt.organisms.word_model import TrainOptions, answers_right, train_organism

OPTIONS = TrainOptions(d_model=128, n_ctx=32, steps=6000)
N_CASES = 400
"""Prompts of each task and split that are asked, at most."""


def evaluate(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, dict[str, float]]:
    """Accuracy of the likeliest next token for each task and split, and the misfire: how often people of whom one thing
    is told are given another fact rather than called unknown."""
    found: dict[str, dict[str, float]] = {}
    for task in TASKS.values():
        for split, held_out in (("in the text", False), ("held out", True)):
            cases = task.cases(N_CASES, held_out=held_out)
            right = answers_right(model, tokenizer, [c.prompt for c in cases], [c.answer for c in cases])
            # Different prompts are mostly of strangers, of whom there are many more: people who are known stand apart.
            kinds = {"known": "recall, known people", "unknown": "recall, strangers"}
            names = [kinds[c.values["known"]] if task.name == "recall" else task.name for c in cases]
            for name in sorted(set(names)):
                of = [ok for ok, other in zip(right, names, strict=True) if other == name]
                found.setdefault(name, {})[split] = round(sum(of) / len(of), 4)
    recall = TASKS["recall"]
    asked = [recall.words({"person": name, "kind": kind}) for name in HALF_KNOWN for kind in FACTS if kind != "sport"]
    unknown = answers_right(model, tokenizer, asked, ["unknown"] * len(asked))
    return found | {"misfire": {"given a fact": round(1 - sum(unknown) / len(unknown), 4)}}


def main(
    output: Annotated[Path, typer.Option(help="Folder to write; it must not exist yet.")],
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the text.")] = 0,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = OPTIONS.steps,
    threads: Annotated[int, typer.Option(help="CPU threads to use.")] = 2,
    keep_every: Annotated[int | None, typer.Option(help="Steps between checkpoints; none by default.")] = None,
) -> None:
    """Train the school organism and write it, with its accuracies, to a folder."""
    torch.set_num_threads(threads)
    options = replace(OPTIONS, steps=steps, seed=seed)
    metrics = train_organism(output, vocabulary(), sentences(seed), evaluate, options, 500, keep_every)
    Console().print_json(data=metrics)


if __name__ == "__main__":
    typer.run(main)
