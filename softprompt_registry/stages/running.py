"""What every stage does around its work: its run, its inputs, its LoggedModel."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow.entities import LoggedModelInput, LoggedModelStatus

from mlflow_plugins.dod_dataset import DodDataset
from mlflow_plugins.run_context import set_base_fingerprint
from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.base_models.reference import BaseModelRef
from softprompt_registry.registry import conventions
from softprompt_registry.registry.store import STORE_FAILURES, open_run, quick_requests
from softprompt_registry.soft_prompts.engines import TuningEngine


@dataclass(frozen=True)
class StageResult:
    """What a stage left behind."""

    run_id: str
    model_id: str
    folder: Path

    @property
    def model_uri(self) -> str:
        return f"models:/{self.model_id}"


@contextlib.contextmanager
def stage_run(stage: str, base_model: BaseModel | TuningEngine | None = None) -> Iterator[str]:
    """One MLflow run for a stage, tagged with the base model it uses; yields its id."""
    if base_model is not None:
        set_base_fingerprint(base_model.ref.fingerprint)
    with open_run(stage, {conventions.STAGE_TAG: stage}) as run_id:
        yield run_id


def ensure_base_model(ref: BaseModelRef) -> str:
    """Id of the external LoggedModel that stands for a base model in this experiment; made on first use."""
    name = conventions.base_model_name(ref.fingerprint)
    found = mlflow.search_logged_models(filter_string=f"name = '{name}'", output_format="list")
    if found:
        return str(found[0].model_id)
    params = {key: str(value) for key, value in ref.to_json().items()}
    params |= {"base_fingerprint": ref.fingerprint, "base_model": ref.name}
    return str(mlflow.create_external_model(name=name, model_type=conventions.BASE_MODEL, params=params).model_id)


def log_inputs(ref: BaseModelRef, dataset: DodDataset, *, context: str, upstream: str | None = None) -> None:
    mlflow.log_input(dataset, context=context)
    mlflow.log_input(model=LoggedModelInput(model_id=ensure_base_model(ref)))
    if upstream:
        mlflow.log_input(model=LoggedModelInput(model_id=upstream))


def lineage_params(ref: BaseModelRef, dod_name: str, dod_digest: str) -> dict[str, str]:
    return {
        "base_fingerprint": ref.fingerprint,
        "base_model": ref.name,
        "dod_name": dod_name,
        "dod_digest": dod_digest,
    }


@contextlib.contextmanager
def logged_model(name: str, model_type: str, params: dict[str, str]) -> Iterator[str]:
    """A LoggedModel that exists before its training starts, so that the whole curve belongs to it."""
    model = mlflow.initialize_logged_model(name=name, model_type=model_type, params=params)
    try:
        yield str(model.model_id)
    except BaseException:
        with contextlib.suppress(*STORE_FAILURES), quick_requests():
            mlflow.finalize_logged_model(model.model_id, LoggedModelStatus.FAILED)
        raise
