"""`tl-clt benchmark`: transcoders judged by circuits that are known, or by how much of an answer circuits keep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from tl_clt.cli.app import Backend, Device, LazyDecoder, ModelOfCLT, app, console, load_pair, plain_errors
from tl_clt.cli.interruption import interruption
from tl_clt.errors import ConfigError, DatasetError, TlCltError

QUICK: dict[str, Any] = {
    "judges": ["hops", "equal"],
    "sparsities": [3.0],
    "k": [4],
    "neurons_kept": [1.0, 0.1],
    "n_seeds": 3,
    "n_steps": 500,
    "n_pairs": 32,
    "n_graphs": 8,
}
"""What --quick stands for, where an option does not say otherwise."""

KNOWN, CURVES = "Known circuits", "Faithfulness curves of a CLT"
"""The two things that the command does, as its help has them."""


@app.command()
def benchmark(
    output: Annotated[Path, typer.Option(help="New folder for report.json, tables and figures.")],
    quick: Annotated[
        bool,
        typer.Option(
            help="Two circuits and one sparsity of each kind, trained shorter, where nothing else is said:"
            " under two minutes on one core. All of it takes about half an hour.",
            rich_help_panel=KNOWN,
        ),
    ] = False,
    judges: Annotated[
        Optional[list[str]],
        typer.Option(
            "--judge",
            help="Known circuit to judge by: hops, sum, equal, parity or automaton; or a trained organism: atlas or"
            " school, with about a minute for each transcoder. Repeatable. Default: the circuits.",
            rich_help_panel=KNOWN,
        ),
    ] = None,
    kinds: Annotated[
        Optional[list[str]],
        typer.Option(
            "--kind",
            help="What is judged: clt, plt, neurons (thresholded) or untrained (chance). Repeatable. Default: all.",
            rich_help_panel=KNOWN,
        ),
    ] = None,
    sparsities: Annotated[
        Optional[list[float]],
        typer.Option(
            "--sparsity",
            help="lambda of JumpReLU transcoders. Repeatable. Default: 0.3, 1, 3 and 10. None where only --k is given.",
            rich_help_panel=KNOWN,
        ),
    ] = None,
    k: Annotated[
        Optional[list[int]],
        typer.Option(
            help="Active features a layer of TopK transcoders. Repeatable. Default: 2, 4 and 8. None where only"
            " --sparsity is given.",
            rich_help_panel=KNOWN,
        ),
    ] = None,
    neurons_kept: Annotated[
        Optional[list[float]],
        typer.Option(
            help="Share of the neurons' activations that thresholds leave; 1 for no threshold. Repeatable."
            " Default: 1, 0.5 and 0.1. With --clt, the neurons are measured beside it where this is given.",
            rich_help_panel=KNOWN,
        ),
    ] = None,
    n_seeds: Annotated[
        Optional[int],
        typer.Option(help="Transcoders of each, for intervals. Default: 3.", rich_help_panel=KNOWN),
    ] = None,
    n_steps: Annotated[
        Optional[int], typer.Option(help="Steps of training. Default: 1500.", rich_help_panel=KNOWN)
    ] = None,
    n_pairs: Annotated[
        Optional[int],
        typer.Option(help="Pairs of prompts to swap each variable between. Default: 64.", rich_help_panel=KNOWN),
    ] = None,
    n_graphs: Annotated[
        Optional[int], typer.Option(help="Prompts of circuits to trace. Default: 16.", rich_help_panel=KNOWN)
    ] = None,
    clt: Annotated[
        Optional[list[str]],
        typer.Option(
            help="Judge this CLT instead, by how much of the model's answers circuits keep: bundled organism, CLT"
            " folder, name from `tl-clt list`, or hub repository. Repeatable, for several of one model.",
            rich_help_panel=CURVES,
        ),
    ] = None,
    model: ModelOfCLT = None,
    prompts: Annotated[
        Optional[Path],
        typer.Option(
            help="Prompts: a text file with one a line; or a .jsonl file of objects with prompt and, if wanted, target"
            " and counterfactual. Default, of bundled organisms: questions that they were not trained on.",
            rich_help_panel=CURVES,
        ),
    ] = None,
    n_prompts: Annotated[
        Optional[int], typer.Option(help="Measure on so many of them. Default: 20.", rich_help_panel=CURVES)
    ] = None,
    counterfactual: Annotated[
        bool,
        typer.Option(
            help="Ablate to what is there on counterfactual prompts, as MIB does. Default: to zero.",
            rich_help_panel=CURVES,
        ),
    ] = False,
    level: Annotated[
        Optional[str],
        typer.Option(
            help="What circuits have some of: nodes or edges of the graphs. Default: nodes.", rich_help_panel=CURVES
        ),
    ] = None,
    metric: Annotated[
        Optional[str],
        typer.Option(
            help="Of the answer: logit, difference (to the counterfactual's answer) or log_prob. Default: difference"
            " where ablated to counterfactuals, else logit.",
            rich_help_panel=CURVES,
        ),
    ] = None,
    errors: Annotated[
        Optional[str],
        typer.Option(
            help="What the CLT does not reconstruct: nodes (ranked as features are), kept (in every circuit) or"
            " removed (from every circuit). Default: nodes.",
            rich_help_panel=CURVES,
        ),
    ] = None,
    freeze: Annotated[
        Optional[str],
        typer.Option(
            help="Hold attention, all (and norms' scales), or none. Default: attention; of edges all, which they need.",
            rich_help_panel=CURVES,
        ),
    ] = None,
    max_feature_nodes: Annotated[
        Optional[int],
        typer.Option(help="Trace at most so many features of a prompt. Default: all.", rich_help_panel=CURVES),
    ] = None,
    seed: Annotated[int, typer.Option(help="The first seed of training, or that of the random order.")] = 0,
    backend: Backend = "hooked",
    device: Device = "cpu",
    lazy_decoder: LazyDecoder = False,
) -> None:
    """Judge transcoders by circuits that are known, or a CLT by how much of the answers its circuits keep.

    Without --clt, CLTs, PLTs and the neurons themselves are judged on models whose circuits are known by
    construction: which of their hops do features and graphs show? With --clt, the first nodes, or edges, of each
    prompt's graph are kept, all others are ablated in the model, and what is left of the answer is drawn against their
    share; the model's own neurons may stand beside it.

    Each transcoder's report is kept in OUTPUT.runs.jsonl until all are there: where the command ends before, the same
    command goes on from it.
    """
    with plain_errors():
        from tl_clt.files import require_new

        require_new(output)
        written = output / "report.json"
        interruption.kept = lambda: f"The report is in {output}." if written.exists() else "Nothing was written."
        how = {
            "judges": judges,
            "kinds": kinds,
            "sparsities": sparsities,
            "k": k,
            "n_seeds": n_seeds,
            "n_steps": n_steps,
            "n_pairs": n_pairs,
            "n_graphs": n_graphs,
        }
        measuring = {
            "level": level,
            "metric": metric,
            "errors": errors,
            "freeze": freeze,
            "max_feature_nodes": max_feature_nodes,
        }
        of_clts = {"model": model, "prompts": prompts, "n_prompts": n_prompts, "counterfactual": counterfactual or None}
        if clt:
            _refuse({**how, "quick": quick or None}, "is of known circuits. Leave it out, or leave out --clt.")
            with console.status("Loading the model and the CLT"):
                hooked, transcoders = _load(model, clt, backend, device, lazy_decoder)
            asked = _prompts(prompts, hooked, 20 if n_prompts is None else n_prompts, counterfactual)
            neurons = _neurons(hooked, neurons_kept or [], asked)
            _judge_clts(hooked, {**transcoders, **neurons}, asked, {**_given(measuring), "seed": seed}, output)
        else:
            loading = {
                "backend": None if backend == "hooked" else backend,
                "device": None if device == "cpu" else device,
                "lazy_decoder": lazy_decoder or None,
            }
            _refuse({**of_clts, **measuring, **loading}, "is of faithfulness curves. Leave it out, or give --clt.")
            how["neurons_kept"] = neurons_kept
            _refuse_unused(kinds, how)
            _judge_known({**(QUICK if quick else {}), **_given(how), **_left_out(sparsities, k), "seed": seed}, output)
        console.print(f"The report and its figures are in {output}.", markup=False, soft_wrap=True)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """Options that were given."""
    return {name: value for name, value in options.items() if value not in (None, [])}


def _left_out(sparsities: Optional[list[float]], k: Optional[list[int]]) -> dict[str, Any]:
    """Where sparsities of one kind of transcoder alone are given, the other kind."""
    if bool(sparsities) == bool(k):
        return {}
    return {"k": ()} if sparsities else {"sparsities": ()}


def _refuse(options: dict[str, Any], why: str) -> None:
    """Raise where an option was given that the other thing to do has."""
    for name in _given(options):
        raise ConfigError(f"{OPTION_OF.get(name, '--' + name.replace('_', '-'))} {why}")


OF_KINDS = {
    "sparsities": ("clt", "plt"),
    "k": ("clt", "plt"),
    "n_steps": ("clt", "plt"),
    "neurons_kept": ("neurons",),
}
"""Options that only some kinds have."""


def _refuse_unused(kinds: Optional[Sequence[str]], options: dict[str, Any]) -> None:
    """Raise where an option was given that none of the kinds has."""
    for name, having in OF_KINDS.items():
        if kinds and not set(kinds) & set(having):
            _refuse({name: options[name]}, f"is of --kind {' and '.join(having)}. Leave it out, or judge one of these.")


OPTION_OF = {"judges": "--judge", "kinds": "--kind", "sparsities": "--sparsity"}
"""Options that are not named as the argument is."""


def _judge_known(options: dict[str, Any], output: Path) -> None:
    import torch

    from tl_clt.benchmark import run_benchmark
    from tl_clt.viewer.tables import benchmark_table

    # Handing parts of so small models to a second thread costs more than it saves.
    torch.set_num_threads(1)
    record = output.absolute().with_name(output.absolute().name + ".runs.jsonl")

    def kept() -> str:
        if (output / "report.json").exists():
            return f"The report is in {output}."
        if not record.exists():
            return "Nothing was written."
        return f"What is judged already is in {record}, and the same command does not do it again."

    interruption.kept = kept
    try:
        report = run_benchmark(**options, record=record)
        report.save(output)
    except TlCltError:
        if record.exists():
            console.print(kept(), markup=False, soft_wrap=True)
        raise
    record.unlink(missing_ok=True)
    console.print(benchmark_table(report))


def _load(
    model: Optional[str], clts: Sequence[str], backend: str, device: str, lazy_decoder: bool
) -> tuple[Any, dict[str, Any]]:
    """The model, and CLTs of it by name."""
    from tl_clt.evaluation.tradeoff import short_names
    from tl_clt.transcoder import CrossLayerTranscoder

    hooked, first = load_pair(model, clts[0], backend, device, lazy_decoder)
    others = [CrossLayerTranscoder.from_pretrained(name, device=device, lazy_decoder=lazy_decoder) for name in clts[1:]]
    return hooked, dict(zip(short_names(clts), [first, *others], strict=True))


def _neurons(model: Any, shares: Sequence[float], prompts: list[dict[str, str]]) -> dict[str, Any]:
    """The model's neurons by name, with thresholds that leave these shares of their activations on the prompts."""
    from tl_clt.evaluation import find_neurons

    texts = [prompt["prompt"] for prompt in prompts]
    named = {"neurons" if share == 1 else f"neurons, {share:g} kept": share for share in shares}
    return {name: find_neurons(model, texts, share) for name, share in named.items()}


def _judge_clts(
    model: Any, clts: dict[str, Any], prompts: list[dict[str, str]], options: dict[str, Any], output: Path
) -> None:
    from tl_clt.evaluation import measure_curves
    from tl_clt.viewer.tables import curves_table

    def all_of(name: str) -> Optional[list[str]]:
        return [prompt[name] for prompt in prompts] if name in prompts[0] else None

    report = measure_curves(
        model, clts, [p["prompt"] for p in prompts], all_of("target"), all_of("counterfactual"), **options
    )
    report.save(output)
    console.print(curves_table(report))


PARTS = ("prompt", "target", "counterfactual")
TABLES = (".json", ".csv", ".tsv")
"""Endings of files whose lines are no prompts."""


def _prompts(file: Optional[Path], model: Any, n_prompts: int, counterfactual: bool) -> list[dict[str, str]]:
    """Prompts with what is known of them, by name: those of a file, or those of a bundled organism."""
    from tl_clt.arguments import as_whole
    from tl_clt.lens import bundled_organisms, model_name
    from tl_clt.organisms import benchmark_prompts

    n_prompts = as_whole("--n-prompts", n_prompts, 1)
    name = model_name(model)
    if file is not None:
        found = _read(file)
    elif name in bundled_organisms():
        found = [prompt._asdict() for prompt in benchmark_prompts(name)]
    else:
        raise ConfigError(f"There are no prompts for {name} in this package: give --prompts, a file with one a line.")
    chosen = found[:n_prompts]
    if not counterfactual:
        return [{part: text for part, text in prompt.items() if part != "counterfactual"} for prompt in chosen]
    if "counterfactual" not in chosen[0]:
        raise ConfigError(
            f"'{file}' has no counterfactual prompts: give a .jsonl file whose objects have them, or leave out"
            " --counterfactual."
        )
    return chosen


def _read(file: Path) -> list[dict[str, str]]:
    """The prompts of a file, all with the same parts.

    Raises:
        DatasetError: it cannot be read, is empty, or a line is none.
    """
    if not file.is_file():
        raise DatasetError(f"'{file}' is no file. Give a text file with a prompt on each line, or a .jsonl file.")
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"'{file}' cannot be read ({error}). Give a text file in UTF-8.") from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise DatasetError(f"'{file}' has no prompts: write one on each line.")
    if file.suffix.lower() in TABLES:
        raise DatasetError(
            f"'{file}' would be read as plain text, a prompt on each line: give a .jsonl file, with an object on each"
            " line, or a .txt file."
        )
    if file.suffix.lower() != ".jsonl":
        return [{"prompt": line} for _, line in numbered]
    return [_object(file, number, line, numbered[0][1]) for number, line in numbered]


def _object(file: Path, number: int, line: str, first: str) -> dict[str, str]:
    """What a line of a .jsonl file says."""
    from tl_clt.files import read_json

    try:
        values, parts = read_json(line), read_json(first)
        known = isinstance(values, dict) and "prompt" in values and set(values) <= set(PARTS)
        if not known or not all(isinstance(text, str) for text in values.values()):
            raise ValueError("not an object with texts named prompt, and perhaps target and counterfactual")
        if set(values) != set(parts):
            raise ValueError(f"it has {', '.join(values)}, and the first line {', '.join(parts)}")
    except (ValueError, TypeError, RecursionError) as error:
        raise DatasetError(
            f"Line {number} of '{file}' is no prompt ({error}). Write an object on each line, all with the same names:"
            ' {"prompt": "...", "target": "...", "counterfactual": "..."}.'
        ) from error
    return values
