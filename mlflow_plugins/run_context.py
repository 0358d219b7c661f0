"""Tags that every run and logged model of ours gets: package version, device, and the base model once it is known.

MLflow imports this module in every process. A process that does not use our package gets no tags of ours.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from pathlib import Path

from mlflow.tracking.context.abstract_context import RunContextProvider

from softprompt_registry import __version__

VERSION_TAG = "softprompt.version"
DEVICE_TAG = "softprompt.device"
BASE_FINGERPRINT_TAG = "softprompt.base_fingerprint"

_NVIDIA_DRIVER = Path("/proc/driver/nvidia/gpus")

_base_fingerprint: str | None = None


def set_base_fingerprint(fingerprint: str | None) -> None:
    """Name the base model that this process works on, for the runs that start from now on; None forgets it."""
    global _base_fingerprint
    _base_fingerprint = fingerprint


class SoftPromptRunContext(RunContextProvider):
    """Entry point of `mlflow.run_context_provider`."""

    def in_context(self) -> bool:
        """Whether a module of softprompt_registry, besides the package itself, has been imported."""
        return any(name.startswith("softprompt_registry.") for name in list(sys.modules))

    def tags(self) -> dict[str, str]:
        tags = {VERSION_TAG: __version__, DEVICE_TAG: device_name()}
        if _base_fingerprint is not None:
            tags[BASE_FINGERPRINT_TAG] = _base_fingerprint
        return tags


def device_name() -> str:
    """The GPU that torch will use, or `cpu (N cores)`. Neither imports torch nor starts CUDA in this process."""
    return _gpu_name() or f"cpu ({_num_cores()} cores)"


def _gpu_name() -> str | None:
    torch = sys.modules.get("torch")
    if torch is not None:
        if not torch.cuda.is_available():
            return None
        if torch.cuda.is_initialized():
            return str(torch.cuda.get_device_name())
    # A value that starts with none of its GPUs hides them all.
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return None
    return _driver_gpu_name(_NVIDIA_DRIVER)


@cache
def _driver_gpu_name(driver: Path) -> str | None:
    """The first GPU's name as the driver gives it: lines `key: value`, the name under `Model`."""
    for file in sorted(driver.glob("*/information")):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "Model":
                return value.strip()
    return None


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
