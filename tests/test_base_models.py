"""The frozen base model: how soft tokens and text are joined, scored and continued, and what its identity is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from tiny_llm import HIDDEN_SIZE, save_tiny_model, tiny_base_model, tiny_tokenizer
from tokenizers import normalizers

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.base_models.loading import (
    BASE_MODEL_VARIABLE,
    default_reference,
    load_base_model,
    load_base_model_for,
)
from softprompt_registry.base_models.reference import BaseModelRef, reference_of, require_same_base
from softprompt_registry.errors import BaseModelError, BaseModelMismatch

K = 3
ROWS = [[0, 40, 41], [0], [0, 70, 71, 72, 73, 74, 75], [0, 50, 51, 52]]
"""Token ids of different lengths, BOS first."""
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
"""float32 through two layers: the same sums in another order."""


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return tiny_base_model()


def soft_tokens(count: int, seed: int = 0) -> torch.Tensor:
    """(count, K, D)"""
    return 0.3 * torch.randn(count, K, HIDDEN_SIZE, generator=torch.Generator().manual_seed(seed))


def embeds_of(base: BaseModel, soft: torch.Tensor | None, ids: Sequence[int]) -> torch.Tensor:
    """One row without padding, put together by hand: (1, K + T, D)."""
    text = base.input_embeddings[torch.tensor(ids, dtype=torch.long)]
    return (text if soft is None else torch.cat([soft, text]))[None]


# Joining --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad_side", ["left", "right"])
@pytest.mark.parametrize("with_soft", [True, False])
def test_a_padded_batch_is_its_rows_one_at_a_time(
    base: BaseModel, pad_side: Literal["left", "right"], with_soft: bool
) -> None:
    soft = soft_tokens(len(ROWS)) if with_soft else None
    joined = base.join(soft, ROWS, pad_side=pad_side)
    longest = 7 + (K if with_soft else 0)
    assert joined.inputs_embeds.shape == (len(ROWS), longest, HIDDEN_SIZE)
    with torch.no_grad():
        batch = base.model(
            inputs_embeds=joined.inputs_embeds,
            attention_mask=joined.attention_mask,
            position_ids=joined.position_ids,
        ).logits
        for row, ids in enumerate(ROWS):
            alone = embeds_of(base, None if soft is None else soft[row], ids)
            length = alone.shape[1]
            real = slice(longest - length, longest) if pad_side == "left" else slice(0, length)
            assert joined.attention_mask[row].sum() == length and joined.attention_mask[row, real].all()
            assert joined.position_ids[row, real].tolist() == list(range(length))
            assert torch.equal(joined.inputs_embeds[row, real], alone[0])
            torch.testing.assert_close(batch[row, real], base.model(inputs_embeds=alone).logits[0], **CLOSE)


def test_soft_tokens_may_stand_alone(base: BaseModel) -> None:
    soft = soft_tokens(2)
    for pad_side in ("left", "right"):
        joined = base.join(soft, [[], []], pad_side=pad_side)  # type: ignore[arg-type]
        assert torch.equal(joined.inputs_embeds, soft) and joined.attention_mask.all()


# Scoring --------------------------------------------------------------------------------------------------------------

TARGETS = [[60, 1], [61, 62, 63, 1], [64], [65, 66, 1]]


@pytest.mark.parametrize("with_soft", [True, False])
def test_scores_are_transformers_own_loss(base: BaseModel, with_soft: bool) -> None:
    """Labels masked with -100 on everything but the target; soft tokens by `inputs_embeds` put together by hand."""
    soft = soft_tokens(len(ROWS)) if with_soft else None
    with torch.no_grad():
        scores = base.score_targets(soft, ROWS, TARGETS)
        assert scores.num_tokens.tolist() == [2, 4, 1, 3]
        for row, (ids, target) in enumerate(zip(ROWS, TARGETS, strict=True)):
            masked = [-100] * (len(ids) + (K if with_soft else 0))
            labels = torch.tensor([masked + target])
            if soft is None:
                loss = base.model(input_ids=torch.tensor([ids + target]), labels=labels).loss
            else:
                loss = base.model(inputs_embeds=embeds_of(base, soft[row], ids + target), labels=labels).loss
            torch.testing.assert_close(scores.log_likelihood[row], -loss * len(target), **CLOSE)


def test_scores_carry_a_gradient_to_the_soft_tokens_and_to_nothing_else(base: BaseModel) -> None:
    soft = soft_tokens(2).requires_grad_()
    base.score_targets(soft, ROWS[:2], TARGETS[:2]).log_likelihood[0].backward()
    assert soft.grad is not None and soft.grad[0].abs().max() > 0
    assert not soft.grad[1].any(), "row 1 has no part in the score of row 0"
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in base.model.parameters())


def test_logits_at_are_those_of_the_full_forward_pass(base: BaseModel) -> None:
    rows, columns = torch.tensor([0, 2, 2, 3]), torch.tensor([5, 0, 9, 4])
    joined = base.join(soft_tokens(len(ROWS)), ROWS, pad_side="right")
    with torch.no_grad():
        full = base.model(
            inputs_embeds=joined.inputs_embeds, attention_mask=joined.attention_mask, position_ids=joined.position_ids
        ).logits
        torch.testing.assert_close(base.logits_at(joined, rows, columns), full[rows, columns], **CLOSE)


# Generating -----------------------------------------------------------------------------------------------------------


def test_a_batch_is_continued_as_its_rows_are(base: BaseModel) -> None:
    soft = soft_tokens(len(ROWS))
    batch = base.generate(soft, ROWS, max_new_tokens=12)
    assert batch == [base.generate(soft[row : row + 1], [ids], max_new_tokens=12)[0] for row, ids in enumerate(ROWS)]
    assert len({tuple(row) for row in batch}) > 1, "rows that all say the same would prove nothing"
    assert base.generate(None, ROWS, max_new_tokens=5) == [
        base.generate(None, [ids], max_new_tokens=5)[0] for ids in ROWS
    ]


def test_greedy_text_is_the_most_likely_token_each_time(base: BaseModel) -> None:
    soft = soft_tokens(1)
    ids = [0, 40]
    with torch.no_grad():
        for _ in range(6):
            ids.append(int(base.model(inputs_embeds=embeds_of(base, soft[0], ids)).logits[0, -1].argmax()))
    assert base.generate(soft, [[0, 40]], max_new_tokens=6) == [ids[2:]]


@pytest.mark.supports(
    "tokenizers",
    "several end tokens (`generation_config.eos_token_id` is a list)",
    "each ends a text",
)
@pytest.mark.parametrize("named_by", ["tokenizer", "generation config", "list in generation config", "config"])
def test_each_row_stops_at_any_end_token_of_tokenizer_and_model(named_by: str) -> None:
    """Chat models end a turn with a token of their own, which their tokenizer does not call the end of the text."""
    base = tiny_base_model()
    soft = soft_tokens(len(ROWS), seed=1)
    free = base.generate(soft, ROWS, max_new_tokens=10)
    # What the model says anyway in the middle of its longest run of new tokens becomes the end token.
    end = next(token for row in free for token in row[2:] if token not in row[:2])
    if named_by == "tokenizer":
        base.tokenizer.eos_token = base.tokenizer.convert_ids_to_tokens(end)
    elif named_by == "config":
        base.model.generation_config.eos_token_id, base.model.config.eos_token_id = None, end
    else:
        base.model.generation_config.eos_token_id = [1, end] if named_by.startswith("list") else end
    assert base.eos_id == (end if named_by == "tokenizer" else 1), "what targets end with"
    stopped = base.generate(soft, ROWS, max_new_tokens=10)
    assert stopped == [row[: row.index(end)] if end in row else row for row in free]
    assert any(0 < len(row) < 10 for row in stopped)
    ended = [row[: row.index(end) + 1] if end in row else row for row in free]
    assert base.generate(soft, ROWS, max_new_tokens=10, keep_end=True) == ended
    rows = base.prefixes(soft).of_rows(range(len(ROWS)))  # type: ignore[union-attr]
    assert base.generate(rows, ROWS, max_new_tokens=10) == stopped
    assert base.generate(rows, ROWS, max_new_tokens=10, keep_end=True) == ended


def test_sampling_follows_its_seed_and_leaves_the_global_state_alone(base: BaseModel) -> None:
    def sample(seed: int, state: int) -> list[list[int]]:
        torch.manual_seed(state)
        before = torch.get_rng_state()
        rows = base.generate(soft_tokens(2), ROWS[:2], max_new_tokens=8, temperature=1.0, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        return rows

    with torch.random.fork_rng():
        first = sample(seed=3, state=0)
        assert sample(seed=3, state=99) == first
        assert sample(seed=4, state=0) != first
        assert base.generate(soft_tokens(2), ROWS[:2], max_new_tokens=8) != first


# Identity -------------------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_the_same_in_both_precisions_and_under_any_name(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "first")
    single = load_base_model(str(folder))
    half = load_base_model(str(folder), dtype="bfloat16")
    assert (single.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    folder.rename(tmp_path / "second")
    renamed = load_base_model(str(tmp_path / "second"))
    assert (
        single.ref.fingerprint == half.ref.fingerprint == renamed.ref.fingerprint == tiny_base_model().ref.fingerprint
    )
    assert (single.ref.name, half.ref.dtype, renamed.ref.name) == ("local:first", "bfloat16", "local:second")
    for base in (single, half, renamed):
        assert str(tmp_path) not in json.dumps(base.ref.to_json()), "a record carries no path"


def test_one_changed_weight_of_the_embedding_is_another_base_model() -> None:
    """Other weights are sampled; the embedding is hashed whole, for soft prompts start from it."""
    base = tiny_base_model()
    with torch.no_grad():
        base.model.get_input_embeddings().weight[200, 63] += 0.25
    assert fingerprint_of(base.model, base.tokenizer) != base.ref.fingerprint


def test_retrained_layers_another_tokenizer_and_another_size_are_other_base_models() -> None:
    base = tiny_base_model()
    prints = {
        base.ref.fingerprint,
        tiny_base_model(seed=1).ref.fingerprint,
        tiny_base_model(hidden_size=32).ref.fingerprint,
    }
    lower = tiny_tokenizer()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert lower.get_vocab() == base.tokenizer.get_vocab()
    prints.add(fingerprint_of(base.model, lower))
    other_end = tiny_tokenizer()
    other_end.eos_token = "<bos>"
    prints.add(fingerprint_of(base.model, other_end))
    with torch.no_grad():
        base.model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
    prints.add(fingerprint_of(base.model, base.tokenizer))
    assert len(prints) == 6


def fingerprint_of(model: Any, tokenizer: Any) -> str:
    return reference_of(model, tokenizer, name="tiny", revision=None, dtype="float32").fingerprint


def test_name_revision_and_dtype_are_for_people() -> None:
    ref = tiny_base_model().ref
    renamed = replace(ref, name="hub/name", revision="abc", dtype="bfloat16")
    assert renamed.fingerprint == ref.fingerprint and renamed != ref
    require_same_base("loading", "a bank", ref, "the model", renamed)
    assert BaseModelRef.from_json(json.loads(json.dumps(renamed.to_json()))) == renamed
    assert str(ref) == f"tiny@{ref.fingerprint[:12]} (D=64, L=2)"


# Loading --------------------------------------------------------------------------------------------------------------


def test_a_loaded_model_is_frozen_and_says_what_it_is(tiny_folder: Path) -> None:
    base = load_base_model(str(tiny_folder))
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert not base.model.training
    assert base.max_positions == 512 and base.input_embeddings.shape == (258, HIDDEN_SIZE)
    assert base.bos == [0] and base.eos_id == 1
    assert base.decode([0, *base.tokenize("déjà vu"), 1]) == "déjà vu"


@pytest.mark.parametrize(
    ("reference", "messages"),
    [
        ("packaged:gpt5", ["'packaged:gpt5'", "['smollm2-135m-instruct']", "Correct the name"]),
        ("local:mine", ["'local:mine'", "whose path is not recorded", BASE_MODEL_VARIABLE]),
        ("/no/such/folder", ["'/no/such/folder'", "a folder with config.json", BASE_MODEL_VARIABLE]),
        ("nobody/no-such-model@main", ["'nobody/no-such-model@main'", "a Hub name that this machine can reach"]),
    ],
)
def test_a_reference_that_leads_nowhere_is_explained(reference: str, messages: list[str]) -> None:
    with pytest.raises(BaseModelError) as caught:
        load_base_model(reference)
    assert all(message in str(caught.value) for message in messages), str(caught.value)


def test_a_folder_that_is_no_model_or_a_damaged_one_is_explained(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BaseModelError, match="loading base model .*empty.*: transformers could not"):
        load_base_model(str(tmp_path / "empty"))
    folder = save_tiny_model(tmp_path / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(BaseModelError, match="loading base model .*cut.*: transformers could not"):
        load_base_model(str(folder))
    with pytest.raises(BaseModelError, match="dtype 'float16' is not float32 or bfloat16"):
        load_base_model(str(folder), dtype="float16")  # type: ignore[arg-type]


def test_another_model_than_the_expected_one_is_refused_and_both_are_named(tiny_folder: Path) -> None:
    expected = tiny_base_model(seed=1, name="wanted").ref
    with pytest.raises(BaseModelMismatch) as caught:
        load_base_model(str(tiny_folder), expected=expected)
    found = tiny_base_model().ref.fingerprint[:12]
    assert f"wanted@{expected.fingerprint[:12]}" in str(caught.value)
    assert f"local:{tiny_folder.name}@{found}" in str(caught.value)


def test_an_artifact_finds_its_base_model(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ref = load_base_model(str(tiny_folder)).ref
    assert default_reference() == str(tiny_folder)
    assert load_base_model_for(ref).ref == ref
    assert load_base_model_for(replace(ref, dtype="bfloat16")).dtype == torch.bfloat16
    assert load_base_model_for(replace(ref, dtype="bfloat16"), dtype="float32").dtype == torch.float32
    other = save_tiny_model(tmp_path / "other", seed=1)
    with pytest.raises(BaseModelMismatch):
        load_base_model_for(ref, override=str(other))
    monkeypatch.delenv(BASE_MODEL_VARIABLE)
    assert default_reference() == "packaged:smollm2-135m-instruct"
    with pytest.raises(BaseModelError, match="whose path is not recorded"):
        load_base_model_for(ref)
    assert load_base_model_for(ref, override=str(tiny_folder)).ref == ref
