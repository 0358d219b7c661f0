"""Which held-out pairs rank candidates, and which report how good the winner is."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from softprompt_registry.dod.task import Pair, Task, text_key
from softprompt_registry.errors import DataError

MIN_ITEMS = 4
"""Of pairs or inputs. The 95 % interval over three or fewer reaches from the smallest to the largest of them, so a single one
would be taken for certain: of n items, the draws that take only the smallest are 1 in n^n, and 1 in 27 is more than 2.5 %."""


class PairHalves(NamedTuple):
    """Held-out pairs in two halves that share no input. In each, test pairs come before validation pairs."""

    ranking: list[Pair]
    """For choosing a candidate."""
    reporting: list[Pair]
    """For saying how good the chosen one is: it was not chosen on these."""


def split_pairs(task: Task, seed: int) -> PairHalves:
    """Divide a task's held-out pairs at random into two halves: its test pairs, and after them its validation pairs, which
    have stopped the tuning and so are a little less new.

    Pairs with the same input (see `text_key`) stay together; the halves are as large as that allows.

    Raises:
        DataError: the held-out pairs have fewer than two different inputs.
    """
    halves = PairHalves([], [])
    side_of: dict[str, list[Pair]] = {}
    for split in ("test", "validation"):
        by_input: dict[str, list[Pair]] = {}
        for pair in task.pairs_of(split):
            by_input.setdefault(text_key(pair.input), []).append(pair)
        groups = list(by_input.items())
        random.Random(f"{seed}/{task.name}/{split}").shuffle(groups)
        for key, group in groups:
            smaller = halves.ranking if len(halves.ranking) <= len(halves.reporting) else halves.reporting
            side_of.setdefault(key, smaller).extend(group)
    if len(side_of) < 2:
        raise DataError(
            f"dividing the held-out pairs of task {task.name!r}: found {len(side_of)} different inputs among its test and "
            "validation pairs, expected at least two. Give the task more held-out pairs."
        )
    return halves


def in_turn(pairs: Sequence[Pair], limit: int, *, balanced: bool) -> list[int]:
    """The places of the first `limit` pairs; balanced: in turn from each output, each output's first ones."""
    if len(pairs) <= limit or not balanced:
        return list(range(len(pairs)))[:limit]
    by_output: dict[str, list[int]] = {}
    for place, pair in enumerate(pairs):
        by_output.setdefault(pair.output, []).append(place)
    rounds = [(turn, place) for places in by_output.values() for turn, place in enumerate(places)]
    return [place for _, place in sorted(rounds)[:limit]]
