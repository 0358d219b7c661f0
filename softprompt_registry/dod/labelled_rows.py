"""The labelled rows of a classification set, from files, saved copies or the Hugging Face Hub: which column is which, and how
labels are spelled. `labelled_sets` makes tasks of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from softprompt_registry.dod.file_rows import ENDINGS, Fault, ending_of, is_text, rows_of, unit_of
from softprompt_registry.dod.hub import datasets_library
from softprompt_registry.dod.task import PairSplit
from softprompt_registry.errors import DataError

SPLITS: tuple[PairSplit, ...] = ("train", "validation", "test")
"""A text that occurs in several splits stays in the last of these."""
NUM_FOLDS = 5
MAX_SHOWN_LABELS = 8

Row = tuple[str, Mapping[str, Any]]
"""Where a row is, as messages name it, and its cells by column."""
Labelled = tuple[str, str]
"""A text and our label word for it."""


@dataclass(frozen=True)
class LabelledSet:
    """A classification set: how its publishers write it, and what it is here."""

    name: str
    labels: tuple[str, ...]
    question: str
    """What to do with a text; the hard prompt is this and the labels."""
    hub: str | None = None
    """The set's repository on the Hub; None for a set that is read from files alone."""
    text_columns: tuple[str, ...] = ("text",)
    """The first of these that is there has the text."""
    label_columns: tuple[str, ...] = ("label",)
    """The first of these that is there has the label; words stand before numbers, whose order differs between copies."""
    words: Mapping[str, str] = field(default_factory=dict)
    """Other spelling of a label → our word."""
    numbers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Label column → our words for 0, 1, … in it; in other columns a number is an unknown label."""
    fold_column: str | None = None
    """The column of a row's fold, in copies that have one."""
    advice: str = "Correct them."
    """What to do about labels that are not known."""

    @property
    def hard_prompt(self) -> str:
        return f"{self.question} as one of: {', '.join(self.labels)}."

    def words_in(self, column: str) -> dict[str, str]:
        """Every known spelling of a label in `column` → our word."""
        numbers = {str(number): label for number, label in enumerate(self.numbers.get(column, ()))}
        known = {**{label: label for label in self.labels}, **numbers, **self.words}
        return {spelling(found): label for found, label in known.items()}


def spelling(label: object) -> str:
    """A label without what copies of a set differ in: case, hyphens, slashes, `True` for 1, `1.0` for 1."""
    text = str(label).strip().casefold().removesuffix(".0")
    return {"true": "1", "false": "0"}.get(text) or re.sub(r"(?<=\w)[-_/\s]+(?=\w)", " ", text)


@dataclass(frozen=True)
class SplitRows:
    """The rows of one split that have a text and a label, and how many have not."""

    rows: Sequence[Labelled] = ()
    blank: int = 0
    unlabelled: int = 0


Splits = dict[PairSplit, SplitRows]
Found = tuple[Splits, str]
"""The rows of a set, and what to call their origin."""


def from_folder(known: LabelledSet, folder: Path, doing: str) -> Found:
    """The splits of a set in a local folder, and what to call their origin."""
    files: dict[PairSplit, Path] = {}
    names = {f"{known.name}_{split}": split for split in SPLITS}
    for path in sorted(folder.iterdir()):
        split = names.get(path.name.removesuffix(ending_of(path.name) or path.name))
        if split is None or not path.is_file():
            continue
        if split in files:
            raise DataError(
                f"{doing}: {path.name!r} and {files[split].name!r} both hold the {split} split of {known.name!r}; "
                "expected one file for each split. Remove one of them."
            )
        files[split] = path
    if files:
        splits = {split: _labelled_rows(known, _rows_of_file(path, doing)) for split, path in files.items()}
        return splits, ", ".join(path.name for path in files.values())
    copy = folder / known.name
    if not copy.is_dir():
        raise DataError(
            f"{doing}: nothing of the set {known.name!r} is there; expected {known.name}_train, {known.name}_validation and "
            f"{known.name}_test, each ending in one of {', '.join(ENDINGS)}, or a subfolder {known.name!r} as `datasets` "
            "saves it. Add them, or leave the set out of `sets`."
        )
    saved = (copy / "dataset_dict.json").is_file()
    with datasets_library(f"{doing}: reading {str(copy)!r}", "files that it can load") as datasets:
        loaded = datasets.load_from_disk(str(copy)) if saved else datasets.load_dataset(str(copy.resolve()))
        return _loaded_splits(known, loaded, known.name, doing), f"the folder {known.name}"


def from_hub(known: LabelledSet, place: str, doing: str) -> Found:
    """The splits of a set on the Hub, and its repository with the commit that was read."""
    repository, _, revision = place.partition("@")
    with datasets_library(f"{doing}: loading {place!r}") as datasets:
        loaded = datasets.load_dataset(repository, revision=revision or None)
        # The cache of `datasets` has a folder for each commit; where it has not, what was asked for has to do.
        cached = next((file["filename"] for files in loaded.cache_files.values() for file in files), "")
        commit = re.search(r"/([0-9a-f]{40})/", cached)
        splits = _loaded_splits(known, loaded, repository, doing)
    return splits, f"{repository}@{commit[1]}" if commit else place


def _loaded_splits(known: LabelledSet, loaded: Any, place: str, doing: str) -> Splits:
    """What `datasets` loaded, split by split; labels by their names where it knows them."""

    def rows(dataset: Any, where: str) -> Iterator[Row]:
        names = {column: getattr(feature, "names", None) for column, feature in dataset.features.items()}
        for number, row in enumerate(dataset.to_list(), start=1):
            for column, classes in names.items():
                if classes and row[column] in range(len(classes)):
                    row[column] = classes[row[column]]
            yield f"{where}, row {number}", row

    found = [split for split in SPLITS if isinstance(loaded, Mapping) and split in loaded]
    return {
        split: _labelled_rows(known, rows(loaded[split], f"{doing}: {place!r}, split {split!r}")) for split in found
    }


def with_test_rows(splits: Splits, where: str) -> Splits:
    """Where the test rows have no labels, or there are none, the validation rows take their place."""
    if "test" in splits and splits["test"].rows:
        return splits
    if "validation" not in splits or not splits["validation"].rows:
        found = ", ".join(f"{len(rows.rows)} in {split}" for split, rows in splits.items()) or "none"
        raise DataError(
            f"{where}: found these labelled rows: {found}; expected some in test, or in validation to serve as test. Add "
            "that split."
        )
    unlabelled = splits["test"].unlabelled if "test" in splits else 0
    splits["test"] = replace(splits.pop("validation"), unlabelled=unlabelled)
    return splits


def from_path(known: LabelledSet, path: Path, held_out: Mapping[int, PairSplit], doing: str) -> Found:
    """The rows of a file or of the reviews' own folders by split, or all as train where they have no folds.

    Args:
        held_out: fold → its split; the other folds are train.
    """
    if path.is_dir() and known.fold_column:
        rows = _review_files(known, path, doing)
    elif path.is_file() and ending_of(path.name) is not None:
        rows = _rows_of_file(path, doing)
    else:
        found = "a file of another kind" if path.is_file() else "a folder" if path.is_dir() else "nothing"
        raise DataError(
            f"{doing}: found {found} at {str(path)!r}; expected a file that ends in one of {', '.join(ENDINGS)}. Correct "
            "the path."
        )
    origin = path.resolve().name
    if known.fold_column is None:
        return {"train": _labelled_rows(known, rows)}, origin
    all_rows = list(rows)
    if not all_rows or known.fold_column not in all_rows[0][1]:
        return {"train": _labelled_rows(known, all_rows)}, origin
    by_split: dict[PairSplit, list[Row]] = {split: [] for split in SPLITS}
    for where, row in all_rows:
        found = row[_column((known.fold_column,), row, where)]
        fold = str(found).strip().removesuffix(".0")
        if fold not in map(str, range(1, NUM_FOLDS + 1)):
            raise DataError(f"{where}: found fold {found!r}; expected a number from 1 to {NUM_FOLDS}. Correct it.")
        by_split[held_out.get(int(fold), "train")].append((where, row))
    return {split: _labelled_rows(known, there) for split, there in by_split.items()}, origin


def _review_files(known: LabelledSet, folder: Path, doing: str) -> Iterator[Row]:
    """Text, label and fold of every review in the corpus's own folders, in the order of their paths."""
    paths = sorted(path for path in folder.rglob("*_from_*/fold*/*.txt") if not path.name.startswith("."))
    if not paths:
        raise DataError(
            f"{doing}: found no reviews in the folder {str(folder)!r}; expected the corpus's text files, such as "
            "'positive_polarity/truthful_from_TripAdvisor/fold1/….txt'. Correct the path."
        )
    for path in paths:
        where = f"{doing}: {path.relative_to(folder).as_posix()!r}"
        label = path.parent.parent.name.partition("_from_")[0]
        if label not in known.labels:
            raise DataError(
                f"{where}: found the label {label!r} in its folder's name; expected {' or '.join(known.labels)}. Correct it."
            )
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: found bytes that are not UTF-8; expected text. Save it as UTF-8.") from error
        yield where, {"text": text, "label": label, "fold": path.parent.name.removeprefix("fold")}


def _rows_of_file(path: Path, doing: str) -> Iterator[Row]:
    for number, row in rows_of(path):
        where = f"{doing}: {path.name!r}, {unit_of(path)} {number}"
        if isinstance(row, Fault):
            raise DataError(f"{where}: found {row.found}; expected {row.expected}. {row.advice}")
        yield where, row


def _column(wanted: Sequence[str], row: Mapping[str, Any], where: str) -> str:
    """The first of the wanted columns that a row has."""
    for name in wanted:
        if name in row:
            return name
    raise DataError(
        f"{where}: found the columns {list(row)}; expected {' or '.join(map(repr, wanted))}. Rename the column that has it."
    )


def _labelled_rows(known: LabelledSet, found: Iterable[Row]) -> SplitRows:
    """The rows of a split with our words for their labels; the columns of text and label are those of the first row.

    A label that is -1 or empty was not published. That may be so for a whole split, not for some of its rows.
    """
    text_columns, label_columns = known.text_columns, known.label_columns
    words: dict[str, str] = {}
    rows: list[Labelled] = []
    blank = 0
    unlabelled: list[str] = []
    unknown: dict[str, str] = {}  # label → where it is first seen
    for where, row in found:
        text_column, label_column = _column(text_columns, row, where), _column(label_columns, row, where)
        text_columns, label_columns = (text_column,), (label_column,)
        words = words or known.words_in(label_column)
        text, label = row[text_column], row[label_column]
        if text is None or (isinstance(text, str) and not text.strip()):
            blank += 1
        elif not isinstance(text, str) or not is_text(text):
            shown = f"{type(text).__name__} {text!r}"[:60]
            raise DataError(f"{where}: found {shown} as text; expected a string of Unicode text. Correct it.")
        elif label is None or str(label).strip() in ("", "-1"):
            unlabelled.append(where)
        elif (word := words.get(spelling(label))) is None:
            unknown.setdefault(str(label), where)
        else:
            rows.append((text.strip(), word))
    if unknown:
        more = ", …" if len(unknown) > MAX_SHOWN_LABELS else ""
        raise DataError(
            f"{next(iter(unknown.values()))}: found unknown labels in column {label_columns[0]!r}: "
            f"{', '.join(map(repr, list(unknown)[:MAX_SHOWN_LABELS]))}{more}; expected {', '.join(map(repr, words))}. "
            f"{known.advice}"
        )
    if unlabelled and rows:
        raise DataError(
            f"{unlabelled[0]}: found no label there and in {len(unlabelled) - 1} other rows; expected all rows of a "
            "split to have one, or none. Add or remove them."
        )
    return SplitRows(rows, blank, len(unlabelled))
