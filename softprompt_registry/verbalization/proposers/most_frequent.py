"""A baseline that gives every soft prompt one text, without reading any of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from softprompt_registry.errors import DataError
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt
from softprompt_registry.verbalization.verbalizer import Candidate, VerbalizationConfig


class MostFrequentTargetProposer:
    """Says the most frequent target text of the training tasks; among equally frequent ones the first in the alphabet."""

    name = "most_frequent_target"

    def __init__(self, training_targets: Sequence[str]) -> None:
        if not training_targets:
            raise DataError("making the most-frequent-target baseline: there are no training targets. Hand in some.")
        counts = Counter(training_targets)
        self.text = min(counts, key=lambda text: (-counts[text], text))

    def propose(self, soft_prompts: Sequence[SoftPrompt], config: VerbalizationConfig) -> list[list[Candidate]]:
        return [[Candidate(self.text, self.name)] for _ in soft_prompts]
