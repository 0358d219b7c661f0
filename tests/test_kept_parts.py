"""Parts of long work on the disk: taken over as they were, and never for other work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from small_prompts import edit_json, make
from tiny_llm import tiny_base_model

from softprompt_registry.dod.task import Pair
from softprompt_registry.errors import ArtifactError
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt
from softprompt_registry.verbalization.kept_parts import KeptParts, KeptProposer, KeptVerifier
from softprompt_registry.verbalization.verbalizer import Candidate, VerbalizationConfig
from softprompt_registry.verbalization.verifier import VerifierConfig

PROMPTS = [make("moods", 1), make("sides", 2)]
PAIRS = [Pair(f"text {number}", "joy") for number in range(4)]


class Counts:
    """A proposer that numbers its texts, so that no two calls give the same."""

    name = "counts"

    def __init__(self) -> None:
        self.calls = 0

    def propose(self, soft_prompts: Sequence[SoftPrompt], config: VerbalizationConfig) -> list[list[Candidate]]:
        self.calls += 1
        return [
            [Candidate(f"{self.calls} {prompt.record.task}", self.name, 0.1, prefill="a")] for prompt in soft_prompts
        ]


def test_a_proposer_writes_once_for_the_same_prompts_and_settings(tmp_path: Path) -> None:
    config = VerbalizationConfig()
    first = KeptProposer(Counts(), KeptParts(tmp_path, "origin")).propose(PROMPTS, config)
    assert KeptProposer(Counts(), KeptParts(tmp_path, "origin")).propose(PROMPTS, config) == first
    counts = Counts()
    counts.calls = 7
    again = KeptProposer(counts, KeptParts(tmp_path, "origin"))
    assert again.propose(PROMPTS, config) == first and counts.calls == 7
    assert again.propose(PROMPTS[:1], config)[0][0].text == "8 moods", "other prompts"
    assert again.propose(PROMPTS, VerbalizationConfig(seed=1))[0][0].text == "9 moods", "other settings"
    assert KeptProposer(counts, KeptParts(tmp_path, "other")).propose(PROMPTS, config)[0][0].text == "10 moods"
    assert KeptProposer(counts, KeptParts(None, "origin")).propose(PROMPTS, config)[0][0].text == "11 moods"


def test_a_verification_comes_back_to_the_last_bit_without_the_model(tmp_path: Path) -> None:
    base, config = tiny_base_model(), VerifierConfig(draws=50)
    made = KeptVerifier(base, config, KeptParts(tmp_path, "origin")).verify(PROMPTS[0], ["joy", "up"], pairs=PAIRS)
    second = KeptVerifier(base, config, KeptParts(tmp_path, "origin"))
    assert second.verify(PROMPTS[0], ["joy", "up"], pairs=PAIRS) == made and second.statistics.tokens == 0
    for prompt, texts, pairs in ((PROMPTS[1], ["joy", "up"], PAIRS), (PROMPTS[0], ["joy"], PAIRS)):
        second.verify(prompt, texts, pairs=pairs)
    second.verify(PROMPTS[0], ["joy", "up"], pairs=PAIRS[:3])
    assert len(list(tmp_path.iterdir())) == 4 and second.statistics.tokens > 0


def test_a_part_of_another_version_is_refused(tmp_path: Path) -> None:
    kept = KeptParts(tmp_path, "origin")
    kept.put(["part"], [1.5])
    assert kept.get(["part"]) == [1.5] and kept.get(["other"]) is None
    (path,) = tmp_path.iterdir()
    edit_json(path, format_version=2)
    with pytest.raises(ArtifactError, match="format_version"):
        kept.get(["part"])
