"""Targets that refuse a part of a request: asked without it from then on, once for all threads, and with a record of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llm_server import LlmServer, Reply, chat, error_body

from softprompt_registry.errors import LanguageModelError
from softprompt_registry.language_models.answer_cache import AnswerCache
from softprompt_registry.language_models.openai_compatible import OpenAICompatible
from softprompt_registry.language_models.openai_settings import OpenAICompatibleConfig
from softprompt_registry.language_models.protocol import Completion, CompletionRequest
from softprompt_registry.portability.answers import Answer, Question
from softprompt_registry.portability.asking import ask_targets
from softprompt_registry.portability.budget import TargetPlan
from softprompt_registry.portability.targets import TargetConfig

REQUEST = CompletionRequest("hello", "Be brief.", 5, stop=("\n",))


def openai_says(param: str, message: str, code: str = "unsupported_parameter") -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": code}}


def has_system(body: dict[str, Any]) -> bool:
    return bool(body["messages"][0]["role"] == "system")


def has(name: str) -> Callable[[dict[str, Any]], bool]:
    return lambda body: name in body


NO_MAX_TOKENS = openai_says(
    "max_tokens",
    "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.",
)
NO_TEMPERATURE = openai_says(
    "temperature",
    "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is supported.",
    "unsupported_value",
)
NO_STOP = openai_says("stop", "Unsupported parameter: 'stop' is not supported with this model.")
NO_SYSTEM = openai_says(
    "messages[0].role",
    "Unsupported value: 'messages[0].role' does not support 'system' with this model.",
    "unsupported_value",
)


def ask(server: LlmServer, *requests: CompletionRequest, **settings: Any) -> list[Completion | LanguageModelError]:
    config = OpenAICompatibleConfig("tiny", server.url, initial_backoff_s=0.01, max_backoff_s=0.02, **settings)
    with OpenAICompatible(config) as model:
        return model.complete(requests)


@pytest.mark.supports(
    "target LLMs",
    "system role, token limit's name, temperature or stop refused (as OpenAI, Azure, Mistral, vLLM or llama.cpp word it)",
    "learned once, recorded as `adapted`",
)
@pytest.mark.parametrize(
    ("is_refused", "reply", "adapted"),
    [
        (has_system, Reply(400, body=NO_SYSTEM), "send_system=False"),
        # vLLM, Google's servers, llama.cpp, what Mistral's chat templates say.
        (
            has_system,
            Reply(400, body={"object": "error", "message": "System role not supported", "param": None, "code": 400}),
            "send_system=False",
        ),
        (
            has_system,
            Reply(400, body=[error_body("Developer instruction is not enabled for models/gemma-3-27b-it")]),
            "send_system=False",
        ),
        (has_system, Reply(500, body=error_body("Jinja Exception: System role not supported")), "send_system=False"),
        (
            has_system,
            Reply(400, body=error_body("Conversation roles must alternate user/assistant/user/assistant/...")),
            "send_system=False",
        ),
        (
            has_system,
            Reply(400, body=error_body("Only user, assistant and tool roles are supported, got system.")),
            "send_system=False",
        ),
        (has("max_tokens"), Reply(400, body=NO_MAX_TOKENS), "max_tokens_parameter='max_completion_tokens'"),
        (has("temperature"), Reply(400, body=NO_TEMPERATURE), "send_temperature=False"),
        (
            has("temperature"),
            Reply(400, body=error_body("`temperature` may only be set to 1 when thinking is enabled.")),
            "send_temperature=False",
        ),
        (
            has("temperature"),
            Reply(400, body=error_body("litellm.UnsupportedParamsError: gpt-5 models don't support temperature=0.0.")),
            "send_temperature=False",
        ),
        (has("stop"), Reply(400, body=NO_STOP), "send_stop=False"),
    ],
)
def test_a_refused_part_is_left_out(
    llm_server: LlmServer,
    caplog: pytest.LogCaptureFixture,
    is_refused: Callable[[dict[str, Any]], bool],
    reply: Reply,
    adapted: str,
) -> None:
    accepted = Reply(body=chat("HELLO\nmore"))
    llm_server.reply_to_body = lambda body: reply if is_refused(body) else accepted
    answers = ask(llm_server, *[REQUEST] * 24, max_attempts=1, max_concurrency=8)
    said = "HELLO" if adapted == "send_stop=False" else "HELLO\nmore"  # this server does not cut by itself
    assert [(one.text, one.adapted, one.attempts) for one in answers if isinstance(one, Completion)] == [
        (said, adapted, 1)
    ] * 24
    # Refused once and not eight times, and told once.
    assert sum(is_refused(received.body) for received in llm_server.received) == 1 and len(llm_server.received) == 25
    [warning] = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.startswith(f"asking model 'tiny' with {adapted} from now on: asking model 'tiny' at '127.0.0.1:")
    body = llm_server.received[-1].body
    if adapted == "send_system=False":
        assert body["messages"] == [{"role": "user", "content": "Be brief.\n\nhello"}]
    if adapted.startswith("max_tokens"):
        assert body["max_completion_tokens"] == 5


def test_one_refusal_after_the_other(llm_server: LlmServer) -> None:
    """As o1-mini does it: each reply names one part."""

    def reply(body: dict[str, Any]) -> Reply:
        refusals = (
            (has("max_tokens"), NO_MAX_TOKENS),
            (has("temperature"), NO_TEMPERATURE),
            (has("stop"), NO_STOP),
            (has_system, NO_SYSTEM),
        )
        return next((Reply(400, body=said) for is_refused, said in refusals if is_refused(body)), Reply())

    llm_server.reply_to_body = reply
    answers = ask(llm_server, *[REQUEST] * 6)
    assert {one.adapted for one in answers if isinstance(one, Completion)} == {
        "send_system=False, max_tokens_parameter='max_completion_tokens', send_temperature=False, send_stop=False"
    }
    assert len(answers) == 6 and len(llm_server.received) == 4 + 6


def test_the_newer_name_of_the_limit_may_be_the_refused_one(llm_server: LlmServer) -> None:
    extra = {
        "type": "extra_forbidden",
        "loc": ["body", "max_completion_tokens"],
        "msg": "Extra inputs are not permitted",
    }
    llm_server.reply_to_body = lambda body: (
        Reply(422, body={"detail": [extra]}) if "max_tokens" not in body else Reply()
    )
    [answer] = ask(llm_server, REQUEST, max_tokens_parameter="max_completion_tokens")
    assert isinstance(answer, Completion) and answer.adapted == "max_tokens_parameter='max_tokens'"


@pytest.mark.supports(
    "target LLMs",
    "a server that takes neither `max_tokens` nor `max_completion_tokens`",
    "refused, in one sentence",
)
def test_a_server_that_refuses_both_names_fails(llm_server: LlmServer) -> None:
    def reply(body: dict[str, Any]) -> Reply:
        name = "max_tokens" if "max_tokens" in body else "max_completion_tokens"
        return Reply(400, body=openai_says(name, f"Unsupported parameter: '{name}'."))

    llm_server.reply_to_body = reply
    [error] = ask(llm_server, REQUEST)
    assert isinstance(error, LanguageModelError) and "'max_completion_tokens'" in str(error)
    assert len(llm_server.received) == 2


@pytest.mark.parametrize(
    "message",
    [
        "'max_tokens' or 'max_completion_tokens' is too large: 9000. This model's maximum context length is 4096 tokens.",
        "max_tokens is too large: 9000. This model supports at most 4096 completion tokens.",
        "`temperature` must be strictly positive",
        "Invalid 'stop': array too long. Expected an array with maximum length 4.",
        "The prompt is not supported in your country.",
    ],
)
def test_what_is_wrong_with_one_request_changes_no_setting(llm_server: LlmServer, message: str) -> None:
    llm_server.replies = [Reply(400, body=error_body(message))]
    first, second = ask(llm_server, REQUEST, REQUEST, max_concurrency=1)
    assert isinstance(first, LanguageModelError) and isinstance(second, Completion) and second.adapted is None
    assert "set send_system=False, max_tokens_parameter='max_completion_tokens', send_temperature=False or" in str(
        first
    )


def test_a_slow_first_answer_does_not_hold_up_the_others(
    llm_server: LlmServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("softprompt_registry.language_models.adaptations._ALONE_S", 0.1)
    llm_server.reply_to = lambda prompt: Reply(delay_s=1.0)
    answers = ask(llm_server, *[REQUEST] * 8, max_concurrency=8)
    assert all(isinstance(answer, Completion) for answer in answers)
    first, *others = sorted(received.at for received in llm_server.received)
    assert max(others) - first < 0.9


def test_a_run_records_what_its_targets_refused_and_finds_the_answers_again(
    llm_server: LlmServer, tmp_path: Path
) -> None:
    llm_server.reply_to_body = lambda body: Reply(400, body=NO_SYSTEM) if has_system(body) else Reply()
    config = TargetConfig(model="gemma", options={"base_url": llm_server.url})
    requests = [CompletionRequest(prompt, "Be brief.") for prompt in "abc"]
    questions = [
        Question("tones", "no_prompt", "gemma", number, one.prompt, "X", one.system, one.prompt, None)
        for number, one in enumerate(requests)
    ]
    with AnswerCache(tmp_path / "a.answers") as cache:
        runs = [ask_targets([TargetPlan(config, questions, requests)], cache)[0] for _ in range(2)]
        assert len(llm_server.received) == 4
        for run in runs:
            assert run.adapted == ["send_system=False"]
            assert [answer.text for answer in run.answers] == ["BE BRIEF.\n\n" + letter for letter in "ABC"]
            assert [Answer.from_json(answer.to_json()) for answer in run.answers] == run.answers
        # The setting itself is another way of asking.
        explicit = TargetConfig(model="gemma", options={"base_url": llm_server.url, "send_system": False})
        [asked] = ask_targets([TargetPlan(explicit, questions, requests)], cache)
        assert asked.adapted == [] and len(llm_server.received) == 7
