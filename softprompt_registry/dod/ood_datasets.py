"""Two classification sets from outside the evaluation sets' domain (paper section 5.1.3): reviews of hotels, truthful or
deceptive, and essays, by humans or generated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from softprompt_registry.config import flatten
from softprompt_registry.dod.file_rows import ENDINGS, ending_of, unit_of
from softprompt_registry.dod.labelled_sets import (
    SPLITS,
    LabelledSet,
    LabelledSetsReport,
    SplitRows,
    cells_of,
    check_pair_settings,
    column_names,
    columns_of,
    labelled_rows,
    labelled_task,
    note_build,
    read_file,
)
from softprompt_registry.dod.store import dod_written_whole, require_free
from softprompt_registry.dod.task import PairSplit
from softprompt_registry.errors import ConfigError, DataError
from softprompt_registry.recording import NullRecorder, Recorder

NUM_FOLDS = 5

REVIEWS = LabelledSet(
    "hotel_reviews",
    ("truthful", "deceptive"),
    "Tell whether a guest of the hotel wrote the review or somebody made it up,",
    label_columns=("label", "deceptive"),
    words={"fake": "deceptive", "genuine": "truthful"},
    numbers={"deceptive": ("truthful", "deceptive")},
    advice="Correct them, or say in `reviews_labels` what they mean.",
)
ESSAYS = LabelledSet(
    "essays",
    ("human", "generated"),
    "Tell whether a person or a language model wrote the essay,",
    label_columns=("generated", "label"),
    words={
        "human-written": "human",
        "human written essay": "human",
        "ai": "generated",
        "ai-generated": "generated",
        "ai generated essay": "generated",
        "machine-generated": "generated",
    },
    numbers={"generated": ("human", "generated"), "label": ("human", "generated")},
    advice="Correct them, or say in `essays_labels` what they mean.",
)


@dataclass(frozen=True)
class OodConfig:
    """How the files of the two sets are read, and how many pairs each gets."""

    reviews_text_column: str = "text"
    """Column (CSV, TSV, Parquet) or key (JSON, JSON Lines) of a review."""
    reviews_label_column: str | None = None
    """Column of its label; None takes `label` or else `deceptive`."""
    reviews_labels: dict[str, str] = field(default_factory=dict)
    """Label in the file → truthful or deceptive, for labels that are not known without it."""
    reviews_validation_fold: int = 4
    """Fold, from 1 to 5, of the validation reviews, where the file has a column `fold` or the folder has folders for them."""
    reviews_test_fold: int = 5
    """Fold of the test reviews; the others are train."""
    essays_text_column: str = "text"
    """Column or key of an essay."""
    essays_label_column: str | None = None
    """Column of its label; None takes `generated` or else `label`, in both of which 1 is read as generated."""
    essays_labels: dict[str, str] = field(default_factory=dict)
    """Label in the file → human or generated, for labels that are not known without it."""
    max_train_pairs: int | None = 5000
    """Draw at most this many train pairs of each set by `seed`, keeping the balance of labels; None keeps all."""
    max_validation_pairs: int | None = 1000
    """The same for validation pairs."""
    max_test_pairs: int | None = 1000
    """The same for test pairs."""
    test_share: float = 0.2
    """Share of all pairs that becomes the test pairs of a set without folds, cut by `seed`."""
    validation_share: float = 0.1
    """Share of the other pairs that becomes the validation pairs of a set without them, cut by `seed`."""
    seed: int = 0
    """Seed of every draw; it is combined with the set's name, so that one set does not depend on the other."""

    def __post_init__(self) -> None:
        doing = "reading the config of the out-of-domain sets"
        check_pair_settings(self, doing)
        if not 0 < self.test_share < 1:
            raise ConfigError(
                f"{doing}: test_share is {self.test_share}; expected a share between 0 and 1. Correct it."
            )
        folds = (self.reviews_validation_fold, self.reviews_test_fold)
        if len(set(folds)) != 2 or not set(folds) <= set(range(1, NUM_FOLDS + 1)):
            raise ConfigError(
                f"{doing}: reviews_validation_fold and reviews_test_fold are {folds[0]} and {folds[1]}; expected two "
                f"numbers from 1 to {NUM_FOLDS}. Correct them."
            )
        for key, known in (("reviews_labels", REVIEWS), ("essays_labels", ESSAYS)):
            wrong = sorted(set(getattr(self, key).values()) - set(known.labels))
            if wrong:
                raise ConfigError(
                    f"{doing}: {key} maps labels to {wrong}; expected only {list(known.labels)}. Correct them."
                )


def build_dod_ood(
    out: Path,
    *,
    reviews: Path | None = None,
    essays: Path | None = None,
    config: OodConfig,
    overwrite: bool = False,
    recorder: Recorder | None = None,
) -> LabelledSetsReport:
    """Write one or both sets into the DoD `out`, whole or not at all: classification tasks of split "test".

    Texts are cleaned as in `inspect_datasets.build_dod_inspect`.

    Args:
        out: the DoD to write; its folder is made where missing.
        reviews: the Deceptive Opinion Spam Corpus: its own folder, with a text file for each review in
            `…/deceptive_from_MTurk/fold1` and the like, or a CSV, JSON Lines or Parquet file with text, label and
            optionally `fold`. Without folds the splits are cut by shares.
        essays: a CSV, JSON Lines or Parquet file of essays with text and label.
        config: see `OodConfig`.
        overwrite: replace `out` if it exists.
        recorder: hears of the progress.

    Raises:
        DataError: `out` exists, no set is given, or a file or label cannot be used.
    """
    doing = "building the out-of-domain sets"
    sources = [
        (_configured(REVIEWS, config.reviews_text_column, config.reviews_label_column, config.reviews_labels), reviews),
        (_configured(ESSAYS, config.essays_text_column, config.essays_label_column, config.essays_labels), essays),
    ]
    given = [(known, path) for known, path in sources if path is not None]
    if not given:
        raise DataError(f"{doing}: found neither reviews nor essays; expected a path to at least one. Give one.")
    require_free(out, doing, overwrite=overwrite)
    with dod_written_whole(out, doing, overwrite=overwrite) as store:
        counts = []
        with (recorder or NullRecorder()).progress("out-of-domain sets", len(given)) as bar:
            for known, path in given:
                if known.name == REVIEWS.name:
                    splits = _read_reviews(known, path, config, doing)
                else:
                    _require_file(path, doing)
                    splits = {"train": read_file(known, path, doing)}
                share = None if "test" in splits else config.test_share
                task, counted = labelled_task(
                    known, splits, config, origin=path.resolve().name, doing=doing, test_share=share
                )
                store.add_task(task)
                counts.append(counted)
                bar.advance(note=known.name)
        note_build(store, "ood", {"settings": flatten(config)}, counts)
        digest = store.digest
    return LabelledSetsReport(path=out, digest=digest, sets=tuple(counts))


def _configured(known: LabelledSet, text: str, label: str | None, labels: Mapping[str, str]) -> LabelledSet:
    return replace(
        known,
        text_columns=(text,),
        label_columns=(label,) if label else known.label_columns,
        words={**known.words, **labels},
    )


def _require_file(path: Path, doing: str) -> None:
    if not path.is_file() or ending_of(path.name) is None:
        found = "a file of another kind" if path.is_file() else "a folder" if path.is_dir() else "nothing"
        raise DataError(
            f"{doing}: found {found} at {str(path)!r}; expected a file that ends in one of {', '.join(ENDINGS)}. Correct "
            "the path."
        )


def _read_reviews(known: LabelledSet, path: Path, config: OodConfig, doing: str) -> dict[PairSplit, SplitRows]:
    """The reviews by split, or all as train where they have no folds."""
    splits: dict[PairSplit, list[tuple[int, object, object]]] = {split: [] for split in SPLITS}
    if path.is_dir():
        for number, (split, text, label) in enumerate(_review_files(known, path, config, doing), start=1):
            splits[split].append((number, text, label))
        return {split: labelled_rows(known, "label", cells, f"{doing}: review") for split, cells in splits.items()}
    _require_file(path, doing)
    if "fold" not in column_names(path):
        return {"train": read_file(known, path, doing)}
    text_column, label_column = columns_of(known, path, doing)
    where = f"{doing}: {path.name!r}, {unit_of(path)}"
    for number, row in cells_of(path, (text_column, label_column, "fold"), doing):
        split = _split_of_fold(row["fold"], config, f"{where} {number}")
        splits[split].append((number, row[text_column], row[label_column]))
    return {split: labelled_rows(known, label_column, cells, where) for split, cells in splits.items()}


def _review_files(
    known: LabelledSet, folder: Path, config: OodConfig, doing: str
) -> Iterator[tuple[PairSplit, str, str]]:
    """Split, text and label of every review in the corpus's own folders, in the order of their paths."""
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
        yield _split_of_fold(path.parent.name.removeprefix("fold"), config, where), text, label


def _split_of_fold(found: object, config: OodConfig, where: str) -> PairSplit:
    fold = str(found).strip().removesuffix(".0")
    if fold not in map(str, range(1, NUM_FOLDS + 1)):
        raise DataError(f"{where}: found fold {found!r}; expected a number from 1 to {NUM_FOLDS}. Correct it.")
    held_out: dict[int, PairSplit] = {config.reviews_validation_fold: "validation", config.reviews_test_fold: "test"}
    return held_out.get(int(fold), "train")
