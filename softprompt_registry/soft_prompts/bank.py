"""A bank: the soft prompts of many tasks of one base model in one artifact. Format: docs/formats.md."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprompt_registry.base_models.reference import BaseModelRef, require_same_base
from softprompt_registry.errors import ArtifactError
from softprompt_registry.fingerprints import digest_of_json
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt, SoftPromptRecord, check_tensor_names
from softprompt_registry.storage import (
    check_format_version,
    complete_record,
    folder_written_whole,
    read_json,
    write_json,
    write_text,
)

if TYPE_CHECKING:
    import torch

FORMAT_VERSION = 1
TENSORS_FILE = "bank.safetensors"
RECORDS_FILE = "bank.jsonl"
HEADER_FILE = "bank.json"


class SoftPromptBank:
    """A bank on disk. Records are read at once, tensors one member at a time.

    Raises:
        ArtifactError: the folder is not a bank, is damaged, or a member is unknown.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.header = read_json(folder / HEADER_FILE, "a bank of soft prompts")
        check_format_version(self.header, FORMAT_VERSION, f"bank {str(folder)!r}")
        with complete_record(f"bank {str(folder)!r}"):
            self.base_model = BaseModelRef.from_json(self.header["base_model"])

    @classmethod
    def save(cls, soft_prompts: Sequence[SoftPrompt], folder: Path, *, made_from: str | None = None) -> SoftPromptBank:
        """Write a bank whole or not at all. All members share base model and K.

        `made_from` is a digest of what the members were tuned from, by which a second start finds its own result.
        """
        import torch
        from safetensors.torch import save_file

        if not soft_prompts:
            raise ArtifactError("writing a bank: there are no soft prompts to write; at least one is needed.")
        first = soft_prompts[0]
        names = [soft_prompt.record.task for soft_prompt in soft_prompts]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ArtifactError(f"writing a bank: the tasks {doubled[:5]} occur twice; a bank has one member per task.")
        for soft_prompt in soft_prompts:
            require_same_base(
                "writing a bank",
                f"soft prompt {first.record.task!r}",
                first.record.base_model,
                f"soft prompt {soft_prompt.record.task!r}",
                soft_prompt.record.base_model,
            )
            if soft_prompt.num_virtual_tokens != first.num_virtual_tokens:
                raise ArtifactError(
                    f"writing a bank: soft prompt {soft_prompt.record.task!r} has K={soft_prompt.num_virtual_tokens}, "
                    f"{first.record.task!r} has K={first.num_virtual_tokens}; one bank has one K. Write two banks."
                )
        tensors = {"embeddings": torch.stack([soft_prompt.embeddings for soft_prompt in soft_prompts])}  # (N, K, D)
        initial = [soft_prompt.initial_embeddings for soft_prompt in soft_prompts]
        if all(tensor is not None for tensor in initial):
            tensors["initial_embeddings"] = torch.stack([tensor for tensor in initial if tensor is not None])
        records = [{"row": row, **soft_prompt.record.to_json()} for row, soft_prompt in enumerate(soft_prompts)]
        header = {
            "format_version": FORMAT_VERSION,
            "base_model": first.record.base_model.to_json(),
            "dod_name": first.record.dod_name,
            "dod_digest": first.record.dod_digest,
            "num_soft_prompts": len(soft_prompts),
            "K": first.num_virtual_tokens,
            "D": int(first.embeddings.shape[1]),
            "made_from": made_from,
            "digest": digest_of_json([[soft_prompt.record.task, soft_prompt.id] for soft_prompt in soft_prompts]),
        }
        with folder_written_whole(folder) as partial:
            save_file(
                tensors,
                partial / TENSORS_FILE,
                metadata={"format": "softprompt-bank", "base_fingerprint": first.record.base_model.fingerprint},
            )
            lines = [json.dumps(_without_base(record), ensure_ascii=False) for record in records]
            write_text(partial / RECORDS_FILE, "\n".join(lines) + "\n")
            write_json(partial / HEADER_FILE, header)
        return cls(folder)

    @property
    def digest(self) -> str:
        """Digest over the members' names and numbers."""
        return str(self.header["digest"])

    @property
    def dod_digest(self) -> str | None:
        digest = self.header.get("dod_digest")
        return None if digest is None else str(digest)

    @cached_property
    def records(self) -> dict[str, dict[str, Any]]:
        """The members' records by task name, in order."""
        base_model = self.header["base_model"]
        what = f"bank {str(self.folder)!r}"
        try:
            # Not splitlines(): it also splits at U+2028 and U+0085, which JSON leaves inside a text as they are.
            lines = (self.folder / RECORDS_FILE).read_text(encoding="utf-8").removesuffix("\n").split("\n")
            records = [{**json.loads(line), "base_model": base_model} for line in lines]
        except (OSError, ValueError) as error:
            raise ArtifactError(f"reading {what}: {RECORDS_FILE} cannot be read ({error}). Make it again.") from error
        with complete_record(what):
            return {record["task"]: record for record in records}

    def __len__(self) -> int:
        return int(self.header["num_soft_prompts"])

    def __iter__(self) -> Iterator[SoftPrompt]:
        return (self.member(task) for task in self.records)

    def member(self, task: str) -> SoftPrompt:
        """One soft prompt; only its rows are read from the disk."""
        from safetensors import SafetensorError, safe_open

        if task not in self.records:
            known = list(self.records)
            raise ArtifactError(
                f"reading {task!r} of bank {self.folder.name!r}: it has no such member among its {len(known)} "
                f"({', '.join(known[:8])}{', …' if len(known) > 8 else ''}). Correct the part after '#'."
            )
        what = f"bank {str(self.folder)!r}"
        with complete_record(what):
            record = SoftPromptRecord.from_json(self.records[task])
            row = int(self.records[task]["row"])
        try:
            with safe_open(self.folder / TENSORS_FILE, framework="pt") as file:
                stored = set(file.keys())
                check_tensor_names(stored, what)
                embeddings: torch.Tensor = file.get_slice("embeddings")[row]
                initial = file.get_slice("initial_embeddings")[row] if "initial_embeddings" in stored else None
        except (OSError, IndexError, SafetensorError) as error:
            raise ArtifactError(f"reading {what}: {TENSORS_FILE} cannot be read ({error}). Make it again.") from error
        return SoftPrompt(embeddings, initial, record)


def _without_base(record: dict[str, Any]) -> dict[str, Any]:
    """The base model stands once, in the header."""
    return {key: value for key, value in record.items() if key != "base_model"}
