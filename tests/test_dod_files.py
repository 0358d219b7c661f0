"""A DoD from files: three formats, one content; every bad row has its words; a failed build changes nothing."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Self

import pyarrow
import pyarrow.parquet
import pytest
from task_files import HEAD, NO_SPLITS, ROWS, Row, build, csv_bytes, jsonl_bytes, parquet_bytes, problems

from softprompt_registry.dod.files import FilesConfig, build_dod_from_files
from softprompt_registry.dod.store import DodStore
from softprompt_registry.dod.task import Pair, Task
from softprompt_registry.errors import DataError
from softprompt_registry.recording import NullRecorder

# Formats


@pytest.mark.supports("files", "CSV, TSV, JSON, JSON Lines, NDJSON (also with `.gz`), Parquet", "read")
@pytest.mark.parametrize("rows", [ROWS, NO_SPLITS], ids=["splits", "no splits"])
def test_all_formats_give_the_same_digest(tmp_path: Path, rows: list[Row]) -> None:
    files = {
        "moods__csv": csv_bytes(rows),
        "moods__CSV": csv_bytes(rows),
        "moods__csv__gz": gzip.compress(csv_bytes(rows)),
        "moods__tsv": csv_bytes(rows, "\t"),
        "moods__tsv__gz": gzip.compress(csv_bytes(rows, "\t")),
        "moods__json": json.dumps(rows, indent=2).encode(),
        "moods__json__gz": gzip.compress(b"\xef\xbb\xbf" + json.dumps(rows).encode()),
        "moods__ndjson": jsonl_bytes(rows),
        "moods__ndjson__gz": gzip.compress(jsonl_bytes(rows)),
        "moods__jsonl": jsonl_bytes(rows),
        "moods__jsonl__gz": gzip.compress(jsonl_bytes(rows)),
        "moods__parquet": parquet_bytes(rows),
    }
    digests = {name: build(tmp_path / name, None, **{name: content})[0].digest for name, content in files.items()}
    assert len(set(digests.values())) == 1, digests


def test_what_is_stored(tmp_path: Path) -> None:
    report, tasks = build(tmp_path, None, moods__csv=csv_bytes(ROWS))
    assert tasks == {
        "moods": Task(
            name="moods",
            kind="classification",
            labels=("no", "yes"),
            pairs=tuple(Pair(row["input"], row["output"], row["split"]) for row in ROWS),
        )
    }
    assert (report.tasks, report.pairs, report.duplicates, report.skipped_rows) == (1, 8, {}, {})
    assert report.path == tmp_path / "out.dod"


def test_column_names_byte_order_mark_windows_lines_and_other_columns(tmp_path: Path) -> None:
    config = FilesConfig(input_column="text", output_column="label")
    _, tasks = build(
        tmp_path,
        config,
        a__csv=b"\xef\xbb\xbfid,label,text\r\n1,x,one\r\n\r\n2,y,two\r\n",
        b__jsonl=b'\xef\xbb\xbf{"text": "one", "label": "x", "n": [1]}\r\n\r\n{"label": "y", "text": "two"}',
        c__parquet=parquet_bytes([{"n": 1, "label": "x", "text": "one"}, {"n": 2, "label": "y", "text": "two"}]),
    )
    pairs = {name: [(pair.input, pair.output) for pair in task.pairs] for name, task in tasks.items()}
    assert pairs == dict.fromkeys("abc", [("one", "x"), ("two", "y")])


def test_parquet_dictionary_columns_and_several_batches(tmp_path: Path) -> None:
    texts = [f"text {number}" for number in range(3000)]
    labels = pyarrow.array(["ab"[number % 2] for number in range(3000)]).dictionary_encode()
    table = pyarrow.table({"input": pyarrow.array(texts, pyarrow.large_string()), "output": labels})
    tmp_path.joinpath("in").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "in" / "many.parquet", row_group_size=700)
    _, tasks = build(tmp_path / "in")
    assert [pair.input for pair in tasks["many"].pairs] == texts
    assert tasks["many"].labels == ("a", "b")


class ProgressRecorder(NullRecorder):
    """Keeps the notes of its bar."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def progress(self, title: str, total: int) -> AbstractContextManager[Self]:
        return nullcontext(self)

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.notes.append(note)


@pytest.mark.supports("files", "files with other endings, subfolders", "left out and named")
def test_other_files_are_left_out_and_listed_and_progress_is_told(tmp_path: Path) -> None:
    for folder in ("sub", "data.csv", ".git"):
        (tmp_path / folder).mkdir()
    for name in ("README.md", ".hidden.csv", "sub/c.csv", "tasks.jsonl", "x.dod.audit.html"):
        (tmp_path / name).write_text("")
    (tmp_path / "b.csv").write_bytes(csv_bytes(ROWS))
    (tmp_path / "a.jsonl").write_bytes(jsonl_bytes([{"input": "x", "output": "a long free text"}]))
    recorder = ProgressRecorder()
    for _ in range(2):  # the DoD itself and what belongs to it are not listed
        report = build_dod_from_files(
            tmp_path, tmp_path / "x.dod", config=FilesConfig(), overwrite=True, recorder=recorder
        )
        assert (report.tasks, report.pairs, report.left_out) == (2, 9, ("README.md", "data.csv/", "sub/"))
    assert recorder.notes == ["a", "b"] * 2
    with DodStore.open(report.path) as store:
        counts = store.metadata()["build"]["counts"]
    assert counts == {
        "duplicates": 0,
        "skipped_rows": {},
        "rows_with_respelled_labels": 0,
        "left_out": 3,
        "names_left_out": ["README.md", "data.csv/", "sub/"],
    }


# Kind, labels, splits, draws


def rows_with(outputs: Sequence[str]) -> list[Row]:
    return [{"input": f"text {number}", "output": output} for number, output in enumerate(outputs)]


@pytest.mark.parametrize(
    ("outputs", "config", "kind"),
    [
        (["b", "a"] * 4, FilesConfig(), "classification"),
        (["b", "a"] * 3 + ["b"], FilesConfig(), "generation"),  # 7 pairs are fewer than 4 times 2 labels
        (["a"] * 8, FilesConfig(), "generation"),  # one output is no choice
        (["two words", "three short words"] * 4, FilesConfig(), "classification"),
        (["two words", "now four short words"] * 4, FilesConfig(), "generation"),
        ([f"l{n}" for n in range(20)] * 4, FilesConfig(), "classification"),
        ([f"l{n}" for n in range(21)] * 4, FilesConfig(), "generation"),
        ([f"l{n}" for n in range(21)] * 4, FilesConfig(max_labels=21), "classification"),
    ],
)
def test_kind_is_inferred(tmp_path: Path, outputs: list[str], config: FilesConfig, kind: str) -> None:
    _, tasks = build(tmp_path, config, t__jsonl=jsonl_bytes(rows_with(outputs)))
    assert tasks["t"].kind == kind
    assert tasks["t"].labels == (tuple(sorted(set(outputs))) if kind == "classification" else ())


def test_records(tmp_path: Path) -> None:
    records = [
        {
            "name": "few",
            "labels": ["no", "yes", "maybe"],
            "split": "test",
            "hard_prompts": ["Say yes, no or maybe.", "Well?"],
            "source": "us, CC0",
        },
        {"name": "free", "kind": "generation", "labels": None, "hard_prompts": []},
        {"name": "sorted", "kind": "classification"},
    ]
    few = jsonl_bytes(ROWS[:2])
    _, tasks = build(
        tmp_path, None, tasks__jsonl=jsonl_bytes(records), few__jsonl=few, free__csv=csv_bytes(ROWS), sorted__jsonl=few
    )
    assert tasks["few"].kind == "classification" and tasks["few"].labels == ("no", "yes", "maybe")
    assert tasks["few"].split == "test" and tasks["few"].source == "us, CC0"
    assert tasks["few"].hard_prompts == ("Say yes, no or maybe.", "Well?")
    assert tasks["free"].kind == "generation" and tasks["free"].labels == () and tasks["free"].split == "train"
    assert tasks["sorted"].labels == ("no", "yes")


def test_task_split_by_share_moves_no_other_task(tmp_path: Path) -> None:
    files = {f"t{number}__csv": csv_bytes(ROWS) for number in range(60)}
    config = FilesConfig(test_share=0.25)
    _, before = build(tmp_path / "a", config, **files)
    _, after = build(tmp_path / "b", config, a_new_one__csv=csv_bytes(ROWS), **files)
    test = {name for name, task in before.items() if task.split == "test"}
    assert 8 <= len(test) <= 22
    assert {name for name, task in after.items() if task.split == "test"} - {"a_new_one"} == test
    _, other = build(tmp_path / "c", FilesConfig(test_share=0.25, seed=1), **files)
    assert {name for name, task in other.items() if task.split == "test"} != test
    _, every = build(tmp_path / "d", FilesConfig(test_share=1.0), **files)
    assert {task.split for task in every.values()} == {"test"}


def test_pair_splits_by_share_and_seed(tmp_path: Path) -> None:
    rows = jsonl_bytes(rows_with(["a", "b"] * 50))
    _, tasks = build(tmp_path, None, one__jsonl=rows, two__jsonl=rows)
    splits = {name: [pair.split for pair in task.pairs] for name, task in tasks.items()}
    assert Counter(splits["one"]) == {"train": 80, "validation": 10, "test": 10}
    assert splits["one"] != splits["two"]
    _, again = build(tmp_path, None)
    assert again == tasks
    _, halves = build(tmp_path, FilesConfig(pair_shares=(0.5, 0.0, 0.5), seed=3))
    assert Counter(pair.split for pair in halves["one"].pairs) == {"train": 50, "test": 50}


def test_draw_keeps_the_balance_of_labels_and_splits(tmp_path: Path) -> None:
    outputs = ["a"] * 60 + ["b"] * 30 + ["rare"] * 4
    rows = [{**row, "split": "test" if number % 3 == 0 else "train"} for number, row in enumerate(rows_with(outputs))]
    _, tasks = build(tmp_path, FilesConfig(max_pairs_per_task=30), t__jsonl=jsonl_bytes(rows))
    task = tasks["t"]
    assert len(task.pairs) == 30
    counts = Counter((pair.output, pair.split) for pair in task.pairs)
    assert counts["rare", "train"] >= 1 and counts["rare", "test"] >= 1
    assert abs(counts["a", "train"] - 40 * 30 / 94) <= 1 and abs(counts["b", "test"] - 10 * 30 / 94) <= 1
    order = [int(pair.input.split()[1]) for pair in task.pairs]
    assert order == sorted(order)
    _, other = build(tmp_path, FilesConfig(max_pairs_per_task=30, seed=1))
    assert other["t"] != task
    _, everything = build(tmp_path, FilesConfig(max_pairs_per_task=94))
    assert len(everything["t"].pairs) == 94


def test_duplicates_are_dropped_and_counted(tmp_path: Path) -> None:
    rows: list[Row] = [
        {"input": "same", "output": "x", "split": "train"},
        {"input": "same", "output": "x", "split": "test"},  # the first one counts, so nothing leaks into the test
        {"input": "same", "output": "y", "split": "train"},
        {"input": "same", "output": "x", "split": "train"},
    ]
    report, tasks = build(tmp_path, None, t__csv=csv_bytes(rows))
    assert tasks["t"].pairs == (Pair("same", "x"), Pair("same", "y"))
    assert report.duplicates == {"t.csv": 2} and report.pairs == 2


# Spellings of a label


@pytest.mark.supports("files", "one label in several spellings", "one label, unless `label_spelling: keep`")
def test_spellings_of_a_label_are_one_label(tmp_path: Path) -> None:
    outputs = ["Good"] * 4 + ["good ", "GOOD", "good"] + ["so  so"] * 3 + ["So so"] + ["cafe\u0301", "caf\u00e9"] * 2
    report, tasks = build(tmp_path, None, t__jsonl=jsonl_bytes(rows_with(outputs)))
    assert tasks["t"].kind == "classification" and tasks["t"].labels == ("Good", "caf\u00e9", "so so")
    assert [pair.output for pair in tasks["t"].pairs] == ["Good"] * 7 + ["so so"] * 4 + ["caf\u00e9"] * 4
    assert report.respelled_labels == {
        "t.jsonl": {
            "Good": {"GOOD": 1, "good": 1, "good ": 1},
            "so so": {"So so": 1, "so  so": 3},
            "caf\u00e9": {"cafe\u0301": 2},
        }
    }
    with DodStore.open(report.path) as store:
        assert store.metadata()["build"]["counts"]["rows_with_respelled_labels"] == 9
    config = FilesConfig(label_spelling="keep")
    record = jsonl_bytes([{"name": "t", "kind": "classification"}])
    report, tasks = build(tmp_path, config, tasks__jsonl=record)
    assert set(tasks["t"].labels) == set(outputs) and report.respelled_labels == {}


@pytest.mark.parametrize(
    ("outputs", "labels"),
    [
        (["a", "b"] * 4 + ["A", "B"] * 4, ("A", "B")),  # equally frequent: the first in the alphabet
        (["x", "X", "X "] * 4, ("X", "x")),  # nothing but case tells them apart
        ([" x", "y\t"] * 4, ("x", "y")),
    ],
)
def test_which_spelling_stands(outputs: list[str], labels: tuple[str, ...], tmp_path: Path) -> None:
    _, tasks = build(tmp_path, None, t__jsonl=jsonl_bytes(rows_with(outputs)))
    assert tasks["t"].labels == labels


def test_a_record_says_how_its_labels_are_spelled(tmp_path: Path) -> None:
    record = jsonl_bytes([{"name": "t", "labels": ["YES", "no", "A", "a"]}])
    rows = jsonl_bytes(rows_with(["yes", "Yes", "no", "A", "a"]))
    report, tasks = build(tmp_path, None, tasks__jsonl=record, t__jsonl=rows)
    assert [pair.output for pair in tasks["t"].pairs] == ["YES", "YES", "no", "A", "a"]
    assert report.respelled_labels == {"t.jsonl": {"YES": {"Yes": 1, "yes": 1}}}
    bad = jsonl_bytes(rows_with(["yes", " a"]))  # which of the two it is cannot be told
    (found,) = problems(tmp_path / "bad", None, tasks__jsonl=record, t__jsonl=bad)
    assert found.startswith("t.jsonl, line 2: found output ' a'; expected one of the task's labels")


def test_pairs_that_became_equal_are_duplicates(tmp_path: Path) -> None:
    rows = [{"input": "same", "output": output, "split": split} for output, split in (("x", "train"), ("X ", "test"))]
    rows += [{"input": f"text {n}", "output": "xy"[n % 2], "split": "test"} for n in range(8)]
    report, tasks = build(tmp_path, None, t__jsonl=jsonl_bytes(rows))
    assert tasks["t"].pairs[:2] == (Pair("same", "x", "train"), Pair("text 0", "x", "test"))
    assert report.duplicates == {"t.jsonl": 1} and report.pairs == 9


# The output


def test_failing_build_leaves_the_old_dod_untouched(tmp_path: Path) -> None:
    build(tmp_path, None, a__csv=HEAD)
    before = (tmp_path / "out.dod").read_bytes()
    (tmp_path / "b.csv").write_bytes(b"input,output\n,\n")
    with pytest.raises(DataError, match="nothing was written"):
        build_dod_from_files(tmp_path, tmp_path / "out.dod", config=FilesConfig(), overwrite=True)
    assert (tmp_path / "out.dod").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "b.csv", "out.dod"]


def test_interrupted_build_leaves_the_old_dod_untouched(tmp_path: Path) -> None:
    build(tmp_path, None, a__csv=HEAD, b__csv=HEAD)
    before = (tmp_path / "out.dod").read_bytes()
    for name in ("out.dod.building", "out.dod.building-wal", "out.dod.building-shm"):  # left by a killed build
        (tmp_path / name).write_bytes(b"left over")

    class Interrupting(ProgressRecorder):
        def advance(self, steps: int = 1, note: str = "") -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_dod_from_files(
            tmp_path, tmp_path / "out.dod", config=FilesConfig(), overwrite=True, recorder=Interrupting()
        )
    assert (tmp_path / "out.dod").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "b.csv", "out.dod"]


def test_existing_output_needs_overwrite(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(HEAD)
    (tmp_path / "old.dod").write_text("mine")
    with pytest.raises(DataError) as error:
        build_dod_from_files(tmp_path, tmp_path / "old.dod", config=FilesConfig())
    assert str(error.value) == (
        f"building a DoD from the files in {str(tmp_path)!r}: {str(tmp_path / 'old.dod')!r} exists already; expected a new "
        "name. Choose another one, or allow overwriting if it is an old DoD."
    )
    assert (tmp_path / "old.dod").read_text() == "mine"
    with pytest.raises(DataError, match="exists already"):
        build_dod_from_files(tmp_path, tmp_path, config=FilesConfig(), overwrite=True)
