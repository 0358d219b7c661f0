"""The DoD store: what goes in comes out, whole or not at all, and the digest says whether two DoDs are the same."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from full_disk import files_up_to

from softprompt_registry.dod.store import APPLICATION_ID, DodStore, dod_written_whole
from softprompt_registry.dod.task import Pair, Task, assign_pair_splits, fill_template, split_pairs_by_input
from softprompt_registry.errors import DataError

MOODS = Task(
    name="moods",
    kind="classification",
    split="test",
    labels=("sunny", "gloomy"),
    hard_prompts=("Say sunny or gloomy.", "Which mood, sunny or gloomy?"),
    source="written here",
    pairs=(
        Pair("What a day!", "sunny"),
        Pair("It's over…\n\tfor good, 雨", "gloomy", "validation"),
        Pair('"Ha", he said', "sunny", "test"),
    ),
)
SHOUT = Task(name="shout", kind="generation", pairs=(Pair("hey", "HEY"), Pair("you", "YOU", "test")))


def build(path: Path, *tasks: Task) -> str:
    with DodStore.create(path) as store:
        for task in tasks:
            store.add_task(task)
        return store.digest


def test_round_trip(tmp_path: Path) -> None:
    digest = build(tmp_path / "new" / "small.dod", MOODS, SHOUT)
    with DodStore.open(tmp_path / "new" / "small.dod") as store:
        assert list(store.tasks()) == [MOODS, SHOUT]
        assert store.task("shout") == SHOUT
        assert store.task_names("train") == ["shout"]
        assert [task.name for task in store.tasks("test")] == ["moods"]
        assert store.digest == digest
        tasks = [
            {"name": task.name, "kind": task.kind, "split": task.split, "num_pairs": len(task.pairs)}
            | {"digest": task.digest, "source": task.source}
            for task in (MOODS, SHOUT)
        ]
        about = {"format_version": 1, "name": "small", "digest": digest, "metadata": {}}
        assert store.manifest() == {**about, "num_tasks": 2, "num_pairs": 5, "tasks": tasks}


def test_digest_does_not_depend_on_the_order_of_tasks_and_pairs(tmp_path: Path) -> None:
    reversed_moods = dataclasses.replace(MOODS, pairs=MOODS.pairs[::-1], source="copied")
    assert build(tmp_path / "a.dod", MOODS, SHOUT) == build(tmp_path / "b.dod", SHOUT, reversed_moods)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "mood"},
        {"split": "train"},
        {"labels": ("gloomy", "sunny")},
        {"labels": ("sunny", "gloomy", "mixed")},
        {"hard_prompts": MOODS.hard_prompts[::-1]},
        {"hard_prompts": MOODS.hard_prompts[:1]},
        {"kind": "generation"},
        {"pairs": MOODS.pairs[:2]},
        {"pairs": (*MOODS.pairs, MOODS.pairs[0])},
        {"pairs": (*MOODS.pairs[:2], Pair('"Ha", he says', "sunny", "test"))},
        {"pairs": (*MOODS.pairs[:2], Pair('"Ha", he said', "gloomy", "test"))},
        {"pairs": (*MOODS.pairs[:2], Pair('"Ha", he said', "sunny", "validation"))},
    ],
    ids=lambda change: next(iter(change)),
)
def test_digest_changes_with_every_field(tmp_path: Path, change: dict[str, object]) -> None:
    changed = dataclasses.replace(MOODS, **change)  # type: ignore[arg-type]
    assert build(tmp_path / "a.dod", MOODS) != build(tmp_path / "b.dod", changed)


def test_digest_is_that_of_canonical_json_whatever_the_characters() -> None:
    """The rule of docs/formats.md, told with the standard library alone."""

    def sha256_of_json(value: object) -> str:
        text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    odd = [
        *(chr(code) for code in range(0x250)),
        "\u2028",
        "\u2029",
        "\ufeff",
        "\uffff",
        "\U0001f600",
        "雨",
        "</script>",
    ]
    for last in (odd, [*odd, "\udc80"]):  # JSON writes a lone surrogate as it is
        pairs = tuple(Pair(f"a{text}b", text + "c") for text in last)
        task = Task(name="odd", kind="generation", pairs=pairs, hard_prompts=('\t\\ "',))
        digests = sorted(sha256_of_json(["train", pair.input, pair.output]) for pair in pairs)
        expected = {
            "name": "odd",
            "kind": "generation",
            "labels": [],
            "hard_prompts": list(task.hard_prompts),
            "pairs": digests,
        }
        assert task.digest == sha256_of_json(expected)


KILLED_WRITER = """
import os, signal, sys
from collections import Counter
from pathlib import Path
from softprompt_registry.dod.store import DodStore
from softprompt_registry.dod.task import Pair, Task

class DeadlyPairs(tuple):
    armed = False
    def __getitem__(self, place):
        if self.armed and isinstance(place, slice) and place.start >= 2000:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(place)

store = DodStore.create(Path(sys.argv[1]))
store.add_task(Task(name="whole", kind="generation", pairs=(Pair("hey", "HEY"),)))
long = "x" * 4000  # 8 MB in all, more than the page cache holds, so that some of it is on the disk when the writer dies
second = Task(name="half", kind="generation", pairs=DeadlyPairs(Pair(f"{n} {long}", "y") for n in range(3000)))
second.digest
DeadlyPairs.armed = True
store.add_task(second)
"""


def test_killed_writer_leaves_whole_tasks(tmp_path: Path) -> None:
    path = tmp_path / "killed.dod"
    result = subprocess.run([sys.executable, "-c", KILLED_WRITER, str(path)], timeout=120)
    assert result.returncode == -signal.SIGKILL
    assert path.with_name("killed.dod-wal").stat().st_size > 1_000_000
    whole = Task(name="whole", kind="generation", pairs=(Pair("hey", "HEY"),))
    with DodStore.open(path) as store:
        assert list(store.tasks()) == [whole]
        assert store.digest == build(tmp_path / "whole.dod", whole)


def test_failed_task_leaves_nothing_and_the_next_one_goes_in(tmp_path: Path) -> None:
    bad_split = Task(name="bad", kind="generation", pairs=(Pair("a", "b"), Pair("c", "d", "dev")))  # type: ignore[arg-type]
    with DodStore.create(tmp_path / "a.dod") as store:
        with pytest.raises(sqlite3.IntegrityError):
            store.add_task(bad_split)
        store.add_task(SHOUT)
        assert list(store.tasks()) == [SHOUT]


def test_finished_dod_is_one_plain_file_and_reading_adds_none(tmp_path: Path) -> None:
    """Bug: the file stayed in WAL mode, so that each reader left a `-wal` and a `-shm` file beside it."""
    path = tmp_path / "plain.dod"
    build(path, MOODS)
    with DodStore.open(path) as store:
        assert store.task_names() == ["moods"]
        assert [file.name for file in tmp_path.iterdir()] == ["plain.dod"]


def test_writer_closes_while_another_connection_reads(tmp_path: Path) -> None:
    with DodStore.create(tmp_path / "a.dod") as writer:
        writer.add_task(SHOUT)
        with DodStore.open(tmp_path / "a.dod") as reader:
            writer.close()
            assert reader.task("shout") == SHOUT


def test_read_only_folder(tmp_path: Path) -> None:
    folder = tmp_path / "frozen"
    digest = build(folder / "a.dod", MOODS, SHOUT)
    (folder / "a.dod").chmod(0o444)
    folder.chmod(0o555)
    try:
        with DodStore.open(folder / "a.dod") as store:
            assert store.digest == digest
            assert list(store.tasks()) == [MOODS, SHOUT]
    finally:
        folder.chmod(0o755)


def test_unknown_task_lists_the_known_ones(tmp_path: Path) -> None:
    path = tmp_path / "ten.dod"
    build(path, *(dataclasses.replace(SHOUT, name=f"t{number}") for number in range(10)))
    with DodStore.open(path) as store, pytest.raises(DataError) as error:
        store.task("moods")
    assert str(error.value) == (
        "reading task 'moods' of DoD 'ten': there is no task of that name among its 10 "
        "(t0, t1, t2, t3, t4, t5, t6, t7, …). Correct the name."
    )


def test_a_name_is_taken_once(tmp_path: Path) -> None:
    with DodStore.create(tmp_path / "a.dod") as store:
        store.add_task(SHOUT)
        with pytest.raises(DataError, match="adding task 'shout' to DoD 'a': a task of that name is there already"):
            store.add_task(dataclasses.replace(MOODS, name="shout"))
        assert list(store.tasks()) == [SHOUT]


def test_not_a_dod(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file. Build one with `softprompt build-dod`"):
        DodStore.open(tmp_path / "a.dod")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "text.dod").write_text("input,output\n" * 100)
    with pytest.raises(DataError, match="SQLite cannot read it .*Build it again"):
        DodStore.open(tmp_path / "text.dod")
    (tmp_path / "empty.dod").touch()
    with pytest.raises(DataError, match="found application id 0x0 and format version 0; expected 0x446f4431 and 1"):
        DodStore.open(tmp_path / "empty.dod")
    with pytest.raises(DataError, match="the file exists already. Choose another name or remove it"):
        DodStore.create(tmp_path / "text.dod")


def test_other_format_version(tmp_path: Path) -> None:
    path = tmp_path / "a.dod"
    build(path, SHOUT)
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
    connection.execute("PRAGMA user_version = 2")
    connection.close()
    with pytest.raises(DataError, match="format version 2; expected 0x446f4431 and 1. Build it with this version"):
        DodStore.open(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "bank#3"}, "its name is 'bank#3'"),
        ({"name": " moods"}, "its name is ' moods'"),
        ({"kind": "regression"}, "found kind 'regression' and split 'test'"),
        ({"split": "dev"}, "splits are \\['train', 'test'\\]"),
        ({"pairs": ()}, "it has no pairs"),
        ({"labels": ("sunny", "sunny")}, "needs at least two distinct ones"),
        ({"labels": ("sunny", "rainy")}, "outputs \\['gloomy'\\] are not among its labels \\['sunny', 'rainy'\\]"),
    ],
)
def test_task_errors(change: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        dataclasses.replace(MOODS, **change)  # type: ignore[arg-type]


def test_ground_truth_and_template() -> None:
    assert MOODS.ground_truth == "sunny, gloomy"
    assert SHOUT.ground_truth == ""
    assert dataclasses.replace(SHOUT, hard_prompts=("Shout.", "Louder.")).ground_truth == "Shout."
    assert fill_template(MOODS.template, "{x} {y}") == "Sentence: {x} {y} Label:"
    assert [pair.input for pair in MOODS.pairs_of("train")] == ["What a day!"]


@pytest.mark.parametrize(
    ("count", "shares", "expected"),
    [
        (0, (0.8, 0.1, 0.1), (0, 0, 0)),
        (1, (0.8, 0.1, 0.1), (1, 0, 0)),
        (2, (0.8, 0.1, 0.1), (2, 0, 0)),
        (3, (0.8, 0.1, 0.1), (1, 1, 1)),
        (100, (0.8, 0.1, 0.1), (80, 10, 10)),
        (10, (1.0, 0.0, 0.0), (10, 0, 0)),
        # Bug: both shares were rounded up, which gave four splits to three pairs, or no pair to train on.
        (3, (0.0, 0.5, 0.5), (0, 1, 2)),
        (3, (0.02, 0.49, 0.49), (1, 1, 1)),
    ],
)
def test_pair_splits_by_shares(count: int, shares: tuple[float, float, float], expected: tuple[int, int, int]) -> None:
    splits = assign_pair_splits(count, shares, seed=5)
    assert tuple(splits.count(name) for name in ("train", "validation", "test")) == expected
    assert splits == assign_pair_splits(count, shares, seed=5)


def test_pair_splits_refuse_shares_that_are_not_shares() -> None:
    with pytest.raises(DataError, match="expected three numbers >= 0 that add up to 1"):
        assign_pair_splits(10, (0.8, 0.1), seed=0)
    assert assign_pair_splits(100, (0.8, 0.1, 0.1), 1) != assign_pair_splits(100, (0.8, 0.1, 0.1), 2)


# --- A DoD that is written whole ---


def write_large(path: Path) -> None:
    with dod_written_whole(path, "building", overwrite=True) as store:
        for number in range(20):
            pairs = tuple(Pair("word " * 200, str(place)) for place in range(100))
            store.add_task(Task(name=f"t{number}", kind="generation", pairs=pairs))


def test_a_disk_that_is_full_at_the_last_step(tmp_path: Path) -> None:
    """Bug: what SQLite could not move out of its journal was lost, and half a DoD took the place of the old one."""
    path = tmp_path / "large.dod"
    write_large(path)
    content = path.read_bytes()
    with pytest.raises(DataError, match=r"building: writing '.*large.dod.building' failed .*Make room on the disk"):
        with files_up_to(len(content) - 10_000):
            write_large(path)
    assert path.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == ["large.dod"]


@pytest.mark.parametrize("num_bytes", [10, 50_000, 500_000])
def test_a_disk_that_is_full_before(tmp_path: Path, num_bytes: int) -> None:
    with pytest.raises(DataError, match="(disk I/O error|full).*nothing was left there"), files_up_to(num_bytes):
        write_large(tmp_path / "large.dod")
    assert list(tmp_path.iterdir()) == []


def test_pairs_with_the_same_input_share_a_split() -> None:
    inputs = [f"Text {number % 40}" if number < 80 else f"other {number}" for number in range(100)] + [" text  7 "]
    splits = split_pairs_by_input(inputs, (0.5, 0.25, 0.25), seed=3)
    assert split_pairs_by_input(inputs[:40], (0.8, 0.1, 0.1), 5) == assign_pair_splits(40, (0.8, 0.1, 0.1), 5)
    by_input: dict[str, set[str]] = {}
    for text, split in zip(inputs, splits, strict=True):
        by_input.setdefault(" ".join(text.lower().split()), set()).add(split)
    assert {len(found) for found in by_input.values()} == {1}
    # 60 different inputs: 30, 15 and 15 of them.
    assert Counter(split for found in by_input.values() for split in found) == {
        "train": 30,
        "validation": 15,
        "test": 15,
    }


KILLED_NOTE = """
import os, signal, sqlite3, sys

connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA cache_size = 1")  # so that half of the change reaches the file before the commit
connection.execute("BEGIN IMMEDIATE")
connection.execute("UPDATE examples SET input = 'changed' || input")
connection.execute("INSERT INTO metadata VALUES ('audit', ?)", ("x" * 500_000,))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_note_is_taken_back_by_the_next_reader(tmp_path: Path) -> None:
    path = tmp_path / "a.dod"
    many = Task(name="many", kind="generation", pairs=tuple(Pair(f"text {n} {'x' * 50}", "y") for n in range(2000)))
    digest = build(path, many)
    assert subprocess.run([sys.executable, "-c", KILLED_NOTE, str(path)], timeout=60).returncode == -signal.SIGKILL
    assert path.with_name("a.dod-journal").exists()
    with DodStore.open(path) as store:
        assert list(store.tasks()) == [many] and store.metadata() == {} and store.digest == digest
    assert not path.with_name("a.dod-journal").exists()
