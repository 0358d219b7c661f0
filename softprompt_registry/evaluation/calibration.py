"""Which texts are good, and the abstention rule that training tasks give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from softprompt_registry.dod.task import Task
from softprompt_registry.evaluation.metrics import TextEncoder
from softprompt_registry.evaluation.text_scores import cosines_of, label_score_of, truth_of
from softprompt_registry.verbalization.abstention import AbstentionRule, choose_rule
from softprompt_registry.verbalization.verbalizer import Verbalization


def is_good(text: str, task: Task, encoder: TextEncoder, *, label_f1: float, cosine: float) -> bool:
    """Whether a text says what the task is: a label list by its F1, another text by its cosine with the ground truth.

    Args:
        text: without a given beginning.
    """
    truth = truth_of(task)
    labels = label_score_of(text, truth)
    return cosines_of([text], [truth], encoder)[0] >= cosine if labels is None else labels.f1 >= label_f1


def rule_from_training_tasks(
    verbalizations: Sequence[Verbalization],
    tasks: Mapping[str, Task],
    is_good: Callable[[Verbalization, Task], bool],
    *,
    precision: float,
) -> tuple[AbstentionRule, dict[str, list[Any]]]:
    """The rule whose given texts are good at least at `precision`, and what it was chosen on, a row per task.

    Args:
        verbalizations: verified ones of training tasks, the verifier's choice each.
        is_good: says of a verbalization and its task whether the text is good.
    """
    good = [is_good(item, tasks[item.task]) for item in verbalizations]
    faithfulness = [item.faithfulness for item in verbalizations]
    table: dict[str, list[Any]] = {
        "task": [item.task for item in verbalizations],
        "truth": [tasks[item.task].ground_truth for item in verbalizations],
        "text": [item.text for item in verbalizations],
        "faithfulness": faithfulness,
        "good": good,
    }
    return choose_rule(faithfulness, good, precision), table
