"""Whole builds of classification DoDs through the real client: what comes out, and what is refused.

The server is `writing_llm`, which writes good answers, or whatever a test puts in their place.
"""

from __future__ import annotations

import dataclasses
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llm_server import KEY, LlmServer, Reply, chat
from small_builds import SMALL, build, build_undisturbed, names_in, tasks_of
from writing_llm import LABELS, SEED_WORDS, Answer, Asked, WritingLlm, client_of, sentence

from softprompt_registry.dod.classification import (
    ClassificationReport,
    build_dod_classification,
)
from softprompt_registry.dod.prompt_files import OWN_FOLDER
from softprompt_registry.dod.store import DodStore
from softprompt_registry.errors import ConfigError, DataError, LanguageModelError
from softprompt_registry.fingerprints import digest_of_json
from softprompt_registry.language_models.opening import LanguageModelConfig


@pytest.fixture
def undisturbed(llm_server: LlmServer, tmp_path: Path) -> ClassificationReport:
    return build_undisturbed(llm_server, tmp_path / "undisturbed")


# --- What comes out ---


def test_a_full_build(llm_server: LlmServer, tmp_path: Path) -> None:
    llm_server.reply_to_body = WritingLlm()
    config = dataclasses.replace(
        SMALL, seed=4, generator=LanguageModelConfig(model="writer", options={"base_url": "http://127.0.0.1/v1"})
    )
    report = build(llm_server, tmp_path / "a.dod", config)
    assert names_in(tmp_path) == ["a.dod", "a.dod.answers"]
    tasks = tasks_of(tmp_path / "a.dod")
    assert [len(tasks), sum(len(task.pairs) for task in tasks)] == [report.tasks, report.pairs] == [6, 180]
    for number, task in enumerate(tasks):
        assert task.kind == "classification" and task.source == "written by writer"
        assert task.name == "_".join([f"{number:05d}", *task.labels])
        assert len(task.labels) == 3 and set(task.labels) <= set(LABELS)
        counts = Counter((pair.output, pair.split) for pair in task.pairs)
        assert counts == {
            (label, split): share
            for label in task.labels
            for split, share in (("train", 8), ("validation", 1), ("test", 1))
        }
        assert len({pair.input for pair in task.pairs}) == 30
    assert len({task.labels for task in tasks}) == 6
    # The order of the pairs does not tell the label.
    assert any(tasks[0].pairs[place].output != tasks[0].pairs[0].output for place in range(1, 10))
    assert (report.given_up, report.refused, report.answers) == ({}, {}, 42)
    assert (report.asked.requests, report.asked.failed, report.asked.prompt_tokens) == (42, 0, 42 * 7)
    with DodStore.open(tmp_path / "a.dod") as store:
        assert store.digest == report.digest
        metadata = store.metadata()["build"]
    assert metadata == {
        "builder": "classification",
        "settings": metadata["settings"],
        "model": "writer",
        "prompts_digest": metadata["prompts_digest"],
        "seed_words_digest": digest_of_json(list(SEED_WORDS)),
        "tasks": 6,
        "given_up": {},
        "refused": {},
        "answers": 42,
    }
    assert metadata["settings"]["num_tasks"] == 6 and metadata["settings"]["pair_shares"] == [0.8, 0.1, 0.1]
    # Where it was made is nobody's business.
    assert not [key for key in metadata["settings"] if key.startswith("generator") or key == "prompts_folder"]
    assert KEY.encode() not in (tmp_path / "a.dod").read_bytes() + (tmp_path / "a.dod.answers").read_bytes()


def test_what_the_server_is_asked(llm_server: LlmServer, tmp_path: Path) -> None:
    llm_server.reply_to_body = WritingLlm()
    build(llm_server, tmp_path / "a.dod", dataclasses.replace(SMALL, num_tasks=1), max_concurrency=1)
    first, *others = [received.body for received in llm_server.received]
    assert first["max_tokens"] == 20 + 12 * 3 and first["temperature"] == 0.5 and "presence_penalty" not in first
    assert first["response_format"]["json_schema"]["schema"]["properties"]["labels"]["minItems"] == 3
    system, user = (message["content"] for message in first["messages"])
    assert system == "You design text classification tasks. You answer with JSON only."
    [words] = [line for line in user.splitlines() if line.startswith("Take these words as loose inspiration: ")]
    seeds = words.rstrip(".").partition(": ")[2].split(", ")
    assert len(set(seeds)) == 3 and set(seeds) <= set(SEED_WORDS)
    assert "same theme" in user
    assert len(others) == 6
    labels = tasks_of(tmp_path / "a.dod")[0].labels
    for place, body in enumerate(others):
        assert (body["max_tokens"], body["temperature"], body["presence_penalty"]) == (20 + 60 * 5, 0.4, 0.5)
        label = labels[place // 2]
        rest = ", ".join(other for other in labels if other != label)
        assert f'category "{label}", and to none of these: {rest}.' in body["messages"][1]["content"]
    assert len({body["seed"] for body in [first, *others]}) == 7
    styles = [body["messages"][1]["content"].partition("Style of these sentences: ")[2] for body in others]
    # Every label goes through the same styles: else the style would tell the label.
    assert styles[:2] == styles[2:4] == styles[4:] and styles[0] != styles[1]


def test_a_second_build_asks_for_nothing(llm_server: LlmServer, tmp_path: Path, undisturbed: Any) -> None:
    again = build(llm_server, undisturbed.path, overwrite=True)
    assert llm_server.received == [] and again.asked.requests == 0
    assert dataclasses.replace(again, asked=undisturbed.asked) == undisturbed
    with pytest.raises(DataError, match="a.dod' exists already; expected a new name"):
        build(llm_server, undisturbed.path)
    more = build(llm_server, undisturbed.path, dataclasses.replace(SMALL, num_tasks=7), overwrite=True)
    assert (more.asked.requests, more.answers, more.tasks) == (7, 49, 7)


@pytest.mark.parametrize("concurrency", [1, 7])
def test_the_digest_does_not_depend_on_the_order_of_answers(
    llm_server: LlmServer, tmp_path: Path, undisturbed: ClassificationReport, concurrency: int
) -> None:
    delays = random.Random(concurrency)
    writer = WritingLlm()
    slowly = dataclasses.replace

    def reply(body: dict[str, Any]) -> Reply:
        return slowly(writer(body), delay_s=delays.uniform(0, 0.02))

    llm_server.reply_to_body = reply
    report = build(llm_server, tmp_path / "b.dod", max_concurrency=concurrency)
    assert report.digest == undisturbed.digest
    assert tasks_of(tmp_path / "b.dod") == tasks_of(undisturbed.path)  # in the same order, too
    other = build(llm_server, tmp_path / "c.dod", dataclasses.replace(SMALL, seed=1))
    assert other.digest != undisturbed.digest


def test_prompts_of_your_own(llm_server: LlmServer, tmp_path: Path) -> None:
    llm_server.reply_to_body = WritingLlm()
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "label_set.txt").write_text('{words}! As {"labels": [{count} words]}, please.')
    config = dataclasses.replace(SMALL, num_tasks=1, prompts_folder=str(folder))
    build(llm_server, tmp_path / "a.dod", config)
    first, second = llm_server.received[0].body, llm_server.received[1].body
    [message] = first["messages"]  # no system text
    assert message["content"].endswith('! As {"labels": [3 words]}, please.')
    assert second["messages"][0]["content"].startswith("You write example sentences")
    # Another prompt is another request.
    shutil.copy(OWN_FOLDER / "label_set.txt", folder)
    assert build(llm_server, tmp_path / "a.dod", config, overwrite=True).asked.requests == 7
    (folder / "sentences.txt").write_text("Write {count} sentences.")
    before = len(llm_server.received)
    with pytest.raises(ConfigError, match=r"sentences.txt': it has no {label} below its '---' line"):
        build(llm_server, tmp_path / "b.dod", config)
    assert len(llm_server.received) == before and not (tmp_path / "b.dod").exists()


def test_too_few_seed_words(llm_server: LlmServer, tmp_path: Path) -> None:
    with (
        client_of(llm_server) as model,
        pytest.raises(ConfigError, match="there are 2 seed words; expected at least 3"),
    ):
        build_dod_classification(SEED_WORDS[:2], tmp_path / "a.dod", model, config=SMALL)
    assert names_in(tmp_path) == []


# --- What is refused ---

FAULTY_LABEL_SETS: list[tuple[Answer, str]] = [
    ("Here are three animals: lion, bear, wolf.", "labels: not JSON"),
    ("[1, 2]", "labels: not JSON"),
    (Reply(body={"choices": [{"message": {"refusal": "No."}, "finish_reason": "stop"}]}), "labels: empty (refusal)"),
    (Reply(body=chat('{"labels": ["lion", "be', finish_reason="length")), "labels: cut off at max_tokens"),
    (["lion", "bear", "Lion"], "labels: a label twice"),
    (["lion", "bear", "Sports"], "labels: a label of the evaluation sets"),
]


def refuse_label_sets(asked: Asked, answer: list[str]) -> Answer:
    """The faulty answers in order, then a good one, with room around a word and capitals."""
    if asked.label is not None:
        return answer
    return FAULTY_LABEL_SETS[asked.call][0] if asked.call < len(FAULTY_LABEL_SETS) else [" Lion", "bear", "WOLF "]


def test_refused_label_sets_are_counted_and_asked_for_again(llm_server: LlmServer, tmp_path: Path) -> None:
    llm_server.reply_to_body = WritingLlm(refuse_label_sets)
    config = dataclasses.replace(SMALL, num_tasks=1, max_label_tries=7)
    report = build(llm_server, tmp_path / "a.dod", config)
    assert tasks_of(tmp_path / "a.dod")[0].labels == ("lion", "bear", "wolf")
    assert report.refused == Counter(fault for _, fault in FAULTY_LABEL_SETS)
    assert sum(report.refused.values()) == 6 and report.given_up == {}
    assert report.answers == report.asked.requests == 7 + 6
    prompts = {received.body["messages"][1]["content"] for received in llm_server.received[:7]}
    assert len(prompts) == 7  # each with other seed words


def test_no_task_at_all(llm_server: LlmServer, tmp_path: Path) -> None:
    llm_server.reply_to_body = WritingLlm(refuse_label_sets)
    config = dataclasses.replace(SMALL, num_tasks=1, max_label_tries=6)
    with pytest.raises(LanguageModelError) as caught:
        build(llm_server, tmp_path / "a.dod", config)
    words = (
        "building a classification DoD with 'writer': no task came out of 1; given up: {'no good label set': 1}, refused: "
        "{'labels: not JSON': 2, "
    )
    assert str(caught.value).startswith(words)
    assert "Look at what it answers in" in str(caught.value)
    assert names_in(tmp_path) == ["a.dod.answers"]
    assert len(llm_server.received) == 6


def test_a_label_set_is_used_once(llm_server: LlmServer, tmp_path: Path) -> None:
    sets = [["lion", "bear", "wolf"], ["harp", "drum", "flute"], ["wolf", "lion", "bear"], ["harp", "lion", "drum"]]

    def edit(asked: Asked, answer: list[str]) -> Answer:
        return answer if asked.label else sets[asked.call]

    llm_server.reply_to_body = WritingLlm(edit)
    report = build(llm_server, tmp_path / "a.dod", dataclasses.replace(SMALL, num_tasks=3), max_concurrency=1)
    assert report.refused == {"labels: the label set of another task": 1}
    assert [task.labels for task in tasks_of(tmp_path / "a.dod")] == [tuple(sets[number]) for number in (0, 1, 3)]


TWO = dataclasses.replace(SMALL, num_tasks=1, labels_per_task=2, sentences_per_label=10, sentences_per_call=10)


def farmer_and_sailor(sentences: Callable[[Asked, list[str]], Answer]) -> WritingLlm:
    """A writer of one task with these two labels."""

    def edit(asked: Asked, answer: list[str]) -> Answer:
        return sentences(asked, answer) if asked.label else ["farmer", "sailor"]

    return WritingLlm(edit)


def test_refused_sentences_are_counted_and_asked_for_again(llm_server: LlmServer, tmp_path: Path) -> None:
    farmer = [
        "The farmer waters a field.",
        "Two farmers' wives wait here.",
        "She is farming near the river.",
        "She tends the wheat before sunrise.",
        "Too short.",
        "word " * 60 + "word",
        "Der Bauer pflügt das Feld im Frühling.",
        "He waits \ud800 here.",
        "  He   tends\tthe cows. ",
        "SHE tends the wheat, before sunrise!",
    ]
    sailor = ["She tends the wheat before sunrise.", *[sentence(number) for number in range(9)]]
    extra = [sentence(number) for number in range(100, 110)]

    def sentences(asked: Asked, answer: list[str]) -> Answer:
        if asked.label == "sailor":
            return sailor if asked.call == 0 else extra
        return farmer if asked.call == 0 else [sentence(number) for number in range(200, 210)]

    llm_server.reply_to_body = farmer_and_sailor(sentences)
    report = build(llm_server, tmp_path / "a.dod", TWO)
    # Of the farmer's ten, two are good; of the sailor's, nine, because one is the farmer's.
    assert report.refused == {
        "sentence: contains its label": 3,
        "sentence: duplicate": 2,
        "sentence: under 3 words": 1,
        "sentence: over 60 words": 1,
        "sentence: not English": 1,
        "sentence: control characters": 1,
    }
    assert report.answers == report.asked.requests == 1 + 2 + 2
    [task] = tasks_of(tmp_path / "a.dod")
    found = {label: {pair.input for pair in task.pairs if pair.output == label} for label in task.labels}
    assert found == {
        "farmer": {farmer[3], "He tends the cows.", *[sentence(number) for number in range(200, 208)]},
        "sailor": {*sailor[1:], extra[0]},
    }


def test_tries_are_bounded_and_the_task_is_given_up(llm_server: LlmServer, tmp_path: Path) -> None:
    """Each answer for a farmer holds one good sentence of five: 2 calls, and then 2 + 1 of the three that it may have."""

    def edit(asked: Asked, answer: list[str]) -> Answer:
        if asked.label is None:
            return ["farmer", "sailor"] if asked.call == 0 else ["lion", "bear"]
        return [answer[0], *["The farmer waits."] * 4] if asked.label == "farmer" else answer

    config = dataclasses.replace(TWO, num_tasks=2, sentences_per_call=5, max_extra_calls=3)
    llm_server.reply_to_body = WritingLlm(edit)
    report = build(llm_server, tmp_path / "a.dod", config, max_concurrency=1)
    assert report.given_up == {"too few good sentences": 1}
    assert report.refused == {"sentence: contains its label": 5 * 4}
    assert report.answers == 2 + 3 * 2 + 5
    assert [task.labels for task in tasks_of(tmp_path / "a.dod")] == [("lion", "bear")]
    # The same answers, but the five sentences that there are suffice.
    enough = dataclasses.replace(config, min_sentences_per_label=5)
    report = build(llm_server, tmp_path / "a.dod", enough, overwrite=True)
    assert (report.given_up, report.asked.requests, report.pairs) == ({}, 0, 20 + 15)
    [task] = [task for task in tasks_of(tmp_path / "a.dod") if "farmer" in task.labels]
    counts = Counter((pair.output, pair.split) for pair in task.pairs)
    assert [counts["farmer", split] for split in ("train", "validation", "test")] == [3, 1, 1]
    report = build(
        llm_server, tmp_path / "a.dod", dataclasses.replace(config, min_sentences_per_label=6), overwrite=True
    )
    assert report.given_up == {"too few good sentences": 1}
