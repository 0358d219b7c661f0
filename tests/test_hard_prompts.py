"""Which text of an evaluation stands for which condition, and when it is put into an instruction."""

from __future__ import annotations

from dataclasses import replace

import pytest
from small_tasks import free_task, make_task

from softprompt_registry.errors import ConfigError
from softprompt_registry.portability.conditions import (
    FEW_SHOT_TRANSLATED,
    GROUND_TRUTH,
    INSPECT,
    TRANSLATED,
    TRANSLATED_VERIFIED,
    VERIFIED_BEST,
)
from softprompt_registry.portability.hard_prompts import HardPrompt, hard_prompts, instruction
from softprompt_registry.verbalization.verbalizer import Verbalization

TASKS = {
    "moods": make_task("moods"),
    "past": replace(free_task("past"), hard_prompts=("Put the sentence into the past.",)),
}


def said(task: str, text: str, *, abstained: bool = False) -> Verbalization:
    return Verbalization(text, task, (), "id", "base", abstained=abstained)


TEXTS = {
    "translator": [said("moods", "joy, fear"), said("past", "Rewrite it, please.")],
    "translator+verifier": [said("moods", "joy, anger"), said("past", "", abstained=True)],
}


def test_each_condition_takes_its_method_and_labels_become_an_instruction() -> None:
    found = hard_prompts(TEXTS, TASKS, [TRANSLATED, TRANSLATED_VERIFIED, GROUND_TRUTH])
    assert found == {
        "moods": {
            TRANSLATED: HardPrompt("Classify the given input into one of the following: joy, fear.", "translator"),
            TRANSLATED_VERIFIED: HardPrompt(
                "Classify the given input into one of the following: joy, anger.", "translator+verifier"
            ),
            GROUND_TRUTH: HardPrompt("Classify the given input into one of the following: joy, fear.", "ground_truth"),
        },
        "past": {
            TRANSLATED: HardPrompt("Rewrite it, please.", "translator"),
            TRANSLATED_VERIFIED: HardPrompt("", "translator+verifier", abstained=True),
            GROUND_TRUTH: HardPrompt("Put the sentence into the past.", "ground_truth"),
        },
    }


def test_the_choice_among_all_candidates_is_not_called_a_translation() -> None:
    texts = {**TEXTS, "all+verifier": [said("moods", "Say the mood."), said("past", "Past tense.")]}
    found = hard_prompts(texts, TASKS, [TRANSLATED_VERIFIED, VERIFIED_BEST, FEW_SHOT_TRANSLATED])
    assert found["moods"][VERIFIED_BEST] == HardPrompt("Say the mood.", "all+verifier")
    assert found["moods"][TRANSLATED_VERIFIED].method == "translator+verifier"
    assert found["moods"][FEW_SHOT_TRANSLATED] == found["moods"][TRANSLATED_VERIFIED]


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        ("joy,  fear, ", "classification", "Pick: joy, fear"),
        ("very good, bad", "classification", "Pick: very good, bad"),
        ("Detect spam, not ham.", "classification", "Detect spam, not ham."),
        ("Is it good, or bad?", "classification", "Is it good, or bad?"),
        ("Labels: good, bad", "classification", "Labels: good, bad"),
        ("joy", "classification", "joy"),
        ("Given a review, say whether it is good", "classification", "Given a review, say whether it is good"),
        ("joy, fear", "generation", "joy, fear"),
        (" two\n lines ", "generation", "two lines"),
        ("", "classification", ""),
    ],
)
def test_only_a_bare_list_of_a_classification_is_put_into_an_instruction(text: str, kind: str, expected: str) -> None:
    assert instruction(text, kind, "Pick: {labels}") == expected  # type: ignore[arg-type]


def test_a_condition_without_its_method_is_an_error_that_says_which_there_are() -> None:
    with pytest.raises(
        ConfigError, match=r"'inspect'.*\['translator', 'translator\+verifier'\].*leave the condition out"
    ):
        hard_prompts(TEXTS, TASKS, [INSPECT])
    with pytest.raises(ConfigError, match="expected one with {labels}"):
        hard_prompts(TEXTS, TASKS, [TRANSLATED], label_list="Pick.")


def test_the_ground_truth_is_the_tasks_own_words_or_its_labels_however_long_they_are() -> None:
    own = replace(TASKS["moods"], name="own", hard_prompts=("Joy, or fear",))
    long = make_task("long", ("a duplicate question", "not a duplicate question"))
    found = hard_prompts({}, {"own": own, "long": long}, [GROUND_TRUTH])
    assert found["own"][GROUND_TRUTH].text == "Joy, or fear"
    listed = "Classify the given input into one of the following: a duplicate question, not a duplicate question."
    assert found["long"][GROUND_TRUTH].text == listed
