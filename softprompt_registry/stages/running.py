"""What every stage does around its work: its run, its inputs, its LoggedModel."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import mlflow
from mlflow.entities import LoggedModelInput, LoggedModelStatus

from mlflow_plugins.dod_dataset import DodDataset, from_dod
from mlflow_plugins.run_context import set_base_fingerprint
from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.base_models.reference import BaseModelRef
from softprompt_registry.dod.paraphrase import digest_before_paraphrasing
from softprompt_registry.dod.store import DodStore
from softprompt_registry.errors import DataError
from softprompt_registry.registry import conventions
from softprompt_registry.registry.artifacts import FoundArtifact, find_artifact
from softprompt_registry.registry.store import STORE_FAILURES, open_run, quick_requests
from softprompt_registry.soft_prompts.bank import SoftPromptBank
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


@dataclass(frozen=True)
class DodStage:
    """A stage at work on a DoD: its run, and what it reads."""

    run_id: str
    store: DodStore
    dataset: DodDataset
    found: Mapping[str, FoundArtifact]
    """The artifacts that it reads, by kind."""

    @cached_property
    def bank(self) -> SoftPromptBank:
        return SoftPromptBank(self.found["bank"].folder)


@contextlib.contextmanager
def dod_stage(
    stage: str,
    base_model: BaseModel | TuningEngine,
    dod_path: Path,
    *,
    context: str,
    bank: str | None = None,
    translator: str | None = None,
) -> Iterator[DodStage]:
    """The run of a stage that reads a DoD, with its inputs logged: the DoD, the base model, a translator and a bank.

    Args:
        context: what the DoD is used for, in MLflow's words.
        bank, translator: what the stage reads, each found (and fetched) once.

    Raises:
        DataError: the bank was tuned on another DoD.
        RegistryError: there is no such artifact.
    """
    given = {"translator": translator, "bank": bank}
    found = {kind: find_artifact(uri, kind) for kind, uri in given.items() if uri is not None}
    with DodStore.open(dod_path) as store, stage_run(stage, base_model) as run_id:
        doing = DodStage(run_id, store, from_dod(str(dod_path)), found)
        if bank is not None:
            require_same_dod(doing.bank, store)
        log_inputs(base_model.ref, doing.dataset, context=context)
        for artifact in found.values():
            if artifact.model_id:
                mlflow.log_input(model=LoggedModelInput(model_id=artifact.model_id))
        yield doing


def log_inputs(ref: BaseModelRef, dataset: DodDataset, *, context: str) -> None:
    mlflow.log_input(dataset, context=context)
    mlflow.log_input(model=LoggedModelInput(model_id=ensure_base_model(ref)))


def require_same_dod(bank: SoftPromptBank, store: DodStore) -> None:
    """A bank and a DoD that are used together must belong together; paraphrased hard prompts change nothing in that."""
    if bank.dod_digest in (None, store.digest) or bank.dod_digest == digest_before_paraphrasing(store):
        return
    raise DataError(
        f"using bank {bank.folder.name!r} with DoD {store.name!r}: the bank was tuned on DoD "
        f"{bank.header.get('dod_name')!r} with digest {str(bank.dod_digest)[:12]}, this one has {store.digest[:12]}. "
        "Use the DoD that the bank was tuned on, or a paraphrase of it."
    )


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
