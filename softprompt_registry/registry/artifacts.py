"""From what a user names (a folder, `models:/…`, `runs:/…`, `…#task`) to files on this disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow
from mlflow.exceptions import MlflowException

from softprompt_registry.base_models.reference import BaseModelRef
from softprompt_registry.errors import ArtifactError, RegistryError
from softprompt_registry.evaluation.record import FILES, EvaluationRecord
from softprompt_registry.registry.lookup import REGISTRY_SCHEMES, find_by_uri, parse_model_uri, split_member
from softprompt_registry.registry.store import STORE_FAILURES, in_one_line, require_store
from softprompt_registry.soft_prompts.bank import SoftPromptBank
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt
from softprompt_registry.translators.translator import read_record

MARKERS = {
    "bank": "bank.json",
    "soft prompt": "soft_prompt.json",
    "translator": "translator.json",
}
"""The file whose presence tells what a folder holds."""

_FETCHED: dict[tuple[str, str | None, str], Path] = {}


@dataclass(frozen=True)
class FoundArtifact:
    """An artifact on the local disk."""

    folder: Path
    member: str | None
    """The task after `#`, for a member of a bank."""
    model_id: str | None
    """The LoggedModel it belongs to; None for a plain folder."""


def find_artifact(uri: str, kind: str) -> FoundArtifact:
    """Find (and download where needed) a `bank`, `soft prompt` or `translator`.

    Raises:
        RegistryError: nothing is there, or what is there is something else.
    """
    location, member = split_member(uri)
    model_id = None
    if location.startswith(REGISTRY_SCHEMES):
        require_store(for_run=False)
        model_id = model_id_of(location)
        try:
            root = _fetched(location, model_id, mlflow.get_tracking_uri())
        except (*STORE_FAILURES, OSError) as error:
            raise RegistryError(
                f"fetching {kind} {uri!r}: MLflow could not ({in_one_line(error)}). Check the name with "
                "`softprompt list`, and that MLFLOW_TRACKING_URI points to the store that holds it."
            ) from error
    else:
        root = Path(location)
        if not root.is_dir():
            raise RegistryError(
                f"opening {kind} {uri!r}: there is no such folder; expected a folder, models:/…, or runs:/…. Check the path."
            )
    marker = MARKERS[kind]
    # A flavor puts the artifact some folders down, among MLflow's own files.
    found = next((place.parent for place in sorted(root.rglob(marker), key=lambda place: len(place.parts))), None)
    if found is None:
        other = [name for name, file in MARKERS.items() if next(iter(root.rglob(file)), None)]
        raise RegistryError(
            f"opening {kind} {uri!r}: it holds no {marker}; it is {f'a {other[0]}' if other else 'nothing of ours'}. "
            f"Name a {kind}."
        )
    return FoundArtifact(found, member, model_id)


def _fetched(location: str, model_id: str | None, store: str) -> Path:
    """The folder of what MLflow holds. A LoggedModel does not change, and a bank is large: it is fetched once."""
    key = (location, model_id, store)
    found = _FETCHED.get(key)
    if found is None or model_id is None or not found.is_dir():
        found = _FETCHED[key] = Path(mlflow.artifacts.download_artifacts(artifact_uri=location))
    return found


def find_evaluation(run: str) -> EvaluationRecord:
    """What a run of `evaluate` found: its files, with the run's params as the settings.

    Args:
        run: its id, or `runs:/<id>`.

    Raises:
        ArtifactError: the run is not there, or is not one of `evaluate`.
    """
    run_id = run.removeprefix("runs:/").strip("/")
    prefix = "evaluation."
    try:
        params = mlflow.get_run(run_id).data.params
        settings = {key.removeprefix(prefix): value for key, value in params.items() if key.startswith(prefix)}
        with TemporaryDirectory() as folder:
            for name in FILES:
                mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=name, dst_path=folder)
            return EvaluationRecord.load(Path(folder), settings)
    except (*STORE_FAILURES, OSError) as error:
        raise ArtifactError(
            f"reading the evaluation of run {run_id!r}: {in_one_line(error)}. Expected a run of `softprompt evaluate` with "
            f"the files {', '.join(FILES)}. Give the run id that the command printed."
        ) from error


def model_id_of(uri: str) -> str | None:
    """The LoggedModel behind `models:/…` or `runs:/…`; None for a version that was not made from one.

    Raises:
        RegistryError: the URI is malformed, or the store has nothing of that name.
    """
    client = mlflow.MlflowClient()
    parts = parse_model_uri(uri)
    if parts is None or parts.name is None:
        return str(find_by_uri(client, uri).model_id)
    try:
        if parts.alias is not None:
            version = client.get_model_version_by_alias(parts.name, parts.alias)
        else:
            version = client.get_model_version(parts.name, str(parts.version))
    except MlflowException as error:
        raise RegistryError(
            f"looking up {uri!r}: the registry has no such version ({in_one_line(error)}). "
            "`softprompt list` shows what there is."
        ) from error
    source = str(version.source)
    return source.removeprefix("models:/") if source.startswith("models:/m-") else None


def find_soft_prompts(uri: str) -> list[SoftPrompt]:
    """The soft prompts that `uri` names: one, one member of a bank (`…#task`), or all members of a bank."""
    location, member = split_member(uri)
    if member is not None:
        return [SoftPromptBank(find_artifact(location, "bank").folder).member(member)]
    try:
        return [SoftPrompt.load(find_artifact(location, "soft prompt").folder)]
    except RegistryError:
        return list(SoftPromptBank(find_artifact(location, "bank").folder))


def bank_base_model(uri: str) -> BaseModelRef:
    """The base model that a bank belongs to."""
    return SoftPromptBank(find_artifact(uri, "bank").folder).base_model


def translator_base_model(uri: str) -> BaseModelRef:
    """The base model that a translator belongs to."""
    return read_record(find_artifact(uri, "translator").folder).base_model
