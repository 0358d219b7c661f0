"""The bootstrap: exact where a resample cannot vary, enumerable on two values, right in the long run."""

from __future__ import annotations

import numpy as np
import pytest

from softprompt_registry.errors import DataError
from softprompt_registry.evaluation import statistics
from softprompt_registry.evaluation.statistics import Interval, PairedComparison, bootstrap_mean, paired_bootstrap


def test_identical_conditions_do_not_differ() -> None:
    scores = [0.1, 0.7, 0.3]
    assert paired_bootstrap(scores, scores, seed=0) == PairedComparison(0.0, 0.0, 0.0, wins=0, ties=3, losses=0, n=3)


def test_a_constant_shift_has_an_interval_without_width_however_much_tasks_vary() -> None:
    b = [0.0, 64.0, -3.5, 1000.0]  # binary fractions, so the differences are exactly 1/4
    a = [score + 1 / 4 for score in b]
    assert paired_bootstrap(a, b, seed=0) == PairedComparison(1 / 4, 1 / 4, 1 / 4, wins=4, ties=0, losses=0, n=4)
    assert paired_bootstrap(b, a, seed=0) == PairedComparison(-1 / 4, -1 / 4, -1 / 4, wins=0, ties=0, losses=4, n=4)


def test_wins_ties_losses_and_difference_are_counted_for_the_first_condition() -> None:
    result = paired_bootstrap([1.0, 0.5, 0.5, 0.25], [0.5, 0.5, 0.25, 0.5], seed=0)
    assert result[3:] == (2, 1, 1, 4)
    assert result.difference == (1 / 2 + 0 + 1 / 4 - 1 / 4) / 4
    assert result.low < result.difference < result.high


def test_float_noise_is_a_tie_and_a_small_difference_is_not() -> None:
    assert paired_bootstrap([0.1 + 0.2, 0.3], [0.3, 0.1 + 0.2], seed=0)[3:] == (0, 2, 0, 2)
    assert paired_bootstrap([0.30001, 0.3], [0.3, 0.30001], seed=0)[3:] == (1, 0, 1, 2)


def test_two_values_have_the_quantiles_that_can_be_enumerated() -> None:
    # The mean of two draws from {0, 1} is 0, 1/2, 1 with probabilities 1/4, 1/2, 1/4.
    assert bootstrap_mean([0.0, 1.0], seed=0) == Interval(1 / 2, 0.0, 1.0)
    assert bootstrap_mean([0.0, 1.0], seed=0, level=0.4) == Interval(1 / 2, 1 / 2, 1 / 2)
    # {-1, 2}: -1, 1/2, 2; the outer quantiles at level 0.6 are .2 and .8.
    assert bootstrap_mean([-1.0, 2.0], seed=0, level=0.6) == Interval(1 / 2, -1.0, 2.0)


def test_the_same_seed_gives_the_same_interval_and_another_does_not() -> None:
    scores = np.random.default_rng(1).random(20).tolist()
    other = np.random.default_rng(2).random(20).tolist()
    first = paired_bootstrap(scores, other, seed=3)
    assert paired_bootstrap(scores, other, seed=3) == first
    assert paired_bootstrap(scores, other, seed=4) != first
    assert bootstrap_mean(scores, seed=3) == bootstrap_mean(scores, seed=3) != bootstrap_mean(scores, seed=4)


def test_a_paired_comparison_is_the_bootstrap_of_the_differences() -> None:
    a, b = [0.75, 0.5, 1.0], [0.25, 0.5, 0.125]
    assert paired_bootstrap(a, b, seed=9, draws=500)[:3] == bootstrap_mean([1 / 2, 0.0, 7 / 8], seed=9, draws=500)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    intervals = [bootstrap_mean(generator.normal(1.0, 2.0, size=60).tolist(), s, 400, 0.8) for s in range(400)]
    covered = sum(low <= 1.0 <= high for _, low, high in intervals) / len(intervals)
    assert 0.74 < covered < 0.85  # .8 ± 3 standard errors of .02, a little less for n = 60


def test_many_tasks_are_drawn_in_blocks_without_leaving_a_draw_out(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).random(50).tolist()
    whole = bootstrap_mean(values, seed=0, draws=1_001)
    monkeypatch.setattr(statistics, "_BLOCK_ENTRIES", 500)  # ten draws at once, the last block has one
    assert bootstrap_mean(values, seed=0, draws=1_001) == pytest.approx(whole, abs=0.01)
    monkeypatch.setattr(statistics, "_BLOCK_ENTRIES", 1)
    assert bootstrap_mean(values, seed=0, draws=1_001) == pytest.approx(whole, abs=0.01)


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(DataError, match="found 2 and 3 scores.*same tasks"):
        paired_bootstrap([0.0, 1.0], [0.0, 1.0, 2.0], seed=0)


@pytest.mark.parametrize("call", [lambda: paired_bootstrap([], [], seed=0), lambda: bootstrap_mean([], seed=0)])
def test_no_task_is_refused(call) -> None:
    with pytest.raises(DataError, match=r"shape \(0,\), expected at least one number"):
        call()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_missing_score_is_refused_and_located(bad: float) -> None:
    with pytest.raises(DataError, match=r"NaN or infinity at positions \[1\]"):
        bootstrap_mean([0.5, bad], seed=0)
    with pytest.raises(DataError, match=r"comparing two conditions: found NaN or infinity at positions \[0\]"):
        paired_bootstrap([0.5, 0.5], [bad, 0.5], seed=0)
