"""What counts as a good answer: its JSON, the rules for labels, the rules for sentences."""

from __future__ import annotations

import json

import pytest

from softprompt_registry.dod.answer_checks import (
    label_set_fault,
    label_set_schema,
    read_string_list,
    sentence_fault,
    sentences_schema,
)
from softprompt_registry.language_models.protocol import Completion


def answer(text: str, finish_reason: str | None = "stop") -> Completion:
    return Completion(text, 7, 3, 0.1, finish_reason, attempts=1)


@pytest.mark.parametrize(
    "text",
    [
        '{"labels": ["lion", "bear"]}',
        ' {"whatever":["lion","bear"]}\n',
        '```json\n{"labels": ["lion", "bear"]}\n```',
        'Sure! {"labels": ["lion", "bear"]} Anything else?',
        '{"theme": "animals", "count": 2, "labels": ["lion", "bear"]}',
    ],
)
def test_lists_are_found(text: str) -> None:
    assert read_string_list(answer(text)) == ["lion", "bear"]


@pytest.mark.parametrize(
    ("text", "finish_reason", "fault"),
    [
        ("", "stop", "empty (stop)"),
        (" \n", "content_filter", "empty (content_filter)"),
        ("I cannot help with that.", "stop", "not JSON"),
        ('["lion", "bear"]', "stop", "not JSON"),
        ("}", "stop", "not JSON"),
        ('{"labels": ["lion"} ["bear"]}', "stop", "not JSON"),
        ("{" * 100_000 + "}" * 100_000, "stop", "not JSON"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "stop", "not JSON"),
        ('{"labels": ["lion", "be', "length", "cut off at max_tokens"),
        ('{"labels": "lion, bear"}', "stop", "not one list of strings"),
        ('{"labels": ["lion", 3]}', "stop", "not one list of strings"),
        ('{"labels": []}', "stop", "not one list of strings"),
        ('{"labels": ["lion"], "more": ["bear"]}', "stop", "not one list of strings"),
        ('{"labels": [{"word": "lion"}]}', "stop", "not one list of strings"),
    ],
)
def test_other_answers_say_what_is_wrong(text: str, finish_reason: str | None, fault: str) -> None:
    assert read_string_list(answer(text, finish_reason)) == fault


@pytest.mark.parametrize(
    ("labels", "fault"),
    [
        (["lion", "bear", "wolf"], None),
        (["lion", "bear"], "not 3 labels"),
        (["lion", "polar bear", "wolf"], "not letters alone"),
        (["lion", "café", "wolf"], "not letters alone"),
        (["lion", "bear\n", "wolf"], "not letters alone"),
        (["lion", "bear", "lion"], "a label twice"),
        (["lion", "blorptang", "wolf"], "not a word of the lexicon"),
        (["lion", "bear", "lions"], "two forms of one word"),
        (["music", "bear", "musician"], "two forms of one word"),
        (["lion", "sports", "wolf"], "a label of the evaluation sets"),
        (["lion", "worst", "wolf"], "a label of the evaluation sets"),
    ],
)
def test_label_sets(labels: list[str], fault: str | None) -> None:
    assert label_set_fault(labels, 3) == fault


@pytest.mark.parametrize(
    ("sentence", "fault"),
    [
        ("She tends the wheat before sunrise.", None),
        ("He waits", "under 3 words"),
        ("3 4 5 he waits", "under 3 words"),
        ("one two three four five six seven eight nine", "over 8 words"),
        ("one two three four five six seven eight", None),
        ("The farmer tends the wheat.", "contains its label"),
        ("The farmer’s wheat is ripe.", "contains its label"),
        ("The farmer's wheat is ripe.", "contains its label"),
        ("She is farming near the river.", "contains its label"),
        ("A small-farm owner waits here.", "contains its label"),
        ("Der Bauer pflügt das Feld früh", "not English"),
        ("彼は 畑を 耕して います", "not English"),
        ("Herr Krause liest his newspaper", "not English"),  # 2 of 5
        ("Herr Krause eats bread", None),  # 2 of 4
        ("He waits\x00 for the wheat.", "control characters"),
        # Bug: JSON's "\ud800" got as far as SQLite, which ended the build with an UnicodeEncodeError.
        (json.loads(r'"He waits \ud800 for wheat"'), "control characters"),
        ("He waits for 👩‍🌾 and wheat.", None),
    ],
)
def test_sentences(sentence: str, fault: str | None) -> None:
    assert sentence_fault(sentence, "farmer", min_words=3, max_words=8, min_english=0.5) == fault


def test_schemas() -> None:
    labels = json.loads(label_set_schema(5))
    assert (labels["required"], labels["additionalProperties"]) == (["labels"], False)
    array = {"type": "array", "minItems": 5, "maxItems": 5}
    assert labels["properties"] == {"labels": {**array, "items": {"type": "string", "pattern": "^[A-Za-z]+$"}}}
    assert json.loads(sentences_schema(5))["properties"] == {"sentences": {**array, "items": {"type": "string"}}}
