"""What every layout's reader shares: opening files with errors that tell the mend."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tl_clt.errors import FormatError
from tl_clt.transcoder.decoders import DecoderFile, Decoders, DenseDecoders, LazyDecoders


class TensorFile:
    """One open safetensors file whose missing keys and wrong shapes are named in errors."""

    def __init__(self, path: Path, opened: Any) -> None:
        self.path = path
        self.opened = opened
        self.keys = set(opened.keys())

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        self._require(key)
        return tuple(self.opened.get_slice(key).get_shape())

    def dtype(self, key: str) -> str:
        """Number type of a tensor, by torch's name."""
        self._require(key)
        return str(self.opened.get_slice(key)[0:0].dtype).removeprefix("torch.")

    def tensor(self, key: str, shape: Sequence[int]) -> Tensor:
        """A tensor, which must have the shape given."""
        if self.shape(key) != tuple(shape):
            raise FormatError(
                f"'{self.path}': {key} has shape {list(self.shape(key))}, but {list(shape)} was expected."
                " The file belongs to another CLT, or its config is wrong."
            )
        return self.opened.get_tensor(key)

    def refuse(self, keys: Iterable[str]) -> None:
        """Raise for a tensor that is there, though what else was read says that the CLT has none."""
        for key in sorted(keys):
            if key in self.keys:
                raise FormatError(
                    f"'{self.path}' has a tensor '{key}' that the CLT, by its config and its other files, has no"
                    " place for. Files of two CLTs are mixed, or the config is wrong: copy or download it again."
                )

    def _require(self, key: str) -> None:
        if key not in self.keys:
            raise FormatError(
                f"'{self.path}' has no tensor '{key}' (it has {', '.join(sorted(self.keys)[:6])})."
                " The file is of another layout, or was not written to its end."
            )


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Open a safetensors file.

    Raises:
        FormatError: it is missing, truncated, or no safetensors file.
    """
    if not path.is_file():
        raise FormatError(f"'{path}' is missing. Copy or download the CLT again, whole.")
    try:
        context = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise FormatError(
            f"'{path}' is truncated or no safetensors file ({error}). Copy or download it again."
        ) from error
    with context as opened:
        yield TensorFile(path, opened)


def read_config(path: Path) -> dict[str, Any]:
    """A JSON or YAML mapping, or an empty one where the file does not exist."""
    if not path.is_file():
        return {}
    try:
        text = path.read_text()
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise FormatError(f"'{path}' cannot be read ({error}). Copy or download it again.") from error
    if not isinstance(values, dict):
        raise FormatError(f"'{path}' holds no mapping of names to values. It is not a CLT's config.")
    return values


def numbered_files(folder: Path, prefix: str) -> list[Path]:
    """`{prefix}{i}.safetensors` for i = 0, 1, ... without a gap."""
    found = sorted(
        int(p.stem.removeprefix(prefix))
        for p in folder.glob(f"{prefix}*.safetensors")
        if p.stem.removeprefix(prefix).isdigit()
    )
    if found != list(range(len(found))):
        missing = sorted(set(range(found[-1])) - set(found))
        raise FormatError(f"'{folder}' lacks {prefix}{missing[0]}.safetensors. Copy or download the CLT again, whole.")
    return [folder / f"{prefix}{i}.safetensors" for i in found]


def read_decoders(
    files: Sequence[DecoderFile],
    n_writes: Sequence[int],
    d_transcoder: int,
    d_model: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    lazy: bool,
) -> Decoders:
    """Check that every file holds the decoder it should; read all of them, or leave them on disk."""
    for file, slots in zip(files, n_writes, strict=True):
        with open_tensors(file.path) as tensors:
            found = tensors.shape(file.key)
        wanted = (d_transcoder, file.first_slot + slots + file.unused_slots, d_model)
        if found != wanted and (wanted[1] > 1 or found != (d_transcoder, d_model)):
            raise FormatError(
                f"'{file.path}': {file.key} has shape {list(found)}, but {list(wanted)} was expected."
                " The file belongs to another CLT, or its config is wrong."
            )
    on_disk = LazyDecoders(files, n_writes, dtype, device)
    return on_disk if lazy else DenseDecoders([on_disk[s].clone() for s in range(len(files))])
