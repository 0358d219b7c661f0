"""MLflow flavor of a bank. As a pyfunc it answers each input with its base model under the soft prompt of a task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow.models.model import ModelInfo

from mlflow_plugins import flavor_parts
from softprompt_registry.soft_prompts.bank import SoftPromptBank

if TYPE_CHECKING:
    import pandas as pd

FLAVOR_NAME = "softprompt_bank"


def save_model(artifact: SoftPromptBank, path: str | Path, **options: Any) -> None:
    """Write a bank as an MLflow model: its files are copied, its tensors never read.

    Args:
        options: see `flavor_parts.save`.
    """
    header = artifact.header
    facts = flavor_parts.facts_of(artifact.base_model, int(header["K"]), artifact.digest, int(header["format_version"]))
    flavor_parts.save(
        FLAVOR_NAME,
        __name__,
        lambda folder: flavor_parts.copy_files(artifact.folder, folder, artifact.files),
        path,
        folder_name="bank",
        facts={"num_soft_prompts": len(artifact), **facts},
        default_signature=flavor_parts.signature_of(["task", "input"], ["output"]),
        **options,
    )


def log_model(artifact: SoftPromptBank, *, name: str, **options: Any) -> ModelInfo:
    """Log a bank as a LoggedModel; see `flavor_parts.log` for the options."""
    return flavor_parts.log(__name__, artifact, name=name, **options)


def load_model(model_uri: str, dst_path: str | None = None) -> SoftPromptBank:
    """The bank in a logged or saved model."""
    return SoftPromptBank(flavor_parts.artifact_folder(model_uri, FLAVOR_NAME, dst_path))


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> _AnsweringBank:
    return _AnsweringBank(SoftPromptBank(Path(path)), model_config)


class _AnsweringBank:
    """Columns `task` and `input` → column `output`."""

    def __init__(self, bank: SoftPromptBank, model_config: Mapping[str, Any] | None) -> None:
        self._bank = bank
        self._base = flavor_parts.ServedBaseModel(bank.base_model, model_config)

    def predict(self, model_input: pd.DataFrame, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        import pandas as pd

        members = {task: self._bank.member(str(task)) for task in dict.fromkeys(model_input["task"])}
        soft_prompts = [members[task] for task in model_input["task"]]
        answers = self._base.answer(soft_prompts, [str(text) for text in model_input["input"]], params)
        return pd.DataFrame({"output": answers}, index=model_input.index)
