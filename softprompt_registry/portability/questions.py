"""Which test pairs a target LLM is asked about, and what it is shown under each condition."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import PositiveInt

from softprompt_registry.config import settings
from softprompt_registry.dod.task import Pair, Task, fill_template, seed_of, text_key
from softprompt_registry.errors import DataError
from softprompt_registry.language_models.protocol import CompletionRequest
from softprompt_registry.portability.answers import Question
from softprompt_registry.portability.conditions import CONDITIONS, GROUND_TRUTH, SOFT_PROMPT
from softprompt_registry.portability.hard_prompts import HardPrompt
from softprompt_registry.portability.templates import PromptTemplates
from softprompt_registry.verbalization.held_out import split_pairs

MAX_EXAMPLES = max(condition.num_examples for condition in CONDITIONS.values())


@settings
class QuestionsConfig:
    """What is asked about each task."""

    max_items: PositiveInt | None = 50
    """Test pairs per task; the cost grows with it. None: all that the verifier did not rank on."""
    seed: int = 0
    """Seed for the draw of few-shot examples."""
    stop_labels_at_newline: bool = True
    """End the answers of classification tasks at their first line break: a label has none, and what follows costs."""


@dataclass(frozen=True)
class TaskItems:
    """What is the same for every condition and target of a task."""

    task: Task
    items: tuple[Pair, ...]
    """The test pairs that are asked about, no input twice."""
    examples: tuple[Pair, ...]
    """Few-shot examples; a condition with fewer of them takes the first ones."""


def choose_items(task: Task, config: QuestionsConfig, *, split_seed: int) -> TaskItems:
    """The test pairs and the few-shot examples of one task.

    Items come from the half of the held-out pairs that the verifier does not rank on, so no text was chosen by them; test
    pairs come before validation pairs. Of pairs with the same input the first is asked about. Examples are training pairs
    with an input that no item has, not even one beyond `max_items`; for a classification in turn from each label. A task
    with fewer than five of them gives all it has.

    Args:
        split_seed: the seed by which the evaluation divided the held-out pairs (its `verifier.seed`).

    Raises:
        DataError: the held-out pairs cannot be divided, or there is no training pair to show.
    """
    reporting = split_pairs(task, split_seed).reporting
    items = _one_per_input(reporting)
    asked = set(items)
    train = task.pairs_of("train")
    random.Random(seed_of("few-shot examples", config.seed, task.name)).shuffle(train)
    examples = [pair for key, pair in _one_per_input(train).items() if key not in asked]
    if not examples:
        raise DataError(
            f"choosing few-shot examples of task {task.name!r}: each of its {len(train)} training pairs has an input that "
            "may be asked about; expected at least one other. Give the task more training pairs."
        )
    if task.kind == "classification":
        examples = _in_turn(examples)
    return TaskItems(
        task,
        tuple(items.values())[: config.max_items],
        tuple(examples[:MAX_EXAMPLES]),
    )


def _one_per_input(pairs: Sequence[Pair]) -> dict[str, Pair]:
    """The first pair with each input, by what inputs that count as the same have in common."""
    found: dict[str, Pair] = {}
    for pair in pairs:
        found.setdefault(text_key(pair.input), pair)
    return found


def _in_turn(pairs: Sequence[Pair]) -> list[Pair]:
    """Each label's first pair, then each label's second, and so on."""
    seen: Counter[str] = Counter()
    rounds = []
    for place, pair in enumerate(pairs):
        rounds.append((seen[pair.output], place))
        seen[pair.output] += 1
    return [pairs[place] for _, place in sorted(rounds)]


def questions_for(
    chosen: TaskItems,
    target: str,
    conditions: Sequence[str],
    hard_prompts: Mapping[str, HardPrompt],
    templates: PromptTemplates,
) -> list[Question]:
    """What one target LLM is asked about one task: condition by condition, each about the same items.

    A method that wrote nothing is asked with an empty hard prompt: the target then gets what it gets without one, and the
    question says `hard_prompt=""` where the condition without one says None. A text that the evaluation withheld is asked
    with like any other, and its questions say so. The condition `soft_prompt` is left to `soft_prompt_questions`, since
    another model answers it.

    Args:
        target: the target's name.
        hard_prompts: of this task, by condition (see `hard_prompts.hard_prompts`); a missing one counts as empty.
    """
    questions = []
    for condition in conditions:
        if condition == SOFT_PROMPT:
            continue
        hard_prompt, method, abstained = None, None, False
        if condition == GROUND_TRUTH or CONDITIONS[condition].methods:
            found = hard_prompts.get(condition)
            hard_prompt = found.text if found else ""
            method, abstained = (found.method, found.abstained) if found else (None, False)
        examples = chosen.examples[: CONDITIONS[condition].num_examples]
        for number, pair in enumerate(chosen.items):
            prompt = templates.fill(pair.input, hard_prompt=hard_prompt, examples=examples)
            questions.append(
                Question(
                    task=chosen.task.name,
                    condition=condition,
                    target=target,
                    item=number,
                    input=pair.input,
                    expected=pair.output,
                    system=templates.system,
                    prompt=prompt,
                    hard_prompt=hard_prompt,
                    method=method,
                    abstained=abstained,
                )
            )
    return questions


def soft_prompt_questions(chosen: TaskItems, base_model: str) -> list[Question]:
    """The same items, for the soft prompt itself on the model that it was tuned on: each in the template of the tuning.

    Args:
        base_model: that model's name, which stands as the target.
    """
    template = chosen.task.template
    return [
        Question(
            task=chosen.task.name,
            condition=SOFT_PROMPT,
            target=base_model,
            item=number,
            input=pair.input,
            expected=pair.output,
            system=None,
            prompt=fill_template(template, pair.input),
            hard_prompt=None,
        )
        for number, pair in enumerate(chosen.items)
    ]


def to_request(question: Question, *, max_tokens: int, stop_at_newline: bool) -> CompletionRequest:
    """The request that asks a question, at temperature 0 (paper section 4.5)."""
    return CompletionRequest(
        question.prompt,
        system=question.system,
        max_tokens=max_tokens,
        temperature=0.0,
        stop=("\n",) if stop_at_newline else (),
    )


def requests_of(
    questions: Sequence[Question], tasks: Mapping[str, Task], config: QuestionsConfig, *, max_tokens: int
) -> list[CompletionRequest]:
    """`to_request` of each question, by the kind of its task; in order, and equal where questions say the same.

    Args:
        max_tokens: the longest answer, in the target's tokens.
    """
    labels = {name for name, task in tasks.items() if task.kind == "classification"}
    return [
        to_request(
            question,
            max_tokens=max_tokens,
            stop_at_newline=config.stop_labels_at_newline and question.task in labels,
        )
        for question in questions
    ]
