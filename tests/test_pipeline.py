"""The whole chain on the sample DoD with the demo's settings: on a tiny Llama, and as `make demo` runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlflow
import pytest
from click.testing import CliRunner
from mlflow import MlflowClient

from softprompt_registry.cli import main
from softprompt_registry.registry import conventions

QUICK = [
    *("-s", "tuning.max_train_pairs=4", "-s", "tuning.max_test_pairs=2", "-s", "tuning.epochs=2"),
    *("-s", "translator.epochs=3", "-s", "policy.minimum={}", "-s", "evaluation.abstention.num_tasks=5"),
]


@pytest.fixture
def demo_result(mlflow_store: Any, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("SOFTPROMPT_BASE_MODEL", str(tiny_folder))
    result = CliRunner().invoke(main, ["demo", "--out", str(tmp_path / "demo"), *QUICK, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_everything_is_visible_in_mlflow(demo_result: Any, tmp_path: Path) -> None:
    assert demo_result["refusal"] is None
    assert demo_result["served"]["task"] == "farm_animals"
    client = MlflowClient()
    parent = client.get_run(demo_result["run_id"])
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'", order_by=["start_time ASC"]
    )
    stages = {run.data.tags[conventions.STAGE_TAG]: run for run in children}
    assert list(stages) == ["tune", "train-translator", "evaluate", "register", "promote"]
    assert all(run.info.status == "FINISHED" for run in children)

    # A search leaves a run's model inputs out.
    tune = client.get_run(stages["tune"].info.run_id)
    assert tune.data.params["tuning.num_virtual_tokens"] == "8"
    assert [item.dataset.source_type for item in tune.inputs.dataset_inputs] == ["dod"]
    assert len(tune.inputs.model_inputs) == 1
    names = {item.path for item in client.list_artifacts(tune.info.run_id)}
    assert {"tuning_curves.png", "soft_prompts.json", "dod_manifest.json"} <= names

    # The curve belongs to the LoggedModel, with its dataset: the model existed before training began.
    model = mlflow.get_logged_model(tune.outputs.model_outputs[0].model_id)
    curve = [metric for metric in model.metrics if metric.key == "mean_train_loss"]
    assert [metric.step for metric in curve] == [1, 2]
    assert curve[0].dataset_name == "sample"

    evaluate = stages["evaluate"]
    assert "verbalizations.json" in {item.path for item in client.list_artifacts(evaluate.info.run_id)}
    methods = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{evaluate.info.run_id}'")
    assert {run.data.params["method"] for run in methods} == {
        *("translator", "translator+verifier", "nearest_tokens", "most_frequent_target", "all+verifier")
    }
    assert len({tuple(sorted(run.data.metrics)) for run in methods}) == 1

    base = mlflow.get_logged_model(tune.inputs.model_inputs[0].model_id)
    assert base.model_type == conventions.BASE_MODEL
    assert base.params["base_fingerprint"] == model.params["base_fingerprint"]


def test_a_second_start_takes_over_what_is_finished(demo_result: Any, tmp_path: Path) -> None:
    files = [
        tmp_path / "demo" / "bank" / "embeddings-00000.safetensors",
        tmp_path / "demo" / "translator" / "adapter_model.safetensors",
    ]
    before = [file.stat().st_mtime_ns for file in files]
    result = CliRunner().invoke(main, ["demo", "--out", str(tmp_path / "demo"), *QUICK, "--json"])
    assert result.exit_code == 0, result.output
    assert [file.stat().st_mtime_ns for file in files] == before
    again = json.loads(result.stdout)
    assert again["metrics"] == demo_result["metrics"]
    assert again["served"]["hard_prompt"] == demo_result["served"]["hard_prompt"]
