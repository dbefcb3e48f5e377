"""A CLT against a circuit that is known: which of the program's hops its features and graphs show.

The MLP of layer L computes a variable from its arguments, so the features that show it are those of layer L, which
read what that MLP reads. A feature belongs to the variable's group where its activation is a function of the arguments
alone: knowing them explains at least `PURITY` of its variance over all prompts. A feature that looks past them, at what
the arguments were made of, does in one hop what the model does in several, and belongs to no group.

A hop is shown where, with the group alone,
    predicted: the variable's value can be told on prompts held out (balanced accuracy of a linear reading), and
    swapped:   giving the group its activations on another prompt, with the model itself running above layer L, makes
               the answer what the program gives with the variable's other value (`ground_truth` does the same without
               features).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from pandas import DataFrame
from torch import Tensor

from tl_clt.arguments import as_seed, as_whole, shown
from tl_clt.attribution import AttributionGraph, NodeKind, attribute
from tl_clt.attribution.influence import SMALLEST_ROW_SUM
from tl_clt.errors import ConfigError, FormatError
from tl_clt.files import read_json
from tl_clt.interventions import Intervention, intervene
from tl_clt.lens import block_hook, run_with_cache
from tl_clt.organisms.circuits import CircuitVariable, KnownCircuit, pairs_that_differ, share
from tl_clt.organisms.programs import Values
from tl_clt.replacement import attach, check_fit
from tl_clt.report import GREY, Report, finite, read_fields, table_from_json, table_to_json
from tl_clt.shapes import NodeMask
from tl_clt.transcoder import CrossLayerTranscoder, CrossLayerTranscoderConfig, explained_variance
from tl_clt.transcoder.decoders import DenseDecoders

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FigureName = Literal["hops"]
PURITY = 0.9
"""Share of a feature's variance that a quantity must explain for the feature to be a function of it."""

SHOWN = 0.9
"""Accuracy and share of swaps from which on a hop counts as shown."""

FOLDS = 4
"""Parts of the prompts, each of which is held out once."""

SHUFFLES = 8
"""Of a variable's values, for chance."""

MEANS = ("accuracy", "accuracy_shuffled", "swap", "swap_other", "swap_replaced")
"""Columns of the table of variables of which the means count."""

BARS = {
    "accuracy": "told (balanced accuracy)",
    "accuracy_shuffled": "told, its values shuffled",
    "swap": "swap followed, the model above",
    "swap_other": "the same with other features",
    "swap_replaced": "swap followed, the CLT above",
    "through": "paths through it, of those there are",
}
"""What a figure shows of each variable."""

Acts = Float[Tensor, "n_prompts n_layers d_transcoder"]
Mask = Bool[Tensor, " d_transcoder"]


VARIABLE_COLUMNS = [
    *(
        "variable",
        "layer",
        "n_features",
        "accuracy",
        "accuracy_shuffled",
        "swap",
        "swap_other",
        "swap_replaced",
        "shown",
    ),
    *("through", "through_there"),
]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class HopReport(Report[FigureName]):
    """What a CLT shows of a known circuit, at the position of the answer.

    Figure: "hops" (of each variable, how well it is told, how often answers follow its swap, and how much of the paths
    goes through it). `save` writes it, report.json (which `from_json` reads) and variables.csv.
    """

    FIGURES: ClassVar[tuple[FigureName, ...]] = get_args(FigureName)

    circuit: str
    """Its name."""

    variables: DataFrame
    """One row a variable of the program: variable, layer, n_features (of its group), accuracy (balanced, on prompts
    held out; chance is 1 / values), accuracy_shuffled (the same with the variable's values shuffled), swap (share of
    pairs whose answer becomes the program's, of those whose answer is to change), swap_other (the same with as many
    other features that are active in the layer, NaN where there are none), swap_replaced (as swap, but features of
    later layers are computed anew in place of the model's MLPs), shown, through (of the influence of tokens on the
    answer in graphs, the share that goes through the group), through_there (the same where neurons are features)."""

    hop_recall: float
    """Share of variables that are shown."""

    hops_shown: float
    """Mean over variables of through / through_there, each at most 1: how much of the graphs' paths takes the hops that
    the model's own paths take."""

    precision: float
    """Of the features in pruned graphs whose activation varies, the share that are functions of one input, of one
    variable computed so far, or of the arguments of one that their layer computes. NaN where there are none."""

    l0: list[float]
    """Active features a prompt, of each layer."""

    explained_variance: list[float]
    """Of each layer's MLP output."""

    answers_kept: float
    """Share of prompts whose answer is right with the CLT in place of the MLPs."""

    answers_kept_without_far: float
    """The same where features write into their own layer alone: what the far writes are needed for."""

    writes_by_distance: list[float]
    """Share of what active features write, activation times decoder norm, into their own layer, the next, and so on."""

    @property
    def numbers(self) -> dict[str, float]:
        """The figures in one row: those of the whole, and means over variables."""
        table = self.variables
        return {
            "hop_recall": self.hop_recall,
            "hops_shown": self.hops_shown,
            "precision": self.precision,
            "l0": sum(self.l0),
            "explained_variance": min(self.explained_variance),
            "answers_kept": self.answers_kept,
            "answers_kept_without_far": self.answers_kept_without_far,
            "far": sum(self.writes_by_distance[1:]),
            "through_answer": float(table["through"].iloc[-1]),
            **{name: float(table[name].mean()) for name in MEANS},
        }

    def to_dict(self) -> dict[str, Any]:
        """The fields, for JSON, which has None in place of what is no number."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return finite({**values, "variables": table_to_json(self.variables)})

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_dict(cls, values: Any) -> HopReport:
        """The report that `to_dict` wrote.

        Raises:
            FormatError: it is none.
        """
        try:
            report = read_fields(cls, values, {"DataFrame": partial(table_from_json, columns=VARIABLE_COLUMNS)})
            if report.variables.empty or len(report.l0) != len(report.explained_variance):
                raise ValueError("it has no variable, or not every list has an entry for each layer")
            return report
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise FormatError(f"This is no report of hops ({error}). Give what HopReport.save wrote.") from error

    @classmethod
    def from_json(cls, text: str) -> HopReport:
        """The report that `to_json` wrote.

        Raises:
            FormatError: it is no such text.
        """
        try:
            values = read_json(text)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"This is no report of hops ({error}). Give what HopReport.save wrote.") from error
        return cls.from_dict(values)

    def _draw(self, name: str) -> Figure:
        from matplotlib.figure import Figure

        table, width = self.variables, 0.8 / len(BARS)
        figure = Figure(figsize=(2.2 * len(table) + 2.5, 4.6), layout="constrained")
        axes = figure.subplots()
        there = (table["through"] / table["through_there"]).clip(upper=1)
        for i, (column, label) in enumerate(BARS.items()):
            places = [place + (i - (len(BARS) - 1) / 2) * width for place in range(len(table))]
            axes.bar(places, there if column == "through" else table[column], width, label=label)
        axes.axhline(SHOWN, color=GREY, linewidth=0.8, linestyle=":")
        names = zip(table["variable"], table["layer"], strict=True)
        axes.set_xticks(range(len(table)), [f"{name}\nlayer {layer}" for name, layer in names])
        axes.set(ylim=(0, 1.02), title=f"{self.circuit}: hop recall {self.hop_recall:.2f}, L0 {sum(self.l0):.1f}")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        return figure

    def _write_numbers(self, folder: Path) -> None:
        (folder / "report.json").write_text(self.to_json())
        self.variables.to_csv(folder / "variables.csv", index=False)

    def _in_short(self) -> str:
        return (
            f"hop_recall={self.hop_recall:.2f}, hops_shown={self.hops_shown:.2f}, precision={self.precision:.2f},"
            f" answers_kept={self.answers_kept:.2f}"
        )

    def _tables(self) -> dict[str, DataFrame]:
        numbers = self.numbers
        of_all = DataFrame({"measure": list(numbers), "value": list(numbers.values())})
        return {f"{self.circuit}: numbers": of_all, "by variable": self.variables}


@torch.no_grad()
def measure_hops(
    circuit: KnownCircuit, clt: CrossLayerTranscoder, *, n_pairs: int = 64, n_graphs: int = 16, seed: int = 0
) -> HopReport:
    """Hold a CLT of a known circuit's model against the circuit.

    Args:
        circuit: the model and its program.
        clt: a CLT of that model.
        n_pairs: pairs of prompts for the swaps of each variable.
        n_graphs: prompts to trace, at random.
        seed: of pairs, prompts, folds and controls.

    Raises:
        ConfigError: an argument out of range.
        CLTMismatch, HookNotFound: the CLT is of another model.
    """
    if not isinstance(circuit, KnownCircuit):
        raise ConfigError(f"circuit is {shown(circuit)}: give what load_circuit gives.")
    n_pairs, n_graphs = as_whole("n_pairs", n_pairs, 1), as_whole("n_graphs", n_graphs, 1)
    generator = torch.Generator().manual_seed(as_seed("seed", seed))
    check_fit(circuit.model, clt)
    inputs, outputs = activations(circuit, clt)
    acts = clt.encode(inputs)
    groups = {v.name: find_group(v, acts) for v in circuit.variables}
    chosen = torch.randperm(len(circuit.prompts), generator=generator)[:n_graphs]
    traced = _trace(circuit, clt, chosen, groups, _known_features(circuit, acts))
    neurons = neurons_as_transcoder(circuit)
    neuron_acts = neurons.encode(activations(circuit, neurons)[0])
    neuron_groups = {v.name: find_group(v, neuron_acts) for v in circuit.variables}
    there = _trace(circuit, neurons, chosen, neuron_groups, _known_features(circuit, neuron_acts))
    rows = []
    for variable in circuit.variables:
        group = groups[variable.name]
        others = _others(group, acts[:, variable.layer], generator)
        pairs = pairs_that_differ(variable.values, n_pairs, generator)
        shuffles = [variable.values[torch.randperm(len(acts), generator=generator)] for _ in range(SHUFFLES)]
        group_acts = acts[:, variable.layer][:, group]
        accuracy = predict(group_acts, variable.values, variable.arguments)
        swap = _swap(circuit, clt, variable, group, acts, pairs, variable.layer)
        swap_other = _swap(circuit, clt, variable, others, acts, pairs, variable.layer).follows
        rows.append(
            {
                "variable": variable.name,
                "layer": variable.layer,
                "n_features": int(group.sum()),
                "accuracy": accuracy,
                "accuracy_shuffled": float(np.mean([predict(group_acts, v, variable.arguments) for v in shuffles])),
                "swap": swap.follows,
                "swap_other": swap_other if bool(others.any()) else float("nan"),
                "swap_replaced": _swap(circuit, clt, variable, group, acts, pairs, None).follows,
                "shown": min(accuracy, swap.follows, swap.stays) >= SHOWN,
                "through": traced.through[variable.name],
                "through_there": there.through[variable.name],
            }
        )
    table = DataFrame(rows, columns=VARIABLE_COLUMNS)
    recons = clt.decode(acts, inputs)
    return HopReport(
        circuit=circuit.name,
        variables=table,
        hop_recall=float(table["shown"].mean()),
        hops_shown=float((table["through"] / table["through_there"]).clip(upper=1).mean()),
        precision=traced.precision,
        l0=(acts != 0).double().sum(dim=-1).mean(dim=0).tolist(),
        explained_variance=explained_by_layer(outputs, recons),
        answers_kept=answers_kept(circuit, clt),
        answers_kept_without_far=answers_kept(circuit, without_far_writes(clt)),
        writes_by_distance=writes_by_distance(clt, acts),
    )


def activations(
    circuit: KnownCircuit, clt: CrossLayerTranscoder
) -> tuple[Float[Tensor, "n_prompts n_layers d_model"], Float[Tensor, "n_prompts n_layers d_model"]]:
    """What a CLT reads, and what it is to write, at the position of the answer, on every prompt."""
    hooks, layers = (clt.cfg.input_hook, clt.cfg.output_hook), clt.layers
    names = {hook: [block_hook(layer, hook) for layer in layers] for hook in hooks}
    _, cache = run_with_cache(circuit.model, circuit.prompts, lambda name: name.endswith(hooks))
    at = circuit.answer_position
    inputs, outputs = (torch.stack([cache[name][:, at] for name in names[hook]], dim=1) for hook in hooks)
    return inputs, outputs


def neurons_as_transcoder(circuit: KnownCircuit, kept: float = 1.0) -> CrossLayerTranscoder:
    """The model's own MLPs as a per-layer transcoder, whose features are the neurons: it shows every hop there is.

    Args:
        circuit: the model.
        kept: below 1, each layer has a threshold of what a neuron writes (activation times norm), that this share of
            the activations on all prompts is above, and those that are equal to the last of them.
    """
    clt = _all_neurons(circuit)
    if kept == 1:
        return clt
    acts = clt.encode(activations(circuit, clt)[0])
    norms = torch.stack([W.detach()[:, 0].norm(dim=-1) for W in clt.W_dec])
    cut = CrossLayerTranscoder(replace(clt.cfg, activation="jumprelu"), clt.W_dec)
    with torch.no_grad():
        for name in ("W_enc", "b_enc", "b_dec"):
            cut.get_parameter(name).copy_(clt.get_parameter(name))
        for layer in clt.layers:
            written = (acts[:, layer] * norms[layer]).flatten()
            written = written[written > 0].sort(descending=True).values
            last = written[max(0, math.ceil(kept * len(written)) - 1)]
            # Half-way to the next that is less by more than rounding, so that this decides nothing.
            less = written[written < last * (1 - 1e-4)]
            limit = (last + (less[0] if len(less) else 0.0)) / 2
            cut.get_parameter("threshold")[layer] = limit / norms[layer].clamp_min(torch.finfo(norms.dtype).tiny)
    return cut.requires_grad_(False)


def _all_neurons(circuit: KnownCircuit) -> CrossLayerTranscoder:
    model = circuit.model
    weights = dict(model.named_parameters())
    layers = range(model.cfg.n_layers)

    def each(name: str) -> list[Tensor]:
        return [weights[f"blocks.{layer}.mlp.{name}"].detach() for layer in layers]

    cfg = CrossLayerTranscoderConfig(
        n_layers=model.cfg.n_layers,
        d_model=model.cfg.d_model,
        d_transcoder=int(model.cfg.d_mlp or 0),
        span=1,
        activation="relu",
        model_name=circuit.name,
        dtype=str(model.cfg.dtype).removeprefix("torch."),
    )
    clt = CrossLayerTranscoder(cfg, DenseDecoders([W[:, None] for W in each("W_out")]))
    with torch.no_grad():
        clt.W_enc.copy_(torch.stack(each("W_in")))
        clt.b_enc.copy_(torch.stack(each("b_in")))
        clt.b_dec.copy_(torch.stack(each("b_out")))
    return clt.requires_grad_(False)


# -- which features belong to what


def explained_by(acts: Float[Tensor, "n_prompts d_transcoder"], quantity: Values) -> Float[Tensor, " d_transcoder"]:
    """Share of each feature's variance over prompts that a quantity explains; NaN where it does not vary.

    1 - (variance within the classes of equal quantity) / (variance).
    """
    acts = acts.double()
    codes = torch.unique(quantity, return_inverse=True)[1]
    members = torch.nn.functional.one_hot(codes).double()
    means = (members.T @ acts) / members.sum(dim=0)[:, None]
    within = (acts - means[codes]).square().sum(dim=0)
    total = (acts - acts.mean(dim=0)).square().sum(dim=0)
    floor = 1e-10 * acts.square().sum(dim=0).clamp_min(1e-30)
    return torch.where(total > floor, 1 - within / total, torch.nan)


def find_group(variable: CircuitVariable, acts: Acts) -> Mask:
    """The features of a variable's layer that are functions of its arguments."""
    return explained_by(acts[:, variable.layer], variable.arguments) >= PURITY


def _known_features(circuit: KnownCircuit, acts: Acts) -> Float[Tensor, "n_layers d_transcoder"]:
    """1 where a feature is a function of something that the program has at its layer, 0 where not, NaN where it does
    not vary."""
    known: list[tuple[int, Values]] = [(0, values) for values in circuit.prompts[:, 1:].unbind(dim=1)]
    known += [(v.layer + 1, v.values) for v in circuit.variables]
    by_layer = []
    for layer in range(acts.shape[1]):
        quantities = [values for first, values in known if first <= layer]
        quantities += [v.arguments for v in circuit.variables if v.layer == layer]
        best = torch.stack([explained_by(acts[:, layer], quantity) for quantity in quantities]).amax(dim=0)
        by_layer.append(torch.where(best.isnan(), best, (best >= PURITY).to(best)))
    return torch.stack(by_layer)


def _others(group: Mask, acts: Float[Tensor, "n_prompts d_transcoder"], generator: torch.Generator) -> Mask:
    """As many features that are active somewhere and not in the group, at random, or all there are."""
    free = ((acts != 0).any(dim=0) & ~group).nonzero().flatten()
    chosen = free[torch.randperm(len(free), generator=generator)[: int(group.sum())]]
    return torch.zeros_like(group).index_fill(0, chosen, True)


# -- what a group does


def predict(acts: Float[Tensor, "n_prompts n_features"], values: Values, strata: Values) -> float:
    """Balanced accuracy with which values are told from activations on prompts held out.

    A linear reading of each value, by least squares, of which the largest wins. Prompts are in `FOLDS` folds, each of
    which has its share of the prompts of each stratum.
    """
    classes, codes = torch.unique(values, return_inverse=True)
    x = torch.cat([acts.double(), torch.ones(len(acts), 1, dtype=torch.float64)], dim=1).numpy()
    scale = np.abs(x).max(axis=0)
    x = x / np.where(scale > 0, scale, 1.0)
    y = np.eye(len(classes))[codes.numpy()]
    order = torch.argsort(strata, stable=True)
    fold = np.empty(len(values), dtype=int)
    fold[order.numpy()] = np.arange(len(values)) % FOLDS
    told = np.empty(len(values), dtype=int)
    for held_out in range(FOLDS):
        train = fold != held_out
        weights = np.linalg.lstsq(x[train], y[train], rcond=1e-6)[0]
        told[~train] = (x[~train] @ weights).argmax(axis=1)
    right = torch.from_numpy(told) == codes
    return float(np.mean([share(right, codes == c) for c in range(len(classes))]))


class Swapped(NamedTuple):
    """How often the answer was the program's after a swap."""

    follows: float
    """Of the pairs whose answer is to change; 0 where nothing was swapped."""

    stays: float
    """Of the others; 1 where there are none."""


def _swap(
    circuit: KnownCircuit,
    clt: CrossLayerTranscoder,
    variable: CircuitVariable,
    features: Mask,
    acts: Acts,
    pairs: tuple[Int[Tensor, " n"], Int[Tensor, " n"]],
    through_layer: int | None,
) -> Swapped:
    """Give features their activations on another prompt.

    Args:
        features: of the variable's layer.
        acts: of all prompts, at the position of the answer.
        pairs: rows, and the rows to take activations from.
        through_layer: as for `intervene`.
    """
    if not bool(features.any()):
        return Swapped(0.0, 1.0)
    numbers, (to, source) = features.nonzero().flatten().tolist(), pairs
    values = acts[source, variable.layer][:, features].tolist()
    swaps = [
        Intervention(layer=variable.layer, pos=variable.pos, feature=numbers, value=value, prompt=row)
        for row, value in enumerate(values)
    ]
    effect = intervene(circuit.model, clt, circuit.prompts[to], swaps, through_layer=through_layer)
    at = circuit.answer_position
    clean, after = (x[:, at].argmax(dim=-1) for x in (effect.baseline_logits, effect.logits))
    wanted = circuit.answers_with(variable.name, to, variable.values[source])
    changing = wanted != clean
    follows = share(after == wanted, changing) if bool(changing.any()) else 0.0
    stays = share(after == wanted, ~changing) if not bool(changing.all()) else 1.0
    return Swapped(follows, stays)


# -- what graphs show


class _Traced(NamedTuple):
    through: dict[str, float]
    """By variable: share of the tokens' influence, summed over graphs, that goes through its group; 0 where there is
    none."""

    precision: float


def _trace(
    circuit: KnownCircuit,
    clt: CrossLayerTranscoder,
    rows: Int[Tensor, " n"],
    groups: dict[str, Mask],
    known: Float[Tensor, "n_layers d_transcoder"],
) -> _Traced:
    """Graphs of some prompts, from the answer upstream."""
    past, total = dict.fromkeys(groups, 0.0), 0.0
    judged: list[Tensor] = []
    for row in rows.tolist():
        target = [int(circuit.answers[row])]
        graph = attribute(
            circuit.model,
            clt,
            circuit.prompts[row],
            targets=target,
            max_n_logits=1,
            bos="features",
            progress=False,
        )
        nodes, total = graph.nodes, total + tokens_influence(graph)
        here = nodes.is_kind(NodeKind.FEATURE) & (nodes.pos == circuit.answer_position)
        for v in circuit.variables:
            in_group = groups[v.name][nodes.index.clamp(max=len(groups[v.name]) - 1)]
            past[v.name] += tokens_influence(graph, here & (nodes.layer == v.layer) & in_group)
        pruned = graph.prune().nodes
        kept = pruned.is_kind(NodeKind.FEATURE) & (pruned.pos == circuit.answer_position)
        judged.append(known[pruned.layer[kept], pruned.index[kept]])
    verdicts = torch.cat(judged)
    verdicts = verdicts[~verdicts.isnan()]
    through = {name: 1 - value / total if total > 0 else 0.0 for name, value in past.items()}
    return _Traced(through, float(verdicts.mean()) if len(verdicts) else float("nan"))


def tokens_influence(graph: AttributionGraph, closed: NodeMask | None = None) -> float:
    """Influence of all tokens on the targets, by walks that visit none of the nodes `closed`.

    Args:
        graph: whole and dense.
        closed: nodes that walks must not visit.
    """
    A = graph.adjacency.double().abs()
    A = A / A.sum(dim=1, keepdim=True).clamp_min(SMALLEST_ROW_SUM)
    if closed is not None:
        A[:, closed] = 0
    at = graph.logit_weights.double()
    tokens, found = graph.nodes.is_kind(NodeKind.TOKEN), 0.0
    while bool(at.any()):
        at = at @ A
        found += float(at[tokens].sum())
    return found


# -- without graphs


@torch.no_grad()
def answers_kept(circuit: KnownCircuit, clt: CrossLayerTranscoder) -> float:
    """Share of prompts whose answer is right with the CLT in place of the MLPs."""
    with attach(circuit.model, clt, mode="replace"):
        answers = circuit.model(circuit.prompts)[:, circuit.answer_position].argmax(dim=-1)
    return float((answers == circuit.answers).double().mean())


@torch.no_grad()
def without_far_writes(clt: CrossLayerTranscoder) -> CrossLayerTranscoder:
    """The same features, which write into their own layer alone."""
    near = CrossLayerTranscoder(
        replace(clt.cfg, span=1), DenseDecoders([clt.W_dec[source][:, :1].clone() for source in clt.layers])
    )
    for name, parameter in near.named_parameters():
        if not name.startswith("W_dec"):
            parameter.copy_(clt.get_parameter(name))
    return near.requires_grad_(False)


def writes_by_distance(clt: CrossLayerTranscoder, acts: Acts) -> list[float]:
    """Share of what features write, activation times decoder norm, by the distance from their own layer.

    Args:
        clt: the CLT.
        acts: activations on some prompts.
    """
    written = torch.zeros(clt.cfg.n_writes_at_most, dtype=torch.float64)
    for source in clt.layers:
        norms = clt.W_dec[source].double().norm(dim=-1)
        written[: norms.shape[1]] += acts[:, source].double().abs().mean(dim=0) @ norms
    return (written / written.sum().clamp_min(1e-30)).tolist()


def explained_by_layer(
    outputs: Float[Tensor, "n_prompts n_layers d_model"], recons: Float[Tensor, "n_prompts n_layers d_model"]
) -> list[float]:
    """Explained variance of each layer's output."""
    out, error = outputs.double(), (outputs - recons).double()

    def squared(x: Tensor) -> Tensor:
        return x.square().sum(dim=(0, 2))

    return explained_variance(squared(error), squared(out - out.mean(dim=0)), squared(out)).per_layer
