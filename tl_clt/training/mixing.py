"""The shuffling buffer: batches of tokens mixed from many prompts, in an order that can be taken up again.

SAELens's `mixing_buffer` in what it does, with random numbers of its own (so that neither the trainer's numbers nor a
background thread change the order) and with a position: which tokens it holds, without their activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from tl_clt.training.chunks import Activations, Chunk, DataCounts, Place
from tl_clt.training.scaling import Batch


@dataclass(frozen=True)
class Position:
    """Where a stream of batches is, after some batch. With the dataset and the model this is enough to go on."""

    place: Place
    """Of the last chunk that went into the buffer."""

    tokens_digest: str
    """What that chunk says of its pass's tokens."""

    ids: Int[Tensor, " held"]
    """Tokens in the buffer, in order."""

    n_ready: int
    """Batches that come off its front before it is filled and shuffled again."""

    generator: UInt8[Tensor, " _"]
    """State of the shuffling's random numbers."""

    counts: DataCounts
    """What was read so far."""


class MixedBatches(Iterator[Batch]):
    """Batches of a fixed size from a buffer that is filled to `size` tokens, shuffled, and emptied to `kept`.

    Args:
        chunks: without end.
        size: tokens to which the buffer is filled; a chunk may take it beyond.
        batch_size: tokens of a batch, at most `size`.
        kept: tokens that stay for the next shuffle, about.
        seed: of the shuffling.
    """

    def __init__(self, chunks: Iterator[Chunk], *, size: int, batch_size: int, kept: int, seed: int) -> None:
        self._chunks = chunks
        self._size, self._batch_size, self._kept = size, batch_size, kept
        self._generator = torch.Generator().manual_seed(seed)
        self._rows: Activations | None = None
        self._ids = torch.empty(0, dtype=torch.int64)
        self._n_ready = 0
        self._place, self._tokens_digest = Place(0, -1), ""
        self.counts = DataCounts()

    def go_on(self, position: Position, rows: Activations | None) -> None:
        """Take up a position; `rows` are the activations of its ids, None where it has none."""
        self._rows, self._ids, self._n_ready = rows, position.ids, position.n_ready
        self._place, self._tokens_digest = position.place, position.tokens_digest
        self._generator.set_state(position.generator)
        self.counts = position.counts

    @property
    def position(self) -> Position:
        """After the last batch that was handed out."""
        return Position(
            self._place, self._tokens_digest, self._ids, self._n_ready, self._generator.get_state(), self.counts
        )

    def __next__(self) -> Batch:
        if self._n_ready == 0:
            self._fill()
        assert self._rows is not None
        batch, self._rows = self._rows[: self._batch_size], self._rows[self._batch_size :]
        self._ids = self._ids[self._batch_size :]
        self._n_ready -= 1
        return batch

    def _fill(self) -> None:
        parts, ids = [] if self._rows is None else [self._rows], [self._ids]
        n_held = len(self._ids)
        while n_held < self._size:
            chunk = next(self._chunks)
            parts.append(chunk.rows)
            ids.append(chunk.ids)
            n_held += len(chunk.ids)
            self._place, self._tokens_digest = chunk.place, chunk.tokens_digest
            self.counts += chunk.counts
        order = torch.randperm(n_held, generator=self._generator)
        self._ids = torch.cat(ids)[order]
        self._rows = _in_order(parts, order)
        self._n_ready = max(1, (n_held - self._kept) // self._batch_size)


def _in_order(parts: list[Tensor], order: Int[Tensor, " held"]) -> Tensor:
    """`torch.cat(parts)[order]`, without the copy that cat makes. The list is emptied."""
    target = torch.empty_like(order)
    target[order] = torch.arange(len(order))
    mixed = parts[0].new_empty(len(order), *parts[0].shape[1:])
    start = 0
    while parts:
        part = parts.pop(0)
        mixed[target[start : start + len(part)].to(part.device)] = part
        start += len(part)
    return mixed
