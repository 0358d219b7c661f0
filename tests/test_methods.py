"""Proposers beside each other: what each says first, what the verifier chooses, and on which pairs that is reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from small_prompts import make
from tiny_llm import tiny_base_model

from softprompt_registry.dod.task import Pair, Task
from softprompt_registry.errors import DataError
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt
from softprompt_registry.verbalization.abstention import AbstentionRule
from softprompt_registry.verbalization.held_out import split_pairs
from softprompt_registry.verbalization.methods import MethodTexts, apply_methods
from softprompt_registry.verbalization.verbalizer import Candidate, VerbalizationConfig
from softprompt_registry.verbalization.verifier import Verifier, VerifierConfig


class Writes:
    """A proposer that says what it was told to say of each task."""

    def __init__(self, name: str, texts: Mapping[str, Sequence[str]]) -> None:
        self.name = name
        self._texts = texts

    def propose(self, soft_prompts: Sequence[SoftPrompt], config: VerbalizationConfig) -> list[list[Candidate]]:
        unknown = [prompt.record.task for prompt in soft_prompts if prompt.record.task not in self._texts]
        if unknown:
            raise DataError(f"{self.name} knows nothing of {unknown}")
        return [[Candidate(text, self.name) for text in self._texts[prompt.record.task]] for prompt in soft_prompts]


def held_out(name: str) -> Task:
    labels = ("joy", "fear")
    pairs = [Pair(f"{name} {number}", labels[number % 2], "test" if number < 12 else "train") for number in range(14)]
    return Task(name, "classification", tuple(pairs), labels)


TASKS = {name: held_out(name) for name in ("moods", "sides")}
PROMPTS = [make("moods", 1), make("sides", 2)]
TEXTS = {"moods": ["joy, fear", "something else", "Name the feeling."], "sides": ["left", "right", "up, down"]}


def methods(*proposers: Writes, without_verifier: Sequence[str] = ()) -> MethodTexts:
    return apply_methods(
        PROMPTS,
        TASKS,
        proposers,
        VerbalizationConfig(),
        Verifier(tiny_base_model(), VerifierConfig(draws=100)),
        AbstentionRule(),
        without_verifier=without_verifier,
    )


def test_a_method_says_its_first_text_and_with_the_verifier_the_one_that_scores_best() -> None:
    made = methods(Writes("a", TEXTS))
    assert list(made.texts) == ["a", "a+verifier", "all+verifier"]
    for number, prompt in enumerate(PROMPTS):
        task = prompt.record.task
        assert made.texts["a"][number].text == TEXTS[task][0]
        best = max(made.ranking[number].candidates, key=lambda candidate: candidate.score)
        assert made.texts["a+verifier"][number].text == best.text
        scores = [candidate.verified_score for candidate in made.texts["a+verifier"][number].candidates]
        assert None not in scores and scores == sorted(scores, reverse=True)
    # The tiny model does not choose the first one each time, or this test would show nothing.
    assert any(made.texts["a"][n].text != made.texts["a+verifier"][n].text for n in range(2))


def test_a_method_is_reported_on_pairs_that_chose_nothing() -> None:
    made = methods(Writes("a", TEXTS))
    for number, prompt in enumerate(PROMPTS):
        halves = split_pairs(TASKS[prompt.record.task], 0)
        assert not {pair.input for pair in halves.ranking} & {pair.input for pair in halves.reporting}
        assert len(made.ranking[number].items) == len(halves.ranking) == 6
        assert len(made.reporting[number].items) == len(halves.reporting) == 6
        assert made.ranking[number].soft_prompt_scores != made.reporting[number].soft_prompt_scores
        reported = {candidate.text for candidate in made.reporting[number].candidates}
        assert reported == {items[number].text for items in made.texts.values()}


def test_all_chooses_among_the_texts_of_all_but_those_left_out() -> None:
    one = {task: texts[:1] for task, texts in TEXTS.items()}
    other = {task: ["the the the"] for task in TASKS}
    made = methods(Writes("a", one), Writes("control", other), without_verifier=["control"])
    # Nobody has a second candidate to choose from.
    assert list(made.texts) == ["a", "control", "all+verifier"]
    assert [item.text for item in made.texts["all+verifier"]] == [one[task][0] for task in TASKS]
    together = methods(Writes("a", one), Writes("control", other)).texts["all+verifier"]
    assert {candidate.text for candidate in together[0].candidates} == {one["moods"][0], "the the the"}


def test_a_proposer_that_fails_with_one_soft_prompt_goes_on_with_the_others() -> None:
    made = methods(Writes("a", TEXTS), Writes("b", {"sides": ["left or right"]}))
    assert [item.text for item in made.texts["b"]] == ["", "left or right"]
    assert made.texts["b"][0].abstained and made.texts["b"][0].reason
    assert list(made.failures) == [("b", "moods")]
    assert "knows nothing of ['moods']" in made.failures["b", "moods"]


def test_a_task_without_held_out_pairs_is_refused() -> None:
    bare = replace(TASKS["moods"], pairs=TASKS["moods"].pairs[12:])
    with pytest.raises(DataError, match="'moods'.*more held-out pairs"):
        apply_methods(
            PROMPTS[:1],
            {"moods": bare},
            [Writes("a", TEXTS)],
            VerbalizationConfig(),
            Verifier(tiny_base_model()),
            AbstentionRule(),
        )


def test_the_given_beginning_of_the_chosen_candidate_goes_with_its_text() -> None:
    """What a proposer was given is not scored, whichever of its candidates the verifier takes."""

    class Begins(Writes):
        def propose(self, soft_prompts: Sequence[SoftPrompt], config: VerbalizationConfig) -> list[list[Candidate]]:
            found = super().propose(soft_prompts, config)
            return [[replace(one, prefill=one.text.split()[0]) for one in candidates] for candidates in found]

    made = apply_methods(
        PROMPTS,
        TASKS,
        [Begins("a", TEXTS)],
        VerbalizationConfig(),
        Verifier(tiny_base_model(), VerifierConfig(draws=100)),
        AbstentionRule(),
        translator_id="translator_1",
    )
    for items in made.texts.values():
        assert [item.prefill for item in items] == [item.text.split()[0] for item in items]
        assert {item.translator_id for item in items} == {"translator_1"}
