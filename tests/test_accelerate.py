"""Training a translator on several processes: the numbers of one process, one run, and no end that leaves one waiting.

The processes are real ones: `accelerate launch` starts them, gloo adds up their gradients.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import mlflow
import psutil
import pytest
import torch
from safetensors.torch import load_file
from tiny_llm import HIDDEN_SIZE, save_tiny_model

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.base_models.loading import load_base_model
from softprompt_registry.dod.store import DodStore
from softprompt_registry.dod.task import Pair, Task
from softprompt_registry.errors import ArtifactError, ConfigError
from softprompt_registry.processes import ALONE, Processes, launched_processes
from softprompt_registry.recording import NullRecorder
from softprompt_registry.registry import conventions
from softprompt_registry.soft_prompts.bank import SoftPromptBank
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt, SoftPromptRecord
from softprompt_registry.translators.training import TranslatorConfig, train_translator
from softprompt_registry.translators.translator import read_record

LABELS = {
    "moods": ("joy", "fear", "hope"),
    "sides": ("up", "down"),
    "paint": ("red", "blue", "green"),
    "rooms": ("hall", "attic"),
    "sizes": ("big", "small"),
    "meals": ("lunch", "dinner"),
    "pets": ("cat", "dog"),
    "tools": ("saw", "hammer"),
    "ages": ("young", "old"),
}
TASKS = {name: Task(name, "classification", tuple(Pair(x, x) for x in own), own) for name, own in LABELS.items()}
CONFIG = TranslatorConfig(
    lora_dropout=0.0,
    learning_rate=3e-3,
    epochs=30,
    batch_size=3,
    noise=0.2,
    validation_share=0.2,
    keep_best=True,
)
"""Seven tasks to train on, two held out: of the last batch, one row, and of each other a share for each of two processes."""
ROUNDING = 5e-6
"""Between weights of some tenths, after 30 epochs of 3 steps in float32; the differences found are below 7e-7."""


@dataclass(frozen=True)
class Inputs:
    """DoD, bank and base model in one folder, with the translator that one process makes of them undisturbed."""

    folder: Path
    bank: SoftPromptBank
    of_one: Path

    @property
    def base(self) -> BaseModel:
        """A new one each time, as each process has."""
        return load_base_model(str(self.folder / "tiny"), device="cpu")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("inputs")
    base = load_base_model(str(save_tiny_model(folder / "tiny")), device="cpu")
    with DodStore.create(folder / "dod.sqlite") as store:
        for task in TASKS.values():
            store.add_task(task)
        name, digest = store.name, store.digest
    prompts = []
    for seed, task_name in enumerate(LABELS):
        numbers = torch.randn(4, HIDDEN_SIZE, generator=torch.Generator().manual_seed(seed))
        record = SoftPromptRecord(task_name, "classification", base.ref, "{x}", dod_name=name, dod_digest=digest)
        prompts.append(SoftPrompt(0.5 * numbers, None, record))
    bank = SoftPromptBank.save(prompts, folder / "bank")
    train_translator(base, bank, TASKS, CONFIG, folder / "of_one")
    return Inputs(folder, bank, folder / "of_one")


def difference(left: Path, right: Path) -> float:
    """The largest between the weights of two adapters."""
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (left, right))
    assert list(one) == list(other)
    return max(float((one[key] - other[key]).abs().max()) for key in one)


def assert_same_translator(left: Path, right: Path) -> None:
    assert difference(left, right) < ROUNDING
    one, other = (read_record(folder).training for folder in (left, right))
    for losses in ("train_losses", "validation_losses"):
        assert one.pop(losses) == pytest.approx(other.pop(losses), rel=1e-4)
    assert one == other


@contextmanager
def launch(inputs: Inputs, config: TranslatorConfig, out: str) -> Iterator[subprocess.Popen[str]]:
    """`train-translator` on two processes; none of them outlives the block."""
    settings = [f"{key}={json.dumps(value)}" for key, value in asdict(config).items()]
    process = subprocess.Popen(
        [
            *(str(Path(sys.executable).with_name("accelerate")), "launch", "--multi_gpu", "--num_processes", "2"),
            *("--main_process_port", "0", "-m", "softprompt_registry.cli", "train-translator", "--json"),
            *("--dod", "dod.sqlite", "--bank", "bank", "--base-model", "tiny", "--out", out),
            *(word for setting in settings for word in ("-s", setting)),
        ],
        cwd=inputs.folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        kill_all(process)


def kill_all(process: subprocess.Popen[str]) -> None:
    """SIGKILL for the launcher and all that it started, as when a machine goes down."""
    if process.poll() is None:
        launcher = psutil.Process(process.pid)
        for each in [launcher, *launcher.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                each.kill()
    process.communicate(timeout=30)


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that train, the main one first."""
    children = [child for child in psutil.Process(process.pid).children() if "RANK" in child.environ()]
    return sorted(children, key=lambda child: child.environ()["RANK"])


def wait_for_epoch(process: subprocess.Popen[str], work: Path, epoch: int) -> None:
    """Until the checkpoint is of that epoch or a later one."""
    for _ in range(10_000):
        if epoch_of(work) >= epoch:
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    pytest.fail(f"no checkpoint of epoch {epoch}: {os.listdir(work)}")


def epoch_of(work: Path) -> int:
    state = work / "state.json"
    return int(json.loads(state.read_text())["epoch"]) if state.exists() else 0


# Two processes --------------------------------------------------------------------------------------------------------


def test_two_processes_make_the_translator_of_one_and_one_run(inputs: Inputs, mlflow_store: str) -> None:
    with launch(inputs, CONFIG, "of_two") as process:
        stdout, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr
    assert_same_translator(inputs.folder / "of_two", inputs.of_one)
    assert not (inputs.folder / "of_two.training").exists()
    found = json.loads(stdout)  # one process prints
    assert stderr.count("train translator 30/30") == 1

    runs = mlflow.MlflowClient().search_runs([mlflow.get_experiment_by_name("test").experiment_id])
    assert [(run.info.run_id, run.info.status) for run in runs] == [(found["run_id"], "FINISHED")]
    losses = found["translator"]["training"]["train_losses"]
    history = mlflow.MlflowClient().get_metric_history(found["run_id"], "train_loss")
    assert [(point.step, point.value) for point in history] == list(enumerate(losses, start=1))
    models = mlflow.search_logged_models(output_format="list")
    assert sorted(model.model_type for model in models) == [conventions.BASE_MODEL, conventions.TRANSLATOR]


def test_a_training_goes_on_with_another_number_of_processes_however_it_ended(
    inputs: Inputs, mlflow_store: str
) -> None:
    out, work = inputs.folder / "resumed", inputs.folder / "resumed.training"
    with pytest.raises(ConnectionError):
        train_translator(inputs.base, inputs.bank, TASKS, CONFIG, out, recorder=FailingRecorder(4))
    assert epoch_of(work) == 3
    # Two go on with the checkpoint of one, and the machine goes down.
    with launch(inputs, CONFIG, "resumed") as process:
        wait_for_epoch(process, work, 5)
    # Two go on with the checkpoint of two, and one of them is killed: the other does not wait for it.
    begun = epoch_of(work)
    with launch(inputs, CONFIG, "resumed") as process:
        wait_for_epoch(process, work, begun + 2)
        workers(process)[1].kill()
        process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    assert begun < epoch_of(work) < CONFIG.epochs and not out.exists()
    # One goes on with the checkpoint of two.
    train_translator(inputs.base, inputs.bank, TASKS, CONFIG, out)
    assert_same_translator(out, inputs.of_one)


class FailingRecorder(NullRecorder):
    """The store behind the recorder goes away at an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def metric(self, name: str, value: float, step: int = 0) -> None:
        if step == self.epoch:
            raise ConnectionError("the tracking server is gone")


def test_an_error_is_said_once_and_ends_all(inputs: Inputs, mlflow_store: str) -> None:
    train_translator(inputs.base, inputs.bank, TASKS, replace(CONFIG, epochs=1), inputs.folder / "taken")
    with launch(inputs, replace(CONFIG, epochs=2), "taken") as process:
        stdout, stderr = process.communicate(timeout=200)
    assert process.returncode == 1 and stdout == ""
    assert stderr.count("Error: writing a translator to 'taken': one made from other inputs or settings is there") == 1
    # What else is said is the launcher's summary.
    assert stderr.count("Error: ") == 1 + stderr.count("ChildFailedError: ")


# One process ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2])
def test_micro_batches_add_up_to_the_whole_batch(inputs: Inputs, size: int) -> None:
    out = inputs.folder / f"micro-{size}"
    train_translator(inputs.base, inputs.bank, TASKS, replace(CONFIG, micro_batch_size=size), out)
    assert 0 < difference(out, inputs.of_one) < ROUNDING
    assert read_record(out).training["micro_batch_size"] == size
    # How a step is divided makes no other translator: this is a finished one.
    again = train_translator(inputs.base, inputs.bank, TASKS, CONFIG, out)
    assert again.record.training["micro_batch_size"] == size


def test_dropout_does_not_move_the_noise_of_micro_batches(inputs: Inputs) -> None:
    """With a rate so small that it drops nothing, dropout still draws numbers."""
    almost, out = replace(CONFIG, lora_dropout=1e-7, epochs=3), inputs.folder
    train_translator(inputs.base, inputs.bank, TASKS, replace(almost, micro_batch_size=1), out / "drawn")
    train_translator(inputs.base, inputs.bank, TASKS, replace(almost, lora_dropout=0.0), out / "none")
    assert difference(out / "drawn", out / "none") < ROUNDING


def test_a_micro_batch_holds_at_least_one() -> None:
    with pytest.raises(ConfigError, match="micro_batch_size is 0, expected above 0"):
        TranslatorConfig(micro_batch_size=0)


# Who does what --------------------------------------------------------------------------------------------------------


def test_every_row_is_in_one_share() -> None:
    for count in (1, 2, 3, 5):
        for rows in (0, 1, 2, 7, 16):
            shares = [Processes(count, index).share_of(rows) for index in range(count)]
            assert [row for share in shares for row in share] == list(range(rows))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_needs_no_accelerate() -> None:
    code = (
        "import sys\nfrom softprompt_registry.processes import ALONE, launched_processes\n"
        "with launched_processes() as processes:\n"
        "    assert processes == ALONE and processes.is_main and processes.main_says(3) == 3\n"
        "    assert processes.totals(1.5, 2) == [1.5, 2]\n"
        "assert 'accelerate' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_an_error_of_one_process_is_raised_at_once() -> None:
    with pytest.raises(ArtifactError, match="mine"), launched_processes() as processes:
        assert processes is ALONE
        raise ArtifactError("mine")
