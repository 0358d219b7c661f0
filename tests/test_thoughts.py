"""What a model thinks before it answers: in parts, in fields of its own or in the text, and never in the answer."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest
from llm_server import LlmServer, Reply, chat
from tiny_llm import tiny_base_model

from softprompt_registry.errors import LanguageModelError
from softprompt_registry.language_models.answer_cache import AnswerCache, _key
from softprompt_registry.language_models.on_transformers import OnTransformers, TransformersConfig
from softprompt_registry.language_models.openai_compatible import OpenAICompatible
from softprompt_registry.language_models.openai_settings import OpenAICompatibleConfig
from softprompt_registry.language_models.protocol import Completion, CompletionRequest
from softprompt_registry.language_models.replies import read_answer, without_thoughts

LABEL = CompletionRequest("Which label?", stop=("\n",))
FREE = CompletionRequest("Say it.")


def message(finish_reason: str = "stop", **fields: Any) -> dict[str, Any]:
    body = chat("", finish_reason=finish_reason)
    body["choices"][0]["message"] = {"role": "assistant", **fields}
    return body


def ask(server: LlmServer, *requests: CompletionRequest, **settings: Any) -> list[Completion | LanguageModelError]:
    config = OpenAICompatibleConfig("tiny", server.url, initial_backoff_s=0.01, max_backoff_s=0.02, **settings)
    with OpenAICompatible(config) as model:
        return model.complete(requests)


def answer_of(server: LlmServer, request: CompletionRequest = FREE, **settings: Any) -> Completion:
    [answer] = ask(server, request, **settings)
    assert isinstance(answer, Completion), answer
    return answer


# --- Parts and fields ---

THINKING = {"type": "thinking", "thinking": [{"type": "text", "text": "joy or fear?"}], "closed": True}


@pytest.mark.supports(
    "target LLMs",
    "answers in parts, reasoning fields beside the answer",
    "the text parts are the answer; the whole is kept as `raw`",
)
@pytest.mark.parametrize(
    ("fields", "text", "raw"),
    [
        # Mistral's form, and one with types that nobody knows.
        ({"content": [THINKING, {"type": "text", "text": "jo"}, {"type": "text", "text": "y"}]}, "joy", "joy or fear?"),
        ({"content": [{"type": "reference", "ids": [1]}, {"type": "text", "text": "joy"}]}, "joy", None),
        ({"content": ["joy"]}, "joy", None),
        ({"content": [{"text": "joy"}]}, "joy", None),
        ({"content": [THINKING]}, "", "joy or fear?"),
        ({"content": "joy", "reasoning_content": "joy or fear?"}, "joy", "joy or fear?"),
        ({"content": "joy", "reasoning": "joy or fear?", "reasoning_content": None}, "joy", "joy or fear?"),
        ({"content": None, "reasoning_content": "joy or fear?"}, "", "joy or fear?"),
        ({"reasoning_content": "joy or fear?"}, "", "joy or fear?"),
    ],
)
def test_an_answer_beside_thoughts(llm_server: LlmServer, fields: dict[str, Any], text: str, raw: str | None) -> None:
    llm_server.reply_to = lambda prompt: Reply(body=message(**fields))
    answer = answer_of(llm_server)
    assert (answer.text, answer.raw) == (text, raw and f"<think>{raw}</think>{text}")
    assert (answer.finish_reason, answer.prompt_tokens) == ("stop" if text else "only_thoughts", 7)
    assert len(llm_server.received) == 1


@pytest.mark.supports(
    "target LLMs",
    "an answer in an unreadable form",
    "asked for once, listed as missing with the reason",
)
@pytest.mark.parametrize(
    "body",
    [
        message(content={"text": "joy"}),
        message(content=[1, 2]),
        {"choices": [{"message": {"role": "assistant"}}]},
        {"choices": [{"finish_reason": "stop"}]},
    ],
)
def test_an_answer_that_cannot_be_read_is_paid_for_once(llm_server: LlmServer, body: Any) -> None:
    """Bug: every such answer was asked for `max_attempts` times, and billed as often."""
    llm_server.reply_to = lambda prompt: Reply(body=body)
    [error] = ask(llm_server, FREE)
    assert isinstance(error, LanguageModelError) and not error.retryable
    assert "(1 try): found an unusable reply (" in str(error)
    assert len(llm_server.received) == 1


# --- In the text ---


@pytest.mark.supports(
    "target LLMs",
    "thoughts in tags (`<think>`, `[THINK]`, …) or gpt-oss channels",
    "no part of an answer; an answer cut within them is empty",
)
@pytest.mark.parametrize(
    ("raw", "answer"),
    [
        ("<think>\njoy or fear?\n</think>\n\njoy", "joy"),
        ("joy or fear?\n</think>\n\njoy", "joy"),  # the opening tag stands in the prompt
        ("<think></think>joy", "joy"),
        ("<think>He says </think> is a tag.</think>joy", "joy"),
        ("joy<think>Was that right?</think>", "joy"),
        ("<thinking>fear</thinking>joy", "joy"),
        ("<thought>fear</thought>\njoy", "joy"),
        ("[THINK]fear[/THINK]joy", "joy"),
        ("<|channel|>analysis<|message|>fear<|end|><|start|>assistant<|channel|>final<|message|>joy<|return|>", "joy"),
        ("<|channel|>analysis<|message|>fear", ""),
        ("analysisWe need one word: fear.assistantfinaljoy", "joy"),
        ("<think>\njoy or", ""),
        ("  <thinking>joy or", ""),
        # No thoughts.
        ("  joy\n", "  joy\n"),
        ("Put <think> around it", "Put <think> around it"),
        ("analysis of the final text", "analysis of the final text"),
        ("", ""),
    ],
)
def test_thoughts_are_no_part_of_the_answer(raw: str, answer: str) -> None:
    assert without_thoughts(raw) == answer
    assert without_thoughts(answer) == answer


@pytest.mark.parametrize(
    ("raw", "finish_reason", "stop", "expected"),
    [
        ("<think>a\nb</think>\njoy\nsince", "length", ("\n",), ("joy", "stop")),
        ("<think>a\nb", "length", ("\n",), ("", "length")),  # counted as cut
        ("<think>a\nb", "stop", (), ("", "only_thoughts")),
        ("a\nb", "length", ("\n",), ("a", "stop")),
        ("a\nb", "length", (), ("a\nb", "length")),
    ],
)
def test_the_reason_of_an_empty_answer_and_stops_behind_thoughts(
    raw: str, finish_reason: str, stop: tuple[str, ...], expected: tuple[str, str]
) -> None:
    found = read_answer(raw, finish_reason, stop)
    assert (found.text, found.finish_reason) == expected
    assert found.raw == (raw if "<think>" in raw else None)


# --- Stop strings ---


@pytest.mark.supports(
    "target LLMs",
    "a stop string that stops the model within its thoughts",
    "met once, then answers are cut here",
)
@pytest.mark.parametrize("in_content", [True, False])
def test_a_stop_within_thoughts_is_met_once_and_then_left_to_us(llm_server: LlmServer, in_content: bool) -> None:
    """Bug: a server that looks for "\\n" in thoughts too gave "<think>" as every label."""

    def reply(body: dict[str, Any]) -> Reply:
        if "stop" not in body and in_content:
            return Reply(body=chat("<think>\njoy or fear?\n</think>\n\njoy\nsince"))
        if "stop" not in body:
            return Reply(body=message(content="\n\njoy\nsince", reasoning_content="joy or fear?"))
        return Reply(body=chat("<think>") if in_content else message(content=None, reasoning_content="joy"))

    llm_server.reply_to_body = reply
    answers = ask(llm_server, *[LABEL] * 12, FREE)
    assert [answer.text for answer in answers if isinstance(answer, Completion)] == ["joy"] * 12 + ["joy\nsince"]
    assert all(answer.adapted == "send_stop=False" for answer in answers[:12] if isinstance(answer, Completion))
    assert sum("stop" in received.body for received in llm_server.received) == 1


# --- Files of earlier versions ---


def test_answers_of_earlier_versions_are_read_without_their_thoughts(tmp_path: Path) -> None:
    path = tmp_path / "old.answers"
    with sqlite3.connect(path) as old:
        old.execute("PRAGMA application_id = 1397768497")
        old.execute(
            "CREATE TABLE answers (key TEXT PRIMARY KEY, text TEXT NOT NULL, finish_reason TEXT, prompt_tokens INTEGER NOT "
            "NULL, completion_tokens INTEGER NOT NULL, latency_s REAL NOT NULL, attempts INTEGER NOT NULL) STRICT, WITHOUT "
            "ROWID"
        )
        for request, text in ((FREE, "<think>a</think>\njoy"), (LABEL, "<think>")):
            old.execute("INSERT INTO answers VALUES (?, ?, 'stop', 7, 3, 0.5, 1)", (_key("tiny", request), text))
    old.close()
    with AnswerCache(path) as cache:
        raw = "<think>a</think>\njoy"
        assert cache.get("tiny", FREE) == Completion("joy", 7, 3, 0.5, "stop", 1, raw=raw)
        assert cache.get("tiny", LABEL) is None  # the answer never came, so it is asked for again
        kept = Completion("", 7, 3, 0.5, "only_thoughts", 1, raw="<think>b", adapted="send_stop=False")
        cache.put("tiny", LABEL, kept)
        assert cache.get("tiny", LABEL) == kept
    with AnswerCache(path) as cache:
        assert len(cache) == 2


# --- In this process ---


def test_a_model_in_this_process_is_not_stopped_within_its_thoughts() -> None:
    """The prompt ends within thoughts that the tiny model never ends, so that all it writes is thoughts."""
    base_model = tiny_base_model()
    base_model.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}<think>\n"
    model = OnTransformers(TransformersConfig("tiny"), base_model)
    [free] = model.complete([CompletionRequest("Hi", max_tokens=4)])
    assert isinstance(free, Completion) and free.raw is not None and free.raw.startswith("<think>")
    assert (free.text, free.finish_reason, free.completion_tokens) == ("", "length", 4)
    first_letter = free.raw.removeprefix("<think>")[:1]
    [stopped] = model.complete([CompletionRequest("Hi", max_tokens=4, stop=(first_letter,))])
    assert isinstance(stopped, Completion) and (stopped.text, stopped.completion_tokens) == ("", 4)
