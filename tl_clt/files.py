"""Files and folders: read without running code, written whole or not at all.

Readers refuse what is damaged with an error that names the file and the mend; writers find before long work whether a
path can be written, and leave nothing half-written.
"""

from __future__ import annotations

import json
import lzma
import math
import os
import secrets
import shutil
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from yaml.composer import ComposerError

from tl_clt.errors import FormatError, NotWritten, OutputNotEmpty, TlCltError

READING_ERRORS = (
    *(SafetensorError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, tokenize.TokenError),
    *(OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, OverflowError, RuntimeError, SyntaxError),
)
"""What readers of files raise on damaged ones. ValueError has undecodable text in it, RuntimeError too deep nesting."""

MEND = "Make room, or give a path that you may write to."


@contextmanager
def reading(path: Path, what: str, mend: str = "Copy or download it again.") -> Iterator[None]:
    """Whatever error of damaged content is raised within becomes a FormatError that names the file and the mend."""
    try:
        yield
    except TlCltError:
        raise
    except READING_ERRORS as error:
        raise FormatError(f"'{path}' is truncated or no {what} ({type(error).__name__}: {error}). {mend}") from error


def read_config(path: Path) -> dict[str, Any]:
    """A JSON or YAML mapping, or an empty one where the file does not exist."""
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        values = read_json(text) if path.suffix == ".json" else yaml.load(text, PlainLoader)
    except (yaml.YAMLError, *READING_ERRORS) as error:
        raise FormatError(f"'{path}' cannot be read ({error}). Copy or download it again.") from error
    if not isinstance(values, dict):
        raise FormatError(f"'{path}' holds no mapping of names to values. It is not a CLT's config.")
    return values


def read_json(text: str, *, finite: bool = False) -> Any:
    """JSON without whole numbers of more than 64 bits, which no part of a file here has a use for.

    Args:
        text: what to read.
        finite: refuse `NaN` and `Infinity` too, which Python writes and which are no JSON, and 1e999, which is read as
            infinite.

    Raises:
        ValueError, RecursionError: it is none.
    """
    number = _finite_number if finite else None
    whole = lambda digits: _require_64_bits(int(digits))  # noqa: E731
    return json.loads(text, parse_int=whole, parse_float=number, parse_constant=number)


def _finite_number(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits:.20} is no finite number")
    return number


class PlainLoader(yaml.SafeLoader):
    """YAML without code, without numbers of more than 64 bits, and with aliases of single values alone: aliases of
    lists and mappings can stand for more than any memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if is_alias and not isinstance(node, yaml.ScalarNode):
            raise ComposerError(None, None, "an alias of a list or a mapping: write it out", None)
        return node

    def whole_number(self, node: Any) -> int:
        return _require_64_bits(self.construct_yaml_int(node))


PlainLoader.add_constructor("tag:yaml.org,2002:int", PlainLoader.whole_number)


def _require_64_bits(number: int) -> int:
    if abs(number) >= 2**64:
        raise ValueError("a whole number of more than 64 bits")
    return number


def require_new(path: Path) -> None:
    """Check that a new folder can be made at a path.

    Raises:
        OutputNotEmpty: a file is there, or a folder that holds something.
        NotWritten: it lies below a file, or where nothing may be written.
    """
    with _named_errors(path, MEND):
        if path.is_file():
            raise OutputNotEmpty(f"'{path}' is a file, and a folder is to be written. Give a new folder.")
        if path.is_dir() and any(path.iterdir()):
            raise OutputNotEmpty(f"'{path}' is not empty. Give a new folder, or empty it first.")
        _require_place(path, path)


def interrupted_beside(output: Path) -> Path:
    """Where Ctrl-C leaves what was to become `output`: OUTPUT-interrupted, or OUTPUT-interrupted-2 and so on."""
    paths = (output.with_name(f"{output.name}-interrupted" + (f"-{i}" if i > 1 else "")) for i in count(1))
    return next(path for path in paths if not path.exists())


def require_file(path: Path) -> None:
    """Check that a file can be written at a path, where one may be already.

    Raises:
        NotWritten: a folder or a device is there, or it lies below a file or where nothing may be written.
    """
    with _named_errors(path, MEND):
        if path.is_dir():
            raise NotWritten(f"'{path}' is a folder, and a file is to be written. Give a file's name within it.")
        if path.exists() and not path.is_file():
            raise NotWritten(f"'{path}' is a device or a pipe, which would be replaced. Give the path of a file.")
        _require_place(path, path.parent)


def require_unused(path: Path) -> None:
    """Check that a file can be written at a path at which nothing is.

    Raises:
        OutputNotEmpty: something is there.
        NotWritten: as of `require_file`.
    """
    require_file(path)
    if os.path.lexists(path):
        raise OutputNotEmpty(f"'{path}' exists. Give another name, or remove it first.")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into that becomes `folder` at the end, or disappears on an error. Missing parents are made.

    Raises:
        OutputNotEmpty: `folder` holds something already, or is a file.
        NotWritten: the disk is full, for example; nothing of it is left.
    """
    require_new(folder)
    if folder.is_dir():
        # It may be where a disk is mounted, a link, or where the user is: it is filled and not replaced.
        with files_into(folder) as unfinished:
            yield unfinished
        return
    with _named_errors(folder, MEND), _parent_of(folder) as parent:
        unfinished = parent / _unfinished_name()
        try:
            unfinished.mkdir()
            yield unfinished
            _open_to_readers(*unfinished.rglob("*"))
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def files_into(folder: Path) -> Iterator[Path]:
    """A folder to write files into that come into `folder` at the end, or disappear on an error. What else is in
    `folder` stays; missing folders are made.

    Raises:
        NotWritten: the disk is full, for example; nothing of them is left, and files of the same names stay.
    """
    with _named_errors(folder, MEND):
        _require_place(folder, folder)
        with _parent_of(folder / "_") as inside:
            unfinished = inside / _unfinished_name()
            added: list[Path] = []
            try:
                unfinished.mkdir()
                yield unfinished
                written = sorted(unfinished.iterdir())
                _open_to_readers(*unfinished.rglob("*"))
                for path in written:
                    if (folder / path.name).is_dir():
                        raise NotWritten(f"'{folder / path.name}' is a folder, and a file is to be written. Remove it.")
                for path in written:
                    if not (folder / path.name).exists():
                        added.append(folder / path.name)
                    path.replace(folder / path.name)
                added.clear()
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
                for path in added:
                    path.unlink(missing_ok=True)


@contextmanager
def new_file(path: Path, mend: str = MEND) -> Iterator[Path]:
    """A file to write that replaces `path` at the end, or disappears on an error. Missing parents are made.

    Args:
        path: the file.
        mend: what the user can do where it could not be written.

    Raises:
        NotWritten: a folder is there, or the disk is full, for example; what was there stays.
    """
    require_file(path)
    # What a link points to is written, and the link stays.
    final = path.resolve() if path.is_symlink() else path
    with _named_errors(path, mend), _parent_of(final) as parent:
        unfinished = parent / _unfinished_name()
        try:
            yield unfinished
            _open_to_readers(unfinished)
            unfinished.replace(final)
        finally:
            unfinished.unlink(missing_ok=True)


def append_line(path: Path, line: str) -> None:
    """Add a line to a file, or begin one with it; missing folders are made.

    Raises:
        NotWritten: the disk is full, for example.
    """
    with _named_errors(path, MEND), _parent_of(path), path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def _open_to_readers(*paths: Path) -> None:
    """Give files the permissions that new files have: safetensors lets nobody but their owner read its own."""
    mask = os.umask(0)
    os.umask(mask)
    for path in paths:
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~mask)


@contextmanager
def _named_errors(path: Path, mend: str) -> Iterator[None]:
    """Within, an error of the system becomes one of ours that names the path and the mend."""
    try:
        yield
    except TlCltError:
        raise
    except (OSError, SafetensorError) as error:
        cause = (error.strerror if isinstance(error, OSError) else None) or error
        raise NotWritten(f"'{path}' could not be written ({cause}). Nothing half-written is left. {mend}") from error
    except ValueError as error:
        if "null" not in str(error):
            raise
        raise NotWritten(f"{str(path)!r} could not be written: no path has a null byte. {mend}") from error


def _require_place(path: Path, folder: Path) -> None:
    """Raise unless `folder`, or the first of its parents that is there, is a folder that may be written to."""
    with suppress(FileNotFoundError, NotADirectoryError):
        path.lstat()  # a name that is too long, for example, is told here
    there = next(parent for parent in (folder, *folder.absolute().parents) if os.path.lexists(parent))
    if not there.is_dir():
        raise NotWritten(f"'{path}' cannot be written: '{there}' is no folder. Give another path.")
    # Tried, since permissions do not tell of all: not of what the system itself keeps, nor of disks that are read only.
    trial = there / _unfinished_name()
    try:
        trial.mkdir()
    except OSError as error:
        cause = error.strerror or error
        raise NotWritten(
            f"'{path}' cannot be written: '{there}' takes nothing ({cause}). Give another path."
        ) from error
    finally:
        if trial.is_dir():
            trial.rmdir()


@contextmanager
def _parent_of(path: Path) -> Iterator[Path]:
    """The folder of a path; where it is made for it, it disappears again on an error."""
    made = [parent for parent in path.absolute().parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield path.parent
    except BaseException:
        for parent in made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        raise


def _unfinished_name() -> str:
    return f".unfinished.{secrets.token_hex(8)}"
