"""What we use of MLflow beyond its documented names, in one place, for whoever moves to another version of MLflow.

A project backend cannot do without: MLflow hands it a URI and leaves fetching the project, reading MLproject and opening the
run to functions in `mlflow.projects.utils`, which its own backends use. Nor can the check of the store: no documented name
tells which experiment the next run goes to, or opens a database as MLflow will, but once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import mlflow
from mlflow.entities import Run
from mlflow.projects.utils import (
    MLFLOW_LOCAL_BACKEND_RUN_ID_CONFIG,
    PROJECT_BUILD_IMAGE,
    PROJECT_DOCKER_ARGS,
    PROJECT_DOCKER_AUTH,
    PROJECT_ENV_MANAGER,
    PROJECT_STORAGE_DIR,
    PROJECT_SYNCHRONOUS,
    fetch_and_validate_project,
    get_entry_point_command,
    get_or_create_run,
    load_project,
)
from mlflow.store.db.utils import create_sqlalchemy_engine
from mlflow.tracking.fluent import _get_experiment_id
from sqlalchemy.engine import make_url

RUN_ID = MLFLOW_LOCAL_BACKEND_RUN_ID_CONFIG
ENV_MANAGER = PROJECT_ENV_MANAGER
DOCKER_ARGS = PROJECT_DOCKER_ARGS
STORAGE_DIR = PROJECT_STORAGE_DIR
BACKEND_CONFIG_KEYS = frozenset(
    {RUN_ID, ENV_MANAGER, DOCKER_ARGS, STORAGE_DIR, PROJECT_SYNCHRONOUS, PROJECT_BUILD_IMAGE, PROJECT_DOCKER_AUTH}
)
"""What MLflow itself puts into a backend config."""


class ProjectEntryPoint:
    """An entry point of a fetched project, its params checked.

    Raises:
        ExecutionException: there is no such project or entry point, or a param has no value.
    """

    def __init__(self, uri: str, version: str | None, name: str, params: Mapping[str, Any]) -> None:
        self.uri = uri
        self.version = version
        self.name = name
        self.params = dict(params)
        self.work_dir = Path(fetch_and_validate_project(uri, version, name, self.params))  # type: ignore[no-untyped-call]
        self._project = load_project(self.work_dir)  # type: ignore[no-untyped-call]
        self._entry_point = self._project.get_entry_point(name)

    @property
    def wants_docker(self) -> bool:
        return bool(self._project.docker_env)

    def path_params(self) -> dict[str, str]:
        """Those of type `path`, with their values, given or default."""
        declared = self._entry_point.parameters
        return {
            key: str(self.params.get(key, declared[key].default)) for key in declared if declared[key].type == "path"
        }

    def command_here(self, storage_dir: str | None) -> str:
        """The shell command for this machine: paths are absolute, and what remote ones name is downloaded."""
        return str(get_entry_point_command(self._project, self.name, self.params, storage_dir)[0])  # type: ignore[no-untyped-call]

    def command_with(self, paths: Mapping[str, str]) -> str:
        """The shell command with other values of the params of type `path`, taken as they are."""
        return str(self._entry_point.compute_command({**self.params, **paths}, None))

    def run(self, experiment_id: str, run_id: str | None) -> Run:
        """The MLflow run with that id, else a new one that has the project's tags and params."""
        run: Run = get_or_create_run(  # type: ignore[no-untyped-call]
            run_id, self.uri, experiment_id, str(self.work_dir), self.version, self.name, self.params
        )
        return run


def context_of_mlflow_run() -> click.Context | None:
    """What the command `mlflow run` was called with, where it is that which calls us.

    MLflow tells a backend `SYNCHRONOUS: False` there, as it does for a caller who does not wait.
    """
    context = click.get_current_context(silent=True)
    if context is not None and getattr(context.command.callback, "__module__", "").startswith("mlflow.cli"):
        return context
    return None


def active_experiment_id() -> str | None:
    """The experiment that the next run goes to; one named in MLFLOW_EXPERIMENT_NAME that is not there is made."""
    return _get_experiment_id()


def connect_to_database(uri: str, *, write: bool) -> None:
    """Connect once, as MLflow will; with `write`, also begin to write to SQLite, which other databases need no check of."""
    url = make_url(uri)
    on_sqlite = url.get_backend_name() == "sqlite"
    if on_sqlite and url.database and not Path(url.database).parent.exists():
        return  # MLflow makes the folder
    engine = create_sqlalchemy_engine(uri)  # type: ignore[no-untyped-call]
    try:
        with engine.connect() as connection:
            if write and on_sqlite:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
    finally:
        engine.dispose()


def knows_schema(revision: str) -> bool:
    """Whether the installed MLflow has this version of its database schema among its own."""
    versions = Path(mlflow.__file__).parent / "store" / "db_migrations" / "versions"
    return any(versions.glob(f"{revision}_*.py"))
