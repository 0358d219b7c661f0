"""What one answer of a target LLM is worth: task ROUGE-L, exact match, and whether it names the right label."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal, get_args

from softprompt_registry.dod.task import Task, TaskKind, text_key
from softprompt_registry.errors import DataError
from softprompt_registry.evaluation.metrics import rouge_l
from softprompt_registry.language_models.replies import CONTENT_FILTER, CUT, REFUSAL
from softprompt_registry.portability.answers import Answer
from softprompt_registry.portability.conditions import CONDITIONS
from softprompt_registry.text_matching import exact_match

METRICS = ("rouge_l", "exact_match", "accuracy_strict", "accuracy_lenient")
"""Scores of an answer, each in [0, 1]; the last two of classifications only."""
HEADLINE = "rouge_l"
"""The one number for all tasks: the paper's task ROUGE-L (section 5.2)."""
HEADLINES: dict[TaskKind, str] = {"classification": "accuracy_lenient", "generation": "rouge_l"}
"""The number that counts for each kind of task."""

AnswerState = Literal["answered", "empty", "refused", "missing"]
STATES: tuple[AnswerState, ...] = get_args(AnswerState)

_REFUSED = (CONTENT_FILTER, REFUSAL)
_REFUSAL = re.compile(
    r"""as \s an \s ai \b
    | (?: (?: i['\s]a?m \s (?: very \s | so \s )? sorry | sorry | i \s apologi[sz]e | my \s apologies | unfortunately )
          [\s,.:;!-]* (?: but \s )? )?
      i \s? (?: can't | cannot | can \s not | won't | will \s not | (?: 'm | am ) \s (?: unable | not \s able ) \s to ) \s
      (?: assist | help \s (?: you | with ) | comply | fulfil | provide | complete | continue | engage | participate
        | discuss | generate | process | answer | classify ) """,
    re.IGNORECASE | re.VERBOSE,
)


@dataclass(frozen=True)
class ScoredAnswer:
    """One answer without its text: where it belongs, what it is worth, what it cost."""

    target: str
    condition: str
    task: str
    kind: TaskKind
    item: int
    state: AnswerState
    """`missing` is without scores; `empty` and `refused` score 0."""
    scores: dict[str, float]
    """Those of `METRICS` that the task's kind has."""
    cut: bool
    """It ran on to the length limit."""
    ambiguous: bool
    """Its first line names more than one label."""
    prompt_tokens: int
    """0 if the server did not say."""
    completion_tokens: int

    @property
    def is_missing(self) -> bool:
        return self.state == "missing"

    @property
    def key(self) -> tuple[str, int]:
        """Which test pair it is about; answers under two conditions are paired by it."""
        return self.task, self.item


def score_answers(answers: Iterable[Answer], tasks: Mapping[str, Task]) -> list[ScoredAnswer]:
    """A score for each answer, in order.

    - `rouge_l` and `exact_match` compare the whole answer with the expected output. Where a generation task knows several
      outputs of the same input, the nearest of them counts.
    - `accuracy_strict` is 1 if the answer is the label, letter by letter, but for white space around it.
    - `accuracy_lenient` is 1 if the first label that the answer's first line names is the right one (see `named_labels`).

    An empty answer scores 0, and so does a refusal: one that the server says it filtered, or one that begins as refusals
    do, unless the expected output does too. A missing answer gets no score. An answer that was cut at the length limit is
    scored as it stands; of one that was cut within the model's thoughts nothing stands, so it is empty.

    Raises:
        DataError: an answer is about an unknown task or condition, expects a label that its task does not have, stands
            twice, or is about another test pair than the other answers of its task and number.
    """
    outputs = {name: _outputs(task) for name, task in tasks.items()}
    texts_compared = cache(rouge_l)  # many answers are equal
    pairs: dict[tuple[str, int], tuple[str, str]] = {}
    seen = set()
    scored = []
    for answer in answers:
        question = answer.question
        _check(answer, tasks)
        place = (question.target, question.condition, question.task, question.item)
        pair = (question.input, question.expected)
        if place in seen or pairs.setdefault(place[2:], pair) != pair:
            found = "a second answer" if place in seen else "an answer about another test pair than before"
            raise DataError(
                f"scoring answers: found {found} for target {place[0]!r}, condition {place[1]!r}, task {place[2]!r}, "
                f"item {place[3]}, expected one answer for each, about the same test pair. Score one run's answers at a time."
            )
        seen.add(place)
        known = outputs[question.task].get(text_key(question.input), ())
        references = tuple(dict.fromkeys([question.expected, *known]))
        scored.append(_scored(answer, tasks[question.task], references, texts_compared))
    return scored


def _scored(
    answer: Answer, task: Task, references: tuple[str, ...], compare: Callable[[str, tuple[str, ...]], float]
) -> ScoredAnswer:
    question, text = answer.question, answer.text or ""
    state = _state(answer, references)
    scores: dict[str, float] = {}
    named: Sequence[str] = ()
    if state == "answered":
        scores["rouge_l"] = compare(text, references)
        scores["exact_match"] = float(any(exact_match(text, reference) for reference in references))
        if task.kind == "classification":
            named = named_labels(text, task.labels)
            scores["accuracy_strict"] = float(text.strip() == question.expected.strip())
            scores["accuracy_lenient"] = float(bool(named) and named[0] == question.expected)
    elif state != "missing":
        scores = dict.fromkeys(METRICS if task.kind == "classification" else METRICS[:2], 0.0)
    return ScoredAnswer(
        question.target,
        question.condition,
        question.task,
        task.kind,
        question.item,
        state,
        scores,
        cut=not answer.is_missing and answer.finish_reason == CUT,
        ambiguous=len(named) > 1,
        prompt_tokens=answer.prompt_tokens,
        completion_tokens=answer.completion_tokens,
    )


def named_labels(text: str, labels: Sequence[str]) -> list[str]:
    """The labels that the first line of an answer names, each once, in order.

    Case and punctuation do not count, neither around a label nor between its words: "**Sci-Tech**." names "Sci/Tech".
    Labels that differ in nothing else are looked for as they are written. A label is never part of a longer word or
    number, the longer of two labels that begin in one place is meant ("not toxic", not "toxic"), and a label of one
    letter is looked for in its own case, since "a" is a word too. Blank lines and code fences are not first lines.

    The first of several is the answer. Naming all labels so gains nothing over naming one. It also means that "not joy" is
    joy, and that an article "A" before the answer "B" hides it: `ScoredAnswer.ambiguous` counts answers with several labels.
    """
    if text.strip() in labels:
        return [text.strip()]
    lines = (line.strip() for line in unicodedata.normalize("NFKC", text).splitlines())
    line = next((line for line in lines if line and not line.startswith("```")), "")
    whole = [label for label in labels if exact_match(line, label)]
    if len(whole) == 1:
        return whole
    pattern, found_by = _label_pattern(tuple(labels))
    named = (found_by[(found.lastindex or 0) - 1] for found in pattern.finditer(line))
    return list(dict.fromkeys(named))


@lru_cache(maxsize=1024)
def _label_pattern(labels: tuple[str, ...]) -> tuple[re.Pattern[str], tuple[str, ...]]:
    """A pattern with a group for each label, the longest first, and the labels in its order."""
    plain = {label: unicodedata.normalize("NFKC", label).strip() for label in labels}
    by_length = tuple(sorted((label for label in labels if plain[label]), key=lambda label: -len(plain[label])))
    words = {label: tuple(re.findall(r"[^\W_]+", plain[label].casefold())) for label in labels}
    in_case = len({text.casefold() for text in plain.values()}) < len(labels)
    groups = []
    for label in by_length:
        told_apart = sum(words[other] == words[label] for other in labels) == 1
        parts = re.findall(r"[^\W_]+", plain[label])
        if told_apart and parts:
            body = r"[\W_]*".join(map(re.escape, parts))
        else:
            body = r"\s+".join(map(re.escape, plain[label].split()))
        if len(plain[label]) == 1:
            body = f"(?-i:{body})"
        before = r"(?<![^\W_])" + (r"(?<!\d[.,])" if plain[label][0].isdigit() else "")
        after = r"(?![^\W_])" + (r"(?![.,]\d)" if plain[label][-1].isdigit() else "")
        groups.append(f"{before}({body}){after}")
    return re.compile("|".join(groups) or r"(?!)", re.NOFLAG if in_case else re.IGNORECASE), by_length


def _check(answer: Answer, tasks: Mapping[str, Task]) -> None:
    question = answer.question
    task = tasks.get(question.task)
    if task is None or question.condition not in CONDITIONS:
        found, expected = (
            (f"task {question.task!r}", "a task of the DoD")
            if task is None
            else (f"condition {question.condition!r}", f"one of {list(CONDITIONS)}")
        )
        raise DataError(
            f"scoring answers: found an answer under the unknown {found}, expected {expected}. "
            "Score answers with the DoD and the version that they were asked with."
        )
    if task.kind == "classification" and question.expected not in task.labels:
        raise DataError(
            f"scoring answers: found the expected label {question.expected!r} in task {task.name!r}, expected one of "
            f"{list(task.labels)}. Score answers with the DoD that they were asked with."
        )


def _outputs(task: Task) -> dict[str, list[str]]:
    """By input, all outputs that a generation task knows. A classification has one right label for each pair."""
    found: dict[str, list[str]] = {}
    if task.kind == "generation":
        for pair in task.pairs:
            found.setdefault(text_key(pair.input), []).append(pair.output)
    return found


def _state(answer: Answer, references: Sequence[str]) -> AnswerState:
    if answer.text is None:
        return "missing"
    if answer.finish_reason in _REFUSED:
        return "refused"
    if not answer.text.strip():
        return "empty"
    if _is_refusal(answer.text) and not any(map(_is_refusal, references)):
        return "refused"
    return "answered"


def _is_refusal(text: str) -> bool:
    return _REFUSAL.match(text.strip().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")) is not None
