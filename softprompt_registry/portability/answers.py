"""One question to one LLM and its answer: the row that everything about portability is computed from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Question:
    """One test pair of one task under one condition, to be put to one target LLM."""

    task: str
    condition: str
    """One of `conditions.CONDITIONS`."""
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
