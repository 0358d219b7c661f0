"""Reports of a stage as they arrive in a real MLflow store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlflow
import pytest
from matplotlib.figure import Figure

from mlflow_plugins import recording
from mlflow_plugins.dod_dataset import DodDataset, from_dod
from mlflow_plugins.recording import MlflowRecorder
from softprompt_registry.dod.store import DodStore
from softprompt_registry.dod.task import Pair, Task
from softprompt_registry.errors import ArtifactError, RegistryError
from softprompt_registry.recording import Recorder


@pytest.fixture
def dataset(tmp_path: Path) -> DodDataset:
    with DodStore.create(tmp_path / "demo.sqlite") as store:
        store.add_task(Task("echo", "generation", (Pair("a", "a"),)))
    return from_dod(tmp_path / "demo.sqlite")


def history(run_id: str, name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in mlflow.MlflowClient().get_metric_history(run_id, name)]


def artifacts(run_id: str, folder: str | None = None) -> list[str]:
    return sorted(item.path for item in mlflow.MlflowClient().list_artifacts(run_id, folder))


def read_table(run_id: str, name: str) -> dict[str, Any]:
    table: dict[str, Any] = json.loads(mlflow.artifacts.load_text(f"runs:/{run_id}/{name}"))
    return table


def test_needs_a_run(mlflow_store: str) -> None:
    with pytest.raises(RegistryError, match="no run is active.*mlflow.start_run"):
        MlflowRecorder()
    assert mlflow.active_run() is None


def test_params(mlflow_store: str) -> None:
    with mlflow.start_run() as run:
        mlflow.log_param("lr", "'quoted by mlflow run'")
        recorder: Recorder = MlflowRecorder()
        recorder.params("tuning", {"lr": 1e-4, "labels": ["a", "b"], "patience": None, "long": "x" * 7000})
        recorder.params("tuning", {"lr": 1e-4, "epochs": 3})
        with pytest.raises(mlflow.MlflowException, match="Changing param values is not allowed"):
            recorder.params("tuning", {"lr": 0.5})
        recorder.params("many", {f"key{i}": i for i in range(250)})  # MLflow takes 100 at a time
    params = mlflow.get_run(run.info.run_id).data.params
    assert params["lr"] == "'quoted by mlflow run'"
    assert params["tuning.lr"] == "0.0001" and params["tuning.epochs"] == "3"
    assert params["tuning.labels"] == "['a', 'b']" and params["tuning.patience"] == "None"
    assert len(params["tuning.long"]) == 6000 and params["tuning.long"].endswith("x…")
    assert sum(key.startswith("many.") for key in params) == 250


def test_model_gets_params_and_the_whole_curve_with_its_dataset(mlflow_store: str, dataset: DodDataset) -> None:
    with mlflow.start_run() as run:
        model = mlflow.initialize_logged_model(name="bank")
        with MlflowRecorder(model_id=model.model_id, dataset=dataset) as recorder:
            recorder.params("tuning", {"lr": 1e-4, "long": "x" * 7000})
            recorder.params("tuning", {"lr": 1e-4})
            for step in range(3):
                recorder.metric("loss", 1 / (step + 1), step=step)
    assert history(run.info.run_id, "loss") == [(0, 1.0), (1, 1 / 2), (2, 1 / 3)]
    stored = mlflow.get_logged_model(model.model_id)
    assert stored.params["tuning.lr"] == "0.0001" and len(stored.params["tuning.long"]) == 6000
    points = sorted(stored.metrics, key=lambda point: point.step)
    assert [(point.step, point.value) for point in points] == [(0, 1.0), (1, 1 / 2), (2, 1 / 3)]
    assert {(point.dataset_name, point.dataset_digest, point.run_id) for point in points} == {
        ("demo", dataset.digest, run.info.run_id)
    }
    inputs = mlflow.get_run(run.info.run_id).inputs
    assert [item.dataset.digest for item in inputs.dataset_inputs] == [dataset.digest]
    # The run makes the model; `mlflow.log_metric(model_id=…)` would have listed it among the run's inputs.
    assert inputs.model_inputs == []


def test_dataset_keeps_the_context_it_was_logged_with(mlflow_store: str, dataset: DodDataset) -> None:
    with mlflow.start_run() as run:
        mlflow.log_input(dataset, context="tuning")
        MlflowRecorder(dataset=dataset)
    (found,) = mlflow.get_run(run.info.run_id).inputs.dataset_inputs
    assert [(tag.key, tag.value) for tag in found.tags] == [("mlflow.data.context", "tuning")]


def test_points_are_written_together_and_none_is_lost(mlflow_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "MAX_BUFFERED_POINTS", 4)
    monkeypatch.setattr(recording, "MAX_BUFFERED_SECONDS", 3600.0)
    with mlflow.start_run() as run:
        run_id = run.info.run_id
        recorder = MlflowRecorder()
        written = []
        for step in range(6):
            recorder.metric("loss", 0.5, step=step)
            written.append(len(history(run_id, "loss")))
        assert written == [0, 0, 0, 4, 4, 4]
        with recorder.progress("tune", 1) as bar:
            bar.advance()
        assert len(history(run_id, "loss")) == 6
        recorder.metric("loss", 0.5, step=6)
        recorder.table("t.json", {"a": [1]})
        assert len(history(run_id, "loss")) == 7
        recorder.metric("loss", 0.5, step=7)
        monkeypatch.setattr(recording, "MAX_BUFFERED_SECONDS", 0.0)
        recorder.metric("loss", 0.5, step=8)
        assert len(history(run_id, "loss")) == 9
        monkeypatch.setattr(recording, "MAX_BUFFERED_SECONDS", 3600.0)
        recorder.metric("loss", 0.5, step=9)
        del recorder
        assert [step for step, _ in history(run_id, "loss")] == list(range(10))


def test_points_that_could_not_be_written_are_kept() -> None:
    class Broken:
        def log_batch(self, run_id: str, metrics: list[Any]) -> None:
            raise OSError("the server is away")

    points: list[Any] = [1, 2]
    with pytest.raises(OSError, match="away"):
        recording._write(Broken(), "run", points)  # type: ignore[arg-type]
    assert points == [1, 2]


def test_figure_table_and_artifacts(mlflow_store: str, tmp_path: Path) -> None:
    folder = tmp_path / "bank"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    figure = Figure()
    figure.subplots().plot([1, 2], [3, 4])
    with mlflow.start_run() as run:
        run_id = run.info.run_id
        recorder = MlflowRecorder()
        recorder.figure("figures/curve.png", figure)
        recorder.figure("figures/curve.svg", figure)
        recorder.table("prompts.json", {"task": ("mood", "topic"), "score": (0.5, None)})
        recorder.table("empty.json", {"task": [], "score": []})
        recorder.artifact(tmp_path / "b.txt")
        recorder.artifact(folder)
        with pytest.raises(ArtifactError, match="there is no such file or folder"):
            recorder.artifact(tmp_path / "missing")
        with pytest.raises(AssertionError, match="differ in length"):
            recorder.table("bad.json", {"a": [1], "b": [1, 2]})
    assert artifacts(run_id) == ["b.txt", "bank", "empty.json", "figures", "prompts.json"]
    assert artifacts(run_id, "figures") == ["figures/curve.png", "figures/curve.svg"]
    assert artifacts(run_id, "bank/inner") == ["bank/inner/a.txt"]
    table = read_table(run_id, "prompts.json")
    assert table["columns"] == ["task", "score"] and table["data"] == [["mood", 0.5], ["topic", None]]
    assert read_table(run_id, "empty.json")["data"] == []
