"""The five classification sets that InSPEcT and the paper evaluate on, as test tasks with the paper's label words.

SST-2, SST-5, TREC, Subj and AG News come from local files or, with the extra `hub`, from the Hugging Face Hub. The labels of
SST-2's test split were never published (they are -1 on the Hub): its validation split serves as test, and validation pairs
are cut from train. The same is done for any set without labelled test rows. What a set goes through on its way from rows to
a task is in `ood_datasets`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from softprompt_registry.config import flatten
from softprompt_registry.dod.file_rows import ENDINGS, ending_of
from softprompt_registry.dod.labelled_sets import (
    SPLITS,
    LabelledSet,
    LabelledSetsReport,
    SplitRows,
    check_pair_settings,
    first_column,
    labelled_rows,
    labelled_task,
    note_build,
    read_file,
)
from softprompt_registry.dod.store import dod_written_whole, require_free
from softprompt_registry.dod.task import PairSplit
from softprompt_registry.errors import ConfigError, DataError
from softprompt_registry.recording import NullRecorder, Recorder

EVALUATION_LABELS: dict[str, tuple[str, ...]] = {
    "sst2": ("positive", "negative"),
    "sst5": ("terrible", "bad", "neutral", "good", "great"),
    "trec": ("description", "entity", "abbreviation", "human", "location", "number"),
    "subj": ("objective", "subjective"),
    "agnews": ("world", "sports", "business", "technology"),
}
"""Set → the paper's label words (section 5.1.2)."""
HUB_IDS: dict[str, str] = {
    "sst2": "stanfordnlp/sst2",
    "sst5": "SetFit/sst5",
    "trec": "SetFit/TREC-QC",
    "subj": "SetFit/subj",
    "agnews": "fancyzhx/ag_news",
}
"""Set → where it lies on the Hub (paper section A.3)."""

EVALUATION_SETS: dict[str, LabelledSet] = {
    known.name: known
    for known in (
        LabelledSet(
            "sst2",
            EVALUATION_LABELS["sst2"],
            "Classify the sentiment of the movie review",
            text_columns=("sentence", "text"),
            label_columns=("label_text", "label"),
            numbers={"label": ("negative", "positive")},
        ),
        LabelledSet(
            "sst5",
            EVALUATION_LABELS["sst5"],
            "Rate how well the movie review speaks of the film",
            label_columns=("label_text", "label"),
            words={"very negative": "terrible", "negative": "bad", "positive": "good", "very positive": "great"},
            numbers={"label": EVALUATION_LABELS["sst5"]},
        ),
        LabelledSet(
            "trec",
            EVALUATION_LABELS["trec"],
            "Name the kind of answer that the question asks for",
            # `label` and `label_text` of the Hub's copy are the 50 fine classes.
            label_columns=("label_coarse_text", "label_coarse_original", "label_coarse", "label"),
            words={
                **dict(zip(("desc", "enty", "abbr", "hum", "loc", "num"), EVALUATION_LABELS["trec"], strict=True)),
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
            EVALUATION_LABELS["subj"],
            "Tell whether the sentence about a film states facts or gives an opinion,",
            label_columns=("label_text", "label"),
            numbers={"label": ("objective", "subjective")},
        ),
        LabelledSet(
            "agnews",
            EVALUATION_LABELS["agnews"],
            "Sort the news text by its topic,",
            label_columns=("label_text", "label"),
            words={"Sci/Tech": "technology"},
            numbers={"label": EVALUATION_LABELS["agnews"]},
        ),
    )
}


@dataclass(frozen=True)
class InspectConfig:
    """Which of the five sets are built, where they lie on the Hub, and how many pairs each gets."""

    sets: tuple[str, ...] = ("sst2", "sst5", "trec", "subj", "agnews")
    """Sets to build."""
    max_train_pairs: int | None = 5000
    """Draw at most this many train pairs of each set by `seed`, keeping the balance of labels; None keeps all."""
    max_validation_pairs: int | None = 1000
    """The same for validation pairs."""
    max_test_pairs: int | None = None
    """The same for test pairs; with all of them the scores are those of the published test sets."""
    validation_share: float = 0.1
    """Share of the train pairs that becomes the validation pairs of a set that has none, cut by `seed`."""
    hub: dict[str, str] = field(default_factory=dict)
    """Set → `repository` or `repository@commit` on the Hub, in place of the newest commit of the paper's (section A.3)."""
    seed: int = 0
    """Seed of every draw; it is combined with the set's name, so sets do not depend on each other."""

    def __post_init__(self) -> None:
        doing = "reading the config of the evaluation sets"
        known = list(EVALUATION_LABELS)
        if not self.sets or len(set(self.sets)) != len(self.sets) or not set(self.sets) <= set(known):
            raise ConfigError(
                f"{doing}: sets are {list(self.sets)}; expected one or more of {known}, each once. Correct the list."
            )
        if unknown := sorted(set(self.hub) - set(known)):
            raise ConfigError(f"{doing}: hub names the sets {unknown}; expected only {known}. Correct them.")
        check_pair_settings(self, doing)


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
        out: the DoD to write; its folder is made where missing.
        config: see `InspectConfig`.
        overwrite: replace `out` if it exists.
        recorder: hears of the progress.

    Raises:
        DataError: `out` exists, a set or a split of it is missing, a file or label cannot be used, or the Hub cannot be read.
    """
    where = "the Hugging Face Hub" if source is None else repr(str(source))
    doing = f"building the evaluation sets from {where}"
    require_free(out, doing, overwrite=overwrite)  # before anything is downloaded
    if source is not None and not source.is_dir():
        raise DataError(f"{doing}: there is no such folder; expected one with the sets' files. Correct the path.")
    with dod_written_whole(out, doing, overwrite=overwrite) as store:
        counts = []
        with (recorder or NullRecorder()).progress("evaluation sets", len(config.sets)) as bar:
            for name in config.sets:
                known = EVALUATION_SETS[name]
                if source is None:
                    splits, origin = _from_hub(known, config.hub.get(name, HUB_IDS[name]), doing)
                else:
                    splits, origin = _from_folder(known, source, doing)
                _serve_validation_as_test(splits, f"{doing}: set {name!r}")
                task, counted = labelled_task(known, splits, config, origin=origin, doing=doing)
                store.add_task(task)
                counts.append(counted)
                bar.advance(note=name)
        note_build(
            store, "inspect", {"from": "hub" if source is None else "files", "settings": flatten(config)}, counts
        )
        digest = store.digest
    return LabelledSetsReport(path=out, digest=digest, sets=tuple(counts))


def _from_folder(known: LabelledSet, folder: Path, doing: str) -> tuple[dict[PairSplit, SplitRows], str]:
    """The splits of a set in a local folder, and what to call their origin."""
    files: dict[PairSplit, Path] = {}
    for path in sorted(folder.iterdir()):
        stem = path.name.removesuffix(ending_of(path.name) or path.name)
        for split in SPLITS:
            if stem != f"{known.name}_{split}" or not path.is_file():
                continue
            if split in files:
                raise DataError(
                    f"{doing}: {path.name!r} and {files[split].name!r} both hold the {split} split of {known.name!r}; "
                    "expected one file for each split. Remove one of them."
                )
            files[split] = path
    if files:
        splits = {split: read_file(known, path, doing) for split, path in files.items()}
        return splits, ", ".join(path.name for path in files.values())
    copy = folder / known.name
    if not copy.is_dir():
        raise DataError(
            f"{doing}: nothing of the set {known.name!r} is there; expected {known.name}_train, {known.name}_validation and "
            f"{known.name}_test, each ending in one of {', '.join(ENDINGS)}, or a subfolder {known.name!r} as `datasets` "
            "saves it. Add them, or leave the set out of `sets`."
        )
    datasets = _datasets_library(doing)
    saved = (copy / "dataset_dict.json").is_file()
    with _loading(f"{doing}: reading {str(copy)!r}", "files that `datasets` can load. Save or download the set again"):
        loaded = datasets.load_from_disk(str(copy)) if saved else datasets.load_dataset(str(copy.resolve()))
        return _loaded_splits(known, loaded, known.name, doing), f"the folder {known.name}"


def _from_hub(known: LabelledSet, place: str, doing: str) -> tuple[dict[PairSplit, SplitRows], str]:
    """The splits of a set on the Hub, and its repository with the commit that was read."""
    repository, _, revision = place.partition("@")
    datasets = _datasets_library(doing)
    with _loading(
        f"{doing}: loading {place!r}",
        "a dataset that this machine can reach. Check the network and the name, or give a folder with the sets' files",
    ):
        loaded = datasets.load_dataset(repository, revision=revision or None)
        # The cache of `datasets` has a folder for each commit; where it has not, what was asked for has to do.
        cached = next((file["filename"] for files in loaded.cache_files.values() for file in files), "")
        commit = re.search(r"/([0-9a-f]{40})/", cached)
        splits = _loaded_splits(known, loaded, repository, doing)
    return splits, f"{repository}@{commit[1]}" if commit else place


def _datasets_library(doing: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{doing}: the package 'datasets' is not installed; expected it for sets on the Hub and for saved copies of "
            "them. Run `pip install 'softprompt-registry[hub]'`, or give a folder with the sets' files."
        ) from error
    return datasets


@contextmanager
def _loading(doing: str, expected: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # what goes wrong between here and the Hub comes from a dozen libraries
        unreached = " cannot reach the Hugging Face Hub" if isinstance(error, ConnectionError) else " failed"
        raise DataError(
            f"{doing}: `datasets`{unreached} ({type(error).__name__}: {str(error)[:200]}); expected {expected}."
        ) from error


def _loaded_splits(known: LabelledSet, loaded: Any, place: str, doing: str) -> dict[PairSplit, SplitRows]:
    """What `datasets` loaded, split by split; labels by their names where it knows them."""
    splits: dict[PairSplit, SplitRows] = {}
    for split in SPLITS:
        if not isinstance(loaded, Mapping) or split not in loaded:
            continue
        dataset = loaded[split]
        where = f"{doing}: {place!r}, split {split!r}"
        text = first_column(known.text_columns, dataset.column_names, where)
        label = first_column(known.label_columns, dataset.column_names, where)
        cells = dataset.select_columns([text, label])[:]
        names = getattr(dataset.features[label], "names", None)
        labels = [names[found] if names and found in range(len(names)) else found for found in cells[label]]
        numbered = zip(range(1, len(labels) + 1), cells[text], labels, strict=True)
        splits[split] = labelled_rows(known, label, numbered, f"{where}, row")
    return splits


def _serve_validation_as_test(splits: dict[PairSplit, SplitRows], where: str) -> None:
    """Where the test rows have no labels, or there are none, the validation rows take their place."""
    if "test" in splits and splits["test"].rows:
        return
    if "validation" not in splits or not splits["validation"].rows:
        found = ", ".join(f"{len(rows.rows)} in {split}" for split, rows in splits.items()) or "none"
        raise DataError(
            f"{where}: found these labelled rows: {found}; expected some in test, or in validation to serve as test. Add "
            "that split."
        )
    unlabelled = splits["test"].unlabelled if "test" in splits else 0
    splits["test"] = replace(splits.pop("validation"), unlabelled=unlabelled)
