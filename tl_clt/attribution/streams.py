"""What is written into the residual stream of one prompt, and what is read from it.

Read points are numbered: point l < n_layers is the CLT's input at layer l, point n_layers is the output of
ln_final, and the ones after that are residual-stream hooks that a target asked for.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

Bos = Literal["error", "drop", "features"]
Stream = Float[Tensor, "pos d_model"]
Streams = Float[Tensor, "n_layers pos d_model"]


class Sites(NamedTuple):
    """What is written into the residual stream, by place. A clean run's values give back the clean run."""

    embed: Stream
    """Token embeddings."""
    pos_embed: Stream | None
    """Position embeddings, where the model adds them."""
    attn: list[Stream]
    """Added to each attention layer's output: zero, but what biases write can be told by it."""
    mlp: list[Stream]
    """Each MLP's output less the CLT's skip connection."""


class Reads(NamedTuple):
    """What is read from the residual stream."""

    points: list[Stream]
    """By read point: the CLT's inputs, ln_final's output, and what targets asked for."""
    logits: Float[Tensor, "pos d_vocab"]
    """Before any soft-cap."""


class ActiveFeatures(NamedTuple):
    """Features that are active on the prompt, ordered by (layer, pos, feature)."""

    layer: Int[Tensor, " n_active"]
    pos: Int[Tensor, " n_active"]
    feature: Int[Tensor, " n_active"]
    activation: Float[Tensor, " n_active"]


class Biases(NamedTuple):
    """What biases write at each layer, and what they add on reading at each read point."""

    attn: Streams
    mlp: Streams
    reads: list[Stream]


class Writes(NamedTuple):
    """All that a graph's nodes write."""

    features: ActiveFeatures
    strengths: Float[Tensor, " n_active"]
    """What multiplies each feature's decoder vectors: its activation, or the difference from another prompt's."""
    errors: Streams
    embed: Stream
    pos_embed: Stream | None
    biases: Biases | None
    """Where bias nodes are wanted."""


class Readouts(NamedTuple):
    """What target nodes read: `direction . (value at a read point and position)`."""

    point: Int[Tensor, " n_targets"]
    pos: Int[Tensor, " n_targets"]
    directions: Float[Tensor, "n_targets d_model"]
    constants: Float[Tensor, " n_targets"]
    """Added to what is read: b_U of logits, less its mean."""

    def take(self, chosen: Int[Tensor, " n"]) -> Readouts:
        """Some of them."""
        return Readouts(*(part[chosen] for part in self))
