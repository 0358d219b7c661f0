"""Streams of requests through the real `openai` client, what each request says to the server, and opening by settings."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from itertools import count, islice
from typing import Any

import pytest
from llm_server import KEY, LlmServer, Reply
from writing_llm import client_of

from softprompt_registry.errors import ConfigError, LanguageModelError
from softprompt_registry.language_models.openai_compatible import OpenAICompatible
from softprompt_registry.language_models.opening import LanguageModelConfig, open_language_model
from softprompt_registry.language_models.protocol import Completion, CompletionRequest, Finished


class Drawn:
    """Endless requests "prompt 0", "prompt 1", … that knows how many were drawn."""

    def __init__(self) -> None:
        self.number = 0

    def __iter__(self) -> Iterator[CompletionRequest]:
        for number in count():
            self.number = number + 1
            yield CompletionRequest(f"prompt {number}")


def texts_of(stream: Iterator[Finished]) -> dict[int, str | None]:
    return {index: result.text if isinstance(result, Completion) else None for index, result in pairs_of(stream)}


def pairs_of(stream: Iterator[Finished]) -> Iterator[tuple[int, Completion | LanguageModelError]]:
    return ((finished.index, finished.result) for finished in stream)


def prompts_seen_by(server: LlmServer) -> list[str]:
    return [received.body["messages"][-1]["content"] for received in server.received]


def test_each_request_gets_its_result(llm_server: LlmServer) -> None:
    llm_server.reply_to = lambda prompt: Reply(delay_s=0.03)
    requests = [CompletionRequest(f"prompt {number}") for number in range(20)]
    with client_of(llm_server, max_concurrency=3) as model:
        assert texts_of(model.stream(requests)) == {number: f"PROMPT {number}" for number in range(20)}
        assert list(model.stream([])) == []
    assert llm_server.most_at_once == 3


def test_results_come_as_they_finish(llm_server: LlmServer) -> None:
    llm_server.reply_to = lambda prompt: Reply(delay_s=0.5 if prompt == "slow" else 0)
    requests = [CompletionRequest(prompt) for prompt in ("slow", "a", "b", "c")]
    with client_of(llm_server, max_concurrency=2) as model:
        model.complete([CompletionRequest("first")])  # is alone, since the server may refuse a part of it
        assert [finished.index for finished in model.stream(requests)] == [1, 2, 3, 0]
    with client_of(llm_server, max_concurrency=1) as model:
        assert [finished.index for finished in model.stream(requests)] == [0, 1, 2, 3]


def test_requests_are_drawn_only_as_far_as_needed(llm_server: LlmServer) -> None:
    requests = Drawn()
    with client_of(llm_server, max_concurrency=2) as model:
        stream = model.stream(requests)
        assert requests.number == 0
        next(stream)
        assert requests.number == 4  # twice as many as may be in flight
        time.sleep(0.1)
        assert requests.number == 4  # a caller who is slow is waited for
        assert len(list(islice(stream, 5))) == 5
        assert requests.number == 9
        stream.close()
    assert len(llm_server.received) <= 9


def test_closing_a_stream_drops_what_is_not_sent(llm_server: LlmServer) -> None:
    llm_server.reply_to = lambda prompt: Reply(delay_s=0.1)
    requests = Drawn()
    with client_of(llm_server, max_concurrency=1) as model:
        stream = model.stream(requests)
        first = next(stream)
        assert first.index == 0
        stream.close()
        assert list(stream) == []
        [result] = model.complete([CompletionRequest("afterwards")])
        assert isinstance(result, Completion)
    assert requests.number == 2
    # The second may have been on its way.
    assert prompts_seen_by(llm_server) in (
        ["prompt 0", "afterwards"],
        ["prompt 0", "prompt 1", "afterwards"],
    )


def test_requests_that_break_off(llm_server: LlmServer) -> None:
    def requests() -> Iterator[CompletionRequest]:
        yield CompletionRequest("a")
        raise ValueError("no more paper")

    with client_of(llm_server) as model:
        with pytest.raises(ValueError, match="no more paper"):
            list(model.stream(requests()))
        assert texts_of(model.stream([CompletionRequest("b")])) == {0: "B"}


def test_the_deadline_is_for_each_request(llm_server: LlmServer) -> None:
    """Bug: in a stream, an answer that dripped in had no end, and neither had the stream."""
    llm_server.reply_to = lambda prompt: Reply(drip=True) if prompt == "drip" else Reply(delay_s=0.2)
    requests = [CompletionRequest(prompt) for prompt in ("a", "drip", "b", "c", "d")]
    started = time.monotonic()
    with client_of(llm_server, max_concurrency=1, deadline_s=0.6) as model:
        results = dict(pairs_of(model.stream(requests)))
    assert 1.2 < time.monotonic() - started < 4
    assert [index for index, result in results.items() if isinstance(result, Completion)] == [0, 2, 3, 4]
    assert "deadline of 0.6 s reached before model 'writer'" in str(results[1])


def test_close_ends_the_wait_for_a_silent_server(llm_server: LlmServer) -> None:
    """Bug: a thread that reads from a socket does not notice that it was closed, so this took up to timeout_s."""
    llm_server.reply_to = lambda prompt: Reply(delay_s=30)
    model = client_of(llm_server, max_concurrency=2)
    requests = [CompletionRequest("a"), CompletionRequest("b")]
    results: list[Finished] = []
    thread = threading.Thread(target=lambda: results.extend(model.stream(requests)))
    thread.start()
    while len(llm_server.received) < 2:
        time.sleep(0.01)
    time.sleep(0.1)
    started = time.monotonic()
    model.close()
    thread.join(timeout=10)
    assert time.monotonic() - started < 3
    assert len(results) == 2 and all("the connection failed" in str(one.result) for one in results)


# --- What each request says ---

SCHEMA = '{"type": "object", "properties": {"labels": {"type": "array"}}, "required": ["labels"]}'
FULL = CompletionRequest(
    "Write.", system="Be brief.", max_tokens=9, temperature=0.5, presence_penalty=0.25, seed=0, json_schema=SCHEMA
)
AS_SCHEMA = {
    "type": "json_schema",
    "json_schema": {"name": "answer", "schema": json.loads(SCHEMA), "strict": True},
}


@pytest.mark.parametrize(
    ("structured_output", "response_format"),
    [("json_schema", AS_SCHEMA), ("json_object", {"type": "json_object"}), ("none", None)],
)
@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_penalty_seed_and_schema_reach_the_server(
    llm_server: LlmServer, endpoint: str, structured_output: str, response_format: Any
) -> None:
    llm_server.reply_to = lambda prompt: (
        Reply() if endpoint == "chat" else Reply(body={"choices": [{"text": "yes", "finish_reason": "stop"}]})
    )
    with client_of(llm_server, endpoint=endpoint, structured_output=structured_output) as model:
        [finished] = model.stream([FULL])
    assert isinstance(finished.result, Completion)
    body: dict[str, Any] = {"model": "writer", "max_tokens": 9, "temperature": 0.5, "presence_penalty": 0.25, "seed": 0}
    if endpoint == "chat":
        body["messages"] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Write."}]
    else:
        body["prompt"] = "Be brief.\n\nWrite."
    if response_format is not None:
        body["response_format"] = response_format
    assert [received.body for received in llm_server.received] == [body]


# --- Opening by settings ---


def test_opening_a_server_by_settings(llm_server: LlmServer) -> None:
    config = LanguageModelConfig(model="tiny", options={"base_url": llm_server.url, "max_concurrency": 2})
    with open_language_model(config) as model:
        assert isinstance(model, OpenAICompatible) and model.config.max_concurrency == 2
        assert model.name == "tiny"
        assert texts_of(model.stream([CompletionRequest("a")])) == {0: "A"}
    with pytest.raises(RuntimeError):  # it is closed
        model.complete([CompletionRequest("a")])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LanguageModelConfig(), "engine 'openai': no model is named; expected the setting `model`"),
        (LanguageModelConfig(model="a", options={"model": "b"}), "`model` stands in its options"),
        (
            LanguageModelConfig(model="a", options={"bas_url": "x"}),
            "engine 'openai': unknown 'bas_url'; known are model",
        ),
        (
            LanguageModelConfig(model="a", options={"max_attempts": "five"}),
            "max_attempts is 'five', expected a whole number",
        ),
        (
            LanguageModelConfig("transformers", "a", {"base_url": "x"}),
            "options of engine 'transformers': unknown 'base_url'; known are model, dtype, prompt_format, batch_size",
        ),
        (LanguageModelConfig("transformers", "a", {"batch_size": 0}), "batch_size is 0, expected above 0"),
    ],
)
def test_settings_that_open_nothing(config: LanguageModelConfig, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(ConfigError, match=words), open_language_model(config):
        pass
