"""The translator as an artifact: a LoRA adapter on the base model that turns a soft prompt into text.

The base model object is shared: its adapter layers are in place but switched off, and switched on only while this
translator reads. So one loaded model serves tuning, translating and measuring.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from softprompt_registry.base_models.frozen import SEQUENCE_LAYOUT, BaseModel, TargetScores
from softprompt_registry.base_models.reference import BaseModelRef, require_same_base
from softprompt_registry.errors import ArtifactError
from softprompt_registry.fingerprints import SHORT, digest_of_file
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt
from softprompt_registry.storage import (
    check_format_version,
    complete_record,
    folder_written_whole,
    read_json,
    write_json,
)

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig

FORMAT_VERSION = 1
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
RECORD_FILE = "translator.json"
PEFT_PREFIX = "base_model.model."
"""Of every tensor's name in the file, so that `PeftModel.from_pretrained` reads it as it reads its own."""


@dataclass(frozen=True)
class TranslatorRecord:
    """What is known about a translator besides its weights."""

    base_model: BaseModelRef
    num_virtual_tokens: int
    """K of the soft prompts it was trained on."""
    bank_digest: str | None = None
    dod_name: str | None = None
    dod_digest: str | None = None
    train_tasks: tuple[str, ...] = ()
    """Names of the tasks it saw; evaluating on them is not a test."""
    training: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    layout: str = SEQUENCE_LAYOUT

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "train_tasks": list(self.train_tasks), "base_model": self.base_model.to_json()}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> TranslatorRecord:
        values = {item.name: record[item.name] for item in fields(cls) if item.name in record}
        values["base_model"] = BaseModelRef.from_json(record["base_model"])
        values["train_tasks"] = tuple(record.get("train_tasks", ()))
        return cls(**values)


class TextModel(Protocol):
    """What writing texts takes of a base model; see `BaseModel` for each."""

    @property
    def ref(self) -> BaseModelRef: ...
    @property
    def bos(self) -> list[int]: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def max_positions(self) -> int: ...
    def tokenize(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int], after: Sequence[int] = ()) -> str: ...
    def generate(
        self,
        soft_prompts: torch.Tensor,
        prompt_ids: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[list[int]]: ...
    def score_targets(
        self, soft_prompts: torch.Tensor, prompt_ids: Sequence[Sequence[int]], target_ids: Sequence[Sequence[int]]
    ) -> TargetScores: ...


class SoftPromptReader(Protocol):
    """A translator as far as texts are written with it, wherever its base model runs."""

    @property
    def base_model(self) -> TextModel: ...
    @property
    def record(self) -> TranslatorRecord: ...
    @property
    def id(self) -> str: ...
    def soft_tokens(self, soft_prompts: Sequence[SoftPrompt]) -> contextlib.AbstractContextManager[torch.Tensor]: ...


class Translator:
    """A translator on a loaded base model.

    Raises:
        BaseModelMismatch: the base model, or a soft prompt handed in later, is another one than the translator's.
    """

    def __init__(self, base_model: BaseModel, record: TranslatorRecord, adapter_name: str) -> None:
        require_same_base(
            "loading a translator", "the translator", record.base_model, "the loaded model", base_model.ref
        )
        self.base_model = base_model
        self.record = record
        self.adapter_name = adapter_name

    @classmethod
    def load(cls, folder: Path, base_model: BaseModel) -> Translator:
        """Put the adapter in `folder` onto `base_model`, switched off until it is used."""
        from peft import LoraConfig, set_peft_model_state_dict
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        record = read_record(folder)
        try:
            adapter_name = f"translator_{digest_of_file(folder / ADAPTER_FILE)[:SHORT]}"
            translator = cls(base_model, record, adapter_name)
            weights = {key.removeprefix(PEFT_PREFIX): value for key, value in load_file(folder / ADAPTER_FILE).items()}
            if adapter_name not in getattr(base_model.model, "peft_config", {}):
                add_adapter(base_model, LoraConfig.from_pretrained(str(folder)), adapter_name)
            outcome: Any = set_peft_model_state_dict(base_model.model, weights, adapter_name=adapter_name)
        except (OSError, ValueError, SafetensorError, RuntimeError) as error:
            raise ArtifactError(
                f"reading translator {str(folder)!r}: its adapter cannot be put on {base_model.ref} ({error}). "
                "Train it again."
            ) from error
        # PEFT is silent about these: the layers of missing weights would stay as they are, and do nothing.
        missing = [key for key in outcome.missing_keys if "lora_" in key and f".{adapter_name}." in key]
        for found, keys in (("holds weights that {} has no place for", outcome.unexpected_keys),
                            ("lacks weights for layers of {}", missing)):  # fmt: skip
            if keys:
                remove_adapter(base_model, adapter_name)
                raise ArtifactError(
                    f"reading translator {str(folder)!r}: the adapter {found.format(base_model.ref)} "
                    f"({[key.replace(f'.{adapter_name}', '') for key in keys[:3]]}, {len(keys)} in all), expected exactly "
                    "those of its configuration. Copy it again, or train it again."
                )
        return translator

    def save(self, folder: Path) -> None:
        """Write adapter and record whole or not at all. The base model's weights are never part of it."""
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        model = self.base_model.model
        weights = get_peft_model_state_dict(model, adapter_name=self.adapter_name, save_embedding_layers=False)
        config = model.peft_config[self.adapter_name]
        with folder_written_whole(folder) as partial:
            save_file(
                {f"{PEFT_PREFIX}{key}": tensor.detach().cpu().contiguous() for key, tensor in weights.items()},
                partial / ADAPTER_FILE,
            )
            stored = config.to_dict() | {"base_model_name_or_path": self.record.base_model.name, "inference_mode": True}
            write_json(partial / ADAPTER_CONFIG_FILE, {key: _plain(value) for key, value in sorted(stored.items())})
            write_json(partial / RECORD_FILE, {"format_version": FORMAT_VERSION, **self.record.to_json()})

    @property
    def id(self) -> str:
        return self.adapter_name

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Switch this adapter on for the block."""
        model = self.base_model.model
        model.set_adapter(self.adapter_name)
        model.enable_adapters()
        try:
            yield
        finally:
            model.disable_adapters()

    @contextlib.contextmanager
    def soft_tokens(self, soft_prompts: Sequence[SoftPrompt]) -> Iterator[torch.Tensor]:
        """Switch this adapter on for the block and give what it reads: (B, K, D), B soft prompts of one K. No gradients.

        Raises:
            BaseModelMismatch: a soft prompt belongs to another base model.
        """
        import torch

        soft = stacked(soft_prompts, self.record.base_model).to(self.base_model.device)
        with self.reading(), torch.no_grad():
            yield soft


def stacked(soft_prompts: Sequence[SoftPrompt], base_model: BaseModelRef) -> torch.Tensor:
    """The embeddings of B soft prompts of one K and of this base model: (B, K, D).

    Raises:
        BaseModelMismatch: a soft prompt belongs to another base model.
    """
    import torch

    for soft_prompt in soft_prompts:
        of, task = soft_prompt.record.base_model, soft_prompt.record.task
        require_same_base("translating", f"soft prompt {task!r}", of, "this translator", base_model)
    return torch.stack([soft_prompt.embeddings for soft_prompt in soft_prompts])


def read_record(folder: Path) -> TranslatorRecord:
    """The record alone, without loading any model."""
    record = read_json(folder / RECORD_FILE, "a translator")
    check_format_version(record, FORMAT_VERSION, f"translator {str(folder)!r}")
    with complete_record(f"translator {str(folder)!r}"):
        return TranslatorRecord.from_json(record)


def add_adapter(base_model: BaseModel, config: LoraConfig, adapter_name: str, *, seed: int = 0) -> None:
    """Put a new LoRA adapter into the base model, frozen and switched off; the base's own weights stay as they are.

    The adapter is in evaluation mode: only a training step switches its dropout on.

    Args:
        seed: seed for the adapter's initial weights.
    """
    import torch

    devices = [base_model.device] if base_model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _several_adapters():
        torch.manual_seed(seed)
        base_model.model.add_adapter(config, adapter_name)
    for parameter in adapter_parameters(base_model, adapter_name).values():
        # Float32 also on a bf16 base: an optimizer's small steps would be rounded away in bf16.
        parameter.data = parameter.data.float()
        parameter.requires_grad_(False)
    # PEFT makes new modules in training mode, also in a model that is in evaluation mode.
    base_model.model.eval()
    base_model.model.disable_adapters()


def remove_adapter(base_model: BaseModel, adapter_name: str) -> None:
    """Take an adapter out of the base model, if it is there."""
    if adapter_name in getattr(base_model.model, "peft_config", {}):
        with _several_adapters():
            base_model.model.delete_adapter(adapter_name)


@contextlib.contextmanager
def _several_adapters() -> Iterator[None]:
    """PEFT warns of a second adapter and of deleting the current one; both are meant here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute", UserWarning)
        warnings.filterwarnings("ignore", "Adapter .* was active which is now deleted", UserWarning)
        yield


def adapter_parameters(base_model: BaseModel, adapter_name: str) -> dict[str, torch.nn.Parameter]:
    """The adapter's own parameters by name."""
    return {
        name: parameter
        for name, parameter in base_model.model.named_parameters()
        if "lora_" in name and f".{adapter_name}." in name
    }


def _plain(value: Any) -> Any:
    """PEFT configs hold sets and enums, which JSON does not know."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return getattr(value, "value", value)
