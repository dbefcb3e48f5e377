"""How far graphs can be believed: `python -m tests.benchmarks.interventions swaps` and `... validate` print tables.

Not collected by pytest. `swaps` finds the features that carry the state on atlas's two-hop prompts, swaps and
suppresses them; `validate` holds graphs of atlas, and of Gemma 3 270M where it is given, against interventions on
their features.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Annotated, Optional

import torch
import typer
from pandas import DataFrame
from rich.console import Console
from rich.table import Table

from tests.interventions.two_hop import CITY, LAST, Outcome, Place, TwoHop
from tl_clt import CrossLayerTranscoder, attribute, load_model, load_organism, validate
from tl_clt.interventions import Freeze, ValidationReport
from tl_clt.interventions.validation_report import brief, select
from tl_clt.lens import HookedModel

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(width=200)

CIRCUITS: dict[str, tuple[Callable[[Place], bool], bool]] = {
    "all of them, iterative": (lambda p: True, False),
    "all of them, constrained": (lambda p: True, True),
    "layer 0, iterative": (lambda p: p.layer == 0, False),
    "layer 0, constrained": (lambda p: p.layer == 0, True),
    "layers 1 to 3, iterative": (lambda p: p.layer > 0, False),
    "at the city alone, iterative": (lambda p: p.pos == CITY, False),
    "at 'is' alone, iterative": (lambda p: p.pos == LAST, False),
}
"""Which of the features that carry the state, and whether all MLP outputs are held but for what these write."""

GEMMA_PROMPTS = (
    "Fact: Michael Jordan plays the sport of",
    "Fact: the capital of the state containing Dallas is",
    "The opposite of small is",
    "The Eiffel Tower is in the city of",
    "One, two, three, four,",
    "The chemical symbol for gold is",
    "Monday, Tuesday, Wednesday,",
    "The first president of the United States was George",
    "Water freezes at zero degrees",
    "She opened the door and saw a",
)


@app.command()
def swaps(
    n_each: Annotated[int, typer.Option(help="Trained prompts, and as many held-out ones (72 there are).")] = 72,
    threads: int = 2,
) -> None:
    """Texas features for California's, on atlas's two-hop prompts: counts of what the answer becomes."""
    about(threads)
    two_hop = TwoHop(*load_organism("atlas"))
    sample = two_hop.sample(n_each)
    right = [two_hop.clean[i] == two_hop.answers[i] for i, *_ in sample]
    console.print(f"{n_each} trained prompts, {n_each} held out; right without intervention: {sum(right)}")
    carriers = {i: two_hop.carriers(i) for i in {i for one in sample for i in one[:2]}}
    places = [place for i, *_ in sample for place in carriers[i]]
    spread = Table("features of a pruned graph that carry the state, mean", *(f"layer {t}" for t in two_hop.clt.layers))
    for pos, where in ((CITY, "at the city"), (LAST, "at 'is'")):
        counts = [sum(p.layer == t and p.pos == pos for p in places) for t in two_hop.clt.layers]
        spread.add_row(where, *(f"{n / len(sample):.1f}" for n in counts))
    console.print(spread)
    table = Table("which", "features", *(name.replace("_", " ") for name in Outcome._fields[1:]))
    for which, (chosen, constrained) in CIRCUITS.items():
        through = two_hop.clt.cfg.n_layers - 1 if constrained else None
        kept = {i: set(filter(chosen, places)) for i, places in carriers.items()}
        found = [two_hop.outcome(i, o, same, kept[i], kept[o], through, seed=i) for i, o, same in sample]
        columns = list(zip(*found, strict=True))
        counts = [f"{sum(column[:n_each])} + {sum(column[n_each:])}" for column in columns[1:]]
        table.add_row(which, f"{sum(columns[0]) / len(sample):.1f}", *counts)
    console.print(table)


@app.command("validate")
def validate_graphs(
    n_prompts: Annotated[int, typer.Option(help="Of atlas: half trained, half held out; 0 for none.")] = 20,
    n_features: Annotated[int, typer.Option(help="Features of each graph, controls not counted.")] = 64,
    gemma: Annotated[Optional[Path], typer.Option(help="Hugging Face folder or .gguf file of Gemma 3 270M.")] = None,
    gemma_clt: Annotated[Optional[Path], typer.Option(help="A CLT of it.")] = None,
    freeze: str = "attention",
    max_feature_nodes: Annotated[Optional[int], typer.Option(help="Of Gemma's graphs.")] = None,
    output: Annotated[Optional[Path], typer.Option(help="New folder for CSV, JSON and figures.")] = None,
    threads: int = 2,
) -> None:
    """Influence and edges against measured effects."""
    about(threads)
    if n_prompts:
        model, clt = load_organism("atlas")
        two_hop = TwoHop(model, clt)
        prompts = [two_hop.questions[i].prompt for i, *_ in two_hop.sample(n_prompts // 2)]
        report_on("atlas", model, clt, prompts, n_features, freeze, output)
    if gemma is not None and gemma_clt is not None:
        model, clt = load_model(gemma), CrossLayerTranscoder.from_pretrained(gemma_clt)
        report_on("gemma", model, clt, GEMMA_PROMPTS, n_features, freeze, output, max_feature_nodes)


def report_on(
    name: str,
    model: HookedModel,
    clt: CrossLayerTranscoder,
    prompts: tuple[str, ...] | list[str],
    n_features: int,
    freeze: Freeze | str,
    output: Path | None,
    max_feature_nodes: int | None = None,
) -> None:
    """Validate a graph of each prompt, and print the joined report."""
    graphs = [attribute(model, clt, p, max_feature_nodes=max_feature_nodes, progress=False) for p in prompts]
    reports = [validate(g, model, clt, n_features, freeze=freeze, progress=False) for g in graphs]  # type: ignore[arg-type]
    report = ValidationReport.concat(reports)
    n = report.info["n_features"], report.info["n_controls"]
    scores = [g.scores() for g in graphs]
    replacement, completeness = (fmean(score[k] for score in scores) for k in (0, 1))
    console.print(
        f"[bold]{name}[/bold], {len(prompts)} prompts, {n[0]} features and {n[1]} controls, freeze={freeze},"
        f" ablated; replacement {replacement:.2f}, completeness {completeness:.2f} (means)"
    )
    show(brief(report.chance), f"rank correlations beside CLTs of chance; intervals: {report.info['intervals']}")
    show(select(report.summary, errors="all").drop(columns="threshold"), f"threshold {report.threshold:g}")
    show(report.controls, "the most influential features beside others of like activation: relative effect on logits")
    show(report.switched_on, "features switched on by a change, which no graph has; mean")
    if output is not None:
        console.print(f"saved: {report.save(output / name)}")


def show(frame: DataFrame, title: str) -> None:
    table = Table(*(str(name).replace("_", " ") for name in frame.columns), title=title)
    for row in frame.itertuples(index=False):
        table.add_row(*("" if x != x else f"{x:.3f}" if isinstance(x, float) else str(x) for x in row))
    console.print(table)


def about(threads: int) -> None:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformer-lens"))
    console.print(f"float32, {threads} threads, {platform.machine()}, Python {platform.python_version()}, {packages}")
    torch.set_num_threads(threads)


if __name__ == "__main__":
    app()
