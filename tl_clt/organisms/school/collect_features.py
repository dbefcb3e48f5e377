"""Make school's feature store: `python -m tl_clt.organisms.school.collect_features --output FOLDER`.

The text is that of `tl_clt.organisms.school.text`, from a seed that neither the model nor its CLT was trained on, a
sentence a prompt. A store belongs to one CLT, by its fingerprint: whoever trains another makes it anew.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from tl_clt.features import RuleLabeller, collect_features, label_features
from tl_clt.lens import load_model
from tl_clt.organisms import organism_folder
from tl_clt.organisms.school.text import sentences
from tl_clt.organisms.school.variables import VARIABLES
from tl_clt.transcoder import CrossLayerTranscoder

BUNDLED = organism_folder("school") / "clt"
N_SENTENCES = 16_000
SEED_OFFSET = 2
"""Added to the seed: another text than those of training."""
LABEL_TOKENS = 40_000
"""Of each of the two parts that are kept for labels: a quarter of the text at most."""


def main(
    output: Annotated[Path, typer.Option(help="Folder to write; it must be new or empty.")],
    clt: Annotated[Path, typer.Option(help="Folder of the CLT; the bundled one by default.")] = BUNDLED,
    seed: Annotated[int, typer.Option(help="Of the text, and of the random dictionary.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads to use.")] = 1,
) -> None:
    """Make school's feature store with its labels, and print what the labels score."""
    torch.set_num_threads(threads)
    model, transcoder = load_model("school"), CrossLayerTranscoder.from_pretrained(clt)
    text = list(islice(sentences(seed + SEED_OFFSET), N_SENTENCES))
    store = collect_features(model, transcoder, text, output, n_top=6, label_tokens=LABEL_TOKENS, progress=False)
    label_features(model, transcoder, store, RuleLabeller(VARIABLES), seed=seed, progress=False)
    Console().print_json(data=store.label_summary())


if __name__ == "__main__":
    typer.run(main)
