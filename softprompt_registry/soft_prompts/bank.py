"""A bank: the soft prompts of many tasks of one base model in one artifact. Format: docs/formats.md."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from softprompt_registry.base_models.reference import BaseModelRef, require_same_base
from softprompt_registry.errors import ArtifactError
from softprompt_registry.fingerprints import digest_of_json
from softprompt_registry.soft_prompts.bank_files import (
    INDEX_FILE,
    INDEX_SCHEMA,
    TABLES,
    Entry,
    OneFileMembers,
    ShardedMembers,
    Shards,
)
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt, SoftPromptRecord
from softprompt_registry.storage import (
    check_format_version,
    complete_record,
    folder_written_whole,
    read_json,
    transaction,
    write_json,
)

FORMAT_VERSIONS = (1, 2, 3)
HEADER_FILE = "bank.json"
ROWS_PER_SHARD = 256
"""84 MB at K = 20 and D = 4096."""


class SoftPromptBank:
    """A bank on disk. A member is looked up in the index, and only its own numbers are read.

    Raises:
        ArtifactError: the folder is not a bank, is damaged, or a member is unknown.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.header = read_json(folder / HEADER_FILE, "a bank of soft prompts")
        self._what = f"bank {str(folder)!r}"
        self._members: OneFileMembers | ShardedMembers
        if self.header.get("format_version") == 1:
            self._members = OneFileMembers(folder, self._what)
        else:
            check_format_version(self.header, FORMAT_VERSIONS, self._what)
        with complete_record(self._what):
            self.base_model = BaseModelRef.from_json(self.header["base_model"])
            self.digest = str(self.header["digest"])
            """Digest over the members' names and numbers."""
            self._num_members = int(self.header["num_soft_prompts"])
            if self.header["format_version"] != 1:
                self._members = ShardedMembers(folder, self._what, int(self.header["rows_per_shard"]))

    @classmethod
    def save(cls, soft_prompts: Iterable[SoftPrompt], folder: Path, *, made_from: str | None = None) -> SoftPromptBank:
        """Write a bank whole or not at all. All members share base model and K.

        `made_from` is a digest of what the members were tuned from, by which a second start finds its own result.
        """
        with folder_written_whole(folder) as partial, BankWriter(partial) as writer:
            for position, soft_prompt in enumerate(soft_prompts):
                writer.add(position, soft_prompt)
            writer.finish(made_from)
        return cls(folder)

    @property
    def dod_digest(self) -> str | None:
        digest = self.header.get("dod_digest")
        return None if digest is None else str(digest)

    @property
    def files(self) -> list[str]:
        """Names of the files in its folder."""
        return [HEADER_FILE, *self._members.files()]

    def tasks(self) -> list[str]:
        """Names of the members, in order."""
        return self._members.tasks()

    def failures(self) -> dict[str, str]:
        """Tasks that could not be tuned, with the reason."""
        return self._members.failures()

    def records(self) -> Iterator[dict[str, Any]]:
        """The members' records in order: the keys of soft_prompt.json."""
        return (self._record(entry) for entry in self._members.entries())

    def record(self, task: str) -> dict[str, Any]:
        """The record of one member."""
        return self._record(self._entry(task))

    def __len__(self) -> int:
        return self._num_members

    def __iter__(self) -> Iterator[SoftPrompt]:
        return (self._soft_prompt(entry) for entry in self._members.entries())

    def member(self, task: str) -> SoftPrompt:
        """One soft prompt; of the others nothing is read."""
        return self._soft_prompt(self._entry(task))

    def _entry(self, task: str) -> Entry:
        found = self._members.entry(task)
        if found is None:
            known = self.tasks()
            shown = f"{len(known)} ({', '.join(known[:8])}{', …' if len(known) > 8 else ''})"
            reason = self.failures().get(task)
            raise ArtifactError(
                f"reading {task!r} of bank {self.folder.name!r}: "
                + (
                    f"it has no such member among its {shown}. Correct the part after '#'."
                    if reason is None
                    else f"that task could not be tuned: {reason}. Tune it with other settings, or take one of the {shown}."
                )
            )
        return found

    def _record(self, entry: Entry) -> dict[str, Any]:
        return {**entry.record, "base_model": self.header["base_model"]}

    def _soft_prompt(self, entry: Entry) -> SoftPrompt:
        with complete_record(self._what):
            record = SoftPromptRecord.from_json(self._record(entry))
        return SoftPrompt(*self._members.tensors(entry), record)


class BankWriter:
    """A bank that grows in a folder, member by member. Use as a context manager, by one process at a time.

    A member is on the disk when `add` returns; a killed writer loses at most the one it was adding, and a new writer on the
    same folder goes on. `finish`, called last, makes the folder a bank; until then, also while a finished one grows on, it is
    none.

    Raises:
        ArtifactError: the disk does not take what is written, or the folder holds something else.
    """

    def __init__(self, folder: Path, *, rows_per_shard: int = ROWS_PER_SHARD) -> None:
        self.folder = folder
        self._rows_per_shard = rows_per_shard
        with self._errors_named(), contextlib.ExitStack() as undo:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / HEADER_FILE).unlink(missing_ok=True)
            self._connection = sqlite3.connect(folder / INDEX_FILE, isolation_level=None)
            undo.callback(self._connection.close)
            # One process alone needs no memory shared with others, which file systems over a network cannot give.
            self._connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")
            if not self._one("SELECT count(*) FROM sqlite_master"):
                self._connection.executescript(f"BEGIN; {INDEX_SCHEMA} COMMIT;")
            shared = self._all("SELECT value FROM shared")
            self._shared: dict[str, Any] | None = json.loads(shared[0][0]) if shared else None
            undo.pop_all()

    def __enter__(self) -> BankWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._connection.close()

    def done(self) -> set[int]:
        """Positions that need no more work: their soft prompt is stored, or their failure."""
        rows = self._all("SELECT position FROM members UNION SELECT position FROM failures")
        return {position for (position,) in rows}

    def add(self, position: int, soft_prompt: SoftPrompt) -> None:
        """Store the member that stands at `position` of the finished bank; they may come in any order.

        Raises:
            ArtifactError: its task is stored already, or it does not share K with the others, or the disk is full.
            BaseModelMismatch: it does not share the base model.
        """
        task = soft_prompt.record.task
        shared = self._shared or self._shared_from(soft_prompt)
        _require_shared(shared, soft_prompt)
        if self._one("SELECT count(*) FROM members WHERE task = ?", task):
            raise ArtifactError(f"writing a bank: the task {task!r} occurs twice; a bank has one member per task.")
        assert not self._one("SELECT count(*) FROM members WHERE position = ?", position), f"{position} is taken"
        record = soft_prompt.record.to_json()
        metrics = json.dumps(record.pop("metrics"), ensure_ascii=False)
        record.pop("base_model")  # stands once, in the header
        text = json.dumps(record, ensure_ascii=False)
        with self._errors_named(), transaction(self._connection):
            if self._shared is None:
                self._connection.execute("INSERT INTO shared VALUES (?)", (json.dumps(shared, ensure_ascii=False),))
            row = self._num_rows("members")
            self._shards("embeddings", shared).write(row, soft_prompt.embeddings)
            values = (position, task, soft_prompt.id, row, self._initial_row(soft_prompt, shared), metrics, text)
            self._connection.execute("INSERT INTO members VALUES (?, ?, ?, ?, ?, ?, ?)", values)
        self._shared = shared

    def fail(self, position: int, task: str, reason: str) -> None:
        """Note that the task at `position` cannot be tuned."""
        with self._errors_named():
            self._connection.execute("INSERT OR REPLACE INTO failures VALUES (?, ?, ?)", (position, task, reason))

    def failures(self) -> dict[str, str]:
        """Tasks that could not be tuned, with the reason."""
        return dict(self._all("SELECT task, reason FROM failures ORDER BY position"))

    def finish(self, made_from: str | None) -> None:
        """Write what makes the folder a bank.

        Raises:
            ArtifactError: there is no member, one that was stored is gone from the disk, or the disk is full.
        """
        if self._shared is None:
            reasons = [f"{task!r}: {reason}" for task, reason in self.failures().items()]
            raise ArtifactError(
                f"writing a bank: there are no soft prompts to write ({'; '.join(reasons[:3]) or 'none were given'}); at "
                "least one is needed."
            )
        with self._errors_named():
            for name, table in TABLES.items():
                self._shards(name, self._shared).finish(
                    self._num_rows(table), self._shared["base_model"]["fingerprint"]
                )
            ids = self._all("SELECT task, id FROM members ORDER BY position")
            num_failed = self._one("SELECT count(*) FROM failures")
            self._connection.execute("PRAGMA journal_mode = DELETE")  # one plain file
            write_json(
                self.folder / HEADER_FILE,
                {
                    "format_version": self._format_version(),
                    **{key: value for key, value in self._shared.items() if key != "first"},
                    "num_soft_prompts": len(ids),
                    "num_failed": num_failed,
                    "made_from": made_from,
                    "digest": digest_of_json(ids),
                },
            )

    def _format_version(self) -> int:
        """3 where a reader of version 2 would put other tokens behind a member (`SoftPromptRecord.format_version`)."""
        base_model = self._shared["base_model"] if self._shared else {}
        records = (json.loads(text) for (text,) in self._all("SELECT record FROM members"))
        versions = {SoftPromptRecord.from_json({**r, "base_model": base_model}).format_version for r in records}
        return 2 if versions == {1} else 3

    def _initial_row(self, soft_prompt: SoftPrompt, shared: dict[str, Any]) -> int | None:
        """Where the start of its tuning is stored; prompts that started from the same numbers share them."""
        initial = soft_prompt.initial_embeddings
        if initial is None:
            return None
        digest = SoftPrompt(initial, None, soft_prompt.record).id
        for (known,) in self._all("SELECT row FROM initial_rows WHERE digest = ?", digest):
            return int(known)
        row = self._num_rows("initial_rows")
        self._shards("initial_embeddings", shared).write(row, initial)
        self._connection.execute("INSERT INTO initial_rows VALUES (?, ?)", (digest, row))
        return row

    def _shared_from(self, first: SoftPrompt) -> dict[str, Any]:
        """What the first member has, and the others must have too."""
        return {
            "first": first.record.task,
            "base_model": first.record.base_model.to_json(),
            "dod_name": first.record.dod_name,
            "dod_digest": first.record.dod_digest,
            "K": first.num_virtual_tokens,
            "D": int(first.embeddings.shape[1]),
            "rows_per_shard": self._rows_per_shard,
        }

    def _shards(self, name: str, shared: dict[str, Any]) -> Shards:
        # The size of a shard is that of the first ones, whatever this writer was told.
        return Shards(self.folder, name, (shared["K"], shared["D"]), shared["rows_per_shard"])

    def _num_rows(self, table: str) -> int:
        return int(self._one(f"SELECT coalesce(max(row), -1) + 1 FROM {table}"))

    def _one(self, query: str, *values: object) -> Any:
        return self._all(query, *values)[0][0]

    def _all(self, query: str, *values: object) -> list[Any]:
        with self._errors_named():
            return self._connection.execute(query, values).fetchall()

    @contextlib.contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.DatabaseError) as error:
            failed = isinstance(error, OSError | sqlite3.OperationalError)
            raise ArtifactError(
                f"writing a bank to {str(self.folder)!r}: its files cannot be written ({error}). "
                + (
                    "Make room on the disk, see that the folder can be written, and start again."
                    if failed
                    else "Remove that folder to start anew."
                )
            ) from error


def _require_shared(shared: dict[str, Any], soft_prompt: SoftPrompt) -> None:
    """Refuse a member that does not belong with the first one."""
    record = soft_prompt.record
    require_same_base(
        "writing a bank",
        f"soft prompt {shared['first']!r}",
        BaseModelRef.from_json(shared["base_model"]),
        f"soft prompt {record.task!r}",
        record.base_model,
    )
    if soft_prompt.num_virtual_tokens != shared["K"]:
        raise ArtifactError(
            f"writing a bank: soft prompt {record.task!r} has K={soft_prompt.num_virtual_tokens}, {shared['first']!r} has "
            f"K={shared['K']}; one bank has one K. Write two banks."
        )
