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
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from pandas import DataFrame
from torch import Tensor
from tqdm.auto import tqdm

from tl_clt.arguments import as_choice, as_choices, as_seed, as_several, as_share, as_switch, as_whole
from tl_clt.attribution import AttributionGraph, DifferenceTarget, NodeKind, TokenTarget, attribute
from tl_clt.attribution.targets import as_token_ids
from tl_clt.errors import ConfigError, DatasetError, FormatError, PromptError
from tl_clt.evaluation.faithfulness import name_transcoders, read_prompts
from tl_clt.files import read_json
from tl_clt.interventions import Freeze, intervention_hooks
from tl_clt.interventions.validation_report import FEWEST_PROMPTS, LEVEL, interval_note, resample
from tl_clt.lens import (
    FwdHook,
    HookedModel,
    Prompt,
    as_text,
    block_hook,
    model_name,
    require_model,
    run_with_cache,
    run_with_hooks,
    token_strings,
    user_hooks_aside,
)
from tl_clt.replacement import attach, check_fit, require_free
from tl_clt.report import GREY, PALETTE, Report, table_from_json, table_to_json
from tl_clt.shapes import Tokens
from tl_clt.transcoder import CrossLayerTranscoder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Those of MIB."""
Ranking = Literal["influence", "magnitude", "random"]
RANKINGS: tuple[Ranking, ...] = get_args(Ranking)
Errors = Literal["nodes", "kept", "removed"]
Metric = Literal["logit", "difference", "log_prob"]
FigureName = Literal["curves"]
COLUMNS = [
    *("transcoder", "prompt", "ranking", "share", "n_nodes", "n_kept", "measure", "measure_empty", "measure_model"),
    "answer",
]
Acts = Float[Tensor, "pos n_layers d_transcoder"]


@torch.no_grad()
def measure_curves(
    model: HookedModel,
    clts: CrossLayerTranscoder | Mapping[str, CrossLayerTranscoder],
    prompts: Prompt | Sequence[Prompt],
    targets: Sequence[int | str] | None = None,
    counterfactuals: Prompt | Sequence[Prompt] | None = None,
    *,
    metric: Metric | None = None,
    errors: Errors = "nodes",
    rankings: Ranking | Sequence[Ranking] = RANKINGS,
    shares: Sequence[float] = SHARES,
    freeze: Freeze = "attention",
    max_feature_nodes: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> FaithfulnessCurves:
    """Ablate all but the first nodes of each prompt's graph, and see how much of the answer stays.

    Hooks of the user's own are set aside.

    Args:
        model: a HookedTransformer or TransformerBridge.
        clts: a CLT of this model (of span 1: per-layer transcoders), or several by name.
        prompts: texts or token ids; one or several.
        targets: the token of each prompt whose place at the end is measured, as text that is one token or as id;
            None for the model's own likeliest.
        counterfactuals: another prompt of the same length for each (or one for all): what is ablated has its values
            there. None for zeros.
        metric: "logit" (of the target, less the mean logit: what graphs explain), "difference" (the target's logit
            less that of the counterfactual prompt's likeliest token, as in MIB) or "log_prob" (of the target). None
            for "difference" where there are counterfactuals, else "logit".
        errors: "nodes" ranks errors among the features, so that the whole circuit is the model; "kept" has them in
            every circuit, the empty one too; "removed" in none, so that the whole circuit is what the features do
            alone.
        rankings: "influence" on the target in the graph, largest first, whatever its sign. Controls: "magnitude" (how
            much a node writes: activation times the norm of all its decoder vectors, or the norm of an error) and
            "random". With counterfactuals the magnitude is that of what changes.
        shares: of the nodes; a circuit has as many nodes as are not more than the share.
        freeze: what is held at the clean run's values: "attention" patterns, "all" (patterns and the scales of norms),
            or "none".
        max_feature_nodes: as for `attribute`: trace at most so many features of each prompt.
        batch_size: circuits in one pass.
        seed: of the random order.
        progress: show a progress bar.

    Raises:
        ConfigError: an argument out of range, or a difference with nothing to be told apart from.
        DatasetError, PromptError, TokenizerMissing, TargetError: no prompts, or one that the model cannot take, or as
            many targets or counterfactuals as there are not prompts.
        CLTMismatch, HookNotFound: a CLT is of another model.
        AlreadyAttached: the model has a CLT attached: it would not be the model itself that runs.
        ModelUnsupported, LocalModelMismatch, MemoryLimit: as for `attribute`.
    """
    require_model(model)
    named = name_transcoders(clts)
    if not named:
        raise ConfigError("There is no CLT to measure: give at least one.")
    for clt in named.values():
        check_fit(model, clt)
    require_free(model)
    if metric is None:
        metric = "logit" if counterfactuals is None else "difference"
    plan = _Plan(
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
        "metric": plan.metric,
        "errors": plan.errors,
        "freeze": plan.freeze,
        "seed": plan.seed,
        "intervals": interval_note(len(tasks)),
    }
    return FaithfulnessCurves(table=DataFrame(rows, columns=COLUMNS), info=info)


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """How circuits are measured: arguments of `measure_curves`."""

    metric: Metric
    errors: Errors
    freeze: Freeze
    batch_size: int


@dataclass(frozen=True, kw_only=True)
class _Plan(Ablation):
    """What is measured: the other arguments."""

    rankings: Sequence[str]
    shares: Sequence[float]
    max_feature_nodes: int | None
    seed: int


class PromptTask(NamedTuple):
    """One prompt."""

    tokens: Tokens
    target: int
    other: Tokens | None
    """The counterfactual prompt."""

    against: int | None
    """The token that the target is to be told apart from, of a difference."""


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


class Clean(NamedTuple):
    """What features and errors are on a prompt."""

    acts: Acts
    errors: Float[Tensor, "pos n_layers d_model"]
    logits: Float[Tensor, " d_vocab"]
    """After the last position."""


def _clean(model: HookedModel, clt: CrossLayerTranscoder, tokens: Tokens) -> Clean:
    with user_hooks_aside(model), attach(model, clt):
        names = {
            point: [block_hook(t, f"clt.{point}") for t in clt.layers] for point in ("hook_acts_post", "hook_error")
        }
        wanted = {name for of in names.values() for name in of}
        logits, cache = run_with_cache(model, tokens[None], lambda name: name in wanted)
        acts, errors = (torch.stack([cache[name][0] for name in of], dim=1) for of in names.values())
    return Clean(acts, errors, logits[0, -1])


class Candidates(NamedTuple):
    """Nodes of a prompt's graph that a circuit may have."""

    number: Int[Tensor, " n"]
    """Of the node in the graph."""
    layer: Int[Tensor, " n"]
    pos: Int[Tensor, " n"]
    feature: Int[Tensor, " n"]
    """-1 for errors."""


def list_candidates(graph: AttributionGraph, errors: Errors) -> Candidates:
    """The features of a graph, and with errors="nodes" its errors, at positions after 0."""
    nodes = graph.nodes
    kinds = [NodeKind.FEATURE, NodeKind.ERROR] if errors == "nodes" else [NodeKind.FEATURE]
    chosen = torch.nonzero(nodes.is_kind(*kinds) & (nodes.pos > 0)).flatten()
    feature = nodes.index[chosen].masked_fill(nodes.is_kind(NodeKind.ERROR)[chosen], -1)
    return Candidates(chosen, nodes.layer[chosen], nodes.pos[chosen], feature)


class Measured(NamedTuple):
    """What comes of one circuit."""

    value: float
    """m of the circuit."""
    answer: bool
    """Whether the likeliest token is the model's."""


class Circuits:
    """Circuits of one prompt, measured in the model itself with all other nodes ablated.

    Args:
        model, clt: the model, and a CLT of it.
        task: the prompt, and what is measured on it.
        how: what is ablated to what, and what is measured.
    """

    def __init__(self, model: HookedModel, clt: CrossLayerTranscoder, task: PromptTask, how: Ablation) -> None:
        self.model, self.clt, self.task, self.how = model, clt, task, how
        self.here = _clean(model, clt, task.tokens)
        self.away = None if task.other is None else _clean(model, clt, task.other)

    @property
    def whole(self) -> float:
        """m of the model as it is."""
        return float(self._value(self.here.logits[None])[0])

    def measure(self, candidates: Candidates, circuits: Sequence[Int[Tensor, " _"]]) -> list[Measured]:
        """Measure circuits, each of some of the candidates, by their places among these."""
        found: list[Measured] = []
        for start in range(0, len(circuits), self.how.batch_size):
            logits = self._run(candidates, circuits[start : start + self.how.batch_size])
            answers = logits.argmax(dim=-1) == self.here.logits.argmax()
            found += map(Measured, self._value(logits).tolist(), answers.tolist())
        return found

    def magnitudes(self, candidates: Candidates) -> Float[Tensor, " n"]:
        """How much of each node is written, or changes."""
        _, layer, pos, feature = candidates
        here, away = self.here, self.away
        acts = here.acts if away is None else here.acts - away.acts
        errors = here.errors if away is None else here.errors - away.errors
        sizes = errors[pos, layer].norm(dim=-1)
        for source in self.clt.layers:
            at = torch.nonzero((layer == source) & (feature >= 0)).flatten()
            rows = self.clt.decoder_rows(source, feature[at]).detach()
            sizes[at] = acts[pos[at], source, feature[at]].abs() * rows.flatten(start_dim=1).norm(dim=1)
        return sizes

    def _value(self, logits: Float[Tensor, "n d_vocab"]) -> Float[Tensor, " n"]:
        logits, task = logits.double(), self.task
        if self.how.metric == "log_prob":
            return logits.log_softmax(dim=-1)[:, task.target]
        return logits[:, task.target] - (logits.mean(dim=-1) if task.against is None else logits[:, task.against])

    def _run(
        self, candidates: Candidates, circuits: Sequence[Int[Tensor, " _"]]
    ) -> Float[Tensor, "n_circuits d_vocab"]:
        """Logits after the last position, with all nodes ablated but those of each circuit."""
        model, clt, here, away = self.model, self.clt, self.here, self.away
        features = torch.zeros(len(circuits), *here.acts.shape, dtype=torch.bool)
        errors = torch.zeros(len(circuits), *here.errors.shape[:2], dtype=torch.bool)
        for row, circuit in enumerate(circuits):
            layer, pos, feature = (values.cpu()[circuit] for values in candidates[1:])
            is_error = feature < 0
            features[row, pos[~is_error], layer[~is_error], feature[~is_error]] = True
            errors[row, pos[is_error], layer[is_error]] = True
        if self.how.errors == "kept":
            errors[:] = True
        # Position 0 stays as it is.
        features[:, 0], errors[:, 0] = True, True
        ablated_acts = torch.zeros_like(here.acts) if away is None else away.acts
        ablated_errors = torch.zeros_like(here.errors) if away is None else away.errors
        device = here.acts.device
        batch = self.task.tokens.expand(len(circuits), -1)
        hooks: list[FwdHook] = []
        if self.how.freeze != "none":
            hooks = intervention_hooks(model, clt, batch, [], None, self.how.freeze)
        for layer in clt.layers:
            keep_acts = keep(features[:, :, layer].to(device), ablated_acts[:, layer])
            keep_error = keep(errors[:, :, layer, None].to(device), ablated_errors[:, layer])
            hooks.append((block_hook(layer, "clt.hook_acts_post"), keep_acts))
            hooks.append((block_hook(layer, "clt.hook_error"), keep_error))
        with user_hooks_aside(model), attach(model, clt, mode="replace_with_error"):
            return run_with_hooks(model, batch, hooks)[:, -1]


def _measure(model: HookedModel, clt: CrossLayerTranscoder, task: PromptTask, plan: _Plan, number: int) -> list[tuple]:
    """Rows of the table, of one prompt."""
    circuits = Circuits(model, clt, task, plan)
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
    candidates = list_candidates(graph, plan.errors)
    n = len(candidates.number)
    scores: dict[str, Callable[[], Tensor]] = {
        "influence": lambda: graph.influence()[candidates.number],
        "magnitude": lambda: circuits.magnitudes(candidates),
        "random": lambda: torch.randperm(n, generator=torch.Generator().manual_seed(plan.seed + number)),
    }
    orders = {ranking: scores[ranking]().argsort(descending=True, stable=True).cpu() for ranking in plan.rankings}
    counts = [_count(share, n) for share in plan.shares]
    chosen = [(ranking, count) for ranking in plan.rankings for count in dict.fromkeys([0, *counts])]
    found = circuits.measure(candidates, [orders[ranking][:count] for ranking, count in chosen])
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


def keep(kept: Bool[Tensor, "batch pos _"], ablated: Float[Tensor, "pos n"]) -> Callable:
    """A hook that leaves what is kept and puts other values in place of the rest.

    A plain function: TransformerLens prints each hook that it adds, and a printed partial prints its tensors.
    """

    def keep_some(x: Float[Tensor, "batch pos n"], hook: object) -> Float[Tensor, "batch pos n"]:
        return torch.where(kept, x, ablated.to(x.dtype))

    return keep_some


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class FaithfulnessCurves(Report[FigureName]):
    """How much of the answer circuits of each size keep.

    Figure: "curves" (f against the share of nodes, a panel for each transcoder, a line for each ranking, with 95%
    intervals). `save` writes it, report.json (which `from_json` reads), measurements.csv (`table`), curves.csv and
    areas.csv.
    """

    FIGURES: ClassVar[tuple[FigureName, ...]] = get_args(FigureName)

    table: DataFrame
    """One row for each transcoder (its name), prompt (number), ranking and share: n_nodes (to choose from), n_kept (in
    the circuit), measure (m of the circuit), measure_empty, measure_model, answer (whether the likeliest token is the
    model's)."""

    info: dict[str, Any]
    """Model, prompts, targets, counterfactuals, ablated_to, metric, errors, freeze, seed, and what intervals are of."""

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
        with its interval; and whole (f of all nodes)."""
        rows = []
        for of in self._curves():
            area = _trapezoids(of.shares, of.faithfulness)
            distance = _trapezoids(of.shares, np.abs(1 - of.faithfulness))
            whole = float(of.faithfulness[0, -1])
            rows.append((*of.name, *_with_interval(area), *_with_interval(distance), whole))
        names = ["area", "area_low", "area_high", "distance", "distance_low", "distance_high", "whole"]
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
            means = (by_prompt(column).mean(axis=0) for column in ("n_kept", "answer"))
            found.append(_Curve((str(transcoder), str(ranking)), shares, f, *means))
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
        from matplotlib.figure import Figure

        curves = self.curves
        parts = list(curves.groupby("transcoder", sort=False))
        figure = Figure(figsize=(5.5 * len(parts) + 1, 4.6), layout="constrained")
        panels = figure.subplots(1, len(parts), squeeze=False, sharey=True)[0]
        for (transcoder, of), axes in zip(parts, panels, strict=True):
            for ranking, line in of.groupby("ranking", sort=False):
                colour = PALETTE[RANKINGS.index(ranking)]  # type: ignore[arg-type]
                axes.plot(line["share"], line["faithfulness"], "o-", color=colour, label=ranking, markersize=4)
                axes.fill_between(line["share"], line["low"], line["high"], color=colour, alpha=0.15, linewidth=0)
            for height in (0, 1):
                axes.axhline(height, color=GREY, linewidth=0.8, linestyle=":")
            axes.set_xscale("log")
            n_prompts = self.table["prompt"].nunique()
            axes.set(xlabel=f"share of nodes kept ({self._nodes()})", title=f"{transcoder}, {n_prompts} prompts")
        panels[0].set_ylabel(f"faithfulness f ({self.info['metric'].replace('_', ' ')})")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        return figure

    def _nodes(self) -> str:
        return {
            "nodes": "features and errors",
            "kept": "features; all errors stay",
            "removed": "features; no errors",
        }[self.info["errors"]]

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
