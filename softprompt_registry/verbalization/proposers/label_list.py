"""Candidates made of labels that are known from data, in the order in which a translator would name them.

They say nothing about how well a translator reads a soft prompt: they are for use, where the labels are at hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from softprompt_registry.dod.task import Task
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt
from softprompt_registry.translators.translator import Translator
from softprompt_registry.verbalization.label_lists import LIST_PREFILL, label_candidates
from softprompt_registry.verbalization.verbalizer import Candidate, VerbalizationConfig


class LabelListProposer:
    """The label list alone and behind a beginning, the likelier first; nothing for tasks without labels."""

    name = "label_list"

    def __init__(
        self, translator: Translator, tasks: Mapping[str, Task], prefixes: Sequence[str] = ("", LIST_PREFILL)
    ) -> None:
        """
        Args:
            tasks: by the name of the task in a soft prompt's record.
        """
        self.translator = translator
        self.tasks = tasks
        self.prefixes = tuple(prefixes)

    def propose(self, soft_prompts: Sequence[SoftPrompt], config: VerbalizationConfig) -> list[list[Candidate]]:
        proposals: list[list[Candidate]] = []
        for soft_prompt in soft_prompts:
            task = self.tasks.get(soft_prompt.record.task)
            labels = task.labels if task is not None else soft_prompt.record.labels
            found = label_candidates(self.translator, soft_prompt, labels, self.prefixes) if labels else []
            proposals.append(found)
        return proposals
