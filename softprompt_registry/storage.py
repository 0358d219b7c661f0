"""How files get onto the disk: whole or not at all, and by one process at a time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from softprompt_registry.errors import ArtifactError, BusyError


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name, then rename, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in `path`; `what` names it in the error."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(
            f"reading {what}: {str(path)!r} is missing; expected a folder written by softprompt-registry. "
            "Check the path, or make the artifact again."
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtifactError(f"reading {what}: {str(path)!r} is not JSON ({error}). Make the artifact again.") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"reading {what}: {str(path)!r} holds a {type(value).__name__}, not an object.")
    return value


def require_same_origin(what: str, folder: Path, found: str | None, expected: str) -> None:
    """Refuse to take over, or to overwrite, a finished output that was made from other inputs or settings."""
    if found != expected:
        raise ArtifactError(
            f"writing {what} to {str(folder)!r}: one made from other inputs or settings is there already, and nothing is "
            "overwritten. Choose another output, or remove that folder."
        )


def require_free_folder(folder: Path, doing: str) -> None:
    """Refuse an output folder that exists."""
    if folder.exists():
        raise ArtifactError(f"{doing}: {str(folder)!r} exists already; expected a new folder. Choose another one.")


def check_format_version(record: dict[str, Any], supported: int | tuple[int, ...], what: str) -> None:
    found = record.get("format_version")
    known = supported if isinstance(supported, tuple) else (supported,)
    if found not in known:
        raise ArtifactError(
            f"reading {what}: its format_version is {found!r}; this version of softprompt-registry reads "
            f"{' and '.join(map(str, known))}. "
            "Use the version that wrote it, or make it again."
        )


@contextlib.contextmanager
def complete_record(what: str) -> Iterator[None]:
    """Building an object from a stored record in the block: an entry that is missing is a damaged artifact."""
    try:
        yield
    except (KeyError, TypeError) as error:
        raise ArtifactError(
            f"reading {what}: its record is incomplete ({error}); expected one written by softprompt-registry. "
            "Make it again."
        ) from error


@contextlib.contextmanager
def folder_written_whole(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` when the block ends without an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial, replaced = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("partial", "replaced"))
    for rest in (partial, replaced):
        shutil.rmtree(rest, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        # The old folder is moved away whole: deleting it in place, a kill would leave half of it under its name.
        if folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All that the block writes into a SQLite database, or nothing of it."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # SQLite itself rolls back when the disk is full
            connection.execute("ROLLBACK")
        raise


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; the kernel frees the lock however the process ends.

    Raises:
        BusyError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _held(folder / ".lock", folder):
        yield


@contextlib.contextmanager
def locked_file(path: Path) -> Iterator[None]:
    """Hold the name `path` for this process, by a hidden lock file beside it that is removed at the end.

    Raises:
        BusyError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}.lock")
    with _held(lock, path):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


@contextlib.contextmanager
def _held(lock: Path, what: Path) -> Iterator[None]:
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it may have removed it just now; then this is no longer the file that others would lock.
            held = lock.exists() and os.path.samestat(lock.stat(), os.fstat(file.fileno()))
        except BlockingIOError:
            held = False
        except OSError as error:  # many network file systems are mounted without locks
            raise ArtifactError(
                f"writing to {str(what)!r}: the file system cannot lock files there ({error}); expected one that can, so "
                "that two processes never write the same output. Choose an output on a local disk, or mount it with locks."
            ) from error
        if not held:
            raise BusyError(
                f"writing to {str(what)!r}: another process is working there. Wait for it to end, or choose "
                "another output."
            )
        yield


def forget(folder: Path) -> None:
    """Remove a working folder, its lock included, once its result is in place: whoever comes next finds that result."""
    shutil.rmtree(folder)
