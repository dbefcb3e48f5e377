"""Files of tensors, read a part at a time: safetensors, and NumPy's .npz. Neither can run code when read."""

from __future__ import annotations

import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tl_clt.errors import FormatError


class TensorFile(ABC):
    """One open file whose missing keys and wrong shapes are named in errors."""

    def __init__(self, path: Path, keys: Iterable[str]) -> None:
        self.path = path
        self.keys = set(keys)

    @abstractmethod
    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""

    @abstractmethod
    def dtype(self, key: str) -> str:
        """Number type of a tensor, by torch's name."""

    @abstractmethod
    def part(self, key: str, where: tuple[int | slice, ...]) -> Tensor:
        """What an index into a tensor gives; no more than that is read from disk."""

    def tensor(self, key: str, shape: Sequence[int]) -> Tensor:
        """A tensor, which must have the shape given."""
        self.require_shape(key, shape)
        return self.part(key, (slice(None),))

    def require_shape(self, key: str, shape: Sequence[int]) -> None:
        """Raise unless a tensor is there and has this shape."""
        if self.shape(key) != tuple(shape):
            raise FormatError(
                f"'{self.path}': {key} has shape {list(self.shape(key))}, but {list(shape)} was expected."
                " The file belongs to another CLT, or its config is wrong."
            )

    def refuse(self, keys: Iterable[str]) -> None:
        """Raise for a tensor that is there, though what else was read says that the CLT has none."""
        for key in sorted(keys):
            if key in self.keys:
                raise FormatError(
                    f"'{self.path}' has a tensor '{key}' that the CLT, by its config and its other files, has no"
                    " place for. Files of two CLTs are mixed, or the config is wrong: copy or download it again."
                )

    def require(self, key: str) -> None:
        """Raise unless the file has a tensor of this name."""
        if key not in self.keys:
            raise FormatError(
                f"'{self.path}' has no tensor '{key}' (it has {', '.join(sorted(self.keys)[:6])})."
                " The file is of another layout, or was not written to its end."
            )


class SafetensorsFile(TensorFile):
    """A safetensors file."""

    def __init__(self, path: Path, opened: Any) -> None:
        super().__init__(path, opened.keys())
        self.opened = opened

    def shape(self, key: str) -> tuple[int, ...]:
        self.require(key)
        return tuple(self.opened.get_slice(key).get_shape())

    def dtype(self, key: str) -> str:
        self.require(key)
        return str(self.opened.get_slice(key)[0:0].dtype).removeprefix("torch.")

    def part(self, key: str, where: tuple[int | slice, ...]) -> Tensor:
        self.require(key)
        return self.opened.get_slice(key)[where]


class NpzFile(TensorFile):
    """NumPy's archive of arrays. Arrays that were stored without compression, as `np.savez` does, are mapped."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        super().__init__(path, (name.removesuffix(".npy") for name in archive.namelist()))
        self.archive = archive

    def shape(self, key: str) -> tuple[int, ...]:
        return self._array(key).shape

    def dtype(self, key: str) -> str:
        return str(self._array(key).dtype)

    def part(self, key: str, where: tuple[int | slice, ...]) -> Tensor:
        return torch.from_numpy(np.array(self._array(key)[where]))

    def _array(self, key: str) -> np.ndarray:
        self.require(key)
        info = self.archive.getinfo(f"{key}.npy")
        try:
            with self.archive.open(info) as stream:
                version = np.lib.format.read_magic(stream)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, fortran, dtype = read(stream)
                header = stream.tell()
            if dtype.kind != "f":
                raise FormatError(f"'{self.path}': {key} holds {dtype}, not floats. The file is of another kind.")
            if info.compress_type == zipfile.ZIP_STORED:
                with self.path.open("rb") as whole:
                    # A local header is 30 bytes, its name and its extra field, whose length the index need not tell.
                    whole.seek(info.header_offset + 26)
                    lengths = np.frombuffer(whole.read(4), "<u2")
                offset = info.header_offset + 30 + int(lengths.sum()) + header
                order = "F" if fortran else "C"
                return np.memmap(self.path, dtype, "r", offset, shape, order)
            with self.archive.open(info) as stream:
                return np.lib.format.read_array(stream, allow_pickle=False)
        except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
            raise _broken(self.path, error) from error


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Open a safetensors or .npz file.

    Raises:
        FormatError: it is missing, truncated, or of another kind.
    """
    if not path.is_file():
        raise FormatError(f"'{path}' is missing. Copy or download the CLT again, whole.")
    try:
        is_npz = path.suffix == ".npz"
        context: Any = zipfile.ZipFile(path) if is_npz else safe_open(path, framework="pt")
    except (SafetensorError, OSError, zipfile.BadZipFile, ValueError) as error:
        raise _broken(path, error) from error
    with context as opened:
        yield NpzFile(path, opened) if is_npz else SafetensorsFile(path, opened)


def _broken(path: Path, error: Exception) -> FormatError:
    kind = ".npz" if path.suffix == ".npz" else "safetensors"
    return FormatError(f"'{path}' is truncated or no {kind} file ({error}). Copy or download it again.")
