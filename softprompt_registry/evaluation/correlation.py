"""Whether two scores rise together: Spearman's and Pearson's coefficients, with a bootstrap interval over tasks.

SciPy ranks no weighted samples, and ranking each of 10,000 draws anew would take seconds; so a draw is a row of weights here,
and all rows are ranked at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from softprompt_registry.errors import DataError
from softprompt_registry.evaluation.statistics import TIE_TOLERANCE

MIN_OBSERVATIONS = 3
"""Any two lie on a line."""

_BLOCK_ENTRIES = 1 << 20
"""Weights drawn at once; a handful of matrices of this size (8 MiB each) live at the same time."""

Floats = NDArray[np.float64]


class Correlation(NamedTuple):
    """How two scores go together over `n` observations; `low` to `high` is the bootstrap interval of Spearman's coefficient.

    Where a coefficient is not defined all four are None, and `reason` says why.
    """

    spearman: float | None
    pearson: float | None
    low: float | None
    high: float | None
    n: int
    reason: str | None = None


def correlation(
    quality: Sequence[float],
    accuracy: Sequence[float],
    seed: int,
    *,
    tasks: Sequence[str] | None = None,
    draws: int = 10_000,
    level: float = 0.95,
    tie_tolerance: float = TIE_TOLERANCE,
) -> Correlation:
    """Whether soft prompts that do their task better are also verbalized better (appendix A.9 of the paper).

    Spearman's coefficient is Pearson's of the ranks; equal scores share their mean rank. A draw takes tasks with replacement
    and ranks their scores anew, and the interval is a percentile interval. Draws in which one of the two is constant have no
    coefficient and are left out.

    Args:
        quality: how good each verbalization is, (n,), for instance its label F1.
        accuracy: how well each soft prompt does its task, (n,), in the same order.
        seed: Seed for the draws.
        tasks: (n,) the task of each observation, where a task has several: they are drawn together, so that they do not
            count as independent. None if each observation is a task.
        draws: Number of bootstrap samples.
        level: Share of the draws' coefficients between `low` and `high`.
        tie_tolerance: Scores that differ by no more are equal.

    Raises:
        DataError: the lists differ in length, or hold a number that is not finite.
    """
    x, y = (np.asarray(values, dtype=np.float64) for values in (quality, accuracy))
    n = len(x)
    if len(y) != n or (tasks is not None and len(tasks) != n) or not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise DataError(
            f"correlating quality with accuracy: found {n} and {len(y)} numbers, expected as many of each, all finite. Leave "
            "out what has no score on one side."
        )
    if n < MIN_OBSERVATIONS:
        return _undefined(n, f"{n} task{'s' * (n != 1)}; a correlation needs at least {MIN_OBSERVATIONS}")
    groups = [_groups(values, tie_tolerance) for values in (x, y)]
    for name, group in zip(("quality", "accuracy"), groups, strict=True):
        if group.max() == 0:
            return _undefined(n, f"{name} is the same in all {n} tasks")
    once = np.ones((1, n))
    spearman = float(_spearman(groups, once)[0])
    pearson = float(_pearson(x[None], y[None], once)[0])
    drawn = _drawn_spearmans(groups, seed, draws, tasks)
    if not len(drawn):
        return Correlation(spearman, pearson, None, None, n, "in every draw one score was constant")
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Correlation(spearman, pearson, float(low), float(high), n)


def _undefined(n: int, reason: str) -> Correlation:
    return Correlation(None, None, None, None, n, reason)


def _drawn_spearmans(groups: list[NDArray[np.int64]], seed: int, draws: int, tasks: Sequence[str] | None) -> Floats:
    """Spearman's coefficient of each draw that has one."""
    generator = np.random.default_rng(seed)
    n = len(groups[0])
    rows_at_once = max(1, _BLOCK_ENTRIES // n)
    found = []
    for start in range(0, draws, rows_at_once):
        rows = min(rows_at_once, draws - start)
        # How often each observation is in each draw. Two ways to the same distribution: each keeps the numbers of its seeds.
        if tasks is None:
            places = generator.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
            counts = np.bincount(places.ravel(), minlength=rows * n).reshape(rows, n)
        else:
            names, task_of = np.unique(np.asarray(tasks), return_inverse=True)
            counts = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=rows)[:, task_of]
        coefficients = _spearman(groups, counts.astype(np.float64))
        found.append(coefficients[~np.isnan(coefficients)])
    return np.concatenate(found)


def _spearman(groups: Sequence[NDArray[np.int64]], counts: Floats) -> Floats:
    """A coefficient for each row of `counts`, (R, n), the sample that has observation i `counts[r, i]` times → (R,)."""
    x, y = (_midranks(group, counts) for group in groups)
    return _pearson(x, y, counts)


def _midranks(groups: NDArray[np.int64], counts: Floats) -> Floats:
    """Rank of each observation in each sample: its copies and its equals share their mean rank → (R, n)."""
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    by_group = np.add.reduceat(counts[:, order], starts, axis=1)  # (R, groups)
    # A group of c after b others holds the ranks b + 1 to b + c; their mean is (b + c) - (c - 1) / 2.
    ranks: Floats = by_group.cumsum(axis=1) - (by_group - 1) / 2
    return ranks[:, groups]


def _groups(values: Floats, tie_tolerance: float) -> NDArray[np.int64]:
    """The number of each value's group, (n,): groups of equal values count up from 0 with the values."""
    order = np.argsort(values, kind="stable")
    groups = np.empty(len(values), dtype=np.int64)
    groups[order] = np.concatenate([[0], np.cumsum(np.diff(values[order]) > tie_tolerance)])
    return groups


def _pearson(x: Floats, y: Floats, weights: Floats) -> Floats:
    """Weighted coefficients, row by row: three (R, n) → (R,); NaN where one side is constant."""
    totals = weights.sum(axis=1, keepdims=True)
    x = x - (weights * x).sum(axis=1, keepdims=True) / totals
    y = y - (weights * y).sum(axis=1, keepdims=True) / totals
    spread = np.sqrt((weights * x * x).sum(axis=1) * (weights * y * y).sum(axis=1))
    together = (weights * x * y).sum(axis=1)
    coefficients = np.where(spread > 0, together / np.where(spread > 0, spread, 1.0), np.nan)
    return np.clip(coefficients, -1.0, 1.0)
