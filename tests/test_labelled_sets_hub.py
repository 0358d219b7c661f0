"""The evaluation sets from the Hub and its saved copies, through `datasets` on local files that look as there."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from softprompt_registry.dod.labelled_sets import (
    EVALUATION_LABELS,
    InspectConfig,
    LabelledSetsReport,
    build_dod_inspect,
)
from softprompt_registry.dod.store import DodStore
from softprompt_registry.dod.task import Task
from softprompt_registry.errors import DataError


def build(source: Path | None, out: Path, config: InspectConfig) -> tuple[LabelledSetsReport, dict[str, Task]]:
    report = build_dod_inspect(source, out, config=config, overwrite=True)
    with DodStore.open(out) as store:
        return report, {task.name: task for task in store.tasks()}


def outputs_of(task: Task) -> list[str]:
    return [pair.output for pair in task.pairs_of("test")]


def refused(source: Path | None, config: InspectConfig) -> str:
    with pytest.raises(DataError) as error:
        build_dod_inspect(source, Path("refused.dod"), config=config)
    assert not Path("refused.dod").exists()
    return str(error.value)


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
    report, tasks = build(None, hub / "out.dod", InspectConfig())
    assert list(tasks) == ["sst2", "sst5", "trec", "subj", "agnews"]
    assert {name: outputs_of(task) for name, task in tasks.items()} == HUB_TESTS
    assert tasks["sst2"].pairs_of("test")[0].input == "validation 0"
    assert {name: task.labels for name, task in tasks.items()} == EVALUATION_LABELS
    assert report.table()["train"] == [9, 10, 11, 5, 7]
    assert report.table()["validation"] == [1, 10, 1, 1, 1]
    assert report.table()["unlabelled"] == [2, 0, 0, 0, 0]
    with DodStore.open(hub / "out.dod") as store:
        note = store.metadata()["build"]
    assert note["from"] == "hub" and note["sets"]["trec"]["source"] == "SetFit/TREC-QC"
    again, _ = build(None, hub / "again.dod", InspectConfig())
    assert again.digest == report.digest


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
        _, tasks = build(None, hub / "out.dod", InspectConfig(sets=("subj",), hub={"subj": place}))
        assert tasks["subj"].source == f"SetFit/subj@{commit}"
    assert revisions == [None, "v1"]


def test_another_repository_and_class_names_in_another_order(hub: Path) -> None:
    import datasets

    names = datasets.ClassLabel(names=["positive", "negative"])
    for split in ("train", "validation"):
        dataset = datasets.Dataset.from_list(hub_rows("stanfordnlp/sst2", split)).cast_column("label", names)
        (hub / "copy").mkdir(exist_ok=True)
        dataset.to_parquet(hub / "copy" / f"{split}.parquet")
    _, tasks = build(None, hub / "out.dod", InspectConfig(sets=("sst2",), hub={"sst2": "copy@v1"}))
    assert outputs_of(tasks["sst2"])[:2] == ["positive", "negative"] and tasks["sst2"].source == "copy@v1"


def test_subfolders_as_downloaded_and_as_saved(hub: Path, tmp_path: Path) -> None:
    import datasets

    source = tmp_path / "in"
    source.mkdir()
    datasets.load_dataset("SetFit/subj").save_to_disk(source / "subj")
    (hub / "fancyzhx" / "ag_news").rename(source / "agnews")
    _, tasks = build(source, tmp_path / "out.dod", InspectConfig(sets=("subj", "agnews")))
    assert outputs_of(tasks["subj"]) == HUB_TESTS["subj"]
    assert outputs_of(tasks["agnews"]) == HUB_TESTS["agnews"]
    assert tasks["agnews"].source == "the folder agnews"


def test_bad_rows_on_the_hub_are_named(hub: Path) -> None:
    import datasets

    bad = datasets.Dataset.from_list([{"text": "a", "label": 0, "label_text": "what"}])
    bad.to_parquet(hub / "SetFit" / "subj" / "data" / "test-00000-of-00001.parquet")
    assert refused(None, InspectConfig(sets=("subj",))).endswith(
        ": 'SetFit/subj', split 'test', row 1: found unknown labels in column 'label_text': 'what'; expected 'objective', "
        "'subjective'. Correct them."
    )


def test_unreachable_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    message = refused(None, InspectConfig(sets=("sst2",)))
    assert message.startswith(
        "building the evaluation sets from the Hugging Face Hub: loading 'stanfordnlp/sst2': `datasets` cannot reach the "
        "Hugging Face Hub (ConnectionError: "
    )
    assert message.endswith(
        "a dataset that this machine can reach. Check the name and the network, or use local files."
    )


def test_datasets_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = refused(None, InspectConfig(sets=("sst2",)))
    assert ": the package 'datasets' is not installed; expected it" in message
    assert "Run `pip install 'softprompt-registry[hub]'`" in message


def test_a_subfolder_that_datasets_cannot_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("datasets")
    (tmp_path / "sst2").mkdir()
    message = refused(tmp_path, InspectConfig(sets=("sst2",)))
    assert f": reading {str(tmp_path / 'sst2')!r}: `datasets` failed (EmptyDatasetError: " in message
    assert "expected files that it can load. Check the name and the network, or use local files." in message
