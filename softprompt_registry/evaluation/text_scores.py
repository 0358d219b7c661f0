"""How good texts are against their truths: the one place where every evaluation takes its numbers from.

`softprompt evaluate`, MLflow's evaluator `softprompt` and the scorers for `mlflow.genai.evaluate` differ in where texts and
truths come from; what they are scored by is here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, NamedTuple

from softprompt_registry.dod.task import Task, TaskKind, ground_truth_of
from softprompt_registry.evaluation.metrics import (
    LabelScore,
    TextEncoder,
    cosine_matrix,
    cosine_similarity,
    item_ranks,
    label_score,
    ranking_metrics,
    rouge_l,
)

ROW_METRICS = ("label_recall", "label_precision", "label_f1", "rouge_l", "cosine", "mpr_midrank")
"""What a text can be scored by, in the order of the tables."""


class Truth(NamedTuple):
    """What a perfect verbalization of one task would say."""

    text: str
    labels: tuple[str, ...] = ()
    """Labels of a classification; empty for other tasks."""
    references: tuple[str, ...] = ()
    """Other hard prompts that would be right."""

    @property
    def accepted(self) -> list[str]:
        """What ROUGE-L takes the best of: a classification has its label list alone."""
        return [self.text] if self.labels else [self.text, *self.references]


class TextScores(NamedTuple):
    """Scores of each text and over all."""

    rows: list[dict[str, float]]
    """Those of `ROW_METRICS` that each text has."""
    metrics: dict[str, float]
    """Means of the rows, the ranking metrics of both directions with their chance levels, `num_tasks` and `empty_share`."""


@dataclass(frozen=True)
class EvaluatedTask:
    """What an evaluation keeps of a task: all that texts are compared with, and no pairs."""

    name: str
    kind: TaskKind
    labels: tuple[str, ...]
    hard_prompts: tuple[str, ...]
    source: str
    digest: str
    accuracy: float | None = None
    """Score of the soft prompt itself on test pairs: label accuracy, or exact match; None if it was not measured."""

    @classmethod
    def of(cls, task: Task, accuracy: float | None = None) -> EvaluatedTask:
        return cls(task.name, task.kind, task.labels, task.hard_prompts, task.source, task.digest, accuracy)

    @property
    def ground_truth(self) -> str:
        """See `Task.ground_truth`."""
        return ground_truth_of(self.kind, self.labels, self.hard_prompts)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> EvaluatedTask:
        texts = {name: tuple(record[name]) for name in ("labels", "hard_prompts")}
        return cls(**{**record, **texts})


def truth_of(task: Task | EvaluatedTask) -> Truth:
    """The label list of a classification, any of the hard prompts of another task."""
    if task.kind == "classification":
        return Truth(task.ground_truth, tuple(task.labels))
    return Truth(task.ground_truth, references=tuple(task.hard_prompts[1:]))


def scored_text(text: str, prefill: str) -> str:
    """The part of a text that is scored: a prefill was given to the model, not found by it."""
    return text.strip().removeprefix(prefill.strip()).strip()


def label_score_of(text: str, truth: Truth) -> LabelScore | None:
    """Labels that the text names, as whole words or phrases (section 4.4); None for a truth without labels."""
    return label_score(text, truth.labels, mode="phrase") if truth.labels else None


def rouge_l_of(text: str, truth: Truth) -> float:
    """ROUGE-L of the text with the best of the accepted truths, in [0, 1] (section 4.4)."""
    return rouge_l(text, truth.accepted)


def cosines_of(texts: Sequence[str], truths: Sequence[Truth], encoder: TextEncoder) -> list[float]:
    """Cosine of each text with the text of its truth, in [-1, 1] (section 4.4); 0 for an empty text.

    Raises:
        DataError: the lists differ in length.
    """
    return cosine_similarity(texts, [truth.text for truth in truths], encoder)


def score_against_truths(texts: Sequence[str], truths: Sequence[Truth], encoder: TextEncoder | None) -> TextScores:
    """Every text against its truth, and all texts against all truths.

    Args:
        texts: (N,) as `scored_text` gives them; an empty one gets the worst score and is never left out.
        truths: (N,), N at least 1.
        encoder: of cosine and ranks; None leaves them out.
    """
    rows: list[dict[str, float]] = []
    for text, truth in zip(texts, truths, strict=True):
        labels = label_score_of(text, truth)
        scores: dict[str, float] = {}
        if labels is not None:
            scores |= {"label_recall": labels.recall, "label_precision": labels.precision, "label_f1": labels.f1}
        rows.append({**scores, "rouge_l": rouge_l_of(text, truth)})
    empty = [not text.strip() for text in texts]
    ranking: dict[str, float] = {}
    if encoder is not None:
        wanted = [truth.text for truth in truths]
        similarities = cosine_matrix(encoder.encode(texts), encoder.encode(wanted))  # (N, N)
        ranks = item_ranks(similarities, empty, wanted)
        for row, cosine, rank in zip(rows, cosines_of(texts, truths, encoder), ranks.midrank, strict=True):
            row |= {"cosine": cosine, "mpr_midrank": float(rank)}
        ranking = ranking_metrics(similarities, empty, wanted)._asdict()
    return TextScores(
        rows, {**mean_scores(rows), **ranking, "num_tasks": float(len(rows)), "empty_share": fmean(empty)}
    )


def mean_scores(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Each score's mean over the rows that have it."""
    return {name: fmean(values) for name, values in score_columns(rows).items()}


def score_columns(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Each score's values in the rows that have it, in the order of the rows."""
    columns: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    return columns
