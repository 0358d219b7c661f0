"""How well soft prompts do their tasks: label accuracy by log-likelihood, and exact match of generated answers.

Rows of different tasks share forward passes, each with the soft prompt of its own task, just as in tuning.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.dod.task import Task
from softprompt_registry.text_matching import exact_match

if TYPE_CHECKING:
    import torch


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


def measure(
    base_model: BaseModel, trials: Sequence[Trial], *, max_new_tokens: int, rows_per_forward: int
) -> list[dict[str, float]]:
    """Scores of each trial as shares in 0..1; empty for a trial without pairs.

    Paper: its "73.73 %" is teacher-forced token accuracy. Here `label_accuracy` is the share of pairs whose own label has
    the highest log-likelihood among the task's labels, and `exact_match` that of generated answers that say the output.
    """
    choices = choose_labels(base_model, trials, rows_per_forward)
    answers = generate_answers(base_model, trials, max_new_tokens=max_new_tokens, rows_per_forward=rows_per_forward)
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
    base_model: BaseModel, trials: Sequence[Trial], *, max_new_tokens: int, rows_per_forward: int
) -> list[list[str]]:
    """Greedy answers per trial, in the order of its prompts. Label answers are capped a little past the longest label."""
    answers = [[""] * len(trial.prompts) for trial in trials]
    for kind in ("classification", "generation"):
        chosen = [index for index, trial in enumerate(trials) if trial.task.kind == kind and trial.prompts]
        if not chosen:
            continue
        cap = max_new_tokens
        if kind == "classification":
            labels = {label for index in chosen for label in trials[index].task.labels}
            cap = min(cap, 2 + max(len(base_model.tokenize(f" {label}")) for label in labels))
        for piece in _pieces(trials, chosen, rows_per_forward):
            soft = _soft_of(trials, piece)
            generated = base_model.generate(soft, [row.prompt for row in piece], max_new_tokens=cap)
            for row, ids in zip(piece, generated, strict=True):
                answers[row.trial][row.number] = base_model.decode(ids).strip()
    return answers


def choose_labels(base_model: BaseModel, trials: Sequence[Trial], rows_per_forward: int) -> list[list[str]]:
    """The label with the highest log-likelihood after each prompt, per trial; empty for generation tasks.

    Labels of one token each are read off one forward pass, far cheaper than a pass per label; otherwise each label is a
    row of its own, scored with its end token so that a label that begins another one stays distinct.
    """
    import torch

    choices = [[""] * len(trial.prompts) if trial.task.kind == "classification" else [] for trial in trials]
    label_ids = [[base_model.tokenize(f" {label}") for label in trial.task.labels] for trial in trials]
    single: list[int] = []
    several: list[int] = []
    for index, trial in enumerate(trials):
        if trial.task.kind == "classification" and trial.prompts:
            (single if all(len(ids) == 1 for ids in label_ids[index]) else several).append(index)
    with torch.no_grad():
        for piece in _pieces(trials, single, rows_per_forward):
            joined = base_model.join(_soft_of(trials, piece), [row.prompt for row in piece], pad_side="left")
            rows = torch.arange(len(piece), device=base_model.device)
            last = torch.full_like(rows, joined.inputs_embeds.shape[1] - 1)
            logits = base_model.logits_at(joined, rows, last)  # (rows, V)
            for row, scores in zip(piece, logits, strict=True):
                best = int(scores[[ids[0] for ids in label_ids[row.trial]]].argmax())
                choices[row.trial][row.number] = trials[row.trial].task.labels[best]
        for piece in _pieces(trials, several, rows_per_forward):
            spread = [(row, ids) for row in piece for ids in label_ids[row.trial]]
            scored: list[float] = []
            for start in range(0, len(spread), rows_per_forward):
                part = spread[start : start + rows_per_forward]
                scored += base_model.score_targets(
                    _soft_of(trials, [row for row, _ in part]),
                    [row.prompt for row, _ in part],
                    [[*ids, base_model.eos_id] for _, ids in part],
                ).log_likelihood.tolist()
            for row in piece:
                labels = trials[row.trial].task.labels
                own, scored = scored[: len(labels)], scored[len(labels) :]
                choices[row.trial][row.number] = labels[own.index(max(own))]
    return choices


def _pieces(trials: Sequence[Trial], chosen: Sequence[int], size: int) -> Iterator[list[_Row]]:
    """The rows of the chosen trials, those of similar length together."""
    rows = [_Row(index, number, prompt) for index in chosen for number, prompt in enumerate(trials[index].prompts)]
    rows.sort(key=lambda row: len(row.prompt))
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _soft_of(trials: Sequence[Trial], rows: Sequence[_Row]) -> torch.Tensor | None:
    """(rows, K, D): each row's own soft prompt."""
    import torch

    prompts = [trials[row.trial].soft_prompt for row in rows]
    present = [prompt for prompt in prompts if prompt is not None]
    return torch.stack(present) if present else None


def _share(hits: Iterator[bool]) -> float:
    values = list(hits)
    return sum(values) / len(values)
