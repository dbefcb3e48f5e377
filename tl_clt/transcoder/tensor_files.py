"""Files of tensors, read a part at a time: safetensors, and NumPy's .npz. Neither can run code when read."""

from __future__ import annotations

import math
import struct
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from tl_clt.errors import FormatError
from tl_clt.files import reading

DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "C64": "complex64", "BOOL": "bool"},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
}
"""Number types by safetensors' names and by torch's."""

MOST_UNPACKED, UNPACKED_UNCHECKED = 64, 2**24
"""Times its size that a compressed archive of weights may take unpacked, and bytes that any may. Numbers hardly shrink:
one that takes more is no archive of weights, and could fill the memory from a few KiB."""


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
    def part(self, key: str, index: tuple[int | slice, ...]) -> Tensor:
        """What an index into a tensor gives; no more than that is read from disk."""

    def tensor(self, key: str, shape: Sequence[int]) -> Tensor:
        """A tensor, which must have the shape given."""
        self.require_shape(key, shape)
        return self.part(key, (slice(None),))

    def require_shape(self, key: str, shape: Sequence[int]) -> None:
        """Raise unless a tensor is there, has this shape and holds floats. Nothing of it is read."""
        if self.shape(key) != tuple(shape):
            raise FormatError(
                f"'{self.path}': {key} has shape {list(self.shape(key))}, but {list(shape)} was expected."
                " The file belongs to another CLT, or its config is wrong."
            )
        if "float" not in self.dtype(key):
            raise FormatError(f"'{self.path}': {key} holds {self.dtype(key)}, not floats. The file is of another kind.")

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
        stored = str(self.opened.get_slice(key).get_dtype())
        return DTYPES.get(stored, stored)

    def part(self, key: str, index: tuple[int | slice, ...]) -> Tensor:
        self.require(key)
        with reading(self.path, "safetensors file"):
            return self.opened.get_slice(key)[index]


class _Stored(NamedTuple):
    """What stands before an array's numbers in an .npz file."""

    shape: tuple[int, ...]
    dtype: np.dtype
    order: Literal["C", "F"]
    start: int
    """Of the numbers, within the array's own file."""


class NpzFile(TensorFile):
    """NumPy's archive of arrays. Arrays that were stored without compression, as `np.savez` does, are mapped."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        names = (name for name in archive.namelist() if name.endswith(".npy"))
        super().__init__(path, (name.removesuffix(".npy") for name in names))
        self.archive = archive
        unpacked = sum(info.file_size for info in archive.infolist())
        if unpacked > max(UNPACKED_UNCHECKED, MOST_UNPACKED * path.stat().st_size):
            raise FormatError(
                f"'{path}' would take {unpacked} bytes unpacked, more than {MOST_UNPACKED} times its size: it holds no"
                " weights. Download it again, or save it anew with numpy.savez."
            )

    def shape(self, key: str) -> tuple[int, ...]:
        return self._stored(key).shape

    def dtype(self, key: str) -> str:
        return self._stored(key).dtype.name

    def part(self, key: str, index: tuple[int | slice, ...]) -> Tensor:
        stored = self._stored(key)
        with reading(self.path, ".npz file"):
            part = np.array(self._array(key, stored)[index])
            return torch.from_numpy(part.astype(part.dtype.newbyteorder("="), copy=False))

    def _stored(self, key: str) -> _Stored:
        """The header of an array, which must state what its file has room for."""
        self.require(key)
        with reading(self.path, ".npz file"), self.archive.open(f"{key}.npy") as stream:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            try:
                shape, fortran, dtype = read(stream)
            except MemoryError as error:  # Python's own parser says so of a header that is nested too deeply.
                raise FormatError(f"'{self.path}': the header of {key} cannot be read. Download it again.") from error
            stored = _Stored(tuple(map(int, shape)), dtype, "F" if fortran else "C", stream.tell())
            size = self.archive.getinfo(f"{key}.npy").file_size
            if dtype.kind != "f":
                raise FormatError(f"'{self.path}': {key} holds {dtype}, not floats. The file is of another kind.")
            if min(stored.shape, default=0) < 0 or stored.start + math.prod(shape) * dtype.itemsize != size:
                raise FormatError(
                    f"'{self.path}': {key} states shape {list(shape)} of {dtype}, but takes {size} bytes with its"
                    " header. Copy or download it again."
                )
            return stored

    def _array(self, key: str, stored: _Stored) -> np.ndarray:
        info = self.archive.getinfo(f"{key}.npy")
        if info.compress_type != zipfile.ZIP_STORED:
            with self.archive.open(info) as stream:
                stream.seek(stored.start)
                numbers = np.frombuffer(stream.read(), stored.dtype)
            return numbers.reshape(stored.shape, order=stored.order)
        with self.path.open("rb") as whole:
            # A local header is 30 bytes, its name and its extra field, whose length the index need not tell.
            whole.seek(info.header_offset + 26)
            lengths = struct.unpack("<HH", whole.read(4))
        offset = info.header_offset + 30 + sum(lengths) + stored.start
        return np.memmap(self.path, stored.dtype, "r", offset, stored.shape, stored.order)


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Open a safetensors or .npz file.

    Raises:
        FormatError: it is missing, truncated, or of another kind.
    """
    if not path.is_file():
        raise FormatError(f"'{path}' is missing. Copy or download the CLT again, whole.")
    is_npz = path.suffix == ".npz"
    with ExitStack() as opened:
        with reading(path, ".npz file" if is_npz else "safetensors file"):
            context: Any = zipfile.ZipFile(path) if is_npz else safe_open(path, framework="pt")
            content = opened.enter_context(context)
            tensors = NpzFile(path, content) if is_npz else SafetensorsFile(path, content)
        yield tensors
