"""What a report of an evaluation is made of: plain values, and the same as JSON."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from softprompt_registry.errors import ConfigError
from softprompt_registry.evaluation.analysis import (
    AbstentionCurve,
    Category,
    abstention_curve,
    by_category,
)
from softprompt_registry.evaluation.control_prompts import ControlPoint
from softprompt_registry.evaluation.correlation import Correlation, correlation
from softprompt_registry.evaluation.record import EvaluationRecord
from softprompt_registry.evaluation.statistics import Interval, PairedComparison, bootstrap_mean
from softprompt_registry.evaluation.text_scores import EvaluatedTask
from softprompt_registry.evaluation.verbalizations import COMPARED, Evaluation, TaskRow, compare
from softprompt_registry.verbalization.methods import WITH_VERIFIER
from softprompt_registry.verbalization.proposing import METHODS

FORMAT_VERSION = 1
"""Version of `report_json`."""


@dataclass(frozen=True)
class TaskReport:
    """A task with its truth and every method's text."""

    name: str
    kind: str
    category: str
    truth: str
    labels: tuple[str, ...]
    """Empty for other tasks than classification."""
    accuracy: float | None
    """How well the soft prompt does the task, as a share; None if not known."""
    texts: dict[str, TaskRow]
    """By method."""


@dataclass(frozen=True)
class MethodReport:
    """One method's means over all tasks, abstained ones included."""

    name: str
    metrics: dict[str, float]
    """As the evaluation has them, chance levels under `<metric>_chance`."""
    intervals: dict[str, Interval]
    """Mean and 95 % bootstrap interval of the metrics that every task has of its own."""


@dataclass(frozen=True)
class MethodComparison:
    """`method` minus `other`, paired over tasks, by metric."""

    method: str
    other: str
    metrics: dict[str, PairedComparison]


@dataclass(frozen=True)
class ReportData:
    """Everything that the page shows, as plain values. `report_data` makes it from an evaluation."""

    title: str
    when: str
    base_model: str
    settings: dict[str, Any]
    ranked_by: str
    """The metric by which a method is best; every task has it."""
    methods: tuple[MethodReport, ...]
    tasks: tuple[TaskReport, ...]
    comparisons: tuple[MethodComparison, ...]
    categories: dict[str, tuple[Category, ...]]
    """By method."""
    correlations: dict[str, Correlation]
    """By method: `ranked_by` with the soft prompt's accuracy; empty if no accuracy is known."""
    curves: dict[str, AbstentionCurve]
    """By method: `ranked_by` against coverage by `decided_on`; empty if no faithfulness is known."""
    told: tuple[str, ...] = ()
    """Methods with privileged information, such as the labels: they are shown, but are no rivals of the others."""
    rule: str = ""
    """What the abstention rule withholds, in words; empty if none was applied."""
    garbage: tuple[ControlPoint, ...] = ()
    """By growing threshold, the shares of control and of real soft prompts that pass; empty without control prompts."""

    @property
    def best(self) -> MethodReport:
        """The method with the highest mean of `ranked_by`; of equal ones the first."""
        return max(self.rivals or self.methods, key=lambda method: method.metrics[self.ranked_by])

    @property
    def rivals(self) -> tuple[MethodReport, ...]:
        """The methods without privileged information."""
        return tuple(method for method in self.methods if method.name not in self.told)

    @property
    def category_names(self) -> dict[str, int]:
        """Number of tasks by category, the largest first."""
        return {category.name: category.tasks for category in next(iter(self.categories.values()), ())}

    def chance(self, metric: str) -> float | None:
        """What a method without any information gets; None for metrics whose chance level is not known."""
        return self.methods[0].metrics.get(f"{metric}_chance")


def report_data(
    record: EvaluationRecord,
    evaluation: Evaluation,
    *,
    title: str = "Verbalizations of held-out tasks",
    when: str = "",
    base_model: str = "",
    categories: Mapping[str, str] | None = None,
) -> ReportData:
    """An evaluation with all that is known beside it, ready to be shown.

    Args:
        evaluation: the record's scores.
        when: date and time of the evaluation, as people read it.
        base_model: as people name it.
        categories: by task; without them a task's kind is its category.

    Raises:
        DataError: a task has no category.
    """
    seed = record.seed
    privileged = {name for name, row in METHODS.items() if row.privileged}
    told = tuple(name for name in evaluation.methods if name.removesuffix(WITH_VERIFIER) in privileged)
    rows = next(iter(evaluation.methods.values())).rows
    by_method = {name: by_category(result.rows, categories) for name, result in evaluation.methods.items()}
    reports = tuple(
        TaskReport(
            name=row.task,
            kind=row.kind,
            category=row.kind if categories is None else categories[row.task],
            truth=row.truth,
            labels=record.tasks[row.task].labels if row.kind == "classification" else (),
            accuracy=record.tasks[row.task].accuracy,
            texts={method: result.rows[number] for method, result in evaluation.methods.items()},
        )
        for number, row in enumerate(rows)
    )
    metric = "label_f1" if all("label_f1" in row.scores for row in rows) else "cosine"
    methods = tuple(
        MethodReport(
            name,
            dict(result.metrics),
            {
                compared: bootstrap_mean([row.scores[compared] for row in result.rows if compared in row.scores], seed)
                for compared in COMPARED
                if compared in result.metrics
            },
        )
        for name, result in evaluation.methods.items()
    )
    return ReportData(
        title=title,
        when=when,
        base_model=base_model,
        settings=dict(record.settings),
        ranked_by=metric,
        told=told,
        methods=methods,
        tasks=reports,
        comparisons=_comparisons(evaluation, metric, told, seed),
        categories=by_method,
        correlations=_correlations(reports, list(evaluation.methods), metric, seed),
        curves=_curves(reports, list(evaluation.methods), metric),
        rule=record.rule.describe(),
        garbage=record.controls.curve if record.controls else (),
    )


def _comparisons(evaluation: Evaluation, metric: str, told: Collection[str], seed: int) -> tuple[MethodComparison, ...]:
    """The evaluation's own, of its first method with the others; if another one without privileged information is best, also
    that one with the others; and what the verifier changes about each method."""
    methods = evaluation.methods
    first = next(iter(methods))
    rivals = [name for name in methods if name not in told] or list(methods)
    best = max(rivals, key=lambda name: methods[name].metrics[metric])
    found = [MethodComparison(first, other, dict(by)) for other, by in evaluation.comparisons.items()]
    if best != first:
        others = [name for name in methods if name != best]
        found += [
            MethodComparison(best, name, compare(methods[best].rows, methods[name].rows, seed)) for name in others
        ]
    known = {(item.method, item.other) for item in found}
    found += [
        MethodComparison(f"{name}{WITH_VERIFIER}", name, dict(by))
        for name, by in evaluation.verifier_effects.items()
        if (f"{name}{WITH_VERIFIER}", name) not in known
    ]
    return tuple(found)


def _correlations(
    tasks: Sequence[TaskReport], methods: Sequence[str], metric: str, seed: int
) -> dict[str, Correlation]:
    known = [(task, task.accuracy) for task in tasks if task.accuracy is not None]
    if not known:
        return {}
    accuracies = [accuracy for _, accuracy in known]
    return {
        name: correlation([task.texts[name].scores[metric] for task, _ in known], accuracies, seed) for name in methods
    }


def _curves(tasks: Sequence[TaskReport], methods: Sequence[str], metric: str) -> dict[str, AbstentionCurve]:
    """Quality against coverage, for the methods of which any faithfulness is known."""
    curves = {}
    for name in methods:
        texts = [task.texts[name] for task in tasks]
        values = [text.decided_on for text in texts]
        if any(value is not None for value in values):
            curves[name] = abstention_curve(values, [text.scores[metric] for text in texts])
    return curves


def categories_of(tasks: Mapping[str, EvaluatedTask], path: str | None) -> dict[str, str]:
    """A category for each task: that of the file; without one the kind of task and the collection it is from.

    Raises:
        ConfigError: the file is missing, is no JSON object of texts, or lacks a task.
    """
    if path is None:
        return {
            name: " · ".join(part for part in (task.kind, task.source.split(":")[0].split(",")[0].strip()) if part)
            for name, task in tasks.items()
        }
    doing = f"reading categories of tasks in {path!r}"
    try:
        read = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f'{doing}: {error}. Expected a JSON file such as {{"sst2": "sentiment"}}.') from error
    if not isinstance(read, dict) or not all(isinstance(value, str) for value in read.values()):
        raise ConfigError(f"{doing}: expected one JSON object with a category, a text, by task name. Correct the file.")
    missing = [name for name in tasks if name not in read]
    if missing:
        raise ConfigError(
            f"{doing}: found categories for {len(read)} tasks, but none for {missing[:5]}. Add them, or "
            "leave the setting out."
        )
    return {name: read[name] for name in tasks}


def report_json(data: ReportData) -> dict[str, Any]:
    """The report's data as JSON values; a named tuple becomes an object."""
    return {"format_version": FORMAT_VERSION, **_json_value(data)}


def _json_value(value: Any) -> Any:
    if isinstance(value, TaskRow):
        return {
            "text": value.found,
            "prefill": value.prefill,
            "scores": value.scores,
            "faithfulness": value.faithfulness and value.faithfulness._asdict(),
            "decided_on": value.decided_on,
            "abstained": value.abstained,
            "reason": value.reason if value.abstained else None,
            "nearest": None,
        }
    if is_dataclass(value):
        return {field.name: _json_value(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: _json_value(item) for name, item in value._asdict().items()}
    if isinstance(value, Mapping):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(item) for item in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)
