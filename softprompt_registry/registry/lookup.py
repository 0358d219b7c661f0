"""Finding runs, LoggedModels and model versions in MLflow; what is not there is `None`, not an exception."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

from mlflow import MlflowClient
from mlflow.entities import Experiment, LoggedModel, Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from softprompt_registry.errors import RegistryError
from softprompt_registry.registry.conventions import (
    EVALUATION_PREFIX,
    METRIC_TAG_PREFIX,
    PARAM_DOD_DIGEST,
    dataset_digest,
)

# A malformed id counts as one that is not there.
_NOT_THERE = ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND", "INVALID_PARAMETER_VALUE")
_PAGE = 1000

REGISTRY_SCHEMES = ("models:/", "runs:/")

FoundT = TypeVar("FoundT")


@dataclass(frozen=True)
class ModelUri:
    """A parsed URI; exactly one of `model_id`, `run_id` and `name` is set."""

    model_id: str | None = None
    run_id: str | None = None
    logged_name: str | None = None
    """Name of a LoggedModel of `run_id`, in `runs:/<run>/<name>`."""
    name: str | None = None
    version: int | None = None
    alias: str | None = None


def split_member(uri: str) -> tuple[str, str | None]:
    """(where the artifact is, task of a bank's member) of `<location>#<task>`; None without a task.

    MLflow takes what follows a '#' in `models:/…` and `runs:/…` for no part of the name. A folder's path may have one: there
    the longest path that is a folder is the location.
    """
    if uri.startswith(REGISTRY_SCHEMES):
        location, _, member = uri.partition("#")
        return location, member or None
    if uri.startswith("file:"):
        parts = urlsplit(uri)
        return url2pathname(parts.path), unquote(parts.fragment) or None
    marks = [place for place, character in enumerate(uri) if character == "#"]
    for end in [len(uri), *reversed(marks)]:
        if Path(uri[:end]).is_dir():
            return uri[:end], uri[end + 1 :] or None
    return uri, None


def parse_model_uri(uri: str) -> ModelUri | None:
    """The parts of `models:/…` or `runs:/…`, or `None` for anything else. A bank's `#<task>` is left away."""
    if not uri.startswith(REGISTRY_SCHEMES):
        return None
    scheme, _, rest = split_member(uri)[0].partition(":/")
    if scheme == "runs":
        run_id, _, logged_name = rest.partition("/")
        return ModelUri(run_id=run_id, logged_name=logged_name or None) if rest else None
    if rest.startswith("m-") and "/" not in rest and "@" not in rest:
        return ModelUri(model_id=rest)
    name, at, alias = rest.rpartition("@")
    if at and name and alias:
        return ModelUri(name=name, alias=alias)
    name, slash, version = rest.rpartition("/")
    if slash and name and version.isascii() and version.isdigit():
        return ModelUri(name=name, version=int(version))
    return None


def find_logged_model(client: MlflowClient, model_id: str) -> LoggedModel | None:
    return _found(client.get_logged_model, model_id)


def find_run(client: MlflowClient, run_id: str) -> Run | None:
    return _found(client.get_run, run_id)


def find_experiment(client: MlflowClient, experiment_id: str | None) -> Experiment | None:
    """With any lifecycle stage; None also where what answered is no such experiment."""
    found = None if experiment_id is None else _found(client.get_experiment, experiment_id)
    return found if found is not None and found.experiment_id == experiment_id else None


def find_version(client: MlflowClient, name: str, version: int) -> ModelVersion | None:
    return _found(client.get_model_version, name, str(version))


def _found(get: Callable[..., FoundT], *key: str) -> FoundT | None:
    try:
        return get(*key)
    except MlflowException as error:
        if error.error_code in _NOT_THERE:
            return None
        raise


def search_logged_models(client: MlflowClient, condition: str) -> list[LoggedModel]:
    """All LoggedModels of all experiments that meet `condition`, oldest first."""
    experiment_ids: list[str] = []
    token: str | None = None
    while True:
        experiments = client.search_experiments(max_results=_PAGE, page_token=token)
        experiment_ids += [experiment.experiment_id for experiment in experiments]
        token = experiments.token
        if not token:
            break
    models: list[LoggedModel] = []
    while True:
        page = client.search_logged_models(experiment_ids, filter_string=condition, page_token=token)
        models += page
        token = page.token
        if not token:
            return sorted(models, key=lambda model: (model.creation_timestamp, model.model_id))


def search_versions(client: MlflowClient, condition: str) -> list[ModelVersion]:
    """All model versions that meet `condition`, by name and number. Their `aliases` are not filled in; see `aliases_of`."""
    versions: list[ModelVersion] = []
    token: str | None = None
    while True:
        page = client.search_model_versions(condition, max_results=_PAGE, page_token=token)
        versions += page
        token = page.token
        if not token:
            return sorted(versions, key=lambda version: (version.name, int(version.version)))


def aliases_of(client: MlflowClient, name: str) -> dict[str, int] | None:
    """Alias → version number of a registered model, or `None` where there is no such model."""
    model = _found(client.get_registered_model, name)
    return None if model is None else {alias: int(version) for alias, version in sorted(model.aliases.items())}


def quoted(value: str) -> str:
    """`value` as a string of MLflow's filter language, which has no escape.

    Double quotes only where they must be: a search of LoggedModels takes them as part of the value and finds nothing.
    """
    if "'" not in value:
        return f"'{value}'"
    if '"' not in value:
        return f'"{value}"'
    raise RegistryError(f"searching MLflow for {value!r}: it holds both kinds of quotes. Use a name with one or none.")


def find_by_uri(client: MlflowClient, uri: str) -> LoggedModel:
    """The LoggedModel of `models:/m-<id>` or `runs:/<run>/<name>`; of several with one name in one run, the newest."""
    parts = parse_model_uri(uri)
    model: LoggedModel | None = None
    if parts is not None and parts.model_id:
        model = find_logged_model(client, parts.model_id)
    elif parts is not None and parts.run_id and parts.logged_name:
        of_run = search_logged_models(client, f"source_run_id = {quoted(parts.run_id)}")
        model = next((model for model in reversed(of_run) if model.name == parts.logged_name), None)
    else:
        raise RegistryError(
            f"looking for the logged model {uri!r}: expected 'models:/m-<id>' or 'runs:/<run id>/<name>'. "
            "Copy it from the run's page in the MLflow UI."
        )
    if model is None:
        raise RegistryError(
            f"looking for the logged model {uri!r}: it is not in this MLflow store. Check the id, and that "
            "MLFLOW_TRACKING_URI names the store that it was logged to."
        )
    return model


def evaluation_metrics(model: LoggedModel) -> dict[str, float]:
    """Metric → newest value of a LoggedModel's `evaluation.*` on one dataset, without the prefix, sorted by name.

    The dataset is the DoD that the model was made from; where no value belongs to it, the dataset that was evaluated last. So
    a later evaluation on other, easier data neither replaces the values that a promotion asks for nor stands among them.

    MLflow keeps an infinite value as the largest float, which must not pass a minimum, so it is left out. It keeps a NaN of
    a LoggedModel as 0, which nothing can tell from a real one.
    """
    found = [
        metric
        for metric in sorted(model.metrics or [], key=lambda metric: (metric.timestamp, metric.step))
        if metric.key.startswith(EVALUATION_PREFIX) and abs(metric.value) < sys.float_info.max
    ]
    own = dataset_digest(model.params.get(PARAM_DOD_DIGEST, ""))
    digests = [metric.dataset_digest for metric in found]
    wanted = own if own in digests else next(reversed(digests), None)
    newest = {
        metric.key.removeprefix(EVALUATION_PREFIX): float(metric.value)
        for metric in found
        if metric.dataset_digest == wanted
    }
    return dict(sorted(newest.items()))


def metrics_of_tags(tags: Mapping[str, str]) -> dict[str, float]:
    """The metrics that a model version repeats in its tags. A tag that someone edited into a non-number is left out."""
    metrics = {}
    for key, value in sorted(tags.items()):
        if key.startswith(METRIC_TAG_PREFIX):
            try:
                metrics[key.removeprefix(METRIC_TAG_PREFIX)] = float(value)
            except ValueError:
                continue
    return metrics
