"""Where a trained organism holds what a task needs, found without any CLT: by interchange interventions and by probes.

Interchange (Geiger et al. 2021, "Causal Abstractions of Neural Networks"): something of the residual stream behind a
layer, at one position, is taken from another prompt of the task, where it is
    part="all"   everything there. What carries a variable and nothing else that the answer needs follows and keeps:
                 follows: with a prompt whose variable differs, the answer becomes the task's with the other value;
                 keeps: with a prompt whose variable is the same, and whose answer is not, the answer stays.
                 A place that carries the answer, or all of the prompt, may follow, and does not keep.
    part="mean"  the difference of the means over prompts of the text with either value of the variable: for places
                 that carry other things beside it. It is 0 where the variable is the same: it keeps by definition.
                 Where values go with answers, as being unknown does with "unknown", a place that holds nothing but the
                 answer follows as well, since the difference is then one of answers. `answer_alone` says how often.

Probes tell only where a variable can be read; a linear one, on prompts held out, beside the same with labels shuffled.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from pandas import DataFrame, concat
from torch import Tensor

from tl_clt.arguments import as_seed, as_whole
from tl_clt.errors import ConfigError
from tl_clt.lens import (
    HookedModel,
    block_hook,
    model_name,
    run_behind_layer,
    run_blocks_with_cache,
    run_with_cache,
    to_tokens,
    token_strings,
)
from tl_clt.organisms.tasks import Case, Task, require_task
from tl_clt.shapes import TokenBatch

Part = Literal["all", "mean"]
STREAM = "hook_resid_post"
N_FOR_MEANS = 2000
"""Prompts of the text over which means are taken."""
MOST_TRIED = 40
"""Other prompts that are tried for one whose exchange gives an answer that neither has."""
RIDGE = 1e-2
"""Of probes, in units of the mean square of what they read."""


@torch.no_grad()
def interchange(
    model: HookedModel,
    task: Task,
    variable: str,
    *,
    part: Part = "all",
    n_pairs: int = 64,
    held_out: bool = True,
    seed: int = 0,
    places: Collection[tuple[int, int]] | None = None,
    cases: Sequence[Case] | None = None,
    means: TextMeans | None = None,
) -> DataFrame:
    """What comes of exchanging the residual stream at each layer and position, for one variable of a task.

    Prompts are those that the model answers right. A pair's wanted answer is, where there is such a pair, neither the
    prompt's own nor the other prompt's.

    Args:
        model: the organism.
        task: what it is asked.
        variable: an input or a hop of the task.
        part: what is exchanged: everything, or the difference of means.
        n_pairs: pairs of prompts, fewer where there are fewer.
        held_out: whether prompts are such as were kept out of the text of training.
        seed: of prompts, pairs and random directions.
        places: (layer, position) of those to exchange at; None for all.
        cases: prompts to take instead of such as the model answers right: to follow the same through training, say.
        means: what `take_means` gives, where it is known already; None to take them.

    Returns:
        One row a layer and position: variable, layer, pos, token (at that position, on one of the prompts), part,
        follows and keeps (shares of pairs; NaN where there are none), random_direction (as follows, with a change of
        the same size in a random direction), copied (of the pairs of `follows`, those in which the wanted answer is the
        other prompt's own: what an answer that is merely copied does), answer_alone (as follows, of a place that holds
        the answer, each answer in a direction of its own, and nothing else) and beyond (follows over those pairs in
        which such a place does not follow; NaN where there are none).

    Raises:
        ConfigError: the task has no such variable, or it never decides the answer; prompts have different lengths;
            there is no such place.
    """
    require_task(task)
    n_pairs = as_whole("n_pairs", n_pairs, 1)
    seed = as_seed("seed", seed)
    if part not in get_args(Part):
        raise ConfigError(f"part is {part!r:.60}: give {' or '.join(map(repr, get_args(Part)))}.")
    if cases is None:
        cases, tokens = answered_right(model, task, 8 * n_pairs, held_out, seed)
    else:
        tokens = as_batch(model, task, cases)
    _require(variable, cases[0], task)
    at = _as_places(places, model, tokens.shape[1], 0)
    chooser = random.Random(f"{task.name} {variable} {seed}")
    changing, same = exchanges(task, cases, variable, n_pairs, chooser)
    if not changing:
        raise ConfigError(f"The answers of {task.name} that the model gives right never depend on {variable}.")
    wanted = [task.run(cases[a].values, _given(task, variable, cases[b])) for a, b in changing]
    answer = task.hops[-1].name
    ids = answer_ids(model, [w[answer] for w in wanted] + [cases[a].answer for a, _ in same])
    n, pairs = len(changing), [*changing, *same]
    to, source = torch.tensor(pairs).unbind(dim=1)
    names = {block_hook(layer, STREAM): layer for layer, _ in at}
    cache = run_blocks_with_cache(model, tokens, lambda name: name in names)
    behind: dict[int, Float[Tensor, "n_prompts pos d_model"]] = {layer: cache[name] for name, layer in names.items()}
    carried = behind
    if part == "mean":
        means = take_means(model, task, seed=seed) if means is None else means
        each = torch.stack([means.of(variable, case.values[variable]) for case in cases])
        carried = {layer: each[:, layer] for layer in behind}
    generator = torch.Generator().manual_seed(seed)
    copied = [w[answer] == cases[b].answer for w, (_, b) in zip(wanted, changing, strict=True)]
    alone = (
        copied
        if part == "all" or means is None
        else [
            means.follows_alone(variable, cases[a], cases[b], w[answer])
            for w, (a, b) in zip(wanted, changing, strict=True)
        ]
    )
    beyond = ~torch.tensor(alone)
    rows = []
    for layer, pos in at:
        change = carried[layer][source, pos] - carried[layer][to, pos]
        drawn = torch.randn(change[:n].shape, generator=generator).to(change)
        at_random = drawn * change[:n].norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True)
        run = torch.cat([to, to[:n]])
        stream = behind[layer][run]
        stream[:, pos] += torch.cat([change, at_random])
        logits = run_behind_layer(model, tokens[run], layer, stream)
        right = (logits[:, -1].argmax(dim=-1) == torch.cat([ids, ids[:n]])).double()
        rows.append(
            {
                "variable": variable,
                "layer": layer,
                "pos": pos,
                "token": token_strings(model, tokens[0])[pos],
                "part": part,
                "follows": float(right[:n].mean()),
                "keeps": float(right[n : len(pairs)].mean()) if same else float("nan"),
                "random_direction": float(right[len(pairs) :].mean()),
                "copied": float(np.mean(copied)),
                "answer_alone": float(np.mean(alone)),
                "beyond": float(right[:n][beyond].mean()) if bool(beyond.any()) else float("nan"),
            }
        )
    return DataFrame(rows)


def find_variables(
    model: HookedModel, task: Task, *, n_pairs: int = 64, held_out: bool = True, seed: int = 0
) -> DataFrame:
    """Where each hop of a task is carried: the layer, position and part for which the lesser of `follows` and `keeps`
    is greatest, the earliest of these, chosen with one seed and measured with the next.

    Args and errors as of `interchange`. The last hop is the answer itself and is left out.

    Returns:
        One row a hop, as of `interchange`, and elsewhere: the mean of `follows` over all other places from that layer
        on, with the same part.
    """
    require_task(task)
    n_pairs, seed = as_whole("n_pairs", n_pairs, 1), as_seed("seed", seed)
    rows, given = [], {}
    if task.hops[1:]:
        for s in (seed, seed + 1):
            cases, _ = answered_right(model, task, 8 * n_pairs, held_out, s)
            given[s] = {"n_pairs": n_pairs, "seed": s, "cases": cases, "means": take_means(model, task, seed=s)}
    for hop in task.hops[:-1]:
        searched = concat(
            [interchange(model, task, hop.name, part=part, **given[seed]) for part in get_args(Part)], ignore_index=True
        )
        score = np.fmin(searched["follows"].to_numpy(), searched["keeps"].to_numpy())
        best = np.flatnonzero(score >= score.max())
        found = searched.iloc[int(best[searched["layer"].to_numpy()[best].argmin()])]
        again = interchange(model, task, hop.name, part=found["part"], **given[seed + 1])
        there = (again["layer"] == found["layer"]) & (again["pos"] == found["pos"])
        others = again[~there & (again["layer"] >= found["layer"])]
        rows.append({**again[there].iloc[0].to_dict(), "elsewhere": float(others["follows"].mean())})
    return DataFrame(rows)


@torch.no_grad()
def probe(
    model: HookedModel,
    task: Task,
    variable: str,
    *,
    n_prompts: int = 512,
    seed: int = 0,
    places: Collection[tuple[int, int]] | None = None,
) -> DataFrame:
    """How well a variable can be read, linearly, from the residual stream behind each layer at each position.

    Trained on prompts of the text, tested on prompts held out of it.

    Args:
        model, task, variable: as for `interchange`.
        n_prompts: of each split, fewer where there are fewer.
        seed: of prompts and shuffled labels.
        places: (layer, position) of those to read at; None for all.

    Returns:
        One row a layer and position: variable, layer (-1 is the embedding), pos, accuracy (balanced over the values
        that are tested), shuffled (the same probe trained on shuffled labels), values (how many are tested).

    Raises:
        ConfigError: the task has no such variable, prompts have different lengths, or there is no such place.
    """
    require_task(task)
    n_prompts, seed = as_whole("n_prompts", n_prompts, 2), as_seed("seed", seed)
    splits = []
    for held_out in (False, True):
        cases = task.cases(n_prompts, held_out=held_out, seed=seed)
        _require(variable, cases[0], task)
        splits.append((as_batch(model, task, cases), [case.values[variable] for case in cases]))
    (train_tokens, train_labels), (test_tokens, test_labels) = splits
    classes = sorted(set(train_labels))
    known = [i for i, label in enumerate(test_labels) if label in classes]
    if not known:
        raise ConfigError(f"{variable} of {task.name} has no value in both splits, so that no probe can be tested.")
    shuffled = list(train_labels)
    random.Random(seed).shuffle(shuffled)
    at = _as_places(places, model, train_tokens.shape[1], -1)
    names = {layer: block_hook(max(layer, 0), STREAM if layer >= 0 else "hook_resid_pre") for layer, _ in at}
    wanted = set(names.values())
    read = [run_with_cache(model, t, lambda name: name in wanted)[1] for t in (train_tokens, test_tokens[known])]
    truth = np.array([classes.index(test_labels[i]) for i in known])
    rows = []
    for layer, pos in at:
        x, z = (cache[names[layer]][:, pos].double().cpu().numpy() for cache in read)
        told = [
            read_out(x, np.array([classes.index(label) for label in labels]), len(classes), z)
            for labels in (train_labels, shuffled)
        ]
        right = [float(np.mean([np.mean(t[truth == c] == c) for c in np.unique(truth)])) for t in told]
        row = {"variable": variable, "layer": layer, "pos": pos, "accuracy": right[0], "shuffled": right[1]}
        rows.append(row | {"values": len(np.unique(truth))})
    return DataFrame(rows)


def read_out(x: np.ndarray, labels: np.ndarray, n_classes: int, z: np.ndarray) -> np.ndarray:
    """Classes of the rows of z, by ridge regression of each class on the rows of x; the largest wins."""
    mean = x.mean(axis=0)
    x, z = x - mean, z - mean
    y = np.eye(n_classes)[labels]
    gram = x.T @ x
    gram[np.diag_indices_from(gram)] += RIDGE * max(gram.trace() / len(gram), 1e-12)
    return (z @ np.linalg.solve(gram, x.T @ (y - y.mean(axis=0))) + y.mean(axis=0)).argmax(axis=1)


class TextMeans(NamedTuple):
    """Means of the residual stream behind each layer over prompts of the text."""

    by_value: dict[tuple[str, str], Float[Tensor, "n_layers pos d_model"]]
    """Of those with a value, by variable and value."""
    whole: Float[Tensor, "n_layers pos d_model"]
    """Of all."""

    answers: dict[tuple[str, str], Counter[str]]
    """How often each answer comes with a value of a variable."""

    def of(self, variable: str, value: str) -> Float[Tensor, "n_layers pos d_model"]:
        """Over prompts with a value of a variable; where there are none, over all of them."""
        return self.by_value.get((variable, value), self.whole)

    def follows_alone(self, variable: str, case: Case, other: Case, wanted: str) -> bool:
        """Whether the answer would become the wanted one at a place that holds one number for each answer, 1 for the
        right one, when the difference of means between the variable's values is added there."""
        scores = {case.answer: 1.0}
        for sign, value in ((1, other.values[variable]), (-1, case.values[variable])):
            counts = self.answers.get((variable, value), Counter())
            for answer, n in counts.items():
                scores[answer] = scores.get(answer, 0.0) + sign * n / counts.total()
        return max(scores, key=scores.__getitem__) == wanted


@torch.no_grad()
def take_means(model: HookedModel, task: Task, *, seed: int = 0) -> TextMeans:
    """What `interchange` with part="mean" exchanges, of all variables of a task at once."""
    require_task(task)
    told = task.cases(N_FOR_MEANS, held_out=False, seed=seed)
    names = [block_hook(layer, STREAM) for layer in range(model.cfg.n_layers)]
    cache = run_blocks_with_cache(model, as_batch(model, task, told), lambda name: name in names)
    stream: Float[Tensor, "n_prompts n_layers pos d_model"] = torch.stack([cache[name] for name in names], dim=1)
    members: dict[tuple[str, str], list[int]] = {}
    for i, case in enumerate(told):
        for place in case.values.items():
            members.setdefault(place, []).append(i)
    return TextMeans(
        {place: stream[rows].mean(dim=0) for place, rows in members.items()},
        stream.mean(dim=0),
        {place: Counter(told[i].answer for i in rows) for place, rows in members.items()},
    )


def _as_places(
    places: Collection[tuple[int, int]] | None, model: HookedModel, n_pos: int, first: int
) -> list[tuple[int, int]]:
    """Layers and positions, in order; all from the first layer on where none are named."""
    every = [(layer, pos) for layer in range(first, model.cfg.n_layers) for pos in range(n_pos)]
    if places is None:
        return every
    for place in places:
        if place not in every:
            raise ConfigError(
                f"places names {place!r:.60}: give (layer, position), layers from {first} to {every[-1][0]}, positions"
                f" from 0 to {n_pos - 1}."
            )
    return [place for place in every if place in places]


# -- prompts


def answered_right(model: HookedModel, task: Task, n: int, held_out: bool, seed: int) -> tuple[list[Case], TokenBatch]:
    """Prompts that the model answers right, and their tokens.

    Raises:
        ConfigError: it answers fewer than two.
    """
    cases = task.cases(n, held_out=held_out, seed=seed)
    tokens = as_batch(model, task, cases)
    right = model(tokens)[:, -1].argmax(dim=-1) == answer_ids(model, [case.answer for case in cases])
    if int(right.sum()) < 2:
        raise ConfigError(f"The model answers {int(right.sum())} of {len(cases)} prompts of {task.name}: no pairs.")
    return [case for case, ok in zip(cases, right.tolist(), strict=True) if ok], tokens[right]


def as_batch(model: HookedModel, task: Task, cases: Sequence[Case]) -> TokenBatch:
    rows = [to_tokens(model, case.prompt).flatten() for case in cases]
    if len({len(row) for row in rows}) > 1:
        raise ConfigError(
            f"Prompts of {task.name} have different lengths, so that their positions cannot be exchanged. Give a task"
            f" whose prompts are all as long, or a model that knows its words ({model_name(model)} may not)."
        )
    return torch.stack(rows)


def answer_ids(model: HookedModel, words: Sequence[str]) -> Int[Tensor, " n"]:
    """The token of each word, which must be one."""
    token = {word: int(to_tokens(model, word).flatten()[-1]) for word in dict.fromkeys(words)}
    return torch.tensor([token[word] for word in words])


def _require(variable: str, case: Case, task: Task) -> None:
    if variable not in case.values:
        raise ConfigError(f"variable is {variable!r:.60}: {task.name} has {', '.join(case.values)}.")


# -- pairs


def _given(task: Task, variable: str, other: Case) -> dict[str, str]:
    """The variable's value on another prompt."""
    return {variable: other.values[variable]}


def exchanges(
    task: Task, cases: Sequence[Case], variable: str, n: int, chooser: random.Random
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Rows and others: whose exchange changes the answer, best to one that neither has; and whose variable is the same,
    but not the answer."""
    changing: list[tuple[int, int]] = []
    same: list[tuple[int, int]] = []
    answer, everything = task.hops[-1].name, range(len(cases))
    alike: dict[str, list[int]] = {}
    for i, case in enumerate(cases):
        alike.setdefault(case.values[variable], []).append(i)
    for a in chooser.sample(everything, len(cases)):
        if len(changing) < n:
            merely: int | None = None
            for b in chooser.sample(everything, min(MOST_TRIED, len(cases))):
                wanted = task.run(cases[a].values, _given(task, variable, cases[b]))[answer]
                if wanted not in (cases[a].answer, cases[b].answer):
                    changing.append((a, b))
                    break
                if wanted != cases[a].answer:
                    merely = b
            else:
                if merely is not None:
                    changing.append((a, merely))
        if len(same) < n:
            others = [b for b in alike[cases[a].values[variable]] if cases[b].answer != cases[a].answer]
            if others:
                same.append((a, chooser.choice(others)))
    return changing, same
