"""What asking will cost at most, what it has cost, and where it ends."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from pydantic import PositiveFloat, PositiveInt

from softprompt_registry.config import settings
from softprompt_registry.errors import ConfigError, LanguageModelError
from softprompt_registry.language_models.answer_cache import AnswerCache
from softprompt_registry.language_models.protocol import Completion, CompletionRequest, Prices, Usage, usage_of
from softprompt_registry.portability.answers import Question
from softprompt_registry.portability.targets import TargetConfig

BYTES_PER_TOKEN = 3
"""Bytes of UTF-8 text that make a token, at least: English has more than four, Chinese about three."""
TOKENS_AROUND = 32
"""Tokens that a chat template puts around a system text and a prompt, at most."""
BY_BYTES = f"bytes / {BYTES_PER_TOKEN} + {TOKENS_AROUND}"


@dataclass(frozen=True)
class TargetPlan:
    """What one target is to be asked."""

    config: TargetConfig
    questions: Sequence[Question]
    requests: Sequence[CompletionRequest]
    """One for each question; equal ones are asked once."""


@dataclass(frozen=True)
class ConditionEstimate:
    """What one condition would cost on one target in this run. What it shares with a condition before it stands there."""

    target: str
    condition: str
    questions: int
    requests: int
    """That are not in the cache. Of a target in this process all, since only the loaded weights say what the cache has."""
    prompt_tokens: int
    completion_tokens: int
    """At most: every answer as long as it may be."""
    cost: float | None
    """At most; None where the prices are not known."""
    is_remote: bool
    """False for what runs in this process, which is shown but counts towards no budget."""
    counted_by: str = BY_BYTES
    """How the prompt tokens were counted."""


@dataclass(frozen=True)
class Estimate:
    """The estimates of all conditions, target by target."""

    conditions: list[ConditionEstimate]

    @property
    def tokens(self) -> int:
        """Of all remote targets, at most."""
        return sum(one.prompt_tokens + one.completion_tokens for one in self.conditions if one.is_remote)

    @property
    def cost(self) -> float | None:
        """Of all remote targets, at most; None if one that has requests has no prices."""
        costs = [one.cost for one in self.conditions if one.is_remote and one.requests]
        return None if any(cost is None for cost in costs) else sum(cost for cost in costs if cost is not None)


def estimate(plans: Sequence[TargetPlan], cache: AnswerCache) -> Estimate:
    """What asking for everything that the cache lacks would cost at most; nothing is asked."""
    found: list[ConditionEstimate] = []
    for plan in plans:
        config, identity = plan.config, plan.config.identity
        seen: set[CompletionRequest] = set()
        missing: dict[str, list[CompletionRequest]] = {}
        for question, request in zip(plan.questions, plan.requests, strict=True):
            new = missing.setdefault(question.condition, [])
            if request not in seen and (identity is None or cache.get(identity, request) is None):
                new.append(request)
            seen.add(request)
        questions = Counter(question.condition for question in plan.questions)
        for condition, requests in missing.items():
            prompt_tokens = sum(map(tokens_by_bytes, requests))
            completion_tokens = sum(request.max_tokens for request in requests)
            found.append(
                ConditionEstimate(
                    target=config.title,
                    condition=condition,
                    questions=questions[condition],
                    requests=len(requests),
                    prompt_tokens=prompt_tokens,
                    completion_tokens=completion_tokens,
                    cost=config.prices and config.prices.cost(prompt_tokens, completion_tokens),
                    is_remote=config.is_remote,
                )
            )
    return Estimate(found)


def tokens_by_bytes(request: CompletionRequest) -> int:
    """Prompt tokens of a request, no fewer than almost any tokenizer makes of it."""
    text = (request.system or "") + request.prompt
    return math.ceil(len(text.encode("utf-8", "replace")) / BYTES_PER_TOKEN) + TOKENS_AROUND


@settings
class Budget:
    """The most that one run may use on remote targets, all of them together.

    What a request will use is estimated from above (`tokens_by_bytes`); a tokenizer that makes more of a text, one that takes
    digits one by one for instance, can go past the limit by what is then on its way.
    """

    max_tokens: PositiveInt | None = None
    """Prompt and completion tokens. None: no limit."""
    max_cost: PositiveFloat | None = None
    """In the currency of the prices. None: no limit."""

    def require(self, expected: Estimate) -> None:
        """Refuse what could go past the limits.

        Raises:
            ConfigError: the estimate is above a limit, or the cost is limited and not known.
        """
        if self.max_cost is not None and expected.cost is None:
            without = sorted(
                {one.target for one in expected.conditions if one.is_remote and one.requests and one.cost is None}
            )
            raise ConfigError(
                f"checking the budget: max_cost is {self.max_cost:g}, but the targets {without} have no prices, expected "
                "them for every target. Set price_per_million_prompt_tokens and price_per_million_completion_tokens, or "
                "limit max_tokens."
            )
        for name, limit, most in (
            ("max_tokens", self.max_tokens, expected.tokens),
            ("max_cost", self.max_cost, expected.cost),
        ):
            if limit is not None and most is not None and most > limit:
                requests = sum(one.requests for one in expected.conditions if one.is_remote)
                raise ConfigError(
                    f"checking the budget: what is missing takes {requests} requests and up to {most:,.10g} ({name} is "
                    f"{limit:,.10g}), expected no more than the limit; nothing was asked. Ask about fewer items, conditions "
                    f"or tasks, lower the targets' max_tokens, or raise {name}."
                )


@dataclass
class Spending:
    """What one run has used and what is on its way, against its budget."""

    budget: Budget
    used: Usage = field(default_factory=Usage)
    on_its_way: dict[CompletionRequest, Usage] = field(default_factory=dict)
    """What each request may use at most."""

    def reserve(self, request: CompletionRequest, prices: Prices | None) -> str | None:
        """Count a request that is about to be asked, at most as much as it may use; why not, if that could be too much."""
        most = _most(request, prices)
        total = sum(self.on_its_way.values(), self.used + most)
        tokens, budget = total.prompt_tokens + total.completion_tokens, self.budget
        if budget.max_tokens is not None and tokens > budget.max_tokens:
            return f"the budget is spent: {self._tokens:,} tokens used, max_tokens is {budget.max_tokens:,}"
        if budget.max_cost is not None and total.cost is not None and total.cost > budget.max_cost:
            return f"the budget is spent: it cost {self.used.cost or 0:.10g}, max_cost is {budget.max_cost:.10g}"
        self.on_its_way[request] = most
        return None

    def settle(
        self, request: CompletionRequest, result: Completion | LanguageModelError, prices: Prices | None
    ) -> None:
        """Count what a request has used, or may have at most where the server does not say. Of a failed one nobody says what
        it was billed, so it counts as nothing."""
        most = self.on_its_way.pop(request, None)
        if isinstance(result, Completion):
            self.used += usage_of([result], prices) if result.is_counted else most or _most(request, prices)

    @property
    def _tokens(self) -> int:
        return self.used.prompt_tokens + self.used.completion_tokens


def _most(request: CompletionRequest, prices: Prices | None) -> Usage:
    return usage_of([Completion("", tokens_by_bytes(request), request.max_tokens, 0.0, None, 1)], prices)
