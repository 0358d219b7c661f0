"""Text in, text out: what is asked, what comes back, what it cost.

A `LanguageModel` takes requests and gives one result per request. A request that failed is returned as its
`LanguageModelError`, so one bad row never spoils the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple, Protocol

from pydantic import NonNegativeFloat

from softprompt_registry.config import settings
from softprompt_registry.errors import LanguageModelError
from softprompt_registry.language_models.replies import CONTENT_FILTER


@dataclass(frozen=True)
class CompletionRequest:
    prompt: str
    """The user's text. A completions endpoint gets `system`, an empty line and then this, as one string."""
    system: str | None = None
    """Instruction that stands before the prompt, in its own message where the endpoint has messages."""
    max_tokens: int = 256
    """Longest answer, in the server's tokens."""
    temperature: float = 0.0
    """0 asks for the most probable answer."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these strings."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that the answer has already."""
    seed: int | None = None
    """Seed of the sampling. None leaves it to the engine."""
    json_schema: str | None = None
    """A JSON schema, as JSON text, that the answer must follow."""


def joined_prompt(request: CompletionRequest) -> str:
    """Both texts of a request as one, where there is no place for a system text."""
    return request.prompt if request.system is None else f"{request.system}\n\n{request.prompt}"


def messages_of(request: CompletionRequest, *, takes_system: bool) -> list[Any]:
    """A request as the messages of a chat."""
    if request.system is None or not takes_system:
        return [{"role": "user", "content": joined_prompt(request)}]
    return [{"role": "system", "content": request.system}, {"role": "user", "content": request.prompt}]


@dataclass(frozen=True)
class Completion:
    """One answer, without the model's thoughts. An empty or refused one has the text "" and says why in `finish_reason`."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    latency_s: float
    """Duration of the try that succeeded, without earlier tries and the waits between them."""
    finish_reason: str | None
    attempts: int
    raw: str | None = None
    """What the model wrote, with its thoughts; None if `text` is all of it, but for what follows a stop string."""
    adapted: str | None = None
    """Settings that it was asked with in place of those given, since the model refuses these: `send_system=False`."""

    @property
    def is_counted(self) -> bool:
        """Whether the tokens are known: some servers do not say. A prompt that was filtered is billed as none."""
        return self.prompt_tokens > 0 or self.finish_reason == CONTENT_FILTER


@dataclass(frozen=True)
class Finished:
    """One result of a stream."""

    index: int
    """Position of its request among those that were drawn, from 0."""
    result: Completion | LanguageModelError


class LanguageModel(Protocol):
    name: str
    """Name for people and records."""
    identity: str
    """All that answers depend on beside the request: which weights, and how they are asked."""

    def complete(self, requests: Sequence[CompletionRequest]) -> list[Completion | LanguageModelError]:
        """One result per request, in order; a failed request is returned as its error, never raised."""
        results = {finished.index: finished.result for finished in self.stream(requests)}
        return [results[index] for index in range(len(requests))]

    def stream(self, requests: Iterable[CompletionRequest]) -> Iterator[Finished]:
        """Results as they finish, in any order.

        Requests are drawn only as fast as they can be worked on, so there may be millions of them. Closing the iterator
        drops what is in flight.
        """
        ...

    def close(self) -> None:
        """Free threads, sockets or the model's memory. A second call does nothing."""
        ...


def recorded_name(model: LanguageModel) -> str:
    """A model's name as artifacts keep it."""
    return without_folders(model.name)


def without_folders(name: str) -> str:
    """A model's name; of one that is a path on somebody's machine, the last part."""
    return name.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1] if _is_path(name) else name


def _is_path(name: str) -> bool:
    return name.startswith(("/", "~", ".", "\\")) or name[1:3] in (":/", ":\\")


# --- What it cost ---


class Prices(NamedTuple):
    per_million_prompt_tokens: float
    per_million_completion_tokens: float

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (
            prompt_tokens * self.per_million_prompt_tokens + completion_tokens * self.per_million_completion_tokens
        ) / 1_000_000


@settings
class PriceConfig:
    """The prices of a language model."""

    _: KW_ONLY
    price_per_million_prompt_tokens: NonNegativeFloat | None = None
    """Price in any currency, one for all models. None: unknown, and so is the cost."""
    price_per_million_completion_tokens: NonNegativeFloat | None = None
    """Price in the same currency. Set both prices or none."""

    def __post_init__(self) -> None:
        if (self.price_per_million_prompt_tokens is None) != (self.price_per_million_completion_tokens is None):
            raise ValueError(
                "only one of the two prices is set, expected both price_per_million_prompt_tokens and "
                "price_per_million_completion_tokens, or none"
            )

    @property
    def prices(self) -> Prices | None:
        """None where they are not known."""
        if self.price_per_million_prompt_tokens is None or self.price_per_million_completion_tokens is None:
            return None
        return Prices(self.price_per_million_prompt_tokens, self.price_per_million_completion_tokens)


@dataclass(frozen=True)
class Usage:
    """Tokens as the server counted them; `Usage()` is zero, so `sum(usages, Usage())` works."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float | None = 0.0
    """In the currency of the prices. None when no prices are known; a sum with an unknown part is unknown."""

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            None if self.cost is None or other.cost is None else self.cost + other.cost,
        )


def usage_of(results: Iterable[Completion | LanguageModelError], prices: Prices | None) -> Usage:
    """The sum over a batch. An error counts as a request without tokens, since no server reports what it billed. The cost of
    an answer whose tokens the server does not say is unknown, and so is the sum's."""
    results = list(results)
    completions = [result for result in results if isinstance(result, Completion)]
    prompt_tokens = sum(completion.prompt_tokens for completion in completions)
    completion_tokens = sum(completion.completion_tokens for completion in completions)
    cost = None
    if prices is not None and all(completion.is_counted for completion in completions):
        cost = prices.cost(prompt_tokens, completion_tokens)
    return Usage(len(results), prompt_tokens, completion_tokens, cost)
