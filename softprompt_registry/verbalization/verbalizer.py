"""From soft prompt to verbalization: proposers write candidates, the verifier tries them, the best one is kept or none.

Without anything to try candidates on, the ranking is the proposer's own likelihood and `faithfulness` is None, with the
reason beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Protocol

from pydantic import PositiveFloat, PositiveInt

from softprompt_registry.config import settings
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt
from softprompt_registry.storage import complete_record
from softprompt_registry.verbalization.abstention import AbstentionRule, decide
from softprompt_registry.verbalization.verification import Verification

RANKED_BY_OWN_SCORE = "candidates are ranked by the proposer's own score"
NOT_VERIFIED = f"not verified: {RANKED_BY_OWN_SCORE}"


@dataclass(frozen=True)
class Candidate:
    """A text that may say what a soft prompt does."""

    text: str
    proposer: str
    score: float | None = None
    """The proposer's own score, higher is better: mean log-likelihood per token for a translator; None without one."""
    verified_score: float | None = None
    """The verifier's score, higher is better (see `Verification`); None where it was not asked."""
    prefill: str = ""
    """The beginning that the proposer was given, which is no part of what it found."""


@dataclass(frozen=True)
class Verbalization:
    """The text made from a soft prompt, with the settings and ids needed to make it again."""

    text: str
    task: str
    candidates: tuple[Candidate, ...]
    soft_prompt_id: str
    base_fingerprint: str
    prefill: str = ""
    """The given beginning of the text, which is not scored."""
    seed: int = 0
    temperature: float = 0.0
    max_new_tokens: int = 0
    translator_id: str | None = None
    faithfulness: float | None = None
    """Share of the soft prompt's gain over no prompt that the text keeps; None where it was not verified, or where the soft
    prompt gains nothing."""
    faithfulness_interval: tuple[float, float] | None = None
    """95 % bootstrap interval over the pairs or probe inputs."""
    evidence: str | None = None
    """What the text was tried on: `pairs` or `probe inputs`."""
    abstained: bool = False
    """Whether the text must not be taken for what the soft prompt does; it is kept for a look at it."""
    reason: str | None = NOT_VERIFIED
    """Why it was not verified or why it abstained."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Verbalization:
        """What `to_json` gave.

        Raises:
            ArtifactError: an entry is missing.
        """
        with complete_record("a verbalization"):
            values = {item.name: record[item.name] for item in fields(cls)}
            values["candidates"] = tuple(Candidate(**candidate) for candidate in record["candidates"])
            interval = record["faithfulness_interval"]
            values["faithfulness_interval"] = None if interval is None else (interval[0], interval[1])
            return cls(**values)


@settings
class VerbalizationConfig:
    """How candidates are made."""

    num_candidates: PositiveInt = 1
    """The first is greedy; each further one is sampled. Doubles are dropped."""
    prefill: str = ""
    """The beginning of every text, for instance "Classify the given input into one of the following:"."""
    max_new_tokens: PositiveInt = 64
    """Length cap of a text, prefill not counted."""
    temperature: PositiveFloat = 0.7
    """Of the sampled candidates."""
    seed: int = 0
    """Of the sampling; candidate i uses seed + i. A sampled text also depends on the prompts that share its batch; the
    served model samples each row alone."""


class Proposer(Protocol):
    """Writes candidate texts for soft prompts."""

    name: str

    def propose(self, soft_prompts: Sequence[SoftPrompt], config: VerbalizationConfig) -> list[list[Candidate]]:
        """One list of candidates per soft prompt, in order, the proposer's first choice first."""


def verbalize(
    soft_prompts: Sequence[SoftPrompt],
    proposer: Proposer,
    config: VerbalizationConfig,
    *,
    translator_id: str | None = None,
) -> list[Verbalization]:
    """One verbalization per soft prompt, in order.

    The candidate with the highest own score becomes the text; candidates without scores stay in the proposer's order.
    """
    results = []
    for soft_prompt, candidates in zip(soft_prompts, proposer.propose(soft_prompts, config), strict=True):
        ranked = rank(candidates)
        results.append(
            Verbalization(
                text=ranked[0].text if ranked else "",
                task=soft_prompt.record.task,
                candidates=tuple(ranked),
                soft_prompt_id=soft_prompt.id,
                base_fingerprint=soft_prompt.record.base_model.fingerprint,
                prefill=ranked[0].prefill if ranked else "",
                seed=config.seed,
                temperature=config.temperature,
                max_new_tokens=config.max_new_tokens,
                translator_id=translator_id,
            )
        )
    return results


def verified(
    verbalization: Verbalization, verification: Verification, rule: AbstentionRule, *, keep_text: bool = False
) -> Verbalization:
    """A verbalization with its candidates in the verifier's order, the best as its text unless the rule abstains.

    Args:
        verification: of this soft prompt, with every candidate among its texts.
        keep_text: leave the text as it is and only judge it.
    """
    by_text = {item.text: item for item in verification.candidates}
    order = {item.text: place for place, item in enumerate(verification.candidates)}
    candidates = [
        replace(candidate, verified_score=by_text[candidate.text].score) for candidate in verbalization.candidates
    ]
    if not keep_text:
        candidates.sort(key=lambda candidate: order[candidate.text])
    text = verbalization.text if keep_text or not candidates else candidates[0].text
    prefill = next((candidate.prefill for candidate in candidates if candidate.text == text), verbalization.prefill)
    chosen = by_text.get(text)
    decision = decide(replace(verification, candidates=() if chosen is None else (chosen,)), rule)
    interval = None
    if chosen is not None and chosen.low is not None and chosen.high is not None:
        interval = (chosen.low, chosen.high)
    return replace(
        verbalization,
        text=text,
        prefill=prefill,
        candidates=tuple(candidates),
        faithfulness=None if chosen is None else chosen.faithfulness,
        faithfulness_interval=interval,
        evidence=verification.evidence,
        abstained=decision.abstained,
        reason=decision.reason,
    )


def distinct(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Without doubles, of which the first stays."""
    by_text: dict[str, Candidate] = {}
    for candidate in candidates:
        by_text.setdefault(candidate.text, candidate)
    return list(by_text.values())


def rank(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Highest score first, doubles dropped; the sort is stable."""
    return sorted(distinct(candidates), key=lambda c: float("-inf") if c.score is None else c.score, reverse=True)
