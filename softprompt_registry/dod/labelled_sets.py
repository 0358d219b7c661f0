"""The seven fixed classification sets as test tasks with the paper's label words: their table, and what builds their DoDs.

SST-2, SST-5, TREC, Subj and AG News, on which InSPEcT and the paper evaluate, come from local files or, with the extra `hub`,
from the Hugging Face Hub. The labels of SST-2's test split were never published (they are -1 on the Hub): its validation
split serves as test, and validation pairs are cut from train. The same is done for any of the five without labelled test
rows. Hotel reviews and essays, from outside their domain (paper section 5.1.3), come from local files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveInt

from softprompt_registry.config import Distinct, InnerShare, flatten, settings
from softprompt_registry.dod.labelled_rows import (
    NUM_FOLDS,
    SPLITS,
    Found,
    Labelled,
    LabelledSet,
    Splits,
    from_folder,
    from_hub,
    from_path,
    with_test_rows,
)
from softprompt_registry.dod.store import dod_written_whole
from softprompt_registry.dod.task import Pair, PairSplit, Task, draw_in_proportion
from softprompt_registry.errors import DataError
from softprompt_registry.recording import NullRecorder, Recorder

_TABLE = (
    LabelledSet(
        "sst2",
        ("positive", "negative"),
        "Classify the sentiment of the movie review",
        hub="stanfordnlp/sst2",
        text_columns=("sentence", "text"),
        label_columns=("label_text", "label"),
        numbers={"label": ("negative", "positive")},
    ),
    LabelledSet(
        "sst5",
        ("terrible", "bad", "neutral", "good", "great"),
        "Rate how well the movie review speaks of the film",
        hub="SetFit/sst5",
        label_columns=("label_text", "label"),
        words={"very negative": "terrible", "negative": "bad", "positive": "good", "very positive": "great"},
        numbers={"label": ("terrible", "bad", "neutral", "good", "great")},
    ),
    LabelledSet(
        "trec",
        ("description", "entity", "abbreviation", "human", "location", "number"),
        "Name the kind of answer that the question asks for",
        hub="SetFit/TREC-QC",
        # `label` and `label_text` of the Hub's copy are the 50 fine classes.
        label_columns=("label_coarse_text", "label_coarse_original", "label_coarse", "label"),
        words={
            "desc": "description",
            "enty": "entity",
            "abbr": "abbreviation",
            "hum": "human",
            "loc": "location",
            "num": "number",
            "description and abstract concepts": "description",
            "entities": "entity",
            "human beings": "human",
            "locations": "location",
            "numeric values": "number",
        },
        numbers={"label_coarse": ("description", "entity", "abbreviation", "human", "number", "location")},
    ),
    LabelledSet(
        "subj",
        ("objective", "subjective"),
        "Tell whether the sentence about a film states facts or gives an opinion,",
        hub="SetFit/subj",
        label_columns=("label_text", "label"),
        numbers={"label": ("objective", "subjective")},
    ),
    LabelledSet(
        "agnews",
        ("world", "sports", "business", "technology"),
        "Sort the news text by its topic,",
        hub="fancyzhx/ag_news",
        label_columns=("label_text", "label"),
        words={"Sci/Tech": "technology"},
        numbers={"label": ("world", "sports", "business", "technology")},
    ),
    LabelledSet(
        "hotel_reviews",
        ("truthful", "deceptive"),
        "Tell whether a guest of the hotel wrote the review or somebody made it up,",
        label_columns=("label", "deceptive"),
        words={"fake": "deceptive", "genuine": "truthful"},
        numbers={"deceptive": ("truthful", "deceptive")},
        fold_column="fold",
        advice="Correct them, or say in `reviews_labels` what they mean.",
    ),
    LabelledSet(
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
    ),
)
LABELLED_SETS: dict[str, LabelledSet] = {known.name: known for known in _TABLE}
EVALUATION_LABELS: dict[str, tuple[str, ...]] = {known.name: known.labels for known in _TABLE if known.hub}
"""Evaluation set → the paper's label words (section 5.1.2)."""


@settings
class InspectConfig:
    """Which of the five sets are built, where they lie on the Hub, and how many pairs each gets."""

    sets: Distinct[str] = ("sst2", "sst5", "trec", "subj", "agnews")
    """Sets to build."""
    max_train_pairs: PositiveInt | None = 5000
    """Draw at most this many train pairs of each set by `seed`, keeping the balance of labels; None keeps all."""
    max_validation_pairs: PositiveInt | None = 1000
    """Draw at most this many validation pairs of each set by `seed`, keeping the balance of labels; None keeps all."""
    max_test_pairs: PositiveInt | None = None
    """Draw at most this many test pairs of each set; with all of them the scores are those of the published sets."""
    validation_share: InnerShare = 0.1
    """Share of the train pairs that becomes the validation pairs of a set that has none, cut by `seed`."""
    hub: dict[str, str] = field(default_factory=dict)
    """Set → `repository` or `repository@commit` on the Hub, in place of the newest commit of the paper's (section A.3)."""
    seed: int = 0
    """Seed of every draw; it is combined with the set's name, so sets do not depend on each other."""

    def __post_init__(self) -> None:
        for name, names in (("sets", self.sets), ("hub", self.hub)):
            if unknown := sorted(set(names) - set(EVALUATION_LABELS)):
                raise ValueError(f"{name} has {unknown}, expected some of {list(EVALUATION_LABELS)}")


@settings
class OodConfig:
    """How the files of the two sets are read, and how many pairs each gets."""

    reviews_text_column: str = "text"
    """Column (CSV, TSV, Parquet) or key (JSON, JSON Lines) of a review."""
    reviews_label_column: str | None = None
    """Column of its label; None takes `label` or else `deceptive`."""
    reviews_labels: dict[str, str] = field(default_factory=dict)
    """Label in the file → truthful or deceptive, for labels that are not known without it."""
    reviews_validation_fold: Annotated[int, Field(ge=1, le=NUM_FOLDS)] = 4
    """Fold, from 1 to 5, of the validation reviews, where the file has a column `fold` or the folder has folders for them."""
    reviews_test_fold: Annotated[int, Field(ge=1, le=NUM_FOLDS)] = 5
    """Fold of the test reviews; the others are train."""
    essays_text_column: str = "text"
    """Column or key of an essay."""
    essays_label_column: str | None = None
    """Column of its label; None takes `generated` or else `label`, in both of which 1 is read as generated."""
    essays_labels: dict[str, str] = field(default_factory=dict)
    """Label in the file → human or generated, for labels that are not known without it."""
    max_train_pairs: PositiveInt | None = 5000
    """Draw at most this many train pairs of each set by `seed`, keeping the balance of labels; None keeps all."""
    max_validation_pairs: PositiveInt | None = 1000
    """Draw at most this many validation pairs of each set by `seed`, keeping the balance of labels; None keeps all."""
    max_test_pairs: PositiveInt | None = 1000
    """Draw at most this many test pairs of each set by `seed`, keeping the balance of labels; None keeps all."""
    test_share: InnerShare = 0.2
    """Share of all pairs that becomes the test pairs of a set without folds, cut by `seed`."""
    validation_share: InnerShare = 0.1
    """Share of the other pairs that becomes the validation pairs of a set without them, cut by `seed`."""
    seed: int = 0
    """Seed of every draw; it is combined with the set's name, so that one set does not depend on the other."""

    def __post_init__(self) -> None:
        if self.reviews_validation_fold == self.reviews_test_fold:
            raise ValueError(
                f"reviews_validation_fold and reviews_test_fold are both {self.reviews_test_fold}, expected two folds"
            )
        for key, name in (("reviews_labels", "hotel_reviews"), ("essays_labels", "essays")):
            known = LABELLED_SETS[name].labels
            if wrong := sorted(set(getattr(self, key).values()) - set(known)):
                raise ValueError(f"{key} maps labels to {wrong}, expected only {list(known)}")


def _max_pairs(config: InspectConfig | OodConfig) -> dict[PairSplit, int | None]:
    return {split: getattr(config, f"max_{split}_pairs") for split in SPLITS}


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


Reader = Callable[[], Found]


def build_dod_inspect(
    source: Path | None,
    out: Path,
    *,
    config: InspectConfig,
    overwrite: bool = False,
    recorder: Recorder | None = None,
) -> LabelledSetsReport:
    """Write the evaluation sets into the DoD `out`, whole or not at all: every one a classification task of split "test".

    Texts lose the white space around them and are otherwise kept as they are. A text with two labels is dropped; one that
    occurs in several splits stays in the one that is held out furthest.

    Args:
        source: a folder, or None for the Hugging Face Hub. The folder has files `<set>_<split>.jsonl` (or another ending of
            a task file) with the columns `text` and `label`, or those of the Hub; a label is the paper's word, the Hub's or
            the Hub's number. A set without such files may have a subfolder `<set>`, saved by `datasets` or downloaded
            from the Hub.

    Raises:
        DataError: `out` exists, a set or a split of it is missing, a file or label cannot be used, or the Hub cannot be read.
    """
    where = "the Hugging Face Hub" if source is None else repr(str(source))
    doing = f"building the evaluation sets from {where}"
    if source is not None and not source.is_dir():
        raise DataError(f"{doing}: there is no such folder; expected one with the sets' files. Correct the path.")

    def read(known: LabelledSet) -> Found:
        if source is None:
            splits, origin = from_hub(known, config.hub.get(known.name, str(known.hub)), doing)
        else:
            splits, origin = from_folder(known, source, doing)
        return with_test_rows(splits, f"{doing}: set {known.name!r}"), origin

    readers = {name: partial(read, LABELLED_SETS[name]) for name in config.sets}
    note = {"builder": "inspect", "from": "hub" if source is None else "files"}
    return _build(out, readers, config, "evaluation sets", note, doing, overwrite=overwrite, recorder=recorder)


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

    Texts are cleaned as in `build_dod_inspect`.

    Args:
        reviews: the Deceptive Opinion Spam Corpus: its own folder, with a text file for each review in
            `…/deceptive_from_MTurk/fold1` and the like, or a CSV, JSON Lines or Parquet file with text, label and
            optionally `fold`. Without folds the splits are cut by shares.
        essays: a CSV, JSON Lines or Parquet file of essays with text and label.

    Raises:
        DataError: `out` exists, no set is given, or a file or label cannot be used.
    """
    doing = "building the out-of-domain sets"
    held_out: dict[int, PairSplit] = {config.reviews_validation_fold: "validation", config.reviews_test_fold: "test"}
    readers: dict[str, Reader] = {}
    if reviews is not None:
        known = _configured(
            "hotel_reviews", config.reviews_text_column, config.reviews_label_column, config.reviews_labels
        )
        readers[known.name] = partial(from_path, known, reviews, held_out, doing)
    if essays is not None:
        known = _configured("essays", config.essays_text_column, config.essays_label_column, config.essays_labels)
        readers[known.name] = partial(from_path, known, essays, {}, doing)
    if not readers:
        raise DataError(f"{doing}: found neither reviews nor essays; expected a path to at least one. Give one.")
    note = {"builder": "ood"}
    return _build(out, readers, config, "out-of-domain sets", note, doing, overwrite=overwrite, recorder=recorder)


def _configured(name: str, text: str, label: str | None, labels: Mapping[str, str]) -> LabelledSet:
    known = LABELLED_SETS[name]
    return replace(
        known,
        text_columns=(text,),
        label_columns=(label,) if label else known.label_columns,
        words={**known.words, **labels},
    )


def _build(
    out: Path,
    readers: Mapping[str, Reader],
    config: InspectConfig | OodConfig,
    title: str,
    note: Mapping[str, Any],
    doing: str,
    *,
    overwrite: bool,
    recorder: Recorder | None,
) -> LabelledSetsReport:
    with dod_written_whole(out, doing, overwrite=overwrite) as store:
        counts = []
        with (recorder or NullRecorder()).progress(title, len(readers)) as bar:
            for name, read in readers.items():
                splits, origin = read()
                task, counted = _task(LABELLED_SETS[name], splits, config, origin, doing)
                store.add_task(task)
                counts.append(counted)
                bar.advance(note=name)
        sets = {counted.name: asdict(counted) for counted in counts}
        store.set_metadata("build", {**note, "settings": flatten(config), "sets": sets})
        return LabelledSetsReport(path=out, digest=store.digest, sets=tuple(counts))


def _task(
    known: LabelledSet, splits: Splits, config: InspectConfig | OodConfig, origin: str, doing: str
) -> tuple[Task, SetCounts]:
    """The task of a set and what became of its rows: first they are cleaned, then missing splits cut, then pairs drawn."""
    rows, dropped = _cleaned(splits)
    found = {label for kept in rows.values() for _, label in kept}
    if found != set(known.labels):
        raise DataError(
            f"{doing}: set {known.name!r} has usable rows of the labels {sorted(found)}; expected some of each of "
            f"{list(known.labels)}. Check that the files are whole."
        )
    shares: dict[PairSplit, float] = {}
    if "test" not in splits and isinstance(config, OodConfig):
        shares["test"] = config.test_share
    if not rows["validation"]:
        shares["validation"] = config.validation_share
    for split, share in shares.items():
        count = max(round(len(rows["train"]) * share), 1)
        rows[split], rows["train"] = _draw(rows["train"], count, f"{config.seed}/{known.name}/{split}")
    empty = [split for split, kept in rows.items() if not kept]
    if empty:
        raise DataError(
            f"{doing}: set {known.name!r} has no rows left for {' and '.join(empty)}; expected some in every split. Add "
            "rows, or check whether its splits hold the same texts."
        )
    for split, limit in _max_pairs(config).items():
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


def _cleaned(splits: Splits) -> tuple[dict[PairSplit, list[Labelled]], dict[str, int]]:
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
    """`count` of the rows with the labels in proportion, and the others, both in their order."""
    drawn = set(draw_in_proportion([(label,) for _, label in rows], count, seed))
    chosen = [row for place, row in enumerate(rows) if place in drawn]
    return chosen, [row for place, row in enumerate(rows) if place not in drawn]
