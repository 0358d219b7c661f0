"""Which base model an artifact belongs to."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

from softprompt_registry.errors import BaseModelMismatch
from softprompt_registry.fingerprints import SHORT, digest_of_json

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class BaseModelRef:
    """Which base model an artifact belongs to.

    The name and the dtype are for people. Identity is the fingerprint: the same weights under two names are one base
    model, and a name whose weights changed is another one. Hashes are taken over bf16-rounded values, so that loading
    in float32 or bfloat16 gives the same fingerprint.
    """

    name: str
    revision: str | None
    dtype: str
    hidden_size: int
    vocab_size: int
    num_layers: int
    tokenizer_sha256: str
    embedding_sha256: str
    weights_sha256: str

    @cached_property
    def fingerprint(self) -> str:
        """Digest of everything but name, revision and dtype."""
        identity = {key: value for key, value in asdict(self).items() if key not in ("name", "revision", "dtype")}
        return digest_of_json(identity)

    def __str__(self) -> str:
        return f"{self.name}@{self.fingerprint[:SHORT]} (D={self.hidden_size}, L={self.num_layers})"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "fingerprint": self.fingerprint}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> BaseModelRef:
        return cls(**{field.name: record[field.name] for field in fields(cls)})


def require_same_base(doing: str, left: str, left_ref: BaseModelRef, right: str, right_ref: BaseModelRef) -> None:
    """Raise `BaseModelMismatch`, naming both sides, unless the fingerprints agree."""
    if left_ref.fingerprint != right_ref.fingerprint:
        raise BaseModelMismatch(
            f"{doing}: {left} belongs to base model {left_ref}, but {right} belongs to {right_ref}; a soft prompt means "
            f"something only to the base model it was tuned on. Use artifacts of one base model."
        )


_PROBE = "The quick brown fox - 3.14 déjà-vu\n\tнет 東京 \U0001f642"
"""Text whose token ids tell two tokenizers of the same vocabulary apart (merges, normalisation, digits)."""


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of a tokenizer by what it does: vocabulary, special tokens and the ids of a probe."""
    return digest_of_json(
        {
            "vocabulary": tokenizer.get_vocab(),
            "bos": tokenizer.bos_token_id,
            "eos": tokenizer.eos_token_id,
            "probe": tokenizer(_PROBE, add_special_tokens=False)["input_ids"],
        }
    )


def reference_of(model: Any, tokenizer: Any, *, name: str, revision: str | None, dtype: str) -> BaseModelRef:
    """The identity of a loaded model. Call before any adapter is added to it."""
    config = model.config.get_text_config()  # a multimodal model keeps its sizes there
    return BaseModelRef(
        name=name,
        revision=revision,
        dtype=dtype,
        # Not the config's: some models (OPT-350m) embed tokens in fewer dimensions than their layers have.
        hidden_size=int(model.get_input_embeddings().weight.shape[1]),
        vocab_size=int(model.get_input_embeddings().weight.shape[0]),
        num_layers=int(config.num_hidden_layers),
        tokenizer_sha256=tokenizer_digest(tokenizer),
        embedding_sha256=digest_of_tensor(model.get_input_embeddings().weight),
        weights_sha256=digest_of_json(
            [
                [key, list(tensor.shape), digest_of_tensor(_sample(tensor))]
                for key, tensor in sorted(model.state_dict().items())
            ]
        ),
    )


def _sample(tensor: torch.Tensor, count: int = 1024) -> torch.Tensor:
    """About `count` values spread evenly over the tensor."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // count)]


def digest_of_tensor(tensor: torch.Tensor) -> str:
    """Digest of the values rounded to bfloat16, as in `embedding_sha256`."""
    import hashlib

    import torch

    rounded = tensor.detach().to("cpu", torch.bfloat16).contiguous()
    return hashlib.sha256(rounded.view(torch.uint8).numpy().tobytes()).hexdigest()
