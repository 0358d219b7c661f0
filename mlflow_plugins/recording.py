"""A stage's reports, written onto the active MLflow run and, where given, a LoggedModel and the dataset it is about."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
from mlflow.data.dataset import Dataset
from mlflow.entities import Dataset as DatasetEntity
from mlflow.entities import DatasetInput, Metric

from mlflow_plugins.flavor_parts import add_model_params
from softprompt_registry.errors import ArtifactError, RegistryError
from softprompt_registry.recording import ConsoleRecorder, ProgressBar
from softprompt_registry.registry.store import STORE_FAILURES, quick_requests

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_PARAM_CHARACTERS = 6000
"""MLflow refuses longer values."""
MAX_BUFFERED_POINTS = 500
MAX_BUFFERED_SECONDS = 5.0


class MlflowRecorder(ConsoleRecorder):
    """Writes to the run that is active when it is made; progress bars go to stderr.

    Points of curves are collected and written together: when there are many or the oldest is some seconds old, before
    anything else is written, at the end of a progress bar, by `flush`, and when the recorder is dropped. As a context
    manager it writes the last ones where the block ends.

    Args:
        model_id: params and metrics also go to this LoggedModel.
        dataset: metrics are linked to it; it becomes an input of the run unless it is one.

    Raises:
        RegistryError: no run is active.
    """

    def __init__(self, *, model_id: str | None = None, dataset: Dataset | None = None) -> None:
        run = mlflow.active_run()
        if run is None:
            raise RegistryError(
                "recording to MLflow: no run is active; expected one to write to. Open it with `mlflow.start_run()`."
            )
        self.run_id = str(run.info.run_id)
        self.model_id = model_id
        self.dataset = dataset
        self._client = mlflow.MlflowClient()
        self._points: list[Metric] = []
        if dataset is not None:
            _link_dataset(self._client, self.run_id, dataset)
        self._finalizer = weakref.finalize(self, _write_last, self._client, self.run_id, self._points)

    def __enter__(self) -> MlflowRecorder:
        return self

    def __exit__(self, *error: object) -> None:
        self.flush()

    def flush(self) -> None:
        """Write the points collected so far; those that cannot be written are kept."""
        _write(self._client, self.run_id, self._points)

    def params(self, prefix: str, values: Mapping[str, Any]) -> None:
        """Settings under `prefix.key`. Values that are there already and equal are skipped; long ones are cut."""
        self.flush()
        texts = {f"{prefix}.{key}": _cut(str(value)) for key, value in values.items()}
        known = self._client.get_run(self.run_id).data.params
        new = {key: text for key, text in texts.items() if known.get(key) != text}
        if new:
            mlflow.log_params(new, run_id=self.run_id)
        if self.model_id is not None:
            add_model_params(self.model_id, texts)

    def metric(self, name: str, value: float, step: int = 0) -> None:
        # Not `mlflow.log_metric(model_id=…)`: it would make the model, which this run produces, an input of the run.
        now = int(time.time() * 1000)
        dataset_name, dataset_digest = (
            (None, None) if self.dataset is None else (self.dataset.name, self.dataset.digest)
        )
        self._points.append(
            Metric(name, float(value), now, step, self.model_id, dataset_name, dataset_digest, self.run_id)
        )
        oldest = int(self._points[0].timestamp)
        if len(self._points) >= MAX_BUFFERED_POINTS or now - oldest >= MAX_BUFFERED_SECONDS * 1000:
            self.flush()

    def figure(self, name: str, figure: Figure) -> None:
        """A `matplotlib.figure.Figure`, which needs no display."""
        self.flush()
        self._client.log_figure(self.run_id, figure, name)

    def table(self, name: str, columns: Mapping[str, Sequence[Any]]) -> None:
        """Rows for people. MLflow appends to a table that the run has under the same name."""
        # MLflow would make one row of lists out of columns of unequal length.
        assert len({len(column) for column in columns.values()}) <= 1, f"columns of {name!r} differ in length"
        self.flush()
        self._client.log_table(self.run_id, {key: list(column) for key, column in columns.items()}, name)

    def artifact(self, path: Path) -> None:
        self.flush()
        if path.is_dir():
            self._client.log_artifacts(self.run_id, str(path), artifact_path=path.name)
        elif path.is_file():
            self._client.log_artifact(self.run_id, str(path))
        else:
            raise ArtifactError(f"recording {str(path)!r}: there is no such file or folder. Write it first.")

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[ProgressBar]:
        with super().progress(title, total) as bar:
            yield bar
        self.flush()


def _write(client: mlflow.MlflowClient, run_id: str, points: list[Metric]) -> None:
    written = list(points)
    if written:
        client.log_batch(run_id, metrics=written)
        del points[: len(written)]


def _write_last(client: mlflow.MlflowClient, run_id: str, points: list[Metric]) -> None:
    """What is left when the recorder is dropped; a store that fails then has failed the stage, too, which says so."""
    with suppress(*STORE_FAILURES), quick_requests():
        _write(client, run_id, points)


def _link_dataset(client: mlflow.MlflowClient, run_id: str, dataset: Dataset) -> None:
    """Make the dataset an input of the run, unless it is one: then its context was chosen by who logged it."""
    inputs = client.get_run(run_id).inputs
    known = [(item.dataset.name, item.dataset.digest) for item in (inputs.dataset_inputs if inputs else [])]
    if (dataset.name, dataset.digest) not in known:
        client.log_inputs(run_id, datasets=[DatasetInput(DatasetEntity(**dataset.to_dict()), tags=[])])


def _cut(text: str) -> str:
    return text if len(text) <= MAX_PARAM_CHARACTERS else text[: MAX_PARAM_CHARACTERS - 1] + "…"
