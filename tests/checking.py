"""The check of annotations in tests: every function of the package, what it is given and what it returns.

jaxtyping's import hook decorates each function with `jaxtyping.jaxtyped`, in whose place `install` puts `checked`. Both
let beartype look at arguments and result, with one memory of axes for the two, so that "pos" is one number within a
call. `jaxtyped` binds each call's arguments, checks them twice, and writes its checks anew each time that an inner
function (a hook, say) is defined: in tests of hooks that took about as long as what is tested.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, get_type_hints

import jaxtyping
from beartype import beartype
from beartype.roar import BeartypeCallHintViolation

one_call = jaxtyping.jaxtyped("context")
"""`with one_call`: an axis has one length within."""
config = jaxtyping.config


class Checks(NamedTuple):
    """Two functions that do nothing but refuse what does not fit an annotation."""

    arguments: Callable[..., object]
    """Takes what the function takes."""
    result: Callable[[object], object]


UNCHECKED = Checks(lambda *args, **kwargs: None, lambda result: None)
_checks: dict[tuple[str, str, int, str], Checks] = {}
"""By name, line and annotations of a function: an inner one is checked alike each time that it is defined."""


def install(package: str) -> None:
    """From here on, modules of the package are checked as they are imported."""
    jaxtyping.install_import_hook(package, "beartype.beartype")
    jaxtyping.jaxtyped = checked  # type: ignore[assignment]


def checked(function: Any = None, *, typechecker: object = None) -> Any:
    """A function whose annotations are checked at each call; a dataclass with its `__init__` checked."""
    if function is None:
        return checked
    if isinstance(function, type):
        own = vars(function).get("__init__")
        if dataclasses.is_dataclass(function) and own is not None and not hasattr(own, "__wrapped__"):
            function.__init__ = checked(own)  # type: ignore[misc]
        return function
    if isinstance(function, (classmethod, staticmethod)):
        return type(function)(checked(function.__func__))
    if isinstance(function, property):
        return property(*(part and checked(part) for part in (function.fget, function.fset, function.fdel)))
    checks, made = UNCHECKED, False

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal checks, made
        if config.jaxtyping_disable:
            return function(*args, **kwargs)
        if not made:
            # Before the next line: beartype imports modules, and finders of the package's own are functions too.
            made = True
            checks = checks_of(function)
        with one_call:
            try:
                checks.arguments(*args, **kwargs)
            except BeartypeCallHintViolation as error:
                raise jaxtyping.TypeCheckError(f"{function.__module__}.{function.__qualname__}: {error}") from error
            result = function(*args, **kwargs)
            try:
                checks.result(result)
            except BeartypeCallHintViolation as error:
                raise jaxtyping.TypeCheckError(f"{function.__module__}.{function.__qualname__}: {error}") from error
            return result

    return call


def checks_of(function: Callable[..., Any]) -> Checks:
    """Made at a function's first call, when all names in its annotations are there."""
    place = (function.__module__, function.__qualname__, function.__code__.co_firstlineno)
    key = (*place, repr(function.__annotations__))
    if key not in _checks:
        hints = {name: hint for name in function.__annotations__ for hint in hint_of(function, name)}
        returned = {"return": hints.pop("return")} if "return" in hints else {}
        takes_one = inspect.Signature([inspect.Parameter("result", inspect.Parameter.POSITIONAL_ONLY)])
        _checks[key] = Checks(
            doing_nothing(function, inspect.signature(function), "None", hints),
            doing_nothing(function, takes_one, "result", returned),
        )
    return _checks[key]


def hint_of(function: Callable[..., Any], name: str) -> list[Any]:
    """What an annotation says; nothing if it names what only type checkers import, or what is local to a function."""

    def alone() -> None: ...

    alone.__annotations__ = {name: function.__annotations__[name]}
    try:
        return [get_type_hints(alone, function.__globals__, include_extras=True)[name]]
    except NameError:
        return []


def doing_nothing(
    function: Callable[..., Any], signature: inspect.Signature, returned: str, hints: dict[str, Any]
) -> Callable[..., Any]:
    """A function of this signature and these annotations, checked by beartype, that returns one of its arguments."""
    parameters = [
        p.replace(annotation=p.empty, default=p.default if p.default is p.empty else None)
        for p in signature.parameters.values()
    ]
    made: dict[str, Any] = {}
    exec(f"def {function.__name__}{inspect.Signature(parameters)}: return {returned}", made)
    empty = made[function.__name__]
    empty.__module__, empty.__qualname__, empty.__annotations__ = function.__module__, function.__qualname__, hints
    if returned == "None":
        empty.__defaults__, empty.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return beartype(empty)
