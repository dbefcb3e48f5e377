"""What is changed: features, supernodes, whole directions; at which layer and positions, and how."""

from __future__ import annotations

import numbers
import re
import sys
import zlib
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, Protocol, SupportsIndex, TypeAlias, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_clt.arguments import as_choice, as_number, as_several, as_vector, as_whole, is_whole, plain, shown
from tl_clt.attribution import AttributionGraph, NodeKind
from tl_clt.errors import CLTMismatch, InterventionError
from tl_clt.lens import HookedModel, Prompt, to_tokens
from tl_clt.replacement import check_fit, feature_acts
from tl_clt.transcoder import CrossLayerTranscoder, CrossLayerTranscoderConfig

Position: TypeAlias = int | slice | Sequence[int] | None
Number: TypeAlias = int | float
Amount: TypeAlias = Number | Sequence[Number]
SETTERS = ("value", "scale", "add", "noise")


@dataclass(frozen=True, kw_only=True)
class _Change:
    """How an amount is changed: exactly one of `value`, `scale`, `add` and `noise`."""

    layer: int
    """Layer that the feature reads, or after which the direction is written."""

    pos: Position = None
    """Position, slice or list of positions, negative ones counted from the prompt's end; None for every position.
    None and slices without an end go on over new tokens."""

    prompt: int | None = None
    """Which prompt of the batch; None for all."""

    value: Amount | None = None
    """Set to this."""

    scale: Amount | None = None
    """Multiply by this: 0 ablates, -1 turns against itself, 2 doubles."""

    add: Amount | None = None
    """Add this."""

    noise: Number | None = None
    """Add a normal random number of this standard deviation, drawn anew for each prompt and position."""

    seed: int = 0
    """Of the noise, which is the same at a position however the text is split into passes."""

    def __post_init__(self) -> None:
        setters = [name for name in SETTERS if getattr(self, name) is not None]
        if len(setters) != 1:
            listed = " and ".join(setters) or "nothing"
            raise InterventionError(f"{self} sets {listed}: give exactly one of value, scale, add or noise.")
        self._set("layer", as_whole("layer", self.layer, error=InterventionError))
        self._set("pos", _as_positions(self.pos))
        prompt = as_whole(
            "prompt", self.prompt, 0, why="numbered from 0 within the batch", none="all", error=InterventionError
        )
        self._set("prompt", prompt)
        self._set(setters[0], _as_amount(setters[0], getattr(self, setters[0])))
        if self.noise is not None and self.noise < 0:
            raise InterventionError(f"noise is {self.noise}: give a standard deviation, which is 0 or more.")
        self._set("seed", as_whole("seed", self.seed, error=InterventionError))

    def _set(self, name: str, value: object) -> None:
        """Replace a field's value, which is how a frozen dataclass gets plain values of Python's."""
        object.__setattr__(self, name, value)

    def __hash__(self) -> int:
        """Equal changes have equal hashes, although their lists and slices cannot be hashed themselves."""
        values = (getattr(self, field_.name) for field_ in fields(self) if field_.compare)
        return hash((type(self), *map(_as_hashable, values)))

    def delta(self, before: Float[Tensor, "batch pos n"], place: Place) -> Float[Tensor, "batch pos n"]:
        """What to add to the amounts at a place."""
        if self.noise is not None:
            return self.noise * torch.stack([self._draw(before, p, place.rows) for p in place.positions], dim=1)
        if self.add is not None:
            return before.new_tensor(self.add).expand_as(before)
        if self.scale is not None:
            return (before.new_tensor(self.scale) - 1) * before
        return before.new_tensor(self.value) - before

    def _draw(self, like: Float[Tensor, "batch pos n"], position: int, rows: list[int]) -> Float[Tensor, "batch n"]:
        # torch's generator on the CPU takes 32 bits of a seed.
        key = f"{self.seed} {self.layer} {getattr(self, 'features', '')} {position}"
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
        # The same for a row however rows are padded; a single prompt that is named draws as row 0.
        chosen = [0] if self.prompt is not None else rows
        drawn = torch.randn(max(chosen) + 1, like.shape[2], generator=generator, dtype=torch.float64)
        return drawn[chosen].to(like)


@dataclass(frozen=True, kw_only=True)
class Intervention(_Change):
    """A change of one feature's activation, or of a supernode's: several features of one layer.

    Exactly one of `value`, `scale`, `add` and `noise`; one number for all features, or a list with one for each.
    Several interventions on one feature act one after another.

    Raises:
        InterventionError: none or several of these; a number that is not finite; no feature.
    """

    feature: int | Sequence[int]
    """Feature number, or several."""

    clt: str | None = field(default=None, repr=False, compare=False)
    """Fingerprint of the CLT whose features they are, where it is known (from a graph): no other is changed by them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("feature", _as_wholes("feature", self.feature))
        features = self.features
        if not features or len(set(features)) < len(features):
            raise InterventionError(f"{self}: name at least one feature, and each once.")
        amount = next(getattr(self, name) for name in SETTERS if getattr(self, name) is not None)
        if isinstance(amount, Sequence) and len(amount) != len(features):
            raise InterventionError(
                f"{self} has {len(amount)} numbers for {len(features)} features: give one for all, or one for each."
            )

    __hash__ = _Change.__hash__

    @property
    def features(self) -> list[int]:
        """The features, also where there is one."""
        return list(self.feature) if isinstance(self.feature, Sequence) else [self.feature]

    @classmethod
    def of(
        cls,
        graph: AttributionGraph,
        node: SupportsIndex | FeatureNode,
        scale: Number = 0,
        *,
        prompt: int | None = None,
    ) -> Intervention:
        """One feature of a graph multiplied, at its layer and position; unless said otherwise it is ablated.

        Args:
            graph: where the node is.
            node: its number in `graph.nodes`, or the node itself: anything with layer, pos and index.
            scale: what to multiply its activation by.
            prompt: as of every intervention.

        Raises:
            InterventionError: there is no such node, or it is no feature.
        """
        layer, pos, feature = _feature_of(graph, node)
        fingerprint = graph.info.get("clt_fingerprint")
        clt = fingerprint if isinstance(fingerprint, str) else None
        return cls(layer=layer, pos=pos, feature=feature, scale=scale, prompt=prompt, clt=clt)


def parse_intervention(text: str, setter: str) -> Intervention:
    """An intervention as a command line has it: `layer:pos:feature=number`.

    Args:
        text: pos is a number or `all`; feature one number, or several with commas between.
        setter: value, scale or add.

    Raises:
        InterventionError: the text is not of that form.
    """
    if not isinstance(text, str):
        raise InterventionError(f"text is {shown(text)}: write layer:pos:feature=number, for example '2:-1:17=0'.")
    as_choice("setter", setter, ("value", "scale", "add"), InterventionError)
    parts = re.fullmatch(r"(\d+):(-?\d+|all):(\d+(?:,\d+)*)=(.+)", text.strip())
    try:
        if parts is None:
            raise ValueError
        layer, pos, features, amount = parts.groups()
        number = float(amount)
    except ValueError:
        raise InterventionError(
            f"'{text}' is no intervention: write layer:pos:feature=number, for example 2:-1:17=0. The position may"
            " be 'all', and there may be several features (17,30)."
        ) from None
    place = {"layer": int(layer), "pos": None if pos == "all" else int(pos)}
    arguments: dict[str, Any] = {**place, "feature": [int(f) for f in features.split(",")], setter: number}
    return Intervention(**arguments)


@dataclass(frozen=True, kw_only=True, eq=False)
class DirectionIntervention(_Change):
    """A change of the residual stream along a direction, after block `layer`; -1 is before block 0.

    What is changed is the coefficient c of the vector v in the stream x, `c = x . v / |v|^2`: `add=1` adds v
    itself, `scale=0` projects it out.

    Raises:
        InterventionError: none or several of value, scale, add and noise; a number that is not finite; a zero
            vector.
    """

    vector: Float[Tensor, " d_model"] | Sequence[float] | Float[np.ndarray, " d_model"]
    """The direction; its length counts. A tensor after construction."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set("vector", as_vector("The vector of a DirectionIntervention", self.vector, InterventionError))
        if not bool(torch.as_tensor(self.vector).any()):
            raise InterventionError("The vector of a DirectionIntervention is zero: give a direction.")
        amount = next(getattr(self, name) for name in SETTERS if getattr(self, name) is not None)
        if isinstance(amount, Sequence):
            raise InterventionError(
                f"A direction has one coefficient, but {amount!r:.60} are several: give one number."
            )

    def change(self, x: Float[Tensor, "batch pos d_model"], place: Place) -> Float[Tensor, "batch pos d_model"]:
        """What to add to the residual stream at a place."""
        v = torch.as_tensor(self.vector).to(x)
        coefficient = (x @ v / v.square().sum())[..., None]
        return self.delta(coefficient, place) * v


AnyIntervention = Intervention | DirectionIntervention


@runtime_checkable
class FeatureNode(Protocol):
    """A node of a graph that is a feature, as `graph.nodes[i]` gives it."""

    @property
    def layer(self) -> int: ...
    @property
    def pos(self) -> int: ...
    @property
    def index(self) -> int:
        """Number of the feature."""
        ...


def _feature_of(graph: AttributionGraph, node: Any) -> tuple[int, int, int]:
    """Layer, position and number of a feature node.

    Raises:
        InterventionError: there is no such node, or it is no feature.
    """
    if not isinstance(graph, AttributionGraph):
        raise InterventionError(f"The graph is {shown(graph)}: give an AttributionGraph, then one of its nodes.")
    if all(hasattr(node, name) for name in ("layer", "pos", "index")) and not isinstance(node, (str, list, tuple)):
        kind, at = getattr(node, "kind", NodeKind.FEATURE), node
        name = f"layer {plain(at.layer)}, position {plain(at.pos)}"
    elif is_whole(plain(node)):
        n_nodes = len(graph.nodes)
        number = (
            as_whole("node", node, -n_nodes, n_nodes - 1, why="the graph's nodes", error=InterventionError) % n_nodes
        )
        [kind] = graph.nodes.kind[number : number + 1].tolist()
        at = graph.nodes.take(torch.tensor([number], device=graph.nodes.kind.device))
        name = f"number {number}"
    else:
        raise InterventionError(
            f"node is {shown(node)}: give its number in graph.nodes, or a node with layer, pos and index."
        )
    node_kind = NodeKind[kind.upper()] if isinstance(kind, str) else NodeKind(int(kind))
    if node_kind != NodeKind.FEATURE:
        raise InterventionError(
            f"Node {name} is of kind {node_kind.name.lower()}, and only features can be changed so: give a feature node"
            " (graph.nodes.where(NodeKind.FEATURE) has their numbers)."
        )
    layer, pos, feature = (int(value) for value in (at.layer, at.pos, at.index))
    return layer, pos, feature


def _as_hashable(value: Any) -> Any:
    """Lists, which may equal each other, as tuples, and slices as what they are made of."""
    if isinstance(value, slice):
        return ("slice", value.start, value.stop, value.step)
    return tuple(value) if isinstance(value, list) else value


def as_interventions(interventions: Any) -> list[AnyIntervention]:
    """The interventions as a list, whether one or several are given.

    Raises:
        InterventionError: something else was given.
    """
    if isinstance(interventions, (Intervention, DirectionIntervention)):
        return [interventions]
    if not isinstance(interventions, Iterable) or isinstance(interventions, (str, bytes, Mapping, Tensor)):
        raise InterventionError(f"interventions is {shown(interventions)}: give an Intervention, or several in a list.")
    entries = list(interventions)
    for i, entry in enumerate(entries):
        if not isinstance(entry, (Intervention, DirectionIntervention)):
            raise InterventionError(
                f"interventions[{i}] is {shown(entry)}: give an Intervention or a DirectionIntervention."
            )
    return entries


def _as_wholes(name: str, value: Any) -> Any:
    """A whole number, or several in a list."""
    if is_whole(plain(value)):
        return as_whole(name, value, error=InterventionError)
    if isinstance(value, (list, tuple)) and not value:
        return value
    if isinstance(value, str):
        raise InterventionError(f"{name} is {shown(value)}: give a whole number, or several in a list.")
    entries = as_several(name, value, "a whole number, or several in a list", InterventionError)
    wholes = [as_whole(f"{name}[{i}]", entry, error=InterventionError) for i, entry in enumerate(entries)]
    return tuple(wholes) if isinstance(value, tuple) else wholes


def _as_positions(pos: Any) -> Any:
    """None, a slice, a position, or several in a list."""
    if isinstance(pos, slice):
        parts = {"start": pos.start, "stop": pos.stop, "step": pos.step}
        ends = {"start": "the first", "stop": "the end", "step": "every one"}
        return slice(*(as_whole(f"pos.{k}", v, none=ends[k], error=InterventionError) for k, v in parts.items()))
    return None if pos is None else _as_wholes("pos", pos)


def _as_amount(name: str, value: Any) -> Any:
    """A finite number, or several in a list (of noise only one)."""
    if name == "noise" or isinstance(plain(value), (numbers.Number, str)):
        return as_number(name, value, error=InterventionError)
    if isinstance(value, (list, tuple)) and not value:
        return value
    entries = as_several(name, value, "a finite number, or one for each feature in a list", InterventionError)
    amounts = [as_number(f"{name}[{i}]", entry, error=InterventionError) for i, entry in enumerate(entries)]
    return tuple(amounts) if isinstance(value, tuple) else amounts


Positions: TypeAlias = range | frozenset[int]
"""Positions in a text; a range without an end is one up to sys.maxsize."""


class Place(NamedTuple):
    """Where an intervention acts in one pass, in prompts that are padded alike."""

    rows: list[int]
    """Prompts of the batch."""
    positions: list[int]
    """In each prompt's own text."""
    columns: list[int]
    """The same in the tensors of the pass."""

    def index(self, device: torch.device) -> tuple[Int[Tensor, "rows 1"], Int[Tensor, "1 columns"]]:
        """Into tensors [batch, pos, ...] of the pass."""
        rows, columns = (torch.tensor(numbers, device=device) for numbers in (self.rows, self.columns))
        return rows[:, None], columns[None]


def within(positions: Positions, first: int, n_pos: int) -> list[int]:
    """Those of some positions that a pass over `n_pos` tokens from position `first` holds."""
    return [p for p in range(first, first + n_pos) if p in positions]


def check(
    intervention: Intervention | DirectionIntervention,
    clt: CrossLayerTranscoder,
    lengths: Sequence[int],
    through_layer: int | None,
) -> None:
    """Check an intervention against a CLT and the lengths of a batch of prompts.

    Raises:
        CLTMismatch: it is known to be of another CLT's features.
        InterventionError: a layer, feature, width, prompt or position that is not there, or a feature above
            `through_layer`.
    """
    if intervention.prompt is not None and intervention.prompt >= len(lengths):
        raise InterventionError(
            f"There is no prompt {intervention.prompt}: the batch has prompts 0 to {len(lengths) - 1}."
        )
    for length in sorted(set(lengths)) if intervention.prompt is None else [lengths[intervention.prompt]]:
        positions_of(intervention, length)
    if isinstance(intervention, Intervention):
        if intervention.clt not in (None, clt.fingerprint()):
            raise CLTMismatch(
                f"{intervention} was made from a graph of another CLT, whose features mean other things. Give the CLT"
                " that the graph was traced with, or write the intervention without the graph."
            )
        _check_feature(intervention, clt.cfg, through_layer)
    else:
        _check_direction(intervention, clt.cfg)


def _check_feature(intervention: Intervention, cfg: CrossLayerTranscoderConfig, through_layer: int | None) -> None:
    if not 0 <= intervention.layer < cfg.n_layers:
        raise InterventionError(
            f"{intervention}: there is no layer {intervention.layer}. The CLT has layers 0 to {cfg.n_layers - 1}."
        )
    for feature in intervention.features:
        if not 0 <= feature < cfg.d_transcoder:
            raise InterventionError(
                f"{intervention}: there is no feature {feature}. A layer has features 0 to {cfg.d_transcoder - 1}."
            )
    if through_layer is not None and intervention.layer > through_layer:
        raise InterventionError(
            f"{intervention} lies above through_layer={through_layer}, where the model itself runs, so that it would"
            f" change nothing. Give through_layer={intervention.layer} or more, or None."
        )


def _check_direction(intervention: DirectionIntervention, cfg: CrossLayerTranscoderConfig) -> None:
    if not -1 <= intervention.layer < cfg.n_layers:
        raise InterventionError(
            f"There is no layer {intervention.layer} to write a direction after: give 0 to {cfg.n_layers - 1}, or -1"
            " for before block 0."
        )
    if len(intervention.vector) != cfg.d_model:
        raise InterventionError(f"The vector has {len(intervention.vector)} entries, but d_model is {cfg.d_model}.")


def positions_of(intervention: Intervention | DirectionIntervention, n_pos: int) -> Positions:
    """The positions that an intervention means on prompts of one length.

    Raises:
        InterventionError: a position that is not there, or none at all.
    """
    pos = intervention.pos
    if pos is None:
        return range(sys.maxsize)
    if isinstance(pos, slice):
        if pos.step is not None and pos.step < 1:
            raise InterventionError(f"{intervention}: positions go backwards. Give a slice with a step of 1 or more.")
        start, stop, step = pos.indices(n_pos)
        if pos.stop is None:
            # A start behind the prompt means new tokens only.
            start = max(start, pos.start or 0)
            return range(start, sys.maxsize, step)
        if start >= stop:
            raise InterventionError(f"{intervention}: the slice holds none of the prompt's {n_pos} positions.")
        return range(start, stop, step)
    wanted = list(pos) if isinstance(pos, Sequence) else [pos]
    for p in wanted:
        if not -n_pos <= p < n_pos:
            raise InterventionError(
                f"{intervention}: there is no position {p}. The prompt has {n_pos} tokens, positions 0 to {n_pos - 1}."
                " For new tokens give None or a slice without an end."
            )
    if not wanted:
        raise InterventionError(f"{intervention}: the list of positions is empty.")
    return frozenset(p % n_pos for p in wanted)


@torch.no_grad()
def swap_interventions(
    model: HookedModel,
    clt: CrossLayerTranscoder,
    prompt: Prompt,
    source: Prompt,
    positions: Mapping[int, int],
    features: Iterable[tuple[int, int]] | None = None,
) -> list[Intervention]:
    """Interventions that give features the activations they have on another prompt (Texas -> California).

    Args:
        model, clt: a model and a CLT of it.
        prompt: the prompt to intervene on.
        source: the prompt to take activations from; of any length.
        positions: position in `source` -> position in `prompt`, negative ones counted from the end.
        features: (layer, feature) pairs to swap, those of either prompt; None for all that are active on either
            at these positions.

    Returns:
        One `Intervention` for each layer and position with something to swap.

    Raises:
        InterventionError: a position, layer or feature that is not there, or nothing to swap.
        CLTMismatch, HookNotFound, PromptError, TokenizerMissing: as for `intervene`.
    """
    check_fit(model, clt)
    prompt_tokens, source_tokens = (to_tokens(model, value_there) for value_there in (prompt, source))
    positions = _swapped_positions(positions, len(source_tokens), len(prompt_tokens))
    named = None if features is None else _by_layer(features, clt)
    here, there = (feature_acts(model, clt, tokens) for tokens in (prompt_tokens, source_tokens))
    swaps = []
    for source_pos, pos in positions.items():
        for layer in clt.layers:
            value_there = there[source_pos, layer]
            if named is None:
                chosen = torch.nonzero((value_there != 0) | (here[pos, layer] != 0)).flatten().tolist()
            else:
                chosen = named.get(layer, [])
            if chosen:
                value = value_there[chosen].tolist()
                swaps.append(Intervention(layer=layer, pos=pos, feature=chosen, value=value))
    if not swaps:
        raise InterventionError("There is nothing to swap: no feature is named, or active at these positions.")
    return swaps


def _swapped_positions(positions: Mapping[int, int], n_source: int, n_tokens: int) -> dict[int, int]:
    if not isinstance(positions, Mapping):
        raise InterventionError(f"positions is {shown(positions)}: give a dict, position in source -> in the prompt.")
    swapped = {
        _swapped_position(source, n_source, "the source"): _swapped_position(pos, n_tokens, "the prompt")
        for source, pos in positions.items()
    }
    if len({p % n_tokens for p in swapped.values()}) < len(positions):
        raise InterventionError(f"Two positions of the source go to one of the prompt: {dict(positions)}.")
    return swapped


def _swapped_position(position: object, length: int, name: str) -> int:
    pos = as_whole(f"A position in {name}", position, error=InterventionError)
    if not -length <= pos < length:
        raise InterventionError(f"There is no position {pos} in {name}: it has positions 0 to {length - 1}.")
    return pos


def _by_layer(features: Iterable[tuple[int, int]], clt: CrossLayerTranscoder) -> dict[int, list[int]]:
    """The features named, each once, by layer."""
    wanted = "(layer, feature) pairs"
    pairs = as_several("features", list(features) if isinstance(features, Set) else features, wanted, InterventionError)
    named: dict[int, list[int]] = {}
    for i, pair in enumerate([pairs] if len(pairs) == 2 and all(is_whole(plain(n)) for n in pairs) else pairs):
        numbers = as_several(f"features[{i}]", pair, wanted, InterventionError)
        if len(numbers) != 2:
            raise InterventionError(f"features[{i}] is {shown(pair)}: give {wanted}.")
        layer, feature = (as_whole(f"features[{i}]", number, error=InterventionError) for number in numbers)
        if not (0 <= layer < clt.cfg.n_layers and 0 <= feature < clt.cfg.d_transcoder):
            raise InterventionError(
                f"There is no feature {feature} in layer {layer}: the CLT has layers 0 to {clt.cfg.n_layers - 1} with"
                f" features 0 to {clt.cfg.d_transcoder - 1}."
            )
        if feature not in named.setdefault(layer, []):
            named[layer].append(feature)
    return named
