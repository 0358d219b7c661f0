"""One question to one LLM and its answer: the row that everything about portability is computed from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

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


@dataclass(frozen=True)
class Question:
    """One test pair of one task under one condition, to be put to one target LLM."""

    task: str
    condition: str
    """One of `CONDITIONS`."""
    target: str
    """Name of the target LLM; of the condition `soft_prompt` the small model's."""
    item: int
    """Number of the test pair within the task, from 0; the same for all conditions and targets."""
    input: str
    expected: str
    system: str | None
    prompt: str
    """The whole user text: hard prompt, examples, input."""
    hard_prompt: str | None
    """The instruction within the prompt; None for conditions without one."""
    method: str | None = None
    """Which method of the evaluation wrote it, or `ground_truth`."""
    abstained: bool = False
    """True if the evaluation withheld the instruction; it is asked with all the same."""


@dataclass(frozen=True)
class Answer:
    """What came back for a question."""

    question: Question
    text: str | None
    """The LLM's answer without its thoughts; it may be empty. None if there is no answer, see `error`."""
    finish_reason: str | None = None
    """The server's word: `stop`, `length`, `content_filter`, …"""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    latency_s: float = 0.0
    """Time that the successful attempt took; for a cached answer, in the run that asked for it."""
    error: str | None = None
    """Why there is no answer."""
    raw: str | None = None
    """What the LLM wrote, with its thoughts; None if it wrote none."""
    adapted: str | None = None
    """Settings that it was asked with in place of those given, since the target refuses these."""

    @property
    def is_missing(self) -> bool:
        """True without an answer; a next run asks for it again."""
        return self.text is None

    def to_json(self) -> dict[str, Any]:
        """The question's entries and the answer's, in one flat object."""
        entries = asdict(self)
        return {**entries.pop("question"), **entries}

    @classmethod
    def from_json(cls, entries: Mapping[str, Any]) -> Answer:
        """The reverse of `to_json`."""
        names = Question.__dataclass_fields__
        question = Question(**{name: entries[name] for name in names})
        return cls(question, **{name: value for name, value in entries.items() if name not in names})
