"""Soft prompts shared as keys and values: the same scores, gradients and texts as with the soft tokens in each row."""

from __future__ import annotations

import pytest
import torch
from tiny_llm import tiny_base_model

from softprompt_registry.base_models.decoding import RowDecoder
from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.base_models.prefixes import prefixes_in, shared_lead

TEXTS = ["a fine day", "rain", "the long and winding road to the sea", "no", "x", "what is it"]
TARGETS = [" sunny", " wet", " far", " yes", " y", " unknown"]
OWNERS = [0, 1, 1, 2, 0, 2]
"""Which of three soft prompts each row begins with."""


@pytest.fixture
def base_model() -> BaseModel:
    return tiny_base_model()


def soft_prompts(base_model: BaseModel, num_virtual_tokens: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    shape = (3, num_virtual_tokens, base_model.ref.hidden_size)
    return torch.randn(shape, generator=generator, dtype=torch.float32) * 0.3


def ids(base_model: BaseModel, texts: list[str]) -> list[list[int]]:
    return [base_model.bos + base_model.tokenize(text) for text in texts]


def targets(base_model: BaseModel) -> list[list[int]]:
    return [[*base_model.tokenize(text), base_model.eos_id] for text in TARGETS]


@pytest.mark.parametrize("before", ["", "Sentence: "], ids=["bos", "template"])
def test_scores_and_gradients_are_those_of_joined_rows(base_model: BaseModel, before: str) -> None:
    texts = ids(base_model, [before + text for text in TEXTS])
    lead = shared_lead(texts)
    assert len(lead) >= (5 if before else 1)
    joined = soft_prompts(base_model).requires_grad_()
    expected = base_model.score_targets(joined[OWNERS], texts, targets(base_model))
    weights = torch.arange(1.0, 7.0, dtype=torch.float32)
    (expected.log_likelihood * weights).sum().backward()

    shared = soft_prompts(base_model).requires_grad_()
    prefixes = base_model.prefixes(shared, lead)
    assert prefixes is not None and prefixes.num_tokens == 5 + len(lead)
    leaves = prefixes.leaves()
    found = []
    for rows in ([0, 2, 4], [1, 3, 5]):  # in two pieces, whose gradients add up
        scores = base_model.score_targets(
            leaves.of_rows([OWNERS[row] for row in rows]),
            [texts[row] for row in rows],
            [targets(base_model)[row] for row in rows],
        )
        (scores.log_likelihood * weights[rows]).sum().backward()
        found += list(zip(rows, scores.log_likelihood.tolist(), scores.num_tokens.tolist(), strict=True))
    prefixes.backward_from(leaves)

    found.sort()
    assert [row[1] for row in found] == pytest.approx(expected.log_likelihood.tolist(), rel=1e-5)
    assert [row[2] for row in found] == expected.num_tokens.tolist()
    assert shared.grad is not None and joined.grad is not None
    torch.testing.assert_close(shared.grad, joined.grad, rtol=1e-3, atol=1e-5)


def test_the_lead_is_embedded_as_the_model_embeds_it(base_model: BaseModel) -> None:
    """Some models scale the rows of their embedding matrix."""
    base_model.model.get_input_embeddings().register_forward_hook(lambda module, given, output: 3 * output)
    prompts, texts = soft_prompts(base_model), ids(base_model, TEXTS)
    prefixes = base_model.prefixes(prompts, shared_lead(texts))
    assert prefixes is not None and prefixes.lead
    expected = base_model.score_targets(prompts[OWNERS], texts, targets(base_model))
    found = base_model.score_targets(prefixes.of_rows(OWNERS), texts, targets(base_model))
    torch.testing.assert_close(found.log_likelihood, expected.log_likelihood, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("before", ["", "Sentence: "], ids=["bos", "template"])
def test_greedy_texts_are_those_of_joined_rows(base_model: BaseModel, before: str) -> None:
    prompts, texts = soft_prompts(base_model), ids(base_model, [before + text for text in TEXTS])
    expected = base_model.generate(prompts[OWNERS], texts, max_new_tokens=12)
    prefixes = base_model.prefixes(prompts, shared_lead(texts))
    assert prefixes is not None
    found = base_model.generate(prefixes.of_rows(OWNERS), texts, max_new_tokens=12)
    assert found == expected
    assert len({tuple(row) for row in found}) > 1


def test_a_decoder_goes_on_with_some_rows(base_model: BaseModel) -> None:
    rows = ids(base_model, TEXTS[:3])
    decoder = RowDecoder(base_model, base_model.join(None, rows, pad_side="left"))
    decoder.feed([7, 8, 9])
    decoder.keep([0, 2])
    decoder.feed([17, 19])
    alone = RowDecoder(base_model, base_model.join(None, [[*rows[2], 9, 19]], pad_side="left"))
    torch.testing.assert_close(decoder.logits[1], alone.logits[0], rtol=1e-5, atol=1e-6)


def test_the_lead_is_what_all_texts_begin_with_and_leaves_each_a_token(base_model: BaseModel) -> None:
    assert shared_lead([[1, 5, 6, 7], [1, 5, 6, 8], [1, 5, 9]]) == (1, 5)
    assert shared_lead([[1, 5], [1, 5, 6]]) == (1,)
    assert shared_lead([[1, 5, 6]]) == (1, 5)
    assert shared_lead([[1], [1, 5]]) == shared_lead([[2, 3], [1, 3]]) == shared_lead([]) == ()
    prefixes = base_model.prefixes(soft_prompts(base_model), (1, 5))
    assert prefixes is not None
    for wrong in ([1, 6, 7], [1, 5]):
        with pytest.raises(ValueError, match=r"must begin with the tokens \[1, 5\]"):
            base_model.join(prefixes.of_rows([0, 1]), [[1, 5, 6], wrong], pad_side="right")


def test_other_caches_are_not_taken_for_prefixes() -> None:
    from transformers import LlamaConfig, StaticCache

    config = LlamaConfig(num_hidden_layers=2, hidden_size=8, num_attention_heads=2)
    assert prefixes_in(StaticCache(config, max_cache_len=8)) is None
    assert prefixes_in(None) is None
