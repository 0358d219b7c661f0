"""A DoD from a folder of files: one CSV, TSV, JSON, JSON Lines or Parquet file per task, and optionally `tasks.jsonl`.

`<task>.csv`, `.tsv`, `.json`, `.jsonl`, `.ndjson` (each also with `.gz`) and `.parquet` have the columns `input` and
`output`, and may have `split` (train, validation or test). `tasks.jsonl` has one object per task: `name`, and optionally
`kind`, `split`, `labels`, `hard_prompts` and `source`. What a record does not say is inferred, always in the same way, so
that the same files and the same config give the same digest. The readers of the formats are in `file_rows.py`.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, PositiveInt

from softprompt_registry.config import Share, build_config, flatten, settings
from softprompt_registry.dod.file_rows import ENDINGS, Fault, ending_of, is_text, jsonl_rows, rows_of, unit_of
from softprompt_registry.dod.store import dod_written_whole, require_free
from softprompt_registry.dod.task import (
    PAIR_SPLITS,
    Pair,
    PairShares,
    PairSplit,
    Task,
    TaskKind,
    TaskSplit,
    draw_in_proportion,
    draw_task_split,
    seed_of,
    split_pairs_by_input,
    text_key,
)
from softprompt_registry.errors import ConfigError, DataError
from softprompt_registry.recording import NullRecorder, Recorder

RECORDS_FILE = "tasks.jsonl"
MAX_PROBLEMS = 20
"""A build stops at this many problems and reports them together."""
MAX_NOTED_FILES = 20
"""Names of files left out that a DoD's metadata keeps."""
MAX_LABEL_WORDS = 3
MIN_PAIRS_PER_LABEL = 4


@settings
class FilesConfig:
    """How a folder of files becomes a DoD."""

    input_column: str = "input"
    """Column (CSV, TSV, Parquet) or key (JSON, JSON Lines) that holds the text that goes in."""
    output_column: str = "output"
    """Column or key that holds the text that should come out."""
    max_labels: int = 20
    """Without a record, a task with more distinct outputs than this is a generation task."""
    label_spelling: Literal["unify", "keep"] = "unify"
    """`unify`: outputs of a classification task that differ only in case, white space or Unicode form are one label, in the
    spelling of the task's record, else in the most frequent one. `keep`: each is a label of its own."""
    test_share: Share = 0.0
    """Share of tasks, from 0 to 1, that `seed` sends to the test split when their record names no split; adding a task
    moves no other."""
    pair_shares: PairShares = (0.8, 0.1, 0.1)
    """Shares of train, validation and test pairs in a task whose file has no `split`."""
    max_pairs_per_task: PositiveInt | None = None
    """Draw at most this many pairs of each task by `seed`, keeping the balance of labels and splits; None keeps all."""
    skip_bad_rows: bool = False
    """Leave out the rows that cannot be used and count them in the report, instead of refusing the whole folder."""
    seed: int = 0
    """Seed of every draw; it is combined with the task's name, so tasks do not depend on each other."""

    def __post_init__(self) -> None:
        if len({self.input_column, self.output_column, "split"}) != 3:
            raise ValueError(
                f"input_column is {self.input_column!r} and output_column is {self.output_column!r}, expected two names that "
                "differ from each other and from 'split'"
            )


@dataclass(frozen=True)
class FilesReport:
    """What a build made of a folder."""

    path: Path
    digest: str
    tasks: int
    pairs: int
    duplicates: Mapping[str, int]
    """File name → dropped rows whose input and output had occurred in that file before; only files that have any."""
    skipped_rows: Mapping[str, Mapping[str, int]]
    """File name → reason → number of rows left out by `skip_bad_rows`."""
    respelled_labels: Mapping[str, Mapping[str, Mapping[str, int]]]
    """File name → label → other spelling of it in the file → number of rows, by `label_spelling`."""
    left_out: tuple[str, ...]
    """Names of the files that are no task files, and of subfolders, these with a slash; without hidden ones."""


def build_dod_from_files(
    folder: Path,
    out: Path,
    *,
    config: FilesConfig,
    overwrite: bool = False,
    recorder: Recorder | None = None,
) -> FilesReport:
    """Read every task file in `folder` and write the DoD `out`, whole or not at all.

    The DoD grows in `<out>.building` and takes its name in one step at the end; an existing `out` stays as it is until
    then. Subfolders and files without a known ending are left out and listed in the report; hidden ones are ignored.

    Raises:
        DataError: `out` exists, or the files have problems; the first 20 are listed, each with its file and line.
    """
    doing = f"building a DoD from the files in {str(folder)!r}"
    require_free(out, doing, overwrite=overwrite)  # before a folder full of problems is read
    problems = _Problems(folder, skip_bad_rows=config.skip_bad_rows)
    files, left_out = _task_files(folder, out, problems)
    records = _read_records(folder / RECORDS_FILE, files, problems)
    num_pairs = 0
    with dod_written_whole(out, doing, overwrite=overwrite) as store:
        with (recorder or NullRecorder()).progress("task files", len(files)) as bar:
            for name, path in files.items():
                task = _read_task(name, path, records.get(name) or TaskRecord(name), config, problems)
                bar.advance(1, name)
                if task is None or problems.found:
                    continue  # read on, to report the problems of all files at once
                store.add_task(task)
                num_pairs += len(task.pairs)
        problems.raise_if_any()
        report = FilesReport(
            path=out,
            digest=store.digest,
            tasks=len(files),
            pairs=num_pairs,
            duplicates=problems.duplicates,
            skipped_rows={name: dict(reasons) for name, reasons in problems.skipped.items()},
            respelled_labels=problems.respelled,
            left_out=left_out,
        )
        store.set_metadata("build", {"builder": "files", "settings": flatten(config), "counts": _counts(report)})
    return report


def _counts(report: FilesReport) -> dict[str, Any]:
    """What a DoD's metadata says of its build; the whole is in the report."""
    labels = [spellings for of_file in report.respelled_labels.values() for spellings in of_file.values()]
    return {
        "duplicates": sum(report.duplicates.values()),
        "skipped_rows": dict(sum(map(Counter, report.skipped_rows.values()), Counter[str]())),
        "rows_with_respelled_labels": sum(sum(spellings.values()) for spellings in labels),
        "left_out": len(report.left_out),
        "names_left_out": list(report.left_out[:MAX_NOTED_FILES]),
    }


class _Problems:
    """Collects what is wrong with the files, so that one error can report it all, and what was dropped or respelled."""

    def __init__(self, folder: Path, *, skip_bad_rows: bool) -> None:
        self.found: list[str] = []
        self.skipped: dict[str, Counter[str]] = {}
        self.duplicates: dict[str, int] = {}
        self.respelled: dict[str, dict[str, dict[str, int]]] = {}
        self._folder = folder
        self._skip_bad_rows = skip_bad_rows
        self._some_can_be_skipped = False

    def add(self, place: str, fault: Fault) -> None:
        """Note a problem that no setting can skip."""
        self.note(f"{place}: found {fault.found}; expected {fault.expected}. {fault.advice}")

    def note(self, text: str) -> None:
        self.found.append(text)
        if len(self.found) == MAX_PROBLEMS:
            self.raise_if_any()

    def add_row(self, path: Path, place: str, fault: Fault) -> None:
        """Note a bad row, or count it as skipped."""
        if self._skip_bad_rows and not fault.fatal:
            self.skipped.setdefault(path.name, Counter())[fault.reason] += 1
        else:
            self._some_can_be_skipped |= not fault.fatal
            self.add(f"{path.name}, {place}", fault)

    def raise_if_any(self) -> None:
        if not self.found:
            return
        count = f"{len(self.found)} problem{'s' if len(self.found) > 1 else ''}"
        if len(self.found) == MAX_PROBLEMS:
            count = f"the first {MAX_PROBLEMS} problems"
        hint = " (skip_bad_rows can leave bad rows out)" if self._some_can_be_skipped else ""
        lines = "\n".join(f"  {text}" for text in self.found)
        raise DataError(
            f"building a DoD from the files in {str(self._folder)!r}: nothing was written because of {count}{hint}:\n{lines}"
        )


def _task_files(folder: Path, out: Path, problems: _Problems) -> tuple[dict[str, Path], tuple[str, ...]]:
    """Task name → its file, in the order of the names; and what else there is, but for hidden files and `out` itself."""
    if not folder.is_dir():
        raise DataError(
            f"building a DoD from the files in {str(folder)!r}: there is no such folder; expected one with a file per "
            "task. Correct the path."
        )
    there = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    names = [path.name if path.is_file() else f"{path.name}/" for path in there]
    is_outs_folder = out.parent.resolve() == folder.resolve()
    files: dict[str, Path] = {}
    left_out = []
    for name in names:
        ending = ending_of(name)
        if name == RECORDS_FILE:
            continue
        if ending is None:
            if not (is_outs_folder and name.startswith(out.name)):  # with its journal and its audit
                left_out.append(name)
            continue
        task = name[: -len(ending)]
        if task in files:
            fault = Fault(
                "two files",
                f"a second file for task {task!r}, beside {files[task].name!r}",
                "one file per task",
                "Remove or rename one of them.",
            )
            problems.add(name, fault)
        else:
            files[task] = folder / name
    if not files:
        shown = ", ".join(map(repr, names[:8])) or "no files at all"
        raise DataError(
            f"building a DoD from the files in {str(folder)!r}: found {shown}{', …' if len(names) > 8 else ''}; "
            f"expected at least one task file that ends in {', '.join(ENDINGS)}. Add task files or correct the path."
        )
    return dict(sorted(files.items())), tuple(left_out)


def _text(text: str) -> str:
    if not is_text(text):
        raise ValueError(f"found {text!r}, expected text that is not empty")
    return text


Text = Annotated[str, AfterValidator(_text)]


@settings
class TaskRecord:
    """What a line of `tasks.jsonl` says about a task; None where it says nothing."""

    name: str
    kind: TaskKind | None = None
    split: TaskSplit | None = None
    labels: tuple[Text, ...] | None = None
    hard_prompts: tuple[Text, ...] | None = None
    source: Text | None = None

    def __post_init__(self) -> None:
        if self.labels and (len(self.labels) < 2 or len(set(self.labels)) < len(self.labels)):
            raise ValueError(f"found labels {list(self.labels)}, expected at least two, each once")
        if self.labels and self.kind == "generation":
            raise ValueError("found labels on a generation task, expected them on classification tasks only")


def _read_records(path: Path, files: Collection[str], problems: _Problems) -> dict[str, TaskRecord]:
    records: dict[str, TaskRecord] = {}
    for line, row in jsonl_rows(path) if path.is_file() else ():
        place = f"{path.name}, line {line}"
        if isinstance(row, Fault):
            problems.add(place, row)
            continue
        try:
            record = build_config(TaskRecord, row, place)
        except ConfigError as error:
            problems.note(str(error))
            continue
        if record.name in records:
            found = f"a second record for task {record.name!r}"
            problems.add(place, Fault("name", found, "one record per task", "Remove one of them."))
        elif record.name not in files:
            known = sorted(files)
            fault = Fault(
                "unknown task",
                f"task {record.name!r}, for which the folder has no file",
                f"one of the tasks with a file, {known[:8]}{' and more' if len(known) > 8 else ''}",
                f"Correct the name or add {record.name + '.jsonl'!r}.",
            )
            problems.add(place, fault)
        else:
            records[record.name] = record
    return records


def _read_task(name: str, path: Path, record: TaskRecord, config: FilesConfig, problems: _Problems) -> Task | None:
    """The task in `path`, or None if it has problems."""
    found_before, record_labels = len(problems.found), record.labels or ()
    splits: dict[tuple[str, str], str | None] = {}  # (input, output) → split; a dict keeps the order of the file
    rows_with: Counter[str] = Counter()
    duplicates = 0
    file_has_splits: bool | None = None  # as the first usable row says
    unify = config.label_spelling == "unify"
    label_of = _labels_by_key(record_labels) if unify else {}
    for line, row in rows_of(path, (config.input_column, config.output_column), optional=("split",)):
        fault = row if isinstance(row, Fault) else _row_fault(row, record_labels, label_of, file_has_splits, config)
        if fault is not None:
            problems.add_row(path, f"{unit_of(path)} {line}", fault)
            continue
        row = cast(dict[str, Any], row)
        split = row.get("split")
        file_has_splits = split is not None
        pair = (row[config.input_column], row[config.output_column])
        rows_with[pair[1]] += 1
        duplicates += pair in splits
        splits.setdefault(pair, split)
    if len(problems.found) > found_before:
        return None
    if not splits:
        fault = Fault("no pairs", "no usable rows", "at least one pair", "Fill the file or remove it.")
        problems.add(path.name, fault)
        return None
    spelling = _unified(rows_with, record_labels) if unify else {output: output for output in rows_with}
    unified: dict[tuple[str, str], str | None] = {}
    for (text, output), split in splits.items():
        unified.setdefault((text, spelling[output]), split)
    kind = record.kind or ("classification" if record_labels else _infer_kind(unified, config.max_labels))
    labels: tuple[str, ...] = ()
    if kind == "classification":
        duplicates += len(splits) - len(unified)
        splits = unified
        for output, label in sorted(spelling.items()):
            if output != label:
                problems.respelled.setdefault(path.name, {}).setdefault(label, {})[output] = rows_with[output]
        labels = record_labels or tuple(sorted({output for _, output in splits}))
    if duplicates:
        problems.duplicates[path.name] = duplicates
    pairs = list(splits)
    strata = [(splits[pair] or "", pair[1] if kind == "classification" else "") for pair in pairs]
    drawn = draw_in_proportion(strata, config.max_pairs_per_task, seed_of("pairs", config.seed, name))
    pairs = [pairs[position] for position in drawn]
    if file_has_splits:
        pair_splits = [cast(PairSplit, splits[pair]) for pair in pairs]
    else:
        inputs = [text for text, _ in pairs]
        pair_splits = split_pairs_by_input(inputs, config.pair_shares, seed_of("splits", config.seed, name))
    try:
        return Task(
            name=name,
            kind=kind,
            split=record.split or draw_task_split(name, config.test_share, config.seed),
            labels=labels,
            hard_prompts=record.hard_prompts or (),
            source=record.source or "",
            pairs=tuple(Pair(*pair, split) for pair, split in zip(pairs, pair_splits, strict=True)),
        )
    except DataError as error:
        problems.note(f"{path.name}: {error}")
        return None


def _labels_by_key(labels: Sequence[str]) -> dict[str, str]:
    """What spellings of a label have in common → the label, where that is one."""
    keys = Counter(map(text_key, labels))
    return {text_key(label): label for label in labels if keys[text_key(label)] == 1}


def _unified(rows_with: Mapping[str, int], labels: Sequence[str]) -> dict[str, str]:
    """Output → label: one of the record's, else the most frequent spelling of what outputs have in common.

    What differs in case may be two labels after all: where only one would be left, case counts.
    """
    if labels:
        label_of = _labels_by_key(labels)
        return {output: output if output in labels else label_of[text_key(output)] for output in rows_with}
    for key in (text_key, _tidy):
        spellings: dict[str, Counter[str]] = {}
        for output, rows in rows_with.items():
            spellings.setdefault(key(output), Counter())[_tidy(output)] += rows
        if len(spellings) > 1:
            break
    # Of equally frequent ones the first in the alphabet, so that the order of the rows does not matter.
    chosen = {common: max(sorted(counts), key=counts.__getitem__) for common, counts in spellings.items()}
    return {output: chosen[key(output)] for output in rows_with}


def _tidy(text: str) -> str:
    """A text with single spaces, in composed form (NFC)."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def _row_fault(
    row: Mapping[str, Any],
    labels: Collection[str],
    label_of: Mapping[str, str],
    file_has_splits: bool | None,
    config: FilesConfig,
) -> Fault | None:
    """What is wrong with one row, or None; `label_of` knows other spellings of `labels`."""
    for column in (config.input_column, config.output_column):
        if column not in row:
            return Fault(
                "missing column",
                f"no {column!r} among {sorted(row)}",
                f"{config.input_column!r} and {config.output_column!r}",
                "Add it, or name the right column in the config.",
            )
        value = row[column]
        if value is None or (isinstance(value, str) and not value.strip()):
            return Fault(f"empty {column}", f"an empty {column!r}", "some text", "Fill it or remove the row.")
        if not isinstance(value, str):
            shown = repr(value) if len(repr(value)) <= 40 else repr(value)[:40] + "…"
            advice = f'Write it as a string, "{value}".' if isinstance(value, int | float) else "Write it as a string."
            return Fault("not a string", f"{type(value).__name__} {shown} as {column!r}", "a string", advice)
        if not is_text(value):
            return Fault(
                "not UTF-8", f"characters in {column!r} that are not Unicode", "UTF-8 text", "Save the file as UTF-8."
            )
    output = row[config.output_column]
    if labels and output not in labels and text_key(output) not in label_of:
        return Fault(
            "unknown label",
            f"output {output!r}",
            f"one of the task's labels {list(labels)}",
            f"Correct it, or the labels in {RECORDS_FILE!r}.",
        )
    split = row.get("split")
    if split is not None and split not in PAIR_SPLITS:
        return Fault("wrong split", f"split {split!r}", f"one of {list(PAIR_SPLITS)}", "Correct the word.")
    if file_has_splits is not None and file_has_splits != (split is not None):
        found, others = ("no split", "a split") if file_has_splits else (f"split {split!r}", "no split")
        return Fault("mixed splits", found, f"{others}, as in the rows above", "Give every row a split, or none.")
    return None


def _infer_kind(pairs: Collection[tuple[str, str]], max_labels: int) -> TaskKind:
    """Classification if the outputs look like labels: few, short and often repeated."""
    outputs = {output for _, output in pairs}
    few = 2 <= len(outputs) <= max_labels and len(pairs) >= MIN_PAIRS_PER_LABEL * len(outputs)
    short = all(len(output.split()) <= MAX_LABEL_WORDS for output in outputs)
    return "classification" if few and short else "generation"
