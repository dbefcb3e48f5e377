"""Which hops of known circuits CLTs and PLTs show: `python -m tests.benchmarks.hops --rows F` prints a table.

32 features a layer, JumpReLU with the tanh penalty, at several lambdas and seeds. Each step is `define_step`, the
package's definition of a training step, on all prompts at the position of the answer; lambda rises linearly over the
run, and Adam's rate falls to 0 over its last fifth. Beside them the model's own neurons (what there is to show) and
CLTs that were not trained (chance). Rows are added to `--rows`, a file of JSON lines, as they are done, and what is
there already is not done again.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from sae_lens.saes.sae import TrainStepInput

from tl_clt.benchmark import HopReport, activations, measure_hops, neurons_as_transcoder
from tl_clt.organisms import KnownCircuit, known_circuits, load_circuit
from tl_clt.training.clt import (
    TrainingCLT,
    TrainingCLTConfig,
    define_step,
    init_decoder_biases,
    init_encoder_biases,
    init_from_tokens,
)
from tl_clt.training.data.batches import apply_scale, estimate_scale
from tl_clt.training.export import export
from tl_clt.transcoder import CrossLayerTranscoder

FEATURES, STEPS, LR, WARM_UP = 32, 1500, 4e-3, 50


def train(
    circuit: KnownCircuit, span: int, sparsity: float, seed: int, start: str, n_steps: int = STEPS, **settings: Any
) -> CrossLayerTranscoder:
    """A CLT of a known circuit, trained on all its prompts at once."""
    cfg = circuit.model.cfg
    batch = torch.stack(activations(circuit, neurons_as_transcoder(circuit)), dim=1)
    scale = estimate_scale([batch])
    batch = apply_scale(batch, scale)
    torch.manual_seed(seed)
    clt = TrainingCLT(
        TrainingCLTConfig(
            d_in=cfg.d_model,
            d_sae=cfg.n_layers * FEATURES,
            n_layers=cfg.n_layers,
            d_transcoder=FEATURES,
            span=span,
            activation="jumprelu",
            dtype="float32",
            input_scale=scale.inputs,
            output_scale=scale.outputs,
            **settings,
        )
    )
    if start == "tokens":
        init_from_tokens(clt, batch[:, 0], batch[:, 1])
    else:
        init_encoder_biases(clt, batch[:, 0])
        init_decoder_biases(clt, batch[:, 1])
    adam = torch.optim.Adam(clt.parameters(), lr=LR)
    constant = {"dead_feature": clt.cfg.dead_feature_coefficient}
    constant["far_write"] = settings.get("far_write_coefficient", 0.0)
    for step in range(n_steps):
        for group in adam.param_groups:
            group["lr"] = LR * min(1.0, (step + 1) / WARM_UP, 5 * (n_steps - step) / n_steps)
        coefficients = constant | {"sparsity": sparsity * (step + 1) / n_steps}
        adam.zero_grad(set_to_none=True)
        define_step(clt, TrainStepInput(batch, coefficients, None, step, False)).loss.backward()
        adam.step()
    return export(clt)


def row_of(report: HopReport) -> dict[str, Any]:
    """The figures of one CLT, means over variables and each variable's own; "through_answer" is the last one's."""
    table = report.variables
    by_variable = {
        name: table[name].tolist()
        for name in ("shown", "accuracy", "accuracy_shuffled", "swap", "swap_other", "swap_replaced", "through")
    }
    return {
        "hop_recall": report.hop_recall,
        "hops_shown": report.hops_shown,
        "precision": report.precision,
        "l0": sum(report.l0),
        "l0_per_layer": report.l0,
        "explained_variance": min(report.explained_variance),
        "answers_kept": report.answers_kept,
        "answers_kept_without_far": report.answers_kept_without_far,
        "far": 1 - report.writes_by_distance[0],
        "writes_by_distance": report.writes_by_distance,
        "through_answer": by_variable["through"][-1],
        "accuracy": table["accuracy"].mean(),
        "accuracy_shuffled": table["accuracy_shuffled"].mean(),
        "swap": table["swap"].mean(),
        "swap_other": table["swap_other"].mean(),
        "swap_replaced": table["swap_replaced"].mean(),
        "by_variable": by_variable,
    }


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
        row = dict(zip(keys, values, strict=True)) | row_of(measure_hops(loaded, clt, seed=values[-1]))
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
                add(key, train(loaded, n_layers, 0.0, seed, "random", n_steps=0))
        for seed, span, strength, begin, far in itertools.product(range(seeds), kind, sparsity, start, far_write):
            key = (name, span, strength, begin, far, seed)
            # One layer's CLT is a PLT, and a PLT has no far writes.
            if key not in known and not (span == "clt" and n_layers == 1) and not (span == "plt" and far > 0):
                settings = {"far_write_coefficient": far} if far > 0 else {}
                add(key, train(loaded, n_layers if span == "clt" else 1, strength, seed, begin, **settings))
    frame = pd.DataFrame(done)
    means = frame.groupby(by.split(","), sort=False, dropna=False)[list(COLUMNS)].mean().rename(columns=COLUMNS)
    counts = frame.groupby(by.split(","), sort=False, dropna=False).size().rename("runs")
    print(pd.concat([counts, means.round(2)], axis=1).reset_index().to_string(index=False))


if __name__ == "__main__":
    typer.run(main)
