"""Cross-layer transcoders for TransformerLens and SAELens: train, trace, test and see circuits.

Names are loaded when they are first used, so that `import tl_clt` is quick and pulls in neither SAELens nor a
plotting or web library. Which they are, and of which room, stands in `__init__.pyi` alone.
"""

from __future__ import annotations

import ast
from importlib import import_module
from importlib.resources import files
from typing import Any

__version__ = "0.1.0"

_ROOMS = {
    name.name: statement.module
    for statement in ast.parse(files(__name__).joinpath("__init__.pyi").read_text(encoding="utf-8")).body
    if isinstance(statement, ast.ImportFrom) and statement.module is not None
    for name in statement.names
}
"""Public names, and the room that each is imported from."""

__all__ = [*_ROOMS]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'tl_clt' has no attribute '{name}'")
    value = getattr(import_module(_ROOMS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_ROOMS])
