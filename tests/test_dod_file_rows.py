"""Bad rows and bad records of task files: each has its words, its place, and its way past."""

from __future__ import annotations

import csv
import gzip
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from task_files import GOOD, HEAD, ROWS, build, jsonl_bytes, parquet_bytes, problems

from softprompt_registry.dod.files import FilesConfig, build_dod_from_files
from softprompt_registry.errors import DataError

BAD_ROWS: list[tuple[str, bytes, str]] = [
    ("t.jsonl", GOOD + b'{"input": "x", "label": "y"}\n', "line 2: found no 'output' among ['input', 'label']"),
    ("t.jsonl", GOOD + b'{"input": "x", "output": "y", "input": "z"}\n', "line 2: found the key 'input' twice"),
    ("t.jsonl", GOOD + b'\n{"input": "x", "output": null}\n', "line 3: found an empty 'output'"),
    ("t.jsonl", GOOD + b'{"input": "x", "output": 3}\n', "line 2: found int 3 as 'output'; expected a string."),
    ("t.jsonl", GOOD + b'{"input": ["x"], "output": "y"}\n', "line 2: found list ['x'] as 'input'; expected a string."),
    (
        "t.jsonl",
        GOOD + b'{"input": "x", "output"\n',
        "line 2: found broken JSON (Expecting ':' delimiter: line 2 column",
    ),
    ("t.jsonl", b"[" * 100_000 + b"\n" + GOOD, "line 1: found broken JSON (maximum recursion depth exceeded"),
    ("t.jsonl", b'["x", "y"]\n' + GOOD, "line 1: found a JSON list; expected an object in braces"),
    ("t.jsonl", GOOD + b'{"input": "caf\xe9", "output": "y"}\n', "line 2: found bytes that are not UTF-8"),
    (
        "t.jsonl",
        GOOD + b'{"input": "x", "output": "\\ud83d"}\n',
        "line 2: found characters in 'output' that are not Unic",
    ),
    ("t.jsonl", b'{"input": "x", "output": "y", "split": "test"}\n' + GOOD, "line 2: found no split; expected a split"),
    (
        "t.jsonl",
        GOOD + b'{"input": "x", "output": "y", "split": "test"}\n',
        "line 2: found split 'test'; expected no sp",
    ),
    ("t.jsonl", b"\n \n", "found no usable rows; expected at least one pair"),
    (
        "t.jsonl.gz",
        gzip.compress(GOOD, mtime=0)[:12],
        "line 1: found a file that cannot be read (Compressed file ended",
    ),
    ("t.csv", b"text;label\na;b\n", "line 1: found the columns ['text;label'] without ['input', 'output']"),
    (
        "t.csv",
        b"",
        "line 1: found the columns [] without ['input', 'output']; expected ['input', 'output'], separated by c",
    ),
    ("t.csv", b"input,output,input\na,b,c\n", "line 1: found columns ['input'] twice"),
    ("t.csv", HEAD + b'"a\nb",ok\n ,ok\n', "line 5: found an empty 'input'"),
    ("t.csv", HEAD + b"caf\xe9,ok\n", "line 3: found bytes that are not UTF-8"),
    ("t.csv", "input,output\nx,y\n".encode("utf-16"), "line 1: found bytes that are not UTF-8"),
    ("t.csv", "input,output\na,b\n".encode("utf-16-le"), "line 1: found NUL bytes, as UTF-16 has them"),
    ("t.csv", b"input,output,split\na,b,train\nc,d,dev\n", "line 3: found split 'dev'; expected one of ['train', 'val"),
    ("t.csv", b"input,output,split\na,b,\n", "line 2: found split ''; expected one of"),
    (
        "t.csv",
        HEAD + b"a, b,c\n",
        "line 3: found 3 cells; expected 2, as in the header ['input', 'output']. Put quotes",
    ),
    ("t.csv", HEAD + b"a\n", "line 3: found 1 cell; expected 2"),
    ("t.csv", HEAD + b'"a" said,ok\n', "line 3: found broken quotes (',' expected after '\"')"),
    ("t.csv", HEAD + b'"a,ok\nb,ok\nc,ok\n', "line 3: found broken quotes (unexpected end of data)"),
    ("t.csv", HEAD + b"x" * (2**24 + 1) + b",ok\n", "line 3: found a cell of more than 16,777,216 characters"),
    ("t.csv", HEAD[:13], "found no usable rows; expected at least one pair"),
    ("t.csv.gz", HEAD, "line 1: found a file that cannot be read (Not a gzipped file (b'in'))"),
    (
        "t.tsv",
        HEAD,
        "line 1: found the columns ['input,output'] without ['input', 'output']; expected ['input', 'output'], sep",
    ),
    ("t.tsv", b"input\toutput\na\tb\tc\n", "line 2: found 3 cells; expected 2"),
    ("t.json", b'{"input": ["x"], "output": ["y"]}', "row 1: found a JSON dict; expected one list of objects"),
    (
        "t.json",
        GOOD + GOOD,
        "row 1: found broken JSON (Extra data: line 2 column 1 (char 34)); expected one list of objects",
    ),
    ("t.json", b'[{"input": "x", "output": "y"}, {"input": "x"}]', "row 2: found no 'output' among ['input']"),
    ("t.json", b'["x"]', "row 1: found a JSON str; expected an object in braces"),
    ("t.json", b"[" * 100_000, "row 1: found broken JSON (maximum recursion depth exceeded"),
    ("t.json.gz", GOOD, "row 1: found a file that cannot be read (Not a gzipped file"),
    ("t.parquet", parquet_bytes([{"input": "a", "output": None}]), "row 1: found an empty 'output'"),
    ("t.parquet", parquet_bytes([{"input": "a", "output": 4.5}]), "row 1: found float 4.5 as 'output'"),
    (
        "t.parquet",
        parquet_bytes([{"input": "a", "label": "b"}]),
        "row 1: found the columns ['input', 'label'] without ['o",
    ),
    ("t.parquet", b"input,output\n", "row 1: found a file that cannot be read (Parquet magic bytes not"),
    ("t.parquet", parquet_bytes(ROWS)[:-9], "row 1: found a file that cannot be read ("),
]


@pytest.mark.parametrize(("name", "content", "expected"), BAD_ROWS, ids=lambda value: str(value)[:40])
def test_bad_rows(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (found,) = problems(tmp_path, None, **{name.replace(".", "__"): content})
    assert found.removeprefix(name).lstrip(":, ").startswith(expected)
    assert re.fullmatch(r"t\.[a-z.]+(, (line|row) \d+)?: found .+; expected .+\. .+\.", found, re.DOTALL)


def test_a_name_that_a_task_cannot_have(tmp_path: Path) -> None:
    (found,) = problems(tmp_path, None, **{"t#1__csv": HEAD})
    assert found.startswith("t#1.csv: reading a task: its name is 't#1'; a name is not empty, has no '#'")


@pytest.mark.supports("files", "`ClassLabel` columns of `datasets` in Parquet", "read by the names of the classes")
def test_classes_of_a_parquet_file_have_their_names(tmp_path: Path) -> None:
    """`datasets` stores the number of a class; a number that is none, as -1 for an unknown label, is still refused."""
    datasets = pytest.importorskip("datasets")
    features = {"input": datasets.Value("string"), "output": datasets.ClassLabel(names=["negative", "positive"])}
    rows = {"input": ["poor", "fine", "dull", "unknown"], "output": [0, 1, 0, -1]}
    dataset = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    dataset.to_parquet(tmp_path / "films.parquet")
    assert problems(tmp_path) == [
        "films.parquet, row 4: found int -1 as 'output'; expected a string. Write it as a string, \"-1\"."
    ]
    dataset.select(range(3)).to_parquet(tmp_path / "films.parquet")
    _, tasks = build(tmp_path)
    assert [pair.output for pair in tasks["films"].pairs] == ["negative", "positive", "negative"]


def test_duplicate_parquet_column_and_bytes_that_are_not_text(tmp_path: Path) -> None:
    twice = pyarrow.table([["a"], ["b"], ["c"]], names=["input", "output", "input"])
    pyarrow.parquet.write_table(twice, tmp_path / "a.parquet")
    broken = pyarrow.array([b"fine", b"caf\xe9", None]).view(pyarrow.string())
    outputs = pyarrow.array(["x", "y", "z"])
    for name, column in (("b", broken), ("c", broken.dictionary_encode())):
        pyarrow.parquet.write_table(pyarrow.table({"input": column, "output": outputs}), tmp_path / f"{name}.parquet")
    unusable = [
        "row 2: found characters in 'input' that are not Unicode; expected UTF-8 text. Save the file as UTF-8.",
        "row 3: found an empty 'input'; expected some text. Fill it or remove the row.",
    ]
    assert problems(tmp_path) == [
        "a.parquet, row 1: found columns ['input'] twice; expected each column once. Remove or rename one.",
        *(f"{name}.parquet, {fault}" for name in "bc" for fault in unusable),
    ]


def test_label_that_the_record_does_not_know(tmp_path: Path) -> None:
    record = jsonl_bytes([{"name": "t", "labels": ["no", "yes"]}])
    config = FilesConfig(label_spelling="keep")
    assert problems(tmp_path, config, tasks__jsonl=record, t__csv=b"input,output\na,yes\nb,Yes\n") == [
        "t.csv, line 3: found output 'Yes'; expected one of the task's labels ['no', 'yes']. "
        "Correct it, or the labels in 'tasks.jsonl'."
    ]


def test_classification_with_one_output(tmp_path: Path) -> None:
    record = jsonl_bytes([{"name": "t", "kind": "classification"}])
    (found,) = problems(tmp_path, None, tasks__jsonl=record, t__csv=HEAD)
    assert found.startswith("t.csv: reading task 't': its labels are ['ok']; a classification task needs at least two")


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"name": "t", "label": ["a"]}, "unknown 'label'; known are name, kind, split, labels, hard_prompts, source"),
        ({"kind": "generation"}, "name is missing"),
        ({"name": 3}, "name is 3, expected text"),
        (
            {"name": "T"},
            "found task 'T', for which the folder has no file; expected one of the tasks with a file, ['t']",
        ),
        ({"name": "t", "kind": "qa"}, "kind is 'qa', expected 'classification' or 'generation'"),
        ({"name": "t", "split": ["test"]}, "split is ['test'], expected 'train' or 'test'"),
        ({"name": "t", "labels": "a, b"}, "labels is 'a, b', expected a list"),
        ({"name": "t", "hard_prompts": ["x", ""]}, "hard_prompts.1: found '', expected text that is not empty"),
        ({"name": "t", "labels": ["a"]}, "found labels ['a'], expected at least two, each once"),
        ({"name": "t", "labels": ["a", "b", "a"]}, "found labels ['a', 'b', 'a'], expected at least two, each once"),
        ({"name": "t", "labels": ["a", "b"], "kind": "generation"}, "found labels on a generation task"),
        ({"name": "t", "source": 5}, "source is 5, expected text"),
        (["t"], "found a JSON list; expected an object in braces"),
    ],
)
def test_bad_records(tmp_path: Path, record: object, expected: str) -> None:
    for skip_bad_rows in (False, True):  # a record is never skipped
        config = FilesConfig(skip_bad_rows=skip_bad_rows)
        (found,) = problems(tmp_path, config, t__csv=HEAD, tasks__jsonl=b"\n" + jsonl_bytes([record]))
        assert found.removeprefix("reading ").startswith(f"tasks.jsonl, line 2: {expected}")


def test_two_records_and_two_files_for_a_task(tmp_path: Path) -> None:
    record = {"name": "t"}
    assert problems(tmp_path, None, t__csv=HEAD, t__jsonl=GOOD, tasks__jsonl=jsonl_bytes([record, record])) == [
        "t.jsonl: found a second file for task 't', beside 't.csv'; expected one file per task. "
        "Remove or rename one of them.",
        "tasks.jsonl, line 2: found a second record for task 't'; expected one record per task. Remove one of them.",
    ]


def test_no_task_files(tmp_path: Path) -> None:
    for name in ("tasks.jsonl", "notes.txt", ".csv"):
        (tmp_path / name).write_text("")
    with pytest.raises(DataError) as error:
        build(tmp_path)
    assert str(error.value) == (
        f"building a DoD from the files in {str(tmp_path)!r}: found 'notes.txt', 'tasks.jsonl'; expected at least one "
        "task file that ends in .csv, .csv.gz, .tsv, .tsv.gz, .jsonl, .jsonl.gz, .ndjson, .ndjson.gz, .json, .json.gz, "
        ".parquet. Add task files or correct the path."
    )
    with pytest.raises(DataError, match="there is no such folder; expected one with a file per task"):
        build_dod_from_files(tmp_path / "x", tmp_path / "y.dod", config=FilesConfig())


def test_problems_of_all_files_in_one_error(tmp_path: Path) -> None:
    bad = b"input,output\n,x\ny,\n"
    assert [line.split(":")[0] for line in problems(tmp_path, None, a__csv=bad, b__csv=HEAD, c__csv=bad)] == [
        "a.csv, line 2",
        "a.csv, line 3",
        "c.csv, line 2",
        "c.csv, line 3",
    ]


def test_stops_at_twenty_problems(tmp_path: Path) -> None:
    bad = b"input,output\n" + b",x\n" * 15
    with pytest.raises(
        DataError, match="nothing was written because of the first 20 problems .skip_bad_rows can leave bad rows out.:"
    ):
        build(tmp_path, None, a__csv=bad, b__csv=bad)
    assert len(problems(tmp_path)) == 20


# Skipping


@pytest.mark.supports("files", "CSV cells of up to 16 million characters", "read")
def test_a_long_cell_is_no_bad_row(tmp_path: Path) -> None:
    """Python's own limit is 131,072 characters; a lower one that other code has set does not matter."""
    before = csv.field_size_limit(1000)
    try:
        long = "x" * 131_073
        content = f'input,output\n{long},ok\n"{long}\n2",ok\nlast,ok\n'.encode()
        for config in (FilesConfig(), FilesConfig(skip_bad_rows=True)):
            report, tasks = build(tmp_path, config, t__csv=content, u__tsv=content.replace(b",", b"\t"))
            assert report.skipped_rows == {}
            for task in tasks.values():
                assert [pair.input for pair in task.pairs] == [long, f"{long}\n2", "last"]
    finally:
        csv.field_size_limit(before)


def test_skipped_rows_are_counted_by_file_and_reason(tmp_path: Path) -> None:
    a = HEAD + b',x\ny,\n  ,x\na,b,c\ncaf\xe9,ok\n"a" b,c\nlast,ok\n'
    b = GOOD + b'{"input": "x", "output": 1}\n{broken\n[]\n{"input": "x"}\n'
    report, tasks = build(tmp_path, FilesConfig(skip_bad_rows=True), a__csv=a, b__jsonl=b)
    assert report.skipped_rows == {
        "a.csv": {
            "empty input": 2,
            "empty output": 1,
            "wrong number of cells": 1,
            "not UTF-8": 1,
            "broken quotes": 1,
        },
        "b.jsonl": {"not a string": 1, "broken JSON": 1, "not an object": 1, "missing column": 1},
    }
    assert [pair.input for pair in tasks["a"].pairs] == ["fine", "last"]
    assert report.pairs == 3


def test_damage_to_a_whole_file_is_not_skipped(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        FilesConfig(skip_bad_rows=True),
        a__csv=b"text,label\na,b\n",
        b__csv=HEAD + b'"never closed,x\ny,z\n',
        c__parquet=b"PAR1",
        d__jsonl=b"{broken\n",
    )
    assert [line.split("; ")[0] for line in found[:2]] == [
        "a.csv, line 1: found the columns ['text', 'label'] without ['input', 'output']",
        "b.csv, line 3: found broken quotes (unexpected end of data)",
    ]
    assert found[2].startswith("c.parquet, row 1: found a file that cannot be read")
    assert found[3] == "d.jsonl: found no usable rows; expected at least one pair. Fill the file or remove it."
