"""Tuning soft prompts as an MLflow run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlflow

from mlflow_plugins import soft_prompt_bank as bank_flavor
from mlflow_plugins.dod_dataset import from_dod
from mlflow_plugins.recording import MlflowRecorder
from softprompt_registry import figures
from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.config import flatten
from softprompt_registry.dod.store import DodStore
from softprompt_registry.registry import conventions
from softprompt_registry.soft_prompts.bank import SoftPromptBank
from softprompt_registry.soft_prompts.tuning import TuningConfig, mean_curves, tune_soft_prompts
from softprompt_registry.stages.running import StageResult, lineage_params, log_inputs, logged_model, stage_run


def tune(
    base_model: BaseModel, dod_path: Path, config: TuningConfig, out: Path, *, task_names: Sequence[str] | None = None
) -> StageResult:
    """Tune soft prompts for all tasks of a DoD, or the named ones, and log the bank."""
    with DodStore.open(dod_path) as store, stage_run("tune", base_model) as run_id:
        dataset = from_dod(str(dod_path))
        tasks = [store.task(name) for name in task_names] if task_names else list(store.tasks())
        log_inputs(base_model.ref, dataset, context="tuning")
        mlflow.log_dict(dataset.manifest, "dod_manifest.json")
        params = lineage_params(base_model.ref, store.name, store.digest)
        with logged_model("bank", conventions.BANK, params) as model_id:
            recorder = MlflowRecorder(model_id=model_id, dataset=dataset)
            recorder.params("tuning", flatten(config))
            bank = tune_soft_prompts(
                base_model, tasks, config, out, dod_name=store.name, dod_digest=store.digest, recorder=recorder
            )
            mlflow.log_model_params({"bank_digest": bank.digest, "artifact_digest": bank.digest}, model_id=model_id)
            recorder.figure(
                "tuning_curves.png", figures.curves(f"Tuning {len(bank)} soft prompts (mean)", mean_curves(bank))
            )
            for metric in ("label_accuracy", "exact_match"):
                scores = {task: r["metrics"][metric] for task, r in bank.records.items() if metric in r["metrics"]}
                if scores:
                    title = f"{metric.replace('_', ' ').capitalize()} on test pairs"
                    recorder.figure(f"{metric}.png", figures.scores_by_task(title, scores, x=metric))
            recorder.table("soft_prompts.json", bank_table(bank))
            bank_flavor.log_model(bank, name="bank", model_id=model_id)
    return StageResult(run_id, model_id, out)


def bank_table(bank: SoftPromptBank) -> dict[str, list[Any]]:
    """A row per soft prompt."""
    names = ("validation_loss", "label_accuracy", "exact_match")
    records = list(bank.records.values())
    columns: dict[str, list[Any]] = {
        "task": [record["task"] for record in records],
        "kind": [record["kind"] for record in records],
        "ground_truth": [record["ground_truth"] for record in records],
        "best_epoch": [record["tuning"].get("best_epoch") for record in records],
        "train_pairs": [record["tuning"].get("num_train_pairs") for record in records],
        "truncated_inputs": [record["tuning"].get("num_truncated_inputs") for record in records],
    }
    return columns | {name: [record["metrics"].get(name) for record in records] for name in names}
