"""Verbalizations whose candidates are tried on what is at hand: for use, where there is no evaluation's half of pairs left
over that says how good the chosen text is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from softprompt_registry.dod.task import TEMPLATES
from softprompt_registry.soft_prompts.encoding import RowEncoder
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt
from softprompt_registry.verbalization.abstention import AbstentionRule
from softprompt_registry.verbalization.evidence import TriedOn
from softprompt_registry.verbalization.verbalizer import (
    RANKED_BY_OWN_SCORE,
    Candidate,
    Proposer,
    Verbalization,
    VerbalizationConfig,
    verbalize,
    verified,
)
from softprompt_registry.verbalization.verification import Verification
from softprompt_registry.verbalization.verifier import Verifier

DEFAULT_MIN_FAITHFULNESS = 0.5
"""From here on a text makes the base model act more as the soft prompt does than as it does without a prompt. It is no
measured number: what share good texts keep depends on the base model and the tasks, and `evaluate` measures it."""

_INPUTS_FOR_TEMPLATE = 8


@dataclass(frozen=True)
class Tried:
    """A verbalization, and what it was judged by."""

    verbalization: Verbalization
    verification: Verification | None
    """None where there was too little to try its candidates on."""

    def to_json(self) -> dict[str, Any]:
        """The verbalization's entries, and `verification`."""
        verification = None if self.verification is None else self.verification.to_json()
        return {**self.verbalization.to_json(), "verification": verification}


def verbalize_verified(
    soft_prompts: Sequence[SoftPrompt],
    proposers: Sequence[Proposer],
    config: VerbalizationConfig,
    verifier: Verifier,
    tried_on: Sequence[TriedOn],
    rule: AbstentionRule,
    *,
    translator_id: str | None = None,
) -> list[Tried]:
    """One verbalization per soft prompt, in order: of all proposers' candidates the verifier's choice, if the rule gives it.

    Where there is nothing to try candidates on, or too little, they are ranked by their own scores and `reason` says so. A
    soft prompt whose record has no template is tried in the one of `TEMPLATES` that fits it (`fitting_template`).

    Args:
        tried_on: for each soft prompt.

    Raises:
        ConfigError, DataError, BaseModelError: see `Verifier.verify`.
        BaseModelMismatch: a soft prompt of another base model.
    """
    made = verbalize(soft_prompts, _Together(proposers), config, translator_id=translator_id)
    results = []
    for prompt, verbalization, data in zip(soft_prompts, made, tried_on, strict=True):
        if not data:
            results.append(Tried(verbalization, None))
        elif data.too_few:
            reason = f"not verified: {data.too_few}; {RANKED_BY_OWN_SCORE}"
            results.append(Tried(replace(verbalization, reason=reason), None))
        else:
            verification = verifier.verify(
                prompt,
                [candidate.text for candidate in verbalization.candidates],
                pairs=data.pairs,
                inputs=data.inputs,
                template=prompt.record.template or fitting_template(verifier, prompt, data),
                test_order=True,
            )
            results.append(Tried(verified(verbalization, verification, rule), verification))
    return results


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


class _Together:
    """The candidates of several proposers, in their order."""

    name = "together"

    def __init__(self, proposers: Sequence[Proposer]) -> None:
        self._proposers = proposers

    def propose(self, soft_prompts: Sequence[SoftPrompt], config: VerbalizationConfig) -> list[list[Candidate]]:
        written = [proposer.propose(soft_prompts, config) for proposer in self._proposers]
        return [[candidate for found in of_one for candidate in found] for of_one in zip(*written, strict=True)]
