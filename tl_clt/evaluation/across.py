"""What graphs of several tasks have in common, and where they differ: heads, parts, circuits, tokens, errors, flow.

Each prompt's graph is of one target, whose value is its logit less the mean logit. With o a node's output (visits of
walks upstream from the target, the start included) and A its in-edges,

    through(h)  = sum_t o_t |c(h, t)| / sum_s |A[t, s]|  over  sum_t o_t
                with t the target and the features that pruning keeps, and c(h, t) what goes through head h to t
                (`tl_clt.attribution.direct`): the size of what the head passes on, beside all that comes in. Heads that
                work against each other each count, and so does each head of a chain.
    direct      what each part writes to the target through the residual stream of the last position alone. The parts
                (heads of all layers together, features, errors, token and position embeddings, biases) sum to the
                value.
    overlap     of the features that pruning keeps, at whatever positions, in graphs of two prompts: the Jaccard index,
                and the same with influence, sum of the lesser shares over sum of the greater. By chance: with as many
                features of each layer, drawn from those active on the prompt, and the influences dealt out among them.
    influence   shares of walks: of tokens those that end there; of features and errors visits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float
from pandas import DataFrame, concat
from torch import Tensor
from tqdm.auto import tqdm

from tl_clt.arguments import as_seed, as_share, as_switch, as_whole, shown
from tl_clt.attribution import AttributionGraph, NodeKind, attribute, find_head_effects
from tl_clt.attribution.influence import walk_upstream
from tl_clt.attribution.targets import as_token_ids
from tl_clt.errors import ConfigError, DatasetError, PromptError
from tl_clt.evaluation.curves import likeliest
from tl_clt.evaluation.faithfulness import read_prompts
from tl_clt.lens import HookedModel, Prompt, as_text, model_name, token_strings
from tl_clt.replacement import check_fit, require_free
from tl_clt.report import GREY, PALETTE, Report
from tl_clt.transcoder import CrossLayerTranscoder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FigureName = Literal["heads", "parts", "overlap", "tokens", "errors", "flow"]
PARTS = ("attention", "feature", "error", "token", "position", "bias")
MOST_HEADS = 32
"""Columns of the figure of heads."""
MOST_POSITIONS = 16
"""Columns of figures by position, from the end."""
MOST_PAIRS = 100
"""Pairs of prompts that an overlap is a mean of."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TaskComparison(Report[FigureName]):
    """Graphs of several tasks beside each other.

    Figures: "heads" (`through` by task), "parts" (direct contributions), "overlap" (of circuits, beside chance),
    "tokens" (influence by position from the end), "errors" (in four quadrants), "flow" (influence by layer and
    position). `save` writes them, a table of each as csv, and info.json.
    """

    FIGURES: ClassVar[tuple[FigureName, ...]] = get_args(FigureName)

    heads: DataFrame
    """One row a prompt and head: task, prompt (number), layer, head, direct (logits, signed), through (share)."""

    parts: DataFrame
    """One row a prompt, part and layer: task, prompt, part (attention, feature, error, token, position, bias), layer
    (that a feature reads or another part writes; -1 for embeddings; n_layers for what the last norm and b_U add),
    direct (logits, signed). A prompt's sum to its target's value."""

    flow: DataFrame
    """One row a prompt, layer and position: task, prompt, layer (-1 for tokens), pos, from_end (-1 the last), token,
    features, errors (influence; a token's stands under features)."""

    overlap: DataFrame
    """One row a pair of tasks, or a task with itself (over pairs of different prompts; NaN of one prompt): task, other,
    n_pairs, jaccard, weighted, jaccard_chance, weighted_chance."""

    info: dict[str, Any]
    """Model, prompts and targets by task, node_threshold, n_layers, seed."""

    @property
    def tasks(self) -> list[str]:
        """Their names, in the order in which they were given."""
        return list(self.info["prompts"])

    @property
    def shares(self) -> DataFrame:
        """For each task the mean direct contribution of each part (logits), their sum `whole`, and attention_share:
        of attention's and the MLPs' (features and errors) together, by size; biases, b_dec among them, count for
        neither."""
        sums: Any = self.parts.groupby(["task", "prompt", "part"], sort=False)["direct"].sum()
        by_prompt = sums.unstack(fill_value=0.0).reindex(columns=list(PARTS), fill_value=0.0)
        by_prompt["whole"] = by_prompt.sum(axis=1)
        attention, mlp = by_prompt["attention"].abs(), (by_prompt["feature"] + by_prompt["error"]).abs()
        by_prompt["attention_share"] = attention / (attention + mlp)
        return by_prompt.groupby("task").mean().loc[self.tasks].rename_axis(columns=None).reset_index()

    @property
    def tokens(self) -> DataFrame:
        """For each task and position from the end: the mean share of walks that end at the token there, and the token,
        where it is the same on all prompts (else empty). Prompts that have no such position count as 0."""
        of: Any = self.flow[self.flow["layer"] == -1].assign(first=lambda t: t["token"])
        found = of.groupby(["task", "from_end"]).agg({"features": "sum", "token": "nunique", "first": "first"})
        n_prompts = self.flow.groupby("task")["prompt"].nunique()
        found["influence"] = found["features"] / found.index.get_level_values("task").map(n_prompts)
        found["token"] = found["first"].where(found["token"] == 1, "")
        return found.loc[self.tasks, ["token", "influence"]].reset_index()

    @property
    def quadrants(self) -> DataFrame:
        """For each task, layers (early: the first half) and positions (earlier, last): influence of features and of
        errors there (means over prompts), and error_share, of the two together (NaN where there is neither)."""
        of: Any = self.flow[self.flow["layer"] >= 0]
        late, last = of["layer"] * 2 >= self.info["n_layers"], of["from_end"] == -1
        of = of.assign(layers=np.where(late, "late", "early"), positions=np.where(last, "last", "earlier"))
        by_prompt = of.groupby(["task", "prompt", "layers", "positions"])[["features", "errors"]].sum()
        found = by_prompt.groupby(["task", "layers", "positions"]).mean()
        found["error_share"] = found["errors"] / (found["features"] + found["errors"])
        return found.loc[self.tasks].reset_index()

    @property
    def stages(self) -> DataFrame:
        """For each task and layer (-1 for tokens): influence of its features and errors (mean over prompts) and
        at_last, the share of it at the last position."""
        of: Any = self.flow.assign(influence=self.flow["features"] + self.flow["errors"])
        of["there"] = of["influence"].where(of["from_end"] == -1, 0.0)
        found = of.groupby(["task", "prompt", "layer"])[["influence", "there"]].sum().groupby(["task", "layer"]).mean()
        found["at_last"] = found.pop("there") / found["influence"]
        return found.loc[self.tasks].reset_index()

    def _draw(self, name: str) -> Figure:
        return getattr(self, f"_draw_{name}")()

    def _draw_heads(self) -> Figure:
        means: Any = self.heads.groupby(["task", "layer", "head"])["through"].mean()
        by_task = means.unstack(["layer", "head"]).loc[self.tasks].sort_index(axis=1)
        most = by_task.max().sort_values(ascending=False).index[:MOST_HEADS]
        shown_heads = by_task[[column for column in by_task.columns if column in set(most)]]
        figure, axes = _canvas(0.42 * shown_heads.shape[1], 0.4 * len(shown_heads))
        labels = [f"{layer}.{head}" for layer, head in shown_heads.columns]
        _heatmap(axes, shown_heads.to_numpy(), labels, self.tasks, "share of input through it")
        axes.set_xlabel("head (layer.head)")
        return figure

    def _draw_parts(self) -> Figure:
        shares = self.shares
        figure, axes = _canvas(1.1 * len(shares) + 1, 3.6)
        used = [part for part in PARTS if shares[part].abs().max() > 0]
        for i, part in enumerate(used):
            at = np.arange(len(shares)) + (i - (len(used) - 1) / 2) * 0.8 / len(used)
            axes.bar(at, shares[part], 0.8 / len(used), color=PALETTE[PARTS.index(part)], label=part)
        axes.plot(np.arange(len(shares)), shares["whole"], "k_", markersize=26, label="sum")
        axes.axhline(0, color=GREY, linewidth=0.8)
        axes.set_xticks(range(len(shares)), shares["task"], rotation=30, ha="right")
        axes.set_ylabel("direct contribution (logits)")
        axes.grid(axis="y", linewidth=0.3)
        figure.legend(loc="outside lower center", ncols=4)
        return figure

    def _draw_overlap(self) -> Figure:
        from matplotlib.figure import Figure

        n = len(self.tasks)
        figure = Figure(figsize=(max(9.0, 1.3 * n + 3), max(3.4, 0.5 * n + 1.8)), layout="constrained")
        both = self.overlap
        top = max(0.05, float(both[["weighted", "weighted_chance"]].max(axis=None)))
        for axes, column in zip(figure.subplots(1, 2), ("weighted", "weighted_chance"), strict=True):
            values = np.full((n, n), np.nan)
            for task, other, value in zip(both["task"], both["other"], both[column], strict=True):
                i, j = self.tasks.index(task), self.tasks.index(other)
                values[i, j] = values[j, i] = value
            _heatmap(axes, values, self.tasks, self.tasks, "overlap", numbers=True, top=top)
            axes.set_title({"weighted": "circuits, by influence", "weighted_chance": "by chance"}[column])
        return figure

    def _draw_tokens(self) -> Figure:
        of = self.tokens
        of = of[of["from_end"] >= -MOST_POSITIONS]
        values = of.pivot(index="task", columns="from_end", values="influence").loc[self.tasks]
        words = of.pivot(index="task", columns="from_end", values="token").loc[self.tasks].fillna("").to_numpy()
        figure, axes = _canvas(0.85 * values.shape[1], 0.5 * len(values))
        _heatmap(axes, values.to_numpy(), list(values.columns), self.tasks, "share of walks")
        half = np.nanmax(values.to_numpy()) / 2
        for i, j in np.ndindex(words.shape):
            word = words[i, j].strip()
            light = bool(values.to_numpy()[i, j] > half)
            axes.text(j, i, f"{word:.12}", ha="center", va="center", fontsize=7, color="white" if light else "black")
        axes.set_xlabel("position, counted from the end; a token is named where all prompts of the task share it")
        return figure

    def _draw_errors(self) -> Figure:
        of = self.quadrants.assign(where=lambda t: t["layers"] + " layers,\n" + t["positions"] + " pos.")
        values = of.pivot(index="task", columns="where", values="error_share").loc[self.tasks]
        weight = of.assign(all=of["features"] + of["errors"]).pivot(index="task", columns="where", values="all")
        figure, axes = _canvas(1.4 * values.shape[1], 0.42 * len(values))
        columns = list(values.columns)
        _heatmap(axes, values.to_numpy(), columns, self.tasks, "share of errors", numbers=True, top=1.0)
        for i, j in np.ndindex(values.shape):
            text = f"of {weight.loc[self.tasks].iloc[i, j]:.2f}"
            light = bool(values.iloc[i, j] > 0.5)
            axes.text(j + 0.27, i, text, ha="center", va="center", fontsize=7, color="white" if light else GREY)
        axes.tick_params(axis="x", rotation=0)
        axes.set_title("share of errors, of the influence of features and errors there", fontsize=10)
        return figure

    def _draw_flow(self) -> Figure:
        from matplotlib.figure import Figure

        of = self.flow[self.flow["from_end"] >= -MOST_POSITIONS]
        of = of.assign(influence=of["features"] + of["errors"])
        by_prompt: Any = of.groupby(["task", "prompt", "layer", "from_end"])["influence"].sum()
        n_prompts = of.groupby("task")["prompt"].nunique()
        n, wide = len(self.tasks), min(len(self.tasks), 4)
        figure = Figure(figsize=(2.9 * wide + 1, 2.4 * math.ceil(n / wide) + 0.4), layout="constrained")
        panels = figure.subplots(math.ceil(n / wide), wide, squeeze=False).flatten()
        tables = {t: by_prompt.loc[t].groupby(["layer", "from_end"]).sum().unstack() / n_prompts[t] for t in self.tasks}
        top = max(float(np.nanmax(table.to_numpy())) for table in tables.values())
        image = None
        for axes, (task, table) in zip(panels, tables.items(), strict=False):
            image = axes.imshow(table.to_numpy(), cmap="Blues", vmin=0, vmax=top, origin="lower", aspect="auto")
            axes.set_yticks(range(len(table)), ["tokens", *(str(layer) for layer in table.index[1:])])
            step = math.ceil(table.shape[1] / 6)
            ticks = list(range(table.shape[1] - 1, -1, -step))
            axes.set_xticks(ticks, [str(table.columns[i]) for i in ticks])
            axes.set_title(task, fontsize=10)
        for axes in panels[n:]:
            axes.set_axis_off()
        if image is not None:
            figure.colorbar(image, ax=list(panels), label="influence", shrink=0.8)
        figure.supxlabel("position, counted from the end", fontsize=10)
        figure.supylabel("layer", fontsize=10)
        return figure

    def _write_numbers(self, folder: Path) -> None:
        for name in ("heads", "parts", "flow", "overlap", "shares", "tokens", "quadrants", "stages"):
            getattr(self, name).to_csv(folder / f"{name}.csv", index=False)
        (folder / "info.json").write_text(json.dumps(self.info, indent=1) + "\n")

    def _in_short(self) -> str:
        own = self.overlap["task"] == self.overlap["other"]
        within, between = self.overlap[own]["weighted"].mean(), self.overlap[~own]["weighted"].mean()
        n = sum(len(of) for of in self.info["prompts"].values())
        beside = "" if own.all() else f", {between:.2f} between them"
        return f"tasks: {len(self.tasks)}, {n} prompts; overlap {within:.2f} within tasks{beside}"

    def _tables(self) -> dict[str, DataFrame]:
        return {"direct contributions (logits)": self.shares, "overlap": self.overlap, "stages of flow": self.stages}


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(5.0, width + 2.5), max(3.2, height + 1.4)), layout="constrained")
    return figure, figure.subplots()


def _heatmap(
    axes: Axes,
    values: np.ndarray,
    columns: Sequence[object],
    rows: Sequence[str],
    label: str,
    *,
    numbers: bool = False,
    top: float | None = None,
) -> None:
    highest = float(np.nanmax(values)) if top is None else top
    image = axes.imshow(values, cmap="Blues", vmin=0, vmax=highest, aspect="auto")
    axes.set_xticks(range(len(columns)), [str(c) for c in columns], rotation=60 if len(columns) > 4 else 0)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.figure.colorbar(image, ax=axes, label=label)
    for i, j in np.ndindex(values.shape):
        if numbers and not math.isnan(values[i, j]):
            colour = "white" if values[i, j] > highest / 2 else "black"
            axes.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", fontsize=8, color=colour)


def compare_tasks(
    model: HookedModel,
    clt: CrossLayerTranscoder,
    prompts: Mapping[str, Prompt | Sequence[Prompt]],
    targets: Mapping[str, Sequence[int | str]] | None = None,
    *,
    node_threshold: float = 0.8,
    max_feature_nodes: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> TaskComparison:
    """Trace a few prompts of each of several tasks, and see what their graphs have in common.

    Hooks of the user's own are set aside.

    Args:
        model: a HookedTransformer or TransformerBridge.
        clt: a CLT of this model.
        prompts: by task; texts or token ids.
        targets: of each prompt the token that its graph is of; None for the model's own likeliest.
        node_threshold: as for `graph.prune`: share of influence that a circuit keeps.
        max_feature_nodes: as for `attribute`.
        seed: of the features of chance.
        progress: show a bar where it takes longer than 2 s.

    Raises:
        ConfigError, DatasetError, PromptError, TokenizerMissing, TargetError: an argument out of range, no prompts, or
            not one target for each.
        CLTMismatch, HookNotFound, AlreadyAttached: the CLT is of another model, or one is attached.
        ModelUnsupported, LocalModelMismatch, MemoryLimit: as for `attribute`; or attention has no W_V and W_O.
    """
    check_fit(model, clt)
    require_free(model)
    if not isinstance(prompts, Mapping) or not prompts:
        raise ConfigError(f"prompts is {shown(prompts)}: give the prompts of each task, by its name.")
    if targets is not None and not isinstance(targets, Mapping):
        raise ConfigError(
            f"targets is {shown(targets)}: give the targets of each task, by its name, or leave them out."
        )
    node_threshold, seed = as_share("node_threshold", node_threshold), as_seed("seed", seed)
    max_feature_nodes = as_whole("max_feature_nodes", max_feature_nodes, 1, none="all")
    progress = as_switch("progress", progress)
    texts = {}
    for task, of in prompts.items():
        try:
            texts[str(task)] = read_prompts(model, of)
        except (DatasetError, PromptError) as error:
            raise type(error)(f"{task}: {error}") from error
    wanted = {task: [likeliest(model, tokens) for tokens in of] for task, of in texts.items() if targets is None}
    for task, of in texts.items():
        if targets is not None:
            given = targets.get(task)
            wanted[task] = [] if given is None else as_token_ids(model, given)
        if len(wanted[task]) != len(of):
            raise DatasetError(f"There are {len(wanted[task])} targets for {len(of)} prompts of {task}: give one each.")
    for task in targets or ():
        if task not in texts:
            raise ConfigError(
                f"targets has {task!r:.40}, and prompts has not: give targets of tasks that are in prompts."
            )
    generator = np.random.default_rng(seed)
    tables: dict[str, list[DataFrame]] = {"heads": [], "parts": [], "flow": []}
    circuits: dict[str, list[_Circuit]] = {task: [] for task in texts}
    n = sum(map(len, texts.values()))
    with tqdm(total=n, desc="Tasks", unit=" prompts", delay=2.0, disable=not progress) as bar:
        for task, number, tokens, target in (
            (task, i, tokens, wanted[task][i]) for task, of in texts.items() for i, tokens in enumerate(of)
        ):
            graph = attribute(model, clt, tokens, target, max_feature_nodes=max_feature_nodes, progress=False)
            kept = graph.prune_masks(node_threshold).nodes
            heads, parts = _find_heads_and_parts(graph, model, clt, kept)
            for name, table in (("heads", heads), ("parts", parts), ("flow", _find_flow(graph))):
                table.insert(0, "task", task)
                table.insert(1, "prompt", number)
                tables[name].append(table)
            circuits[task].append(_find_circuit(graph, kept, generator))
            bar.update()
    info = {
        "model_name": model_name(model),
        "prompts": {task: [as_text(model, tokens) for tokens in of] for task, of in texts.items()},
        "targets": {task: token_strings(model, torch.tensor(ids)) for task, ids in wanted.items()},
        "node_threshold": node_threshold,
        "n_layers": clt.cfg.n_layers,
        "seed": seed,
    }
    whole = {name: concat(of, ignore_index=True) for name, of in tables.items()}
    return TaskComparison(**whole, overlap=_find_overlap(circuits, generator), info=info)


def _find_heads_and_parts(
    graph: AttributionGraph, model: HookedModel, clt: CrossLayerTranscoder, kept: Tensor
) -> tuple[DataFrame, DataFrame]:
    nodes = graph.nodes
    features = torch.nonzero(kept & graph.expanded & nodes.is_kind(NodeKind.FEATURE)).flatten()
    effects, walks = find_head_effects(graph, model, clt, features), walk_upstream(graph)
    o = walks.output[effects.nodes].double()
    through: Float[Tensor, "n_layers n_heads"] = (
        (o / walks.inputs[effects.nodes])[:, None, None] * effects.total.abs()
    ).sum(dim=0) / o.sum()
    direct = effects.direct[0]
    layer, head = (at.flatten().tolist() for at in torch.meshgrid(*map(torch.arange, direct.shape), indexing="ij"))
    heads = {"layer": layer, "head": head, "direct": direct.flatten().tolist(), "through": through.flatten().tolist()}
    by_node = {
        "part": [NodeKind(kind).name.lower() for kind in nodes.kind.tolist()],
        "layer": nodes.layer.tolist(),
        "direct": effects.direct_nodes[0].tolist(),
    }
    parts: Any = DataFrame(by_node).groupby(["part", "layer"], as_index=False)["direct"].sum()
    attention = {"part": "attention", "layer": range(len(direct)), "direct": direct.sum(dim=1).tolist()}
    return DataFrame(heads), concat([DataFrame(attention), parts[parts["part"] != "logit"]], ignore_index=True)


def _find_flow(graph: AttributionGraph) -> DataFrame:
    nodes, n_pos = graph.nodes, len(graph.tokens)
    influence = (graph.influence() / graph.logit_weights.sum()).double()
    found = torch.zeros(2, graph.info["n_layers"] + 1, n_pos, dtype=torch.float64)
    for row, kinds in enumerate(([NodeKind.FEATURE, NodeKind.TOKEN], [NodeKind.ERROR])):
        at = nodes.is_kind(*kinds)
        places = (torch.full_like(nodes.pos[at], row).cpu(), nodes.layer[at].cpu() + 1, nodes.pos[at].cpu())
        found.index_put_(places, influence[at].cpu(), accumulate=True)
    layer, pos = torch.meshgrid(torch.arange(-1, found.shape[1] - 1), torch.arange(n_pos), indexing="ij")
    table = {"layer": layer.flatten().tolist(), "pos": pos.flatten().tolist()}
    table |= {"from_end": (pos - n_pos).flatten().tolist(), "token": graph.prompt_tokens * found.shape[1]}
    return DataFrame(table | {"features": found[0].flatten().tolist(), "errors": found[1].flatten().tolist()})


# -- overlap


Influences = dict[tuple[int, int], float]
"""Of features, by layer and number, summed over positions."""


class _Circuit(NamedTuple):
    kept: Influences
    drawn: Influences
    """By chance."""


def _find_circuit(graph: AttributionGraph, kept: Tensor, generator: np.random.Generator) -> _Circuit:
    found: Influences = {}
    active: dict[int, set[int]] = {}
    influence, is_kept = graph.influence().tolist(), kept.tolist()
    for number in graph.nodes.where(NodeKind.FEATURE).tolist():
        layer, feature = int(graph.nodes.layer[number]), int(graph.nodes.index[number])
        active.setdefault(layer, set()).add(feature)
        if is_kept[number]:
            found[layer, feature] = found.get((layer, feature), 0.0) + influence[number]
    whole = sum(found.values()) or 1.0
    found = {place: value / whole for place, value in found.items()}
    drawn: Influences = {}
    for layer, among in active.items():
        values = [value for (at, _), value in found.items() if at == layer]
        chosen = generator.choice(sorted(among), len(values), replace=False)
        drawn |= {(layer, int(feature)): value for feature, value in zip(chosen, values, strict=True)}
    return _Circuit(found, drawn)


def _find_overlap(circuits: Mapping[str, Sequence[_Circuit]], generator: np.random.Generator) -> DataFrame:
    rows = []
    for task, other in combinations_with_replacement(circuits, 2):
        ours, theirs = circuits[task], circuits[other]
        pairs = [(a, b) for a in range(len(ours)) for b in range(len(theirs)) if task != other or a < b]
        chosen = generator.permutation(len(pairs))[:MOST_PAIRS]
        found = [
            (*_overlap(ours[a].kept, theirs[b].kept), *_overlap(ours[a].drawn, theirs[b].drawn))
            for a, b in (pairs[i] for i in chosen)
        ]
        rows.append((task, other, len(found), *(np.mean(found, axis=0) if found else [math.nan] * 4)))
    columns = ["task", "other", "n_pairs", "jaccard", "weighted", "jaccard_chance", "weighted_chance"]
    return DataFrame(rows, columns=columns)


def _overlap(one: Influences, other: Influences) -> tuple[float, float]:
    """Jaccard index, and the same by influence."""
    union = one.keys() | other.keys()
    lesser = sum(min(one.get(place, 0.0), other.get(place, 0.0)) for place in union)
    greater = sum(max(one.get(place, 0.0), other.get(place, 0.0)) for place in union)
    return len(one.keys() & other.keys()) / max(1, len(union)), lesser / greater if greater else 0.0
