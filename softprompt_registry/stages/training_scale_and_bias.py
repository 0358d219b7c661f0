"""Training a scale and bias as an MLflow run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mlflow

from mlflow_plugins.dod_dataset import from_dod
from mlflow_plugins.recording import MlflowRecorder
from softprompt_registry import figures
from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.config import flatten
from softprompt_registry.dod.store import DodStore
from softprompt_registry.fingerprints import digest_of_directory
from softprompt_registry.registry.artifacts import find_artifact
from softprompt_registry.soft_prompts.bank import SoftPromptBank
from softprompt_registry.stages.running import lineage_params, log_inputs, stage_run
from softprompt_registry.stages.training import require_same_dod, training_tasks
from softprompt_registry.translators.scale_and_bias import ScaleAndBias
from softprompt_registry.translators.scale_and_bias_training import ScaleAndBiasConfig, train_scale_and_bias


@dataclass(frozen=True)
class ScaleAndBiasResult:
    """What was trained, and the run that holds it."""

    run_id: str
    scale_and_bias: ScaleAndBias
    folder: Path


def train(
    base_model: BaseModel, bank_uri: str, dod_path: Path, config: ScaleAndBiasConfig, out: Path
) -> ScaleAndBiasResult:
    """Train a scale and bias on the bank's training tasks, and log its curves and its folder.

    It is an artifact of its run and no LoggedModel: a method to compare with, which is neither registered nor served.
    A second start goes on from the last epoch, or takes what is finished, in a run of its own that has the whole curve.

    Args:
        bank_uri: a folder, models:/… or runs:/….

    Raises:
        DataError: bank and DoD do not belong together, or see `train_scale_and_bias`, whose errors pass through.
    """
    found = find_artifact(bank_uri, "bank")
    bank = SoftPromptBank(found.folder)
    with DodStore.open(dod_path) as store, stage_run("train-scale-and-bias", base_model) as run_id:
        require_same_dod(bank, store)
        dataset = from_dod(str(dod_path))
        log_inputs(base_model.ref, dataset, context="training", upstream=found.model_id)
        recorder = MlflowRecorder(dataset=dataset)
        recorder.params("scale_and_bias", flatten(config))
        tasks = training_tasks(store, bank)
        made = train_scale_and_bias(base_model, bank, tasks, config, out, recorder=recorder)
        recorder.flush()
        mlflow.log_params(
            lineage_params(base_model.ref, store.name, store.digest)
            | {"bank_digest": bank.digest, "artifact_digest": digest_of_directory(out)}
        )
        losses = {name: made.record.training[name] for name in ("train_losses", "validation_losses")}
        recorder.figure("training_curves.png", figures.curves(f"Scale and bias, {len(tasks)} tasks", losses))
        recorder.artifact(out)
    return ScaleAndBiasResult(run_id, made, out)
