"""Task files for the tests of `dod/files.py`: rows as bytes of each format, and a build that is expected to work or fail."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from softprompt_registry.dod.files import FilesConfig, FilesReport, build_dod_from_files
from softprompt_registry.dod.store import DodStore
from softprompt_registry.dod.task import Task
from softprompt_registry.errors import DataError

Row = Mapping[str, Any]
ROWS: list[Row] = [
    {"input": text, "output": output, "split": split}
    for text, output, split in [
        ('He said "hi", then left', "yes", "train"),
        ("two\nlines", "no", "train"),
        ("plain", "yes", "validation"),
        ("雨 and café", "no", "test"),
        ("five", "yes", "test"),
        ("six", "no", "train"),
        ("seven", "yes", "train"),
        ("eight", "no", "train"),
    ]
]
NO_SPLITS: list[Row] = [{"input": row["input"], "output": row["output"]} for row in ROWS]


def csv_bytes(rows: Sequence[Row], delimiter: str = ",") -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def jsonl_bytes(rows: Sequence[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def parquet_bytes(rows: Sequence[Row]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([dict(row) for row in rows]), sink)
    return sink.getvalue()


def build(folder: Path, config: FilesConfig | None = None, **files: bytes) -> tuple[FilesReport, dict[str, Task]]:
    """Write `files` (with `__` for the dot of the name) into a folder and build it into `<folder>/out.dod`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content)
    report = build_dod_from_files(folder, folder / "out.dod", config=config or FilesConfig(), overwrite=True)
    with DodStore.open(report.path) as store:
        assert store.digest == report.digest
        return report, {task.name: task for task in store.tasks()}


def problems(folder: Path, config: FilesConfig | None = None, **files: bytes) -> list[str]:
    """The problems of a build that must fail and leave nothing behind."""
    with pytest.raises(DataError) as error:
        build(folder, config, **files)
    assert not [path.name for path in folder.iterdir() if path.name.startswith("out.dod")]
    head, *lines = str(error.value).split("\n")
    assert head.startswith(f"building a DoD from the files in {str(folder)!r}: nothing was written because of ")
    return [line.removeprefix("  ") for line in lines]


GOOD = b'{"input": "fine", "output": "ok"}\n'
HEAD = b"input,output\nfine,ok\n"


def write_classifications(folder: Path, tasks: Mapping[str, Mapping[str, Sequence[str]]], *, test_task: str) -> None:
    """A new folder for `build-dod files`: by task and label some inputs, each once in every split; one task is held out."""
    folder.mkdir()
    records = []
    for name, labels in tasks.items():
        rows = [
            {"input": f"{text} number {copy}", "output": label, "split": split}
            for label, texts in labels.items()
            for text in texts
            for copy, split in enumerate(("train", "validation", "test"))
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        records.append({"name": name, "labels": list(labels), "split": "test" if name == test_task else "train"})
    (folder / "tasks.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
