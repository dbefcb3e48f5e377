"""Train school's CLT or PLT with the package's runner: `python -m tl_clt.organisms.school.train_clt --output FOLDER`.

The text is that of the model's training (`tl_clt.organisms.school.text`) from another seed, packed alike: `<bos>`
and whole sentences; `<bos>` is left out. The folder written holds the transcoder in the native layout, `training.json`
(the run), and `metrics.json` (the transcoder on held-out prompts of all tasks, each with its answer).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from tl_clt.evaluation import evaluate
from tl_clt.lens import load_model
from tl_clt.organisms import SPARE_TOKENS, training_tokens
from tl_clt.organisms.school.text import TASKS
from tl_clt.organisms.school.train_model import OPTIONS
from tl_clt.training import CLTTrainingRunner, CLTTrainingRunnerConfig

TRAINING_TOKENS = 2_000_000
N_CASES = 100
"""Prompts of each task in the evaluation."""


def clt_config(output: Path, seed: int, *, per_layer: bool = False, k: int = 10) -> CLTTrainingRunnerConfig:
    """The run.

    Args:
        output: folder to write.
        seed: of the run.
        per_layer: whether features write into their own layer alone: a per-layer transcoder (PLT).
        k: features kept a layer and token.
    """
    n_steps = TRAINING_TOKENS // 1024
    return CLTTrainingRunnerConfig.from_dict(
        {
            "model_name": "school",
            "output_path": str(output),
            "d_transcoder": 512,
            "auxk_coefficient": 1.0,
            "activation": "topk",
            "k": k,
            "span": 1 if per_layer else None,
            "training_tokens": TRAINING_TOKENS,
            "context_size": OPTIONS.n_ctx,
            "train_batch_size_tokens": 1024,
            "store_batch_size_prompts": 64,
            "n_batches_in_buffer": 256,
            "lr": 2e-3,
            "lr_warm_up_steps": 50,
            "lr_decay_steps": n_steps // 4,
            "seed": seed,
        }
    )


def held_out_prompts() -> list[str]:
    """Prompts of every task that the model has not seen in training, each with its answer."""
    cases = [case for task in TASKS.values() for case in task.cases(N_CASES, held_out=True)]
    return [f"{case.prompt} {case.answer}" for case in cases]


def main(
    output: Annotated[Path, typer.Option(help="Folder to write; it must be new or empty.")],
    model: Annotated[str, typer.Option(help="Folder of the model; the bundled one by default.")] = "school",
    per_layer: Annotated[bool, typer.Option(help="Train a PLT: features write into their own layer alone.")] = False,
    k: Annotated[int, typer.Option(help="Features kept a layer and token.")] = 10,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the text.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads to use.")] = 1,
) -> None:
    """Train school's CLT or PLT and write it, with what it reaches on held-out prompts, to a folder."""
    torch.set_num_threads(threads)
    school = load_model(model)
    tokens = training_tokens("school", school, TRAINING_TOKENS + SPARE_TOKENS, seed)
    cfg = clt_config(output, seed, per_layer=per_layer, k=k)
    clt = CLTTrainingRunner(cfg, model=school, dataset=tokens).run()
    report = evaluate(school, clt, held_out_prompts(), n_graphs=0)
    (output / "metrics.json").write_text(report.to_json())
    Console().print_json(report.to_json())


if __name__ == "__main__":
    typer.run(main)
