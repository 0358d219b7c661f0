"""Running a study as an MLflow run: a parent with the comparison, and a child run for each point."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import mlflow

from mlflow_plugins.dod_dataset import from_dod
from mlflow_plugins.recording import MlflowRecorder
from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.config import flatten
from softprompt_registry.evaluation.record import EvaluationRecord
from softprompt_registry.evaluation.study_figure import skill_figure, study_figure
from softprompt_registry.evaluation.study_table import SKILLS, PointResult, RankCorrelation, StudyTable
from softprompt_registry.registry import conventions
from softprompt_registry.registry.artifacts import find_artifact
from softprompt_registry.registry.store import open_run
from softprompt_registry.soft_prompts.bank import SoftPromptBank
from softprompt_registry.stages.evaluating import evaluate
from softprompt_registry.stages.running import log_inputs, stage_run
from softprompt_registry.stages.study_plans import PlannedPoint, StudyPlan
from softprompt_registry.stages.training import train
from softprompt_registry.stages.tuning import tune
from softprompt_registry.storage import locked, read_json, require_same_origin, write_json
from softprompt_registry.translators.translator import read_record

RESULT_FILE = "result.json"
POINTS_FILE = "study_points.json"
"""In the parent run: what each point reached task by task, from which `StudyTable.from_json` makes all of its numbers."""


@dataclass(frozen=True)
class StudyResult:
    """What a study found, and the run that holds it."""

    run_id: str
    table: StudyTable
    correlations: dict[str, dict[str, RankCorrelation]]
    """Rank correlations between the quality of soft prompts and of their verbalizations; only in the study `accuracy`."""


def run_study(base_model: BaseModel, plan: StudyPlan, out: Path) -> StudyResult:
    """Train, tune and evaluate what the points of a study need, and lay them side by side.

    Everything is written below `out`: the result of a point as `<out>/<point>/result.json` as soon as it is there. A second
    start with the same settings takes over finished points without evaluating them again, and resumes in the middle of a
    training or tuning; with more points it adds those.

    Raises:
        ArtifactError: `out` holds a point made from other inputs or settings.
        BusyError: another process works on a study in `out`.
    """
    with locked(out):
        finished = {point.name: found for point in plan.points if (found := _finished(plan, point, base_model, out))}
        with stage_run(conventions.STAGE_STUDY, base_model) as run_id:
            mlflow.set_tag("mlflow.runName", f"study {plan.study}")
            mlflow.log_params({"study": plan.study})
            recorder = MlflowRecorder()
            recorder.params("study", flatten(plan.config))
            for source in plan.sources:
                log_inputs(base_model.ref, from_dod(str(source.dod)), context=conventions.STAGE_STUDY)
            if plan.notes:
                mlflow.set_tag("mlflow.note.content", "\n".join(plan.notes))
            work = _Work(base_model, plan, out)
            if len(finished) < len(plan.points):
                work.prepare()
            results = []
            for number, point in enumerate(plan.points, start=1):
                tags = {conventions.STAGE_TAG: conventions.STAGE_STUDY_POINT}
                with open_run(point.name, tags):
                    mlflow.log_params({"study": plan.study, "point": point.name})
                    result = finished.get(point.name) or work.reach(point)
                    _log_point(result, plan.config.method)
                results.append(result)
                # The stages show bars of their own, and a terminal shows one at a time.
                with recorder.progress(f"study {plan.study}", len(plan.points)) as bar:
                    bar.advance(number, point.name)
            table = StudyTable(plan.study, plan.config.method, tuple(results), plan.config.evaluation.seed)
            correlations = table.correlations() if plan.study == "accuracy" else {}
            _log_study(table, correlations, recorder)
    return StudyResult(run_id, table, correlations)


def read_study(run_id: str) -> StudyTable:
    """A study from its run alone: all means, intervals, differences and correlations are worked out again."""
    return StudyTable.from_json(mlflow.artifacts.load_dict(f"runs:/{run_id}/{POINTS_FILE}"))


@dataclass
class _Work:
    """Makes what is not there yet."""

    base_model: BaseModel
    plan: StudyPlan
    out: Path
    shared_translator: str | None = None

    def prepare(self) -> None:
        """Have the translator that several points share."""
        self.shared_translator = self.plan.given_translator
        shared = next((point for point in self.plan.points if not point.own_translator), None)
        if shared is not None and self.shared_translator is None:
            self.shared_translator = self._train(shared, self.out / "translator")

    def reach(self, point: PlannedPoint) -> PointResult:
        folder, source = self.out / point.name, point.evaluated_on
        translator, bank = self.shared_translator, source.bank
        if point.own_translator:
            translator = self._train(point, folder / "translator")
        assert translator is not None, "prepare comes first"
        if point.tuning is not None:
            names = source.test_tasks
            bank = tune(self.base_model, source.dod, point.tuning, folder / "bank", task_names=names).model_uri
        work = folder / "evaluation.work"
        found = evaluate(self.base_model, translator, bank, source.dod, point.evaluation, work=work)
        record = read_record(find_artifact(translator, "translator").folder)
        held_out = record.training.get("validation_tasks", [])
        result = PointResult(
            point=point.name,
            value=point.value,
            dod_name=source.dod_name,
            dod_digest=source.dod_digest,
            run_id=found.run_id,
            metrics={method: dict(item.metrics) for method, item in found.evaluation.methods.items()},
            rows={method: item.rows for method, item in found.evaluation.methods.items()},
            skills=_skills(found.record, SoftPromptBank(find_artifact(bank, "bank").folder)),
            facts={
                **point.facts,
                "train_tasks": len(record.train_tasks) - len(held_out),
                "trained_on": record.dod_name,
                "tested_on": source.dod_name,
                "evaluation_run_id": found.run_id,
            },
        )
        made_from = self.plan.origin(point, self.base_model.ref)
        write_json(folder / RESULT_FILE, {"made_from": made_from, "result": result.to_json()})
        return result

    def _train(self, point: PlannedPoint, folder: Path) -> str:
        assert point.trained_on is not None and point.translator is not None
        source = point.trained_on
        return train(self.base_model, source.bank, source.dod, point.translator, folder).model_uri


def _finished(plan: StudyPlan, point: PlannedPoint, base_model: BaseModel, out: Path) -> PointResult | None:
    """The result of an earlier start; None if there is none."""
    path = out / point.name / RESULT_FILE
    if not path.exists():
        return None
    record = read_json(path, f"the result of point {point.name!r}")
    require_same_origin(
        f"point {point.name!r} of a study", path.parent, record.get("made_from"), plan.origin(point, base_model.ref)
    )
    return PointResult.from_json(record["result"])


def _skills(record: EvaluationRecord, bank: SoftPromptBank) -> dict[str, dict[str, float]]:
    """How well each soft prompt that was read does its task, on test pairs, and its loss."""
    found = {}
    for name, task in record.tasks.items():
        loss = bank.record(name)["metrics"].get("validation_loss")
        skills = {"accuracy": task.accuracy, "negative_validation_loss": None if loss is None else -loss}
        found[name] = {skill: float(value) for skill, value in skills.items() if value is not None}
    return found


def _log_point(result: PointResult, method: str) -> None:
    """Metrics with the same names in every child, so that MLflow's comparison view lays the points side by side."""
    value = {} if result.value is None else {"value": result.value}
    mlflow.log_params({"method": method, **value, **result.facts})
    metrics = result.metrics.get(method, {})
    mlflow.log_metrics({f"{conventions.EVALUATION_PREFIX}{name}": number for name, number in metrics.items()})
    for skill in SKILLS:
        values = [skills[skill] for skills in result.skills.values() if skill in skills]
        if values:
            mlflow.log_metric(f"soft_prompts.{skill}", fmean(values))


def _log_study(
    table: StudyTable, correlations: Mapping[str, Mapping[str, RankCorrelation]], recorder: MlflowRecorder
) -> None:
    mlflow.log_dict(table.to_json(), POINTS_FILE)
    recorder.table("study.json", table.columns())
    recorder.table("study_tasks.json", table.task_columns())
    mlflow.log_dict(
        {point: {name: item._asdict() for name, item in by.items()} for point, by in table.differences.items()},
        "study_differences.json",
    )
    tasks = sorted({len(point.rows[table.method]) for point in table.points})
    counted = f"{tasks[0]} to {tasks[-1]}" if len(tasks) > 1 else str(tasks[0])
    title = f"Study {table.study}: {table.method}, {counted} test tasks, 95 % intervals over tasks"
    recorder.figure("study.png", study_figure(title, table))
    if correlations:
        found = {pair: {point: item._asdict() for point, item in by.items()} for pair, by in correlations.items()}
        mlflow.log_dict(found, "correlations.json")
        figure = skill_figure("How good soft prompts are, and how good their texts", table, correlations)
        if figure is not None:
            recorder.figure("accuracy.png", figure)
