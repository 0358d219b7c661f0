"""From soft prompt to verbalization: proposers write candidates, the best one is kept.

The verifier, which scores candidates by what they make the base model do, is not part of this version. Until it is, the
ranking is the proposer's own likelihood and `faithfulness` is None, with the reason beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from softprompt_registry.errors import ConfigError
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt

NOT_VERIFIED = "not verified: this version has no verifier, candidates are ranked by the translator's own likelihood"


@dataclass(frozen=True)
class Candidate:
    """A text that may say what a soft prompt does."""

    text: str
    proposer: str
    score: float | None = None
    """The proposer's own score, higher is better: mean log-likelihood per token for a translator; None without one."""


@dataclass(frozen=True)
class Verbalization:
    """The text made from a soft prompt, with the settings and ids needed to make it again."""

    text: str
    task: str
    candidates: tuple[Candidate, ...]
    soft_prompt_id: str
    base_fingerprint: str
    prefill: str = ""
    seed: int = 0
    temperature: float = 0.0
    max_new_tokens: int = 0
    translator_id: str | None = None
    faithfulness: float | None = None
    abstained: bool = False
    reason: str | None = NOT_VERIFIED

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "candidates": [asdict(candidate) for candidate in self.candidates]}


@dataclass(frozen=True)
class VerbalizationConfig:
    """How candidates are made."""

    num_candidates: int = 1
    """The first is greedy; each further one is sampled. Doubles are dropped."""
    prefill: str = ""
    """The beginning of every text, for instance "Classify the given input into one of the following:"."""
    max_new_tokens: int = 64
    """Length cap of a text, prefill not counted."""
    temperature: float = 0.7
    """Of the sampled candidates."""
    seed: int = 0
    """Of the sampling; candidate i uses seed + i. A sampled text also depends on the prompts that share its batch; the
    served model samples each row alone."""

    def __post_init__(self) -> None:
        if self.num_candidates < 1 or self.max_new_tokens < 1 or self.temperature <= 0:
            raise ConfigError(
                f"reading the verbalization settings: num_candidates={self.num_candidates}, max_new_tokens="
                f"{self.max_new_tokens}, temperature={self.temperature}; expected all above zero."
            )


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
                prefill=config.prefill,
                seed=config.seed,
                temperature=config.temperature,
                max_new_tokens=config.max_new_tokens,
                translator_id=translator_id,
            )
        )
    return results


def rank(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Highest score first, doubles dropped; the sort is stable."""
    distinct: dict[str, Candidate] = {}
    for candidate in candidates:
        distinct.setdefault(candidate.text, candidate)
    return sorted(distinct.values(), key=lambda c: float("-inf") if c.score is None else c.score, reverse=True)
