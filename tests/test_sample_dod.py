"""An audit of the sample DoD: right size, no leaks, no duplicates, nothing from the evaluation sets, and frozen."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from nltk.stem.porter import PorterStemmer

from softprompt_registry.dod.store import DodStore
from softprompt_registry.dod.task import PAIR_SPLITS, Task
from softprompt_registry.errors import DataError
from softprompt_registry.sample import SAMPLE_FOLDER, build_sample_dod

DIGEST = "c8e079b7eee91a40f1bd217a8ac94aea6a75f1420455f46a177544b0d29e2c0b"
TEST_TASKS = {"instruments", "farm_animals", "meals", "support_tickets", "temperature", "genres", "past_tense"}
# Labels of the sets that the translator is evaluated on; it must not have seen them.
HELD_OUT = set(
    "positive negative terrible bad neutral good great description entity abbreviation human location number objective "
    "subjective world sports business technology truthful deceptive original generated".split()
)

stem = cache(PorterStemmer().stem)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[Task]:
    path = build_sample_dod(tmp_path_factory.mktemp("sample") / "sample.dod")
    with DodStore.open(path) as store:
        return list(store.tasks())


@pytest.fixture(scope="module")
def classification(tasks: list[Task]) -> list[Task]:
    return [task for task in tasks if task.kind == "classification"]


@pytest.fixture(scope="module")
def generation(tasks: list[Task]) -> list[Task]:
    return [task for task in tasks if task.kind == "generation"]


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def test_digest_is_pinned(tmp_path: Path) -> None:
    """Soft prompts, translators and figures name this digest. Change the sample only together with all of them."""
    path = build_sample_dod(tmp_path / "sample.dod")
    with DodStore.open(path) as store:
        assert store.digest == DIGEST
        assert store.manifest()["num_pairs"] == sum(
            len(file.read_text().splitlines()) for file in SAMPLE_FOLDER.glob("*.jsonl") if file.name != "tasks.jsonl"
        )


def test_an_existing_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "sample.dod").write_text("mine")
    with pytest.raises(DataError, match="exists already"):
        build_sample_dod(tmp_path / "sample.dod")
    assert (tmp_path / "sample.dod").read_text() == "mine"


def test_size(classification: list[Task], generation: list[Task]) -> None:
    assert len(classification) >= 24
    for task in classification:
        assert 3 <= len(task.labels) <= 6, task.name
        counts = Counter(pair.output for pair in task.pairs)
        assert min(counts[label] for label in task.labels) >= 24, (task.name, counts)
    assert len(generation) == 6
    for task in generation:
        assert len(task.pairs) >= 60, task.name


def test_task_splits_and_sources(tasks: list[Task]) -> None:
    assert {task.name for task in tasks if task.split == "test"} == TEST_TASKS
    assert {task.source for task in tasks} == {"softprompt-registry sample, Apache-2.0"}


def test_pair_splits_hold_every_label(classification: list[Task], generation: list[Task]) -> None:
    for task in classification:
        for label in task.labels:
            counts = Counter(pair.split for pair in task.pairs if pair.output == label)
            assert counts["train"] >= 16 and counts["validation"] == counts["test"] == 4, (task.name, label, counts)
    for task in generation:
        counts = Counter(pair.split for pair in task.pairs)
        assert set(counts) == set(PAIR_SPLITS) and counts["validation"] == 8 and counts["test"] == 10, task.name


def test_labels_alternate_in_training_order(classification: list[Task]) -> None:
    for task in classification:
        first = [pair.output for pair in task.pairs_of("train")][: len(task.labels)]
        assert sorted(first) == sorted(task.labels), task.name


def test_hard_prompt_names_every_label(classification: list[Task], generation: list[Task]) -> None:
    for task in [*classification, *generation]:
        (prompt,) = task.hard_prompts
        assert 5 <= len(prompt.split()) <= 40 and prompt.endswith((".", "?")), task.name
        for label in task.labels:
            assert re.search(rf"\b{label}\b", prompt), (task.name, label)


def test_no_duplicates_within_and_across_tasks(tasks: list[Task]) -> None:
    seen: dict[str, str] = {}
    for task in tasks:
        for pair in task.pairs:
            text = " ".join(words_of(pair.input))
            assert text not in seen, f"{task.name} repeats {seen[text]}: {pair.input}"
            seen[text] = task.name


def test_no_opening_is_worn_out(classification: list[Task]) -> None:
    for task in classification:
        openings = Counter(" ".join(words_of(pair.input)[:3]) for pair in task.pairs)
        assert openings.most_common(1)[0][1] <= 2, (task.name, openings.most_common(3))


def leaks(text: str, labels: tuple[str, ...]) -> list[str]:
    """The words of a text that hold the root of a label: its Porter stem, alone or inside a longer word."""
    stems = [stem(label) for label in labels]
    return [
        word
        for word in words_of(text)
        if any(stem(word) == root or (len(root) >= 4 and root in word) for root in stems)
    ]


def test_the_leak_check_finds_leaks() -> None:
    assert leaks("The crows are feared, and an airplane cycles on", ("fear", "plane", "cycling")) == [
        "feared",
        "airplane",
        "cycles",
    ]


def test_no_label_or_root_in_the_inputs(classification: list[Task]) -> None:
    for task in classification:
        for pair in task.pairs:
            assert not leaks(pair.input, task.labels), (task.name, pair.input, leaks(pair.input, task.labels))


def test_labels_are_not_those_of_the_evaluation_sets(classification: list[Task]) -> None:
    labels = {label for task in classification for label in task.labels}
    assert not labels & HELD_OUT


def test_no_label_belongs_to_a_train_and_a_test_task(classification: list[Task]) -> None:
    sides = [
        {label for task in classification if task.split == split for label in task.labels}
        for split in ("train", "test")
    ]
    assert not sides[0] & sides[1]


def test_lengths_vary(classification: list[Task], generation: list[Task]) -> None:
    for task in [*classification, *generation]:
        lengths = sorted(len(pair.input.split()) for pair in task.pairs)
        assert 3 <= lengths[0] <= 9 and 10 <= lengths[-1] <= 25, (task.name, lengths[0], lengths[-1])
        assert lengths[-1] - lengths[0] >= 5 and len(set(lengths)) >= 6, (task.name, set(lengths))
        assert 6 <= lengths[len(lengths) // 2] <= 16, (task.name, lengths[len(lengths) // 2])


def test_text_is_plain_ascii_without_stray_spaces(tasks: list[Task]) -> None:
    for task in tasks:
        for pair in task.pairs:
            for text in (pair.input, pair.output):
                assert text.isascii() and text.isprintable() and text == " ".join(text.split()), (task.name, text)


# What the generation tasks ask for can be worked out from the input, so each output is checked against its rule.
AUXILIARIES = set("is are was were am will would can could should must may might has have had".split())


def split_at_auxiliary(sentence: str) -> tuple[list[str], str, list[str]]:
    words = sentence.split()
    position = next(number for number, word in enumerate(words) if word in AUXILIARIES)
    return words[:position], words[position], words[position + 1 :]


def negated(sentence: str) -> str:
    before, auxiliary, after = split_at_auxiliary(sentence)
    return " ".join([*before, *(["cannot"] if auxiliary == "can" else [auxiliary, "not"]), *after])


def asked(sentence: str) -> str:
    before, auxiliary, after = split_at_auxiliary(sentence.removesuffix("."))
    return " ".join([auxiliary.capitalize(), before[0].lower(), *before[1:], *after]) + "?"


def capitalized(sentence: str) -> str:
    first, rest = sentence.split(" ", 1)
    return f"{first.upper()} {rest}"


@pytest.mark.parametrize(
    ("name", "rule"), [("negate", negated), ("make_question", asked), ("capitalize_first", capitalized)]
)
def test_generation_by_rule(generation: list[Task], name: str, rule: object) -> None:
    (task,) = [task for task in generation if task.name == name]
    assert callable(rule)
    for pair in task.pairs:
        assert pair.output == rule(pair.input)


def test_generation_by_reading(generation: list[Task]) -> None:
    """These three were read by a person; here only what a machine can tell."""
    by_name = {task.name: task for task in generation}
    for pair in by_name["extract_city"].pairs:
        assert pair.output in pair.input and pair.output != pair.input
    for pair in by_name["expand_contractions"].pairs:
        assert "'" in pair.input and "'" not in pair.output
    for pair in by_name["past_tense"].pairs:
        before, after = pair.input.split(), pair.output.split()
        assert len(before) == len(after) and before != after
