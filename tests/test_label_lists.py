"""Label lists: made from known labels in a likely order, and freed of what they repeat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch
from small_prompts import tiny_translator
from tiny_llm import HIDDEN_SIZE

from softprompt_registry.dod.task import Pair, Task
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt, SoftPromptRecord
from softprompt_registry.translators.translator import Translator
from softprompt_registry.verbalization.proposers.label_list import LabelListProposer
from softprompt_registry.verbalization.repeated_labels import dedupe_list
from softprompt_registry.verbalization.verbalizer import Candidate, VerbalizationConfig

LABELS = ("joy", "fear", "anger", "calm")


@cache
def translator() -> Translator:
    return tiny_translator()


def random_prompt(seed: int) -> SoftPrompt:
    embeddings = torch.randn(4, HIDDEN_SIZE, generator=torch.Generator().manual_seed(seed))
    return SoftPrompt(embeddings, None, SoftPromptRecord("t", "classification", translator().base_model.ref, "{x}"))


def mean_by_hand(soft_prompt: SoftPrompt, text: str, *, end: bool = True) -> float:
    """Log-likelihood per token after [soft tokens][BOS], one text alone."""
    base = translator().base_model
    target = [*base.tokenize(text), *([1] if end else [])]
    with translator().reading(), torch.no_grad():
        scores = base.score_targets(soft_prompt.embeddings[None], [[0]], [target])
    return float(scores.log_likelihood[0]) / len(target)


# Known labels ---------------------------------------------------------------------------------------------------------


def lists(prompt: SoftPrompt, labels: tuple[str, ...], prefixes: Sequence[str]) -> list[Candidate]:
    task = Task("t", "classification", (Pair("a", labels[0]),), labels)
    (found,) = LabelListProposer(translator(), {"t": task}, prefixes).propose([prompt], VerbalizationConfig())
    return found


@pytest.mark.parametrize("prefix", ["", "One of: "])
def test_the_next_label_is_the_one_that_makes_the_likeliest_beginning(prefix: str) -> None:
    texts = set()
    for seed in range(6):
        prompt = random_prompt(seed)
        expected = ""
        while len(named := [label for label in expected.split(", ") if label]) < 4:
            beginnings = [", ".join([*named, label]) for label in LABELS if label not in named]
            expected = max(beginnings, key=lambda text: mean_by_hand(prompt, prefix + text, end=False))
        (found,) = lists(prompt, LABELS, [prefix])
        assert found.text == prefix + expected
        texts.add(found.text)
    assert len(texts) > 1, "different soft prompts, different orders"


def test_lists_are_scored_whole_and_the_likeliest_comes_first() -> None:
    prompt = random_prompt(1)
    found = lists(prompt, LABELS, ["", "One of:", "zq#\n"])
    assert {(one.text[: -len("joy, fear, anger, calm")], one.prefill) for one in found} == {
        ("", ""),
        ("One of: ", "One of:"),
        ("zq#\n", "zq#\n"),
    }
    scores = [candidate.score for candidate in found]
    assert scores == [pytest.approx(mean_by_hand(prompt, candidate.text), rel=1e-4) for candidate in found]
    assert scores == sorted(scores, reverse=True)  # type: ignore[type-var]
    of_record = replace(prompt, record=replace(prompt.record, labels=("only",)))
    (only,) = LabelListProposer(translator(), {}, [""]).propose([of_record], VerbalizationConfig())
    assert [one.text for one in only] == ["only"]


def test_many_texts_are_scored_in_several_passes() -> None:
    """40 rows of some 150 tokens are more than one pass takes."""
    prompt = random_prompt(0)
    found = lists(prompt, ("joy", "fear"), [f"{'y' * 130} {number:02d}" for number in range(40)])
    assert len(found) == 40
    by_hand = [mean_by_hand(prompt, each.text) for each in found]
    assert [each.score for each in found] == pytest.approx(by_hand, rel=1e-4)


# Unknown labels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cat, dog, cat, Dog", "cat, dog"),
        ("Cat, cat, CAT", "Cat"),
        ("cat, dog", "cat, dog"),
        ("cat,dog,cat", "cat, dog"),
        ("cat,  dog ,  cat", "cat, dog"),
        ("very good, bad, very  good", "very good, bad"),
        ("not toxic, toxic", "not toxic, toxic"),
        ("cat, dog, and cat", "cat, dog"),
        ("cat, dog, or bird", "cat, dog, or bird"),
        ("android, or android", "android"),
        ("cat, dog, Dog.", "cat, dog"),
        ("cat,, dog, ", "cat, dog"),
        ("naïve, NAÏVE, ﬁne, fine", "naïve, ﬁne"),
        ("Say one of: cat, dog, cat", "Say one of: cat, dog"),
        ("Say one of:\ncat, dog, cat", "Say one of:\ncat, dog"),
        ("NUM:count, LOC:city, NUM:count", "NUM:count, LOC:city"),
        ("cat", "cat"),
        ("", ""),
        (", ,", ""),
        ("A sentence without any list.", "A sentence without any list."),
        ("Say what it is, whether you would buy it again, say what it is", None),
        ("cat, dog, cat\n\nInput: cat, dog", None),
    ],
)
def test_repetitions_leave_the_list_and_what_is_no_list_stays_as_it_is(text: str, expected: str | None) -> None:
    expected = text if expected is None else expected
    assert dedupe_list(text) == expected
    assert dedupe_list(expected) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cat, dog, bir", "cat, dog, bir"),
        ("cat, dog, cat, do", "cat, dog"),
        ("cat, cat, do", "cat"),
        ("cat, dog, cat", "cat, dog"),
        ("cat, dog,", "cat, dog"),
        ("categ", "categ"),
        ("One of: cat, dog, Cat, b", "One of: cat, dog"),
    ],
)
def test_the_last_item_of_a_cut_list_goes_too_where_items_repeat(text: str, expected: str) -> None:
    assert dedupe_list(text, cut=True) == expected


def test_the_prefill_is_kept_as_it_is() -> None:
    assert dedupe_list("Pick cat, dog or bird, cat: cat, dog, Cat", prefill="Pick cat, dog or bird, cat:") == (
        "Pick cat, dog or bird, cat: cat, dog"
    )
    assert dedupe_list("One of:cat, dog, cat", prefill="One of:") == "One of:cat, dog"
    assert dedupe_list("cat, dog, cat", prefill="One of:") == "cat, dog", "a text that begins otherwise"
