"""What can stand before an input when a target LLM is asked: the table of conditions."""

from __future__ import annotations

from typing import Literal, NamedTuple

from softprompt_registry.verbalization.proposing import METHODS

NO_PROMPT = "no_prompt"
TRANSLATED = "translated"
TRANSLATED_VERIFIED = "translated_verified"
VERIFIED_BEST = "verified_best"
INSPECT = "inspect"
INSTRUCTION_INDUCTION = "instruction_induction"
FEW_SHOT_3 = "few_shot_3"
FEW_SHOT_5 = "few_shot_5"
FEW_SHOT_TRANSLATED = "few_shot_3_translated"
GROUND_TRUTH = "ground_truth"
SOFT_PROMPT = "soft_prompt"


class Condition(NamedTuple):
    """What stands before an input when a target LLM is asked."""

    label: str
    """Its name in figures and on pages."""
    methods: tuple[str, ...] = ()
    """Methods of an evaluation whose text is the hard prompt; the first one that the evaluation has is used."""
    num_examples: int = 0
    """Training pairs that are shown behind the hard prompt."""
    group: Literal["reference", "translation", "other text", "examples"] = "reference"
    """Conditions of one group have one colour."""


CONDITIONS = {
    NO_PROMPT: Condition("no prompt"),
    TRANSLATED: Condition("translated", ("translator",), group="translation"),
    TRANSLATED_VERIFIED: Condition("translated, verified", ("translator+verifier",), group="translation"),
    VERIFIED_BEST: Condition("verified best of all", ("all+verifier",), group="other text"),
    **{
        name: Condition(method.label, (name,), group="other text")
        for name, method in METHODS.items()
        if method.portability
    },
    FEW_SHOT_3: Condition("3 examples", num_examples=3, group="examples"),
    FEW_SHOT_5: Condition("5 examples", num_examples=5, group="examples"),
    FEW_SHOT_TRANSLATED: Condition(
        "translated + 3 examples", ("translator+verifier", "translator"), num_examples=3, group="translation"
    ),
    GROUND_TRUTH: Condition("ground truth"),
    SOFT_PROMPT: Condition("soft prompt"),
}
"""By name, in the order of tables and plots. The soft prompt works on the small model that it was tuned on. The text of
`verified_best` may be of a method that does not read the soft prompt."""
TRANSLATIONS = (TRANSLATED, TRANSLATED_VERIFIED)
FEW_SHOTS = (FEW_SHOT_3, FEW_SHOT_5)
