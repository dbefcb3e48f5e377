"""Which hops of known circuits CLTs and PLTs show: `python -m tests.benchmarks.hops --rows F` prints a table.

32 features a layer, JumpReLU with the tanh penalty, at several lambdas and seeds, trained by
`tl_clt.benchmark.train`; unlike `tl-clt benchmark` with other starts and penalties on far writes too. Beside them the
model's own neurons (what there is to show) and CLTs that were not trained (chance). Rows are added to `--rows`, a file
of JSON lines, as they are done, and what is there already is not done again.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer

from tl_clt.benchmark import measure_hops, neurons_as_transcoder
from tl_clt.benchmark.train import train_on_circuit
from tl_clt.organisms import known_circuits, load_circuit
from tl_clt.transcoder import CrossLayerTranscoder

COLUMNS = {
    "l0": "L0",
    "explained_variance": "EV",
    "answers_kept": "answers",
    "accuracy": "told",
    "swap": "swap",
    "swap_replaced": "swap, CLT above",
    "hop_recall": "hop recall",
    "hops_shown": "hops shown",
    "through_answer": "through last",
    "precision": "precision",
    "far": "far writes",
    "answers_kept_without_far": "answers without far",
    "swap_other": "swap, others",
    "accuracy_shuffled": "told, shuffled",
}


def main(
    rows: Annotated[Path, typer.Option(help="JSON lines that rows are added to.")],
    circuit: Annotated[list[str], typer.Option(help="Of `known_circuits`; all where left out.")] = [],  # noqa: B006
    sparsity: Annotated[list[float], typer.Option(help="lambda at the end.")] = [0.3, 1.0, 3.0, 10.0],  # noqa: B006
    start: Annotated[list[str], typer.Option(help="random, or tokens: `init_from_tokens`.")] = ["random"],  # noqa: B006
    far_write: Annotated[list[float], typer.Option(help="Weight of the penalty on far writes.")] = [0.0],  # noqa: B006
    kind: Annotated[list[str], typer.Option(help="clt or plt.")] = ["clt", "plt"],  # noqa: B006
    seeds: Annotated[int, typer.Option(help="Runs of each.")] = 3,
    by: Annotated[str, typer.Option(help="What rows of the table are means over.")] = "circuit,kind,sparsity",
) -> None:
    """Train and measure what is not in `--rows` yet, and print the table of all that is."""
    torch.set_num_threads(1)
    done = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    keys = ("circuit", "kind", "sparsity", "start", "far_write", "seed")
    known = {tuple(row[key] for key in keys) for row in done}

    def add(values: tuple[Any, ...], clt: CrossLayerTranscoder) -> None:
        report = measure_hops(loaded, clt, seed=values[-1])
        row = {**dict(zip(keys, values, strict=True)), **report.numbers, "report": report.to_dict()}
        done.append(row)
        with rows.open("a") as file:
            file.write(json.dumps(row) + "\n")

    for name in circuit or known_circuits():
        loaded = load_circuit(name)
        n_layers = loaded.model.cfg.n_layers
        if (key := (name, "neurons", None, None, None, 0)) not in known:
            add(key, neurons_as_transcoder(loaded))
        for seed in range(seeds):
            if (key := (name, "untrained", None, None, None, seed)) not in known:
                add(key, train_on_circuit(loaded, n_layers, 0.0, seed, n_steps=0))
        for seed, span, strength, begin, far in itertools.product(range(seeds), kind, sparsity, start, far_write):
            key = (name, span, strength, begin, far, seed)
            # One layer's CLT is a PLT, and a PLT has no far writes.
            if key not in known and not (span == "clt" and n_layers == 1) and not (span == "plt" and far > 0):
                settings = {"far_write_coefficient": far} if far > 0 else {}
                layers = n_layers if span == "clt" else 1
                add(key, train_on_circuit(loaded, layers, strength, seed, start=begin, **settings))
    frame = pd.DataFrame(done)
    means = frame.groupby(by.split(","), sort=False, dropna=False)[list(COLUMNS)].mean().rename(columns=COLUMNS)
    counts = frame.groupby(by.split(","), sort=False, dropna=False).size().rename("runs")
    print(pd.concat([counts, means.round(2)], axis=1).reset_index().to_string(index=False))


if __name__ == "__main__":
    typer.run(main)
