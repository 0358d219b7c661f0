"""English words: which exist, how they inflect, which share a root, and which are held out for the evaluation.

`lemminflect` (its lexicon) and `snowballstemmer` do the work; nothing is downloaded.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from softprompt_registry.dod.labelled_sets import LABELLED_SETS

_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")
FUNCTION_WORDS = frozenset(
    "a about above after again against all although am amid among amongst an and any are as at be because been before "
    "being below beneath beside between both but by can cannot could despite did do does doing down during each every "
    "few for from further had has have having he her here hers him his how i if in into is it its just me more most "
    "must my no nor not now of off on once only onto or other our ours out over own per same shall she should so some "
    "such than that the their theirs them then there these they this those through to too toward towards under unless "
    "until up upon us versus very was we were what when where which while whilst who whom whose why will with would "
    "you your yours three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety alas bye dr etc gonna gotta "
    "hey hi hmm kinda mr mrs ms oh ok oops ugh uh um vs wanna yeah".split()
)
"""Words that are no nouns, verbs, adjectives or adverbs, and so are missing in the lexicon."""
MIN_ROOT_LETTERS = 4
"""Stems shorter than this count as the same root only when they are equal: "art" is no root of "artery"."""


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, in order; digits and punctuation are left out, apostrophes are plain ones."""
    return [word.lower() for word in _WORD.findall(text.replace("’", "'"))]


@cache
def is_english_word(word: str) -> bool:
    """Whether the lexicon or the list of function words has it, in any inflected form."""
    import lemminflect

    word = word.lower()
    return word in FUNCTION_WORDS or bool(lemminflect.getAllLemmas(word))


def share_of_english(text: str) -> float:
    """Share of a text's words that are English, from 0 to 1; 0 without words. Names and numbers keep it below 1."""
    words = words_of(text)
    known = sum(map(_is_english, words))
    return known / len(words) if words else 0.0


def _is_english(word: str) -> bool:
    """Whether the word is English, also with an apostrophe: "farmer's" as farmer, "isn't" as is, "won't" as won."""
    head, _, tail = word.partition("'")
    return is_english_word(head) or (tail == "t" and head.endswith("n") and is_english_word(head[:-1]))


@cache
def inflections(word: str) -> frozenset[str]:
    """A word with all its inflected forms, in lower case: "bad" gives bad, worse, worst."""
    import lemminflect

    word = word.lower()
    lemmas = {word} | {lemma for forms in lemminflect.getAllLemmas(word).values() for lemma in forms}
    inflected = {form for lemma in lemmas for forms in lemminflect.getAllInflections(lemma).values() for form in forms}
    return frozenset({word} | {form.lower() for form in lemmas | inflected})


@cache
def _stemmer() -> Any:
    import snowballstemmer

    return snowballstemmer.stemmer("english")


@cache
def stem(word: str) -> str:
    """Snowball (Porter 2) stem of a word."""
    return str(_stemmer().stemWord(word.lower()))


def same_root(word: str, other: str) -> bool:
    """Whether one word is, inflects or derives from the other: musician and music, happily and happiness.

    Compares stems: equal, or one begins with the other of at least `MIN_ROOT_LETTERS` letters. This errs on the side of
    saying yes ("carp" and "carpet").
    """
    shorter, longer = sorted((stem(word), stem(other)), key=len)
    if shorter == longer or other.lower() in inflections(word):
        return True
    return len(shorter) >= MIN_ROOT_LETTERS and longer.startswith(shorter)


@cache
def held_out_words() -> frozenset[str]:
    """Every label word of the evaluation sets, with its inflections: no training task may have one as a label.

    Paper: its label generator could produce these words, which makes the evaluation easier than it should be.
    """
    words = {word for known in LABELLED_SETS.values() for label in known.labels for word in words_of(label)}
    return frozenset(form for word in words for form in inflections(word))
