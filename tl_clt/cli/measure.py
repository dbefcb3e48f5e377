"""`tl-clt evaluate` and `tl-clt tradeoff`: how good CLTs are on held-out text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from tl_clt.cli.app import (
    Backend,
    CLTName,
    Device,
    LazyDecoder,
    ModelName,
    ModelOfCLT,
    app,
    console,
    load_pair,
    plain_errors,
)
from tl_clt.cli.interruption import interruption

HeldOutText = Annotated[str, typer.Option(help="Held-out text: a text file, dataset folder, or hub dataset.")]
MaxTokens = Annotated[int, typer.Option(help="Measure on whole prompts of it, until they have so many tokens.")]
ContextSize = Annotated[
    Optional[int], typer.Option(help="Tokens of a prompt at most. Default: 128, or the model's own if less.")
]
NGraphs = Annotated[int, typer.Option(help="Prompts to trace for graph scores; 0 for none.")]
GraphTokens = Annotated[int, typer.Option(help="Tokens of each at most.")]
MaxUnexplored = Annotated[
    Optional[float], typer.Option(help="Share of influence that tracing may leave. Default: trace all.")
]


@app.command()
def evaluate(
    clt: CLTName,
    dataset: HeldOutText,
    output: Annotated[Path, typer.Option(help="New folder for report.json and figures.")],
    model: ModelOfCLT = None,
    max_tokens: MaxTokens = 65_536,
    context_size: ContextSize = None,
    n_graphs: NGraphs = 8,
    graph_tokens: GraphTokens = 32,
    max_unexplored: MaxUnexplored = None,
    backend: Backend = "hooked",
    device: Device = "cpu",
    seed: Annotated[int, typer.Option(help="Of the draw of prompts to trace.")] = 0,
    lazy_decoder: LazyDecoder = False,
) -> None:
    """Measure how good a CLT is on text that it was not trained on."""
    with plain_errors():
        from tl_clt.files import require_new

        require_new(output)
        written = output / "report.json"
        interruption.kept = lambda: f"The report is in {output}." if written.exists() else "Nothing was written."
        with console.status("Loading the model and the CLT"):
            from tl_clt.evaluation import evaluate as measure
            from tl_clt.viewer.tables import evaluation_table, layer_table

            hooked, transcoder = load_pair(model, clt, backend, device, lazy_decoder)
        report = measure(
            hooked,
            transcoder,
            dataset,
            max_tokens=max_tokens,
            context_size=context_size,
            n_graphs=n_graphs,
            graph_tokens=graph_tokens,
            max_unexplored=max_unexplored,
            seed=seed,
        )
        report.save(output)
        console.print(layer_table(report))
        console.print(evaluation_table(report))
        console.print(f"The report and its figures are in {output}.")


@app.command()
def tradeoff(
    model: ModelName,
    dataset: HeldOutText,
    output: Annotated[Path, typer.Option(help="New folder for tradeoff.csv, tradeoff.png and what is trained.")],
    clt: Annotated[Optional[list[str]], typer.Option(help="CLT or PLT folder to compare. Repeatable.")] = None,
    neurons: Annotated[
        Optional[list[float]], typer.Option(help="Compare thresholded neurons of this L0 a layer. Repeatable.")
    ] = None,
    train_on: Annotated[
        Optional[str], typer.Option(help="Text to train a PLT and a CLT on for each size and L0 (TopK).")
    ] = None,
    d_transcoder: Annotated[Optional[list[int]], typer.Option(help="Size to train. Repeatable.")] = None,
    l0: Annotated[Optional[list[int]], typer.Option(help="L0 a layer to train. Repeatable.")] = None,
    training_tokens: Annotated[int, typer.Option(help="Tokens to train each on.")] = 1_000_000,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = 4e-4,
    max_tokens: MaxTokens = 65_536,
    context_size: ContextSize = None,
    n_graphs: NGraphs = 8,
    graph_tokens: GraphTokens = 32,
    max_unexplored: MaxUnexplored = None,
    backend: Backend = "hooked",
    device: Device = "cpu",
    seed: Annotated[int, typer.Option(help="Of training, and of the draw of prompts to trace.")] = 0,
) -> None:
    """Sparsity against fidelity of neurons, PLTs and CLTs, on the same held-out text."""
    with plain_errors():
        from tl_clt.evaluation.tradeoff import check_training, compare, short_names, train_transcoders, training_config
        from tl_clt.files import files_into, require_new
        from tl_clt.texts import read_held_out

        require_new(output)
        interruption.kept = lambda: _kept(output)
        check_training(train_on, d_transcoder, l0)
        with console.status("Loading the model and transcoders"):
            from tl_clt.lens import load_model
            from tl_clt.transcoder import CrossLayerTranscoder
            from tl_clt.viewer.tables import tradeoff_table

            loaded = [CrossLayerTranscoder.from_pretrained(path, device=device) for path in clt or ()]
            given = dict(zip(short_names(clt or ()), loaded, strict=True))
            hooked: Any = load_model(model, backend=backend, device=device)  # type: ignore[arg-type]
        if train_on is not None:
            # Text that cannot be measured on is told before the training, not after it.
            read_held_out(hooked, dataset, max_tokens, context_size)
            base = training_config(hooked, training_tokens, lr, context_size, device, seed)
            given |= train_transcoders(hooked, train_on, base, d_transcoder or (), l0 or (), output)
        found = compare(
            hooked,
            dataset,
            given,
            neurons or (),
            max_tokens=max_tokens,
            context_size=context_size,
            n_graphs=n_graphs,
            graph_tokens=graph_tokens,
            max_unexplored=max_unexplored,
            seed=seed,
        )
        with files_into(output) as unfinished:  # what was trained is in it
            found.write_into(unfinished)
        console.print(tradeoff_table(found.table))
        console.print(f"The table and its figure are in {output}.")


def _kept(output: Path) -> str:
    """What of a comparison is there."""
    if (output / "tradeoff.csv").exists():
        return f"The table is in {output}."
    trained = sorted(str(path.parent) for path in output.glob("*/cfg.json"))
    if trained:
        return "These are trained, and can be compared with " + " ".join(f"--clt {folder}" for folder in trained) + "."
    return "Nothing was written."
