"""The settings of tuning soft prompts."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt

from softprompt_registry.config import settings


@settings
class TuningConfig:
    """How soft prompts are tuned. Defaults are the paper's for its Classification DoD (section 4.3), where it has them."""

    num_virtual_tokens: PositiveInt = 20
    """K, soft tokens per prompt (paper: 20)."""
    init: Literal["shared_vocabulary", "own_vocabulary"] = "shared_vocabulary"
    """Start from embeddings of randomly drawn vocabulary tokens: the same ones for all tasks, or each task its own.
    Paper: own ones; one shared start makes prompts comparable and translators better."""
    learning_rate: PositiveFloat = 1e-4
    """AdamW's (paper: 1e-4 for classification, 1e-3 in general); weight decay is 0."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate over the epochs: constant, or falling to zero along a cosine."""
    epochs: PositiveInt = 20
    """At most this many passes over the train pairs (paper: 20)."""
    patience_epochs: PositiveInt | None = 5
    """Stop after so many epochs without a lower validation loss (paper: 5; 3 in general). None never stops early."""
    batch_size: PositiveInt = 32
    """Pairs per task and step (paper: 32; 8 in general)."""
    slots: PositiveInt = 8
    """Prompts that are tuned at once. More of them fill a GPU better and cost little memory; results stay the same to
    rounding."""
    tokens_per_forward: PositiveInt | None = None
    """Tokens of one forward pass, padding included: the rows of a step are sorted by length and cut into such pieces. Null
    takes what suits the free memory. Halved when the memory does not suffice; results stay the same to rounding."""
    compile: bool = False
    """Let torch.compile join the small operations of norms and MLPs, which takes half a minute first and on a CPU a C++
    compiler. Results stay the same to rounding. Measured on two CPU cores: no faster."""
    max_sequence_tokens: int = 256
    """Longest row, soft tokens included. Longer inputs are cut from the right; targets never are."""
    max_train_pairs: PositiveInt | None = None
    """Use at most so many train pairs of a task, balanced over labels. None takes all."""
    max_validation_pairs: NonNegativeInt | None = None
    """Use at most so many validation pairs of a task. None takes all."""
    max_test_pairs: NonNegativeInt | None = None
    """Use at most so many test pairs of a task, which measure the finished prompt. None takes all."""
    max_new_tokens: PositiveInt = 48
    """Length cap when test answers are generated."""
    seed: int = 0
    """Seed for initialisation, example order and choice of pairs."""

    def __post_init__(self) -> None:
        if self.max_sequence_tokens < self.num_virtual_tokens + 8:
            raise ValueError(
                f"max_sequence_tokens={self.max_sequence_tokens} leaves no room for text after {self.num_virtual_tokens} "
                "soft tokens"
            )

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that make another soft prompt. The others change it by rounding only."""
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in ("slots", "tokens_per_forward", "compile")
        }
