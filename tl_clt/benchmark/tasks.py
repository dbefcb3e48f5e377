"""A CLT against what a trained organism is known to do: which hops of its tasks the features show.

Where a hop is carried is found without features (`tl_clt.organisms.interchange`): behind a layer, at a position. The
features that can show it are those of that layer and below, at that position and before, for they wrote what is there,
and what attention brings there. A feature at a position belongs to the hop's group where its activation there is a
function of the hop's value: knowing the value explains at least `PURITY` of its variance over prompts of the task.

A hop is shown where, with the group alone,
    predicted: its value can be told on prompts that were held out of the model's text, and
    swapped:   giving the group its activations on another prompt, with the model itself running above that layer, does
               at least `SHOWN` of what exchanging the whole residual stream there does.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from pandas import DataFrame
from torch import Tensor

from tl_clt.arguments import as_seed, as_whole, shown
from tl_clt.benchmark.hops import PURITY, SHOWN, explained_by
from tl_clt.errors import ConfigError
from tl_clt.interventions import Intervention, intervene
from tl_clt.lens import HookedModel
from tl_clt.organisms.interchange import (
    answer_ids,
    answered_right,
    as_batch,
    exchanges,
    find_variables,
    read_out,
)
from tl_clt.organisms.tasks import Case, Task
from tl_clt.replacement import check_fit, feature_acts
from tl_clt.transcoder import CrossLayerTranscoder

HELD = 0.9
"""Of `follows` and `keeps`: from here on a hop is said to be carried at one place, and a CLT is asked to show it."""

COLUMNS = (
    *("variable", "layer", "pos", "token", "part", "follows", "keeps", "carried", "n_features"),
    *("accuracy", "accuracy_shuffled", "swap", "swap_partly", "swap_other", "shown"),
)
PARTLY = 0.5
"""The same, for features that are about the value for the most part."""

Acts = Float[Tensor, "n_prompts pos n_layers d_transcoder"]
Mask = Bool[Tensor, "pos n_layers d_transcoder"]


@dataclass(frozen=True, kw_only=True, repr=False)
class TaskReport:
    """What a CLT shows of one task of a trained organism."""

    task: str

    hops: DataFrame
    """One row a hop, without the last, which is the answer itself: variable, layer, pos, token (where it is carried),
    follows, keeps (of exchanging the whole stream there), carried (whether both are at least `HELD`), n_features (of
    the group), accuracy (balanced, on prompts held out of the model's text), accuracy_shuffled (the same with labels
    shuffled), swap (share of pairs whose answer becomes the task's when the group is given its activations on the other
    prompt), swap_partly (the same with the features of which the value explains `PARTLY`), swap_other (as swap, with
    as many other active features of the same layers and positions), shown."""

    hop_recall: float
    """Share of the hops that are carried at one place that are shown; NaN where none is carried."""

    def __repr__(self) -> str:
        carried = int(self.hops["carried"].sum())
        return f"TaskReport({self.task!r}, hop_recall={self.hop_recall:.2f} of {carried} hops carried at one place)"


@torch.no_grad()
def measure_task(
    model: HookedModel,
    clt: CrossLayerTranscoder,
    task: Task,
    *,
    places: DataFrame | None = None,
    n_prompts: int = 400,
    n_pairs: int = 64,
    seed: int = 0,
) -> TaskReport:
    """Hold a CLT of an organism against what the organism is known to do.

    Args:
        model: the organism.
        clt: a CLT of it.
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
    check_fit(model, clt)
    if places is None:
        places = find_variables(model, task, n_pairs=n_pairs, seed=seed)
    told = task.cases(n_prompts, held_out=False, seed=seed)
    kept, kept_tokens = answered_right(model, task, n_prompts, True, seed + 2)
    told_acts, kept_acts = feature_acts(model, clt, as_batch(model, task, told)), feature_acts(model, clt, kept_tokens)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for place in cast("list[dict[str, Any]]", places.to_dict("records")):
        variable, layer, pos = place["variable"], int(place["layer"]), int(place["pos"])
        reach = torch.zeros(told_acts.shape[1:], dtype=torch.bool)
        reach[: pos + 1, : layer + 1] = True
        labels, codes = _coded(told, variable)
        explained = explained_by(told_acts.flatten(1), codes).unflatten(0, reach.shape)
        group, partly = ((explained >= least) & reach for least in (PURITY, PARTLY))
        active = (kept_acts != 0).any(dim=0) & reach
        chooser = random.Random(f"{task.name} {variable} {seed}")
        pairs, _ = exchanges(task, kept, variable, n_pairs, chooser)

        def swapped(features: Mask, pairs: Sequence[tuple[int, int]] = pairs, place: dict[str, Any] = place) -> float:
            return swap(model, clt, task, kept, kept_tokens, kept_acts, pairs, features, place)

        others = _as_many(active & ~group, int((group & active).sum()), generator)
        shuffled = codes[torch.randperm(len(codes), generator=generator)]
        accuracy = [
            _told(told_acts[:, group], c, labels, kept_acts[:, group], [case.values[variable] for case in kept])
            for c in (codes, shuffled)
        ]
        carried = min(place["follows"], place["keeps"]) >= HELD
        own = swapped(group)
        rows.append(
            {
                **{name: place[name] for name in COLUMNS[:7]},
                "carried": carried,
                "n_features": int(group.sum()),
                "accuracy": accuracy[0],
                "accuracy_shuffled": accuracy[1],
                "swap": own,
                "swap_partly": swapped(partly),
                "swap_other": swapped(others) if bool(others.any()) else float("nan"),
                "shown": accuracy[0] >= SHOWN and own >= SHOWN * place["follows"],
            }
        )
    table = DataFrame(rows, columns=COLUMNS)
    asked = table[table["carried"].astype(bool)]
    recall = float(asked["shown"].mean()) if len(asked) else float("nan")
    return TaskReport(task=task.name, hops=table, hop_recall=recall)


def swap(
    model: HookedModel,
    clt: CrossLayerTranscoder,
    task: Task,
    cases: Sequence[Case],
    tokens: Int[Tensor, "n_prompts pos"],
    acts: Acts,
    pairs: Sequence[tuple[int, int]],
    features: Mask,
    place: dict[str, Any],
) -> float:
    """Share of pairs whose answer becomes the task's with the variable of the other prompt, when features take their
    activations there; the model itself runs above the layer of the place."""
    if not bool(features.any()):
        return 0.0
    rows = torch.tensor(pairs)[:, 0]
    changes = []
    for pos, layer in features.any(dim=2).nonzero().tolist():
        numbers = features[pos, layer].nonzero().flatten()
        for row, (a, b) in enumerate(pairs):
            differs = acts[a, pos, layer, numbers] != acts[b, pos, layer, numbers]
            if bool(differs.any()):
                values = acts[b, pos, layer, numbers[differs]].tolist()
                which = numbers[differs].tolist()
                changes.append(Intervention(layer=layer, pos=pos, feature=which, value=values, prompt=row))
    if not changes:
        return 0.0
    effect = intervene(model, clt, tokens[rows], changes, through_layer=int(place["layer"]))
    variable = place["variable"]
    wanted = [task.run(cases[a].values, {variable: cases[b].values[variable]})[task.hops[-1].name] for a, b in pairs]
    return float((effect.logits[:, -1].argmax(dim=-1) == answer_ids(model, wanted)).double().mean())


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
