"""Registering a logged model as a version that says where it came from, and listing such versions.

`register` refuses what nobody could trace or judge later: no digest of the DoD, no fingerprint of the base model, no
evaluation. The facts are written twice, as tags (to search) and as a Markdown description (to read).
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

import mlflow
from mlflow import MlflowClient
from mlflow.entities import LoggedModel, LoggedModelStatus
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from softprompt_registry.errors import BaseModelMismatch, RegistryError
from softprompt_registry.fingerprints import SHORT
from softprompt_registry.registry.conventions import (
    EVALUATION_PREFIX,
    METRIC_TAG_PREFIX,
    MODEL_WORDS,
    PARAM_ARTIFACT_DIGEST,
    PARAM_BANK_DIGEST,
    PARAM_BASE_FINGERPRINT,
    PARAM_BASE_MODEL,
    PARAM_DOD_DIGEST,
    PARAM_DOD_NAME,
    PARAM_TASK,
    TAG_ARTIFACT_DIGEST,
    TAG_BASE_FINGERPRINT,
    TAG_BASE_MODEL,
    TAG_DOD_NAME,
    TAG_MODEL_ID,
    TAG_MODEL_TYPE,
    TAG_OF_PARAM,
    TAG_RUN_ID,
    TAG_TASK,
    UPSTREAM_PARAMS,
)
from softprompt_registry.registry.lookup import (
    aliases_of,
    evaluation_metrics,
    find_by_uri,
    find_logged_model,
    metrics_of_tags,
    quoted,
    search_versions,
)
from softprompt_registry.registry.store import in_one_line


@dataclass(frozen=True)
class RegisteredVersion:
    name: str
    version: int
    model_id: str
    uri: str
    """`models:/<name>/<version>`"""
    metrics: dict[str, float]
    """Evaluation metrics at registration, without their prefix."""


@dataclass(frozen=True)
class ListedVersion:
    name: str
    version: int
    aliases: tuple[str, ...]
    model_type: str
    base: str
    """The base model's name."""
    base_fingerprint: str
    dod: str
    task: str | None
    """Set on what belongs to one task."""
    metrics: dict[str, float]
    created: datetime


def register(model_uri: str, name: str) -> RegisteredVersion:
    """The registered version of a logged model; the same artifact registered again gives the version it has.

    Registering again also brings the version's metrics up to date.

    Args:
        model_uri: `models:/m-<id>` or `runs:/<run>/<name>`.
        name: of the registered model, which is made if there is none.

    Raises:
        RegistryError: the name cannot be used, or the model's lineage is incomplete; lists all that is missing.
        BaseModelMismatch: the model belongs to another base model than the one it was made from.
    """
    client = MlflowClient()
    _check_name(client, name)
    model = find_by_uri(model_uri)
    require_complete_lineage(model)

    facts = _tags_of(model)
    version = _existing_version(name, facts)
    if version is None:
        try:
            # Not the client's create_model_version: this also writes the link from the LoggedModel that the UI shows.
            version = mlflow.register_model(model.model_uri, name, tags=facts)
        except MlflowException as error:
            raise RegistryError(
                f"registering {model_uri!r} as {name!r}: MLflow refused: {in_one_line(error)}"
            ) from error
    else:
        for key, value in facts.items():
            if version.tags.get(key) != value:
                client.set_model_version_tag(name, str(version.version), key, value)
    description = _description(model)
    if version.description != description:
        client.update_model_version(name, str(version.version), description)
    return RegisteredVersion(
        name=name,
        version=int(version.version),
        model_id=model.model_id,
        uri=f"models:/{name}/{version.version}",
        metrics=evaluation_metrics(model),
    )


def _check_name(client: MlflowClient, name: str) -> None:
    if not name.strip() or any(character in name for character in "/:#?") or name in (".", ".."):
        raise RegistryError(
            f"registering under the name {name!r}: MLflow allows no empty name and no '/' or ':' in it, and `models:/` "
            f"cannot address one with '#' or '?'. "
            f"Use for instance {re.sub('[/:#?]+', '-', name).strip(' -.') or 'translator'!r}."
        )
    # Prompts share the namespace, and MLflow would quietly add a model version to a prompt.
    if aliases_of(name) is None and client.get_prompt(name) is not None:
        raise RegistryError(f"registering under the name {name!r}: a prompt has this name. Choose another.")


def require_complete_lineage(model: LoggedModel) -> None:
    """Refuse a logged model that could not be registered.

    Raises:
        RegistryError: lists all that is missing, with what to do about each.
        BaseModelMismatch: it belongs to another base model than what it was made from.
    """
    what = f"registering {MODEL_WORDS.get(model.model_type or '', 'model')} {model.name!r} ({model.model_uri})"
    missing = []
    if model.status != LoggedModelStatus.READY:
        missing.append(f"its status is {model.status}, expected READY: log it again; its run did not end well")
    if not model.params.get(PARAM_BASE_FINGERPRINT):
        missing.append(
            f"no fingerprint of the base model (param {PARAM_BASE_FINGERPRINT!r}): make it with a stage such as "
            "`softprompt train-translator`, which records it"
        )
    if not model.params.get(PARAM_DOD_DIGEST):
        missing.append(
            f"no digest of the DoD (param {PARAM_DOD_DIGEST!r}): make it from a DoD with `softprompt tune` and "
            "`softprompt train-translator`"
        )
    if not evaluation_metrics(model):
        missing.append(f"no evaluation (metrics '{EVALUATION_PREFIX}*'): run `softprompt evaluate` on it")
    if missing:
        raise RegistryError(f"{what}: its lineage is incomplete.\n" + "\n".join(f"  - {item}" for item in missing))
    for param in UPSTREAM_PARAMS:
        upstream = find_logged_model(model.params[param]) if model.params.get(param) else None
        fingerprint = upstream and upstream.params.get(PARAM_BASE_FINGERPRINT)
        if upstream is not None and fingerprint and fingerprint != model.params[PARAM_BASE_FINGERPRINT]:
            raise BaseModelMismatch(
                f"{what}: it belongs to {_base_of(model)}, but was made from {upstream.name!r} of {_base_of(upstream)}. "
                "Make it again from artifacts of one base model."
            )


def _base_of(model: LoggedModel) -> str:
    return f"{model.params.get(PARAM_BASE_MODEL, 'a base model')}@{model.params[PARAM_BASE_FINGERPRINT][:SHORT]}"


def _tags_of(model: LoggedModel) -> dict[str, str]:
    facts = {TAG_OF_PARAM[param]: model.params[param] for param in TAG_OF_PARAM if model.params.get(param)}
    facts[TAG_MODEL_TYPE] = model.model_type or ""
    facts[TAG_MODEL_ID] = model.model_id
    if model.source_run_id:
        facts[TAG_RUN_ID] = model.source_run_id
    facts.update({METRIC_TAG_PREFIX + metric: repr(value) for metric, value in evaluation_metrics(model).items()})
    return facts


def _existing_version(name: str, facts: Mapping[str, str]) -> ModelVersion | None:
    same_model = f"name = {quoted(name)} AND tags.`{TAG_MODEL_ID}` = {quoted(facts[TAG_MODEL_ID])}"
    for version in search_versions(same_model):
        if version.tags.get(TAG_ARTIFACT_DIGEST) == facts.get(TAG_ARTIFACT_DIGEST):
            return version
    return None


def _description(model: LoggedModel) -> str:
    """The facts of `_tags_of` as Markdown, with links that work inside the MLflow UI."""
    params, experiment = model.params, f"#/experiments/{model.experiment_id}"
    rows = [
        ("base model", _named_digest(params.get(PARAM_BASE_MODEL), params.get(PARAM_BASE_FINGERPRINT))),
        ("DoD", _named_digest(params.get(PARAM_DOD_NAME), params.get(PARAM_DOD_DIGEST))),
        ("task", _cell(params.get(PARAM_TASK, ""))),
        ("bank", _named_digest(None, params.get(PARAM_BANK_DIGEST))),
        ("artifact", _named_digest(None, params.get(PARAM_ARTIFACT_DIGEST))),
        ("logged model", f"[{model.model_id}]({experiment}/models/{model.model_id})"),
        ("run", f"[{model.source_run_id}]({experiment}/runs/{model.source_run_id})" if model.source_run_id else ""),
    ]
    kind = MODEL_WORDS.get(model.model_type or "", model.model_type or "model")
    lines = [f"{kind.capitalize()} `{model.name}`", "", "| fact | value |", "|---|---|"]
    lines += [f"| {fact} | {value} |" for fact, value in rows if value]
    lines += ["", "| evaluation | value |", "|---|---|"]
    lines += [f"| {_cell(metric)} | {value:.4g} |" for metric, value in evaluation_metrics(model).items()]
    return "\n".join(lines) + "\n"


def _named_digest(name: str | None, digest: str | None) -> str:
    return " ".join(part for part in (_cell(name or ""), f"`{digest}`" if digest else "") if part)


def _cell(text: str) -> str:
    """Text that cannot leave its table cell."""
    return " ".join(text.replace("|", "\\|").split())


def list_models(
    *, base: str | None = None, task: str | None = None, metric_filter: str | None = None
) -> list[ListedVersion]:
    """The versions that `register` made, by name and number.

    Args:
        base: name of the base model, or the beginning of its fingerprint.
        task: what it was made from: the task of a soft prompt or portable prompt, else the name of the DoD.
        metric_filter: one comparison such as `label_f1>=0.3`; versions without the metric are left out.
    """
    meets_metric = _comparison(metric_filter) if metric_filter is not None else None
    aliases: dict[str, dict[str, int]] = {}
    listed = []
    for version in search_versions(f"tags.`{TAG_MODEL_ID}` != ''"):
        tags = version.tags
        metrics = metrics_of_tags(tags)
        if base is not None and base != tags.get(TAG_BASE_MODEL):
            if not base or not tags.get(TAG_BASE_FINGERPRINT, "").startswith(base):
                continue
        if task is not None and task != tags.get(TAG_TASK, tags.get(TAG_DOD_NAME)):
            continue
        if meets_metric is not None and not meets_metric(metrics):
            continue
        if version.name not in aliases:
            aliases[version.name] = aliases_of(version.name) or {}
        listed.append(
            ListedVersion(
                name=version.name,
                version=int(version.version),
                aliases=tuple(
                    alias for alias, number in aliases[version.name].items() if number == int(version.version)
                ),
                model_type=tags.get(TAG_MODEL_TYPE, ""),
                base=tags.get(TAG_BASE_MODEL, ""),
                base_fingerprint=tags.get(TAG_BASE_FINGERPRINT, ""),
                dod=tags.get(TAG_DOD_NAME, ""),
                task=tags.get(TAG_TASK),
                metrics=metrics,
                created=datetime.fromtimestamp(version.creation_timestamp / 1000, UTC),
            )
        )
    return listed


_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "=": operator.eq,
}


def _comparison(text: str) -> Callable[[Mapping[str, float]], bool]:
    match = re.fullmatch(r"\s*(?:evaluation\.)?([\w./-]+?)\s*(>=|<=|>|<|=)\s*([-+.\deE]+)\s*", text)
    try:
        if match is None:
            raise ValueError
        metric, compare, limit = match[1], _COMPARISONS[match[2]], float(match[3])
    except ValueError:
        raise RegistryError(
            f"listing: the metric filter {text!r} is not a comparison; expected for instance 'label_f1>=0.3' with one of "
            f"{', '.join(_COMPARISONS)}."
        ) from None
    return lambda metrics: metric in metrics and compare(metrics[metric], limit)
