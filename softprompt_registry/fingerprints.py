"""Every digest in the project is computed here, so that two artifacts agree on what "the same" means.

All digests are lower-case hex SHA-256. Text is hashed as UTF-8 JSON with sorted keys, so a digest does not depend on the
platform, on dict order or on float formatting of another language.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

SHORT = 12
"""Characters of a digest shown to people and used in names."""


def digest_of_json(value: Any) -> str:
    """SHA-256 of `value` written as canonical JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def digest_of_texts(*texts: str) -> str:
    """`digest_of_json` of a list of strings, in a sixth of the time for long ones."""
    try:
        return hashlib.sha256(orjson.dumps(texts)).hexdigest()
    except orjson.JSONEncodeError:  # a lone surrogate
        return digest_of_json(texts)


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file's bytes, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def digest_of_task(
    *,
    name: str,
    kind: str,
    labels: Sequence[str],
    hard_prompts: Sequence[str],
    pairs: Iterable[tuple[str, str, str]],
) -> str:
    """Digest of one task that does not depend on the order of its pairs.

    Args:
        name: the task's name; two tasks with equal pairs but different names are different tasks.
        kind: `classification` or `generation`.
        labels: in the order of the task, which matters to a reader of a label list.
        hard_prompts: the ground-truth prompts.
        pairs: (split, input, output); each is hashed alone, the sorted hashes are hashed together.
    """
    value = {"name": name, "kind": kind, "labels": list(labels), "hard_prompts": list(hard_prompts)}
    pairs = list(pairs)
    try:
        # The same as below, in less than half the time; it is called for millions of pairs.
        encode, sha256 = orjson.dumps, hashlib.sha256
        pair_digests = sorted([sha256(encode(pair)).hexdigest() for pair in pairs])
        return sha256(encode(value | {"pairs": pair_digests}, option=orjson.OPT_SORT_KEYS)).hexdigest()
    except orjson.JSONEncodeError:  # a lone surrogate, which orjson refuses
        return digest_of_json(value | {"pairs": sorted(digest_of_json(pair) for pair in pairs)})


def digest_of_dod(task_digests: Mapping[str, str], task_splits: Mapping[str, str]) -> str:
    """Digest of a DoD from its tasks' digests and their splits, independent of the order they were added in."""
    return digest_of_json(sorted((name, task_splits[name], digest) for name, digest in task_digests.items()))


def digest_of_directory(folder: Path) -> str:
    """Digest of all files below `folder` by relative name and content."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return digest_of_json([(path.relative_to(folder).as_posix(), digest_of_file(path)) for path in files])
