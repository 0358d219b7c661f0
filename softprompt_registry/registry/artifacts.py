"""From what a user names (a folder, `models:/…`, `runs:/…`, `…#task`) to files on this disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow

from softprompt_registry.base_models.reference import BaseModelRef
from softprompt_registry.errors import ArtifactError, RegistryError
from softprompt_registry.evaluation.record import FILES, EvaluationRecord
from softprompt_registry.portability.analysis import Portability
from softprompt_registry.portability.answers import Answer
from softprompt_registry.registry.lookup import (
    REGISTRY_SCHEMES,
    find_by_uri,
    model_id_of,
    parse_model_uri,
    run_id_of,
    split_member,
    version_by_uri,
)
from softprompt_registry.registry.store import STORE_FAILURES, in_one_line, require_store
from softprompt_registry.soft_prompts.bank import SoftPromptBank
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt
from softprompt_registry.storage import complete_record, read_json
from softprompt_registry.translators.translator import read_record

ANSWERS, RESULT = "answers.json", "portability.json"
"""Files of a portability run, from which all of its numbers and its page can be made again."""
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
        parts = parse_model_uri(location)
        if parts is not None and parts.name is not None:
            model_id = model_id_of(version_by_uri(location, parts))
        else:
            model_id = str(find_by_uri(location).model_id)
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
    run_id = run_id_of(run)
    prefix = "evaluation."
    with TemporaryDirectory() as folder:
        _fetch(run_id, "evaluate", "evaluation", FILES, folder)
        params = mlflow.get_run(run_id).data.params
        settings = {key.removeprefix(prefix): value for key, value in params.items() if key.startswith(prefix)}
        return EvaluationRecord.load(Path(folder), settings)


def find_portability(run: str) -> tuple[Portability, list[Answer]]:
    """The result and the answers of a run of `portability`.

    Raises:
        ArtifactError: the run is not there, or is not one of `portability`.
    """
    what = "the answers of a portability run"
    with TemporaryDirectory() as folder:
        _fetch(run_id_of(run), "portability", "portability", (RESULT, ANSWERS), folder)
        result, rows = (read_json(Path(folder) / name, what) for name in (RESULT, ANSWERS))
    with complete_record(what):
        return Portability.from_json(result), [Answer.from_json(row) for row in rows["answers"]]


def _fetch(run_id: str, command: str, what: str, files: Sequence[str], folder: str) -> None:
    try:
        for name in files:
            mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=name, dst_path=folder)
    except (*STORE_FAILURES, OSError) as error:
        raise ArtifactError(
            f"reading the {what} of run {run_id!r}: {in_one_line(error)}. Expected a run of `softprompt {command}` with "
            f"the files {', '.join(files)}. Give the run id that the command printed."
        ) from error


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
