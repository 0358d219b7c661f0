"""Soft prompts of a few numbers, for tests of what holds them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from tiny_llm import HIDDEN_SIZE, tiny_base_model

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.base_models.reference import BaseModelRef
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt, SoftPromptRecord
from softprompt_registry.translators.translator import Translator, TranslatorRecord, adapter_parameters, add_adapter
from softprompt_registry.verbalization.proposers.translator import TranslatorProposer
from softprompt_registry.verbalization.verbalizer import Candidate, VerbalizationConfig

K = 4


@cache
def tiny_ref(seed: int = 0, name: str = "tiny") -> BaseModelRef:
    return tiny_base_model(seed, name=name).ref


def numbers(seed: int = 0, num_virtual_tokens: int = K) -> torch.Tensor:
    """(K, D)"""
    return torch.randn(num_virtual_tokens, HIDDEN_SIZE, generator=torch.Generator().manual_seed(seed))


def make(task: str = "moods", seed: int = 0, *, initial: bool = True, **changes: Any) -> SoftPrompt:
    record = SoftPromptRecord(
        task=task,
        kind="classification",
        base_model=tiny_ref(),
        template="Sentence: {x} Label:",
        labels=("joy", "fear"),
        task_digest="ab" * 32,
        dod_name="sample",
        dod_digest="cd" * 32,
        ground_truth="joy, fear",
        tuning={"epochs": 2, "train_losses": [2.5, 1.25]},
        metrics={"validation_loss": 1.5},
    )
    return SoftPrompt(numbers(seed), numbers(99) if initial else None, replace(record, **changes))


def assert_same(found: SoftPrompt, expected: SoftPrompt) -> None:
    assert torch.equal(found.embeddings, expected.embeddings)
    assert (found.initial_embeddings is None) == (expected.initial_embeddings is None)
    if found.initial_embeddings is not None and expected.initial_embeddings is not None:
        assert torch.equal(found.initial_embeddings, expected.initial_embeddings)
    assert found.record == expected.record
    assert found.id == expected.id


def edit_json(path: Path, **changes: Any) -> None:
    record = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in record.items() if value is not ...}))


def tiny_translator(base_model: BaseModel | None = None, seed: int = 0) -> Translator:
    """An untrained translator whose adapter changes what the base model says."""
    base = base_model or tiny_base_model()
    add_adapter(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), "made")
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(adapter_parameters(base, "made").items()):
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return Translator(base, TranslatorRecord(base.ref, K), "made")


def translated(translator: Translator, soft_prompts: Sequence[SoftPrompt], **settings: Any) -> list[Candidate]:
    """Each soft prompt's greedy text as the translator writes it, label lists uncleaned."""
    as_written = [replace(each, record=replace(each.record, kind="generation")) for each in soft_prompts]
    found = TranslatorProposer(translator).propose(as_written, VerbalizationConfig(**settings))
    return [candidates[0] for candidates in found]
