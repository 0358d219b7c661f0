"""What the scores of many tasks say together: correlation, categories, abstention, confusions; and where labels are found.

Every function takes plain texts, numbers or the rows of an evaluation and returns plain values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from softprompt_registry.errors import ConfigError, DataError
from softprompt_registry.evaluation.metrics import PUNCTUATION_TO_SPACE
from softprompt_registry.evaluation.metrics import TIE_TOLERANCE as SIMILARITY_TOLERANCE
from softprompt_registry.evaluation.statistics import TIE_TOLERANCE, finite_scores
from softprompt_registry.evaluation.verbalizations import TaskRow
from softprompt_registry.verbalization.abstention import CoveragePoint, coverage_curve

MIN_CORRELATED_TASKS = 3
"""Any two tasks lie on a line."""

_BLOCK_ENTRIES = 1 << 20
"""Task counts drawn at once; a handful of matrices of this size (8 MiB each) live at the same time."""


# Correlation ----------------------------------------------------------------------------------------------------------


class Correlation(NamedTuple):
    """How two scores go together over `n` tasks; `low` to `high` is the bootstrap interval of Spearman's coefficient.

    Where a coefficient is not defined all four are None, and `reason` says why.
    """

    spearman: float | None
    pearson: float | None
    low: float | None
    high: float | None
    n: int
    reason: str | None = None


def correlation(
    quality: Sequence[float], accuracy: Sequence[float], seed: int, draws: int = 10_000, level: float = 0.95
) -> Correlation:
    """Whether soft prompts that do their task better are also verbalized better (appendix A.9 of the paper).

    Spearman's coefficient is Pearson's of the ranks; equal scores share their mean rank, and scores closer than
    `statistics.TIE_TOLERANCE` are equal. The interval is a percentile interval: a draw takes n tasks with replacement
    and ranks them anew. Draws in which one of the two is constant have no coefficient and are left out.

    Args:
        quality: how good each task's verbalization is, (n,), for instance its label F1.
        accuracy: how well each soft prompt does its task, (n,), in the same order.
        seed: of the draws.
        draws: number of bootstrap samples.
        level: share of the draws' coefficients between `low` and `high`.

    Raises:
        DataError: the lists differ in length, are empty, or hold a number that is not finite.
        ConfigError: `draws` is below 1 or `level` is not between 0 and 1.
    """
    doing = "correlating quality with accuracy"
    _check_lengths(doing, "quality scores", len(quality), "accuracies", len(accuracy))
    x, y = finite_scores(quality, doing), finite_scores(accuracy, doing)
    if draws < 1 or not 0 < level < 1:
        raise ConfigError(
            f"{doing}: found draws={draws!r} and level={level!r}, expected draws of at least 1 and a level between 0 "
            "and 1. 10,000 draws and 0.95 are the project's standard."
        )
    n = len(x)
    if n < MIN_CORRELATED_TASKS:
        return _undefined(n, f"{n} task{'s' * (n != 1)}; a correlation needs at least {MIN_CORRELATED_TASKS}")
    for name, values in (("quality", x), ("accuracy", y)):
        if _groups(values).max() == 0:
            return _undefined(n, f"{name} is the same in all {n} tasks")
    once = np.ones((1, n))
    spearman = _spearman(x, y, once)[0]
    pearson = _pearson(x[None], y[None], once)[0]
    drawn = _drawn_spearmans(x, y, seed, draws)
    if not len(drawn):
        return Correlation(float(spearman), float(pearson), None, None, n, "in every draw one score was constant")
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Correlation(float(spearman), float(pearson), float(low), float(high), n)


def _undefined(n: int, reason: str) -> Correlation:
    return Correlation(None, None, None, None, n, reason)


def _drawn_spearmans(x: NDArray[np.float64], y: NDArray[np.float64], seed: int, draws: int) -> NDArray[np.float64]:
    """Spearman's coefficient of each draw that has one."""
    generator = np.random.default_rng(seed)
    n = len(x)
    rows_at_once = max(1, _BLOCK_ENTRIES // n)
    found = []
    for start in range(0, draws, rows_at_once):
        rows = min(rows_at_once, draws - start)
        places = generator.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
        counts = np.bincount(places.ravel(), minlength=rows * n).reshape(rows, n)  # how often each task was drawn
        coefficients = _spearman(x, y, counts.astype(np.float64))
        found.append(coefficients[~np.isnan(coefficients)])
    return np.concatenate(found)


def _spearman(x: NDArray[np.float64], y: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """A coefficient for each row of `counts`, (R, n): the sample in which task i stands `counts[r, i]` times → (R,)."""
    return _pearson(_midranks(x, counts), _midranks(y, counts), counts)


def _midranks(values: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rank of each task's value, (n,), in each sample: its copies and its equals share their mean rank → (R, n)."""
    groups = _groups(values)
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    by_group = np.add.reduceat(counts[:, order], starts, axis=1)  # (R, groups)
    # A group of c after b others holds the ranks b + 1 to b + c; their mean is (b + c) - (c - 1) / 2.
    ranks: NDArray[np.float64] = by_group.cumsum(axis=1) - (by_group - 1) / 2
    return ranks[:, groups]


def _groups(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """The number of each value's group, (n,): groups of equal values count up from 0 with the values."""
    order = np.argsort(values, kind="stable")
    groups = np.empty(len(values), dtype=np.int64)
    groups[order] = np.concatenate([[0], np.cumsum(np.diff(values[order]) > TIE_TOLERANCE)])
    return groups


def _pearson(x: NDArray[np.float64], y: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weighted coefficients, row by row: three (R, n) → (R,); NaN where one side is constant."""
    totals = weights.sum(axis=1, keepdims=True)
    x = x - (weights * x).sum(axis=1, keepdims=True) / totals
    y = y - (weights * y).sum(axis=1, keepdims=True) / totals
    spread = np.sqrt((weights * x * x).sum(axis=1) * (weights * y * y).sum(axis=1))
    together = (weights * x * y).sum(axis=1)
    coefficients = np.where(spread > 0, together / np.where(spread > 0, spread, 1.0), np.nan)
    return np.clip(coefficients, -1.0, 1.0)


# Categories -----------------------------------------------------------------------------------------------------------


class MetricMean(NamedTuple):
    """A metric's mean over the `tasks` tasks that have it."""

    mean: float
    tasks: int


@dataclass(frozen=True)
class Category:
    """The tasks of one category and one method's means over them."""

    name: str
    tasks: int
    means: dict[str, MetricMean]
    """By metric; label metrics only where the category has classification tasks."""


def by_category(rows: Sequence[TaskRow], categories: Mapping[str, str] | None = None) -> tuple[Category, ...]:
    """Means of one method's scores by category, the category with most tasks first, then by name.

    Args:
        rows: one method's rows, one for each task.
        categories: category by task name; without it a task's kind is its category.

    Raises:
        DataError: a task has no category.
    """
    if categories is not None:
        missing = [row.task for row in rows if row.task not in categories]
        if missing:
            raise DataError(
                f"grouping tasks by category: found no category for {missing[:5]!r} ({len(missing)} of {len(rows)} "
                "tasks), expected one for every task. Name them, or leave the categories out to group by kind."
            )
    members: dict[str, list[TaskRow]] = {}
    for row in rows:
        members.setdefault(row.kind if categories is None else categories[row.task], []).append(row)
    found = []
    for name, inside in members.items():
        scores: dict[str, list[float]] = {}
        for row in inside:
            for metric, value in row.scores.items():
                scores.setdefault(metric, []).append(value)
        means = {metric: MetricMean(fmean(values), len(values)) for metric, values in scores.items()}
        found.append(Category(name, len(inside), means))
    return tuple(sorted(found, key=lambda category: (-category.tasks, category.name)))


# Abstention -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AbstentionCurve:
    """What abstaining on the texts of lowest faithfulness does to the mean quality of the others."""

    points: tuple[CoveragePoint, ...]
    """By growing coverage; the last one has coverage 1."""
    area: float
    """Under the points as steps, over coverages 0 to 1. Above `no_abstention` where faithfulness tells good texts from bad
    ones; equal to it where all texts have the same."""
    no_abstention: float
    """Mean quality of all texts."""


def abstention_curve(faithfulness: Sequence[float | None], quality: Sequence[float]) -> AbstentionCurve:
    """Quality of the answered tasks against their share, with the area under it.

    The points are those of `verbalization.abstention.coverage_curve`. With q(c) the quality at coverage c and c_0 = 0:

        area = Σ_i (c_i - c_{i-1}) q(c_i)

    Args:
        faithfulness: of each task's text, (n,); None where it is not known, which counts as the lowest.
        quality: of the same texts, (n,), higher is better.

    Raises:
        DataError: the lists differ in length, are empty, or hold a number that is not finite.
    """
    points = coverage_curve(faithfulness, quality)
    before = [0.0, *(point.coverage for point in points)]
    area = sum((point.coverage - start) * point.quality for start, point in zip(before, points, strict=False))
    return AbstentionCurve(tuple(points), area, points[-1].quality)


# Confusions -----------------------------------------------------------------------------------------------------------


class Confusion(NamedTuple):
    """The task whose ground truth a task's text is nearest to.

    `nearest` is None for an empty text, which is near to nothing.
    """

    task: str
    nearest: str | None
    similarity: float
    """Of the text with the truth of `nearest`; 0 for an empty text."""
    own_similarity: float
    """Of the text with its own truth."""

    @property
    def is_own(self) -> bool:
        return self.nearest == self.task


def confusions(
    similarities: NDArray[np.floating[Any]], names: Sequence[str], empty: Sequence[bool] | None = None
) -> tuple[Confusion, ...]:
    """For each task the task that its text would be taken for (A.10 of the paper gives only the mean rank).

    Of truths that are equally near (within `metrics.TIE_TOLERANCE`) the task's own wins, then the first.

    Args:
        similarities: `[j, i]` compares text j with truth i, (N, N), as `metrics.cosine_matrix` gives them.
        names: of the tasks, (N,).
        empty: true where the text is blank, (N,); without it no text is.

    Raises:
        DataError: the shapes do not fit, there is no task, or a similarity is not finite.
    """
    scores = np.asarray(similarities, dtype=np.float64)
    blank = [False] * len(names) if empty is None else list(empty)
    if not names or scores.shape != (len(names), len(names)) or len(blank) != len(names):
        raise DataError(
            f"finding confusions: found similarities of shape {scores.shape!r}, {len(names)} names and {len(blank)} marks "
            "of emptiness, expected (N, N), N and N with N at least 1. Hand in one text and one truth for each task."
        )
    if not np.isfinite(scores).all():
        raise DataError(
            "finding confusions: found NaN or infinity among the similarities, expected finite numbers only. "
            "Check the embeddings; an empty text is marked in `empty`, not by its similarity."
        )
    found = []
    for number, (name, row) in enumerate(zip(names, scores, strict=True)):
        own = float(row[number])
        ties = np.flatnonzero(row >= row.max() - SIMILARITY_TOLERANCE)
        nearest = number if number in ties else int(ties[0])
        if blank[number]:
            found.append(Confusion(name, None, 0.0, 0.0))
        else:
            found.append(Confusion(name, names[nearest], float(row[nearest]), own))
    return tuple(found)


# Labels in a text -----------------------------------------------------------------------------------------------------


class LabelSpan(NamedTuple):
    """`text[start:end]` names this label."""

    start: int
    end: int
    label: str


def label_spans(text: str, labels: Sequence[str]) -> tuple[LabelSpan, ...]:
    """Where `metrics.label_score(text, labels, mode="phrase")` finds labels, from left to right, repetitions included.

    Its rules hold: whole words, lower-cased, cut at white space and ASCII punctuation; at each word the longest label
    that starts there. Of two labels with the same words the first is named.
    """
    lowered = text.lower()
    # A letter may become two when lower-cased: the place in `text` of each character of `lowered`.
    places = [place for place, letter in enumerate(text) for _ in letter.lower()]
    words = [
        (found.group(), places[found.start()], places[found.end() - 1] + 1)
        for found in re.finditer(r"\S+", lowered.translate(PUNCTUATION_TO_SPACE))
    ]
    label_of: dict[tuple[str, ...], str] = {}
    for label in labels:
        label_of.setdefault(label_words(label), label)
    lengths = sorted({len(phrase) for phrase in label_of}, reverse=True)
    spans = []
    start = 0
    while start < len(words):
        for length in lengths:
            phrase = words[start : start + length]
            found_label = label_of.get(tuple(word for word, _, _ in phrase))
            if found_label is not None:
                spans.append(LabelSpan(phrase[0][1], phrase[-1][2], found_label))
                start += len(phrase)
                break
        else:
            start += 1
    return tuple(spans)


def label_words(label: str) -> tuple[str, ...]:
    """The words that a text must say to name a label; a label of punctuation alone is itself, and never found."""
    lowered = label.strip().lower()
    return tuple(lowered.translate(PUNCTUATION_TO_SPACE).split()) or (lowered,)


def label_pieces(text: str, labels: Sequence[str]) -> list[tuple[str, bool]]:
    """The text cut at the ends of `label_spans`, and of each piece whether it is a label. No piece is empty."""
    spans = label_spans(text, labels)
    starts, ends = [span.start for span in spans], [span.end for span in spans]
    pieces = []
    for before, start, end in zip([0, *ends], [*starts, len(text)], [*ends, len(text)], strict=True):
        pieces += [(text[before:start], False), (text[start:end], True)]
    return [(piece, is_label) for piece, is_label in pieces if piece]


def missed_labels(text: str, labels: Sequence[str]) -> list[str]:
    """The labels that the text does not name."""
    found = {label_words(span.label) for span in label_spans(text, labels)}
    return [label for label in labels if label_words(label) not in found]


def _check_lengths(doing: str, left: str, num_left: int, right: str, num_right: int) -> None:
    if num_left != num_right:
        raise DataError(
            f"{doing}: found {num_left} {left} and {num_right} {right}, expected one of each for every task. "
            "Hand in both for the same tasks, in the same order."
        )
