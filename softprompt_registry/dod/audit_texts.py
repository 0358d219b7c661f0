"""How an audit compares texts: across tasks by hashes, words by their roots, near duplicates without punctuation."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from softprompt_registry.dod.vocabulary import MIN_ROOT_LETTERS, inflections, stem, words_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Shared:
    """Texts that several tasks have: how many, which tasks, and of those in most tasks the hash and the tasks."""

    count: int
    tasks: list[int]
    examples: list[tuple[int, list[int]]]


class SharedTexts:
    """Finds texts that several tasks have by 8-byte hashes; among 3 million texts two meet by chance once in 4 million."""

    def __init__(self) -> None:
        self._hashes: list[NDArray[np.uint64]] = []

    def add(self, texts: Iterable[str]) -> None:
        """The different texts of the next task."""
        import numpy as np

        self._hashes.append(np.fromiter(map(hash_of, texts), np.uint64))

    def compare(
        self, test_side: Sequence[bool], max_examples: int
    ) -> tuple[Shared, Shared, list[tuple[int, int, int]]]:
        """What tasks on both sides have, what several tasks on one side have, and per task the number of each and of all
        its texts."""
        import numpy as np

        sizes = np.array([len(hashes) for hashes in self._hashes])
        hashes = np.concatenate(self._hashes)
        self._hashes.clear()
        # `np.unique` of them all would be shorter, and hold twice as many arrays of this length.
        ordered = np.sort(hashes)
        twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
        del ordered
        several = np.searchsorted(twice, hashes) != np.searchsorted(twice, hashes, side="right")
        hashes, tasks = hashes[several], np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)[several]
        hashes, group = np.unique(hashes, return_inverse=True)
        tested = np.array(test_side)[tasks]
        on_test = np.bincount(group, weights=tested, minlength=len(hashes))
        on_train = np.bincount(group, minlength=len(hashes)) - on_test
        both_sides = ((on_test > 0) & (on_train > 0))[group]
        one_side = np.where(tested, on_test[group], on_train[group]) > 1

        def shared(chosen: NDArray[np.bool_]) -> Shared:
            groups, num_tasks = np.unique(group[chosen], return_counts=True)
            widest = groups[np.lexsort((hashes[groups], -num_tasks))][:max_examples]
            examples = [(int(hashes[number]), tasks[chosen & (group == number)].tolist()) for number in widest]
            return Shared(len(groups), np.unique(tasks[chosen]).tolist(), examples)

        counts = (np.bincount(tasks[chosen], minlength=len(sizes)).tolist() for chosen in (both_sides, one_side))
        return shared(both_sides), shared(one_side), list(zip(*counts, sizes.tolist(), strict=True))


class SameRoots(dict[str, frozenset[str]]):
    """Word → those of a few label words that `same_root` holds for, with one stem instead of a call for each of them."""

    def __init__(self, label_words: Iterable[str]) -> None:
        self._by_form: dict[str, set[str]] = defaultdict(set)
        self._by_beginning: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for label_word in label_words:
            for form in inflections(label_word):
                self._by_form[form].add(label_word)
            self._by_beginning[stem(label_word)[:MIN_ROOT_LETTERS]].append((stem(label_word), label_word))
        self._initials = {word[0] for word in (*self._by_form, *self._by_beginning)}

    def __missing__(self, word: str) -> frozenset[str]:
        if word[0] not in self._initials:  # stemming changes ends only, and most words need none
            self[word] = _NOTHING
            return _NOTHING
        found = set(self._by_form.get(word, ()))
        root = stem(word)
        for other, label_word in self._by_beginning.get(root[:MIN_ROOT_LETTERS], ()):
            shorter, longer = sorted((root, other), key=len)
            if shorter == longer or (len(shorter) >= MIN_ROOT_LETTERS and longer.startswith(shorter)):
                found.add(label_word)
        self[word] = frozenset(found) or _NOTHING
        return self[word]


_NOTHING: frozenset[str] = frozenset()


class _NoPunctuation(dict[int, int | None]):
    """Takes punctuation and white space out of a text by `str.translate`. Symbols (+ < = 😀) stay: they tell texts apart."""

    def __missing__(self, code: int) -> int | None:
        self[code] = None if unicodedata.category(chr(code))[0] in "PZ" else code
        return self[code]


NO_PUNCTUATION = _NoPunctuation()


def telling_words(label: str) -> frozenset[str]:
    """The words that a text with this label in it must have all; single letters ("A") say nothing."""
    words = {word for word in words_of(label) if len(word) > 1}
    return frozenset({word for word in words if len(word) > 2} or words)


def hash_of(text: str) -> int:
    """8 bytes of a text's digest, to compare texts within one audit; nothing stores it."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
