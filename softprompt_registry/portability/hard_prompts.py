"""From the texts of an evaluation to the hard prompts that a target LLM gets under each condition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from softprompt_registry.dod.task import Task, TaskKind
from softprompt_registry.errors import ConfigError
from softprompt_registry.portability.conditions import CONDITIONS, GROUND_TRUTH
from softprompt_registry.verbalization.verbalizer import Verbalization

LABEL_LIST = "Classify the given input into one of the following: {labels}."
MAX_WORDS_OF_A_LABEL = 3
"""A list whose parts have no more words than this is taken for one of labels."""


@dataclass(frozen=True)
class HardPrompt:
    """The instruction of one task under one condition."""

    text: str
    """The instruction; empty if the method wrote none."""
    method: str
    """Which method of the evaluation, or `ground_truth`."""
    abstained: bool = False
    """True if the evaluation's rule withheld it; it is asked with all the same, and marked."""


def hard_prompts(
    texts: Mapping[str, Sequence[Verbalization]],
    tasks: Mapping[str, Task],
    conditions: Sequence[str],
    *,
    label_list: str = LABEL_LIST,
) -> dict[str, dict[str, HardPrompt]]:
    """Task → condition → hard prompt, for those of the conditions that have one.

    A list of labels is no instruction, so the text of a classification that is one is put into `label_list`; so is the ground
    truth of a classification without a hard prompt of its own.

    Args:
        texts: of an evaluation, by method; one for each task.
        label_list: an instruction with the place `{labels}`.

    Raises:
        ConfigError: the evaluation lacks a method that a condition needs, or `label_list` has no place for the labels.
    """
    if "{labels}" not in label_list:
        raise ConfigError(
            f"reading the portability settings: label_list is {label_list!r}, expected one with {{labels}}."
        )
    found: dict[str, dict[str, HardPrompt]] = {name: {} for name in tasks}
    for condition in conditions:
        if condition == GROUND_TRUTH:
            for name, task in tasks.items():
                listed = label_list.replace("{labels}", ", ".join(task.labels)) if task.labels else ""
                found[name][condition] = HardPrompt(
                    task.hard_prompts[0] if task.hard_prompts else listed, "ground_truth"
                )
        elif methods := CONDITIONS[condition].methods:
            method = next((method for method in methods if method in texts), None)
            if method is None:
                raise ConfigError(
                    f"choosing hard prompts for the condition {condition!r}: the evaluation has the methods "
                    f"{sorted(texts)}, expected one of {list(methods)}. Evaluate with it, or leave the condition "
                    "out."
                )
            for item in texts[method]:
                if item.task in tasks:
                    text = instruction(item.text, tasks[item.task].kind, label_list)
                    found[item.task][condition] = HardPrompt(text, method, item.abstained)
    return found


def instruction(text: str, kind: TaskKind, label_list: str = LABEL_LIST) -> str:
    """The text as an instruction: in `label_list` if it is a bare list of a classification's labels.

    A list has at least two parts between commas, none of more than `MAX_WORDS_OF_A_LABEL` words, and no sign that ends a
    sentence or announces something. The task's own labels are not looked at: a text gets no help from them.
    """
    text = " ".join(text.split())
    parts = [part.strip() for part in text.split(",") if part.strip()]
    is_list = len(parts) > 1 and all(len(part.split()) <= MAX_WORDS_OF_A_LABEL for part in parts)
    if kind == "classification" and is_list and not any(sign in text for sign in ".:;?!"):
        return label_list.replace("{labels}", ", ".join(parts))
    return text
