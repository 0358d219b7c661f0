"""The audit: each kind of finding alone, with numbers worked out by hand, and the page that shows them."""

from __future__ import annotations

import dataclasses
import json
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from html_page import Page
from small_tasks import write_dod

from softprompt_registry.dod.audit import AuditConfig, audit_dod
from softprompt_registry.dod.audit_findings import FINDING_KINDS, SEVERITIES, Audit, Example
from softprompt_registry.dod.audit_page import audit_figures, write_audit_page
from softprompt_registry.dod.audit_texts import SameRoots
from softprompt_registry.dod.store import DodStore, note_in_dod
from softprompt_registry.dod.task import Pair, Task
from softprompt_registry.dod.vocabulary import same_root
from softprompt_registry.errors import DataError

CONFIG = AuditConfig(min_pairs_per_task=4, max_label_leak_share=0.1)
SPLITS = ("train", "train", "train", "train", "validation", "validation", "test", "test")


def pairs_about(name: str, outputs: Iterable[str]) -> tuple[Pair, ...]:
    """Eight different inputs, four of them train pairs, with the outputs in turn."""
    several = list(outputs)
    return tuple(Pair(f"Sample {n} of {name}", several[n % len(several)], split) for n, split in enumerate(SPLITS))  # type: ignore[arg-type]


CRAFTS = Task("crafts", "classification", pairs_about("crafts", ("pottery", "weaving")), labels=("pottery", "weaving"))
MEALS = Task("meals", "classification", pairs_about("meals", ("soup", "salad")), labels=("soup", "salad"), split="test")
SHOUT = Task("shout", "generation", pairs_about("shout", ("HEY",)), hard_prompts=("Shout it.", "Louder!"))
CLEAN = (CRAFTS, MEALS, SHOUT)


def audit_of(folder: Path, *tasks: Task, config: AuditConfig = CONFIG, tokenizer: Any = None) -> Audit:
    return audit_dod(write_dod(folder / "made.dod", tasks), config=config, tokenizer=tokenizer)


def changed(task: Task, number: int, **values: Any) -> Task:
    """The task with another pair at one place."""
    pairs = list(task.pairs)
    pairs[number] = pairs[number]._replace(**values)
    return dataclasses.replace(task, pairs=tuple(pairs))


def with_splits(task: Task, *splits: str) -> Task:
    pairs = (pair._replace(split=split) for pair, split in zip(task.pairs, splits, strict=True))  # type: ignore[arg-type]
    return dataclasses.replace(task, pairs=tuple(pairs))


def renamed(task: Task, name: str) -> Task:
    """A task like `task` with inputs of its own."""
    return dataclasses.replace(task, name=name, pairs=pairs_about(name, [pair.output for pair in task.pairs]))


def test_a_clean_dod_has_no_finding(tmp_path: Path) -> None:
    audit = audit_of(tmp_path, *CLEAN)
    assert audit.findings == ()
    assert audit.verdict == "Nothing found in 3 tasks and 24 pairs."
    assert audit.passed(strict=True)
    assert audit.not_checked == {"long_hard_prompts": "it needs a tokenizer"}
    assert dataclasses.asdict(audit.sizes) == {
        "tasks": 3,
        "train_tasks": 2,
        "test_tasks": 1,
        "classification_tasks": 2,
        "pairs": 24,
        "train_pairs": 12,
        "validation_pairs": 6,
        "test_pairs": 6,
        "min_pairs": 8,
        "median_pairs": 8,
        "max_pairs": 8,
        "label_sets": 2,
        "hard_prompts": 2,
    }
    # "Sample 0 of crafts" and its label are five words, 24 times.
    assert audit.lengths.unit == "words"
    assert audit.pair_lengths == {"train": {5: 16}, "test": {5: 8}}
    with DodStore.open(tmp_path / "made.dod") as store:
        assert audit.digest == store.digest


# Kind of finding → the tasks, the title, which tasks are concerned, and the example.
ALONE: dict[str, tuple[tuple[Task, ...], str, tuple[str, ...], Example]] = {
    "inputs_on_both_sides": (
        (CRAFTS, changed(MEALS, 5, input="SAMPLE 1  of\tcrafts"), SHOUT),
        "1 input both in a train task and in a test task",
        ("crafts", "meals"),
        Example("crafts", "Sample 1 of crafts", "2 tasks; train: crafts; test: meals"),
    ),
    "label_sets_on_both_sides": (
        (*CLEAN, renamed(dataclasses.replace(CRAFTS, split="test", labels=("weaving", "pottery")), "arts")),
        "1 label set both of a train task and of a test task",
        ("arts", "crafts"),
        Example("arts", "pottery, weaving", "train: crafts; test: arts"),
    ),
    "hard_prompts_on_both_sides": (
        (
            CRAFTS,
            MEALS,
            SHOUT,
            dataclasses.replace(renamed(SHOUT, "yell"), split="test", hard_prompts=("louder! ", "Yell.")),
        ),
        "1 hard prompt both of a train task and of a test task",
        ("shout", "yell"),
        Example("shout", "Louder!", "2 tasks; train: shout; test: yell"),
    ),
    "leaks_between_splits": (
        (changed(CRAFTS, 4, input="sample 0 of crafts"), MEALS, SHOUT),
        "1 input in train and in validation or test pairs of one task",
        ("crafts",),
        Example("crafts", "Sample 0 of crafts", "1 train and 1 validation; output pottery"),
    ),
    "held_out_labels": (
        (
            CRAFTS,
            MEALS,
            SHOUT,
            Task("moods", "classification", pairs_about("moods", ("worst", "funny")), ("worst", "funny")),
        ),
        "1 label of train tasks with a word held out for the evaluation",
        ("moods",),
        Example("moods", "", "label 'worst': worst"),
    ),
    "labels_without_train_pairs": (
        # Train pairs 0, 2, 4 and 6 are pottery; 1, 3, 5 and 7 are weaving.
        (
            with_splits(CRAFTS, "train", "test", "train", "test", "train", "validation", "train", "validation"),
            MEALS,
            SHOUT,
        ),
        "1 label without train pairs",
        ("crafts",),
        Example("crafts", "", "label 'weaving'"),
    ),
    "tasks_without_train_pairs": (
        (with_splits(CRAFTS, *["validation", "test"] * 4), MEALS, SHOUT),
        "1 task without train pairs",
        ("crafts",),
        Example("crafts", "", "8 pairs"),
    ),
    "tasks_without_validation_pairs": (
        (CRAFTS, MEALS, with_splits(SHOUT, *["train", "test"] * 4)),
        "1 task without validation pairs",
        ("shout",),
        Example("shout", "", "8 pairs"),
    ),
    "tasks_without_test_pairs": (
        (CRAFTS, MEALS, with_splits(SHOUT, *["train", "validation"] * 4)),
        "1 task without test pairs",
        ("shout",),
        Example("shout", "", "8 pairs"),
    ),
    "small_tasks": (
        (CRAFTS, MEALS, dataclasses.replace(SHOUT, pairs=(SHOUT.pairs[0], SHOUT.pairs[4], SHOUT.pairs[7]))),
        "1 task with fewer than 4 pairs",
        ("shout",),
        Example("shout", "", "3 pairs"),
    ),
    "unbalanced_labels": (
        # One of eight pairs where four would be equal: 1/4. The most frequent gives only 4/7.
        (dataclasses.replace(CRAFTS, pairs=pairs_about("crafts", ["weaving"] + ["pottery"] * 7)), MEALS, SHOUT),
        "1 task with a label balance below 0.5",
        ("crafts",),
        Example("crafts", "", "balance 0.25: 'weaving' 1 and 'pottery' 7 of 8 pairs; equal would be 4"),
    ),
    "labels_in_inputs": (
        (changed(CRAFTS, 3, input="She wove it on a loom"), MEALS, SHOUT),
        "1 task with the label itself in over 10 % of the inputs",
        ("crafts",),
        Example("crafts", "She wove it on a loom", "1 of 8 inputs; here label 'weaving', the input says 'wove'"),
    ),
    "contradictions": (
        (changed(CRAFTS, 1, input="Sample 0 of crafts"), MEALS, SHOUT),
        "1 input with several labels within one task",
        ("crafts",),
        Example("crafts", "Sample 0 of crafts", "2 train; output pottery | weaving"),
    ),
    "label_spellings": (
        (
            dataclasses.replace(
                CRAFTS, pairs=pairs_about("crafts", ("pottery", "Pottery ")), labels=("pottery", "Pottery ")
            ),
            MEALS,
            SHOUT,
        ),
        "2 labels of one task that differ only in case, white space or Unicode form from another",
        ("crafts",),
        Example("crafts", "", "'Pottery ' 4, 'pottery' 4"),
    ),
    "repeated_inputs": (
        (changed(CRAFTS, 2, input="Sample 0 of crafts"), MEALS, SHOUT),
        "1 input repeated within one task with the same output",
        ("crafts",),
        Example("crafts", "Sample 0 of crafts", "2 train; output pottery"),
    ),
    "repeated_label_sets": (
        (*CLEAN, renamed(CRAFTS, "arts")),
        "1 label set of several tasks on one side",
        ("arts", "crafts"),
        Example("arts", "pottery, weaving", "train: arts, crafts"),
    ),
    "missing_ground_truth": (
        (CRAFTS, MEALS, dataclasses.replace(SHOUT, hard_prompts=())),
        "1 task with neither labels nor hard prompts",
        ("shout",),
        Example("shout", "", "8 pairs"),
    ),
    "long_pairs": (
        (CRAFTS, changed(changed(MEALS, 2, num_tokens=401), 3, num_tokens=400), SHOUT),
        "1 pair longer than 400 tokens",
        ("meals",),
        Example("meals", "Sample 2 of meals", "401 long"),
    ),
    "shared_inputs": (
        (CRAFTS, MEALS, changed(SHOUT, 5, input="Sample 1 of crafts")),
        "1 input in several tasks on one side",
        ("crafts", "shout"),
        Example("crafts", "Sample 1 of crafts", "2 tasks; train: crafts, shout"),
    ),
    "several_outputs": (
        (CRAFTS, MEALS, changed(SHOUT, 1, input="Sample 0 of shout", output="HO")),
        "1 input with several outputs within one generation task",
        ("shout",),
        Example("shout", "Sample 0 of shout", "2 train; output HEY | HO"),
    ),
    "near_duplicates": (
        (CRAFTS, MEALS, changed(SHOUT, 5, input="“Sample 0”, of-shout!")),
        "2 inputs of one task that differ only in punctuation or spacing from another",
        ("shout",),
        Example("shout", "Sample 0 of shout", "1 train and 1 validation; output HEY"),
    ),
    "other_labels_in_inputs": (
        (changed(CRAFTS, 0, input="Beside the weavers"), MEALS, SHOUT),
        "1 input with the word of another label of the task",
        ("crafts",),
        Example("crafts", "Beside the weavers", "label 'pottery', the input also has 'weaving'"),
    ),
    "held_out_words_in_hard_prompts": (
        (CRAFTS, MEALS, dataclasses.replace(SHOUT, hard_prompts=("Shout to the whole World.",))),
        "1 hard prompt of train tasks with a held-out word",
        ("shout",),
        Example("shout", "Shout to the whole World.", "world"),
    ),
}


@pytest.mark.parametrize("code", ALONE)
def test_a_finding_alone(code: str, tmp_path: Path) -> None:
    tasks, title, concerned, example = ALONE[code]
    audit = audit_of(tmp_path, *tasks)
    (finding,) = audit.findings
    count = int(title.split()[0])
    assert (finding.code, finding.title, finding.count, finding.tasks) == (code, title, count, concerned)
    assert finding.examples == (example,)
    severity = FINDING_KINDS[code].severity
    assert [audit.number_of(each) for each in SEVERITIES] == [int(severity == each) for each in SEVERITIES]
    assert audit.passed(strict=True) == (severity == "note")
    assert audit.passed(strict=False)
    rows = {row.name: (row.errors, row.warnings) for row in audit.rows}
    expected = (int(severity == "error"), int(severity == "warning"))
    assert rows == {task.name: expected if task.name in concerned else (0, 0) for task in tasks}


def test_what_makes_inputs_near_duplicates(tmp_path: Path) -> None:
    """Punctuation does, and symbols and the marks that are part of a letter do not."""
    inputs = ("I like it.", "i like it!!", "3 + 4", "3 < 4", "काम", "कम", "?", "!", "so good 😀", "so good 😡")
    task = Task("t", "generation", tuple(Pair(text, "x") for text in inputs), hard_prompts=("p",))
    findings = {f.code: f.count for f in audit_of(tmp_path, task).findings}
    assert findings == {"near_duplicates": 2, "tasks_without_validation_pairs": 1, "tasks_without_test_pairs": 1}


def test_a_copy_of_a_task(tmp_path: Path) -> None:
    """Five of eight inputs are more than half, four are not."""
    inputs = {number: f"Sample {number} of crafts" for number in range(5)}
    copy = SHOUT
    for number in range(4):
        copy = changed(copy, number, input=inputs[number])
    assert [(f.code, f.count) for f in audit_of(tmp_path / "a", CRAFTS, MEALS, copy).findings] == [("shared_inputs", 4)]
    audit = audit_of(tmp_path / "b", CRAFTS, MEALS, changed(copy, 4, input=inputs[4]))
    assert [(f.code, f.count) for f in audit.findings] == [("mostly_shared_tasks", 2), ("shared_inputs", 5)]
    assert audit.findings[0].title == "2 tasks with over 50 % of the inputs in other tasks of the same side"
    assert audit.findings[0].examples[1] == Example("shout", "", "5 of 8 different inputs")
    assert [row.shared_inputs for row in audit.rows] == [5, 0, 5]


def test_lengths_with_a_tokenizer(tmp_path: Path) -> None:
    from tiny_llm import tiny_tokenizer

    # A token per byte: "Sample 0 of shout" and "HEY" are 17 and 3; one pair has its own count.
    tasks = (CRAFTS, MEALS, dataclasses.replace(changed(SHOUT, 7, num_tokens=7), hard_prompts=("x" * 300, "y" * 301)))
    audit = audit_of(tmp_path, *tasks, tokenizer=tiny_tokenizer())
    assert audit.not_checked == {}
    assert audit.lengths.unit == "tokens"
    assert audit.pair_lengths == {"train": {7: 1, 20: 7, 25: 8}, "test": {21: 4, 22: 4}}
    (finding,) = audit.findings
    assert (finding.code, finding.title) == ("long_hard_prompts", "1 hard prompt longer than 300 tokens")
    assert finding.examples == (Example("shout", "y" * 199 + "…", "301 tokens"),)


def test_every_kind_of_finding_is_tested() -> None:
    assert {*ALONE, "mostly_shared_tasks", "long_hard_prompts"} == set(FINDING_KINDS)


def test_percentiles_and_units(tmp_path: Path) -> None:
    counted = Task(
        "t", "generation", tuple(Pair(f"i{n}", "o", num_tokens=n) for n in range(1, 101)), hard_prompts=("p",)
    )
    audit = audit_of(tmp_path / "a", counted, config=AuditConfig(max_pair_tokens=None, max_hard_prompt_tokens=None))
    assert dataclasses.astuple(audit.lengths) == ("tokens", 50, 90, 99, 100)
    one_side = "all tasks are train tasks"
    assert audit.not_checked == {
        "long_pairs": "the settings switch it off",
        "long_hard_prompts": "the settings switch it off",
        "inputs_on_both_sides": one_side,
        "label_sets_on_both_sides": one_side,
        "hard_prompts_on_both_sides": one_side,
    }
    assert audit_of(tmp_path / "b", *CLEAN, counted).lengths.unit == "tokens or words"


def test_what_is_worse_hides_what_is_less(tmp_path: Path) -> None:
    """A leak or a contradiction is not counted as a repetition too; a leak with two labels is both of the worse."""
    leak = changed(CRAFTS, 5, input="Sample 0 of crafts")  # weaving in validation, pottery in train
    leak = changed(leak, 2, input="Sample 0 of crafts")
    audit = audit_of(tmp_path, leak, MEALS, SHOUT)
    assert [(f.code, f.count) for f in audit.findings] == [("leaks_between_splits", 1), ("contradictions", 1)]
    assert audit.findings[0].examples[0].detail == "2 train and 1 validation; output pottery | weaving"
    row = audit.rows[0]
    assert (row.leaks, row.contradictions, row.repeated, row.errors, row.warnings) == (1, 1, 0, 1, 1)


def test_labels_of_several_words_and_of_one_letter(tmp_path: Path) -> None:
    pairs = pairs_about("it", ("not spam", "A"))
    task = Task("mail", "classification", pairs, labels=("not spam", "A"))
    task = changed(task, 0, input="This is not the spammer")  # both words of its label
    task = changed(task, 2, input="This is spam")  # one of two
    task = changed(task, 1, input="A spade is a spade")  # a single letter says nothing
    audit = audit_of(tmp_path, task, MEALS)
    assert {row.name: row.label_in_inputs for row in audit.rows} == {"mail": 1 / 8, "meals": 0}


def test_same_roots_are_those_of_the_vocabulary() -> None:
    labels = ["music", "bad", "happy", "die", "art", "carpet", "running", "mouse"]
    words = (
        "musicians music worse worst bad badly happiness happily unhappy dying died dice artery arts carp carpets ran run "
        "runner mice lie ugly skies mu café über"
    ).split()
    roots = SameRoots(labels)
    for word in words:
        assert roots[word] == {label for label in labels if same_root(label, word)}, word
    assert (
        roots["worse"] == {"bad"} and roots["mice"] == {"mouse"} and roots["dying"] == {"die"} and roots["lie"] == set()
    )


def messy_tasks() -> list[Task]:
    """Every kind of finding but those that need a tokenizer, some several times, in texts that HTML must not believe."""
    tasks = {}
    for code, (several, *_) in ALONE.items():
        for task in several:
            if task not in CLEAN:
                tasks[f"{code}: {task.name}"] = dataclasses.replace(task, name=f"{code}: {task.name}")
    evil = "<script>alert('&')</script>"
    pairs = (*pairs_about("evil", ("<b>bold</b>", "</style>")), Pair("Sample 0 of evil", "</style>"))
    tasks[evil] = Task(evil, "classification", pairs, labels=("<b>bold</b>", "</style>"))
    tasks["again"] = dataclasses.replace(tasks[evil], name="again", split="test")
    return [*CLEAN, *tasks.values()]


def test_order_of_tasks_and_pairs_does_not_matter(tmp_path: Path) -> None:
    tasks = messy_tasks()
    turned = [dataclasses.replace(task, pairs=task.pairs[::-1]) for task in tasks[::-1]]
    config = dataclasses.replace(CONFIG, max_examples=2)
    audit, other = (audit_of(tmp_path / name, *some, config=config) for name, some in (("a", tasks), ("b", turned)))
    assert len(audit.findings) == 24
    assert dataclasses.replace(other, path=audit.path) == audit
    for number, same in enumerate((audit, other)):
        write_audit_page(same, tmp_path / f"{number}.html")
    assert (tmp_path / "0.html").read_bytes() == (tmp_path / "1.html").read_bytes()


def test_verdict_and_table(tmp_path: Path) -> None:
    tasks = (*ALONE["repeated_label_sets"][0], *ALONE["held_out_labels"][0][3:])
    tasks = tuple(changed(task, 5, input="Sample 1 of crafts") if task is SHOUT else task for task in tasks)
    audit = audit_of(tmp_path, *tasks)
    assert audit.verdict == "1 error, 1 warning and 1 note in 5 tasks and 40 pairs."
    assert audit.passed(strict=False) and not audit.passed(strict=True)
    table = audit.table()
    assert table["name"] == ["arts", "crafts", "meals", "moods", "shout"]
    assert table["side"] == ["train", "train", "test", "train", "train"]
    assert table["balance"] == [1, 1, 1, 1, None]
    assert table["errors"] == [0, 0, 0, 1, 0]
    assert table["warnings"] == [1, 1, 0, 0, 0]


def test_json_is_small_and_kept_in_the_dod(tmp_path: Path) -> None:
    """Long names in a script of three bytes a letter, and far more tasks and examples than are kept."""
    long = "雨" * 300
    tasks = [dataclasses.replace(task, name=f"{n}{long}{task.name}") for n in range(8) for task in messy_tasks()]
    audit = audit_of(tmp_path, *tasks, config=dataclasses.replace(CONFIG, max_examples=100))
    assert len(audit.findings) == 24
    record = audit.to_json()
    assert len(json.dumps(record, ensure_ascii=False).encode()) < 200_000
    assert str(tmp_path) not in json.dumps(record)
    assert max(len(finding.examples) for finding in audit.findings) == 100
    assert max(len(finding["examples"]) for finding in record["findings"]) == 3
    assert max(len(finding["tasks"]) for finding in record["findings"]) == 10
    note_in_dod(audit.path, "audit", record)
    with DodStore.open(audit.path) as store:
        assert store.metadata()["audit"] == record
        assert store.digest == audit.digest
    assert audit_dod(audit.path, config=dataclasses.replace(CONFIG, max_examples=100)) == audit


@pytest.fixture
def page_of(tmp_path: Path) -> Callable[..., Page]:
    def write(*tasks: Task) -> Page:
        write_audit_page(audit_of(tmp_path, *tasks), tmp_path / "page.html")
        return Page((tmp_path / "page.html").read_text())

    return write


def test_page_shows_everything(page_of: Callable[..., Page], tmp_path: Path) -> None:
    page = page_of(*messy_tasks())
    assert "Numbers measured with this DoD would be wrong." in page.text
    assert [code for code, kind in FINDING_KINDS.items() if kind.why not in page.text] == ["long_hard_prompts"]
    assert page.count("figure") == page.count("svg") == 4
    assert page.count("article") == 24
    assert page.count("tbody") == 1
    assert (tmp_path / "page.html").stat().st_size < 1_000_000
    assert str(tmp_path) not in page.text


def test_page_of_a_clean_dod_and_of_generation_only(page_of: Callable[..., Page], tmp_path: Path) -> None:
    page = page_of(*CLEAN)
    assert "Good to use." in page.text
    assert "24 checks without a finding" in page.text
    assert "hard prompts longer than 300 tokens: it needs a tokenizer" in page.text
    assert (page.count("article"), page.count("table")) == (0, 0)
    (tmp_path / "made.dod").unlink()
    assert page_of(SHOUT).count("svg") == 2


def test_figures(tmp_path: Path) -> None:
    from matplotlib.patches import Rectangle

    audit = audit_of(tmp_path, *CLEAN, changed(renamed(SHOUT, "yell"), 0, num_tokens=5000))
    figures = {drawn.name: drawn.figure for drawn in audit_figures(audit)}
    names = ["pairs_per_task", "label_balance", "label_in_inputs", "pair_lengths"]
    assert list(figures) == names
    # Bars count every task with a value, and every pair.
    heights = {
        name: sum(bar.get_height() for bar in figure.axes[0].patches if isinstance(bar, Rectangle))
        for name, figure in figures.items()
    }
    assert heights == dict(zip(names, [4, 2, 2, 32], strict=True))
    assert figures["pair_lengths"].axes[0].get_xscale() == "log"


def test_memory_holds_one_task_and_not_the_dod(tmp_path: Path) -> None:
    filler = "lorem ipsum " * 160  # 1,920 letters; 10 tasks of 100 pairs are 2 MB
    tasks = (
        Task(f"t{t}", "generation", tuple(Pair(f"{t} {n} {filler}", "y") for n in range(100)), hard_prompts=("p",))
        for t in range(10)
    )
    path = write_dod(tmp_path / "a.dod", tasks)
    audit_of(tmp_path, *CLEAN)  # loads what it needs
    tracemalloc.start()
    try:
        audit = audit_dod(path, config=CONFIG)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert audit.sizes.pairs == 1_000
    assert peak < 1_500_000


def test_a_dod_without_tasks(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found no tasks; expected at least one. Build it again"):
        audit_of(tmp_path)
    with pytest.raises(DataError, match="there is no such file"):
        audit_dod(tmp_path / "other.dod", config=CONFIG)
