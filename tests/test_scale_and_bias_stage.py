"""`train-scale-and-bias` as a user types it: what it writes, what its run holds, and that it goes on after a stop."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
import torch
from click.testing import CliRunner, Result
from mlflow.entities import Run
from small_tasks import make_task
from tiny_llm import HIDDEN_SIZE, tiny_base_model

from softprompt_registry.cli import main
from softprompt_registry.dod.store import DodStore
from softprompt_registry.errors import DataError
from softprompt_registry.registry.artifacts import find_artifact
from softprompt_registry.soft_prompts.bank import SoftPromptBank
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt, SoftPromptRecord
from softprompt_registry.stages.training_scale_and_bias import train
from softprompt_registry.translators import scale_and_bias_training
from softprompt_registry.translators.scale_and_bias import ScaleAndBias
from softprompt_registry.translators.scale_and_bias_training import ScaleAndBiasConfig

TRAIN = {"moods": ("joy", "fear"), "sides": ("up", "down"), "paint": ("red", "blue"), "rooms": ("hall", "attic")}
SETTINGS = ("-s", "epochs=3", "-s", "validation_share=0.25", "-s", "batch_size=2")

pytestmark = pytest.mark.usefixtures("mlflow_store", "tiny_folder")


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[str, str]:
    """A DoD of four training tasks and a test task, and a bank with a soft prompt of each."""
    tasks = [*(make_task(name, labels) for name, labels in TRAIN.items()), replace(make_task("speeds"), split="test")]
    with DodStore.create(tmp_path / "tasks.sqlite") as store:
        for task in tasks:
            store.add_task(task)
        name, digest = store.name, store.digest
    generator = torch.Generator().manual_seed(0)
    ref = tiny_base_model().ref
    members = [
        SoftPrompt(
            0.5 * torch.randn(4, HIDDEN_SIZE, generator=generator),
            None,
            SoftPromptRecord(task.name, "classification", ref, "{x}", dod_name=name, dod_digest=digest),
        )
        for task in tasks
    ]
    SoftPromptBank.save(members, tmp_path / "bank")
    return str(tmp_path / "tasks.sqlite"), str(tmp_path / "bank")


def invoke(inputs: tuple[str, str], out: Path, *more: str) -> Result:
    dod, bank = inputs
    arguments = ["train-scale-and-bias", "--dod", dod, "--bank", bank, "--out", str(out), *SETTINGS, *more]
    return CliRunner().invoke(main, arguments)


def run_of(result: Result) -> Run:
    assert result.exit_code == 0, result.output + repr(result.exception)
    return mlflow.get_run(json.loads(result.stdout)["run_id"])


def curve(run: Run, name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in mlflow.MlflowClient().get_metric_history(run.info.run_id, name)]


def test_the_command_trains_on_training_tasks_and_its_run_holds_all(inputs: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "made"
    result = invoke(inputs, out, "--json")
    run = run_of(result)
    made = ScaleAndBias.load(out, tiny_base_model())
    assert made.record.train_tasks == tuple(TRAIN) and not torch.equal(made.scale, torch.ones(HIDDEN_SIZE))
    printed = json.loads(result.stdout)
    assert printed["scale_and_bias"] == made.record.to_json() and printed["folder"] == str(out)

    params = run.data.params
    assert (params["scale_and_bias.epochs"], params["scale_and_bias.validation_share"]) == ("3", "0.25")
    assert (params["bank_digest"], params["dod_digest"]) == (made.record.bank_digest, made.record.dod_digest)
    assert (run.data.tags["softprompt.stage"], run.info.run_name) == ("train-scale-and-bias", "train-scale-and-bias")
    for name, found in (("train_loss", "train_losses"), ("validation_loss", "validation_losses")):
        assert curve(run, name) == list(enumerate(made.record.training[found], start=1))
    (dataset,) = run.inputs.dataset_inputs
    assert (dataset.dataset.name, [tag.value for tag in dataset.tags]) == ("tasks", ["training"])
    assert [mlflow.get_logged_model(item.model_id).name for item in run.inputs.model_inputs] == [
        f"base-model-{made.record.base_model.fingerprint[:12]}"
    ]
    fetched = find_artifact(f"runs:/{run.info.run_id}/made", "scale and bias")
    assert torch.equal(ScaleAndBias.load(fetched.folder, tiny_base_model()).scale, made.scale)
    assert {item.path for item in mlflow.MlflowClient().list_artifacts(run.info.run_id)} == {
        "made",
        "training_curves.png",
    }
    fetched = mlflow.artifacts.download_artifacts(f"runs:/{run.info.run_id}/made", dst_path=str(tmp_path / "fetched"))
    assert ScaleAndBias.load(Path(fetched), tiny_base_model()).id == made.id


def test_without_json_it_says_how_well_it_learned(inputs: tuple[str, str], tmp_path: Path) -> None:
    result = invoke(inputs, tmp_path / "made")
    assert result.exit_code == 0, result.output
    metrics = ScaleAndBias.load(tmp_path / "made", tiny_base_model()).record.metrics
    first, second = result.stdout.splitlines()
    assert first == (
        f"trained on 4 tasks: train loss {metrics['train_loss']:.3f}, held out {metrics['validation_loss']:.3f}"
    )
    assert second.startswith(f"scale and bias {tmp_path / 'made'}  run ")


def test_settings_come_from_their_section_of_a_file(inputs: tuple[str, str], tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("translator: {epochs: 9}\nscale_and_bias: {learning_rate: 0.5, epochs: 9}\n")
    params = run_of(invoke(inputs, tmp_path / "made", "--config", str(file), "--json")).data.params
    # `-s` stands above the file.
    assert (params["scale_and_bias.learning_rate"], params["scale_and_bias.epochs"]) == ("0.5", "3")
    refused = invoke(inputs, tmp_path / "other", "-s", "lora_rank=4")
    assert refused.exit_code == 1 and "unknown 'lora_rank'; known are learning_rate" in refused.stderr


def test_a_stopped_training_goes_on_in_a_new_run_with_the_whole_curve(
    inputs: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = scale_and_bias_training.record_epoch

    def stopped(recorder: object, epoch: int, *losses: float) -> None:
        if epoch == 2:
            raise KeyboardInterrupt
        real(recorder, epoch, *losses)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(scale_and_bias_training, "record_epoch", stopped)
        assert invoke(inputs, tmp_path / "made", "--json").exit_code != 0
    assert not (tmp_path / "made").exists() and (tmp_path / "made.training").is_dir()
    resumed = run_of(invoke(inputs, tmp_path / "made", "--json"))
    undisturbed = run_of(invoke(inputs, tmp_path / "undisturbed", "--json"))
    assert [step for step, _ in curve(resumed, "train_loss")] == [1, 2, 3]
    assert curve(resumed, "train_loss") == curve(undisturbed, "train_loss")
    assert resumed.data.params["artifact_digest"] == undisturbed.data.params["artifact_digest"]
    # What is finished is taken as it is, with its curve once more.
    again = run_of(invoke(inputs, tmp_path / "made", "--json"))
    assert curve(again, "train_loss") == curve(resumed, "train_loss")
    other = invoke(inputs, tmp_path / "made", "-s", "seed=1")
    assert other.exit_code == 1 and "made from other inputs or settings" in other.stderr


def test_a_bank_of_another_dod_is_refused(inputs: tuple[str, str], tmp_path: Path) -> None:
    with DodStore.create(tmp_path / "others.sqlite") as store:
        store.add_task(make_task("moods"))
    with pytest.raises(DataError, match="using bank 'bank' with DoD 'others'"):
        train(tiny_base_model(), inputs[1], tmp_path / "others.sqlite", ScaleAndBiasConfig(), tmp_path / "made")
