"""Whether MLflow's store can be used, found out before work that takes long; and its failures in one sentence."""

from __future__ import annotations

import contextlib
import math
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit
from urllib.request import url2pathname

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from requests import RequestException
from sqlalchemy.exc import SQLAlchemyError

from mlflow_plugins._compat import active_experiment_id, connect_to_database, knows_schema
from softprompt_registry.errors import ConfigError, RegistryError
from softprompt_registry.registry.lookup import find_run, get_or_none

TIMEOUT_VARIABLE = "SOFTPROMPT_STORE_TIMEOUT_S"
DEFAULT_TIMEOUT_S = 15.0
STORE_FAILURES = (MlflowException, SQLAlchemyError, RequestException)
"""What MLflow raises when its store fails or refuses."""

_MAX_CHARACTERS = 300
_WORDS = {"MLFLOW_TRACKING_URI": "tracking store", "MLFLOW_REGISTRY_URI": "model registry"}
_DATABASES = ("postgresql", "mysql", "sqlite", "mssql")
_SCHEMA = re.compile(r"out-of-date database schema \(found version (\w+)|Can't locate revision identified by '(\w+)'")
_CHECK_PATH = "Check the path, and that file and folder may be read and written."
_HINTS = {
    r"xperiment name: |'name' exceeds": "Correct MLFLOW_EXPERIMENT_NAME.",
    r"MLFLOW_EXPERIMENT_": "`mlflow experiments search` lists those there are.",
    r"MLFLOW_ALLOW_FILE_STORE": "Set MLFLOW_TRACKING_URI to a database such as sqlite:///mlflow.db (`mlflow "
    "migrate-filestore` moves what is there), or MLFLOW_ALLOW_FILE_STORE=true.",
    r"database is locked": "Another process writes to it; start again when that has ended.",
    r"\[Errno (2|13|17|20|28|30)\]": _CHECK_PATH,
    r"logged-models\S* failed with error code 404": "This server keeps no LoggedModels; use one of MLflow 3.",
    r"No module named": "Install this driver in the same environment.",
    r"error code 40[13]|UNAUTHENTICATED|PERMISSION_DENIED": "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
    "MLFLOW_TRACKING_TOKEN, to those of an account that may use it.",
    r"too many 5\d\d|error code 5\d\d": "Read the server's log, and start again when it answers.",
    r"Databricks credential|cannot configure default credentials": "Set DATABRICKS_HOST and DATABRICKS_TOKEN, or "
    "MLFLOW_TRACKING_URI to another store.",
}
"""Pattern → what to do about a failure whose text matches; the first that does."""

ResultT = TypeVar("ResultT")


def require_store(*, for_run: bool = True) -> None:
    """Check that MLflow's tracking store and model registry answer and, for a stage, that a run can be started.

    It takes some milliseconds, or at most about `SOFTPROMPT_STORE_TIMEOUT_S` (15 s by default): MLflow itself waits over four
    minutes for a server that does not answer. Within an active run nothing is checked: there that patience is wanted.

    Args:
        for_run: also check the experiment, or the run of MLFLOW_RUN_ID, and that its artifacts can be written where they
            lie on this disk. Not needed for what only reads.

    Raises:
        RegistryError: names the store, what was found, and what to do.
    """
    if mlflow.active_run() is not None:
        return
    tracking, registry = mlflow.get_tracking_uri(), mlflow.get_registry_uri()

    def ask_tracking_store() -> None:
        client = MlflowClient()
        client.search_experiments(max_results=1)
        if for_run:
            # Servers of MLflow 2 and some hosted ones know runs but no LoggedModels, which are logged when the work is done.
            client.search_logged_models([_require_place_for_run()], max_results=1)

    def ask_registry() -> None:
        MlflowClient().search_registered_models(max_results=1)

    _probe("MLFLOW_TRACKING_URI", tracking, ask_tracking_store, write=for_run)
    if registry != tracking:
        _probe("MLFLOW_REGISTRY_URI", registry, ask_registry, write=False)


@contextlib.contextmanager
def open_run(name: str, tags: Mapping[str, str] | None = None) -> Iterator[str]:
    """An MLflow run in a store that was checked, below the active run if there is one; yields its id.

    An error within the block ends the run as failed, quickly, and comes through though the store fails, too.
    """
    require_store()
    nested = mlflow.active_run() is not None
    with mlflow.start_run(run_name=name, nested=nested, tags=dict(tags or {})) as run:
        try:
            yield str(run.info.run_id)
        except BaseException:
            with contextlib.suppress(*STORE_FAILURES), quick_requests():
                mlflow.end_run("FAILED")
            raise


@contextlib.contextmanager
def quick_requests() -> Iterator[None]:
    """Within the block MLflow's requests end after `SOFTPROMPT_STORE_TIMEOUT_S`, and none is tried again."""
    quick = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(math.ceil(timeout_s())),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_DATABRICKS_ENDPOINT_HTTP_RETRY_TIMEOUT": str(math.ceil(timeout_s())),
    }
    before = {name: os.environ.get(name) for name in quick}
    os.environ.update(quick)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def timeout_s() -> float:
    """How long the check of the store may wait for an answer."""
    text = os.environ.get(TIMEOUT_VARIABLE) or str(DEFAULT_TIMEOUT_S)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < threading.TIMEOUT_MAX:
        raise ConfigError(
            f"reading {TIMEOUT_VARIABLE}: found {text!r}, expected a number of seconds above 0. Correct it or unset it."
        )
    return seconds


def without_credentials(text: str) -> str:
    """`text` without the user, the password and the query values in its URIs."""
    text = re.sub(r"(?<=://)[^\s'\"]*@", "***@", text)
    return re.sub(r"(?i)\b(\w*(?:password|passwd|pwd|token|secret)\w*=)[^&;\s'\"]+", r"\1***", text)


def in_one_line(error: BaseException) -> str:
    """What an error of MLflow says, short and without credentials; of a failed request, what its innermost cause says."""
    text = _text_of(error)
    return text if len(text) <= _MAX_CHARACTERS else text[: _MAX_CHARACTERS - 1] + "…"


def _text_of(error: BaseException) -> str:
    chain = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(inner)
    if any(isinstance(link, (RequestException, SQLAlchemyError)) for link in chain):
        error = chain[-1]  # the driver's own words, without URL and SQL
    # A response's body may be a page.
    lines = str(error).partition("Response body")[0].strip().splitlines() or [type(error).__name__]
    return without_credentials(lines[0]).rstrip(" .")


def failed_during_work(error: Exception) -> RegistryError:
    """The error to end a command with whose store failed or refused after the check."""
    return RegistryError(
        f"writing to or reading from the MLflow store {without_credentials(mlflow.get_tracking_uri())!r}: "
        f"{in_one_line(error)}. See to the store, then start the same command again: what it has finished is on the disk, "
        "and it resumes there (a DoD that is whole: with --overwrite, which asks no LLM anew)."
    )


def _probe(variable: str, uri: str, ask: Callable[[], object], *, write: bool) -> None:
    seconds = timeout_s()
    try:
        with quick_requests():
            if not urlsplit(uri).scheme.startswith(_DATABASES):
                _within(seconds, ask)
                return
            # MLflow tries ten times to connect, for a hundred seconds.
            _within(seconds, lambda: connect_to_database(uri, write=write))
            ask()  # without a limit: in an empty database MLflow makes its tables first
    except RegistryError:
        raise
    except Exception as error:  # a store may be a plugin, with drivers of its own
        text = _text_of(error)
        if "too many 429" in text:  # it is alive, and MLflow's own retries deal with it
            return
        if "timed out" in text:
            reason = f"it did not answer within {seconds:g} s"
        else:
            reason = re.split(r"(?<=[a-z)])\. (?=[A-Z])", in_one_line(error))[0]
        doing = f"using the MLflow {_WORDS[variable]} {without_credentials(uri)!r}"
        raise RegistryError(f"{doing}: {reason}. {_hint(variable, uri, text)}") from error


def _within(seconds: float, call: Callable[[], ResultT]) -> None:
    """Wait for `call` no longer than that: limits of sockets cover neither look-ups of names nor answers that drip in."""
    failures: list[Exception] = []

    def target() -> None:
        try:
            call()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError("timed out")
    if failures:
        raise failures[0]


def _hint(variable: str, uri: str, text: str) -> str:
    schema = _SCHEMA.search(text)
    if schema is not None:
        if knows_schema(schema[1] or schema[2]):
            return f"Back the database up, then run `mlflow db upgrade {without_credentials(uri)}`."
        return f"A newer MLflow than {mlflow.__version__} made it: install that version, or use another store."
    for pattern, hint in _HINTS.items():
        if re.search(pattern, text):
            return hint
    if urlsplit(uri).scheme.startswith("sqlite"):
        return _CHECK_PATH
    place = "MLflow server" if urlsplit(uri.strip()).scheme in ("http", "https") else "store"
    longer = f", or wait longer with {TIMEOUT_VARIABLE}" if "timed out" in text else ""
    return f"Check that {variable} is the address of a running {place}{longer}."


def _require_place_for_run() -> str:
    """Id of the experiment that the next run goes to, or that the run of MLFLOW_RUN_ID is in; all of it checked."""
    store = without_credentials(mlflow.get_tracking_uri())
    experiment_id: str | None
    location: str | None = None
    run_id = os.environ.get("MLFLOW_RUN_ID")
    if run_id:
        run = find_run(run_id)
        if run is None or run.info.lifecycle_stage != "active":
            restore = f", or restore the run with `mlflow runs restore --run-id {run_id}`" if run else ""
            raise RegistryError(
                f"continuing the run of MLFLOW_RUN_ID {run_id!r}: it is {'deleted' if run else 'not'} in the MLflow store "
                f"{store!r}. Unset MLFLOW_RUN_ID{restore}."
            )
        experiment_id, location = run.info.experiment_id, run.info.artifact_uri
    else:
        experiment_id = active_experiment_id()
    experiment = None if experiment_id is None else get_or_none(MlflowClient().get_experiment, experiment_id)
    if experiment is not None and experiment.experiment_id != experiment_id:  # what answered is no MLflow server
        experiment = None
    if experiment is None or experiment.lifecycle_stage != "active":
        name = repr(experiment.name) if experiment else f"with the id {experiment_id!r}"
        restore = f", or restore it with `mlflow experiments restore -x {experiment_id}`" if experiment else ""
        raise RegistryError(
            f"starting a run in the experiment {name}: it is {'deleted' if experiment else 'not'} in the MLflow store "
            f"{store!r}. Name another with MLFLOW_EXPERIMENT_NAME{restore}."
        )
    _require_writable(location or experiment.artifact_location)
    return str(experiment.experiment_id)


def _require_writable(location: str) -> None:
    parts = urlsplit(location)
    if parts.scheme not in ("", "file"):
        return
    folder = Path(url2pathname(parts.path) if parts.scheme else location).absolute()
    nearest = next(place for place in (folder, *folder.parents) if place.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise RegistryError(
            f"starting a run: its artifacts go to {str(folder)!r} on this machine, and {str(nearest)!r} is "
            f"{'a folder that cannot be written' if nearest.is_dir() else 'no folder'}. Make it writable, use an experiment "
            "with another artifact location, or let the MLflow server take artifacts (`mlflow server --serve-artifacts`)."
        )
