"""`mlflow run --backend ray` on a real Ray cluster of one node, with a real SQLite store."""

from __future__ import annotations

import functools
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")

import mlflow
from click.testing import CliRunner
from local_ray import LocalRay, local_ray
from mlflow.entities import Run
from mlflow.exceptions import ExecutionException

from mlflow_plugins import ray_backend
from mlflow_plugins.ray_backend import RayBackendConfig, RaySubmittedRun

MLPROJECT = """
name: tiny
entry_points:
  main:
    parameters:
      loss: float
      data: {type: path, default: numbers.txt}
    command: "python train.py {loss} {data}"
  fail:
    command: "echo about to fail; exit 3"
  sleep:
    command: "echo asleep; sleep 300"
  where:
    command: "echo here is $PWD; test -f MLproject"
"""
TRAIN = """
import os, pathlib, sys
import mlflow

with mlflow.start_run() as run:
    mlflow.log_metric("loss", float(sys.argv[1]))
    mlflow.log_metric("numbers", len(pathlib.Path(sys.argv[2]).read_text().split()))
    mlflow.log_metric("knows_the_key", float("OPENAI_API_KEY" in os.environ))
    mlflow.log_metric("knows_the_token", float(os.environ.get("HF_TOKEN", "").startswith("hf_")))
    mlflow.log_text("done", "note.txt")
print("trained in run", run.info.run_id)
"""
KEY = "sk-live-0123456789"
TOKEN = "hf_9876543210"


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalRay]:
    with local_ray(num_cpus=2) as ray:
        yield ray


@pytest.fixture
def project(mlflow_store: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A project that is the current folder, and a store that has one experiment, `test`."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "MLproject").write_text(MLPROJECT)
    (folder / "train.py").write_text(TRAIN)
    (folder / "numbers.txt").write_text("1 2 3")
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(folder)
    return folder


def start_mlflow_run(config: dict[str, Any], *arguments: str, **environment: str) -> subprocess.Popen[str]:
    (Path("..") / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "mlflow", "run", ".", "--backend", "ray", "--backend-config", "../config.json"]
    # A job that a shell starts in the background ignores Ctrl-C, and so would what it starts.
    heeds_ctrl_c = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(
        [*command, *arguments],
        preexec_fn=heeds_ctrl_c,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def only_run() -> Run:
    [run] = runs()
    return run


def runs() -> list[Run]:
    experiment = mlflow.get_experiment_by_name("test")
    assert experiment is not None
    return list(mlflow.MlflowClient().search_runs([experiment.experiment_id]))


def submit(config: dict[str, Any], entry_point: str = "main", **params: Any) -> RaySubmittedRun:
    """As a caller does that goes on with other work."""
    submitted = mlflow.projects.run(
        ".", entry_point, parameters=params, backend="ray", backend_config=config, synchronous=False
    )
    assert isinstance(submitted, RaySubmittedRun)
    return submitted


def everything_in(folder: Path) -> bytes:
    """The content of all files: the store and the artifacts."""
    return b"".join(file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file())


def test_a_job_logs_into_the_run_and_ends_it(cluster: LocalRay, project: Path, tmp_path: Path) -> None:
    subprocess.run(
        "git init -q . && git add . && git -c user.name=a -c user.email=a@b commit -qm a", shell=True, check=True
    )
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    config = {
        "address": cluster.address,
        "runtime_env": {"env_vars": {"HF_TOKEN": TOKEN}},
        "entrypoint_num_cpus": 1,
    }
    # A relative URI, which means another file in the folder of the job; and RAY_ADDRESS, which the config overrides.
    environment = {
        "OPENAI_API_KEY": KEY,
        "MLFLOW_TRACKING_URI": "sqlite:///../mlflow.db",
        "RAY_ADDRESS": "http://127.0.0.1:1",
    }
    process = start_mlflow_run(config, "-P", "loss=0.25", "--run-name", "first", "--env-manager", "uv", **environment)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr

    run = only_run()
    assert f"trained in run {run.info.run_id}\n" in stdout
    assert stdout.count("trained in run") == 1
    assert "the Ray backend makes no environment: --env-manager uv not used" in stderr
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "first"
    assert run.data.metrics == {"loss": 0.25, "numbers": 3, "knows_the_key": 0, "knows_the_token": 1}
    assert run.data.params == {"loss": "0.25", "data": "numbers.txt"}
    assert run.data.tags["mlflow.project.backend"] == "ray"
    assert run.data.tags["mlflow.project.entryPoint"] == "main"
    assert run.data.tags["mlflow.source.git.commit"] == commit
    assert run.data.tags["ray.job_id"] in stderr
    (tmp_path / "config.json").unlink()  # the one place where the token may be
    content = everything_in(tmp_path)
    assert run.info.run_id.encode() in content
    assert KEY.encode() not in content and TOKEN.encode() not in content


def test_a_failing_job_fails_the_command(cluster: LocalRay, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.cli import cli

    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    result = CliRunner().invoke(cli, ["run", ".", "--backend", "ray", "-e", "fail"])
    assert result.exit_code == 1
    assert "about to fail\n" in result.stdout
    assert "its command exited with 3, expected 0. The reason is in the log above." in result.stderr
    assert only_run().info.status == "FAILED"


def test_ctrl_c_stops_the_job(cluster: LocalRay, project: Path) -> None:
    process = start_mlflow_run({"address": cluster.address}, "-e", "sleep")
    assert process.stdout is not None
    for line in process.stdout:  # streams: the job is in the middle of its work
        if line == "asleep\n":
            break
    assert only_run().info.status == "RUNNING"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "interrupted: stopping Ray job" in stderr
    run = only_run()
    assert run.info.status == "KILLED"
    assert job_state(cluster, run.data.tags["ray.job_id"]) == "STOPPED"


def job_state(cluster: LocalRay, job_id: str) -> str:
    from ray.job_submission import JobSubmissionClient

    return str(JobSubmissionClient(cluster.address).get_job_info(job_id).status.value)


def test_without_upload_in_an_existing_run_and_in_the_background(
    cluster: LocalRay, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with mlflow.start_run() as existing:
        pass
    config = {
        "address": cluster.address,
        "upload": False,
        "_mlflow_local_backend_run_id": existing.info.run_id,
    }
    submitted = submit(config, "where")
    assert submitted.run_id == existing.info.run_id
    assert submitted.get_status() in ("SCHEDULED", "RUNNING")
    assert only_run().info.status == "RUNNING"
    assert submitted.wait()
    assert submitted.get_status() == only_run().info.status == "FINISHED"
    assert f"here is {project}\n" in capsys.readouterr().out
    submitted.cancel()
    assert only_run().info.status == "FINISHED"


def test_the_password_of_the_store_is_not_shown() -> None:
    # The job gets the store's URI, and Ray repeats a runtime environment that it refuses.
    said = ray_backend._without_secrets("refused 'postgresql://me:secret@host/db', key0123", RayBackendConfig())
    assert said == "refused 'postgresql://***@host/db', key0123"


def test_an_environment_that_cannot_be_made_tells_why_without_secrets(
    cluster: LocalRay, project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    environment = {"env_vars": {"HF_TOKEN": TOKEN}, "working_dir": f"file:///nowhere/{TOKEN}.zip"}
    submitted = submit({"address": cluster.address, "runtime_env": environment}, "where")
    assert not submitted.wait()
    assert only_run().info.status == "FAILED"
    stderr = capfd.readouterr().err
    assert "it failed before or beside its command" in stderr and "***" in stderr
    assert TOKEN not in stderr


def test_a_refused_submission_fails_the_run(cluster: LocalRay, project: Path) -> None:
    with pytest.raises(
        ExecutionException, match=r"submitting entry point 'where' to Ray at .*'no-such-field'.*is FAILED"
    ):
        submit({"address": cluster.address, "runtime_env": {"pip": {"no-such-field": 1}}}, "where")
    assert only_run().info.status == "FAILED"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"adress": "x"}, "reading the config of the Ray backend: unknown 'adress'; known are address, runtime_env, "),
        ({"upload": "no"}, "upload is 'no', expected true or false"),
        ({"runtime_env": {"env_vars": {"HF_TOKEN": 1}}}, "'env_vars': expected a mapping of names to texts"),
        (
            {"address": "http://127.0.0.1:1"},
            "connecting to Ray's job server at 'http://127.0.0.1:1': Failed to connect",
        ),
    ],
)
def test_what_cannot_begin_leaves_no_run(project: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ExecutionException, match=message):
        submit({"address": "http://127.0.0.1:1", **config}, "where")
    assert runs() == []


def test_without_ray(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ExecutionException, match=r"cannot be imported .* `pip install 'softprompt-registry\[ray\]'`"):
        submit({}, "where")
    assert runs() == []


def test_paths_in_an_upload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tasks").mkdir()
    monkeypatch.chdir(tmp_path)
    for inside in ("tasks", str(tmp_path / "tasks"), (tmp_path / "tasks").as_uri()):
        assert ray_backend._path_in_upload("folder", inside, tmp_path) == "tasks"
    assert ray_backend._path_in_upload("folder", "/data/tasks", tmp_path) == "/data/tasks"
    for elsewhere in ("missing", "../tasks"):
        with pytest.raises(ExecutionException, match="'folder' of type path is .* Give a path inside the project"):
            ray_backend._path_in_upload("folder", elsewhere, tmp_path)
    with pytest.raises(ExecutionException, match="which MLflow downloads to this machine.*`upload: false`"):
        ray_backend._path_in_upload("folder", "s3://bucket/tasks", tmp_path)


def test_tracking_uris_for_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert ray_backend._absolute("sqlite:///my.db?timeout=9") == f"sqlite:///{tmp_path}/my.db?timeout=9"
    assert ray_backend._absolute("./mlruns") == ray_backend._absolute("file:mlruns") == f"file://{tmp_path}/mlruns"
    for whole in ("sqlite:////data/my.db", "file:///data/mlruns", "http://user@host:5000/path", "databricks"):
        assert ray_backend._absolute(whole) == whole


def test_a_store_on_this_disk_is_not_for_a_job_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    reached = RayBackendConfig(runtime_env={"env_vars": {"MLFLOW_TRACKING_URI": "http://store:5000"}})
    ray_backend._warn_of_local_store(reached, SilentServer(), "sqlite:///my.db")
    ray_backend._warn_of_local_store(RayBackendConfig(), SilentServer(), "http://store:5000")
    assert capsys.readouterr().err == ""
    ray_backend._warn_of_local_store(RayBackendConfig(), SilentServer(), "sqlite:///my.db")
    assert "Set MLFLOW_TRACKING_URI to a tracking server." in capsys.readouterr().err


class SilentServer:
    """A job server that has gone away."""

    def get_address(self) -> str:
        return "http://head:8265"

    def get_job_info(self, job_id: str) -> Any:
        raise ConnectionError("connection refused")

    get_job_logs = stop_job = tail_job_logs = get_job_info


class BrokenStream(SilentServer):
    """A job whose log breaks off after each piece; the last comes only with the whole log."""

    def __init__(self) -> None:
        self.connections = 0

    async def tail_job_logs(self, job_id: str) -> Any:
        self.connections += 1
        for piece in ["one\n", "two\n"][: self.connections]:
            yield piece
        raise ConnectionError("connection closed")

    def get_job_info(self, job_id: str) -> Any:
        from ray.job_submission import JobStatus

        status = JobStatus.SUCCEEDED if self.connections > 2 else JobStatus.RUNNING
        return SimpleNamespace(status=status, driver_exit_code=None, message=None)

    def get_job_logs(self, job_id: str) -> str:
        return "one\ntwo\nthree 雨\n"


@pytest.fixture
def started_run(project: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(ray_backend, "POLL_S", 0.05)
    client = mlflow.MlflowClient()
    return client.create_run(client.search_experiments(filter_string="name = 'test'")[0].experiment_id)


def test_a_log_that_breaks_off_is_printed_once(started_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the terminal lacks a character of it; that made the run of a job that succeeded FAILED."""
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", terminal)
    server = BrokenStream()
    assert RaySubmittedRun(server, "job", mlflow.MlflowClient(), started_run.info.run_id).wait()
    assert server.connections > 2
    assert terminal.detach().getvalue() == b"one\ntwo\nthree \\u96e8\n"  # type: ignore[attr-defined]
    assert only_run().info.status == "FINISHED"


def test_a_server_that_goes_away_fails_the_run(
    started_run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray_backend, "LOST_AFTER_S", 0.3)
    submitted = RaySubmittedRun(SilentServer(), "job", mlflow.MlflowClient(), started_run.info.run_id)
    assert not submitted.wait()
    assert only_run().info.status == "FAILED"
    stderr = capsys.readouterr().err
    assert "no answer from the job server" in stderr and "(connection refused.) It may still run" in stderr


def test_a_job_that_cannot_be_stopped_is_said_to_go_on(started_run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    submitted = RaySubmittedRun(SilentServer(), "job", mlflow.MlflowClient(), started_run.info.run_id)
    begun = time.monotonic()
    submitted.cancel()
    assert time.monotonic() - begun < ray_backend.STOP_WITHIN_S / 2
    assert only_run().info.status == "KILLED"
    assert "It may still run: `ray job stop job --address http://head:8265`." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("by_code", "job", "in_the_end"),
    [
        ("FAILED", "FINISHED", "FAILED"),  # the code said so on purpose, and left in peace
        ("FINISHED", "FAILED", "FAILED"),
        ("FAILED", "KILLED", "KILLED"),
    ],
)
def test_the_job_knows_better_unless_it_succeeded(started_run: Run, by_code: str, job: str, in_the_end: str) -> None:
    client = mlflow.MlflowClient()
    submitted = RaySubmittedRun(SilentServer(), "job", client, started_run.info.run_id)
    submitted.cancel()
    client.set_terminated(started_run.info.run_id, by_code)
    submitted._end_run(job)
    assert only_run().info.status == in_the_end
