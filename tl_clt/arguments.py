"""Arguments as plain values of Python: numbers, choices, switches, paths, vectors.

What is meant is accepted: numbers of numpy and pandas, tensors of no dimensions. The rest is refused with an error that
names the argument, what was given, and what to give.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Literal, TypeGuard, overload

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_clt.errors import ConfigError, FeatureNotFound, TlCltError, nearest

Refusal = type[TlCltError]
NO_NUMBERS = (bool, np.timedelta64)
"""Python counts these among its numbers."""
SMALLEST, LARGEST = -(2**63), 2**63 - 1
"""Whole numbers that torch can hold."""
DTYPES = ("float64", "float32", "bfloat16", "float16")
"""Number types that models and transcoders have."""
Backend = Literal["hooked", "bridge"]
"""Kinds of model that are loaded: a HookedTransformer or a TransformerBridge."""


def shown(value: object) -> str:
    """A value and its type, short and on one line, for a message."""
    kind = type(value).__name__
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)} and {value.dtype}"
    if isinstance(value, np.ndarray):
        return f"an array of shape {list(value.shape)} and {value.dtype}"
    if isinstance(value, torch.nn.Module):
        return f"of type {kind}"
    try:
        text = " ".join(repr(value).split())
    except Exception:
        # A message about a value that cannot even be printed.
        return f"of type {kind}"
    return text if value is None else f"{text:.60}, of type {kind}"


def plain(value: object) -> Any:
    """The Python value of a tensor or array of no dimensions, or of a number of numpy's; all else as it is."""
    if isinstance(value, Tensor):
        return value.item() if value.ndim == 0 and has_values(value) else value
    if isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0 and value.dtype.kind in "biufc":
        return value.item()
    return value


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor holds numbers to be read: those on the "meta" device do not, and sparse ones hold few."""
    return tensor.device.type != "meta" and tensor.layout == torch.strided


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a plain value is a whole number; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, NO_NUMBERS)


@overload
def as_whole(
    name: str, value: object, least: int | None = ..., most: int | None = ..., *, why: str = ..., error: Refusal = ...
) -> int: ...
@overload
def as_whole(
    name: str,
    value: object,
    least: int | None = ...,
    most: int | None = ...,
    *,
    why: str = ...,
    none: str,
    error: Refusal = ...,
) -> int | None: ...
def as_whole(
    name: str,
    value: object,
    least: int | None = None,
    most: int | None = None,
    *,
    why: str = "",
    none: str | None = None,
    error: Refusal = ConfigError,
) -> int | None:
    """A whole number within bounds: a count, a position, a layer.

    Args:
        name: of the argument.
        value: what was given for it.
        least, most: bounds; None for none.
        why: what the bounds are of, for the message: "the size of the vocabulary".
        none: what None stands for ("all"), where the argument may be None.
        error: what to raise.
    """
    number: object = plain(value)
    if number is None and none is not None:
        return None
    low = SMALLEST if least is None else least
    high = LARGEST if most is None else most
    if not is_whole(number) or not low <= number <= high:
        wanted = ([] if is_whole(number) else ["a whole number"]) + [_bounds(least, most)] + ([why] if why else [])
        if least is None and most is None:
            wanted = ["a whole number of 64 bits" if is_whole(number) else "a whole number"]
        raise error(f"{name} is {_said(number, value)}: give {', '.join(wanted)}{_or_none(none)}.")
    return operator.index(number)


@overload
def as_number(name: str, value: object, *, above: int | float | None = ..., error: Refusal = ...) -> int | float: ...
@overload
def as_number(
    name: str, value: object, *, above: int | float | None = ..., none: str, error: Refusal = ...
) -> int | float | None: ...
def as_number(
    name: str,
    value: object,
    *,
    above: int | float | None = None,
    none: str | None = None,
    error: Refusal = ConfigError,
) -> int | float | None:
    """A finite number, more than `above`. Whole numbers stay whole."""
    number: object = plain(value)
    if number is None and none is not None:
        return None
    if not _is_finite(number) or (above is not None and not number > above):
        more = "" if above is None else f", more than {above:g}"
        raise error(f"{name} is {_said(number, value)}: give a finite number{more}{_or_none(none)}.")
    return operator.index(number) if is_whole(number) else float(number)


@overload
def as_share(name: str, value: object, *, zero: bool = ..., error: Refusal = ...) -> float: ...
@overload
def as_share(name: str, value: object, *, zero: bool = ..., none: str, error: Refusal = ...) -> float | None: ...
def as_share(
    name: str, value: object, *, zero: bool = False, none: str | None = None, error: Refusal = ConfigError
) -> float | None:
    """A share, at most 1, and more than 0 unless `zero` may be one."""
    number: object = plain(value)
    if number is None and none is not None:
        return None
    if not _is_finite(number) or not (0 < number <= 1 or (zero and number == 0)):
        bounds = " from 0 to 1" if zero else ", more than 0 and at most 1"
        raise error(f"{name} is {_said(number, value)}: give a share{bounds}{_or_none(none)}.")
    return float(number)


def as_seed(name: str, value: object) -> int:
    """A seed of random numbers."""
    return as_whole(name, value, SMALLEST, LARGEST)


def as_switch(name: str, value: object, error: Refusal = ConfigError) -> bool:
    """True or False, also as 1 or 0."""
    switch = plain(value)
    if not isinstance(switch, int) or switch not in (0, 1):
        raise error(f"{name} is {shown(value)}: give True or False.")
    return bool(switch)


def as_choice(name: str, value: object, choices: Sequence[str], error: Refusal = ConfigError) -> Any:
    """One of some words."""
    if not isinstance(value, str) or value not in choices:
        said = repr(value) if isinstance(value, str) else shown(value)
        near = nearest(value, choices) if isinstance(value, str) else ""
        raise error(f"{name} is {said:.80}: give one of {', '.join(choices)}.{near}")
    return str(value)


def as_choices(name: str, value: object, choices: Sequence[str]) -> list[Any]:
    """Some of some words, at least one, each once; a word by itself is a list of one."""
    given = as_several(name, value, "some of " + ", ".join(choices))
    return list(dict.fromkeys(as_choice(f"{name}[{i}]", one, choices) for i, one in enumerate(given)))


def as_several(name: str, value: object, wanted: str, error: Refusal = ConfigError) -> list[Any]:
    """The entries of a list, tuple, range, tensor, array or other ordered things, at least one; a number, word or
    switch by itself is a list of one.

    Args:
        wanted: what to give, for the message.
    """
    given = plain(value)
    if isinstance(given, np.ndarray) or (isinstance(given, Tensor) and has_values(given)):
        given = given.tolist()
    elif isinstance(given, (str, numbers.Number)):
        given = [given]
    elif isinstance(given, Iterable) and not isinstance(given, (bytes, bytearray, Set, Mapping, Tensor)):
        given = list(given)
    if not isinstance(given, list) or not given:
        raise error(f"{name} is {shown(value)}: give {wanted}, at least one.")
    return given


def as_path(name: str, value: object, error: Refusal = ConfigError) -> Path:
    """A path of the file system."""
    if not isinstance(value, (str, Path)) or not str(value) or "\0" in str(value) or lone_surrogate(str(value)):
        raise error(f"{name} is {shown(value)}: give a path, as text or pathlib.Path.")
    return Path(value)


def lone_surrogate(text: str) -> str | None:
    """Half of a surrogate pair, which is no character and cannot be written as UTF-8; None where there is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return text[error.start]
    return None


def as_device(name: str, value: object) -> torch.device:
    """A device of torch's that is here, by name or as it is."""
    try:
        device = torch.device(value)  # type: ignore[arg-type]
    except (RuntimeError, TypeError, ValueError, OverflowError):
        raise ConfigError(f"{name} is {shown(value)}: give a device of torch's, such as 'cpu' or 'cuda'.") from None
    require_device(name, device)
    return device


def require_device(name: str, device: str | torch.device) -> None:
    """Raise unless tensors can be made on a device.

    Args:
        name: of the argument.
        device: as torch names it.

    Raises:
        ConfigError: with the devices that there are.
    """
    try:
        is_here = torch.empty(0, device=device).device.type != "meta"
    # Of a kind that it was built without torch says so by an assertion.
    except (RuntimeError, AssertionError, TypeError, ValueError, OverflowError, ImportError):
        is_here = False
    if not is_here:
        gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        apple = ["mps"] if torch.backends.mps.is_available() else []
        raise ConfigError(f"{name} is '{device}', which is not here: give one of {', '.join(['cpu', *gpus, *apple])}.")


def as_dtype(name: str, value: object) -> torch.dtype:
    """A floating number type of torch's, by name or as it is."""
    named = str(value).removeprefix("torch.") if isinstance(value, (str, torch.dtype)) else None
    if named not in DTYPES:
        said = shown(value) if named is None else f"{named!r:.60}"
        raise ConfigError(f"{name} is {said}: give one of {', '.join(DTYPES)}, as text or of torch.")
    return getattr(torch, named)


def as_vector(name: str, value: object, error: Refusal) -> Float[Tensor, " n"]:
    """A direction: finite numbers along one dimension, as a tensor, an array or a list."""
    wanted = "give finite numbers along one dimension, as a tensor, an array or a list"
    if not isinstance(value, (Tensor, np.ndarray, list, tuple)):
        raise error(f"{name} is {shown(value)}: {wanted}.")
    try:
        vector = value if isinstance(value, Tensor) else torch.tensor(np.asarray(value))
        if not vector.is_floating_point() and not vector.is_complex() and vector.dtype != torch.bool:
            vector = vector.to(torch.get_default_dtype())
        holds = vector.is_floating_point() and vector.ndim == 1 and bool(torch.isfinite(vector).all())
    except (TypeError, ValueError, RuntimeError, NotImplementedError, OverflowError):
        holds = False
    if not holds:
        raise error(f"{name} is {shown(value)}, and may not be finite: {wanted}.")
    return vector


def as_features(value: object, d_transcoder: int) -> Int[Tensor, " n"]:
    """Numbers of features of a layer, one or several, as a tensor."""
    if isinstance(value, Tensor) and value.ndim == 1 and value.dtype == torch.long and has_values(value):
        found = value
    elif isinstance(value, (list, tuple)) and not value:
        found = torch.zeros(0, dtype=torch.long)
    else:
        entries = as_several("features", value, "feature numbers, as a tensor or a list")
        found = torch.tensor([as_whole(f"features[{i}]", n, 0, d_transcoder - 1) for i, n in enumerate(entries)])
    if len(found) and not (int(found.min()) >= 0 and int(found.max()) < d_transcoder):
        raise FeatureNotFound(f"features holds numbers out of range: a layer has features 0 to {d_transcoder - 1}.")
    return found


def _is_finite(number: object) -> TypeGuard[float]:
    if isinstance(number, NO_NUMBERS) or not isinstance(number, numbers.Real):
        return False
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


def _said(number: object, value: object) -> str:
    """A number as it is; of all else what it is."""
    return f"{number}" if _is_finite(number) or isinstance(number, float) else shown(value)


def _bounds(least: int | None, most: int | None) -> str:
    if least is None:
        return f"at most {most}"
    if least == 0 and most is None:
        return "0 or more"
    return f"at least {least}" if most is None else f"{least} to {most}"


def _or_none(none: str | None) -> str:
    return "" if none is None else f", or None for {none}"
