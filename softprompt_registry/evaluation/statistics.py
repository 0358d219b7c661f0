"""Uncertainty of a mean over tasks, and of the difference between two conditions measured on the same tasks.

The unit that is drawn is the task, because tasks are what we want to generalise to. All intervals are percentile
intervals of a seeded bootstrap: same numbers and same seed, same interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from softprompt_registry.errors import DataError

TIE_TOLERANCE = 1e-6
"""Two scores of one task closer than this are a tie: equal texts encoded in different batches differ by some 1e-7."""

_BLOCK_ENTRIES = 1 << 22
"""Task indices drawn at once (32 MiB), so that 10,000 draws over thousands of tasks fit into memory."""


class Interval(NamedTuple):
    """A mean with its bootstrap percentile interval."""

    mean: float
    low: float
    high: float


class PairedComparison(NamedTuple):
    """Condition a minus condition b over the same `n` tasks; wins, ties and losses are counted for a."""

    difference: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int
    n: int


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], seed: int, draws: int = 10_000, level: float = 0.95
) -> PairedComparison:
    """Mean of `a[i] - b[i]` over tasks i with its percentile interval, and in how many tasks a is ahead.

    A draw takes n tasks with replacement and keeps the two scores of a task together, so what makes a task hard for
    both conditions cancels out. A win is a difference above `TIE_TOLERANCE`, a loss one below
    minus that. With a single task the interval has no width: it says nothing about other tasks.

    Args:
        a: one score per task, (n,).
        b: the other condition's score of the same tasks in the same order, (n,).
        seed: Seed for the draws; swapping a and b under the same seed mirrors the interval.
        draws: number of bootstrap samples.
        level: share of the draws' means between `low` and `high`.

    Raises:
        DataError: the lists differ in length, are empty, or hold a number that is not finite.
    """
    if len(a) != len(b):
        raise DataError(
            f"comparing two conditions: found {len(a)} and {len(b)} scores, expected one of each for every task. "
            "Score both conditions on the same tasks, in the same order."
        )
    differences = finite_scores(a, "comparing two conditions") - finite_scores(b, "comparing two conditions")
    mean, low, high = _interval(differences, seed, draws, level)
    wins = int(np.count_nonzero(differences > TIE_TOLERANCE))
    losses = int(np.count_nonzero(differences < -TIE_TOLERANCE))
    n = len(differences)
    return PairedComparison(mean, low, high, wins, n - wins - losses, losses, n)


def bootstrap_mean(values: Sequence[float], seed: int, draws: int = 10_000, level: float = 0.95) -> Interval:
    """Mean of one score per task with the percentile interval of its bootstrap over tasks.

    Raises:
        DataError: there is no value, or one is not finite.
    """
    return _interval(finite_scores(values, "bootstrapping a mean"), seed, draws, level)


def finite_scores(values: Sequence[float], doing: str) -> NDArray[np.float64]:
    """The scores as (n,) float64.

    Args:
        doing: what they are for, as the beginning of an error message.

    Raises:
        DataError: there is no score, or one is not finite.
    """
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1 or not len(scores):
        raise DataError(
            f"{doing}: found scores of shape {scores.shape!r}, expected at least one number in a flat list. "
            "Check that the evaluation saw any task."
        )
    if not np.isfinite(scores).all():
        where = np.flatnonzero(~np.isfinite(scores)).tolist()
        raise DataError(
            f"{doing}: found NaN or infinity at positions {where[:10]!r}, expected finite scores only. "
            "Find out why those tasks have no score; leaving them out would flatter the result."
        )
    return scores


def _interval(values: NDArray[np.float64], seed: int, draws: int, level: float) -> Interval:
    generator = np.random.default_rng(seed)
    n = len(values)
    rows_at_once = max(1, _BLOCK_ENTRIES // n)
    means = np.empty(draws)
    for start in range(0, draws, rows_at_once):
        rows = min(rows_at_once, draws - start)
        means[start : start + rows] = values[generator.integers(n, size=(rows, n))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high))
