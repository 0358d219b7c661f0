"""What the verifier found: a score for every condition and item, and how much of a soft prompt's gain each text keeps.

    gain         = score(soft prompt) - score(no prompt)
    faithfulness = (score(candidate) - score(no prompt)) / gain

A score is a mean over items (pairs or probe inputs). Intervals are percentile intervals of a seeded bootstrap over items,
in which the conditions share the drawn items: what makes an item hard for all of them cancels out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from statistics import fmean
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from softprompt_registry.errors import ConfigError
from softprompt_registry.storage import complete_record

Evidence = Literal["pairs", "probe inputs"]


class Gain(NamedTuple):
    """How much better the soft prompt is than no prompt, in nats per token, with its interval."""

    mean: float
    low: float
    high: float


class Faithfulness(NamedTuple):
    """The share of the soft prompt's gain that a text keeps, with its interval: 1 acts like the soft prompt, 0 like no
    prompt at all, less than 0 is worse than none."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Verified:
    """A candidate text with what it makes the base model do."""

    text: str
    score: float
    """Mean of `item_scores`; higher is better."""
    faithfulness: float | None
    """None where the soft prompt gains nothing (`Verification.reason`)."""
    low: float | None
    high: float | None
    """Ends of the faithfulness' interval."""
    item_scores: tuple[float, ...]
    """One per item, in the order of `Verification.items`."""
    truncated: bool = False
    """The text is longer than the verifier reads; what is scored is its beginning."""


class OrderTest(NamedTuple):
    """A permutation test: does the soft prompt do better than its own tokens in random other orders?

    Untuned vectors are as good in any order, whatever they gain over no prompt: of n other orders each place in the
    ranking is then equally likely. A tuned soft prompt was tuned in its order.
    """

    score: float
    """The soft prompt's mean score over the items of the test, the first of all."""
    order_scores: tuple[float, ...]
    """Mean score of each of the n other orders, on the same items."""

    @property
    def p_value(self) -> float:
        """(1 + number of orders that score as high) / (1 + n)."""
        return (1 + sum(score >= self.score for score in self.order_scores)) / (1 + len(self.order_scores))


@dataclass(frozen=True)
class Verification:
    """Candidates of one soft prompt, scored on the same items.

    With `evidence` "pairs" the score of an item is the mean log-likelihood per target token (the answer and EOS), in nats.
    With "probe inputs" it is minus the mean KL(p under the soft prompt || p under the condition) over the positions of the
    soft-prompted model's own answer, in nats; the soft prompt's own score is 0.
    """

    task: str
    soft_prompt_id: str
    base_fingerprint: str
    evidence: Evidence
    items: tuple[int, ...]
    """Which of the given pairs or inputs were used, by their place."""
    no_prompt_scores: tuple[float, ...]
    """One per item, as those of the soft prompt."""
    soft_prompt_scores: tuple[float, ...]
    gain: Gain
    reason: str | None
    """Why there is no faithfulness; None where there is."""
    candidates: tuple[Verified, ...]
    """Highest score first; of equal scores the one that was given first."""
    truncated_inputs: int
    """Items whose input was cut to fit."""
    draws: int
    """Draws of the bootstrap; `level` and `seed` are its settings too."""
    level: float
    seed: int
    order: OrderTest | None = None
    """None if the order was not tested."""

    @property
    def no_prompt(self) -> float:
        """Mean score without any prompt."""
        return fmean(self.no_prompt_scores)

    @property
    def soft_prompt(self) -> float:
        """Mean score under the soft prompt."""
        return fmean(self.soft_prompt_scores)

    @property
    def best(self) -> Verified | None:
        """The candidate with the highest score; None without any."""
        return self.candidates[0] if self.candidates else None

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "gain": self.gain._asdict(),
            "order": None if self.order is None else {**self.order._asdict(), "p_value": self.order.p_value},
            "no_prompt": self.no_prompt,
            "soft_prompt": self.soft_prompt,
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Verification:
        """What `to_json` gave.

        Raises:
            ArtifactError: an entry is missing.
        """
        with complete_record("a verification"):
            values = {item.name: record[item.name] for item in fields(cls) if item.name != "order"}
            order = record.get("order")  # runs of earlier versions have none
            values["order"] = order and OrderTest(order["score"], tuple(order["order_scores"]))
            values["gain"] = Gain(**record["gain"])
            for name in ("items", "no_prompt_scores", "soft_prompt_scores"):
                values[name] = tuple(record[name])
            values["candidates"] = tuple(
                Verified(**{**candidate, "item_scores": tuple(candidate["item_scores"])})
                for candidate in record["candidates"]
            )
            return cls(**values)


class Bootstrap:
    """Draws of items that all conditions share.

    Raises:
        ConfigError: `draws` is below 1 or `level` not between 0 and 1.
    """

    def __init__(self, num_items: int, *, draws: int, level: float, seed: int) -> None:
        if draws < 1 or not 0 < level < 1:
            raise ConfigError(
                f"bootstrapping: draws={draws} and level={level}; expected at least one draw and a level between 0 and 1."
            )
        self.level = level
        generator = np.random.default_rng(seed)
        counts = generator.multinomial(num_items, np.full(num_items, 1 / num_items), size=draws)
        self._shares = counts / num_items
        """(draws, n): how often a draw takes each item, as a share of its n items."""

    def means(self, item_scores: Sequence[float]) -> NDArray[np.float64]:
        """(draws,): the mean of (n,) scores in each draw."""
        means: NDArray[np.float64] = self._shares @ np.asarray(item_scores, dtype=np.float64)
        return means

    def interval(self, values: NDArray[np.float64]) -> tuple[float, float]:
        """Percentiles of (draws,) values that leave the same share out at either end."""
        low, high = np.quantile(values, [(1 - self.level) / 2, (1 + self.level) / 2])
        return float(low), float(high)


def gain_of(no_prompt: Sequence[float], soft_prompt: Sequence[float], bootstrap: Bootstrap) -> Gain:
    """The soft prompt's mean score minus that of no prompt.

    Args:
        no_prompt, soft_prompt: (n,) scores of the same items.
    """
    interval = bootstrap.interval(bootstrap.means(soft_prompt) - bootstrap.means(no_prompt))
    return Gain(fmean(soft_prompt) - fmean(no_prompt), *interval)


def why_no_faithfulness(gain: Gain, num_items: int, evidence: Evidence, level: float) -> str | None:
    """A sentence if the soft prompt is not surely better than no prompt: there is then no gain to keep a share of."""
    if gain.mean > 0 and gain.low > 0:
        return None
    found = "is not better than no prompt" if gain.mean <= 0 else "is not surely better than no prompt"
    return (
        f"no faithfulness: the soft prompt {found} on {num_items} {evidence} (gain {gain.mean:.3g} nats per token, "
        f"{level:.0%} interval {gain.low:.3g} to {gain.high:.3g})"
    )


def faithfulness_of(
    candidate: Sequence[float], no_prompt: Sequence[float], soft_prompt: Sequence[float], bootstrap: Bootstrap
) -> Faithfulness:
    """The share of the gain that a candidate keeps, where the soft prompt gains something.

    Draws in which it gains nothing have no such share and are left out; they are at most half of what the interval
    leaves out, or the lower end of the gain would not be above 0.

    Args:
        candidate, no_prompt, soft_prompt: (n,) scores of the same items.
    """
    nothing = bootstrap.means(no_prompt)
    kept, gained = bootstrap.means(candidate) - nothing, bootstrap.means(soft_prompt) - nothing
    interval = bootstrap.interval(kept[gained > 0] / gained[gained > 0])
    floor = fmean(no_prompt)
    return Faithfulness((fmean(candidate) - floor) / (fmean(soft_prompt) - floor), *interval)
