"""What the stages leave in MLflow, made in milliseconds: runs, LoggedModels, params, inputs and metrics, but no files."""

from __future__ import annotations

from dataclasses import dataclass

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelInput

FINGERPRINT = "1f2e" * 16
OTHER_FINGERPRINT = "9c0d" * 16
DOD_DIGEST = "5a" * 32


@dataclass(frozen=True)
class Chain:
    base_id: str
    bank_id: str
    translator_id: str
    tune_run: str
    train_run: str
    evaluate_run: str

    @property
    def translator_uri(self) -> str:
        return f"models:/{self.translator_id}"


def log_dataset(run_id: str, name: str = "sample", digest: str = DOD_DIGEST, source_type: str = "dod") -> None:
    dataset = Dataset(name=name, digest=digest[:36], source_type=source_type, source='{"uri": "dod:sample.dod"}')
    tags = [InputTag("mlflow.data.context", "training")]
    MlflowClient().log_inputs(run_id, datasets=[DatasetInput(dataset, tags)])


def log_model(model_type: str, name: str, **params: str) -> str:
    """Id of an external LoggedModel, made by the active run."""
    return str(mlflow.create_external_model(name=name, model_type=f"softprompt_{model_type}", params=params).model_id)


def log_evaluation(model_id: str, **metrics: float) -> str:
    """Id of an `evaluate` run whose child holds the metrics, as the stage does it."""
    with mlflow.start_run(nested=True, run_name="evaluate", tags={"softprompt.stage": "evaluate"}) as run:
        log_dataset(run.info.run_id)
        mlflow.log_input(model=LoggedModelInput(model_id))
        with mlflow.start_run(nested=True, tags={"softprompt.stage": "evaluate-method"}):
            for metric, value in metrics.items():
                mlflow.log_metric(f"evaluation.{metric}", value, model_id=model_id)
    return str(run.info.run_id)


def log_chain(*, fingerprint: str = FINGERPRINT, base: str = "tiny-llama", **metrics: float) -> Chain:
    """A bank tuned, a translator trained on it and evaluated."""
    lineage = {"base_fingerprint": fingerprint, "base_model": base, "dod_name": "sample", "dod_digest": DOD_DIGEST}
    with mlflow.start_run(run_name="tune", tags={"softprompt.stage": "tune"}) as tune:
        log_dataset(tune.info.run_id)
        base_name = f"base-model-{fingerprint[:12]}"
        base_id = log_model("base_model", base_name, base_fingerprint=fingerprint, base_model=base)
        mlflow.log_input(model=LoggedModelInput(base_id))
        bank_id = log_model("bank", "bank", **lineage, bank_digest="ba" * 32, artifact_digest="ba" * 32)
        mlflow.log_metric("validation_loss", 1.5, model_id=bank_id)
    with mlflow.start_run(run_name="train-translator", tags={"softprompt.stage": "train-translator"}) as train:
        log_dataset(train.info.run_id)
        for upstream in (base_id, bank_id):
            mlflow.log_input(model=LoggedModelInput(upstream))
        digests = {"bank_digest": "ba" * 32, "artifact_digest": "7a" * 32}
        translator_id = log_model("translator", "translator", **lineage, **digests, bank_model_id=bank_id)
    evaluate = log_evaluation(translator_id, **(metrics or {"label_f1": 0.4125, "label_recall": 0.5}))
    return Chain(base_id, bank_id, translator_id, tune.info.run_id, train.info.run_id, evaluate)
