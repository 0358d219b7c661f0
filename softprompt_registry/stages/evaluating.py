"""Scoring methods of verbalization beside each other as MLflow runs: a parent, and a child for each method."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow

from mlflow_plugins.dod_dataset import DodDataset
from mlflow_plugins.recording import MlflowRecorder
from softprompt_registry import figures
from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.config import flatten
from softprompt_registry.evaluation import evaluating
from softprompt_registry.evaluation.evaluating import EvaluationConfig
from softprompt_registry.evaluation.metrics import SentenceEncoder
from softprompt_registry.evaluation.record import EvaluationRecord
from softprompt_registry.evaluation.report_data import categories_of, report_data, report_json
from softprompt_registry.evaluation.report_page import report_page
from softprompt_registry.evaluation.verbalizations import COMPARED, UNBOUNDED, Evaluation
from softprompt_registry.recording import Recorder
from softprompt_registry.registry import conventions
from softprompt_registry.stages.running import dod_stage
from softprompt_registry.storage import forget, locked
from softprompt_registry.translators.translator import Translator


@dataclass(frozen=True)
class EvaluationResult:
    """What the evaluation found, and the run that holds it."""

    run_id: str
    record: EvaluationRecord
    evaluation: Evaluation
    """The record's scores."""


def evaluate(
    base_model: BaseModel,
    translator_uri: str,
    bank_uri: str,
    dod_path: Path,
    config: EvaluationConfig,
    *,
    work: Path | None = None,
) -> EvaluationResult:
    """Verbalize the bank's test tasks with every method, without and with the verifier, and score all on the same prompts.

    The parent run holds the report, table, figure, comparisons and every candidate with its scores, from which `reproduce`
    makes all numbers again; each method has a child run with the same metric names, so that MLflow's comparison view lays
    them side by side. The translator's scores also go to its LoggedModel.

    Args:
        work: folder that keeps what is done, so that a second start with the same settings resumes; it is removed at the
            end. None keeps nothing.

    Raises:
        BusyError: another process works in `work`.
        DataError: see `evaluation.evaluating.evaluate`.
    """
    with ExitStack() as stack:
        if work is not None:
            stack.enter_context(locked(work))
        stage = stack.enter_context(
            dod_stage(
                conventions.STAGE_EVALUATE,
                base_model,
                dod_path,
                context="evaluation",
                translator=translator_uri,
                bank=bank_uri,
            )
        )
        recorder = MlflowRecorder()
        recorder.params("evaluation", flatten(config))
        translator = Translator.load(stage.found["translator"].folder, base_model)
        encoder = SentenceEncoder()
        record = evaluating.evaluate(translator, stage.bank, stage.store, config, encoder, work=work, recorder=recorder)
        evaluation = record.score(encoder)
        with TemporaryDirectory() as folder:
            record.save(Path(folder))
            mlflow.log_artifacts(folder)
        _log_methods(evaluation, recorder, stage.dataset, stage.found["translator"].model_id)
        _log_report(record, evaluation, base_model, config.categories)
        for name, columns in record.tables().items():
            recorder.table(name, columns)
        recorder.metric(f"{conventions.EVALUATION_PREFIX}num_left_out", float(len(record.left_out)))
        for name, value in ({} if record.controls is None else record.controls.metrics).items():
            recorder.metric(f"{conventions.EVALUATION_PREFIX}{name}", value)
    if work is not None:
        forget(work)
    return EvaluationResult(stage.run_id, record, evaluation)


def _log_methods(evaluation: Evaluation, recorder: Recorder, dataset: DodDataset, model_id: str | None) -> None:
    """Tables and figures of all methods, and a child run for each; the translator's scores also go to its LoggedModel."""
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
        with mlflow.start_run(
            run_name=method, nested=True, tags={conventions.STAGE_TAG: conventions.STAGE_EVALUATE_METHOD}
        ):
            mlflow.log_params({"method": method})
            mlflow.log_input(dataset, context="evaluation")
            mlflow.log_metrics(named)
            if method == "translator" and model_id:
                mlflow.log_metrics(named, model_id=model_id, dataset=dataset)


def _log_report(
    record: EvaluationRecord, evaluation: Evaluation, base_model: BaseModel, categories: str | None
) -> None:
    """The page that people read, and the same as JSON."""
    data = report_data(
        record,
        evaluation,
        when=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        base_model=str(base_model.ref),
        categories=categories_of(record.tasks, categories),
    )
    mlflow.log_text(report_page(data), "report.html")
    mlflow.log_dict(report_json(data), "report.json")
