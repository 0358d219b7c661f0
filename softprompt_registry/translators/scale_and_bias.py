"""The cheapest translator: the base model as it is, and a learned scale and bias on the soft tokens that it reads.

Not in the paper. It is 2·D numbers instead of an adapter in every layer, and stands between reading soft prompts without any
training and a LoRA translator.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.base_models.reference import require_same_base
from softprompt_registry.errors import ArtifactError
from softprompt_registry.fingerprints import SHORT, digest_of_texts
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt
from softprompt_registry.storage import (
    check_format_version,
    complete_record,
    folder_written_whole,
    read_json,
    write_json,
)
from softprompt_registry.translators.translator import Translation, TranslatorRecord

if TYPE_CHECKING:
    import torch

FORMAT_VERSION = 1
TENSORS_FILE = "scale_and_bias.safetensors"
RECORD_FILE = "scale_and_bias.json"


class ScaleAndBias:
    """A scale and a bias on the soft tokens of a loaded base model, which itself stays as it is.

    The base model reads `scale * soft + bias` in place of each soft token, so [scaled soft tokens][BOS][prefill] and on.

    Raises:
        ArtifactError: the tensors are not (D,) float32 with the base model's D, or hold NaN or infinity.
        BaseModelMismatch: the base model, or a soft prompt handed in later, is another one than the record's.
    """

    def __init__(
        self, base_model: BaseModel, record: TranslatorRecord, scale: torch.Tensor, bias: torch.Tensor
    ) -> None:
        """scale, bias: (D,) float32."""
        require_same_base(
            "loading a scale and bias", "the scale and bias", record.base_model, "the loaded model", base_model.ref
        )
        for name, tensor in (("scale", scale), ("bias", bias)):
            _check_tensor(name, tensor, base_model.ref.hidden_size)
        self.base_model = base_model
        self.record = record
        self.scale = scale.to(base_model.device)
        self.bias = bias.to(base_model.device)

    @classmethod
    def load(cls, folder: Path, base_model: BaseModel) -> ScaleAndBias:
        """Read a folder written by `save`."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        record = read_record(folder)
        try:
            tensors = load_file(folder / TENSORS_FILE)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(
                f"reading scale and bias {str(folder)!r}: {TENSORS_FILE} cannot be read ({error}). Train it again."
            ) from error
        if sorted(tensors) != ["bias", "scale"]:
            raise ArtifactError(
                f"reading scale and bias {str(folder)!r}: found the tensors {sorted(tensors)[:5]}, expected 'bias' and "
                "'scale'. Train it again."
            )
        return cls(base_model, record, tensors["scale"], tensors["bias"])

    def save(self, folder: Path) -> None:
        """Write tensors and record whole or not at all."""
        from safetensors.torch import save_file

        with folder_written_whole(folder) as partial:
            tensors = {"scale": self.scale.cpu().contiguous(), "bias": self.bias.cpu().contiguous()}
            save_file(tensors, partial / TENSORS_FILE)
            write_json(partial / RECORD_FILE, {"format_version": FORMAT_VERSION, **self.record.to_json()})

    @property
    def id(self) -> str:
        """The same numbers on the same base model have the same id wherever they lie."""
        numbers = [tensor.cpu().contiguous().numpy().tobytes().hex() for tensor in (self.scale, self.bias)]
        return f"scale_and_bias_{digest_of_texts(self.record.base_model.fingerprint, *numbers)[:SHORT]}"

    @contextlib.contextmanager
    def soft_tokens(self, soft_prompts: Sequence[SoftPrompt]) -> Iterator[torch.Tensor]:
        """For the block, without gradients: (B, K, D) float32, what the base model reads in place of the soft prompts."""
        import torch

        for soft_prompt in soft_prompts:
            require_same_base(
                "translating",
                f"soft prompt {soft_prompt.record.task!r}",
                soft_prompt.record.base_model,
                "this scale and bias",
                self.record.base_model,
            )
        sizes = sorted({soft_prompt.num_virtual_tokens for soft_prompt in soft_prompts})
        if len(sizes) != 1:
            raise ArtifactError(
                f"translating: the soft prompts have K={sizes}, expected at least one, and one K in a batch. "
                "Translate those of each K apart."
            )
        soft = torch.stack([soft_prompt.embeddings for soft_prompt in soft_prompts]).to(self.scale)
        with torch.no_grad():
            yield self.scale * soft + self.bias

    def translate(
        self,
        soft_prompts: Sequence[SoftPrompt],
        *,
        prefill: str = "",
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[Translation]:
        """Write each soft prompt out as text: [scaled soft tokens][BOS][prefill] and on until EOS or the cap.

        Args:
            soft_prompts: B prompts of this base model, all with the same K.
            prefill: the beginning of every text, kept in the result.
            max_new_tokens: cap on the continuation.
            temperature: 0 is greedy.
            seed: of the sampling.
        """
        base = self.base_model
        head = base.bos + (base.tokenize(prefill) if prefill else [])
        heads = [head] * len(soft_prompts)
        with self.soft_tokens(soft_prompts) as soft:
            rows = base.generate(soft, heads, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
            scores = base.score_targets(soft, heads, [[*row, base.eos_id] for row in rows])
        means = (scores.log_likelihood / scores.num_tokens).tolist()
        return [
            Translation((prefill + base.decode(row, after=head)).strip(), prefill, mean)
            for row, mean in zip(rows, means, strict=True)
        ]


def read_record(folder: Path) -> TranslatorRecord:
    """The record alone, without loading any model. Its entries are those of a translator."""
    record = read_json(folder / RECORD_FILE, "a scale and bias")
    check_format_version(record, FORMAT_VERSION, f"scale and bias {str(folder)!r}")
    with complete_record(f"scale and bias {str(folder)!r}"):
        return TranslatorRecord.from_json(record)


def _check_tensor(name: str, tensor: torch.Tensor, hidden_size: int) -> None:
    import torch

    if tuple(tensor.shape) != (hidden_size,) or tensor.dtype != torch.float32:
        raise ArtifactError(
            f"reading a scale and bias: its {name!r} is {tensor.dtype} of shape {tuple(tensor.shape)}; expected "
            f"torch.float32 of shape ({hidden_size},), the base model's hidden size. Train it again."
        )
    if not bool(torch.isfinite(tensor).all()):
        raise ArtifactError(
            f"reading a scale and bias: its {name!r} holds NaN or infinity, expected finite numbers. Train it again."
        )
