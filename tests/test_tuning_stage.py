"""What `tune` leaves in MLflow: one run with distributions, a table with a row per prompt, and on request a run each."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
from small_tasks import CONFIG, TASKS, make_task
from tiny_llm import tiny_base_model

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.dod.store import DodStore
from softprompt_registry.dod.task import Task
from softprompt_registry.soft_prompts import fleet as fleet_module
from softprompt_registry.soft_prompts.bank import SoftPromptBank
from softprompt_registry.soft_prompts.progress import EncodedTask, Progress, begin
from softprompt_registry.soft_prompts.tuning_settings import TuningConfig
from softprompt_registry.stages import tuning as stage


@pytest.fixture
def with_one_broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Task `a` starts from NaN."""

    def begun(base_model: BaseModel, encoded: EncodedTask, config: TuningConfig) -> Progress:
        progress = begin(base_model, encoded, config)
        if encoded.task.name == "a":
            progress.prompt.data[0, 0] = math.nan
        return progress

    monkeypatch.setattr(fleet_module, "begin", begun)
    yield


def write_dod(folder: Path, tasks: list[Task]) -> Path:
    with DodStore.create(folder / "tasks.sqlite") as store:
        for task in tasks:
            store.add_task(task)
    return folder / "tasks.sqlite"


@pytest.mark.usefixtures("mlflow_store", "with_one_broken")
def test_one_run_for_the_fleet_and_one_for_each_prompt(tmp_path: Path) -> None:
    config = replace(CONFIG, epochs=2)
    done = stage.tune(tiny_base_model(), write_dod(tmp_path, TASKS), config, tmp_path / "bank", log_each=True)
    client = mlflow.MlflowClient()
    run = client.get_run(done.run_id)
    assert run.data.metrics["failed_tasks"] == 1
    assert run.data.metrics["train_tokens_per_s"] > 0 and run.data.metrics["memory_halvings"] == 0
    artifacts = {item.path for item in client.list_artifacts(done.run_id)}
    assert {"tuning_curves.png", "validation_loss.png", "label_accuracy.png", "exact_match.png"} <= artifacts
    table = json.loads(Path(client.download_artifacts(done.run_id, "soft_prompts.json", str(tmp_path))).read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [row["task"] for row in rows] == ["b", "c", "free", "d", "a"]
    assert rows[-1]["failure"] == "its train loss became nan in epoch 1" and rows[-1]["validation_loss"] is None
    assert all(row["failure"] == "" and row["validation_loss"] > 0 for row in rows[:-1])

    children = client.search_runs(
        [run.info.experiment_id], filter_string=f"tags.`mlflow.parentRunId` = '{done.run_id}'"
    )
    bank = SoftPromptBank(tmp_path / "bank")
    assert sorted(child.info.run_name for child in children) == sorted(bank.tasks())
    for child in children:
        record = bank.record(child.info.run_name)
        assert child.info.status == "FINISHED"
        assert child.data.params["best_epoch"] == str(record["tuning"]["best_epoch"])
        assert child.data.params["bank"] == bank.digest
        assert child.data.metrics["validation_loss"] == record["metrics"]["validation_loss"]
        for name, curve in stage.CURVES.items():
            history = client.get_metric_history(child.info.run_id, name)
            assert [(point.step, point.value) for point in history] == list(enumerate(record["tuning"][curve], start=1))


@pytest.mark.usefixtures("mlflow_store")
def test_without_it_there_is_one_run_and_many_prompts_become_a_distribution(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn: list[tuple[str, int]] = []
    real = stage.figures.distribution

    def distribution(title: str, values: list[float], *, x: str) -> object:
        drawn.append((x, len(values)))
        return real(title, values, x=x)

    monkeypatch.setattr(stage.figures, "distribution", distribution)
    tasks = [make_task(f"t{number:02d}", train=2) for number in range(stage.MAX_BARS + 1)]
    config = replace(CONFIG, epochs=1, slots=16, tokens_per_forward=4000)
    done = stage.tune(tiny_base_model(), write_dod(tmp_path, tasks), config, tmp_path / "bank")
    experiment = mlflow.MlflowClient().get_run(done.run_id).info.experiment_id
    assert len(mlflow.MlflowClient().search_runs([experiment])) == 1
    assert drawn == [(words, len(tasks)) for words in ("validation loss", "label accuracy", "exact match")]
