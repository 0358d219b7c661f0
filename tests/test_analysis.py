"""Correlation, categories and abstention by hand, and labels marked where the metric counts them."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from softprompt_registry.errors import DataError
from softprompt_registry.evaluation import correlation as correlation_module
from softprompt_registry.evaluation.analysis import (
    Category,
    LabelSpan,
    MetricMean,
    abstention_curve,
    by_category,
    label_pieces,
    label_spans,
    label_words,
    missed_labels,
)
from softprompt_registry.evaluation.correlation import Correlation, correlation
from softprompt_registry.evaluation.metrics import label_score
from softprompt_registry.evaluation.verbalizations import TaskRow
from softprompt_registry.verbalization.abstention import CoveragePoint

# Correlation ----------------------------------------------------------------------------------------------------------


def test_both_coefficients_are_those_of_scipy() -> None:
    generator = np.random.default_rng(1)
    for n in (3, 10, 97):
        x = generator.integers(5, size=n) / 4  # many ties
        y = x + generator.normal(size=n)
        x[0] = 9.0
        found = correlation(x.tolist(), y.tolist(), seed=0, draws=10)
        assert found.spearman == pytest.approx(stats.spearmanr(x, y).statistic)
        assert found.pearson == pytest.approx(stats.pearsonr(x, y).statistic)


def test_the_interval_is_that_of_ranking_every_draw_anew() -> None:
    generator = np.random.default_rng(2)
    x = (generator.integers(4, size=8) / 3).tolist()
    y = generator.random(8).tolist()
    found = correlation(x, y, seed=5, draws=300, level=0.8)
    drawn = []
    for places in np.random.default_rng(5).integers(8, size=(300, 8)):
        left, right = np.take(x, places), np.take(y, places)
        if len(set(left)) > 1 and len(set(right)) > 1:
            drawn.append(stats.spearmanr(left, right).statistic)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, [0.1, 0.9])))


def test_the_same_seed_gives_the_same_interval_and_blocks_change_little(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = np.random.default_rng(3).random((2, 40)).tolist()
    found = correlation(x, y, seed=7)
    assert correlation(x, y, seed=7) == found != correlation(x, y, seed=8)
    assert found.low is not None and found.spearman is not None and found.high is not None
    assert found.low < found.spearman < found.high
    monkeypatch.setattr(correlation_module, "_BLOCK_ENTRIES", 90)  # two draws at once
    assert correlation(x, y, seed=7, draws=2_001)[2:4] == pytest.approx((found.low, found.high), abs=0.05)


def test_what_is_the_same_everywhere_has_no_correlation() -> None:
    same, rising = [0.5, 0.5, 0.5, 0.5], [0.1, 0.2, 0.3, 0.4]
    undefined = (None, None, None, None, 4)
    assert correlation(same, rising, seed=0) == Correlation(*undefined, "quality is the same in all 4 tasks")
    assert correlation(rising, same, seed=0) == Correlation(*undefined, "accuracy is the same in all 4 tasks")
    noisy = [0.5, 0.5 + 1e-8, 0.5 - 1e-8, 0.5]
    assert correlation(noisy, rising, seed=0).spearman is None, "rounding noise is no quality"


@pytest.mark.parametrize(("n", "words"), [(0, "0 tasks;"), (1, "1 task;"), (2, "2 tasks;")])
def test_two_tasks_always_lie_on_a_line(n: int, words: str) -> None:
    found = correlation([0.1, 0.2][:n], [0.3, 0.9][:n], seed=0)
    assert found == Correlation(None, None, None, None, n, f"{words} a correlation needs at least 3")


def test_scores_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(DataError, match="found 2 and 3 numbers, expected as many of each, all finite"):
        correlation([0.0, 1.0], [0.0, 1.0, 2.0], seed=0)
    with pytest.raises(DataError, match="found 3 and 3 numbers"):
        correlation([0.0, 1.0, 2.0], [0.0, math.nan, 2.0], seed=0)


def test_many_observations_of_few_tasks_count_as_few() -> None:
    """Twenty times the same four tasks tell no more than once: an interval over rows would become narrow."""
    x, y = [1.0, 2.0, 3.0, 4.0], [1.0, 3.0, 2.0, 4.0]
    once = correlation(x, y, 1, tasks=list("abcd"))
    often = correlation(x * 20, y * 20, 1, tasks=list("abcd") * 20)
    apart = correlation(x * 20, y * 20, 1, tasks=[str(number) for number in range(80)])
    assert once.spearman == often.spearman == pytest.approx(0.8) and often.n == 80
    assert known(often.high) - known(often.low) > 3 * (known(apart.high) - known(apart.low))
    assert correlation(x, y, 1, tasks=list("abcd")) == once


def known(value: float | None) -> float:
    assert value is not None
    return value


# Categories -----------------------------------------------------------------------------------------------------------


def row(task: str, kind: str, **scores: float) -> TaskRow:
    return TaskRow(task, kind, "truth", "text", scores)


ROWS = [
    row("a", "generation", cosine=0.5),
    row("b", "classification", cosine=0.25, label_f1=1.0),
    row("c", "classification", cosine=0.75, label_f1=0.5),
]


def test_categories_have_the_means_of_their_tasks_and_their_number() -> None:
    assert by_category(ROWS) == (
        Category("classification", 2, {"cosine": MetricMean(0.5, 2), "label_f1": MetricMean(0.75, 2)}),
        Category("generation", 1, {"cosine": MetricMean(0.5, 1)}),
    )


def test_given_categories_may_mix_kinds_and_a_metric_counts_the_tasks_that_have_it() -> None:
    found = by_category(ROWS, {"a": "news", "b": "news", "c": "art", "other": "unused"})
    assert found == (
        Category("news", 2, {"cosine": MetricMean(0.375, 2), "label_f1": MetricMean(1.0, 1)}),
        Category("art", 1, {"cosine": MetricMean(0.75, 1), "label_f1": MetricMean(0.5, 1)}),
    )


def test_a_task_without_a_category_is_refused() -> None:
    with pytest.raises(DataError, match=r"found no category for \['b', 'c'\] \(2 of 3 tasks\)"):
        by_category(ROWS, {"a": "news"})


# Abstention -----------------------------------------------------------------------------------------------------------


def test_quality_against_coverage_by_hand() -> None:
    curve = abstention_curve([0.5, None, 0.9, 0.5], [0.5, 0.0, 1.0, 0.0])
    assert curve.points == (
        CoveragePoint(1 / 4, 1.0, 0.9),
        CoveragePoint(3 / 4, 0.5, 0.5),  # equal faithfulness is answered together
        CoveragePoint(1.0, 0.375, None),
    )
    assert curve.area == 1 / 4 * 1 + 1 / 2 * 0.5 + 1 / 4 * 0.375
    assert curve.no_abstention == 0.375


@pytest.mark.parametrize("nothing", [[None, None], [0.5, 0.5], [0.0, -0.0]])
def test_faithfulness_that_says_nothing_changes_nothing(nothing: list[float | None]) -> None:
    curve = abstention_curve(nothing, [1.0, 0.5])
    assert [(point.coverage, point.quality) for point in curve.points] == [(1.0, 0.75)]
    assert curve.area == curve.no_abstention == 0.75


# Labels in a text -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "labels", "found"),
    [
        ("Joy, fear or joy!", ["joy", "fear"], ["Joy", "fear", "joy"]),
        ("enjoy joyful", ["joy"], []),
        ("It is not toxic.", ["toxic", "not toxic"], ["not toxic"]),
        ("very, GOOD and e-mail", ["very good", "e-mail"], ["very, GOOD", "e-mail"]),
        ("very very good", ["very good"], ["very good"]),
        ("a b", ["a b c", "a"], ["a"]),
        ("+ and -", ["+", "-"], []),
        ("", ["joy"], []),
        ("\u0130stanbul: STRASSE, stra\u00dfe", ["i\u0307stanbul", "stra\u00dfe"], ["\u0130stanbul", "stra\u00dfe"]),
        ("joy…", ["joy"], []),  # only ASCII punctuation ends a word
    ],
)
def test_labels_are_found_as_whole_words_and_phrases(text: str, labels: list[str], found: list[str]) -> None:
    spans = label_spans(text, labels)
    assert [text[span.start : span.end] for span in spans] == found
    assert [piece for piece, is_label in label_pieces(text, labels) if is_label] == found
    assert "".join(piece for piece, _ in label_pieces(text, labels)) == text


def test_a_span_names_its_label_and_the_rest_is_missed() -> None:
    labels = ["E-mail", "letter", "call"]
    assert label_spans("an e mail, a LETTER", labels) == (LabelSpan(3, 9, "E-mail"), LabelSpan(13, 19, "letter"))
    assert label_pieces("an e mail!", labels) == [("an ", False), ("e mail", True), ("!", False)]
    assert missed_labels("an e mail, a LETTER", labels) == ["call"]
    assert missed_labels("e mail", ["e-mail", "e mail"]) == [], "two spellings of the same words"


def test_spans_are_exactly_what_the_metric_counts() -> None:
    generator = random.Random(0)
    words = ["very", "good", "not", "Bad", "e", "mail", "\u0130d", "stra\u00dfe", "…", "+"]
    gaps = [" ", ", ", "-", "\n", ".", "\u00a0", "  ", "\u2028"]

    def some(count: int) -> str:
        parts = [generator.choice(words) + generator.choice(gaps) for _ in range(count)]
        return "".join(part.upper() if generator.random() < 0.3 else part for part in parts)

    hits = 0
    for _ in range(400):
        text = some(generator.randrange(12))
        labels = [label for _ in range(generator.randint(1, 5)) if (label := some(generator.randint(1, 3)).strip())]
        spans = label_spans(text, labels)
        distinct = {label_words(label) for label in labels}
        found = {label_words(span.label) for span in spans}
        score = label_score(text, labels, mode="phrase")
        assert Fraction(len(found), len(distinct)) == Fraction(score.recall).limit_denominator(100)
        assert len(missed_labels(text, labels)) == sum(label_words(label) not in found for label in labels)
        for span in spans:
            alone = label_score(text[span.start : span.end], labels, mode="phrase")
            assert (alone.recall, alone.precision) == (1 / len(distinct), 1.0)
        without = "".join(" zzz " if is_label else piece for piece, is_label in label_pieces(text, labels))
        assert label_score(without, labels, mode="phrase").recall == 0.0
        hits += len(spans)
    assert hits > 100
