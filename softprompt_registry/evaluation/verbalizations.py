"""How good verbalizations are, method beside method, on the same soft prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from softprompt_registry.dod.task import Task
from softprompt_registry.errors import DataError
from softprompt_registry.evaluation.metrics import (
    RankingMetrics,
    TextEncoder,
    cosine_matrix,
    cosine_similarity,
    item_ranks,
    label_score,
    ranking_metrics_from_similarities,
    rouge_l,
)
from softprompt_registry.evaluation.statistics import PairedComparison, paired_bootstrap
from softprompt_registry.verbalization.verbalizer import Verbalization

COMPARED = ("label_recall", "label_f1", "rouge_l", "cosine", "mpr_midrank")
"""Metrics whose difference between two methods is tested."""


@dataclass(frozen=True)
class TaskRow:
    """One method's text for one task, with its scores."""

    task: str
    kind: str
    truth: str
    text: str
    scores: dict[str, float]
    """label_recall, label_precision and label_f1 on classification tasks; rouge_l, cosine and mpr_midrank on all."""


@dataclass(frozen=True)
class MethodResult:
    """What one method reached."""

    rows: tuple[TaskRow, ...]
    metrics: dict[str, float]
    """Means over tasks under the same names for every method, and the chance level of every ranking metric."""


@dataclass(frozen=True)
class Evaluation:
    """All methods on the same soft prompts."""

    methods: dict[str, MethodResult]
    comparisons: dict[str, dict[str, PairedComparison]]
    """By other method, by metric: the first method minus the other one, paired over tasks."""

    def table(self) -> dict[str, list[Any]]:
        """Columns for people: truth beside the text of each method, with scores."""
        columns: dict[str, list[Any]] = {name: [] for name in ("task", "kind", "method", "truth", "text", *COMPARED)}
        for task in range(len(next(iter(self.methods.values())).rows)):
            for method, result in self.methods.items():
                row = result.rows[task]
                for name, value in zip(
                    ("task", "kind", "method", "truth", "text"),
                    (row.task, row.kind, method, row.truth, row.text),
                    strict=True,
                ):
                    columns[name].append(value)
                for name in COMPARED:
                    columns[name].append(None if name not in row.scores else round(row.scores[name], 4))
        return columns


def evaluate_verbalizations(
    verbalizations: Mapping[str, Sequence[Verbalization]],
    tasks: Mapping[str, Task],
    encoder: TextEncoder,
    *,
    seed: int = 0,
) -> Evaluation:
    """Score every method's texts against the ground truth of their tasks.

    The prefill of a verbalization was given to the model, not found by it, and is left out of the scored text. The
    truth of a classification task is its label list, that of another task any of its hard prompts (ROUGE-L takes the
    best, cosine and ranks the first).

    Args:
        verbalizations: by method; every method has one verbalization for each of the same soft prompts, in order.
        tasks: by name.
        seed: of the paired bootstrap.

    Raises:
        DataError: methods cover different tasks, a task is unknown or has no ground truth.
    """
    orders = {method: [item.soft_prompt_id for item in items] for method, items in verbalizations.items()}
    if not orders or len({tuple(order) for order in orders.values()}) != 1 or not next(iter(orders.values())):
        raise DataError(
            f"evaluating verbalizations: the methods {list(orders)} cover {[len(order) for order in orders.values()]} "
            "soft prompts; all must cover the same ones, in the same order, and at least one. Verbalize one bank with all."
        )
    methods = {}
    for method, items in verbalizations.items():
        for item in items:
            if item.task not in tasks or not tasks[item.task].ground_truth:
                raise DataError(
                    f"evaluating verbalizations: task {item.task!r} is not in the DoD or has no ground truth; its "
                    "verbalization cannot be scored. Evaluate tasks of the DoD that have one."
                )
        methods[method] = _method_result(items, [tasks[item.task] for item in items], encoder)
    first, *others = methods
    comparisons = {other: _compare(methods[first].rows, methods[other].rows, seed) for other in others}
    return Evaluation(methods, comparisons)


def _method_result(items: Sequence[Verbalization], tasks: Sequence[Task], encoder: TextEncoder) -> MethodResult:
    texts = [item.text.removeprefix(item.prefill.strip()).strip() for item in items]
    truths = [task.ground_truth for task in tasks]
    cosines = cosine_similarity(texts, truths, encoder)
    similarities = cosine_matrix(encoder.encode(texts), encoder.encode(truths))  # (N, N)
    empty = [not text for text in texts]
    ranks = item_ranks(similarities, empty, truths)
    ranking: RankingMetrics = ranking_metrics_from_similarities(similarities, empty, truths)
    rows = []
    for number, (item, task, text) in enumerate(zip(items, tasks, texts, strict=True)):
        scores: dict[str, float] = {}
        if task.kind == "classification":
            score = label_score(text, task.labels, mode="phrase")
            scores |= {"label_recall": score.recall, "label_precision": score.precision, "label_f1": score.f1}
        references = [task.ground_truth] if task.kind == "classification" else list(task.hard_prompts)
        scores["rouge_l"] = rouge_l(text, references)
        scores["cosine"] = cosines[number]
        scores["mpr_midrank"] = float(ranks.midrank[number])
        rows.append(TaskRow(task.name, task.kind, task.ground_truth, item.text, scores))
    metrics = {name: fmean(values) for name, values in _columns(rows).items()}
    metrics |= ranking._asdict()
    metrics["num_tasks"] = float(len(rows))
    metrics["empty_share"] = fmean(empty)
    return MethodResult(tuple(rows), metrics)


def _columns(rows: Sequence[TaskRow]) -> dict[str, list[float]]:
    columns: dict[str, list[float]] = {}
    for row in rows:
        for name, value in row.scores.items():
            columns.setdefault(name, []).append(value)
    return columns


def _compare(left: Sequence[TaskRow], right: Sequence[TaskRow], seed: int) -> dict[str, PairedComparison]:
    columns, others = _columns(left), _columns(right)
    return {name: paired_bootstrap(columns[name], others[name], seed) for name in COMPARED if name in columns}
