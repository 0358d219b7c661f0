"""Super-NaturalInstructions as task files of the public repository and as a flat copy, and what a source of it is.

Every reader gives `SourceTask`s. What a task holds is read only when it is asked for.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

from softprompt_registry.dod.file_rows import Fault, is_text, json_value, jsonl_rows
from softprompt_registry.errors import DataError
from softprompt_registry.fingerprints import digest_of_json

LANGUAGE_KEYS = ("Input_language", "Output_language", "Instruction_language")
SPLIT_FILES = {side: f"{side}_tasks.txt" for side in ("train", "test", "excluded")}
CORPUS = "Super-NaturalInstructions"


class DamagedTask(Exception):
    """A task cannot be used; the text says why. Never leaves the builder."""


@dataclass(frozen=True)
class TaskContent:
    """What a task holds."""

    instances: Iterable[tuple[Any, Any]]
    """Input and output, or list of outputs, of each instance, whatever they are."""
    definitions: tuple[str, ...]
    """At least one; each of them alone describes the whole task."""
    languages: Mapping[str, tuple[str, ...]] | None = None
    """Language key → languages; None where the layout has none."""
    source: str = CORPUS


@dataclass(frozen=True)
class SourceTask:
    """A task that was found."""

    name: str
    file: str
    """Where it was found, relative to the source."""
    side: str | None
    """The side of the benchmark that the source itself puts it on: train, test or excluded; None if it has none."""
    read: Callable[[], TaskContent]
    """Raises `DamagedTask`. Call it before the next task is asked for."""


@dataclass(frozen=True)
class Source:
    """An opened source."""

    layout: str
    name: str
    """For the record; without a path."""
    tasks: Iterable[SourceTask]
    num_tasks: int
    lists: SplitLists | None
    """The benchmark's lists where they lie beside the tasks."""
    skipped: dict[str, str] = field(default_factory=dict)
    """File → why it, or some of its lines, cannot be used; grows while tasks are read."""


@dataclass(frozen=True)
class SplitLists:
    """The benchmark's own lists of task names."""

    train: frozenset[str]
    test: frozenset[str]
    excluded: frozenset[str]

    def side_of(self, name: str) -> str | None:
        """train, test, excluded or, on no list, None. Being excluded comes first."""
        return next((side for side in ("excluded", "train", "test") if name in getattr(self, side)), None)

    @property
    def digest(self) -> str:
        return digest_of_json([sorted(self.train), sorted(self.test), sorted(self.excluded)])


def read_split_lists(folder: Path) -> SplitLists | None:
    """The lists in a folder; None if it holds neither the one of train tasks nor the one of test tasks."""
    names: dict[str, frozenset[str]] = {}
    for side, file in SPLIT_FILES.items():
        try:
            lines = (folder / file).read_text(encoding="utf-8-sig").splitlines()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"reading the benchmark's list {str(folder / file)!r}: found a file that cannot be read ({error}); expected "
                "UTF-8 text with one task name on each line. Fetch the list again."
            ) from error
        names[side] = frozenset(line.strip().removesuffix(".json") for line in lines if line.strip())
    if "train" not in names and "test" not in names:
        return None
    lists = SplitLists(**{side: names.get(side, frozenset()) for side in SPLIT_FILES})
    both = sorted(lists.train & lists.test)
    if both:
        raise DataError(
            f"reading the benchmark's lists in {str(folder)!r}: found {both[:5]} on the train list and on the test list; "
            "expected each task on one list, or training would see the test. Correct the lists."
        )
    return lists


def _definitions_of(value: object, key: str) -> tuple[str, ...]:
    """Each definition of a list stands for itself: in the benchmark they are alternatives, not parts of one text."""
    texts = _strings_of(value, key, "a string or a list of strings")
    definitions = tuple(dict.fromkeys(text.strip() for text in texts if is_text(text)))
    if not definitions:
        raise DamagedTask(f"{key!r} is empty")
    return definitions


def _strings_of(value: object, key: str, expected: str) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(each, str) for each in strings):
        raise DamagedTask(f"{key!r} is {_kind_of(value)}, not {expected}")
    return tuple(strings)


def _kind_of(value: object) -> str:
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


def _source_of(source: object, licence: object) -> str:
    """Where a task's data come from, in words: "Super-NaturalInstructions: cosmosqa (CC BY 4.0)"."""
    datasets, licences = (
        ", ".join(text.strip() for text in value if is_text(text)) if isinstance(value, list) else ""
        for value in ([each] if isinstance(each, str) else each for each in (source, licence))
    )
    return CORPUS + (f": {datasets}" if datasets else "") + (f" ({licences})" if licences else "")


# The repository: one JSON file per task


def open_repository(folder: Path, files: Sequence[Path]) -> Source:
    places = (folder / "splits" / "default", folder, folder.parent / "splits" / "default")
    lists = next((found for found in map(read_split_lists, places) if found is not None), None)
    skipped: dict[str, str] = {}

    def tasks() -> Iterator[SourceTask]:
        for path in files:
            # A name that is not UTF-8 can neither be stored nor printed.
            file = os.fsencode(path.name).decode("utf-8", "replace")
            if not path.is_file():
                skipped[file] = "not a file"
            else:
                yield SourceTask(file.removesuffix(".json"), file, None, partial(_read_task_file, path))

    return Source("repository", folder.resolve().name, tasks(), len(files), lists, skipped)


def _read_task_file(path: Path) -> TaskContent:
    record = _read_json(path)
    missing = [key for key in ("Definition", "Instances") if key not in record]
    if missing:
        raise DamagedTask(f"there is no {missing[0]!r}")
    instances = record["Instances"]
    if not isinstance(instances, list):
        raise DamagedTask(f"'Instances' is {_kind_of(instances)}, not a list")
    objects = (each if isinstance(each, dict) else {} for each in instances)
    return TaskContent(
        instances=((each.get("input"), each.get("output")) for each in objects),
        definitions=_definitions_of(record["Definition"], "Definition"),
        languages={key: _strings_of(record[key], key, "a list of strings") for key in LANGUAGE_KEYS if key in record},
        source=_source_of(record.get("Source"), record.get("Instance License")),
    )


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a task file."""
    try:
        record = json_value(path.read_bytes(), "one object", "Fetch the file again.")
    except OSError as error:
        raise DamagedTask(f"the file cannot be read ({error.strerror or error})") from error
    if isinstance(record, Fault):
        raise DamagedTask(f"found {record.found}")
    if not isinstance(record, dict):
        raise DamagedTask(f"the file holds {_kind_of(record)}, not an object")
    return record


# A flat copy: one file of tasks, one of pairs


def open_flat(tasks_file: Path, pairs_file: Path) -> Source:
    skipped: dict[str, str] = {}
    bad_lines = BadLines(skipped)
    records: dict[str, Mapping[str, Any]] = {}
    for line, name, row in _flat_rows(tasks_file, bad_lines):
        if name in records:
            bad_lines.add(tasks_file.name, line, f"a second record for {name!r}")
        else:
            records[name] = row

    def tasks() -> Iterator[SourceTask]:
        done: set[str] = set()
        for name, group in itertools.groupby(_flat_rows(pairs_file, bad_lines), key=itemgetter(1)):
            rows = list(group)
            if name in done:
                raise DataError(
                    f"reading {str(pairs_file)!r}: line {rows[0][0]} has a pair of task {name!r}, whose pairs ended further "
                    "up; expected the pairs of a task one below the other. Sort the file by task."
                )
            done.add(name)
            yield task_of(name, [(row.get("input"), row.get("output")) for _, _, row in rows])
        for name in sorted(set(records) - done):
            yield task_of(name, [])

    def task_of(name: str, instances: list[tuple[Any, Any]]) -> SourceTask:
        record = records.get(name)
        side = record.get("split") if record else None
        return SourceTask(name, pairs_file.name, side, partial(_read_flat_task, record, instances))

    lists = read_split_lists(tasks_file.parent)
    return Source("flat", tasks_file.resolve().parent.name, tasks(), len(records), lists, skipped)


def _flat_rows(path: Path, bad_lines: BadLines) -> Iterator[tuple[int, str, Mapping[str, Any]]]:
    """Line, task and columns of the rows that can be used."""
    for line, row in jsonl_rows(path):
        if not isinstance(row, Fault):
            name = row.get("task")
            if isinstance(name, str) and is_text(name):
                yield line, name, row
            else:
                bad_lines.add(path.name, line, "no 'task'")
        elif row.fatal:
            raise DataError(
                f"reading {str(path)!r}: line {line} is the last one that can be reached: found {row.found}; expected "
                f"{row.expected}, because all tasks lie in it. Fetch the file again."
            )
        else:
            bad_lines.add(path.name, line, row.found)


def _read_flat_task(record: Mapping[str, Any] | None, instances: Iterable[tuple[Any, Any]]) -> TaskContent:
    if record is None:
        raise DamagedTask("the tasks' file has no record for it")
    if record.get("definition") is None:
        raise DamagedTask("there is no 'definition'")
    definitions = _definitions_of(record["definition"], "definition")
    if record.get("definitions_extra"):
        definitions += _definitions_of(record["definitions_extra"], "definitions_extra")
    return TaskContent(
        instances,
        definitions=tuple(dict.fromkeys(definitions)),
        source=_source_of(record.get("source"), record.get("instance_license")),
    )


class BadLines:
    """Tells of each file how many lines cannot be used, and what is wrong with the first."""

    def __init__(self, skipped: dict[str, str]) -> None:
        self._skipped = skipped
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, file: str, line: int, found: str) -> None:
        self._counts[file] += 1
        first = self._first.setdefault(file, f"line {line}: {found}")
        count = self._counts[file]
        self._skipped[file] = f"{count} line{'s' if count > 1 else ''} left out, the first is {first}"
