"""The files of a bank: rows of equal shape in safetensors shards that are filled one row after the other, and an index."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from softprompt_registry.errors import ArtifactError
from softprompt_registry.soft_prompts.soft_prompt import check_tensor_names

if TYPE_CHECKING:
    import torch

INDEX_FILE = "bank.sqlite"
HEADER_BYTES = 1024
"""Bytes of each shard's header: JSON padded with spaces, so that rows can be written before their number is known."""
BYTES_PER_NUMBER = 4
TABLES = {"embeddings": "members", "initial_embeddings": "initial_rows"}
"""Tensor name → the table whose `row` counts its rows."""

INDEX_SCHEMA = """
CREATE TABLE members (
    position INTEGER PRIMARY KEY,
    task TEXT NOT NULL UNIQUE,
    id TEXT NOT NULL,
    row INTEGER NOT NULL UNIQUE,
    initial_row INTEGER,
    metrics TEXT NOT NULL,
    record TEXT NOT NULL
) STRICT;
CREATE TABLE initial_rows (
    digest TEXT PRIMARY KEY,
    row INTEGER NOT NULL UNIQUE
) STRICT, WITHOUT ROWID;
CREATE TABLE shared (
    value TEXT NOT NULL
) STRICT;
CREATE TABLE failures (
    position INTEGER PRIMARY KEY,
    task TEXT NOT NULL UNIQUE,
    reason TEXT NOT NULL
) STRICT;
"""


@dataclass(frozen=True)
class Entry:
    """A member as the index knows it."""

    row: int
    """Row of its tuned numbers, counted over all shards."""
    initial_row: int | None
    """Row of the numbers that its tuning started from; members may share one."""
    record: dict[str, Any]
    """Keys of soft_prompt.json, without the base model."""


class Shards:
    """Rows (K, D) float32 under one tensor name, so many to a file: `embeddings-00000.safetensors` and on.

    A row counts once the index names it: what a killed writer left behind the last of those is written over. Headers are
    written by `finish`.
    """

    def __init__(self, folder: Path, name: str, shape: tuple[int, int], rows_per_shard: int) -> None:
        self._folder, self._name, self._shape = folder, name, shape
        self._rows_per_shard = rows_per_shard

    def write(self, number: int, row: torch.Tensor) -> None:
        """Put row `number` on the disk; rows come in order."""
        shard, place = divmod(number, self._rows_per_shard)
        content = row.detach().cpu().contiguous().numpy().astype("<f4", copy=False).tobytes()
        with self._opened(shard, place) as file:
            file.seek(self._end(place))
            file.write(content)

    def finish(self, num_rows: int, base_fingerprint: str) -> None:
        """Make every shard a whole safetensors file. May be repeated."""
        num_shards = -(-num_rows // self._rows_per_shard)
        for shard in range(num_shards):
            rows = min(self._rows_per_shard, num_rows - shard * self._rows_per_shard)
            with self._opened(shard, rows) as file:
                file.truncate(self._end(rows))
                file.seek(0)
                file.write(self._header(rows, base_fingerprint))
        # A writer that was killed may have begun one more.
        (self._folder / shard_name(self._name, num_shards)).unlink(missing_ok=True)

    @contextmanager
    def _opened(self, shard: int, rows: int) -> Iterator[IO[bytes]]:
        """A shard that must hold `rows` rows; what the block writes is on the disk when it ends."""
        path = self._folder / shard_name(self._name, shard)
        new = not path.exists()
        if rows and (new or path.stat().st_size < self._end(rows)):
            raise ArtifactError(
                f"writing a bank to {str(self._folder)!r}: {path.name} should hold {rows} rows and "
                f"{'is missing' if new else 'is shorter'}. Remove that folder to start anew."
            )
        with path.open("w+b" if new else "r+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if not rows:
            folder = os.open(self._folder, os.O_RDONLY)  # its entry for a new file
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _end(self, rows: int) -> int:
        """Where the file ends after so many rows."""
        return 8 + HEADER_BYTES + rows * self._shape[0] * self._shape[1] * BYTES_PER_NUMBER

    def _header(self, rows: int, base_fingerprint: str) -> bytes:
        header = {
            "__metadata__": {"format": "softprompt-bank", "base_fingerprint": base_fingerprint},
            self._name: {
                "dtype": "F32",
                "shape": [rows, *self._shape],
                "data_offsets": [0, self._end(rows) - self._end(0)],
            },
        }
        return HEADER_BYTES.to_bytes(8, "little") + json.dumps(header).encode().ljust(HEADER_BYTES)


def shard_name(name: str, shard: int) -> str:
    return f"{name}-{shard:05d}.safetensors"


def read_row(folder: Path, file: str, name: str, row: int, what: str) -> torch.Tensor:
    """One row (K, D) of a safetensors file; nothing else is read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / file, framework="pt") as stored:
            if name == "embeddings":
                check_tensor_names(set(stored.keys()), what)
            # A copy: what safetensors gives is a view that holds the whole file in the address space.
            found: torch.Tensor = stored.get_slice(name)[row].clone()
    except (OSError, IndexError, SafetensorError) as error:
        raise ArtifactError(f"reading {what}: {file} cannot be read ({error}). Make it again.") from error
    return found


class ShardedMembers:
    """Members of a finished bank: an index in SQLite, shards of rows."""

    def __init__(self, folder: Path, what: str, rows_per_shard: int) -> None:
        self._folder, self._what, self._rows_per_shard = folder, what, rows_per_shard
        self._last_initial: tuple[int, torch.Tensor] | None = None

    def files(self) -> list[str]:
        """Names of the files, the header apart."""
        names = [INDEX_FILE]
        for name, table in TABLES.items():
            ((last,),) = self._query(f"SELECT max(row) FROM {table}")
            num_shards = 0 if last is None else last // self._rows_per_shard + 1
            names += [shard_name(name, shard) for shard in range(num_shards)]
        return names

    def tasks(self) -> list[str]:
        return [str(task) for (task,) in self._query("SELECT task FROM members ORDER BY position")]

    def failures(self) -> dict[str, str]:
        return dict(self._query("SELECT task, reason FROM failures ORDER BY position"))

    def entry(self, task: str) -> Entry | None:
        found = self._query("SELECT row, initial_row, metrics, record FROM members WHERE task = ?", task)
        return self._entry(*found[0]) if found else None

    def entries(self) -> Iterator[Entry]:
        rows = self._query("SELECT row, initial_row, metrics, record FROM members ORDER BY position")
        return (self._entry(*row) for row in rows)

    def tensors(self, entry: Entry) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(K, D) tuned and, if stored, initial numbers of one member."""
        return self._row("embeddings", entry.row), self._initial(entry.initial_row)

    def _initial(self, number: int | None) -> torch.Tensor | None:
        """Members that share a start and are read one after the other share its tensor, too."""
        if number is None:
            return None
        last = self._last_initial
        if last is None or last[0] != number:
            self._last_initial = last = number, self._row("initial_embeddings", number)
        return last[1]

    def _row(self, name: str, number: int) -> torch.Tensor:
        shard, row = divmod(number, self._rows_per_shard)
        return read_row(self._folder, shard_name(name, shard), name, row, self._what)

    def _entry(self, row: int, initial_row: int | None, metrics: str, record: str) -> Entry:
        try:
            return Entry(row, initial_row, {**json.loads(record), "metrics": json.loads(metrics)})
        except (TypeError, ValueError) as error:
            raise ArtifactError(
                f"reading {self._what}: {INDEX_FILE} holds no JSON objects ({error}). Make it again."
            ) from error

    def _query(self, query: str, *values: object) -> list[Any]:
        # A finished bank never changes, which is what `immutable` promises; it may lie in a folder that cannot be written.
        # Without `mode=ro` a missing index would be made.
        uri = f"{(self._folder / INDEX_FILE).resolve().as_uri()}?mode=ro&immutable=1"
        try:
            with closing(sqlite3.connect(uri, uri=True)) as connection:
                return connection.execute(query, values).fetchall()
        except sqlite3.DatabaseError as error:
            raise ArtifactError(
                f"reading {self._what}: {INDEX_FILE} cannot be read ({error}). Make it again."
            ) from error


class OneFileMembers:
    """Members of a bank of format version 1: one tensor file, one JSON line each."""

    TENSORS_FILE = "bank.safetensors"
    RECORDS_FILE = "bank.jsonl"

    def __init__(self, folder: Path, what: str) -> None:
        self._folder, self._what = folder, what
        self._entries: dict[str, Entry] | None = None

    def files(self) -> list[str]:
        return [self.TENSORS_FILE, self.RECORDS_FILE]

    def tasks(self) -> list[str]:
        return list(self._read())

    def failures(self) -> dict[str, str]:
        return {}

    def entry(self, task: str) -> Entry | None:
        return self._read().get(task)

    def entries(self) -> Iterator[Entry]:
        return iter(self._read().values())

    def tensors(self, entry: Entry) -> tuple[torch.Tensor, torch.Tensor | None]:
        from safetensors import safe_open

        tuned = read_row(self._folder, self.TENSORS_FILE, "embeddings", entry.row, self._what)
        with safe_open(self._folder / self.TENSORS_FILE, framework="pt") as stored:
            if "initial_embeddings" not in stored.keys():  # noqa: SIM118
                return tuned, None
        return tuned, read_row(self._folder, self.TENSORS_FILE, "initial_embeddings", entry.row, self._what)

    def _read(self) -> dict[str, Entry]:
        if self._entries is None:
            try:
                # Not splitlines(): it also splits at U+2028 and U+0085, which JSON leaves inside a text as they are.
                text = (self._folder / self.RECORDS_FILE).read_text(encoding="utf-8")
                records = [json.loads(line) for line in text.removesuffix("\n").split("\n")]
                rows = [int(record.pop("row")) for record in records]
                self._entries = {
                    record["task"]: Entry(row, row, record) for row, record in zip(rows, records, strict=True)
                }
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise ArtifactError(
                    f"reading {self._what}: {self.RECORDS_FILE} cannot be read ({error}). Make it again."
                ) from error
        return self._entries
