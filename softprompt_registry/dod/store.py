"""A dataset of datasets in one SQLite file.

Three tables hold the content: `datasets` (a row per task), `labels` (a row per label, in order) and `examples` (a row per
pair). `metadata` says how the DoD was made and what an audit found; it does not count for the digest. A task is added in
one transaction, so a killed writer leaves whole tasks only. The format is specified in docs/formats.md.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import lru_cache
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, cast, overload

from softprompt_registry.dod.task import Pair, Task, TaskKind, TaskSplit
from softprompt_registry.errors import DataError
from softprompt_registry.fingerprints import digest_of_dod
from softprompt_registry.storage import locked_file, transaction

FORMAT_VERSION = 1
APPLICATION_ID = (
    0x44_6F_44_31  # "DoD1" in the SQLite header, so that `file` and we can tell a DoD from another database
)

# `split IN (…)` in a check would be built anew for each row, which doubles the time to write one.
SCHEMA = """
CREATE TABLE datasets (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    kind TEXT NOT NULL CHECK (kind IN ('classification', 'generation')),
    split TEXT NOT NULL CHECK (split IN ('train', 'test')),
    hard_prompts TEXT NOT NULL,
    source TEXT NOT NULL,
    num_pairs INTEGER NOT NULL,
    digest TEXT NOT NULL
) STRICT;
CREATE TABLE labels (
    dataset_id INTEGER NOT NULL REFERENCES datasets (id),
    position INTEGER NOT NULL,
    label TEXT NOT NULL,
    PRIMARY KEY (dataset_id, position)
) STRICT, WITHOUT ROWID;
CREATE TABLE examples (
    dataset_id INTEGER NOT NULL REFERENCES datasets (id),
    position INTEGER NOT NULL,
    split TEXT NOT NULL CHECK (split = 'train' OR split = 'validation' OR split = 'test'),
    input TEXT NOT NULL,
    output TEXT NOT NULL,
    num_tokens INTEGER,
    PRIMARY KEY (dataset_id, position)
) STRICT, WITHOUT ROWID;
CREATE TABLE metadata (
    key TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT, WITHOUT ROWID;
"""
ROWS_PER_INSERT = 500
"""Of 6 values each; SQLite takes 32,766 values in a statement."""
JOURNALS = ("-wal", "-shm", "-journal")
"""What SQLite leaves beside a file whose writer was killed."""


@lru_cache(maxsize=64)
def _insert_pairs(first: int, count: int) -> str:
    """One statement for `count` pairs from position `first` on: a call for each row would cost more than the row itself."""
    rows = ", ".join(f"(?1, {position}, ?, ?, ?, ?)" for position in range(first, first + count))
    return f"INSERT INTO examples (dataset_id, position, input, output, split, num_tokens) VALUES {rows}"


class DodStore:
    """An open DoD. Use as a context manager; `create` writes a new file, `open` reads one.

    Raises:
        DataError: the file is missing, is not a DoD, has another format version, or a task name is taken or unknown.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, *, writable: bool = False) -> None:
        self.path = path
        self._connection = connection
        self._writable = writable
        # Files of 0.1.0's first builds have neither token counts nor metadata; both were added without a new version.
        columns = {row[1] for row in connection.execute("PRAGMA table_info(examples)")}
        self._num_tokens = "num_tokens" if "num_tokens" in columns else "NULL"
        self._has_metadata = bool(connection.execute("PRAGMA table_info(metadata)").fetchone())

    @classmethod
    def create(cls, path: Path, *, throwaway: bool = False) -> DodStore:
        """A new, empty DoD at `path`, which must not exist yet.

        Args:
            throwaway: the file is of no use if its writer dies, so it needs no journal on the disk, which is faster.
        """
        if path.exists():
            raise DataError(f"creating DoD {str(path)!r}: the file exists already. Choose another name or remove it.")
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path, isolation_level=None)
        try:
            connection.execute(f"PRAGMA journal_mode = {'MEMORY' if throwaway else 'WAL'}")
            connection.execute(f"PRAGMA synchronous = {'OFF' if throwaway else 'NORMAL'}")
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {FORMAT_VERSION}")
            connection.executescript(f"BEGIN; {SCHEMA} COMMIT;")
            return cls(path, connection, writable=True)
        except BaseException:
            connection.close()
            raise

    @classmethod
    def open(cls, path: Path) -> DodStore:
        """An existing DoD, read only; also from a folder that cannot be written."""
        if not path.is_file():
            raise DataError(f"opening DoD {str(path)!r}: there is no such file. Build one with `softprompt build-dod`.")
        if path.with_name(f"{path.name}-journal").exists() and os.access(path, os.W_OK):
            # A writer of metadata was killed: SQLite takes its half of a change back, which a reader may not.
            with closing(sqlite3.connect(path)) as repairing:
                repairing.execute("SELECT count(*) FROM sqlite_master")
        # SQLite cannot make the shared-memory file of a WAL database in a read-only folder; there the file cannot
        # change either, which is what `immutable` promises.
        mode = "mode=ro" if os.access(path.resolve().parent, os.W_OK) else "immutable=1"
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?{mode}", uri=True, isolation_level=None)
        try:
            application_id = connection.execute("PRAGMA application_id").fetchone()[0]
            version = connection.execute("PRAGMA user_version").fetchone()[0]
        except sqlite3.DatabaseError as error:
            connection.close()
            raise DataError(
                f"opening DoD {str(path)!r}: SQLite cannot read it ({error}); expected a file written by "
                "`softprompt build-dod`. Build it again."
            ) from error
        if application_id != APPLICATION_ID or version != FORMAT_VERSION:
            connection.close()
            raise DataError(
                f"opening DoD {str(path)!r}: found application id {application_id:#x} and format version {version}; "
                f"expected {APPLICATION_ID:#x} and {FORMAT_VERSION}. Build it with this version of softprompt-registry."
            )
        return cls(path, connection)

    def close(self) -> None:
        """Close the file; after writing, leave it as one plain file.

        A reader of a WAL database would make `-wal` and `-shm` files beside it and, being read-only, never remove them.
        """
        with suppress(sqlite3.OperationalError):  # another connection is reading; it stays a WAL database then
            self._join_journal()
        self._connection.close()

    def _join_journal(self) -> None:
        """After writing, move what is still in the journal beside the file into it."""
        if self._writable:
            self._writable = False  # closing twice is fine
            self._connection.execute("PRAGMA journal_mode = DELETE")

    def __enter__(self) -> DodStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def add_task(self, task: Task) -> None:
        """Store a task whole or not at all."""
        with transaction(self._connection):
            if self._connection.execute("SELECT 1 FROM datasets WHERE name = ?", (task.name,)).fetchone():
                raise DataError(
                    f"adding task {task.name!r} to DoD {self.name!r}: a task of that name is there already; names are "
                    "unique in a DoD. Rename one of them."
                )
            dataset_id = self._connection.execute("SELECT coalesce(max(id), 0) + 1 FROM datasets").fetchone()[0]
            self._connection.execute(
                "INSERT INTO datasets VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    dataset_id,
                    task.name,
                    task.kind,
                    task.split,
                    json.dumps(task.hard_prompts, ensure_ascii=False),
                    task.source,
                    len(task.pairs),
                    task.digest,
                ),
            )
            self._connection.executemany(
                "INSERT INTO labels VALUES (?, ?, ?)",
                ((dataset_id, position, label) for position, label in enumerate(task.labels)),
            )
            self._add_pairs(dataset_id, task.pairs)

    def _add_pairs(self, dataset_id: int, pairs: Sequence[Pair]) -> None:
        for first in range(0, len(pairs), ROWS_PER_INSERT):
            rows = pairs[first : first + ROWS_PER_INSERT]
            self._connection.execute(_insert_pairs(first, len(rows)), [dataset_id, *chain.from_iterable(rows)])

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return self.path.stem

    @property
    def digest(self) -> str:
        """Order-independent digest of the whole DoD, from the tasks' stored digests."""
        rows = self._connection.execute("SELECT name, split, digest FROM datasets").fetchall()
        return digest_of_dod({row[0]: row[2] for row in rows}, {row[0]: row[1] for row in rows})

    def task_names(self, split: TaskSplit | None = None) -> list[str]:
        """Names of the tasks in the order they were added."""
        query = "SELECT name FROM datasets WHERE ? IS NULL OR split = ? ORDER BY id"
        return [row[0] for row in self._connection.execute(query, (split, split))]

    def task(self, name: str) -> Task:
        """One task with all its pairs."""
        row = self._connection.execute(
            "SELECT id, name, kind, split, hard_prompts, source FROM datasets WHERE name = ?", (name,)
        ).fetchone()
        if row is None:
            known = self.task_names()
            shown = ", ".join(known[:8]) + (", …" if len(known) > 8 else "")
            raise DataError(
                f"reading task {name!r} of DoD {self.name!r}: there is no task of that name among its {len(known)} "
                f"({shown}). Correct the name."
            )
        labels = self._connection.execute("SELECT label FROM labels WHERE dataset_id = ? ORDER BY position", (row[0],))
        examples = self._connection.execute(
            f"SELECT input, output, split, {self._num_tokens} FROM examples WHERE dataset_id = ? ORDER BY position",
            (row[0],),
        )
        return Task(
            name=row[1],
            kind=cast(TaskKind, row[2]),
            split=cast(TaskSplit, row[3]),
            hard_prompts=tuple(json.loads(row[4])),
            source=row[5],
            labels=tuple(label for (label,) in labels),
            pairs=tuple(Pair(*example) for example in examples),
        )

    def tasks(self, split: TaskSplit | None = None) -> Iterator[Task]:
        """The tasks one after the other; only one is in memory at a time."""
        for name in self.task_names(split):
            yield self.task(name)

    def stored_tasks(self, names: Sequence[str] | None = None) -> Sequence[Task]:
        """The named tasks, or all, as a sequence that reads a task from the file each time it is asked for."""
        return _StoredTasks(self, self.task_names() if names is None else list(names))

    def metadata(self) -> dict[str, Any]:
        """How the DoD was made (`build`), what an audit found (`audit`); empty where nothing was written down."""
        if not self._has_metadata:
            return {}
        return {key: json.loads(value) for key, value in self._connection.execute("SELECT key, value FROM metadata")}

    def set_metadata(self, key: str, value: Any) -> None:
        """Write one JSON value down under `key`, in place of an earlier one."""
        with transaction(self._connection):
            self._connection.execute(
                "INSERT INTO metadata VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
                (key, json.dumps(value, ensure_ascii=False, sort_keys=True)),
            )

    def manifest(self) -> dict[str, Any]:
        """What a DoD is made of, without its examples: the record that MLflow keeps."""
        rows = self._connection.execute(
            "SELECT name, kind, split, num_pairs, digest, source FROM datasets ORDER BY name"
        ).fetchall()
        columns = ("name", "kind", "split", "num_pairs", "digest", "source")
        return {
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "digest": self.digest,
            "num_tasks": len(rows),
            "num_pairs": sum(row[3] for row in rows),
            "metadata": self.metadata(),
            "tasks": [dict(zip(columns, row, strict=True)) for row in rows],
        }


class _StoredTasks(Sequence[Task]):
    def __init__(self, store: DodStore, names: list[str]) -> None:
        self._store, self._names = store, names

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> Task: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Task]: ...

    def __getitem__(self, index: int | slice) -> Task | Sequence[Task]:
        if isinstance(index, slice):
            return _StoredTasks(self._store, self._names[index])
        return self._store.task(self._names[index])


@contextmanager
def dod_written_whole(out: Path, doing: str, *, overwrite: bool = False) -> Iterator[DodStore]:
    """A new DoD that grows in `<out>.building` and takes its name in one step when the block ends without an error.

    An existing `out` stays as it is until then; after an error nothing is left.

    Args:
        doing: what is being done, for the error messages: "building a DoD from …".
        overwrite: replace `out` if it exists.

    Raises:
        DataError: `out` exists and may not be replaced, or the disk does not take the file.
        BusyError: another process is writing the same DoD.
    """
    require_free(out, doing, overwrite=overwrite)
    building = out.with_name(out.name + ".building")
    with locked_file(out):
        _remove_database(building)
        try:
            with DodStore.create(building, throwaway=True) as store:
                yield store
                store._join_journal()  # and fail if it does not fit on the disk, which closing alone would not
            with building.open("rb") as file:
                os.fsync(file.fileno())
            for journal in JOURNALS:
                out.with_name(out.name + journal).unlink(missing_ok=True)
            os.replace(building, out)
        except sqlite3.OperationalError as error:
            raise DataError(
                f"{doing}: writing {str(building)!r} failed ({error}); nothing was left there. Make room on the disk, or "
                "choose a folder that can be written."
            ) from error
        finally:
            _remove_database(building)


def require_free(out: Path, doing: str, *, overwrite: bool) -> None:
    """Refuse an output that exists, unless it is a file that may be replaced."""
    if out.is_dir() or (out.exists() and not overwrite):
        raise DataError(
            f"{doing}: {str(out)!r} exists already; expected a new name. Choose another one, or allow overwriting if it is "
            "an old DoD."
        )


def _remove_database(path: Path) -> None:
    """Remove a SQLite file and the journals that a killed writer leaves beside it."""
    for journal in JOURNALS:
        path.with_name(path.name + journal).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def note_in_dod(path: Path, key: str, value: Any) -> None:
    """Write a metadata entry into an existing DoD; its content, and so its digest, stays the same.

    Raises:
        DataError: the file is no DoD, was made before DoDs had metadata, or cannot be written.
    """
    with DodStore.open(path) as store:
        has_metadata = store._has_metadata
    if not has_metadata:
        raise DataError(
            f"noting {key!r} in DoD {str(path)!r}: it was built before DoDs had a metadata table. Build it again."
        )
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        with DodStore(path, connection, writable=True) as writable:
            writable.set_metadata(key, value)
    except sqlite3.OperationalError as error:
        raise DataError(
            f"noting {key!r} in DoD {str(path)!r}: SQLite cannot write it ({error}). Make the file writable."
        ) from error
