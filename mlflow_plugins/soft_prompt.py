"""MLflow flavor of a soft prompt. As a pyfunc it answers inputs with its base model under the soft prompt."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow.models.model import ModelInfo

from mlflow_plugins import flavor_parts
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt

if TYPE_CHECKING:
    import pandas as pd

FLAVOR_NAME = "softprompt_soft_prompt"


def save_model(artifact: SoftPrompt, path: str | Path, **options: Any) -> None:
    """Write a soft prompt as an MLflow model, which names its base model and does not hold it.

    Args:
        options: see `flavor_parts.save`.
    """
    record = artifact.record
    facts = flavor_parts.facts_of(record.base_model, artifact.num_virtual_tokens, artifact.id, record.format_version)
    flavor_parts.save(
        FLAVOR_NAME,
        __name__,
        artifact.save,
        path,
        folder_name="soft_prompt",
        facts={"task": record.task, **facts},
        default_signature=flavor_parts.signature_of(["input"], ["output"]),
        **options,
    )


def log_model(artifact: SoftPrompt, *, name: str, **options: Any) -> ModelInfo:
    """Log a soft prompt as a LoggedModel; see `flavor_parts.log` for the options."""
    return flavor_parts.log(__name__, artifact, name=name, **options)


def load_model(model_uri: str, dst_path: str | None = None) -> SoftPrompt:
    """The soft prompt in a logged or saved model."""
    return SoftPrompt.load(flavor_parts.artifact_folder(model_uri, FLAVOR_NAME, dst_path))


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> _AnsweringSoftPrompt:
    return _AnsweringSoftPrompt(SoftPrompt.load(Path(path)), model_config)


class _AnsweringSoftPrompt:
    """Column `input` → column `output`."""

    def __init__(self, soft_prompt: SoftPrompt, model_config: Mapping[str, Any] | None) -> None:
        self._soft_prompt = soft_prompt
        self._base = flavor_parts.ServedBaseModel(soft_prompt.record.base_model, model_config)

    def predict(self, model_input: pd.DataFrame, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        import pandas as pd

        texts = [str(text) for text in model_input["input"]]
        answers = self._base.answer([self._soft_prompt] * len(texts), texts, params)
        return pd.DataFrame({"output": answers}, index=model_input.index)
