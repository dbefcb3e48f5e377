"""The benchmark: transcoders of several kinds, sparsities and seeds, judged by models whose mechanism is known.

A judge is a model with what makes transcoders of it and what measures their hops, by name in `JUDGES`: the circuits
known by construction, which give a `HopReport`, and the trained organisms, where hops are carried as interchange
interventions find them, which give an `OrganismReport`. A further model becomes a judge by an entry there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np
from pandas import DataFrame
from scipy.stats import t as students_t
from tqdm.auto import tqdm

from tl_clt.arguments import as_choices, as_number, as_path, as_seed, as_several, as_share, as_switch, as_whole
from tl_clt.benchmark.hops import HopReport, measure_hops, neurons_as_transcoder
from tl_clt.benchmark.tasks import OrganismReport, measure_organism
from tl_clt.bundled import bundled_organisms
from tl_clt.errors import FormatError
from tl_clt.evaluation import Neurons, find_neurons
from tl_clt.files import append_line, read_json, require_file
from tl_clt.lens import load_model
from tl_clt.organisms import (
    KnownCircuit,
    find_variables,
    known_circuits,
    load_circuit,
    organism_tasks,
    training_tokens,
)
from tl_clt.report import GREY, PALETTE, Report, finite, table_to_json
from tl_clt.transcoder import CrossLayerTranscoder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Kind = Literal["neurons", "untrained", "plt", "clt"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Activation = Literal["jumprelu", "topk"]
FigureName = Literal["hops"]
LEVEL = 0.95
"""Of intervals."""


class Candidate(NamedTuple):
    """A transcoder that is to be judged."""

    kind: Kind
    """"neurons" are the model's own, "untrained" is a CLT of chance, "plt" writes to its own layer alone."""

    activation: Activation
    sparsity: float
    """Of "jumprelu" lambda at the end of training, of "topk" k, of "neurons" the share of activations kept."""

    seed: int


class Judge(NamedTuple):
    """A model whose hops are known."""

    n_layers: int
    make: Callable[[Candidate, int], Any]
    """A candidate, trained for so many steps where it is trained: a transcoder, or an organism's `Neurons`."""

    measure: Callable[[Any, int, int, int], HopReport | OrganismReport]
    """What it shows: with n_pairs, n_graphs and a seed."""


def _circuit_judge(name: str) -> Judge:
    circuit = load_circuit(name)

    def measure(clt: CrossLayerTranscoder, n_pairs: int, n_graphs: int, seed: int) -> HopReport:
        return measure_hops(circuit, clt, n_pairs=n_pairs, n_graphs=n_graphs, seed=seed)

    return Judge(circuit.model.cfg.n_layers, lambda candidate, n_steps: _make(circuit, candidate, n_steps), measure)


def _make(circuit: KnownCircuit, candidate: Candidate, n_steps: int) -> CrossLayerTranscoder:
    kind, activation, sparsity, seed = candidate
    if kind == "neurons":
        return neurons_as_transcoder(circuit, sparsity)
    # Only here, since it loads sae_lens.
    from tl_clt.benchmark.train import train_on_circuit

    span = 1 if kind == "plt" else circuit.model.cfg.n_layers
    steps = 0 if kind == "untrained" else n_steps
    return train_on_circuit(circuit, span, sparsity, seed, activation=activation, n_steps=steps)


N_FOR_THRESHOLDS = 4096
"""Tokens of text that the thresholds of an organism's neurons are set by."""


def _organism_judge(name: str) -> Judge:
    model, tasks = load_model(name), organism_tasks(name)

    @cache
    def places(n_pairs: int) -> dict[str, DataFrame]:
        """Where hops are carried: the same for all candidates."""
        return {task.name: find_variables(model, task, n_pairs=n_pairs) for task in tasks.values() if task.hops[1:]}

    def make(candidate: Candidate, n_steps: int) -> CrossLayerTranscoder | Neurons:
        kind, activation, sparsity, seed = candidate
        if kind == "neurons":
            return find_neurons(model, training_tokens(name, model, N_FOR_THRESHOLDS, seed), sparsity)
        # Only here, since it loads sae_lens.
        from tl_clt.benchmark.train import train_on_organism

        span, steps = 1 if kind == "plt" else model.cfg.n_layers, 0 if kind == "untrained" else n_steps
        return train_on_organism(name, model, span, sparsity, seed, activation=activation, n_steps=steps)

    def measure(clt: CrossLayerTranscoder | Neurons, n_pairs: int, n_graphs: int, seed: int) -> OrganismReport:
        return measure_organism(name, model, clt, tasks, places=places(n_pairs), n_pairs=n_pairs, seed=seed)

    return Judge(model.cfg.n_layers, make, measure)


JUDGES: dict[str, Callable[[str], Judge]] = {
    **dict.fromkeys(known_circuits(), _circuit_judge),
    **dict.fromkeys(bundled_organisms(), _organism_judge),
}
"""What loads each judge, by name."""


def known_judges() -> list[str]:
    """Names of the judges that `load_judge` knows."""
    return list(JUDGES)


def load_judge(name: str) -> Judge:
    """A model whose hops are known, with what makes and measures transcoders of it.

    Raises:
        ConfigError: there is no judge of that name.
    """
    [known] = as_choices("judge", name, known_judges())
    return JUDGES[known](known)


def run_benchmark(
    judges: str | Sequence[str] | None = None,
    *,
    kinds: Kind | Sequence[Kind] = KINDS,
    sparsities: Sequence[float] = (0.3, 1.0, 3.0, 10.0),
    k: Sequence[int] = (2, 4, 8),
    neurons_kept: Sequence[float] = (1.0, 0.5, 0.1),
    n_seeds: int = 3,
    n_steps: int = 1500,
    n_pairs: int = 64,
    n_graphs: int = 16,
    seed: int = 0,
    progress: bool = True,
    record: str | Path | None = None,
) -> BenchmarkReport:
    """Train transcoders of several kinds, sparsities and seeds on each judge, and measure which of its hops they show.

    A CLT of a model of one layer is a PLT, and is left out.

    Args:
        judges: names of `known_judges`; None for the circuits known by construction. A transcoder of a trained organism
            takes about a minute, one of a circuit some seconds.
        kinds: "clt" and "plt" are trained; "neurons" are the model's own, which on a circuit show every hop there is,
            with thresholds that leave fewer; "untrained" is a CLT of chance.
        sparsities: lambdas of JumpReLU transcoders; () for none.
        k: of TopK transcoders; () for none.
        neurons_kept: shares of the neurons' activations that thresholds leave, ties with the last included; 1 for none.
        n_seeds: transcoders of each; intervals are over these.
        n_steps: of training.
        n_pairs: pairs of prompts for the swaps of each variable.
        n_graphs: prompts of circuits to trace, at random.
        seed: the first seed.
        progress: show a progress bar.
        record: a file that each transcoder's report is added to as soon as it is there, one line of JSON each. What is
            in it already, judged with the same n_steps, n_pairs and n_graphs, is not done again: a run that was
            interrupted goes on. None for no file.

    Raises:
        ConfigError: an argument out of range, or nothing to judge.
        FormatError: `record` is a file of another kind.
        NotWritten: `record` cannot be written.
    """
    names = known_circuits() if judges is None else as_choices("judges", judges, known_judges())
    chosen = as_choices("kinds", kinds, KINDS)
    lambdas = [as_number(f"sparsities[{i}]", x, above=0) for i, x in enumerate(sparsities)]
    ks = [as_whole(f"k[{i}]", x, 1) for i, x in enumerate(k)]
    kept = [as_share(f"neurons_kept[{i}]", x) for i, x in enumerate(neurons_kept)]
    n_seeds, n_steps = as_whole("n_seeds", n_seeds, 1), as_whole("n_steps", n_steps, 1)
    n_pairs, n_graphs = as_whole("n_pairs", n_pairs, 1), as_whole("n_graphs", n_graphs, 1)
    seed, progress = as_seed("seed", seed), as_switch("progress", progress)
    trained: list[tuple[Activation, float]] = [
        *(("jumprelu", float(x)) for x in lambdas),
        *(("topk", float(x)) for x in ks),
    ]
    if ks and {"plt", "clt"} & set(chosen):
        _check_k(ks, names)
    seeds = range(seed, seed + n_seeds)
    loaded = {name: load_judge(name) for name in names}
    jobs = [
        (name, candidate)
        for name, judge in loaded.items()
        for candidate in _candidates(judge, chosen, trained, kept, seeds)
    ]
    as_several("What is to be judged", jobs, "kinds with a lambda, a k or a share to judge them at")
    how = {"n_steps": n_steps, "n_pairs": n_pairs, "n_graphs": n_graphs}
    file = None if record is None else as_path("record", record)
    done = {} if file is None else _recorded(file, how)
    for name, candidate in tqdm(jobs, desc="Judging", unit=" transcoders", delay=2.0, disable=not progress):
        if (name, candidate) in done:
            continue
        clt = loaded[name].make(candidate, n_steps)
        run = Run(name, candidate, loaded[name].measure(clt, n_pairs, n_graphs, candidate.seed))
        done[name, candidate] = run
        if file is not None:
            append_line(file, json.dumps(how | run.to_dict(), allow_nan=False))
    return BenchmarkReport(runs=[done[job] for job in jobs], info={"n_seeds": n_seeds, **how, "seed": seed})


def _check_k(ks: Sequence[int], judges: Sequence[str]) -> None:
    """Raise where a k is more than the features of a layer: the turn of that transcoder may come hours later."""
    # Only here, since it loads sae_lens.
    from tl_clt.benchmark.train import features_of

    for judge, (i, k) in product(judges, enumerate(ks)):
        as_whole(f"k[{i}]", k, 1, features_of(judge), why=f"the features of a layer of {judge}'s transcoders")


def _recorded(file: Path, how: dict[str, int]) -> dict[tuple[str, Candidate], Run]:
    """The runs of a file of `run_benchmark` that were made and measured in this way."""
    require_file(file)
    done: dict[tuple[str, Candidate], Run] = {}
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            values = read_json(line)
            run, same = Run.from_dict(values), {name: values[name] for name in how} == how
        except UNREADABLE as error:
            raise FormatError(
                f"Line {number} of '{file}' is no run of the benchmark ({error}). Remove it, or give another file."
            ) from error
        if same:
            done[run.judge, run.candidate] = run
    return done


def _candidates(
    judge: Judge,
    kinds: Sequence[Kind],
    trained: Sequence[tuple[Activation, float]],
    neurons_kept: Sequence[float],
    seeds: Sequence[int],
) -> Iterator[Candidate]:
    for kind in kinds:
        if kind == "neurons":
            yield from (Candidate(kind, "jumprelu", share, seeds[0]) for share in neurons_kept)
        elif kind == "untrained":
            yield from (Candidate(kind, "jumprelu", 0.0, seed) for seed in seeds)
        elif kind == "plt" or judge.n_layers > 1:
            yield from (Candidate(kind, *how, seed) for how, seed in product(trained, seeds))


class Run(NamedTuple):
    """One transcoder, judged."""

    judge: str
    candidate: Candidate
    report: HopReport | OrganismReport

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return finite({"judge": self.judge, **self.candidate._asdict(), "report": self.report.to_dict()})

    @classmethod
    def from_dict(cls, values: Any) -> Run:
        """The run that `to_dict` wrote; one of `UNREADABLE` where it is none."""
        if values["kind"] not in KINDS:
            raise ValueError(f"it is of an unknown kind, {values['kind']!r:.60}")
        of = OrganismReport if "organism" in values["report"] else HopReport
        candidate = Candidate(values["kind"], values["activation"], float(values["sparsity"]), int(values["seed"]))
        return cls(str(values["judge"]), candidate, of.from_dict(values["report"]))


UNREADABLE = (FormatError, ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError)
"""What reading a run of an unknown form may raise."""
OF_A_KIND = ["judge", "kind", "activation", "sparsity"]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class BenchmarkReport(Report[FigureName]):
    """What transcoders of several kinds, sparsities and seeds show of known hops.

    Figure: "hops" (hop recall and hops shown, of organisms swaps followed, against L0, a column for each judge, means
    over seeds with the least and the most). `save` writes it, report.json (which `from_json` reads), runs.csv (`table`)
    and summary.csv.
    """

    FIGURES: ClassVar[tuple[FigureName, ...]] = get_args(FigureName)

    runs: list[Run]
    info: dict[str, Any]
    """n_seeds, n_steps, n_pairs, n_graphs and seed."""

    @cached_property
    def table(self) -> DataFrame:
        """One row a run: judge, kind, activation, sparsity, seed, and the numbers of its `HopReport`."""
        return DataFrame([{"judge": r.judge, **r.candidate._asdict(), **r.report.numbers} for r in self.runs])

    @cached_property
    def summary(self) -> DataFrame:
        """For each judge, kind, activation and sparsity: runs (seeds), and of each number the mean over them, the least
        and the most (_least, _most), and Student's 95% interval of the mean (_low, _high; wide where seeds are few, nan
        for one)."""
        rows = []
        for name, of in self.table.groupby(OF_A_KIND, sort=False):
            row: dict[str, Any] = dict(zip(OF_A_KIND, name, strict=True)) | {"runs": len(of)}  # type: ignore[arg-type]
            for column in of.columns.drop([*OF_A_KIND, "seed"]):
                row |= _over_seeds(column, of[column].dropna().to_numpy(dtype=float))
            rows.append(row)
        return DataFrame(rows)

    def to_dict(self) -> dict[str, Any]:
        """`info`, the summary and the runs with their reports, for JSON."""
        runs = [run.to_dict() for run in self.runs]
        return finite({**self.info, "summary": table_to_json(self.summary), "runs": runs})

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> BenchmarkReport:
        """The report that `to_json` wrote.

        Raises:
            FormatError: it is no such text.
        """
        try:
            values = read_json(text)
            runs = [Run.from_dict(run) for run in values["runs"]]
            if not runs:
                raise ValueError("it has no runs")
            return cls(runs=runs, info={name: x for name, x in values.items() if name not in ("summary", "runs")})
        except UNREADABLE as error:
            raise FormatError(f"This is no benchmark report ({error}). Give what `tl-clt benchmark` wrote.") from error

    def _draw(self, name: str) -> Figure:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullLocator

        summary = self.summary
        judges = list(summary.groupby("judge", sort=False))
        figure = Figure(figsize=(3.4 * len(judges) + 1.5, 6.8), layout="constrained")
        rows = figure.subplots(2, len(judges), squeeze=False, sharex="col", sharey="row")
        said = ""
        for (judge, of), (above, below) in zip(judges, rows.T, strict=True):
            _draw_measure(above, of, "hop_recall")
            lower = "hops_shown" if "hops_shown" in of and of["hops_shown"].notna().any() else "swap"
            _draw_measure(below, of, lower)
            above.set_title(str(judge))
            # Of organisms, neurons have fifty times the active features that transcoders have.
            below.set_xscale("log")
            below.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            below.xaxis.set_major_formatter("{x:g}")
            below.xaxis.set_minor_locator(NullLocator())
            below.set_xlabel("L0, sum over layers")
            if lower != said:
                below.set_ylabel({"hops_shown": "hops shown", "swap": "swaps followed"}[lower])
            said = lower
        rows[0][0].set_ylabel("hop recall")
        labelled = (zip(*reversed(axes.get_legend_handles_labels()), strict=True) for axes in rows.flat)
        handles = {label: handle for pairs in labelled for label, handle in pairs}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
        return figure

    def _write_numbers(self, folder: Path) -> None:
        (folder / "report.json").write_text(self.to_json())
        self.table.to_csv(folder / "runs.csv", index=False)
        self.summary.to_csv(folder / "summary.csv", index=False)

    def _in_short(self) -> str:
        judges = self.table["judge"].unique().tolist()
        return f"{len(self.runs)} transcoders judged by {', '.join(judges)}"

    def _tables(self) -> dict[str, DataFrame]:
        shown = [*OF_A_KIND, "runs", "l0", "hop_recall", "hops_shown", "precision", "swap"]
        return {"means over seeds": self.summary.filter(shown)}


LINES = {
    ("neurons", "jumprelu"): ("neurons", GREY, "o-"),
    ("untrained", "jumprelu"): ("untrained CLT", PALETTE[7], "x"),
    ("plt", "jumprelu"): ("PLT, JumpReLU", PALETTE[1], "s-"),
    ("plt", "topk"): ("PLT, TopK", PALETTE[4], "s--"),
    ("clt", "jumprelu"): ("CLT, JumpReLU", PALETTE[0], "o-"),
    ("clt", "topk"): ("CLT, TopK", PALETTE[5], "o--"),
}
"""What a line is called and how it is drawn, by kind and activation."""


def _draw_measure(axes: Axes, summary: DataFrame, measure: str) -> None:
    for (kind, activation), (label, colour, style) in LINES.items():
        line = summary.query(f"kind == '{kind}' and activation == '{activation}'").sort_values("l0")
        if len(line) > 0:
            bars = [line[measure] - line[f"{measure}_least"], line[f"{measure}_most"] - line[measure]]
            axes.errorbar(
                line["l0"], line[measure], bars, fmt=style, color=colour, label=label, markersize=4, capsize=2
            )
    axes.set(ylim=(-0.03, 1.03))


def _over_seeds(name: str, values: np.ndarray) -> dict[str, float]:
    """Mean, range and interval of a number; nan where there is none."""
    if len(values) == 0:
        return dict.fromkeys([name, *(f"{name}_{end}" for end in ("least", "most", "low", "high"))], math.nan)
    mean, half = float(values.mean()), math.nan
    if len(values) > 1:
        t = students_t.ppf((1 + LEVEL) / 2, len(values) - 1)
        half = float(t * values.std(ddof=1) / len(values) ** 0.5)
    ends = {"least": float(values.min()), "most": float(values.max()), "low": mean - half, "high": mean + half}
    return {name: mean, **{f"{name}_{end}": value for end, value in ends.items()}}
