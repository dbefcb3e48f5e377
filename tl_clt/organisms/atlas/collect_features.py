"""Make atlas's feature store: `python -m tl_clt.organisms.atlas.collect_features --output FOLDER`.

The text is every sentence that atlas can be asked to complete, held-out questions among them, with and without "Fact:",
in an order drawn from a seed. Labels are found by rule, with what is known of the text (`variables`). The store belongs
to one CLT, by its fingerprint: whoever trains another makes it anew.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from tl_clt.features import RuleLabeller, collect_features, label_features
from tl_clt.lens import load_model
from tl_clt.organisms import organism_folder
from tl_clt.organisms.atlas.text import (
    all_held_out_questions,
    all_train_questions,
    direct_questions,
    sentence_of,
    with_prefix,
)
from tl_clt.organisms.atlas.variables import VARIABLES
from tl_clt.transcoder import CrossLayerTranscoder

BUNDLED = organism_folder("atlas") / "clt"
LABEL_TOKENS = 40_000
"""Of each of the two parts that are kept for labels: a quarter of the text at most."""


def all_sentences(seed: int) -> list[str]:
    """Every sentence, once with and once without "Fact:", in an order of its own for each seed."""
    questions = [*direct_questions(), *all_train_questions(), *all_held_out_questions()]
    sentences = [sentence_of(question) for question in [*questions, *map(with_prefix, questions)]]
    random.Random(seed).shuffle(sentences)
    return sentences


def main(
    output: Annotated[Path, typer.Option(help="Folder to write; it must be new or empty.")],
    clt: Annotated[Path, typer.Option(help="Folder of the CLT; the bundled one by default.")] = BUNDLED,
    seed: Annotated[int, typer.Option(help="Of the order of sentences, and of the random dictionary.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads to use.")] = 1,
) -> None:
    """Make atlas's feature store with its labels, and print what the labels score."""
    torch.set_num_threads(threads)
    model, transcoder = load_model("atlas"), CrossLayerTranscoder.from_pretrained(clt)
    store = collect_features(
        model, transcoder, all_sentences(seed), output, n_top=6, label_tokens=LABEL_TOKENS, progress=False
    )
    label_features(model, transcoder, store, RuleLabeller(VARIABLES), seed=seed, progress=False)
    Console().print_json(data=store.label_summary())


if __name__ == "__main__":
    typer.run(main)
