"""Words that give a label set its theme: nouns and adjectives of the Brown corpus, or of a file of word counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from softprompt_registry.dod.file_rows import Fault, ending_of, rows_of
from softprompt_registry.errors import DataError

PARTS_OF_SPEECH = ("noun", "adj")


def read_seed_words(path: Path, *, min_letters: int) -> list[str]:
    """The words of a CSV, JSON Lines or Parquet file, most frequent first, equal counts by the alphabet.

    Columns: `word`; `pos`, of which `noun` and `adj` are taken; `count`, if there is one. Words shorter than `min_letters`,
    words with anything but letters, and repetitions are left out.

    Raises:
        DataError: the file is missing or damaged, or no word is left.
    """
    if not path.is_file() or ending_of(path.name) is None:
        raise DataError(
            f"reading seed words: {str(path)!r} is not a CSV, JSON Lines or Parquet file; expected one with the columns "
            "word, pos and count. Correct the path, or leave it out to use the Brown corpus of NLTK."
        )
    counts: dict[str, int] = {}
    for line, row in rows_of(path, ("word", "pos"), optional=("count",)):
        if isinstance(row, Fault):
            raise DataError(
                f"reading seed words from {path.name!r}, line {line}: found {row.found}; expected {row.expected}. "
                f"{row.advice}"
            )
        doing = f"reading seed words from {path.name!r}, line {line}"
        word, count = _word_and_count(row, doing)
        if "pos" not in row:
            raise DataError(f"{doing}: found {sorted(row)} without 'pos'; expected a part of speech. Add it.")
        if row["pos"] in PARTS_OF_SPEECH and _usable(word, min_letters):
            counts[word] = counts.get(word, 0) + count
    return _ordered(counts, f"in {path.name!r}")


def brown_words(*, min_letters: int, min_count: int = 3) -> list[str]:
    """The same from NLTK's Brown corpus: words tagged as common nouns or plain adjectives at least `min_count` times.

    Raises:
        DataError: the corpus is not installed and cannot be fetched.
    """
    import nltk

    try:
        nltk.data.find("corpora/brown")
    except LookupError:
        nltk.download("brown", quiet=True)  # returns False without a network, and the reading below says so
    try:
        tagged = cast(Any, nltk.corpus.brown).tagged_words()
        counts: dict[str, int] = {}
        for word, tag in tagged:
            word = word.lower()
            if tag in ("NN", "NNS", "JJ") and _usable(word, min_letters):
                counts[word] = counts.get(word, 0) + 1
    except LookupError:
        raise DataError(
            "reading seed words: NLTK's Brown corpus is neither installed nor reachable. Run "
            "`python -m nltk.downloader brown` where there is a network, or give a file of word counts with --words."
        ) from None
    return _ordered({word: count for word, count in counts.items() if count >= min_count}, "in the Brown corpus")


def _word_and_count(row: dict[str, Any], doing: str) -> tuple[str, int]:
    word, count = row.get("word"), row.get("count", 1)
    try:
        if not isinstance(word, str):
            raise ValueError
        return word.lower(), int(count)
    except (TypeError, ValueError, OverflowError):
        raise DataError(
            f"{doing}: found word {word!r} with count {count!r}; expected a word and a whole number. Correct the row."
        ) from None


def _usable(word: str, min_letters: int) -> bool:
    return len(word) >= min_letters and word.isascii() and word.isalpha()


def _ordered(counts: dict[str, int], where: str) -> list[str]:
    if not counts:
        raise DataError(
            f"reading seed words: there is no noun or adjective long enough {where}. Give another file, or lower "
            "min_seed_letters."
        )
    return sorted(counts, key=lambda word: (-counts[word], word))
