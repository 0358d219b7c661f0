"""Every answer of a language model on the disk as soon as it is there, keyed by what was asked.

A second run with the same requests asks for nothing; a run that was stopped asks for what is missing. A changed prompt,
model or setting is another request, so nothing stale is ever used.
"""

from __future__ import annotations

import dataclasses
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from softprompt_registry.errors import DataError, LanguageModelError
from softprompt_registry.fingerprints import digest_of_json
from softprompt_registry.language_models.protocol import Completion, CompletionRequest, LanguageModel
from softprompt_registry.language_models.replies import ONLY_THOUGHTS, read_answer
from softprompt_registry.recording import ProgressBar, Recorder

APPLICATION_ID = 0x53_50_41_31  # "SPA1" in the SQLite header
MAX_FAILURES_IN_A_ROW = 20
"""So many failed requests without an answer between them end the work: key, address or server are wrong."""


class AnswerCache:
    """An open file of answers. Use as a context manager.

    Raises:
        DataError: the file is something else, is damaged, or cannot be written (a full disk); what it holds stays there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._failures("opening the answers"):
            self._connection = sqlite3.connect(path, isolation_level=None)
            try:
                self._prepare()
            except sqlite3.DatabaseError:
                self._connection.close()
                raise

    def _prepare(self) -> None:
        execute = self._connection.execute
        application_id = execute("PRAGMA application_id").fetchone()[0]
        if application_id == 0 and not execute("SELECT 1 FROM sqlite_master").fetchone():
            execute("PRAGMA journal_mode = WAL")
            execute(f"PRAGMA application_id = {APPLICATION_ID}")
        elif application_id != APPLICATION_ID:
            raise sqlite3.DatabaseError(f"application id {application_id:#x} instead of {APPLICATION_ID:#x}")
        # A killed process loses nothing in this mode; only a power cut can lose the last answers.
        execute("PRAGMA synchronous = NORMAL")
        execute(
            "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, text TEXT NOT NULL, finish_reason TEXT, "
            "prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, latency_s REAL NOT NULL, "
            "attempts INTEGER NOT NULL, raw TEXT, adapted TEXT) STRICT, WITHOUT ROWID"
        )
        columns = {row[1] for row in execute("PRAGMA table_info(answers)")}
        for name in sorted({"raw", "adapted"} - columns):  # a file of an earlier version
            execute(f"ALTER TABLE answers ADD COLUMN {name} TEXT")

    @contextmanager
    def _failures(self, doing: str) -> Iterator[None]:
        """SQLite's errors as ours."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            expected = "expected a whole file written by softprompt-registry"
            advice = "Move it away to start again, or put a backup in its place."
            if isinstance(error, sqlite3.OperationalError) and doing.startswith("storing"):
                expected = f"the {len(self)} answers before it are safe"
                advice = "Make room on the disk and run the same command again."
            elif isinstance(error, sqlite3.OperationalError) and doing.startswith("opening"):
                advice = "Make room on the disk, and see that the file and its folder can be written."
            raise DataError(
                f"{doing} in {str(self.path)!r}: SQLite cannot use the file ({error}); {expected}. {advice}"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._connection.close()

    def __len__(self) -> int:
        return int(self._connection.execute("SELECT count(*) FROM answers").fetchone()[0])

    def get(self, identity: str, request: CompletionRequest) -> Completion | None:
        """The stored answer to a request; None if there is none yet."""
        with self._failures("reading an answer"):
            row = self._connection.execute(
                f"SELECT {', '.join(_COLUMNS)} FROM answers WHERE key = ?", (_key(identity, request),)
            ).fetchone()
        return None if row is None else _without_thoughts(Completion(*row), request)

    def put(self, identity: str, request: CompletionRequest, answer: Completion) -> None:
        """Store an answer; it is on the disk when this returns."""
        stored = dataclasses.replace(answer, text=_readable(answer.text), raw=answer.raw and _readable(answer.raw))
        with self._failures("storing an answer"):
            self._connection.execute(
                f"INSERT OR REPLACE INTO answers (key, {', '.join(_COLUMNS)}) VALUES (?{', ?' * len(_COLUMNS)})",
                (_key(identity, request), *dataclasses.astuple(stored)),
            )


_COLUMNS = tuple(field.name for field in dataclasses.fields(Completion))
"""Columns of the table; the names and order are those of `Completion`."""


def _readable(text: str) -> str:
    """A server may send lone surrogates, which UTF-8 cannot hold."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _without_thoughts(answer: Completion, request: CompletionRequest) -> Completion | None:
    """A stored answer as it is read today: earlier versions kept thoughts in its text. None if they ended at a stop string,
    so that the answer is still to be asked for."""
    if answer.raw is not None:
        return answer
    text, finish_reason, raw = read_answer(answer.text, answer.finish_reason)
    if finish_reason == ONLY_THOUGHTS and request.stop:
        return None
    return answer if raw is None else dataclasses.replace(answer, text=text, finish_reason=finish_reason, raw=raw)


def _key(identity: str, request: CompletionRequest) -> str:
    return digest_of_json({"model": identity, **dataclasses.asdict(request)})


@dataclasses.dataclass
class Asked:
    """What a run asked for, and what it cost."""

    requests: int = 0
    """Answered in this run; those found in the cache are not counted."""
    found: int = 0
    """Found in the cache."""
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    last_failure: LanguageModelError | None = None
    adapted: str | None = None
    """Settings that the last answer was asked with in place of those given, since the model refuses these."""

    def add(self, answer: Completion) -> None:
        self.requests += 1
        self.prompt_tokens += answer.prompt_tokens
        self.completion_tokens += answer.completion_tokens
        self.adapted = answer.adapted or self.adapted


def ask_missing(
    model: LanguageModel,
    cache: AnswerCache,
    requests: Iterable[CompletionRequest],
    bar: ProgressBar,
    asked: Asked,
    *,
    identity: str | None = None,
    on_result: Callable[[CompletionRequest, Completion | LanguageModelError], None] | None = None,
) -> None:
    """Ask for every answer that the cache lacks, with as much in flight as the model takes.

    Args:
        bar: moves on by one for each request, those in the cache included.
        asked: is added to.
        identity: what the cache keeps the answers under; None: the model's own.
        on_result: is called with each request that was asked, once its answer is in the cache, or with its failure.

    Raises:
        LanguageModelError: `MAX_FAILURES_IN_A_ROW` requests failed with no answer between them. Fewer failures are counted
            in `asked` and leave their answers missing.
    """
    drawn: dict[int, CompletionRequest] = {}
    identity = identity or model.identity

    def missing() -> Iterator[CompletionRequest]:
        for request in requests:
            if cache.get(identity, request) is not None:
                asked.found += 1
                bar.advance()
                continue
            drawn[len(drawn) + finished] = request
            yield request

    finished = in_a_row = 0
    started = time.monotonic()
    try:
        for item in model.stream(missing()):
            request = drawn.pop(item.index)
            finished += 1
            if isinstance(item.result, LanguageModelError):
                asked.failed += 1
                asked.last_failure = item.result
                if on_result is not None:
                    on_result(request, item.result)
                # Once anything was answered, a refused request says nothing about the next one; a wrong key or a server
                # that is down always does.
                in_a_row += not (item.result.about_request and (asked.found or asked.requests))
                if in_a_row >= MAX_FAILURES_IN_A_ROW:
                    raise LanguageModelError(
                        f"asking {model.name!r}: {in_a_row} requests in a row failed; the {len(cache)} answers before them "
                        f"are safe in {str(cache.path)!r}. The last one: {item.result}",
                        retryable=item.result.retryable,
                        hint="Then run the same command again; it resumes.",
                    ) from item.result
            else:
                in_a_row = 0
                cache.put(identity, request, item.result)
                asked.add(item.result)
                if on_result is not None:
                    on_result(request, item.result)
            rate = asked.completion_tokens / max(time.monotonic() - started + asked.seconds, 1e-9)
            bar.advance(1, f"{rate:.0f} tokens/s" + (f", {asked.failed} failed" if asked.failed else ""))
    finally:
        asked.seconds += time.monotonic() - started


def ask_all(
    model: LanguageModel,
    cache: AnswerCache,
    requests: Iterable[CompletionRequest],
    title: str,
    total: int,
    recorder: Recorder,
    asked: Asked,
    *,
    skip_failed: bool,
) -> None:
    """One round of requests with a progress bar; see `ask_missing`.

    Args:
        title: what is asked for, on the bar and in the error.
        total: how many requests there are.
        skip_failed: leave the answers of failed requests missing instead of raising when the others are there.

    Raises:
        LanguageModelError: requests failed.
    """
    failed_before = asked.failed
    with recorder.progress(title, total) as bar:
        ask_missing(model, cache, requests, bar, asked)
    failed = asked.failed - failed_before
    if failed and not skip_failed:
        raise LanguageModelError(
            f"asking for {title}: {failed} of {total} requests failed; all other answers are safe in {str(cache.path)!r}. "
            f"The last failure: {asked.last_failure}",
            retryable=True,
            hint="Run the same command again to ask for those alone, or set skip_failed_requests=true to leave them out.",
        )
