"""PEFT prompt-tuning adapters, out and in: the real PEFT on the tiny Llama."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny_llm import tiny_base_model

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.base_models.loading import load_base_model
from softprompt_registry.cli import main
from softprompt_registry.errors import ArtifactError, BaseModelMismatch
from softprompt_registry.soft_prompts.peft_format import export_peft, import_peft
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt, SoftPromptRecord

TEXT = "a fine day at the sea"


@pytest.fixture(scope="module")
def base_model() -> BaseModel:
    return tiny_base_model()


def soft_prompt_of(base_model: BaseModel, seed: int = 0) -> SoftPrompt:
    generator = torch.Generator().manual_seed(seed)
    shape = (4, base_model.ref.hidden_size)
    record = SoftPromptRecord(
        task="weather",
        kind="classification",
        base_model=base_model.ref,
        template="Sentence: {x} Label:",
        labels=("wet", "dry"),
        ground_truth="wet, dry",
        metrics={"label_accuracy": 0.75},
        tuning={"epochs": 3},
    )
    return SoftPrompt(
        torch.randn(shape, generator=generator) * 0.3, torch.randn(shape, generator=generator) * 0.3, record
    )


def logits_through_peft(base_model: BaseModel, folder: Path) -> torch.Tensor:
    """(T, V): the logits at the text's tokens."""
    model = peft.PeftModel.from_pretrained(tiny_base_model().model, str(folder))
    ids = torch.tensor([base_model.bos + base_model.tokenize(TEXT)])
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return output.logits[0, -ids.shape[1] :]


def our_logits(base_model: BaseModel, embeddings: torch.Tensor) -> torch.Tensor:
    ids = base_model.bos + base_model.tokenize(TEXT)
    joined = base_model.join(embeddings[None], [ids], pad_side="right")
    columns = len(embeddings) + torch.arange(len(ids))
    with torch.no_grad():
        return base_model.logits_at(joined, torch.zeros(len(ids), dtype=torch.long), columns)


def test_ours_gives_the_same_logits_through_peft(base_model: BaseModel, tmp_path: Path) -> None:
    soft_prompt = soft_prompt_of(base_model)
    export_peft(soft_prompt, tmp_path / "adapter")
    found = logits_through_peft(base_model, tmp_path / "adapter")
    torch.testing.assert_close(found, our_logits(base_model, soft_prompt.embeddings), rtol=1e-5, atol=1e-5)


def test_out_and_in_loses_nothing(base_model: BaseModel, tmp_path: Path) -> None:
    soft_prompt = soft_prompt_of(base_model)
    export_peft(soft_prompt, tmp_path / "adapter")
    again = import_peft(tmp_path / "adapter", base_model.ref, task="another name")
    assert again.record == soft_prompt.record and again.id == soft_prompt.id
    assert again.initial_embeddings is not None and soft_prompt.initial_embeddings is not None
    assert torch.equal(again.initial_embeddings, soft_prompt.initial_embeddings)
    assert SoftPrompt.load(tmp_path / "adapter").id == soft_prompt.id  # the folder is one of ours as well
    with pytest.raises(ArtifactError, match="exists already"):
        export_peft(soft_prompt, tmp_path / "adapter")


def trained_by_peft(folder: Path, base_model: BaseModel) -> torch.Tensor:
    """A few steps of PEFT's own prompt tuning; returns its embeddings."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = peft.get_peft_model(tiny_base_model().model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.tensor([base_model.bos + base_model.tokenize(TEXT)])
    for _ in range(3):
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return model.get_prompt_embedding_to_save("default").detach()


def test_an_adapter_trained_by_peft_becomes_a_soft_prompt(base_model: BaseModel, tmp_path: Path) -> None:
    embeddings = trained_by_peft(tmp_path / "theirs", base_model)
    soft_prompt = import_peft(tmp_path / "theirs", base_model.ref, task="sea", labels=("calm", "rough"))
    assert torch.equal(soft_prompt.embeddings, embeddings) and soft_prompt.initial_embeddings is None
    assert soft_prompt.record.ground_truth == "calm, rough"
    found = our_logits(base_model, soft_prompt.embeddings)
    torch.testing.assert_close(found, logits_through_peft(base_model, tmp_path / "theirs"), rtol=1e-5, atol=1e-5)
    soft_prompt.save(tmp_path / "ours")
    assert SoftPrompt.load(tmp_path / "ours").id == soft_prompt.id


def test_an_exported_prompt_that_was_trained_further_keeps_no_old_numbers(
    base_model: BaseModel, tmp_path: Path
) -> None:
    soft_prompt = soft_prompt_of(base_model)
    export_peft(soft_prompt, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({"prompt_embeddings": load_file(path)["prompt_embeddings"] + 0.5}, path)
    again = import_peft(tmp_path / "adapter", base_model.ref, task="weather")
    torch.testing.assert_close(again.embeddings, soft_prompt.embeddings + 0.5)
    assert again.record.metrics == {} and again.record.labels == ("wet", "dry") and again.initial_embeddings is None


def test_another_base_model_is_refused(base_model: BaseModel, tmp_path: Path) -> None:
    export_peft(soft_prompt_of(base_model), tmp_path / "adapter")
    with pytest.raises(BaseModelMismatch, match="belongs to base model"):
        import_peft(tmp_path / "adapter", tiny_base_model(seed=1).ref, task="x")
    trained_by_peft(tmp_path / "theirs", base_model)
    with pytest.raises(ArtifactError, match="D=32"):
        import_peft(tmp_path / "theirs", tiny_base_model(hidden_size=32).ref, task="x")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "LORA"}, "expected peft_type 'PROMPT_TUNING'"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "task_type 'CAUSAL_LM'"),
        ({"num_transformer_submodules": 2}, "one submodule"),
    ],
)
def test_other_adapters_are_refused(
    base_model: BaseModel, tmp_path: Path, change: dict[str, object], words: str
) -> None:
    trained_by_peft(tmp_path / "theirs", base_model)
    path = tmp_path / "theirs" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ArtifactError, match=words):
        import_peft(tmp_path / "theirs", base_model.ref, task="x")


def test_a_pickled_adapter_is_not_opened(base_model: BaseModel, tmp_path: Path) -> None:
    trained_by_peft(tmp_path / "theirs", base_model)
    (tmp_path / "theirs" / "adapter_model.safetensors").rename(tmp_path / "theirs" / "adapter_model.bin")
    with pytest.raises(ArtifactError, match="Pickled adapters .* are not opened"):
        import_peft(tmp_path / "theirs", base_model.ref, task="x")


def test_by_commands(tiny_folder: Path, tmp_path: Path) -> None:
    base_model = load_base_model(str(tiny_folder))
    trained_by_peft(tmp_path / "theirs", base_model)
    arguments = ["import-peft", str(tmp_path / "theirs"), "--out", str(tmp_path / "ours"), "--task", "sea", "--json"]
    imported = CliRunner().invoke(main, [*arguments, "--label", "calm", "--label", "rough"])
    assert imported.exit_code == 0, imported.output
    result = json.loads(imported.stdout)
    assert result["record"]["kind"] == "classification" and result["record"]["labels"] == ["calm", "rough"]
    again = CliRunner().invoke(main, [*arguments, "--label", "calm", "--label", "rough"])
    assert again.exit_code == 1 and "exists already" in again.stderr
    exported = CliRunner().invoke(main, ["export-peft", str(tmp_path / "ours"), "--out", str(tmp_path / "back")])
    assert exported.exit_code == 0 and "task sea" in exported.stdout
    assert import_peft(tmp_path / "back", base_model.ref, task="x").id == result["id"]
