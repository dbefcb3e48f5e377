"""Positions of held-out text, and what features do there: what labels are chosen and scored on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csc_matrix, csr_matrix
from torch import Tensor

from tl_clt.features.collect import counted_tokens
from tl_clt.lens import HookedModel, special_token_ids, token_strings
from tl_clt.replacement import layer_inputs
from tl_clt.texts import numbered_batches
from tl_clt.transcoder import CrossLayerTranscoder


class Window(NamedTuple):
    """The text around a position."""

    tokens: list[str]
    position: int
    """Which of the tokens it is."""


@dataclass(frozen=True, eq=False)
class Contexts:
    """The counted positions of some prompts, one after another: [n_contexts]."""

    prompts: list[Int[Tensor, " _"]]
    strings: list[list[str]]
    """The prompts' tokens as text."""
    prompt: np.ndarray
    """Which prompt each context is in."""
    position: np.ndarray
    """Where in it."""

    @classmethod
    def of(cls, model: HookedModel, prompts: Sequence[Int[Tensor, " _"]]) -> Contexts:
        """All positions of prompts that features are looked at."""
        special = torch.tensor(special_token_ids(model), dtype=torch.long)
        counted = [torch.nonzero(counted_tokens(tokens[None].cpu(), special)[0]).flatten() for tokens in prompts]
        return cls(
            list(prompts),
            [token_strings(model, tokens) for tokens in prompts],
            np.repeat(np.arange(len(prompts)), [len(positions) for positions in counted]),
            torch.cat([torch.zeros(0, dtype=torch.long), *counted]).numpy(),
        )

    def __len__(self) -> int:
        return len(self.prompt)

    def window(self, context: int, before: int, after: int) -> Window:
        """The tokens around one context."""
        words, at = self.strings[self.prompt[context]], int(self.position[context])
        first = max(0, at - before)
        return Window(words[first : at + after + 1], at - first)


class Firing(NamedTuple):
    """Where one feature is active, and how much."""

    contexts: np.ndarray
    activations: np.ndarray


@dataclass(frozen=True, eq=False)
class Activations:
    """Activations of all features of some contexts, by layer, with zeros left out."""

    contexts: Contexts
    by_feature: list[csc_matrix]
    """Of each layer, [n_contexts, n_features]."""
    directions: list[csr_matrix]
    """The same by context, each scaled to norm 1."""

    def firing(self, layer: int, feature: int) -> Firing:
        """Where a feature is active. Of one that is active in more than half of the contexts, the half in which it is
        most: what it is active at always tells nothing."""
        matrix = self.by_feature[layer]
        own = slice(matrix.indptr[feature], matrix.indptr[feature + 1])
        rows, values = matrix.indices[own], matrix.data[own]
        half = len(self.contexts) // 2
        if len(rows) > half:
            most = np.sort(np.argsort(np.negative(values), kind="stable")[:half])
            rows, values = rows[most], values[most]
        return Firing(rows, values)

    def nearest(self, layer: int, likes: np.ndarray, others: np.ndarray, k: int) -> np.ndarray:
        """Of some contexts (`others`) the k that are most like any of `likes`: by the cosine between the activations
        of a layer's features. Fewer, where only fewer have a feature in common with them."""
        directions = self.directions[layer]
        products: Any = directions[others] @ directions[likes].T
        alike: np.ndarray = products.toarray().max(axis=1)
        best = np.argsort(-alike, kind="stable")[:k]
        return others[best[alike[best] > 0]]


class HeldOutReading(NamedTuple):
    """What a CLT's features and some other directions read of held-out text."""

    features: Activations
    projections: Float[Tensor, "n_layers n_contexts n_directions"]


@torch.no_grad()
def read_contexts(
    model: HookedModel,
    clt: CrossLayerTranscoder,
    contexts: Contexts,
    directions: Float[Tensor, "n_layers d_model n_directions"],
) -> HeldOutReading:
    """Run prompts once; features' activations are kept without zeros, projections onto directions whole."""
    n_layers, n_directions = clt.cfg.n_layers, directions.shape[-1]
    directions = directions.to(clt.W_enc)
    projections = torch.zeros(n_layers, len(contexts), n_directions)
    found: list[list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = [[] for _ in clt.layers]
    first = np.searchsorted(contexts.prompt, np.arange(len(contexts.prompts) + 1))
    batches = numbered_batches(model, enumerate(contexts.prompts), values_per_token=2 * clt.cfg.d_transcoder)
    for batch in batches:
        inputs = layer_inputs(model, clt, batch.tokens.to(model.W_E.device))
        rows = np.concatenate([np.arange(int(first[i]), int(first[i + 1])) for i in batch.numbers.tolist()])
        row_of = torch.repeat_interleave(
            torch.arange(len(batch.numbers)),
            torch.tensor([int(first[i + 1] - first[i]) for i in batch.numbers.tolist()]),
        )
        at = torch.from_numpy(contexts.position[rows])
        for layer in clt.layers:
            x = inputs[row_of.to(inputs.device), at.to(inputs.device), layer]
            acts = clt.encode_layer(x, layer).feature_acts.float().cpu()
            where, feature = torch.nonzero(acts > 0, as_tuple=True)
            found[layer].append((rows[where.numpy()], feature.numpy(), acts[where, feature].numpy()))
            projections[layer, rows] = (x @ directions[layer]).float().cpu()
    parts = [[np.concatenate(column) for column in zip(*of_layer, strict=True)] for of_layer in found]
    return HeldOutReading(as_activations(contexts, [(a, i, j) for i, j, a in parts], clt.cfg.d_transcoder), projections)


def as_activations(
    contexts: Contexts, entries: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], n_features: int
) -> Activations:
    """Activations of (values, contexts, features) of each layer."""
    shape = (len(contexts), n_features)
    by_feature = [csc_matrix((values, (rows, columns)), shape=shape) for values, rows, columns in entries]
    directions = []
    for matrix in by_feature:
        norms = np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=1)).ravel())
        rows = csr_matrix(matrix)
        values: np.ndarray = rows.data
        rows.data = values / np.repeat(np.where(norms > 0, norms, 1), np.diff(rows.indptr)).astype(values.dtype)
        directions.append(rows)
    return Activations(contexts, by_feature, directions)
