"""The General DoD: exactly the right pairs from three layouts, damage named and left out."""

from __future__ import annotations

import gzip
import json
import random
import sys
import tracemalloc
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from task_files import jsonl_bytes, parquet_bytes
from tiny_llm import bos_writing_tokenizer, tiny_base_model, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from softprompt_registry.dod import general
from softprompt_registry.dod.general import GeneralConfig, GeneralReport, TaskRow, build_dod_general
from softprompt_registry.dod.store import DodStore
from softprompt_registry.dod.task import Task
from softprompt_registry.errors import DataError

SHARED = Path(__file__).parents[2] / "shared" / "data" / "super_natural"
SMALL = GeneralConfig(min_pairs=1)
ENGLISH = {key: ["English"] for key in ("Input_language", "Output_language", "Instruction_language")}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


def raw_task(instances: Any, definition: Any = "Do it.", **other: Any) -> dict[str, Any]:
    """A task file's object as the repository has it."""
    return {
        "Source": ["quoref"],
        "Categories": ["Question Generation"],
        "Definition": definition,
        **ENGLISH,
        "Positive Examples": [{"input": "example", "output": "no pair", "explanation": "because"}],
        "Instances": instances,
        "Instance License": ["CC BY 4.0"],
        **other,
    }


def instance(text: Any, *outputs: Any) -> dict[str, Any]:
    return {"id": f"task-{text!s:.8}", "input": text, "output": list(outputs)}


def numbered(count: int, word: str = "text") -> list[dict[str, Any]]:
    return [instance(f"{word} {number}", f"answer {number}") for number in range(count)]


def write_repository(
    folder: Path,
    files: Mapping[str, Any],
    *,
    test: Sequence[str] = (),
    excluded: Sequence[str] = (),
    unlisted: Sequence[str] = (),
) -> Path:
    """A copy of the repository; values are a task's object or the bytes of its file. What is on no list is for training."""
    (folder / "tasks").mkdir(parents=True)
    for name, content in files.items():
        data = content if isinstance(content, bytes) else json.dumps(content, indent=4).encode()
        (folder / "tasks" / f"{name}.json").write_bytes(data)
    splits = folder / "splits" / "default"
    splits.mkdir(parents=True)
    train = [name for name in files if name not in {*test, *excluded, *unlisted}]
    for side, names in (("train", train), ("test", test), ("excluded", excluded)):
        (splits / f"{side}_tasks.txt").write_text("".join(f"{name}\n" for name in names))
    return folder


def build(
    source: Path | str,
    tokenizer: PreTrainedTokenizerFast,
    config: GeneralConfig = SMALL,
    out: Path | None = None,
) -> tuple[GeneralReport, dict[str, Task]]:
    out = out or Path(source) / "out.dod"
    report = build_dod_general(source, out, tokenizer=tokenizer, config=config, overwrite=True)
    with DodStore.open(out) as store:
        assert store.digest == report.digest
        assert store.metadata()["build"]["totals"] == report.totals()
        tasks = {task.name: task for task in store.tasks()}
    for row in report.rows:
        assert row.pairs == row.empty + row.duplicates + row.too_long + row.available
        assert row.drawn == (len(tasks[row.name].pairs) if row.kept else 0)
    return report, tasks


def pairs_of(task: Task) -> set[tuple[str, str, int | None]]:
    assert len({(pair.input, pair.output) for pair in task.pairs}) == len(task.pairs)
    return {(pair.input, pair.output, pair.num_tokens) for pair in task.pairs}


# The pairs

ODD_INSTANCES: list[Any] = [
    instance("two outputs", "one", "two"),
    {"id": "1", "input": "plain string", "output": "yes"},
    {"id": "2", "input": "no id needed", "output": ["ok"]},
    instance("two outputs", "one"),  # the second time
    instance("same twice inside", "x", "x"),
    instance("empty output", "", " \n"),
    instance("  ", "empty input"),
    instance("é" * 150, "a" * 100),  # 300 bytes and 100: exactly 400 tokens of the byte-level tokenizer
    instance("é" * 150, "a" * 101),
    instance("<eos>" * 398, "ok"),  # 1,992 characters, but 400 tokens
    instance("word " * 20_000, "a long input"),
    instance("b" * 1999, "2000 characters are not dropped unseen"),
    instance(" kept as it is \n", "\tso"),
    {"id": "3", "output": ["no input"]},
    {"id": "4", "input": "no output"},
    {"id": "5", "input": ["a", "list"], "output": ["x"]},
    {"id": "6", "input": "a number", "output": 3},
    {"id": "7", "input": "a number among texts", "output": ["x", 3]},
    {"id": "8", "input": "nothing to learn", "output": []},
    {"id": "9", "input": "half a pair \ud83d", "output": ["x"]},
    {"id": "10", "input": "the other half", "output": ["\ude00"]},
    instance("a whole pair \U0001f600", "x"),
    "not an object",
    None,
]
ODD_PAIRS = {
    ("two outputs", "one", 14),
    ("two outputs", "two", 14),
    ("plain string", "yes", 15),
    ("no id needed", "ok", 14),
    ("same twice inside", "x", 18),
    ("é" * 150, "a" * 100, 400),
    ("<eos>" * 398, "ok", 400),
    (" kept as it is \n", "\tso", 19),
    ("a whole pair \U0001f600", "x", 18),
}


def test_exactly_the_right_pairs(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    report, tasks = build(write_repository(tmp_path, {"task1_odd": raw_task(ODD_INSTANCES)}), tokenizer)
    assert pairs_of(tasks["task1_odd"]) == ODD_PAIRS
    assert report.rows == (
        TaskRow(
            name="task1_odd",
            split="train",
            status="kept",
            instances=24,
            bad_instances=10,
            pairs=17,
            empty=3,
            duplicates=2,
            too_long=3,
            available=9,
            drawn=9,
        ),
    )
    assert report.skipped == {}
    task = tasks["task1_odd"]
    assert (task.kind, task.split, task.labels) == ("generation", "train", ())
    assert task.hard_prompts == ("Do it.",) and task.source == "Super-NaturalInstructions: quoref (CC BY 4.0)"


def test_sides_and_reasons(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    files = {
        "train": raw_task(numbered(6), " Do it. \n"),
        "test": raw_task(numbered(6), ["Write a headline.", "", "Write a short summary.", "Write a headline. "]),
        "excluded": raw_task(numbered(6)),
        "nowhere": raw_task(numbered(6)),
        "small": raw_task([*numbered(4), *numbered(4)]),
        "german": raw_task(numbered(6), Output_language=["German"]),
        "both": raw_task(numbered(6), Input_language=["English", "German"]),
    }
    folder = write_repository(tmp_path, files, test=["test"], excluded=["excluded"], unlisted=["nowhere"])
    report, tasks = build(folder, tokenizer, GeneralConfig(min_pairs=5))
    assert {name: (task.split, *task.hard_prompts) for name, task in tasks.items()} == {
        "train": ("train", "Do it."),
        "test": ("test", "Write a headline.", "Write a short summary."),
    }
    assert {row.name: (row.split, row.status, row.reason, row.available) for row in report.rows} == {
        "both": ("train", "other language", "Input_language ['English', 'German']", 6),
        "excluded": ("", "excluded", "excluded by the benchmark", 0),
        "german": ("train", "other language", "Output_language ['German']", 6),
        "nowhere": ("", "unlisted", "on none of the benchmark's lists", 0),
        "small": ("train", "too few pairs", "4 pairs, fewer than 5", 4),
        "test": ("test", "kept", "", 6),
        "train": ("train", "kept", "", 6),
    }
    counts = {"instances": 32, "pairs": 32, "duplicates": 4, "available": 28, "drawn": 12}
    statuses = {"excluded_tasks": 1, "unlisted_tasks": 1, "other_language_tasks": 2, "too_few_pairs_tasks": 1}
    none = dict.fromkeys(("damaged_tasks", "skipped_places", "bad_instances", "empty", "too_long"), 0)
    assert report.totals() == {"tasks": 7, "train_tasks": 1, "test_tasks": 1, **statuses, **counts, **none}
    columns = report.table()
    assert columns["name"] == sorted(files) and columns["status"][0] == "other language"
    assert {len(column) for column in columns.values()} == {7}

    _, tasks = build(folder, tokenizer, GeneralConfig(min_pairs=5, unlisted_to_train=True, language=None))
    assert sorted(tasks) == ["both", "german", "nowhere", "test", "train"]


def test_lists_of_the_config_and_beside_the_files(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = write_repository(tmp_path / "in", {"a": raw_task(numbered(3)), "b": raw_task(numbered(3))}, test=["b"])
    own = tmp_path / "my lists"
    own.mkdir()
    (own / "train_tasks.txt").write_bytes(b"\xef\xbb\xbfb.json\r\n\r\n")
    (own / "test_tasks.txt").write_bytes(b"a")
    config = GeneralConfig(min_pairs=1, split_lists=str(own))
    report, tasks = build(folder, tokenizer, config)
    assert {name: task.split for name, task in tasks.items()} == {"a": "test", "b": "train"}
    with DodStore.open(report.path) as store:
        record = store.metadata()["build"]
    assert record["settings"]["split_lists"] == "my lists" and str(tmp_path) not in json.dumps(record)
    assert (record["builder"], record["layout"], record["source"]) == ("general", "repository", "in")
    assert record["settings"]["max_tokens"] == 400 and record["settings"]["pair_shares"] == [0.8, 0.1, 0.1]
    assert len(record["split_lists_sha256"]) == 64
    assert record["tokenizer"]["sha256"] == tiny_base_model().ref.tokenizer_sha256

    # The folder of the task files itself is a source too; its lists lie beside the files or in the repository above.
    _, tasks = build(folder / "tasks", tokenizer, out=tmp_path / "x.dod")
    assert {name: task.split for name, task in tasks.items()} == {"a": "train", "b": "test"}
    for file in own.iterdir():
        file.rename(folder / "tasks" / file.name)
    _, tasks = build(folder / "tasks", tokenizer, out=tmp_path / "x.dod")
    assert {name: task.split for name, task in tasks.items()} == {"a": "test", "b": "train"}


def test_wrong_lists(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = write_repository(tmp_path / "in", {"a": raw_task(numbered(3))}, test=["a"])
    lists = folder / "splits" / "default"
    (lists / "train_tasks.txt").write_text("a\n")
    with pytest.raises(
        DataError, match=r"found \['a'\] on the train list and on the test list; expected each task on one"
    ):
        build(folder, tokenizer)
    (lists / "train_tasks.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"train_tasks.txt': found a file that cannot be read .* Fetch the list again"):
        build(folder, tokenizer)
    for file in lists.iterdir():
        file.unlink()
    with pytest.raises(DataError, match="found task files but no lists; expected .*, or set unlisted_to_train"):
        build(folder, tokenizer)
    with pytest.raises(DataError, match="found neither 'train_tasks.txt' nor 'test_tasks.txt'"):
        build(folder, tokenizer, GeneralConfig(split_lists=str(lists)))
    _, tasks = build(folder, tokenizer, GeneralConfig(min_pairs=1, unlisted_to_train=True))
    assert tasks["a"].split == "train"


# Token counts


def test_tokens_are_counted_without_special_ones(tmp_path: Path) -> None:
    instances = [instance("a" * 399, "b"), instance("a" * 399, "bb"), instance("c", "d")]
    folder = write_repository(tmp_path, {"t": raw_task(instances)})
    for max_tokens, counts in ((400, [2, 400]), (None, [2, 400, 401])):
        _, tasks = build(folder, bos_writing_tokenizer(), GeneralConfig(min_pairs=1, max_tokens=max_tokens))
        assert sorted(pair.num_tokens or 0 for pair in tasks["t"].pairs) == counts


def test_batches_of_pairs_do_not_matter(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_repository(tmp_path, {"task1_odd": raw_task(ODD_INSTANCES)})
    _, tasks = build(folder, tokenizer)
    for size in (1, 40):
        monkeypatch.setattr(general, "TOKENIZE_CHARS", size)
        assert build(folder, tokenizer)[1] == tasks


# Draws and order


def test_draw_is_of_the_right_size_and_by_seed(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    files = {"one": raw_task(numbered(60)), "two": raw_task(numbered(60)), "few": raw_task(numbered(10))}
    folder = write_repository(tmp_path, files)
    config = GeneralConfig(min_pairs=10, max_pairs_per_task=20)
    report, tasks = build(folder, tokenizer, config)
    assert {row.name: (row.available, row.drawn) for row in report.rows} == {
        "few": (10, 10),
        "one": (60, 20),
        "two": (60, 20),
    }
    assert Counter(pair.split for pair in tasks["one"].pairs) == {"train": 16, "validation": 2, "test": 2}
    assert pairs_of(tasks["one"]) != pairs_of(tasks["two"])
    assert build(folder, tokenizer, config)[1] == tasks
    _, other = build(folder, tokenizer, GeneralConfig(min_pairs=10, max_pairs_per_task=20, seed=1))
    assert pairs_of(other["one"]) != pairs_of(tasks["one"])
    _, everything = build(folder, tokenizer, GeneralConfig(min_pairs=10, max_pairs_per_task=None))
    assert len(everything["one"].pairs) == 60 and pairs_of(tasks["one"]) < pairs_of(everything["one"])
    _, halves = build(folder, tokenizer, GeneralConfig(min_pairs=10, pair_shares=(0.9, 0.1, 0.0)))
    assert Counter(pair.split for pair in halves["one"].pairs) == {"train": 54, "validation": 6}


def test_order_of_files_and_instances_does_not_matter(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = GeneralConfig(min_pairs=1, max_pairs_per_task=25)
    names = [f"t{number}" for number in range(5)]
    reports = []
    for turn in range(3):
        generator = random.Random(turn)
        order = generator.sample(names, len(names))
        files = {
            name: raw_task(generator.sample(instances := [*numbered(40, name), *ODD_INSTANCES], len(instances)))
            for name in order
        }
        reports.append(build(write_repository(tmp_path / str(turn), files, test=["t3"]), tokenizer, config))
    assert len({report.digest for report, _ in reports}) == 1
    assert reports[0][1] == reports[1][1] == reports[2][1]  # the stored order and the splits too
    assert reports[0][0].rows == reports[2][0].rows


# Damage


def test_every_damaged_file_is_named_with_its_reason(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    good = raw_task(numbered(5))
    whole = json.dumps(good).encode()
    without = {key: {name: value for name, value in good.items() if name != key} for key in good}
    letter = json.dumps(raw_task([instance("\xe9", "x")]), ensure_ascii=False)
    broken = "found broken JSON ("
    damage: dict[str, tuple[Any, str]] = {
        "cut": (json.dumps(raw_task(numbered(200))).encode()[:9000], broken),
        "cut_in_a_letter": (letter.encode().partition(b"\xa9")[0], "found bytes that are not UTF-8"),
        "empty": (b"", broken),
        "list": (b"[1, 2]", "the file holds a list, not an object"),
        "utf16": (json.dumps(good).encode("utf-16"), "found bytes that are not UTF-8"),
        "broken": (b'{"Instances": [{"input" "x"}]}', broken + "Expecting ':' delimiter: line 1 column 25 (char 24))"),
        "followed": (b"{} {}", broken + "Extra data: line 1 column 4 (char 3))"),
        "nested": (b'{"Instances": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", broken),
        "digits": (b'{"Instances": ' + b"1" * 5000 + b"}", broken + "Exceeds the limit (4300 digits) for integer"),
        "twice": (b'{"Definition": "a", "Definition": "b"}', "found the key 'Definition' twice"),
        "no_definition": (without["Definition"], "there is no 'Definition'"),
        "no_instances": (without["Instances"], "there is no 'Instances'"),
        "no_language": (without["Output_language"], "there is no 'Output_language'"),
        "language_number": ({**good, "Input_language": 1}, "'Input_language' is a number, not a list of strings"),
        "instances_object": ({**good, "Instances": {"input": "x"}}, "'Instances' is an object, not a list"),
        "instances_text": ({**good, "Instances": "x"}, "'Instances' is a string, not a list"),
        "blank_definition": ({**good, "Definition": ["", "  "]}, "'Definition' is empty"),
        "definition_number": ({**good, "Definition": 5}, "'Definition' is a number, not a string or a list of strings"),
        "definition_mixed": ({**good, "Definition": ["a", None]}, "'Definition' is a list, not a string or a list of "),
        "no#name": (good, "reading a task: its name is 'no#name'"),
    }
    files = {"good": good, "bom": b"\xef\xbb\xbf" + whole} | {name: content for name, (content, _) in damage.items()}
    folder = write_repository(tmp_path, files)
    (folder / "tasks" / "folder.json").mkdir()
    (folder / "tasks" / "gone.json").symlink_to(tmp_path / "nowhere")
    (folder / "tasks" / ".hidden.json").write_text("left alone")
    (folder / "tasks" / "README.md").write_text("left alone")
    report, tasks = build(folder, tokenizer)
    assert sorted(tasks) == ["bom", "good"]
    reasons = {name: reason for name, (_, reason) in damage.items()} | {"folder": "not a file", "gone": "not a file"}
    assert set(report.skipped) == {f"{name}.json" for name in reasons}
    for name, reason in reasons.items():
        assert report.skipped[f"{name}.json"].startswith(reason)
    damaged = [row for row in report.rows if row.status == "damaged"]
    assert {row.name: row.reason for row in damaged} == {name: report.skipped[f"{name}.json"] for name in damage}
    assert all(row.pairs == row.drawn == 0 for row in damaged)  # nothing of half a file
    _, tasks = build(folder, tokenizer, GeneralConfig(min_pairs=1, language=None))
    assert sorted(tasks) == ["bom", "good", "no_language"]

    with pytest.raises(DataError) as error:
        build(folder, tokenizer, GeneralConfig(min_pairs=1, strict=True), tmp_path / "strict.dod")
    head, *lines = str(error.value).split("\n")
    assert head.startswith(f"building the General DoD from {str(folder)!r}: nothing was written because of 20 damaged ")
    assert len(lines) == 20 and f"  cut.json: {report.skipped['cut.json']}" in lines
    assert not list(tmp_path.glob("*strict.dod*"))


# The other layouts


def write_flat(
    folder: Path, tasks: Iterable[Mapping[str, Any]], pairs: Iterable[Mapping[str, Any]], gz: bool = True
) -> Path:
    folder.mkdir(parents=True)
    for name, rows in (("tasks.jsonl", tasks), ("pairs.jsonl", pairs)):
        data = jsonl_bytes(list(rows))
        (folder / (f"{name}.gz" if gz else name)).write_bytes(gzip.compress(data) if gz else data)
    return folder


def flat_task(name: str, split: Any = "train", definition: Any = "Do it.", **other: Any) -> dict[str, Any]:
    return {
        "task": name,
        "split": split,
        "definition": definition,
        "definitions_extra": [],
        "source": ["quoref"],
        "instance_license": ["CC BY 4.0"],
        "n_instances": 1,
        **other,
    }


def flat_pairs(name: str, instances: Iterable[Any]) -> Iterator[dict[str, Any]]:
    for each in instances:
        if isinstance(each, dict):
            yield {"task": name, **{key: each[key] for key in ("input", "output") if key in each}}


@pytest.mark.parametrize("gz", [True, False])
def test_flat_copy_gives_the_same_dod(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, gz: bool) -> None:
    instances = {"a": [*ODD_INSTANCES[:19], *numbered(60)], "b": numbered(30), "c": numbered(3), "d": numbered(30)}
    config = GeneralConfig(min_pairs=5, max_pairs_per_task=20)
    extra = ["Do it.", "Or else."]
    files = {name: raw_task(items, extra if name == "b" else "Do it.") for name, items in instances.items()}
    folder = write_repository(tmp_path / "in", files, test=["b"], excluded=["d"])
    report, tasks = build(folder, tokenizer, config)

    sides = {"a": "train", "b": "test", "c": "train", "d": "excluded"}
    records = [
        *(flat_task(name, side, definitions_extra=extra[1:] if name == "b" else []) for name, side in sides.items()),
        flat_task("without pairs"),
        flat_task("out", "excluded"),
    ]
    # A flat copy holds one output in each line.
    flat_rows = [row for name in "bcda" for row in flat_pairs(name, instances[name])]
    flat = write_flat(tmp_path / "flat", records, flat_rows, gz)
    flat_report, flat_result = build(flat, tokenizer, config)
    assert flat_result == tasks and flat_report.digest == report.digest
    assert flat_report.layout == "flat"
    status = {row.name: (row.status, row.reason) for row in flat_report.rows}
    assert status == {row.name: (row.status, row.reason) for row in report.rows} | {
        "without pairs": ("too few pairs", "0 pairs, fewer than 5"),
        "out": ("excluded", "excluded by the benchmark"),
    }


def test_flat_copy_with_scattered_pairs(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [*flat_pairs("a", numbered(2)), *flat_pairs("b", numbered(1)), *flat_pairs("a", numbered(1))]
    flat = write_flat(tmp_path / "flat", [flat_task("a"), flat_task("b")], rows)
    with pytest.raises(
        DataError, match="line 4 has a pair of task 'a', whose pairs ended further up; expected .* Sort the file"
    ):
        build(flat, tokenizer)
    assert not list(flat.glob("*out.dod*"))


def test_damaged_flat_copy(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    records = [
        flat_task("good"),
        flat_task("none", definition=None),
        flat_task("blank", definition=" "),
        flat_task("side", "validation"),
        flat_task("good", "test"),
        {"name": "x"},
    ]
    names = ("good", "none", "blank", "side", "stranger")
    rows = [row for name in names for row in flat_pairs(name, numbered(3))]
    flat = write_flat(tmp_path / "flat", records, rows, gz=False)
    path = flat / "pairs.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], b"{broken\n", b"[1]\n", *lines[2:]]))
    lists = tmp_path / "lists"
    lists.mkdir()
    report, tasks = build(flat, tokenizer)
    assert list(tasks) == ["good"] and len(tasks["good"].pairs) == 3
    assert report.skipped["pairs.jsonl"].startswith("2 lines left out, the first is line 3: broken JSON")
    assert {place: reason for place, reason in report.skipped.items() if place != "pairs.jsonl"} == {
        "tasks.jsonl": "2 lines left out, the first is line 5: a second record for 'good'",
        "pairs.jsonl, task 'none'": "there is no 'definition'",
        "pairs.jsonl, task 'blank'": "'definition' is empty",
        "pairs.jsonl, task 'side'": "the split is 'validation', not train, test or excluded",
    }
    assert {row.name: row.status for row in report.rows}["stranger"] == "unlisted"
    (lists / "train_tasks.txt").write_text("good\nstranger\n")
    report, _ = build(flat, tokenizer, GeneralConfig(min_pairs=1, split_lists=str(lists)))
    assert report.skipped["pairs.jsonl, task 'stranger'"] == "the tasks' file has no record for it"


@pytest.mark.parametrize("name", ["tasks.jsonl.gz", "pairs.jsonl.gz"])
def test_flat_copy_that_breaks_off(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    records = [flat_task("a", definition="x" * 2000), flat_task("b")]
    rows = [row for task in "ab" for row in flat_pairs(task, numbered(3000))]
    flat = write_flat(tmp_path / "flat", records, rows)
    data = (flat / name).read_bytes()
    (flat / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(
        DataError, match=rf"{name}': line \d+ is the last one that can be reached: .* Fetch the file again"
    ):
        build(flat, tokenizer)
    assert not list(flat.glob("*out.dod*"))


def hub_rows(name: str, instances: Iterable[Any], definition: Any = "Do it.") -> Iterator[dict[str, Any]]:
    for number, each in enumerate(instances):
        for output in each["output"] if isinstance(each["output"], list) else [each["output"]]:
            yield {
                "task_name": name,
                "id": f"{name}-{number}",
                "definition": definition,
                "inputs": each["input"],
                "targets": output,
            }


def write_hub_copy(folder: Path, sides: Mapping[str, Mapping[str, list[Any]]]) -> Path:
    for side, tasks in sides.items():
        (folder / side).mkdir(parents=True)
        for name, instances in tasks.items():
            (folder / side / f"{name}_{side}.jsonl").write_bytes(jsonl_bytes(list(hub_rows(name, instances))))
    return folder


TEXT_INSTANCES = [each for each in ODD_INSTANCES[:13] if isinstance(each["input"], str)]
HUB_TASKS: dict[str, dict[str, list[Any]]] = {
    "train": {"a": [*TEXT_INSTANCES, *numbered(40)], "small": numbered(3)},
    "test": {"b": numbered(30)},
}


@pytest.mark.parametrize("form", ["files by task", "parquet by side", "lines by side", "datasets"])
def test_hub_copy_gives_the_same_dod(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, form: str) -> None:
    config = GeneralConfig(min_pairs=5, max_pairs_per_task=20)
    files = {name: raw_task(instances) for tasks in HUB_TASKS.values() for name, instances in tasks.items()}
    expected, _ = build(write_repository(tmp_path / "reference", files, test=["b"]), tokenizer, config)

    copy = tmp_path / "copy"
    if form.endswith("by side"):  # the rows of all tasks mixed
        ending, as_bytes = ("parquet", parquet_bytes) if form.startswith("parquet") else ("jsonl", jsonl_bytes)
        (copy / "data").mkdir(parents=True)
        for side, side_tasks in HUB_TASKS.items():
            rows = [row for name, instances in side_tasks.items() for row in hub_rows(name, instances)]
            random.Random(0).shuffle(rows)
            (copy / "data" / f"{side}-00000-of-00001.{ending}").write_bytes(as_bytes(rows))
    else:
        write_hub_copy(copy, HUB_TASKS)
    if form == "datasets":
        pytest.importorskip("datasets", reason="the extra 'hub' is not installed")
    source = f"hub:{copy}" if form == "datasets" else copy
    report, _ = build(source, tokenizer, config, tmp_path / "x.dod")
    assert (report.digest, report.layout) == (expected.digest, "hub" if form == "datasets" else "hub copy")
    assert [(row.name, row.status, row.drawn) for row in report.rows] == [
        ("a", "kept", 20),
        ("b", "kept", 20),
        ("small", "too few pairs", 0),
    ]
    with DodStore.open(report.path) as store:
        assert store.metadata()["build"]["source"] == "copy"


def test_hub_errors(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="the extra 'hub' is not installed")
    out = tmp_path / "x.dod"
    with pytest.raises(DataError, match=r"Hub dataset 'nobody/nothing@v1': `datasets` .*use local files"):
        build("hub:nobody/nothing@v1", tokenizer, SMALL, out)
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(
        DataError, match="'Muennighoff/natural-instructions': .* Run `pip install 'softprompt-registry.hub.'`"
    ):
        build("hub", tokenizer, SMALL, out)
    assert not list(tmp_path.glob("*x.dod*"))


def test_damaged_hub_copy(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    copy = write_hub_copy(
        tmp_path / "copy", {"train": {"good": numbered(5), "both": numbered(5)}, "test": {"both": numbered(2)}}
    )
    train = copy / "train"
    (train / "lines.jsonl").write_bytes(b'{"task_name": "good"}\n{broken\n{"inputs": "of no task"}\n')
    (train / "no_definition.jsonl").write_bytes(jsonl_bytes(list(hub_rows("bare", numbered(3), None))))
    (train / "many.jsonl").write_bytes(
        jsonl_bytes([row for n in range(150) for row in hub_rows("many", [instance(f"{n}", "x")], f"definition {n}")])
    )
    cut = gzip.compress(jsonl_bytes(list(hub_rows("cut", numbered(3000)))))
    (train / "cut.jsonl.gz").write_bytes(cut[: len(cut) // 2])
    (train / "columns.parquet").write_bytes(parquet_bytes([{"task_name": "x", "inputs": "y"}]))
    (copy / "misc.jsonl").write_bytes(jsonl_bytes(list(hub_rows("nowhere", numbered(3)))))
    report, tasks = build(copy, tokenizer)
    assert list(tasks) == ["good"] and report.rows[3].name == "good" and report.rows[3].bad_instances == 1
    skipped = dict(report.skipped)
    assert skipped.pop("train/cut.jsonl.gz").startswith("found a file that cannot be read")
    assert skipped.pop("train/lines.jsonl").startswith("2 lines left out, the first is line 2: broken JSON")
    assert skipped.pop("train/columns.parquet").startswith("found the columns ['task_name', 'inputs'] without")
    both = "test/both_test.jsonl, train/both_train.jsonl, task 'both'"
    assert skipped == {
        both: "the split is 'train and test', not train, test or excluded",
        "train/no_definition.jsonl, task 'bare'": "there is no 'definition'",
        "train/many.jsonl, task 'many'": "it has more than 100 definitions",
        "train/cut.jsonl.gz, task 'cut'": "'train/cut.jsonl.gz' cannot be read to its end",
    }
    assert {row.name: row.status for row in report.rows}["nowhere"] == "unlisted"


def test_definitions_of_a_hub_copy(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    counts = {"rare": 2, "frequent": 3, "also rare": 2}
    rows = [row for text, count in counts.items() for row in hub_rows("t", numbered(count, text), text)]
    (tmp_path / "train.jsonl").write_bytes(jsonl_bytes(rows))
    _, tasks = build(tmp_path, tokenizer)
    assert tasks["t"].hard_prompts == ("frequent", "also rare", "rare")


@pytest.mark.parametrize("files", [[], ["notes.txt"], ["pairs.jsonl"], ["tasks.jsonl.gz"]])
def test_no_known_layout(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, files: list[str]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for file in files:
        (folder / file).write_bytes(b"")
    found = repr(files[0]) if files else "no files"
    with pytest.raises(
        DataError, match=f"found {found}; expected tasks/.*json of the benchmark's repository, both tasks.jsonl"
    ):
        build(folder, tokenizer, SMALL, tmp_path / "x.dod")
    with pytest.raises(DataError, match="there is no such folder; expected .* 'hub:Muennighoff/natural-instructions'"):
        build(folder / "missing", tokenizer, SMALL, tmp_path / "x.dod")
    assert not list(tmp_path.glob("*x.dod*"))


def test_nothing_to_keep(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = write_repository(tmp_path / "in", {"a": raw_task(numbered(3)), "b": b"{", "c": b"[]"}, excluded=["c"])
    out = tmp_path / "out" / "x.dod"
    build(folder, tokenizer, out=out)
    before = out.read_bytes()
    with pytest.raises(DataError, match="exists already; expected a new name"):
        build_dod_general(folder, out, tokenizer=tokenizer)
    with pytest.raises(DataError, match=r"found 3 tasks and none to keep (.|\n)*\n  b.json: found broken JSON"):
        build(folder, tokenizer, GeneralConfig(), out)
    assert [path.name for path in out.parent.iterdir()] == ["x.dod"] and out.read_bytes() == before


# The output


def test_memory_on_a_large_file(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """A task file of some 35 MB, in which one letter beyond U+FFFF makes each letter four bytes while it is read."""
    instances = [
        {**each, "explanation": f"{number} \U0001f600" + "lorem ipsum " * 300}
        for number, each in enumerate(numbered(9_000))
    ]
    folder = write_repository(tmp_path, {"t": json.dumps(raw_task(instances), ensure_ascii=False).encode()})
    assert (folder / "tasks" / "t.json").stat().st_size > 30 << 20
    del instances
    tracemalloc.start()
    try:
        report, _ = build(folder, tokenizer)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (report.rows[0].pairs, report.rows[0].drawn) == (9_000, 500)
    assert 30 << 20 < peak < 290 << 20


# The real data


@pytest.mark.skipif(not SHARED.is_dir(), reason="the benchmark's flat copy is not beside the project")
def test_the_whole_flat_copy(tmp_path: Path) -> None:
    """All tasks with pairs are found and sided as the lists say; a small draw keeps it short."""
    words = Tokenizer(models.WordLevel(vocab={"<unk>": 0}, unk_token="<unk>"))  # several times as fast as BPE
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    report, tasks = build(SHARED, tokenizer, GeneralConfig(max_tokens=2100, max_pairs_per_task=5), tmp_path / "x.dod")
    assert len(tasks) == 452 and report.skipped == {}
    names = {side: set((SHARED / f"{side}_tasks.txt").read_text().split()) for side in ("train", "test")}
    assert all(name in names[task.split] for name, task in tasks.items())
    totals = report.totals()
    assert totals["tasks"] == 452 + totals["excluded_tasks"] + totals["too_few_pairs_tasks"]
    assert (totals["instances"], totals["available"], totals["drawn"]) == (226_000, 226_000, 452 * 5)
    drawn = {(name, pair.input, pair.output) for name, task in tasks.items() for pair in task.pairs}
    with gzip.open(SHARED / "pairs.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = map(json.loads, file)
        assert len(drawn & {(row["task"], row["input"], row["output"]) for row in rows}) == len(drawn) == 452 * 5
    for task in tasks.values():
        assert all(pair.num_tokens == len(f"{pair.input} {pair.output}".split()) for pair in task.pairs)
