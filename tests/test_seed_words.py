"""Seed words from a file or from the Brown corpus, and the prompt files that they are filled into."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import nltk
import pytest
from nltk.corpus.reader import CategorizedTaggedCorpusReader
from nltk.corpus.util import LazyCorpusLoader

from softprompt_registry.dod.prompt_files import OWN_FOLDER, PromptFile, read_prompt, read_styles
from softprompt_registry.dod.seed_words import brown_words, read_seed_words
from softprompt_registry.errors import ConfigError, DataError

ROWS = [
    ("stone", "noun", 5),
    ("River", "noun", 7),
    ("quiet", "adj", 5),
    ("walk", "verb", 90),
    ("river", "adj", 2),  # with the other: 9
    ("sea", "noun", 50),  # three letters
    ("far-off", "adj", 8),
    ("naïve", "adj", 8),
    ("slow", "adj", 6),
]
WORDS = ["river", "slow", "quiet", "stone"]
"""9, 6, and twice 5 by the alphabet."""


def write_rows(path: Path, *, with_counts: bool = True) -> Path:
    rows = [{"word": word, "pos": pos} | ({"count": number} if with_counts else {}) for word, pos, number in ROWS]
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_words_by_count(tmp_path: Path, ending: str) -> None:
    """Bug: the counts of a Parquet file were not read, so that its words came by the alphabet."""
    assert read_seed_words(write_rows(tmp_path / f"words.{ending}"), min_letters=4) == WORDS


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_words_without_counts(tmp_path: Path, ending: str) -> None:
    path = write_rows(tmp_path / f"words.{ending}", with_counts=False)
    # "river" stands there twice, which counts 2.
    assert read_seed_words(path, min_letters=4) == ["river", "quiet", "slow", "stone"]
    assert read_seed_words(path, min_letters=3)[1:] == ["quiet", "sea", "slow", "stone"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        (
            "missing.csv",
            None,
            "'.*missing.csv' is not a CSV, JSON Lines or Parquet file; .* leave it out to use the Brown",
        ),
        ("words.txt", "stone", "is not a CSV"),
        ("words.csv", "word,count\nstone,3\n", r"line 1: found the columns \['word', 'count'\] without \['pos'\]"),
        ("words.csv", "word,pos,count\nstone,noun,many\n", "line 2: found word 'stone' with count 'many'"),
        ("words.csv", "word,pos\nwalk,verb\n", "no noun or adjective long enough in 'words.csv'.*min_seed_letters"),
        ("words.jsonl", '{"word": 3, "pos": "noun"}', "line 1: found word 3 with count 1; expected a word and a whole"),
        ("words.jsonl", '{"pos": "noun"}', "found word None"),
        # Bugs: both came out as Python's own errors.
        ("words.jsonl", '{"word": "stone"}', r"line 1: found \['word'\] without 'pos'"),
        ("words.jsonl", '{"word": "stone", "pos": "noun", "count": 1e999}', "with count inf"),
        ("words.jsonl", "stone\n", "line 1: found broken JSON"),
        ("words.parquet", "stone\n", "line 1: found a file that cannot be read"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, name: str, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=words):
        read_seed_words(tmp_path / name, min_letters=4)


BROWN = """
The/at stone/nn stone/nn stones/nns ran/vbd quiet/jj stone/nn Stone/nn-tl quiet/jj Quiet/jj ./.
river/nn river/nn sea/nn sea/nn sea/nn quickly/rb quickly/rb quickly/rb rainy/jj rainy/jj rainy/jj rainy/jj ./.
"""


def test_the_brown_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A corpus of the same form in the place where NLTK looks."""
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setattr(nltk, "download", lambda name, quiet: False)  # as without a network
    reader = LazyCorpusLoader("brown", CategorizedTaggedCorpusReader, r"c[a-z]\d\d", cat_file="cats.txt")
    monkeypatch.setattr(nltk.corpus, "brown", reader)
    with pytest.raises(DataError, match="neither installed nor reachable. Run .* a file of word counts with --words"):
        brown_words(min_letters=4)
    corpus = tmp_path / "corpora" / "brown"
    corpus.mkdir(parents=True)
    (corpus / "ca01").write_text(BROWN)
    (corpus / "cats.txt").write_text("ca01 news\n")
    # "rainy" 4 times, "quiet" and "stone" 3; "river" only twice, "sea" too short, "Stone/nn-tl" part of a title.
    assert brown_words(min_letters=4) == ["rainy", "quiet", "stone"]


# --- Prompt files ---


def test_own_prompts_have_all_their_places() -> None:
    for name, required in [
        ("label_set", {"count", "words"}),
        ("unrelated_label_set", {"count", "words"}),
        ("sentences", {"count", "label", "other_labels", "style"}),
    ]:
        prompt = read_prompt(name, None, tuple(required))
        assert prompt.system is not None and "{" not in prompt.system and "---" not in prompt.user
        filled = prompt.fill({place: f"<{place}>" for place in required})
        assert all(f"<{place}>" in filled for place in required)
        assert re.findall(r"{\w+}", filled) == []
    assert len(set(read_styles("styles", None))) == len(read_styles("styles", None)) == 20


def test_what_is_filled_in_is_not_filled_again() -> None:
    prompt = PromptFile("p", None, 'Give {count} for {label}: {"labels": [{count} words]} {other}')
    assert prompt.fill({"count": 2, "label": "{count}"}) == 'Give 2 for {count}: {"labels": [2 words]} {other}'


def test_a_folder_of_your_own_replaces_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "label_set.txt").write_bytes(b"Be \xc3\xbcber brief.\r\n---\r\n {count} from {words}\r\n\r\n")
    (tmp_path / "styles.txt").write_text("loud\n\n  quiet \n")
    prompt = read_prompt("label_set", str(tmp_path), ("count", "words"))
    assert (prompt.system, prompt.user) == ("Be über brief.", "{count} from {words}")
    assert read_styles("styles", str(tmp_path)) == ["loud", "quiet"]
    assert read_prompt("sentences", str(tmp_path), ()) == read_prompt("sentences", None, ())


@pytest.mark.parametrize("text", ["{count} from {words}", "---\n{count} from {words}\n", "\n---\n{count} from {words}"])
def test_a_prompt_without_a_system_text(tmp_path: Path, text: str) -> None:
    """Bug: with the line '---' at the very top, it became part of the request."""
    (tmp_path / "label_set.txt").write_text(text)
    assert read_prompt("label_set", str(tmp_path), ()) == PromptFile("label_set", None, "{count} from {words}")


def test_prompt_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no folder '.*nowhere'; expected copies of 'prompts' there"):
        read_prompt("label_set", str(tmp_path / "nowhere"), ())
    (tmp_path / "label_set.txt").write_text("Use {words}.\n---\nGive {count}.")
    with pytest.raises(ConfigError, match=r"label_set.txt': it has no {words} below its '---' line.*Add them"):
        read_prompt("label_set", str(tmp_path), ("count", "words"))
    (tmp_path / "label_set.txt").write_bytes(b"Give {count} caf\xe9s from {words}.")
    with pytest.raises(ConfigError, match="label_set.txt': it is not UTF-8"):
        read_prompt("label_set", str(tmp_path), ("count", "words"))
    (tmp_path / "styles.txt").write_text(" \n\n")
    with pytest.raises(ConfigError, match="styles.txt': the file is empty; expected one style per line"):
        read_styles("styles", str(tmp_path))


def test_a_copy_of_our_folder_gives_our_prompts(tmp_path: Path) -> None:
    copy = shutil.copytree(OWN_FOLDER, tmp_path / "copy")
    for name in ("label_set", "unrelated_label_set", "sentences", "paraphrase"):
        assert read_prompt(name, str(copy), ()) == read_prompt(name, None, ())
