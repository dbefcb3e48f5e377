"""The type checker of tests: beartype, which looks at a function that is made anew at every call only once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import beartype

_checked: dict[tuple[str, str, str], Any] = {}


def check(annotated: Callable[..., Any] | type) -> Any:
    """`beartype.beartype`, remembered by name and annotations for functions within functions.

    jaxtyping hands over an empty function with the signature of the one to be checked, and does so each time that an
    inner function (a hook, say) is defined: beartype would write and compile the same check each time, which took most
    of the time of some tests.
    """
    name = annotated.__qualname__
    if isinstance(annotated, type) or "<locals>" not in name:
        return beartype(annotated)
    key = (annotated.__module__, name, repr(annotated.__annotations__))
    if key not in _checked:
        _checked[key] = beartype(annotated)
    return _checked[key]
