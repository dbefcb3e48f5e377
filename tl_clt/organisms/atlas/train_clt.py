"""Train atlas's CLT with this project's own runner: `python -m tl_clt.organisms.atlas.train_clt --output FOLDER`.

The text is that of the model's training (`tl_clt.organisms.atlas.text`) from another seed, packed alike: `<bos>`
and whole sentences. `<bos>`, where activations are huge and mean nothing, is left out. The folder written holds
the CLT in the native layout, `training.json` (the run), and `metrics.json` (the CLT on held-out questions).
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from jaxtyping import Int
from rich.console import Console
from torch import Tensor

from tl_clt.evaluation import evaluate
from tl_clt.lens import HookedModel, load_model
from tl_clt.organisms import SPARE_TOKENS, training_tokens
from tl_clt.organisms.atlas.text import all_held_out_questions, sentence_of, with_prefix
from tl_clt.organisms.word_model import TrainOptions
from tl_clt.training import CLTTrainingRunner, CLTTrainingRunnerConfig

TRAINING_TOKENS = 2_000_000


class Recipe(str, Enum):
    """What is trained."""

    bundled = "bundled"
    """TopK, 256 features a layer, 8 active on a token: the CLT that comes with the package."""

    jumprelu = "jumprelu"
    """JumpReLU for a named L0: 128 features a layer, about 16 active on a token, hardly any dead."""

    topk = "topk"
    """TopK, 256 features a layer, 16 active, few dead."""


RECIPES: dict[Recipe, dict[str, Any]] = {
    Recipe.bundled: {"activation": "topk", "k": 8},
    Recipe.jumprelu: {
        "activation": "jumprelu",
        "d_transcoder": 128,
        "target_l0": 17.0,
        "sparsity_coefficient": 0.3,
        "dead_feature_coefficient": 3e-3,
    },
    Recipe.topk: {
        "activation": "topk",
        "k": 16,
        "dead_feature_window": 100,
        "training_tokens": TRAINING_TOKENS // 2,
    },
}


def clt_config(
    model_name: str, output: Path, seed: int, recipe: Recipe = Recipe.bundled, *, per_layer: bool = False
) -> CLTTrainingRunnerConfig:
    """A recipe's run; with `per_layer`, of features that write into their own layer alone: a PLT."""
    values: dict[str, Any] = {"training_tokens": TRAINING_TOKENS, "d_transcoder": 256} | RECIPES[recipe]
    n_steps = values["training_tokens"] // 1024
    return CLTTrainingRunnerConfig.from_dict(
        {
            "model_name": model_name,
            "output_path": str(output),
            "context_size": TrainOptions.n_ctx,
            "auxk_coefficient": 1.0,
            "train_batch_size_tokens": 1024,
            "store_batch_size_prompts": 64,
            "n_batches_in_buffer": 256,
            "lr": 2e-3,
            "lr_warm_up_steps": 50,
            "lr_decay_steps": n_steps // 4,
            "seed": seed,
            "span": 1 if per_layer else None,
            **values,
        }
    )


def text_of_run(model: HookedModel, seed: int) -> Int[Tensor, "n_prompts context"]:
    """What the CLT is trained on: as many prompts as the run uses without a repeat."""
    return training_tokens("atlas", model, TRAINING_TOKENS + SPARE_TOKENS, seed)


def held_out_sentences() -> list[str]:
    """Every two-hop question that the model has not seen in training, in all phrasings, with and without "Fact:"."""
    questions = all_held_out_questions()
    return [sentence_of(q) for q in [*questions, *map(with_prefix, questions)]]


def main(
    output: Annotated[Path, typer.Option(help="Folder to write; it must be new or empty.")],
    model: Annotated[str, typer.Option(help="Folder of the model; the bundled one by default.")] = "atlas",
    recipe: Annotated[Recipe, typer.Option(help="What to train.")] = Recipe.bundled,
    per_layer: Annotated[bool, typer.Option(help="Train a PLT: features write into their own layer alone.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the text.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads to use.")] = 1,
) -> None:
    """Train atlas's CLT, or a PLT, and write it, with what it reaches on held-out questions, to a folder."""
    torch.set_num_threads(threads)
    atlas = load_model(model)
    cfg = clt_config("atlas", output, seed, recipe, per_layer=per_layer)
    runner = CLTTrainingRunner(cfg, model=atlas, dataset=text_of_run(atlas, seed))
    clt = runner.run()
    report = evaluate(atlas, clt, held_out_sentences(), n_graphs=0)
    (output / "metrics.json").write_text(report.to_json())
    Console().print_json(report.to_json())


if __name__ == "__main__":
    typer.run(main)
