"""Which pairs of a task go into a General DoD: unwinding, empty, repeated and too long pairs, and the draw."""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from softprompt_registry.dod.task import Pair, seed_of
from softprompt_registry.fingerprints import digest_of_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZE_PAIRS = 512
TOKENIZE_CHARS = 1 << 20
"""Pairs are tokenized together until there are this many, or this many characters in them."""


COUNTS = ("instances", "bad_instances", "pairs", "empty", "duplicates", "too_long", "available", "drawn")


class PairDraw:
    """Takes the instances of one task, and keeps the pairs with the smallest hashes.

    The hash covers seed, task and pair, so the draw depends on nothing else; sorted by it, the pairs are also shuffled.
    """

    def __init__(
        self, name: str, counter: TokenCounter, *, max_tokens: int | None, max_pairs: int | None, seed: int
    ) -> None:
        self.counts: dict[str, Any] = dict.fromkeys(COUNTS, 0)
        self._seed = seed_of("pairs", seed, name)
        self._counter = counter
        self._max_tokens = max_tokens
        self._max_pairs = max_pairs
        self._seen: set[int] = set()
        self._waiting: list[tuple[int, str, str]] = []
        self._waiting_chars = 0
        self._heap: list[tuple[int, Pair]] = []
        """Negative hash and pair: the pair with the largest hash comes out first."""

    def add(self, text: object, outputs: object) -> None:
        """One instance, whatever it holds."""
        self.counts["instances"] += 1
        outputs = [outputs] if isinstance(outputs, str) else outputs
        if (
            not isinstance(text, str)
            or not isinstance(outputs, list)
            or not outputs
            or not _are_texts([text, *outputs])
        ):
            self.counts["bad_instances"] += 1
            return
        # Paper: names unwinding as its last step. We unwind first, so that each pair is measured by itself.
        for output in outputs:
            self._add_pair(text, output)

    def _add_pair(self, text: str, output: str) -> None:
        self.counts["pairs"] += 1
        if not text.strip() or not output.strip():
            self.counts["empty"] += 1
            return
        key = int(digest_of_json([self._seed, text, output])[:32], 16)
        # Paper: says nothing of repeated pairs. We drop them, so that none is on both sides of a split.
        if key in self._seen:
            self.counts["duplicates"] += 1
            return
        self._seen.add(key)
        fits = self._counter.fits(text, output)
        if fits is None:
            self._waiting.append((key, text, output))
            self._waiting_chars += len(text) + len(output)
        elif fits:
            self._take(key, Pair(text, output))
        else:
            self.counts["too_long"] += 1
        if len(self._waiting) >= TOKENIZE_PAIRS or self._waiting_chars >= TOKENIZE_CHARS:
            self._count_waiting()

    def _count_waiting(self) -> None:
        lengths = self._counter.count(text for pair in self._waiting for text in pair[1:])
        for key, text, output in self._waiting:
            num_tokens = lengths[text] + lengths[output]
            if self._max_tokens is not None and num_tokens > self._max_tokens:
                self.counts["too_long"] += 1
            else:
                self._take(key, Pair(text, output, num_tokens=num_tokens))
        self._waiting, self._waiting_chars = [], 0

    def _take(self, key: int, pair: Pair) -> None:
        self.counts["available"] += 1
        if self._max_pairs is None or len(self._heap) < self._max_pairs:
            heapq.heappush(self._heap, (-key, pair))
        elif -key > self._heap[0][0]:
            heapq.heapreplace(self._heap, (-key, pair))

    def drawn(self) -> list[Pair]:
        """The drawn pairs in the order of their hashes, all counted. Call it once, at the end."""
        self._count_waiting()
        self.counts["drawn"] = len(self._heap)
        pairs = [pair for _, pair in sorted(self._heap, key=lambda entry: -entry[0])]
        for start in range(0, len(pairs), TOKENIZE_PAIRS):
            batch = pairs[start : start + TOKENIZE_PAIRS]
            lengths = self._counter.count(
                text for pair in batch if pair.num_tokens is None for text in (pair.input, pair.output)
            )
            for position, pair in enumerate(batch, start):
                if pair.num_tokens is None:
                    pairs[position] = pair._replace(num_tokens=lengths[pair.input] + lengths[pair.output])
        return pairs


def _are_texts(values: list[Any]) -> bool:
    """Strings that UTF-8 can hold; they may be empty."""
    try:
        return all(isinstance(value, str) and value.encode("utf-8") is not None for value in values)
    except UnicodeEncodeError:
        return False


class TokenCounter:
    """Counts tokens, and knows of many pairs without counting on which side of `max_tokens` they are."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int | None) -> None:
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._bound = None if max_tokens is None else _token_bound(tokenizer)

    def fits(self, text: str, output: str) -> bool | None:
        """Whether a pair has at most `max_tokens` tokens; None if it must be counted."""
        if self._max_tokens is None or self._bound is None:
            return None
        most_chars = self._max_tokens * self._bound.longest
        num_chars = len(text) + len(output)
        if num_chars > most_chars and num_chars - sum(map((text + output).count, self._bound.dropped)) > most_chars:
            return False
        # A token stands for at least one byte; each of the two texts may get a space put before it.
        num_bytes = len(text.encode("utf-8")) + len(output.encode("utf-8")) + 2
        return True if num_bytes <= self._max_tokens else None

    def count(self, texts: Iterable[str]) -> dict[str, int]:
        """Text → its tokens without special ones; each distinct text is tokenized once."""
        distinct = list(dict.fromkeys(texts))
        if not distinct:
            return {}
        ids = self._tokenizer(
            distinct,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no notice that a text is longer than the model's context
        )["input_ids"]
        return {text: len(row) for text, row in zip(distinct, cast("list[list[int]]", ids), strict=True)}


@dataclass(frozen=True)
class _TokenBound:
    longest: int
    """The most characters that one token stands for."""
    dropped: str
    """Characters that become no token at all."""


def _token_bound(tokenizer: PreTrainedTokenizerBase) -> _TokenBound | None:
    """How much text a token can hold; None unless that is certain.

    It is for a byte-level BPE that changes nothing before it: a token is written with one letter for each byte, and a
    character has at least one byte. With others, a normalizer may shorten the text, and an unknown word, or white space
    beside an added token, may be of any length in one token.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    record = json.loads(backend.to_str())
    model, added = record["model"], record["added_tokens"]
    steps = record["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    keeps_text = record["normalizer"] is None and all(
        step.get("type") in ("ByteLevel", "Digits") or (step.get("type") == "Split" and step["behavior"] != "Removed")
        for step in steps
    )
    if (
        not keeps_text
        or not any(step.get("type") == "ByteLevel" for step in steps)
        or model["type"] != "BPE"
        or any(model.get(key) for key in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix"))
        or any(token["lstrip"] or token["rstrip"] for token in added)
    ):
        return None
    from tokenizers.pre_tokenizers import ByteLevel

    byte_level = ByteLevel(add_prefix_space=False, use_regex=False)
    # The last letter is that of the byte itself: U+0080 to U+00BF are written with two bytes, of which it is the second.
    letters = {code: byte_level.pre_tokenize_str(chr(code))[0][0][-1] for code in range(0xC0)}
    # Some vocabularies lack bytes that were rare in their training text, and the model drops those. A longer character
    # leaves at least the tokens of its second and further bytes, which must all be there.
    missing = [code for code, letter in letters.items() if letter not in model["vocab"]]
    if any(code >= 0x80 for code in missing):
        return None
    longest = max(len(token) for token in [*model["vocab"], *(token["content"] for token in added)])
    return _TokenBound(longest, "".join(map(chr, missing)))
