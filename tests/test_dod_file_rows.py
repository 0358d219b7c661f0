"""Bad rows and bad records of task files: each has its words, its place, and its way past."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from task_files import GOOD, HEAD, ROWS, build, jsonl_bytes, parquet_bytes, problems

from softprompt_registry.dod.files import FilesConfig, build_dod_from_files
from softprompt_registry.errors import DataError


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "t.jsonl",
            GOOD + b'{"input": "x", "label": "y"}\n',
            "t.jsonl, line 2: found no 'output' among ['input', 'label']; expected 'input' and 'output'. "
            "Add it, or name the right column in the config.",
        ),
        (
            "t.csv",
            b"text;label\na;b\n",
            "t.csv, line 1: found the columns ['text;label'] without ['input', 'output']; expected ['input', 'output'], "
            "separated by commas. Add a header, or name the right columns in the config.",
        ),
        (
            "t.csv",
            b"",
            "t.csv, line 1: found the columns [] without ['input', 'output']; expected ['input', 'output'], separated by "
            "commas. Add a header, or name the right columns in the config.",
        ),
        (
            "t.csv",
            b"input,output,input\na,b,c\n",
            "t.csv, line 1: found columns ['input'] twice; expected each column once. Remove or rename one.",
        ),
        (
            "t.jsonl",
            GOOD + b'{"input": "x", "output": "y", "input": "z"}\n',
            "t.jsonl, line 2: found the key 'input' twice; expected each key once. Remove one of them.",
        ),
        (
            "t.csv",
            HEAD + b'"a\nb",ok\n ,ok\n',
            "t.csv, line 5: found an empty 'input'; expected some text. Fill it or remove the row.",
        ),
        (
            "t.jsonl",
            GOOD + b'\n{"input": "x", "output": null}\n',
            "t.jsonl, line 3: found an empty 'output'; expected some text. Fill it or remove the row.",
        ),
        (
            "t.jsonl",
            GOOD + b'{"input": "x", "output": 3}\n',
            "t.jsonl, line 2: found int 3 as 'output'; expected a string. Write it as a string, \"3\".",
        ),
        (
            "t.jsonl",
            GOOD + b'{"input": ["x"], "output": "y"}\n',
            "t.jsonl, line 2: found list ['x'] as 'input'; expected a string. Write it as a string.",
        ),
        (
            "t.jsonl",
            GOOD + b'{"input": "x", "output"\n',
            "t.jsonl, line 2: found broken JSON (Expecting ':' delimiter: line 2 column 1 (char 24)); expected one JSON "
            "object on the line. Correct the line.",
        ),
        (
            "t.jsonl",
            b"[" * 100_000 + b"\n" + GOOD,
            "t.jsonl, line 1: found broken JSON (maximum recursion depth exceeded",
        ),
        (
            "t.jsonl",
            b'["x", "y"]\n' + GOOD,
            't.jsonl, line 1: found a JSON list; expected an object in braces. Write {"input": …, "output": …}.',
        ),
        (
            "t.jsonl",
            GOOD + b'{"input": "caf\xe9", "output": "y"}\n',
            "t.jsonl, line 2: found bytes that are not UTF-8; expected UTF-8 text. Save the file as UTF-8.",
        ),
        (
            "t.jsonl",
            GOOD + b'{"input": "x", "output": "\\ud83d"}\n',
            "t.jsonl, line 2: found characters in 'output' that are not Unicode; expected UTF-8 text. "
            "Save the file as UTF-8.",
        ),
        (
            "t.csv",
            HEAD + b"caf\xe9,ok\n",
            "t.csv, line 3: found bytes that are not UTF-8; expected UTF-8 text. Save the file as UTF-8.",
        ),
        (
            "t.csv",
            "input,output\nx,y\n".encode("utf-16"),
            "t.csv, line 1: found bytes that are not UTF-8; expected UTF-8 text. Save the file as UTF-8.",
        ),
        (
            "t.csv",
            b"input,output,split\na,b,train\nc,d,dev\n",
            "t.csv, line 3: found split 'dev'; expected one of ['train', 'validation', 'test']. Correct the word.",
        ),
        (
            "t.csv",
            b"input,output,split\na,b,\n",
            "t.csv, line 2: found split ''; expected one of ['train', 'validation', 'test']. Correct the word.",
        ),
        (
            "t.jsonl",
            b'{"input": "x", "output": "y", "split": "test"}\n' + GOOD,
            "t.jsonl, line 2: found no split; expected a split, as in the rows above. Give every row a split, or none.",
        ),
        (
            "t.jsonl",
            GOOD + b'{"input": "x", "output": "y", "split": "test"}\n',
            "t.jsonl, line 2: found split 'test'; expected no split, as in the rows above. "
            "Give every row a split, or none.",
        ),
        (
            "t.csv",
            HEAD + b"a, b,c\n",
            "t.csv, line 3: found 3 cells; expected 2, as in the header ['input', 'output']. "
            "Put quotes around a cell that has a comma in it.",
        ),
        (
            "t.csv",
            HEAD + b"a\n",
            "t.csv, line 3: found 1 cell; expected 2, as in the header ['input', 'output']. "
            "Put quotes around a cell that has a comma in it.",
        ),
        (
            "t.csv",
            HEAD + b'"a" said,ok\n',
            't.csv, line 3: found broken quotes (\',\' expected after \'"\'); expected cells in "double quotes", with "" '
            "for a quote inside them. Close the quotes, and double those inside a cell.",
        ),
        (
            "t.csv",
            HEAD + b'"a,ok\nb,ok\nc,ok\n',
            "t.csv, line 3: found broken quotes (unexpected end of data); ",
        ),
        (
            "t.csv",
            HEAD + b"x" * (2**24 + 1) + b",ok\n",
            "t.csv, line 3: found a cell of more than 16,777,216 characters; expected shorter ones. Shorten it, or close the "
            "quotes: an open quote makes one cell of all that follows.",
        ),
        (
            "t.csv",
            "input,output\na,b\n".encode("utf-16-le"),
            "t.csv, line 1: found NUL bytes, as UTF-16 has them; expected UTF-8 text. Save the file as UTF-8.",
        ),
        (
            "t.tsv",
            HEAD,
            "t.tsv, line 1: found the columns ['input,output'] without ['input', 'output']; expected ['input', 'output'], "
            "separated by tabs. Add a header, or name the right columns in the config.",
        ),
        (
            "t.tsv",
            b"input\toutput\na\tb\tc\n",
            "t.tsv, line 2: found 3 cells; expected 2, as in the header ['input', 'output']. "
            "Put quotes around a cell that has a tab in it.",
        ),
        (
            "t.json",
            b'{"input": ["x"], "output": ["y"]}',
            't.json, row 1: found a JSON dict; expected one list of objects. Write [{"input": …, "output": …}, …].',
        ),
        (
            "t.json",
            GOOD + GOOD,
            "t.json, row 1: found broken JSON (Extra data: line 2 column 1 (char 34)); expected one list of objects. "
            "Correct the file, or call it .jsonl if each of its lines is an object.",
        ),
        (
            "t.json",
            b'[{"input": "x", "output": "y"}, {"input": "x"}]',
            "t.json, row 2: found no 'output' among ['input']; expected 'input' and 'output'. "
            "Add it, or name the right column in the config.",
        ),
        (
            "t.json",
            b'["x"]',
            't.json, row 1: found a JSON str; expected an object in braces. Write {"input": …, "output": …}.',
        ),
        ("t.json", b"[" * 100_000, "t.json, row 1: found broken JSON (maximum recursion depth exceeded"),
        (
            "t.json.gz",
            GOOD,
            "t.json.gz, row 1: found a file that cannot be read (Not a gzipped file (b'{\"')); expected a",
        ),
        ("t.csv", HEAD[:13], "t.csv: found no usable rows; expected at least one pair. Fill the file or remove it."),
        ("t.jsonl", b"\n \n", "t.jsonl: found no usable rows; expected at least one pair. Fill the file or remove it."),
        (
            "t.parquet",
            parquet_bytes([{"input": "a", "output": "b"}, {"input": "c", "output": None}]),
            "t.parquet, row 2: found an empty 'output'; expected some text. Fill it or remove the row.",
        ),
        (
            "t.parquet",
            parquet_bytes([{"input": "a", "output": 4.5}]),
            "t.parquet, row 1: found float 4.5 as 'output'; expected a string. Write it as a string, \"4.5\".",
        ),
        (
            "t.parquet",
            parquet_bytes([{"input": "a", "label": "b"}]),
            "t.parquet, row 1: found the columns ['input', 'label'] without ['output']; expected ['input', 'output']. ",
        ),
        ("t.parquet", b"input,output\n", "t.parquet, row 1: found a file that cannot be read (Parquet magic bytes not"),
        ("t.parquet", parquet_bytes(ROWS)[:-9], "t.parquet, row 1: found a file that cannot be read ("),
        (
            "t.csv.gz",
            HEAD,
            "t.csv.gz, line 1: found a file that cannot be read (Not a gzipped file (b'in')); expected a",
        ),
        (
            "t.jsonl.gz",
            gzip.compress(GOOD, mtime=0)[:12],
            "t.jsonl.gz, line 1: found a file that cannot be read (Compressed file ended before the end-of-stream",
        ),
        ("t#1.csv", HEAD, "t#1.csv: reading a task: its name is 't#1'; a name is not empty, has no '#'"),
    ],
    ids=lambda value: value.split("; ")[0][:60] if isinstance(value, str) else "",
)
def test_bad_rows(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (found,) = problems(tmp_path, None, **{name.replace(".", "__"): content})
    assert found.startswith(expected)
    if expected.endswith("."):
        assert found == expected


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
        (
            {"name": "t", "label": ["a"], "hard_prompt": "x"},
            "found unknown keys ['hard_prompt', 'label']; expected only ['name', 'kind', 'split', 'labels', "
            "'hard_prompts', 'source']. Correct or remove them.",
        ),
        ({"kind": "generation"}, "found name None; expected the name of a task as a string. Correct it."),
        ({"name": 3}, "found name 3; expected the name of a task as a string. Correct it."),
        (
            {"name": "T"},
            "found task 'T', for which the folder has no file; expected one of the tasks with a file, ['t']. "
            "Correct the name or add 'T.jsonl'.",
        ),
        ({"name": "t", "kind": "qa"}, "found kind 'qa'; expected one of ['classification', 'generation']. Correct it."),
        ({"name": "t", "split": ["test"]}, "found split ['test']; expected one of ['train', 'test']. Correct it."),
        (
            {"name": "t", "labels": "a, b"},
            "found labels 'a, b'; expected a list of strings that are not empty. Correct it.",
        ),
        (
            {"name": "t", "hard_prompts": ["x", ""]},
            "found hard_prompts ['x', '']; expected a list of strings that are not empty. Correct it.",
        ),
        (
            {"name": "t", "labels": ["a"]},
            "found labels ['a']; expected at least two labels, each once. Correct the list.",
        ),
        (
            {"name": "t", "labels": ["a", "b", "a"]},
            "found labels ['a', 'b', 'a']; expected at least two labels, each once. Correct the list.",
        ),
        (
            {"name": "t", "labels": ["a", "b"], "kind": "generation"},
            "found labels on a generation task; expected labels on classification tasks only. "
            "Remove labels or the kind.",
        ),
        ({"name": "t", "source": 5}, "found source 5; expected a string that is not empty. Correct it."),
        (["t"], 'found a JSON list; expected an object in braces. Write {"input": …, "output": …}.'),
    ],
)
def test_bad_records(tmp_path: Path, record: object, expected: str) -> None:
    for skip_bad_rows in (False, True):  # a record is never skipped
        config = FilesConfig(skip_bad_rows=skip_bad_rows)
        assert problems(tmp_path, config, t__csv=HEAD, tasks__jsonl=b"\n" + jsonl_bytes([record])) == [
            f"tasks.jsonl, line 2: {expected}"
        ]


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
