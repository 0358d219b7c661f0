"""Soft prompts as artifacts: what is written, read back, and refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save, save_file
from small_prompts import K, assert_same, edit_json, make, numbers, tiny_ref
from tiny_llm import HIDDEN_SIZE

from softprompt_registry.errors import ArtifactError, BaseModelMismatch
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt, soft_prompt_from_bytes
from softprompt_registry.storage import folder_written_whole

# One soft prompt ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("initial", [True, False])
def test_a_soft_prompt_comes_back_as_it_was_saved(tmp_path: Path, initial: bool) -> None:
    soft_prompt = make(initial=initial)
    soft_prompt.save(tmp_path / "a")
    loaded = SoftPrompt.load(tmp_path / "a")
    assert_same(loaded, soft_prompt)
    assert loaded.num_virtual_tokens == K
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["soft_prompt.json", "soft_prompt.safetensors"]
    record = json.loads((tmp_path / "a" / "soft_prompt.json").read_text())
    assert (record["format_version"], record["K"], record["D"]) == (1, K, HIDDEN_SIZE)
    assert record["layout"] == "[soft tokens][BOS][text][EOS]"
    assert record["base_model"]["fingerprint"] == tiny_ref().fingerprint


def test_the_id_is_of_the_numbers_and_the_base_model_alone() -> None:
    soft_prompt = make()
    assert make("other task", initial=False).id == soft_prompt.id
    assert make(seed=1).id != soft_prompt.id
    assert make(base_model=tiny_ref(1)).id != soft_prompt.id
    assert make(base_model=replace(tiny_ref(), name="renamed")).id == soft_prompt.id


def with_one(bad: float) -> torch.Tensor:
    embeddings = numbers()
    embeddings[3, 17] = bad
    return embeddings


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        (
            torch.zeros(K, HIDDEN_SIZE + 1),
            f"shape (4, 65); expected (K, D) with K >= 1 and D={HIDDEN_SIZE} of base model",
        ),
        (torch.zeros(HIDDEN_SIZE), "shape (64,); expected (K, D)"),
        (torch.zeros(1, K, HIDDEN_SIZE), "shape (1, 4, 64); expected (K, D)"),
        (torch.zeros(0, HIDDEN_SIZE), "shape (0, 64); expected (K, D) with K >= 1"),
        (torch.zeros(K, HIDDEN_SIZE, dtype=torch.float64), "are torch.float64, expected torch.float32"),
        (torch.zeros(K, HIDDEN_SIZE, dtype=torch.int64), "are torch.int64, expected torch.float32"),
        (with_one(float("nan")), "hold NaN or infinity, expected finite numbers"),
        (with_one(float("-inf")), "hold NaN or infinity, expected finite numbers"),
    ],
)
def test_numbers_that_cannot_be_a_soft_prompt_are_refused(embeddings: torch.Tensor, message: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        SoftPrompt(embeddings, None, make().record)
    assert "reading soft prompt 'moods'" in str(caught.value) and message in str(caught.value)
    payload = save({"embeddings": embeddings}, metadata={"base_fingerprint": tiny_ref().fingerprint})
    with pytest.raises(ArtifactError) as caught:
        soft_prompt_from_bytes(payload, tiny_ref())
    assert "reading the soft prompt payload" in str(caught.value) and message in str(caught.value)


def test_initial_embeddings_of_another_shape_are_refused() -> None:
    with pytest.raises(ArtifactError, match=r"initial embeddings have shape \(5, 64\), the tuned ones \(4, 64\)"):
        SoftPrompt(numbers(), numbers(0, 5), make().record)


def test_a_damaged_folder_says_which_file(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    with pytest.raises(ArtifactError, match="soft_prompt.json' is missing"):
        SoftPrompt.load(folder)
    make().save(folder)
    tensors = folder / "soft_prompt.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-1])
    with pytest.raises(ArtifactError, match="soft_prompt.safetensors cannot be read .*Make it again"):
        SoftPrompt.load(folder)
    tensors.unlink()
    with pytest.raises(ArtifactError, match="soft_prompt.safetensors cannot be read"):
        SoftPrompt.load(folder)
    save_file({"weights": numbers()}, tensors)
    with pytest.raises(ArtifactError, match=r"found the tensors \['weights'\], expected one called 'embeddings'"):
        SoftPrompt.load(folder)
    tensors.write_bytes(whole)
    edit_json(folder / "soft_prompt.json", format_version=3)
    with pytest.raises(
        ArtifactError, match="its format_version is 3; this version of softprompt-registry reads 1 and 2"
    ):
        SoftPrompt.load(folder)


@pytest.mark.parametrize("changes", [{"base_model": ...}, {"task": ...}, {"base_model": {"name": "tiny"}}])
def test_a_record_without_what_it_must_say_is_an_artifact_error(tmp_path: Path, changes: dict[str, Any]) -> None:
    """A missing key was once a bare KeyError or TypeError."""
    make().save(tmp_path / "a")
    edit_json(tmp_path / "a" / "soft_prompt.json", **changes)
    with pytest.raises(ArtifactError, match="reading soft prompt .*: its record is incomplete"):
        SoftPrompt.load(tmp_path / "a")


def test_a_newer_writer_of_the_same_format_may_add_keys(tmp_path: Path) -> None:
    make().save(tmp_path / "a")
    edit_json(tmp_path / "a" / "soft_prompt.json", added_later={"x": 1})
    assert_same(SoftPrompt.load(tmp_path / "a"), make())


def test_a_failed_save_leaves_the_old_soft_prompt(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    make().save(folder)
    # The record of the second one cannot be written as JSON: its tensors are on the disk when the error comes.
    with pytest.raises(TypeError, match="not JSON serializable"):
        make(seed=1, tuning={"what": object()}).save(folder)
    assert_same(SoftPrompt.load(folder), make())
    with pytest.raises(KeyboardInterrupt), folder_written_whole(folder) as partial:
        (partial / "soft_prompt.json").write_text("{}")
        raise KeyboardInterrupt
    assert_same(SoftPrompt.load(folder), make())
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# Payloads -------------------------------------------------------------------------------------------------------------


def test_a_payload_carries_numbers_base_model_and_what_a_verifier_needs(tmp_path: Path) -> None:
    soft_prompt = make()
    payload = soft_prompt.to_bytes()
    (tmp_path / "payload").write_bytes(payload)
    with safe_open(tmp_path / "payload", framework="pt") as file:
        assert file.metadata() == {
            "format": "softprompt",
            "format_version": "1",
            "base_fingerprint": tiny_ref().fingerprint,
            "base_model": "tiny",
            "task": "moods",
            "kind": "classification",
            "template": "Sentence: {x} Label:",
        }
        assert list(file.keys()) == ["embeddings"]
    received = soft_prompt_from_bytes(payload, tiny_ref())
    assert torch.equal(received.embeddings, soft_prompt.embeddings)
    assert (received.id, received.record.task, received.record.kind) == (soft_prompt.id, "moods", "classification")
    assert received.record.template == soft_prompt.record.template
    assert received.initial_embeddings is None and received.record.ground_truth == ""


@pytest.mark.parametrize("template", ["no place for the input", "{x} and {x}", "{x}" + "a" * 500])
def test_a_template_that_cannot_be_used_is_left_out(template: str) -> None:
    received = soft_prompt_from_bytes(make(kind="poem", template=template).to_bytes(), tiny_ref())
    assert (received.record.kind, received.record.template) == ("unknown", "")


def test_the_saved_file_is_a_payload_too(tmp_path: Path) -> None:
    make().save(tmp_path / "a")
    received = soft_prompt_from_bytes((tmp_path / "a" / "soft_prompt.safetensors").read_bytes(), tiny_ref())
    assert received.id == make().id


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_payloads_are_widened(dtype: torch.dtype) -> None:
    half = numbers().to(dtype)
    received = soft_prompt_from_bytes(
        save({"embeddings": half}, metadata={"base_fingerprint": tiny_ref().fingerprint}), tiny_ref()
    )
    assert received.embeddings.dtype == torch.float32 and torch.equal(received.embeddings, half.float())
    assert received.record.task == "unnamed"


def payload_with_header(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "its 0 bytes are not safetensors"),
        (b"not safetensors at all", "its 22 bytes are not safetensors"),
        (payload_with_header(b"[]"), "are not safetensors"),
        (payload_with_header(b'{"embeddings": 3}'), "are not safetensors"),
        ((1 << 62).to_bytes(8, "little") + b"{}", "are not safetensors"),
        (save({"weights": torch.zeros(1)}), "found the tensors ['weights'], expected one called 'embeddings'"),
        (save({}), "found the tensors [], expected one called 'embeddings'"),
        (save({"embeddings": torch.zeros(K, HIDDEN_SIZE)}), "its header has no 'base_fingerprint'"),
    ],
)
def test_bytes_that_are_no_soft_prompt_are_refused(payload: bytes, message: str) -> None:
    with pytest.raises(ArtifactError) as caught:
        soft_prompt_from_bytes(payload, tiny_ref())
    assert message in str(caught.value)


def test_a_header_whose_metadata_is_null_is_refused_like_one_without() -> None:
    """safetensors reads such a file; it was once an AttributeError, which a server answers with 500."""
    data = numbers(0, 1).numpy().tobytes()
    entry = {"dtype": "F32", "shape": [1, HIDDEN_SIZE], "data_offsets": [0, len(data)]}
    header = json.dumps({"__metadata__": None, "embeddings": entry}).encode()
    with pytest.raises(ArtifactError, match="no 'base_fingerprint'|not safetensors"):
        soft_prompt_from_bytes(payload_with_header(header) + data, tiny_ref())


def test_a_cut_payload_is_refused() -> None:
    payload = make().to_bytes()
    for length in (4, 100, len(payload) - 1):
        with pytest.raises(ArtifactError, match=f"its {length} bytes are not safetensors"):
            soft_prompt_from_bytes(payload[:length], tiny_ref())


def test_a_payload_of_another_base_model_names_both() -> None:
    other = tiny_ref(1, "elsewhere")
    payload = make(base_model=other).to_bytes()
    with pytest.raises(BaseModelMismatch) as caught:
        soft_prompt_from_bytes(payload, tiny_ref())
    assert f"elsewhere@{other.fingerprint[:12]}" in str(caught.value)
    assert f"tiny@{tiny_ref().fingerprint[:12]}" in str(caught.value)
