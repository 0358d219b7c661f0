"""Files and folders appear whole or not at all, and one process at a time writes."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from softprompt_registry import storage
from softprompt_registry.errors import ArtifactError, BusyError


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_written_with_its_folders_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "text.txt"
    storage.write_text(path, "première\n")
    storage.write_text(path, "deuxième\n")
    assert path.read_text(encoding="utf-8") == "deuxième\n"
    assert names_in(path.parent) == ["text.txt"]


def test_json_keeps_its_characters_and_comes_back_equal(tmp_path: Path) -> None:
    value = {"name": "été 東京", "numbers": [1, 0.1, None]}
    storage.write_json(tmp_path / "a.json", value)
    assert (tmp_path / "a.json").read_text(encoding="utf-8").startswith('{\n  "name": "été 東京",\n')
    assert storage.read_json(tmp_path / "a.json", "a test") == value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing; expected a folder written by softprompt-registry"),
        (b'{"half": ', "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[1]", "holds a list, not an object"),
    ],
)
def test_unreadable_json_names_the_thing_and_the_file(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "bank.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArtifactError, match=f"reading a bank: .*{path}") as caught:
        storage.read_json(path, "a bank")
    assert message in str(caught.value)


def test_another_format_version_names_both() -> None:
    storage.check_format_version({"format_version": 1}, 1, "bank 'b'")
    with pytest.raises(ArtifactError, match="reading bank 'b': its format_version is 2; this version .* reads 1"):
        storage.check_format_version({"format_version": 2}, 1, "bank 'b'")
    with pytest.raises(ArtifactError, match="its format_version is None"):
        storage.check_format_version({}, 1, "bank 'b'")


def test_an_output_made_from_something_else_is_not_taken_over(tmp_path: Path) -> None:
    storage.require_same_origin("a bank", tmp_path, "abc", "abc")
    for found in ("other", None):
        with pytest.raises(ArtifactError, match="made from other inputs or settings is there already, and nothing is"):
            storage.require_same_origin("a bank", tmp_path, found, "abc")


def test_a_folder_takes_the_place_of_the_old_one_with_none_of_its_files(tmp_path: Path) -> None:
    for name in ("old", "new"):
        with storage.folder_written_whole(tmp_path / "deep" / "artifact") as partial:
            (partial / f"{name}.txt").write_text(name)
    assert names_in(tmp_path / "deep") == ["artifact"]
    assert names_in(tmp_path / "deep" / "artifact") == ["new.txt"]


def test_an_error_leaves_the_old_folder_and_no_other(tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    with storage.folder_written_whole(folder) as partial:
        (partial / "a.txt").write_text("old")
    with pytest.raises(RuntimeError, match="disk full"), storage.folder_written_whole(folder) as partial:
        (partial / "a.txt").write_text("half")
        raise RuntimeError("disk full")
    assert names_in(tmp_path) == ["artifact"]
    assert (folder / "a.txt").read_text() == "old"


def test_a_rest_of_a_killed_write_does_not_get_into_the_next_one(tmp_path: Path) -> None:
    # A killed process cannot tidy up; its half folder is under the temporary name.
    script = (
        "import os, signal, sys; from pathlib import Path; from softprompt_registry import storage\n"
        "with storage.folder_written_whole(Path(sys.argv[1])) as partial:\n"
        "    (partial / 'half.txt').write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    folder = tmp_path / "artifact"
    killed = subprocess.run([sys.executable, "-c", script, str(folder)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not folder.exists() and len(names_in(tmp_path)) == 1
    with storage.folder_written_whole(folder) as partial:
        (partial / "whole.txt").write_text("whole")
    assert names_in(tmp_path) == ["artifact"] and names_in(folder) == ["whole.txt"]


def test_replacing_never_leaves_half_of_the_old_folder_in_place(tmp_path: Path) -> None:
    """Once, the old folder was deleted file by file under its own name: a kill in between left half an artifact."""
    folder = tmp_path / "artifact"
    with storage.folder_written_whole(folder) as partial:
        for number in range(3):
            (partial / f"{number}.txt").write_text("old")
    # An audit hook in a fresh process: it kills at the first file that is deleted while the folder is replaced.
    script = (
        "import os, signal, sys; from pathlib import Path; from softprompt_registry import storage\n"
        "sys.addaudithook(lambda event, _: event == 'os.remove' and os.kill(os.getpid(), signal.SIGKILL))\n"
        "with storage.folder_written_whole(Path(sys.argv[1])) as partial:\n"
        "    (partial / 'new.txt').write_text('new')\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(folder)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert names_in(folder) == ["new.txt"]
    with storage.folder_written_whole(folder) as partial:
        (partial / "newer.txt").write_text("newer")
    assert names_in(tmp_path) == ["artifact"] and names_in(folder) == ["newer.txt"]


def test_a_second_process_is_told_that_the_output_is_busy(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from softprompt_registry import storage\n"
        "with storage.locked(Path(sys.argv[1])):\n"
        "    print('held', flush=True); sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(BusyError, match="another process is working there. Wait for it to end"):
            with storage.locked(tmp_path / "out"):
                raise AssertionError("locked twice")
        os.kill(holder.pid, signal.SIGKILL)
    # However the holder ended, the lock is free again.
    with storage.locked(tmp_path / "out"):
        pass


@pytest.mark.supports("files", "file systems without locks", "refused, in one sentence")
@pytest.mark.parametrize("lock", [storage.locked, storage.locked_file])
def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lock: Any) -> None:
    """Such as NFS mounted with `nolock`, or Lustre without `flock`."""

    def no_locks(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(ArtifactError, match="cannot lock files there .*No locks available.* output on a local disk"):
        with lock(tmp_path / "out"):
            raise AssertionError("not locked")


def test_the_lock_is_freed_by_an_error_inside(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="inside"), storage.locked(tmp_path):
        raise ValueError("inside")
    with storage.locked(tmp_path):
        pass
