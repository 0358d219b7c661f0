"""The soft prompt as an artifact: a (K, D) tensor with what it was tuned on. Format: docs/formats.md."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprompt_registry.base_models.frozen import LAYOUT_WITHOUT_BOS, SEQUENCE_LAYOUT
from softprompt_registry.base_models.reference import BaseModelRef
from softprompt_registry.dod.task import TASK_KINDS
from softprompt_registry.errors import ArtifactError
from softprompt_registry.fingerprints import digest_of_texts
from softprompt_registry.storage import (
    check_format_version,
    complete_record,
    folder_written_whole,
    read_json,
    write_json,
)

if TYPE_CHECKING:
    import torch

FORMAT_VERSIONS = (1, 2)
LAYOUTS = (SEQUENCE_LAYOUT, LAYOUT_WITHOUT_BOS)
ENCODED_APART, AS_ONE_TEXT = 1, 2
"""Encodings: the ids of the filled template and those of the target, or the ids of both as one text."""
MAX_TEMPLATE_CHARACTERS = 500
"""Most characters of a payload's template; a longer one is left out."""
TENSORS_FILE = "soft_prompt.safetensors"
RECORD_FILE = "soft_prompt.json"


@dataclass(frozen=True)
class SoftPromptRecord:
    """What is known about a soft prompt besides its numbers."""

    task: str
    kind: str
    base_model: BaseModelRef
    template: str
    labels: tuple[str, ...] = ()
    task_digest: str | None = None
    dod_name: str | None = None
    dod_digest: str | None = None
    ground_truth: str = ""
    """What a perfect verbalization says, where known; empty otherwise."""
    tuning: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    layout: str = SEQUENCE_LAYOUT
    """One of `LAYOUTS`: what stands between the soft tokens and the text."""
    encoding: int = ENCODED_APART
    """How the text of a pair became token ids. Records from before it was written have the first."""

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS or self.encoding not in (ENCODED_APART, AS_ONE_TEXT):
            raise ArtifactError(
                f"reading soft prompt {self.task!r}: its layout is {self.layout!r} and its encoding {self.encoding!r}; "
                f"expected one of {', '.join(map(repr, LAYOUTS))} and {ENCODED_APART} or {AS_ONE_TEXT}. Use the version "
                "of softprompt-registry that wrote it."
            )

    @property
    def format_version(self) -> int:
        """2 where a reader of version 1, which knows one layout and one encoding, would put other tokens behind it."""
        return 1 if (self.layout, self.encoding) == (SEQUENCE_LAYOUT, ENCODED_APART) else 2

    def to_json(self) -> dict[str, Any]:
        record = {**asdict(self), "labels": list(self.labels), "base_model": self.base_model.to_json()}
        if self.format_version == 1:
            del record["encoding"]  # a file of version 1 is what it was
        return record

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> SoftPromptRecord:
        values = {item.name: record[item.name] for item in fields(cls) if item.name in record}
        values["base_model"] = BaseModelRef.from_json(record["base_model"])
        values["labels"] = tuple(record.get("labels", ()))
        return cls(**values)


@dataclass(frozen=True)
class SoftPrompt:
    """A tuned soft prompt.

    Raises:
        ArtifactError: the tensors are not (K, D) float32 with the base model's D, or hold NaN or infinity.
    """

    embeddings: torch.Tensor
    """(K, D) float32."""
    initial_embeddings: torch.Tensor | None
    """(K, D) float32: where tuning started from; None for prompts that came from elsewhere."""
    record: SoftPromptRecord

    def __post_init__(self) -> None:
        check_embeddings(self.embeddings, self.record.base_model, f"soft prompt {self.record.task!r}")
        if self.initial_embeddings is not None and self.initial_embeddings.shape != self.embeddings.shape:
            raise ArtifactError(
                f"reading soft prompt {self.record.task!r}: its initial embeddings have shape "
                f"{tuple(self.initial_embeddings.shape)}, the tuned ones {tuple(self.embeddings.shape)}; they must agree."
            )

    @property
    def num_virtual_tokens(self) -> int:
        return int(self.embeddings.shape[0])

    @property
    def id(self) -> str:
        """Digest of the tuned numbers and the base model: the same soft prompt has the same id wherever it lies."""
        return digest_of_texts(self.record.base_model.fingerprint, _bytes_of(self.embeddings).hex())

    def save(self, folder: Path) -> None:
        """Write the folder whole or not at all."""
        from safetensors.torch import save_file

        with folder_written_whole(folder) as partial:
            save_file(self._tensors(), partial / TENSORS_FILE, metadata=self._header())
            version = {"format_version": self.record.format_version}
            write_json(partial / RECORD_FILE, {**version, **self._shape(), **self.record.to_json()})

    @classmethod
    def load(cls, folder: Path) -> SoftPrompt:
        """Read a folder written by `save`."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        stored = read_json(folder / RECORD_FILE, "a soft prompt")
        check_format_version(stored, FORMAT_VERSIONS, f"soft prompt {str(folder)!r}")
        with complete_record(f"soft prompt {str(folder)!r}"):
            record = SoftPromptRecord.from_json(stored)
        try:
            tensors = load_file(folder / TENSORS_FILE)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(
                f"reading soft prompt {str(folder)!r}: {TENSORS_FILE} cannot be read ({error}). Make it again."
            ) from error
        check_tensor_names(tensors, f"soft prompt {str(folder)!r}")
        return cls(tensors["embeddings"], tensors.get("initial_embeddings"), record)

    def to_bytes(self) -> bytes:
        """The safetensors payload that a served model takes (as base64): tuned numbers, base fingerprint, and the task's
        name, kind and template, which a verifier needs."""
        from safetensors.torch import save

        known = {"kind": self.record.kind, "template": self.record.template}
        return save({"embeddings": self.embeddings.contiguous()}, metadata=self._header() | known)

    def _tensors(self) -> dict[str, torch.Tensor]:
        tensors = {"embeddings": self.embeddings.contiguous()}
        if self.initial_embeddings is not None:
            tensors["initial_embeddings"] = self.initial_embeddings.contiguous()
        return tensors

    def _shape(self) -> dict[str, int]:
        return {"K": self.num_virtual_tokens, "D": int(self.embeddings.shape[1])}

    def _header(self) -> dict[str, str]:
        header = {
            "format": "softprompt",
            "format_version": str(self.record.format_version),
            "base_fingerprint": self.record.base_model.fingerprint,
            "base_model": self.record.base_model.name,
            "task": self.record.task,
        }
        if self.record.format_version == 1:
            return header
        return header | {"layout": self.record.layout, "encoding": str(self.record.encoding)}


def check_tensor_names(names: Iterable[str], what: str) -> None:
    found = sorted(names)
    if "embeddings" not in found:
        raise ArtifactError(
            f"reading {what}: found the tensors {found[:5]}, expected one called 'embeddings' of shape (K, D)."
        )


def check_embeddings(embeddings: torch.Tensor, base: BaseModelRef, what: str) -> None:
    """Refuse a tensor that cannot be a soft prompt of `base`."""
    import torch

    if embeddings.ndim != 2 or embeddings.shape[0] < 1 or embeddings.shape[1] != base.hidden_size:
        raise ArtifactError(
            f"reading {what}: its embeddings have shape {tuple(embeddings.shape)}; expected (K, D) with K >= 1 and "
            f"D={base.hidden_size} of base model {base}. Send the tuned embeddings of that base model."
        )
    if embeddings.dtype != torch.float32:
        raise ArtifactError(f"reading {what}: its embeddings are {embeddings.dtype}, expected torch.float32.")
    if not bool(torch.isfinite(embeddings).all()):
        raise ArtifactError(
            f"reading {what}: its embeddings hold NaN or infinity, expected finite numbers. Tune it again, for "
            "instance with a lower learning rate."
        )


def soft_prompt_from_bytes(payload: bytes, base: BaseModelRef) -> SoftPrompt:
    """A soft prompt from a safetensors payload (fp16, bf16 or fp32), which must name the fingerprint of `base`.

    Raises:
        ArtifactError: not safetensors, no `embeddings`, wrong shape, NaN, or no fingerprint.
        BaseModelMismatch: the payload belongs to another base model.
    """
    import json

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    from softprompt_registry.errors import BaseModelMismatch

    what = "the soft prompt payload"
    try:
        tensors = load(payload)
        header = json.loads(payload[8 : 8 + int.from_bytes(payload[:8], "little")]).get("__metadata__") or {}
    except (SafetensorError, ValueError, KeyError) as error:
        raise ArtifactError(
            f"reading {what}: its {len(payload)} bytes are not safetensors; expected a file like soft_prompt.safetensors. "
            "Send that file, base64-encoded."
        ) from error
    check_tensor_names(tensors, what)
    version = header.get("format_version", "1")
    if version not in map(str, FORMAT_VERSIONS):
        raise ArtifactError(
            f"reading {what}: its format_version is {version[:20]!r}; this version of softprompt-registry reads "
            f"{' and '.join(map(str, FORMAT_VERSIONS))}. Save it with this version."
        )
    found = header.get("base_fingerprint")
    if found is None:
        raise ArtifactError(
            f"reading {what}: its header has no 'base_fingerprint', so it is not known which base model it was tuned on; "
            f"expected that of {base}. Send a file saved by softprompt-registry."
        )
    if found != base.fingerprint:
        name = str(header.get("base_model", "unknown"))[:100]
        raise BaseModelMismatch(
            f"reading {what}: it belongs to base model {name}@{str(found)[:12]}, but this translator reads {base}; "
            "a soft prompt means something only to the base model it was tuned on. Send one of that base model."
        )
    embeddings = tensors["embeddings"]
    if embeddings.dtype in (torch.float16, torch.bfloat16):
        embeddings = embeddings.float()
    check_embeddings(embeddings, base, what)
    task = str(header.get("task", "unnamed"))[:200] or "unnamed"
    kind = str(header.get("kind"))
    template = str(header.get("template", ""))
    encoding = str(header.get("encoding", ENCODED_APART))[:20]
    record = SoftPromptRecord(
        task=task,
        kind=kind if kind in TASK_KINDS else "unknown",
        base_model=base,
        # Of no use without the place of the input, and from elsewhere: nothing to fail about.
        template=template if template.count("{x}") == 1 and len(template) <= MAX_TEMPLATE_CHARACTERS else "",
        layout=str(header.get("layout", SEQUENCE_LAYOUT))[:100],
        encoding=int(encoding) if encoding.isdecimal() else 0,
    )
    return SoftPrompt(embeddings, None, record)


def _bytes_of(tensor: torch.Tensor) -> bytes:
    import torch

    return bytes(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
