"""The fixed sets as tasks: labels as each publisher writes them, what is dropped, what is drawn, and what is refused."""

from __future__ import annotations

import gzip
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from task_files import Row, csv_bytes, jsonl_bytes, parquet_bytes

from softprompt_registry.dod.labelled_rows import spelling
from softprompt_registry.dod.labelled_sets import (
    EVALUATION_LABELS,
    LABELLED_SETS,
    InspectConfig,
    LabelledSetsReport,
    SetCounts,
    build_dod_inspect,
)
from softprompt_registry.dod.store import DodStore
from softprompt_registry.dod.task import Task
from softprompt_registry.errors import DataError

REAL_DATA = Path(__file__).parent.parent.parent / "shared" / "data" / "inspect"
SST2 = InspectConfig(sets=("sst2",))


def build(
    source: Path, out: Path, config: InspectConfig = SST2
) -> tuple[LabelledSetsReport, dict[str, Task], dict[str, Any]]:
    """The report, the tasks and the note of a build."""
    report = build_dod_inspect(source, out, config=config, overwrite=True)
    with DodStore.open(out) as store:
        assert store.digest == report.digest
        return report, {task.name: task for task in store.tasks()}, store.metadata()["build"]


def refused(source: Path) -> str:
    """The message of a build that must fail and leave nothing behind."""
    with pytest.raises(DataError) as error:
        build_dod_inspect(source, source / "refused.dod", config=SST2)
    assert not [path.name for path in source.iterdir() if "refused" in path.name]
    return str(error.value).removeprefix(f"building the evaluation sets from {str(source)!r}: ")


def rows(*pairs: tuple[str, Any]) -> list[Row]:
    return [{"text": text, "label": label} for text, label in pairs]


TRAIN = rows(("fine", "positive"), ("poor", "negative"), ("lovely", "positive"), ("dull", "negative"))
VALIDATION = rows(("sweet", "positive"), ("sour", "negative"))
TEST = rows(("warm", "positive"), ("cold", "negative"))


def write(folder: Path, **files: bytes) -> Path:
    """The files, with `__` for the dot of a name."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content)
    return folder


def pairs_of(task: Task, split: Any) -> list[tuple[str, str]]:
    return [(pair.input, pair.output) for pair in task.pairs_of(split)]


# Labels


LABELS_IN_FILES: list[tuple[str, str, dict[Any, str]]] = [
    ("sst2", "label", {0: "negative", 1: "positive", "Positive": "positive"}),
    ("sst5", "label", {0: "terrible", 4: "great", "negative": "bad", "neutral": "neutral", "positive": "good"}),
    ("sst5", "label_text", {"very negative": "terrible", "very-positive": "great", "bad": "bad"}),
    ("trec", "label", {"DESC": "description", "entity": "entity"}),
    ("trec", "label_coarse", {0: "description", 3: "human", 4: "number", 5: "location"}),
    ("trec", "label_coarse_original", {"ABBR": "abbreviation"}),
    ("trec", "label_coarse_text", {"human beings": "human", "numeric values": "number"}),
    ("subj", "label", {0: "objective", "1.0": "subjective"}),
    ("agnews", "label", {0: "world", "3": "technology", "Sci/Tech": "technology", "sci-tech": "technology"}),
    ("hotel_reviews", "label", {"fake": "deceptive", "genuine": "truthful"}),
    ("hotel_reviews", "deceptive", {0: "truthful", 1: "deceptive", "truthful": "truthful"}),
    ("essays", "generated", {0: "human", 1.0: "generated", "AI-generated": "generated", "HUMAN": "human"}),
    ("essays", "label", {"0": "human", True: "generated", "ai": "generated", "Human-written": "human"}),
    ("essays", "label", {"Human written essay": "human", "AI generated essay": "generated"}),
]


@pytest.mark.parametrize(("name", "column", "labels"), LABELS_IN_FILES)
def test_labels_become_the_papers_words(name: str, column: str, labels: dict[Any, str]) -> None:
    words = LABELLED_SETS[name].words_in(column)
    assert {found: words[spelling(found)] for found in labels} == labels


def test_words_stand_before_numbers(tmp_path: Path) -> None:
    found = [{"text": f"Who is {n} ?", "label": 5, "label_coarse": n, "label_coarse_text": "?"} for n in range(6)]
    names = ("entities", "human beings", "locations", "numeric values", "abbreviation", "DESC")
    texts = [{**row, "label_coarse_text": name} for row, name in zip(found, names, strict=True)]
    source = write(
        tmp_path,
        trec_test__jsonl=jsonl_bytes(texts),
        trec_train__jsonl=jsonl_bytes([{**row, "text": f"train {n}"} for n, row in enumerate(texts * 2)]),
    )
    _, tasks, _ = build(source, tmp_path / "out.dod", InspectConfig(sets=("trec",)))
    words = [pair.output for pair in tasks["trec"].pairs_of("test")]
    assert words == ["entity", "human", "location", "number", "abbreviation", "description"]


# The evaluation sets


def test_what_is_stored(tmp_path: Path) -> None:
    source = write(
        tmp_path / "in",
        sst2_train__jsonl=jsonl_bytes(TRAIN),
        sst2_validation__csv__gz=gzip.compress(csv_bytes(VALIDATION)),
        sst2_test__parquet=parquet_bytes(TEST),
        README__md=b"not a set",
    )
    report, tasks, note = build(source, tmp_path / "new" / "out.dod")
    task = tasks["sst2"]
    assert (task.kind, task.split, task.labels) == ("classification", "test", ("positive", "negative"))
    assert task.hard_prompts == ("Classify the sentiment of the movie review as one of: positive, negative.",)
    assert pairs_of(task, "train") == [(row["text"], row["label"]) for row in TRAIN]
    assert pairs_of(task, "validation") == [("sweet", "positive"), ("sour", "negative")]
    assert pairs_of(task, "test") == [("warm", "positive"), ("cold", "negative")]
    assert task.source == "sst2_test.parquet, sst2_train.jsonl, sst2_validation.csv.gz"
    counts = SetCounts(
        "sst2", 4, 2, 2, duplicates=0, leaked=0, contradicting=0, blank=0, unlabelled=0, source=task.source
    )
    assert report.sets == (counts,) and report.path == tmp_path / "new" / "out.dod"
    assert report.table()["set"] == ["sst2"] and report.table()["train"] == [4] and report.table()["leaked"] == [0]
    assert (note["builder"], note["from"]) == ("inspect", "files")
    assert note["settings"]["max_train_pairs"] == 5000 and note["sets"]["sst2"]["test"] == 2


def test_the_hubs_columns_work_in_local_files(tmp_path: Path) -> None:
    source = write(
        tmp_path,
        sst2_train__parquet=parquet_bytes([{"idx": n, "sentence": f"film {n} ", "label": n % 2} for n in range(10)]),
        sst2_validation__parquet=parquet_bytes([{"idx": 0, "sentence": "held out ", "label": 1}]),
        sst2_test__parquet=parquet_bytes([{"idx": 0, "sentence": "unknown", "label": -1}]),
    )
    report, tasks, _ = build(source, tmp_path / "out.dod")
    # the test labels are not published: validation serves as test, a tenth of train as validation
    assert pairs_of(tasks["sst2"], "test") == [("held out", "positive")]
    assert Counter(pair.split for pair in tasks["sst2"].pairs) == {"train": 9, "validation": 1, "test": 1}
    assert report.sets[0].unlabelled == 1


def test_cleaning(tmp_path: Path) -> None:
    train = rows(
        ("kept", "positive"),
        ("kept", "positive"),  # a duplicate
        (" kept ", "positive"),  # the same text
        ("Kept", "negative"),  # another text
        ("also kept", "negative"),
        ("in test", "positive"),  # held out
        ("in test", "positive"),  # held out
        ("in validation", "negative"),  # held out
        ("two minds", "negative"),  # contradicts itself
        ("two minds", "positive"),
        ("unsure", "positive"),  # contradicts the test
        ("", "positive"),
        (" \t", "negative"),
    )
    validation = rows(("in validation", "negative"), ("in both", "negative"), ("in validation", "negative"))
    test = rows(("in test", "positive"), ("in both", "negative"), ("unsure", "negative"))
    source = write(
        tmp_path,
        sst2_train__jsonl=jsonl_bytes([*train, {"text": None, "label": "positive"}]),
        sst2_validation__jsonl=jsonl_bytes(validation),
        sst2_test__jsonl=jsonl_bytes(test),
    )
    report, tasks, _ = build(source, tmp_path / "out.dod")
    task = tasks["sst2"]
    assert pairs_of(task, "train") == [("kept", "positive"), ("Kept", "negative"), ("also kept", "negative")]
    assert pairs_of(task, "validation") == [("in validation", "negative")]
    assert pairs_of(task, "test") == [("in test", "positive"), ("in both", "negative")]
    counts = report.sets[0]
    assert (counts.train, counts.validation, counts.test) == (3, 1, 2)
    # duplicates: two in train, one in validation; leaked: three rows of train, one of validation
    assert (counts.duplicates, counts.leaked, counts.contradicting, counts.blank) == (3, 4, 2, 3)


def numbered(name: str, count: int) -> list[Row]:
    """Four texts of the first label for each of the second."""
    first, second = EVALUATION_LABELS[name][:2]
    return [{"text": f"{name} {n}", "label": second if n % 5 == 0 else first} for n in range(count)]


def test_draws_and_cuts_keep_the_balance_and_follow_from_the_seed(tmp_path: Path) -> None:
    source = write(
        tmp_path / "in",
        sst2_train__jsonl=jsonl_bytes(numbered("sst2", 200)),
        sst2_test__jsonl=jsonl_bytes([{**row, "text": f"test {row['text']}"} for row in numbered("sst2", 100)]),
    )
    settings: dict[str, Any] = {
        "sets": ("sst2",),
        "max_train_pairs": 50,
        "max_test_pairs": 10,
        "validation_share": 0.25,
    }
    report, tasks, _ = build(source, tmp_path / "a.dod", InspectConfig(**settings))
    counts = Counter((pair.split, pair.output) for pair in tasks["sst2"].pairs)
    assert counts == {
        ("train", "positive"): 40,
        ("train", "negative"): 10,
        ("validation", "positive"): 40,
        ("validation", "negative"): 10,
        ("test", "positive"): 8,
        ("test", "negative"): 2,
    }
    texts = [pair.input for pair in tasks["sst2"].pairs]
    assert len(set(texts)) == len(texts)
    order = [int(pair.input.split()[1]) for pair in tasks["sst2"].pairs_of("train")]
    assert order == sorted(order)
    again, _, _ = build(source, tmp_path / "b.dod", InspectConfig(**settings))
    assert again.digest == report.digest
    other, _, _ = build(source, tmp_path / "c.dod", InspectConfig(**settings, seed=1))
    assert other.digest != report.digest


def test_one_set_does_not_move_another(tmp_path: Path) -> None:
    for name in ("sst2", "subj"):
        write(
            tmp_path,
            **{
                f"{name}_train__jsonl": jsonl_bytes(numbered(name, 40)),
                f"{name}_test__jsonl": jsonl_bytes([{"text": "t", "label": EVALUATION_LABELS[name][0]}]),
            },
        )
    _, both, _ = build(tmp_path, tmp_path / "both.dod", InspectConfig(sets=("sst2", "subj"), max_train_pairs=9))
    _, one, _ = build(tmp_path, tmp_path / "one.dod", InspectConfig(sets=("subj",), max_train_pairs=9))
    assert list(both) == ["sst2", "subj"] and both["subj"] == one["subj"]


UNKNOWN = rows(("a", "meh"), ("b", "meh"), ("c", 7))
BAD_FILES: list[tuple[dict[str, bytes], str]] = [
    (
        {"sst2_train__jsonl": jsonl_bytes([*TRAIN, *UNKNOWN])},
        "'sst2_train.jsonl', line 5: found unknown labels in column 'label': 'meh', '7'; expected 'positive', 'negative', "
        "'0', '1'. Correct them.",
    ),
    ({"sst2_train__csv": b"text,label\nfine,positive\npoor\n"}, "'sst2_train.csv', line 3: found 1 cell; expected 2"),
    (
        {"sst2_train__jsonl": b'{"text": "fine", "label": 1}\n{"text": '},
        "'sst2_train.jsonl', line 2: found broken JSON",
    ),
    (
        {"sst2_train__csv": b"review,label\nfine,positive\n"},
        "'sst2_train.csv', line 2: found the columns ['review', 'label']; expected 'sentence' or 'text'. Rename the column",
    ),
    (
        {"sst2_train__jsonl": b'{"text": "fine", "label": 1}\n{"text": "poor"}\n'},
        "'sst2_train.jsonl', line 2: found the columns ['text']; expected 'label'.",
    ),
    (
        {"sst2_train__jsonl": b'{"text": 5, "label": 1}\n'},
        "'sst2_train.jsonl', line 1: found int 5 as text; expected a st",
    ),
    (
        {"sst2_train__jsonl": b'{"text": "\\ud800", "label": 1}\n'},
        "'sst2_train.jsonl', line 1: found str '\\ud800' as te",
    ),
    (
        {"sst2_train__jsonl": jsonl_bytes([*TRAIN, *rows(("a", -1), ("b", ""))])},
        "'sst2_train.jsonl', line 5: found no label there and in 1 other rows; expected all rows of a split to have one",
    ),
    ({"sst2_train__parquet": b"PAR1"}, "'sst2_train.parquet', row 1: found a file that cannot be read"),
    ({"sst2_train__csv": b""}, "set 'sst2': found these labelled rows: 0 in train; expected some in test"),
    (
        {"sst2_train__csv": csv_bytes(TRAIN), "sst2_train__jsonl": jsonl_bytes(TRAIN)},
        "'sst2_train.jsonl' and 'sst2_train.csv' both hold the train split of 'sst2'; expected one file for each split.",
    ),
    (
        {"sst2_train__csv": csv_bytes(TRAIN), "sst2_test__csv": csv_bytes(TRAIN)},
        "set 'sst2' has no rows left for train and validation; expected some in every split. Add rows, or check whether",
    ),
    (
        {"sst2_train__csv": csv_bytes(TRAIN)},
        "set 'sst2': found these labelled rows: 4 in train; expected some in test, or",
    ),
    (
        {"sst2_train__csv": csv_bytes(TRAIN[:1]), "sst2_test__csv": csv_bytes(TEST[:1])},
        "set 'sst2' has usable rows of the labels ['positive']; expected some of each of ['positive', 'negative'].",
    ),
    (
        {"sst_train__csv": csv_bytes(TRAIN)},
        "nothing of the set 'sst2' is there; expected sst2_train, sst2_validation and",
    ),
]


@pytest.mark.parametrize(("files", "message"), BAD_FILES, ids=[message[:60] for _, message in BAD_FILES])
def test_bad_files(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    assert refused(write(tmp_path, **files)).startswith(message)


def test_bad_folder_and_existing_output(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such folder; expected one with the sets' files"):
        build_dod_inspect(tmp_path / "none", tmp_path / "out.dod", config=SST2)
    (tmp_path / "out.dod").write_text("mine")
    with pytest.raises(DataError, match="exists already"):
        build_dod_inspect(None, tmp_path / "out.dod", config=SST2)
    assert (tmp_path / "out.dod").read_text() == "mine"


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="the real sets are not beside this checkout")
def test_the_real_sets(tmp_path: Path) -> None:
    report, tasks, _ = build(REAL_DATA, tmp_path / "out.dod", InspectConfig())
    assert {name: task.labels for name, task in tasks.items()} == EVALUATION_LABELS
    assert {task.split for task in tasks.values()} == {"test"}
    table = report.table()
    assert table["set"] == ["sst2", "sst5", "trec", "subj", "agnews"]
    assert table["train"] == [5000, 4999, 4833, 5000, 3600]  # a train text of SST-5 is in its validation split
    assert table["validation"] == [872, 999, 538, 900, 400]  # which has a duplicate
    assert table["test"] == [1000, 1000, 500, 1000, 1000]
    assert (table["duplicates"], table["leaked"]) == ([0, 1, 0, 0, 0], [0, 1, 0, 0, 0])
    assert table["contradicting"] == table["blank"] == table["unlabelled"] == [0] * 5
    assert Counter(pair.output for pair in tasks["trec"].pairs_of("test"))["description"] == 138
    assert Counter(pair.output for pair in tasks["subj"].pairs_of("test")) == {"objective": 500, "subjective": 500}
