"""A CLT, or a model's own neurons, against what a trained organism is known to do: which hops of its tasks they show.

Where a hop is carried is found without features (`tl_clt.organisms.interchange`): behind a layer, at a position. The
features that can show it are those of that layer and below, at that position and before, for they wrote what is there,
and what attention brings there. A feature at a position belongs to the hop's group where its activation there is about
the hop's value for the most part: knowing the value explains at least `MOSTLY` of its variance over prompts of the
task. It is pure where `PURITY` is explained.

A hop is shown where, with the group alone,
    predicted: its value can be told on prompts that were held out of the model's text, and
    swapped:   exchanging the group's activations as the stream was exchanged, with the model itself running above that
               layer, does at least `SHOWN` of what exchanging the stream there does. Where that was the difference of
               means over prompts with either value, so is this, and activations stay 0 or above; where it was
               everything, the group takes its activations on the other prompt.
It is shown purely where the pure features alone do so: a stricter measure, which a model's own neurons may miss too.

Neurons stand for features that write into their own layer alone, and may have a threshold of what they write
(activation times the norm of their output weights) that leaves a share of them: they are what a transcoder has to beat.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, cast, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from pandas import DataFrame, concat
from torch import Tensor

from tl_clt.arguments import as_seed, as_whole, shown
from tl_clt.benchmark.hops import PURITY, SHOWN, explained_by, explained_by_layer
from tl_clt.errors import ConfigError, FormatError
from tl_clt.evaluation.neurons import NEURONS, Neurons, neuron_values
from tl_clt.interventions import Intervention, intervene
from tl_clt.lens import FwdHook, HookedModel, block_hook, run_with_cache, run_with_hooks
from tl_clt.organisms.interchange import (
    answer_ids,
    answered_right,
    as_batch,
    exchanges,
    find_variables,
    read_out,
)
from tl_clt.organisms.tasks import Case, Task
from tl_clt.replacement import check_fit, feature_acts, replaced
from tl_clt.report import Report, finite, read_fields, table_from_json, table_to_json
from tl_clt.shapes import TokenBatch
from tl_clt.transcoder import CrossLayerTranscoder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HELD = 0.9
"""Of `follows`, `keeps` and `beyond`: from here on a hop is said to be carried at one place, and a CLT is asked to show
it."""

COLUMNS = (
    *("variable", "layer", "pos", "token", "part", "follows", "keeps", "carried", "n_features"),
    *("accuracy", "accuracy_shuffled", "swap", "swap_all", "swap_other", "shown"),
    *("n_pure", "accuracy_pure", "swap_pure", "shown_pure"),
)
MOSTLY = 0.5
"""Share of a feature's variance that a hop's value must explain for the feature to be about it."""

Acts = Float[Tensor, "n_prompts pos n_layers d_transcoder"]
OfPairs = Float[Tensor, "n_pairs pos n_layers d_transcoder"]
Mask = Bool[Tensor, "pos n_layers d_transcoder"]


def _above(values: Tensor, thresholds: Tensor) -> Tensor:
    return values * (values.abs() >= thresholds)


def _acts(model: HookedModel, features: CrossLayerTranscoder | Neurons, tokens: TokenBatch) -> Acts:
    if isinstance(features, Neurons):
        return _above(neuron_values(model, tokens), features.thresholds)
    return feature_acts(model, features, tokens)


@dataclass(frozen=True, kw_only=True, repr=False)
class TaskReport:
    """What a CLT shows of one task of a trained organism."""

    task: str

    hops: DataFrame
    """One row a hop, without the last, which is the answer itself: variable, layer, pos, token (where it is carried),
    follows, keeps (of exchanging the whole stream there), carried (whether both, and `beyond` of `interchange`, are at
    least `HELD`), n_features (of the group), accuracy (balanced, on prompts held out of the model's text),
    accuracy_shuffled (the same with labels shuffled), swap (share of pairs whose answer becomes the task's when the
    group's activations are exchanged, by means or whole, as the stream was), swap_all (the same, whole), swap_other (as
    swap, with as many other active features of the same layers and positions), shown; and of the pure features alone
    n_pure, accuracy_pure, swap_pure and shown_pure."""

    hop_recall: float
    """Share of the hops that are carried at one place that are shown; NaN where none is carried."""

    def __repr__(self) -> str:
        carried = int(self.hops["carried"].sum())
        return f"TaskReport({self.task!r}, hop_recall={self.hop_recall:.2f} of {carried} hops carried at one place)"


@torch.no_grad()
def measure_task(
    model: HookedModel,
    clt: CrossLayerTranscoder | Neurons,
    task: Task,
    *,
    places: DataFrame | None = None,
    n_prompts: int = 400,
    n_pairs: int = 64,
    seed: int = 0,
) -> TaskReport:
    """Hold a CLT of an organism, or its neurons, against what the organism is known to do.

    Args:
        model: the organism.
        clt: a CLT of it, or what `find_neurons` gives.
        task: what it is asked.
        places: what `find_variables` gives, where it is known already: it is the same for all CLTs of a model.
        n_prompts: of the text, for choosing groups, and as many held out for telling values.
        n_pairs: pairs of held-out prompts for the swaps of each hop.
        seed: of prompts, pairs and controls.

    Raises:
        ConfigError: an argument out of range, or the model answers too few prompts.
        CLTMismatch, HookNotFound: the CLT is of another model.
    """
    if not isinstance(task, Task):
        raise ConfigError(f"task is {shown(task)}: give one of organism_tasks(...).")
    n_prompts, n_pairs = as_whole("n_prompts", n_prompts, 2), as_whole("n_pairs", n_pairs, 1)
    seed = as_seed("seed", seed)
    if not isinstance(clt, Neurons):
        check_fit(model, clt)
    if places is None:
        places = find_variables(model, task, n_pairs=n_pairs, seed=seed)
    return _measure_hops(
        model, clt, task, places, _held_out(model, clt, task, n_prompts, seed), n_prompts, n_pairs, seed
    )


class _HeldOut(NamedTuple):
    """Prompts that were held out of a model's text and that it answers right."""

    cases: list[Case]
    tokens: TokenBatch
    acts: Acts


def _held_out(
    model: HookedModel, clt: CrossLayerTranscoder | Neurons, task: Task, n_prompts: int, seed: int
) -> _HeldOut:
    cases, tokens = answered_right(model, task, n_prompts, True, seed + 2)
    return _HeldOut(cases, tokens, _acts(model, clt, tokens))


def _measure_hops(
    model: HookedModel,
    clt: CrossLayerTranscoder | Neurons,
    task: Task,
    places: DataFrame,
    held_out: _HeldOut,
    n_prompts: int,
    n_pairs: int,
    seed: int,
) -> TaskReport:
    """`measure_task`, its arguments checked."""
    kept, kept_tokens, kept_acts = held_out
    told = task.cases(n_prompts, held_out=False, seed=seed)
    told_acts = _acts(model, clt, as_batch(model, task, told))
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for place in cast("list[dict[str, Any]]", places.to_dict("records")):
        variable, layer, pos = place["variable"], int(place["layer"]), int(place["pos"])
        reach = torch.zeros(told_acts.shape[1:], dtype=torch.bool)
        reach[: pos + 1, : layer + 1] = True
        labels, codes = _coded(told, variable)
        explained = explained_by(told_acts.flatten(1), codes).unflatten(0, reach.shape)
        group, pure = ((explained >= least) & reach for least in (MOSTLY, PURITY))
        active = (kept_acts != 0).any(dim=0) & reach
        chooser = random.Random(f"{task.name} {variable} {seed}")
        pairs, _ = exchanges(task, kept, variable, n_pairs, chooser)

        to, source = (kept_acts[rows] for rows in torch.tensor(pairs).unbind(dim=1))
        of_means = to + _means_of(told_acts, codes, labels, kept, variable)(pairs)
        by_means = of_means if isinstance(clt, Neurons) else of_means.clamp(min=0)
        given = by_means if place["part"] == "mean" else source

        def swapped(
            features: Mask,
            given: OfPairs = given,
            pairs: Sequence[tuple[int, int]] = pairs,
            place: dict[str, Any] = place,
        ) -> float:
            return swap_group(model, clt, task, kept, kept_tokens, kept_acts, given, pairs, features, place)

        others = _as_many(active & ~group, int((group & active).sum()), generator)
        shuffled = codes[torch.randperm(len(codes), generator=generator)]
        values = [case.values[variable] for case in kept]

        def told_from(
            features: Mask,
            codes: Int[Tensor, " n"] = codes,
            labels: list[str] = labels,
            values: Sequence[str] = tuple(values),
        ) -> float:
            return _told(told_acts[:, features], codes, labels, kept_acts[:, features], values)

        follows = float(place["follows"])
        carried = min(follows, place["keeps"]) >= HELD and place["beyond"] >= HELD
        (accuracy, swap), (accuracy_pure, swap_pure) = ((told_from(of), swapped(of)) for of in (group, pure))
        rows.append(
            {
                **{name: place[name] for name in COLUMNS[:7]},
                "carried": carried,
                "n_features": int(group.sum()),
                "accuracy": accuracy,
                "accuracy_shuffled": told_from(group, shuffled),
                "swap": swap,
                "swap_all": swapped(group, source),
                "swap_other": swapped(others) if bool(others.any()) else float("nan"),
                "shown": carried and accuracy >= SHOWN and swap >= SHOWN * follows,
                "n_pure": int(pure.sum()),
                "accuracy_pure": accuracy_pure,
                "swap_pure": swap_pure,
                "shown_pure": carried and accuracy_pure >= SHOWN and swap_pure >= SHOWN * follows,
            }
        )
    table = DataFrame(rows, columns=COLUMNS)
    asked = table[table["carried"].astype(bool)]
    recall = float(asked["shown"].astype(float).mean()) if len(asked) else float("nan")
    return TaskReport(task=task.name, hops=table, hop_recall=recall)


FigureName = Literal["hops"]
OF_ORGANISM = ("task", *COLUMNS)
BARS = {
    "follows": "the model's own exchange followed",
    "accuracy": "told (balanced accuracy)",
    "accuracy_shuffled": "told, its values shuffled",
    "swap": "swap followed",
    "swap_all": "the same, all that the features say",
    "swap_other": "the same, other features",
    "swap_pure": "the same, pure features alone",
}
"""What a figure shows of each hop."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class OrganismReport(Report[FigureName]):
    """What a CLT, or neurons, show of all tasks of an organism.

    Figure: "hops" (of each hop, how well it is told, and how often answers follow its swap). `save` writes it,
    report.json (which `from_dict` reads) and hops.csv.
    """

    FIGURES: ClassVar[tuple[FigureName, ...]] = get_args(FigureName)

    organism: str
    """Its name."""

    hops: DataFrame
    """The hops of `TaskReport`, with the task of each."""

    hop_recall: float
    """Share of the hops that are carried at one place that are shown; NaN where none is carried."""

    precision: float
    """Of the features that vary over a task's prompts at the last position, the share that are functions of one input
    or one hop; mean over tasks. NaN where none varies."""

    l0: list[float]
    """Active features a token of each layer, on held-out prompts, position 0 left out."""

    explained_variance: list[float]
    """Of each layer's MLP output, there."""

    answers_kept: float
    """Share of the held-out prompts that the model answers right which are so with the CLT, or the active neurons
    alone, in place of the MLPs; mean over tasks."""

    @property
    def numbers(self) -> dict[str, float]:
        """The figures in one row: those of the whole, and means over the hops that are carried at one place."""
        carried = self.hops[self.hops["carried"].astype(bool)]
        return {
            "hop_recall": self.hop_recall,
            "precision": self.precision,
            "l0": sum(self.l0),
            "explained_variance": min(self.explained_variance),
            "answers_kept": self.answers_kept,
            **{name: float(carried[name].mean()) for name in list(BARS)[1:]},
            "hop_recall_pure": float(carried["shown_pure"].astype(float).mean()),
        }

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON, which has None in place of what is no number."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return finite({**values, "hops": table_to_json(self.hops)})

    @classmethod
    def from_dict(cls, values: Any) -> OrganismReport:
        """The report that `to_dict` wrote.

        Raises:
            FormatError: it is none.
        """
        try:
            return read_fields(cls, values, {"DataFrame": partial(table_from_json, columns=OF_ORGANISM)})
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise FormatError(f"This is no report of tasks ({error}). Give what OrganismReport.save wrote.") from error

    def _draw(self, name: str) -> Figure:
        from matplotlib.figure import Figure

        table, width = self.hops, 0.8 / len(BARS)
        figure = Figure(figsize=(1.3 * len(table) + 2.5, 4.6), layout="constrained")
        axes = figure.subplots()
        for i, (column, label) in enumerate(BARS.items()):
            places = [place + (i - (len(BARS) - 1) / 2) * width for place in range(len(table))]
            axes.bar(places, table[column], width, label=label)
        names = zip(table["task"], table["variable"], strict=True)
        axes.set_xticks(range(len(table)), [f"{task}\n{variable}" for task, variable in names])
        axes.set(ylim=(0, 1.02), title=f"{self.organism}: hop recall {self.hop_recall:.2f}, L0 {sum(self.l0):.1f}")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        return figure

    def _write_numbers(self, folder: Path) -> None:
        (folder / "report.json").write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")
        self.hops.to_csv(folder / "hops.csv", index=False)

    def _in_short(self) -> str:
        return f"{self.organism}, hop_recall={self.hop_recall:.2f}, answers_kept={self.answers_kept:.2f}"

    def _tables(self) -> dict[str, DataFrame]:
        numbers = self.numbers
        of_all = DataFrame({"measure": list(numbers), "value": list(numbers.values())})
        return {f"{self.organism}: numbers": of_all, "by hop": self.hops}


@torch.no_grad()
def measure_organism(
    name: str,
    model: HookedModel,
    clt: CrossLayerTranscoder | Neurons,
    tasks: Mapping[str, Task],
    *,
    places: Mapping[str, DataFrame] | None = None,
    n_prompts: int = 400,
    n_pairs: int = 64,
    seed: int = 0,
) -> OrganismReport:
    """`measure_task` for each task, and how well the CLT, or the active neurons, stand in for the model.

    Args:
        name: the organism's.
        places: what `find_variables` gives for each task with hops before its answer, where it is known already.

    The others, and errors, as of `measure_task`.
    """
    n_prompts, n_pairs = as_whole("n_prompts", n_prompts, 2), as_whole("n_pairs", n_pairs, 1)
    seed = as_seed("seed", seed)
    if not isinstance(clt, Neurons):
        check_fit(model, clt)
    tables, precisions, kept, l0, variances = [], [], [], [], []
    for task in tasks.values():
        held_out = _held_out(model, clt, task, n_prompts, seed)
        cases, tokens, acts = held_out
        if len(task.hops) > 1:
            known = None if places is None else places.get(task.name)
            known = find_variables(model, task, n_pairs=n_pairs, seed=seed) if known is None else known
            report = _measure_hops(model, clt, task, known, held_out, n_prompts, n_pairs, seed)
            tables.append(report.hops.assign(task=task.name)[list(OF_ORGANISM)])
        precisions.append(_precision(acts[:, -1].flatten(1), cases))
        l0.append((acts[:, 1:] != 0).double().sum(dim=-1).mean(dim=(0, 1)))
        variances.append(_explained(model, clt, tokens, acts))
        right = _answers(model, clt, tokens) == answer_ids(model, [case.answer for case in cases])
        kept.append(float(right.double().mean()))
    hops = concat(tables, ignore_index=True) if tables else DataFrame(columns=list(OF_ORGANISM))
    asked = hops[hops["carried"].astype(bool)]
    return OrganismReport(
        organism=name,
        hops=hops,
        hop_recall=float(asked["shown"].astype(float).mean()) if len(asked) else float("nan"),
        precision=float(np.nanmean(precisions)) if not np.isnan(precisions).all() else float("nan"),
        l0=torch.stack(l0).mean(dim=0).tolist(),
        explained_variance=np.mean(variances, axis=0).tolist(),
        answers_kept=float(np.mean(kept)),
    )


def _precision(acts: Float[Tensor, "n_prompts n_features"], cases: Sequence[Case]) -> float:
    """Of the features that vary, the share of whose variance one input or hop explains `PURITY`."""
    explained = torch.stack([explained_by(acts, _coded(cases, variable)[1]) for variable in cases[0].values])
    varies = ~explained[0].isnan()
    return float((explained.amax(dim=0)[varies] >= PURITY).double().mean())


def _explained(model: HookedModel, clt: CrossLayerTranscoder | Neurons, tokens: TokenBatch, acts: Acts) -> list[float]:
    """Explained variance of each layer's MLP output, at all positions after 0."""
    layers = range(model.cfg.n_layers)

    def read(name: str) -> Float[Tensor, "n_tokens n_layers d"]:
        names = [block_hook(layer, name) for layer in layers]
        _, cache = run_with_cache(model, tokens, lambda hook: hook in names)
        return torch.stack([cache[hook] for hook in names], dim=2)[:, 1:].flatten(0, 1)

    acts = acts[:, 1:].flatten(0, 1)
    if not isinstance(clt, Neurons):
        return explained_by_layer(read(clt.cfg.output_hook), clt.decode(acts, read(clt.cfg.input_hook)))
    outputs, left_out, weights = read("hook_mlp_out"), read(NEURONS) - acts, dict(model.named_parameters())
    errors = [left_out[:, layer] @ weights[f"blocks.{layer}.mlp.W_out"] for layer in layers]
    return explained_by_layer(outputs, outputs - torch.stack(errors, dim=1))


def _answers(model: HookedModel, clt: CrossLayerTranscoder | Neurons, tokens: TokenBatch) -> Int[Tensor, " n_prompts"]:
    """Answers with the CLT, or the active neurons, in place of the MLPs, but for position 0, where they stay."""
    if not isinstance(clt, Neurons):
        with replaced(model, clt):
            return model(tokens)[:, -1].argmax(dim=-1)

    def cut(layer: int) -> FwdHook:
        def act(x: Float[Tensor, "batch pos d_mlp"], hook: object) -> Float[Tensor, "batch pos d_mlp"]:
            return torch.cat([x[:, :1], _above(x[:, 1:], clt.thresholds[layer])], dim=1)

        return block_hook(layer, NEURONS), act

    return run_with_hooks(model, tokens, [cut(layer) for layer in range(model.cfg.n_layers)])[:, -1].argmax(dim=-1)


def swap_group(
    model: HookedModel,
    clt: CrossLayerTranscoder | Neurons,
    task: Task,
    cases: Sequence[Case],
    tokens: Int[Tensor, "n_prompts pos"],
    acts: Acts,
    given: OfPairs,
    pairs: Sequence[tuple[int, int]],
    features: Mask,
    place: dict[str, Any],
) -> float:
    """Share of pairs whose answer becomes the task's with the variable of the other prompt, when features take other
    activations; the model itself runs above the layer of the place.

    Args:
        acts: on all prompts.
        given: what the features of each pair's first prompt take.
    """
    if not bool(features.any()):
        return 0.0
    layer = int(place["layer"])
    if isinstance(clt, Neurons):
        logits = _swap_neurons(model, tokens, acts, given, pairs, features, layer)
    else:
        logits = _swap_features(model, clt, tokens, acts, given, pairs, features, layer)
    variable = place["variable"]
    wanted = [task.run(cases[a].values, {variable: cases[b].values[variable]})[task.hops[-1].name] for a, b in pairs]
    return float((logits.argmax(dim=-1) == answer_ids(model, wanted)).double().mean())


def _swap_features(
    model: HookedModel,
    clt: CrossLayerTranscoder,
    tokens: Int[Tensor, "n_prompts pos"],
    acts: Acts,
    given: OfPairs,
    pairs: Sequence[tuple[int, int]],
    features: Mask,
    through_layer: int,
) -> Float[Tensor, "n_pairs d_vocab"]:
    """Logits at the last position where features take other activations."""
    rows = torch.tensor(pairs)[:, 0]
    changes = []
    for pos, layer in features.any(dim=2).nonzero().tolist():
        numbers = features[pos, layer].nonzero().flatten()
        for row, (a, _) in enumerate(pairs):
            differs = acts[a, pos, layer, numbers] != given[row, pos, layer, numbers]
            if bool(differs.any()):
                values = given[row, pos, layer, numbers[differs]].tolist()
                which = numbers[differs].tolist()
                changes.append(Intervention(layer=layer, pos=pos, feature=which, value=values, prompt=row))
    if not changes:
        return model(tokens[rows])[:, -1]
    return intervene(model, clt, tokens[rows], changes, through_layer=through_layer).logits[:, -1]


def _swap_neurons(
    model: HookedModel,
    tokens: Int[Tensor, "n_prompts pos"],
    acts: Acts,
    given: OfPairs,
    pairs: Sequence[tuple[int, int]],
    features: Mask,
    through_layer: int,
) -> Float[Tensor, "n_pairs d_vocab"]:
    """The same of neurons. Up to the layer, all others keep what they are, as features and errors do."""
    to = torch.tensor(pairs)[:, 0]
    values = neuron_values(model, tokens)[to] + (given - acts[to]) * features

    def hold(layer: int) -> FwdHook:
        return block_hook(layer, NEURONS), lambda x, hook: values[:, :, layer]

    return run_with_hooks(model, tokens[to], [hold(layer) for layer in range(through_layer + 1)])[:, -1]


def _means_of(
    told: Float[Tensor, "n_told pos n_layers d_transcoder"],
    codes: Int[Tensor, " n_told"],
    labels: list[str],
    kept: Sequence[Case],
    variable: str,
) -> Callable[[Sequence[tuple[int, int]]], OfPairs]:
    """For pairs of prompts held out, the difference between features' means over the text with either value; a value
    that the text has not counts as the mean of all."""
    by_value = {label: told[codes == code].mean(dim=0) for code, label in enumerate(labels)}
    overall = told.mean(dim=0)
    mean = [by_value.get(case.values[variable], overall) for case in kept]
    return lambda pairs: torch.stack([mean[b] - mean[a] for a, b in pairs])


def _coded(cases: Sequence[Case], variable: str) -> tuple[list[str], Int[Tensor, " n"]]:
    """The values that there are, and the number of each case's."""
    values = [case.values[variable] for case in cases]
    labels = sorted(set(values))
    return labels, torch.tensor([labels.index(value) for value in values])


def _told(
    x: Float[Tensor, "n_told n_features"],
    codes: Int[Tensor, " n_told"],
    labels: list[str],
    z: Float[Tensor, "n_kept n_features"],
    values: Sequence[str],
) -> float:
    """Balanced accuracy with which values of prompts held out are told from features, by a linear reading."""
    known = [i for i, value in enumerate(values) if value in labels]
    truth = np.array([labels.index(values[i]) for i in known])
    if not x.shape[1]:
        return 1 / len(np.unique(truth))
    told = read_out(x.double().numpy(), codes.numpy(), len(labels), z[known].double().numpy())
    return float(np.mean([np.mean(told[truth == c] == c) for c in np.unique(truth)]))


def _as_many(free: Mask, n: int, generator: torch.Generator) -> Mask:
    """n of some features at random, or all there are."""
    places = free.flatten().nonzero().flatten()
    chosen = places[torch.randperm(len(places), generator=generator)[:n]]
    return torch.zeros(free.numel(), dtype=torch.bool).index_fill(0, chosen, True).unflatten(0, free.shape)
