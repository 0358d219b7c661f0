"""Whether two numbers of the same thing rise together: Spearman's rank correlation, with an interval over tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from softprompt_registry.errors import DataError

_DRAWS_AT_ONCE = 256


class RankCorrelation(NamedTuple):
    """Spearman's rho of `num_pairs` observations of `num_tasks` tasks, with its bootstrap percentile interval."""

    rho: float
    low: float
    high: float
    num_pairs: int
    num_tasks: int


def rank_correlation(
    x: Sequence[float], y: Sequence[float], tasks: Sequence[str], seed: int, draws: int = 2_000, level: float = 0.95
) -> RankCorrelation | None:
    """Pearson's correlation of the ranks of `x` and `y`; equal values share their mean rank.

    None where it is not defined: fewer than three observations, or all values of one side equal. A draw of the bootstrap
    takes whole tasks with replacement, so that several observations of one task do not count as independent ones; draws
    in which one side is constant are left out.

    Args:
        x: (n,) finite numbers.
        y: (n,) finite numbers.
        tasks: (n,) the task that each observation belongs to.
        seed: of the draws.

    Raises:
        DataError: the three differ in length, or a number is not finite.
    """
    left, right = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if not len(left) == len(right) == len(tasks) or not (np.isfinite(left).all() and np.isfinite(right).all()):
        raise DataError(
            f"correlating two scores: found {len(left)} and {len(right)} numbers of {len(tasks)} tasks; expected as many of "
            "each, all finite. Leave out what has no score on one side."
        )
    if len(left) < 3:
        return None
    names, task_of_row = np.unique(np.asarray(tasks), return_inverse=True)
    whole = _spearman(left, right, np.ones((1, len(left)), dtype=np.int64))
    if not len(whole):
        return None
    generator = np.random.default_rng(seed)
    found = []
    for start in range(0, draws, _DRAWS_AT_ONCE):
        count = min(_DRAWS_AT_ONCE, draws - start)
        # How often each task is in each draw, (draws, tasks).
        times = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=count)
        found.append(_spearman(left, right, times[:, task_of_row]))
    drawn = np.concatenate(found)
    low, high = np.quantile(drawn if len(drawn) else whole, [(1 - level) / 2, (1 + level) / 2])
    return RankCorrelation(float(whole[0]), float(low), float(high), len(left), len(names))


def _spearman(x: NDArray[np.float64], y: NDArray[np.float64], times: NDArray[np.int64]) -> NDArray[np.float64]:
    """Rho of each of B samples in which observation i occurs `times[b, i]` times; samples without one are left out.

    Args:
        x: (n,); y: (n,); times: (B, n).
    """
    left, right = _ranks(x, times), _ranks(y, times)
    size = times.sum(axis=1, keepdims=True)
    left = left - (times * left).sum(axis=1, keepdims=True) / size
    right = right - (times * right).sum(axis=1, keepdims=True) / size
    product = (times * left**2).sum(axis=1) * (times * right**2).sum(axis=1)
    varies = product > 1e-9  # equal ranks differ by rounding, others by 1/2 at least
    rho: NDArray[np.float64] = (times * left * right).sum(axis=1)[varies] / np.sqrt(product[varies])
    return rho


def _ranks(values: NDArray[np.float64], times: NDArray[np.int64]) -> NDArray[np.float64]:
    """(B, n) ranks of the observations in each sample, from 1; equal values get the mean of their places."""
    _, place = np.unique(values, return_inverse=True)
    order = np.argsort(place, kind="stable")
    ends = np.flatnonzero(np.diff(place[order], append=-1))
    last = np.cumsum(times[:, order], axis=1)[:, ends]  # place of the last of each value
    counts = np.diff(last, axis=1, prepend=0)
    ranks: NDArray[np.float64] = (last - (counts - 1) / 2)[:, place]
    return ranks
