"""How good verbalizations are, method beside method, on the same soft prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, NamedTuple

from softprompt_registry.dod.task import Task
from softprompt_registry.errors import DataError
from softprompt_registry.evaluation.metrics import TextEncoder
from softprompt_registry.evaluation.statistics import PairedComparison, paired_bootstrap
from softprompt_registry.evaluation.text_scores import (
    EvaluatedTask,
    mean_scores,
    score_against_truths,
    score_columns,
    scored_text,
    truth_of,
)
from softprompt_registry.verbalization.methods import WITH_VERIFIER
from softprompt_registry.verbalization.verbalizer import Verbalization
from softprompt_registry.verbalization.verification import Verification

COMPARED = ("label_recall", "label_f1", "rouge_l", "cosine", "mpr_midrank", "heldout_log_likelihood", "faithfulness")
"""Metrics whose difference between two methods is tested."""
UNBOUNDED = ("heldout_log_likelihood", "faithfulness")
"""Those of them that do not lie between 0 and 1."""


class Faithfulness(NamedTuple):
    """The share of the soft prompt's gain over no prompt that a text keeps; None if the prompt gains nothing."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class TaskRow:
    """One method's text for one task, with its scores."""

    task: str
    kind: str
    truth: str
    text: str
    """The whole text, with its prefill."""
    scores: dict[str, float]
    """label_recall, label_precision and label_f1 on classification tasks; rouge_l, cosine and mpr_midrank on all. Where the
    texts were verified, heldout_log_likelihood (nats per target token of the base model that reads the text, on pairs that
    chose no text), and faithfulness on the same pairs where the soft prompt gains something."""
    abstained: bool = False
    reason: str | None = None
    """Why the text is not to be relied on."""
    faithfulness_interval: tuple[float, float] | None = None
    """Interval of `scores["faithfulness"]` over pairs."""
    decided_on: float | None = None
    """The faithfulness by which the rule decided, measured on the pairs that chose the text."""
    prefill: str = ""
    """The given beginning of the text, which is not scored."""

    @property
    def found(self) -> str:
        """The part of the text that was scored."""
        return scored_text(self.text, self.prefill)

    @property
    def faithfulness(self) -> Faithfulness | None:
        """Faithfulness on pairs that no text was chosen on: None if the text was not verified, without a value if the soft
        prompt gains nothing."""
        if "heldout_log_likelihood" not in self.scores:
            return None
        return Faithfulness(self.scores.get("faithfulness"), *(self.faithfulness_interval or ()))


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
    verifier_effects: dict[str, dict[str, PairedComparison]] = field(default_factory=dict)
    """By method, by metric: the method with the verifier minus the same one without it."""

    def table(self) -> dict[str, list[Any]]:
        """Columns for people: truth beside the text of each method, with scores."""
        texts = ("task", "kind", "method", "truth", "text", "abstained", "reason")
        columns: dict[str, list[Any]] = {name: [] for name in (*texts, *COMPARED)}
        for task in range(len(next(iter(self.methods.values())).rows)):
            for method, result in self.methods.items():
                row = result.rows[task]
                values = (row.task, row.kind, method, row.truth, row.text, row.abstained, row.reason)
                for name, value in zip(texts, values, strict=True):
                    columns[name].append(value)
                for name in COMPARED:
                    columns[name].append(None if name not in row.scores else round(row.scores[name], 4))
        return columns


def evaluate_verbalizations(
    verbalizations: Mapping[str, Sequence[Verbalization]],
    tasks: Mapping[str, Task | EvaluatedTask],
    encoder: TextEncoder,
    *,
    reporting: Sequence[Verification] | None = None,
    seed: int = 0,
) -> Evaluation:
    """Score every method's texts against the ground truth of their tasks.

    The prefill of a verbalization was given to the model, not found by it, and is left out of the scored text. The
    truth of a classification task is its label list, that of another task any of its hard prompts (ROUGE-L takes the
    best, cosine and ranks the first).

    Args:
        verbalizations: by method; every method has one verbalization for each of the same soft prompts, in order.
        tasks: by name.
        reporting: for each soft prompt, in order, every method's text on pairs that no text was chosen on.
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
        methods[method] = _method_result(items, [tasks[item.task] for item in items], encoder, reporting)
    first, *others = methods
    comparisons = {other: compare(methods[first].rows, methods[other].rows, seed) for other in others}
    effects = {
        name: compare(methods[f"{name}{WITH_VERIFIER}"].rows, result.rows, seed)
        for name, result in methods.items()
        if f"{name}{WITH_VERIFIER}" in methods
    }
    return Evaluation(methods, comparisons, effects)


def _method_result(
    items: Sequence[Verbalization],
    tasks: Sequence[Task | EvaluatedTask],
    encoder: TextEncoder,
    reporting: Sequence[Verification] | None,
) -> MethodResult:
    texts = [scored_text(item.text, item.prefill) for item in items]
    of_texts = score_against_truths(texts, [truth_of(task) for task in tasks], encoder)
    rows = []
    for number, (item, task) in enumerate(zip(items, tasks, strict=True)):
        scores = dict(of_texts.rows[number])
        interval = None
        if reporting is not None:
            found = next(candidate for candidate in reporting[number].candidates if candidate.text == item.text)
            scores["heldout_log_likelihood"] = found.score
            if found.faithfulness is not None and found.low is not None and found.high is not None:
                scores["faithfulness"] = found.faithfulness
                interval = (found.low, found.high)
        prefill = item.prefill.strip()
        rows.append(
            TaskRow(
                task=task.name,
                kind=task.kind,
                truth=task.ground_truth,
                text=item.text,
                scores=scores,
                abstained=item.abstained,
                reason=item.reason,
                faithfulness_interval=interval,
                decided_on=item.faithfulness,
                prefill=prefill if item.text.startswith(prefill) else "",
            )
        )
    metrics = mean_scores([row.scores for row in rows]) | of_texts.metrics
    metrics["abstained_share"] = fmean(row.abstained for row in rows)
    return MethodResult(tuple(rows), metrics)


def compare(left: Sequence[TaskRow], right: Sequence[TaskRow], seed: int) -> dict[str, PairedComparison]:
    """By metric of `COMPARED` that the rows have: the left method minus the right one, paired over the same tasks in order.

    Args:
        seed: of the bootstrap.
    """
    columns, others = (score_columns([row.scores for row in rows]) for rows in (left, right))
    return {name: paired_bootstrap(columns[name], others[name], seed) for name in COMPARED if name in columns}
