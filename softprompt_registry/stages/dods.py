"""Building, paraphrasing and auditing DoDs as MLflow runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import mlflow

from mlflow_plugins.dod_dataset import from_dod
from mlflow_plugins.recording import MlflowRecorder
from softprompt_registry.config import flatten
from softprompt_registry.dod.audit import AuditConfig, audit_dod
from softprompt_registry.dod.audit_findings import Audit
from softprompt_registry.dod.audit_page import audit_figures, write_audit_page
from softprompt_registry.dod.store import note_in_dod
from softprompt_registry.recording import Recorder
from softprompt_registry.registry import conventions
from softprompt_registry.stages.running import stage_run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class BuildReport(Protocol):
    """What every builder reports."""

    @property
    def path(self) -> Path: ...

    @property
    def digest(self) -> str: ...


@runtime_checkable
class HasTable(Protocol):
    """A report with a row per task."""

    def table(self) -> Mapping[str, Sequence[Any]]: ...


ReportT = TypeVar("ReportT", bound=BuildReport)


def build(stage: str, config: Any, build_dod: Callable[[Recorder], ReportT]) -> tuple[str, ReportT]:
    """(run id, report) of a build whose settings, counts and DoD are recorded.

    Args:
        stage: name of the run, and prefix of its params.
        config: the builder's settings.
        build_dod: the builder itself; it reports its progress to the recorder it is given.
    """
    with stage_run(stage) as run_id:
        recorder = MlflowRecorder()
        recorder.params(stage.replace("-", "_"), flatten(config))
        report = build_dod(recorder)
        manifest = log_dod(report.path, context="built")
        recorder.table("tasks.json", report.table() if isinstance(report, HasTable) else _tasks_of(manifest))
    return run_id, report


def _tasks_of(manifest: Mapping[str, Any]) -> dict[str, list[Any]]:
    """What a manifest says of each task, as columns."""
    columns = ("name", "kind", "split", "num_pairs", "source")
    return {column: [task[column] for task in manifest["tasks"]] for column in columns}


def log_dod(path: Path, *, context: str) -> dict[str, Any]:
    """A DoD as an input of the active run: one dataset, its manifest, and how many tasks and pairs it has.

    Returns the manifest.
    """
    dataset = from_dod(str(path))
    manifest = dataset.manifest
    mlflow.log_input(dataset, context=context)
    mlflow.log_dict(manifest, "dod_manifest.json")
    mlflow.log_metrics({"num_tasks": manifest["num_tasks"], "num_pairs": manifest["num_pairs"]})
    return manifest


def audit(
    dod_path: Path, config: AuditConfig, page: Path, *, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[str, Audit]:
    """(run id, audit) of a DoD. The page goes to `page` and into the run, the findings into the DoD's metadata."""
    with stage_run(conventions.STAGE_AUDIT_DOD) as run_id:
        recorder = MlflowRecorder()
        recorder.params("audit", flatten(config))
        found = audit_dod(dod_path, config=config, tokenizer=tokenizer, recorder=recorder)
        write_audit_page(found, page)
        note_in_dod(dod_path, "audit", found.to_json())
        log_dod(dod_path, context="audited")
        recorder.artifact(page)
        for drawn in audit_figures(found):
            recorder.figure(f"{drawn.name}.png", drawn.figure)
        recorder.table("tasks.json", found.table())
    return run_id, found
