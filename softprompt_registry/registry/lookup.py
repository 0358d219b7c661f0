"""Finding runs, LoggedModels and model versions in MLflow; what is not there is `None`, not an exception."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from softprompt_registry.errors import RegistryError
from softprompt_registry.registry.conventions import (
    EVALUATION_PREFIX,
    METRIC_TAG_PREFIX,
    PARAM_DOD_DIGEST,
    TAG_MODEL_ID,
    dataset_digest,
)

# A malformed id counts as one that is not there.
_NOT_THERE = ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND", "INVALID_PARAMETER_VALUE")

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


def run_id_of(given: str) -> str:
    """The run id in `runs:/<id>` or in itself."""
    parts = parse_model_uri(given)
    return parts.run_id if parts is not None and parts.run_id else given


def find_logged_model(model_id: str) -> LoggedModel | None:
    return get_or_none(MlflowClient().get_logged_model, model_id)


def find_run(run_id: str) -> Run | None:
    return get_or_none(MlflowClient().get_run, run_id)


def find_version(name: str, version: int) -> ModelVersion | None:
    return get_or_none(MlflowClient().get_model_version, name, str(version))


def get_or_none(get: Callable[..., FoundT], *key: str) -> FoundT | None:
    """What one of MLflow's getters returns for the key."""
    try:
        return get(*key)
    except MlflowException as error:
        if error.error_code in _NOT_THERE:
            return None
        raise


def search_logged_models(condition: str) -> list[LoggedModel]:
    """All LoggedModels of all experiments that meet `condition`, oldest first."""
    experiments = [experiment.experiment_id for experiment in mlflow.search_experiments()]
    models = mlflow.search_logged_models(experiments, filter_string=condition, output_format="list")
    return sorted(models, key=lambda model: (model.creation_timestamp, model.model_id))


def search_versions(condition: str) -> list[ModelVersion]:
    """All model versions that meet `condition`, by name and number. Their `aliases` are not filled in; see `aliases_of`."""
    versions = mlflow.search_model_versions(filter_string=condition)
    return sorted(versions, key=lambda version: (version.name, int(version.version)))


def aliases_of(name: str) -> dict[str, int] | None:
    """Alias → version number of a registered model, or `None` where there is no such model."""
    model = get_or_none(MlflowClient().get_registered_model, name)
    return None if model is None else {alias: int(version) for alias, version in sorted(model.aliases.items())}


def check_alias(alias: str, doing: str, *, ascii_only: bool = False) -> None:
    """Refuse an alias that MLflow would only refuse when it moves, after all else is written.

    Raises:
        RegistryError: MLflow would refuse it, or keeps it for itself.
    """
    flags = re.ASCII if ascii_only else re.NOFLAG
    if not re.fullmatch(r"[\w-]{1,255}", alias, flags) or re.fullmatch(r"latest|v\d+", alias, re.IGNORECASE):
        raise RegistryError(
            f"{doing} the alias {alias!r}: MLflow allows letters, digits, '_' and '-', and keeps 'latest' and 'v<number>' "
            "for itself. Use for instance 'champion'."
        )


def quoted(value: str) -> str:
    """`value` as a string of MLflow's filter language, which has no escape.

    Double quotes only where they must be: a search of LoggedModels takes them as part of the value and finds nothing.
    """
    if "'" not in value:
        return f"'{value}'"
    if '"' not in value:
        return f'"{value}"'
    raise RegistryError(f"searching MLflow for {value!r}: it holds both kinds of quotes. Use a name with one or none.")


def version_by_uri(uri: str, parts: ModelUri) -> ModelVersion:
    """The registered version of `models:/<name>@<alias>` or `models:/<name>/<version>`.

    Raises:
        RegistryError: there is no such version; lists the aliases that there are.
    """
    assert parts.name is not None
    aliases = aliases_of(parts.name)
    if aliases is None:
        raise RegistryError(
            f"looking up {uri!r}: there is no registered model of this name; `softprompt list` shows those there are."
        )
    number = parts.version if parts.alias is None else aliases.get(parts.alias)
    version = None if number is None else find_version(parts.name, number)
    if version is None:
        held = ", ".join(f"@{alias} = {number}" for alias, number in aliases.items()) or "none"
        raise RegistryError(
            f"looking up {uri!r}: {parts.name!r} has no such {'version' if parts.alias is None else 'alias'}; its aliases "
            f"are: {held}. Name one of these, or a version that `softprompt list` shows."
        )
    return version


def model_id_of(version: ModelVersion) -> str | None:
    """Id of the LoggedModel that a version was made from; None for a version that was not made from one."""
    if version.tags.get(TAG_MODEL_ID):
        return version.tags[TAG_MODEL_ID]
    source = parse_model_uri(version.source or "")
    return source.model_id if source else None


def find_by_uri(uri: str) -> LoggedModel:
    """The LoggedModel of `models:/m-<id>` or `runs:/<run>/<name>`; of several with one name in one run, the newest."""
    parts = parse_model_uri(uri)
    model: LoggedModel | None = None
    if parts is not None and parts.model_id:
        model = find_logged_model(parts.model_id)
    elif parts is not None and parts.run_id and parts.logged_name:
        of_run = search_logged_models(f"source_run_id = {quoted(parts.run_id)}")
        model = next((model for model in reversed(of_run) if model.name == parts.logged_name), None)
    else:
        raise RegistryError(
            f"looking for the logged model {uri!r}: expected 'models:/m-<id>' or 'runs:/<run id>/<name>'. "
            "Copy it from the run's page in the MLflow UI."
        )
    if model is None:
        raise _not_in_store(f"looking for the logged model {uri!r}")
    return model


def run_by_id(run_id: str, doing: str) -> Run:
    """
    Raises:
        RegistryError: there is no such run.
    """
    run = find_run(run_id)
    if run is None:
        raise _not_in_store(doing)
    return run


def _not_in_store(doing: str) -> RegistryError:
    return RegistryError(
        f"{doing}: it is not in this MLflow store. Check the id, and that MLFLOW_TRACKING_URI names the store that it was "
        "logged to."
    )


def evaluation_metrics(model: LoggedModel) -> dict[str, float]:
    """Metric → newest value of a LoggedModel's `evaluation.*` on one dataset, without the prefix, sorted by name.

    The dataset is the DoD that the model was made from; where no value belongs to it, the dataset that was evaluated last. So
    a later evaluation on other, easier data neither replaces the values that a promotion asks for nor stands among them.

    MLflow keeps an infinite value as the largest float, which must not pass a minimum, so it is left out. It keeps a NaN of
    a LoggedModel as 0, which nothing can tell from a real one.
    """
    measured = [
        metric
        for metric in sorted(model.metrics or [], key=lambda metric: (metric.timestamp, metric.step))
        if metric.key.startswith(EVALUATION_PREFIX) and abs(metric.value) < sys.float_info.max
    ]
    own = dataset_digest(model.params.get(PARAM_DOD_DIGEST, ""))
    digests = [metric.dataset_digest for metric in measured]
    wanted = own if own in digests else next(reversed(digests), None)
    newest = {
        metric.key.removeprefix(EVALUATION_PREFIX): float(metric.value)
        for metric in measured
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
