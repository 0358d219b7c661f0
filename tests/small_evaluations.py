"""An evaluation's run as the stage leaves it, without the evaluation."""

from __future__ import annotations

from pathlib import Path

import mlflow

from softprompt_registry.evaluation.record import EvaluationRecord


def log_record(record: EvaluationRecord, folder: Path) -> str:
    """Log a record's files and its seeds in the active run; gives its id."""
    folder.mkdir()
    record.save(folder)
    mlflow.log_params({"evaluation.seed": 0, "evaluation.verifier.seed": 0})
    mlflow.log_artifacts(str(folder))
    run = mlflow.active_run()
    assert run is not None
    return str(run.info.run_id)
