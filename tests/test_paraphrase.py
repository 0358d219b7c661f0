"""Paraphrases of hard prompts: what must stay in them, which are refused, and that nothing else of a DoD changes.

The LLM is a local server behind the real client; tokens are counted as words.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import random
import re
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from llm_server import KEY, LlmServer, Reply, chat, error_body

from softprompt_registry.dod.paraphrase import (
    ParaphraseConfig,
    ParaphraseReport,
    digest_before_paraphrasing,
    must_keep,
    paraphrase_dod,
    paraphrase_fault,
)
from softprompt_registry.dod.prompt_files import read_styles
from softprompt_registry.dod.store import DodStore
from softprompt_registry.dod.task import Pair, PairSplit, Task
from softprompt_registry.errors import ConfigError, DataError, LanguageModelError
from softprompt_registry.language_models.answer_cache import AnswerCache
from softprompt_registry.language_models.openai_compatible import OpenAICompatible
from softprompt_registry.language_models.openai_settings import OpenAICompatibleConfig
from softprompt_registry.recording import NullRecorder

BENCHMARK = Path(__file__).parents[2] / "shared" / "data" / "super_natural"
STYLES = read_styles("paraphrase_styles", None)
SPLITS: tuple[PairSplit, ...] = ("train", "train", "validation", "test")


def count_words(text: str) -> int:
    return len(text.split())


# --- What must be kept ---


def kept(hard_prompt: str, outputs: Iterable[str], labels: Sequence[str] = ()) -> list[str]:
    """What a task with these outputs, four times each, has to keep of its hard prompt."""
    pairs = tuple(Pair(f"{output} {copy}", output) for output in outputs for copy in range(4))
    kind: Any = "classification" if labels else "generation"
    return must_keep(Task("t", kind, pairs, labels=tuple(labels), hard_prompts=(hard_prompt,)), hard_prompt)


MANY = [f"answer {number}" for number in range(200)]
"""Outputs that are no labels."""


@pytest.mark.parametrize(
    ("hard_prompt", "outputs", "labels", "expected"),
    [
        # Labels: the task's own, and outputs where they are few; in the order and spelling of the hard prompt.
        ("Sort the pots: weaving or pottery?", ["pottery", "weaving"], ["pottery", "weaving"], ["weaving", "pottery"]),
        ("Is the review positive or negative?", ["negative", "positive"], [], ["positive", "negative"]),
        ("Say whether it is Spam or not spam.", ["spam", "not spam"], [], ["spam", "not spam"]),
        ("Tell male from female.", ["male", "female"], [], ["male", "female"]),
        ("Name the mood of the post.", ["joy", "fear"], [], []),  # it names none of them
        ("Answer Yes or No.", ["Yes.", "No."], [], ["Yes", "No"]),
        ("Answer true or false. Write 'True' or 'False'.", ["True", "False"], [], ["True", "False"]),
        ("Are they SIMILAR or NOT SIMILAR?", ["Similar", "Not similar"], [], ["Similar", "Not similar"]),
        ("Is it a noun (part of speech)?", ["PART", "NOUN"], [], ["noun", "part"]),
        ("Answer with Don't Care or Cheap.", ["Don't Care", "Cheap"], [], ["Don't Care", "Cheap"]),
        # More than 20 outputs are labels where the hard prompt names half of them: 15 of 30, but not 14 of 30.
        (" ".join(f"kind{n}" for n in range(15)), [f"kind{n}" for n in range(30)], [], [f"kind{n}" for n in range(15)]),
        (" ".join(f"kind{n}" for n in range(14)), [f"kind{n}" for n in range(30)], [], []),
        # Quotation marks of all kinds, and apostrophes that are none.
        ("Write \"Event\", “Intent”, 'poster' or `no_flight`.", MANY, [], ["Event", "Intent", "poster", "no_flight"]),
        ("Don't change the person's words, nor the writers' order.", MANY, [], []),
        ("Say 'I don't know' or ‘I don’t care’ if you can't.", MANY, [], ["I don't know", "I don’t care"]),
        ("Begin with 'Question: ' and end with '?'.", MANY, [], ["Question", "?"]),
        ('Use "the words of a whole long sentence that is quoted" and "short".', MANY, [], ["short"]),
        ("Do not say 'what is in quotes and has 5 words'.", MANY, [], []),
        ("Write 'A', 'B, 'C' or 'D'.", ["A", "B", "C", "D"], [], ["A", "B", "C", "D"]),
        # Tags in brackets; not the plural's (s), a letter put into a word, and values.
        ("Mark <B-PER>, [Link] and {name}; keep the file(s) of [one]self.", MANY, [], ["<B-PER>", "[Link]", "{name}"]),
        ("Find x < 3 in a list like [1, 2, 30] or ['1', 'l'], or a set like {4, 5}.", MANY, [], ["3"]),
        ("Triples are [subject, predicate, object].", MANY, [], ["[subject, predicate, object]"]),
        ("Ask 'Where is <person_name>?' of the text.", MANY, [], ["Where is <person_name>?"]),
        # Options; the letters alone where they are the outputs.
        ("Choose (A) or (B), and say why (c).", MANY, [], ["(A)", "(B)"]),
        ("Choose (A) or (B).", ["A", "B"], [], ["A", "B"]),
        # Numbers and decimals; not those of a list's items, of a label, of a word or of an example.
        ("Use 3 to 5 words, at most 0.5 or 1,000 of 2.", MANY, [], ["3", "5", "0.5", "1,000", "2"]),
        ("Write a sentence (8 words, not 9) for [step 1] at (3, 4) or -6.", MANY, [], ["8", "9", "[step 1]", "6"]),
        ("Give the 3rd of word1, B2B and 2x.", MANY, [], []),
        ("Classify: 1) Company, 2) Artist. Give 10 words.", ["Company", "Artist"], [], ["Company", "Artist", "10"]),
        ("The kinds (1) algebra (2) arithmetic", ["algebra", "arithmetic"], [], ["algebra", "arithmetic"]),
        ("Steps:\n1. count the rows.\n2. sum the rows.\nUse at most 7.", MANY, [], ["7"]),
        ("Use class 0,1,2 for 3,4 words.", ["0", "1", "2"], [], ["0", "1", "2", "3", "4"]),
        ("Rate it: 1. bad, 2. good.", ["1", "2"], [], ["1", "2"]),
        ("Say Response 1 or Response 2.", ["Response 1", "Response 2"], [], ["Response 1", "Response 2"]),
        (
            'Change a word (e.g., "small (or 1)" to "big"), in 15 words. For example, of "cat", write "dog" (2). Keep "#".',
            MANY,
            [],
            ["15", "#"],
        ),
        ('Turn it round, for instance from "increase" to "decrease." Use "up".', MANY, [], ["up"]),
        # An example does not hide a label.
        ("Find the mood, e.g. joy or 'fear'.", ["joy", "fear"], [], ["joy", "fear"]),
        # An answer that looks like an article, and the blank output.
        ("Pick a letter: a, b.", ["a", "b", ""], [], ["a", "b"]),
    ],
)  # fmt: skip
def test_what_must_be_kept(hard_prompt: str, outputs: list[str], labels: list[str], expected: list[str]) -> None:
    assert kept(hard_prompt, outputs, labels) == expected


def test_a_handful_of_pairs_has_no_labels_by_chance() -> None:
    """30 outputs of one pair each are texts, although the hard prompt has each of them."""
    words = [f"word{number}" for number in range(30)]
    task = Task("t", "generation", tuple(Pair(word, word) for word in words), hard_prompts=(" ".join(words),))
    assert must_keep(task, task.hard_prompts[0]) == []


@pytest.fixture(scope="module")
def benchmark_tasks() -> list[Task]:
    """Every task of the benchmark's copy beside the project, with its pairs."""
    if not BENCHMARK.is_dir():
        pytest.skip("the benchmark's flat copy is not beside the project")
    pairs: dict[str, list[Pair]] = {}
    with gzip.open(BENCHMARK / "pairs.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            pairs.setdefault(row["task"], []).append(Pair(row["input"], row["output"]))
    with gzip.open(BENCHMARK / "tasks.jsonl.gz", "rt", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    return [
        Task(record["task"], "generation", tuple(pairs[record["task"]]), hard_prompts=(record["definition"],))
        for record in records
        if record["task"] in pairs
    ]


def test_what_real_definitions_must_keep(benchmark_tasks: list[Task]) -> None:
    items = {task.name: must_keep(task, task.hard_prompts[0]) for task in benchmark_tasks}
    for task in benchmark_tasks:
        [definition] = task.hard_prompts
        # A definition that is no paraphrase of itself would have none at all.
        assert paraphrase_fault(definition, "", items[task.name], 0.0) is None, task.name
        outputs = {pair.output.strip() for pair in task.pairs}
        shown = {item.casefold() for item in items[task.name]}
        if len(outputs) <= 20:
            named = {output for output in outputs if re.search(rf"(?<!\w){re.escape(output)}(?!\w)", definition)}
            assert {output.casefold() for output in named} <= shown, task.name
    assert mean(map(len, items.values())) < 3
    # Those that still have to keep many have many labels or tags: 73 quoted classes, 52 categories, parts of speech, …
    assert sum(len(kept) > 15 for kept in items.values()) <= 18

    def of(number: str) -> list[str]:
        [found] = [kept for name, kept in items.items() if name.startswith(f"task{number}_")]
        return found

    assert of("211") == ["yes", "no"]  # and not the numbers of its 22 operators
    assert of("834") == ["algebra", "arithmetic", "measurement", "numbers", "probability"]
    assert of("068") == ["4"]  # and not the sentences of its example
    assert of("377") == of("835") == of("122") == []
    assert of("035") == ["trigger word", "15", "30", "70"]
    assert of("1203") == ["<sep>", "Yes", "No", "___"]
    assert of("109") == ["spam", "ham"]
    assert (len(of("900")), len(of("143")), len(of("1328"))) == (73, 52, 24)


# --- Which answers are refused ---


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "empty"),
        ("Lies den Satz und antworte mit yes oder no.", "not English"),
        ("12345 67890", "not English"),
        ("  read THE sentence and\nanswer yes or no. ", "a copy of the original"),
        ("Read the sentence and answer yes.", "a label or format marker is lost"),
        ("Read the sentence and answer yes or not.", "a label or format marker is lost"),
        ("Answer Yes or NO about the sentence.", None),
    ],
)
def test_faults(text: str, fault: str | None) -> None:
    assert paraphrase_fault(text, "Read the sentence and answer yes or no.", ["yes", "no"], 0.5) == fault


@pytest.mark.parametrize(
    ("item", "good", "bad"),
    [
        ("A", "Choose A or B.", "Choose a letter."),
        ("IN", "Tag it as IN.", "Tag what is in it."),
        ("I_LOOK", "Write I_LOOK.", "Write i_look."),
        ("Yes", "Say yes.", "Say yesterday."),
        ("5", "Use 5 words.", "Use 0.5 or 5.5 words of 50 or 5,000."),
        ("5", "One of 4,5,6.", "One of 4,15,6."),
        ("0.5", "At most 0.5.", "At most 10.5."),
        ("<sep>", "Split at<sep>there.", "Split at sep."),
        ("+", "Swap the +.", "Swap the sign."),
        ("not spam", "Say Not Spam.", "Say not, or spam."),
    ],
)
def test_where_an_item_counts_as_kept(item: str, good: str, bad: str) -> None:
    assert paraphrase_fault(good, "", [item], 0.0) is None
    assert paraphrase_fault(bad, "", [item], 0.0) == "a label or format marker is lost"


# --- Whole DoDs ---


def pairs_of(name: str, *outputs: str) -> tuple[Pair, ...]:
    return tuple(
        Pair(f"Sample {n} of {name}", output, split, num_tokens=n)
        for n, (output, split) in enumerate((output, split) for output in outputs for split in SPLITS)
    )


SHOUT = Task(
    "shout", "generation", pairs_of("shout", "HEY"), hard_prompts=("Shout the given text in capitals.", "Louder!")
)
VERDICT_TEXT = (
    "You are given a sentence about a person and what the person did on one day of the week. Read the sentence slowly, think "
    "about it for a while, and decide whether the person was kind to somebody else. If so, answer with 'kind'. If not, "
    "answer with 'unkind', please."
)
"""50 words."""
VERDICT = Task(
    "verdict", "generation", pairs_of("verdict", "kind", "unkind"), hard_prompts=(VERDICT_TEXT,), source="here"
)
CRAFTS = Task("crafts", "classification", pairs_of("crafts", "pottery", "weaving"), labels=("pottery", "weaving"))
HELD_OUT = Task("held", "generation", pairs_of("held", "x"), hard_prompts=("Held out: write it.",), split="test")
BARE = Task("bare", "generation", pairs_of("bare", "y"))
TASKS = (SHOUT, CRAFTS, VERDICT, HELD_OUT, BARE)


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a request asks for."""

    original: str
    number: int
    """Of the paraphrase: up to ten of them differ in style."""
    attempt: int


class Rewriter:
    """Answers requests for paraphrases by what they ask for, whenever they come."""

    def __init__(self, write: Callable[[Wanted], Reply | str]) -> None:
        self.write = write
        self.wanted: list[Wanted] = []
        self._seen: Counter[tuple[str, int]] = Counter()

    def __call__(self, body: Mapping[str, Any]) -> Reply:
        prompt = body["messages"][-1]["content"]
        [style] = re.findall(r"^- Style: (.*)\.$", prompt, re.MULTILINE)
        place = (prompt.partition("Instruction:\n")[2], STYLES.index(style))
        wanted = Wanted(*place, self._seen[place])
        self._seen[place] += 1
        self.wanted.append(wanted)
        answer = self.write(wanted)
        return answer if isinstance(answer, Reply) else Reply(body=chat(answer))

    def count(self, task: Task) -> int:
        return sum(wanted.original == task.hard_prompts[0] for wanted in self.wanted)


OPENINGS = (
    "Read the sentence. Please|Look at the text and|First read it, then|With the sentence in mind,|For each text|Carefully|"
    "Consider the sentence;|Given a text,|After reading,|Now"
).split("|")


def good(wanted: Wanted) -> str:
    """A paraphrase that is one, and differs by its number and attempt."""
    what = "write it in capitals" if wanted.original == SHOUT.hard_prompts[0] else "answer kind or unkind"
    return f"{OPENINGS[wanted.number]} {what}{' again' * wanted.attempt}."


def instead(faulty: Mapping[tuple[str, int, int], Reply | str]) -> Callable[[Wanted], Reply | str]:
    """Good answers, but for those by (beginning of the original, number, attempt)."""

    def write(wanted: Wanted) -> Reply | str:
        for (beginning, number, attempt), answer in faulty.items():
            if wanted.original.startswith(beginning) and (wanted.number, wanted.attempt) == (number, attempt):
                return answer
        return good(wanted)

    return write


def make_dod(path: Path, tasks: Iterable[Task] = TASKS) -> Path:
    with DodStore.create(path) as store:
        for task in tasks:
            store.add_task(task)
        store.set_metadata("build", {"builder": "by hand"})
    return path


def paraphrase(
    server: LlmServer,
    dod: Path,
    out: Path,
    write: Callable[[Wanted], Reply | str] = good,
    *,
    overwrite: bool = False,
    recorder: Any = None,
    client: Mapping[str, Any] | None = None,
    **settings: Any,
) -> tuple[ParaphraseReport, dict[str, Task], Rewriter]:
    """The report, the tasks of the new DoD, and what was asked for."""
    rewriter = Rewriter(write)
    server.reply_to_body = rewriter
    options = {"model": "writer", "base_url": server.url, "timeout_s": 20.0, "max_attempts": 1, **(client or {})}
    model = OpenAICompatible(OpenAICompatibleConfig(**options), jitter=random.Random(0))
    config = ParaphraseConfig(**{"factor": 3, **settings})
    try:
        report = paraphrase_dod(dod, out, model, count_words, config=config, overwrite=overwrite, recorder=recorder)
    finally:
        model.close()
    with DodStore.open(out) as store:
        assert store.digest == report.digest
        return report, {task.name: task for task in store.tasks()}, rewriter


@pytest.fixture
def dod(tmp_path: Path) -> Path:
    return make_dod(tmp_path / "in" / "tasks.sqlite")


def files_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_paraphrases_stand_behind_the_own_hard_prompts_of_training_tasks(
    llm_server: LlmServer, dod: Path, tmp_path: Path
) -> None:
    before = dod.read_bytes()
    report, tasks, rewriter = paraphrase(llm_server, dod, tmp_path / "out.sqlite", factor=10)
    assert dod.read_bytes() == before
    assert (report.tasks, report.wanted, report.made) == (2, 20, 20)
    assert (report.refused, report.failed_by_task, report.failed_share) == ({}, {}, 0.0)
    assert (report.asked.requests, report.asked.failed) == (20, 0)
    assert (report.asked.prompt_tokens, report.asked.completion_tokens) == (20 * 7, 20 * 3)
    assert (rewriter.count(SHOUT), rewriter.count(VERDICT), len(rewriter.wanted)) == (10, 10, 20)

    # Only hard prompts are new, only those of the two tasks, and in the order of their numbers.
    for task in (CRAFTS, HELD_OUT, BARE):
        assert tasks[task.name] == task
    for task in (SHOUT, VERDICT):
        written = tuple(good(Wanted(task.hard_prompts[0], number, 0)) for number in range(10))
        assert tasks[task.name] == dataclasses.replace(task, hard_prompts=(*task.hard_prompts, *written))
    assert list(tasks) == [task.name for task in TASKS]
    assert files_of(tmp_path) == ["in", "out.sqlite", "out.sqlite.answers"]


def test_what_is_asked(llm_server: LlmServer, dod: Path, tmp_path: Path) -> None:
    paraphrase(llm_server, dod, tmp_path / "out.sqlite", factor=2, temperature=0.25, max_tokens=150, seed=7)
    bodies = [received.body for received in llm_server.received]
    assert {body["temperature"] for body in bodies} == {0.25}
    assert {body["max_tokens"] for body in bodies} == {250}  # the LLM's tokens may be shorter than the base model's
    assert len({body["seed"] for body in bodies}) == 4
    system, user = bodies[0]["messages"]
    assert system["role"] == "system" and "answer with the new instruction only" in system["content"]
    prompts = [body["messages"][1]["content"] for body in bodies]
    assert Counter(re.findall(r"letter for letter: (.*)", "\n".join(prompts))) == {
        "(nothing in particular)": 2,
        "kind, unkind": 2,
    }
    assert sorted(prompt.count(VERDICT_TEXT) for prompt in prompts) == [0, 0, 1, 1]
    assert not [prompt for prompt in prompts if "{" in prompt]


def test_every_refusal_is_counted_and_asked_for_again(llm_server: LlmServer, dod: Path, tmp_path: Path) -> None:
    long = "Answer kind or unkind about the sentence" + " and the text" * 20 + "."  # 7 and 60 words
    not_shorter = "Now answer kind or unkind." + " Read it again." * 15  # 5 and 45 words, as many as the hard prompt
    faulty: dict[tuple[str, int, int], Reply | str] = {
        ("You", 0, 0): "",
        ("You", 0, 1): Reply(body=chat(None, finish_reason="content_filter")),
        ("You", 1, 0): "Antworte mit kind oder unkind, wenn du den Satz gelesen hast.",
        ("You", 2, 0): VERDICT_TEXT.upper(),
        ("You", 3, 0): "Answer kind or not.",
        ("You", 4, 0): not_shorter,
        ("You", 5, 0): long,
        # What was cut has lost its end, and that is not what is wrong with it.
        ("You", 6, 0): Reply(body=chat("Answer kind or", finish_reason="length")),
        ("You", 7, 0): good(Wanted(VERDICT_TEXT, 9, 0)),
        ("You", 9, 0): "The sentence is kind or unkind.",
        ("You", 8, 0): " The sentence is\n KIND or unkind.",
        ("Shout", 0, 0): "louder!",  # the task's second hard prompt
        ("Shout", 1, 0): '"Write it in\n capitals."',  # quotation marks around the whole answer go
        ("Shout", 2, 0): '"Write" it in "capitals", every letter of it, please.',  # a short hard prompt may grow
    }
    recorder = Metrics()
    report, tasks, rewriter = paraphrase(
        llm_server, dod, tmp_path / "out.sqlite", instead(faulty), factor=10, max_tokens=50, recorder=recorder
    )
    assert report.refused == {
        "over 50 tokens": 2,
        "duplicate": 2,
        "empty": 2,
        "not English": 1,
        "a copy of the original": 1,
        "a label or format marker is lost": 1,
        "not shorter than the original": 1,
    }
    assert (report.wanted, report.made, report.failed_share, report.failed_by_task) == (20, 20, 0.0, {})
    assert recorder.values == {"failed_share": [0.0]}
    # Ten refused answers make ten more requests; the one that was refused twice comes a third time.
    assert Counter(wanted.attempt for wanted in rewriter.wanted) == {0: 20, 1: 9, 2: 1}
    assert report.asked.requests == 30
    assert tasks["shout"].hard_prompts[3:5] == (
        "Write it in capitals.",
        '"Write" it in "capitals", every letter of it, please.',
    )
    written = tasks["verdict"].hard_prompts[1:]
    assert written[0] == "Read the sentence. Please answer kind or unkind again again."
    assert written[7] == good(Wanted(VERDICT_TEXT, 9, 0))
    assert written[8] == "The sentence is KIND or unkind."
    assert written[9] == "Now answer kind or unkind again."


class Metrics(NullRecorder):
    """Keeps the metrics."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}

    def metric(self, name: str, value: float, step: int = 0) -> None:
        self.values.setdefault(name, []).append(value)


def test_after_an_error_only_what_is_missing_is_asked_for(llm_server: LlmServer, dod: Path, tmp_path: Path) -> None:
    whole, *_ = paraphrase(llm_server, dod, tmp_path / "whole.sqlite", factor=10)
    out = tmp_path / "out.sqlite"
    broken = Reply(status=400, body=error_body("too long"))
    with pytest.raises(LanguageModelError) as error:
        paraphrase(llm_server, dod, out, instead({("You", 2, 0): broken, ("Shout", 5, 0): broken}), factor=10)
    assert "asking for paraphrases: 2 of 20 requests failed" in str(error.value)
    assert error.value.retryable and "Run the same command again" in error.value.hint
    assert files_of(tmp_path) == ["in", "out.sqlite.answers", "whole.sqlite", "whole.sqlite.answers"]
    with AnswerCache(tmp_path / "out.sqlite.answers") as cache:
        assert len(cache) == 18

    report, _, rewriter = paraphrase(llm_server, dod, out, factor=10)
    assert {(wanted.original[:3], wanted.number) for wanted in rewriter.wanted} == {("You", 2), ("Sho", 5)}
    assert (report.asked.requests, report.made) == (2, 20)
    assert report.digest == whole.digest

    # A third time nothing is asked for; another model or prompt is asked for everything.
    report, _, rewriter = paraphrase(llm_server, dod, out, factor=10, overwrite=True)
    assert (rewriter.wanted, report.asked.requests, report.digest) == ([], 0, whole.digest)
    _, _, rewriter = paraphrase(llm_server, dod, out, factor=10, overwrite=True, client={"model": "other"})
    assert len(rewriter.wanted) == 20


def test_the_digest_does_not_depend_on_the_order_of_the_answers(
    llm_server: LlmServer, dod: Path, tmp_path: Path
) -> None:
    """Two requests get the same text; whichever is answered first, the first number keeps it."""

    def write(wanted: Wanted) -> Reply:
        text = "Write capitals." if wanted.original != VERDICT_TEXT and not wanted.attempt else good(wanted)
        if wanted.number == 1 and wanted.original == VERDICT_TEXT:
            text = ""  # every time
        delay = random.uniform(0, 0.02)
        return Reply(body=chat(text), delay_s=delay)

    reports = []
    for concurrency in (1, 3, 16):
        out = tmp_path / f"{concurrency}.sqlite"
        report, *_ = paraphrase(llm_server, dod, out, write, factor=6, client={"max_concurrency": concurrency})
        reports.append(
            dataclasses.replace(report, path=out.parent, asked=dataclasses.replace(report.asked, seconds=0.0))
        )
    assert reports[0] == reports[1] == reports[2]
    assert reports[0].refused == {"duplicate": 5, "empty": 3}
    assert llm_server.most_at_once > 3


# --- Where it came from ---


def test_the_digest_before_is_that_of_the_original(llm_server: LlmServer, dod: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.sqlite"
    paraphrase(llm_server, dod, out)
    with DodStore.open(dod) as original, DodStore.open(out) as store:
        assert digest_before_paraphrasing(store) == original.digest != store.digest
        assert digest_before_paraphrasing(original) is None
        assert store.metadata()["build"]["hard_prompts_before"] == {"shout": 2, "verdict": 1}
        assert store.metadata()["build"]["from"] == {
            "name": "tasks",
            "digest": original.digest,
            "build": {"builder": "by hand"},
        }


@pytest.mark.parametrize(
    ("statement", "same"),
    [
        ("UPDATE examples SET output = 'LO' WHERE rowid IN (SELECT rowid FROM examples LIMIT 1)", False),
        ("UPDATE examples SET split = 'test' WHERE position = 0 AND dataset_id = 1", False),
        ("UPDATE datasets SET split = 'test' WHERE name = 'shout'", False),
        ("DELETE FROM datasets WHERE name = 'bare'", False),
        ("UPDATE labels SET label = 'knitting ' || position", None),  # its pairs no longer have a label
        ("UPDATE datasets SET hard_prompts = replace(hard_prompts, 'Louder', 'Quieter')", False),
        ("UPDATE datasets SET digest = 'forged'", True),  # what is stored is not believed
        # A paraphrase may be corrected by hand.
        ("UPDATE datasets SET hard_prompts = replace(hard_prompts, 'write it in', 'print it in')", True),
    ],
)
def test_what_was_changed_is_not_taken_for_the_original(
    llm_server: LlmServer, dod: Path, tmp_path: Path, statement: str, same: bool | None
) -> None:
    out = tmp_path / "out.sqlite"
    paraphrase(llm_server, dod, out)
    connection = sqlite3.connect(out)
    statement = statement.replace("rowid IN (SELECT rowid FROM examples LIMIT 1)", "dataset_id = 1 AND position = 1")
    assert connection.execute(statement).rowcount > 0
    connection.commit()
    connection.close()
    with DodStore.open(dod) as original, DodStore.open(out) as store:
        if same is None:
            with pytest.raises(DataError, match="are not among its labels"):
                digest_before_paraphrasing(store)
        else:
            assert (digest_before_paraphrasing(store) == original.digest) is same


def test_a_bank_goes_with_the_paraphrases_of_its_dod(llm_server: LlmServer, dod: Path, tmp_path: Path) -> None:
    from softprompt_registry.soft_prompts.bank import SoftPromptBank
    from softprompt_registry.stages.running import require_same_dod

    def bank_of(path: Path, name: str) -> SoftPromptBank:
        """The golden bank, as if it had been tuned on a DoD."""
        folder = tmp_path / name
        shutil.copytree(Path(__file__).parent / "data" / "v1" / "bank", folder)
        header = json.loads((folder / "bank.json").read_text())
        with DodStore.open(path) as store:
            header |= {"dod_name": store.name, "dod_digest": store.digest}
        (folder / "bank.json").write_text(json.dumps(header))
        return SoftPromptBank(folder)

    other = make_dod(tmp_path / "other.sqlite", [SHOUT, VERDICT])
    out = tmp_path / "out.sqlite"
    paraphrase(llm_server, dod, out)
    bank = bank_of(dod, "bank")
    for path in (dod, out):
        with DodStore.open(path) as store:
            require_same_dod(bank, store)
    with DodStore.open(out) as store:
        require_same_dod(bank_of(out, "bank of the paraphrased"), store)
    for banked, path in ((bank, other), (bank_of(other, "another bank"), out), (bank_of(out, "third bank"), dod)):
        with DodStore.open(path) as store, pytest.raises(DataError, match="Use the DoD that the bank was tuned on"):
            require_same_dod(banked, store)


def test_nothing_of_the_machine_is_written_down(llm_server: LlmServer, dod: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "my prompts"
    prompts.mkdir()
    (prompts / "paraphrase.txt").write_text("Mine.\n- Style: {style}.\nInstruction:\n{hard_prompt}")
    out = tmp_path / "out.sqlite"
    paraphrase(llm_server, dod, out, prompts_folder=str(prompts))
    assert llm_server.received[0].body["messages"][0]["content"].startswith("Mine.")
    with DodStore.open(out) as store:
        build = store.metadata()["build"]
    assert build["builder"] == "paraphrase" and build["model"] == "writer"
    assert build["settings"] == {
        "factor": 3,
        "temperature": 0.5,
        "max_tokens": 300,
        "max_tries": 3,
        "condense_over": 40,
        "min_english": 0.5,
        "skip_failed_requests": False,
        "seed": 0,
    }
    for path in (out, out.with_name("out.sqlite.answers")):
        content = path.read_bytes()
        for secret in (str(tmp_path), "127.0.0.1", str(llm_server.server_port), KEY):
            assert secret.encode() not in content, secret


# --- What cannot be done ---


def test_what_cannot_be_done_leaves_nothing_behind(llm_server: LlmServer, dod: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out.sqlite"
    bare = make_dod(tmp_path / "bare.sqlite", [CRAFTS, HELD_OUT, BARE])
    with pytest.raises(
        DataError,
        match="none of its 2 training tasks is a generation task.*Label lists need no paraphrases",
    ):
        paraphrase(llm_server, bare, out)
    with pytest.raises(DataError, match="there is no such file"):
        paraphrase(llm_server, tmp_path / "missing.sqlite", out)
    with pytest.raises(ConfigError, match="there is no folder"):
        paraphrase(llm_server, dod, out, prompts_folder=str(tmp_path / "nowhere"))
    assert not out.parent.exists()
    with pytest.raises(DataError, match="exists already; expected a new name"):
        paraphrase(llm_server, dod, bare)
    assert files_of(tmp_path) == ["bare.sqlite", "in"] and files_of(dod.parent) == ["tasks.sqlite"]
    assert llm_server.received == []


def test_a_dod_may_be_replaced_by_its_paraphrase(llm_server: LlmServer, dod: Path) -> None:
    with DodStore.open(dod) as store:
        digest = store.digest
    report, tasks, _ = paraphrase(llm_server, dod, dod, overwrite=True)
    assert len(tasks["verdict"].hard_prompts) == 1 + 3
    with DodStore.open(dod) as store:
        assert (store.digest, digest_before_paraphrasing(store)) == (report.digest, digest)
