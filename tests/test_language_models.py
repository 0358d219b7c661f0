"""The real `openai` client against a real HTTP server on this machine whose replies each test writes down."""

from __future__ import annotations

import logging
import random
import re
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from types import SimpleNamespace
from typing import Any

import pytest
from llm_server import KEY, LlmServer, Reply, chat, error_body

from softprompt_registry.errors import ConfigError, LanguageModelError
from softprompt_registry.language_models.openai_compatible import OpenAICompatible
from softprompt_registry.language_models.openai_settings import OpenAICompatibleConfig
from softprompt_registry.language_models.protocol import Completion, CompletionRequest, Prices, Usage, usage_of
from softprompt_registry.language_models.provider_failures import retry_after_s


@pytest.fixture
def server(llm_server: LlmServer) -> LlmServer:
    return llm_server


def model_at(server: LlmServer, **settings: Any) -> OpenAICompatible:
    defaults: dict[str, Any] = {
        "model": "tiny",
        "base_url": server.url,
        "initial_backoff_s": 0.01,
        "max_backoff_s": 0.02,
    }
    return OpenAICompatible(OpenAICompatibleConfig(**(defaults | settings)), jitter=random.Random(0))


def ask(
    server: LlmServer, request: CompletionRequest | str = "hello", **settings: Any
) -> Completion | LanguageModelError:
    with model_at(server, **settings) as model:
        [result] = model.complete([CompletionRequest(request) if isinstance(request, str) else request])
    return result


def ask_well(server: LlmServer, request: CompletionRequest | str = "hello", **settings: Any) -> Completion:
    result = ask(server, request, **settings)
    assert isinstance(result, Completion)
    return result


def ask_in_vain(server: LlmServer, **settings: Any) -> LanguageModelError:
    result = ask(server, **settings)
    assert isinstance(result, LanguageModelError)
    return result


# --- Answers ---


def test_a_chat_completion(server: LlmServer) -> None:
    request = CompletionRequest("hello", system="Be brief.", max_tokens=5, temperature=0.5, stop=("\n", "END"))
    result = ask_well(server, request)
    assert 0 < result.latency_s < 5
    assert result == Completion("HELLO", 7, 3, result.latency_s, "stop", attempts=1)
    [received] = server.received
    assert received.path == "/v1/chat/completions"
    assert (received.authorization, received.api_key) == (f"Bearer {KEY}", None)
    assert received.body == {
        "model": "tiny",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}],
        "max_tokens": 5,
        "temperature": 0.5,
        "stop": ["\n", "END"],
    }


def test_the_completions_endpoint_joins_system_and_prompt(server: LlmServer) -> None:
    server.replies = [Reply(body={"choices": [{"text": " world", "finish_reason": "length"}]})]
    request = CompletionRequest("hello", system="Be brief.", max_tokens=5)
    result = ask_well(server, request, endpoint="completions")
    assert (result.text, result.finish_reason) == (" world", "length")
    [received] = server.received
    assert received.path == "/v1/completions"
    assert received.body == {"model": "tiny", "prompt": "Be brief.\n\nhello", "max_tokens": 5, "temperature": 0.0}


def test_settings_for_models_that_refuse_max_tokens_and_temperature(server: LlmServer) -> None:
    ask(server, max_tokens_parameter="max_completion_tokens", send_temperature=False)
    assert server.received[0].body == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hello"}],
        "max_completion_tokens": 256,
    }


@pytest.mark.parametrize(
    ("body", "finish_reason"),
    [
        (chat("", finish_reason="length"), "length"),
        (chat(None, finish_reason="content_filter"), "content_filter"),
        ({"choices": [{"message": {"refusal": "I cannot help."}, "finish_reason": "stop"}]}, "refusal"),
        (
            {"choices": [{"message": {"content": "", "refusal": "No."}, "finish_reason": "content_filter"}]},
            "content_filter",
        ),
        (chat("") | {"refusal": None}, "stop"),
        # Thoughts took the whole answer, and the server leaves its field out.
        ({"choices": [{"message": {"role": "assistant"}, "finish_reason": "length"}]}, "length"),
        ({"choices": [{"message": {"content": None}}]}, None),
    ],
)
def test_an_empty_or_refused_answer_is_kept(server: LlmServer, body: Any, finish_reason: str | None) -> None:
    server.replies = [Reply(body=body)]
    result = ask_well(server)
    assert (result.text, result.finish_reason) == ("", finish_reason)


def test_a_prompt_that_is_filtered_is_an_empty_answer(server: LlmServer) -> None:
    """Azure OpenAI refuses such a prompt with status 400, where others answer with an empty text."""
    filtered = error_body("The response was filtered", "content_filter")
    server.replies = [Reply(400, body=filtered), Reply(400, body=error_body("no", "context_length_exceeded"))]
    with model_at(server, max_concurrency=1) as model:
        filtered_answer, error = model.complete([CompletionRequest("a"), CompletionRequest("b")])
    assert isinstance(filtered_answer, Completion) and isinstance(error, LanguageModelError)
    assert filtered_answer == Completion("", 0, 0, filtered_answer.latency_s, "content_filter", 1)


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": None, "completion_tokens": "3"}, [1]])
def test_missing_usage_counts_as_no_tokens(server: LlmServer, usage: Any) -> None:
    server.replies = [Reply(body=chat("yes") | {"usage": usage})]
    result = ask_well(server)
    assert (result.text, result.prompt_tokens, result.completion_tokens) == ("yes", 0, 0)


# --- Azure ---


@pytest.mark.parametrize("path", ["", "/openai", "/openai/deployments/tiny"])
def test_azure_gets_the_deployment_the_version_and_the_key_where_it_wants_them(
    server: LlmServer, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setenv("AZURE_OPENAI_AD_TOKEN", "not this one")
    base_url = server.url.removesuffix("/v1") + path
    assert ask_well(server, base_url=base_url, api_version="2024-10-21").text == "HELLO"
    [received] = server.received
    assert received.path == "/openai/deployments/tiny/chat/completions?api-version=2024-10-21"
    assert (received.api_key, received.authorization) == (KEY, None)
    assert received.body["messages"] == [{"role": "user", "content": "hello"}]


def test_azure_retries_and_hides_the_key_like_any_other(server: LlmServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    server.replies = [Reply(429, headers={"Retry-After": "0"}), Reply(404, body=error_body(f"no such thing for {KEY}"))]
    error = ask_in_vain(server, base_url=server.url.removesuffix("/v1"), api_version="2024-10-21")
    assert "(2 tries): found HTTP 404 (no such thing for ***). Check the model name 'tiny', that base_url names" in str(
        error
    )
    assert all(KEY not in f"{link} {link!r} {vars(link)}" for link in chain(error)) and KEY not in caplog.text
    assert "2024-10-21" in caplog.text


# --- Tries and waits ---


@pytest.mark.parametrize(
    "failures",
    [
        [Reply(500), Reply(503, body=b"<html>Service Unavailable</html>")],
        [Reply(429, body=error_body("slow down")), Reply(408)],
        [Reply(body=b'{"choices": [')],
        [Reply(body=b"\xff\xfe\x00garbage")],
        [Reply(body=b"")],
        [Reply(body=["not", "an", "object"])],
        [Reply(body={"id": "chatcmpl-1"}), Reply(body={"choices": []})],
        [Reply(cut=True)],
    ],
)
def test_a_passing_failure_is_tried_again(server: LlmServer, failures: list[Reply]) -> None:
    server.replies = list(failures)
    result = ask_well(server)
    assert (result.text, result.attempts) == ("HELLO", len(failures) + 1)


def test_latency_is_that_of_the_last_try(server: LlmServer) -> None:
    server.replies = [Reply(500, delay_s=0.3)]
    assert ask_well(server).latency_s < 0.25


@pytest.mark.supports(
    "target LLMs",
    "`Retry-After` in seconds or as a date, `retry-after-ms`",
    "obeyed within the deadline",
)
def test_retry_after_is_obeyed(server: LlmServer) -> None:
    server.replies = [Reply(429, headers={"Retry-After": "0.3"})]
    assert ask_well(server).attempts == 2
    first, second = server.received
    assert 0.3 <= second.at - first.at < 10


@pytest.mark.parametrize(
    ("headers", "least_s", "most_s"),
    [
        ({"retry-after": formatdate(time.time() + 36000, usegmt=True)}, 30000, 36000),
        ({"retry-after": formatdate(time.time() + 36000)}, 30000, 36000),  # zone "-0000"
        ({"retry-after": formatdate(time.time() - 3600, usegmt=True)}, 0, 0),
        ({"retry-after": "soon"}, 0, 0),
        ({"retry-after": "-5"}, 0, 0),
        ({"retry-after": "inf"}, 0, 0),
        ({"retry-after": "Wed, 21 Oct 99999999999999999999 07:28:00 GMT"}, 0, 0),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "9"}, 9, 9),
        ({"retry-after-ms": "nan"}, 0, 0),
        ({}, 0, 0),
    ],
)
def test_what_retry_after_says(headers: dict[str, str], least_s: float, most_s: float) -> None:
    failure = Exception()
    failure.response = SimpleNamespace(headers=headers)  # type: ignore[attr-defined]
    assert least_s <= retry_after_s(failure) <= most_s


def test_waits_are_drawn_from_a_range_that_doubles_up_to_its_limit(server: LlmServer) -> None:
    ranges = []

    class NoWait(random.Random):
        def uniform(self, a: float, b: float) -> float:
            ranges.append((a, b))
            return 0.0

    server.replies = [Reply(500)] * 4
    config = OpenAICompatibleConfig("tiny", server.url, initial_backoff_s=1.0, max_backoff_s=3.0)
    with OpenAICompatible(config, jitter=NoWait()) as model:
        model.complete([CompletionRequest("hello")])
    assert ranges == [(0, 1.0), (0, 2.0), (0, 3.0), (0, 3.0)]


def test_a_lasting_failure_ends_after_max_attempts(server: LlmServer) -> None:
    server.reply_to = lambda prompt: Reply(500, body=error_body("out\nof \x1b[31m memory"))
    error = ask_in_vain(server, max_attempts=3)
    assert len(server.received) == 3
    assert error.retryable
    assert str(error) == (
        f"asking model 'tiny' at '127.0.0.1:{server.server_port}' (3 tries): found HTTP 500 (out of [31m memory). "
        "The server is in trouble: read its log if it is yours, else try again later."
    )


def test_a_silent_server_times_out(server: LlmServer) -> None:
    server.reply_to = lambda prompt: Reply(delay_s=5)
    error = ask_in_vain(server, timeout_s=0.1, max_attempts=2)
    assert len(server.received) == 2
    assert error.retryable
    assert "(2 tries): found no reply within 0.1 s." in str(error)
    assert "timeout_s" in error.hint


def test_no_server_at_all(server: LlmServer) -> None:
    error = ask_in_vain(server, base_url="http://127.0.0.1:1/v1", max_attempts=2)
    assert error.retryable
    assert "at '127.0.0.1:1' (2 tries): found the connection failed (" in str(error)
    assert "Connection refused" in str(error)


def test_broken_replies_for_ever(server: LlmServer) -> None:
    server.reply_to = lambda prompt: Reply(body={"error": {"message": "upstream is down"}})
    error = ask_in_vain(server, max_attempts=2)
    assert error.retryable
    assert "found an unusable reply (no choices; upstream is down)." in str(error)


# --- Failures that stay ---


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (Reply(400, body=error_body("max_tokens is too large: 300")), "set send_system=False, max_tokens_parameter="),
        (Reply(422, body={"detail": "temperature too high"}), "HTTP 422 (temperature too high)"),
        (Reply(401, body=error_body("no such key")), "variable OPENAI_API_KEY"),
        (Reply(403, body=error_body("not for you")), "may not use this model"),
        (Reply(404, body=error_body("The model `tiny` does not exist")), "Check the model name 'tiny'"),
        (Reply(413, body=b"Payload Too Large"), "HTTP 413 (Payload Too Large)"),
        (Reply(429, body=error_body("pay first", "insufficient_quota")), "plan and billing"),
    ],
)
def test_a_failure_that_stays_is_not_tried_again(server: LlmServer, reply: Reply, words: str) -> None:
    server.replies = [reply]
    error = ask_in_vain(server)
    assert len(server.received) == 1
    assert not error.retryable
    assert words in str(error)
    assert f"HTTP {reply.status} (" in str(error)


def test_a_long_provider_message_is_cut(server: LlmServer) -> None:
    server.replies = [Reply(400, body=error_body("too long " * 1000))]
    quoted = re.search(r"HTTP 400 \((.*)\)\. Check", str(ask_in_vain(server)))
    assert quoted is not None
    assert len(quoted[1]) == 200 and quoted[1].endswith("…")


def test_one_bad_request_does_not_spoil_the_others(server: LlmServer) -> None:
    server.reply_to = lambda prompt: Reply(400, body=error_body("no")) if prompt == "bad" else Reply()
    with model_at(server) as model:
        assert model.complete([]) == []
        results = model.complete([CompletionRequest(prompt) for prompt in ("a", "bad", "\ud800", "b")])
    assert [result.text if isinstance(result, Completion) else None for result in results] == ["A", None, None, "B"]
    assert "not valid Unicode" in str(results[2])


# --- The key ---


def chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@pytest.mark.parametrize(
    ("reply", "has_cause"),
    [
        (Reply(401, body=error_body(f"Incorrect API key provided: {KEY}.")), False),
        (Reply(401, body=error_body("x" * 190 + KEY)), False),  # the cut would fall into the key
        (Reply(401, body=error_body("no such key") | {"key": KEY}), False),
        (Reply(500, body=b"Authorization: Bearer " + KEY.encode()), False),
        (Reply(body={"error": {"message": f"bad key {KEY}"}}), False),
        (Reply(401, body=error_body("no such key")), True),
        (Reply(cut=True), True),
    ],
)
def test_the_key_is_in_no_error_and_no_log(
    server: LlmServer, caplog: pytest.LogCaptureFixture, reply: Reply, has_cause: bool
) -> None:
    caplog.set_level(logging.DEBUG)
    server.reply_to = lambda prompt: reply
    error = ask_in_vain(server, max_attempts=2)
    assert (error.__cause__ is not None) == has_cause
    for link in chain(error):
        shown = f"{link} {link!r} {vars(link)}"
        assert KEY[:-4] not in shown
        assert link.__traceback__ is None  # its frames hold the client
        for owner in (link, getattr(link, "response", None)):
            assert not getattr(getattr(owner, "request", None), "headers", None)
    assert KEY[:-4] not in caplog.text


def test_a_key_that_a_server_repeats_is_masked(server: LlmServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.reply_to = lambda prompt: Reply(body=chat(f"Your key is {KEY}.", finish_reason=KEY))
    answer = ask_well(server)
    assert (answer.text, answer.finish_reason) == ("Your key is ***.", "***")
    server.reply_to = lambda prompt: Reply(401, body=error_body(f"Incorrect API key provided: {KEY}."))
    assert "HTTP 401 (Incorrect API key provided: ***.)" in str(ask_in_vain(server))
    # A short made-up key hides only itself.
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")
    server.reply_to = lambda prompt: Reply(body=chat("EMPTY"))
    assert ask_well(server).text == "EMPTY"
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    server.reply_to = lambda prompt: Reply(400, body=error_body("max_tokens exceeded for key x"))
    assert "(max_tokens exceeded for key ***)" in str(ask_in_vain(server))


def test_another_model_that_answers_is_named_once(server: LlmServer, caplog: pytest.LogCaptureFixture) -> None:
    names = ["tiny", "tiny-2026-01-01", None, "huge", "huge"]
    server.replies = [Reply(body=chat("yes") | {"model": name}) for name in names]
    with model_at(server, max_concurrency=1) as model:
        model.complete([CompletionRequest("hello")] * len(names))
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "the server was asked for model 'tiny' and says that 'huge' answers"
    ]


def test_the_key_comes_from_the_named_variable(server: LlmServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", " other-key\n")
    with model_at(server, api_key_env="MY_KEY") as model:
        model.complete([CompletionRequest("hello")])
        assert "other-key" not in f"{model!r} {model.config!r}"
    assert server.received[0].authorization == "Bearer other-key"


def test_a_missing_key_and_one_that_no_header_can_carry(server: LlmServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "  \n")
    for name in ("MY_KEY", "NO_KEY"):
        with pytest.raises(LanguageModelError, match=f"{name} is not set. Set {name} .* to any value") as caught:
            model_at(server, api_key_env=name)
        assert not caught.value.retryable
    monkeypatch.setenv("OPENAI_API_KEY", "sk-sécret")
    with pytest.raises(LanguageModelError, match="outside ASCII") as caught:
        model_at(server)
    assert "cret" not in str(caught.value)


# --- Many requests at once ---


def test_the_deadline_ends_the_batch(server: LlmServer) -> None:
    server.reply_to = lambda prompt: Reply(delay_s=0 if prompt == "quick" else 5)
    with model_at(server, max_concurrency=2, deadline_s=0.5) as model:
        model.complete([CompletionRequest("quick")])  # the client's modules are loaded by its first request
        started = time.monotonic()
        results = model.complete([CompletionRequest(prompt) for prompt in ("quick", "slow", "slow", "never sent")])
    assert time.monotonic() - started < 2
    assert isinstance(results[0], Completion)
    for result in results[1:]:
        assert isinstance(result, LanguageModelError) and result.retryable
        assert f"deadline of 0.5 s reached before model 'tiny' at '127.0.0.1:{server.server_port}'" in str(result)
    assert "never sent" not in [received.body["messages"][-1]["content"] for received in server.received]


def test_a_wait_that_ends_after_the_deadline_is_not_begun(server: LlmServer) -> None:
    server.replies = [Reply(429, body=error_body("slow down"), headers={"Retry-After": "60"})]
    started = time.monotonic()
    error = ask_in_vain(server, deadline_s=30)
    assert time.monotonic() - started < 5
    assert error.retryable
    assert "deadline of 30 s reached" in str(error) and "HTTP 429 (slow down)" in str(error)


def test_a_dripping_answer_does_not_outlast_the_deadline(server: LlmServer) -> None:
    """Each byte restarts the client's timeout, so only the deadline ends this; close() ends the connection."""
    server.reply_to = lambda prompt: Reply(drip=True)
    started = time.monotonic()
    error = ask_in_vain(server, timeout_s=0.3, deadline_s=0.5)
    assert time.monotonic() - started < 2
    assert "deadline of 0.5 s reached" in str(error)


def test_close_ends_waits_and_may_be_called_twice(server: LlmServer) -> None:
    server.reply_to = lambda prompt: Reply(500, headers={"Retry-After": "60"})
    model = model_at(server)
    results: list[Completion | LanguageModelError] = []
    thread = threading.Thread(target=lambda: results.extend(model.complete([CompletionRequest("hello")])))
    thread.start()
    while not server.received:
        time.sleep(0.01)
    time.sleep(0.1)
    model.close()
    model.close()
    thread.join(timeout=5)
    assert not thread.is_alive()
    assert "HTTP 500" in str(results[0])


# --- Usage and cost ---


def test_usage_and_cost_are_summed(server: LlmServer) -> None:
    server.replies = [
        Reply(body=chat("a", prompt_tokens=1000, completion_tokens=100)),
        Reply(body=chat("b", prompt_tokens=2000, completion_tokens=300)),
        Reply(401),
    ]
    settings = {"price_per_million_prompt_tokens": 0.5, "price_per_million_completion_tokens": 2.0}
    with model_at(server, max_concurrency=1, **settings) as model:
        results = model.complete([CompletionRequest("hello")] * 3)
        prices = model.config.prices
    assert prices == Prices(0.5, 2.0)
    usage = usage_of(results, prices)
    assert usage == Usage(requests=3, prompt_tokens=3000, completion_tokens=400, cost=usage.cost)
    assert usage.cost == pytest.approx(0.0015 + 0.0008)
    assert sum([usage_of([result], prices) for result in results], Usage()) == usage
    unknown = usage_of([Completion("a", 5, 1, 0.1, "stop", 1)], None)
    assert unknown == Usage(1, 5, 1, None)
    assert (unknown + Usage(1, 1, 1, 0.25)).cost is None
    assert Usage(1, 2, 3, 0.25) + Usage(1, 2, 3, 0.5) == Usage(2, 4, 6, 0.75)


# --- Settings ---


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"api_key_env": ""}, "api_key_env is no name of an environment variable"),
        ({"api_key_env": "hunter2"}, "If it is the key itself, put it into the environment"),
        ({"base_url": "localhost:8000/v1"}, "base_url is not a usable address"),
        ({"base_url": "http://[::1/v1"}, "base_url is not a usable address"),
        ({"base_url": "http://host:99999/v1"}, "base_url is not a usable address"),
        ({"base_url": "https://me:hunter2@host/v1"}, "for host 'host' carries credentials"),
        ({"base_url": "https://host/v1?key=hunter2"}, "for host 'host' carries credentials, a query"),
        ({"initial_backoff_s": 60.0}, r"initial_backoff_s \(60.0\) is above max_backoff_s \(30.0\)"),
        (
            {"api_version": "2024-10-21"},
            "api_version is '2024-10-21' and base_url None, expected both for Azure OpenAI",
        ),
        ({"api_version": " ", "base_url": "https://me.openai.azure.com"}, "api_version is ' '"),
        ({"price_per_million_prompt_tokens": 1.0}, "only one of the two prices is set"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        OpenAICompatibleConfig(**({"model": "tiny"} | settings))
    assert "hunter2" not in str(caught.value)
