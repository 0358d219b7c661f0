"""Several proposers on the same soft prompts, each as it is and with the verifier: the methods that an evaluation compares.

The verifier chooses on one half of each task's held-out pairs; each chosen text is scored on the other half.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from softprompt_registry.dod.task import Pair, Task
from softprompt_registry.errors import SoftPromptError
from softprompt_registry.recording import NullRecorder, Recorder
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt
from softprompt_registry.verbalization.abstention import AbstentionRule
from softprompt_registry.verbalization.held_out import split_pairs
from softprompt_registry.verbalization.verbalizer import (
    Candidate,
    Proposer,
    Verbalization,
    VerbalizationConfig,
    choose,
    distinct,
)
from softprompt_registry.verbalization.verification import Verification
from softprompt_registry.verbalization.verifier import Verifier

WITH_VERIFIER = "+verifier"
"""Added to a proposer's name for the method that lets the verifier choose among its candidates."""
ALL = "all"
"""Name of the candidates of all proposers together."""


@dataclass(frozen=True)
class MethodTexts:
    """The text of each method for each soft prompt."""

    texts: dict[str, list[Verbalization]]
    """By method; one for each soft prompt, in order."""
    ranking: list[Verification]
    """Every candidate of each soft prompt, on the half of the pairs that the verifier chooses on."""
    reporting: list[Verification]
    """Every method's text, on the other half."""
    failures: dict[tuple[str, str], str]
    """By proposer and task, why there is no candidate."""


def apply_methods(
    soft_prompts: Sequence[SoftPrompt],
    tasks: Mapping[str, Task],
    proposers: Sequence[Proposer],
    config: VerbalizationConfig,
    verifier: Verifier,
    rule: AbstentionRule,
    *,
    without_verifier: Sequence[str] = (),
    translator_id: str | None = None,
    test_order: bool = True,
    recorder: Recorder | None = None,
) -> MethodTexts:
    """Let each proposer write candidates and the verifier choose among them.

    A method by a proposer's name gives its first choice (a translator's greedy text). With `+verifier` behind the name the
    verifier has chosen among all its candidates; there is none such for proposers that write one candidate at most.
    `all+verifier` chooses among the candidates of all proposers, those in `without_verifier` left out. The rule judges every
    text. A proposer that fails with one soft prompt has no candidate for that one, and the others have theirs.

    Args:
        tasks: by name; each needs held-out pairs with at least two different inputs.
        translator_id: of the translator that some of the proposers use.
        without_verifier: names of proposers whose candidates take no part in `all+verifier`.
        test_order: whether soft prompts that are as good in another order of their tokens are given no text.

    Raises:
        DataError: a task has too few held-out pairs.
    """
    recorder = recorder or NullRecorder()
    halves = [split_pairs(tasks[prompt.record.task], verifier.config.seed) for prompt in soft_prompts]
    by_proposer: dict[str, list[list[Candidate]]] = {}
    failures: dict[tuple[str, str], str] = {}
    with recorder.progress("write candidates", len(proposers)) as bar:
        for proposer in proposers:
            written = _propose(proposer, soft_prompts, config, failures)
            by_proposer[proposer.name] = [distinct(found) for found in written]
            bar.advance(1, proposer.name)
    with recorder.progress("verify candidates", len(soft_prompts)) as bar:
        ranking = []
        for number, prompt in enumerate(soft_prompts):
            texts_of = [candidate.text for found in by_proposer.values() for candidate in found[number]]
            ranking.append(verifier.verify(prompt, texts_of, pairs=halves[number].ranking, test_order=test_order))
            bar.advance(1, prompt.record.task)

    def chosen(candidates: Sequence[Sequence[Candidate]], *, keep_order: bool) -> list[Verbalization]:
        return [
            choose(prompt, found, config, verification, rule, keep_order=keep_order, translator_id=translator_id)
            for prompt, found, verification in zip(soft_prompts, candidates, ranking, strict=True)
        ]

    texts: dict[str, list[Verbalization]] = {}
    together: list[list[Candidate]] = [[] for _ in soft_prompts]
    for name, candidates in by_proposer.items():
        texts[name] = chosen(candidates, keep_order=True)
        if any(len(found) > 1 for found in candidates):
            texts[f"{name}{WITH_VERIFIER}"] = chosen(candidates, keep_order=False)
        if name not in without_verifier:
            together = [[*all_found, *found] for all_found, found in zip(together, candidates, strict=True)]
    texts[f"{ALL}{WITH_VERIFIER}"] = chosen([distinct(found) for found in together], keep_order=False)
    reporting = _report(soft_prompts, texts, [half.reporting for half in halves], verifier, recorder)
    return MethodTexts(texts, ranking, reporting, failures)


def _propose(
    proposer: Proposer,
    soft_prompts: Sequence[SoftPrompt],
    config: VerbalizationConfig,
    failures: dict[tuple[str, str], str],
) -> list[list[Candidate]]:
    """What the proposer writes; if that fails, what it writes of each soft prompt alone."""
    try:
        return proposer.propose(soft_prompts, config)
    except SoftPromptError as error:
        if len(soft_prompts) == 1:
            failures[proposer.name, soft_prompts[0].record.task] = str(error)
            return [[]]
    return [_propose(proposer, [prompt], config, failures)[0] for prompt in soft_prompts]


def _report(
    soft_prompts: Sequence[SoftPrompt],
    texts: Mapping[str, Sequence[Verbalization]],
    pairs: Sequence[Sequence[Pair]],
    verifier: Verifier,
    recorder: Recorder,
) -> list[Verification]:
    reporting = []
    with recorder.progress("score chosen texts on other pairs", len(soft_prompts)) as bar:
        for number, prompt in enumerate(soft_prompts):
            chosen = list(dict.fromkeys(items[number].text for items in texts.values()))
            reporting.append(verifier.verify(prompt, chosen, pairs=pairs[number]))
            bar.advance(1, prompt.record.task)
    return reporting
