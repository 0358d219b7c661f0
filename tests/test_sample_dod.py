"""The sample DoD is frozen, and an audit finds neither errors nor warnings in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from softprompt_registry.dod.audit import AuditConfig, audit_dod
from softprompt_registry.dod.store import DodStore
from softprompt_registry.dod.task import PAIR_SPLITS
from softprompt_registry.errors import DataError
from softprompt_registry.sample import SAMPLE_FOLDER, build_sample_dod

DIGEST = "c8e079b7eee91a40f1bd217a8ac94aea6a75f1420455f46a177544b0d29e2c0b"
TEST_TASKS = {"instruments", "farm_animals", "meals", "support_tickets", "temperature", "genres", "past_tense"}


def test_digest_is_pinned(tmp_path: Path) -> None:
    """Soft prompts, translators and figures name this digest. Change the sample only together with all of them."""
    path = build_sample_dod(tmp_path / "sample.dod")
    with DodStore.open(path) as store:
        assert store.digest == DIGEST
        assert store.manifest()["num_pairs"] == sum(
            len(file.read_text().splitlines()) for file in SAMPLE_FOLDER.glob("*.jsonl") if file.name != "tasks.jsonl"
        )
        assert set(store.task_names("test")) == TEST_TASKS
        for task in store.tasks():
            assert task.source == "softprompt-registry sample, Apache-2.0"
            assert all(task.pairs_of(split) for split in PAIR_SPLITS) and len(task.hard_prompts) == 1, task.name


def test_an_audit_finds_nothing_wrong(tmp_path: Path) -> None:
    audit = audit_dod(build_sample_dod(tmp_path / "sample.dod"), config=AuditConfig())
    assert audit.passed(strict=True), audit.findings


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "sample.dod").write_text("mine")
    with pytest.raises(DataError, match="exists already"):
        build_sample_dod(tmp_path / "sample.dod")
    assert (tmp_path / "sample.dod").read_text() == "mine"
