"""Candidates made of labels that are known from data, in the order in which a translator would name them.

They say nothing about how well a translator reads a soft prompt: they are for use, where the labels are at hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from softprompt_registry.dod.task import Task
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt
from softprompt_registry.soft_prompts.token_budget import pieces
from softprompt_registry.translators.translator import SoftPromptReader
from softprompt_registry.verbalization.proposers.translator import mean_log_likelihoods
from softprompt_registry.verbalization.verbalizer import Candidate, VerbalizationConfig, rank

if TYPE_CHECKING:
    import torch

LIST_PREFILL = "Classify the given input into one of the following:"
"""The beginning that makes a translator list labels (paper, appendix A.12)."""
_TOKENS_PER_FORWARD = 4096


class LabelListProposer:
    """The label list alone and behind a beginning, the likelier first; nothing for tasks without labels.

    A score is the mean log-likelihood per token of the whole text and EOS, in nats, under the translator.
    """

    name = "label_list"

    def __init__(
        self, translator: SoftPromptReader, tasks: Mapping[str, Task], prefixes: Sequence[str] = ("", LIST_PREFILL)
    ) -> None:
        """
        Args:
            tasks: by the name of the task in a soft prompt's record.
        """
        self.translator = translator
        self.tasks = tasks
        self.prefixes = [f"{prefix} " if prefix and not prefix[-1].isspace() else prefix for prefix in prefixes]
        self._prefills = tuple(prefixes)

    def propose(self, soft_prompts: Sequence[SoftPrompt], config: VerbalizationConfig) -> list[list[Candidate]]:
        proposals: list[list[Candidate]] = []
        for soft_prompt in soft_prompts:
            task = self.tasks.get(soft_prompt.record.task)
            labels = task.labels if task is not None else soft_prompt.record.labels
            proposals.append(self._lists(soft_prompt, labels) if labels else [])
        return proposals

    def _lists(self, soft_prompt: SoftPrompt, labels: Sequence[str]) -> list[Candidate]:
        with self.translator.soft_tokens([soft_prompt]) as soft:
            texts = [prefix + ", ".join(self._likely_order(soft, labels, prefix)) for prefix in self.prefixes]
            scores = self._scores(soft, texts, end=True)
        return rank(
            [
                Candidate(text, self.name, score, prefill=prefill)
                for text, score, prefill in zip(texts, scores, self._prefills, strict=True)
            ]
        )

    def _likely_order(self, soft: torch.Tensor, labels: Sequence[str], prefix: str) -> list[str]:
        """The labels as the translator would name them: each time the one that makes the likeliest beginning.

        Beginnings are compared by log-likelihood per token. Of n labels n(n + 1)/2 - 1 beginnings are scored, not n! orders;
        so the order found need not be the likeliest of all. soft: (1, K, D).
        """
        chosen: list[str] = []
        left = list(labels)
        while len(left) > 1:
            scores = self._scores(soft, [prefix + ", ".join([*chosen, label]) for label in left], end=False)
            chosen.append(left.pop(scores.index(max(scores))))
        return [*chosen, *left]

    def _scores(self, soft: torch.Tensor, texts: Sequence[str], *, end: bool) -> list[float]:
        """Mean log-likelihood per token of each text after [soft tokens][BOS], with or without EOS. soft: (1, K, D)."""
        base = self.translator.base_model
        ids = [base.tokenize(text) for text in texts]
        scores = [0.0] * len(texts)
        for rows in pieces(range(len(texts)), lambda row: int(soft.shape[1]) + 2 + len(ids[row]), _TOKENS_PER_FORWARD):
            repeated, targets = soft.expand(len(rows), -1, -1), [ids[row] for row in rows]
            if end:
                found = mean_log_likelihoods(base, repeated, base.bos, targets)
            else:
                scored = base.score_targets(repeated, [base.bos] * len(rows), targets)
                found = (scored.log_likelihood / scored.num_tokens).tolist()
            for row, score in zip(rows, found, strict=True):
                scores[row] = score
        return scores
