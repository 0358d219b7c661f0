"""What one answer of a target LLM is worth: labels strict and lenient, texts, and answers that are none."""

from __future__ import annotations

import pytest

from softprompt_registry.dod.task import Pair, Task
from softprompt_registry.errors import DataError
from softprompt_registry.portability.answers import Answer, Question
from softprompt_registry.portability.conditions import NO_PROMPT, TRANSLATED
from softprompt_registry.portability.scoring import HEADLINE, HEADLINES, ScoredAnswer, named_labels, score_answers

MOODS = Task(
    "moods",
    "classification",
    (Pair("I won", "joy", "test"), Pair("A ghost", "fear", "test")),
    ("joy", "fear"),
)
FREE = Task(
    "free",
    "generation",
    (
        Pair("Who sat?", "The cat sat down", "test"),
        Pair("who  SAT?", "A dog", "test"),
        Pair("Who ran?", "The horse ran", "test"),
        Pair("Say sorry", "I'm sorry, I can't help you with that today", "test"),
    ),
)
TASKS = {task.name: task for task in (MOODS, FREE)}


def answered(
    text: str | None,
    task: Task = MOODS,
    item: int = 0,
    *,
    finish: str | None = "stop",
    condition: str = TRANSLATED,
    target: str = "big",
) -> Answer:
    pair = task.pairs[item]
    question = Question(task.name, condition, target, item, pair.input, pair.output, None, pair.input, None)
    error = None if text is not None else "server error 500"
    return Answer(question, text, finish if text is not None else None, 10, 2, error=error)


def score(answer: Answer) -> ScoredAnswer:
    (scored,) = score_answers([answer], TASKS)
    return scored


def accuracies(text: str) -> tuple[float, float]:
    """Strict and lenient, of an answer to the input whose label is joy."""
    scores = score(answered(text)).scores
    return scores["accuracy_strict"], scores["accuracy_lenient"]


# Labels ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["Joy", "joy.", "**Joy**", '"joy"', "Label: joy", "The mood is joy!", "\n\n```\njoy\n```"]
)
def test_form_costs_the_strict_accuracy_only(text: str) -> None:
    assert accuracies("joy") == accuracies(" \n joy\n") == (1.0, 1.0)
    assert accuracies(text) == (0.0, 1.0)


@pytest.mark.parametrize("text", ["fear", "enjoy it", "joyful", "killjoy", "happiness", "Label:\njoy", "joy2"])
def test_another_word_or_another_line_is_not_the_label(text: str) -> None:
    assert accuracies(text) == (0.0, 0.0)


def test_the_first_of_several_labels_is_the_answer_and_they_are_counted_as_ambiguous() -> None:
    first, other = score(answered("joy, not fear")), score(answered("fear or joy"))
    assert (first.scores["accuracy_lenient"], first.ambiguous) == (1.0, True)
    assert (other.scores["accuracy_lenient"], other.ambiguous) == (0.0, True)
    # Only the first line counts, and naming one label twice is naming one.
    assert not score(answered("joy\nfear")).ambiguous
    assert not score(answered("joy, joy")).ambiguous


@pytest.mark.parametrize(
    ("text", "labels", "named"),
    [
        ("It is not toxic.", ("toxic", "not toxic"), ["not toxic"]),
        ("toxic", ("toxic", "not toxic"), ["toxic"]),
        ("This is about Sci-Tech news", ("Sci/Tech", "Business"), ["Sci/Tech"]),
        ("scitech", ("Sci/Tech", "Business"), ["Sci/Tech"]),
        ("not,  toxic", ("toxic", "not toxic"), ["not toxic"]),
        # Labels of punctuation, and labels that differ in nothing else.
        ("+", ("+", "-"), ["+"]),
        ("-1", ("1", "-1"), ["-1"]),
        ("It is -1", ("1", "-1"), ["-1"]),
        ("It is 1", ("1", "-1"), ["1"]),
        # Numbers are no part of other numbers.
        ("4.5 stars", ("4", "5"), []),
        ("14 stars", ("4", "5"), []),
        ("4 stars.", ("4", "5"), ["4"]),
        # "a" is a word; alone on the line it is an answer.
        ("This is a question: B", ("A", "B"), ["B"]),
        ("(a)", ("A", "B"), ["A"]),
        ("A better answer is B", ("A", "B"), ["A", "B"]),
        # Labels that differ in case only.
        ("It is US", ("us", "US"), ["US"]),
        ("US", ("us", "US"), ["US"]),
        # Full-width letters are the same letters.
        ("\uff2a\uff4f\uff59", ("joy", "fear"), ["joy"]),
        ("", ("joy", "fear"), []),
        ("anything", ("", "fear"), []),
    ],
)
def test_which_labels_an_answer_names(text: str, labels: tuple[str, ...], named: list[str]) -> None:
    assert named_labels(text, labels) == named


# Texts ----------------------------------------------------------------------------------------------------------------


def test_a_text_is_compared_with_all_outputs_of_its_input() -> None:
    # "the cat": 2 common words of 2 and 4, so 2 · 1 · 0.5 / 1.5. The other output has no word in common.
    assert score(answered("the cat", FREE)).scores == pytest.approx({"rouge_l": 2 / 3, "exact_match": 0.0})
    # The same input, in other letters, has another output too.
    assert score(answered("a dog!", FREE)).scores == {"rouge_l": 1.0, "exact_match": 1.0}
    # Another input's output is no help.
    assert score(answered("A dog", FREE, 2)).scores == {"rouge_l": 0.0, "exact_match": 0.0}


def test_a_classification_has_text_scores_too() -> None:
    # One common word of 4 and 1: 2 · 0.25 · 1 / 1.25.
    scores = score(answered("The mood is joy")).scores
    assert scores == pytest.approx({"rouge_l": 0.4, "exact_match": 0, "accuracy_strict": 0, "accuracy_lenient": 1})


def test_the_headlines_are_scores_of_their_kind() -> None:
    assert HEADLINE in score(answered("x")).scores and HEADLINE in score(answered("x", FREE)).scores
    assert HEADLINES["classification"] in score(answered("x")).scores
    assert HEADLINES["generation"] in score(answered("x", FREE)).scores


# Answers that are none ------------------------------------------------------------------------------------------------


def test_an_empty_answer_scores_zero() -> None:
    for text in ("", " \n"):
        scored = score(answered(text))
        assert scored.state == "empty"
        assert scored.scores == {"rouge_l": 0, "exact_match": 0, "accuracy_strict": 0, "accuracy_lenient": 0}
    assert score(answered("", FREE)).scores == {"rouge_l": 0, "exact_match": 0}
    within_thoughts = score(answered("", finish="length"))
    assert (within_thoughts.state, within_thoughts.cut) == ("empty", True)


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't assist with that.",
        "I\N{RIGHT SINGLE QUOTATION MARK}m sorry, I can\N{RIGHT SINGLE QUOTATION MARK}t help you with joy.",
        "Sorry, I am unable to provide this.",
        "I cannot classify this text as joy or fear.",
        "I won't complete this.",
        "Unfortunately, I'm not able to answer.",
        "As an AI language model, I feel no joy.",
    ],
)
def test_a_refusal_scores_zero_whatever_it_names(text: str) -> None:
    scored = score(answered(text))
    assert scored.state == "refused" and set(scored.scores.values()) == {0.0}


@pytest.mark.parametrize(
    "text", ["I'm sorry for your loss", "I can see joy", "joy, as an AI would say", "I cannot wait"]
)
def test_words_of_a_refusal_are_not_one(text: str) -> None:
    assert score(answered(text)).state == "answered"


def test_what_the_server_filtered_is_a_refusal() -> None:
    assert score(answered("", finish="content_filter")).state == "refused"
    assert score(answered("", finish="refusal")).state == "refused"
    assert score(answered("joy", finish="content_filter")).scores["accuracy_lenient"] == 0


def test_where_a_refusal_is_expected_it_is_an_answer() -> None:
    scored = score(answered("I'm sorry, I can't help you with that today", FREE, 3))
    assert (scored.state, scored.scores) == ("answered", {"rouge_l": 1.0, "exact_match": 1.0})


def test_a_missing_answer_has_no_score() -> None:
    scored = score(answered(None))
    assert (scored.state, scored.is_missing, scored.scores, scored.cut) == ("missing", True, {}, False)


def test_an_answer_that_was_cut_is_scored_as_it_stands() -> None:
    scored = score(answered("joy and so on", finish="length"))
    assert scored.cut and scored.scores["accuracy_lenient"] == 1
    assert not score(answered("joy")).cut


# What cannot be scored ------------------------------------------------------------------------------------------------


def test_answers_of_an_unknown_task_or_condition_are_refused() -> None:
    with pytest.raises(DataError, match=r"unknown task 'moods', expected a task of the DoD\. Score answers with"):
        score_answers([answered("joy")], {"free": FREE})
    with pytest.raises(DataError, match=r"unknown condition 'magic', expected one of \['no_prompt'"):
        score_answers([answered("joy", condition="magic")], TASKS)


def test_answers_of_another_dod_are_refused() -> None:
    other = Task("moods", "classification", (Pair("I won", "delight"),), ("delight", "fear"))
    with pytest.raises(DataError, match=r"expected label 'joy' in task 'moods', expected one of \['delight', 'fear'\]"):
        score_answers([answered("joy")], {"moods": other})


def test_two_answers_to_one_question_are_refused() -> None:
    with pytest.raises(
        DataError, match="found a second answer for target 'big', condition 'translated', task 'moods', item 0"
    ):
        score_answers([answered("joy"), answered("joy")], TASKS)
    assert len(score_answers([answered("joy"), answered("joy", condition=NO_PROMPT)], TASKS)) == 2


def test_an_item_is_the_same_test_pair_under_every_condition() -> None:
    swapped = Question("moods", NO_PROMPT, "big", 0, "A ghost", "fear", None, "A ghost", None)
    with pytest.raises(DataError, match="found an answer about another test pair than before"):
        score_answers([answered("joy"), Answer(swapped, "fear")], TASKS)
