"""Train the atlas organism from scratch: `python -m tl_clt.organisms.atlas.train_model --output FOLDER`.

The organism is a small GPT-2 (`tl_clt.organisms.word_model`) trained on the text of `tl_clt.organisms.atlas.text`. The
folder written holds a Hugging Face model with its tokenizer, and `metrics.json`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from tl_clt.organisms.atlas.text import (
    RELATIONS,
    Question,
    all_city_questions,
    all_held_out_questions,
    all_state_questions,
    all_train_questions,
    held_out_questions,
    sentences,
    vocabulary,
    with_prefix,
)
from tl_clt.organisms.word_model import TrainOptions, answers_right, train_organism


def accuracy(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, questions: list[Question]) -> float:
    """Return the fraction of questions answered right, asked both with and without the prefix."""
    both = questions + [with_prefix(question) for question in questions]
    right = answers_right(model, tokenizer, [q.prompt for q in both], [q.answer for q in both])
    return sum(right) / len(right)


def evaluate(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """Return the accuracy on each kind of question, over all phrasings, and per relation for two-hop ones."""
    groups = {
        "direct_city": all_city_questions(),
        "direct_state": all_state_questions(),
        "two_hop_trained": all_train_questions(),
        "two_hop_held_out": all_held_out_questions(),
    }
    for name in ("two_hop_trained", "two_hop_held_out"):
        for relation in RELATIONS:
            groups[f"{name}_{relation}"] = [q for q in groups[name] if q.relation == relation]
    groups["two_hop_held_out_first_phrasing"] = held_out_questions(0)
    groups["direct"] = groups["direct_city"] + groups["direct_state"]
    return {name: round(accuracy(model, tokenizer, questions), 4) for name, questions in groups.items()}


def main(
    output: Annotated[Path, typer.Option(help="Folder to write; it must not exist yet.")],
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the text.")] = 0,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = TrainOptions.steps,
    threads: Annotated[int, typer.Option(help="CPU threads to use.")] = 2,
) -> None:
    """Train the atlas organism and write it, with its accuracies, to a folder."""
    torch.set_num_threads(threads)
    options = TrainOptions(steps=steps, seed=seed)
    metrics = train_organism(output, vocabulary(), sentences(seed), evaluate, options)
    Console().print_json(data=metrics)


if __name__ == "__main__":
    typer.run(main)
