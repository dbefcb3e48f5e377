"""Where decoder vectors live: in memory, or on disk with only the asked-for rows read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor, nn


class DecoderFile(NamedTuple):
    """Where one source layer's decoder lies on disk."""

    path: Path
    """safetensors file."""

    key: str
    """Name of a tensor [d_transcoder, slots, d_model] in it, or [d_transcoder, d_model] for one slot."""

    first_slot: int = 0
    """Slot that holds the source layer's own output."""

    unused_slots: int = 0
    """Slots after the last one that this CLT writes (a span below n_layers in a layout without spans)."""


class DenseDecoders(nn.Module):
    """All decoders in memory: one parameter [d_transcoder, n_writes, d_model] a source layer."""

    def __init__(self, per_source: Sequence[Float[Tensor, "d_transcoder _ d_model"]]) -> None:
        super().__init__()
        self.per_source = nn.ParameterList([nn.Parameter(w) for w in per_source])

    def __len__(self) -> int:
        return len(self.per_source)

    def __getitem__(self, source: int) -> Float[Tensor, "d_transcoder n_writes d_model"]:
        return self.per_source[source]

    def rows(self, source: int, features: Int[Tensor, " n"]) -> Float[Tensor, "n n_writes d_model"]:
        """Decoder vectors of the features named, one for each layer they write to."""
        return self.per_source[source][features]


class LazyDecoders(nn.Module):
    """Decoders left in their files. `rows` reads what it is asked for; indexing reads a whole layer."""

    def __init__(
        self, files: Sequence[DecoderFile], n_writes: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.files = list(files)
        self.n_writes = list(n_writes)
        self.dtype = dtype
        self.register_buffer("place", torch.zeros(0, dtype=dtype, device=device), persistent=False)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, source: int) -> Float[Tensor, "d_transcoder n_writes d_model"]:
        file = self.files[source]
        with safe_open(file.path, framework="pt") as opened:
            whole = opened.get_tensor(file.key)
        return self._window(whole, source)

    def rows(self, source: int, features: Int[Tensor, " n"]) -> Float[Tensor, "n n_writes d_model"]:
        """Decoder vectors of the features named, read from disk in runs of neighbouring rows."""
        file = self.files[source]
        wanted, back = torch.unique(features.cpu(), return_inverse=True)
        with safe_open(file.path, framework="pt") as opened:
            stored = opened.get_slice(file.key)
            if len(wanted) == 0:
                return self._window(stored[0:0], source)
            breaks = torch.nonzero(wanted.diff() != 1).flatten().add(1).tolist()
            runs = [stored[int(r[0]) : int(r[-1]) + 1] for r in torch.tensor_split(wanted, breaks)]
        return self._window(torch.cat(runs)[back], source)

    def _window(self, stored: Tensor, source: int) -> Float[Tensor, "n n_writes d_model"]:
        """The slots that this CLT writes, in its dtype and on its device."""
        if stored.ndim == 2:
            stored = stored[:, None, :]
        first = self.files[source].first_slot
        place: Tensor = self.place  # type: ignore[assignment]
        return stored[:, first : first + self.n_writes[source]].to(place.device, place.dtype)


Decoders = DenseDecoders | LazyDecoders
