"""Asking target LLMs through the real client and a real server that misbehaves: what is kept, what is named as missing, what
it costs, and what a second run asks for."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import mlflow
import pytest
from llm_server import KEY, LlmServer, Reply, chat, error_body
from tiny_llm import tiny_base_model

from softprompt_registry.errors import ConfigError
from softprompt_registry.language_models.answer_cache import AnswerCache
from softprompt_registry.language_models.on_transformers import OnTransformers, TransformersConfig
from softprompt_registry.language_models.protocol import CompletionRequest, Prices, Usage
from softprompt_registry.portability.answers import Answer, Question
from softprompt_registry.portability.asking import TargetAnswers, ask_questions, ask_targets
from softprompt_registry.portability.budget import Budget, ConditionEstimate, TargetPlan, estimate
from softprompt_registry.portability.questions import to_request
from softprompt_registry.portability.targets import TargetConfig, require_different_names
from softprompt_registry.recording import NullRecorder

PRICES = {"price_per_million_prompt_tokens": 1.0, "price_per_million_completion_tokens": 10.0}


@pytest.fixture
def cache(tmp_path: Path) -> Any:
    with AnswerCache(tmp_path / "portability.answers") as cache:
        yield cache


def target_at(server: LlmServer, name: str = "big", **settings: Any) -> TargetConfig:
    fast = {"base_url": server.url, "initial_backoff_s": 0.01, "max_backoff_s": 0.02}
    options = fast | {"max_concurrency": 1} | settings.pop("options", {})
    return TargetConfig(**{"model": "big-llm", "options": options, "name": name, "max_tokens": 8, **PRICES, **settings})


def question(prompt: str, *, target: str = "big", condition: str = "translated", item: int = 0) -> Question:
    return Question("tones", condition, target, item, prompt, prompt.upper(), "Be brief.", prompt, "Say it.")


def plan_of(config: TargetConfig, *prompts: str, condition: str = "translated") -> TargetPlan:
    questions = [
        question(prompt, target=config.title, condition=condition, item=number) for number, prompt in enumerate(prompts)
    ]
    requests = [to_request(one, max_tokens=config.max_tokens, stop_at_newline=False) for one in questions]
    return TargetPlan(config, questions, requests)


def joined(one: TargetPlan, other: TargetPlan) -> TargetPlan:
    return TargetPlan(one.config, [*one.questions, *other.questions], [*one.requests, *other.requests])


def ask(cache: AnswerCache, *plans: TargetPlan, **settings: Any) -> list[TargetAnswers]:
    return ask_targets(plans, cache, **settings)


def prompts_seen_by(server: LlmServer) -> list[str]:
    return [received.body["messages"][-1]["content"] for received in server.received]


def texts(answers: Sequence[Answer]) -> list[str | None]:
    return [answer.text for answer in answers]


# --- Answers ---


def test_answers_come_in_the_order_of_the_questions(llm_server: LlmServer, cache: AnswerCache) -> None:
    llm_server.reply_to = lambda prompt: Reply(delay_s=0.1 if prompt == "slow" else 0)
    plan = plan_of(target_at(llm_server, options={"max_concurrency": 4}), "slow", "a", "b", "c")
    [result] = ask(cache, plan)
    assert texts(result.answers) == ["SLOW", "A", "B", "C"]
    assert [answer.question for answer in result.answers] == plan.questions
    answer = result.answers[1]
    assert (answer.finish_reason, answer.prompt_tokens, answer.completion_tokens, answer.error) == ("stop", 7, 3, None)
    assert 0 < answer.latency_s < 5
    assert result.asked == result.total == Usage(4, 28, 12, (28 * 1 + 12 * 10) / 1e6)
    assert (result.target, result.found, result.failed, result.ended, result.missing) == ("big", 0, 0, None, [])
    assert llm_server.received[0].body["max_tokens"] == 8 and llm_server.received[0].body["temperature"] == 0


def test_a_second_run_asks_nothing_and_gives_the_same_to_the_last_bit(
    llm_server: LlmServer, cache: AnswerCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm_server.reply_to = lambda prompt: Reply(body=chat("odd \ud800" if prompt == "b" else prompt))
    plan = plan_of(target_at(llm_server), "a", "b", "c")
    [first] = ask(cache, plan)
    monkeypatch.delenv("OPENAI_API_KEY")  # not even a key is needed
    told: list[Sequence[Answer]] = []
    [second] = ask(cache, plan, on_answer=told.append)
    assert len(llm_server.received) == 3 and told == []
    lines = [[json.dumps(answer.to_json()) for answer in run.answers] for run in (first, second)]
    assert lines[0] == lines[1]
    assert [Answer.from_json(json.loads(line)) for line in lines[0]] == first.answers
    assert (second.asked, second.total, second.found) == (Usage(0, 0, 0, 0.0), first.asked, 3)


def test_equal_requests_are_asked_and_paid_once(llm_server: LlmServer, cache: AnswerCache) -> None:
    config = target_at(llm_server, options={"max_concurrency": 4})
    plan = joined(*(plan_of(config, "a", "b", condition=name) for name in ("no_prompt", "inspect")))
    told: list[Sequence[Answer]] = []
    [result] = ask(cache, plan, on_answer=told.append)
    assert sorted(prompts_seen_by(llm_server)) == ["a", "b"]
    assert texts(result.answers) == ["A", "B", "A", "B"]
    assert result.asked == result.total == Usage(2, 14, 6, (14 + 60) / 1e6)
    # One call tells of all the questions that it answered.
    told.sort(key=lambda answers: answers[0].question.item)
    assert told == [[result.answers[0], result.answers[2]], [result.answers[1], result.answers[3]]]


def test_refusals_and_empty_answers_are_counted_and_kept(llm_server: LlmServer, cache: AnswerCache) -> None:
    refusal = chat(None)
    refusal["choices"][0]["message"]["refusal"] = "I won't."
    llm_server.replies = [
        Reply(body=chat("yes")),
        Reply(body=chat(None, finish_reason="content_filter", completion_tokens=0)),
        Reply(body=refusal),
        Reply(body=chat(" \n", finish_reason="length", completion_tokens=8)),
        Reply(400, body=error_body("filtered", "content_filter")),
    ]
    [result] = ask(cache, plan_of(target_at(llm_server), *"abcde"))
    assert texts(result.answers) == ["yes", "", "", " \n", ""]
    reasons = [answer.finish_reason for answer in result.answers]
    assert reasons == ["stop", "content_filter", "refusal", "length", "content_filter"]
    assert result.missing == []
    assert result.asked == Usage(5, 28, 14, (28 + 140) / 1e6)
    ask(cache, plan_of(target_at(llm_server), *"abcde"))
    assert len(llm_server.received) == 5


def test_a_cost_is_not_known_where_the_server_does_not_count(llm_server: LlmServer, cache: AnswerCache) -> None:
    def silent(prompt: str) -> Reply:
        body = chat(prompt)
        del body["usage"]
        return Reply(body=body)

    llm_server.reply_to = silent
    # 36 prompt tokens each by bytes, and at most 8 others, are what an answer may have taken.
    [result] = ask(cache, plan_of(target_at(llm_server), *"ab"), budget=Budget(max_tokens=88))
    assert texts(result.answers) == ["a", "b"] and result.asked == Usage(2, 0, 0, None) == result.total
    with pytest.raises(ConfigError, match="max_tokens is 43"):
        ask(cache, plan_of(target_at(llm_server), "c"), budget=Budget(max_tokens=43))


def test_a_progress_bar_for_each_target_counts_its_requests(llm_server: LlmServer, cache: AnswerCache) -> None:
    bars: dict[str, MagicMock] = {}

    class Recorder(NullRecorder):
        def progress(self, title: str, total: int) -> Any:
            return bars.setdefault(f"{title}/{total}", MagicMock())

    recorder = Recorder()
    ask(cache, plan_of(target_at(llm_server), "a"))
    plans = plan_of(target_at(llm_server), "a", "b", "b"), plan_of(target_at(llm_server, "other", model="o"), "a")
    ask(cache, *plans, recorder=recorder)
    steps = {title: bar.__enter__().advance.call_count for title, bar in bars.items()}
    assert steps == {"asking big/2": 2, "asking other/1": 1}


# --- A server that misbehaves ---


def test_what_passes_is_waited_for(llm_server: LlmServer, cache: AnswerCache) -> None:
    llm_server.replies = [
        Reply(429, body=error_body("slow down"), headers={"Retry-After": "0.2"}),
        Reply(500),
        Reply(503, body=b"<html>"),
        Reply(cut=True),
        Reply(body=b'{"choices": ['),
        Reply(delay_s=0.5),
    ]
    options = {"max_attempts": 8, "timeout_s": 0.3}
    [result] = ask(cache, plan_of(target_at(llm_server, options=options), *"abcd"))
    assert texts(result.answers) == list("ABCD") and (result.failed, result.missing) == (0, [])
    assert llm_server.received[1].at - llm_server.received[0].at >= 0.2
    assert len(llm_server.received) == 4 + 6
    assert result.asked == Usage(4, 28, 12, (28 + 120) / 1e6)


def test_what_does_not_pass_is_listed_and_asked_again_by_the_next_run(
    llm_server: LlmServer, cache: AnswerCache
) -> None:
    failures = {
        "b": Reply(500, body=error_body("broken")),
        "d": Reply(body=b"not JSON"),
        "f": Reply(400, body=error_body("too long")),
        "g": Reply(cut=True),
        "h": Reply(delay_s=0.5),
    }
    llm_server.reply_to = lambda prompt: failures.get(prompt, Reply())
    plan = plan_of(target_at(llm_server, options={"max_attempts": 2, "timeout_s": 0.2}), *"abcdefghi")
    told: list[Sequence[Answer]] = []
    [first] = ask(cache, plan, on_answer=told.append)
    assert texts(first.answers) == ["A", None, "C", None, "E", None, None, None, "I"]
    assert [answer.question.prompt for answer in first.missing] == list("bdfgh")
    errors = ["HTTP 500 (broken)", "not JSON", "HTTP 400 (too long)", "the connection failed", "no reply within 0.2 s"]
    for answer, words in zip(first.missing, errors, strict=True):
        assert answer.error is not None and words in answer.error
    assert first.asked == first.total == Usage(4, 28, 12, (28 + 120) / 1e6)
    assert (first.failed, first.ended) == (5, None)
    # Whoever records calls hears of those that failed too.
    heard = {answers[0].question.prompt: answers[0] for answers in told}
    assert sorted(heard) == list("abcdefghi") and heard["b"] == first.answers[1]

    llm_server.received.clear()
    llm_server.reply_to = None
    [second] = ask(cache, plan)
    assert sorted(prompts_seen_by(llm_server)) == list("bdfgh")
    assert texts(second.answers) == list("ABCDEFGHI") and second.missing == []
    assert second.answers[0] == first.answers[0]
    assert (second.asked.requests, second.total.requests, second.found) == (5, 9, 4)
    assert second.asked.prompt_tokens + first.asked.prompt_tokens == second.total.prompt_tokens == 63


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (Reply(404, body=error_body("The model `big-llm` does not exist")), "Check the model name 'wrong'"),
        (Reply(401, body=error_body("Incorrect API key")), "HTTP 401 (Incorrect API key)"),
    ],
)
def test_a_target_that_cannot_work_ends_for_itself_alone(
    llm_server: LlmServer, cache: AnswerCache, tmp_path: Path, reply: Reply, words: str
) -> None:
    llm_server.reply_to_body = lambda body: reply if body["model"] == "wrong" else Reply()
    prompts = [f"prompt {number}" for number in range(60)]
    wrong, right = target_at(llm_server, "wrong", model="wrong"), target_at(llm_server, "right")
    first, second = ask(cache, plan_of(wrong, *prompts), plan_of(right, *prompts[:3]))
    assert len(first.missing) == 60 and first.failed == 20 and first.asked == Usage(0, 0, 0, 0.0)
    assert first.ended is not None and words in first.ended
    assert all(words in (answer.error or "") for answer in first.missing)
    assert str(first.missing[-1].error).startswith("not asked: too many requests in a row failed; the last one: asking")
    assert not any(str(tmp_path) in str(answer.error) for answer in first.missing)
    assert sum(received.body["model"] == "wrong" for received in llm_server.received) <= 22
    assert texts(second.answers) == ["PROMPT 0", "PROMPT 1", "PROMPT 2"] and second.ended is None


def test_a_target_without_a_key_gives_what_is_known_and_names_the_rest(
    llm_server: LlmServer, cache: AnswerCache
) -> None:
    config = target_at(llm_server)
    ask(cache, plan_of(config, "a"))
    keyless = replace(config, name="keyless", options={**config.options, "api_key_env": "NO_SUCH_KEY"})
    first, second = ask(cache, plan_of(keyless, "a", "b"), plan_of(config, "b"))
    assert texts(first.answers) == ["A", None]
    assert "not asked: connecting to model 'big-llm': the environment variable NO_SUCH_KEY is not set" in str(
        first.missing[0].error
    )
    assert texts(second.answers) == ["B"]


def test_a_target_in_this_process_that_cannot_be_loaded_ends_for_itself_alone(
    llm_server: LlmServer, cache: AnswerCache, tmp_path: Path
) -> None:
    local = TargetConfig("transformers", str(tmp_path / "nothing"))
    first, second = ask(cache, plan_of(local, "a"), plan_of(target_at(llm_server), "a"))
    assert first.target == "nothing" and texts(first.answers) == [None]
    assert str(first.answers[0].error).startswith("not asked: ") and texts(second.answers) == ["A"]


def test_two_servers_with_one_model_name_do_not_share_answers(llm_server: LlmServer, cache: AnswerCache) -> None:
    one = target_at(llm_server, "one")
    elsewhere = {"base_url": llm_server.url.replace("127.0.0.1", "localhost")}
    other = target_at(llm_server, "other", options=elsewhere)
    renamed = replace(one, name="renamed", options={**one.options, "max_concurrency": 2})
    ask(cache, plan_of(one, "a"), plan_of(other, "a"), plan_of(renamed, "a"))
    assert prompts_seen_by(llm_server) == ["a", "a"]
    azure = replace(one, options={**one.options, "api_version": "2024-10-21"})
    assert len({config.identity for config in (one, other, azure)}) == 3 and one.identity == renamed.identity


# --- Budgets ---


def test_an_estimate_says_what_is_missing_for_each_target_and_condition(
    llm_server: LlmServer, cache: AnswerCache
) -> None:
    config = target_at(llm_server)
    ask(cache, plan_of(config, "known"))
    llm_server.received.clear()
    long = "x" * 31  # with the 9 characters of the system text 40
    no_prompt, translated = (
        plan_of(config, *prompts, condition=condition)
        for condition, prompts in (("no_prompt", (long, "known", long)), ("translated", (long, "y" * 35)))
    )
    plan = joined(no_prompt, translated)
    free = {"price_per_million_prompt_tokens": None, "price_per_million_completion_tokens": None}
    unpriced = plan_of(target_at(llm_server, "other", model="other", max_tokens=100, **free), "a b c")
    expected = estimate([plan, unpriced], cache)
    assert expected.conditions == [
        ConditionEstimate("big", "no_prompt", 3, 1, 46, 8, (46 + 80) / 1e6, True),
        ConditionEstimate("big", "translated", 2, 1, 47, 8, (47 + 80) / 1e6, True),
        ConditionEstimate("other", "translated", 1, 1, 37, 100, None, True),
    ]
    assert expected.tokens == 54 + 55 + 137 and expected.cost is None
    assert estimate([plan], cache).cost == pytest.approx(253 / 1e6)
    assert llm_server.received == []


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (Budget(max_tokens=131), r"takes 3 requests and up to 132 \(max_tokens is 131\).*nothing was asked"),
        (Budget(max_cost=0.000347), r"up to 0.000348 \(max_cost is 0.000347\)"),
    ],
)
def test_what_could_go_past_the_budget_is_not_begun(
    llm_server: LlmServer, cache: AnswerCache, budget: Budget, words: str
) -> None:
    # 4 + 32 prompt tokens each, and at most 8 others: 132 tokens, 348 millionths
    plan = plan_of(target_at(llm_server), *"abc")
    with pytest.raises(ConfigError, match=words):
        ask(cache, plan, budget=budget)
    assert llm_server.received == []
    [result] = ask(cache, plan, budget=Budget(132, 0.000348))  # one that suffices
    assert texts(result.answers) == list("ABC") and result.ended is None


def test_a_run_stops_asking_when_the_budget_is_spent(llm_server: LlmServer, cache: AnswerCache) -> None:
    """The server counts more tokens than the estimate: 6 requests reach the limit, and another may be on its way."""
    llm_server.reply_to = lambda prompt: Reply(body=chat(prompt, prompt_tokens=90, completion_tokens=10))
    prompts = [f"{number:02}" for number in range(12)]
    plan, other = (
        plan_of(target_at(llm_server, name, model=name), *prompts[:number]) for name, number in (("big", 12), ("o", 2))
    )
    ask(cache, plan_of(target_at(llm_server, model="big"), "11"))
    llm_server.received.clear()
    [first, second] = ask(cache, plan, other, budget=Budget(max_tokens=600))
    assert 6 <= len(llm_server.received) <= 7
    answered = [answer for answer in first.answers if not answer.is_missing]
    assert len(answered) == len(llm_server.received) + 1 and not first.answers[11].is_missing  # from the first run
    spent = 100 * len(llm_server.received)
    assert first.asked == Usage(len(llm_server.received), spent * 9 // 10, spent // 10, first.asked.cost)
    [reason] = {answer.error for answer in first.missing}
    assert reason is not None
    assert re.fullmatch("not asked: the budget is spent: [56]00 tokens used, max_tokens is 600", reason)
    assert first.ended == reason.removeprefix("not asked: ") and first.failed == 0
    # The budget is one for all targets.
    assert len(second.missing) == 2 and second.ended is not None and "tokens used" in second.ended
    # A new run has a new budget, and asks for what is missing.
    [again, _] = ask(cache, plan, other)
    assert again.missing == [] and again.asked.requests == 12 - len(answered)


def test_a_limit_of_cost_needs_prices(llm_server: LlmServer, cache: AnswerCache) -> None:
    free = {name: None for name in PRICES}
    plan = plan_of(target_at(llm_server, "free", **free), "a")
    with pytest.raises(ConfigError, match=r"max_cost is 1, but the targets \['free'\] have no prices"):
        ask(cache, plan, budget=Budget(max_cost=1.0))
    [result] = ask(cache, plan)
    assert result.asked == Usage(1, 7, 3, None)
    assert ask(cache, plan, budget=Budget(max_cost=1.0))[0].missing == []  # nothing is left to pay for


def test_a_limit_of_cost_ends_a_run(llm_server: LlmServer, cache: AnswerCache) -> None:
    llm_server.reply_to = lambda prompt: Reply(body=chat(prompt, prompt_tokens=500, completion_tokens=50))
    [result] = ask(cache, plan_of(target_at(llm_server), *"abcdefgh"), budget=Budget(max_cost=0.001))
    assert 1 <= len(llm_server.received) <= 3
    assert result.ended == "the budget is spent: it cost 0.001, max_cost is 0.001"
    assert result.asked.cost == pytest.approx(0.001 * len(llm_server.received))


def test_what_runs_in_this_process_counts_towards_no_budget(cache: AnswerCache) -> None:
    local = TargetConfig("transformers", "somewhere", name="local", max_tokens=10**6)
    expected = estimate([plan_of(local, "a")], cache)
    assert (expected.tokens, expected.cost, expected.conditions[0].is_remote) == (0, 0, False)
    assert expected.conditions[0].requests == 1
    Budget(1, 0.01).require(expected)


# --- Settings ---


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "no model is named"),
        ({"model": "m", "options": {"api_key": KEY}}, "unknown 'api_key'"),
        ({"model": "m", "options": {"base_url": f"https://me:{KEY}@host/v1"}}, "carries credentials"),
        ({"model": "m", "options": {"price_per_million_prompt_tokens": 1.0}}, "stand in its options"),
        ({"model": "m", "price_per_million_prompt_tokens": 1.0}, "only one of the two prices is set"),
        ({"model": "m", "engine": "transformers", "options": {"base_url": "x"}}, "unknown 'base_url'"),
    ],
)
def test_targets_that_cannot_work_are_refused_before_anything_is_asked(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        TargetConfig(**settings)
    assert KEY not in str(caught.value)


def test_targets_have_different_names() -> None:
    one, two = TargetConfig(model="m"), TargetConfig(model="m", options={"base_url": "http://host/v1"})
    with pytest.raises(ConfigError, match=r"found the names \['m'\] more than once"):
        require_different_names([one, two])
    require_different_names([one, replace(two, name="m2")])
    with pytest.raises(ConfigError, match="found none"):
        require_different_names([])
    assert TargetConfig("transformers", "/home/me/models/llama").title == "llama"
    assert TargetConfig(model="org/llama").title == "org/llama"
    assert (TargetConfig(model="m", **PRICES).prices, one.prices) == (Prices(1.0, 10.0), None)


@pytest.mark.parametrize(
    ("title", "key"),
    [
        ("meta-llama/Llama-3.1-8B@0e9e39f", "meta-llama/Llama-3.1-8B-0e9e39f"),
        ("./models//tiny/", "models/tiny"),
        ("a/../b", "a/b"),
        ("/", "-"),
        ("x" * 149 + "/y" * 200, "x" * 149),
    ],
)
def test_a_title_becomes_a_name_that_mlflow_takes(title: str, key: str, mlflow_store: str) -> None:
    assert TargetConfig(model="m", name=title).key == key
    with mlflow.start_run():
        mlflow.log_metric(f"portability.total_requests.{key}", 1.0)
        mlflow.log_param(f"portability.targets.{key}.price_per_million_completion_tokens", 1.0)


# --- Models that are open already ---


def test_a_model_in_this_process_is_asked_like_a_server(cache: AnswerCache) -> None:
    model = OnTransformers(TransformersConfig("tiny", prompt_format="plain"), base_model=tiny_base_model())
    questions = [question(f"prompt {number}", item=number) for number in range(3)]
    requests = [to_request(one, max_tokens=4, stop_at_newline=True) for one in questions]
    bar = NullRecorder().progress("", 3)
    with bar as shown:
        first = ask_questions(model, cache, questions, requests, target="tiny", bar=shown)
        second = ask_questions(model, cache, questions, requests, target="tiny", bar=shown)
    assert first.answers == second.answers and first.missing == []
    assert (first.asked.requests, second.asked.requests, second.found) == (3, 0, 3)
    [direct] = model.complete([CompletionRequest("prompt 1", "Be brief.", 4, stop=("\n",))])
    assert first.answers[1].text == direct.text  # type: ignore[union-attr]
