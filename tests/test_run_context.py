"""Tags that our runs get, and that runs of others do not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

import softprompt_registry.errors  # noqa: F401  # this process uses the package
from mlflow_plugins import run_context
from mlflow_plugins.run_context import set_base_fingerprint
from softprompt_registry import __version__


@pytest.fixture(autouse=True)
def no_base_model() -> Iterator[None]:
    set_base_fingerprint(None)
    yield
    set_base_fingerprint(None)


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the driver lists its GPUs, empty; torch is not loaded."""
    monkeypatch.setattr(run_context, "_NVIDIA_DRIVER", tmp_path)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def test_runs_and_models_get_the_tags(mlflow_store: str) -> None:
    with mlflow.start_run() as first:
        pass
    set_base_fingerprint("f" * 64)
    with mlflow.start_run() as second:
        model = mlflow.initialize_logged_model(name="model")
    tags = mlflow.get_run(first.info.run_id).data.tags
    assert tags["softprompt.version"] == __version__
    assert tags["softprompt.device"]
    assert "softprompt.base_fingerprint" not in tags
    assert mlflow.get_run(second.info.run_id).data.tags["softprompt.base_fingerprint"] == "f" * 64
    assert model.tags["softprompt.base_fingerprint"] == "f" * 64


def test_device_from_the_driver(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_context._driver_gpu_name.cache_clear()
    assert run_context.device_name() == f"cpu ({len(os.sched_getaffinity(0))} cores)"
    run_context._driver_gpu_name.cache_clear()
    folder = driver / "0000:3b:00.0"
    folder.mkdir()
    (folder / "information").write_text("Model: \t\t NVIDIA H100 80GB HBM3\nIRQ:   	 18\nGPU UUID: 	 GPU-1\n")
    assert run_context.device_name() == "NVIDIA H100 80GB HBM3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert run_context.device_name().startswith("cpu (")


def test_torch_without_cuda_means_cpu(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Cuda:
        @staticmethod
        def is_available() -> bool:
            return False

    class Torch:
        cuda = Cuda

    (driver / "gpu").mkdir()
    (driver / "gpu" / "information").write_text("Model: NVIDIA T4\n")
    monkeypatch.setitem(sys.modules, "torch", Torch)  # type: ignore[arg-type]
    assert run_context.device_name().startswith("cpu (")


def test_foreign_runs_get_no_tags(mlflow_store: str) -> None:
    code = """
import sys, mlflow
with mlflow.start_run() as run:
    mlflow.log_metric("loss", 1.0)
assert "mlflow_plugins.run_context" in sys.modules
tags = mlflow.get_run(run.info.run_id).data.tags
print(sorted(key for key in tags if key.startswith("softprompt")), "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[] False"
