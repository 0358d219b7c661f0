"""MLflow flavor of a translator. As a pyfunc it writes soft prompts out as hard prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow.models import Model
from mlflow.models.model import ModelInfo
from mlflow.models.signature import ModelSignature

from mlflow_plugins import flavor_parts
from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.base_models.loading import load_base_model_for
from softprompt_registry.fingerprints import digest_of_file
from softprompt_registry.translators.translator import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    FORMAT_VERSION,
    RECORD_FILE,
    Translator,
    TranslatorRecord,
    read_record,
)

if TYPE_CHECKING:
    import pandas as pd

FLAVOR_NAME = "softprompt_translator"


def get_default_pip_requirements() -> list[str]:
    """What loading the model needs, pinned."""
    return flavor_parts.default_pip_requirements()


def get_default_conda_env() -> dict[str, Any]:
    """The same as a conda environment."""
    return flavor_parts.default_conda_env()


def save_model(
    artifact: Path,
    path: str | Path,
    mlflow_model: Model | None = None,
    signature: ModelSignature | None = None,
    input_example: Any = None,
    pip_requirements: Sequence[str] | str | None = None,
    extra_pip_requirements: Sequence[str] | str | None = None,
    metadata: dict[str, Any] | None = None,
    **kwargs: Any,
) -> None:
    """Write the translator in the folder `artifact` as an MLflow model; no model is loaded for it."""
    record = read_record(artifact)
    files = [ADAPTER_FILE, ADAPTER_CONFIG_FILE, RECORD_FILE]
    flavor_parts.require_files(artifact, files)
    facts = flavor_parts.facts_of(
        record.base_model,
        num_virtual_tokens=record.num_virtual_tokens,
        digest=digest_of_file(artifact / ADAPTER_FILE),
        format_version=FORMAT_VERSION,
    )
    flavor_parts.save(
        FLAVOR_NAME,
        __name__,
        lambda folder: flavor_parts.copy_files(artifact, folder, files),
        path,
        folder_name="translator",
        facts=facts,
        default_signature=flavor_parts.signature_of(["soft_prompt"], ["hard_prompt"]),
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
    artifact: Path,
    *,
    name: str,
    model_id: str | None = None,
    params: Mapping[str, Any] | None = None,
    tags: Mapping[str, Any] | None = None,
    registered_model_name: str | None = None,
    **kwargs: Any,
) -> ModelInfo:
    """Log a translator as a LoggedModel: a new one, or the one that `model_id` names."""
    labels: dict[str, Any] = {"name": name, "model_id": model_id, "params": params, "tags": tags}
    return flavor_parts.log(__name__, artifact, **labels, registered_model_name=registered_model_name, **kwargs)


def load_model(model_uri: str, dst_path: str | None = None) -> StoredTranslator:
    """The translator in a logged or saved model, its base model not loaded yet."""
    folder = flavor_parts.artifact_folder(model_uri, FLAVOR_NAME, dst_path)
    return StoredTranslator(folder, read_record(folder))


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> _WritingTranslator:
    return _WritingTranslator(StoredTranslator(Path(path), read_record(Path(path))), model_config)


@dataclass(frozen=True)
class StoredTranslator:
    """A translator on the disk."""

    folder: Path
    record: TranslatorRecord

    def load(self, base_model: BaseModel | str | None = None) -> Translator:
        """Put it on a loaded base model, on the one that a reference names, or on the one that its record names.

        Raises:
            BaseModelMismatch: it belongs to another base model.
        """
        if not isinstance(base_model, BaseModel):
            base_model = load_base_model_for(self.record.base_model, override=base_model)
        return Translator.load(self.folder, base_model)


class _WritingTranslator:
    """Column `soft_prompt`, base64 of a soft_prompt.safetensors → column `hard_prompt`."""

    def __init__(self, stored: StoredTranslator, model_config: Mapping[str, Any] | None) -> None:
        self._stored = stored
        self._base = flavor_parts.ServedBaseModel(stored.record.base_model, model_config)
        self._translator: Translator | None = None

    def predict(self, model_input: pd.DataFrame, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        import pandas as pd

        from softprompt_registry.verbalization.proposers.translator import TranslatorProposer
        from softprompt_registry.verbalization.verbalizer import VerbalizationConfig

        config = VerbalizationConfig(num_candidates=1, max_new_tokens=self._base.max_new_tokens(params))
        soft_prompts = [
            flavor_parts.soft_prompt_from_base64(str(text), row, self._stored.record.base_model)
            for row, text in enumerate(model_input["soft_prompt"])
        ]
        with self._base.in_use() as base_model:
            if self._translator is None:
                self._translator = self._stored.load(base_model)
            candidates = TranslatorProposer(self._translator).propose(soft_prompts, config)
        return pd.DataFrame({"hard_prompt": [row[0].text for row in candidates]}, index=model_input.index)
