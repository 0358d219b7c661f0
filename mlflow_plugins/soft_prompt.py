"""MLflow flavor of a soft prompt. As a pyfunc it answers inputs with its base model under the soft prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow.models import Model
from mlflow.models.model import ModelInfo
from mlflow.models.signature import ModelSignature

from mlflow_plugins import flavor_parts
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt

if TYPE_CHECKING:
    import pandas as pd

FLAVOR_NAME = "softprompt_soft_prompt"


def get_default_pip_requirements() -> list[str]:
    """What loading the model needs, pinned."""
    return flavor_parts.default_pip_requirements()


def get_default_conda_env() -> dict[str, Any]:
    """The same as a conda environment."""
    return flavor_parts.default_conda_env()


def save_model(
    artifact: SoftPrompt,
    path: str | Path,
    mlflow_model: Model | None = None,
    signature: ModelSignature | None = None,
    input_example: Any = None,
    pip_requirements: Sequence[str] | str | None = None,
    extra_pip_requirements: Sequence[str] | str | None = None,
    metadata: dict[str, Any] | None = None,
    **kwargs: Any,
) -> None:
    """Write a soft prompt as an MLflow model; the base model is named in it, never part of it."""
    facts = flavor_parts.facts_of(
        artifact.record.base_model,
        num_virtual_tokens=artifact.num_virtual_tokens,
        digest=artifact.id,
        format_version=artifact.record.format_version,
    )
    flavor_parts.save(
        FLAVOR_NAME,
        __name__,
        artifact.save,
        path,
        folder_name="soft_prompt",
        facts={"task": artifact.record.task, **facts},
        default_signature=flavor_parts.signature_of(["input"], ["output"]),
        default_requirements=get_default_pip_requirements(),
        mlflow_model=mlflow_model,
        signature=signature,
        input_example=input_example,
        pip_requirements=pip_requirements,
        extra_pip_requirements=extra_pip_requirements,
        metadata=metadata,
        **kwargs,
    )


def log_model(
    artifact: SoftPrompt,
    *,
    name: str,
    model_id: str | None = None,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, Any] | None = None,
    registered_model_name: str | None = None,
    **kwargs: Any,
) -> ModelInfo:
    """Log a soft prompt as a LoggedModel: a new one, or the one that `model_id` names."""
    labels: dict[str, Any] = {"name": name, "model_id": model_id, "params": params, "tags": tags}
    return flavor_parts.log(__name__, artifact, **labels, registered_model_name=registered_model_name, **kwargs)


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
