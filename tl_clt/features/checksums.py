"""Checksums of a feature store's files, block by block, so that what is read of a large file is checked and no more.

`checksums.json` holds CRC-32s, as eight hexadecimal digits each, of every 16 KiB of every file:

    {"block_bytes": 16384, "files": {"examples.safetensors": "6a0c81f2...", ...}}

They tell damage: a byte that a disk or a copy changed. They are no seal: whoever changes a file on purpose can change
them too. A store without the file, which releases before this one wrote, is read unchecked.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from tl_clt.errors import FormatError
from tl_clt.files import read_json, reading
from tl_clt.transcoder.tensor_files import TensorFile, open_tensors

CHECKSUMS = "checksums.json"
BLOCK_BYTES = 2**14
"""A feature's rows lie in some twenty blocks, which takes less time to sum up than opening the files."""
DIGITS = 8


def write_checksums(folder: Path, before: Path | None = None) -> None:
    """Write the checksums of all files of a folder.

    Args:
        before: a folder in which there may be checksums of other files, which are kept. None where there is none.
    """
    sums = _Sums(BLOCK_BYTES, {}) if before is None else _read(before / CHECKSUMS)
    written = [path for path in sorted(folder.iterdir()) if path.name != CHECKSUMS]
    files = sums.files | {path.name: _sums_of(path, sums.block_bytes) for path in written}
    values = {"block_bytes": sums.block_bytes, "files": dict(sorted(files.items()))}
    (folder / CHECKSUMS).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


class CheckedFolder:
    """Files of a folder, which are checked as they are read. What was once found right is not summed up again while
    neither it nor the checksums change."""

    def __init__(self, folder: Path, mends: dict[str, str], mend: str) -> None:
        """Args:
        mends: for some files, what to do where they are damaged.
        mend: the same for all others.
        """
        self.folder = folder
        self._mends, self._mend = mends, mend
        self._sums, self._sums_as_of = _Sums(BLOCK_BYTES, {}), None
        self._checked: dict[str, _CheckedFile] = {}

    def read_text(self, name: str) -> str:
        """A whole file.

        Raises:
            FormatError: it is damaged.
            OSError: it cannot be read.
        """
        checked = self._file(name)
        checked.require(0, checked.version.size)
        return checked.path.read_text(encoding="utf-8")

    @contextmanager
    def open_tensors(self, name: str) -> Iterator[TensorFile]:
        """A file of tensors, each part of which is checked when it is read.

        Raises:
            FormatError: it is missing or damaged.
        """
        path = self.folder / name
        if not path.is_file():
            raise FormatError(f"The feature store '{self.folder}' lacks {name}. {self._mend_of(name)}")
        checked = self._file(name)
        checked.require_header()
        with open_tensors(path) as tensors:
            yield _CheckedTensors(tensors, checked)

    def _mend_of(self, name: str) -> str:
        return self._mends.get(name, self._mend)

    def _file(self, name: str) -> _CheckedFile:
        """A file as it is on disk: who labels a store changes it, and the checksums."""
        path = self.folder / CHECKSUMS
        as_of = _Version.of(path) if path.is_file() else None
        if as_of != self._sums_as_of:
            self._sums, self._sums_as_of, self._checked = _read(path), as_of, {}
        version = _Version.of(self.folder / name)
        known = self._checked.get(name)
        if known is None or known.version != version:
            digits = self._sums.files.get(name)
            known = _CheckedFile(self.folder / name, version, digits, self._sums.block_bytes, self._mend_of(name))
            self._checked[name] = known
        return known


class _CheckedFile:
    """A file with the checksums of its blocks."""

    def __init__(self, path: Path, version: _Version, digits: str | None, block_bytes: int, mend: str) -> None:
        self.path, self.version, self.mend = path, version, mend
        self._digits, self._block_bytes = digits, block_bytes
        n_blocks = -(-version.size // block_bytes)
        self._is_right = bytearray(n_blocks)
        self._places: dict[str, _Place] | None = None
        if digits is not None and len(digits) != n_blocks * DIGITS:
            raise FormatError(
                f"'{path}' is damaged: it has {version.size} bytes, and {len(digits) // DIGITS} blocks of {block_bytes}"
                f" were written ({CHECKSUMS} tells). {mend}"
            )

    def require(self, first: int, last: int) -> None:
        """Raise unless the bytes from `first` to before `last` are those that were written.

        Raises:
            FormatError: they are not.
        """
        size = self._block_bytes
        begin, end = first // size, -(-last // size)
        if self._digits is None or self._is_right.find(0, begin, end) < 0:
            return
        with self.path.open("rb") as file:
            for block in range(begin, end):
                file.seek(block * size)
                if _sum_of(file.read(size)) != self._digits[block * DIGITS : (block + 1) * DIGITS]:
                    raise FormatError(
                        f"'{self.path}' is damaged: bytes {block * size} to"
                        f" {min((block + 1) * size, self.version.size) - 1} are not those that were written"
                        f" ({CHECKSUMS} tells). {self.mend}"
                    )
                self._is_right[block] = 1

    def require_header(self) -> None:
        """The same of what stands before the tensors of a safetensors file."""
        if self._digits is not None and self._places is None:
            with reading(self.path, "safetensors file", self.mend), self.path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                start = 8 + length
                self.require(0, min(start, self.version.size))
                header = json.loads(file.read(length))
                header.pop("__metadata__", None)
                self._places = {
                    key: _Place(start + one["data_offsets"][0], start + one["data_offsets"][1], one["shape"])
                    for key, one in header.items()
                }

    def require_part(self, key: str, where: tuple[int | slice, ...]) -> None:
        """The same of a part of a tensor: rows along its first axes, by whole numbers and at last a slice."""
        if self._places is None or key not in self._places:
            return
        begin, end, shape = self._places[key]
        first, n = 0, prod(shape)
        size = (end - begin) // n if n else 0
        for at, length in zip(where, shape, strict=False):
            n //= max(1, length)
            if isinstance(at, slice):
                low, high, _ = at.indices(length)
                first, n = first + low * n, max(0, high - low) * n
                break
            first += at * n
        self.require(begin + first * size, begin + (first + n) * size)


class _CheckedTensors(TensorFile):
    """A file of tensors with checksums."""

    def __init__(self, tensors: TensorFile, checked: _CheckedFile) -> None:
        super().__init__(tensors.path, tensors.keys)
        self._tensors, self._checked = tensors, checked

    def shape(self, key: str) -> tuple[int, ...]:
        return self._tensors.shape(key)

    def dtype(self, key: str) -> str:
        return self._tensors.dtype(key)

    def part(self, key: str, where: tuple[int | slice, ...]) -> Tensor:
        self._checked.require_part(key, where)
        return self._tensors.part(key, where)


class _Place(NamedTuple):
    """Where a tensor lies in a file."""

    begin: int
    end: int
    shape: list[int]


class _Version(NamedTuple):
    """What tells that a file is the one that was looked at."""

    size: int
    modified: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> _Version:
        found = path.stat()
        return cls(found.st_size, found.st_mtime_ns, found.st_ino)


class _Sums(NamedTuple):
    """What `checksums.json` holds."""

    block_bytes: int
    files: dict[str, str]


def _read(path: Path) -> _Sums:
    if not path.is_file():
        return _Sums(BLOCK_BYTES, {})
    with reading(path, "file of checksums", "Copy the folder again, or remove this file to read the store unchecked."):
        values = read_json(path.read_text(encoding="utf-8"))
        block_bytes, files = int(values["block_bytes"]), {str(k): str(v) for k, v in values["files"].items()}
        if block_bytes < 1:
            raise ValueError(f"block_bytes is {block_bytes}")
        return _Sums(block_bytes, files)


def _sums_of(path: Path, block_bytes: int) -> str:
    with path.open("rb") as file:
        return "".join(_sum_of(block) for block in iter(lambda: file.read(block_bytes), b""))


def _sum_of(block: bytes) -> str:
    return f"{zlib.crc32(block):08x}"
