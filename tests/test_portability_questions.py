"""What a target LLM is asked: templates, which test pairs, which examples, and the request."""

from __future__ import annotations

from dataclasses import replace

import pytest
from small_tasks import free_task, make_task

from softprompt_registry.dod.task import Pair, PairSplit, Task
from softprompt_registry.errors import ConfigError, DataError
from softprompt_registry.language_models.protocol import CompletionRequest
from softprompt_registry.portability.answers import Question
from softprompt_registry.portability.conditions import CONDITIONS, SOFT_PROMPT
from softprompt_registry.portability.hard_prompts import HardPrompt
from softprompt_registry.portability.questions import (
    QuestionsConfig,
    TaskItems,
    choose_items,
    questions_for,
    requests_of,
    soft_prompt_questions,
    to_request,
)
from softprompt_registry.portability.templates import PromptTemplates
from softprompt_registry.verbalization.held_out import split_pairs

TEMPLATES = PromptTemplates()
PAIRS = (Pair("one", "1"), Pair("two", "2"))


def large_task(labels: tuple[str, ...] = ("joy", "fear", "anger", "awe")) -> Task:
    """40 training, 6 validation and 20 test pairs, no two with the same input."""
    splits: list[PairSplit] = [*["train"] * 40, *["validation"] * 6, *["test"] * 20]
    pairs = [Pair(f"large {number}", labels[number % len(labels)], split) for number, split in enumerate(splits)]
    return Task("large", "classification", tuple(pairs), labels)


# --- Templates ---


def test_the_papers_prompt() -> None:
    assert TEMPLATES.fill("Rain.", hard_prompt="Name the tone.") == "Name the tone. Input: Rain.\nOutput:"
    assert TEMPLATES.fill("Rain.") == TEMPLATES.fill("Rain.", hard_prompt="") == "Input: Rain.\nOutput:"
    assert TEMPLATES.system == "You are a helpful assistant. Follow the task exactly."


def test_examples_stand_between_the_hard_prompt_and_the_input() -> None:
    shown = "Input: one\nOutput: 1\n\nInput: two\nOutput: 2\n\n"
    assert TEMPLATES.fill("Rain.", examples=PAIRS) == f"{shown}Input: Rain.\nOutput:"
    filled = TEMPLATES.fill("Rain.", hard_prompt="Name it.", examples=PAIRS)
    assert filled == f"Name it. {shown}Input: Rain.\nOutput:"


def test_other_templates() -> None:
    templates = PromptTemplates(None, "# {hard_prompt}\n\n{input} =>", "{input} => {output}\n")
    assert templates.fill("3", hard_prompt="Count.", examples=PAIRS) == "# Count.\n\none => 1\ntwo => 2\n3 =>"
    assert templates.fill("3") == "# 3 =>"


def test_braces_in_data_stay_as_they_are() -> None:
    examples = [Pair("{output}", "{input} {hard_prompt}")]
    filled = TEMPLATES.fill("{hard_prompt} \\1 {x}", hard_prompt="Say {input} {{and}} \\g<0>.", examples=examples)
    assert filled == (
        "Say {input} {{and}} \\g<0>. Input: {output}\nOutput: {input} {hard_prompt}\n\n"
        "Input: {hard_prompt} \\1 {x}\nOutput:"
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prompt": "Input: {input}"}, r"prompt is 'Input: \{input\}' with the places \['input'\], expected each of"),
        ({"prompt": "{input} {hard_prompt}"}, r"\['hard_prompt', 'input'\] once and in this order"),
        ({"prompt": "{hard_prompt} {input} {input}"}, "prompt is"),
        ({"prompt": "{hard_prompt} {input} {question}"}, "'question'"),
        ({"example": "{input}"}, r"example is '\{input\}' with the places \['input'\]"),
    ],
)
def test_templates_without_their_places_are_refused(settings: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PromptTemplates(**settings)


# --- Items and examples ---


def test_items_are_what_the_verifier_does_not_rank_on() -> None:
    task = large_task()
    for seed in range(3):
        halves = split_pairs(task, seed)
        chosen = choose_items(task, QuestionsConfig(max_items=None), split_seed=seed)
        assert chosen.items == tuple(halves.reporting)
        assert not {pair.input for pair in chosen.items} & {pair.input for pair in halves.ranking}
        # Test pairs first; validation pairs have stopped the tuning.
        assert [pair.split for pair in chosen.items] == sorted(pair.split for pair in chosen.items)
    fewer = choose_items(task, QuestionsConfig(max_items=4), split_seed=2)
    assert fewer.items == chosen.items[:4]


def test_an_input_is_asked_about_once() -> None:
    pairs = [Pair(f"in {number}", f"out {number}", "test") for number in range(4)]
    again = [Pair(f"In  {number}", f"other {number}", "test") for number in range(4)]
    task = Task("twice", "generation", (*pairs, *again, Pair("t", "u")))
    chosen = choose_items(task, QuestionsConfig(), split_seed=0)
    assert len(chosen.items) == 2 and len({pair.input.casefold().split()[1] for pair in chosen.items}) == 2
    reporting = split_pairs(task, 0).reporting
    assert all(reporting.index(item) % 2 == 0 for item in chosen.items)  # the first of each two


def test_examples_are_training_pairs_that_are_not_asked_about() -> None:
    task = large_task()
    leaked = tuple(Pair(pair.input.upper(), pair.output) for pair in task.pairs_of("test"))
    task = replace(task, pairs=leaked + task.pairs)
    for seed in range(5):
        chosen = choose_items(task, QuestionsConfig(seed=seed), split_seed=0)
        assert len(chosen.examples) == 5 and all(pair.split == "train" for pair in chosen.examples)
        possible = {pair.input.casefold() for pair in split_pairs(task, 0).reporting}
        assert not {pair.input.casefold() for pair in chosen.examples} & possible
        assert {pair.input.casefold() for pair in task.pairs_of("train")} & possible  # there is what to leave out
    draws = {choose_items(task, QuestionsConfig(seed=seed), split_seed=0).examples for seed in range(5)}
    assert len(draws) == 5
    assert choose_items(task, QuestionsConfig(seed=4), split_seed=0) == chosen


def test_examples_of_a_classification_are_balanced() -> None:
    for labels in (("joy", "fear"), ("joy", "fear", "anger", "awe"), tuple("abcdefgh")):
        for seed in range(5):
            examples = choose_items(large_task(labels), QuestionsConfig(seed=seed), split_seed=0).examples
            for count in (3, 5):
                outputs = [pair.output for pair in examples[:count]]
                assert len(set(outputs)) == min(count, len(labels))


def test_a_task_with_few_training_pairs_gives_all_it_has() -> None:
    task = make_task("few", train=3)  # its splits share inputs
    asked = {pair.input for pair in split_pairs(task, 0).reporting}
    examples = choose_items(task, QuestionsConfig(), split_seed=0).examples
    assert {pair.input for pair in examples} == {pair.input for pair in task.pairs_of("train")} - asked != set()
    task = replace(task, pairs=tuple(pair for pair in task.pairs if pair.split != "train" or pair.input in asked))
    with pytest.raises(
        DataError, match="few-shot examples of task 'few': each of its . training pairs has an input that"
    ):
        choose_items(task, QuestionsConfig(), split_seed=0)


# --- Questions ---


def asked(task: Task, hard_prompts: dict[str, HardPrompt], **config: int) -> dict[str, list[Question]]:
    """Questions by condition."""
    chosen = choose_items(task, QuestionsConfig(**config), split_seed=0)
    questions = questions_for(chosen, "big", list(CONDITIONS), hard_prompts, TEMPLATES)
    return {name: [one for one in questions if one.condition == name] for name in CONDITIONS}


def test_every_condition_asks_about_the_same_items() -> None:
    texts = {name: HardPrompt(f"Do {name}.", "some") for name in CONDITIONS}
    by_condition = asked(large_task(), texts, max_items=6)
    for name, questions in by_condition.items():
        if name == SOFT_PROMPT:
            assert questions == []  # another model answers it
            continue
        assert [one.item for one in questions] == [0, 1, 2, 3, 4, 5]
        assert [(one.input, one.expected) for one in questions] == [
            (one.input, one.expected) for one in by_condition["no_prompt"]
        ]
        assert all(one.prompt.endswith(f"Input: {one.input}\nOutput:") for one in questions)
        assert {one.target for one in questions} == {"big"} and {one.system for one in questions} == {TEMPLATES.system}
    without = {name for name in CONDITIONS if any(one.hard_prompt is None for one in by_condition[name])}
    assert without == {"no_prompt", "few_shot_3", "few_shot_5"}
    assert by_condition["translated"][0].prompt.startswith("Do translated. Input: ")


def test_five_examples_begin_with_the_three_and_are_the_same_for_every_item() -> None:
    texts = {"few_shot_3_translated": HardPrompt("Do it.", "translator")}
    by_condition = asked(large_task(), texts)
    heads = {
        name: {one.prompt.removesuffix(f"Input: {one.input}\nOutput:") for one in by_condition[name]}
        for name in ("few_shot_3", "few_shot_5", "few_shot_3_translated")
    }
    assert all(len(head) == 1 for head in heads.values())
    three, five, translated = (next(iter(head)) for head in heads.values())
    assert (three.count("Output: "), five.count("Output: ")) == (3, 5)
    assert five.startswith(three) and translated == f"Do it. {three}"


def test_a_method_that_wrote_nothing_is_asked_and_marked() -> None:
    by_condition = asked(large_task(), {"inspect": HardPrompt("", "inspect"), "translated": HardPrompt("x", "t", True)})
    for name in ("inspect", "nearest_tokens"):  # an empty text, and none at all
        assert {one.hard_prompt for one in by_condition[name]} == {""}
        assert [one.prompt for one in by_condition[name]] == [one.prompt for one in by_condition["no_prompt"]]
    # What the evaluation held back is asked with as well.
    assert {one.hard_prompt for one in by_condition["translated"]} == {"x"}


def test_the_soft_prompt_is_asked_in_the_template_of_its_tuning() -> None:
    for task, prompt in ((large_task(), "Sentence: {} Label:"), (free_task("free"), "Input: {}\nOutput:")):
        chosen = choose_items(task, QuestionsConfig(), split_seed=0)
        questions = soft_prompt_questions(chosen, "tiny")
        assert [one.prompt for one in questions] == [prompt.format(pair.input) for pair in chosen.items]
        assert all(one.system is None and one.target == "tiny" and one.condition == SOFT_PROMPT for one in questions)
        assert [one.expected for one in questions] == [pair.output for pair in chosen.items]


# --- Requests ---


def question_of(chosen: TaskItems) -> Question:
    return questions_for(chosen, "big", ["no_prompt"], {}, TEMPLATES)[0]


def test_labels_end_at_a_line_break_and_free_answers_do_not() -> None:
    tasks = {"large": large_task(), "free": free_task("free")}
    config = QuestionsConfig()
    questions = [question_of(choose_items(task, config, split_seed=0)) for task in tasks.values()]
    label, free = requests_of(questions, tasks, config, max_tokens=9)
    assert label == to_request(questions[0], max_tokens=9, stop_at_newline=True)
    assert label == CompletionRequest(questions[0].prompt, TEMPLATES.system, 9, temperature=0.0, stop=("\n",))
    assert free == CompletionRequest(questions[1].prompt, TEMPLATES.system, 9, temperature=0.0, stop=())
    label, _ = requests_of(questions, tasks, QuestionsConfig(stop_labels_at_newline=False), max_tokens=9)
    assert label.stop == ()
