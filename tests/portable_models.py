"""A servable model on the tiny Llama, with soft prompts for it: what the tests of serving have in common."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import torch
from mlflow.pyfunc import PyFuncModel
from small_prompts import tiny_translator, translated
from tiny_llm import HIDDEN_SIZE, save_tiny_model

from mlflow_plugins import portable_prompt
from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.base_models.loading import load_base_model
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt, SoftPromptRecord
from softprompt_registry.translators.translator import Translator

NUM_VIRTUAL_TOKENS = 4


@dataclass(frozen=True)
class PortableModel:
    """Folders of the base model, the translator and the MLflow model, and the translator loaded natively."""

    base_folder: Path
    translator_folder: Path
    model_folder: Path
    translator: Translator

    @property
    def base_model(self) -> BaseModel:
        return self.translator.base_model

    def soft_prompt(self, seed: int = 0) -> SoftPrompt:
        generator = torch.Generator().manual_seed(seed)
        embeddings = torch.randn(NUM_VIRTUAL_TOKENS, HIDDEN_SIZE, generator=generator)
        record = SoftPromptRecord("tones", "classification", self.base_model.ref, "{x}")
        return SoftPrompt(embeddings, None, record)

    def served(self, **model_config: Any) -> PyFuncModel:
        return mlflow.pyfunc.load_model(str(self.model_folder), model_config=model_config)

    def text(self, soft_prompt_seed: int = 0, **settings: Any) -> str:
        """The native answer: what the translator writes, greedily."""
        return translated(self.translator, [self.soft_prompt(soft_prompt_seed)], **settings)[0].text


def make_portable_model(folder: Path, **model_config: Any) -> PortableModel:
    base_folder = save_tiny_model(folder / "tiny")
    tiny_translator(load_base_model(str(base_folder)), seed=1).save(folder / "translator")
    portable_prompt.save_model(folder / "translator", folder / "model", model_config=model_config)
    translator = Translator.load(folder / "translator", load_base_model(str(base_folder)))
    return PortableModel(base_folder, folder / "translator", folder / "model", translator)


def predict(model: PyFuncModel, *rows: dict[str, Any], **params: Any) -> list[dict[str, Any]]:
    """The results of these rows, with short texts."""
    answer = model.predict(pd.DataFrame(list(rows)), params={"max_new_tokens": 8, **params})
    results: list[dict[str, Any]] = answer.to_dict(orient="records")
    return results


def encoded(payload: bytes) -> str:
    return base64.b64encode(payload).decode()
