"""Whether `target_l0` is reached: `python -m tests.benchmarks.l0_control` prints a table. Not collected by pytest.

JumpReLU CLTs of atlas, whole runs of `CLTTrainingRunner` with what it chooses by itself but for the batch. L0 is told
before thresholds are set by held-out text (what lambdas alone reached; least and greatest layer) and after.
"""

from __future__ import annotations

import itertools
import platform
from importlib.metadata import version
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from tl_clt import CLTTrainingRunner, CLTTrainingRunnerConfig, load_model
from tl_clt.organisms.atlas.train_clt import text_of_run

BATCH = 256


def main(
    steps: Annotated[list[int], typer.Option(help="Budgets.")] = [100, 250, 1000],  # noqa: B006
    target: Annotated[list[float], typer.Option(help="Active features asked for.")] = [4.0, 16.0, 64.0],  # noqa: B006
    loss: Annotated[list[str], typer.Option(help="Sparsity losses.")] = ["tanh", "l0", "quadratic_l0"],  # noqa: B006
    d_transcoder: Annotated[list[int], typer.Option(help="Features per layer.")] = [128, 512],  # noqa: B006
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    """Train with every combination."""
    torch.set_num_threads(threads)
    atlas = load_model("atlas")
    tokens = text_of_run(atlas, 0)
    table = Table(
        title=f"atlas, batches of {BATCH} tokens, {platform.machine()}, {threads} threads, torch {torch.__version__},"
        f" sae-lens {version('sae-lens')}, float32",
        title_justify="left",
    )
    for heading in ("loss", "features", "steps", "asked", "by lambda", "at the end", "EV", "dead", "lambda"):
        table.add_column(heading, justify="left" if heading == "loss" else "right")
    for kind, width, n_steps, asked in itertools.product(loss, d_transcoder, steps, target):
        cfg = CLTTrainingRunnerConfig(
            model_name="atlas",
            d_transcoder=width,
            activation="jumprelu",
            sparsity_loss=kind,  # type: ignore[arg-type]
            target_l0=asked,
            training_tokens=BATCH * n_steps,
            train_batch_size_tokens=BATCH,
            context_size=tokens.shape[1],
            n_eval_prompts=64,
        )
        run = CLTTrainingRunner(cfg, model=atlas, dataset=tokens)
        run.run()
        assert run.record is not None
        metrics = run.record.metrics
        before, after = metrics.l0_before_thresholds or [], metrics.l0_per_layer
        table.add_row(
            *(kind, str(width), str(n_steps), f"{asked:g}"),
            *(f"{min(l0):.3g} to {max(l0):.3g}" for l0 in (before, after)),
            *(f"{metrics.explained_variance:.3f}", f"{metrics.dead_share:.0%}"),
            f"{run.record.coefficients['sparsity']:.2g}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
