"""Pairs of a task as token ids, ready to be tuned on."""

from __future__ import annotations

import random
from dataclasses import dataclass

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.dod.task import Pair, PairSplit, Task, fill_template


@dataclass(frozen=True)
class EncodedPair:
    """A pair as token ids."""

    prompt: list[int]
    """BOS and the filled template."""
    target: list[int]
    """One space, the output and EOS. Paper: its general prompts were trained without EOS and ran on; ours end."""

    @property
    def num_tokens(self) -> int:
        """Of prompt and target together, without soft tokens."""
        return len(self.prompt) + len(self.target)


def encode_pair(base_model: BaseModel, template: str, pair: Pair, max_tokens: int) -> tuple[EncodedPair, bool]:
    """Token ids of a pair, and whether its input had to be cut to fit `max_tokens` (prompt and target together).

    Paper: it cut at 64 tokens from the right, label included; here the input gives way, the target never does.
    """
    target = [*base_model.tokenize(f" {pair.output}"), base_model.eos_id]
    whole = base_model.bos + base_model.tokenize(fill_template(template, pair.input))
    if len(whole) + len(target) <= max_tokens:
        return EncodedPair(whole, target), False
    before, after = template.split("{x}")
    # Most tokenizers join a space to the word after it, so the one before the input goes with the input.
    space = " " if before.endswith(" ") else ""
    head = base_model.bos + base_model.tokenize(before.removesuffix(space))
    tail = base_model.tokenize(after)
    room = max_tokens - len(head) - len(tail) - len(target)
    text = base_model.tokenize(space + pair.input)
    return EncodedPair([*head, *text[: max(room, 1)], *tail], target), True


def choose_pairs(task: Task, split: PairSplit, limit: int | None, seed: int) -> list[Pair]:
    """At most `limit` pairs of a split, in turn from each label so that a small choice stays balanced."""
    pairs = task.pairs_of(split)
    if limit is None or len(pairs) <= limit:
        return pairs
    draw = random.Random(f"{seed}/{task.name}/{split}")
    by_output: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_output.setdefault(pair.output if task.kind == "classification" else "", []).append(pair)
    for members in by_output.values():
        draw.shuffle(members)
    chosen: list[Pair] = []
    queues = [members for _, members in sorted(by_output.items())]
    while len(chosen) < limit:
        queues = [queue for queue in queues if queue]
        chosen += [queue.pop() for queue in queues][: limit - len(chosen)]
    return chosen
