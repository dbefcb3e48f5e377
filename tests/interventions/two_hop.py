"""Atlas's two-hop prompts: which features of their graphs carry the state, and what follows if they are changed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from tl_clt import CrossLayerTranscoder, Intervention, NodeKind, attribute, intervene
from tl_clt.interventions import swap_interventions
from tl_clt.lens import HookedModel
from tl_clt.organisms.atlas.text import held_out_questions, train_questions

CITY, LAST = 7, 8
"""Positions in "<bos> the capital of the state containing <city> is"."""
SELECTIVE = 0.5
"""Share of a feature's variance over all prompts that lies between states, from which on it carries the state."""
ALIKE = 3


class Place(NamedTuple):
    """A feature at a position."""

    layer: int
    pos: int
    feature: int


class Outcome(NamedTuple):
    """What came of one prompt; all but `n_features` are 0 or 1."""

    n_features: int
    swap_other: int
    """Swapped for another state's prompt: the answer is that state's capital."""
    swap_lost: int
    """Swapped for another state's prompt: the answer is no longer this state's capital."""
    same_state_kept: int
    """Swapped for another city's of the same state: the answer stays."""
    ablated_lost: int
    """Set to 0: the answer is lost."""
    negated_lost: int
    """Turned against themselves, set to minus their activation: the answer is lost."""
    control_other: int
    """Matched random features, each changed by as much as one in the swap: the answer is the other state's capital."""
    control_swap_lost: int
    control_ablated_lost: int
    """Matched random active features set to 0: the answer is lost."""
    control_negated_lost: int


class TwoHop:
    """All "the capital of the state containing <city> is" prompts, trained ones first, and their activations."""

    def __init__(self, model: HookedModel, clt: CrossLayerTranscoder) -> None:
        self.model, self.clt = model, clt
        trained = [q for q in train_questions() if q.relation == "capital"]
        self.n_trained = len(trained)
        self.questions = [*trained, *(q for q in held_out_questions() if q.relation == "capital")]
        effect = intervene(model, clt, [q.prompt for q in self.questions], [])
        assert effect.tokens.shape[1] == LAST + 1
        self.acts = effect.baseline_feature_acts
        self.clean = effect.baseline_logits[:, -1].argmax(dim=-1).tolist()
        self.answers = [int(model.to_tokens(q.answer, prepend_bos=False)[0, 0]) for q in self.questions]
        self.state_share = self._state_share()

    def sample(self, n_each: int, seed: int = 0) -> list[tuple[int, int, int]]:
        """(prompt, one of another state, one of the same state) for some trained and as many held-out prompts."""
        rng = random.Random(seed)
        n = len(self.questions)
        chosen = rng.sample(range(self.n_trained), n_each) + rng.sample(range(self.n_trained, n), n_each)
        states = [q.state for q in self.questions]
        return [
            (
                i,
                rng.choice([j for j in range(n) if states[j] != states[i]]),
                rng.choice([j for j in range(n) if states[j] == states[i] and j != i]),
            )
            for i in chosen
        ]

    def carriers(self, i: int, node_threshold: float = 0.9) -> set[Place]:
        """Features of a prompt's pruned graph, at the city and after it, that carry the state."""
        graph = attribute(self.model, self.clt, self.questions[i].prompt, progress=False).prune(node_threshold)
        nodes = graph.nodes.take(graph.nodes.where(NodeKind.FEATURE))
        found = [
            Place(*place) for place in zip(*(x.tolist() for x in (nodes.layer, nodes.pos, nodes.index)), strict=True)
        ]
        return {p for p in found if p.pos >= CITY and self.state_share[p.pos, p.layer, p.feature] >= SELECTIVE}

    def outcome(
        self, i: int, other: int, same: int, here: set[Place], there: set[Place], through_layer: int | None, seed: int
    ) -> Outcome:
        """Swap and suppress features, and matched random ones.

        Args:
            i, other, same: a prompt, one of another state and one of the same state.
            here, there: what carries the state on the first and on the second.
            through_layer: as for `intervene`.
            seed: of the random features.
        """
        acts = self.acts[i]
        both, mine = sorted(here | there), sorted(here)
        beside_both = self._matched(i, both, seed, active=False)
        beside_mine = self._matched(i, mine, seed, active=True)
        change = self.acts[other] - acts
        swap, same_state, ablated, negated, control, control_ablated, control_negated = self._answers(
            i,
            [
                self._swap(i, other, both),
                self._swap(i, same, both),
                _set({p: 0.0 for p in mine}),
                _set({p: -_of(acts, p) for p in mine}),
                _set({q: _of(acts, q) + _of(change, p) for p, q in zip(both, beside_both, strict=True)}),
                _set({p: 0.0 for p in beside_mine}),
                _set({p: -_of(acts, p) for p in beside_mine}),
            ],
            through_layer,
        )
        right = self.answers[i]
        return Outcome(
            n_features=len(both),
            swap_other=int(swap == self.answers[other]),
            swap_lost=int(swap != right),
            same_state_kept=int(same_state == right),
            ablated_lost=int(ablated != right),
            negated_lost=int(negated != right),
            control_other=int(control == self.answers[other]),
            control_swap_lost=int(control != right),
            control_ablated_lost=int(control_ablated != right),
            control_negated_lost=int(control_negated != right),
        )

    def _answers(self, i: int, runs: Sequence[Sequence[Intervention]], through_layer: int | None) -> list[int]:
        """The likeliest next token of a prompt under each list of interventions, in one pass."""
        prompts = [self.questions[i].prompt] * len(runs)
        what = [replace(one, prompt=row) for row, run in enumerate(runs) for one in run]
        effect = intervene(self.model, self.clt, prompts, what, through_layer)
        return effect.logits[:, -1].argmax(dim=-1).tolist()

    def _swap(self, i: int, other: int, places: Sequence[Place]) -> list[Intervention]:
        prompts = self.questions[i].prompt, self.questions[other].prompt
        swaps = []
        for pos in sorted({p.pos for p in places}):
            features = [(p.layer, p.feature) for p in places if p.pos == pos]
            swaps += swap_interventions(self.model, self.clt, *prompts, {pos: pos}, features)
        return swaps

    def _matched(self, i: int, places: Sequence[Place], seed: int, *, active: bool) -> list[Place]:
        """For each feature another one of the same layer, which is none of them.

        A random one of the three active ones at the same position with the most similar activation; where there is none
        left, the like at another position (`active`), or a random one at the same position that is not active.
        """
        rng = random.Random(seed)
        taken = set(places)
        found = []
        for place in places:
            acts = self.acts[i, :, place.layer]
            free = [
                candidate
                for pos, feature in torch.nonzero(acts > 0).tolist()
                if (candidate := Place(place.layer, pos, feature)) not in taken
            ]
            free = [p for p in free if p.pos == place.pos] or (free if active else [])
            free.sort(key=lambda p: abs(float(acts[p.pos, p.feature] - acts[place.pos, place.feature])))
            inactive = (place._replace(feature=f) for f in torch.nonzero(acts[place.pos] == 0).flatten().tolist())
            chosen = rng.choice(free[:ALIKE] or [p for p in inactive if p not in taken])
            taken.add(chosen)
            found.append(chosen)
        return found

    def _state_share(self) -> Tensor:
        """[pos, n_layers, d_transcoder]: share of the variance over prompts that lies between states."""
        states = sorted({q.state for q in self.questions})
        member = torch.tensor([[q.state == state for state in states] for q in self.questions]).to(self.acts)
        acts = self.acts - self.acts.mean(dim=0)
        means = torch.einsum("ns,n...->s...", member, acts) / member.sum(dim=0)[:, None, None, None]
        between = torch.einsum("s,s...->...", member.sum(dim=0), means.square())
        whole = acts.square().sum(dim=0)
        return torch.where(whole > 1e-4, between / whole.clamp_min(1e-4), 0)


def _of(acts: Tensor, place: Place) -> float:
    return float(acts[place.pos, place.layer, place.feature])


def _set(values: dict[Place, float]) -> list[Intervention]:
    """Features set to values; one intervention for each layer and position."""
    groups: dict[tuple[int, int], list[Place]] = {}
    for place in values:
        groups.setdefault((place.layer, place.pos), []).append(place)
    return [
        Intervention(layer=layer, pos=pos, feature=[p.feature for p in places], value=[values[p] for p in places])
        for (layer, pos), places in groups.items()
    ]
