"""Where decoder vectors live, in memory or on disk with only the asked-for rows read; and a CLT's weights as files hold
them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tl_clt.errors import FormatError
from tl_clt.transcoder.config import CrossLayerTranscoderConfig
from tl_clt.transcoder.tensor_files import TensorFile, open_tensors


class DecoderFile(NamedTuple):
    """One tensor holds all that a source layer writes."""

    path: Path
    """safetensors or .npz file."""

    key: str
    """Name of a tensor [d_transcoder, slots, d_model] in it, or [d_transcoder, d_model] for one slot."""

    first_slot: int = 0
    """Slot that holds the source layer's own output."""

    unused_slots: int = 0
    """Slots after the last one that this CLT writes (a span below n_layers in a layout without spans)."""

    def check(self, tensors: TensorFile, d_transcoder: int, n_writes: int, d_model: int) -> None:
        """Raise unless the open file holds a decoder of this shape."""
        wanted = (d_transcoder, self.first_slot + n_writes + self.unused_slots, d_model)
        as_matrix = wanted[1] == 1 and tensors.shape(self.key) == (d_transcoder, d_model)
        tensors.require_shape(self.key, (d_transcoder, d_model) if as_matrix else wanted)

    def read(self, tensors: TensorFile, rows: slice, n_writes: int) -> Float[Tensor, "n n_writes d_model"]:
        """Some neighbouring rows, one vector for each layer written."""
        if len(tensors.shape(self.key)) == 2:
            return tensors.part(self.key, (rows,))[:, None, :]
        return tensors.part(self.key, (rows, slice(self.first_slot, self.first_slot + n_writes)))


class DecodersByTarget(NamedTuple):
    """A tensor for each target layer, which holds what every source layer up to it writes there."""

    path: Path

    keys: tuple[str, ...]
    """Names of tensors [n_sources, d_transcoder, d_model], of this source layer's targets in order."""

    n_sources: tuple[int, ...]
    """Source layers that each of them holds."""

    source: int

    def check(self, tensors: TensorFile, d_transcoder: int, n_writes: int, d_model: int) -> None:
        for key, n_sources in zip(self.keys, self.n_sources, strict=True):
            tensors.require_shape(key, (n_sources, d_transcoder, d_model))

    def read(self, tensors: TensorFile, rows: slice, n_writes: int) -> Float[Tensor, "n n_writes d_model"]:
        return torch.stack([tensors.part(key, (self.source, rows)) for key in self.keys[:n_writes]], dim=1)


DecoderSource = DecoderFile | DecodersByTarget
"""Where one source layer's decoder lies on disk."""


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
    """Decoders left in their files. `rows` reads what it is asked for; indexing reads a whole layer.

    A copy, or what is made of a pickle, reads the same files, which must still lie where they were.
    """

    def __init__(
        self,
        sources: Sequence[DecoderSource],
        n_writes: Sequence[int],
        d_transcoder: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        # Absolute, so that another working folder, as a pickle's reader may have, does not lose them.
        self.sources = [source._replace(path=source.path.absolute()) for source in sources]
        self.n_writes = list(n_writes)
        self.d_transcoder = d_transcoder
        self.dtype = dtype
        self.register_buffer("place", torch.zeros(0, dtype=dtype, device=device), persistent=False)

    def __len__(self) -> int:
        return len(self.sources)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for source in self.sources:
            if not source.path.is_file():
                raise FormatError(
                    f"This CLT was copied or pickled with its decoders left on disk, in '{source.path}', which is not"
                    " there. Put its folder back, or load the CLT with lazy_decoder=False before it is pickled."
                )

    def __getitem__(self, source: int) -> Float[Tensor, "d_transcoder n_writes d_model"]:
        return self._read(source, [slice(0, self.d_transcoder)])

    def rows(self, source: int, features: Int[Tensor, " n"]) -> Float[Tensor, "n n_writes d_model"]:
        """Decoder vectors of the features named, read from disk in runs of neighbouring rows."""
        wanted, back = torch.unique(features.cpu(), return_inverse=True)
        if len(wanted) == 0:
            return self._read(source, [slice(0, 0)])
        breaks = torch.nonzero(wanted.diff() != 1).flatten().add(1).tolist()
        runs = [slice(int(run[0]), int(run[-1]) + 1) for run in torch.tensor_split(wanted, breaks)]
        return self._read(source, runs)[back.to(self.place.device)]

    def _read(self, source: int, runs: list[slice]) -> Float[Tensor, "n n_writes d_model"]:
        """Rows in this CLT's dtype and on its device."""
        place: Tensor = self.place  # type: ignore[assignment]
        decoder = self.sources[source]
        with open_tensors(decoder.path) as tensors:
            parts = [decoder.read(tensors, run, self.n_writes[source]) for run in runs]
        rows = torch.cat(parts)
        require_finite(rows, f"decoder of layer {source}", decoder.path)
        return rows.to(place.device, place.dtype)


def require_finite(weight: Tensor, name: str, path: Path) -> None:
    """Raise where a weight that was read holds NaN or an infinite value.

    Raises:
        FormatError: it does: the file is damaged, or the training that wrote it had diverged.
    """
    if weight.numel() and not all(bool(extreme.isfinite()) for extreme in weight.aminmax()):
        raise FormatError(
            f"'{path}' holds a CLT whose {name} is not finite everywhere (NaN or infinity). The file is damaged, or its"
            " training went wrong: get it anew, or train again with a lower lr."
        )


Decoders = DenseDecoders | LazyDecoders


def read_decoders(
    sources: Sequence[DecoderSource],
    n_writes: Sequence[int],
    d_transcoder: int,
    d_model: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    lazy: bool,
) -> Decoders:
    """Check that every file holds the decoder it should; read all of them, or leave them on disk."""
    for source, slots in zip(sources, n_writes, strict=True):
        with open_tensors(source.path) as tensors:
            source.check(tensors, d_transcoder, slots, d_model)
    on_disk = LazyDecoders(sources, n_writes, d_transcoder, dtype, device)
    return on_disk if lazy else DenseDecoders([on_disk[s] for s in range(len(sources))])


@dataclass(kw_only=True)
class Weights:
    """All weights of a CLT, on their way from files or to them. Shapes are the config's (`weight_shapes`)."""

    cfg: CrossLayerTranscoderConfig
    W_dec: Decoders
    W_enc: Float[Tensor, "n_layers d_model d_transcoder"]
    b_enc: Float[Tensor, "n_layers d_transcoder"]
    b_dec: Float[Tensor, "n_layers d_model"]
    threshold: Float[Tensor, "n_layers d_transcoder"] | None = None
    W_skip: Float[Tensor, "n_layers d_model d_model"] | None = None

    @classmethod
    def empty(cls, cfg: CrossLayerTranscoderConfig, decoders: Decoders, device: torch.device) -> Weights:
        """Weights to be filled, with these decoders."""
        dtype = getattr(torch, cfg.dtype)
        shapes = cfg.weight_shapes.items()
        return cls(
            cfg=cfg,
            W_dec=decoders.to(device),
            **{name: torch.empty(shape, dtype=dtype, device=device) for name, shape in shapes},
        )
