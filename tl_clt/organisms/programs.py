"""Small programs over whole numbers, in steps: what the models of `circuits` compute, and what they would compute if a
step had given something else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

Values = Int[Tensor, " n_prompts"]


class Step(NamedTuple):
    """One intermediate value, made of two values that are known before it."""

    name: str
    arguments: tuple[str, str]
    """Names of inputs or earlier steps."""

    function: Callable[[int, int], int]


class Program(NamedTuple):
    """Inputs in the order of a prompt, and steps, of which the last gives the answer.

    A step's layer is the first whose MLP finds both arguments in the residual stream.
    """

    inputs: tuple[str, ...]
    n_values: int
    """Inputs are 0 to n_values - 1; so is the answer."""

    steps: tuple[Step, ...]

    def all_inputs(self) -> Int[Tensor, "n_prompts n_inputs"]:
        """Every combination of inputs, once."""
        return torch.tensor(list(product(range(self.n_values), repeat=len(self.inputs))))

    def step(self, name: str) -> Step:
        """The step of that name."""
        return next(step for step in self.steps if step.name == name)

    def layer(self, name: str) -> int:
        """Layer of the MLP that computes a step; -1 for inputs."""
        if name in self.inputs:
            return -1
        return 1 + max(self.layer(argument) for argument in self.step(name).arguments)

    def run(
        self, inputs: Int[Tensor, "n_prompts n_inputs"], given: Mapping[str, Values] | None = None
    ) -> dict[str, Values]:
        """Values of all inputs and steps.

        Args:
            inputs: one row a prompt.
            given: values that some steps are to have, whatever their arguments are.
        """
        values = dict(zip(self.inputs, inputs.unbind(dim=1), strict=True))
        for step in self.steps:
            if given is not None and step.name in given:
                values[step.name] = given[step.name]
            else:
                pairs = zip(*(values[name].tolist() for name in step.arguments), strict=True)
                values[step.name] = torch.tensor([step.function(*pair) for pair in pairs])
        return values


def _xor(a: int, b: int) -> int:
    return a ^ b


def _and(a: int, b: int) -> int:
    return a & b


def _add(n: int) -> Callable[[int, int], int]:
    return lambda a, b: (a + b) % n


def _multiply(n: int) -> Callable[[int, int], int]:
    return lambda a, b: a * b % n


def _equal(a: int, b: int) -> int:
    return int(a == b)


def _next_state(state: int, symbol: int) -> int:
    """Symbol 0 keeps the state, 1 goes on to the next of three, 2 exchanges the first two: their order matters."""
    return (state, (state + 1) % 3, (1, 0, 2)[state])[symbol]


def _chain(names: str, inputs: tuple[str, ...], function: Callable[[int, int], int]) -> tuple[Step, ...]:
    """Steps that each take the last one's value and the next input."""
    steps: list[Step] = []
    for i, symbol in enumerate(inputs[1:], start=2):
        steps.append(Step(f"{names}_{i}", (steps[-1].name if steps else inputs[0], symbol), function))
    return tuple(steps)


PROGRAMS: dict[str, Program] = {
    "hops": Program(
        ("a", "b", "c", "d"),
        2,
        (
            Step("a_xor_b", ("a", "b"), _xor),
            Step("c_xor_d", ("c", "d"), _xor),
            Step("both", ("a_xor_b", "c_xor_d"), _and),
        ),
    ),
    "sum": Program(("other", "x", "y"), 4, (Step("sum", ("x", "y"), _add(4)),)),
    "equal": Program(
        ("a", "b", "c", "d"),
        3,
        (
            Step("product", ("a", "b"), _multiply(3)),
            Step("sum", ("c", "d"), _add(3)),
            Step("equal", ("product", "sum"), _equal),
        ),
    ),
    "parity": Program(("a", "b", "c", "d"), 2, _chain("parity", ("a", "b", "c", "d"), _xor)),
    "automaton": Program(("a", "b", "c", "d", "e"), 3, _chain("state", ("a", "b", "c", "d", "e"), _next_state)),
}
"""By name: (a xor b) and (c xor d); the sum of two digits beside a third that says nothing; whether a product equals a
sum; the parity of four bits; the state of an automaton with three states after five symbols."""
