"""Fixtures for tests that need a real MLflow store or a base model on the disk."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from llm_server import LlmServer
    from portable_models import PortableModel

# Read by the libraries when they are imported: tests ask no server for anything.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"


_SLOW_PARTS = re.compile(
    r"\b(torch|tiny_\w+|small_decoders|portable_models|logged_models|shared_folder|mlflow_store|llm_server|writing_llm|"
    r"subprocess|multiprocessing|ray|local_ray|vllm|browser\w*|html_page|packaged)\b"
)
"""Names in a test file that say that its tests load a model, or start a process, a server, a browser or a store."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick", action="store_true", help="Only files that load no model and start nothing (make quick)."
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if config.getoption("--quick") and collection_path.name.startswith("test_"):
        return bool(_SLOW_PARTS.search(collection_path.read_text())) or None
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("vllm") is None:
        for item in items:
            if item.get_closest_marker("vllm"):
                item.add_marker(pytest.mark.skip(reason="vLLM has an environment of its own: make test-vllm"))


@pytest.fixture(scope="session")
def _empty_mlflow_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite store with all of MLflow's tables; making them takes seconds, copying the file does not."""
    import mlflow

    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    mlflow.MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def mlflow_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, _empty_mlflow_database: Path) -> Iterator[str]:
    """A real, empty tracking store and registry with a fresh experiment; yields the tracking URI.

    Database, artifacts and the current folder all lie below `tmp_path`.
    """
    with _store_in(tmp_path, monkeypatch, _empty_mlflow_database) as uri:
        yield uri


@pytest.fixture(scope="module")
def shared_folder(
    tmp_path_factory: pytest.TempPathFactory, _empty_mlflow_database: Path, _tiny_folder: Path
) -> Iterator[Path]:
    """The same for all tests of a module, with the tiny base model; yields the current folder. Not beside `mlflow_store`."""
    folder = tmp_path_factory.mktemp("shared")
    with pytest.MonkeyPatch.context() as patch, _store_in(folder, patch, _empty_mlflow_database):
        patch.setenv("SOFTPROMPT_BASE_MODEL", str(_tiny_folder))
        yield folder


@contextlib.contextmanager
def _store_in(folder: Path, patch: pytest.MonkeyPatch, empty_database: Path) -> Iterator[str]:
    import mlflow

    database = folder / "mlflow.db"
    shutil.copyfile(empty_database, database)
    uri = f"sqlite:///{database}"
    patch.chdir(folder)
    patch.setenv("MLFLOW_TRACKING_URI", uri)
    patch.delenv("MLFLOW_RUN_ID", raising=False)
    _end_runs()
    mlflow.set_tracking_uri(uri)
    experiment_id = mlflow.create_experiment("test", artifact_location=(folder / "artifacts").as_uri())
    mlflow.set_experiment(experiment_id=experiment_id)
    yield uri
    _end_runs()
    mlflow.set_tracking_uri(None)


def _end_runs() -> None:
    import mlflow

    while mlflow.active_run() is not None:
        mlflow.end_run()


@pytest.fixture(scope="session")
def _tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_llm import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def tiny_folder(_tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny base model (seed 0) on the disk, and the place where artifacts find their base model."""
    monkeypatch.setenv("SOFTPROMPT_BASE_MODEL", str(_tiny_folder))
    return _tiny_folder


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> PortableModel:
    """A servable model on the tiny base model."""
    from portable_models import make_portable_model

    return make_portable_model(tmp_path_factory.mktemp("portable"))


@pytest.fixture
def base_in_environment(portable: PortableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The place where a served model finds its base model."""
    monkeypatch.setenv("SOFTPROMPT_BASE_MODEL", str(portable.base_folder))
    monkeypatch.delenv("SOFTPROMPT_TARGET_MODEL", raising=False)


@pytest.fixture
def llm_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[LlmServer]:
    """A server that speaks OpenAI's API, with its key in the environment."""
    from llm_server import KEY, LlmServer
    from running_server import running

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with running(LlmServer()) as server:
        yield server
