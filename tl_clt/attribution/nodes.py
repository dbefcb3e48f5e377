"""The nodes of an attribution graph, in a fixed order: features, errors, tokens, positions, biases, logits."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class NodeKind(IntEnum):
    """What a node stands for."""

    FEATURE = 0
    """An active CLT feature at one position."""
    ERROR = 1
    """What the CLT does not reconstruct of one MLP's output at one position."""
    TOKEN = 2
    """A token's embedding."""
    POSITION = 3
    """A position's embedding, where the model has learned ones."""
    BIAS = 4
    """All biases of one block: of attention and its norms, and b_dec. The last one: of ln_final and b_U."""
    LOGIT = 5
    """A token's logit above the mean logit, at the last position."""


def same_values(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors, or their absence, are alike: number type, shape and every number, on whatever device."""
    if one is None or other is None:
        return one is other
    return one.dtype == other.dtype and torch.equal(one, other.to(one.device))


@dataclass(frozen=True, eq=False)
class Nodes:
    """One entry a node in each tensor [n_nodes]. Equal where all of them are, number for number."""

    kind: Int[Tensor, " n_nodes"]
    """Values of `NodeKind`."""

    layer: Int[Tensor, " n_nodes"]
    """The layer a feature reads, an error writes or a bias belongs to; -1 for tokens and positions, n_layers for
    logits and the last bias."""

    pos: Int[Tensor, " n_nodes"]
    """Position in the prompt; -1 for biases, which act at all of them."""

    index: Int[Tensor, " n_nodes"]
    """Feature number; token id for tokens and logits; else 0."""

    activation: Float[Tensor, " n_nodes"]
    """A feature's activation; a logit's height above the mean logit; else the norm of the node's vectors."""

    def where(self, kind: NodeKind) -> Int[Tensor, " n"]:
        """Numbers of the nodes of one kind, in order."""
        return torch.nonzero(self.kind == int(kind)).flatten()

    def is_kind(self, *kinds: NodeKind) -> Bool[Tensor, " n_nodes"]:
        """Mask of the nodes of some kinds."""
        return torch.isin(self.kind, torch.tensor([int(k) for k in kinds], device=self.kind.device))

    def take(self, kept: Int[Tensor, " n_kept"] | Bool[Tensor, " n_nodes"]) -> Nodes:
        """The nodes of a mask or list of numbers."""
        return Nodes(**{name: values[kept] for name, values in self.tensors().items()})

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Nodes):
            return NotImplemented
        return all(same_values(values, other.tensors()[name]) for name, values in self.tensors().items())

    def __hash__(self) -> int:
        return hash((len(self), tuple(self.layer.tolist()), tuple(self.index.tolist())))

    def __len__(self) -> int:
        return len(self.kind)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def build(cls, parts: list[tuple[NodeKind, Tensor, Tensor, Tensor, Tensor]]) -> Nodes:
        """Nodes of (kind, layer, pos, index, activation) parts, one after another."""
        kinds = torch.cat([torch.full_like(layer, int(kind)) for kind, layer, *_ in parts])
        _, *values = zip(*parts, strict=True)
        return cls(kinds, *(torch.cat(tensors) for tensors in values))
