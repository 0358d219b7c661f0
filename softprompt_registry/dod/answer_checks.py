"""Whether an LLM's answer is of use: its JSON, the rules for labels, the rules for sentences."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import combinations

from softprompt_registry.dod.vocabulary import (
    FUNCTION_WORDS,
    held_out_words,
    is_english_word,
    same_root,
    share_of_english,
    words_of,
)
from softprompt_registry.language_models.protocol import Completion

_LABEL = re.compile(r"[a-z]+")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
"""What JSON's escapes can bring in and a text does not have; UTF-8 cannot hold the last of them."""


def label_set_schema(count: int) -> str:
    """JSON schema of an answer with `count` one-word labels."""
    return _schema("labels", {"type": "string", "pattern": "^[A-Za-z]+$"}, count)


def sentences_schema(count: int) -> str:
    """JSON schema of an answer with `count` sentences."""
    return _schema("sentences", {"type": "string"}, count)


def _schema(key: str, items: dict[str, str], count: int) -> str:
    return json.dumps(
        {
            "type": "object",
            "properties": {key: {"type": "array", "items": items, "minItems": count, "maxItems": count}},
            "required": [key],
            "additionalProperties": False,
        }
    )


def read_string_list(answer: Completion) -> list[str] | str:
    """The strings of an answer `{"…": [strings]}`, or what is wrong with it.

    Servers that follow no schema put such an object into a code fence or add words around it; these are cut off.
    """
    text = answer.text.strip()
    if not text:
        return f"empty ({answer.finish_reason})" if answer.finish_reason else "empty"
    try:
        value = json.loads(text[text.find("{") : text.rfind("}") + 1])
    except (ValueError, RecursionError):
        return "cut off at max_tokens" if answer.finish_reason == "length" else "not JSON"
    lists = [item for item in value.values() if isinstance(item, list)] if isinstance(value, dict) else []
    if len(lists) != 1 or not lists[0] or not all(isinstance(item, str) for item in lists[0]):
        return "not one list of strings"
    return list(lists[0])


def label_set_fault(labels: Sequence[str], count: int) -> str | None:
    """Why a set of lower-case labels is refused; None if it is good.

    Paper: its label generator could produce labels of the evaluation sets; here those are refused.
    """
    if len(labels) != count:
        return f"not {count} labels"
    if not all(_LABEL.fullmatch(label) for label in labels):
        return "not letters alone"
    if len(set(labels)) < count:
        return "a label twice"
    if not all(is_english_word(label) and label not in FUNCTION_WORDS for label in labels):
        return "not a word of the lexicon"
    if any(same_root(left, right) for left, right in combinations(labels, 2)):
        return "two forms of one word"
    if not held_out_words().isdisjoint(labels):
        return "a label of the evaluation sets"
    return None


def sentence_fault(sentence: str, label: str, *, min_words: int, max_words: int, min_english: float) -> str | None:
    """Why a sentence is refused as an example of `label`; None if it is good."""
    if _CONTROL.search(sentence):
        return "control characters"
    words = words_of(sentence)
    if len(words) < min_words:
        return f"under {min_words} words"
    if len(words) > max_words:
        return f"over {max_words} words"
    if any(same_root(word.partition("'")[0], label) for word in set(words)):
        return "contains its label"
    if share_of_english(sentence) < min_english:
        return "not English"
    return None
