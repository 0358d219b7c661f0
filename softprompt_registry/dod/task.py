"""A task: one dataset of (input, output) pairs, its labels and its ground-truth hard prompts."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import Annotated, Literal, NamedTuple, get_args

from pydantic import AfterValidator

from softprompt_registry.config import Share
from softprompt_registry.errors import DataError
from softprompt_registry.fingerprints import digest_of_json, digest_of_task

TaskKind = Literal["classification", "generation"]
TaskSplit = Literal["train", "test"]
"""Which side of the DoD a task is on: `train` tasks teach the translator, `test` tasks only measure it."""
PairSplit = Literal["train", "validation", "test"]
"""Inside a task: `train` pairs tune the soft prompt, `validation` pairs stop it, `test` pairs only measure it."""

TASK_KINDS: tuple[str, ...] = get_args(TaskKind)
TASK_SPLITS: tuple[str, ...] = get_args(TaskSplit)
PAIR_SPLITS: tuple[str, ...] = get_args(PairSplit)


class Pair(NamedTuple):
    """One example: what goes in and what should come out.

    A named tuple, since a DoD has millions: a frozen dataclass takes three times as long to make.
    """

    input: str
    output: str
    split: PairSplit = "train"
    num_tokens: int | None = None
    """Tokens of input and output together, where the builder counted them; not part of the digest."""


_SPLIT_INPUT_OUTPUT = itemgetter(2, 0, 1)


@dataclass(frozen=True)
class Task:
    """One dataset with what is known about it.

    A classification task has at least two distinct labels, and every output is one of them.

    Raises:
        DataError: the name is empty, a label list contradicts the outputs, or there is no pair at all.
    """

    name: str
    kind: TaskKind
    pairs: tuple[Pair, ...]
    labels: tuple[str, ...] = ()
    hard_prompts: tuple[str, ...] = ()
    split: TaskSplit = "train"
    source: str = ""

    def __post_init__(self) -> None:
        if not self.name.strip() or "#" in self.name or self.name != self.name.strip():
            raise DataError(
                f"reading a task: its name is {self.name!r}; a name is not empty, has no '#' (that separates a bank "
                "from its member) and no spaces around it. Rename the task."
            )
        if self.kind not in TASK_KINDS or self.split not in TASK_SPLITS:
            raise DataError(
                f"reading task {self.name!r}: found kind {self.kind!r} and split {self.split!r}; "
                f"kinds are {list(TASK_KINDS)}, splits are {list(TASK_SPLITS)}. Correct the task's record."
            )
        if not self.pairs:
            raise DataError(f"reading task {self.name!r}: it has no pairs; at least one is needed. Remove or fill it.")
        if self.kind == "classification":
            self._check_labels()

    def _check_labels(self) -> None:
        if len(set(self.labels)) != len(self.labels) or len(self.labels) < 2:
            raise DataError(
                f"reading task {self.name!r}: its labels are {list(self.labels)}; a classification task needs at least "
                "two distinct ones. Correct the labels, or make it a generation task."
            )
        unknown = {pair.output for pair in self.pairs} - set(self.labels)
        if unknown:
            raise DataError(
                f"reading task {self.name!r}: outputs {sorted(unknown)[:5]!r} are not among its labels "
                f"{list(self.labels)}. Correct the outputs or the label list."
            )

    @cached_property
    def digest(self) -> str:
        """Order-independent digest of the task's content (see `fingerprints.digest_of_task`)."""
        return digest_of_task(
            name=self.name,
            kind=self.kind,
            labels=self.labels,
            hard_prompts=self.hard_prompts,
            pairs=map(_SPLIT_INPUT_OUTPUT, self.pairs),
        )

    def pairs_of(self, split: PairSplit) -> list[Pair]:
        """The pairs of one split, in stored order."""
        return [pair for pair in self.pairs if pair.split == split]

    @property
    def ground_truth(self) -> str:
        """What a perfect verbalization would say: the label list for classification (paper section 4.3), else the
        first hard prompt; empty when neither is known."""
        return ground_truth_of(self.kind, self.labels, self.hard_prompts)

    @property
    def template(self) -> str:
        """The frame that the soft prompt was tuned in (paper section A.4); the target follows after one space."""
        return TEMPLATES[self.kind]


def ground_truth_of(kind: TaskKind, labels: Sequence[str], hard_prompts: Sequence[str]) -> str:
    """See `Task.ground_truth`."""
    return ", ".join(labels) if kind == "classification" else next(iter(hard_prompts), "")


TEMPLATES: dict[str, str] = {"classification": "Sentence: {x} Label:", "generation": "Input: {x}\nOutput:"}


def fill_template(template: str, text: str) -> str:
    """Put `text` in place of `{x}`; other braces in either string are left alone."""
    return template.replace("{x}", text)


def _adding_up_to_one(shares: tuple[float, float, float]) -> tuple[float, float, float]:
    if not 0.999 < sum(shares) < 1.001:
        raise ValueError(f"{list(shares)} add up to {sum(shares):g}, expected 1")
    return shares


PairShares = Annotated[tuple[Share, Share, Share], AfterValidator(_adding_up_to_one)]
"""Shares of train, validation and test pairs, as a setting."""


def assign_pair_splits(count: int, shares: Sequence[float], seed: int) -> list[PairSplit]:
    """Split labels for `count` pairs by the shares (train, validation, test), shuffled by `seed`.

    A split with a share above zero gets at least one pair as soon as there are three pairs.
    """
    if len(shares) != 3 or min(shares) < 0 or not 0.999 < sum(shares) < 1.001:
        raise DataError(
            f"splitting pairs: shares are {list(shares)}; expected three numbers >= 0 that add up to 1. Correct them."
        )
    least = [1 if share > 0 and count >= 3 else 0 for share in shares]
    validation = max(round(count * shares[1]), least[1])
    test = max(round(count * shares[2]), least[2])
    # Rounding both up can take the last training pair, or more pairs than there are.
    while validation + test > count - least[0]:
        validation, test = (validation - 1, test) if validation >= test else (validation, test - 1)
    train = count - validation - test
    splits: list[PairSplit] = ["train"] * train
    splits += ["validation"] * validation
    splits += ["test"] * test
    random.Random(seed).shuffle(splits)
    return splits


def split_pairs_by_input(inputs: Sequence[str], shares: Sequence[float], seed: int) -> list[PairSplit]:
    """A split for each pair, by the input of each: pairs with the same input, and other outputs, stay together.

    Otherwise a tuned prompt would be measured on inputs that it was tuned on. Shares count different inputs.
    """
    keys = [text_key(text) for text in inputs]
    different = list(dict.fromkeys(keys))
    split_of = dict(zip(different, assign_pair_splits(len(different), shares, seed), strict=True))
    return [split_of[key] for key in keys]


def draw_in_proportion(strata: Sequence[tuple[str, ...]], count: int | None, seed: int | str) -> list[int]:
    """Positions of at most `count` items, in their order, with the shares of the strata kept; None draws all.

    The i-th of n shuffled items of a stratum gets the key i / n, and the smallest keys are drawn: first an item of every
    stratum, then of each in proportion.

    Args:
        strata: the stratum of each item.
    """
    if count is None or len(strata) <= count:
        return list(range(len(strata)))
    positions_of: dict[tuple[str, ...], list[int]] = {}
    for position, stratum in enumerate(strata):
        positions_of.setdefault(stratum, []).append(position)
    generator = random.Random(seed)
    keyed: list[tuple[float, tuple[str, ...], int]] = []
    for stratum, positions in sorted(positions_of.items()):
        generator.shuffle(positions)
        keyed += [(i / len(positions), stratum, position) for i, position in enumerate(positions)]
    return sorted(position for _, _, position in sorted(keyed)[:count])


def text_key(text: str) -> str:
    """What two texts have in common that count as the same: compatibility form (NFKC), no case, single spaces."""
    return " ".join((text if text.isascii() else unicodedata.normalize("NFKC", text)).casefold().split())


def seed_of(purpose: str, seed: int, name: str) -> int:
    """A number below 16^13 (exact as a float) from a builder's seed and a task's name."""
    return int(digest_of_json([purpose, seed, name])[:13], 16)


def draw_task_split(name: str, test_share: float, seed: int) -> TaskSplit:
    """Hashes the name instead of shuffling the names, so that a new task moves no other to the other side."""
    return "test" if seed_of("tasks", seed, name) / 16**13 < test_share else "train"
