"""Artifacts of every format version, as written on the day it was fixed; they must load for ever.

`python tests/test_golden_artifacts.py` writes the current ones anew, which only a new format version may need: versions 1 and
2 of the soft prompt, 2 and 3 of the bank, and 1 of all others. The bank of version 1 in `data/v1/bank` was written by 0.1.0,
and nothing writes it any more.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_prompts import translated
from tiny_llm import tiny_base_model

from softprompt_registry.base_models.frozen import LAYOUT_WITHOUT_BOS
from softprompt_registry.dod.store import DodStore
from softprompt_registry.dod.task import Pair, Task
from softprompt_registry.errors import ArtifactError
from softprompt_registry.soft_prompts.bank import BankWriter, SoftPromptBank
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt, SoftPromptRecord, soft_prompt_from_bytes
from softprompt_registry.storage import check_format_version, folder_written_whole
from softprompt_registry.translators.training import TranslatorConfig, train_translator
from softprompt_registry.translators.translator import Translator, read_record

FOLDER = Path(__file__).parent / "data" / "v1"
BANK = Path(__file__).parent / "data" / "v2" / "bank"
SOFT_PROMPT_2 = Path(__file__).parent / "data" / "v2" / "soft_prompt"
BANK_3 = Path(__file__).parent / "data" / "v3" / "bank"
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


def in_other_layouts() -> list[SoftPrompt]:
    """What a reader of version 1 would misunderstand: one without a BOS, one encoded as one text."""
    first, second = golden_prompts()
    return [
        replace(first, record=replace(first.record, layout=LAYOUT_WITHOUT_BOS)),
        replace(second, record=replace(second.record, encoding=2)),
    ]


def write_bank(prompts: list[SoftPrompt]) -> SoftPromptBank:
    """Two shards, added last first, one start for both, one task that failed."""
    with folder_written_whole(BANK) as partial, BankWriter(partial, rows_per_shard=1) as writer:
        writer.add(2, prompts[1])
        writer.add(0, prompts[0])
        writer.fail(1, "shapes", "its train loss became nan in epoch 1")
        writer.finish("0123456789ab")
    return SoftPromptBank(BANK)


def write() -> None:
    prompts = golden_prompts()
    prompts[0].save(FOLDER / "soft_prompt")
    (FOLDER / "payload.safetensors").write_bytes(prompts[0].to_bytes())
    bank = write_bank(prompts)
    in_other_layouts()[0].save(SOFT_PROMPT_2)
    SoftPromptBank.save(in_other_layouts(), BANK_3)
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


def test_soft_prompt_and_bank_in_other_layouts() -> None:
    expected = [prompt.record for prompt in in_other_layouts()]
    assert SoftPrompt.load(SOFT_PROMPT_2).record == expected[0]
    payload = (SOFT_PROMPT_2 / "soft_prompt.safetensors").read_bytes()
    assert soft_prompt_from_bytes(payload, tiny_base_model().ref).record.layout == LAYOUT_WITHOUT_BOS
    bank = SoftPromptBank(BANK_3)
    assert bank.header["format_version"] == 3 and [member.record for member in bank] == expected
    # Readers of version 1, and of version 2 of the bank, put other tokens behind these: they refuse by the number.
    for folder, name, version in ((SOFT_PROMPT_2, "soft_prompt.json", 1), (BANK_3, "bank.json", 2)):
        with pytest.raises(ArtifactError, match=f"its format_version is {version + 1}; .* reads {version}"):
            check_format_version(json.loads((folder / name).read_text()), version, "it")


def test_payload() -> None:
    soft_prompt = soft_prompt_from_bytes((FOLDER / "payload.safetensors").read_bytes(), tiny_base_model().ref)
    assert torch.equal(soft_prompt.embeddings, numbers(0.0))
    assert soft_prompt.record.task == "colours"


@pytest.mark.parametrize(("version", "folder"), [(1, FOLDER / "bank"), (2, BANK)])
def test_bank(version: int, folder: Path) -> None:
    bank = SoftPromptBank(folder)
    assert bank.header["format_version"] == version
    assert bank.tasks() == ["colours", "sizes"]
    assert torch.equal(bank.member("sizes").embeddings, numbers(1.0))
    initial = bank.member("sizes").initial_embeddings
    assert initial is not None and torch.equal(initial, numbers(0.0))
    assert [member.id for member in bank] == [prompt.id for prompt in golden_prompts()]
    assert [member.record for member in bank] == [prompt.record for prompt in golden_prompts()]
    # Translators name the bank that they were made from: the rule may not change.
    assert bank.digest == "ef095291951aa29d1e66a4488654ffd302de11e6e8164a606dd06abe49d193fd"
    assert sorted(bank.files) == sorted(path.name for path in folder.iterdir())


def test_bank_of_version_2_has_its_failures_and_shards() -> None:
    bank = SoftPromptBank(BANK)
    assert bank.failures() == {"shapes": "its train loss became nan in epoch 1"}
    assert (bank.header["made_from"], bank.header["num_failed"], bank.header["rows_per_shard"]) == (
        "0123456789ab",
        1,
        1,
    )
    first = load_file(BANK / "embeddings-00000.safetensors")["embeddings"]
    assert torch.equal(first, numbers(1.0)[None])
    assert len(bank.files) == 5


def test_translator() -> None:
    base_model = tiny_base_model()
    assert read_record(FOLDER / "translator").train_tasks == ("colours", "sizes")
    translator = Translator.load(FOLDER / "translator", base_model)
    assert translated(translator, golden_prompts(), max_new_tokens=4)[0].prefill == ""


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
