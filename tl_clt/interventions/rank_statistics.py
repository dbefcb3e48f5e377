"""Rank correlations of predictions and measurements, and their intervals by bootstrap over prompts.

Each statistic is a function of how often every prompt counts, so that a resample of prompts costs little and all
statistics can be taken of the same one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from pandas import Series

FEWEST_ENTRIES = 5
"""Of a target or source, for a correlation within it."""
FEWEST_PROMPTS = 10
"""For an interval."""
RESAMPLES = 1000
LEVEL = 0.95
Values = Float[np.ndarray, " n"]
Numbers = Int[np.ndarray, " n"]
Times = Float[np.ndarray, "n_resamples n_prompts"]
"""How often each prompt counts."""


class Interval(NamedTuple):
    """Between which numbers a statistic lies in 95% of resamples; nan where there are fewer than 10 prompts."""

    low: float
    high: float


@dataclass(frozen=True)
class Statistic:
    """A number as a function of how often each prompt counts."""

    n: int
    """Pairs, or targets or sources, that it is taken of."""
    n_prompts: int
    """Prompts that have any of them."""
    at: Callable[[Times], Float[np.ndarray, " n_resamples"]]

    def value(self, n_prompts: int) -> float:
        """With each of all prompts counted once."""
        return float(self.at(np.ones((1, n_prompts)))[0])


def resample(n_prompts: int, seed: int = 0) -> Times:
    """How often each prompt counts in draws of as many prompts, with replacement."""
    return (
        np.random.default_rng(seed).multinomial(n_prompts, np.full(n_prompts, 1 / n_prompts), RESAMPLES).astype(float)
    )


def interval(of: Statistic, times: Times, less: Statistic | None = None) -> Interval:
    """The percentile interval of a statistic, or of one less another on the same resamples."""
    if min(s.n_prompts for s in (of, less) if s is not None) < FEWEST_PROMPTS:
        return Interval(float("nan"), float("nan"))
    drawn = of.at(times) if less is None else of.at(times) - less.at(times)
    if np.isnan(drawn).all():
        return Interval(float("nan"), float("nan"))
    outside = 100 * (1 - LEVEL) / 2
    return Interval(*(float(x) for x in np.nanpercentile(drawn, [outside, 100 - outside])))


def pooled(prompt: Numbers, n_prompts: int, x: Values, y: Values, given: Values | None = None) -> Statistic:
    """Spearman's correlation of all pairs together, or the partial one with the ranks of a third thing given.

    With prompts counted m times, an item's rank is `sum_q m_q c_q`, c_q the items of prompt q below it and half of
    those that are equal. Sums of products of two ranks are then `sum_pqr m_p m_q m_r T_pqr`, with T taken once.
    """
    below = [_below(prompt, n_prompts, values) for values in ((x, y) if given is None else (x, y, given))]
    pairs = [(a, b) for b in range(len(below)) for a in range(b + 1)]
    products = {(a, b): _products(prompt, n_prompts, below[a], below[b]) for a, b in pairs}
    counts = np.bincount(prompt, minlength=n_prompts).astype(float)

    def at(times: Times) -> Float[np.ndarray, " n_resamples"]:
        whole = times @ counts

        def covariance(a: int, b: int) -> Float[np.ndarray, " n_resamples"]:
            sums = (times @ products[a, b].reshape(n_prompts, -1)).reshape(-1, n_prompts, n_prompts)
            with np.errstate(divide="ignore", invalid="ignore"):
                return np.einsum("nq,nqr,nr->n", times, sums, times) / whole**3 - 1 / 4

        return _correlation(covariance, given is not None)

    return Statistic(len(x), int((counts > 0).sum()), at)


def within(
    groups: Numbers, prompt: Numbers, n_prompts: int, x: Values, y: Values, given: Values | None = None
) -> Statistic:
    """The mean of Spearman's correlations within groups, each counted with its entries.

    Groups of fewer than 5 entries, and those in which x or y (or what is left of them, with a third thing given) is
    constant, are left out. A group lies within one prompt.
    """
    _, group = np.unique(groups, return_inverse=True)
    counts = np.bincount(group)
    values = [Series(v).groupby(group).rank().to_numpy() for v in ((x, y) if given is None else (x, y, given))]
    ranks = [rank - (counts[group] + 1) / 2 for rank in values]

    def covariance(a: int, b: int) -> Values:
        return np.bincount(group, weights=ranks[a] * ranks[b]) / counts**3

    found = _correlation(covariance, given is not None) if len(group) else np.zeros(0)
    used = (counts >= FEWEST_ENTRIES) & ~np.isnan(found)
    of_prompt = np.zeros(len(counts), dtype=int)
    of_prompt[group] = prompt
    weight = np.bincount(of_prompt[used], weights=counts[used], minlength=n_prompts)
    weighed = np.bincount(of_prompt[used], weights=(counts * found)[used], minlength=n_prompts)

    def at(times: Times) -> Float[np.ndarray, " n_resamples"]:
        with np.errstate(divide="ignore", invalid="ignore"):
            return (times @ weighed) / (times @ weight)

    return Statistic(int(used.sum()), int((weight > 0).sum()), at)


def mean_of(prompt: Numbers, n_prompts: int, values: Values) -> Statistic:
    """The mean of all values."""
    counts = np.bincount(prompt, minlength=n_prompts)
    sums = np.bincount(prompt, weights=values, minlength=n_prompts)

    def at(times: Times) -> Float[np.ndarray, " n_resamples"]:
        with np.errstate(divide="ignore", invalid="ignore"):
            return (times @ sums) / (times @ counts)

    return Statistic(len(prompt), int((counts > 0).sum()), at)


def _below(prompt: Numbers, n_prompts: int, values: Values) -> Float[np.ndarray, "n n_prompts"]:
    """Of each prompt, the items below each item, and half of those that are equal."""
    levels, level = np.unique(values, return_inverse=True)
    found = np.empty((len(values), n_prompts))
    for q in range(n_prompts):
        here = np.bincount(level[prompt == q], minlength=len(levels))
        found[:, q] = (np.cumsum(here) - here / 2)[level]
    return found


def _products(
    prompt: Numbers, n_prompts: int, a: Float[np.ndarray, "n n_prompts"], b: Float[np.ndarray, "n n_prompts"]
) -> Float[np.ndarray, "n_prompts n_prompts n_prompts"]:
    return np.stack([a[prompt == p].T @ b[prompt == p] for p in range(n_prompts)])


def _correlation(covariance: Callable[[int, int], Float[np.ndarray, " n"]], partial: bool) -> Float[np.ndarray, " n"]:
    """Of the first two of what was ranked, with the third given where there is one; nan where one is constant."""

    def of(a: int, b: int) -> Float[np.ndarray, " n"]:
        x, y = covariance(a, a), covariance(b, b)
        # Of ranks as shares of all n entries: 0 up to rounding, or at least about 1 / 4n.
        varies = (x > 1e-12) & (y > 1e-12)
        return np.where(varies, covariance(a, b) / np.sqrt(np.where(varies, x * y, 1)), np.nan)

    xy = of(0, 1)
    if not partial:
        return xy
    xz, yz = of(0, 2), of(1, 2)
    # What is not ranked apart by the third thing is not explained by it.
    xz, yz = np.nan_to_num(xz), np.nan_to_num(yz)
    left = (1 - xz**2) * (1 - yz**2)
    enough = left > 1e-9
    return np.where(enough, (xy - xz * yz) / np.sqrt(np.where(enough, left, 1)), np.nan)
