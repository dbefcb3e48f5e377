"""What training recipes reach: `python -m tests.benchmarks.recipes --model M --rows F` prints a table.

Each recipe is trained by `CLTTrainingRunner` with what it chooses by itself, but for the budget, the features and the
activation, and measured by `evaluate` on other text. Rows are added to `--rows`, a file of JSON lines, as they are
done, so that a run that is cut off keeps them; the table is of all its rows. With `--cache` the model runs over the
text once.
"""

from __future__ import annotations

import itertools
import json
import platform
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from rich.console import Console
from rich.table import Table

from tl_clt import CLTTrainingRunner, CLTTrainingRunnerConfig, evaluate, load_model
from tl_clt.organisms.atlas.train_clt import text_of_run
from tl_clt.training.clt import init_decoder_biases, init_encoder_biases
from tl_clt.training.run import runner as runner_module

COLUMNS = {
    "explained_variance": "EV",
    "nmse": "NMSE",
    "l0": "L0",
    "l0_least": "least",
    "l0_most": "most",
    "dead_share": "dead",
    "top1_agreement_uncertain": "top-1, p < .8",
    "kl_divergence": "KL",
    "recovered": "recovered",
    "replacement": "replacement",
    "completeness": "completeness",
    "path_length": "path",
    "seconds": "s",
    "tokens_per_second": "tokens/s",
}


def start_at_random(clt: Any, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
    """What `init_from_tokens` stands in place of: random encoders and decoders, biases as it sets them."""
    init_encoder_biases(clt, inputs)
    init_decoder_biases(clt, outputs)


def measure(
    model: Any, settings: dict[str, Any], start: str, text: Any, held_out: Any, n_tokens: int, n_graphs: int
) -> Any:
    """Train one recipe and measure it; a row of the table."""
    run = CLTTrainingRunner(CLTTrainingRunnerConfig(**settings), model=model, dataset=text)
    with ExitStack() as patched:
        if start == "random":
            patched.enter_context(mock.patch.object(runner_module, "init_from_tokens", start_at_random))
        clt = run.run()
    record = run.record
    assert record is not None
    report = evaluate(model, clt, held_out, max_tokens=n_tokens, n_graphs=n_graphs, max_unexplored=0.1, progress=False)
    l0 = report.l0_per_layer
    silenced = (report.cross_entropy_ablated or 0.0) - (report.cross_entropy or 0.0)
    lost = (report.cross_entropy_replaced or 0.0) - (report.cross_entropy or 0.0)
    row = {
        name: getattr(report, name)
        for name in ("explained_variance", "nmse", "dead_share", "top1_agreement_uncertain", "kl_divergence")
    }
    row |= {"l0": sum(l0) / len(l0), "l0_least": min(l0), "l0_most": max(l0)}
    row |= {"recovered": 1 - lost / silenced if silenced else None, "seconds": record.seconds}
    row |= {"tokens_per_second": record.tokens_seen / record.times.seconds}
    if n_graphs > 0 and report.graphs:
        means = report.graph_means
        row |= {name: getattr(means, name) for name in ("replacement", "completeness", "path_length")}
    return row


def main(
    model: Annotated[str, typer.Option(help="What `load_model` takes.")],
    rows: Annotated[Path, typer.Option(help="JSON lines that rows are added to.")],
    text: Annotated[Path | None, typer.Option(help="Text to train on; atlas has its own.")] = None,
    held_out: Annotated[Path | None, typer.Option(help="Text to measure on; atlas has its own.")] = None,
    budget: Annotated[list[int], typer.Option(help="Tokens to train on.")] = [50_000, 200_000],  # noqa: B006
    activation: Annotated[list[str], typer.Option(help="Of the features.")] = ["topk"],  # noqa: B006
    kind: Annotated[list[str], typer.Option(help="clt or plt.")] = ["clt", "plt"],  # noqa: B006
    start: Annotated[list[str], typer.Option(help="tokens, or random: see `start_at_random`.")] = ["tokens"],  # noqa: B006
    straight_through: Annotated[str, typer.Option(help="Of jumprelu: all or threshold.")] = "all",
    d_transcoder: Annotated[int, typer.Option(help="Features per layer.")] = 2048,
    l0: Annotated[float, typer.Option(help="Active features per layer and token to ask for.")] = 16.0,
    n_tokens: Annotated[int, typer.Option(help="Held-out tokens.")] = 8192,
    n_graphs: Annotated[int, typer.Option(help="Prompts to trace.")] = 0,
    cache: Annotated[Path | None, typer.Option(help="Folder for the model's activations.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    """Train recipes and measure them."""
    torch.set_num_threads(threads)
    loaded = load_model(model)
    sources: list[Any] = [text, held_out]
    if text is None or held_out is None:
        tokens_of_atlas = text_of_run(loaded, 0)
        sources = [tokens_of_atlas[:-400], tokens_of_atlas[-400:]]
    for tokens, phi, span, begin in itertools.product(budget, activation, kind, start):
        label = phi if phi != "jumprelu" or straight_through == "all" else f"{phi}, {straight_through}"
        name = {"kind": span, "activation": label, "start": begin, "tokens": tokens, "d_transcoder": d_transcoder}
        settings = {
            "model_name": model,
            "cache_path": None if cache is None else str(cache),
            "d_transcoder": d_transcoder,
            "activation": phi,
            **({"straight_through": straight_through} if phi == "jumprelu" else {}),
            "target_l0": l0,
            "training_tokens": tokens,
            "span": 1 if span == "plt" else None,
            "context_size": min(128, loaded.cfg.n_ctx),
        }
        row = measure(loaded, settings, begin, *sources, n_tokens, n_graphs)
        with rows.open("a") as file:
            file.write(json.dumps(name | row) + "\n")
    table = Table(
        title=f"{model}, {platform.machine()}, {threads} threads, torch {torch.__version__},"
        f" sae-lens {version('sae-lens')}, float32; L0 asked for: {l0:g}"
    )
    done = [json.loads(line) for line in rows.read_text().splitlines()]
    for heading in ("kind", "activation", "start", "tokens", "features", *COLUMNS.values()):
        table.add_column(heading)
    for row in done:
        names = [str(row[key]) for key in ("kind", "activation", "start", "tokens", "d_transcoder")]
        table.add_row(*names, *("" if row.get(key) is None else f"{row[key]:.3g}" for key in COLUMNS))
    Console(width=200).print(table)


if __name__ == "__main__":
    typer.run(main)
