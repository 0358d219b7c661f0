"""Traces of what target LLMs were asked: what they hold, what they must not hold, and that none is lost."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import mlflow
import pytest
from llm_server import KEY, LlmServer, Reply, chat, error_body
from mlflow.entities import SpanStatusCode, Trace

from mlflow_plugins.serving_requests import ServingConfig
from mlflow_plugins.serving_target import TargetModel
from mlflow_plugins.target_traces import target_traces
from softprompt_registry.language_models.answer_cache import AnswerCache
from softprompt_registry.portability.answers import Question
from softprompt_registry.portability.asking import TargetAnswers, ask_targets
from softprompt_registry.portability.budget import TargetPlan
from softprompt_registry.portability.questions import to_request
from softprompt_registry.portability.targets import TargetConfig

HARD_PROMPT = "Name the tone of the sentence."
INPUT = "a rainy evening at the harbour"


def target_at(url: str, name: str = "big", **settings: Any) -> TargetConfig:
    options = {"base_url": url, "max_concurrency": 2, "max_attempts": 1, **settings.pop("options", {})}
    prices = {"price_per_million_prompt_tokens": 1.0, "price_per_million_completion_tokens": 10.0}
    return TargetConfig(**{"model": "big-llm", "name": name, "options": options, "max_tokens": 8, **prices, **settings})


def plan_of(config: TargetConfig, count: int, conditions: Sequence[str] = ("translated",)) -> TargetPlan:
    questions = [
        Question(
            task="tones",
            condition=condition,
            target=config.title,
            item=number,
            input=f"{INPUT} {number}",
            expected="joy",
            system="Be brief.",
            prompt=f"{HARD_PROMPT} Input: {INPUT} {number}\nOutput:",
            hard_prompt=HARD_PROMPT,
        )
        for condition in conditions
        for number in range(count)
    ]
    requests = [to_request(question, max_tokens=8, stop_at_newline=True) for question in questions]
    return TargetPlan(config, questions, requests)


@contextlib.contextmanager
def in_a_run(*configs: TargetConfig) -> Iterator[Any]:
    with mlflow.start_run(), target_traces({config.title: config.prices for config in configs}) as on_answer:
        yield on_answer


def ask(folder: Path, *plans: TargetPlan) -> list[TargetAnswers]:
    with AnswerCache(folder / "some.answers") as cache, in_a_run(*(plan.config for plan in plans)) as on_answer:
        return ask_targets(plans, cache, on_answer=on_answer)


def traces() -> list[Trace]:
    mlflow.flush_trace_async_logging()
    found = mlflow.search_traces(return_type="list", max_results=500)
    return sorted(found, key=lambda trace: trace.info.timestamp_ms)


def test_a_trace_says_what_was_asked_and_what_it_cost(llm_server: LlmServer, mlflow_store: str, tmp_path: Path) -> None:
    llm_server.reply_to = lambda prompt: Reply(body=chat("joy", prompt_tokens=20, completion_tokens=2), delay_s=0.2)
    [answers] = ask(tmp_path, plan_of(target_at(llm_server.url), 1, ("translated", "inspect")))
    run = mlflow.search_runs(output_format="list")[0]
    [trace] = traces()
    assert trace.info.trace_metadata["mlflow.sourceRun"] == run.info.run_id
    assert trace.info.token_usage == {"input_tokens": 20, "output_tokens": 2, "total_tokens": 22}
    assert trace.info.cost == pytest.approx({"input_cost": 20e-6, "output_cost": 20e-6, "total_cost": 40e-6})
    assert trace.info.cost["total_cost"] == answers.asked.cost
    tags = {key: value for key, value in trace.info.tags.items() if key.startswith("softprompt.")}
    # Both conditions gave the same prompt, which was asked once.
    both = "translated, inspect"
    assert tags == {"softprompt.task": "tones", "softprompt.condition": both, "softprompt.target": "big"}
    [span] = trace.data.spans
    assert (span.name, span.span_type, span.status.status_code) == ("target LLM", "CHAT_MODEL", SpanStatusCode.OK)
    latency_s = answers.answers[0].latency_s
    assert latency_s >= 0.2 and span.get_attribute("softprompt.latency_s") == latency_s
    assert trace.info.execution_duration == pytest.approx(latency_s * 1000, abs=2)
    assert span.get_attribute("softprompt.items") == [0, 0]
    prompt_id = span.get_attribute("softprompt.prompt_id")
    assert len(prompt_id) == 12 and span.inputs["hard_prompt_digest"] == prompt_id
    assert span.inputs["prompt_characters"] == len(answers.answers[0].question.prompt)
    assert (span.outputs["text"], span.outputs["finish_reason"]) == ("joy", "stop")


def test_only_what_this_run_asked_has_a_trace_and_failures_have_one(
    llm_server: LlmServer, mlflow_store: str, tmp_path: Path
) -> None:
    config = target_at(llm_server.url)
    ask(tmp_path, plan_of(config, 2))
    assert len(traces()) == 2
    ask(tmp_path, plan_of(config, 2))
    assert len(traces()) == 2
    llm_server.reply_to = lambda prompt: Reply(500, body=error_body("broken")) if " 3" in prompt else Reply()
    [answers] = ask(tmp_path, plan_of(config, 4))
    found = traces()
    assert len(found) == 4 and len(answers.missing) == 1
    [failed] = [trace for trace in found if trace.info.state == "ERROR"]
    assert "HTTP 500 (broken)" in failed.data.spans[0].outputs["error"] and failed.info.token_usage is None
    usage = [trace.info.token_usage for trace in found if trace is not failed]
    assert sum(one["total_tokens"] for one in usage if one) == sum(
        (answers.total.prompt_tokens, answers.total.completion_tokens)
    )


def test_without_prices_no_price_is_looked_up(llm_server: LlmServer, mlflow_store: str, tmp_path: Path) -> None:
    free = {"price_per_million_prompt_tokens": None, "price_per_million_completion_tokens": None}
    ask(tmp_path, plan_of(target_at(llm_server.url, model="gpt-4o-mini", **free), 1))
    [trace] = traces()
    assert trace.info.cost is None and trace.info.token_usage is not None
    # MLflow would look up the price of a model that stands under its own name for it.
    assert trace.data.spans[0].get_attribute("mlflow.llm.model") is None


def test_a_trace_holds_no_prompt(llm_server: LlmServer, mlflow_store: str, tmp_path: Path) -> None:
    ask(tmp_path, plan_of(target_at(llm_server.url), 1))
    llm_server.reply_to = lambda prompt: Reply(body=chat("half \ud800 a sign"))
    ask(tmp_path, plan_of(target_at(llm_server.url, model="other"), 1))
    written = "".join(trace.to_json() for trace in traces())
    assert HARD_PROMPT not in written and INPUT not in written
    assert "half ? a sign" in written  # what UTF-8 cannot hold is replaced


def test_answers_survive_a_store_that_cannot_be_written(
    llm_server: LlmServer, mlflow_store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = target_at(llm_server.url)
    with AnswerCache(tmp_path / "some.answers") as cache, in_a_run(config) as on_answer:
        database = Path(mlflow_store.removeprefix("sqlite:///"))
        content = database.read_bytes()
        with sqlite3.connect(database) as connection:
            for table in ("spans", "trace_info"):
                connection.execute(f"ALTER TABLE {table} RENAME TO gone_{table}")
        connection.close()
        [answers] = ask_targets([plan_of(config, 2)], cache, on_answer=on_answer)
        mlflow.flush_trace_async_logging()
        database.write_bytes(content)
    assert answers.missing == [] and "no such table: trace_info" in caplog.text


# --- Stopped processes ---

PROGRAM = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}]
from test_target_traces import ask, plan_of, target_at
print("ready", flush=True)
ask(Path({folder!r}), plan_of(target_at({url!r}), 200))
"""


def test_a_stopped_process_has_lost_no_trace(llm_server: LlmServer, mlflow_store: str, tmp_path: Path) -> None:
    llm_server.reply_to = lambda prompt: Reply(delay_s=0.05)
    program = PROGRAM.format(tests=str(Path(__file__).parent), folder=str(tmp_path), url=llm_server.url)
    environment = {key: value for key, value in os.environ.items() if key != "MLFLOW_ENABLE_ASYNC_TRACE_LOGGING"}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120
        while len(llm_server.received) < 12:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=30)
        assert process.returncode == -signal.SIGTERM, stderr.decode()
    finally:
        process.kill()
        process.communicate()
    with AnswerCache(tmp_path / "some.answers") as cache:
        kept = len(cache)
    complete = [trace for trace in traces() if trace.data.spans and trace.info.token_usage]
    assert kept >= 6
    assert kept - 1 <= len(complete) <= kept  # the one that was being written


# --- The served model ---


def served(server: LlmServer, **settings: Any) -> TargetModel:
    settings = {"trace_target_calls": True, **settings}
    return TargetModel(ServingConfig(target_model="big-llm", target_base_url=server.url, **settings))


def test_a_served_model_records_its_questions_where_it_is_told_to(llm_server: LlmServer, mlflow_store: str) -> None:
    llm_server.reply_to = lambda prompt: Reply(403, body=error_body("no")) if "bad" in prompt else Reply()
    questions = [(HARD_PROMPT, INPUT), (HARD_PROMPT, "bad")]
    assert len(served(llm_server, trace_target_calls=False).ask(questions)) == 2
    assert traces() == []
    assert len(served(llm_server).ask(questions)) == 2
    good, bad = sorted(traces(), key=lambda trace: trace.info.state != "OK")
    assert good.info.token_usage == {"input_tokens": 7, "output_tokens": 3, "total_tokens": 10}
    assert "HTTP 403 (no)" in bad.data.spans[0].outputs["error"]
    # Inputs of clients and answers to them are in no trace.
    written = good.to_json() + bad.to_json()
    assert INPUT.upper() not in written and INPUT not in written and HARD_PROMPT not in written
    assert good.data.spans[0].outputs["characters"] == len(f"{HARD_PROMPT} Input: {INPUT}\nOutput:")


def test_the_questions_of_a_traced_request_stand_below_it(llm_server: LlmServer, mlflow_store: str) -> None:
    target = served(llm_server)
    with mlflow.start_span("portable_prompt", span_type="CHAIN"):
        target.ask([(HARD_PROMPT, INPUT), (HARD_PROMPT, "other")])
    [trace] = traces()
    assert [span.name for span in trace.data.spans if span.parent_id is None] == ["portable_prompt"]
    assert sum(span.span_type == "CHAT_MODEL" for span in trace.data.spans) == 2
    assert trace.info.token_usage == {"input_tokens": 14, "output_tokens": 6, "total_tokens": 20}


def test_a_request_is_answered_when_no_trace_can_be_written(
    llm_server: LlmServer, mlflow_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_TRACE_LOGGING", "false")
    mlflow.set_tracking_uri("sqlite:////dev/null/nowhere.db")
    try:
        replies = served(llm_server).ask([(HARD_PROMPT, INPUT)])
    finally:
        mlflow.set_tracking_uri(mlflow_store)
    assert [getattr(reply, "text", None) for reply in replies] == [f"{HARD_PROMPT} Input: {INPUT}\nOutput:".upper()]


# --- Secrets ---


def test_the_key_is_in_nothing_that_is_written(
    llm_server: LlmServer, mlflow_store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    replies = {
        " 0": Reply(body=chat("the answer that was given")),
        " 1": Reply(401, body=error_body(f"Incorrect API key provided: {KEY}.")),
        " 2": Reply(500, body=f"Authorization: Bearer {KEY}".encode()),
        " 3": Reply(body={"error": {"message": f"bad key {KEY}"}}),
        " 4": Reply(cut=True),
    }
    llm_server.reply_to = lambda prompt: next(reply for mark, reply in replies.items() if f"{INPUT}{mark}" in prompt)
    azure = {"base_url": llm_server.url.removesuffix("/v1"), "api_version": "2024-10-21"}
    configs = [target_at(llm_server.url), target_at(llm_server.url, "azure", options=azure)]
    plans = [plan_of(config, 5) for config in configs]
    results = ask(tmp_path, *plans)
    assert [len(result.missing) for result in results] == [4, 4]
    with mlflow.start_run():
        lines = [json.dumps(answer.to_json()) for result in results for answer in result.answers]
        mlflow.log_text("\n".join(lines), "answers.jsonl")
        mlflow.log_dict({"targets": [repr(config) for config in configs]}, "targets.json")
    logging.getLogger("test").warning("%r %s", results, [vars(config) for config in configs])
    mlflow.flush_trace_async_logging()
    assert len(traces()) == 10

    def found(secret: str) -> list[str]:
        files = [path for path in tmp_path.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
        return sorted({path.name for path in files} | ({"log"} if secret in caplog.text else set()))

    # What was written is found where it was written, so the search finds.
    assert found("the answer that was given") == ["answers.jsonl", "log", "mlflow.db", "some.answers"]
    assert {"answers.jsonl", "log"} <= set(found(HARD_PROMPT))
    assert "mlflow.db" in found("Incorrect API key provided: ***.")
    assert found(KEY) == found(KEY[:-4]) == []
