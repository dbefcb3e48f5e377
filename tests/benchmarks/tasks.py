"""Which hops of a trained organism's tasks it carries at one place, and its transcoders and neurons show.

`python -m tests.benchmarks.tasks --organism school --transcoder clt --transcoder plt`
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from pandas import concat
from rich.console import Console

from tl_clt.benchmark import find_neurons, measure_task
from tl_clt.lens import load_model
from tl_clt.organisms import find_variables, organism_folder, organism_tasks, training_tokens
from tl_clt.transcoder import CrossLayerTranscoder


def main(
    organism: Annotated[str, typer.Option(help="Name of a bundled organism.")] = "school",
    transcoder: Annotated[list[str], typer.Option(help="Its folders of transcoders.")] = ["clt"],  # noqa: B006
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Print, task by task, where hops are carried and what each transcoder shows of them."""
    torch.set_num_threads(threads)
    model, console = load_model(organism), Console(width=200)
    folder = organism_folder(organism)
    judged = {name: CrossLayerTranscoder.from_pretrained(folder / name) for name in transcoder}
    judged |= {"neurons": find_neurons(model, training_tokens(organism, model, 4096, 0))}
    for task in organism_tasks(organism).values():
        if len(task.hops) < 2:
            continue
        places = find_variables(model, task)
        shown = concat({name: measure_task(model, of, task, places=places).hops for name, of in judged.items()})
        console.print(f"{task.name}\n{places.round(2).to_string()}\n{shown.round(2).to_string()}")


if __name__ == "__main__":
    typer.run(main)
