"""Candidates from a trained translator: the greedy text, then sampled ones."""

from __future__ import annotations

from collections.abc import Sequence

from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt
from softprompt_registry.translators.translator import Translator
from softprompt_registry.verbalization.verbalizer import Candidate, VerbalizationConfig


class TranslatorProposer:
    """Reads soft prompts with a translator; prompts of the same K share a batch."""

    name = "translator"

    def __init__(self, translator: Translator, rows_per_batch: int = 16) -> None:
        self.translator = translator
        self.rows_per_batch = rows_per_batch

    def propose(self, soft_prompts: Sequence[SoftPrompt], config: VerbalizationConfig) -> list[list[Candidate]]:
        proposals: list[list[Candidate]] = [[] for _ in soft_prompts]
        order = sorted(range(len(soft_prompts)), key=lambda row: soft_prompts[row].num_virtual_tokens)
        for start in range(0, len(order), self.rows_per_batch):
            piece = order[start : start + self.rows_per_batch]
            sizes = sorted({soft_prompts[row].num_virtual_tokens for row in piece})
            for size in sizes:
                rows = [row for row in piece if soft_prompts[row].num_virtual_tokens == size]
                for number in range(config.num_candidates):
                    translations = self.translator.translate(
                        [soft_prompts[row] for row in rows],
                        prefill=config.prefill,
                        max_new_tokens=config.max_new_tokens,
                        temperature=0.0 if number == 0 else config.temperature,
                        seed=config.seed + number,
                    )
                    for row, translation in zip(rows, translations, strict=True):
                        name = f"{self.name}:{'greedy' if number == 0 else 'sampled'}"
                        proposals[row].append(Candidate(translation.text, name, translation.log_likelihood))
        return proposals
