"""Packages whose names are loaded when they are first used, so that importing them is quick.

Which names these are, and the module of each, stands in the package's stub `__init__.pyi` alone, which editors and type
checkers read as well.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from importlib import import_module
from importlib.resources import files
from typing import Any


def modules_of_names(package: str) -> dict[str, str]:
    """The names that a package's stub imports, and the module that it imports each from."""
    stub = ast.parse(files(package).joinpath("__init__.pyi").read_text(encoding="utf-8"))
    return {
        name.name: statement.module
        for statement in stub.body
        if isinstance(statement, ast.ImportFrom) and statement.module is not None
        for name in statement.names
    }


def load_name(package: str, modules: Mapping[str, str], name: str) -> Any:
    """What a package's `__getattr__` gives: the name, loaded from its module.

    Args:
        package: the package.
        modules: of its names, by `modules_of_names`.
        name: which is not loaded yet.

    Raises:
        AttributeError: the package has no such name.
    """
    if name not in modules:
        raise AttributeError(f"module '{package}' has no attribute '{name}'")
    return getattr(import_module(modules[name]), name)
