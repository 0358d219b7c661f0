"""From soft prompt to text: proposers write candidates, the verifier ranks them, and a rule withholds a text that fails.

Without anything to try candidates on they are ranked by the proposers' own scores and `faithfulness` is None, with the reason
beside it. The command line, the served model and Python users call `verbalize`; an evaluation compares methods
(`methods.py`). Both make each verbalization by `choose`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Protocol

from pydantic import PositiveFloat, PositiveInt

from softprompt_registry.config import settings
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt
from softprompt_registry.storage import complete_record
from softprompt_registry.verbalization.abstention import DEFAULT_MIN_FAITHFULNESS, AbstentionRule, decide
from softprompt_registry.verbalization.evidence import TriedOn
from softprompt_registry.verbalization.verification import Verification
from softprompt_registry.verbalization.verifier import Verifier, fitting_template

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
    verification: Verification | None = field(default=None, repr=False, compare=False)
    """What it was judged by; None where there was too little to try its candidates on. No part of the record."""

    def to_json(self) -> dict[str, Any]:
        record = asdict(replace(self, verification=None))
        del record["verification"]
        return record

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Verbalization:
        """What `to_json` gave.

        Raises:
            ArtifactError: an entry is missing.
        """
        with complete_record("a verbalization"):
            values = {item.name: record[item.name] for item in fields(cls) if item.compare}
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
    """Temperature of the sampled candidates."""
    seed: int = 0
    """Seed for the sampling; candidate i uses seed + i. A sampled text also depends on the prompts that share its batch; the
    served model samples each row alone."""


class Proposer(Protocol):
    """Writes candidate texts for soft prompts."""

    name: str

    def propose(self, soft_prompts: Sequence[SoftPrompt], config: VerbalizationConfig) -> list[list[Candidate]]:
        """One list of candidates per soft prompt, in order, the proposer's first choice first."""


def verbalize(
    soft_prompts: Sequence[SoftPrompt],
    proposers: Sequence[Proposer],
    config: VerbalizationConfig | None = None,
    *,
    verifier: Verifier | None = None,
    evidence: Sequence[TriedOn] = (),
    rule: AbstentionRule | None = None,
    translator_id: str | None = None,
) -> list[Verbalization]:
    """One verbalization per soft prompt, in order: of all proposers' candidates the verifier's choice, if the rule gives it.

    Where there is nothing to try candidates on, or too little, they are ranked by their own scores and `reason` says so;
    candidates without scores stay in the proposers' order. A soft prompt whose record has no template is tried in the one of
    `TEMPLATES` that fits it (`fitting_template`).

    Args:
        verifier: needed where there is evidence.
        evidence: what texts are tried on, for each soft prompt; empty tries nothing.
        rule: None requires a faithfulness of `DEFAULT_MIN_FAITHFULNESS`.
        translator_id: id of the translator that some of the proposers use, for the record.

    Raises:
        ConfigError, DataError, BaseModelError: see `Verifier.verify`.
        BaseModelMismatch: a soft prompt of another base model.
    """
    config = config or VerbalizationConfig()
    rule = rule or AbstentionRule(DEFAULT_MIN_FAITHFULNESS)
    written = [proposer.propose(soft_prompts, config) for proposer in proposers]
    results = []
    for number, (soft_prompt, data) in enumerate(
        zip(soft_prompts, evidence or [TriedOn()] * len(soft_prompts), strict=True)
    ):
        candidates = rank([candidate for found in written for candidate in found[number]])
        verification, reason = None, NOT_VERIFIED
        if data.too_few:
            reason = f"not verified: {data.too_few}; {RANKED_BY_OWN_SCORE}"
        elif data:
            assert verifier is not None, "evidence without a verifier"
            verification = verifier.verify(
                soft_prompt,
                [candidate.text for candidate in candidates],
                pairs=data.pairs,
                inputs=data.inputs,
                template=soft_prompt.record.template or fitting_template(verifier, soft_prompt, data),
                test_order=True,
            )
        made = choose(soft_prompt, candidates, config, verification, rule, translator_id=translator_id)
        results.append(made if verification else replace(made, reason=reason))
    return results


def choose(
    soft_prompt: SoftPrompt,
    candidates: Sequence[Candidate],
    config: VerbalizationConfig,
    verification: Verification | None,
    rule: AbstentionRule,
    *,
    keep_order: bool = False,
    translator_id: str | None = None,
) -> Verbalization:
    """The verbalization of a soft prompt: its text is the first of the candidates in the verifier's order.

    Args:
        candidates: without doubles.
        verification: of this soft prompt, with every candidate among its texts; None leaves the text unverified.
        rule: whether a verified text abstains.
        keep_order: leave the candidates in their order, and only judge the first one.
    """
    if verification is not None:
        place = {item.text: number for number, item in enumerate(verification.candidates)}
        verified = verification.candidates
        candidates = [replace(one, verified_score=verified[place[one.text]].score) for one in candidates]
        if not keep_order:
            candidates.sort(key=lambda candidate: place[candidate.text])
    made = Verbalization(
        text=candidates[0].text if candidates else "",
        task=soft_prompt.record.task,
        candidates=tuple(candidates),
        soft_prompt_id=soft_prompt.id,
        base_fingerprint=soft_prompt.record.base_model.fingerprint,
        prefill=candidates[0].prefill if candidates else "",
        seed=config.seed,
        temperature=config.temperature,
        max_new_tokens=config.max_new_tokens,
        translator_id=translator_id,
        verification=verification,
    )
    if verification is None:
        return made
    best = next((item for item in verification.candidates if item.text == made.text), None)
    decision = decide(replace(verification, candidates=() if best is None else (best,)), rule)
    interval = None if best is None or best.low is None or best.high is None else (best.low, best.high)
    return replace(
        made,
        faithfulness=None if best is None else best.faithfulness,
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
