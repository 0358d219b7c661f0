"""Label lists that a translator wrote, freed of what they repeat.

A small model that names labels often goes round: it repeats some of them until the length cap ends the text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from softprompt_registry.dod.task import text_key

MAX_WORDS_OF_A_LABEL = 5
"""A text with a longer item is no label list but a sentence with commas."""


def dedupe_list(text: str, *, prefill: str = "", cut: bool = False) -> str:
    """A comma-separated list of labels without repetitions: "cat, dog, cat, Dog" becomes "cat, dog".

    Items are the same that differ only in case, spaces, a full stop at the end or "and"/"or" at the beginning; the first
    spelling stays. What stands before the list is left alone: the prefill, or else all up to a colon before the first comma.
    A text in which nothing repeats comes back as it is, and so does one that is no list: with no comma, a line break, or an
    item of more than `MAX_WORDS_OF_A_LABEL` words.

    Args:
        prefill: the beginning that `text` was given, if any.
        cut: whether the length cap ended the text; the last item of a list that repeats itself, which may be half a word, is
            then left out too.
    """
    start = _start_of_list(text, prefill)
    body = text[start:]
    items = [item.strip() for item in body.split(",")]
    if len(items) < 2 or any("\n" in item or len(item.split()) > MAX_WORDS_OF_A_LABEL for item in items):
        return text
    kept = _distinct(items)
    if len(kept) == len(items):
        return text
    if cut:
        kept = _distinct(items[:-1])
    space = body[: len(body) - len(body.lstrip())]
    return (text[:start] + space + ", ".join(kept)).strip()


def _distinct(items: Sequence[str]) -> list[str]:
    kept: dict[str, str] = {}
    for item in items:
        key = _item_key(item)
        if key:
            kept.setdefault(key, item)
    return list(kept.values())


def _start_of_list(text: str, prefill: str) -> int:
    if prefill and text.startswith(prefill):
        return len(prefill)
    # A colon inside a label, as in "NUM:count", has no space behind it.
    colon = re.match(r"[^,]*:(?=\s)", text)
    return colon.end() if colon else 0


def _item_key(item: str) -> str:
    return re.sub(r"^(and|or) ", "", text_key(item).rstrip(".").rstrip())
