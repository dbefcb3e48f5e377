"""Writing a folder all or nothing."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tl_clt.errors import OutputNotEmpty


def require_new(path: Path) -> None:
    """Raise `OutputNotEmpty` unless the path is absent or an empty folder."""
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise OutputNotEmpty(f"'{path}' is not empty. Give a new folder, or empty it first.")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into that becomes `folder` at the end, or disappears on an error.

    Raises:
        OutputNotEmpty: `folder` holds something already.
    """
    require_new(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield unfinished
        if folder.is_dir():
            folder.rmdir()
        unfinished.chmod(0o777 & ~_umask())
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file to write that replaces `path` at the end, or disappears on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
