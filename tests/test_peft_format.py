"""PEFT prompt-tuning adapters, out and in: the real PEFT on the tiny Llama."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny_llm import bos_writing_tokenizer, save_tiny_model, sentencepiece_tokenizer, tiny_base_model, tiny_tokenizer
from tokenizers import processors
from transformers import AutoModelForCausalLM, PreTrainedModel

from softprompt_registry.base_models.frozen import LAYOUT_WITHOUT_BOS, SEQUENCE_LAYOUT, BaseModel
from softprompt_registry.base_models.loading import load_base_model
from softprompt_registry.base_models.reference import BaseModelRef
from softprompt_registry.cli import main
from softprompt_registry.dod.task import Pair
from softprompt_registry.errors import ArtifactError, BaseModelMismatch
from softprompt_registry.soft_prompts.encoding import RowEncoder, encoding_for
from softprompt_registry.soft_prompts.peft_format import export_peft, how_to_load, import_peft, what_peft_does_otherwise
from softprompt_registry.soft_prompts.soft_prompt import LAYOUTS, SoftPrompt, SoftPromptRecord

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
    return logits_of(peft.PeftModel.from_pretrained(tiny_base_model().model, str(folder)), base_model)


def logits_of(model: Any, base_model: BaseModel) -> torch.Tensor:
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


def test_out_and_in_loses_nothing(base_model: BaseModel, tmp_path: Path) -> None:
    soft_prompt = soft_prompt_of(base_model)
    export_peft(soft_prompt, tmp_path / "adapter")
    again = import_peft(tmp_path / "adapter", base_model, task="another name")
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
    soft_prompt = import_peft(tmp_path / "theirs", base_model, task="sea", labels=("calm", "rough"))
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
    again = import_peft(tmp_path / "adapter", base_model, task="weather")
    torch.testing.assert_close(again.embeddings, soft_prompt.embeddings + 0.5)
    # Unchanged it had the layout of its own; PEFT trains without a BOS.
    assert (soft_prompt.record.layout, again.record.layout) == (SEQUENCE_LAYOUT, LAYOUT_WITHOUT_BOS)
    assert again.record.metrics == {} and again.record.labels == ("wet", "dry") and again.initial_embeddings is None


def test_another_base_model_is_refused(base_model: BaseModel, tmp_path: Path) -> None:
    export_peft(soft_prompt_of(base_model), tmp_path / "adapter")
    with pytest.raises(BaseModelMismatch, match="belongs to base model"):
        import_peft(tmp_path / "adapter", tiny_base_model(seed=1), task="x")
    trained_by_peft(tmp_path / "theirs", base_model)
    with pytest.raises(ArtifactError, match="D=32"):
        import_peft(tmp_path / "theirs", tiny_base_model(hidden_size=32), task="x")


@pytest.mark.supports("adapters", "other types, sizes that contradict the tensor", "refused, in one sentence")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "LORA"}, "expected peft_type 'PROMPT_TUNING'"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "task_type 'CAUSAL_LM'"),
        ({"num_transformer_submodules": 2}, "one submodule"),
        ({"num_virtual_tokens": 5}, r"'num_virtual_tokens': 5, .* has shape \(3, 64\)"),
        ({"token_dim": 32}, r"'token_dim': 32\}, .* has shape \(3, 64\)"),
    ],
)
def test_other_adapters_are_refused(
    base_model: BaseModel, tmp_path: Path, change: dict[str, object], words: str
) -> None:
    trained_by_peft(tmp_path / "theirs", base_model)
    path = tmp_path / "theirs" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ArtifactError, match=words):
        import_peft(tmp_path / "theirs", base_model, task="x")


def saved_by_peft(folder: Path, model: PreTrainedModel, *names: str, **how: Any) -> torch.Tensor:
    """Adapters of those names (`default` for none); returns the embeddings of the last one."""
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    first, *others = names or ("default",)
    adapted = peft.get_peft_model(model, config, adapter_name=first)
    for name in others:
        adapted.add_adapter(name, config)
    adapted.save_pretrained(folder, **how)
    return adapted.get_prompt_embedding_to_save([first, *others][-1]).detach()


@pytest.mark.supports("adapters", "`adapter_model.bin`", "refused, with the call that converts it")
def test_a_pickled_adapter_is_not_opened_but_can_be_saved_again(base_model: BaseModel, tmp_path: Path) -> None:
    embeddings = saved_by_peft(tmp_path / "bin", tiny_base_model().model, safe_serialization=False)
    with pytest.raises(
        ArtifactError, match=r"pickled weights, 'adapter_model.bin', which are not opened.*save_pretrained"
    ):
        import_peft(tmp_path / "bin", base_model, task="x")
    # As the message says.
    peft.PeftModel.from_pretrained(tiny_base_model().model, tmp_path / "bin").save_pretrained(tmp_path / "again")
    assert torch.equal(import_peft(tmp_path / "again", base_model, task="x").embeddings, embeddings)


@pytest.mark.supports("adapters", "in a subfolder of its own name", "imported where it is the only one")
def test_an_adapter_with_a_name_is_found_in_its_folder(base_model: BaseModel, tmp_path: Path) -> None:
    embeddings = saved_by_peft(tmp_path / "one", tiny_base_model().model, "sea")
    assert torch.equal(import_peft(tmp_path / "one", base_model, task="x").embeddings, embeddings)
    second = saved_by_peft(tmp_path / "two", tiny_base_model().model, "sea", "mood")
    with pytest.raises(ArtifactError, match=r"holds the adapters \['mood', 'sea'\]; expected one"):
        import_peft(tmp_path / "two", base_model, task="x")
    assert torch.equal(import_peft(tmp_path / "two" / "mood", base_model, task="x").embeddings, second)
    with pytest.raises(ArtifactError, match=r"no 'adapter_config.json'; expected .* download an adapter of the Hub"):
        import_peft(tmp_path, base_model, task="x")


@pytest.mark.supports("adapters", "with embedding layers", "imported if they are the base model's")
def test_embedding_layers_beside_the_prompt_must_be_the_base_model_s(base_model: BaseModel, tmp_path: Path) -> None:
    embeddings = saved_by_peft(tmp_path / "theirs", tiny_base_model().model, save_embedding_layers=True)
    assert len(load_file(tmp_path / "theirs" / "adapter_model.safetensors")) == 3
    assert torch.equal(import_peft(tmp_path / "theirs", base_model, task="x").embeddings, embeddings)
    with pytest.raises(BaseModelMismatch, match=r"embed_tokens.weight\), whose numbers are not those of tiny@"):
        import_peft(tmp_path / "theirs", tiny_base_model(seed=1), task="x")


@pytest.mark.supports("adapters", "of a grown vocabulary", "imported with the grown base model, otherwise refused")
def test_an_adapter_of_a_grown_vocabulary_needs_the_grown_base_model(
    base_model: BaseModel, tiny_folder: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model.resize_token_embeddings(300, mean_resizing=False)
    with pytest.warns(UserWarning, match="embedding layer has been resized"):  # PEFT saves both layers by itself
        embeddings = saved_by_peft(tmp_path / "theirs", model)
    with pytest.raises(
        BaseModelMismatch, match=r"embed_tokens.weight': 300\} tokens; expected the 258 of .* --base-model"
    ):
        import_peft(tmp_path / "theirs", base_model, task="x")
    model.save_pretrained(tmp_path / "grown")
    base_model.tokenizer.save_pretrained(tmp_path / "grown")
    grown = load_base_model(str(tmp_path / "grown"))
    assert torch.equal(import_peft(tmp_path / "theirs", grown, task="x").embeddings, embeddings)


def test_an_exported_adapter_says_how_it_loads(base_model: BaseModel, tiny_folder: Path, tmp_path: Path) -> None:
    loaded = load_base_model(str(tiny_folder))
    local, soft_prompt = loaded.ref, soft_prompt_of(loaded)
    expected = our_logits(base_model, soft_prompt.embeddings)

    def load(folder: Path, base: BaseModelRef) -> torch.Tensor:
        model = eval(
            how_to_load(folder, base), {"peft": peft, "transformers": transformers, "FOLDER": str(tiny_folder)}
        )
        return logits_of(model, base_model)

    export_peft(soft_prompt, tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None  # "local:tiny" is no place that PEFT could load
    torch.testing.assert_close(load(tmp_path / "plain", local), expected, rtol=1e-5, atol=1e-5)

    export_peft(soft_prompt, tmp_path / "named", base_model_path=str(tiny_folder))
    assert how_to_load(tmp_path / "named", local).startswith("peft.AutoPeftModelForCausalLM")
    torch.testing.assert_close(load(tmp_path / "named", local), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(BaseModelMismatch):
        export_peft(soft_prompt, tmp_path / "wrong", base_model_path=str(save_tiny_model(tmp_path / "other", seed=1)))
    assert not (tmp_path / "wrong").exists()

    packaged = replace(base_model.ref, name="packaged:tiny")
    assert "load_base_model('packaged:tiny').model, '" in how_to_load(tmp_path / "plain", packaged)


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
    assert result["record"]["layout"] == LAYOUT_WITHOUT_BOS  # the tokenizer writes no BOS
    exported = CliRunner().invoke(main, ["export-peft", str(tmp_path / "ours"), "--out", str(tmp_path / "back")])
    assert exported.exit_code == 0 and "task sea" in exported.stdout and exported.stderr == ""
    assert f"from_pretrained(FOLDER), '{tmp_path / 'back'}')" in exported.stdout
    assert import_peft(tmp_path / "back", base_model, task="x").id == result["id"]
    arguments[3] = str(tmp_path / "with_bos")
    assert CliRunner().invoke(main, [*arguments, "--layout", "bos"]).exit_code == 0
    exported = CliRunner().invoke(main, ["export-peft", arguments[3], "--out", str(tmp_path / "noted")])
    assert exported.exit_code == 0 and "put the BOS ('<bos>') before each text" in exported.stderr


# PEFT's own loss -------------------------------------------------------------------------------------------------------

PAIRS = (Pair("a fine day", "calm"), Pair("wind", "rough"), Pair("hardly a wave", "calm"))


def model_with(tokenizer: Any) -> BaseModel:
    return tiny_base_model(tokenizer=tokenizer)


def rows_of_peft(tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, mask and labels (B, T), as a user of PEFT makes them: the tokenizer's ids of whole texts, the prompts masked."""
    rows, labels = [], []
    for pair in PAIRS:
        prompt = tokenizer(f"Sentence: {pair.input} Label:")["input_ids"]
        ids = [*tokenizer(f"Sentence: {pair.input} Label: {pair.output}")["input_ids"], 1]
        rows.append(torch.tensor(ids))
        labels.append(torch.tensor([-100] * len(prompt) + ids[len(prompt) :]))
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(row) for row in rows], batch_first=True)
    return pad(rows, batch_first=True), mask, pad(labels, batch_first=True, padding_value=-100)


def peft_loss(model: Any, tokenizer: Any) -> torch.Tensor:
    ids, mask, labels = rows_of_peft(tokenizer)
    loss: torch.Tensor = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    return loss


def our_loss(base: BaseModel, soft_prompt: SoftPrompt) -> float:
    encoder = RowEncoder.of(base, soft_prompt.record)
    rows = [encoder.pair(soft_prompt.record.template, pair, 200)[0] for pair in PAIRS]
    soft = soft_prompt.embeddings.expand(len(rows), -1, -1)
    with torch.no_grad():
        scores = base.score_targets(soft, [row.prompt for row in rows], [row.target for row in rows])
    return float(-scores.log_likelihood.sum() / scores.num_tokens.sum())


TOKENIZERS = pytest.mark.parametrize(
    ("make_tokenizer", "layout"),
    [
        (tiny_tokenizer, LAYOUT_WITHOUT_BOS),
        (bos_writing_tokenizer, SEQUENCE_LAYOUT),
        (lambda: sentencepiece_tokenizer("llama2", ("calm", "rough", "Label")), LAYOUT_WITHOUT_BOS),
    ],
    ids=["writes no BOS", "writes a BOS", "writes a space"],
)


@TOKENIZERS
@pytest.mark.supports(
    "adapters",
    "PEFT `PROMPT_TUNING`, trained with or without a BOS behind the soft tokens",
    "imported in its layout; our loss is PEFT's",
)
def test_after_import_our_loss_is_the_loss_of_peft(
    make_tokenizer: Callable[[], Any], layout: str, tmp_path: Path
) -> None:
    base = model_with(make_tokenizer())
    with torch.random.fork_rng():
        torch.manual_seed(5)
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        model = peft.get_peft_model(model_with(make_tokenizer()).model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-2)
    losses = []
    for _ in range(5):
        loss = peft_loss(model, base.tokenizer)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        found = peft_loss(model, base.tokenizer).item()
    assert found < losses[0]
    soft_prompt = import_peft(
        tmp_path / "theirs", base, task="sea", kind="classification", template="Sentence: {x} Label:"
    )
    assert soft_prompt.record.layout == layout
    assert our_loss(base, soft_prompt) == pytest.approx(found, rel=1e-5)
    # What was done before: the other layout, without a word.
    other = next(other for other in LAYOUTS if other != layout)
    named = import_peft(tmp_path / "theirs", base, task="sea", template="Sentence: {x} Label:", layout=other)
    assert named.record.layout == other and abs(our_loss(base, named) - found) > 1e-3


@TOKENIZERS
@pytest.mark.supports("adapters", "our soft prompts in PEFT", "exported; PEFT's loss is ours")
def test_an_exported_prompt_has_our_loss_in_peft(
    make_tokenizer: Callable[[], Any], layout: str, tmp_path: Path
) -> None:
    base = model_with(make_tokenizer())
    soft_prompt = soft_prompt_of(base)
    encoding = encoding_for(base.tokenizer)
    soft_prompt = replace(soft_prompt, record=replace(soft_prompt.record, layout=layout, encoding=encoding))
    export_peft(soft_prompt, tmp_path / "adapter")
    model = peft.PeftModel.from_pretrained(model_with(make_tokenizer()).model, str(tmp_path / "adapter"))
    with torch.no_grad():
        assert peft_loss(model, base.tokenizer).item() == pytest.approx(our_loss(base, soft_prompt), rel=1e-5)
    assert what_peft_does_otherwise(soft_prompt.record, base.tokenizer) is None


def test_where_peft_gives_another_layout_it_is_said(tmp_path: Path) -> None:
    record = soft_prompt_of(tiny_base_model()).record
    assert re.search(
        r"tuned in the layout \[soft tokens\]\[BOS\]\[text\].* gives \[soft tokens\]\[text\].* put the BOS \('<bos>'\)",
        str(what_peft_does_otherwise(record, tiny_tokenizer())),
    )
    without = replace(record, layout=LAYOUT_WITHOUT_BOS)
    assert "add_special_tokens=False" in str(what_peft_does_otherwise(without, bos_writing_tokenizer()))
    # A tokenizer that writes something else, as GLM's does: neither layout.
    other = tiny_tokenizer()
    other.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<eos> <bos> $A", special_tokens=[("<bos>", 0), ("<eos>", 1)]
    )
    assert "other special tokens" in str(what_peft_does_otherwise(record, other))
    trained_by_peft(tmp_path / "theirs", tiny_base_model())
    with pytest.raises(ArtifactError, match="other special tokens than the BOS .* Name the layout"):
        import_peft(tmp_path / "theirs", model_with(other), task="x")
    assert import_peft(tmp_path / "theirs", model_with(other), task="x", layout=SEQUENCE_LAYOUT)
