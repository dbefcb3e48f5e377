"""Faithfulness of replacement models: `python -m tests.benchmarks.faithfulness` prints tables. Not collected by pytest.

atlas with its bundled CLT, beside per-layer transcoders (PLTs) of the same recipe, which the project's runner trains
first unless --plt names some; with --gemma and --gemma-clt also Gemma 3 270M. Published (Methods, "Evaluating
mechanistic faithfulness", an 18-layer model): cosine about 0.8 and normalised error about 0.4, one layer after a
perturbation.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import typer
from rich.console import Console
from rich.table import Table

from tl_clt import CLTTrainingRunner, CrossLayerTranscoder, load_model, load_organism, measure_faithfulness
from tl_clt.evaluation import FaithfulnessReport
from tl_clt.evaluation.faithfulness import KINDS
from tl_clt.lens import HookedModel
from tl_clt.organisms.atlas.train_clt import clt_config, held_out_sentences, text_of_run

console = Console(width=150)
DISTANCES = (1, 2, 3, 5, 8, 12, 17)
GEMMA_PROMPTS = [
    "Fact: Michael Jordan plays the sport of",
    "Fact: the capital of the state containing Dallas is",
    "The opposite of small is",
    "The company was founded in 1998 and is based in",
    "Water boils at one hundred degrees",
]


def atlas_plt(folder: Path | None, seed: int) -> CrossLayerTranscoder:
    """PLTs of atlas from a folder, or trained now: the recipe of its CLT, with span 1."""
    if folder is not None:
        return CrossLayerTranscoder.from_pretrained(folder)
    model = load_model("atlas")
    with tempfile.TemporaryDirectory() as temp:
        cfg = clt_config("atlas", Path(temp) / "plt", seed, per_layer=True)
        return CLTTrainingRunner(cfg, model=model, dataset=text_of_run(model, seed)).run()


def show(name: str, report: FaithfulnessReport) -> None:
    """One layer after each kind of perturbation; then cosines (means) and errors (medians) by distance."""
    near = Table("attention", "transcoder", "norms", "perturbation", "n", "cosine", "normalised error", "its median")
    near.add_column("perturbation alone: cosine, error")
    far = Table("attention", "transcoder", "norms", "distance", *(f"{kind}: cosine, median error" for kind in KINDS))
    groups = report.by_distance.groupby(["model_freeze", "transcoder", "freeze"], sort=False)
    for (model_freeze, transcoder, freeze), means in groups:
        where = ("free" if model_freeze == "none" else "held", transcoder, "held" if freeze == "all" else "free")
        for row in means[means["distance"] == 1].itertuples():
            numbers = f"{row.cosine:.2f}", f"{row.normalised_error:.2f}", f"{row.median_error:.2f}"
            alone = f"{row.carried_cosine:.2f}, {row.carried_error:.2f}"
            near.add_row(*where, row.kind, str(row.n), *numbers, alone)
        for distance, at in means[means["distance"].isin(DISTANCES)].groupby("distance"):
            kinds = at.set_index("kind").loc[list(KINDS)].itertuples()
            far.add_row(*where, str(distance), *(f"{row.cosine:.2f}, {row.median_error:.2f}" for row in kinds))
    console.print(f"{name}, one layer after a perturbation", near)
    console.print(f"{name}, by distance", far)


def measure(
    name: str,
    model: HookedModel,
    clts: dict[str, CrossLayerTranscoder],
    prompts: list[str],
    options: dict[str, Any],
    output: Path | None,
) -> None:
    """Measure with the model's attention free and held, print tables, and save the report."""
    report = measure_faithfulness(model, clts, prompts, model_freeze=("none", "attention"), **options)
    show(f"{name}, {len(prompts)} prompts, {options}", report)
    if output is not None:
        report.save(output / name)


def main(
    atlas: Annotated[bool, typer.Option(help="Measure atlas.")] = True,
    plt: Annotated[Optional[Path], typer.Option(help="PLTs of atlas, instead of training some.")] = None,
    gemma: Annotated[Optional[Path], typer.Option(help="Folder or .gguf file of Gemma 3 270M.")] = None,
    gemma_clt: Annotated[Optional[Path], typer.Option(help="A CLT of it.")] = None,
    gemma_plt: Annotated[Optional[Path], typer.Option(help="PLTs of it, to stand beside.")] = None,
    n_prompts: Annotated[int, typer.Option(help="Held-out questions of atlas; of Gemma's prompts 5 at most.")] = 40,
    n_perturbations: Annotated[int, typer.Option(help="Of each kind, for each prompt and layer.")] = 4,
    size: Annotated[float, typer.Option(help="Of encoder and random perturbations, over the stream's norm.")] = 0.1,
    output: Annotated[Optional[Path], typer.Option(help="Folder for a folder of each report.")] = None,
    threads: int = 2,
    seed: int = 0,
) -> None:
    """Cosine and normalised error of what follows a perturbation, for atlas and perhaps Gemma."""
    torch.set_num_threads(threads)
    options = {"n_perturbations": n_perturbations, "size": size, "seed": seed}
    if (gemma is None) != (gemma_clt is None):
        raise typer.BadParameter("Give --gemma and --gemma-clt together.")
    if atlas:
        clts = {"CLT": load_organism("atlas").clt, "PLT": atlas_plt(plt, seed)}
        prompts = random.Random(seed).sample(held_out_sentences(), n_prompts)
        measure("atlas", load_model("atlas"), clts, prompts, options, output)
    if gemma is not None and gemma_clt is not None:
        folders = {"CLT": gemma_clt} if gemma_plt is None else {"CLT": gemma_clt, "PLT": gemma_plt}
        clts = {name: CrossLayerTranscoder.from_pretrained(folder) for name, folder in folders.items()}
        measure("gemma", load_model(gemma), clts, GEMMA_PROMPTS[:n_prompts], options, output)


if __name__ == "__main__":
    typer.run(main)
