"""How well soft prompts do their tasks: label accuracy by log-likelihood, and exact match of generated answers.

Rows of different tasks share forward passes, each with the soft prompt of its own task, just as in tuning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.base_models.prefixes import PrefixRows, shared_lead
from softprompt_registry.dod.task import Task
from softprompt_registry.soft_prompts.encoding import RowEncoder
from softprompt_registry.soft_prompts.token_budget import pieces
from softprompt_registry.text_matching import exact_match

if TYPE_CHECKING:
    import torch

LabelIds = list[list[tuple[int, list[int]]]]
"""For each trial and label, how many tokens at the end of a prompt give way to it, and its token ids."""


@dataclass(frozen=True)
class Trial:
    """A soft prompt, or the bare base model, on held-out pairs of one task."""

    task: Task
    soft_prompt: torch.Tensor | None
    """(K, D), or None for the bare base model. In one call all have the same K, or all are None."""
    prompts: Sequence[Sequence[int]]
    """Token ids, BOS first."""
    outputs: Sequence[str]
    """The expected answers, in the same order."""


@dataclass(frozen=True)
class _Row:
    trial: int
    number: int
    prompt: Sequence[int]


@dataclass(frozen=True)
class _LabelRow:
    row: _Row
    label: int
    ids: Sequence[int]


def measure(
    base_model: BaseModel, trials: Sequence[Trial], *, max_new_tokens: int, tokens_per_forward: int
) -> list[dict[str, float]]:
    """Scores of each trial as shares in 0..1; empty for a trial without pairs.

    Paper: its "73.73 %" is teacher-forced token accuracy. Here `label_accuracy` is the share of pairs whose own label has
    the highest log-likelihood among the task's labels, and `exact_match` that of generated answers that say the output.
    """
    label_ids = _label_ids(base_model, trials)
    choices = choose_labels(base_model, trials, tokens_per_forward, label_ids)
    answers = generate_answers(
        base_model, trials, max_new_tokens=max_new_tokens, tokens_per_forward=tokens_per_forward, label_ids=label_ids
    )
    results = []
    for trial, chosen, texts in zip(trials, choices, answers, strict=True):
        scores: dict[str, float] = {}
        if trial.outputs and trial.task.kind == "classification":
            scores["label_accuracy"] = _share(a == o for a, o in zip(chosen, trial.outputs, strict=True))
        if trial.outputs:
            scores["exact_match"] = _share(exact_match(t, o) for t, o in zip(texts, trial.outputs, strict=True))
        results.append(scores)
    return results


def generate_answers(
    base_model: BaseModel,
    trials: Sequence[Trial],
    *,
    max_new_tokens: int,
    tokens_per_forward: int,
    label_ids: LabelIds | None = None,
) -> list[list[str]]:
    """Greedy answers per trial, in the order of its prompts. Label answers are cut a little past the task's longest label."""
    import torch

    label_ids = label_ids or _label_ids(base_model, trials)
    num_soft = _num_soft(trials)
    answers = [[""] * len(trial.prompts) for trial in trials]
    with torch.no_grad():
        soft_of = _soft_rows(base_model, trials)
    for kind in ("classification", "generation"):
        chosen = [index for index, trial in enumerate(trials) if trial.task.kind == kind and trial.prompts]
        if not chosen:
            continue
        caps = {index: _answer_cap(label_ids[index], max_new_tokens) for index in chosen}
        longest = max(caps.values())
        rows = _rows(trials, chosen)
        for piece in pieces(rows, _length(num_soft + longest), tokens_per_forward):
            soft = soft_of([row.trial for row in piece])
            generated = base_model.generate(soft, [row.prompt for row in piece], max_new_tokens=longest)
            for row, ids in zip(piece, generated, strict=True):
                answers[row.trial][row.number] = base_model.decode(ids[: caps[row.trial]]).strip()
    return answers


def choose_labels(
    base_model: BaseModel, trials: Sequence[Trial], tokens_per_forward: int, label_ids: LabelIds | None = None
) -> list[list[str]]:
    """The label with the highest log-likelihood after each prompt, per trial; empty for generation tasks.

    Labels of one token each are read off one forward pass, far cheaper than a pass per label; otherwise each label is a
    row of its own, scored with its end token so that a label that begins another one stays distinct.
    """
    import torch

    num_soft = _num_soft(trials)
    choices = [[""] * len(trial.prompts) if trial.task.kind == "classification" else [] for trial in trials]
    label_ids = label_ids or _label_ids(base_model, trials)
    single: list[int] = []
    several: list[int] = []
    for index, trial in enumerate(trials):
        if trial.task.kind == "classification" and trial.prompts:
            each_one_token = all(given_way == 0 and len(ids) == 1 for given_way, ids in label_ids[index])
            (single if each_one_token else several).append(index)
    with torch.no_grad():
        soft_of = _soft_rows(base_model, trials)
        for piece in pieces(_rows(trials, single), _length(num_soft), tokens_per_forward):
            joined = base_model.join(
                soft_of([row.trial for row in piece]), [row.prompt for row in piece], pad_side="left"
            )
            rows = torch.arange(len(piece), device=base_model.device)
            last = torch.full_like(rows, joined.inputs_embeds.shape[1] - 1)
            logits = base_model.logits_at(joined, rows, last)  # (rows, V)
            for row, scores in zip(piece, logits, strict=True):
                best = int(scores[[ids[0] for _, ids in label_ids[row.trial]]].argmax())
                choices[row.trial][row.number] = trials[row.trial].task.labels[best]
        spread = [
            _LabelRow(replace(row, prompt=row.prompt[: len(row.prompt) - given_way]), label, ids)
            for row in _rows(trials, several)
            for label, (given_way, ids) in enumerate(label_ids[row.trial])
        ]
        scored: dict[tuple[int, int], dict[int, float]] = {}
        for part in pieces(spread, lambda row: num_soft + len(row.row.prompt) + len(row.ids) + 1, tokens_per_forward):
            scores = base_model.score_targets(
                soft_of([row.row.trial for row in part]),
                [row.row.prompt for row in part],
                [[*row.ids, base_model.eos_id] for row in part],
            ).log_likelihood
            for choice, score in zip(part, scores.tolist(), strict=True):
                scored.setdefault((choice.row.trial, choice.row.number), {})[choice.label] = score
        for (index, number), by_label in scored.items():
            # Of equal scores the first label, whatever the order they were worked out in.
            best = max(sorted(by_label), key=by_label.__getitem__)
            choices[index][number] = trials[index].task.labels[best]
    return choices


def _rows(trials: Sequence[Trial], chosen: Sequence[int]) -> list[_Row]:
    return [_Row(index, number, prompt) for index in chosen for number, prompt in enumerate(trials[index].prompts)]


def _num_soft(trials: Sequence[Trial]) -> int:
    """K, or 0 for the bare base model."""
    return next((int(trial.soft_prompt.shape[0]) for trial in trials if trial.soft_prompt is not None), 0)


def _length(beside: int) -> Callable[[_Row], int]:
    """Tokens of a row: its text and `beside`, what is kept for it besides."""
    return lambda row: len(row.prompt) + beside


def _answer_cap(label_ids: Sequence[tuple[int, list[int]]], max_new_tokens: int) -> int:
    """Of the answers to one task; a generation task has no labels."""
    return min(max_new_tokens, 2 + max(len(ids) for _, ids in label_ids)) if label_ids else max_new_tokens


def _label_ids(base_model: BaseModel, trials: Sequence[Trial]) -> LabelIds:
    encoder = RowEncoder.of_new_prompts(base_model)
    return [
        [encoder.label(trial.task.template, label) for label in trial.task.labels]
        if trial.task.kind == "classification"
        else []
        for trial in trials
    ]


SoftOf = Callable[[Sequence[int]], "torch.Tensor | PrefixRows | None"]
"""From the numbers of the prompts that rows begin with to what a forward pass takes."""


def soft_rows(base_model: BaseModel, prompts: Sequence[torch.Tensor | None], texts: Sequence[Sequence[int]]) -> SoftOf:
    """Soft prompts (K, D), computed once for all their rows where the model allows it; None for the bare base model.

    Call without gradients.

    Args:
        texts: token ids of all rows that will begin with these prompts.
    """
    import torch

    present = [prompt for prompt in prompts if prompt is not None]
    if not present:
        return lambda owners: None
    stacked = torch.stack(present)  # (G, K, D)
    prefixes = base_model.prefixes(stacked, shared_lead(texts))
    if prefixes is None:
        return lambda owners: stacked[list(owners)]
    return prefixes.of_rows


def _soft_rows(base_model: BaseModel, trials: Sequence[Trial]) -> SoftOf:
    texts = [prompt for trial in trials for prompt in trial.prompts]
    return soft_rows(base_model, [trial.soft_prompt for trial in trials], texts)


def _share(hits: Iterator[bool]) -> float:
    values = list(hits)
    return sum(values) / len(values)
