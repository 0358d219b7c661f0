"""When to say nothing: a text that does not make the base model act like the soft prompt is not given as an answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from statistics import NormalDist, fmean
from typing import Any, NamedTuple

from softprompt_registry.errors import ConfigError, DataError
from softprompt_registry.storage import complete_record
from softprompt_registry.verbalization.verification import Verification

DEFAULT_MIN_FAITHFULNESS = 0.5
"""From here on a text makes the base model act more as the soft prompt does than as it does without a prompt. It is no
measured number: what share good texts keep depends on the base model and the tasks, and `evaluate` measures it."""
MIN_ANSWERED = 5
"""A threshold that so few training tasks reach is not chosen: one or two lucky ones would decide it."""
ALWAYS = "always abstains: "
"""Beginning of the reason of a rule that gives no text."""
_ROUNDING = 1e-9


@dataclass(frozen=True)
class AbstentionRule:
    """The faithfulness that a text needs to be given, and how that threshold was chosen.

    Raises:
        ConfigError: the threshold is not finite.
    """

    min_faithfulness: float = 0.0
    """Texts below it are not given; 0 is a text that acts like no prompt, 1 one that acts like the soft prompt."""
    always_abstain: str | None = None
    """Why no text is given at all; None gives those that reach the threshold."""
    precision: float | None = None
    """The rule was chosen so that at least this share of the answered training tasks is good; None was not chosen on any."""
    num_tasks: int = 0
    """Training tasks that it was chosen on."""
    num_answered: int = 0
    """Those of them that it answers."""
    num_good: int = 0
    """Those of the answered ones that are good."""
    precision_low: float | None = None
    """Lower end of the 95 % Wilson interval of num_good / num_answered: what tasks as few as these show."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.min_faithfulness):
            raise ConfigError(
                f"reading an abstention rule: min_faithfulness is {self.min_faithfulness}, expected a finite number. Use "
                "always_abstain, with a reason, for a rule that answers nothing."
            )

    def describe(self) -> str:
        """What the rule withholds, in one or two sentences; where it withholds every text, also what to do."""
        if self.always_abstain is not None:
            return (
                f"Every text is withheld: {self.always_abstain.removeprefix(ALWAYS)}. Train the translator on more tasks, "
                "choose the rule on more of them (abstention.num_tasks), accept a smaller share of good texts "
                "(abstention.precision), or give a threshold (abstention.min_faithfulness)."
            )
        withheld = f"Texts with a faithfulness below {self.min_faithfulness:.2f} are withheld"
        if self.precision is None:
            return f"{withheld}; this threshold was given, not chosen on training tasks."
        return (
            f"{withheld}: {self.num_good} of the {self.num_answered} training tasks that reach it have a good text "
            f"(required: {self.precision:.0%})."
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> AbstentionRule:
        """What `to_json` gave.

        Raises:
            ArtifactError: an entry is missing.
        """
        with complete_record("an abstention rule"):
            return cls(**{item.name: record[item.name] for item in fields(cls)})


@dataclass(frozen=True)
class Decision:
    """Whether the best candidate is given as an answer."""

    abstained: bool
    reason: str | None
    """Why not; None where it is given."""


def decide(verification: Verification, rule: AbstentionRule) -> Decision:
    """Abstain unless the soft prompt does something, and the best candidate says something and keeps enough of the gain."""
    best = verification.best
    if best is None:
        return Decision(True, "there is no candidate text")
    if (reason := why_not_tuned(verification)) is not None:
        return Decision(True, reason)
    if best.faithfulness is None:
        return Decision(True, "no faithfulness")
    if not best.text.strip():
        return Decision(True, "the best text is empty, which is no prompt at all")
    if rule.always_abstain is not None:
        return Decision(True, rule.always_abstain)
    if best.faithfulness < rule.min_faithfulness:
        return Decision(
            True,
            f"the best text keeps {best.faithfulness:.2f} of the soft prompt's gain ({verification.level:.0%} interval "
            f"{best.low:.2f} to {best.high:.2f}, {len(verification.items)} {verification.evidence}), less than the required "
            f"{rule.min_faithfulness:.2f}",
        )
    return Decision(False, None)


def why_not_tuned(verification: Verification) -> str | None:
    """A sentence if the soft prompt may say nothing: it is not surely better than no prompt, or its tokens may do as well in
    another order."""
    if verification.reason is not None:
        return verification.reason
    test = verification.order
    if test is None or test.p_value <= 1 - verification.level + _ROUNDING:
        return None
    as_good = sum(score >= test.score for score in test.order_scores)
    return (
        f"the soft prompt's tokens do as well in other orders ({as_good} of {len(test.order_scores)} random ones, p = "
        f"{test.p_value:.2f}), as those of noise do"
    )


def choose_rule(
    faithfulness: Sequence[float | None], good: Sequence[bool], precision: float, *, min_answered: int = MIN_ANSWERED
) -> AbstentionRule:
    """The rule that answers the most training tasks with at least `precision` of the answered ones good.

    Its threshold is the lowest faithfulness of a training task at which that holds, and never below 0, where a text is worse
    than none. Tasks with equal faithfulness are answered together or not at all; tasks without any are never answered. The
    share was the best of several that were looked at, and on few tasks says little about others: see
    `AbstentionRule.precision_low`.

    Args:
        faithfulness: of the best text of each task, (n,).
        good: whether that text is good, (n,).
        precision: a share above 0, at most 1.
        min_answered: a threshold that fewer tasks reach is not chosen.
    Returns:
        A rule that always abstains, with the reason, if no threshold does it.

    Raises:
        DataError: the lists differ in length or are empty, or a number is not finite.
        ConfigError: `precision` or `min_answered` is out of range.
    """
    doing = "choosing an abstention rule"
    if not 0 < precision <= 1 or min_answered < 1:
        raise ConfigError(
            f"{doing}: precision is {precision} and min_answered is {min_answered}, expected a share above 0 and at most 1, "
            "and at least one task."
        )
    best: tuple[float, int, int] | None = None
    reached, hits = 0.0, 0
    groups = _groups(faithfulness, [float(value) for value in good], doing)
    answered = 0
    for threshold, values in groups:
        if threshold is None or threshold < 0:
            break
        answered += len(values)
        hits += round(sum(values))
        if answered < min_answered:
            continue
        reached = max(reached, hits / answered)
        if hits / answered >= precision:
            best = threshold, answered, hits
    if best is not None:
        threshold, answered, hits = best
        low = _wilson_low(hits, answered)
        return AbstentionRule(threshold, None, precision, len(good), answered, hits, low)
    if answered < min_answered:
        enough = f"expected at least {min_answered}"
        reason = f"only {answered} of {len(good)} training tasks have a faithfulness of 0 or more, {enough}"
    else:
        reason = (
            f"no threshold that {min_answered} or more of the {len(good)} training tasks reach makes {precision:.0%} of "
            f"their texts good; the best makes {reached:.0%}"
        )
    return AbstentionRule(always_abstain=f"{ALWAYS}{reason}", precision=precision, num_tasks=len(good))


class CoveragePoint(NamedTuple):
    """What answering down to a threshold gives."""

    coverage: float
    """Share of the tasks that are answered."""
    quality: float
    """Mean over those."""
    threshold: float | None
    """The lowest faithfulness that is answered; None where those without any are answered too."""


def coverage_curve(faithfulness: Sequence[float | None], quality: Sequence[float]) -> list[CoveragePoint]:
    """Mean quality of the answered tasks as more and more are answered, the most faithful first.

    A point for each different faithfulness, since equal ones cannot be told apart; None counts as the lowest. The last point
    answers everything.

    Args:
        faithfulness: of the best text of each task, (n,).
        quality: of that text, (n,), for instance label F1.

    Raises:
        DataError: the lists differ in length or are empty, or a number is not finite.
    """
    points = []
    answered: list[float] = []
    for threshold, values in _groups(faithfulness, quality, "drawing quality against coverage"):
        answered += values
        points.append(CoveragePoint(len(answered) / len(quality), fmean(answered), threshold))
    return points


def _groups(
    faithfulness: Sequence[float | None], values: Sequence[float], doing: str
) -> list[tuple[float | None, list[float]]]:
    """The values of the tasks of each faithfulness, highest first, None last."""
    if len(faithfulness) != len(values) or not values:
        raise DataError(
            f"{doing}: found {len(faithfulness)} faithfulness scores and {len(values)} values, expected one of each for "
            "every task, and at least one task."
        )
    numbers = [number for number in faithfulness if number is not None]
    if not all(map(math.isfinite, [*numbers, *values])):
        raise DataError(f"{doing}: found NaN or infinity, expected finite numbers, or None for no faithfulness.")
    groups: dict[float | None, list[float]] = {number: [] for number in sorted(set(numbers), reverse=True)}
    for number, value in zip(faithfulness, values, strict=True):
        groups.setdefault(number, []).append(value)
    return list(groups.items())


def _wilson_low(hits: int, total: int) -> float:
    """Lower end of the 95 % Wilson interval of a share."""
    z = NormalDist().inv_cdf(0.975)
    share = hits / total
    middle = share + z**2 / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    return (middle - half) / (1 + z**2 / total)
