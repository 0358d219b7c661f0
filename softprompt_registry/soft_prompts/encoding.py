"""Texts of a soft prompt as token ids: the pairs it is tuned on, and all that is later put behind it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from softprompt_registry.base_models.frozen import SEQUENCE_LAYOUT, BaseModel
from softprompt_registry.dod.task import Pair, PairSplit, Task, fill_template
from softprompt_registry.soft_prompts.soft_prompt import AS_ONE_TEXT, ENCODED_APART

if TYPE_CHECKING:
    from softprompt_registry.soft_prompts.soft_prompt import SoftPromptRecord

_SOME_TEXT = "x"
"""Stands for an input where only what follows it matters."""


@dataclass(frozen=True)
class EncodedPair:
    """A pair as token ids."""

    prompt: list[int]
    """BOS, where the layout has it, and the filled template."""
    target: list[int]
    """One space, the output and EOS. Paper: its general prompts were trained without EOS and ran on; ours end."""

    @property
    def num_tokens(self) -> int:
        """Number of tokens of prompt and target together, without soft tokens."""
        return len(self.prompt) + len(self.target)


@dataclass(frozen=True)
class RowEncoder:
    """How texts become the rows of one soft prompt.

    The names of special tokens (`</s>`) in inputs and outputs are text. In a template they are these tokens, and then also in
    the prompts made from it, which are encoded whole.
    """

    base_model: BaseModel
    layout: str
    """Layout in the soft prompt's record; `encoding` is from there too."""
    encoding: int

    @classmethod
    def of(cls, base_model: BaseModel, record: SoftPromptRecord) -> RowEncoder:
        """As the soft prompt was tuned."""
        return cls(base_model, record.layout, record.encoding)

    @classmethod
    def of_new_prompts(cls, base_model: BaseModel) -> RowEncoder:
        """As soft prompts are tuned here."""
        return cls(base_model, SEQUENCE_LAYOUT, encoding_for(base_model.tokenizer))

    @property
    def bos(self) -> list[int]:
        """What stands between the soft tokens and the text: the BOS id or nothing."""
        return self.base_model.bos if self.layout == SEQUENCE_LAYOUT else []

    def text(self, text: str) -> list[int]:
        """Token ids of a whole text behind the soft tokens."""
        return [*self.bos, *self.base_model.tokenize(text)]

    def pair(self, template: str, pair: Pair, max_tokens: int) -> tuple[EncodedPair, bool]:
        """Token ids of a pair, and whether its input had to be cut to fit `max_tokens` (prompt and target together).

        Paper: it cut at 64 tokens from the right, label included; here the input gives way, the target never does.
        """
        filled = fill_template(template, pair.input)
        special = self.base_model.names_special_tokens(template)
        prompt = self.base_model.tokenize(filled, special_tokens=special)
        dropped, target = self._target(filled, pair.output, special)
        target = [*target, self.base_model.eos_id]
        kept, cut = self._cut(template, pair.input, prompt, max_tokens - len(target), dropped)
        return EncodedPair([*self.bos, *kept], target), cut

    def prompt(self, template: str, text: str, max_tokens: int) -> tuple[list[int], bool]:
        """Token ids of a filled template to be answered, and whether its input had to be cut.

        `max_tokens` has room for the shortest answer too, of two tokens.
        """
        special = self.base_model.names_special_tokens(template)
        prompt = self.base_model.tokenize(fill_template(template, text), special_tokens=special)
        kept, cut = self._cut(template, text, prompt, max_tokens - 2, 0)
        return [*self.bos, *kept], cut

    def label(self, template: str, label: str) -> tuple[int, list[int]]:
        """Token ids of a target without EOS, and how many tokens at the end of each prompt give way to it."""
        special = self.base_model.names_special_tokens(template)
        return self._target(fill_template(template, _SOME_TEXT), label, special)

    def _target(self, filled: str, output: str, special: bool) -> tuple[int, list[int]]:
        if self.encoding == ENCODED_APART:
            return 0, self.base_model.tokenize(f" {output}")
        return encode_behind(self.base_model, filled, f" {output}", special_tokens=special)

    def _cut(self, template: str, text: str, prompt: list[int], room: int, dropped: int) -> tuple[list[int], bool]:
        """A filled template without its last `dropped` tokens; if more than `room` are left, its input is cut."""
        room -= len(self.bos)
        end = len(prompt) - dropped
        if end <= room:
            return prompt[:end], False
        before, after = template.split("{x}")
        # Most tokenizers join a space to the word after it, so the one before the input goes with the input.
        space = " " if before.endswith(" ") else ""
        head = self.base_model.tokenize(before.removesuffix(space), special_tokens=True)
        if self.encoding == ENCODED_APART:
            middle = self.base_model.tokenize(space + text)
            tail = self.base_model.tokenize(after, special_tokens=True)
        else:
            # Of the whole text's own tokens: each part alone would begin as a text does.
            tail = encode_behind(self.base_model, _SOME_TEXT, after, special_tokens=True)[1]
            first = _num_common(head, prompt)
            last = max(len(prompt) - _num_common(tail[::-1], prompt[::-1]), first)
            head, middle, tail = prompt[:first], prompt[first : min(last, end)], prompt[last:end]
        return [*head, *middle[: max(room - len(head) - len(tail), 1)], *tail], True


def encode_behind(
    base_model: BaseModel, before: str, text: str, *, special_tokens: bool = False
) -> tuple[int, list[int]]:
    """Token ids of `text` where it stands behind `before` in one text.

    Encoded alone, a text gets a space of its own from tokenizers such as Llama 2's. A token that belongs to both texts is
    counted to the second.

    Args:
        special_tokens: see `BaseModel.tokenize`.
    Returns:
        How many of the tokens of `before` alone, the last ones, give way; and the ids.
    """
    alone, whole = (base_model.tokenize(part, special_tokens=special_tokens) for part in (before, before + text))
    kept = _num_common(alone, whole)
    return len(alone) - kept, whole[kept:]


def encode_inside(base_model: BaseModel, text: str) -> list[int]:
    """Token ids of a text where it stands behind another one, whose last token it must not be joined with."""
    return encode_behind(base_model, _SOME_TEXT, text)[1]


def encoding_for(tokenizer: Any) -> int:
    """The `encoding` of soft prompts that are tuned with this tokenizer.

    The first for a tokenizer that puts nothing before a text: there both give the same ids.
    """

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    parts = (("a", " good"), ("a:", " good"), ("a", ":"))
    return ENCODED_APART if all(ids(a) + ids(b) == ids(a + b) for a, b in parts) else AS_ONE_TEXT


def _num_common(some: Sequence[int], others: Sequence[int]) -> int:
    """How many first tokens agree."""
    for place, (one, other) in enumerate(zip(some, others, strict=False)):
        if one != other:
            return place
    return min(len(some), len(others))


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
