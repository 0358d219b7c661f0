"""Verbalizations that are lists of known labels.

Labels are known from data, never from the soft prompt: texts made from them are for use, where a task's labels are at hand
and the best wording is looked for. They say nothing about how well a translator reads a soft prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from softprompt_registry.errors import DataError
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt
from softprompt_registry.soft_prompts.token_budget import pieces
from softprompt_registry.translators.translator import Translator
from softprompt_registry.verbalization.proposers.translator import mean_log_likelihoods
from softprompt_registry.verbalization.verbalizer import Candidate, rank

if TYPE_CHECKING:
    import torch

LIST_PREFILL = "Classify the given input into one of the following:"
"""The beginning that makes a translator list labels (paper, appendix A.12)."""

_TOKENS_PER_FORWARD = 4096


def label_list_text(labels: Sequence[str], order: Sequence[int] | None = None) -> str:
    """The labels, comma separated, as a translator learns to write them.

    Args:
        order: places in `labels`, each once; None for the order they stand in.

    Raises:
        DataError: there is no label, one is blank, or `order` is no order of them.
    """
    if not labels or any(not label.strip() for label in labels):
        raise DataError(
            f"writing a label list: the labels are {list(labels)!r}; expected at least one, and none that is blank. "
            "Correct them."
        )
    if order is None:
        return ", ".join(labels)
    if sorted(order) != list(range(len(labels))):
        raise DataError(
            f"writing a label list: the order {list(order)!r} does not name each of the places 0 to {len(labels) - 1} "
            "once. Correct it."
        )
    return ", ".join(labels[place] for place in order)


def with_labels(labels: Sequence[str], prefixes: Sequence[str], order: Sequence[int] | None = None) -> list[str]:
    """The label list behind each beginning, such as `LIST_PREFILL`; "" gives the list alone."""
    text = label_list_text(labels, order)
    return [f"{_before_a_list(prefix)}{text}" for prefix in prefixes]


def likely_order(
    translator: Translator, soft_prompt: SoftPrompt, labels: Sequence[str], *, prefix: str = ""
) -> tuple[int, ...]:
    """An order in which the translator would name the labels: each time the one that makes the likeliest beginning.

    Beginnings are compared by log-likelihood per token. Of n labels n(n + 1)/2 - 1 beginnings are scored, not n! orders; so
    the order found need not be the likeliest of all.
    """
    label_list_text(labels)
    chosen: list[int] = []
    left = list(range(len(labels)))
    with translator.soft_tokens([soft_prompt]) as soft:
        while len(left) > 1:
            texts = [_before_a_list(prefix) + ", ".join(labels[p] for p in (*chosen, place)) for place in left]
            scores = _scores(translator, soft, texts, end=False)
            best = left[scores.index(max(scores))]
            chosen.append(best)
            left.remove(best)
    return (*chosen, *left)


def label_candidates(
    translator: Translator, soft_prompt: SoftPrompt, labels: Sequence[str], prefixes: Sequence[str] = ("",)
) -> list[Candidate]:
    """One candidate for each beginning, with the labels in their `likely_order` behind it; the likeliest text first.

    A score is the mean log-likelihood per token of the whole text and EOS, in nats, under the translator.
    """
    orders = [likely_order(translator, soft_prompt, labels, prefix=prefix) for prefix in prefixes]
    texts = [with_labels(labels, [prefix], order)[0] for prefix, order in zip(prefixes, orders, strict=True)]
    with translator.soft_tokens([soft_prompt]) as soft:
        scores = _scores(translator, soft, texts, end=True)
    candidates = [
        Candidate(text, "label_list", score, prefill=prefix)
        for text, score, prefix in zip(texts, scores, prefixes, strict=True)
    ]
    return rank(candidates)


def _scores(translator: Translator, soft: torch.Tensor, texts: Sequence[str], *, end: bool) -> list[float]:
    """Mean log-likelihood per token of each text after [soft tokens][BOS], with or without EOS. soft: (1, K, D)."""
    base = translator.base_model
    ids = [base.tokenize(text) for text in texts]
    scores = [0.0] * len(texts)
    for rows in pieces(range(len(texts)), lambda row: int(soft.shape[1]) + 2 + len(ids[row]), _TOKENS_PER_FORWARD):
        repeated = soft.expand(len(rows), -1, -1)
        if end:
            found = mean_log_likelihoods(base, repeated, base.bos, [ids[row] for row in rows])
        else:
            scored = base.score_targets(repeated, [base.bos] * len(rows), [ids[row] for row in rows])
            found = (scored.log_likelihood / scored.num_tokens).tolist()
        for row, score in zip(rows, found, strict=True):
            scores[row] = score
    return scores


def _before_a_list(prefix: str) -> str:
    return f"{prefix} " if prefix and not prefix[-1].isspace() else prefix
