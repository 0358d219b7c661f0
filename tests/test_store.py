"""MLflow's store is checked before anything that takes time; what is wrong with it is one sentence without a password."""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
from pathlib import Path

import mlflow
import pytest
from click.testing import CliRunner
from faulty_store import faulty_server
from small_tasks import CONFIG, TASKS
from tiny_llm import tiny_base_model

from softprompt_registry.cli import main
from softprompt_registry.dod.store import DodStore
from softprompt_registry.errors import ConfigError, DataError, RegistryError
from softprompt_registry.registry.store import (
    TIMEOUT_VARIABLE,
    failed_during_work,
    open_run,
    require_store,
    without_credentials,
)
from softprompt_registry.soft_prompts.bank import SoftPromptBank
from softprompt_registry.stages.tuning import tune


def said(*, for_run: bool = True) -> str:
    with pytest.raises(RegistryError) as caught:
        require_store(for_run=for_run)
    message = str(caught.value)
    assert "secret" not in message and "\n" not in message and len(message) < 500
    return message


@pytest.mark.supports(
    "MLflow stores",
    "servers that refuse, reset, hang, or answer something else",
    "refused within `SOFTPROMPT_STORE_TIMEOUT_S`",
)
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("hang", "it did not answer within 0.5 s"),
        ("drip", "it did not answer within 0.5 s"),
        ("reset", "onnection"),
        ("html", "not in a valid JSON format"),
        ("json", "it is not in the MLflow store"),
        ("401", "MLFLOW_TRACKING_PASSWORD"),
        ("404", "the address of a running MLflow server"),
        ("old", "This server keeps no LoggedModels; use one of MLflow 3."),
        ("503", "too many 503 error responses"),
    ],
)
def test_a_server_that_cannot_be_used(
    fault: str, words: str, mlflow_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TIMEOUT_VARIABLE, "0.5")
    before = dict(os.environ)
    with faulty_server(fault) as server:
        uri = f"http://me:se@secret@127.0.0.1:{server.server_port}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        mlflow.set_tracking_uri(uri)
        begun = time.monotonic()
        message = said()
        assert time.monotonic() - begun < 5
    assert f"'http://***@127.0.0.1:{server.server_port}'" in message and words in message
    assert dict(os.environ) == before | {"MLFLOW_TRACKING_URI": uri}  # what later requests use is as it was


def test_a_server_that_asks_to_slow_down_is_usable(mlflow_store: str) -> None:
    with faulty_server("429") as server:
        mlflow.set_tracking_uri(f"http://127.0.0.1:{server.server_port}")
        require_store()
        assert server.requests == 1


@pytest.mark.supports("MLflow stores", "`file:` stores, missing drivers, unknown schemes", "refused, in one sentence")
@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("http://127.0.0.1:1/", "Connection refused"),
        ("http://localhost:port", "'localhost:port' is not a valid host or port"),
        ("storage://me:secret@host", "unsupported URI 'storage://***@host'"),
        ("mysql+nodriver://me:secret@host/db?password=secret", "nodriver"),
        ("file:///tmp/mlruns", "MLFLOW_ALLOW_FILE_STORE=true"),
        ("sqlite:////proc/none/mlflow.db", "file and folder may be read and written"),
        ("sqlite:////proc", "unable to open database file. Check the path"),
    ],
)
def test_a_uri_that_leads_nowhere(uri: str, words: str, mlflow_store: str) -> None:
    mlflow.set_tracking_uri(uri)
    assert words in said()


OLD = "0584bdc529eb"
"""A version of MLflow's schema from before 3.17."""


@pytest.mark.supports(
    "MLflow stores",
    "databases of another MLflow version",
    "refused, with the command that upgrades them",
)
@pytest.mark.parametrize(
    ("version", "words"), [(OLD, "run `mlflow db upgrade sqlite:///"), ("f" * 12, "A newer MLflow")]
)
def test_the_schema_of_another_mlflow(version: str, words: str, mlflow_store: str, tmp_path: Path) -> None:
    other = tmp_path / "other.db"  # a store that MLflow has open stays open
    shutil.copyfile(tmp_path / "mlflow.db", other)
    with sqlite3.connect(other) as database:
        database.execute("UPDATE alembic_version SET version_num = ?", (version,))
    database.close()
    mlflow.set_tracking_uri(f"sqlite:///{other}")
    message = said()
    assert version in message and words in message


def test_a_database_that_another_process_writes(mlflow_store: str, tmp_path: Path) -> None:
    database = sqlite3.connect(tmp_path / "mlflow.db")
    database.execute("BEGIN IMMEDIATE")
    mlflow.set_tracking_uri(f"{mlflow_store}?timeout=0.2")
    require_store(for_run=False)  # reading needs no lock
    assert "database is locked" in said()
    database.rollback()
    database.close()
    require_store()


@pytest.mark.supports("MLflow stores", "deleted or missing experiments and runs", "refused, in one sentence")
def test_an_experiment_or_run_that_is_not_there(mlflow_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = mlflow.MlflowClient()
    experiment_id = client.get_experiment_by_name("test").experiment_id
    run_id = client.create_run(experiment_id).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    require_store()
    client.delete_run(run_id)
    assert f"`mlflow runs restore --run-id {run_id}`" in said()
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    assert "it is not in the MLflow store" in said()
    monkeypatch.delenv("MLFLOW_RUN_ID")
    client.delete_experiment(experiment_id)
    message = said()
    assert "experiment 'test': it is deleted" in message
    assert f"`mlflow experiments restore -x {experiment_id}`" in message
    require_store(for_run=False)


def test_artifacts_that_could_not_be_written(mlflow_store: str, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    experiment_id = mlflow.create_experiment("elsewhere", artifact_location=(tmp_path / "taken" / "below").as_uri())
    mlflow.set_experiment(experiment_id=experiment_id)
    assert f"{str(tmp_path / 'taken')!r} is no folder" in said()


def test_the_registry_is_checked_too(mlflow_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "http://me:secret@127.0.0.1:1")
    assert "model registry 'http://***@127.0.0.1:1': " in said(for_run=False)


@pytest.mark.parametrize("text", ["soon", "0", "nan", "1e30"])
def test_a_timeout_that_is_none(text: str, mlflow_store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TIMEOUT_VARIABLE, text)
    with pytest.raises(ConfigError, match=f"{TIMEOUT_VARIABLE}: found {text!r}"):
        require_store()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:pa/ss@wo:rd@host:5432/db?sslmode=require", "postgresql://***@host:5432/db?sslmode=require"),
        ("at http://me:pw@a/x and http://b/y", "at http://***@a/x and http://b/y"),
        ("mssql+pyodbc:///?UID=sa;PWD=pw;Trusted=no", "mssql+pyodbc:///?UID=sa;PWD=***;Trusted=no"),
        ("models:/name@champion of http://host/", "models:/name@champion of http://host/"),
    ],
)
def test_credentials_are_not_shown(text: str, shown: str) -> None:
    assert without_credentials(text) == shown


NOWHERE = {
    "build-dod files": "none --out d.sqlite",
    "build-dod classification": "--out d.sqlite --engine transformers --model none",
    "build-dod general": "none --out d.sqlite --base-model none",
    "build-dod inspect": "none --out d.sqlite",
    "build-dod ood": "--out d.sqlite --reviews none",
    "audit-dod": "none --base-model none",
    "paraphrase-dod": "none --out d.sqlite --base-model none",
    "tune": "--dod none --out bank --base-model none",
    "train-translator": "--dod none --bank none --out out",
    "verbalize": "models:/none@champion --translator none",
    "inspect-grid": "--dod none --bank none --out out",
    "evaluate": "--dod none --bank none --translator none",
    "reproduce": "none",
    "study": "dod-size --dod none --bank none --out out",
    "portability": "none --dod none --target none --dry-run",
    "publish": "none --all",
    "register": "models:/m-none --name none",
    "promote": "none",
    "list": "",
    "lineage": "models:/none@champion",
    "export-peft": "models:/none@champion --out out",
    "demo": "--out out",
}
"""Arguments of which each leads to an error of its own once the store is there."""
WITHOUT_STORE = {"import-peft"}


def test_every_command_is_in_the_list() -> None:
    assert {name.split()[0] for name in NOWHERE} | WITHOUT_STORE == set(main.commands)


@pytest.mark.parametrize("command", NOWHERE)
def test_each_command_checks_the_store_first(command: str, mlflow_store: str, tmp_path: Path) -> None:
    mlflow.set_tracking_uri("http://me:secret@127.0.0.1:1")
    result = CliRunner().invoke(main, [*command.split(), *NOWHERE[command].split()])
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith("Error: using the MLflow tracking store 'http://***@127.0.0.1:1': ")
    assert result.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlflow.db"]  # nothing was begun


def broken(path: Path, table: str, when: str = "INSERT") -> None:
    """Make a real store fail as one with a full disk does."""
    with sqlite3.connect(path) as database:
        database.execute(
            f"CREATE TRIGGER broken_{table} BEFORE {when} ON {table} BEGIN SELECT RAISE(ABORT, 'disk is full'); END"
        )
    database.close()


def mended(path: Path, table: str) -> None:
    with sqlite3.connect(path) as database:
        database.execute(f"DROP TRIGGER broken_{table}")
    database.close()


@pytest.mark.supports(
    "MLflow stores",
    "a store that fails in the middle of a stage",
    "finished work stays and is logged by the next start",
)
def test_a_store_that_fails_after_the_work_loses_none_of_it(mlflow_store: str, tmp_path: Path) -> None:
    base_model, dod, out = tiny_base_model(), tmp_path / "tasks.sqlite", tmp_path / "bank"
    with DodStore.create(dod) as store:
        for task in TASKS:
            store.add_task(task)
    broken(tmp_path / "mlflow.db", "metrics")
    with pytest.raises(mlflow.MlflowException, match="disk is full") as caught:
        tune(base_model, dod, CONFIG, out)
    message = str(failed_during_work(caught.value))
    assert "disk is full. See to the store" in message and "\n" not in message
    first = SoftPromptBank(out)
    written = {record["task"]: record["tuning"] for record in first.records()}
    assert sorted(written) == sorted(task.name for task in TASKS)
    runs = mlflow.search_runs(output_format="list")
    assert [run.info.status for run in runs] == ["FAILED"]

    mended(tmp_path / "mlflow.db", "metrics")
    done = tune(base_model, dod, CONFIG, out)
    assert {record["task"]: record["tuning"] for record in SoftPromptBank(out).records()} == written  # times, too
    assert mlflow.get_logged_model(done.model_id).status == "READY"


def test_the_first_error_comes_through_a_store_that_fails_too(mlflow_store: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the cause"), open_run("work"):
        broken(tmp_path / "mlflow.db", "runs", "UPDATE")
        raise DataError("the cause")
    assert mlflow.active_run() is None


def test_a_failure_during_a_command_is_one_sentence(mlflow_store: str, tmp_path: Path) -> None:
    broken(tmp_path / "mlflow.db", "runs")
    result = CliRunner().invoke(main, ["build-dod", "files", str(tmp_path), "--out", "d.sqlite"])
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("Error: writing to or reading from the MLflow store 'sqlite:///")
    assert "disk is full" in result.stderr
