"""From what a user names to soft prompts, where folders and tasks have names with '#', spaces and '%'."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_prompts import make

from softprompt_registry.errors import RegistryError
from softprompt_registry.registry.artifacts import find_soft_prompts
from softprompt_registry.registry.lookup import ModelUri, parse_model_uri, split_member
from softprompt_registry.soft_prompts.bank import SoftPromptBank


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: banks in `C# 50%20 Grüße`, beside a folder with the name up to the '#'."""
    place = tmp_path / "C# 50%20 Grüße"
    for name in ("bank", "bank#2"):
        SoftPromptBank.save([make(f"{name[4:]}{task}", 0) for task in ("moods", "a / b %20")], place / name)
    make("alone").save(place / "one#1")
    (tmp_path / "C").mkdir()
    monkeypatch.chdir(tmp_path)
    return place


@pytest.mark.supports("files", "folders with spaces and `#` in their names", "supported")
@pytest.mark.parametrize(
    ("rest", "tasks"),
    [
        ("bank#moods", ["moods"]),
        ("bank#a / b %20", ["a / b %20"]),
        ("bank", ["moods", "a / b %20"]),
        ("bank#", ["moods", "a / b %20"]),
        ("bank#2", ["#2moods", "#2a / b %20"]),
        ("bank#2##2moods", ["#2moods"]),
        ("one#1", ["alone"]),
    ],
)
def test_a_folder_s_name_may_have_the_mark_of_a_member(folder: Path, rest: str, tasks: list[str]) -> None:
    for location in (folder.name, str(folder)):
        assert [found.record.task for found in find_soft_prompts(f"{location}/{rest}")] == tasks


def test_a_file_uri_is_a_folder(folder: Path) -> None:
    assert [found.record.task for found in find_soft_prompts((folder / "bank#2").as_uri())] == [
        "#2moods",
        "#2a / b %20",
    ]
    (found,) = find_soft_prompts(f"{(folder / 'bank').as_uri()}#a%20/%20b%20%2520")
    assert found.record.task == "a / b %20"


def test_what_is_not_there_is_named_whole(folder: Path) -> None:
    with pytest.raises(RegistryError, match=r"opening bank 'D# work/bank#moods': there is no such folder"):
        find_soft_prompts("D# work/bank#moods")


def test_a_registry_name_ends_at_the_first_mark(folder: Path) -> None:
    assert split_member("models:/bank/1#a#b") == ("models:/bank/1", "a#b")
    assert parse_model_uri("runs:/0ab/bank#moods") == ModelUri(run_id="0ab", logged_name="bank")
