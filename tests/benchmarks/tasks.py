"""Which hops of a trained organism's tasks it carries at one place, and its transcoders and neurons show.

`python -m tests.benchmarks.tasks --organism school --transcoder clt --transcoder plt`: those that are bundled.
`python -m tests.benchmarks.tasks options --organism school --rows F --k 10`: CLTs trained as `tl-clt benchmark` does,
with options of the trainer, and one of them after `finetune` with some of its terms. Rows are added to `--rows`, a file
of JSON lines, as they are done; what is there is not done again. Not collected by pytest.
"""

from __future__ import annotations

import time
from typing import Annotated, Any

import torch
import typer
from pandas import DataFrame, concat
from rich.console import Console

from tests.benchmarks.finetune import Rows, Seeds, Steps, Table, weights_of
from tl_clt import CrossLayerTranscoder, finetune
from tl_clt.benchmark import find_neurons, measure_organism, measure_task
from tl_clt.benchmark.train import OF_ORGANISM, STEPS, train_on_organism
from tl_clt.lens import HookedModel, load_model
from tl_clt.organisms import find_variables, organism_folder, organism_tasks, training_tokens

app = typer.Typer(add_completion=False, invoke_without_command=True)
Organism = Annotated[str, typer.Option(help="Name of a bundled organism.")]


@app.callback()
def bundled(
    context: typer.Context,
    organism: Organism = "school",
    transcoder: Annotated[list[str], typer.Option(help="Its folders of transcoders.")] = ["clt"],  # noqa: B006
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Print, task by task, where hops are carried and what each transcoder shows of them."""
    if context.invoked_subcommand is not None:
        return
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


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "span 2": {"span": 2},
    "far writes .03": {"far_write_coefficient": 0.03},
    "far writes .3": {"far_write_coefficient": 0.3},
    "JumpReLU": {"activation": "jumprelu"},
    "twice as wide": {"width": 2},
}
"""Of training, by the name that the table has."""
TERMS = ("plain", "downstream=3,jacobian=0.3", "across=0.1")
"""Of fine-tuning, each on the plain CLT of the same seed; "plain" is further steps without any."""
TEXT_SEED = 1000
"""Of the text of fine-tuning."""


def trained_with(
    option: str, organism: str, model: HookedModel, k: int, seed: int, n_steps: int
) -> CrossLayerTranscoder:
    """The transcoder that `tl-clt benchmark` would train, with an option. JumpReLU is asked for an L0 of k."""
    settings = dict(OPTIONS[option])
    span, activation = settings.pop("span", model.cfg.n_layers), settings.pop("activation", "topk")
    settings["d_transcoder"] = settings.pop("width", 1) * OF_ORGANISM[organism]
    if activation == "jumprelu":
        settings["target_l0"] = float(k)
    strength = k if activation == "topk" else 1.0
    return train_on_organism(organism, model, span, strength, seed, activation=activation, n_steps=n_steps, **settings)


@app.command()
def options(
    rows: Rows,
    organism: Organism = "school",
    option: Annotated[list[str], typer.Option(help="Of `OPTIONS`.")] = list(OPTIONS),  # noqa: B006
    terms: Annotated[list[str], typer.Option(help="Of fine-tuning; none to leave it out.")] = list(TERMS),  # noqa: B006
    k: Annotated[int, typer.Option(help="Active features a layer.")] = 10,
    seeds: Seeds = 2,
    first_seed: Annotated[int, typer.Option(help="The first of them.")] = 0,
    n_steps: Annotated[int, typer.Option(help="Of training.")] = STEPS,
    finetune_steps: Steps = 300,
) -> None:
    """Train, fine-tune and measure what is not in `--rows` yet, and print what options change in swaps, hop by hop."""
    torch.set_num_threads(1)
    model, tasks = load_model(organism), organism_tasks(organism)
    places = {task.name: find_variables(model, task) for task in tasks.values() if task.hops[1:]}
    table = Table(rows, ("organism", "option", "k", "n_steps", "seed"))

    def add(key: tuple[Any, ...], clt: CrossLayerTranscoder, began: float) -> None:
        seconds = time.process_time() - began
        report = measure_organism(organism, model, clt.requires_grad_(False), tasks, places=places, seed=key[-1])
        table.add(key, {**report.numbers, "seconds": seconds, "report": report.to_dict()})

    tuned = [(f"tuned: {one}", one) for one in terms if one != "none"]
    for seed in range(first_seed, first_seed + seeds):
        plain = None
        for one in option:
            if table.missing(*(key := (organism, one, k, n_steps, seed))):
                began = time.process_time()
                clt = trained_with(one, organism, model, k, seed, n_steps)
                add(key, clt, began)
                plain = clt if one == "plain" else plain
        for name, one in tuned:
            if table.missing(*(key := (organism, name, k, n_steps, seed))):
                plain = trained_with("plain", organism, model, k, seed, n_steps) if plain is None else plain
                n_ctx = model.cfg.n_ctx
                text = training_tokens(organism, model, finetune_steps * 8 * n_ctx, seed + TEXT_SEED)
                began = time.process_time()
                clt = finetune(
                    *(model, plain, text), **weights_of(one), n_steps=finetune_steps, batch_size=8, seed=seed,
                    progress=False,
                )  # fmt: skip
                add(key, clt, began)
    compare([row for row in table.rows if (row["organism"], row["k"], row["n_steps"]) == (organism, k, n_steps)])


def compare(rows: list[dict[str, Any]]) -> None:
    """Means over seeds of each option, the swaps of each hop that is carried, and differences of their mean from
    the plain one's of the same seed."""
    means, by_hop, mean_swap = [], [], {}
    for row in rows:
        hops = DataFrame(row["report"]["hops"]).query("carried")
        mean_swap[row["option"], row["seed"]] = row["swap"]
        about = {"told": "accuracy", "swap": "swap", "whole": "swap_all", "features": "n_features"}
        means.append(
            {
                **{"option": row["option"], "L0": row["l0"], "EV": row["explained_variance"]},
                **{"answers": row["answers_kept"], "recall": row["hop_recall"], "shown": int(hops["shown"].sum())},
                **{name: hops[column].mean() for name, column in about.items()},
                "CPU s": row["seconds"],
            }
        )
        by_hop.append({"option": row["option"], **dict(zip(hops["variable"], hops["swap"], strict=True))})
    for row in means:
        row["runs"] = 1
    groups = DataFrame(means).groupby("option", sort=False)
    summary = groups.mean(numeric_only=True).assign(runs=groups["runs"].sum())
    gains = {
        option: [
            f"{swap - mean_swap['plain', seed]:+.3f}"
            for (of, seed), swap in mean_swap.items()
            if of == option and ("plain", seed) in mean_swap
        ]
        for option in summary.index
    }
    summary["swap less plain, by seed"] = [" ".join(gains[option]) for option in summary.index]
    print(summary.round(3).to_string())
    print(DataFrame(by_hop).groupby("option", sort=False).mean().round(2).to_string())


if __name__ == "__main__":
    app()
