"""What the scores of many tasks say together: by category and by coverage; and where a text names labels."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from softprompt_registry.errors import DataError
from softprompt_registry.evaluation.metrics import PUNCTUATION_TO_SPACE
from softprompt_registry.evaluation.text_scores import score_columns
from softprompt_registry.evaluation.verbalizations import TaskRow
from softprompt_registry.verbalization.abstention import CoveragePoint, coverage_curve


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
        columns = score_columns([row.scores for row in inside])
        means = {metric: MetricMean(fmean(values), len(values)) for metric, values in columns.items()}
        found.append(Category(name, len(inside), means))
    return tuple(sorted(found, key=lambda category: (-category.tasks, category.name)))


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
