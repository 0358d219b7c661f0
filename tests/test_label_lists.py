"""Label lists: made from known labels in a likely order, and freed of what they repeat."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from peft import LoraConfig
from tiny_llm import HIDDEN_SIZE, tiny_base_model

from softprompt_registry.errors import DataError
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt, SoftPromptRecord
from softprompt_registry.translators.translator import Translator, TranslatorRecord, adapter_parameters, add_adapter
from softprompt_registry.verbalization.label_lists import (
    LIST_PREFILL,
    label_candidates,
    label_list_text,
    likely_order,
    with_labels,
)
from softprompt_registry.verbalization.repeated_labels import dedupe_list

LABELS = ("joy", "fear", "anger", "calm")


@cache
def translator() -> Translator:
    base = tiny_base_model()
    add_adapter(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), "made")
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter_parameters(base, "made").values():
        parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return Translator(base, TranslatorRecord(base.ref, 4), "made")


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


def test_a_label_list_is_written_as_a_translator_learns_it() -> None:
    assert label_list_text(LABELS) == "joy, fear, anger, calm"
    assert label_list_text(LABELS, (3, 0, 2, 1)) == "calm, joy, anger, fear"
    assert label_list_text(["only"]) == "only"


@pytest.mark.parametrize(
    ("labels", "order", "message"),
    [
        ((), None, r"the labels are \[\]; expected at least one"),
        (("a", " "), None, "none that is blank"),
        (("a", "b"), (0,), r"the order \[0\] does not name each of the places 0 to 1 once"),
        (("a", "b"), (0, 0), r"the order \[0, 0\]"),
        (("a", "b"), (1, 2), r"the order \[1, 2\]"),
    ],
)
def test_what_is_no_list_and_no_order_is_refused(
    labels: tuple[str, ...], order: tuple[int, ...] | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        label_list_text(labels, order)


def test_the_list_stands_behind_each_beginning() -> None:
    assert with_labels(("a", "b"), ["", LIST_PREFILL, "Say ", "Answer with:\n"], (1, 0)) == [
        "b, a",
        "Classify the given input into one of the following: b, a",
        "Say b, a",
        "Answer with:\nb, a",
    ]
    assert with_labels(("a", "b"), []) == []


@pytest.mark.parametrize("prefix", ["", "One of: "])
def test_the_next_label_is_the_one_that_makes_the_likeliest_beginning(prefix: str) -> None:
    orders = set()
    for seed in range(6):
        prompt = random_prompt(seed)
        chosen: list[int] = []
        while len(chosen) < 4:
            beginnings = {
                place: mean_by_hand(prompt, prefix + ", ".join(LABELS[p] for p in (*chosen, place)), end=False)
                for place in range(4)
                if place not in chosen
            }
            chosen.append(max(beginnings, key=lambda place: beginnings[place]))
        found = likely_order(translator(), prompt, LABELS, prefix=prefix)
        assert found == tuple(chosen)
        orders.add(found)
    assert len(orders) > 1, "different soft prompts, different orders"


def test_one_label_has_one_order_and_none_has_none() -> None:
    assert likely_order(translator(), random_prompt(0), ["only"]) == (0,)
    with pytest.raises(DataError, match="expected at least one"):
        likely_order(translator(), random_prompt(0), [])


def test_candidates_are_scored_whole_and_the_likeliest_comes_first() -> None:
    prompt = random_prompt(1)
    prefixes = ["", "One of:", "zq#"]
    found = label_candidates(translator(), prompt, LABELS, prefixes)
    expected = {
        with_labels(LABELS, [prefix], likely_order(translator(), prompt, LABELS, prefix=prefix))[0]
        for prefix in prefixes
    }
    assert {candidate.text for candidate in found} == expected and len(expected) == 3
    assert all(candidate.proposer == "label_list" for candidate in found)
    scores = [candidate.score for candidate in found]
    assert scores == [pytest.approx(mean_by_hand(prompt, candidate.text), rel=1e-4) for candidate in found]
    assert scores == sorted(scores, reverse=True)  # type: ignore[type-var]


def test_many_texts_are_scored_in_several_passes() -> None:
    """40 rows of some 150 tokens are more than one pass takes."""
    prompt = random_prompt(0)
    prefixes = [f"{'y' * 130} {number:02d}" for number in range(40)]
    found = label_candidates(translator(), prompt, ("joy", "fear"), prefixes)
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
