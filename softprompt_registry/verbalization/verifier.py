"""The verifier: candidate texts scored by what they make the base model do, without a call of the target LLM.

A text that says what a soft prompt does makes the base model act as the soft prompt does. With held-out pairs of its task
that is read off the likelihood of their outputs; without any, off how close the model's next-token distributions come to
those under the soft prompt.

Gibberish that was searched for can come as close as a good text does. So the verifier ranks fluent candidates; it is no guide
for a search.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from pydantic import PositiveInt

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.base_models.reference import require_same_base
from softprompt_registry.config import InnerShare, settings
from softprompt_registry.dod.task import TEMPLATES, Pair
from softprompt_registry.errors import BaseModelError, ConfigError, DataError
from softprompt_registry.soft_prompts.encoding import RowEncoder, encode_inside
from softprompt_registry.soft_prompts.performance import soft_rows
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt
from softprompt_registry.soft_prompts.token_budget import TokenBudget, pieces, tokens_that_fit
from softprompt_registry.verbalization.conditions import (
    Conditions,
    Item,
    PassStatistics,
    embedded,
    negative_divergences,
    target_log_likelihoods,
)
from softprompt_registry.verbalization.evidence import TriedOn
from softprompt_registry.verbalization.held_out import in_turn
from softprompt_registry.verbalization.verification import (
    Bootstrap,
    Evidence,
    OrderTest,
    Verification,
    Verified,
    faithfulness_of,
    gain_of,
    why_no_faithfulness,
)

if TYPE_CHECKING:
    import torch

NO_PROMPT, SOFT_PROMPT = 0, 1
"""Numbers of the first two conditions; those of the candidates follow."""
MAX_ORDER_ITEMS = 10
"""So many pairs at most show how a soft prompt's tokens do in other orders: tuned ones differ from these by nats."""


@settings
class VerifierConfig:
    """How candidates are verified."""

    max_pairs: PositiveInt = 32
    """Use at most so many of the given pairs: the first ones, for a classification in turn from each output."""
    max_probe_inputs: PositiveInt = 32
    """Use at most so many of the given probe inputs: the first ones. Each takes max_answer_tokens × V × 4 bytes of memory."""
    max_answer_tokens: PositiveInt = 8
    """Length cap of the soft-prompted model's answer to a probe input, its end included; so many positions are compared."""
    max_pair_tokens: int = 256
    """Longest filled template and answer together. Longer inputs are cut from the right; answers never are."""
    max_candidate_tokens: PositiveInt = 256
    """Longest candidate, at most half of the base model's context. Longer ones are cut (`Verified.truncated`)."""
    draws: PositiveInt = 2000
    """Draws of the bootstrap over pairs or probe inputs."""
    level: InnerShare = 0.95
    """Share of the draws that lie between the ends of an interval; 1 - level is that of the permutation test."""
    orders: int | None = None
    """Random orders of a soft prompt's tokens that are tried, on up to 10 pairs; a prompt that does not beat them all gets
    no text (`OrderTest`). Null: as few as the level allows, 19. 0: no test. Prompts whose tokens have fewer orders, and
    probe inputs, are not tested."""
    tokens_per_forward: PositiveInt | None = None
    """Tokens of one forward pass, padding included. Null takes what suits the free memory. Halved when the memory does not
    suffice; results stay the same to rounding."""
    seed: int = 0
    """Seed for the bootstrap and the random orders."""

    def __post_init__(self) -> None:
        if self.max_pair_tokens < self.max_answer_tokens + 8:
            raise ValueError(
                f"max_pair_tokens={self.max_pair_tokens} leaves no room for text before {self.max_answer_tokens} tokens of "
                "an answer"
            )
        if self.orders and self.orders < self.fewest_orders:
            raise ValueError(
                f"orders is {self.orders}, expected 0 or at least {self.fewest_orders}: fewer can show nothing at the level "
                f"{self.level}"
            )

    @property
    def fewest_orders(self) -> int:
        """With fewer, not even the best of all orders has a p-value of 1 - level."""
        return math.ceil(self.level / (1 - self.level) - 1e-9)


class _Reading(NamedTuple):
    """A candidate as the base model reads it."""

    ids: tuple[int, ...]
    """With the line break behind it; none for an empty text."""
    truncated: bool


class _Items(NamedTuple):
    """What all conditions are tried on."""

    items: list[Item]
    places: list[int]
    """Place of each item in what was given."""
    truncated: int


class Verifier:
    """Scores candidate texts for soft prompts of one base model.

    `statistics` counts what has gone through the model, in all calls together; what `verify` generates is not in it.
    """

    def __init__(self, base_model: BaseModel, config: VerifierConfig | None = None) -> None:
        self.base_model = base_model
        self.config = config or VerifierConfig()
        self.statistics = PassStatistics()
        self._budget = TokenBudget(self.config.tokens_per_forward or tokens_that_fit(base_model, 1))

    @property
    def halvings(self) -> int:
        """How often the memory did not suffice."""
        return self._budget.halvings

    def verify(
        self,
        soft_prompt: SoftPrompt,
        texts: Sequence[str],
        *,
        pairs: Sequence[Pair] = (),
        inputs: Sequence[str] = (),
        template: str | None = None,
        test_order: bool = False,
    ) -> Verification:
        """Score texts by how the base model acts under them, beside the soft prompt and no prompt on the same items.

        What the base model reads; what follows a candidate is the same tokens as without one:

            no prompt     [BOS][filled template][answer]
            soft prompt   [soft tokens][BOS][filled template][answer]
            candidate     [BOS][candidate][line break][filled template][answer]

        The soft prompt's layout decides whether there is a BOS, in all of them.

        With pairs an answer is one space, the pair's output and EOS. With inputs alone it is what the model under the soft
        prompt says greedily, with EOS where it ends before `max_answer_tokens`. White space around a candidate is left
        out; an empty one is no prompt.

        Args:
            texts: candidates; equal ones are scored and listed once.
            pairs: held out, of the soft prompt's task. Those that it was tuned on would flatter it.
            inputs: probe inputs, where there are no pairs; beside pairs they are not used.
            template: with `{x}` for the input; None takes the soft prompt's own.
            test_order: where there is a gain on pairs, see whether other orders of the soft prompt's tokens do as well.

        Raises:
            ConfigError: there are neither pairs nor inputs, or the template has no place for the input.
            DataError: an item does not fit into the base model's context, or has no text.
            BaseModelMismatch: the soft prompt belongs to another base model.
            BaseModelError: the base model gives no finite scores.
        """
        import torch

        record = soft_prompt.record
        doing = f"verifying texts for soft prompt {record.task!r}"
        require_same_base(doing, "the soft prompt", record.base_model, "the loaded model", self.base_model.ref)
        template = record.template if template is None else template
        if template.count("{x}") != 1:
            raise ConfigError(
                f"{doing}: its template is {template!r}, expected one with '{{x}}' once, where the input goes, such as "
                "'Input: {x}\\nOutput:'. Give the template that it was tuned with."
            )
        if not pairs and not inputs:
            raise ConfigError(
                f"{doing}: found neither pairs nor inputs, expected something to try the texts on. Give held-out pairs of "
                "its task as `pairs`, or a few typical inputs as `inputs`."
            )
        evidence: Evidence = "pairs" if pairs else "probe inputs"
        readings = {text: self._read(text) for text in texts}
        numbers: dict[tuple[int, ...], int] = {(): NO_PROMPT}
        for reading in readings.values():
            numbers.setdefault(reading.ids, len(numbers) + 1)  # SOFT_PROMPT has no text
        with torch.no_grad():
            encoder = RowEncoder.of(self.base_model, record)
            beginnings = self._beginnings(soft_prompt, encoder.bos, [ids for ids in numbers if ids])
            room = self.base_model.max_positions - max(map(len, beginnings))
            if pairs:
                found = self._pairs(encoder, pairs, template, room, doing, balanced=record.kind == "classification")
            else:
                found = self._answered_inputs(soft_prompt, inputs, template, room, doing)
            scores = self._budget.run(lambda tokens: self._scores(beginnings, found.items, evidence, tokens))
        if not all(math.isfinite(score) for row in scores for score in row):
            raise BaseModelError(
                f"{doing}: the base model's scores hold NaN or infinity, expected finite numbers. Load it in float32, or "
                "tune the soft prompt again with a lower learning rate."
            )
        bootstrap = Bootstrap(len(found.items), draws=self.config.draws, level=self.config.level, seed=self.config.seed)
        gain = gain_of(scores[NO_PROMPT], scores[SOFT_PROMPT], bootstrap)
        reason = why_no_faithfulness(gain, len(found.items), evidence, self.config.level)
        order = None
        if test_order and pairs and reason is None:
            with torch.no_grad():
                order = self._order_test(soft_prompt, found.items, scores[SOFT_PROMPT])
        candidates = []
        for text, reading in readings.items():
            row = scores[numbers[reading.ids]]
            value, low, high = (
                (None, None, None)
                if reason
                else faithfulness_of(row, scores[NO_PROMPT], scores[SOFT_PROMPT], bootstrap)
            )
            candidates.append(Verified(text, fmean(row), value, low, high, tuple(row), reading.truncated))
        return Verification(
            task=record.task,
            soft_prompt_id=soft_prompt.id,
            base_fingerprint=record.base_model.fingerprint,
            evidence=evidence,
            items=tuple(found.places),
            no_prompt_scores=tuple(scores[NO_PROMPT]),
            soft_prompt_scores=tuple(scores[SOFT_PROMPT]),
            gain=gain,
            reason=reason,
            candidates=tuple(sorted(candidates, key=lambda candidate: -candidate.score)),  # equal ones keep their order
            truncated_inputs=found.truncated,
            draws=self.config.draws,
            level=self.config.level,
            seed=self.config.seed,
            order=order,
        )

    def _order_test(
        self, soft_prompt: SoftPrompt, items: Sequence[Item], own_scores: Sequence[float]
    ) -> OrderTest | None:
        """Score random other orders of the soft prompt's tokens on the same items, the first of them.

        Returns:
            None if there shall be no test, or the tokens have not so many other orders.
        """
        import torch

        length = soft_prompt.num_virtual_tokens
        count = self.config.fewest_orders if self.config.orders is None else self.config.orders
        if not count or math.factorial(min(length, 20)) - 1 < count:
            return None
        _, own = self._beginnings(soft_prompt, RowEncoder.of(self.base_model, soft_prompt.record).bos, [])
        others = [
            torch.cat([own[list(order)], own[length:]]) for order in _other_orders(length, count, self.config.seed)
        ]
        few = items[:MAX_ORDER_ITEMS]
        scores = self._budget.run(lambda tokens: self._scores(others, few, "pairs", tokens))
        return OrderTest(fmean(own_scores[: len(few)]), tuple(map(fmean, scores)))

    def check_pairs(self, soft_prompt: SoftPrompt, pairs: Sequence[Pair]) -> None:
        """See that `verify` can use these pairs, whatever the texts are.

        Raises:
            DataError: a pair that would be used does not fit into the base model's context, or has no text.
        """
        record = soft_prompt.record
        encoder = RowEncoder.of(self.base_model, record)
        longest = max(soft_prompt.num_virtual_tokens, self._candidate_limit + len(self._line_break))
        room = self.base_model.max_positions - longest - len(encoder.bos)
        doing = f"verifying texts for soft prompt {record.task!r}"
        self._pairs(encoder, pairs, record.template, room, doing, balanced=record.kind == "classification")

    @property
    def _candidate_limit(self) -> int:
        return max(min(self.config.max_candidate_tokens, self.base_model.max_positions // 2), 1)

    @property
    def _line_break(self) -> list[int]:
        return encode_inside(self.base_model, "\n")

    def _read(self, text: str) -> _Reading:
        limit = self._candidate_limit
        ids = self.base_model.tokenize(text.strip())
        if not ids:
            return _Reading((), False)
        return _Reading((*ids[:limit], *self._line_break), len(ids) > limit)

    def _beginnings(
        self, soft_prompt: SoftPrompt, first: Sequence[int], candidates: Sequence[Sequence[int]]
    ) -> list[torch.Tensor]:
        """(N, D) of each condition: no prompt, the soft prompt, the candidates."""
        import torch

        base = self.base_model
        bos = embedded(base, first)  # (1, D), or (0, D) without BOS
        soft = torch.cat([soft_prompt.embeddings.to(bos), bos])  # (K + 1, D)
        return [bos, soft, *(embedded(base, [*first, *ids]) for ids in candidates)]

    def _pairs(
        self, encoder: RowEncoder, pairs: Sequence[Pair], template: str, room: int, doing: str, *, balanced: bool
    ) -> _Items:
        places = in_turn(pairs, self.config.max_pairs, balanced=balanced)
        items, truncated = [], 0
        for place in places:
            limit = min(self.config.max_pair_tokens, room)
            encoded, cut = encoder.pair(template, pairs[place], limit)
            items.append(Item(encoded.prompt[len(encoder.bos) :], encoded.target))
            truncated += cut
            self._check(items[-1].text, len(items[-1].target), room, f"{doing} with pair {place}")
        return _Items(items, places, truncated)

    def _answered_inputs(
        self, soft_prompt: SoftPrompt, inputs: Sequence[str], template: str, room: int, doing: str
    ) -> _Items:
        """Inputs with what the model under the soft prompt answers, its own end token included where it ends."""
        base, cap = self.base_model, self.config.max_answer_tokens
        encoder = RowEncoder.of(base, soft_prompt.record)
        prompts, truncated = [], 0
        for place, text in enumerate(inputs[: self.config.max_probe_inputs]):
            limit = min(self.config.max_pair_tokens, room) - cap
            prompt, cut = encoder.prompt(template, text, limit)
            prompts.append(prompt)
            truncated += cut
            self._check(prompt[len(encoder.bos) :], cap, room, f"{doing} with input {place}")
        answers = self._budget.run(lambda tokens: self._answers(soft_prompt, prompts, tokens))
        items = []
        for prompt, answer in zip(prompts, answers, strict=True):
            items.append(Item(prompt[len(encoder.bos) :], answer))
        return _Items(items, list(range(len(items))), truncated)

    def _answers(self, soft_prompt: SoftPrompt, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        base, cap = self.base_model, self.config.max_answer_tokens
        soft_of = soft_rows(base, [soft_prompt.embeddings.to(base.device)], prompts)
        beside = soft_prompt.num_virtual_tokens + cap
        answers: dict[int, list[int]] = {}
        for piece in pieces(range(len(prompts)), lambda number: beside + len(prompts[number]), tokens):
            soft = soft_of([0] * len(piece))
            rows = base.generate(soft, [prompts[number] for number in piece], max_new_tokens=cap, keep_end=True)
            answers |= zip(piece, rows, strict=True)
        return [answers[number] for number in range(len(prompts))]

    def _check(self, text: Sequence[int], num_answer_tokens: int, room: int, doing: str) -> None:
        if not text:
            raise DataError(f"{doing}: its filled template is empty, expected some text. Leave it out.")
        if len(text) + num_answer_tokens > room:
            raise DataError(
                f"{doing}: its text and answer have {len(text)} and {num_answer_tokens} tokens, although the input was cut; "
                f"behind the soft prompt and the candidates there is room for {room}. Leave it out, or lower "
                "max_candidate_tokens."
            )

    def _scores(
        self, beginnings: Sequence[torch.Tensor], items: Sequence[Item], evidence: Evidence, tokens: int
    ) -> list[list[float]]:
        """(C, n): each item's score under each condition."""
        conditions = Conditions(self.base_model, beginnings, items, tokens, self.statistics)
        if evidence == "pairs":
            return target_log_likelihoods(conditions)
        return negative_divergences(conditions, reference=SOFT_PROMPT)


def _other_orders(length: int, count: int, seed: int) -> list[tuple[int, ...]]:
    """Distinct random orders of 0 … length - 1, none of them the sorted one."""
    generator = random.Random(seed)
    own = tuple(range(length))
    orders: dict[tuple[int, ...], None] = {}
    while len(orders) < count:
        order = tuple(generator.sample(own, length))
        if order != own:
            orders[order] = None
    return list(orders)


_INPUTS_FOR_TEMPLATE = 8


def fitting_template(verifier: Verifier, soft_prompt: SoftPrompt, data: TriedOn) -> str:
    """The one of `TEMPLATES` that a soft prompt was most likely tuned in, where its record does not say.

    That in which it makes the outputs of the pairs likelier; without pairs, that in which the base model under the soft
    prompt is surer of what it answers to the inputs, which tells less.
    """

    def fit(template: str) -> float:
        if data.pairs:
            return verifier.verify(soft_prompt, [], pairs=data.pairs, template=template).soft_prompt
        return _sureness(verifier, soft_prompt, data.inputs[:_INPUTS_FOR_TEMPLATE], template)

    return max(TEMPLATES.values(), key=fit)


def _sureness(verifier: Verifier, soft_prompt: SoftPrompt, inputs: Sequence[str], template: str) -> float:
    """Mean log-likelihood per token of the greedy answers, with EOS where they end, in nats."""
    import torch

    base, config = verifier.base_model, verifier.config
    room = base.max_positions - soft_prompt.num_virtual_tokens - config.max_answer_tokens - 1
    limit = min(config.max_pair_tokens, room)
    encoder = RowEncoder.of(base, soft_prompt.record)
    prompts = [encoder.prompt(template, text, limit)[0] for text in inputs]
    soft = soft_prompt.embeddings.to(base.device).expand(len(prompts), -1, -1)  # (B, K, D)
    with torch.no_grad():
        answers = base.generate(soft, prompts, max_new_tokens=config.max_answer_tokens, keep_end=True)
        scores = base.score_targets(soft, prompts, answers)
    return float((scores.log_likelihood / scores.num_tokens).mean())
