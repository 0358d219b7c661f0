"""Asking an LLM for a DoD in rounds, with the answers kept beside the DoD.

A round asks for everything that is still missing. When all its answers are there, they are checked in a fixed order, and
what was refused is asked for again in the next round. Answers are on the disk as soon as they arrive (`<out>.answers`) and
are checked again by every run. So a build that was stopped, however it was stopped, asks for nothing twice and ends with
the same DoD.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from softprompt_registry.config import flatten
from softprompt_registry.language_models.answer_cache import AnswerCache, Asked, ask_all
from softprompt_registry.language_models.protocol import Completion, CompletionRequest, LanguageModel
from softprompt_registry.recording import Recorder


def answers_path(out: Path) -> Path:
    """The file that keeps the answers of a build."""
    return out.with_name(out.name + ".answers")


def recorded_settings(config: Any) -> dict[str, Any]:
    """The settings of a build that its DoD keeps: without folders and addresses of the machine it was made on."""
    return {
        key: value
        for key, value in flatten(config).items()
        if key != "prompts_folder" and not key.startswith("generator.")
    }


class Rounds:
    """The rounds of one build, what they cost and which answers they refused."""

    def __init__(self, model: LanguageModel, cache: AnswerCache, recorder: Recorder, *, skip_failed: bool) -> None:
        self.asked = Asked()
        self.refused: Counter[str] = Counter()
        """Reason → refused answers, or parts of them."""
        self._model, self._cache, self._recorder, self._skip_failed = model, cache, recorder, skip_failed

    def ask(self, what: str, attempt: int, requests: Iterable[CompletionRequest], total: int) -> None:
        """One round.

        Raises:
            LanguageModelError: requests failed and failures are not skipped; all other answers are stored.
        """
        title = f"{what}, again ({attempt})" if attempt else what
        ask_all(
            self._model,
            self._cache,
            requests,
            title,
            total,
            self._recorder,
            self.asked,
            skip_failed=self._skip_failed,
        )

    def answer(self, request: CompletionRequest) -> Completion | None:
        """The answer to a request of an earlier round; None if the request failed and failures are skipped."""
        return self._cache.get(self._model.identity, request)
