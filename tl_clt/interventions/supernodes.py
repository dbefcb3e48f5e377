"""`measure_supernodes`: what groups of features do together, beside what a graph says and what groups of chance do.

All members of a group are changed at once (`joint`), and each by itself (`singles`, the sum of what follows). What is
measured is the change of the graph's targets, each as what it is (for tokens the logit less the mean logit), averaged
by their weights in the graph. The graph predicts of it

    direct = (scale - 1) sum over members s of E[t, s]      along direct edges alone
    total  = the same through all paths of traced features, each passing on in proportion to its activation, members
             as they are set

`direct` is exact where all MLP outputs are held (`through_layer="all"`) with `freeze="all"`; `total` where features are
computed anew (`through_layer=None`) with `freeze="all"`, as long as no feature switches on or off. `influence` is the
sum of the members' in the graph, with the targets' weights made to sum to 1. It has no sign, and is compared with the
size of the effect.

A group of chance has as many features of the same graph that are not in the group, of the same layers and positions
where there are such. Correlations over groups are given for both: a graph's influence, and what it predicts, agree with
effects in groups of chance as well, so that only what is beyond says something of the groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from pandas import DataFrame
from torch import Tensor
from tqdm.auto import tqdm

from tl_clt.arguments import as_choice, as_number, as_seed, as_switch, as_whole
from tl_clt.attribution import AttributionGraph, DirectionTarget, Node, NodeKind
from tl_clt.attribution.supernodes import Supernodes, as_supernodes, draw_alike, score_subgraph
from tl_clt.interventions.hooks import ThroughLayer
from tl_clt.interventions.intervene import intervene
from tl_clt.interventions.intervention import Intervention
from tl_clt.interventions.validation import (
    LOGITS_AT_ONCE,
    change_of_target,
    predict_joint,
    require_same_features,
    require_testable,
    targets_of,
)
from tl_clt.interventions.validation_report import select
from tl_clt.lens import Freeze, HookedModel, model_name
from tl_clt.replacement import check_fit
from tl_clt.report import GREY, PALETTE, Report
from tl_clt.transcoder import CrossLayerTranscoder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FigureName = Literal["effects"]
Role = Literal["group", "random"]
ROLES: tuple[Role, ...] = get_args(Role)
FEWEST = 3
"""Groups that a correlation is of at least."""
PREDICTIONS = ("influence", "direct", "total", "singles")
"""What joint effects are compared with; influence with their size."""
MOST_RANDOM = 1000
"""Groups of chance beside one: more tell no more."""
COLUMNS = [
    *("supernode", "role", "draw", "n_features", "influence", "direct", "total", "joint", "singles", "answer_kept"),
]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SupernodeReport(Report[FigureName]):
    """What groups of a graph's features do, beside groups of chance.

    Figure: "effects" (influence against the size of the joint effect; sum of single effects against it). `save` writes
    it, supernodes.csv (`table`), agreement.csv and scores.csv.
    """

    FIGURES: ClassVar[tuple[FigureName, ...]] = get_args(FigureName)

    table: DataFrame
    """One row a group: supernode (its name, or that of the group which a random one stands beside), role ("group" or
    "random"), draw (-1 for groups), n_features, influence (summed), direct, total (predicted changes of the targets),
    joint (measured, all members changed at once), singles (sum of the members' changes, each changed by itself),
    answer_kept (whether the likeliest token after the last position stays)."""

    scores: DataFrame
    """Of the subgraph of all groups, other features counting as errors, and of as many random features: role, draw,
    n_features, replacement, completeness."""

    info: dict[str, Any]
    """Model, prompt, scale, through_layer, freeze and seed."""

    @property
    def agreement(self) -> DataFrame:
        """How predictions agree with the joint effects that were measured, over groups of each role.

        Columns role, prediction (influence, which is compared with the effect's size; direct, total, singles),
        n_groups, pearson and spearman, which are NaN where there are fewer than three groups or all are alike.
        """
        rows = []
        for role in ROLES:
            groups = select(self.table, role=role)
            for name in PREDICTIONS:
                predicted, joint = groups[name], groups["joint"]
                effect = joint.abs() if name == "influence" else joint
                both = [math.nan, math.nan]
                if len(groups) >= FEWEST and min(predicted.nunique(), effect.nunique()) > 1:
                    both = [
                        float(predicted.corr(effect, method="pearson")),
                        float(predicted.corr(effect, method="spearman")),
                    ]
                rows.append((role, name, len(groups), *both))
        return DataFrame(rows, columns=["role", "prediction", "n_groups", "pearson", "spearman"])

    def _draw(self, name: str) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for i, role in enumerate(reversed(ROLES)):
            of = select(self.table, role=role)
            look: dict[str, Any] = {"color": PALETTE[1 - i], "alpha": 0.8, "zorder": i + 2, "label": role}
            left.plot(of["influence"], of["joint"].abs(), "xo"[i], **look)
            right.plot(of["singles"], of["joint"], "xo"[i], **look)
        for axes in (left, right):
            axes.axhline(0, color=GREY, linewidth=0.8)
            axes.grid(linewidth=0.3)
        left.set(xlabel="influence (sum of members)", ylabel="size of joint effect")
        right.set(xlabel="sum of single effects", ylabel="joint effect")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
        return figure

    def _write_numbers(self, folder: Path) -> None:
        self.table.to_csv(folder / "supernodes.csv", index=False)
        self.agreement.to_csv(folder / "agreement.csv", index=False)
        self.scores.to_csv(folder / "scores.csv", index=False)

    def _in_short(self) -> str:
        groups = select(self.table, role="group")
        whole = self.scores.iloc[0]
        return (
            f"{len(groups)} groups of {int(groups['n_features'].sum())} features; replacement"
            f" {whole['replacement']:.3f}, completeness {whole['completeness']:.3f}"
        )

    def _tables(self) -> dict[str, DataFrame]:
        groups = select(self.table, role="group")
        return {"groups": groups, "agreement with joint effects": self.agreement, "scores of the subgraph": self.scores}


class _Group(NamedTuple):
    """Features that are changed together."""

    supernode: str
    role: Role
    draw: int
    nodes: Sequence[int]


@torch.no_grad()
def measure_supernodes(
    model: HookedModel,
    clt: CrossLayerTranscoder,
    graph: AttributionGraph,
    supernodes: Mapping[str, Iterable[int | Node]],
    *,
    n_random: int = 8,
    scale: float = 0.0,
    through_layer: ThroughLayer = None,
    freeze: Freeze = "attention",
    batch_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> SupernodeReport:
    """Change all features of each group at once and one by one, and compare with the graph and with random groups.

    Random groups are of the graph's own features: give a pruned graph for a control among those that matter, and a
    whole one for scores of the subgraph in all that there is. Hooks of the user's are set aside.

    Args:
        model: a HookedTransformer or TransformerBridge.
        clt: the CLT that the graph was traced with.
        graph: not a contrastive one; its targets are what is measured.
        supernodes: of its features, from `find_supernodes` or by hand.
        n_random: random groups beside each, at most 1,000, and draws for the scores; 0 for none.
        scale: what activations are multiplied by; 0 ablates.
        through_layer, freeze: as for `intervene`.
        batch_size: changes in one pass; None for as many as make 256 MiB of logits, at most 64.
        seed: of the random groups.
        progress: show a bar where it takes longer than 2 s.

    Raises:
        ConfigError: an argument out of range, a contrastive graph, or groups that are not of its features.
        TargetError: the graph does not tell what its targets are.
        CLTMismatch: the graph is of another model or CLT.
        HookNotFound, InterventionError: as for `intervene`.
    """
    groups = as_supernodes(graph, supernodes)
    check_fit(model, clt)
    scale = as_number("scale", scale)
    require_testable(graph, scale)
    n_random = as_whole("n_random", n_random, 0, MOST_RANDOM, why="each a run, and one for each of its features")
    seed = as_seed("seed", seed)
    batch_size = as_whole("batch_size", batch_size, 1, none="as many as fit")
    freeze, progress = as_choice("freeze", freeze, get_args(Freeze)), as_switch("progress", progress)
    generator = torch.Generator().manual_seed(seed)
    every = [_Group(name, "group", -1, nodes) for name, nodes in groups.items()]
    every += [
        _Group(name, "random", draw, drawn)
        for name, nodes in groups.items()
        for draw in range(n_random)
        if (drawn := draw_alike(graph, nodes, generator))
    ]
    singles = {number: (number,) for group in every for number in group.nodes}
    sets = list(dict.fromkeys([*(tuple(group.nodes) for group in every), *singles.values()]))
    measure = _Measurement(graph, model, clt, scale, through_layer, freeze)
    rows = batch_size or max(1, min(64, LOGITS_AT_ONCE // (len(graph.tokens) * model.cfg.d_vocab)))
    found: dict[tuple[int, ...], _Effect] = {}
    with tqdm(total=len(sets), desc="Supernodes", unit=" changes", delay=2.0, disable=not progress) as bar:
        for start in range(0, len(sets), rows):
            chunk = sets[start : start + rows]
            found |= dict(zip(chunk, measure(chunk), strict=True))
            bar.update(len(chunk))
    influence = graph.influence() / graph.logit_weights.sum()
    table = DataFrame(
        [
            (
                *(group.supernode, group.role, group.draw, len(group.nodes)),
                float(influence[list(group.nodes)].double().sum()),
                *measure.predict(group.nodes),
                found[tuple(group.nodes)].change,
                sum(found[number,].change for number in group.nodes),
                found[tuple(group.nodes)].answer_kept,
            )
            for group in every
        ],
        columns=COLUMNS,
    )
    info = {
        "model_name": model_name(model),
        "prompt": graph.info.get("prompt", " ".join(graph.prompt_tokens)),
        "scale": scale,
        "through_layer": through_layer,
        "freeze": freeze,
        "seed": seed,
    }
    return SupernodeReport(table=table, scores=_scores(graph, groups, n_random, generator), info=info)


def _scores(graph: AttributionGraph, groups: Supernodes, n_random: int, generator: torch.Generator) -> DataFrame:
    draws = [("supernodes", -1, groups.nodes)]
    draws += [("random", draw, draw_alike(graph, groups.nodes, generator, apart=False)) for draw in range(n_random)]
    rows = [(role, draw, len(nodes), *score_subgraph(graph, nodes)) for role, draw, nodes in draws]
    return DataFrame(rows, columns=["role", "draw", "n_features", "replacement", "completeness"])


class _Effect(NamedTuple):
    change: float
    """Of the targets, averaged by their weights."""
    answer_kept: bool


class _Measurement:
    """Changes of several sets of a graph's features in one pass, one set in each row of a batch of the same prompt."""

    def __init__(
        self,
        graph: AttributionGraph,
        model: HookedModel,
        clt: CrossLayerTranscoder,
        scale: float,
        through_layer: ThroughLayer,
        freeze: Freeze,
    ) -> None:
        self.graph, self.model, self.clt = graph, model, clt
        self.scale = scale
        self.through_layer: ThroughLayer = through_layer
        self.freeze: Freeze = freeze
        self.named = targets_of(graph)
        self.hooks = list(dict.fromkeys(t.hook for t in self.named if isinstance(t, DirectionTarget)))
        self.features = graph.nodes.take(graph.nodes.where(NodeKind.FEATURE))
        weights = graph.logit_weights[graph.nodes.where(NodeKind.LOGIT)].double()
        self.weights: Float[Tensor, " n_targets"] = weights / weights.sum()

    def __call__(self, sets: Sequence[Sequence[int]]) -> Iterator[_Effect]:
        changes = [intervention for row, nodes in enumerate(sets) for intervention in self._changes(nodes, row)]
        tokens = self.graph.tokens.expand(len(sets), -1)
        bos = None if self.through_layer is None else self.graph.info.get("bos")
        effect = intervene(
            *(self.model, self.clt, tokens, changes, self.through_layer, self.freeze), record=self.hooks, bos=bos
        )
        require_same_features(self.features, effect)
        hidden_change = effect.hidden_pre - effect.baseline_hidden_pre
        heights = torch.stack([change_of_target(effect, hidden_change, target) for target in self.named], dim=1)
        change = heights @ self.weights.to(heights)
        answers, before = (logits[:, -1].argmax(dim=-1) for logits in (effect.logits, effect.baseline_logits))
        return map(_Effect, change.tolist(), (answers == before).tolist())

    def _changes(self, nodes: Sequence[int], row: int) -> Iterator[Intervention]:
        """One for each layer and position."""
        at: dict[tuple[int, int], list[int]] = {}
        for number in nodes:
            node = self.graph.nodes[number]
            at.setdefault((node.layer, node.pos), []).append(node.index)
        known = self.graph.info.get("clt_fingerprint")
        for (layer, pos), features in at.items():
            yield Intervention(layer=layer, pos=pos, feature=features, scale=self.scale, prompt=row, clt=known)

    def predict(self, nodes: Sequence[int]) -> tuple[float, float]:
        """direct and total."""
        graph, targets = self.graph, self.graph.nodes.where(NodeKind.LOGIT)
        sources = torch.tensor(nodes, device=targets.device)
        direct = torch.stack([graph.out_edges(number)[targets] for number in nodes]).double().sum(dim=0)
        total = predict_joint(graph, sources, self.scale)[targets].double()
        return float((self.scale - 1) * direct @ self.weights), float(total @ self.weights)
