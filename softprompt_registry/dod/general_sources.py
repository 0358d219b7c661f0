"""Super-NaturalInstructions as task files of the public repository and as a flat copy, and what a source of it is.

Every reader gives `SourceTask`s. What a task holds is read only when it is asked for, instance by instance, and the
facts about the task come last, because a task file may tell them after its instances.
"""

from __future__ import annotations

import codecs
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

from softprompt_registry.dod.file_rows import Fault, is_text, jsonl_rows
from softprompt_registry.errors import DataError
from softprompt_registry.fingerprints import digest_of_json

LANGUAGE_KEYS = ("Input_language", "Output_language", "Instruction_language")
SPLIT_FILES = {side: f"{side}_tasks.txt" for side in ("train", "test", "excluded")}
CORPUS = "Super-NaturalInstructions"

AddInstance = Callable[[object, object], None]
"""Takes the input and the output, or list of outputs, of one instance, whatever they are."""


class DamagedTask(Exception):
    """A task cannot be used; the text says why. Never leaves the builder."""


@dataclass(frozen=True)
class TaskFacts:
    """What is told about a task beside its instances."""

    definitions: tuple[str, ...]
    """At least one; each of them alone describes the whole task."""
    languages: Mapping[str, tuple[str, ...]] | None = None
    """Language key → languages; None where the layout tells none."""
    source: str = CORPUS


@dataclass(frozen=True)
class SourceTask:
    """A task that was found."""

    name: str
    file: str
    """Where it was found, relative to the source."""
    side: str | None
    """The side of the benchmark that the source itself puts it on: train, test or excluded; None if it tells none."""
    read: Callable[[AddInstance], TaskFacts]
    """Hands over all instances, then gives the facts; raises `DamagedTask`. Call it before the next task is asked for."""


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
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DamagedTask(f"{key!r} is {_kind_of(value)}, not a string or a list of strings")
    definitions = tuple(dict.fromkeys(text.strip() for text in texts if is_text(text)))
    if not definitions:
        raise DamagedTask(f"{key!r} is empty")
    return definitions


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


def _read_task_file(path: Path, add: AddInstance) -> TaskFacts:
    """Reads the file once, from beginning to end, whatever the order of its keys."""
    import ijson

    try:
        if not path.stat().st_size:
            raise DamagedTask("the file is empty")
        with path.open("rb") as file:
            # The fast parser turns one half of a surrogate pair into '?' and fails on the other half.
            backend = ijson.get_backend("python") if _has_lone_surrogate(file) else ijson
            file.seek(0)
            file.seek(3 if file.read(3) == codecs.BOM_UTF8 else 0)
            facts = _read_events(backend.basic_parse(file), add)
    except (ijson.JSONError, UnicodeDecodeError, RecursionError) as error:
        raise DamagedTask(_what_is_broken(path, error)) from error
    except OSError as error:
        raise DamagedTask(f"the file cannot be read ({error.strerror or error})") from error
    missing = [key for key in ("Definition", "Instances") if key not in facts]
    if missing:
        raise DamagedTask(f"there is no {missing[0]!r}")
    return TaskFacts(
        definitions=_definitions_of(facts["Definition"], "Definition"),
        languages={key: _languages_of(facts[key], key) for key in LANGUAGE_KEYS if key in facts},
        source=_source_of(facts.get("Source"), facts.get("Instance License")),
    )


def _languages_of(value: object, key: str) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DamagedTask(f"{key!r} is {_kind_of(value)}, not a list of strings")
    return tuple(names)


_KEPT_KEYS = ("Definition", "Source", "Instance License", *LANGUAGE_KEYS)

_EVENT_KINDS = {
    "start_map": "an object",
    "start_array": "a list",
    "string": "a string",
    "number": "a number",
    "boolean": "true or false",
    "null": "null",
}

Events = Iterator[tuple[str, Any]]


def _read_events(events: Events, add: AddInstance) -> dict[str, Any]:
    """The top-level values that matter; the instances are handed over one by one and never held together."""
    event, value = next(events)
    if event != "start_map":
        raise DamagedTask(f"the file holds {_EVENT_KINDS[event]}, not an object")
    facts: dict[str, Any] = {}
    seen: set[str] = set()
    for event, key in events:
        if event == "end_map":
            break
        if key in seen:
            raise DamagedTask(f"the key {key!r} stands there twice")
        seen.add(key)
        event, value = next(events)
        if key == "Instances":
            facts[key] = None
            if event != "start_array":
                raise DamagedTask(f"'Instances' is {_EVENT_KINDS[event]}, not a list")
            for event, value in events:
                if event == "end_array":
                    break
                instance = _value(event, value, events)
                if isinstance(instance, dict):
                    add(instance.get("input"), instance.get("output"))
                else:
                    add(None, None)
        elif key in _KEPT_KEYS:
            facts[key] = _value(event, value, events)
        else:
            _skip(event, events)
    for _ in events:  # to the end of the file: something may follow the object
        pass
    return facts


def _value(event: str, value: Any, events: Events) -> Any:
    """The JSON value that begins with this event."""
    if event == "start_map":
        members: dict[str, Any] = {}
        for event, key in events:
            if event == "end_map":
                break
            members[key] = _value(*next(events), events)
        return members
    if event == "start_array":
        items: list[Any] = []
        for event, item in events:
            if event == "end_array":
                break
            items.append(_value(event, item, events))
        return items
    return value


def _skip(event: str, events: Events) -> None:
    """Past the value that begins with this event, which may be large."""
    depth = 0
    while True:
        depth += event in ("start_map", "start_array")
        depth -= event in ("end_map", "end_array")
        if depth == 0:
            return
        event, _ = next(events)


_BLOCK = 1 << 20
_PAIR = len(rb"\ud83d\ude42")
_LONE_SURROGATE = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F]"
)


def _has_lone_surrogate(file: IO[bytes]) -> bool:
    r"""Whether an escape like \ud83d stands without its other half."""
    text, start = b"", 0
    while block := file.read(_BLOCK):
        text = text[-2 * _PAIR :] + block
        match = _LONE_SURROGATE.search(text, start) if b"\\ud" in text or b"\\uD" in text else None
        if match is not None and match.start() + _PAIR <= len(text):
            return True
        # What begins further down may go on in the next block; it is looked at again with that one.
        start = min(len(text), 2 * _PAIR) - min(len(text), _PAIR - 1)
    return _LONE_SURROGATE.search(text, max(len(text) - _PAIR + 1, 0)) is not None


_BREAKS_OFF = "the JSON breaks off before its end"


def _what_is_broken(path: Path, error: Exception) -> str:
    """The parsers' own messages differ from each other and say little about bytes."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                decoder.decode(block)
    except UnicodeDecodeError:
        return "the file is not UTF-8"
    if decoder.getstate()[0]:  # the file ends inside a letter
        return _BREAKS_OFF
    if isinstance(error, RecursionError):
        return "broken JSON (nested too deeply)"
    message = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "premature EOF" in message or "Incomplete" in message:
        return _BREAKS_OFF
    return f"broken JSON ({message})"


# A flat copy: one file of tasks, one of pairs


def open_flat(tasks_file: Path, pairs_file: Path) -> Source:
    skipped: dict[str, str] = {}
    bad_lines = BadLines(skipped)
    records: dict[str, Mapping[str, Any]] = {}
    for line, row in jsonl_rows(tasks_file):
        name = "" if isinstance(row, Fault) else row.get("task")
        if isinstance(row, Fault):
            _require_whole(row, tasks_file, line)
            bad_lines.add(tasks_file.name, line, row.found)
        elif not isinstance(name, str) or not is_text(name):
            bad_lines.add(tasks_file.name, line, "no 'task'")
        elif name in records:
            bad_lines.add(tasks_file.name, line, f"a second record for {name!r}")
        else:
            records[name] = {key: row.get(key) for key in _RECORD_KEYS if key in row}
    tasks = _flat_tasks(records, pairs_file, bad_lines)
    lists = read_split_lists(tasks_file.parent)
    return Source("flat", tasks_file.resolve().parent.name, tasks, len(records), lists, skipped)


_RECORD_KEYS = ("split", "definition", "definitions_extra", "source", "instance_license")


def _flat_tasks(
    records: Mapping[str, Mapping[str, Any]], pairs_file: Path, bad_lines: BadLines
) -> Iterator[SourceTask]:
    done: set[str] = set()

    def rows() -> Iterator[tuple[str, Mapping[str, Any]]]:
        current = None
        for line, row in jsonl_rows(pairs_file):
            if isinstance(row, Fault):
                _require_whole(row, pairs_file, line)
                bad_lines.add(pairs_file.name, line, row.found)
                continue
            name = row.get("task")
            if not isinstance(name, str) or not is_text(name):
                bad_lines.add(pairs_file.name, line, "no 'task'")
                continue
            if name != current and name in done:
                raise DataError(
                    f"reading {str(pairs_file)!r}: line {line} has a pair of task {name!r}, whose pairs ended further up; "
                    "expected the pairs of a task one below the other. Sort the file by task."
                )
            current = name
            done.add(name)
            yield name, row

    for name, group in itertools.groupby(rows(), key=lambda item: item[0]):
        record = records.get(name)
        side = record.get("split") if record else None
        yield SourceTask(name, pairs_file.name, side, partial(_read_flat_task, record, group))
    for name in sorted(set(records) - done):
        yield SourceTask(name, pairs_file.name, records[name].get("split"), partial(_read_flat_task, records[name], ()))


def _read_flat_task(
    record: Mapping[str, Any] | None, rows: Iterable[tuple[str, Mapping[str, Any]]], add: AddInstance
) -> TaskFacts:
    if record is None:
        raise DamagedTask("the tasks' file has no record for it")
    for _, row in rows:
        add(row.get("input"), row.get("output"))
    if record.get("definition") is None:
        raise DamagedTask("there is no 'definition'")
    definitions = _definitions_of(record["definition"], "definition")
    if record.get("definitions_extra"):
        definitions += _definitions_of(record["definitions_extra"], "definitions_extra")
    return TaskFacts(
        definitions=tuple(dict.fromkeys(definitions)),
        source=_source_of(record.get("source"), record.get("instance_license")),
    )


def _require_whole(fault: Fault, path: Path, line: int) -> None:
    if fault.fatal:
        raise DataError(
            f"reading {str(path)!r}: line {line} is the last one that can be reached: found {fault.found}; expected "
            f"{fault.expected}, because all tasks lie in it. Fetch the file again."
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
