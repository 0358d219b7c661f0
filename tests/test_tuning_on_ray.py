"""Tuning over a real local Ray: two actors, one of them killed, into the same bank as without Ray."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from local_ray import local_ray
from small_tasks import CONFIG, TASKS, make_task
from tiny_llm import save_tiny_model

from softprompt_registry.base_models.loading import load_base_model
from softprompt_registry.dod.store import DodStore
from softprompt_registry.dod.task import Task
from softprompt_registry.errors import BaseModelError, ConfigError
from softprompt_registry.recording import NullRecorder, ProgressBar
from softprompt_registry.soft_prompts import on_ray
from softprompt_registry.soft_prompts.bank import SoftPromptBank
from softprompt_registry.soft_prompts.on_ray import RayConfig, RayEngine, _Actor, share_of_each
from softprompt_registry.soft_prompts.tuning import tune_soft_prompts

ray = pytest.importorskip("ray")

MANY = [*TASKS, *(make_task(f"more{number}", train=4 + number) for number in range(9))]


@pytest.mark.parametrize(
    ("machines", "settings", "cpus", "gpus"),
    [
        ([(8, 0)], {"workers": 3}, 2, 0),
        (
            [(8, 2)],
            {"workers": 5},
            1,
            0.3333,
        ),  # not 0.4: a GPU has room for two such, and the fifth would wait for ever
        ([(8, 1), (8, 1)], {"workers": 1}, 8, 1),  # no machine has the cluster's 16 processors and 2 GPUs
        ([(4, 0), (2, 0)], {"workers": 3}, 2, 0),
        ([(64, 0), (16, 4)], {"workers": 4}, 4, 1),  # the head node's processors are of no use without a GPU
        ([(16, 4)], {"workers": 4, "gpus_per_worker": 2}, 0, 2),  # cannot be: two of them wait for GPUs
        ([(2, 0)], {"workers": 7}, 0.25, 0),
        ([(4, 1)], {"workers": 7}, 0.5, 0.1428),  # seven times 0.1429, as Ray rounds, is more than one GPU
    ],
)
def test_what_each_actor_asks_for_is_to_be_had(
    machines: list[tuple[int, int]], settings: dict[str, Any], cpus: float, gpus: float
) -> None:
    share = share_of_each([{"CPU": c, "GPU": g} if g else {"CPU": c} for c, g in machines], RayConfig(**settings))
    assert share == {"num_cpus": cpus, "num_gpus": gpus}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with local_ray(num_cpus=2) as started:
        ray.init(address=started.gcs_address, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("model") / "tiny"))


class Telling(NullRecorder):
    """Calls back when a task is done."""

    def __init__(self, on_task: Callable[[int], None]) -> None:
        self.done = 0
        self.notes: list[str] = []
        self._on_task = on_task

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.notes.append(note)
        if steps and note != "taken from an earlier start":
            self.done += steps
            self._on_task(self.done)

    def progress(self, title: str, total: int) -> AbstractContextManager[ProgressBar]:
        return contextlib.nullcontext(self)


def actor_processes() -> list[int]:
    """Process ids of this machine's tuning actors."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "cmdline").read_bytes().startswith(b"ray::_Actor"):
                found.append(int(folder.name))
    return sorted(found)


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it has not come true in 60 s")


def assert_same(found: SoftPromptBank, expected: SoftPromptBank) -> None:
    assert found.tasks() == expected.tasks()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.embeddings, other.embeddings, rtol=1e-4, atol=1e-5)
        assert one.record.tuning["train_losses"] == pytest.approx(other.record.tuning["train_losses"], rel=1e-4)


@pytest.fixture(scope="module")
def expected(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> SoftPromptBank:
    return tune_soft_prompts(load_base_model(tiny), MANY, CONFIG, tmp_path_factory.mktemp("here") / "bank")


@pytest.mark.usefixtures("cluster")
def test_a_killed_actor_is_replaced_and_no_task_is_lost_or_doubled(
    tiny: str, expected: SoftPromptBank, tmp_path: Path
) -> None:
    killed: list[int] = []

    def kill_one(done: int) -> None:
        if done == 1:
            wait_for(lambda: len(actor_processes()) == 2)  # the other one may still be loading
            killed.append(actor_processes()[0])
            os.kill(killed[0], signal.SIGKILL)

    recorder = Telling(kill_one)
    with RayEngine(tiny, "float32", RayConfig(workers=2)) as engine:
        bank = tune_soft_prompts(engine, MANY, replace(CONFIG, slots=2), tmp_path / "bank", recorder=recorder)
    assert recorder.done == len(MANY)
    assert_same(bank, expected)
    assert engine.statistics.train_tokens > 0
    wait_for(lambda: not actor_processes())  # the actors end with the engine


@pytest.mark.usefixtures("cluster")
def test_a_stopped_driver_goes_on_where_it_was(tiny: str, expected: SoftPromptBank, tmp_path: Path) -> None:
    def stop(done: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), RayEngine(tiny, "float32", RayConfig(workers=2)) as engine:
        tune_soft_prompts(engine, MANY, CONFIG, tmp_path / "bank", recorder=Telling(stop))
    again = Telling(lambda done: None)
    with RayEngine(tiny, "float32", RayConfig(workers=1)) as engine:
        bank = tune_soft_prompts(engine, MANY, CONFIG, tmp_path / "bank", recorder=again)
    assert again.notes[0] == "taken from an earlier start" and again.done == len(MANY) - 3
    assert_same(bank, expected)


@pytest.mark.usefixtures("cluster")
def test_a_task_that_kills_its_actor_is_given_up_and_no_other(
    tiny: str, expected: SoftPromptBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Deadly(_Actor):
        def _tasks(self) -> Iterator[Task]:
            for task in super()._tasks():
                if task.name == "c":
                    os.kill(os.getpid(), signal.SIGKILL)
                yield task

    monkeypatch.setattr(on_ray, "_Actor", Deadly)
    with RayEngine(tiny, "float32", RayConfig(workers=1)) as engine:
        bank = tune_soft_prompts(engine, TASKS, CONFIG, tmp_path / "bank")
    assert bank.failures() == {"c": "the actor that tuned it was lost 3 times"}
    assert bank.tasks() == ["b", "a", "free", "d"]
    for found in bank:
        torch.testing.assert_close(
            found.embeddings, expected.member(found.record.task).embeddings, rtol=1e-4, atol=1e-5
        )


@pytest.mark.usefixtures("cluster")
def test_more_workers_than_the_cluster_holds_and_a_second_use(tiny: str, tmp_path: Path) -> None:
    """Two workers of two processors each on a machine of two: one waits for ever, the other does the work."""
    config = replace(CONFIG, epochs=1)
    with RayEngine(tiny, "float32", RayConfig(workers=2, cpus_per_worker=2.0)) as engine:
        assert len(tune_soft_prompts(engine, TASKS[:3], config, tmp_path / "bank")) == 3
        assert len(tune_soft_prompts(engine, TASKS[3:], config, tmp_path / "other")) == 2


@pytest.mark.usefixtures("cluster")
def test_what_goes_wrong_in_an_actor_is_told_as_it_is(tmp_path: Path) -> None:
    with (
        RayEngine(str(tmp_path / "nothing"), "float32", RayConfig()) as engine,
        pytest.raises(BaseModelError, match="nothing"),
    ):
        tune_soft_prompts(engine, TASKS, CONFIG, tmp_path / "bank")


@pytest.mark.usefixtures("cluster")
def test_settings_that_the_cluster_cannot_meet() -> None:
    with pytest.raises(ConfigError, match="2 workers with 1.0 GPUs each need 2.0, the cluster has 0"):
        RayEngine("tiny", "float32", RayConfig(workers=2, gpus_per_worker=1.0))
    with pytest.raises(ConfigError, match="workers is 0, expected above 0"):
        RayConfig(workers=0)


def test_the_command(tiny: str, tmp_path: Path) -> None:
    """In a process of its own, which starts a Ray of its own and ends it."""
    with DodStore.create(tmp_path / "dod.sqlite") as store:
        for task in TASKS:
            store.add_task(task)
    settings = [
        f"--set={key}={getattr(CONFIG, key)}" for key in ("num_virtual_tokens", "epochs", "batch_size", "slots")
    ]
    command = [sys.executable, "-m", "softprompt_registry.cli", "tune", "--dod", "dod.sqlite", "--out", "bank"]
    command += ["--base-model", tiny, "--engine", "ray", "--workers", "2", "--log-each", "--json", *settings]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "RAY_"))}
    environment["MLFLOW_TRACKING_URI"] = f"sqlite:///{tmp_path}/mlflow.db"
    environment["RAY_AUTH_MODE"] = "disabled"  # else Ray leaves a token in the home folder
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert sorted(told["soft_prompts"]["task"]) == sorted(task.name for task in TASKS)
    assert len(SoftPromptBank(tmp_path / "bank")) == len(TASKS)
