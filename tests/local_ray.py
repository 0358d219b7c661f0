"""A Ray cluster of one node on this machine, with ports and a folder of its own, so that several can run side by side."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

START_TIMEOUT_S = 120
STOP_TIMEOUT_S = 20
NOT_FOR_JOBS = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID")
"""Jobs inherit the cluster's environment; a test must see what they are given, not what is there by chance."""


@dataclass(frozen=True)
class LocalRay:
    address: str
    """URL of the job server, as `JobSubmissionClient` takes it."""
    gcs_address: str
    """`host:port`, as `ray.init(address=…)` takes it."""


@contextmanager
def local_ray(num_cpus: int = 2) -> Iterator[LocalRay]:
    """Start a cluster whose `python` is this one; no process and no file of it is left behind."""
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # short: a socket's path has at most 107 bytes
    gcs, dashboard, agent, agent_grpc, metrics, env_agent, client = _free_ports(7)
    command = [
        f"{sys.executable} -m ray.scripts.scripts start --head --block --disable-usage-stats --include-dashboard=true",
        f"--node-ip-address=127.0.0.1 --port={gcs} --dashboard-host=127.0.0.1 --dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent} --dashboard-agent-grpc-port={agent_grpc}",
        f"--metrics-export-port={metrics} --runtime-env-agent-port={env_agent} --ray-client-server-port={client}",
        f"--num-cpus={num_cpus} --num-gpus=0 --object-store-memory={80 * 2**20} --temp-dir={folder}",
    ]
    environment = {key: value for key, value in os.environ.items() if key not in NOT_FOR_JOBS}
    # Else it depends on whether a `ray.init()` has ever left a token in the home folder.
    environment["RAY_AUTH_MODE"] = "disabled"
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    log = folder / "start.log"
    with log.open("wb") as output:
        head = subprocess.Popen(
            " ".join(command).split(), stdout=output, stderr=output, env=environment, start_new_session=True
        )
    try:
        _wait_until_it_takes_jobs(head, dashboard, log)
        yield LocalRay(address=f"http://127.0.0.1:{dashboard}", gcs_address=f"127.0.0.1:{gcs}")
    finally:
        _stop(head, folder)
        shutil.rmtree(folder, ignore_errors=True)


def _free_ports(count: int) -> list[int]:
    """Different ports that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports: list[int] = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _wait_until_it_takes_jobs(head: subprocess.Popen[bytes], dashboard: int, log: Path) -> None:
    """The job server answers before it can run anything; a list of jobs comes only from a whole cluster."""
    import requests

    session = requests.Session()
    session.trust_env = False  # no proxy to our own machine
    end = time.monotonic() + START_TIMEOUT_S
    with session:
        while time.monotonic() < end and head.poll() is None:
            with suppress(requests.RequestException):
                if session.get(f"http://127.0.0.1:{dashboard}/api/jobs/", timeout=10).status_code == 200:
                    return
            time.sleep(0.2)
    raise RuntimeError(f"starting a local Ray: it takes no jobs after {START_TIMEOUT_S} s.\n{log.read_text()}")


def _stop(head: subprocess.Popen[bytes], folder: Path) -> None:
    """Kill the head first, so that it starts nothing anew, then all that it has started."""
    ours = _processes_of(head.pid, folder)
    head.kill()
    head.wait(STOP_TIMEOUT_S)
    while ours:
        for process in ours:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(ours, timeout=STOP_TIMEOUT_S)
        ours = _processes_of(head.pid, folder)


def _processes_of(head: int, folder: Path) -> list[psutil.Process]:
    """The head's children to the last generation, and whoever names our folder in its command."""
    found: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        found += psutil.Process(head).children(recursive=True)
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process not in found and any(str(folder) in word for word in process.cmdline()):
                found.append(process)
    return found
