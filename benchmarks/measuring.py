"""What the benchmarks share: a way in a process of its own, medians over turns, peak memory, a clock, the figures' file.

It imports no torch before it is needed: a parent process must be small, since its peak memory counts for its children too.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def in_own_process(script: str, *given: str, folder: Path | None = None) -> dict[str, Any]:
    """The figures that a script prints as JSON on its last line, with these arguments and in this working folder."""
    command = [sys.executable, script, *given]
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=folder)
    return dict(json.loads(finished.stdout.splitlines()[-1]))


def options_of(arguments: Namespace, *, left_out: Sequence[str]) -> list[str]:
    """Parsed arguments as options again, without those left out and those that were not given."""
    given = []
    for name, value in vars(arguments).items():
        if name not in left_out and value is not None:
            given += [f"--{name.replace('_', '-')}", str(value)]
    return given


def medians(turns: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of each figure over the turns."""
    return {name: statistics.median(figures[name] for figures in turns) for name in turns[0]}


def peak_mib(device: torch.device | None = None) -> float:
    """Peak memory of this process in MiB, on a GPU that of torch's allocations there."""
    if device is not None and device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def clock(device: torch.device | None = None) -> float:
    """Seconds, read when the device has finished its work."""
    if device is not None and device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    return time.perf_counter()


def write_figures(file: Path | None, figures: Mapping[str, Any], **more: Any) -> None:
    """Write the figures as JSON, if a file is given."""
    if file:
        file.write_text(json.dumps({"figures": figures, **more}, indent=2) + "\n")
