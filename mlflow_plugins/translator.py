"""MLflow flavor of a translator. As a pyfunc it writes soft prompts out as hard prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow.models.model import ModelInfo

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


def save_translator(flavor_name: str, loader_module: str, folder: Path, path: str | Path, **options: Any) -> None:
    """Write the translator in `folder` as an MLflow model of a flavor; no model is loaded for it."""
    record = read_record(folder)
    files = [ADAPTER_FILE, ADAPTER_CONFIG_FILE, RECORD_FILE]
    flavor_parts.require_files(folder, files)
    digest = digest_of_file(folder / ADAPTER_FILE)
    flavor_parts.save(
        flavor_name,
        loader_module,
        lambda destination: flavor_parts.copy_files(folder, destination, files),
        path,
        folder_name="translator",
        facts=flavor_parts.facts_of(record.base_model, record.num_virtual_tokens, digest, FORMAT_VERSION),
        **options,
    )


def save_model(artifact: Path, path: str | Path, **options: Any) -> None:
    """Write the translator in the folder `artifact` as an MLflow model; see `flavor_parts.save` for the options."""
    signature = flavor_parts.signature_of(["soft_prompt"], ["hard_prompt"])
    save_translator(FLAVOR_NAME, __name__, artifact, path, default_signature=signature, **options)


def log_model(artifact: Path, *, name: str, **options: Any) -> ModelInfo:
    """Log the translator in the folder `artifact` as a LoggedModel; see `flavor_parts.log` for the options."""
    return flavor_parts.log(__name__, artifact, name=name, **options)


def load_model(model_uri: str, dst_path: str | None = None) -> StoredTranslator:
    """The translator in a logged or saved model, its base model not loaded yet."""
    return StoredTranslator(flavor_parts.artifact_folder(model_uri, FLAVOR_NAME, dst_path))


def _load_pyfunc(path: str, model_config: Mapping[str, Any] | None = None) -> _WritingTranslator:
    return _WritingTranslator(StoredTranslator(Path(path)), model_config)


@dataclass(frozen=True)
class StoredTranslator:
    """A translator on the disk."""

    folder: Path

    @cached_property
    def record(self) -> TranslatorRecord:
        return read_record(self.folder)

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
