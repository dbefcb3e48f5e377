"""Pruning by what the model does: the smallest graph whose circuit keeps a share of the measured behaviour; and which
features several such graphs have in common.

Thresholds of `AttributionGraph.prune` are shares of influence, which do not say how much of the answer is left. Here
the threshold is chosen by the circuit itself: the nodes of the pruned graph stay, all other features and errors are
ablated in the model (as in `curves`, with the same measure m and the same nodes in question), and

    f = (m(C) - m(0)) / (m(N) - m(0))

is to be a given share at least. The threshold is found by bisection over the ranking of nodes by influence. f need not
rise with every node: what is found keeps the share, and the next smaller circuit does not. Nor is 1 the most: f is
above where what is ablated spoke against the answer; then the circuit keeps the share, but is not what the model does.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
from jaxtyping import Int
from pandas import DataFrame
from torch import Tensor

from tl_clt.arguments import as_choice, as_seed, as_several, as_share, as_switch, as_whole, shown
from tl_clt.attribution import AttributionGraph, DifferenceTarget, NodeKind, TokenTarget
from tl_clt.attribution.pruning import list_node_thresholds
from tl_clt.errors import CLTMismatch, ConfigError, PromptError, TargetError
from tl_clt.evaluation.circuits import Ablation, Clean, Measured, Metric, NodeCircuits, PromptTask
from tl_clt.interventions import Freeze
from tl_clt.interventions.validation import targets_of
from tl_clt.lens import HookedModel, Prompt, to_tokens
from tl_clt.replacement import check_fit, require_free
from tl_clt.transcoder import CrossLayerTranscoder

SMALLEST_EFFECT = 1e-6
"""Of all nodes on the measure, beside its size: below, f would be a ratio of rounding errors."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PrunedToBehaviour:
    """What `prune_to_behaviour` found."""

    graph: AttributionGraph
    """The pruned graph."""

    node_threshold: float
    """That it was pruned with."""

    faithfulness: float
    """f of its circuit."""

    reached: bool
    """Whether that is the share asked for. Else no threshold of the graph keeps as much, and it is the largest."""

    n_kept: int
    """Features and errors after position 0 in it: the circuit."""

    n_nodes: int
    """The same in the graph as it was given."""

    n_random: int | None
    """How many nodes, taken in a random order, keep as much; None where not even all of them do."""

    tried: DataFrame
    """What was measured, by n_kept: node_threshold, n_kept, faithfulness, answer (whether the likeliest token is the
    model's)."""

    def __repr__(self) -> str:
        said = "" if self.reached else ", not reached"
        return (
            f"PrunedToBehaviour({self.n_kept} of {self.n_nodes} nodes keep f={self.faithfulness:.3f}{said};"
            f" node_threshold={self.node_threshold:.6g}, {self.n_random} at random)"
        )


@torch.no_grad()
def prune_to_behaviour(
    model: HookedModel,
    clt: CrossLayerTranscoder,
    graph: AttributionGraph,
    share: float = 0.9,
    *,
    edge_threshold: float = 0.98,
    log_prob: bool = False,
    counterfactual: Prompt | None = None,
    freeze: Freeze = "attention",
    batch_size: int = 8,
    seed: int = 0,
) -> PrunedToBehaviour:
    """Prune a graph as far as its circuit, measured in the model itself, keeps a share of the behaviour.

    Hooks of the user's own are set aside.

    Args:
        model: a HookedTransformer or TransformerBridge.
        clt: the CLT that the graph was traced with.
        graph: of a prompt's next token, or of a difference of two: its likeliest target is measured.
        share: of the behaviour that is to stay: f of the circuit.
        edge_threshold: as for `graph.prune`.
        log_prob: measure the log-probability of the token, and not its logit less the mean logit.
        counterfactual: of a contrastive graph the prompt that it was traced with as `contrast`, where what is ablated
            takes its values from. None for zeros.
        freeze: as for `measure_curves`.
        batch_size: circuits in one pass; as many divide what is left to search.
        seed: of the random order that the number of nodes is compared with.

    Raises:
        ConfigError: an argument out of range, a contrastive graph without its other prompt or the reverse, or nodes
            that make no difference to what is measured.
        TargetError: the graph's first target is no token, or difference, after the last position.
        CLTMismatch, HookNotFound: the graph is of another CLT, or that of another model.
        PromptError, TokenizerMissing: a counterfactual that the model cannot take, or of another length.
        AlreadyAttached: the model has a CLT attached: it would not be the model itself that runs.
    """
    if not isinstance(graph, AttributionGraph):
        raise ConfigError(f"The graph is {shown(graph)}: give an AttributionGraph, then its model and CLT.")
    check_fit(model, clt)
    require_free(model)
    if graph.info.get("clt_fingerprint", clt.fingerprint()) != clt.fingerprint():
        raise CLTMismatch("The graph is of another CLT, whose features mean other things. Give the one it is of.")
    share, edge_threshold = as_share("share", share), as_share("edge_threshold", edge_threshold)
    target = _target(graph)
    metric: Metric = "log_prob" if as_switch("log_prob", log_prob) else "logit"
    if isinstance(target, DifferenceTarget):
        if metric == "log_prob":
            raise ConfigError("log_prob is True, but the graph's target is a difference of two tokens: leave it out.")
        metric = "difference"
    how = Ablation(
        metric=metric,
        errors="nodes",
        freeze=as_choice("freeze", freeze, get_args(Freeze)),
        batch_size=as_whole("batch_size", batch_size, 1),
    )
    seed = as_seed("seed", seed)
    task = _task(model, graph, target, counterfactual)
    circuits = NodeCircuits(model, clt, task, how, graph)
    _require_contrast(graph, circuits.away)
    n = circuits.n
    whole, [empty] = circuits.whole, circuits.measure([torch.arange(0)])
    if not abs(whole - empty.value) > SMALLEST_EFFECT * max(1.0, abs(whole)):
        raise ConfigError(
            f"What is measured is {whole:.6g} with all of the graph's nodes and without any: there is no behaviour to"
            " keep a share of."
        )

    def keep(kept: Sequence[Int[Tensor, " _"]]) -> list[_Kept]:
        found = circuits.measure(kept)
        return [
            _Kept(len(c), (m.value - empty.value) / (whole - empty.value), m) for c, m in zip(kept, found, strict=True)
        ]

    thresholds = list_node_thresholds(graph)
    tried: dict[float, _Kept] = {}

    def keep_up_to(levels: Sequence[int]) -> list[float]:
        with warnings.catch_warnings():
            # Of reduced graphs, whose largest thresholds keep all there is; what they keep is measured here.
            warnings.filterwarnings("ignore", message="The graph is sure of")
            masks = [graph.prune_masks(thresholds[level], edge_threshold).nodes for level in levels]
        found = keep([torch.nonzero(mask[circuits.candidates.number]).flatten().cpu() for mask in masks])
        tried.update({thresholds[level]: of for level, of in zip(levels, found, strict=True)})
        return [of.faithfulness for of in found]

    level = search(keep_up_to, len(thresholds), share, how.batch_size)
    reached = level is not None
    chosen = thresholds[-1 if level is None else level]
    if not reached:
        warnings.warn(
            f"No threshold keeps {share:g} of the behaviour: all that the graph's edges tell keep"
            f" f={tried[chosen].faithfulness:.6g}. Give a smaller share, or a whole graph, or edge_threshold=1.",
            stacklevel=2,
        )
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    at_random = search(
        lambda counts: [of.faithfulness for of in keep([order[: count + 1] for count in counts])],
        n,
        share,
        how.batch_size,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The graph is sure of")
        pruned = graph.prune(chosen, edge_threshold)
    columns = ["node_threshold", "n_kept", "faithfulness", "answer"]
    rows = [(at, of.n_kept, of.faithfulness, of.measured.answer) for at, of in sorted(tried.items())]
    return PrunedToBehaviour(
        graph=pruned,
        node_threshold=chosen,
        faithfulness=tried[chosen].faithfulness,
        reached=reached,
        n_kept=tried[chosen].n_kept,
        n_nodes=n,
        n_random=None if at_random is None else at_random + 1,
        tried=DataFrame(rows, columns=columns),
    )


class _Kept(NamedTuple):
    n_kept: int
    faithfulness: float
    measured: Measured


def _target(graph: AttributionGraph) -> TokenTarget | DifferenceTarget:
    """The first target, where it is what comes after the last position."""
    target = targets_of(graph)[int(graph.logit_probs.argmax())]
    if not isinstance(target, (TokenTarget, DifferenceTarget)) or target.pos % len(graph.tokens) + 1 != len(
        graph.tokens
    ):
        raise TargetError(
            f"The graph's likeliest target is {target}: only what comes after the last position can be measured here,"
            " a token or a difference of two."
        )
    return target


def _task(
    model: HookedModel, graph: AttributionGraph, target: TokenTarget | DifferenceTarget, counterfactual: Prompt | None
) -> PromptTask:
    other = None if counterfactual is None else to_tokens(model, counterfactual)
    if other is not None and len(other) != len(graph.tokens):
        raise PromptError(
            f"The graph's prompt has {len(graph.tokens)} tokens and the counterfactual {len(other)}: activations are"
            " exchanged position by position, so give one of the same length."
        )
    if isinstance(target, DifferenceTarget):
        return PromptTask(graph.tokens, int(target.plus), other, int(target.minus))
    return PromptTask(graph.tokens, int(target.token), other, None)


def _require_contrast(graph: AttributionGraph, away: Clean | None) -> None:
    """Raise unless a graph has the features of both prompts, or of one where there is no other: a feature that is
    active on the other prompt alone, and is no node, would be switched on in every circuit."""
    there = graph.contrast_activation
    if away is not None and there is not None:
        nodes = graph.nodes.take(graph.nodes.where(NodeKind.FEATURE))
        acts = away.acts[nodes.pos, nodes.layer, nodes.index].to(there.dtype)
        if torch.allclose(acts, there[graph.nodes.where(NodeKind.FEATURE)], rtol=1e-2, atol=1e-3):
            return
    elif away is None and there is None:
        return
    raise ConfigError(
        "counterfactual is to be the prompt that the graph was traced with as `contrast`, and None for a graph that was"
        " traced without: only then is every feature that is ablated a node of it. Trace the prompt with it, or leave"
        " it out."
    )


def search(keeps: Callable[[Sequence[int]], list[float]], n: int, share: float, at_once: int = 1) -> int | None:
    """The number from 0 to n - 1 from which on a share is kept, by bisection (into at_once + 1 parts); None where not
    even the last keeps it.

    Where what is kept does not rise throughout, a number that keeps the share, while the one before, or the last that
    was tried below, does not.

    Args:
        keeps: for some numbers, what each keeps.
        n: how many numbers there are.
        share: to be kept.
        at_once: numbers asked about at once.
    """
    if n == 0 or keeps([n - 1])[0] < share:
        return None
    low, high = -1, n - 1
    while high - low > 1:
        parts = min(at_once, high - low - 1) + 1
        asked = [low + math.ceil((high - low) * i / parts) for i in range(1, parts)]
        asked = list(dict.fromkeys(number for number in asked if low < number < high))
        enough = [kept >= share for kept in keeps(asked)]
        first = enough.index(True) if True in enough else len(asked)
        low, high = (asked[first - 1] if first else low), (asked[first] if first < len(asked) else high)
    return high


def find_consensus(graphs: Sequence[AttributionGraph], share: float = 0.5, *, positions: bool = False) -> DataFrame:
    """Which features are in at least a share of several graphs, which were pruned for example.

    Args:
        graphs: of one CLT.
        share: of the graphs that a feature is in.
        positions: whether it must be at the same position there, counted from the prompt's end.

    Returns:
        One row a feature, those in most graphs first: layer, feature, with `positions` also pos (-1 the last),
        n_graphs, share, influence (mean of those graphs; without `positions` of all its positions together).

    Raises:
        ConfigError: an argument out of range, or no graphs.
        CLTMismatch: the graphs are of several CLTs.
    """
    graphs = as_several("graphs", graphs, "graphs of one CLT in a list")
    for i, graph in enumerate(graphs):
        if not isinstance(graph, AttributionGraph):
            raise ConfigError(f"graphs[{i}] is {shown(graph)}: give an AttributionGraph.")
    share, positions = as_share("share", share), as_switch("positions", positions)
    if len({graph.info.get("clt_fingerprint") for graph in graphs}) > 1:
        raise CLTMismatch("The graphs are of several CLTs, whose features have nothing to do with each other.")
    found: dict[tuple[int, ...], dict[int, float]] = {}
    for number, graph in enumerate(graphs):
        features = graph.nodes.where(NodeKind.FEATURE)
        nodes, influence = graph.nodes.take(features), graph.influence()[features]
        from_end = nodes.pos - len(graph.tokens)
        each = zip(*(values.tolist() for values in (nodes.layer, nodes.index, from_end, influence)), strict=True)
        for layer, feature, pos, value in each:
            of = found.setdefault((layer, feature, pos) if positions else (layer, feature), {})
            of[number] = of.get(number, 0.0) + value
    n = len(graphs)
    # Rounding may have made a share of n larger than it is.
    often = {place: of for place, of in found.items() if len(of) >= share * n - 1e-9}
    rows = [(*place, len(of), len(of) / n, sum(of.values()) / len(of)) for place, of in often.items()]
    rows.sort(key=lambda row: (-row[-3], -row[-1]))
    keys = ["layer", "feature", "pos"] if positions else ["layer", "feature"]
    return DataFrame(rows, columns=[*keys, "n_graphs", "share", "influence"])
