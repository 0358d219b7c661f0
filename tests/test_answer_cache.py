"""Answers on the disk: kept at once, found again, never mixed up; and asking for the missing ones."""

from __future__ import annotations

import dataclasses
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest
from full_disk import files_up_to

from softprompt_registry.errors import DataError, LanguageModelError
from softprompt_registry.language_models.answer_cache import (
    MAX_FAILURES_IN_A_ROW,
    AnswerCache,
    Asked,
    ask_all,
    ask_missing,
)
from softprompt_registry.language_models.protocol import Completion, CompletionRequest, Finished
from softprompt_registry.recording import NullRecorder

REQUEST = CompletionRequest("Hello?", system="Be kind.", max_tokens=9, temperature=0.5, stop=("\n",), seed=3)
ANSWER = Completion("Hello, 雨!\n", 7, 3, 0.25, "stop", attempts=2)


class Upper:
    """Answers one request after the other: the prompt in upper case."""

    name = identity = "upper"

    def complete(self, requests: Sequence[CompletionRequest]) -> list[Completion | LanguageModelError]:
        return [finished.result for finished in sorted(self.stream(requests), key=lambda finished: finished.index)]

    def stream(self, requests: Iterable[CompletionRequest]) -> Iterator[Finished]:
        for index, request in enumerate(requests):
            yield Finished(index, Completion(request.prompt.upper(), 5, 2, 0.1, "stop", 1))

    def close(self) -> None:
        return None


class Table(Upper):
    """The same in batches of four, backwards; fails where the prompt says so."""

    name = identity = "table"

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.closed_streams = 0

    def stream(self, requests: Iterable[CompletionRequest]) -> Iterator[Finished]:
        waiting = enumerate(requests)
        try:
            while batch := list(islice(waiting, 4)):
                for index, request in reversed(batch):
                    self.asked.append(request.prompt)
                    if "fail" in request.prompt:
                        yield Finished(index, LanguageModelError(f"no {index}.", retryable=False, hint="Pay."))
                    else:
                        yield Finished(index, Completion(request.prompt.upper(), 5, 2, 0.1, "stop", 1))
        finally:
            self.closed_streams += 1


class Bar:
    def __init__(self) -> None:
        self.steps = 0
        self.notes: list[str] = []

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.steps += steps
        self.notes.append(note)


# --- The file ---


def test_an_answer_is_found_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.answers"
    with AnswerCache(path) as cache:
        assert cache.get("tiny", REQUEST) is None and len(cache) == 0
        cache.put("tiny", REQUEST, ANSWER)
        assert cache.get("tiny", REQUEST) == ANSWER and len(cache) == 1
        with AnswerCache(path) as reader:  # while the first is still open: it is on the disk already
            assert reader.get("tiny", dataclasses.replace(REQUEST)) == ANSWER
    with AnswerCache(path) as cache:
        assert cache.get("tiny", REQUEST) == ANSWER
        later = dataclasses.replace(ANSWER, text="", finish_reason=None)
        cache.put("tiny", REQUEST, later)
        assert cache.get("tiny", REQUEST) == later and len(cache) == 1
    assert [file.name for file in path.parent.iterdir()] == ["a.answers"]


def test_whatever_changes_it_is_another_request(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "prompt": "Hello!",
        "system": None,
        "max_tokens": 10,
        "temperature": 0.6,
        "stop": (),
        "presence_penalty": 0.5,
        "seed": None,
        "json_schema": "{}",
    }
    assert set(changes) == {field.name for field in dataclasses.fields(CompletionRequest)}
    with AnswerCache(tmp_path / "a.answers") as cache:
        cache.put("tiny", REQUEST, ANSWER)
        assert cache.get("other", REQUEST) is None
        for name, value in changes.items():
            assert cache.get("tiny", dataclasses.replace(REQUEST, **{name: value})) is None, name


def test_lone_surrogates_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.answers").touch()  # an empty file is a new one
    with AnswerCache(tmp_path / "a.answers") as cache:
        cache.put("tiny", REQUEST, dataclasses.replace(ANSWER, text="a\ud800b"))
        stored = cache.get("tiny", REQUEST)
        assert stored is not None and stored.text == "a?b"


def test_files_of_others_are_refused_and_left_alone(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"not a database, " * 1000)
    other = tmp_path / "other"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE mine (word TEXT)")
    connection.close()
    for path, found in [(garbage, "file is not a database"), (other, "application id 0x0 instead of 0x53504131")]:
        content = path.read_bytes()
        with pytest.raises(DataError, match=f"SQLite cannot use the file \\({found}\\).*Move it away to start again"):
            AnswerCache(path)
        assert path.read_bytes() == content
    assert sorted(file.name for file in tmp_path.iterdir()) == ["garbage", "other"]


def test_a_folder_in_its_place(tmp_path: Path) -> None:
    """Bug: SQLite's own error came out, and the build blamed the DoD for it."""
    with pytest.raises(
        DataError, match=r"unable to open database file.*see that the file and its folder can be written"
    ):
        AnswerCache(tmp_path)


@pytest.mark.parametrize("damage", ["half", "middle"])
def test_a_damaged_file_says_so(tmp_path: Path, damage: str) -> None:
    """Bug: only opening was looked after; a page that was damaged ended in SQLite's own error."""
    path = tmp_path / "a.answers"
    requests = [CompletionRequest(f"prompt {number}") for number in range(300)]
    with AnswerCache(path) as cache:
        for request in requests:
            cache.put("tiny", request, ANSWER)
    content = path.read_bytes()
    half = len(content) // 2 + 100
    damaged = content[:half] if damage == "half" else content[:8192] + b"\xa5" * (len(content) - 8192)
    path.write_bytes(damaged)
    words = "SQLite cannot (use|read).*(malformed|disk I/O error).*Move it away to start again"
    with pytest.raises(DataError, match=words), AnswerCache(path) as cache:
        for request in requests:
            cache.get("tiny", request)
    with pytest.raises(DataError, match=words), AnswerCache(path) as cache:
        for number in range(300):
            cache.put("tiny", CompletionRequest(f"another {number}"), ANSWER)


def test_a_full_disk_keeps_what_is_there(tmp_path: Path) -> None:
    requests = [CompletionRequest(f"prompt {number}") for number in range(200)]
    with AnswerCache(tmp_path / "a.answers") as cache:
        stored = 0
        with pytest.raises(DataError) as caught, files_up_to(100_000):
            for request in requests:
                cache.put("tiny", request, ANSWER)
                stored += 1
        assert 5 < stored < 150
        assert f"; the {stored} answers before it are safe. Make room on the disk and run the same" in str(caught.value)
        assert [cache.get("tiny", request) for request in requests] == [ANSWER] * stored + [None] * (200 - stored)
        cache.put("tiny", requests[stored], ANSWER)  # there is room again
    with AnswerCache(tmp_path / "a.answers") as cache:
        assert len(cache) == stored + 1


def test_a_disk_that_is_full_from_the_start(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Make room on the disk"), files_up_to(10):
        AnswerCache(tmp_path / "a.answers")


# --- Asking ---


def requests_of(*prompts: str) -> Iterator[CompletionRequest]:
    return (CompletionRequest(prompt) for prompt in prompts)


def test_only_what_is_missing_is_asked_for(tmp_path: Path) -> None:
    table, bar, asked = Table(), Bar(), Asked()
    with AnswerCache(tmp_path / "a.answers") as cache:
        ask_missing(table, cache, requests_of("b", "d"), Bar(), Asked())
        table.asked.clear()
        ask_missing(table, cache, requests_of(*"abcdefgh"), bar, asked)
        # Batches of four, backwards, without the two that are known.
        assert table.asked == ["f", "e", "c", "a", "h", "g"]
        answers = [cache.get("table", request) for request in requests_of(*"abcdefgh")]
    assert [answer.text for answer in answers if answer] == list("ABCDEFGH")
    assert bar.steps == 8
    assert (asked.requests, asked.failed, asked.prompt_tokens, asked.completion_tokens) == (6, 0, 30, 12)
    assert asked.seconds > 0 and asked.last_failure is None


def test_a_failed_request_is_counted_and_stays_missing(tmp_path: Path) -> None:
    table, bar, asked = Table(), Bar(), Asked()
    with AnswerCache(tmp_path / "a.answers") as cache:
        ask_missing(table, cache, requests_of("a", "fail b", "c", "fail d", "e"), bar, asked)
        assert (asked.requests, asked.failed, len(cache), bar.steps) == (3, 2, 3, 5)
        assert bar.notes[-1].endswith(" tokens/s, 2 failed")
        assert str(asked.last_failure) == "no 1. Pay."  # backwards: 1 came after 3
        table.asked.clear()
        ask_missing(table, cache, requests_of("a", "fail b", "c", "fail d", "e"), bar, asked)
        assert table.asked == ["fail d", "fail b"]


def test_too_many_failures_in_a_row_end_it(tmp_path: Path) -> None:
    table, asked = Table(), Asked()
    endless = (CompletionRequest(f"{'good' if number < 6 else 'fail'} {number}") for number in count())
    with AnswerCache(tmp_path / "a.answers") as cache, pytest.raises(LanguageModelError) as caught:
        ask_missing(table, cache, endless, Bar(), asked)
    assert MAX_FAILURES_IN_A_ROW == 20
    # 0 to 7 are two batches; backwards, 7 and 6 fail and then 5 and 4 are answered, which ends that row of failures.
    assert (asked.requests, asked.failed) == (6, 22)
    assert str(caught.value) == (
        "asking 'table': 20 requests in a row failed; the 6 answers before them are safe in "
        f"{str(tmp_path / 'a.answers')!r}. The last one: no 24. Pay. "
        "Then run the same command again; it resumes."
    )
    assert not caught.value.retryable and table.closed_streams == 1


def test_a_round_with_failures_ends_in_an_error_or_goes_on_without(tmp_path: Path) -> None:
    table, asked = Table(), Asked(failed=5)
    with AnswerCache(tmp_path / "a.answers") as cache:
        with pytest.raises(LanguageModelError) as caught:
            requests = requests_of("a", "fail b", "c")
            ask_all(table, cache, requests, "words", 3, NullRecorder(), asked, skip_failed=False)
        assert str(caught.value).startswith("asking for words: 1 of 3 requests failed; all other answers are safe in ")
        assert "The last failure: no 1. Pay. Run the same command again to ask for those alone, or" in str(caught.value)
        assert caught.value.retryable and len(cache) == 2
        ask_all(table, cache, requests_of("fail b"), "words", 1, NullRecorder(), asked, skip_failed=True)
    assert asked.failed == 7


def test_memory_does_not_grow_with_the_number_of_requests(tmp_path: Path) -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    resident: list[int] = []

    def requests() -> Iterator[CompletionRequest]:
        for number in range(5_000):
            if number in (1_000, 4_999):
                resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * page)
            yield CompletionRequest(f"{number} " + "long " * 1000)  # 25 MB in all, and as much in answers

    with AnswerCache(tmp_path / "a.answers") as cache:
        with NullRecorder().progress("words", 5_000) as bar:
            ask_missing(Upper(), cache, requests(), bar, Asked())
        assert len(cache) == 5_000
    assert resident[1] - resident[0] < 6_000_000


def test_refused_requests_in_a_row_do_not_end_it_once_anything_was_answered(tmp_path: Path) -> None:
    class Refusing(Table):
        """Refuses what it will not read, as a content filter does."""

        def stream(self, requests: Iterable[CompletionRequest]) -> Iterator[Finished]:
            for finished in super().stream(requests):
                if isinstance(finished.result, LanguageModelError):
                    refusal = LanguageModelError("no.", retryable=False, about_request=True, hint="Ask otherwise.")
                    yield Finished(finished.index, refusal)
                else:
                    yield finished

    refused = [CompletionRequest(f"fail {number}") for number in range(3 * MAX_FAILURES_IN_A_ROW)]
    with AnswerCache(tmp_path / "a.answers") as cache:
        with pytest.raises(LanguageModelError, match=f"{MAX_FAILURES_IN_A_ROW} requests in a row failed"):
            ask_missing(Refusing(), cache, refused, Bar(), Asked())
        asked = Asked()
        ask_missing(Refusing(), cache, [REQUEST, REQUEST, *[REQUEST] * 2, *refused], Bar(), asked)
        assert (asked.failed, len(cache)) == (len(refused), 1)
        asked = Asked()  # what an earlier run got counts as well
        ask_missing(Refusing(), cache, [REQUEST, *refused], Bar(), asked)
        assert (asked.failed, asked.found) == (len(refused), 1)
