"""From labelled rows to a classification task: which column is which, how labels are spelled, what is dropped, which pairs
are drawn. Every labelled set of `inspect_datasets` and `ood_datasets` goes this way.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from softprompt_registry.dod.file_rows import Fault, is_text, rows_of, unit_of
from softprompt_registry.dod.store import DodStore
from softprompt_registry.dod.task import Pair, PairSplit, Task
from softprompt_registry.errors import ConfigError, DataError

SPLITS: tuple[PairSplit, ...] = ("train", "validation", "test")
"""A text that occurs in several splits stays in the last of these."""
MAX_SHOWN_LABELS = 8

Cells = Iterable[tuple[int, object, object]]
"""Number of a row, its text and its label, both as found."""
Labelled = tuple[str, str]
"""A text and our label word for it."""


@dataclass(frozen=True)
class LabelledSet:
    """A classification set: how it is written by those who publish it, and what it is here."""

    name: str
    labels: tuple[str, ...]
    question: str
    """What to do with a text; its hard prompt goes on with the labels."""
    text_columns: tuple[str, ...] = ("text",)
    """The first of these that is there has the text."""
    label_columns: tuple[str, ...] = ("label",)
    """The first of these that is there has the label; words stand before numbers, whose order differs between copies."""
    words: Mapping[str, str] = field(default_factory=dict)
    """Other spelling of a label → our word."""
    numbers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Label column → our words for 0, 1, … in it; in other columns a number is an unknown label."""
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


class PairSettings(Protocol):
    """What the settings of both builders say about pairs."""

    @property
    def max_train_pairs(self) -> int | None: ...
    @property
    def max_validation_pairs(self) -> int | None: ...
    @property
    def max_test_pairs(self) -> int | None: ...
    @property
    def validation_share(self) -> float: ...
    @property
    def seed(self) -> int: ...


def check_pair_settings(config: PairSettings, doing: str) -> None:
    for split in SPLITS:
        count = getattr(config, f"max_{split}_pairs")
        if count is not None and count < 1:
            raise ConfigError(
                f"{doing}: max_{split}_pairs is {count}; expected 1 or more, or null for all pairs. Correct it."
            )
    if not 0 < config.validation_share < 1:
        raise ConfigError(
            f"{doing}: validation_share is {config.validation_share}; expected a share between 0 and 1. Correct it."
        )


@dataclass(frozen=True)
class SetCounts:
    """What became of one set's rows."""

    name: str
    train: int
    validation: int
    test: int
    """Pairs in the DoD, after any draw."""
    duplicates: int
    """Rows dropped because text and label stand earlier in the same split."""
    leaked: int
    """Rows dropped because their text is held out: train rows also in validation or test, validation rows also in test."""
    contradicting: int
    """Texts dropped everywhere because they have more than one label in the set."""
    blank: int
    """Rows dropped because they have no text."""
    unlabelled: int
    """Rows of a split whose labels were not published."""
    source: str


@dataclass(frozen=True)
class LabelledSetsReport:
    """The DoD that was written, and what became of each set."""

    path: Path
    digest: str
    sets: tuple[SetCounts, ...]

    def table(self) -> dict[str, list[Any]]:
        """A column for each count, a row for each set."""
        rows = [asdict(counts) for counts in self.sets]
        return {"set" if key == "name" else key: [row[key] for row in rows] for key in rows[0]}


@dataclass(frozen=True)
class SplitRows:
    """The rows of one split that have a text and a label, and how many have not."""

    rows: Sequence[Labelled] = ()
    blank: int = 0
    unlabelled: int = 0


def read_file(known: LabelledSet, path: Path, doing: str) -> SplitRows:
    """The labelled rows of one file."""
    text, label = columns_of(known, path, doing)
    cells = ((number, row[text], row[label]) for number, row in cells_of(path, (text, label), doing))
    return labelled_rows(known, label, cells, f"{doing}: {path.name!r}, {unit_of(path)}")


def column_names(path: Path) -> list[str]:
    """A file's columns (in JSON the keys of its first object); empty where it cannot be read."""
    if path.name.lower().endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        try:
            return list(pyarrow.parquet.read_schema(path).names)
        except (OSError, pyarrow.ArrowException):
            return []
    for _, row in rows_of(path, ()):
        return [] if isinstance(row, Fault) else list(row)
    return []


def columns_of(known: LabelledSet, path: Path, doing: str) -> tuple[str, str]:
    """The columns of text and label in a file."""
    found = column_names(path)
    if not found:  # reading the rows will tell why
        return known.text_columns[0], known.label_columns[0]
    where = f"{doing}: {path.name!r}, {unit_of(path)} 1"
    return first_column(known.text_columns, found, where), first_column(known.label_columns, found, where)


def first_column(wanted: Sequence[str], found: Sequence[str], where: str) -> str:
    for name in wanted:
        if name in found:
            return name
    raise DataError(
        f"{where}: found the columns {list(found)}; expected {' or '.join(map(repr, wanted))}. Rename the column that has it."
    )


def cells_of(path: Path, columns: Sequence[str], doing: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a file with their numbers; every row has the columns."""
    for number, row in rows_of(path, columns):
        where = f"{doing}: {path.name!r}, {unit_of(path)} {number}"
        if isinstance(row, Fault):
            raise DataError(f"{where}: found {row.found}; expected {row.expected}. {row.advice}")
        for column in columns:
            first_column((column,), list(row), where)
        yield number, row


def labelled_rows(known: LabelledSet, column: str, cells: Cells, where: str) -> SplitRows:
    """The rows with our words for the labels in `column`; `where` is followed by a row's number.

    A label that is -1 or empty was not published. That may be so for a whole split, not for some of its rows.
    """
    words = known.words_in(column)
    rows: list[Labelled] = []
    blank = 0
    unlabelled: list[int] = []
    unknown: dict[str, int] = {}  # label → the row where it is first seen
    for number, text, label in cells:
        if text is None or (isinstance(text, str) and not text.strip()):
            blank += 1
        elif not isinstance(text, str) or not is_text(text):
            found = f"{type(text).__name__} {text!r}"[:60]
            raise DataError(f"{where} {number}: found {found} as text; expected a string of Unicode text. Correct it.")
        elif label is None or str(label).strip() in ("", "-1"):
            unlabelled.append(number)
        elif (word := words.get(spelling(label))) is None:
            unknown.setdefault(str(label), number)
        else:
            rows.append((text.strip(), word))
    if unknown:
        shown = ", ".join(map(repr, list(unknown)[:MAX_SHOWN_LABELS])) + (
            ", …" if len(unknown) > MAX_SHOWN_LABELS else ""
        )
        raise DataError(
            f"{where} {next(iter(unknown.values()))}: found unknown labels in column {column!r}: {shown}; expected "
            f"{', '.join(map(repr, words))}. {known.advice}"
        )
    if unlabelled and rows:
        raise DataError(
            f"{where} {unlabelled[0]}: found no label there and in {len(unlabelled) - 1} other rows; expected all rows of a "
            "split to have one, or none. Add or remove them."
        )
    return SplitRows(rows, blank, len(unlabelled))


def labelled_task(
    known: LabelledSet,
    splits: Mapping[PairSplit, SplitRows],
    config: PairSettings,
    *,
    origin: str,
    doing: str,
    test_share: float | None = None,
) -> tuple[Task, SetCounts]:
    """The task of a set and what became of its rows: first they are cleaned, then missing splits cut, then pairs drawn.

    Args:
        test_share: share of the train rows that becomes the test pairs where `splits` has none; None if it must have.
    """
    rows, dropped = _cleaned(splits)
    found = {label for kept in rows.values() for _, label in kept}
    if found != set(known.labels):
        raise DataError(
            f"{doing}: set {known.name!r} has usable rows of the labels {sorted(found)}; expected some of each of "
            f"{list(known.labels)}. Check that the files are whole."
        )
    shares: dict[PairSplit, float | None] = {"test": test_share, "validation": config.validation_share}
    for split, share in shares.items():
        if not rows[split] and share is not None:
            count = max(round(len(rows["train"]) * share), 1)
            rows[split], rows["train"] = _draw(rows["train"], count, f"{config.seed}/{known.name}/{split}")
    empty = [split for split, kept in rows.items() if not kept]
    if empty:
        raise DataError(
            f"{doing}: set {known.name!r} has no rows left for {' and '.join(empty)}; expected some in every split. Add "
            "rows, or check whether its splits hold the same texts."
        )
    for split in SPLITS:
        limit = getattr(config, f"max_{split}_pairs")
        rows[split], _ = _draw(rows[split], limit, f"{config.seed}/{known.name}/{split} pairs")
    task = Task(
        name=known.name,
        kind="classification",
        split="test",
        labels=known.labels,
        hard_prompts=(known.hard_prompt,),
        source=origin,
        pairs=tuple(Pair(text, label, split) for split in SPLITS for text, label in rows[split]),
    )
    return task, SetCounts(
        name=known.name,
        train=len(rows["train"]),
        validation=len(rows["validation"]),
        test=len(rows["test"]),
        **dropped,
        blank=sum(read.blank for read in splits.values()),
        unlabelled=sum(read.unlabelled for read in splits.values()),
        source=origin,
    )


def _cleaned(splits: Mapping[PairSplit, SplitRows]) -> tuple[dict[PairSplit, list[Labelled]], dict[str, int]]:
    """Every text once, in the split that is held out furthest; and how many rows or texts went for which reason."""
    labels: dict[str, set[str]] = {}
    for read in splits.values():
        for text, label in read.rows:
            labels.setdefault(text, set()).add(label)
    dropped = {"duplicates": 0, "leaked": 0, "contradicting": sum(len(found) > 1 for found in labels.values())}
    place: dict[str, PairSplit] = {}
    kept: dict[PairSplit, list[Labelled]] = {split: [] for split in SPLITS}
    for split in reversed(SPLITS):
        for text, label in splits[split].rows if split in splits else ():
            if len(labels[text]) > 1:
                continue
            if text in place:
                dropped["duplicates" if place[text] == split else "leaked"] += 1
                continue
            place[text] = split
            kept[split].append((text, label))
    return kept, dropped


def _draw(rows: list[Labelled], count: int | None, seed: str) -> tuple[list[Labelled], list[Labelled]]:
    """`count` of the rows with the labels in proportion, and the others, both in their order.

    The i-th of n shuffled rows of a label gets the key i / n, and the smallest keys are drawn: first a row of every label.
    """
    if count is None or len(rows) <= count:
        return rows, []
    places: dict[str, list[int]] = {}
    for place, (_, label) in enumerate(rows):
        places.setdefault(label, []).append(place)
    generator = random.Random(seed)
    keyed: list[tuple[float, str, int]] = []
    for label in sorted(places):
        generator.shuffle(places[label])
        keyed += [(i / len(places[label]), label, place) for i, place in enumerate(places[label])]
    drawn = {place for _, _, place in sorted(keyed)[:count]}
    chosen = [row for place, row in enumerate(rows) if place in drawn]
    return chosen, [row for place, row in enumerate(rows) if place not in drawn]


def note_build(store: DodStore, builder: str, made_from: Mapping[str, Any], counts: Sequence[SetCounts]) -> None:
    """Write down how the sets were made."""
    sets = {counted.name: asdict(counted) for counted in counts}
    store.set_metadata("build", {"builder": builder, **made_from, "sets": sets})
