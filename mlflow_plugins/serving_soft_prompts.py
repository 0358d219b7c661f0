"""Where a served soft prompt comes from: the payload in the request, or the registry."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from mlflow_plugins.serving_requests import shortened
from softprompt_registry.base_models.reference import BaseModelRef
from softprompt_registry.errors import ArtifactError, SoftPromptError
from softprompt_registry.registry.lookup import split_member
from softprompt_registry.soft_prompts import bank, soft_prompt
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt, soft_prompt_from_bytes

_log = logging.getLogger(__name__)


def soft_prompt_from_payload(payload: bytes, base: BaseModelRef) -> SoftPrompt:
    try:
        return soft_prompt_from_bytes(payload, base)
    except SoftPromptError:
        raise
    except Exception as error:  # what the parser makes of bytes that someone forged
        _log.warning("a payload of %d bytes could not be read", len(payload), exc_info=True)
        raise ArtifactError(
            f"reading soft_prompt: its {len(payload)} bytes cannot be read as safetensors; expected a file like "
            "soft_prompt.safetensors. Send that file, base64-encoded."
        ) from error


def soft_prompt_from_registry(reference: str) -> SoftPrompt:
    """`models:/…` or `runs:/…`, with `#task` for a member of a bank. Downloaded each time: an alias may have moved."""
    import mlflow

    uri, task = split_member(reference)
    shown = repr(shortened(reference, 100))
    with tempfile.TemporaryDirectory() as temporary:
        try:
            root = Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=temporary))
        except Exception as error:  # every store has its own, and their texts name addresses of the server
            _log.warning("%s could not be downloaded", shown, exc_info=True)
            raise ArtifactError(
                f"reading soft_prompt {shown}: the registry of this server could not find or read it; expected a logged "
                "soft prompt, or a bank with '#' and the task. Check the name and the version."
            ) from error
        found = sorted([*root.rglob(soft_prompt.RECORD_FILE), *root.rglob(bank.HEADER_FILE)])
        if len(found) != 1:
            raise ArtifactError(
                f"reading soft_prompt {shown}: found {len(found)} soft prompts and banks there, expected one. Name one."
            )
        folder = found[0].parent
        is_bank = found[0].name == bank.HEADER_FILE
        if is_bank != (task is not None):
            what, expected = ("a bank", "'#' and a task") if is_bank else ("a soft prompt", "no '#'")
            raise ArtifactError(f"reading soft_prompt {shown}: found {what}, expected {expected} after it. Correct it.")
        try:
            return SoftPrompt.load(folder) if task is None else bank.SoftPromptBank(folder).member(task)
        except SoftPromptError as error:
            # The library's messages name the folder; a client gets the reference instead.
            raise type(error)(str(error).replace(str(folder), reference[:100])) from error
