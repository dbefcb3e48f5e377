"""Graphs of an organism's tasks beside each other, and its hops over training: `python -m tests.benchmarks.across`
prints tables, and with `--output FOLDER` writes reports and figures.

Hops over training are of the checkpoints that `python -m tl_clt.organisms.school.train_model --keep-every 500` keeps:
without `--checkpoints FOLDER` they are left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from pandas import concat
from rich.console import Console

from tl_clt import load_organism
from tl_clt.evaluation import compare_tasks
from tl_clt.organisms import Checkpoints, measure_emergence, organism_tasks
from tl_clt.organisms.emergence import share_right

console = Console(width=220)
HOPS = ("rhyme", "opposite", "tens", "recall")


def main(
    organism: Annotated[str, typer.Option(help="Whose tasks are compared.")] = "school",
    n_prompts: Annotated[int, typer.Option(help="Held-out prompts of each task that are traced.")] = 8,
    checkpoints: Annotated[Path | None, typer.Option(help="Folder of a run's checkpoints.")] = None,
    tasks: Annotated[str, typer.Option(help="Tasks that are followed over training, with commas.")] = ",".join(HOPS),
    output: Annotated[Path | None, typer.Option(help="A new folder for reports and figures.")] = None,
) -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    known = organism_tasks(organism)
    if n_prompts:
        model, clt = load_organism(organism)
        # A bundled model may be of an older text than its tasks: what it does not do is not its circuit.
        cases = {name: task.cases(n_prompts, held_out=True) for name, task in known.items()}
        done = {name: share_right(model, known[name], of) for name, of in cases.items()}
        console.print(f"Share of the prompts that the model answers right: {done}\n")
        cases = {name: of for name, of in cases.items() if done[name] > 0.5}
        prompts = {name: [case.prompt for case in of] for name, of in cases.items()}
        answers = {name: [case.answer for case in of] for name, of in cases.items()}
        report = compare_tasks(model, clt, prompts, answers, progress=False)
        console.print(f"{report}\n")
        means: Any = report.heads.groupby(["task", "layer", "head"], sort=False)[["through", "direct"]].mean()
        heads = means.reset_index()
        most = heads.sort_values("through", ascending=False).groupby("task", sort=False).head(3)
        console.print(f"Heads of most importance\n{most.sort_values(['task', 'layer']).round(3).to_string()}\n")
        for name in ("shares", "overlap", "tokens", "quadrants", "stages"):
            console.print(f"{name}\n{getattr(report, name).round(3).to_string(index=False)}\n")
        if output is not None:
            report.save(output / "tasks")
    first = []
    for name in tasks.split(",") if checkpoints is not None else ():
        assert checkpoints is not None
        course = measure_emergence(Checkpoints(checkpoints), known[name], progress=False)
        console.print(f"{name} over training\n{course.table.round(3).to_string(index=False)}\n")
        first.append(course.first.assign(task=name))
        if output is not None:
            course.save(output / name)
    if first:
        console.print(f"First steps\n{concat(first).round(3).to_string(index=False)}")


if __name__ == "__main__":
    typer.run(main)
