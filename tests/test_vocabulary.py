"""Which words are English, which share a root, and which are kept for the evaluation."""

from __future__ import annotations

import subprocess
import sys
from itertools import combinations

import pytest
from writing_llm import LABELS, NUM_SENTENCES, sentence

from softprompt_registry.dod.vocabulary import (
    held_out_words,
    inflections,
    is_english_word,
    same_root,
    share_of_english,
    words_of,
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        ("Don't PANIC!", ["don't", "panic"]),
        ("sun-dried, 3 tomatoes_and 4th", ["sun", "dried", "tomatoes", "and", "th"]),
        ("Über den Äpfeln", ["über", "den", "äpfeln"]),
        ("the dogs' bowl 'quoted'", ["the", "dogs", "bowl", "quoted"]),
        ("雨 rain", ["雨", "rain"]),
        ("He doesn’t, don’t ’t", ["he", "doesn't", "don't", "t"]),
    ],
)
def test_words_of(text: str, words: list[str]) -> None:
    assert words_of(text) == words


def test_english_words() -> None:
    assert all(map(is_english_word, "lion Lions worse running the whom could happily seven".split()))
    assert not any(map(is_english_word, ("", "blorptang", "frühling", "qwxz", "雨")))


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("12 + 34!", 0.0),
        ("The lion sleeps.", 1.0),
        ("Mr Blorptang sleeps here", 3 / 4),
        ("Isn't it? It doesn't, it can't, it won't.", 1.0),
        ("It doesn’t matter", 1.0),
        ("Oh, among three or four of them", 1.0),
        ("the farmer's wheat", 1.0),
        ("Ich weiß nicht, was du meinst", 1 / 6),
        ("雨 falls", 1 / 2),
    ],
)
def test_share_of_english(text: str, share: float) -> None:
    assert share_of_english(text) == share


def test_inflections() -> None:
    assert {"bad", "worse", "worst"} <= inflections("Bad")
    assert {"go", "goes", "going", "went", "gone"} <= inflections("went")
    assert inflections("blorptang") == {"blorptang"}


def test_same_root() -> None:
    same = "music music,music musician,happily happiness,cat cats,ran run,feet foot,worse bad,taught teach,photo photography"
    same += ",carp carpet,Farming farmer"  # the rule errs on the side of "carp"
    for word, other in map(str.split, same.split(",")):
        assert same_root(word, other) and same_root(other, word)
    for word, other in map(str.split, "art artery,cat category,lion tiger,sun sunder,car carpet".split(",")):
        assert not same_root(word, other) and not same_root(other, word)


def test_held_out_words_are_the_evaluation_labels_with_their_inflections() -> None:
    held_out = held_out_words()
    # sst2 and sst5; trec; subj; agnews
    assert {"positive", "negative", "terrible", "bad", "neutral", "good", "great", "worst", "better"} <= held_out
    assert {"description", "entity", "entities", "abbreviation", "human", "location", "numbers"} <= held_out
    assert {"objective", "subjective", "truthful", "deceptive", "human", "generated", "generate"} <= held_out
    assert {"world", "sports", "sport", "business", "technologies"} <= held_out
    assert held_out.isdisjoint({"lion", "music", "nice", "awful", "science", "place"})


def test_the_words_of_the_stand_in_are_as_it_says() -> None:
    assert all(is_english_word(label) for label in LABELS) and held_out_words().isdisjoint(LABELS)
    assert not [pair for pair in combinations(LABELS, 2) if same_root(*pair)]
    sentences = [sentence(number) for number in range(0, NUM_SENTENCES, 97)]  # 97 divides no number of parts
    assert len(set(sentences)) == len(sentences)
    used = {word for text in sentences for word in words_of(text)}
    assert len(used) > 80
    assert not [(word, label) for word in used for label in LABELS if same_root(word, label)]


def test_importing_loads_no_lexicon() -> None:
    program = (
        "import sys, softprompt_registry.dod.vocabulary, softprompt_registry.dod.classification\n"
        "print([name for name in ('lemminflect', 'nltk', 'openai', 'torch', 'mlflow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
