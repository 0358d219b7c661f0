"""Recognises the layout of Super-NaturalInstructions, and reads a Hub copy: the rows of a table, in any order."""

from __future__ import annotations

import json
import re
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from softprompt_registry.dod.file_rows import Fault, Rows, is_text, rows_of
from softprompt_registry.dod.general_sources import (
    CORPUS,
    BadLines,
    DamagedTask,
    Source,
    SourceTask,
    SplitLists,
    TaskContent,
    open_flat,
    open_repository,
    read_split_lists,
)
from softprompt_registry.dod.hub import datasets_library
from softprompt_registry.errors import DataError
from softprompt_registry.recording import Recorder

DEFAULT_HUB_DATASET = "Muennighoff/natural-instructions"
HUB_COLUMNS = ("task_name", "definition", "inputs", "targets")
MAX_DEFINITIONS = 100
"""A task with more distinct definitions than this has its columns mixed up."""


def open_source(source: Path | str, recorder: Recorder) -> AbstractContextManager[Source]:
    """The source with its layout recognised.

    Args:
        source: a folder, or `hub` or `hub:NAME[@revision]` for a dataset of the Hub.

    Raises:
        DataError: there is nothing in one of the three layouts, or a file that all tasks lie in is damaged.
    """
    if isinstance(source, str) and source.partition(":")[0] == "hub":
        dataset = source.partition(":")[2] or DEFAULT_HUB_DATASET
        copy = Path(dataset.partition("@")[0])
        name = copy.resolve().name if copy.is_dir() else dataset
        return _open_rows("hub", name, _hub_splits(dataset, name), None, recorder)
    folder = Path(source)
    doing = f"reading {CORPUS} from {str(folder)!r}"
    if not folder.is_dir():
        raise DataError(
            f"{doing}: there is no such folder; expected the benchmark's repository, a flat copy or a Hub copy. Correct "
            f"the path, or give 'hub:{DEFAULT_HUB_DATASET}' to read the copy on the Hub."
        )
    tasks_file, pairs_file = (_plain_or_gzip(folder, stem) for stem in ("tasks.jsonl", "pairs.jsonl"))
    if tasks_file and pairs_file:
        return nullcontext(open_flat(tasks_file, pairs_file))
    for place in (folder / "tasks", folder):
        files = sorted(path for path in place.glob("*.json") if not path.name.startswith("."))
        if files:
            return nullcontext(open_repository(folder, files))
    rows = sorted(path for path in folder.rglob("*") if path.name.endswith(_ROW_ENDINGS) and path.is_file())
    rows = [path for path in rows if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if rows and not tasks_file and not pairs_file:
        lists = read_split_lists(folder)
        return _open_rows("hub copy", folder.resolve().name, _local_files(folder, rows), lists, recorder)
    shown = sorted(path.name for path in folder.iterdir())
    raise DataError(
        f"{doing}: found {', '.join(map(repr, shown[:8])) or 'no files'}{', …' if len(shown) > 8 else ''}; expected "
        "tasks/*.json of the benchmark's repository, both tasks.jsonl and pairs.jsonl (each also with .gz), or JSON Lines "
        f"or Parquet files with the columns {list(HUB_COLUMNS)}. Correct the path."
    )


def _plain_or_gzip(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


_ROW_ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")


def _side_in_path(path: Path) -> str | None:
    """`train/task1.jsonl`, `data/train-00000-of-00003.parquet` and `train.jsonl` are all on the train side."""
    words = [*path.parts[:-1], re.split(r"[^a-z]", path.name)[0]]
    return next((word for word in words if word in ("train", "test")), None)


@dataclass(frozen=True)
class _RowFile:
    """A file of a Hub copy, or a split of a dataset on the Hub."""

    name: str
    side: str | None
    rows: Rows


def _local_files(folder: Path, files: Sequence[Path]) -> list[_RowFile]:
    places = [path.relative_to(folder) for path in files]
    return [_RowFile(place.as_posix(), _side_in_path(place), rows_of(folder / place, HUB_COLUMNS)) for place in places]


def _hub_splits(dataset: str, name: str) -> list[_RowFile]:
    """The splits of a dataset on the Hub, or of a local copy of one given by its folder, read through `datasets`."""
    doing = f"reading {CORPUS} from the Hub dataset {dataset!r}"

    def rows(split: Any) -> Rows:
        with datasets_library(doing):
            yield from enumerate(split, start=1)

    place, _, revision = dataset.partition("@")
    with datasets_library(doing) as datasets:
        splits = datasets.load_dataset(place, revision=revision or None, streaming=True)
    return [
        _RowFile(f"{name}, {split}", split if split in ("train", "test") else None, rows(data))
        for split, data in splits.items()
    ]


@dataclass
class _Found:
    """What is known of a task without its instances."""

    number: int
    side: str | None
    files: set[str] = field(default_factory=set)
    definitions: Counter[str] = field(default_factory=Counter)

    def add(self, file: _RowFile, definition: object) -> None:
        self.files.add(file.name)
        self.side = self.side or file.side
        if file.side is not None and file.side != self.side:
            self.side = "train and test"
        for text in definition if isinstance(definition, list) else [definition]:
            if isinstance(text, str) and is_text(text) and len(self.definitions) <= MAX_DEFINITIONS:
                self.definitions[text.strip()] += 1


@contextmanager
def _open_rows(
    layout: str, name: str, files: Sequence[_RowFile], lists: SplitLists | None, recorder: Recorder
) -> Iterator[Source]:
    """Groups rows that come in any order by task, through a temporary database that needs disk and no memory.

    SQLite makes the file for an empty name in $SQLITE_TMPDIR, $TMPDIR or /var/tmp and removes it however this ends.
    """
    skipped: dict[str, str] = {}
    broken_files: set[str] = set()
    bad_lines = BadLines(skipped)
    found: dict[str, _Found] = {}
    with closing(sqlite3.connect("", isolation_level=None)) as connection:
        try:
            connection.execute("CREATE TABLE instances (task INTEGER NOT NULL, instance TEXT NOT NULL) STRICT")
            connection.execute("BEGIN")
            with recorder.progress(f"rows of {name}", len(files)) as bar:
                for file in files:
                    for number, row in file.rows:
                        if isinstance(row, Fault):
                            if row.fatal:
                                skipped[file.name] = f"found {row.found}; expected {row.expected}"
                                broken_files.add(file.name)
                            else:
                                bad_lines.add(file.name, number, row.found)
                            continue
                        task_name = row.get("task_name")
                        if not isinstance(task_name, str) or not is_text(task_name):
                            bad_lines.add(file.name, number, f"no 'task_name' among {sorted(row)}")
                            continue
                        task = found.setdefault(task_name, _Found(len(found), file.side))
                        task.add(file, row.get("definition"))
                        # As ASCII, because half a surrogate pair is no text for SQLite; what is no JSON is no text.
                        instance = json.dumps([row.get("inputs"), row.get("targets")], default=lambda _: None)
                        connection.execute("INSERT INTO instances VALUES (?, ?)", (task.number, instance))
                    bar.advance(note=f"{len(found)} tasks")
            connection.execute("CREATE INDEX by_task ON instances (task)")
            connection.execute("COMMIT")
        except sqlite3.OperationalError as error:
            raise DataError(
                f"reading {CORPUS} from {name!r}: sorting the rows by task failed ({error}); expected room for "
                "another copy of them on the disk. Make room, or point SQLITE_TMPDIR at another disk."
            ) from error
        tasks = (
            SourceTask(
                key, ", ".join(sorted(task.files)[:3]), task.side, partial(_read_rows, connection, task, broken_files)
            )
            for key, task in sorted(found.items())
        )
        yield Source(layout, name, tasks, len(found), lists, skipped)


def _read_rows(connection: sqlite3.Connection, task: _Found, broken_files: set[str]) -> TaskContent:
    broken = sorted(task.files & broken_files)
    if broken:
        raise DamagedTask(f"{broken[0]!r} cannot be read to its end")
    if not task.definitions:
        raise DamagedTask("there is no 'definition'")
    if len(task.definitions) > MAX_DEFINITIONS:
        raise DamagedTask(f"it has more than {MAX_DEFINITIONS} definitions")
    rows = connection.execute("SELECT instance FROM instances WHERE task = ?", (task.number,))
    # The most frequent one first, so that the order of the rows does not matter.
    ranked = sorted(task.definitions.items(), key=lambda item: (-item[1], item[0]))
    return TaskContent(
        instances=((text, outputs) for (instance,) in rows for text, outputs in [json.loads(instance)]),
        definitions=tuple(text for text, _ in ranked),
    )
