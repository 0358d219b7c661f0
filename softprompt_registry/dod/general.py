"""The General DoD: Super-NaturalInstructions, English tasks as (input, output) pairs (paper section A.7).

Steps: the benchmark's lists say which tasks are used and on which side; English tasks only; every output of an instance
becomes a pair of its own; empty, repeated and too long pairs go; small tasks go; of the rest some pairs are drawn. The
result depends neither on the order of the files nor on that of the instances. The readers are in `general_layouts.py`
and `general_sources.py`.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from pydantic import PositiveInt

from softprompt_registry.base_models.reference import tokenizer_digest
from softprompt_registry.config import flatten, settings
from softprompt_registry.dod.files import MAX_PROBLEMS
from softprompt_registry.dod.general_layouts import open_source
from softprompt_registry.dod.general_sources import (
    LANGUAGE_KEYS,
    DamagedTask,
    Source,
    SourceTask,
    SplitLists,
    TaskContent,
    read_split_lists,
)
from softprompt_registry.dod.store import dod_written_whole, require_free
from softprompt_registry.dod.task import TASK_SPLITS, Pair, PairShares, Task, TaskSplit, seed_of, split_pairs_by_input
from softprompt_registry.errors import DataError
from softprompt_registry.fingerprints import digest_of_json
from softprompt_registry.recording import NullRecorder, Recorder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@settings
class GeneralConfig:
    """How Super-NaturalInstructions becomes a DoD."""

    max_tokens: PositiveInt | None = 400
    """Drop pairs with more tokens than this in input and output together, by the base model's tokenizer and without
    special tokens; None keeps all (section A.7)."""
    min_pairs: PositiveInt = 500
    """Drop tasks with fewer pairs left than this (section A.7)."""
    max_pairs_per_task: PositiveInt | None = 500
    """Draw at most this many pairs of each task by `seed`; None keeps all."""
    pair_shares: PairShares = (0.8, 0.1, 0.1)
    """Shares of train, validation and test pairs in a task."""
    language: str | None = "English"
    """Keep tasks whose input, output and instruction are all in this language alone; None keeps all. Flat and Hub copies
    name no languages and are not filtered: there the lists decide."""
    split_lists: str | None = None
    """Folder with the benchmark's train_tasks.txt, test_tasks.txt and excluded_tasks.txt; None takes what the source says
    itself, or the lists beside it."""
    unlisted_to_train: bool = False
    """Use tasks that are on no list as train tasks, instead of leaving them out."""
    strict: bool = False
    """Refuse a source with damaged tasks or lines, instead of leaving those out."""
    seed: int = 0
    """Seed of every draw; it is combined with the task's name, so tasks do not depend on each other."""


TaskStatus = Literal["kept", "excluded", "unlisted", "other language", "too few pairs", "damaged"]
COUNTS = ("instances", "bad_instances", "pairs", "empty", "duplicates", "too_long", "available", "drawn")
TOKENIZE_CHARS = 1 << 18
"""Pairs are tokenized together while they have about this many characters."""


@dataclass(frozen=True)
class TaskRow:
    """What became of one task. A task that is excluded, unlisted or damaged has no counts."""

    name: str
    split: str
    """train or test; empty when no list says."""
    status: TaskStatus
    reason: str = ""
    """Why it is not kept."""
    instances: int = 0
    bad_instances: int = 0
    """Instances whose input is no text, or whose output is neither a text nor a list of texts."""
    pairs: int = 0
    """After unwinding; each of them is counted in exactly one of the next four."""
    empty: int = 0
    duplicates: int = 0
    too_long: int = 0
    available: int = 0
    drawn: int = 0

    @property
    def kept(self) -> bool:
        return self.status == "kept"


@dataclass(frozen=True)
class GeneralReport:
    """What a build made of a source."""

    path: Path
    digest: str
    layout: str
    rows: tuple[TaskRow, ...]
    """Every task that was found, by name."""
    skipped: Mapping[str, str]
    """File → why it, or some of its lines, was left out."""

    def totals(self) -> dict[str, int]:
        """Tasks by what became of them, and the counts of all tasks together."""
        statuses = Counter(row.status for row in self.rows)
        kept = Counter(row.split for row in self.rows if row.kept)
        not_kept = (status for status in get_args(TaskStatus) if status != "kept")
        return {
            "tasks": len(self.rows),
            **{f"{split}_tasks": kept[split] for split in TASK_SPLITS},
            **{f"{status.replace(' ', '_')}_tasks": statuses[status] for status in not_kept},
            "skipped_places": len(self.skipped),
            **{count: sum(getattr(row, count) for row in self.rows) for count in COUNTS},
        }

    def table(self) -> dict[str, list[Any]]:
        """The rows as columns, for `Recorder.table` and for printing."""
        return {each.name: [getattr(row, each.name) for row in self.rows] for each in fields(TaskRow)}


def build_dod_general(
    source: Path | str,
    out: Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    config: GeneralConfig | None = None,
    overwrite: bool = False,
    recorder: Recorder | None = None,
) -> GeneralReport:
    """Build the General DoD `out`, whole or not at all.

    A damaged task is left out whole and named in the report, and the build continues. One task is in memory at a time:
    some two to eight times the size of its file, by its letters.

    Args:
        source: a folder with the benchmark's repository (tasks/*.json, splits/default/), a flat copy (tasks.jsonl,
            pairs.jsonl, each also with .gz) or a Hub copy (JSON Lines or Parquet); or `hub:NAME[@revision]`, `hub` for
            the usual one, which is read from the Hub as it comes and needs the extra `hub`.
        tokenizer: the base model's, to count tokens.

    Raises:
        DataError: `out` exists, the source is in none of the layouts or has no task to keep, or, with `strict`, something
            in it is damaged.
    """
    config = config or GeneralConfig()
    recorder = recorder or NullRecorder()
    doing = f"building the General DoD from {str(source)!r}"
    require_free(out, doing, overwrite=overwrite)  # before minutes are spent on reading
    configured = _configured_lists(config)
    rows: list[TaskRow] = []
    with (
        dod_written_whole(out, doing, overwrite=overwrite) as store,
        open_source(source, recorder) as opened,
        recorder.progress("General DoD", opened.num_tasks) as bar,
    ):
        lists = configured or opened.lists
        if opened.layout == "repository" and not (lists or config.unlisted_to_train):
            raise DataError(
                f"{doing}: found task files but no lists; expected the benchmark's train_tasks.txt and test_tasks.txt in "
                "splits/default/ or beside the task files. Add them, name their folder in split_lists, or set "
                "unlisted_to_train to use every task for training."
            )
        for found in opened.tasks:
            # The config's lists come first, then what the source says of the task, then the lists beside it.
            side = (None if configured else found.side) or (lists.side_of(found.name) if lists else None)
            side = side or ("train" if config.unlisted_to_train else None)
            row, task = _build_task(found, side, tokenizer, config)
            if task is not None:
                store.add_task(task)
            if row.status == "damaged":
                # Its file, and its name if the file holds others too.
                place = found.file if found.file == f"{found.name}.json" else f"{found.file}, task {found.name!r}"
                opened.skipped[place] = row.reason
            if config.strict and len(opened.skipped) >= MAX_PROBLEMS:
                break
            rows.append(row)
            bar.advance(note=row.name)
        if config.strict and opened.skipped:
            raise _damage(opened.skipped, doing)
        rows.sort(key=lambda row: row.name)
        report = GeneralReport(out, store.digest, opened.layout, tuple(rows), dict(sorted(opened.skipped.items())))
        _require_tasks(report, doing)
        store.set_metadata("build", _build_record(report, opened, lists, tokenizer, config))
    return report


def _configured_lists(config: GeneralConfig) -> SplitLists | None:
    """The lists that the config names."""
    if config.split_lists is None:
        return None
    lists = read_split_lists(Path(config.split_lists))
    if lists is None:
        raise DataError(
            f"reading the benchmark's lists in {config.split_lists!r}: found neither 'train_tasks.txt' nor "
            "'test_tasks.txt'; expected at least one of them. Correct split_lists."
        )
    return lists


def _build_task(
    found: SourceTask, side: str | None, tokenizer: PreTrainedTokenizerBase, config: GeneralConfig
) -> tuple[TaskRow, Task | None]:
    """What becomes of a task, and the task if it is kept."""
    if side is None:
        return TaskRow(found.name, "", "unlisted", "on none of the benchmark's lists"), None
    if side == "excluded":
        return TaskRow(found.name, "", "excluded", "excluded by the benchmark"), None
    if side not in TASK_SPLITS:
        return TaskRow(found.name, "", "damaged", f"the split is {side!r}, not train, test or excluded"), None
    try:
        content = found.read()
        other = _other_language(content, config.language)
        counts, drawn = _draw_pairs(found.name, content.instances, tokenizer, config)
        row = TaskRow(found.name, side, "kept", **counts)
        if other:
            return replace(row, status="other language", reason=other, drawn=0), None
        if row.available < config.min_pairs:
            reason = f"{row.available} pairs, fewer than {config.min_pairs}"
            return replace(row, status="too few pairs", reason=reason, drawn=0), None
        return row, _task_of(found.name, cast(TaskSplit, side), content, drawn, config)
    except DamagedTask as error:
        return TaskRow(found.name, side, "damaged", str(error)), None


def _draw_pairs(
    name: str, instances: Iterable[tuple[Any, Any]], tokenizer: PreTrainedTokenizerBase, config: GeneralConfig
) -> tuple[dict[str, Any], list[Pair]]:
    """The `COUNTS` of a task, and its pairs with the smallest hashes, in their order.

    The hash covers seed, task and pair, so the draw depends on nothing else, and pairs sorted by it are also shuffled.
    """
    counts: dict[str, Any] = dict.fromkeys(COUNTS, 0)
    seed = seed_of("pairs", config.seed, name)
    by_hash: dict[str, Pair] = {}
    for text, outputs in instances:
        counts["instances"] += 1
        outputs = [outputs] if isinstance(outputs, str) else outputs
        if not isinstance(outputs, list) or not outputs or not _are_texts([text, *outputs]):
            counts["bad_instances"] += 1
            continue
        # Paper: names unwinding as its last step. We unwind first, so that each pair is measured by itself.
        for output in outputs:
            counts["pairs"] += 1
            if not text.strip() or not output.strip():
                counts["empty"] += 1
                continue
            key = digest_of_json([seed, text, output])[:32]
            # Paper: says nothing of repeated pairs. We drop them, so that none is on both sides of a split.
            if key in by_hash:
                counts["duplicates"] += 1
            else:
                by_hash[key] = Pair(text, output)
    drawn: list[Pair] = []
    for pair in _with_num_tokens([by_hash[key] for key in sorted(by_hash)], tokenizer):
        if config.max_tokens is not None and cast(int, pair.num_tokens) > config.max_tokens:
            counts["too_long"] += 1
            continue
        counts["available"] += 1
        if config.max_pairs_per_task is None or len(drawn) < config.max_pairs_per_task:
            drawn.append(pair)
    return counts | {"drawn": len(drawn)}, drawn


def _are_texts(values: list[Any]) -> bool:
    """Strings that UTF-8 can hold; they may be empty."""
    try:
        "".join(values).encode()
    except (TypeError, UnicodeEncodeError):
        return False
    return True


def _with_num_tokens(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase) -> Iterator[Pair]:
    """The pairs with the tokens of input and output, without special ones."""
    ends = itertools.accumulate(len(pair.input) + len(pair.output) for pair in pairs)
    for _, group in itertools.groupby(zip(pairs, ends, strict=True), key=lambda item: item[1] // TOKENIZE_CHARS):
        batch = [pair for pair, _ in group]
        texts = list(dict.fromkeys(text for pair in batch for text in (pair.input, pair.output)))
        ids = tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no notice that a text is longer than the model's context
        )["input_ids"]
        lengths = dict(zip(texts, map(len, cast("list[list[int]]", ids)), strict=True))
        for pair in batch:
            yield pair._replace(num_tokens=lengths[pair.input] + lengths[pair.output])


def _task_of(name: str, side: TaskSplit, content: TaskContent, drawn: list[Pair], config: GeneralConfig) -> Task:
    # Paper: pairs are split 90/10 inside a task. We hold test pairs back as well, so that a soft prompt is measured on
    # pairs that did not stop its tuning.
    inputs = [pair.input for pair in drawn]
    splits = split_pairs_by_input(inputs, config.pair_shares, seed_of("splits", config.seed, name))
    try:
        return Task(
            name=name,
            kind="generation",  # as in the paper, also where the outputs are a handful of labels
            split=side,
            hard_prompts=content.definitions,
            source=content.source,
            pairs=tuple(pair._replace(split=split) for pair, split in zip(drawn, splits, strict=True)),
        )
    except DataError as error:  # a name that a DoD cannot have
        raise DamagedTask(str(error)) from error


def _other_language(content: TaskContent, language: str | None) -> str:
    """Which other languages a task has; empty if it is all in `language`."""
    if language is None or content.languages is None:
        return ""
    missing = [key for key in LANGUAGE_KEYS if key not in content.languages]
    if missing:
        raise DamagedTask(f"there is no {missing[0]!r}")
    others = {key: names for key, names in content.languages.items() if set(names) != {language}}
    return ", ".join(f"{key} {list(names)}" for key, names in others.items())


def _damage(skipped: Mapping[str, str], doing: str) -> DataError:
    lines = "\n".join(f"  {place}: {reason}" for place, reason in sorted(skipped.items())[:MAX_PROBLEMS])
    return DataError(
        f"{doing}: nothing was written because of {len(skipped)} damaged place{'s' if len(skipped) > 1 else ''}; expected "
        f"none with strict. Fetch these again, or turn strict off to leave them out:\n{lines}"
    )


def _require_tasks(report: GeneralReport, doing: str) -> None:
    if any(row.kept for row in report.rows):
        return
    found = Counter(row.status for row in report.rows)
    lines = "".join(f"\n  {place}: {reason}" for place, reason in list(report.skipped.items())[:MAX_PROBLEMS])
    raise DataError(
        f"{doing}: found {len(report.rows)} tasks and none to keep ({dict(found)}); expected at least one. Correct the "
        f"source, its lists, or min_pairs and max_tokens.{lines}"
    )


def _build_record(
    report: GeneralReport,
    source: Source,
    lists: SplitLists | None,
    tokenizer: PreTrainedTokenizerBase,
    config: GeneralConfig,
) -> dict[str, Any]:
    """What the DoD's metadata keep of the build; no path of this machine."""
    settings = flatten(config)
    if config.split_lists is not None:
        settings["split_lists"] = Path(config.split_lists).resolve().name
    tokenizer_name = str(tokenizer.name_or_path)
    if Path(tokenizer_name).is_dir():
        tokenizer_name = Path(tokenizer_name).name
    return {
        "builder": "general",
        "settings": settings,
        "layout": source.layout,
        "source": source.name,
        "split_lists_sha256": lists.digest if lists else None,
        "tokenizer": {"name": tokenizer_name, "sha256": tokenizer_digest(tokenizer)},
        "totals": report.totals(),
    }
