"""`mlflow run --backend ray`: an entry point of an MLproject as a job of a Ray cluster.

    mlflow run . --backend ray --backend-config '{"address": "http://head-node:8265"}' -e tune -P dod=… -P out=…

The job's log appears on stdout as it is written, and the MLflow run ends as the job does: FINISHED, FAILED, or KILLED when it
was stopped, by Ctrl-C here or by anyone there. `mlflow run` stays until then, and its exit code is not 0 unless the job
succeeded. `mlflow.projects.run(…, synchronous=False)` returns at once; the process then follows the job in a thread and does
not end before it.

The job runs with the cluster's Python, in which the project's requirements must be installed or named as `pip` in
`runtime_env`. It gets MLFLOW_TRACKING_URI, MLFLOW_RUN_ID and MLFLOW_EXPERIMENT_ID and no other variable of this process: a
key that it needs is set on the cluster, or in `env_vars` of `runtime_env`, which are never written to MLflow (Ray keeps them
with the job, for whoever can reach its dashboard).
"""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname
from uuid import uuid4

import click
from mlflow import MlflowClient
from mlflow.entities import Run, RunStatus
from mlflow.exceptions import ExecutionException
from mlflow.projects.backend.abstract_backend import AbstractBackend
from mlflow.projects.submitted_run import SubmittedRun

from mlflow_plugins import _compat
from softprompt_registry.config import build_config, settings
from softprompt_registry.errors import ConfigError
from softprompt_registry.registry.store import without_credentials

JOB_ID_TAG = "ray.job_id"
BACKEND_TAG = "mlflow.project.backend"
RUN_NAME_TAG = "mlflow.runName"

POLL_S = 2.0
LAST_LINES_S = 10.0
"""How long the end of a log may take after the job has ended."""
LOST_AFTER_S = 60.0
"""A job server that is silent for so long is taken for gone."""
STOP_WITHIN_S = 60.0
"""Ray lets a job clean up for 3 s, or RAY_JOB_STOP_WAIT_TIME_S, before it kills it."""

_RUN_STATUS = {
    "PENDING": "SCHEDULED",
    "RUNNING": "RUNNING",
    "SUCCEEDED": "FINISHED",
    "FAILED": "FAILED",
    "STOPPED": "KILLED",
}
"""Ray's word for the state of a job, and MLflow's."""


@settings
class RayBackendConfig:
    """The keys of `--backend-config`."""

    address: str | None = None
    """URL of Ray's job server, such as `http://head-node:8265`. None: what RAY_ADDRESS says, else the cluster on this
    machine."""
    runtime_env: dict[str, Any] = field(default_factory=dict)
    """Ray's runtime environment of the job, such as `pip`, `env_vars` or `excludes`. A `working_dir` takes the place of
    the project folder. MLFLOW_TRACKING_URI in `env_vars` is how the cluster reaches the store, where that differs."""
    entrypoint_num_cpus: float | None = None
    """CPUs kept for the command itself, beside what its Ray tasks ask for. None: the command waits for none."""
    entrypoint_num_gpus: float | None = None
    """GPUs kept for the command itself. One that asks for neither CPUs nor GPUs runs on the head node."""
    upload: bool = True
    """Send the project folder to the cluster, without what .gitignore and .rayignore name. False: the folder is on a disk
    that the cluster has under the same path, and the command runs there."""


def build() -> RayBackend:
    """Entry point of `mlflow.project_backend`."""
    return RayBackend()


class RayBackend(AbstractBackend):
    """Submits entry points as Ray jobs."""

    def run(
        self,
        project_uri: str,
        entry_point: str,
        params: dict[str, Any] | None,
        version: str | None,
        backend_config: dict[str, Any],
        tracking_uri: str,
        experiment_id: str,
    ) -> RaySubmittedRun:
        """Submit the job; called by `mlflow run`, also follow it to its end.

        All that can be checked is checked before there is an MLflow run.

        Raises:
            ExecutionException: the config, the project or the cluster cannot be used, or, called by `mlflow run`, the job
                failed.
        """
        config = _read_config(backend_config)
        client = _connect(config.address)
        project = _compat.ProjectEntryPoint(project_uri, version, entry_point, params or {})
        if config.upload:
            command = project.command_with(_paths_in_upload(project))
        else:
            command = project.command_here(backend_config.get(_compat.STORAGE_DIR))
            command = f"cd {shlex.quote(str(project.work_dir))} && {command}"
        _warn_of_what_is_not_used(backend_config, project)
        _warn_of_local_store(config, client, tracking_uri)

        run = project.run(experiment_id, backend_config.get(_compat.RUN_ID))
        store = MlflowClient(tracking_uri)
        run_id = run.info.run_id
        runtime_env = _runtime_env(config, project.work_dir, _absolute(tracking_uri), run)
        job_id = f"mlflow-{run_id}-{uuid4().hex[:6]}"
        context = _compat.context_of_mlflow_run()
        try:
            store.update_run(run_id, status="RUNNING")  # a run that was there may have ended before
            store.set_tag(run_id, JOB_ID_TAG, job_id)
            store.set_tag(run_id, BACKEND_TAG, "ray")
            if context is not None and context.params.get("run_name"):
                store.set_tag(run_id, RUN_NAME_TAG, context.params["run_name"])  # MLflow does it after this method
            client.submit_job(
                # MLflow runs commands in bash, Ray in sh.
                entrypoint=f"bash -c {shlex.quote(command)}",
                submission_id=job_id,
                runtime_env=runtime_env,
                metadata={"mlflow_run_id": run_id, "mlflow_entry_point": entry_point},
                entrypoint_num_cpus=config.entrypoint_num_cpus,
                entrypoint_num_gpus=config.entrypoint_num_gpus,
            )
        except BaseException as error:
            store.set_terminated(run_id, "FAILED" if isinstance(error, Exception) else "KILLED")
            if not isinstance(error, Exception):  # Ctrl-C; the job may have been accepted already
                with suppress(Exception):
                    client.stop_job(job_id)
                raise
            raise ExecutionException(
                f"submitting entry point {entry_point!r} to Ray at {client.get_address()!r}: "
                f"{_without_secrets(_one_line(error), config)} Correct the backend config or the project; run {run_id} "
                "is FAILED."
            ) from None
        _say(f"Ray job {job_id} at {client.get_address()}, MLflow run {run_id}, with the Python of the cluster")
        submitted = RaySubmittedRun(client, job_id, store, run_id, config)
        if context is not None and not submitted.wait():
            # MLflow would not wait for a backend that it does not know, and would exit with 0.
            raise ExecutionException(f"Run (ID '{run_id}') failed")
        return submitted


class RaySubmittedRun(SubmittedRun):
    """A Ray job and its MLflow run. From the start a thread prints the job's log and, when the job is over, ends the run."""

    def __init__(
        self, client: Any, job_id: str, store: MlflowClient, run_id: str, config: RayBackendConfig | None = None
    ) -> None:
        self.job_id = job_id
        self._run_id = run_id
        self._client = client
        self._store = store
        self._config = config or RayBackendConfig()
        self._status = "SCHEDULED"
        self._printed = 0
        self._given_up = threading.Event()
        self._error: Exception | None = None
        # Not the thread's own `join`: in Python before 3.13, Ctrl-C in it makes a thread that works look finished.
        self._over = threading.Event()
        threading.Thread(target=self._follow, name=f"follows {job_id}").start()

    @property
    def run_id(self) -> str:
        return self._run_id

    def wait(self) -> bool:
        """Whether the job has succeeded, once it is over. Ctrl-C stops the job."""
        try:
            self._over.wait()
        except KeyboardInterrupt:
            _say(f"interrupted: stopping Ray job {self.job_id}")
            self.cancel()
            raise
        if self._error is not None:
            raise self._error
        return self._status == "FINISHED"

    def get_status(self) -> str:
        """The MLflow status that goes with the job's state, a few seconds old."""
        return self._status

    def cancel(self) -> None:
        """Stop the job and wait until it has stopped; the run is KILLED. A job that is over stays as it is."""
        if self._over.is_set():
            return
        try:
            self._client.stop_job(self.job_id)
            self._over.wait(STOP_WITHIN_S)
            problem = f"it still runs after {STOP_WITHIN_S:.0f} s."
        except Exception as error:  # whatever it is, the user must hear that the job may go on
            problem = _one_line(error)
        if not self._over.is_set():
            _say(
                f"stopping Ray job {self.job_id}: {problem} It may still run: "
                f"`ray job stop {self.job_id} --address {self._client.get_address()}`."
            )
            self._given_up.set()
            self._over.wait()
        if self._error is not None:
            raise self._error

    def _follow(self) -> None:
        try:
            status, problem = asyncio.run(self._last_state())
            if problem:
                _say(_without_secrets(problem, self._config))
            self._end_run(status)
            self._status = status
        except Exception as error:
            self._status = "FAILED"
            self._error = error  # raised in the thread that waits
        finally:
            self._over.set()

    async def _last_state(self) -> tuple[str, str | None]:
        """MLflow's status for how the job ended, and what went wrong; meanwhile the log is printed."""
        log = asyncio.create_task(self._print_log())
        heard_at = time.monotonic()
        while not self._given_up.is_set():
            await asyncio.wait({log}, timeout=POLL_S)
            try:
                info = await asyncio.to_thread(self._client.get_job_info, self.job_id)
            except Exception as error:  # the server may be restarting; the reason is reported if it stays away
                if time.monotonic() - heard_at > LOST_AFTER_S:
                    log.cancel()
                    return "FAILED", (
                        f"following Ray job {self.job_id}: no answer from the job server for {LOST_AFTER_S:.0f} s "
                        f"({_one_line(error)}) It may still run. Look with `ray job status {self.job_id}` when the "
                        "server is back."
                    )
            else:
                heard_at = time.monotonic()
                if info.status.is_terminal():
                    await asyncio.wait({log}, timeout=LAST_LINES_S)
                    log.cancel()
                    await asyncio.to_thread(self._print_rest_of_log)
                    return _RUN_STATUS[info.status.value], self._problem(info)
                self._status = _RUN_STATUS[info.status.value]
            if log.done():
                await asyncio.sleep(POLL_S)
                log = asyncio.create_task(self._print_log())
        log.cancel()
        return "KILLED", None

    async def _print_log(self) -> None:
        """Print the log as it comes, from where printing stopped. Ends with the job or when the connection breaks."""
        seen = 0
        with suppress(Exception):  # the caller asks for the job's state, then opens the log again
            async for text in self._client.tail_job_logs(self.job_id):
                self._print(text[max(0, self._printed - seen) :])
                seen += len(text)

    def _print_rest_of_log(self) -> None:
        """What the stream did not bring, such as the log of a job that failed before it began."""
        try:
            log = self._client.get_job_logs(self.job_id)
        except Exception as error:
            if not self._printed:
                _say(f"reading the log of Ray job {self.job_id}: {_one_line(error)}")
            return
        self._print(log[self._printed :])

    def _print(self, text: str) -> None:
        self._printed += len(text)
        encoding = sys.stdout.encoding or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)  # a terminal may lack what a job writes
        with suppress(BrokenPipeError):  # `| head` must not keep the run from being ended
            sys.stdout.write(text)
            sys.stdout.flush()

    def _problem(self, info: Any) -> str | None:
        """Message about a job that did not succeed."""
        job = f"running Ray job {self.job_id}"
        if info.status.value == "SUCCEEDED":
            return None
        if info.status.value == "STOPPED":
            return f"{job}: it was stopped. MLflow run {self.run_id} is KILLED."
        if info.driver_exit_code is not None:
            return (
                f"{job}: its command exited with {info.driver_exit_code}, expected 0. The reason is in the log above."
            )
        return f"{job}: it failed before or beside its command. {info.message} Look at the dashboard of the cluster."

    def _end_run(self, status: str) -> None:
        """The job's own code may have ended the run; where the job did not succeed, the job knows better."""
        found = self._store.get_run(self.run_id).info.status
        if found == status or (status == "FINISHED" and RunStatus.is_terminated(RunStatus.from_string(found))):
            return
        self._store.set_terminated(self.run_id, status)


def _read_config(backend_config: Mapping[str, Any]) -> RayBackendConfig:
    values = {key: value for key, value in backend_config.items() if key not in _compat.BACKEND_CONFIG_KEYS}
    try:
        config = build_config(RayBackendConfig, values, "the config of the Ray backend")
    except ConfigError as error:
        raise ExecutionException(str(error)) from None
    variables = config.runtime_env.get("env_vars", {})
    if not isinstance(variables, dict) or not all(isinstance(value, str) for value in variables.values()):
        # The values may be secrets, so the message shows none.
        raise ExecutionException(
            "reading the config of the Ray backend, 'runtime_env', 'env_vars': expected a mapping of names to texts. "
            "Put numbers in quotes."
        )
    return config


def _connect(address: str | None) -> Any:
    """A `JobSubmissionClient` whose server has answered."""
    try:
        import ray  # noqa: F401  # says it more clearly than a part of it that is missing
        from ray.job_submission import JobSubmissionClient
    except ImportError as error:
        raise ExecutionException(
            f"running on Ray: its package cannot be imported ({error}). Run `pip install 'softprompt-registry[ray]'`."
        ) from None
    try:
        if address is None:
            return JobSubmissionClient()
        with _without_variables("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # Ray would prefer them to the config
            return JobSubmissionClient(address)
    except Exception as error:
        place = repr(address) if address else "the address in RAY_ADDRESS, else on this machine"
        raise ExecutionException(
            f"connecting to Ray's job server at {place}: {_one_line(error)} Expected a running cluster, such as one of "
            "`ray start --head`. Give the URL of its dashboard as `address` in the backend config, such as "
            "'http://127.0.0.1:8265'."
        ) from None


@contextmanager
def _without_variables(*names: str) -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _paths_in_upload(project: _compat.ProjectEntryPoint) -> dict[str, str]:
    """The params of type `path` as the job must name them."""
    return {name: _path_in_upload(name, value, project.work_dir) for name, value in project.path_params().items()}


def _path_in_upload(name: str, value: str, work_dir: Path) -> str:
    """A path inside the project becomes relative to it; another absolute one is left for the cluster to have."""
    url = urlsplit(value)
    if url.scheme not in ("", "file"):
        raise ExecutionException(
            f"running on Ray: the param {name!r} of type path is {value!r}, which MLflow downloads to this machine; "
            "expected a path that the job can open. Put `upload: false` in the backend config and use --storage-dir on a "
            "shared disk, or give a path on the cluster."
        )
    path = Path(os.path.abspath(url2pathname(url.path) if url.scheme else value))
    if path.is_relative_to(work_dir) and path.exists():
        return str(path.relative_to(work_dir))
    if url.scheme or os.path.isabs(value):
        return str(path)
    raise ExecutionException(
        f"running on Ray: the param {name!r} of type path is {value!r}, and there is no {str(path)!r} in the project that is "
        f"uploaded, {str(work_dir)!r}. Give a path inside the project, or an absolute path that the cluster has."
    )


def _warn_of_what_is_not_used(backend_config: Mapping[str, Any], project: _compat.ProjectEntryPoint) -> None:
    manager = backend_config.get(_compat.ENV_MANAGER)
    unused = [f"--env-manager {manager}"] if manager not in (None, "local") else []
    unused += ["--docker-args"] if backend_config.get(_compat.DOCKER_ARGS) else []
    unused += ["docker_env of the MLproject"] if project.wants_docker else []
    if unused:
        _say(
            f"the Ray backend makes no environment: {' and '.join(unused)} not used. The job runs with the Python of the "
            "cluster; name packages that it lacks as `pip` of `runtime_env` in the backend config."
        )


def _warn_of_local_store(config: RayBackendConfig, client: Any, tracking_uri: str) -> None:
    """A job on another machine would make itself a new, empty store under that path."""
    uri = config.runtime_env.get("env_vars", {}).get("MLFLOW_TRACKING_URI", tracking_uri)
    host = urlsplit(client.get_address()).hostname
    if _is_on_this_disk(uri) and host not in ("localhost", "127.0.0.1", "::1"):
        _say(
            "the tracking store is a file of this machine, which a job on another one cannot reach unless the disk is "
            "shared. Set MLFLOW_TRACKING_URI to a tracking server."
        )


def _is_on_this_disk(uri: str) -> bool:
    return uri.startswith("sqlite") or (urlsplit(uri).scheme in ("", "file") and uri != "databricks")


def _absolute(tracking_uri: str) -> str:
    """The URI of the same store for a process in another folder."""
    dialect, _, path = tracking_uri.partition(":///")
    if dialect.startswith("sqlite"):
        relative = path and not path.startswith(("/", ":memory:"))
        return f"{dialect}:///{Path.cwd()}/{path}" if relative else tracking_uri
    if _is_on_this_disk(tracking_uri):
        return Path(os.path.abspath(url2pathname(urlsplit(tracking_uri).path))).as_uri()
    return tracking_uri


def _runtime_env(config: RayBackendConfig, work_dir: Path, tracking_uri: str, run: Run) -> dict[str, Any]:
    variables = {
        "MLFLOW_TRACKING_URI": tracking_uri,
        **config.runtime_env.get("env_vars", {}),
        "MLFLOW_RUN_ID": run.info.run_id,
        "MLFLOW_EXPERIMENT_ID": str(run.info.experiment_id),
    }
    folder = {"working_dir": str(work_dir)} if config.upload else {}
    return {**folder, **config.runtime_env, "env_vars": variables}


def _one_line(error: Exception) -> str:
    """The error in one sentence."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if text.endswith((".", "!", "?")) else text + "."


def _without_secrets(text: str, config: RayBackendConfig) -> str:
    """`text` without the values of the config's environment variables, of which those too short for a key stay, nor those in
    URIs, such as that of the store, which the job gets, too."""
    for value in config.runtime_env.get("env_vars", {}).values():
        if len(value) >= 6:
            text = text.replace(value, "***")
    return without_credentials(text)


def _say(text: str) -> None:
    click.echo(text, err=True)
