"""A DoD as an MLflow dataset, and the source that leads back to it."""

from __future__ import annotations

import json
import sqlite3
import warnings
from pathlib import Path

import mlflow
import pytest
from mlflow.data.dataset_source_registry import get_dataset_source_from_json, resolve_dataset_source

from mlflow_plugins import dod_dataset
from mlflow_plugins.dod_dataset import DodDataset, DodSource, from_dod
from softprompt_registry.dod.store import APPLICATION_ID, DodStore
from softprompt_registry.dod.task import Pair, Task
from softprompt_registry.errors import DataError


def make_dod(path: Path, *, extra: bool = False) -> Path:
    with DodStore.create(path) as store:
        pairs = (Pair("warm", "good"), Pair("cold", "bad", "validation"), Pair("grey", "bad", "test"))
        store.add_task(Task("mood", "classification", pairs, labels=("good", "bad")))
        store.add_task(Task("echo", "generation", (Pair("a", "a"),), hard_prompts=("Repeat.",), split="test"))
        if extra:
            store.add_task(Task("more", "generation", (Pair("b", "c"),)))
    return path


@pytest.fixture
def dod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DoD under a relative path."""
    monkeypatch.chdir(tmp_path)
    make_dod(tmp_path / "data" / "demo.sqlite")
    return Path("data/demo.sqlite")


def test_dataset_of_a_dod(dod: Path) -> None:
    with DodStore.open(dod) as store:
        digest = store.digest
    dataset = from_dod(dod)
    assert isinstance(dataset, DodDataset)
    assert dataset.name == "demo" and dataset.digest == digest[:36]
    assert dataset.source.uri == f"dod:data/demo.sqlite#sha256={digest}"
    assert dataset.profile == {
        "num_tasks": 2,
        "num_pairs": 4,
        "kinds": {"classification": 1, "generation": 1},
        "splits": {"test": 1, "train": 1},
        "digest": digest,
        "format_version": 1,
    }
    assert dataset.schema.input_names() == ["task", "kind", "split", "input", "output"]
    record = dataset.to_dict()
    assert json.loads(record["profile"]) == dataset.profile
    assert [column["name"] for column in json.loads(record["schema"])["mlflow_colspec"]] == dataset.schema.input_names()
    assert from_dod(str(dod), name="other").name == "other"


def test_mlflow_knows_the_constructor() -> None:
    assert mlflow.data.from_dod is from_dod


def test_run_leads_back_to_the_file(mlflow_store: str, dod: Path) -> None:
    with mlflow.start_run() as run:
        mlflow.log_input(mlflow.data.from_dod(dod), context="tuning")
    stored = mlflow.get_run(run.info.run_id).inputs.dataset_inputs[0].dataset
    assert stored.source_type == "dod"
    # Neither tasks nor the folder that the run happened in: a thousand tasks make it no longer.
    assert len(stored.source) < 200 and str(Path.cwd()) not in stored.source
    source = mlflow.data.get_source(stored)
    assert isinstance(source, DodSource)
    assert source.load() == dod


def test_odd_paths_survive(tmp_path: Path) -> None:
    path = make_dod(tmp_path / "a #sha256= b%20ü" / "demo.sqlite")
    dataset = from_dod(path)
    source = get_dataset_source_from_json(dataset.source.to_json(), "dod")
    assert source.load() == path
    assert source.to_dict() == dataset.source.to_dict()


def test_gone_and_changed_files_are_refused(dod: Path) -> None:
    source = from_dod(dod).source
    dod.rename("moved.sqlite")
    with pytest.raises(DataError, match=r"there is no file 'data/demo.sqlite' as seen from .*Bring it back there"):
        source.load()
    assert from_dod("moved.sqlite", digest=source.digest[:36]).source.digest == source.digest
    make_dod(dod, extra=True)
    with pytest.raises(DataError, match=rf"has digest \w+, expected '{source.digest[:36]}'; its tasks are not those"):
        source.load()
    with pytest.raises(DataError, match="expected '1234'"):
        from_dod(dod, digest="1234")


def test_sources_that_are_ours(dod: Path, tmp_path: Path) -> None:
    assert DodSource._can_resolve("dod:anything")
    assert DodSource._can_resolve(dod) and DodSource._can_resolve(str(dod))
    foreign = tmp_path / "foreign.sqlite"
    connection = sqlite3.connect(foreign)
    connection.execute("CREATE TABLE t (x)")
    connection.commit()
    connection.close()
    text = tmp_path / "text.sqlite"
    text.write_text("DoD1")
    for other in (foreign, text, tmp_path, tmp_path / "missing.sqlite", "s3://bucket/a.sqlite", 3, None, {"a": 1}):
        assert not DodSource._can_resolve(other)


def test_mlflow_resolves_our_uris(dod: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = resolve_dataset_source(from_dod(dod).source.uri)
        without_digest = resolve_dataset_source(f"dod:{dod}")
    assert isinstance(source, DodSource) and source.load() == dod
    assert without_digest.to_dict() == source.to_dict()


def test_application_id_is_the_stores() -> None:
    assert int.from_bytes(dod_dataset._APPLICATION_ID, "big") == APPLICATION_ID
