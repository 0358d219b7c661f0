"""What an evaluation leaves in its MLflow runs: numbers to compare, a page to read, and all that they came from."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlflow

from mlflow_plugins.dod_dataset import DodDataset
from softprompt_registry import figures
from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.config import flatten
from softprompt_registry.dod.task import Task
from softprompt_registry.errors import ConfigError
from softprompt_registry.evaluation.control_prompts import ControlResult
from softprompt_registry.evaluation.record import EvaluationRecord
from softprompt_registry.evaluation.report_data import report_data, report_json
from softprompt_registry.evaluation.report_page import report_page
from softprompt_registry.evaluation.text_scores import EvaluatedTask
from softprompt_registry.evaluation.verbalizations import COMPARED, UNBOUNDED, Evaluation
from softprompt_registry.recording import Recorder
from softprompt_registry.registry import conventions
from softprompt_registry.stages.proposing import EvaluationConfig
from softprompt_registry.verbalization.abstention import AbstentionRule
from softprompt_registry.verbalization.methods import MethodTexts


@dataclass(frozen=True)
class Evaluated:
    """All that one evaluation found."""

    evaluation: Evaluation
    made: MethodTexts
    tasks: Mapping[str, Task]
    """By name, in the order of the texts."""
    rule: AbstentionRule
    calibration: Mapping[str, Any]
    """Columns of what the rule was chosen on; empty if it was not chosen."""
    left_out: Mapping[str, str]
    """Test tasks that could not be evaluated, with the reason."""
    garbage: ControlResult | None
    accuracy: Mapping[str, float]
    """Of the soft prompts on test pairs, by task."""


def record_evaluation(
    found: Evaluated,
    recorder: Recorder,
    dataset: DodDataset,
    base_model: BaseModel,
    config: EvaluationConfig,
    model_id: str | None,
) -> None:
    """Log it all in the active run, and a child run for each method.

    Args:
        model_id: the translator's LoggedModel, which gets the scores of its greedy texts.
    """
    tasks = {name: EvaluatedTask.of(task, found.accuracy.get(name)) for name, task in found.tasks.items()}
    made = found.made
    record = EvaluationRecord(tasks, made.texts, made.ranking, made.reporting, found.rule, flatten(config))
    with TemporaryDirectory() as folder:
        record.save(Path(folder))
        mlflow.log_artifacts(folder)
    _record_methods(found.evaluation, recorder, dataset, model_id)
    _record_report(found, record, base_model, config)
    recorder.table("abstention_rule.json", found.calibration)
    failures = [("", task, reason) for task, reason in found.left_out.items()]
    failures += [(method, task, reason) for (method, task), reason in found.made.failures.items()]
    columns = zip(*failures, strict=True) if failures else ((), (), ())
    recorder.table("left_out.json", dict(zip(("method", "task", "reason"), map(list, columns), strict=True)))
    recorder.metric(f"{conventions.EVALUATION_PREFIX}num_left_out", float(len(found.left_out)))
    if found.garbage is not None:
        recorder.table("garbage.json", found.garbage.rows)
        recorder.table("garbage_curve.json", found.garbage.curve_table)
        for name, value in found.garbage.metrics.items():
            recorder.metric(f"{conventions.EVALUATION_PREFIX}{name}", value)


def _record_methods(evaluation: Evaluation, recorder: Recorder, dataset: DodDataset, model_id: str | None) -> None:
    values = {method: result.metrics for method, result in evaluation.methods.items()}
    shown = [name for name in COMPARED if name in next(iter(values.values())) and name not in UNBOUNDED]
    recorder.table("verbalizations.json", evaluation.table())
    recorder.figure("methods.png", figures.methods_compared("Verbalizations of held-out tasks", values, shown))
    for name, comparisons in (
        ("comparisons.json", evaluation.comparisons),
        ("verifier_effects.json", evaluation.verifier_effects),
    ):
        mlflow.log_dict(
            {other: {key: item._asdict() for key, item in by.items()} for other, by in comparisons.items()}, name
        )
    for method, metrics in values.items():
        named = {f"{conventions.EVALUATION_PREFIX}{name}": value for name, value in metrics.items()}
        with mlflow.start_run(run_name=method, nested=True, tags={conventions.STAGE_TAG: "evaluate-method"}):
            mlflow.log_params({"method": method})
            mlflow.log_input(dataset, context="evaluation")
            mlflow.log_metrics(named)
            if method == "translator" and model_id:
                mlflow.log_metrics(named, model_id=model_id, dataset=dataset)


def _record_report(found: Evaluated, record: EvaluationRecord, base_model: BaseModel, config: EvaluationConfig) -> None:
    """The page that people read, and the same as JSON."""
    data = report_data(
        record,
        found.evaluation,
        when=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        base_model=str(base_model.ref),
        categories=categories_of(found.tasks, config.categories),
        controls=() if found.garbage is None else found.garbage.curve,
    )
    mlflow.log_text(report_page(data), "report.html")
    mlflow.log_dict(report_json(data), "report.json")


def categories_of(tasks: Mapping[str, Task], path: str | None) -> dict[str, str]:
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
