"""What a trained organism has learnt to do, as a small program over words: inputs, and hops on the way to an answer.

A task says what the answer would be if a hop had given something else, which is what interchange interventions are held
against (`tl_clt.organisms.interchange`).
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from tl_clt.arguments import shown
from tl_clt.errors import ConfigError

Values = Mapping[str, str]
"""What inputs and hops are on one prompt."""


class Hop(NamedTuple):
    """An intermediate value of a task: made of inputs and earlier hops."""

    name: str
    arguments: tuple[str, ...]
    function: Callable[..., str]


class Case(NamedTuple):
    """One prompt of a task."""

    prompt: str
    """Words with single spaces; `<bos>` is put before them by the tokenizer."""

    answer: str
    """The one token that is right after the prompt."""

    values: dict[str, str]
    """Of inputs and hops; the last one is the answer."""


class BenchmarkPrompt(NamedTuple):
    """A prompt that an organism was not trained on, to measure circuits on."""

    prompt: str
    target: str
    """The right next token."""

    counterfactual: str
    """Another prompt of as many tokens, with another answer."""


def one_in(n: int, *names: str) -> Callable[[Values], bool]:
    """Holds out one in n of the combinations of some inputs: the same on every machine and with every seed, and in all
    tasks that are held out by the same values."""
    return lambda values: zlib.crc32("|".join(values[name] for name in names).encode()) % n == 0


@dataclass(frozen=True, kw_only=True)
class Task:
    """Something that an organism does: how a prompt is made, and the steps to its answer."""

    name: str
    says: str
    """In one sentence, what is asked and why it takes more than looking up one word."""

    draw: Callable[[random.Random], dict[str, str]]
    """Values of the inputs of one prompt."""

    hops: tuple[Hop, ...]
    """In the order in which each can be known; the last gives the answer."""

    words: Callable[[Values], str]
    """The prompt, up to where the answer comes."""

    rest: Callable[[Values], str] = lambda values: "."
    """What follows the answer in the text of training."""

    is_held_out: Callable[[Values], bool]
    """Whether the prompt with some inputs is kept out of the text of training."""

    def run(self, inputs: Values, given: Values | None = None) -> dict[str, str]:
        """Values of all inputs and hops.

        Args:
            inputs: of one prompt.
            given: values that some inputs or hops are to have, whatever they are made of.
        """
        given = given or {}
        values = {name: given.get(name, value) for name, value in inputs.items()}
        for hop in self.hops:
            made = given.get(hop.name)
            values[hop.name] = hop.function(*(values[name] for name in hop.arguments)) if made is None else made
        return values

    def case(self, inputs: Values) -> Case:
        """The prompt with these inputs, its answer, and what lies between."""
        values = self.run(inputs)
        return Case(self.words(values), values[self.hops[-1].name], values)

    def cases(self, n: int, *, held_out: bool, seed: int = 0) -> list[Case]:
        """Different prompts of one split, at random: n of them, or fewer where after 50 n draws there are no more.

        Raises:
            ConfigError: no prompt of the split was drawn.
        """
        chooser = random.Random(f"{self.name} {held_out} {seed}")
        found: dict[str, Case] = {}
        for _ in range(50 * n):
            inputs = self.draw(chooser)
            if self.is_held_out(inputs) == held_out:
                case = self.case(inputs)
                found[case.prompt] = case
            if len(found) == n:
                break
        if not found:
            raise ConfigError(f"{self.name} has no prompt that is {'' if held_out else 'not '}held out.")
        return list(found.values())

    def sentences(self, seed: int) -> Iterator[str]:
        """Prompts of the text of training with their answers, without end."""
        chooser = random.Random(f"{self.name} {seed}")
        while True:
            inputs = self.draw(chooser)
            if not self.is_held_out(inputs):
                case = self.case(inputs)
                yield f"{case.prompt} {case.answer} {self.rest(case.values)}"


def require_task(value: object) -> None:
    """Raise unless something is a task.

    Raises:
        ConfigError: with where tasks are to be had.
    """
    if not isinstance(value, Task):
        raise ConfigError(f"task is {shown(value)}: give a Task, such as organism_tasks(...) has by their names.")
