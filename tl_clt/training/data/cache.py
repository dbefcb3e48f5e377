"""Activations on disk, so that a model runs over a text once for all the CLTs that are trained on it.

A cache folder has a folder for each combination of model, hooks and number type, named by its key. In it:

    index.json                  what the key stands for, and the rounding error of each layer
    {tokens}.safetensors        the prompts of one forward pass, named by the sha256 of their token ids:
        tokens  [prompt, pos]
        values  [token, 2, n_layers, d_model]   int8 or float16
        scales  [token, 2, n_layers]            activation = value * scale

Because a shard is named by its tokens, any dataset, context size or order may use the folder: what was seen before is
read, what was not is added. The tokens that training leaves out are in it, and a run's seed has no part in it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tl_clt.errors import FormatError, ModelUnsupported
from tl_clt.files import READING_ERRORS, new_file, read_json, reading
from tl_clt.training.config import CacheDtype

Prompts = Int[Tensor, "prompt pos"]
Activations = Float[Tensor, "token 2 n_layers d_model"]

INDEX = "index.json"
SUFFIX = ".safetensors"
LARGEST = {"int8": 127.0, "float16": 1.0}
"""What the largest activation of a token, side and layer becomes: all of int8; for float16 any power of 2 will do."""

BOUND = {"int8": 0.5 / 127, "float16": 2.0**-12}
"""Largest rounding error of an activation, as a share of the largest of its token, side and layer: half a step."""

MEND = (
    "What was cached before stays good. Make room, give a cache_path on another disk, use cache_dtype='int8', or train"
    " without."
)


class Packed(NamedTuple):
    """Activations in few bits."""

    values: Tensor
    """[token, 2, n_layers, d_model], int8 or float16."""

    scales: Float[Tensor, "token 2 n_layers"]
    """Activation = value * scale, in float32."""


class RoundingError(NamedTuple):
    """What packing changed, each [2, n_layers]: inputs, then outputs."""

    largest: Float[Tensor, "2 n_layers"]
    """Largest difference."""

    squared: Float[Tensor, "2 n_layers"]
    """Sum of squared differences."""

    of: Float[Tensor, "2 n_layers"]
    """Sum of squared activations."""


def pack(activations: Activations, dtype: CacheDtype) -> tuple[Packed, RoundingError]:
    """Activations in few bits, with a scale for each token, side and layer: one scale for all tokens would leave few
    steps to any but the largest ones. No difference is above `BOUND[dtype]` times the largest activation of its
    token, side and layer.

    Raises:
        ModelUnsupported: a value is not finite.
    """
    exact = activations.float()
    largest = exact.abs().amax(dim=-1)
    if not largest.isfinite().all():
        side, layer = (~largest.isfinite()).any(dim=0).nonzero()[0].tolist()
        raise ModelUnsupported(
            f"The {('input', 'output')[side]} of layer {layer} is infinite or no number at some token: it cannot be"
            " cached. Load the model in float32 (model_dtype), or check its weights."
        )
    # Where a token's activations are all 0, or too small for a step of them to be a number, they become 0.
    scales = (largest / LARGEST[dtype]).clamp_min(torch.finfo(torch.float32).tiny)
    values = exact / scales[..., None]
    packed = Packed(values.round().to(torch.int8) if dtype == "int8" else values.to(torch.float16), scales)
    difference = unpack(packed).sub_(exact)
    error = RoundingError(
        largest=difference.abs().amax(dim=(0, 3)).double(),
        squared=difference.double().square_().sum(dim=(0, 3)),
        of=exact.double().square_().sum(dim=(0, 3)),
    )
    return packed, error


def unpack(packed: Packed) -> Activations:
    """The activations, in float32."""
    return packed.values.float().mul_(packed.scales[..., None])


class ActivationCache:
    """The part of a cache folder that belongs to one model, its hooks and one number type.

    Args:
        folder: the cache folder, made where it does not exist.
        model: fingerprint of the model.
        names: hooks, inputs of all layers and then outputs.
        dtype: int8 takes half the space of float16 and rounds more.
        model_name: for people, in the index.
    """

    def __init__(self, folder: Path, model: str, names: list[str], dtype: CacheDtype, model_name: str) -> None:
        self._about = {"format": 1, "model_fingerprint": model, "hooks": names, "dtype": dtype}
        self.key = hashlib.sha256(json.dumps(self._about, sort_keys=True).encode()).hexdigest()
        self.folder = folder / self.key[:16]
        self._dtype: CacheDtype = dtype
        self._model_name = model_name
        self._counted: set[str] | None = None
        self._error: RoundingError | None = None

    def read(self, tokens: Prompts, make: Callable[[Prompts], Activations]) -> Activations:
        """The activations of prompts, rounded: from disk, or where they are not there from `make`, and then written.

        Both give the same to the bit, in float32 on the device of `tokens`.

        Raises:
            FormatError: the shard is damaged or is not what its name says.
            NotWritten: the disk is full, for example; nothing half-written is left.
        """
        on_cpu = tokens.cpu()
        path = self.folder / (self._name_of(on_cpu) + SUFFIX)
        if not path.is_file():
            packed, error = pack(make(tokens), self._dtype)
            self._write(path, on_cpu, Packed(packed.values.cpu(), packed.scales.cpu()), error)
        else:
            packed = self._read(path, on_cpu)
        return unpack(Packed(packed.values.to(tokens.device), packed.scales.to(tokens.device)))

    @staticmethod
    def _name_of(tokens: Prompts) -> str:
        return hashlib.sha256(f"{list(tokens.shape)}".encode() + tokens.long().numpy().tobytes()).hexdigest()

    def _read(self, path: Path, tokens: Prompts) -> Packed:
        mend = "Delete this file: the next run makes it again."
        with reading(path, "safetensors file", mend), safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
            are_ours = metadata.get("key") == self.key and torch.equal(tensors.get("tokens", tokens[:0]), tokens)
        if not are_ours:
            raise FormatError(f"'{path}' holds other activations than its folder and name say. {mend}")
        if _checksum(tensors) != metadata.get("sha256"):
            raise FormatError(f"'{path}' is damaged: its contents do not have the checksum it states. {mend}")
        with reading(path, "shard of activations", mend):
            packed = Packed(tensors["values"], tensors["scales"])
            n_tokens, sides, _ = packed.scales.shape
            if (n_tokens, sides) != (tokens.numel(), 2) or packed.values.shape[:-1] != packed.scales.shape:
                raise ValueError(f"values {list(packed.values.shape)}, scales {list(packed.scales.shape)}")
            if packed.values.dtype != getattr(torch, self._dtype) or packed.scales.dtype != torch.float32:
                raise ValueError(f"values of {packed.values.dtype}, scales of {packed.scales.dtype}")
        return packed

    def _write(self, path: Path, tokens: Prompts, packed: Packed, error: RoundingError) -> None:
        tensors = {"tokens": tokens.contiguous(), **packed._asdict()}
        metadata = {
            "key": self.key,
            "sha256": _checksum(tensors),
            "error": json.dumps({name: value.tolist() for name, value in error._asdict().items()}),
        }
        self._count_shards(error.largest.shape)
        with new_file(path, MEND) as unfinished:
            save_file(tensors, unfinished, metadata)
        self._count(path.stem, error)
        with new_file(self.folder / INDEX, MEND) as unfinished:
            unfinished.write_text(json.dumps(self._index(), indent=2) + "\n")

    def _count_shards(self, shape: torch.Size) -> None:
        """Count what is in the folder, and of this shape: from headers, once a run, whatever happened to an index."""
        if self._counted is not None:
            return
        self._counted = set()
        for path in sorted(self.folder.glob("*" + SUFFIX)):
            try:
                with safe_open(path, framework="pt") as opened:
                    values = read_json((opened.metadata() or {})["error"])
                error = [torch.tensor(values[name], dtype=torch.float64) for name in RoundingError._fields]
            except READING_ERRORS:
                continue  # told by name when it is read
            if all(part.shape == shape for part in error):
                self._count(path.stem, RoundingError(*error))

    def _count(self, name: str, error: RoundingError) -> None:
        """Add a shard to the running sums: however many there are, the index of one more costs the same."""
        assert self._counted is not None
        if name in self._counted:  # deleted under this run, and made again
            return
        self._counted.add(name)
        new = RoundingError(*(value.double().cpu() for value in error))
        old = self._error
        self._error = (
            new
            if old is None
            else RoundingError(torch.maximum(old.largest, new.largest), old.squared + new.squared, old.of + new.of)
        )

    def _index(self) -> dict[str, Any]:
        assert self._counted is not None and self._error is not None
        relative = (self._error.squared / self._error.of).sqrt()
        largest = self._error.largest
        return {
            **self._about,
            "model_name": self._model_name,
            "shards": len(self._counted),
            "bound_of_error": f"{BOUND[self._dtype]:.6f} of the largest activation of a token and layer",
            "largest_error_per_layer": {"inputs": largest[0].tolist(), "outputs": largest[1].tolist()},
            "relative_error_per_layer": {"inputs": relative[0].tolist(), "outputs": relative[1].tolist()},
        }


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        digest.update(f"{name} {list(value.shape)} {value.dtype}".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
