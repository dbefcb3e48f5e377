"""How much of an answer a circuit keeps, by its size (Mueller et al. 2025, "MIB: A Mechanistic Interpretability
Benchmark").

The nodes of a prompt's attribution graph are ranked. The circuit C of a share of them are the first ones; all others
are ablated in the model itself, by hooks within `attach(mode="replace_with_error")`: features above are computed anew
from what the circuit leaves. With m a measure of the answer at the last position,

    f(share) = (m(C) - m(0)) / (m(N) - m(0))

m(N) is that of the model as it is, m(0) that of the empty circuit, each a mean over prompts, as MIB takes them. The
area under f (`area`, MIB's CPR: larger is better) and the area between f and 1 (`distance`, MIB's CMD: smaller is
better) are sums of trapezoids over the shares, on a linear axis, so that with MIB's shares a circuit that is the model
from the first share on has an area of .999 and a distance of 0.

Nodes are the features that are active, and the errors (what the CLT does not reconstruct of an MLP's output), both at
positions after 0. Tokens, position embeddings, biases, skip connections and position 0, whose MLP outputs stay the
model's own, belong to every circuit, the empty one too. What is ablated becomes 0; or, with a counterfactual prompt of
the same length, what it is there, and then nodes are the features active on either prompt. Features that are no nodes
are ablated always.

Edges in place of nodes: a circuit has some of the graph's edges from the same features and errors. A target sees a
source as the circuit leaves it along an edge that is kept, and ablated along one that is not. This is measured with
attention patterns and the scales of norms held, since edges are what they are only then: activations are computed from
the graph, the logits in the model (`EdgeCircuits`). The empty circuit is that of no nodes.

Neurons in place of a CLT's features: nodes are the values that the model's own MLPs give their output weights, ranked
by gradient times activation, which is to the first order what a node does to m (`NeuronCircuits`). With thresholds,
what smaller values write at a place is a node, as a CLT's error is. Shares are of many more nodes there: numbers of
nodes (`n_kept`, `n_for_90`) can be compared between transcoders, shares and areas cannot.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float
from pandas import DataFrame
from torch import Tensor
from tqdm.auto import tqdm

from tl_clt.arguments import as_choice, as_choices, as_seed, as_several, as_share, as_switch, as_whole, shown
from tl_clt.attribution import DifferenceTarget, TokenTarget, attribute
from tl_clt.attribution.targets import as_token_ids
from tl_clt.errors import ConfigError, DatasetError, FormatError, PromptError
from tl_clt.evaluation.circuits import (
    Ablation,
    Circuits,
    EdgeCircuits,
    Errors,
    Metric,
    NeuronCircuits,
    NodeCircuits,
    PromptTask,
)
from tl_clt.evaluation.faithfulness import name_transcoders, read_prompts
from tl_clt.evaluation.neurons import Neurons, require_neurons
from tl_clt.files import read_json
from tl_clt.interventions import Freeze
from tl_clt.interventions.validation_report import FEWEST_PROMPTS, LEVEL, interval_note, resample
from tl_clt.lens import (
    HookedModel,
    Prompt,
    as_text,
    model_name,
    require_model,
    run_with_hooks,
    token_strings,
    user_hooks_aside,
)
from tl_clt.replacement import check_fit, require_free
from tl_clt.report import GREY, PALETTE, Report, table_from_json, table_to_json
from tl_clt.shapes import Tokens
from tl_clt.transcoder import CrossLayerTranscoder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Those of MIB."""
Ranking = Literal["influence", "magnitude", "random"]
RANKINGS: tuple[Ranking, ...] = get_args(Ranking)
Level = Literal["nodes", "edges"]
FigureName = Literal["curves", "numbers"]
COLUMNS = [
    *("transcoder", "prompt", "ranking", "share", "n_nodes", "n_kept", "measure", "measure_empty", "measure_model"),
    "answer",
]


@torch.no_grad()
def measure_curves(
    model: HookedModel,
    clts: CrossLayerTranscoder | Neurons | Mapping[str, CrossLayerTranscoder | Neurons],
    prompts: Prompt | Sequence[Prompt],
    targets: Sequence[int | str] | None = None,
    counterfactuals: Prompt | Sequence[Prompt] | None = None,
    *,
    level: Level = "nodes",
    metric: Metric | None = None,
    errors: Errors = "nodes",
    rankings: Ranking | Sequence[Ranking] = RANKINGS,
    shares: Sequence[float] = SHARES,
    freeze: Freeze | None = None,
    max_feature_nodes: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> FaithfulnessCurves:
    """Ablate all but the first nodes, or edges, of each prompt's graph, and see how much of the answer stays.

    Hooks of the user's own are set aside.

    Args:
        model: a HookedTransformer or TransformerBridge.
        clts: a CLT of this model (of span 1: per-layer transcoders), its own neurons (what `find_neurons` gives), or
            several of these by name.
        prompts: texts or token ids; one or several.
        targets: the token of each prompt whose place at the end is measured, as text that is one token or as id;
            None for the model's own likeliest.
        counterfactuals: another prompt of the same length for each (or one for all): what is ablated has its values
            there. None for zeros.
        level: what a circuit has some of: "nodes" or "edges" of the graph. Neurons have no graph, and so nodes alone.
        metric: "logit" (of the target, less the mean logit: what graphs explain), "difference" (the target's logit
            less that of the counterfactual prompt's likeliest token, as in MIB) or "log_prob" (of the target). None
            for "difference" where there are counterfactuals, else "logit".
        errors: "nodes" ranks errors among the features, so that the whole circuit is the model; "kept" has them in
            every circuit, the empty one too; "removed" in none, so that the whole circuit is what the features do
            alone.
        rankings: "influence" on the target in the graph, largest first, whatever its sign: of an edge that which runs
            along it, of neurons gradient times activation. Controls: "magnitude" (how much a node writes: activation
            times the norm of all its decoder vectors, or the norm of an error; of an edge its own size) and "random".
            With counterfactuals the magnitude is that of what changes.
        shares: of the nodes or edges; a circuit has as many as are not more than the share.
        freeze: what is held at the clean run's values: "attention" patterns, "all" (patterns and the scales of norms),
            or "none". None for "attention"; of edges for "all", without which there are none.
        max_feature_nodes: as for `attribute`: trace at most so many features of each prompt.
        batch_size: circuits in one pass.
        seed: of the random order.
        progress: show a progress bar.

    Raises:
        ConfigError: an argument out of range, a difference with nothing to be told apart from, or edges of neurons.
        DatasetError, PromptError, TokenizerMissing, TargetError: no prompts, or one that the model cannot take, or as
            many targets or counterfactuals as there are not prompts.
        CLTMismatch, HookNotFound: a CLT, or neurons, are of another model.
        AlreadyAttached: the model has a CLT attached: it would not be the model itself that runs.
        ModelUnsupported, LocalModelMismatch, MemoryLimit: as for `attribute`.
    """
    require_model(model)
    named = {"neurons": clts} if isinstance(clts, Neurons) else name_transcoders(clts)  # type: ignore[arg-type]
    if not named:
        raise ConfigError("There is no CLT to measure: give at least one.")
    for clt in named.values():
        if isinstance(clt, Neurons):
            require_neurons(model, clt)
        else:
            check_fit(model, clt)
    require_free(model)
    level = as_choice("level", level, get_args(Level))
    if freeze is None:
        freeze = "attention" if level == "nodes" else "all"
    if level == "edges" and freeze != "all":
        raise ConfigError(
            f"freeze is {shown(freeze)}: a graph's edges are what they are with attention patterns and the scales of"
            " norms held. Give freeze='all', or leave it out, or take level='nodes'."
        )
    if level == "edges" and any(isinstance(clt, Neurons) for clt in named.values()):
        raise ConfigError("Neurons have no graph, and so no edges: leave them out, or take level='nodes'.")
    if metric is None:
        metric = "logit" if counterfactuals is None else "difference"
    plan = _Plan(
        level=level,
        metric=as_choice("metric", metric, get_args(Metric)),
        errors=as_choice("errors", errors, get_args(Errors)),
        rankings=as_choices("rankings", rankings, RANKINGS),
        shares=_as_shares(shares),
        freeze=as_choice("freeze", freeze, get_args(Freeze)),
        max_feature_nodes=as_whole("max_feature_nodes", max_feature_nodes, 1, none="all"),
        batch_size=as_whole("batch_size", batch_size, 1),
        seed=as_seed("seed", seed),
    )
    progress = as_switch("progress", progress)
    tasks = _tasks(model, prompts, targets, counterfactuals, plan.metric)
    rows: list[tuple] = []
    with tqdm(total=len(named) * len(tasks), desc="Curves", unit=" prompts", delay=2.0, disable=not progress) as bar:
        for name, clt in named.items():
            for number, task in enumerate(tasks):
                rows += ((name, number, *row) for row in _measure(model, clt, task, plan, number))
                bar.update()
    info = {
        "model": model_name(model),
        "prompts": [as_text(model, task.tokens) for task in tasks],
        "targets": [token_strings(model, torch.tensor([task.target]))[0] for task in tasks],
        "counterfactuals": [as_text(model, task.other) for task in tasks if task.other is not None],
        "ablated_to": "zero" if counterfactuals is None else "counterfactual",
        "level": plan.level,
        "metric": plan.metric,
        "errors": plan.errors,
        "freeze": plan.freeze,
        "seed": plan.seed,
        "intervals": interval_note(len(tasks)),
    }
    return FaithfulnessCurves(table=DataFrame(rows, columns=COLUMNS), info=info)


@dataclass(frozen=True, kw_only=True)
class _Plan(Ablation):
    """What is measured: the other arguments."""

    level: Level
    rankings: Sequence[str]
    shares: Sequence[float]
    max_feature_nodes: int | None
    seed: int


def _as_shares(given: object) -> list[float]:
    shares = [as_share(f"shares[{i}]", share) for i, share in enumerate(as_several("shares", given, "shares"))]
    if len(shares) < 2 or any(b <= a for a, b in pairwise(shares)):
        raise ConfigError(f"shares is {shares}: give at least two, each larger than the one before.")
    return shares


def _tasks(
    model: HookedModel,
    prompts: Prompt | Sequence[Prompt],
    targets: Sequence[int | str] | None,
    counterfactuals: Prompt | Sequence[Prompt] | None,
    metric: Metric,
) -> list[PromptTask]:
    texts = read_prompts(model, prompts)
    others: Sequence[Tokens | None] = [None] * len(texts)
    if counterfactuals is not None:
        others = read_prompts(model, counterfactuals)
        others = others * len(texts) if len(others) == 1 else others
        if len(others) != len(texts):
            raise PromptError(f"There are {len(others)} counterfactuals for {len(texts)} prompts: give one for each.")
    if metric == "difference" and counterfactuals is None:
        raise ConfigError(
            "A difference needs counterfactual prompts, whose answer the target is told apart from: give them, or"
            " another metric."
        )
    wanted: Sequence[int | None] = [None] * len(texts)
    if targets is not None:
        wanted = as_token_ids(model, targets)
        if len(wanted) != len(texts):
            raise DatasetError(f"There are {len(wanted)} targets for {len(texts)} prompts: give one for each.")
    tasks = []
    for number, (tokens, other, target) in enumerate(zip(texts, others, wanted, strict=True)):
        if other is not None and len(other) != len(tokens):
            raise PromptError(
                f"Prompt {number} has {len(tokens)} tokens and its counterfactual {len(other)}: activations are"
                " exchanged position by position, so give two of the same length."
            )
        chosen = likeliest(model, tokens) if target is None else target
        against = None
        if metric == "difference" and other is not None:
            against = likeliest(model, other)
            if against == chosen:
                raise ConfigError(
                    f"The target of prompt {number} is also the likeliest token after its counterfactual, so that there"
                    " is no difference: give another counterfactual, or another metric."
                )
        tasks.append(PromptTask(tokens, chosen, other, against))
    return tasks


def likeliest(model: HookedModel, tokens: Tokens) -> int:
    with user_hooks_aside(model) as known:
        return int(run_with_hooks(model, tokens[None], [], known)[0, -1].argmax())


def _circuits(model: HookedModel, clt: CrossLayerTranscoder | Neurons, task: PromptTask, plan: _Plan) -> Circuits:
    """Circuits of one prompt, of what is wanted."""
    if isinstance(clt, Neurons):
        return NeuronCircuits(model, clt, task, plan)
    target = TokenTarget(task.target) if task.against is None else DifferenceTarget(task.target, task.against)
    graph = attribute(
        model,
        clt,
        task.tokens,
        [target],
        max_feature_nodes=plan.max_feature_nodes,
        contrast=task.other,
        progress=False,
    )
    kind = NodeCircuits if plan.level == "nodes" else EdgeCircuits
    return kind(model, clt, task, plan, graph)


def _measure(
    model: HookedModel, clt: CrossLayerTranscoder | Neurons, task: PromptTask, plan: _Plan, number: int
) -> list[tuple]:
    """Rows of the table, of one prompt."""
    circuits = _circuits(model, clt, task, plan)
    n = circuits.n
    scores: dict[str, Callable[[], Tensor]] = {
        "influence": circuits.influences,
        "magnitude": circuits.magnitudes,
        "random": lambda: torch.randperm(n, generator=torch.Generator().manual_seed(plan.seed + number)),
    }
    orders = {ranking: scores[ranking]().argsort(descending=True, stable=True).cpu() for ranking in plan.rankings}
    counts = [_count(share, n) for share in plan.shares]
    chosen = [(ranking, count) for ranking in plan.rankings for count in dict.fromkeys([0, *counts])]
    found = circuits.measure([orders[ranking][:count] for ranking, count in chosen])
    measures, whole = dict(zip(chosen, found, strict=True)), circuits.whole
    rows = []
    for ranking in plan.rankings:
        empty = measures[ranking, 0].value
        for share, count in zip(plan.shares, counts, strict=True):
            value, same = measures[ranking, count]
            rows.append((ranking, share, n, count, value, empty, whole, same))
    return rows


def _count(share: float, n: int) -> int:
    """As many of n as are not more than a share, which rounding may have made smaller than it is."""
    return math.floor(share * n + 1e-9)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class FaithfulnessCurves(Report[FigureName]):
    """How much of the answer circuits of each size keep.

    Figures: "curves" (f against the share of nodes, a panel for each transcoder, a line for each ranking, with 95%
    intervals) and "numbers" (f against the number of nodes, by the first ranking, all transcoders in one panel).
    `save` writes them, report.json (which `from_json` reads), measurements.csv (`table`), curves.csv and
    areas.csv.
    """

    FIGURES: ClassVar[tuple[FigureName, ...]] = get_args(FigureName)

    table: DataFrame
    """One row for each transcoder (its name), prompt (number), ranking and share: n_nodes (nodes, or edges, to choose
    from), n_kept (in the circuit), measure (m of the circuit), measure_empty, measure_model, answer (whether the
    likeliest token is the model's)."""

    info: dict[str, Any]
    """Model, prompts, targets, counterfactuals, ablated_to, level, metric, errors, freeze, seed, and what intervals are
    of."""

    @property
    def curves(self) -> DataFrame:
        """For each transcoder, ranking and share: n_kept (mean), faithfulness (f) with its interval low and high, and
        answers (share of prompts whose likeliest token stays)."""
        rows = []
        for of in self._curves():
            for i, share in enumerate(of.shares):
                value, low, high = _with_interval(of.faithfulness[:, i])
                rows.append((*of.name, share, of.n_kept[i], value, low, high, of.answers[i]))
        names = ["transcoder", "ranking", "share", "n_kept", "faithfulness", "low", "high", "answers"]
        return DataFrame(rows, columns=names)

    @property
    def areas(self) -> DataFrame:
        """For each transcoder and ranking: area (under f; MIB's CPR) and distance (between f and 1; MIB's CMD), each
        with its interval; whole (f of all nodes); n_nodes (mean over prompts) and n_for_90 (n_kept of the smallest
        share measured whose f is .9 or more; nan where none is)."""
        rows = []
        for of in self._curves():
            area = _trapezoids(of.shares, of.faithfulness)
            distance = _trapezoids(of.shares, np.abs(1 - of.faithfulness))
            f = of.faithfulness[0]
            enough = of.n_kept[f >= 0.9]
            numbers = (of.n_nodes, float(enough[0]) if len(enough) else math.nan)
            rows.append((*of.name, *_with_interval(area), *_with_interval(distance), float(f[-1]), *numbers))
        names = ["area", "area_low", "area_high", "distance", "distance_low", "distance_high", "whole"]
        names += ["n_nodes", "n_for_90"]
        return DataFrame(rows, columns=["transcoder", "ranking", *names])

    def _curves(self) -> list[_Curve]:
        found: list[_Curve] = []
        for (transcoder, ranking), rows in self.table.groupby(["transcoder", "ranking"], sort=False):  # type: ignore
            shares, n_prompts = np.unique(rows["share"]), rows["prompt"].nunique()

            def by_prompt(column: str, rows: DataFrame = rows, shape: tuple = (n_prompts, len(shares))) -> Any:
                return rows.sort_values(["prompt", "share"])[column].to_numpy(dtype=float).reshape(shape)

            measure, empty, whole = map(by_prompt, ("measure", "measure_empty", "measure_model"))
            times = np.vstack([np.ones(n_prompts), resample(n_prompts, 0)])
            with np.errstate(divide="ignore", invalid="ignore"):
                f = (times @ (measure - empty)) / (times @ (whole - empty))
            if n_prompts < FEWEST_PROMPTS:
                f[1:] = np.nan
            n_kept, answers = (by_prompt(column).mean(axis=0) for column in ("n_kept", "answer"))
            n_nodes = float(by_prompt("n_nodes").mean())
            found.append(_Curve((str(transcoder), str(ranking)), shares, f, n_kept, answers, n_nodes))
        return found

    def to_dict(self) -> dict[str, Any]:
        """`info`, the curves, the areas and the table, for JSON."""
        tables = {"areas": self.areas, "curves": self.curves, "table": self.table}
        return {**self.info, **{name: table_to_json(table) for name, table in tables.items()}}

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> FaithfulnessCurves:
        """The report that `to_json` wrote.

        Raises:
            FormatError: it is no such text.
        """
        try:
            values = read_json(text)
            table = table_from_json(values["table"], COLUMNS)
            info = {name: value for name, value in values.items() if name not in ("areas", "curves", "table")}
            if set(table["ranking"]) - set(RANKINGS) or table.isna().any(axis=None) or table.empty:
                raise ValueError("its table has gaps")
            return cls(table=table, info=info)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise FormatError(
                f"This is no report of faithfulness curves ({error}). Give what FaithfulnessCurves.save wrote."
            ) from error

    def _draw(self, name: str) -> Figure:
        return self._draw_curves() if name == "curves" else self._draw_numbers()

    def _draw_curves(self) -> Figure:
        from matplotlib.figure import Figure

        curves = self.curves
        n_nodes = self.areas.groupby("transcoder")["n_nodes"].first()
        parts = list(curves.groupby("transcoder", sort=False))
        figure = Figure(figsize=(5.5 * len(parts) + 1, 4.6), layout="constrained")
        panels = figure.subplots(1, len(parts), squeeze=False, sharey=True)[0]
        for (transcoder, of), axes in zip(parts, panels, strict=True):
            for ranking, line in of.groupby("ranking", sort=False):
                colour = PALETTE[RANKINGS.index(ranking)]  # type: ignore[arg-type]
                axes.plot(line["share"], line["faithfulness"], "o-", color=colour, label=ranking, markersize=4)
                axes.fill_between(line["share"], line["low"], line["high"], color=colour, alpha=0.15, linewidth=0)
            axes.set_xscale("log")
            title = f"{transcoder}, {self._n_prompts}, {n_nodes[transcoder]:,.0f} {self._level} each"
            axes.set(xlabel=f"share of {self._level} kept{self._said_of_errors}", title=title)
        self._finish(figure, list(panels))
        return figure

    def _draw_numbers(self) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.5, 4.6), layout="constrained")
        axes, ranking = figure.subplots(), self.table["ranking"].iloc[0]
        of_ranking = self.curves.query("ranking == @ranking and n_kept > 0").groupby("transcoder", sort=False)
        for (transcoder, line), colour in zip(of_ranking, cycle(PALETTE), strict=False):
            axes.plot(line["n_kept"], line["faithfulness"], "o-", color=colour, label=transcoder, markersize=4)
            axes.fill_between(line["n_kept"], line["low"], line["high"], color=colour, alpha=0.15, linewidth=0)
        axes.set_xscale("log")
        title = f"{self._n_prompts}, first by {ranking}"
        axes.set(xlabel=f"number of {self._level} kept (mean over prompts)", title=title)
        self._finish(figure, [axes])
        return figure

    def _finish(self, figure: Figure, panels: list[Axes]) -> None:
        for axes in panels:
            for height in (0, 1):
                axes.axhline(height, color=GREY, linewidth=0.8, linestyle=":")
        panels[0].set_ylabel(f"faithfulness f ({self.info['metric'].replace('_', ' ')})")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))

    @property
    def _n_prompts(self) -> str:
        n = self.table["prompt"].nunique()
        return f"{n} prompt{'s' if n > 1 else ''}"

    @property
    def _level(self) -> str:
        """Reports written before edges were measured do not say it."""
        return self.info.get("level", "nodes")

    @property
    def _said_of_errors(self) -> str:
        return {"nodes": "", "kept": " (all errors stay)", "removed": " (no errors)"}[self.info["errors"]]

    def _write_numbers(self, folder: Path) -> None:
        (folder / "report.json").write_text(self.to_json())
        self.table.to_csv(folder / "measurements.csv", index=False)
        self.curves.to_csv(folder / "curves.csv", index=False)
        self.areas.to_csv(folder / "areas.csv", index=False)

    def _in_short(self) -> str:
        areas = self.areas[["transcoder", "ranking", "area"]].to_numpy().tolist()
        said = ", ".join(f"{transcoder} by {ranking} {area:.3f}" for transcoder, ranking, area in areas[:3])
        return f"{self.table['prompt'].nunique()} prompts; area under f: {said}"

    def _tables(self) -> dict[str, DataFrame]:
        return {"areas": self.areas, "curves": self.curves}


class _Curve(NamedTuple):
    """One transcoder's, by one ranking."""

    name: tuple[str, ...]
    """Of the transcoder, and the ranking."""
    shares: Float[np.ndarray, " n_shares"]
    faithfulness: Float[np.ndarray, "n_draws n_shares"]
    """f of all prompts, then of draws of as many, which are nan where they are too few for an interval."""
    n_kept: Float[np.ndarray, " n_shares"]
    answers: Float[np.ndarray, " n_shares"]
    n_nodes: float
    """Mean over prompts."""


def _trapezoids(
    shares: Float[np.ndarray, " n_shares"], heights: Float[np.ndarray, "n_draws n_shares"]
) -> Float[np.ndarray, " n_draws"]:
    """Areas under lines through some heights."""
    return ((heights[:, 1:] + heights[:, :-1]) / 2) @ np.diff(shares)


def _with_interval(values: Float[np.ndarray, " n_draws"]) -> tuple[float, float, float]:
    """The first, and between what the others lie in 95% of draws; nan where there are none."""
    drawn = values[1:]
    if np.isnan(drawn).all():
        return float(values[0]), math.nan, math.nan
    outside = 100 * (1 - LEVEL) / 2
    low, high = np.nanpercentile(drawn, [outside, 100 - outside])
    return float(values[0]), float(low), float(high)
