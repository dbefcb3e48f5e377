"""What all reports share: figures by name, files all or nothing, one line of text, tables in a notebook."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, fields
from html import escape
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import numpy as np
from pandas import DataFrame

from tl_clt.arguments import as_path
from tl_clt.errors import ConfigError
from tl_clt.files import new_folder

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
"""Colours of lines and bars, in order: those of Okabe and Ito, which people of every colour vision tell apart."""
POSITIVE, NEGATIVE = PALETTE[0], PALETTE[1]
"""Colours of signs on light ground. Negative lines are dashed as well."""
POSITIVE_ON_DARK, NEGATIVE_ON_DARK = PALETTE[5], PALETTE[4]
"""On dark ground: the palette's lighter blue and orange. The page's style sheet has these four as well."""
GREY = "#808080"
"""Of what is beside the point: means, zero lines, what is left out."""

Name = TypeVar("Name", bound=str)
MOST_ROWS = 20
"""Rows of a table that a notebook shows."""


class Report(ABC, Generic[Name]):
    """Results that are looked at as figures and tables, and kept as files.

    `Name` is a `Literal` of the names of its figures, so that editors complete them.
    """

    FIGURES: ClassVar[tuple[str, ...]]
    """Names of all its figures; the first is drawn where none is named."""

    @property
    def figures(self) -> tuple[str, ...]:
        """The figures that there is something to draw for."""
        return self.FIGURES

    def plot(self, name: Name | None = None) -> Figure:
        """One of its figures (`figures` has the names), the first where none is named.

        Raises:
            ConfigError: there is no such figure, or nothing to draw for it.
        """
        if name is not None and (not isinstance(name, str) or name not in self.FIGURES):
            raise ConfigError(f"There is no figure {name!r:.60}: give one of {', '.join(self.FIGURES)}.")
        with drawing():
            return self._draw(self.figures[0] if name is None else name)

    def save(self, folder: str | Path) -> Path:
        """Write it to a new or empty folder, all or nothing: numbers and tables, and each figure as a PNG file.

        Raises:
            ConfigError: that is no path.
            OutputNotEmpty: the folder holds something already, or is a file.
            NotWritten: the disk is full, for example; nothing is left.
        """
        folder = as_path("folder", folder)
        with new_folder(folder) as unfinished:
            self.write_into(unfinished)
        return folder

    def write_into(self, folder: Path) -> None:
        """Write the files of `save` to a folder that is there."""
        self._write_numbers(folder)
        for name in self.figures:
            self.plot(name).savefig(folder / f"{name}.png", dpi=120)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._in_short()})"

    def _repr_html_(self) -> str:
        return as_html(repr(self), self._tables())

    @abstractmethod
    def _draw(self, name: str) -> Figure:
        """The figure of a name that is one of `FIGURES`."""

    @abstractmethod
    def _write_numbers(self, folder: Path) -> None:
        """Write numbers and tables to a folder that is there."""

    @abstractmethod
    def _in_short(self) -> str:
        """What it is of and what came out, in a few words."""

    @abstractmethod
    def _tables(self) -> Mapping[str, DataFrame]:
        """What a notebook shows, by title."""


@contextmanager
def drawing() -> Iterator[None]:
    """Within, figures are drawn in the palette; matplotlib's own settings are as before after it."""
    from cycler import cycler
    from matplotlib import rc_context

    with rc_context({"axes.prop_cycle": cycler(color=PALETTE), "axes.axisbelow": True}):
        yield


def diverging_colours() -> Colormap:
    """From the colour of negative values through white to that of positive ones."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("signs", [NEGATIVE, "#ffffff", POSITIVE])


def finite(value: Any) -> Any:
    """A tree of dicts and lists in plain values, in which floats that JSON has no word for are None."""
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    plain = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(plain, float) and not math.isfinite(plain) else plain


def read_fields(cls: type[Any], values: Any, parts: Mapping[str, Callable[[Any], Any]] = MappingProxyType({})) -> Any:
    """A dataclass from what JSON holds, each field of the type that its annotation states; None is nan for a float.

    Args:
        cls: the dataclass.
        values: a mapping with its fields; others are left alone.
        parts: how values of types that are not JSON's own are read, by the type's name.

    Raises:
        ValueError, LookupError: a field that is missing, or of another type.
    """
    if not isinstance(values, dict):
        raise ValueError(f"a {cls.__name__} is {type(values).__name__}")
    given = [f for f in fields(cls) if f.name in values or f.default is MISSING]
    return cls(**{f.name: _read_field(f.name, str(f.type), values[f.name], parts) for f in given})


def _read_field(name: str, kind: str, value: Any, parts: Mapping[str, Callable[[Any], Any]]) -> Any:
    if kind.startswith("list[") and isinstance(value, list):
        return [_read_field(name, kind[len("list[") : -1], one, parts) for one in value]
    if kind in parts:
        return parts[kind](value)
    if kind.startswith("float") and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if value is None and kind == "float":
        return math.nan
    if value is None and kind.endswith("| None"):
        return None
    if {"int": int, "str": str, "str | None": str, "dict[str, Any]": dict}.get(kind) is type(value):
        return value
    raise ValueError(f"{name} is {str(value)[:40]!r}, where {kind} was expected")


def table_to_json(table: DataFrame) -> list[dict[str, Any]]:
    """The rows of a table in plain values; None where a number is infinite or none."""
    return finite(table.to_dict("records"))


def table_from_json(rows: Any, columns: Sequence[str]) -> DataFrame:
    """The table that `table_to_json` wrote, NaN where it has None.

    Raises:
        ValueError, TypeError: these are no rows with just these columns.
    """
    if any(set(row) != set(columns) for row in rows):
        raise ValueError(f"not every row of its table has {', '.join(columns)}")
    table = DataFrame(rows, columns=list(columns))
    return table.where(table.notna(), np.nan).infer_objects()


def as_html(headline: str, tables: Mapping[str, DataFrame]) -> str:
    """A line and some tables for a notebook. All text is escaped: prompts, tokens and names are anybody's."""
    parts = [f"<p><b>{escape(headline)}</b></p>"]
    for title, table in tables.items():
        shown = table.to_html(index=False, escape=True, max_rows=MOST_ROWS, float_format=lambda x: f"{x:.3g}", border=0)
        parts.append(f"<p>{escape(title)}</p>{shown}" if title else shown)
    return "<div>" + "".join(parts) + "</div>"
