"""Tuning soft prompts as an MLflow run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Metric, Param, RunTag

from mlflow_plugins import soft_prompt_bank as bank_flavor
from mlflow_plugins.recording import MlflowRecorder
from softprompt_registry import figures
from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.config import flatten
from softprompt_registry.registry import conventions
from softprompt_registry.soft_prompts.bank import SoftPromptBank
from softprompt_registry.soft_prompts.engines import TuningEngine
from softprompt_registry.soft_prompts.tuning import tune_soft_prompts
from softprompt_registry.soft_prompts.tuning_settings import TuningConfig
from softprompt_registry.stages.running import StageResult, dod_stage, lineage_params, logged_model

METRICS = ("validation_loss", "label_accuracy", "exact_match")
CURVES = {"train_loss_by_epoch": "train_losses", "validation_loss_by_epoch": "validation_losses"}
"""Metrics of a soft prompt's own run, and what the record calls them."""
MAX_POINTS = 800
"""MLflow takes 1,000 in a call, params and tags counted in."""
MAX_BARS = 40
"""More soft prompts than these are shown as a distribution."""


def tune(
    base_model: BaseModel | TuningEngine,
    dod_path: Path,
    config: TuningConfig,
    out: Path,
    *,
    task_names: Sequence[str] | None = None,
    log_each: bool = False,
) -> StageResult:
    """Tune soft prompts for all tasks of a DoD, or the named ones, and log the bank.

    Args:
        base_model: a loaded one, or an engine that tunes elsewhere.
        log_each: also make a nested run for each soft prompt, with its own curves.
    """
    with dod_stage(conventions.STAGE_TUNE, base_model, dod_path, context="tuning") as stage:
        store, dataset = stage.store, stage.dataset
        tasks = store.stored_tasks(task_names)
        mlflow.log_dict(dataset.manifest, "dod_manifest.json")
        params = lineage_params(base_model.ref, store.name, store.digest)
        with logged_model("bank", conventions.BANK, params) as model_id:
            recorder = MlflowRecorder(model_id=model_id, dataset=dataset)
            recorder.params("tuning", flatten(config))
            bank = tune_soft_prompts(
                base_model, tasks, config, out, dod_name=store.name, dod_digest=store.digest, recorder=recorder
            )
            mlflow.log_model_params({"bank_digest": bank.digest, "artifact_digest": bank.digest}, model_id=model_id)
            _draw(bank, recorder)
            recorder.table("soft_prompts.json", bank_table(bank))
            if log_each:
                _log_each(bank, stage.run_id, recorder)
            bank_flavor.log_model(bank, name="bank", model_id=model_id)
    return StageResult(stage.run_id, model_id, out)


def bank_table(bank: SoftPromptBank) -> dict[str, list[Any]]:
    """A row per soft prompt, and one per task that has none because its tuning failed."""
    columns: dict[str, list[Any]] = {}

    def add(row: dict[str, Any]) -> None:
        for name, value in row.items():
            columns.setdefault(name, []).append(value)

    for record in bank.records():
        tuning = record["tuning"]
        add(
            {
                "task": record["task"],
                "kind": record["kind"],
                "ground_truth": record["ground_truth"],
                "best_epoch": tuning.get("best_epoch"),
                "train_pairs": tuning.get("num_train_pairs"),
                "truncated_inputs": tuning.get("num_truncated_inputs"),
                **{name: record["metrics"].get(name) for name in METRICS},
                "failure": "",
            }
        )
    for task, reason in bank.failures().items():
        add({name: None for name in columns} | {"task": task, "failure": reason})
    return columns


def _draw(bank: SoftPromptBank, recorder: MlflowRecorder) -> None:
    losses: dict[str, list[list[float]]] = {"train loss": [], "validation loss": []}
    scores: dict[str, dict[str, float]] = {name: {} for name in METRICS}
    for record in bank.records():
        losses["train loss"].append(record["tuning"]["train_losses"])
        losses["validation loss"].append(record["tuning"]["validation_losses"])
        for name in METRICS:
            if name in record["metrics"]:
                scores[name][record["task"]] = record["metrics"][name]
    recorder.figure("tuning_curves.png", figures.bands(f"Tuning {len(bank)} soft prompts", losses))
    for name, by_task in scores.items():
        words = name.replace("_", " ")
        if not by_task:
            continue
        if name == "validation_loss" or len(by_task) > MAX_BARS:
            title = f"Best {words}" if name == "validation_loss" else f"{words.capitalize()} on test pairs"
            recorder.figure(f"{name}.png", figures.distribution(title, list(by_task.values()), x=words))
        else:
            title = f"{words.capitalize()} on test pairs"
            recorder.figure(f"{name}.png", figures.scores_by_task(title, by_task, x=words))


def _log_each(bank: SoftPromptBank, run_id: str, recorder: MlflowRecorder) -> None:
    """A nested run for each soft prompt: three calls to the tracking server each, so not the default."""
    client = mlflow.MlflowClient()
    experiment_id = client.get_run(run_id).info.experiment_id
    with recorder.progress("log each soft prompt", len(bank)) as bar:
        for record in bank.records():
            now = int(time.time() * 1000)
            tags = {"mlflow.parentRunId": run_id, conventions.STAGE_TAG: conventions.STAGE_SOFT_PROMPT}
            run = client.create_run(experiment_id, run_name=record["task"], tags=tags)
            points = [Metric(name, value, now, 0) for name, value in record["metrics"].items()]
            for name, curve in CURVES.items():
                losses = enumerate(record["tuning"][curve], start=1)
                points += [Metric(name, value, now, epoch) for epoch, value in losses]
            params = [
                Param("task", record["task"]),
                Param("kind", record["kind"]),
                Param("best_epoch", str(record["tuning"]["best_epoch"])),
                Param("bank", bank.digest),
            ]
            note = RunTag("mlflow.note.content", record["ground_truth"][:4000])
            client.log_batch(run.info.run_id, metrics=points[:MAX_POINTS], params=params, tags=[note])
            for first in range(MAX_POINTS, len(points), MAX_POINTS):
                client.log_batch(run.info.run_id, metrics=points[first : first + MAX_POINTS])
            client.set_terminated(run.info.run_id)
            bar.advance(1, record["task"])
