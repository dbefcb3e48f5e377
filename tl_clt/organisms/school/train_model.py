"""Train the school organism from scratch: `python -m tl_clt.organisms.school.train_model --output FOLDER`.

A small GPT-2 (`tl_clt.organisms.word_model`) on the text of `tl_clt.organisms.school.text`. The folder written holds
a Hugging Face model with its tokenizer, and `metrics.json`: for each task, accuracy on prompts of the text and on those
held out, and for the names that it misfires on what it says.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from tl_clt.organisms.school.text import FACTS, HALF_KNOWN, TASKS, sentences, vocabulary
from tl_clt.organisms.word_model import (
    TrainOptions,
    answers_right,
    build_model,
    build_tokenizer,
    save,
    train,
    training_batches,
)

OPTIONS = TrainOptions(d_model=128, n_ctx=32, steps=4000)
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
                found.setdefault(name, {})[split] = sum(of) / len(of)
    recall = TASKS["recall"]
    asked = [recall.words({"person": name, "kind": kind}) for name in HALF_KNOWN for kind in FACTS if kind != "sport"]
    unknown = answers_right(model, tokenizer, asked, ["unknown"] * len(asked))
    return found | {"misfire": {"given a fact": 1 - sum(unknown) / len(unknown)}}


def train_school(output: Path, options: TrainOptions) -> dict[str, Any]:
    """Train an organism, write it to the new folder `output` and return what `metrics.json` holds."""
    if output.exists():
        raise FileExistsError(f"{output} already exists; name a new folder")
    tokenizer = build_tokenizer(vocabulary(), options.n_ctx)
    model = build_model(tokenizer, options)
    start = time.perf_counter()

    def tell(step: int) -> None:
        if step and step % 500 == 0:
            model.eval()
            told = {
                name: "/".join(f"{share:.2f}" for share in of.values())
                for name, of in evaluate(model, tokenizer).items()
            }
            model.train()
            Console(stderr=True).print(f"step {step}: " + ", ".join(f"{name} {share}" for name, share in told.items()))

    loss = train(model, training_batches(tokenizer, sentences(options.seed), options), options, tell)
    metrics: dict[str, Any] = {
        "accuracy": {
            name: {split: round(share, 4) for split, share in of.items()}
            for name, of in evaluate(model, tokenizer).items()
        },
        "final_loss_nats_per_token": round(loss, 4),
        "seconds": round(time.perf_counter() - start, 1),
        "tokens_seen": options.steps * options.batch_size * options.n_ctx,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "vocabulary": len(tokenizer),
        "threads": torch.get_num_threads(),
        "options": asdict(options),
    }
    save(model, tokenizer, output)
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    return metrics


def main(
    output: Annotated[Path, typer.Option(help="Folder to write; it must not exist yet.")],
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the text.")] = 0,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = OPTIONS.steps,
    threads: Annotated[int, typer.Option(help="CPU threads to use.")] = 2,
) -> None:
    """Train the school organism and write it, with its accuracies, to a folder."""
    torch.set_num_threads(threads)
    Console().print_json(data=train_school(output, replace(OPTIONS, steps=steps, seed=seed)))


if __name__ == "__main__":
    typer.run(main)
