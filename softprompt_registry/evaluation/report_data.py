"""What a report of an evaluation is made of: plain values, and the same as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, NamedTuple

from softprompt_registry.dod.task import Task
from softprompt_registry.errors import ConfigError, DataError
from softprompt_registry.evaluation.analysis import (
    AbstentionCurve,
    Category,
    Confusion,
    Correlation,
    abstention_curve,
    by_category,
    correlation,
)
from softprompt_registry.evaluation.garbage import GarbagePoint
from softprompt_registry.evaluation.statistics import Interval, PairedComparison, bootstrap_mean
from softprompt_registry.evaluation.text_scores import scored_text
from softprompt_registry.evaluation.verbalizations import COMPARED, Evaluation, TaskRow, compare
from softprompt_registry.verbalization.methods import WITH_VERIFIER

FORMAT_VERSION = 1
"""Of `report_json`."""

Key = tuple[str, str]
"""Method and task: which text is meant."""


class Faithfulness(NamedTuple):
    """The share of the soft prompt's gain over no prompt that a text keeps; None if the prompt gains nothing."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class MethodText:
    """What one method said of one task."""

    text: str
    """What was scored: without the prefill."""
    prefill: str
    """The given beginning, not scored; empty without one."""
    scores: dict[str, float]
    faithfulness: Faithfulness | None
    """None if it was not measured."""
    decided_on: float | None
    """The faithfulness by which a rule would answer or abstain; None without any."""
    abstained: bool
    reason: str | None
    """Why it abstained."""
    nearest: str | None
    """The task that the text is nearest to, if confusions were looked for and the text is not empty."""


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
    texts: dict[str, MethodText]
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
    """Methods that are told what is asked for, such as the labels: they are shown, but are no rivals of the others."""
    rule: str = ""
    """What the abstention rule withholds, in words; empty if none was applied."""
    garbage: tuple[GarbagePoint, ...] = ()
    """By growing threshold, what of garbage and of real soft prompts gets through; empty if no garbage was tried."""

    @property
    def best(self) -> MethodReport:
        """The method with the highest mean of `ranked_by`; of equal ones the first."""
        return max(self.rivals or self.methods, key=lambda method: method.metrics[self.ranked_by])

    @property
    def rivals(self) -> tuple[MethodReport, ...]:
        """The methods that are not told what is asked for."""
        return tuple(method for method in self.methods if method.name not in self.told)

    @property
    def category_names(self) -> dict[str, int]:
        """Number of tasks by category, the largest first."""
        return {category.name: category.tasks for category in next(iter(self.categories.values()), ())}

    def chance(self, metric: str) -> float | None:
        """What a method without any information gets; None for metrics whose chance level is not known."""
        return self.methods[0].metrics.get(f"{metric}_chance")


def report_data(
    evaluation: Evaluation,
    tasks: Mapping[str, Task],
    *,
    title: str,
    when: str = "",
    base_model: str = "",
    settings: Mapping[str, Any] | None = None,
    ranked_by: str | None = None,
    accuracy: Mapping[str, float] | None = None,
    categories: Mapping[str, str] | None = None,
    faithfulness: Mapping[Key, Faithfulness | None] | None = None,
    abstained: Mapping[Key, str] | None = None,
    prefills: Mapping[Key, str] | None = None,
    confusions: Mapping[str, Sequence[Confusion]] | None = None,
    told: Collection[str] = (),
    rule: str = "",
    garbage: Sequence[GarbagePoint] = (),
    seed: int = 0,
) -> ReportData:
    """An evaluation with all that is known beside it, ready to be shown.

    Args:
        evaluation: of the methods; each has one text for each task.
        tasks: by name, for their labels.
        title: of the page.
        when: date and time of the evaluation, as people read it.
        base_model: as people name it.
        settings: of the run, shown at the end of the page.
        ranked_by: what makes a method the best; without it label F1 if all tasks are classifications, else the cosine.
        accuracy: of the soft prompts, by task.
        categories: by task; without them a task's kind is its category.
        faithfulness: by method and task, what decides on abstaining; without it the evaluation's own, which is
            measured on other pairs. Shown where the evaluation has none of its own.
        abstained: by method and task, why a text is held back, beside those that the evaluation says are.
        prefills: by method and task: the given beginnings of texts, which are not scored.
        confusions: by method, as `analysis.confusions` gives them.
        told: methods that are told what is asked for.
        rule: description of the abstention rule.
        garbage: the curve of `GarbageResult`.
        seed: of the bootstraps that the evaluation has not made.

    Raises:
        DataError: a task is unknown, appears twice or has no category, or something is said of a text that is not there.
        ConfigError: `ranked_by` is not a metric of every task.
    """
    rows = next(iter(evaluation.methods.values())).rows
    names = [row.task for row in rows]
    _check_tasks(names, tasks)
    keys = {(method, name) for method in evaluation.methods for name in names}
    for what, mapping in (("faithfulness", faithfulness), ("abstained", abstained), ("prefills", prefills)):
        _check_known(what, mapping or {}, keys, "text (method, task)")
    _check_known("accuracy", accuracy or {}, set(names), "task")
    _check_known("confusions", confusions or {}, evaluation.methods, "method")
    _check_known("told", dict.fromkeys(told), evaluation.methods, "method")
    metric = _ranked_by(evaluation, ranked_by)
    nearest = {(method, item.task): item.nearest for method, found in (confusions or {}).items() for item in found}

    def text_of(method: str, number: int) -> MethodText:
        row, key = evaluation.methods[method].rows[number], (method, names[number])
        prefill = (prefills or {}).get(key, "").strip()
        decided_on, measured = (faithfulness or {}).get(key), _measured(row)
        return MethodText(
            text=scored_text(row.text, prefill),
            prefill=prefill if row.text.startswith(prefill) else "",
            scores=dict(row.scores),
            faithfulness=measured or decided_on,
            decided_on=decided_on.value if decided_on else row.scores.get("faithfulness"),
            abstained=row.abstained or key in (abstained or {}),
            reason=(abstained or {}).get(key, row.reason if row.abstained else None),
            nearest=nearest.get(key),
        )

    reports = tuple(
        TaskReport(
            name=row.task,
            kind=row.kind,
            category=row.kind if categories is None else categories.get(row.task, ""),
            truth=row.truth,
            labels=tuple(tasks[row.task].labels) if row.kind == "classification" else (),
            accuracy=(accuracy or {}).get(row.task),
            texts={method: text_of(method, number) for method in evaluation.methods},
        )
        for number, row in enumerate(rows)
    )
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
        settings=dict(settings or {}),
        ranked_by=metric,
        told=tuple(told),
        methods=methods,
        tasks=reports,
        comparisons=_comparisons(evaluation, metric, told, seed),
        categories={name: by_category(result.rows, categories) for name, result in evaluation.methods.items()},
        correlations=_correlations(reports, list(evaluation.methods), metric, seed),
        curves=_curves(reports, list(evaluation.methods), metric),
        rule=rule,
        garbage=tuple(garbage),
    )


def _measured(row: TaskRow) -> Faithfulness | None:
    """What the evaluation found; without a value if it looked and the soft prompt gains nothing."""
    if "faithfulness" in row.scores:
        return Faithfulness(row.scores["faithfulness"], *(row.faithfulness_interval or ()))
    return Faithfulness(None) if "heldout_log_likelihood" in row.scores else None


def _check_tasks(names: Sequence[str], tasks: Mapping[str, Task]) -> None:
    unknown = [name for name in names if name not in tasks]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if unknown or repeated:
        found = f"no task {unknown[:5]!r}" if unknown else f"{repeated[:5]!r} more than once"
        raise DataError(
            f"reporting an evaluation: found {found}, expected one soft prompt for each task and every task of the "
            "evaluation among the tasks. Hand in the tasks that were evaluated, and one soft prompt of each."
        )


def _check_known(what: str, mapping: Collection[object], known: Collection[object], kind: str) -> None:
    unknown = [key for key in mapping if key not in known]
    if unknown:
        raise DataError(
            f"reporting an evaluation: found {what} of {unknown[0]!r}, which is no {kind} of the evaluation; expected "
            "methods and tasks as the evaluation names them. Correct the key, or leave it out."
        )


def _ranked_by(evaluation: Evaluation, wanted: str | None) -> str:
    rows = [row for result in evaluation.methods.values() for row in result.rows]
    everywhere = [metric for metric in COMPARED if all(metric in row.scores for row in rows)]
    chosen = wanted or ("label_f1" if "label_f1" in everywhere else "cosine")
    if chosen not in everywhere:
        raise ConfigError(
            f"reporting an evaluation: found ranked_by={chosen!r}, expected a metric that every task has: {everywhere}. "
            "Label metrics are only for evaluations of nothing but classification tasks."
        )
    return chosen


def _comparisons(evaluation: Evaluation, metric: str, told: Collection[str], seed: int) -> tuple[MethodComparison, ...]:
    """The evaluation's own, of its first method with the others; if another is best that is not told what is asked for, also
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
    """Of the methods of which any faithfulness is known."""
    curves = {}
    for name in methods:
        texts = [task.texts[name] for task in tasks]
        values = [text.decided_on for text in texts]
        if any(value is not None for value in values):
            curves[name] = abstention_curve(values, [text.scores[metric] for text in texts])
    return curves


def report_json(data: ReportData) -> dict[str, Any]:
    """The report's data as JSON values; a named tuple becomes an object."""
    return {"format_version": FORMAT_VERSION, **_json_value(data)}


def _json_value(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _json_value(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: _json_value(item) for name, item in value._asdict().items()}
    if isinstance(value, Mapping):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(item) for item in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)
