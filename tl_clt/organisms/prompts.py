"""What is asked of organisms to measure circuits on."""

from __future__ import annotations

from typing import NamedTuple


class BenchmarkPrompt(NamedTuple):
    """A prompt that an organism was not trained on."""

    prompt: str
    target: str
    """The right next token."""

    counterfactual: str
    """Another prompt of as many tokens, with another answer."""
