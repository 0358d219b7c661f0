"""Requests answered in this process, by a tiny Llama whose weights are random: rules hold although it knows nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count, islice
from typing import Any

import pytest
import torch
from tiny_llm import tiny_base_model

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.dod.answer_checks import label_set_schema, sentences_schema
from softprompt_registry.errors import ConfigError, LanguageModelError
from softprompt_registry.language_models.local_prompts import prompt_ids
from softprompt_registry.language_models.on_transformers import OnTransformers, TransformersConfig
from softprompt_registry.language_models.protocol import Completion, CompletionRequest

PROMPTS = ["Hi", "A longer prompt than the first", "x", "Some words, and 雨", "The sixth is not here"]
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def base_model() -> BaseModel:
    return tiny_base_model()


def model_of(base_model: BaseModel, batch_size: int = 8) -> OnTransformers:
    prompt_format: Any = "chat" if base_model.tokenizer.chat_template else "plain"
    return OnTransformers(TransformersConfig("tiny", prompt_format=prompt_format, batch_size=batch_size), base_model)


def answers(base_model: BaseModel, *requests: CompletionRequest, batch_size: int = 8) -> list[Completion]:
    results = model_of(base_model, batch_size).complete(requests)
    assert all(isinstance(result, Completion) for result in results), results
    return [result for result in results if isinstance(result, Completion)]


def what_was_said(completions: list[Completion]) -> list[tuple[str, int, str | None]]:
    return [(answer.text, answer.completion_tokens, answer.finish_reason) for answer in completions]


def reference(base_model: BaseModel, prompt: str, max_tokens: int, penalty: float = 0.0) -> str:
    """Greedy, a whole forward pass for each token."""
    ids = [0, *base_model.tokenize(prompt)]
    start = len(ids)
    while len(ids) < start + max_tokens:
        with torch.no_grad():
            scores = base_model.model(input_ids=torch.tensor([ids])).logits[0, -1]
        scores[sorted(set(ids[start:]))] -= penalty
        best = int(scores.argmax())
        if best == base_model.eos_id:
            break
        ids.append(best)
    return base_model.decode(ids[start:])


def test_greedy_answers_do_not_depend_on_the_batch(base_model: BaseModel) -> None:
    requests = [CompletionRequest(prompt, max_tokens=4 + 5 * number) for number, prompt in enumerate(PROMPTS)]
    alone = [answers(base_model, request)[0] for request in requests]
    for batch_size in (1, 2, 8):
        assert what_was_said(answers(base_model, *requests, batch_size=batch_size)) == what_was_said(alone)
    assert [answer.text for answer in alone] == [
        reference(base_model, prompt, 4 + 5 * number) for number, prompt in enumerate(PROMPTS)
    ]
    assert [answer.finish_reason for answer in alone] == ["length"] * 5
    assert [answer.completion_tokens for answer in alone] == [4, 9, 14, 19, 24]
    # BOS, and a token for each byte; 雨 has three.
    assert [answer.prompt_tokens for answer in alone] == [3, 31, 2, 20, 22]
    assert all(answer.attempts == 1 and answer.latency_s > 0 for answer in alone)


def test_an_answer_ends_where_a_chat_model_ends_its_turn() -> None:
    base_model = tiny_base_model()
    request = CompletionRequest("Hi", max_tokens=12)
    (free,) = answers(base_model, request)
    assert free.text[:2] == "Xr" and free.finish_reason == "length"
    base_model.model.generation_config.eos_token_id = [1, *base_model.tokenize("r")]
    (ended,) = answers(base_model, request)
    assert (ended.text, ended.completion_tokens, ended.finish_reason) == ("X", 1, "stop")


def test_sampling_follows_its_seed_whoever_shares_the_batch(base_model: BaseModel) -> None:
    requests = [CompletionRequest(p, max_tokens=20, temperature=1.0, seed=n) for n, p in enumerate(PROMPTS)]
    together = what_was_said(answers(base_model, *requests))
    assert together == what_was_said(answers(base_model, *requests))
    assert together == [what_was_said(answers(base_model, request))[0] for request in requests]
    assert together == what_was_said(answers(base_model, *reversed(requests), batch_size=3))[::-1]
    same = [CompletionRequest("Hi", max_tokens=20, temperature=1.0, seed=seed) for seed in (7, 7, 8)]
    first, second, third = answers(base_model, *same)
    assert first.text == second.text != third.text
    torch.manual_seed(0)
    unseeded = [CompletionRequest("Hi", max_tokens=20, temperature=1.0)] * 2
    one, two = answers(base_model, *unseeded)
    assert one.text != two.text


@pytest.mark.parametrize("temperature", [0.0, 20.0])
def test_a_json_schema_is_always_obeyed(base_model: BaseModel, temperature: float) -> None:
    short = {"type": "string", "maxLength": 6}
    bounded = json.dumps(
        {
            "type": "object",
            "properties": {
                "labels": {"type": "array", "items": short, "minItems": 2, "maxItems": 2},
                "kind": {"enum": ["a", "b"]},
            },
            "required": ["labels", "kind"],
            "additionalProperties": False,
        }
    )
    requests = [
        CompletionRequest(prompt, max_tokens=100, temperature=temperature, seed=seed, json_schema=bounded)
        for seed, prompt in enumerate(PROMPTS)
    ]
    free = CompletionRequest("Hi", max_tokens=5)
    *constrained, unbound = answers(base_model, *requests, free)
    for answer in constrained:
        value = json.loads(answer.text)
        assert list(value) == ["labels", "kind"] and len(value["labels"]) == 2 and value["kind"] in ("a", "b")
        assert all(isinstance(word, str) and len(word) <= 6 for word in value["labels"])
        assert answer.finish_reason == "stop"
    assert what_was_said([unbound]) == what_was_said(answers(base_model, free))


def test_our_own_schemas_are_obeyed(base_model: BaseModel) -> None:
    requests = [
        CompletionRequest("Hi", max_tokens=400, temperature=1.0, seed=seed, json_schema=label_set_schema(3))
        for seed in range(4)
    ]
    for answer in answers(base_model, *requests):
        labels = json.loads(answer.text)["labels"]
        assert len(labels) == 3 and all(word.isascii() and word.isalpha() for word in labels)
    request = CompletionRequest("Hi", max_tokens=25, temperature=1.0, seed=0, json_schema=sentences_schema(2))
    [cut] = answers(base_model, request)
    assert cut.text.startswith('{"sentences":["') and cut.finish_reason == "length"


def test_an_answer_ends_before_the_first_stop_string(base_model: BaseModel) -> None:
    whole = reference(base_model, "Hi", 20)
    printable = [place for place in range(4, len(whole) - 2) if "\ufffd" not in whole[place : place + 2]]
    stop = whole[printable[0] : printable[0] + 2]
    place = whole.find(stop)
    [answer] = answers(base_model, CompletionRequest("Hi", max_tokens=20, stop=("never this", stop)))
    assert (answer.text, answer.finish_reason) == (whole[:place], "stop")
    assert answer.completion_tokens < 20
    [unstopped] = answers(base_model, CompletionRequest("Hi", max_tokens=20, stop=("never this",)))
    assert (unstopped.text, unstopped.finish_reason) == (whole, "length")


def test_presence_penalty_forbids_repetition(base_model: BaseModel) -> None:
    plain, half, full = (
        answers(base_model, CompletionRequest("Hi", max_tokens=40, presence_penalty=penalty))[0].text
        for penalty in (0.0, 0.5, 1000.0)
    )
    assert half == reference(base_model, "Hi", 40, penalty=0.5) not in (plain, full)
    # A token is a byte: what is no part of a longer character comes at most once.
    ascii_letters = [letter for letter in full if letter < "\x7f"]
    assert len(ascii_letters) == len(set(ascii_letters)) and plain != full


def test_a_prompt_beyond_the_context_is_an_error_of_its_own(base_model: BaseModel) -> None:
    requests = [CompletionRequest("Hi", max_tokens=5), CompletionRequest("x" * 511), CompletionRequest("x" * 512)]
    fits, barely, beyond = model_of(base_model).complete(requests)
    assert isinstance(fits, Completion) and what_was_said([fits]) == what_was_said(answers(base_model, requests[0]))
    assert str(barely) == (
        "asking model 'tiny' in this process: its prompt has 512 tokens; the model takes 512. Shorten the prompt, or choose "
        "a model with a longer context."
    )
    assert isinstance(beyond, LanguageModelError) and not beyond.retryable
    [last] = answers(base_model, CompletionRequest("x" * 501, max_tokens=50))  # room for ten
    assert (last.completion_tokens, last.finish_reason) == (10, "length")


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        # Bugs: each of these ended the whole stream.
        (CompletionRequest("\ud800"), r"its prompt cannot be read \(.*\). Remove lone surrogates"),
        (
            CompletionRequest("Hi", json_schema="no schema"),
            r"its JSON schema is not a JSON object \(.*Correct the schema",
        ),
        (CompletionRequest("Hi", json_schema="[]"), "its JSON schema is not a JSON object"),
        (CompletionRequest("Hi", json_schema='{"type": "word"}'), r"cannot be followed \(.*\). Correct the schema"),
    ],
)
def test_a_bad_request_does_not_spoil_the_others(
    base_model: BaseModel, request_: CompletionRequest, words: str
) -> None:
    good = CompletionRequest("Hi", max_tokens=5)
    for batch_size in (1, 8):
        first, second, third = model_of(base_model, batch_size).complete([good, request_, good])
        assert isinstance(first, Completion) and isinstance(third, Completion) and first.text == third.text
        assert isinstance(second, LanguageModelError) and not second.retryable
        with pytest.raises(LanguageModelError, match=words):
            raise second


def test_a_chat_template_is_used_where_there_is_one() -> None:
    base_model = tiny_base_model()
    tokenizer = base_model.tokenizer
    request = CompletionRequest("Hi", system="Be brief.", max_tokens=5)
    assert prompt_ids(tokenizer, request, "plain") == [0, *base_model.tokenize("Be brief.\n\nHi")]
    [plain] = answers(base_model, request)
    with pytest.raises(ConfigError, match="its tokenizer has no chat template.*prompt_format. to .plain."):
        OnTransformers(TransformersConfig("tiny"), base_model)
    tokenizer.chat_template = TEMPLATE
    assert prompt_ids(tokenizer, request, "chat") == base_model.tokenize("<system>Be brief.<user>Hi<assistant>")
    assert prompt_ids(tokenizer, CompletionRequest("Hi"), "chat") == base_model.tokenize("<user>Hi<assistant>")
    [templated] = answers(base_model, request)
    assert templated.text != plain.text and templated.prompt_tokens == len("<system>Be brief.<user>Hi<assistant>")


@pytest.mark.parametrize(
    "template",
    [
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TEMPLATE,
        "{% for m in messages if m.role == 'user' %}<user>{{ m.content }}{% endfor %}<assistant>",
    ],
    ids=["refuses", "drops"],
)
def test_a_template_without_a_system_text_gets_it_before_the_prompt(template: str) -> None:
    """Bug: each request failed, or was answered as if it had no system text."""
    base_model = tiny_base_model()
    base_model.tokenizer.chat_template = TEMPLATE
    with_system = model_of(base_model).identity
    base_model.tokenizer.chat_template = template
    model = model_of(base_model)
    first, second = model.complete([CompletionRequest("Hi", "Be brief.", 5), CompletionRequest("Hi", max_tokens=5)])
    assert isinstance(first, Completion) and isinstance(second, Completion)
    assert (first.prompt_tokens, first.adapted) == (len("<user>Be brief.\n\nHi<assistant>"), "send_system=False")
    assert (second.prompt_tokens, second.adapted) == (len("<user>Hi<assistant>"), None)
    assert model.identity != with_system


def test_requests_are_drawn_a_batch_at_a_time(base_model: BaseModel) -> None:
    drawn = []

    def requests() -> Iterator[CompletionRequest]:
        for number in count():
            drawn.append(number)
            yield CompletionRequest(f"prompt {number}", max_tokens=2 + number % 3)

    stream = model_of(base_model, batch_size=3).stream(requests())
    assert drawn == []
    # The shortest answer of a batch comes first.
    assert [finished.index for finished in islice(stream, 3)] == [0, 1, 2]
    assert drawn == [0, 1, 2]
    assert next(stream).index == 3 and drawn == [0, 1, 2, 3, 4, 5]
    stream.close()
    assert drawn == [0, 1, 2, 3, 4, 5]
    assert model_of(base_model).complete([]) == []


def test_a_closed_model_and_settings_that_cannot_work(base_model: BaseModel) -> None:
    model = model_of(base_model)
    assert model.name == "tiny"
    model.close()
    model.close()
    with pytest.raises(RuntimeError, match="closed"):
        model.complete([CompletionRequest("Hi")])
    for settings in ({"model": ""}, {"model": "tiny", "batch_size": 0}):
        with pytest.raises(ConfigError, match="batch_size is 0, expected|model is '', expected text"):
            TransformersConfig(**settings)  # type: ignore[arg-type]
