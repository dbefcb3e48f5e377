"""A dataset as chunks of activations: the prompts of one forward pass, and which of their tokens to train on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_clt.errors import DatasetError

Prompts = Int[Tensor, "prompt pos"]
Activations = Float[Tensor, "token 2 n_layers d_model"]


@dataclass(frozen=True)
class DataCounts:
    """Tokens read from the dataset so far, each in one of four places. Some that are kept still wait in the buffer."""

    epochs: int = 0
    """Times that the dataset was read to its end."""

    prompts: int = 0
    """Prompts that went through the model or came from the cache."""

    kept: int = 0
    """Tokens to train on."""

    other_positions: int = 0
    """Tokens left out by `seqpos_slice`."""

    special_tokens: int = 0
    """Tokens left out by `exclude_special_tokens`."""

    outliers: int = 0
    """Tokens left out by `max_norm_ratio`."""

    def __add__(self, other: DataCounts) -> DataCounts:
        """Both together."""
        mine, theirs = asdict(self), asdict(other)
        return DataCounts(**{name: mine[name] + theirs[name] for name in mine})


@dataclass(frozen=True)
class Rules:
    """Which tokens are trained on."""

    seqpos_slice: tuple[int | None, ...] = (None,)
    """Positions within a prompt, as the arguments of `slice`."""

    excluded: Int[Tensor, " n_ids"] | None = None
    """Token ids that are left out."""

    max_norm_ratio: float | None = None
    """Left out: tokens at which the norm of some layer's input or output is more than so many times the chunk's
    median of it. (The median, because the mean moves with what is to be left out.)"""

    def choose(self, tokens: Prompts, activations: Activations) -> tuple[Int[Tensor, " kept"], DataCounts]:
        """Rows of `activations`, which are the tokens' prompt after prompt, to train on; and the counts."""
        within = torch.zeros_like(tokens, dtype=torch.bool)
        within[:, slice(*self.seqpos_slice)] = True
        ordinary = torch.ones_like(within) if self.excluded is None else ~torch.isin(tokens, self.excluded)
        wanted = within.flatten() & ordinary.flatten()
        kept = wanted
        if self.max_norm_ratio is not None and wanted.any():
            kept = wanted & _usual(activations, wanted, self.max_norm_ratio)
        n_within, n_wanted, n_kept = int(within.sum()), int(wanted.sum()), int(kept.sum())
        counts = DataCounts(
            prompts=len(tokens),
            kept=n_kept,
            other_positions=tokens.numel() - n_within,
            special_tokens=n_within - n_wanted,
            outliers=n_wanted - n_kept,
        )
        return kept.nonzero()[:, 0], counts


def _usual(activations: Activations, wanted: Bool[Tensor, " token"], max_norm_ratio: float) -> Bool[Tensor, " token"]:
    """Tokens none of whose norms is above the limit."""
    norms = activations.norm(dim=-1, dtype=torch.promote_types(activations.dtype, torch.float32))
    limit = max_norm_ratio * norms[wanted].median(dim=0).values
    return (norms <= limit).flatten(start_dim=1).all(dim=1)


class Place(NamedTuple):
    """Where a chunk is in the dataset."""

    epoch: int
    """Passes over the dataset before this one."""

    index: int
    """Chunks of this pass before this one."""


class Chunk(NamedTuple):
    """What one forward pass gives to train on."""

    place: Place
    """Where it is."""

    rows: Activations
    """Activations of the tokens that are kept."""

    ids: Int[Tensor, " token"]
    """Which they are: index of the chunk * tokens of a full chunk + place within it. The same in every pass."""

    counts: DataCounts
    """Of this chunk alone."""

    tokens_digest: str
    """sha256 of all tokens of this pass up to the end of this chunk."""


class Chunks:
    """A dataset's activations, chunk by chunk, again and again.

    Args:
        one_pass: makes an iterator over the dataset's prompts, the same every time, some prompts at a time.
        read: raw activations of prompts, all positions.
        rules: which tokens to keep.
        full: tokens of a chunk that is not the last of its pass.
    """

    def __init__(
        self,
        one_pass: Callable[[], Iterator[Prompts]],
        read: Callable[[Prompts], Activations],
        rules: Rules,
        full: int,
    ) -> None:
        self._one_pass = one_pass
        self._read = read
        self._rules = rules
        self._full = full

    def after(self, place: Place | None, tokens_digest: str | None = None) -> Iterator[Chunk]:
        """The chunks that follow a place, without end; all of them where place is None.

        Args:
            place: of the last chunk that is not wanted again. Its pass is read to there, without the model.
            tokens_digest: what that chunk said of the tokens; they must be the same now.

        Raises:
            DatasetError: the tokens up to the place are others, or no token of a whole pass is kept.
        """
        epoch, skip = (0, 0) if place is None else (place.epoch, place.index + 1)
        while True:
            digest, prompts = hashlib.sha256(), self._one_pass()
            for tokens in islice(prompts, skip):
                digest.update(tokens.cpu().numpy().tobytes())
            if skip > 0 and digest.hexdigest() != tokens_digest:
                raise DatasetError(_OTHER_TOKENS)
            n_kept = 0
            for index, tokens in enumerate(prompts, start=skip):
                digest.update(tokens.cpu().numpy().tobytes())
                chunk = self._chunk(Place(epoch, index), tokens, digest.hexdigest(), new_epoch=index == 0 < epoch)
                n_kept += len(chunk.rows)
                yield chunk
            if n_kept == 0 and skip == 0:
                raise DatasetError(
                    "No token of the dataset is left to train on. Widen seqpos_slice, exclude fewer tokens, or raise"
                    " max_norm_ratio."
                )
            epoch, skip = epoch + 1, 0

    def find(self, ids: Int[Tensor, " token"]) -> Activations:
        """The activations of tokens, in order, read once more. There must be at least one.

        Raises:
            DatasetError: the dataset is shorter than it was.
        """
        places, offsets = ids // self._full, ids % self._full
        wanted = set(places.tolist())
        rows: Tensor | None = None
        for index, tokens in enumerate(self._one_pass()):
            if index in wanted:
                found, here = self._read(tokens), places == index
                if rows is None:
                    rows = found.new_empty(len(ids), *found.shape[1:])
                rows[here.to(rows.device)] = found[offsets[here].to(found.device)]
                wanted.remove(index)
            if not wanted and rows is not None:
                return rows
        raise DatasetError(_OTHER_TOKENS)

    def _chunk(self, place: Place, tokens: Prompts, digest: str, new_epoch: bool) -> Chunk:
        activations = self._read(tokens)
        kept, counts = self._rules.choose(tokens.to(activations.device), activations)
        ids = place.index * self._full + kept.cpu()
        return Chunk(place, activations[kept], ids, counts + DataCounts(epochs=int(new_epoch)), digest)


_OTHER_TOKENS = (
    "The dataset gives other tokens than the run that is to be resumed read. Give the same dataset and tokenizer, or"
    " start a new run without resume."
)
