"""The evaluation sets as tasks: from files of every format, from the Hub's own layouts, and what is dropped on the way."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from task_files import Row, csv_bytes, jsonl_bytes, parquet_bytes

from softprompt_registry.config import build_config
from softprompt_registry.dod.inspect_datasets import (
    EVALUATION_LABELS,
    EVALUATION_SETS,
    InspectConfig,
    build_dod_inspect,
)
from softprompt_registry.dod.labelled_sets import LabelledSetsReport, SetCounts, spelling
from softprompt_registry.dod.store import DodStore
from softprompt_registry.dod.task import Task
from softprompt_registry.errors import ConfigError, DataError
from softprompt_registry.recording import NullRecorder

REAL_DATA = Path(__file__).parent.parent.parent / "shared" / "data" / "inspect"
SST2 = InspectConfig(sets=("sst2",))


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


def build(
    source: Path | None, out: Path, config: InspectConfig = SST2
) -> tuple[LabelledSetsReport, dict[str, Task], dict[str, Any]]:
    """The report, the tasks and the note of a build."""
    report = build_dod_inspect(source, out, config=config, overwrite=True)
    with DodStore.open(out) as store:
        assert store.digest == report.digest
        return report, {task.name: task for task in store.tasks()}, store.metadata()["build"]


def pairs_of(task: Task, split: Any) -> list[tuple[str, str]]:
    return [(pair.input, pair.output) for pair in task.pairs_of(split)]


def refused(source: Path | None, config: InspectConfig = SST2) -> str:
    """The message of a build that must fail and leave nothing behind."""
    out = (source or Path.cwd()) / "refused.dod"
    with pytest.raises(DataError) as error:
        build_dod_inspect(source, out, config=config)
    assert not [path.name for path in out.parent.iterdir() if "refused" in path.name]
    head = f"building the evaluation sets from {repr(str(source)) if source else 'the Hugging Face Hub'}: "
    assert str(error.value).startswith(head)
    return str(error.value).removeprefix(head)


# Local files


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


@pytest.mark.parametrize("ending", ["csv", "csv__gz", "jsonl", "jsonl__gz", "parquet"])
def test_all_formats_give_the_same_pairs(tmp_path: Path, ending: str) -> None:
    write_as = {"csv": csv_bytes, "jsonl": jsonl_bytes, "parquet": parquet_bytes}[ending.removesuffix("__gz")]
    packed = gzip.compress if ending.endswith("gz") else bytes
    files = {f"sst2_{split}__{ending}": packed(write_as(some)) for split, some in (("train", TRAIN), ("test", TEST))}
    _, tasks, _ = build(write(tmp_path / "in", **files), tmp_path / "out.dod")
    assert pairs_of(tasks["sst2"], "test") == [("warm", "positive"), ("cold", "negative")]
    assert Counter(pair.split for pair in tasks["sst2"].pairs) == {"train": 3, "validation": 1, "test": 2}


LABELS_IN_FILES: list[tuple[str, Mapping[str, Any], str]] = [
    ("sst2", {"label": 0}, "negative"),
    ("sst2", {"label": 1}, "positive"),
    ("sst2", {"label": "Positive"}, "positive"),
    ("sst2", {"label": 0, "label_text": "positive"}, "positive"),
    ("sst5", {"label": 0}, "terrible"),
    ("sst5", {"label": 4}, "great"),
    ("sst5", {"label": "very negative"}, "terrible"),
    ("sst5", {"label": "negative"}, "bad"),
    ("sst5", {"label": "neutral"}, "neutral"),
    ("sst5", {"label": "positive"}, "good"),
    ("sst5", {"label": "very-positive"}, "great"),
    ("sst5", {"label": "bad"}, "bad"),
    ("trec", {"label": "DESC"}, "description"),
    ("trec", {"label": "entity"}, "entity"),
    ("trec", {"label": 5, "label_coarse": 0}, "description"),
    ("trec", {"label": 5, "label_coarse": 4}, "number"),
    ("trec", {"label": 5, "label_coarse": 5}, "location"),
    ("trec", {"label": 5, "label_coarse": 5, "label_coarse_original": "ABBR"}, "abbreviation"),
    ("trec", {"label": 5, "label_text": "abbreviation", "label_coarse_text": "human beings"}, "human"),
    ("subj", {"label": 0}, "objective"),
    ("subj", {"label": "1.0"}, "subjective"),
    ("agnews", {"label": 0}, "world"),
    ("agnews", {"label": "3"}, "technology"),
    ("agnews", {"label": "Sci/Tech"}, "technology"),
    ("agnews", {"label": "sci-tech"}, "technology"),
]


@pytest.mark.parametrize(("name", "found", "word"), LABELS_IN_FILES)
def test_labels_become_the_papers_words(tmp_path: Path, name: str, found: Mapping[str, Any], word: str) -> None:
    known = EVALUATION_SETS[name]
    row = {"text": "the one", **found}
    column = next(column for column in known.label_columns if column in row)
    others = [{**row, "text": f"text {label}", column: label} for label in known.labels * 2 if column != "label_coarse"]
    others += [{**row, "text": f"text {n}", column: n} for n in range(6) if column == "label_coarse"]
    source = write(
        tmp_path,
        **{f"{name}_train__jsonl": jsonl_bytes(others), f"{name}_test__jsonl": jsonl_bytes([row])},
    )
    _, tasks, _ = build(source, tmp_path / "out.dod", InspectConfig(sets=(name,)))
    assert pairs_of(tasks[name], "test") == [("the one", word)]


def test_spelling() -> None:
    assert [spelling(label) for label in (" AI-generated ", "Sci / Tech", "a_b", True, "False", 1.0, -1)] == [
        "ai generated",
        "sci tech",
        "a b",
        "1",
        "0",
        "1",
        "-1",
    ]


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


# What is dropped


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


# The Hub, through `datasets` on local files that look as there


def hub_rows(name: str, split: str) -> list[dict[str, Any]]:
    """A few rows with the Hub's columns and numbers."""
    if name == "stanfordnlp/sst2":
        labels = [-1, -1] if split == "test" else [0, 1] * 5
        return [{"idx": n, "sentence": f"{split} {n} ", "label": label} for n, label in enumerate(labels)]
    if name == "SetFit/sst5":
        texts = ["very negative", "negative", "neutral", "positive", "very positive"]
        return [{"text": f"{split} {n}", "label": n % 5, "label_text": texts[n % 5]} for n in range(10)]
    if name == "fancyzhx/ag_news":
        return [{"text": f"{split} {n}", "label": n % 4} for n in range(8)]
    if name == "SetFit/subj":
        return [
            {"text": f"{split} {n}", "label": n % 2, "label_text": ("objective", "subjective")[n % 2]} for n in range(6)
        ]
    assert name == "SetFit/TREC-QC"
    coarse = [
        ("DESC", "description and abstract concepts"),
        ("ENTY", "entities"),
        ("ABBR", "abbreviation"),
        ("HUM", "human beings"),
        ("NUM", "numeric values"),
        ("LOC", "locations"),
    ]
    return [
        {
            "text": f"{split} {n}",
            "label": n,
            "label_text": "manner of an action",
            "label_original": f"{coarse[n % 6][0]}:x",
            "label_coarse": n % 6,
            "label_coarse_text": coarse[n % 6][1],
            "label_coarse_original": coarse[n % 6][0],
        }
        for n in range(12)
    ]


CLASS_NAMES = {
    "stanfordnlp/sst2": ["negative", "positive"],
    "fancyzhx/ag_news": ["World", "Sports", "Business", "Sci/Tech"],
}
HUB_SPLITS = {
    "stanfordnlp/sst2": ("train", "validation", "test"),
    "SetFit/sst5": ("train", "validation", "test"),
    "SetFit/TREC-QC": ("train", "test"),
    "SetFit/subj": ("train", "test"),
    "fancyzhx/ag_news": ("train", "test"),
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that has the repositories' files under their names; `datasets` takes it for them, and caches beside it."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    here = tmp_path / "here"
    for name, splits in HUB_SPLITS.items():
        (here / name / "data").mkdir(parents=True)
        for split in splits:
            dataset = datasets.Dataset.from_list(hub_rows(name, split))
            if name in CLASS_NAMES:
                dataset = dataset.cast_column("label", datasets.ClassLabel(names=CLASS_NAMES[name]))
            dataset.to_parquet(here / name / "data" / f"{split}-00000-of-00001.parquet")
    monkeypatch.chdir(here)
    return here


HUB_TESTS: dict[str, Sequence[str]] = {
    "sst2": ["negative", "positive"] * 5,
    "sst5": ["terrible", "bad", "neutral", "good", "great"] * 2,
    "trec": ["description", "entity", "abbreviation", "human", "number", "location"] * 2,
    "subj": ["objective", "subjective"] * 3,
    "agnews": ["world", "sports", "business", "technology"] * 2,
}


def test_all_five_sets_from_the_hub(hub: Path) -> None:
    report, tasks, note = build(None, hub / "out.dod", InspectConfig())
    assert list(tasks) == ["sst2", "sst5", "trec", "subj", "agnews"]
    assert {name: [pair.output for pair in task.pairs_of("test")] for name, task in tasks.items()} == HUB_TESTS
    assert pairs_of(tasks["sst2"], "test")[:2] == [("validation 0", "negative"), ("validation 1", "positive")]
    assert {name: task.labels for name, task in tasks.items()} == EVALUATION_LABELS
    assert report.table()["train"] == [9, 10, 11, 5, 7]
    assert report.table()["validation"] == [1, 10, 1, 1, 1]
    assert report.table()["unlabelled"] == [2, 0, 0, 0, 0]
    assert note["from"] == "hub" and note["sets"]["trec"]["source"] == "SetFit/TREC-QC"
    again, _, _ = build(None, hub / "again.dod", InspectConfig())
    assert again.digest == report.digest


def test_another_repository_and_commit(hub: Path) -> None:
    (hub / "SetFit" / "subj").rename(hub / "copy")
    _, tasks, note = build(None, hub / "out.dod", InspectConfig(sets=("subj",), hub={"subj": "copy@v1"}))
    assert tasks["subj"].source == "copy@v1" and note["settings"]["hub.subj"] == "copy@v1"


def test_the_commit_that_was_read_is_noted(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    commit = "0123456789abcdef0123456789abcdef01234567"
    revisions = []
    load = datasets.load_dataset

    def load_into_a_cache_as_the_hubs(name: str, revision: str | None) -> Any:  # whose last folder is the commit
        revisions.append(revision)
        return load(name, cache_dir=hub / commit)

    monkeypatch.setattr(datasets, "load_dataset", load_into_a_cache_as_the_hubs)
    for place in ("SetFit/subj", "SetFit/subj@v1"):
        _, tasks, _ = build(None, hub / "out.dod", InspectConfig(sets=("subj",), hub={"subj": place}))
        assert tasks["subj"].source == f"SetFit/subj@{commit}"
    assert revisions == [None, "v1"]


def test_class_names_count_and_not_their_numbers(hub: Path) -> None:
    import datasets

    names = datasets.ClassLabel(names=["positive", "negative"])  # the other way round
    for split in ("train", "validation"):
        dataset = datasets.Dataset.from_list(hub_rows("stanfordnlp/sst2", split)).cast_column("label", names)
        dataset.to_parquet(hub / "stanfordnlp/sst2/data" / f"{split}-00000-of-00001.parquet")
    (hub / "stanfordnlp/sst2/data/test-00000-of-00001.parquet").unlink()
    _, tasks, _ = build(None, hub / "out.dod")
    assert pairs_of(tasks["sst2"], "test")[:2] == [("validation 0", "positive"), ("validation 1", "negative")]


def test_subfolders_as_downloaded_and_as_saved(hub: Path, tmp_path: Path) -> None:
    import datasets

    source = tmp_path / "in"
    source.mkdir()
    datasets.load_dataset("SetFit/subj").save_to_disk(source / "subj")
    (hub / "fancyzhx" / "ag_news").rename(source / "agnews")
    _, tasks, note = build(source, tmp_path / "out.dod", InspectConfig(sets=("subj", "agnews")))
    assert [pair.output for pair in tasks["subj"].pairs_of("test")] == HUB_TESTS["subj"]
    assert [pair.output for pair in tasks["agnews"].pairs_of("test")] == HUB_TESTS["agnews"]
    assert note["sets"]["agnews"]["source"] == "the folder agnews"


def test_bad_rows_on_the_hub_are_named(hub: Path) -> None:
    import datasets

    bad = datasets.Dataset.from_list([{"text": "a", "label": 0, "label_text": "what"}])
    bad.to_parquet(hub / "SetFit" / "subj" / "data" / "test-00000-of-00001.parquet")
    assert refused(None, InspectConfig(sets=("subj",))) == (
        "'SetFit/subj', split 'test', row 1: found unknown labels in column 'label_text': 'what'; expected 'objective', "
        "'subjective'. Correct them."
    )


def test_unreachable_hub(tmp_path: Path) -> None:
    program = (
        "from pathlib import Path\n"
        "from softprompt_registry.dod.inspect_datasets import InspectConfig, build_dod_inspect\n"
        "from softprompt_registry.errors import DataError\n"
        "try:\n    build_dod_inspect(None, Path('out.dod'), config=InspectConfig())\n"
        "except DataError as error:\n    print(error)\n"
    )
    root = str(Path(__file__).parent.parent)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": root}
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith(
        "building the evaluation sets from the Hugging Face Hub: loading 'stanfordnlp/sst2': `datasets` cannot reach the "
        "Hugging Face Hub (ConnectionError: "
    )
    assert result.stdout.endswith(
        "expected a dataset that this machine can reach. Check the network and the name, or give a folder with the sets' "
        "files.\n"
    )
    assert not (tmp_path / "out.dod").exists()


def test_datasets_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = refused(None)
    assert message.startswith("the package 'datasets' is not installed")
    assert "Run `pip install 'softprompt-registry[hub]'`" in message


# Bad sources


BAD_FILES: list[tuple[dict[str, bytes], str]] = [
    (
        {"sst2_train__jsonl": jsonl_bytes([*TRAIN, *rows(("a", "meh"), ("b", "meh"), ("c", 7))])},
        "'sst2_train.jsonl', line 5: found unknown labels in column 'label': 'meh', '7'; expected 'positive', 'negative', "
        "'0', '1'. Correct them.",
    ),
    (
        {"sst2_train__csv": b"text,label\nfine,positive\npoor\n"},
        "'sst2_train.csv', line 3: found 1 cell; expected 2, as in the header ['text', 'label']. Put quotes",
    ),
    (
        {"sst2_train__jsonl": b'{"text": "fine", "label": 1}\n{"text": '},
        "'sst2_train.jsonl', line 2: found broken JSON",
    ),
    (
        {"sst2_train__csv": b"review,label\nfine,positive\n"},
        "'sst2_train.csv', line 1: found the columns ['review', 'label']; expected 'sentence' or 'text'. Rename the column",
    ),
    (
        {"sst2_train__csv": b"text,mood\nfine,positive\n"},
        "'sst2_train.csv', line 1: found the columns ['text', 'mood']; expected 'label_text' or 'label'.",
    ),
    (
        {"sst2_train__jsonl": b'{"text": "fine", "label": 1}\n{"text": "poor"}\n'},
        "'sst2_train.jsonl', line 2: found the columns ['text']; expected 'label'.",
    ),
    (
        {"sst2_train__jsonl": b'{"text": 5, "label": 1}\n'},
        "'sst2_train.jsonl', line 1: found int 5 as text; expected a string of Unicode text. Correct it.",
    ),
    (
        {"sst2_train__jsonl": b'{"text": "\\ud800", "label": 1}\n'},
        "'sst2_train.jsonl', line 1: found str '\\ud800' as text; expected",
    ),
    (
        {"sst2_train__jsonl": jsonl_bytes([*TRAIN, *rows(("a", -1), ("b", ""))])},
        "'sst2_train.jsonl', line 5: found no label there and in 1 other rows; expected all rows of a split to have one",
    ),
    ({"sst2_train__parquet": b"PAR1"}, "'sst2_train.parquet', row 1: found a file that cannot be read"),
    ({"sst2_train__csv": b""}, "'sst2_train.csv', line 1: found the columns [] without ['sentence', 'label_text']"),
    (
        {"sst2_train__csv": csv_bytes(TRAIN), "sst2_train__jsonl": jsonl_bytes(TRAIN)},
        "'sst2_train.jsonl' and 'sst2_train.csv' both hold the train split of 'sst2'; expected one file for each split.",
    ),
    (
        {"sst2_test__csv": csv_bytes(TEST)},
        "set 'sst2' has no rows left for train and validation; expected some in every split.",
    ),
    (
        {"sst2_train__csv": csv_bytes(TRAIN), "sst2_test__csv": csv_bytes(TRAIN)},
        "set 'sst2' has no rows left for train and validation; expected some in every split. Add rows, or check whether",
    ),
    (
        {"sst2_train__csv": csv_bytes(TRAIN)},
        "set 'sst2': found these labelled rows: 4 in train; expected some in test, or in validation to serve as test.",
    ),
    (
        {"sst2_train__csv": csv_bytes(TRAIN[:1]), "sst2_test__csv": csv_bytes(TEST[:1])},
        "set 'sst2' has usable rows of the labels ['positive']; expected some of each of ['positive', 'negative'].",
    ),
    (
        {"sst_train__csv": csv_bytes(TRAIN)},
        "nothing of the set 'sst2' is there; expected sst2_train, sst2_validation and sst2_test, each ending in one of .csv",
    ),
]


@pytest.mark.parametrize(("files", "message"), BAD_FILES, ids=[message[:60] for _, message in BAD_FILES])
def test_bad_files(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    assert refused(write(tmp_path, **files)).startswith(message)


def test_the_fine_numbers_of_trec_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path, trec_train__jsonl=jsonl_bytes(rows(("Who ?", 3))))
    message = refused(source, InspectConfig(sets=("trec",)))
    assert message.startswith(
        "'trec_train.jsonl', line 1: found unknown labels in column 'label': '3'; expected 'description'"
    )


def test_bad_folder_and_existing_output(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such folder; expected one with the sets' files"):
        build_dod_inspect(tmp_path / "none", tmp_path / "out.dod", config=SST2)
    (tmp_path / "out.dod").write_text("mine")
    with pytest.raises(DataError, match="exists already"):
        build_dod_inspect(None, tmp_path / "out.dod", config=SST2)
    assert (tmp_path / "out.dod").read_text() == "mine"


def test_a_subfolder_that_datasets_cannot_load(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "sst2").mkdir()
    message = refused(tmp_path)
    assert message.startswith(f"reading {str(tmp_path / 'sst2')!r}: `datasets` failed (EmptyDatasetError: ")
    assert message.endswith("expected files that `datasets` can load. Save or download the set again.")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"sets": []},
            r"sets are \[\]; expected one or more of \['sst2', 'sst5', 'trec', 'subj', 'agnews'\], each once",
        ),
        ({"sets": ["sst2", "sst2"]}, "each once. Correct the list."),
        ({"sets": ["imdb"]}, r"sets are \['imdb'\]"),
        ({"hub": {"sst-2": "a/b"}}, r"hub names the sets \['sst-2'\]; expected only"),
        ({"max_test_pairs": 0}, "max_test_pairs is 0; expected 1 or more, or null for all pairs"),
        ({"validation_share": 0.0}, "validation_share is 0.0; expected a share between 0 and 1"),
    ],
)
def test_config_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(InspectConfig, settings)


def test_progress(tmp_path: Path) -> None:
    class Told(NullRecorder):
        notes: list[str] = []

        def progress(self, title: str, total: int) -> Any:
            self.notes.append(f"{title} {total}")
            bar = super().progress(title, total)
            bar.advance = lambda steps=1, note="": self.notes.append(note)  # type: ignore[attr-defined]
            return bar

    write(tmp_path, sst2_train__csv=csv_bytes(TRAIN), sst2_test__csv=csv_bytes(TEST))
    recorder = Told()
    build_dod_inspect(tmp_path, tmp_path / "out.dod", config=SST2, recorder=recorder)
    assert recorder.notes == ["evaluation sets 1", "sst2"]


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
