"""The check of annotations in tests: what does not fit is refused, in functions of every kind."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from jaxtyping import Float, TypeCheckError
from torch import Tensor, zeros

from tests.checking import checked, install
from tl_clt.lens import to_tokens


@checked
def product(x: Float[Tensor, "a b"], y: Float[Tensor, "b c"], n: int = 3) -> Float[Tensor, "a c"]:
    return (x @ y)[:n]


@checked
def of_a_class_below(x: Below) -> None: ...


class Below: ...


def make_hook(k: int) -> Any:
    @checked
    def hook(x: Float[Tensor, "a"], hook: object = None, *, k: int = k) -> Float[Tensor, "a"]:
        return x[:k]

    return hook


@checked
@dataclass(frozen=True, kw_only=True)
class Config:
    n: int = 3
    bias: Float[Tensor, "d"] | None = None


@checked
@dataclass(frozen=True, kw_only=True)
class LargerConfig(Config):
    name: str = ""


@contextmanager
@checked
def counted(n: int) -> Iterator[int]:
    yield n


class Counter:
    @classmethod
    @checked
    def named(cls, n: int) -> str:
        return n  # type: ignore[return-value]

    @staticmethod
    @checked
    def doubled(n: int) -> int:
        return 2 * n

    @property
    @checked
    def n(self) -> int:
        return ""  # type: ignore[return-value]


def test_what_fits_is_let_through() -> None:
    assert product(zeros(2, 3), zeros(3, 4)).shape == (2, 4)
    of_a_class_below(Below())
    assert make_hook(3)(zeros(3)).shape == (3,) == make_hook(2)(zeros(3), k=5).shape
    assert (Config(n=1).n, LargerConfig(n=2, name="a").n, Counter.doubled(2)) == (1, 2, 4)
    with counted(3) as n:
        assert n == 3


@pytest.mark.parametrize(
    "call",
    [
        lambda: product(zeros(2, 3), zeros(4, 4)),
        lambda: product(zeros(2, 3).long(), zeros(3, 4)),
        lambda: product(zeros(2, 3), zeros(3, 4), n="2"),
        lambda: product(zeros(2, 3), zeros(3, 4), n=1),
        lambda: of_a_class_below(3),
        lambda: make_hook(3)(zeros(3, 3)),
        lambda: make_hook(3)(zeros(4)),
        lambda: make_hook(2)(zeros(3)),
        lambda: Config(n="3"),
        lambda: Config(bias=zeros(2, 2)),
        lambda: LargerConfig(name=3),
        lambda: LargerConfig(n="3"),
        lambda: counted("3"),
        lambda: Counter.named(3),
        lambda: Counter.doubled("3"),
        lambda: Counter().n,
        lambda: to_tokens(3, "a prompt for no model"),
    ],
)
def test_what_does_not_fit_is_refused(call: Any) -> None:
    with pytest.raises(TypeCheckError):
        call()


def test_modules_of_a_package_are_checked_as_they_are_imported(tmp_path, monkeypatch) -> None:
    (tmp_path / "of_a_test.py").write_text(
        "from jaxtyping import Float\nfrom torch import Tensor\n"
        "Rows = Float[Tensor, 'pos d_model']\n"
        "def adder(by):\n"
        "    def add(x: Rows, y: Rows) -> Rows:\n"
        "        return (x + y + by)[:, : x.shape[1] if by < 2 else 1]\n"
        "    return add\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    install("of_a_test")
    adder = importlib.import_module("of_a_test").adder
    x = zeros(2, 3)
    for by in (0, 1):
        assert torch.equal(adder(by)(x, x), x + by)
        for wrong in ((x, x[:1]), (x[0], x)):
            with pytest.raises(TypeCheckError, match="parameter"):
                adder(by)(*wrong)
    with pytest.raises(TypeCheckError, match="return"):
        adder(2)(x, x)


def test_nothing_is_checked_where_a_test_asks_for_it(as_users_run_it: None) -> None:
    assert product(zeros(2, 3), zeros(3, 4), n=1).shape == (1, 4)


def test_arguments_that_a_function_does_not_take_are_pythons_own_error() -> None:
    with pytest.raises(TypeError, match=r"product\(\) missing 1 required positional argument: 'y'"):
        product(zeros(2, 3))
    with pytest.raises(TypeError, match=r"product\(\) got an unexpected keyword argument 'z'"):
        product(zeros(2, 3), zeros(3, 4), z=torch.float64)
