"""What a build of a classification DoD survives: servers in trouble, kill -9, Ctrl-C, full disks, damaged files."""

from __future__ import annotations

import dataclasses
import functools
import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from full_disk import files_up_to
from llm_server import KEY, LlmServer, Reply, error_body
from small_builds import SMALL, build, build_undisturbed, names_in, tasks_of
from writing_llm import WritingLlm

from softprompt_registry.dod.asking import answers_path
from softprompt_registry.dod.classification import ClassificationReport
from softprompt_registry.dod.store import DodStore
from softprompt_registry.errors import BusyError, DataError, LanguageModelError
from softprompt_registry.language_models.answer_cache import AnswerCache


@pytest.fixture
def undisturbed(llm_server: LlmServer, tmp_path: Path) -> ClassificationReport:
    return build_undisturbed(llm_server, tmp_path / "undisturbed")


# --- Servers in trouble ---


def test_a_server_in_trouble_for_a_while(
    llm_server: LlmServer, tmp_path: Path, undisturbed: ClassificationReport
) -> None:
    troubles = [
        Reply(429, body=error_body("slow down"), headers={"Retry-After": "0.05"}),
        Reply(500),
        Reply(cut=True),
        Reply(503, body=b"<html>Service Unavailable</html>"),
        Reply(body=b"\xff\xfe rubbish"),
        Reply(body={"choices": []}),
    ]
    writer = WritingLlm()
    seen: Counter[str] = Counter()

    def reply(body: dict[str, Any]) -> Reply:
        """Each second request fails twice, one kind after the other."""
        key = json.dumps(body, sort_keys=True)
        seen[key] += 1
        number = list(seen).index(key)
        return troubles[(number // 2 + 3 * seen[key]) % 6] if number % 2 and seen[key] <= 2 else writer(body)

    llm_server.reply_to_body = reply
    report = build(llm_server, tmp_path / "b.dod")
    assert report.digest == undisturbed.digest
    assert len(llm_server.received) == 42 + 21 * 2
    assert len(writer.answered) == 42 and set(writer.answered.values()) == {1}
    assert (report.asked.requests, report.asked.failed) == (42, 0)


def test_a_server_that_always_fails(llm_server: LlmServer, tmp_path: Path) -> None:
    llm_server.reply_to_body = lambda body: Reply(401, body=error_body(f"Incorrect API key provided: {KEY}."))
    with pytest.raises(LanguageModelError) as caught:
        build(llm_server, tmp_path / "a.dod", dataclasses.replace(SMALL, num_tasks=100), max_concurrency=4)
    assert str(caught.value) == (
        f"asking 'writer': 20 requests in a row failed; the 0 answers before them are safe in "
        f"{str(answers_path(tmp_path / 'a.dod'))!r}. The last one: asking model 'writer' at "
        f"'127.0.0.1:{llm_server.server_port}' (1 try): found HTTP 401 (Incorrect API key provided: ***.). Check the key "
        "in the environment variable OPENAI_API_KEY. Then run the same command again; it resumes."
    )
    assert not caught.value.retryable
    assert 20 <= len(llm_server.received) <= 20 + 2 * 4
    assert names_in(tmp_path) == ["a.dod.answers"]


def test_some_requests_fail_for_good(llm_server: LlmServer, tmp_path: Path, undisturbed: ClassificationReport) -> None:
    label = tasks_of(undisturbed.path)[2].labels[1]
    failing = sum(label in task.labels for task in tasks_of(undisturbed.path)) * 2
    refuse = Reply(400, body=error_body("no"))
    llm_server.reply_to_body = WritingLlm(lambda asked, answer: refuse if asked.label == label else answer)
    out = tmp_path / "b.dod"
    with pytest.raises(LanguageModelError) as caught:
        build(llm_server, out)
    assert str(caught.value).startswith(f"asking for sentences: {failing} of 36 requests failed; all other answers are")
    assert "HTTP 400 (no)" in str(caught.value) and "set skip_failed_requests=true to leave them out" in str(
        caught.value
    )
    assert len(llm_server.received) == 42 and not out.exists()

    # Without them: the task is asked 10 more times for its label, two at a time, and is then given up.
    llm_server.received.clear()
    report = build(llm_server, out, dataclasses.replace(SMALL, skip_failed_requests=True))
    assert report.refused == {"answer: the request failed": failing // 2 * 12}
    assert report.given_up == {"too few good sentences": failing // 2}
    assert (report.tasks, report.asked.requests) == (6 - failing // 2, 0)
    assert len(llm_server.received) == report.asked.failed == failing // 2 * 12

    # The server is well again: only those are asked for.
    llm_server.received.clear()
    llm_server.reply_to_body = WritingLlm()
    report = build(llm_server, out, overwrite=True)
    assert len(llm_server.received) == report.asked.requests == failing
    assert all(f'category "{label}"' in received.body["messages"][1]["content"] for received in llm_server.received)
    assert report.digest == undisturbed.digest


# --- Builds that are stopped ---

PROGRAM = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from small_builds import SMALL
from writing_llm import SEED_WORDS
from softprompt_registry.dod.classification import build_dod_classification
from softprompt_registry.language_models.openai_compatible import OpenAICompatible
from softprompt_registry.language_models.openai_settings import OpenAICompatibleConfig
with OpenAICompatible(OpenAICompatibleConfig("writer", sys.argv[2])) as model:
    build_dod_classification(SEED_WORDS, Path(sys.argv[3]), model, config=SMALL)
"""


def start_build(server: LlmServer, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), server.url, str(out)]
    # A test run in the background may have been started with Ctrl-C ignored, which a child inherits.
    heeds_ctrl_c = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heeds_ctrl_c)


def wait_until(happened: Callable[[], bool], timeout_s: float = 60.0) -> None:
    ends = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < ends, "it did not happen"
        time.sleep(0.01)


def test_kill_9_in_the_middle(llm_server: LlmServer, tmp_path: Path, undisturbed: ClassificationReport) -> None:
    out = tmp_path / "b.dod"
    writer = WritingLlm(delay_s=0.2)
    llm_server.reply_to_body = writer
    process = start_build(llm_server, out)
    wait_until(lambda: len(llm_server.received) >= 25)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    with AnswerCache(answers_path(out)) as cache:
        stored = len(cache)
    assert 6 < stored < 36 and not out.exists()
    assert {"b.dod.answers", "b.dod.building", ".b.dod.lock"} <= set(names_in(tmp_path))

    wait_until(lambda: llm_server.at_once == 0)
    first = Counter(writer.requests)
    assert set(first.values()) == {1} and stored <= len(first)
    llm_server.received.clear()
    writer.delay_s = 0.0
    report = build(llm_server, out)
    assert report.digest == undisturbed.digest
    assert (report.asked.requests, report.answers) == (42 - stored, 42)
    # Each of the 42 was asked for; twice only those that were on their way when the process was killed.
    assert len(writer.requests) == 42
    assert sum(writer.requests.values()) == 42 + (len(first) - stored)
    assert names_in(tmp_path) == ["b.dod", "b.dod.answers", "undisturbed"]


def test_ctrl_c(llm_server: LlmServer, tmp_path: Path, undisturbed: ClassificationReport) -> None:
    """Bug: the process went on waiting for a server that was silent, for as long as timeout_s."""
    out = tmp_path / "b.dod"
    writer = WritingLlm()

    def reply(body: dict[str, Any]) -> Reply:
        return dataclasses.replace(writer(body), delay_s=0.0 if len(llm_server.received) <= 4 else 30.0)

    llm_server.reply_to_body = reply
    process = start_build(llm_server, out)
    wait_until(lambda: len(llm_server.received) == 6)
    time.sleep(0.2)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert time.monotonic() - started < 5
    assert process.returncode == -signal.SIGINT and stderr.endswith("KeyboardInterrupt\n")
    assert names_in(tmp_path) == ["b.dod.answers", "undisturbed"]
    with AnswerCache(answers_path(out)) as cache:
        assert len(cache) == 4
    llm_server.reply_to_body = WritingLlm()
    report = build(llm_server, out)
    assert (report.asked.requests, report.digest) == (38, undisturbed.digest)


def test_two_builds_of_the_same_dod(llm_server: LlmServer, tmp_path: Path) -> None:
    llm_server.reply_to_body = WritingLlm(delay_s=0.05)
    reports: list[ClassificationReport] = []
    first = threading.Thread(target=lambda: reports.append(build(llm_server, tmp_path / "a.dod")))
    first.start()
    wait_until(lambda: len(llm_server.received) > 0)
    with pytest.raises(BusyError, match="a.dod': another process is working there. Wait for it to end"):
        build(llm_server, tmp_path / "a.dod")
    first.join()
    assert reports[0].tasks == 6 and len(llm_server.received) == 42
    assert names_in(tmp_path) == ["a.dod", "a.dod.answers"]


# --- Disks and files in trouble ---


def test_a_disk_that_fills_up_with_answers(
    llm_server: LlmServer, tmp_path: Path, undisturbed: ClassificationReport
) -> None:
    writer = WritingLlm()
    llm_server.reply_to_body = writer
    out = tmp_path / "b.dod"
    with pytest.raises(DataError, match="storing an answer in .*Make room on the disk and run") as caught:
        with files_up_to(120_000):
            build(llm_server, out)
    assert names_in(tmp_path) == ["b.dod.answers", "undisturbed"]
    with AnswerCache(answers_path(out)) as cache:
        stored = len(cache)
    assert 6 <= stored < 42 and f"the {stored} answers before it are safe" in str(caught.value)
    report = build(llm_server, out)
    assert (report.asked.requests, report.digest) == (42 - stored, undisturbed.digest)


def test_a_disk_that_fills_up_with_the_dod(llm_server: LlmServer, tmp_path: Path, undisturbed: Any) -> None:
    with pytest.raises(DataError, match=r"writing '.*a.dod.building' failed .*Make room on the disk"):
        with files_up_to(undisturbed.path.stat().st_size - 1):
            build(llm_server, undisturbed.path, overwrite=True)
    assert names_in(undisturbed.path.parent) == ["a.dod", "a.dod.answers"]
    with DodStore.open(undisturbed.path) as store:  # the old one is as it was
        assert store.digest == undisturbed.digest
    assert build(llm_server, undisturbed.path, overwrite=True).digest == undisturbed.digest
    assert llm_server.received == []


def test_answers_that_are_no_answers(llm_server: LlmServer, tmp_path: Path, undisturbed: Any) -> None:
    answers = answers_path(undisturbed.path)
    whole = answers.read_bytes()
    for damaged in (b"mine " * 1000, whole[: len(whole) // 2 + 7], whole[:8192] + b"\xa5" * (len(whole) - 8192)):
        answers.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a.dod.answers': SQLite cannot .*Move it away to start again"):
            build(llm_server, undisturbed.path, overwrite=True)
        assert answers.read_bytes() == damaged
        assert names_in(undisturbed.path.parent) == ["a.dod", "a.dod.answers"]
    assert llm_server.received == []
    answers.write_bytes(whole)
    assert build(llm_server, undisturbed.path, overwrite=True).asked.requests == 0
