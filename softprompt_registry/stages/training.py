"""Training a translator as an MLflow run."""

from __future__ import annotations

from pathlib import Path

import mlflow

from mlflow_plugins import translator as translator_flavor
from mlflow_plugins.recording import MlflowRecorder
from softprompt_registry import figures
from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.config import flatten
from softprompt_registry.dod.store import DodStore
from softprompt_registry.dod.task import Task
from softprompt_registry.fingerprints import digest_of_directory
from softprompt_registry.processes import ALONE, Processes
from softprompt_registry.registry import conventions
from softprompt_registry.registry.artifacts import find_artifact
from softprompt_registry.soft_prompts.bank import SoftPromptBank
from softprompt_registry.stages.running import StageResult, dod_stage, lineage_params, logged_model, require_same_dod
from softprompt_registry.translators.training import TranslatorConfig, train_translator


def train(
    base_model: BaseModel,
    bank_uri: str,
    dod_path: Path,
    config: TranslatorConfig,
    out: Path,
    *,
    processes: Processes = ALONE,
) -> StageResult:
    """Train a translator on the bank's training tasks and log it.

    Where `processes` are several, this is for the main one; the others call `take_part_in_training`.
    """
    with dod_stage(
        conventions.STAGE_TRAIN_TRANSLATOR, base_model, dod_path, context="training", bank=bank_uri
    ) as stage:
        bank, store, found = stage.bank, stage.store, stage.found["bank"]
        params = lineage_params(base_model.ref, store.name, store.digest) | {"bank_digest": bank.digest}
        if found.model_id:
            params["bank_model_id"] = found.model_id
        with logged_model("translator", conventions.TRANSLATOR, params) as model_id:
            recorder = MlflowRecorder(model_id=model_id, dataset=stage.dataset)
            recorder.params("translator", flatten(config))
            tasks = training_tasks(store, bank)
            translator = train_translator(base_model, bank, tasks, config, out, recorder=recorder, processes=processes)
            mlflow.log_model_params({"artifact_digest": digest_of_directory(out)}, model_id=model_id)
            losses = {name: translator.record.training[name] for name in ("train_losses", "validation_losses")}
            recorder.figure("training_curves.png", figures.curves(f"Translator, {len(tasks)} tasks", losses))
            translator_flavor.log_model(out, name="translator", model_id=model_id)
    return StageResult(stage.run_id, model_id, out)


def take_part_in_training(
    base_model: BaseModel, bank_uri: str, dod_path: Path, config: TranslatorConfig, out: Path, *, processes: Processes
) -> None:
    """What a process other than the main one does of `train`: its share of each step, and nothing that is logged."""
    with DodStore.open(dod_path) as store:
        bank = SoftPromptBank(find_artifact(bank_uri, "bank").folder)
        require_same_dod(bank, store)
        train_translator(base_model, bank, training_tasks(store, bank), config, out, processes=processes)


def training_tasks(store: DodStore, bank: SoftPromptBank) -> dict[str, Task]:
    members = set(bank.tasks())
    return {task.name: task for task in store.tasks("train") if task.name in members}
