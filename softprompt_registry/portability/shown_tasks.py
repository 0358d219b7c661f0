"""What a page shows of each task: its hard prompts, and some test inputs with what every target answered to them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from softprompt_registry.portability.analysis import Measure, Portability
from softprompt_registry.portability.answers import Answer
from softprompt_registry.portability.conditions import CONDITIONS, FEW_SHOT_3, FEW_SHOT_5
from softprompt_registry.portability.scoring import HEADLINES, ScoredAnswer

MAX_INPUTS = 5
"""Test inputs shown of each task at most."""
MAX_ANSWERS = 10_000
"""Answers on a page, about: with many tasks, conditions and targets fewer inputs of each task are shown, but at least one."""
MAX_TASKS = 300
INPUT_LETTERS, ANSWER_LETTERS, PROMPT_LETTERS = 600, 300, 2_500
"""Longer texts are cut."""
PARTLY = 0.5
"""ROUGE-L from which an answer that is not the expected output counts as partly right."""

Mark = Literal["right", "partly", "wrong", "empty", "refused", "missing"]


@dataclass(frozen=True)
class ShownAnswer:
    """One cell: an answer and how good it is."""

    mark: Mark
    text: str
    """Of a missing answer why it is missing."""
    rouge_l: float | None
    """Of generations that are not the expected output."""
    cut: bool
    """It ran on to the length limit."""


@dataclass(frozen=True)
class ShownInput:
    """One test pair with all that was answered to it."""

    input: str
    expected: str
    rows: dict[str, dict[str, ShownAnswer]]
    """Condition → target → answer; what was not asked is not in it."""


@dataclass(frozen=True)
class ShownTask:
    """One task."""

    name: str
    kind: str
    metric: str
    """What `scores` are: the headline of the task's kind."""
    hard_prompts: dict[str, str]
    """Condition → instruction, for conditions that have one; it may be empty."""
    held_back: tuple[str, ...]
    """Conditions whose instruction the evaluation withheld."""
    prompts: dict[str, str]
    """Condition with examples → the whole prompt of the first shown input."""
    scores: dict[str, dict[str, float]]
    """Condition → target → mean over the task's answered items."""
    inputs: tuple[ShownInput, ...]
    num_inputs: int
    """How many were asked about."""
    beaten: tuple[str, ...]
    """Targets on which a translation beats 5 examples (3 where 5 were not asked) in task ROUGE-L."""


def inputs_per_task(num_tasks: int, num_places: int) -> int:
    """How many inputs of each task are shown, so that a page of many targets and conditions stays small."""
    return max(1, min(MAX_INPUTS, MAX_ANSWERS // max(1, min(num_tasks, MAX_TASKS) * num_places)))


def shown_tasks(result: Portability, answers: Iterable[Answer]) -> list[ShownTask]:
    """The first `MAX_TASKS` tasks in the order of the answers, each with its first inputs: none is chosen for its answers."""
    scored = {(item.target, item.condition, item.task, item.item): item for item in result.answers}
    by_task: dict[str, list[Answer]] = {}
    for answer in answers:
        by_task.setdefault(answer.question.task, []).append(answer)
    limit = inputs_per_task(len(by_task), len(result.places))
    means = {
        (place, metric): result.task_means(*place, Measure(metric))
        for place in result.places
        for metric in dict.fromkeys(HEADLINES.values())
    }
    few_shot = FEW_SHOT_5 if any(condition == FEW_SHOT_5 for _, condition in result.places) else FEW_SHOT_3
    shown = []
    for name, found in list(by_task.items())[:MAX_TASKS]:
        items = sorted({answer.question.item for answer in found})
        kept = [answer for answer in found if answer.question.item in items[:limit]]
        first = [answer.question for answer in kept if answer.question.item == items[0]]
        kind = scored[_place(found[0])].kind
        metric = HEADLINES[kind]
        scores: dict[str, dict[str, float]] = {}
        for target, condition in result.places:
            if name in means[(target, condition), metric]:
                scores.setdefault(condition, {})[target] = means[(target, condition), metric][name]
        beaten = [margin.target for margin in result.margins if (margin.task, margin.few_shot) == (name, few_shot)]
        shown.append(
            ShownTask(
                name=name,
                kind=kind,
                metric=metric,
                hard_prompts={
                    q.condition: shortened(q.hard_prompt, PROMPT_LETTERS) for q in first if q.hard_prompt is not None
                },
                held_back=tuple(dict.fromkeys(q.condition for q in first if q.abstained)),
                prompts={
                    q.condition: shortened(q.prompt, PROMPT_LETTERS)
                    for q in first
                    if CONDITIONS[q.condition].num_examples
                },
                scores=scores,
                inputs=tuple(
                    _shown_input([a for a in kept if a.question.item == item], scored) for item in items[:limit]
                ),
                num_inputs=len(items),
                beaten=tuple(dict.fromkeys(beaten)),
            )
        )
    return shown


def shortened(text: str, letters: int) -> str:
    """The text, or its beginning with how much is left out."""
    return text if len(text) <= letters else f"{text[:letters]}… ({len(text) - letters:,} more letters)"


def _place(answer: Answer) -> tuple[str, str, str, int]:
    question = answer.question
    return question.target, question.condition, question.task, question.item


def _shown_input(answers: list[Answer], scored: dict[tuple[str, str, str, int], ScoredAnswer]) -> ShownInput:
    rows: dict[str, dict[str, ShownAnswer]] = {}
    for condition in CONDITIONS:
        for answer in answers:
            if answer.question.condition == condition:
                rows.setdefault(condition, {})[answer.question.target] = _shown(answer, scored[_place(answer)])
    question = answers[0].question
    return ShownInput(shortened(question.input, INPUT_LETTERS), shortened(question.expected, INPUT_LETTERS), rows)


def _shown(answer: Answer, scored: ScoredAnswer) -> ShownAnswer:
    text = answer.error or "no reason given" if answer.text is None else answer.text.strip()
    mark: Mark = _right_or_wrong(scored) if scored.state == "answered" else scored.state
    rouge = scored.scores.get("rouge_l") if scored.kind == "generation" and mark in ("partly", "wrong") else None
    return ShownAnswer(mark, shortened(text, ANSWER_LETTERS), rouge, scored.cut)


def _right_or_wrong(scored: ScoredAnswer) -> Mark:
    """By the label that is named, or by the whole text."""
    if scored.scores["accuracy_lenient" if scored.kind == "classification" else "exact_match"] == 1:
        return "right"
    return "partly" if scored.kind == "generation" and scored.scores["rouge_l"] >= PARTLY else "wrong"
