"""Circuits of nodes and of edges, of an organism's CLT, a PLT and its own neurons:
`python -m tests.benchmarks.curves --plt FOLDER` prints tables, and with `--output FOLDER` writes reports and figures.

Areas are over MIB's shares; how many nodes or edges reach .9 is by `N_SHARES` shares, each a fixed factor more.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console

from tl_clt import CrossLayerTranscoder, load_organism
from tl_clt.evaluation import FaithfulnessCurves, find_neurons, measure_curves
from tl_clt.organisms import benchmark_prompts, organism_folder

console = Console(width=220)
N_SHARES = 48


def main(
    organism: Annotated[str, typer.Option(help="Whose circuits are measured.")] = "atlas",
    plt: Annotated[Path | None, typer.Option(help="Folder of a PLT; the bundled one by default.")] = None,
    n_prompts: Annotated[int, typer.Option(help="Measure on so many of its prompts.")] = 20,
    errors: Annotated[str, typer.Option(help="nodes, kept or removed.")] = "nodes",
    output: Annotated[Path | None, typer.Option(help="A new folder for reports and figures.")] = None,
) -> None:
    """Print the tables."""
    torch.set_num_threads(1)
    model, clt = load_organism(organism)
    prompts, targets, counterfactuals = map(list, zip(*benchmark_prompts(organism)[:n_prompts], strict=True))
    folder = organism_folder(organism) / "plt" if plt is None else plt
    transcoders: dict[str, Any] = {"CLT": clt, "PLT": CrossLayerTranscoder.from_pretrained(folder)}
    neurons = {
        "neurons": find_neurons(model, prompts),
        "neurons, .1 kept": find_neurons(model, prompts, kept=0.1),
    }
    fine = [float(share) for share in np.geomspace(1e-4, 1, N_SHARES)]
    for level, of_level in (("nodes", {**transcoders, **neurons}), ("edges", transcoders)):
        for others in (None, counterfactuals):
            started = time.process_time()
            common: dict[str, Any] = {"level": level, "errors": errors, "progress": False}
            report = measure_curves(model, of_level, prompts, targets, others, **common)
            finer = measure_curves(model, of_level, prompts, targets, others, shares=fine, **common)
            seconds = time.process_time() - started
            console.print(
                f"{level}, ablated to {report.info['ablated_to']}, errors {errors}, {seconds:.0f} CPU seconds\n"
            )
            print_table(report, finer)
            if output is not None:
                report.save(output / f"{level}-{report.info['ablated_to']}")
                finer.save(output / f"{level}-{report.info['ablated_to']}-fine")


SHOWN = (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Shares in tables."""


def print_table(report: FaithfulnessCurves, finer: FaithfulnessCurves) -> None:
    """In Markdown."""
    curves, for_90 = report.curves.set_index(["transcoder", "ranking", "share"]), finer.areas["n_for_90"]
    names = [
        "",
        "order",
        "number",
        "for .9",
        "area",
        "distance",
        *(f"f({share:g})" for share in SHOWN),
        "f(1)",
        "answers",
    ]
    console.print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for row, number in zip(report.areas.to_dict("records"), for_90, strict=True):
        at = {share: curves.loc[(row["transcoder"], row["ranking"], share)] for share in SHOWN}
        cells = [row["transcoder"], row["ranking"], f"{row['n_nodes']:,.0f}", f"{number:,.0f}"]
        cells += [f"{row[x]:.3f} ({row[f'{x}_low']:.3f} to {row[f'{x}_high']:.3f})" for x in ("area", "distance")]
        cells += [f"{at[share]['faithfulness']:.2f}" for share in SHOWN]
        cells += [f"{row['whole']:.2f}", f"{at[0.1]['answers']:.2f}"]
        console.print(f"| {' | '.join(cells)} |".replace(" 0.", " .").replace("(0.", "(."))
    console.print()


if __name__ == "__main__":
    typer.run(main)
