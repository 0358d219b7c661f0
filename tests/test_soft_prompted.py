"""A soft prompt as a language model to ask: the answers of transformers' own generation, its limits, what it counts."""

from __future__ import annotations

import pytest
import torch
from small_prompts import K, make
from tiny_llm import tiny_base_model

from softprompt_registry.errors import BaseModelMismatch, LanguageModelError
from softprompt_registry.language_models.protocol import Completion, CompletionRequest
from softprompt_registry.portability.soft_prompted import SoftPrompted

PROMPTS = ["Sentence: a Label:", "Sentence: a much longer one than that Label:", "Sentence: b Label:"]


def answered(model: SoftPrompted, *requests: CompletionRequest) -> list[Completion]:
    found = model.complete(requests)
    assert all(isinstance(item, Completion) for item in found), found
    return [item for item in found if isinstance(item, Completion)]


def test_each_answer_is_the_greedy_one_of_transformers_for_that_row_alone() -> None:
    base, prompt = tiny_base_model(), make()
    requests = [CompletionRequest(text, max_tokens=12) for text in PROMPTS]
    found = answered(SoftPrompted(base, prompt, batch_size=2), *requests)
    for text, completion in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([[base.tokenizer.bos_token_id, *base.tokenizer(text)["input_ids"]]])
        embeds = torch.cat([prompt.embeddings[None], base.model.get_input_embeddings()(ids)], dim=1)
        output = base.model.generate(inputs_embeds=embeds, max_new_tokens=12, do_sample=False, eos_token_id=1)[0]
        expected = base.tokenizer.decode([token for token in output.tolist() if token != 1])
        assert completion.text == expected.removeprefix(" ")
        assert completion.prompt_tokens == K + ids.shape[1]


def test_each_row_ends_at_its_own_limit_and_its_own_stop() -> None:
    base, prompt = tiny_base_model(), make()
    long, short = answered(
        SoftPrompted(base, prompt), *(CompletionRequest(PROMPTS[0], max_tokens=limit) for limit in (12, 4))
    )
    assert (short.completion_tokens, short.finish_reason) == (4, "length")
    whole = base.decode(base.generate(prompt.embeddings[None], [_ids(PROMPTS[0])], max_new_tokens=12)[0])
    stop = whole[3]
    (cut,) = answered(SoftPrompted(base, prompt), CompletionRequest(PROMPTS[0], max_tokens=12, stop=(stop,)))
    assert cut.text == whole[: whole.index(stop)].removeprefix(" ") and cut.finish_reason == "stop"
    assert long.text.startswith(cut.text)


def test_what_does_not_fit_is_an_error_of_that_request_alone() -> None:
    model = SoftPrompted(tiny_base_model(), make())
    fine, too_long, with_system = model.complete(
        [
            CompletionRequest(PROMPTS[0], max_tokens=4),
            CompletionRequest("x" * 600, max_tokens=4),
            CompletionRequest(PROMPTS[0], system="Be brief.", max_tokens=4),
        ]
    )
    assert isinstance(fine, Completion)
    assert isinstance(too_long, LanguageModelError) and "601 tokens" in str(too_long)
    assert isinstance(with_system, LanguageModelError) and "a system text" in str(with_system)
    assert too_long.about_request and not too_long.retryable


def test_another_soft_prompt_is_another_identity_and_another_base_model_is_refused() -> None:
    base = tiny_base_model()
    assert SoftPrompted(base, make(seed=0)).identity != SoftPrompted(base, make(seed=1)).identity
    with pytest.raises(BaseModelMismatch, match="soft prompt of task 'moods'"):
        SoftPrompted(tiny_base_model(seed=1), make())


def _ids(text: str) -> list[int]:
    base = tiny_base_model()
    return [*base.bos, *base.tokenize(text)]
