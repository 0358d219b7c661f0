"""The two out-of-domain sets: hotel reviews by fold, from a file or the corpus's folders, and essays."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from task_files import Row, csv_bytes, jsonl_bytes, parquet_bytes

from softprompt_registry.config import build_config
from softprompt_registry.dod.labelled_sets import LabelledSetsReport, OodConfig, build_dod_ood
from softprompt_registry.dod.store import DodStore
from softprompt_registry.dod.task import Task
from softprompt_registry.errors import DataError

REAL_REVIEWS = Path(__file__).parent.parent.parent / "shared" / "data" / "op_spam.jsonl.gz"
REVIEWS: list[Row] = [
    {"text": f"stay {fold} {label}", "label": label, "fold": fold, "hotel": "hilton"}
    for fold in range(1, 6)
    for label in ("truthful", "deceptive")
]


def build(
    out: Path, config: OodConfig | None = None, *, reviews: Path | None = None, essays: Path | None = None
) -> tuple[LabelledSetsReport, dict[str, Task], dict[str, Any]]:
    """The report, the tasks and the note of a build."""
    report = build_dod_ood(out, reviews=reviews, essays=essays, config=config or OodConfig(), overwrite=True)
    with DodStore.open(out) as store:
        assert store.digest == report.digest
        return report, {task.name: task for task in store.tasks()}, store.metadata()["build"]


def refused(
    folder: Path, config: OodConfig | None = None, *, reviews: Path | None = None, essays: Path | None = None
) -> str:
    """The message of a build that must fail and leave nothing behind."""
    with pytest.raises(DataError) as error:
        build_dod_ood(folder / "refused.dod", reviews=reviews, essays=essays, config=config or OodConfig())
    assert not [path.name for path in folder.iterdir() if "refused" in path.name]
    return str(error.value).removeprefix("building the out-of-domain sets: ")


def written(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def pairs_of(task: Task, split: Any) -> list[tuple[str, str]]:
    return [(pair.input, pair.output) for pair in task.pairs_of(split)]


# Hotel reviews


@pytest.mark.parametrize("name", ["r.csv", "r.parquet"])
def test_reviews_are_split_by_fold(tmp_path: Path, name: str) -> None:
    write_as = {"r.csv": csv_bytes, "r.parquet": parquet_bytes}[name]
    report, tasks, note = build(tmp_path / "out.dod", reviews=written(tmp_path / name, write_as(REVIEWS)))
    task = tasks["hotel_reviews"]
    assert (task.kind, task.split, task.labels) == ("classification", "test", ("truthful", "deceptive"))
    assert pairs_of(task, "train") == [
        (f"stay {fold} {label}", label) for fold in (1, 2, 3) for label in ("truthful", "deceptive")
    ]
    assert pairs_of(task, "validation") == [("stay 4 truthful", "truthful"), ("stay 4 deceptive", "deceptive")]
    assert pairs_of(task, "test") == [("stay 5 truthful", "truthful"), ("stay 5 deceptive", "deceptive")]
    assert task.hard_prompts == (
        "Tell whether a guest of the hotel wrote the review or somebody made it up, as one of: truthful, deceptive.",
    )
    assert task.source == name and list(tasks) == ["hotel_reviews"]
    assert note["builder"] == "ood" and note["settings"]["reviews_test_fold"] == 5
    assert note["sets"]["hotel_reviews"]["train"] == 6
    assert report.table()["set"] == ["hotel_reviews"] and report.table()["test"] == [2]
    config = OodConfig(reviews_test_fold=1, reviews_validation_fold=5)
    _, tasks, _ = build(tmp_path / "other.dod", config, reviews=tmp_path / name)
    assert [text for text, _ in pairs_of(tasks["hotel_reviews"], "test")] == ["stay 1 truthful", "stay 1 deceptive"]


def corpus(folder: Path) -> Path:
    """The corpus's own folders with the reviews of `REVIEWS`, and what unpacking on a Mac leaves beside them."""
    places = {"truthful": ("positive", "truthful_from_TripAdvisor"), "deceptive": ("negative", "deceptive_from_MTurk")}
    for number, row in enumerate(REVIEWS):
        polarity, label = places[row["label"]]
        fold = folder / "op_spam_v1.4" / f"{polarity}_polarity" / label / f"fold{row['fold']}"
        written(fold / f"t_hilton_{number}.txt", f"{row['text']}\n".encode())
        written(fold / f"._t_hilton_{number}.txt", b"\x00\xff")
    written(folder / "op_spam_v1.4" / "README", b"about")
    return folder


@pytest.mark.parametrize("below", ["", "op_spam_v1.4"])
def test_the_corpus_folders_give_the_same_task_as_a_file(tmp_path: Path, below: str) -> None:
    source = written(tmp_path / "r.jsonl", jsonl_bytes(REVIEWS))
    from_file, _, _ = build(tmp_path / "file.dod", reviews=source)
    from_folder, tasks, _ = build(tmp_path / "folder.dod", reviews=corpus(tmp_path / "op_spam") / below)
    assert from_folder.digest == from_file.digest
    assert tasks["hotel_reviews"].source == (below or "op_spam")


def test_truthful_reviews_from_the_web(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "op_spam")
    web = folder / "op_spam_v1.4" / "negative_polarity" / "truthful_from_Web" / "fold5"
    written(web / "a.txt", b"noisy")
    written(web / "b.txt", b" \n")
    report, tasks, _ = build(tmp_path / "out.dod", reviews=folder)
    assert ("noisy", "truthful") in pairs_of(tasks["hotel_reviews"], "test")
    assert report.sets[0].blank == 1


def test_reviews_without_folds_are_cut_by_shares(tmp_path: Path) -> None:
    rows: list[Row] = [{"text": f"stay {n}", "deceptive": ("truthful", "deceptive")[n % 2]} for n in range(100)]
    source = written(tmp_path / "deceptive-opinion.csv", csv_bytes(rows))
    report, tasks, _ = build(tmp_path / "a.dod", reviews=source)
    counts = Counter((pair.split, pair.output) for pair in tasks["hotel_reviews"].pairs)
    # 20 of 100 are test, and 8 of the other 80 validation
    assert counts == {
        ("train", "truthful"): 36,
        ("train", "deceptive"): 36,
        ("validation", "truthful"): 4,
        ("validation", "deceptive"): 4,
        ("test", "truthful"): 10,
        ("test", "deceptive"): 10,
    }
    assert len({pair.input for pair in tasks["hotel_reviews"].pairs}) == 100
    other, _, _ = build(tmp_path / "c.dod", OodConfig(seed=1), reviews=source)
    assert other.digest != report.digest


BAD_REVIEWS: list[tuple[bytes, str]] = [
    (
        jsonl_bytes([*REVIEWS, {"text": "a", "label": 1, "fold": 1}]),
        "'r.jsonl', line 11: found unknown labels in column 'label': '1'; expected 'truthful', 'deceptive', 'fake', "
        "'genuine'. Correct them, or say in `reviews_labels` what they mean.",
    ),
    (
        jsonl_bytes([*REVIEWS, {"text": "a", "label": "truthful", "fold": 6}]),
        "'r.jsonl', line 11: found fold 6; expected a number from 1 to 5. Correct it.",
    ),
    (
        jsonl_bytes([*REVIEWS, {"text": "a", "label": "truthful"}]),
        "'r.jsonl', line 11: found the columns ['text', 'label']; expected 'fold'.",
    ),
    (
        jsonl_bytes([row for row in REVIEWS if row["fold"] < 5]),
        "set 'hotel_reviews' has no rows left for test; expected some in every split.",
    ),
]


@pytest.mark.parametrize(("content", "message"), BAD_REVIEWS, ids=[message[:50] for _, message in BAD_REVIEWS])
def test_bad_review_files(tmp_path: Path, content: bytes, message: str) -> None:
    assert refused(tmp_path, reviews=written(tmp_path / "r.jsonl", content)).startswith(message)


def test_bad_review_folders(tmp_path: Path) -> None:
    assert refused(tmp_path, reviews=tmp_path).startswith(
        f"found no reviews in the folder {str(tmp_path)!r}; expected the corpus's text files, such as 'positive_polarity/"
    )
    bad = tmp_path / "a" / "truthful_from_Web" / "fold1" / "x.txt"
    written(bad, b"caf\xe9")
    assert refused(tmp_path, reviews=tmp_path) == (
        "'a/truthful_from_Web/fold1/x.txt': found bytes that are not UTF-8; expected text. Save it as UTF-8."
    )
    bad.unlink()
    bad = written(tmp_path / "a" / "truthful_from_Web" / "fold7" / "x.txt", b"fine")
    assert refused(tmp_path, reviews=tmp_path).startswith("'a/truthful_from_Web/fold7/x.txt': found fold '7'; expected")
    bad.unlink()
    written(tmp_path / "a" / "paid_from_Web" / "fold1" / "x.txt", b"fine")
    assert refused(tmp_path, reviews=tmp_path).startswith(
        "'a/paid_from_Web/fold1/x.txt': found the label 'paid' in its folder's name; expected truthful or deceptive."
    )


# Essays


def essay_rows(human: object, generated: object, column: str = "generated") -> list[Row]:
    return [{"text": f"essay {n}", column: generated if n % 2 else human} for n in range(20)]


def is_right(task: Task) -> bool:
    return all(pair.output == ("human", "generated")[int(pair.input.split()[1]) % 2] for pair in task.pairs)


def test_essay_columns_and_labels_can_be_configured(tmp_path: Path) -> None:
    rows = [{"essay": row["text"], "is_human": row["label"], "label": "x"} for row in essay_rows(1, 0, "label")]
    source = written(tmp_path / "e.csv", csv_bytes(rows))
    settings = {"essays_text_column": "essay", "essays_label_column": "is_human", "essays_labels": {1: "human"}}
    assert refused(tmp_path, build_config(OodConfig, settings), essays=source) == (
        "'e.csv', line 3: found unknown labels in column 'is_human': '0'; expected 'human', 'generated', 'human written', "
        "'human written essay', 'ai', 'ai generated', 'ai generated essay', 'machine generated', '1'. Correct them, or say "
        "in `essays_labels` what they mean."
    )
    settings["essays_labels"] = {1: "human", 0: "generated"}
    _, tasks, note = build(tmp_path / "out.dod", build_config(OodConfig, settings), essays=source)
    assert is_right(tasks["essays"])
    assert note["settings"]["essays_labels.1"] == "human"


@pytest.mark.parametrize(
    ("name", "found"), [("none.csv", "nothing"), ("e.txt", "a file of another kind"), ("d", "a folder")]
)
def test_bad_essay_paths(tmp_path: Path, name: str, found: str) -> None:
    written(tmp_path / "e.txt", b"essay")
    (tmp_path / "d").mkdir()
    path = tmp_path / name
    assert refused(tmp_path, essays=path).startswith(
        f"found {found} at {str(path)!r}; expected a file that ends in one of"
    )


# Both reviews and essays


def test_both_sets_in_one_dod(tmp_path: Path) -> None:
    reviews = written(tmp_path / "r.jsonl", jsonl_bytes(REVIEWS))
    source = written(tmp_path / "e.csv", csv_bytes(essay_rows(0, 1)))
    report, tasks, note = build(tmp_path / "out.dod", reviews=reviews, essays=source)
    assert list(tasks) == report.table()["set"] == ["hotel_reviews", "essays"]
    assert report.table()["source"] == ["r.jsonl", "e.csv"] and set(note["sets"]) == {"hotel_reviews", "essays"}
    _, alone, _ = build(tmp_path / "alone.dod", essays=source)
    assert alone["essays"] == tasks["essays"]
    assert str(tmp_path) not in json.dumps(note)


def test_at_least_one_set_and_a_free_name(tmp_path: Path) -> None:
    assert refused(tmp_path) == "found neither reviews nor essays; expected a path to at least one. Give one."
    (tmp_path / "out.dod").write_text("mine")
    with pytest.raises(DataError, match="exists already"):
        build_dod_ood(tmp_path / "out.dod", reviews=tmp_path, config=OodConfig())


@pytest.mark.skipif(not REAL_REVIEWS.is_file(), reason="the real reviews are not beside this checkout")
def test_the_real_reviews(tmp_path: Path) -> None:
    report, tasks, _ = build(tmp_path / "out.dod", reviews=REAL_REVIEWS)
    counts = report.sets[0]
    assert (counts.train, counts.validation, counts.test, counts.duplicates) == (956, 320, 320, 4)
    assert (counts.leaked, counts.contradicting, counts.blank) == (0, 0, 0)
    assert tasks["hotel_reviews"].labels == ("truthful", "deceptive")
    outputs = Counter(pair.output for pair in tasks["hotel_reviews"].pairs_of("test"))
    assert outputs == {"truthful": 160, "deceptive": 160}
