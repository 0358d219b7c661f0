"""Recognises the layout of Super-NaturalInstructions, and reads a Hub copy: the rows of a table, in any order."""

from __future__ import annotations

import itertools
import json
import re
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from softprompt_registry.dod.file_rows import Fault, is_text, rows_of
from softprompt_registry.dod.general_sources import (
    CORPUS,
    AddInstance,
    BadLines,
    DamagedTask,
    Source,
    SourceTask,
    SplitLists,
    TaskFacts,
    open_flat,
    open_repository,
    read_split_lists,
)
from softprompt_registry.errors import DataError
from softprompt_registry.recording import Recorder

HUB_PREFIX = "hub"
DEFAULT_HUB_DATASET = "Muennighoff/natural-instructions"
HUB_COLUMNS = ("task_name", "definition", "inputs", "targets")
MAX_DEFINITIONS = 100
"""A task with more distinct definitions than this has its columns mixed up."""

Keep = Callable[[str, "str | None", "SplitLists | None"], bool]
"""Whether a task of that name and side is wanted, given the lists beside the tasks; others are not even stored."""


@contextmanager
def open_source(source: Path | str, recorder: Recorder, *, keep: Keep) -> Iterator[Source]:
    """The source with its layout recognised.

    Args:
        source: a folder, or `hub` or `hub:NAME[@revision]` for a dataset of the Hub.
        keep: asked before a row is stored on the way; tasks of all names are still found.

    Raises:
        DataError: there is nothing in one of the three layouts, or a file that all tasks lie in is damaged.
    """
    if isinstance(source, str) and source.partition(":")[0] == HUB_PREFIX:
        dataset = source.partition(":")[2] or DEFAULT_HUB_DATASET
        opened: AbstractContextManager[Source] = _open_rows(_Hub(dataset), recorder, keep)
    else:
        opened = _open_folder(Path(source), recorder, keep)
    with opened as result:
        yield result


def _open_folder(folder: Path, recorder: Recorder, keep: Keep) -> AbstractContextManager[Source]:
    doing = f"reading {CORPUS} from {str(folder)!r}"
    if not folder.is_dir():
        raise DataError(
            f"{doing}: there is no such folder; expected the benchmark's repository, a flat copy or a Hub copy. Correct "
            f"the path, or give 'hub:{DEFAULT_HUB_DATASET}' to read the copy on the Hub."
        )
    flat = {stem: _plain_or_gzip(folder, stem) for stem in ("tasks.jsonl", "pairs.jsonl")}
    tasks_file, pairs_file = flat.values()
    if tasks_file and pairs_file:
        return nullcontext(open_flat(tasks_file, pairs_file))
    for place in (folder / "tasks", folder):
        files = sorted(path for path in place.glob("*.json") if not path.name.startswith("."))
        if files:
            return nullcontext(open_repository(folder, files))
    rows = sorted(path for path in folder.rglob("*") if path.name.endswith(_ROW_ENDINGS) and path.is_file())
    rows = [path for path in rows if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if rows and not any(flat.values()):
        return _open_rows(_RowFiles(folder, rows), recorder, keep)
    shown = sorted(path.name for path in folder.iterdir())
    raise DataError(
        f"{doing}: found {', '.join(map(repr, shown[:8])) or 'no files'}{', …' if len(shown) > 8 else ''}; expected "
        "tasks/*.json of the benchmark's repository, both tasks.jsonl and pairs.jsonl (each also with .gz), or JSON Lines "
        f"or Parquet files with the columns {list(HUB_COLUMNS)}. Correct the path."
    )


def _plain_or_gzip(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


_ROW_ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")


@dataclass(frozen=True)
class _HubRow:
    file: str
    number: int
    side: str | None
    columns: Mapping[str, Any]


class _RowFiles:
    """A Hub copy that lies in a local folder, read without `datasets`."""

    layout = "hub copy"

    def __init__(self, folder: Path, files: Sequence[Path]) -> None:
        self._folder, self._files = folder, files
        self.name = folder.resolve().name
        self.title = f"rows of {len(files)} files"
        self.num_parts = len(files)
        self.broken_files: set[str] = set()

    def lists(self) -> SplitLists | None:
        return read_split_lists(self._folder)

    def rows(self, bad_lines: BadLines, skipped: dict[str, str]) -> Iterator[_HubRow | None]:
        """The rows, and None after each part."""
        for path in self._files:
            file = path.relative_to(self._folder).as_posix()
            side = _side_in_path(path.relative_to(self._folder))
            for line, row in rows_of(path, HUB_COLUMNS):
                if not isinstance(row, Fault):
                    yield _HubRow(file, line, side, row)
                elif row.fatal:
                    skipped[file] = f"found {row.found}; expected {row.expected}"
                    self.broken_files.add(file)
                else:
                    bad_lines.add(file, line, row.found)
            yield None


def _side_in_path(path: Path) -> str | None:
    """`train/task1.jsonl`, `data/train-00000-of-00003.parquet` and `train.jsonl` are all on the train side."""
    words = [*path.parts[:-1], re.split(r"[^a-z]", path.name)[0]]
    return next((word for word in words if word in ("train", "test")), None)


class _Hub:
    """A dataset on the Hub, or a local copy of one given by its folder, read through `datasets`."""

    layout = "hub"

    def __init__(self, dataset: str) -> None:
        place, _, revision = dataset.partition("@")
        self._place, self._revision = place, revision or None
        self.name = Path(place).resolve().name if Path(place).is_dir() else dataset
        self.broken_files: set[str] = set()
        self._doing = f"reading {CORPUS} from the Hub dataset {dataset!r}"
        try:
            import datasets
        except ImportError as error:
            raise DataError(
                f"{self._doing}: the package 'datasets' is not installed; expected it for sources on the Hub. Run "
                "`pip install 'softprompt-registry[hub]'`."
            ) from error
        with self._explained():
            self._splits: Mapping[str, Any] = datasets.load_dataset(place, revision=self._revision, streaming=True)
        self.title = f"rows of {self.name}"
        self.num_parts = len(self._splits)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # what can go wrong between here and the Hub comes from a dozen libraries
            message = str(error).strip().partition("\n")[0][:200]
            raise DataError(
                f"{self._doing}: `datasets` could not ({type(error).__name__}: {message}); "
                "expected a dataset that this machine can reach. Check its name and the network, or use a local copy."
            ) from error

    def lists(self) -> None:
        return None

    def rows(self, bad_lines: BadLines, skipped: dict[str, str]) -> Iterator[_HubRow | None]:
        for split, dataset in self._splits.items():
            side = split if split in ("train", "test") else None
            iterator = iter(dataset)
            for number in itertools.count(1):
                with self._explained():
                    row = next(iterator, None)
                if row is None:
                    break
                yield _HubRow(f"{self.name}, {split}", number, side, row)
            yield None


@contextmanager
def _open_rows(copy: _RowFiles | _Hub, recorder: Recorder, keep: Keep) -> Iterator[Source]:
    """Groups rows that come in any order by task, through a temporary database that needs disk and no memory.

    SQLite makes the file for an empty name in $SQLITE_TMPDIR, $TMPDIR or /var/tmp and removes it however this ends.
    """
    connection = sqlite3.connect("", isolation_level=None)
    try:
        spool = _Spool(connection)
        skipped: dict[str, str] = {}
        try:
            _fill(spool, copy, recorder, skipped, keep)
        except sqlite3.OperationalError as error:
            raise DataError(
                f"reading {CORPUS} from {copy.name!r}: sorting the rows by task failed ({error}); expected room for "
                "another copy of them on the disk. Make room, or point SQLITE_TMPDIR at another disk."
            ) from error
        tasks = spool.tasks(copy.broken_files)
        yield Source(copy.layout, copy.name, tasks, len(spool.found), copy.lists(), skipped)
    finally:
        connection.close()


@dataclass
class _Found:
    """What is known of a task without its instances."""

    number: int
    side: str | None
    files: set[str] = field(default_factory=set)
    definitions: Counter[str] = field(default_factory=Counter)


def _fill(
    spool: _Spool,
    copy: _RowFiles | _Hub,
    recorder: Recorder,
    skipped: dict[str, str],
    keep: Keep,
) -> None:
    bad_lines = BadLines(skipped)
    lists = copy.lists()
    with recorder.progress(copy.title, copy.num_parts) as bar:
        for row in copy.rows(bad_lines, skipped):
            if row is None:
                bar.advance(note=f"{len(spool.found)} tasks")
                continue
            name = row.columns.get("task_name")
            if not isinstance(name, str) or not is_text(name):
                bad_lines.add(row.file, row.number, f"no 'task_name' among {sorted(row.columns)}")
            else:
                spool.add(name, row, wanted=keep(name, row.side, lists))
    spool.finish()


class _Spool:
    def __init__(self, connection: sqlite3.Connection) -> None:
        self.found: dict[str, _Found] = {}
        self._connection = connection
        connection.execute("CREATE TABLE instances (task INTEGER NOT NULL, instance TEXT NOT NULL) STRICT")
        connection.execute("BEGIN")

    def add(self, name: str, row: _HubRow, *, wanted: bool) -> None:
        task = self.found.setdefault(name, _Found(len(self.found), row.side))
        task.files.add(row.file)
        task.side = task.side or row.side
        if row.side is not None and row.side != task.side:
            task.side = "train and test"
        definition = row.columns.get("definition")
        for text in definition if isinstance(definition, list) else [definition]:
            if isinstance(text, str) and is_text(text) and len(task.definitions) <= MAX_DEFINITIONS:
                task.definitions[text.strip()] += 1
        if wanted:
            values = [row.columns.get("inputs"), row.columns.get("targets")]
            # As ASCII, because half a surrogate pair is no text for SQLite; what is no JSON is no text either.
            self._connection.execute(
                "INSERT INTO instances VALUES (?, ?)", (task.number, json.dumps(values, default=lambda _: None))
            )

    def finish(self) -> None:
        self._connection.execute("CREATE INDEX by_task ON instances (task)")
        self._connection.execute("COMMIT")

    def tasks(self, broken_files: set[str]) -> Iterator[SourceTask]:
        for name, task in sorted(self.found.items()):
            read = partial(self._read, task, sorted(task.files & broken_files))
            yield SourceTask(name, ", ".join(sorted(task.files)[:3]), task.side, read)

    def _read(self, task: _Found, broken_files: Sequence[str], add: AddInstance) -> TaskFacts:
        if broken_files:
            raise DamagedTask(f"{broken_files[0]!r} cannot be read to its end")
        if not task.definitions:
            raise DamagedTask("there is no 'definition'")
        if len(task.definitions) > MAX_DEFINITIONS:
            raise DamagedTask(f"it has more than {MAX_DEFINITIONS} definitions")
        rows = self._connection.execute("SELECT instance FROM instances WHERE task = ?", (task.number,))
        for (instance,) in rows:
            add(*json.loads(instance))
        # The most frequent one first, so that the order of the rows does not matter.
        ranked = sorted(task.definitions.items(), key=lambda item: (-item[1], item[0]))
        return TaskFacts(definitions=tuple(text for text, _ in ranked))
