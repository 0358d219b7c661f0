"""Artifacts of format version 1, as written on the day it was fixed; they must load for ever.

`python tests/test_golden_artifacts.py` writes them anew, which only a new format version may need.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tiny_llm import tiny_base_model

from softprompt_registry.dod.store import DodStore
from softprompt_registry.dod.task import Pair, Task
from softprompt_registry.soft_prompts.bank import SoftPromptBank
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt, SoftPromptRecord, soft_prompt_from_bytes
from softprompt_registry.translators.training import TranslatorConfig, train_translator
from softprompt_registry.translators.translator import Translator, read_record

FOLDER = Path(__file__).parent / "data" / "v1"
TASKS = {
    name: Task(name, "classification", (Pair("a", labels[0]), Pair("b", labels[1])), labels)
    for name, labels in {"colours": ("red", "blue"), "sizes": ("big", "small")}.items()
}


def numbers(offset: float) -> torch.Tensor:
    """(3, 64) float32, the same on every machine."""
    return (torch.arange(3 * 64, dtype=torch.float32).reshape(3, 64) + offset) / 128


def golden_prompts() -> list[SoftPrompt]:
    base = tiny_base_model().ref
    return [
        SoftPrompt(
            numbers(offset),
            numbers(0.0),
            SoftPromptRecord(
                task=task.name,
                kind=task.kind,
                base_model=base,
                template=task.template,
                labels=task.labels,
                task_digest=task.digest,
                ground_truth=task.ground_truth,
                metrics={"label_accuracy": 0.75},
            ),
        )
        for offset, task in enumerate(TASKS.values())
    ]


def write() -> None:
    prompts = golden_prompts()
    prompts[0].save(FOLDER / "soft_prompt")
    (FOLDER / "payload.safetensors").write_bytes(prompts[0].to_bytes())
    bank = SoftPromptBank.save(prompts, FOLDER / "bank")
    config = TranslatorConfig(lora_rank=1, target_modules=("q_proj",), epochs=1, validation_share=0.0)
    train_translator(tiny_base_model(), bank, TASKS, config, FOLDER / "translator")
    with DodStore.create(FOLDER / "dod.sqlite") as store:
        for task in TASKS.values():
            store.add_task(task)


def test_soft_prompt() -> None:
    soft_prompt = SoftPrompt.load(FOLDER / "soft_prompt")
    assert torch.equal(soft_prompt.embeddings, numbers(0.0))
    assert soft_prompt.record.labels == ("red", "blue")
    assert soft_prompt.record.metrics == {"label_accuracy": 0.75}
    assert soft_prompt.id == golden_prompts()[0].id


def test_payload() -> None:
    soft_prompt = soft_prompt_from_bytes((FOLDER / "payload.safetensors").read_bytes(), tiny_base_model().ref)
    assert torch.equal(soft_prompt.embeddings, numbers(0.0))
    assert soft_prompt.record.task == "colours"


def test_bank() -> None:
    bank = SoftPromptBank(FOLDER / "bank")
    assert list(bank.records) == ["colours", "sizes"]
    assert torch.equal(bank.member("sizes").embeddings, numbers(1.0))
    initial = bank.member("sizes").initial_embeddings
    assert initial is not None and torch.equal(initial, numbers(0.0))


def test_translator() -> None:
    base_model = tiny_base_model()
    assert read_record(FOLDER / "translator").train_tasks == ("colours", "sizes")
    translator = Translator.load(FOLDER / "translator", base_model)
    assert translator.translate(golden_prompts(), max_new_tokens=4)[0].prefill == ""


def test_dod() -> None:
    with DodStore.open(FOLDER / "dod.sqlite") as store:
        assert store.task_names() == ["colours", "sizes"]
        # Digests are stored in every artifact made from a DoD: the rule may not change within a format version.
        assert store.digest == json.loads((FOLDER / "digests.json").read_text())["dod"]
        assert store.task("colours").digest == json.loads((FOLDER / "digests.json").read_text())["colours"]


if __name__ == "__main__":
    write()
    with DodStore.open(FOLDER / "dod.sqlite") as opened:
        digests = {"dod": opened.digest, **{task.name: task.digest for task in opened.tasks()}}
    (FOLDER / "digests.json").write_text(json.dumps(digests, indent=2) + "\n")
