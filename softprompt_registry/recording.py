"""Where stages report to. The science knows this protocol only; MLflow's side of it is `mlflow_plugins.recording`."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # takes a third of a second


class ProgressBar(Protocol):
    """One line of progress."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Move on by `steps`; `note` is shown beside the bar until the next one."""


class Recorder(Protocol):
    """Takes what a stage has to say."""

    def params(self, prefix: str, values: Mapping[str, Any]) -> None:
        """Settings, kept under `prefix.key`."""
        return None

    def metric(self, name: str, value: float, step: int = 0) -> None:
        """One point of a curve."""
        return None

    def figure(self, name: str, figure: Figure) -> None:
        """A matplotlib figure; `name` ends in .png or .svg."""
        return None

    def table(self, name: str, columns: Mapping[str, Sequence[Any]]) -> None:
        """Rows for people; `name` ends in .json."""
        return None

    def artifact(self, path: Path) -> None:
        """A file, or a folder with all it holds."""
        return None

    def progress(self, title: str, total: int) -> AbstractContextManager[ProgressBar]:
        """A progress bar that lives as long as the block."""


class _SilentBar(ProgressBar):
    def advance(self, steps: int = 1, note: str = "") -> None:
        return None


class NullRecorder(Recorder):
    """Forgets everything; the default in library use."""

    def progress(self, title: str, total: int) -> AbstractContextManager[ProgressBar]:
        return nullcontext(_SilentBar())


class _RichBar:
    def __init__(self, progress: Progress, title: str, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task(title, total=total, note="")

    def advance(self, steps: int = 1, note: str = "") -> None:
        self._progress.update(self._task, advance=steps, note=note)

    def __enter__(self) -> _RichBar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()


class _LineBar:
    """Progress for log files: a line when something happened, at most one in `SECONDS`, and one at the end."""

    SECONDS = 10.0

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total = title, total
        self._done, self._note = 0, ""
        self._started = self._printed = time.monotonic()

    def advance(self, steps: int = 1, note: str = "") -> None:
        self._done += steps
        self._note = note
        if time.monotonic() - self._printed >= self.SECONDS:
            self._print()

    def _print(self) -> None:
        self._printed = time.monotonic()
        seconds = self._printed - self._started
        print(f"{self._title} {self._done}/{self._total} {seconds:.0f} s {self._note}", file=sys.stderr, flush=True)

    def __enter__(self) -> _LineBar:
        return self

    def __exit__(self, *error: object) -> None:
        self._print()


class ConsoleRecorder(NullRecorder):
    """Shows progress on stderr and forgets the rest: bars on a terminal, now and then a line in a pipe or a file."""

    def progress(self, title: str, total: int) -> AbstractContextManager[ProgressBar]:
        if not sys.stderr.isatty():
            return _LineBar(title, total)
        progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=Console(stderr=True),
        )
        return _RichBar(progress, title, total)
