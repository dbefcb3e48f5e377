"""Labels of features, each with a score that says what it is worth.

A score is the balanced accuracy (0.5 is chance) with which a label tells contexts in which the feature is active from
100 in which it is not: random ones, and those most like the former by the features that are active there. Of the active
ones at most 100 are taken, without replacement and the stronger the likelier: all of them, weak ones too, where there
are fewer. Where a feature is active in more than half of the contexts, only the stronger half counts as active. All
contexts are of prompts that no example is from, and on which no label was chosen.
Beside it stands what the same labeller reaches on a random dictionary: random directions of the residual stream that
are active as often as the CLT's own features. A label is worth what it has beyond that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias, cast, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from tl_clt.arguments import as_seed, as_several, as_switch, as_whole, shown
from tl_clt.errors import ConfigError, DatasetError, FeatureNotFound, LabellerError
from tl_clt.features.contexts import Activations, Contexts, Firing, as_activations, read_contexts
from tl_clt.features.processes import Processes, sharing
from tl_clt.features.rules import RuleLabeller
from tl_clt.features.store import Example, FeatureRecord, FeatureStore, GivenLabel, Histogram, Label
from tl_clt.lens import HookedModel
from tl_clt.replacement import check_fit
from tl_clt.transcoder import CrossLayerTranscoder

MOST_COMPARED = 4096
"""Contexts, drawn at random, among which those most like others are looked for."""
N_EXAMPLES = 8
"""Contexts that a labeller is shown of a random direction."""
ANSWERS = "answers"
"""Folder within a store in which a labeller's answers are kept."""


@runtime_checkable
class Labeller(Protocol):
    """Gives labels, and says what they mean: in which contexts a feature of that label should be active."""

    name: str
    n_contexts: int
    """Contexts of each kind (active, random, nearest) that a label is scored on, at most."""
    n_random: int
    """Directions a layer in the random dictionary."""

    def label(self, record: FeatureRecord, firing: Firing, contexts: Contexts) -> GivenLabel | None:
        """A label, or None where there is none to give.

        Args:
            record: what the store knows of the feature.
            firing: where it is active in text for choosing, and how much.
            contexts: that text.
        """
        ...

    def fits(self, label: str, contexts: Contexts, which: np.ndarray) -> Sequence[bool] | np.ndarray:
        """Whether a feature of that label should be active at each of some contexts."""
        ...


@runtime_checkable
class KeepsAnswers(Protocol):
    """A labeller whose answers are worth keeping, since each takes time or money."""

    def keep_in(self, folder: Path) -> None:
        """Keep in this folder what is answered, as it comes, and do not ask for what is kept there already."""
        ...


LabelFunction: TypeAlias = Callable[[FeatureRecord], str | None]
"""The plainest labeller: what the store knows of a feature -> its label, or None."""


class PlainLabeller:
    """A function as a labeller. Its labels are read literally: a context fits where a word of the label stands at the
    position, among the three tokens before it, or comes next."""

    n_contexts = 100
    n_random = 64

    def __init__(self, function: LabelFunction) -> None:
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)

    def label(self, record: FeatureRecord, firing: Firing, contexts: Contexts) -> GivenLabel | None:
        text = self.function(record)
        if text is not None and not isinstance(text, str):
            raise LabellerError(f"The labeller {self.name} gave {shown(text)}: give text, or None for no label.")
        return None if text is None else GivenLabel(text, [])

    def fits(self, label: str, contexts: Contexts, which: np.ndarray) -> list[bool]:
        words = set(re.findall(r"\w+", label.casefold()))
        near = (contexts.window(int(i), before=3, after=1).tokens for i in which)
        return [any(token.strip().casefold() in words for token in tokens) for tokens in near]


class LabelScore(NamedTuple):
    """What a label is worth; None where the feature is active in no context for scoring, or always."""

    random: float | None
    nearest: float | None


def label_features(
    model: HookedModel,
    clt: CrossLayerTranscoder,
    store: FeatureStore,
    labeller: Labeller | LabelFunction | None = None,
    *,
    features: Sequence[tuple[int, int]] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> FeatureStore:
    """Label the features of a store and score the labels, on the text that the store holds for that.

    Labels that the store has already are replaced; where `features` are named, theirs alone. What is held: activations
    on that text, without zeros. Started by torchrun, each process labels its share of the features, and the labels are
    those of one process. What an endpoint answers is kept in the store's folder as it comes (`answers`): where it
    fails, the same call asks for the rest.

    Args:
        labeller: a `Labeller`; a function of a record that gives text; or None for rules.
        features: (layer, feature) of those to label. None for all that were active.
        seed: of the random dictionary, and of the contexts drawn.
        progress: show a bar.

    Raises:
        CLTMismatch: the store is of another CLT.
        DatasetError: the store holds no text for labels.
        FeatureNotFound: there is no such feature.
        LabellerError: the labeller fails; the labels that were there stay, and so does what an endpoint answered.
    """
    seed, progress = as_seed("seed", seed), as_switch("progress", progress)
    check_fit(model, clt)
    if not isinstance(store, FeatureStore):
        raise ConfigError(f"store is {shown(store)}: give a FeatureStore, as `collect_features` makes it.")
    store.require_clt(clt)
    chosen = _as_labeller(labeller)
    wanted = _wanted(store, features)
    parts = {part: Contexts.of(model, store.held_out(part)) for part in ("choosing", "scoring")}
    if not all(len(contexts) for contexts in parts.values()):
        raise DatasetError(
            f"The feature store '{store.folder}' holds no text to choose and score labels on: it was made with"
            " label_tokens=0, or of fewer than 4 prompts. Make it anew from more text."
        )
    if isinstance(chosen, KeepsAnswers):
        chosen.keep_in(store.folder / ANSWERS)
    directions = torch.randn(
        clt.cfg.n_layers, clt.cfg.d_model, chosen.n_random, generator=torch.Generator().manual_seed(seed)
    )
    choosing = read_contexts(model, clt, parts["choosing"], directions)
    scoring = read_contexts(model, clt, parts["scoring"], directions)
    twins = _random_dictionary(
        choosing.features,
        (parts["choosing"], parts["scoring"]),
        (choosing.projections, scoring.projections),
        np.random.default_rng(seed),
    )
    work = _Work(store, chosen, choosing.features, scoring.features, twins, seed)
    labels: dict[tuple[int, int], Label] = {}
    by_layer: list[dict[str, Any]] = []
    with sharing(clt.W_enc.device) as processes:
        shown_here = progress and processes.rank == 0
        with tqdm(total=len(wanted), desc="Labels", unit=" features", disable=not shown_here) as bar:
            for layer in clt.layers:
                of_layer = [feature for at, feature in wanted if at == layer]
                own, random = _label_layer(work, layer, of_layer, processes)
                bar.update(len(of_layer))
                means = _means([score for _, score in random])
                labels |= {(layer, feature): Label(*given, *score, *means) for feature, (given, score) in own.items()}
                of_own = _means([score for _, score in own.values()])
                by_layer.append(
                    {
                        "layer": layer,
                        "n_labels": len(own),
                        "score": of_own.random,
                        "score_nearest": of_own.nearest,
                        "n_random": len(random),
                        "score_random": means.random,
                        "score_random_nearest": means.nearest,
                    }
                )
        about = {
            "labeller": chosen.name,
            "features": None if features is None else [list(place) for place in wanted],
            "n_contexts": {part: len(contexts) for part, contexts in parts.items()},
            "seed": seed,
            "layers": by_layer,
        }
        if features is not None and store.is_labelled:
            labels, about = _beside_others(store, labels, about)
        processes.on_main(lambda: store.write_labels(labels, about))
    return store


def _beside_others(
    store: FeatureStore, new: dict[tuple[int, int], Label], about: dict[str, Any]
) -> tuple[dict[tuple[int, int], Label], dict[str, Any]]:
    """Labels of some features together with the labels that other features have already, and what is said of all."""
    before = store.label_summary()
    asked = {tuple(place) for place in about["features"]}
    places = store.labels()[["layer", "feature"]].itertuples(index=False, name=None)
    old = {place: label for place in places if place not in asked and (label := store.label(*place)) is not None}
    names = list(dict.fromkeys([*str(before["labeller"]).split(" and "), about["labeller"]]))
    earlier = before["features"]
    layers = []
    for then, now in zip(before["layers"], about["layers"], strict=True):
        layer = now["layer"]
        scores = _means([LabelScore(*label[2:4]) for (at, _), label in (old | new).items() if at == layer])
        n_labels = sum(at == layer for at, _ in old | new)
        own = {"n_labels": n_labels, "score": scores.random, "score_nearest": scores.nearest}
        layers.append({**(now if now["n_labels"] else then), **own})
    return old | new, {
        **about,
        "labeller": " and ".join(names),
        "features": None if earlier is None else sorted({tuple(place) for place in earlier} | asked),
        "layers": layers,
    }


class _Work(NamedTuple):
    """What every label of a store is found and scored by."""

    store: FeatureStore
    labeller: Labeller
    choosing: Activations
    scoring: Activations
    twins: _Twins
    seed: int

    def draws(self, *which: int) -> np.random.Generator:
        """Random numbers for one label alone: which others there are, and where they are made, does not matter."""
        return np.random.default_rng([*which, self.seed])


_Scored: TypeAlias = tuple[GivenLabel, LabelScore]


def _label_layer(
    work: _Work, layer: int, features: Sequence[int], processes: Processes
) -> tuple[dict[int, _Scored], list[_Scored]]:
    """Labels with scores of a layer's features, and those of the random dictionary, in order: each process makes its
    share, and all have all of them."""

    def share() -> tuple[list[tuple[int, _Scored | None]], list[tuple[int, _Scored | None]]]:
        own = [(f, _label_feature(work, layer, f)) for f in processes.share_of(features)]
        directions = processes.share_of(range(len(work.twins.like[layer])))
        return own, [(d, _label_twin(work, layer, d)) for d in directions]

    try:
        shares = processes.everywhere(share)
    except LabellerError as error:
        if not isinstance(work.labeller, KeepsAnswers):
            raise
        raise LabellerError(
            f"{error} What was answered is kept in '{work.store.folder / ANSWERS}': the same call again (`--resume`)"
            " asks for the rest."
        ) from error
    own, random = (dict(sorted(pair for part in parts for pair in part)) for parts in zip(*shares, strict=True))
    return (
        {feature: scored for feature, scored in own.items() if scored is not None},
        [scored for scored in random.values() if scored is not None],
    )


def _label_feature(work: _Work, layer: int, feature: int) -> _Scored | None:
    """A feature's label with its score."""
    firing = work.choosing.firing(layer, feature)
    found = work.labeller.label(work.store[layer, feature], firing, work.choosing.contexts)
    if found is None:
        return None
    active = work.scoring.firing(layer, feature)
    return found, _score(work.labeller, found.text, active, work.scoring, layer, work.draws(0, layer, feature))


def _as_labeller(labeller: Any) -> Labeller:
    if labeller is None:
        return RuleLabeller()
    if isinstance(labeller, Labeller) and not isinstance(labeller, type):
        return labeller
    if callable(labeller):
        return PlainLabeller(cast(LabelFunction, labeller))
    raise ConfigError(f"labeller is {shown(labeller)}: give a function of a record that gives text, or a Labeller.")


def _wanted(store: FeatureStore, features: Sequence[tuple[int, int]] | None) -> list[tuple[int, int]]:
    if features is None:
        return [(int(l), int(f)) for l, f in torch.nonzero(store.statistics()["n_active"])]  # noqa: E741
    pairs = [as_several("features", pair, "(layer, feature)") for pair in as_several("features", features, "pairs")]
    for pair in pairs:
        if len(pair) != 2:
            raise ConfigError(f"features has {shown(pair)}: give pairs (layer, feature).")
    return sorted(
        {
            (
                as_whole("layer", layer, 0, store.n_layers - 1, why="the layers", error=FeatureNotFound),
                as_whole("feature", f, 0, store.d_transcoder - 1, why="of a layer", error=FeatureNotFound),
            )
            for layer, f in pairs
        }
    )


def _means(scores: Sequence[LabelScore]) -> LabelScore:
    """The mean of each kind over those that are known."""
    known = [[value for value in values if value is not None] for values in zip(*scores, strict=True)] or [[], []]
    return LabelScore(*(float(np.mean(values)) if values else None for values in known))


def _score(
    labeller: Labeller, label: str, active: Firing, scoring: Activations, layer: int, rng: np.random.Generator
) -> LabelScore:
    """Balanced accuracy of a label on contexts that it was not chosen on.

    Args:
        active: where the feature is active there.
        scoring: activations of the CLT, by which contexts are like each other.
    """
    is_silent = np.ones(len(scoring.contexts), dtype=bool)
    is_silent[active.contexts] = False
    silent = np.flatnonzero(is_silent)
    if not len(active.contexts) or not len(silent):
        return LabelScore(None, None)
    n = min(labeller.n_contexts, len(active.contexts))
    positives = rng.choice(
        active.contexts, n, replace=False, p=active.activations.astype(float) / active.activations.sum(dtype=float)
    )
    drawn = rng.permutation(silent)[:MOST_COMPARED]
    random = drawn[: labeller.n_contexts]
    nearest = scoring.nearest(layer, positives, drawn, labeller.n_contexts)
    asked = np.concatenate([positives, random, nearest])
    fits = np.asarray(labeller.fits(label, scoring.contexts, asked), dtype=bool)
    found = fits[:n].mean()
    wrong = [fits[n : n + len(random)], fits[n + len(random) :]]
    return LabelScore(*(float(found + 1 - w.mean()) / 2 if len(w) else None for w in wrong))


# -- the random dictionary


class _Twins(NamedTuple):
    """Random directions that are active as often as some features of a CLT."""

    like: list[np.ndarray]
    """Of each layer, the features that they are as often active as."""
    choosing: Activations
    scoring: Activations


def _random_dictionary(
    own: Activations,
    contexts: tuple[Contexts, Contexts],
    projections: tuple[Float[Tensor, "n_layers _ n_directions"], Float[Tensor, "n_layers _ n_directions"]],
    rng: np.random.Generator,
) -> _Twins:
    """Each direction is active where the stream's projection onto it is above a threshold, by what it is above; the
    threshold is that at which it is active, in the text for choosing, as often as a feature of the CLT drawn at random.

    Args:
        own: of the CLT's features, in the text for choosing.
        contexts, projections: of the text for choosing, and of that for scoring.
    """
    n_directions = projections[0].shape[-1]
    like, entries = [], ([], [])
    for layer, matrix in enumerate(own.by_feature):
        counts = np.diff(matrix.indptr)
        live = np.nonzero((counts > 0) & (counts < len(own.contexts)))[0]
        drawn = rng.choice(live, n_directions, replace=len(live) < n_directions) if len(live) else live
        ordered = -np.sort(-projections[0][layer].numpy(), axis=0)
        thresholds = ordered[counts[drawn], np.arange(len(drawn))]
        like.append(drawn)
        for of_part, projected in zip(entries, projections, strict=True):
            above = projected[layer].numpy()[:, : len(drawn)] - thresholds
            rows, columns = np.nonzero(above > 0)
            of_part.append((above[rows, columns], rows, columns))
    return _Twins(like, *(as_activations(c, e, n_directions) for c, e in zip(contexts, entries, strict=True)))


def _label_twin(work: _Work, layer: int, direction: int) -> _Scored | None:
    """What the labeller makes of a random direction, with its score. Words that it promotes are those of a feature
    drawn at random."""
    contexts, twins = work.twins.choosing.contexts, work.twins
    firing = twins.choosing.firing(layer, direction)
    other = work.store[layer, int(twins.like[layer][direction - 1])]
    strongest = firing.contexts[np.argsort(-firing.activations, kind="stable")]
    _, first = np.unique(contexts.prompt[strongest], return_index=True)
    examples = []
    active = dict(zip(firing.contexts.tolist(), firing.activations.tolist(), strict=True))
    for context in strongest[np.sort(first)][:N_EXAMPLES].tolist():
        window = contexts.window(context, before=16, after=8)
        # Contexts of a prompt stand one after another, but for special tokens.
        offsets = {int(contexts.position[c] - contexts.position[context]): c for c in _same_prompt(contexts, context)}
        around = (offsets.get(i - window.position) for i in range(len(window.tokens)))
        activations = [0.0 if c is None else active.get(c, 0.0) for c in around]
        examples.append(Example("top", window.tokens, activations, window.position))
    record = FeatureRecord(
        layer=layer,
        feature=direction,
        density=len(firing.contexts) / len(contexts),
        n_active=len(firing.contexts),
        max_activation=float(firing.activations.max(initial=0)),
        decoder_norm=other.decoder_norm,
        histogram=Histogram([], []),
        top_logits=other.top_logits,
        bottom_logits=other.bottom_logits,
        examples=examples,
        connected=[],
    )
    found = work.labeller.label(record, firing, contexts)
    if found is None:
        return None
    active = twins.scoring.firing(layer, direction)
    return found, _score(work.labeller, found.text, active, work.scoring, layer, work.draws(1, layer, direction))


def _same_prompt(contexts: Contexts, context: int) -> range:
    prompt = contexts.prompt[context]
    return range(*np.searchsorted(contexts.prompt, [prompt, prompt + 1]).tolist())
