"""A DoD as an MLflow dataset: `mlflow.data.from_dod`, and the source `dod:<path>#sha256=<digest>` that leads back to it.

MLflow imports this module in every process and reads the annotation of `from_dod` as a class, so there is no
`from __future__ import annotations` here, and nothing of softprompt_registry is imported before it is needed.
"""

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow.data.dataset import Dataset
from mlflow.data.dataset_source import DatasetSource
from mlflow.types.schema import ColSpec, Schema

if TYPE_CHECKING:
    from softprompt_registry.dod.store import DodStore

DIGEST_LENGTH = 36
"""MLflow's limit for a dataset's digest; the source holds the whole one."""

_SCHEME = "dod:"
_DIGEST_MARK = "#sha256="
_SQLITE_MAGIC = b"SQLite format 3\0"
_APPLICATION_ID = b"DoD1"
"""`dod.store.APPLICATION_ID` as it lies in the file, so that a foreign file can be told apart without our package."""


class DodSource(DatasetSource):
    """Where a DoD lies, and which content it had. The path is kept as it was given: a relative one is looked up from the
    folder in which `load` is called."""

    def __init__(self, path: str, digest: str) -> None:
        self.path = path
        self.digest = digest

    @property
    def uri(self) -> str:
        return f"{_SCHEME}{self.path}{_DIGEST_MARK}{self.digest}"

    @staticmethod
    def _get_source_type() -> str:
        return "dod"

    def load(self) -> Path:
        """The file's path, once its content is known to be the recorded one.

        Raises:
            DataError: the file is gone, is not a DoD, or has another content.
        """
        from softprompt_registry.errors import DataError

        path = Path(self.path)
        if not path.is_file():
            raise DataError(
                f"loading {self.uri!r}: there is no file {self.path!r} as seen from {str(Path.cwd())!r}; expected the DoD "
                "that the run was started with. Bring it back there, or open a copy with `mlflow.data.from_dod(path, "
                f"digest={self.digest[:DIGEST_LENGTH]!r})`, which checks that it is the same."
            )
        with _open(path) as store:
            _require_digest(store, self.digest, f"loading {self.uri!r}")
        return path

    @staticmethod
    def _can_resolve(raw_source: Any) -> bool:
        if isinstance(raw_source, str) and raw_source.startswith(_SCHEME):
            return True
        return isinstance(raw_source, str | Path) and _is_dod_file(Path(raw_source))

    @classmethod
    def _resolve(cls, raw_source: Any) -> "DodSource":
        text = str(raw_source).removeprefix(_SCHEME)
        path, mark, digest = text.rpartition(_DIGEST_MARK)
        if mark:
            return cls(path, digest)
        with _open(Path(text)) as store:
            return cls(text, store.digest)

    def to_dict(self) -> dict[str, Any]:
        return {"uri": self.uri}

    @classmethod
    def from_dict(cls, source_dict: dict[Any, Any]) -> "DodSource":
        return cls._resolve(source_dict["uri"])


class DodDataset(Dataset):
    """A DoD for `mlflow.log_input`: what it is made of, without its examples."""

    def __init__(self, source: DodSource, manifest: dict[str, Any], name: str | None = None) -> None:
        self.manifest = manifest
        """Of `DodStore.manifest`: every task with its digest."""
        super().__init__(source=source, name=name or str(manifest["name"]))

    def _compute_digest(self) -> str:
        return str(self.manifest["digest"])[:DIGEST_LENGTH]

    @property
    def schema(self) -> Schema:
        """The columns of its pairs."""
        return Schema([ColSpec("string", name) for name in ("task", "kind", "split", "input", "output")])

    @property
    def profile(self) -> dict[str, Any]:
        """How many tasks and pairs, and how the tasks divide."""
        tasks = self.manifest["tasks"]
        return {
            "num_tasks": self.manifest["num_tasks"],
            "num_pairs": self.manifest["num_pairs"],
            "kinds": dict(sorted(Counter(task["kind"] for task in tasks).items())),
            "splits": dict(sorted(Counter(task["split"] for task in tasks).items())),
            "digest": self.manifest["digest"],
            "format_version": self.manifest["format_version"],
        }

    def to_dict(self) -> dict[str, str]:
        return {
            **super().to_dict(),
            "schema": json.dumps({"mlflow_colspec": self.schema.to_dict()}),
            "profile": json.dumps(self.profile),
        }


def from_dod(path: str | Path, name: str | None = None, digest: str | None = None) -> DodDataset:
    """A DoD file as a dataset; also reachable as `mlflow.data.from_dod`.

    Args:
        name: None takes the file's name without its ending.
        digest: what the DoD's digest is expected to start with; None accepts any.

    Raises:
        DataError: the file is not a DoD, or has another digest.
    """
    with _open(Path(path)) as store:
        if digest is not None:
            _require_digest(store, digest, f"opening DoD {str(path)!r}")
        manifest = store.manifest()
    return DodDataset(DodSource(str(path), manifest["digest"]), manifest, name)


def _open(path: Path) -> "DodStore":
    from softprompt_registry.dod.store import DodStore

    return DodStore.open(path)


def _require_digest(store: "DodStore", expected: str, doing: str) -> None:
    from softprompt_registry.errors import DataError

    found = store.digest
    if not expected or not found.startswith(expected):
        raise DataError(
            f"{doing}: the file {str(store.path)!r} has digest {found[:DIGEST_LENGTH]}, expected "
            f"{expected[:DIGEST_LENGTH]!r}; its tasks are not those that were recorded. Use the DoD that was recorded."
        )


def _is_dod_file(path: Path) -> bool:
    if path.suffix != ".sqlite" or not path.is_file():
        return False
    with path.open("rb") as file:
        header = file.read(72)
    return header.startswith(_SQLITE_MAGIC) and header[68:72] == _APPLICATION_ID
