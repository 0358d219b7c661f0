"""The soft prompt itself at work on the small model that it was tuned on, as one more language model to ask."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from softprompt_registry.base_models.frozen import SEQUENCE_LAYOUT
from softprompt_registry.base_models.reference import require_same_base
from softprompt_registry.errors import LanguageModelError
from softprompt_registry.language_models.protocol import Completion, CompletionRequest, Finished, LanguageModel
from softprompt_registry.language_models.replies import read_answer
from softprompt_registry.soft_prompts.encoding import RowEncoder

if TYPE_CHECKING:
    from softprompt_registry.base_models.frozen import BaseModel
    from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt


class SoftPrompted(LanguageModel):
    """Answers greedily with one soft prompt before each request's prompt, in the soft prompt's own layout.

    A request's prompt is the filled template that the soft prompt was tuned in; it has no system text. Paper: its soft
    prompts were tuned without an end token and ran on to the length limit, which cost them most of their score; these end
    by themselves, rows are padded on the left, and `max_tokens` caps them.
    """

    def __init__(self, base_model: BaseModel, soft_prompt: SoftPrompt, *, batch_size: int = 16) -> None:
        """
        Raises:
            BaseModelMismatch: the soft prompt belongs to another base model.
        """
        task = f"soft prompt of task {soft_prompt.record.task!r}"
        require_same_base(
            "asking a soft prompt", task, soft_prompt.record.base_model, "the loaded model", base_model.ref
        )
        self._base_model = base_model
        self._soft_prompt = soft_prompt
        self._batch_size = batch_size
        self.name = base_model.ref.name
        self._encoder = RowEncoder.of(base_model, soft_prompt.record)
        self.identity = f"soft prompt {soft_prompt.id} on {base_model.ref.fingerprint} {base_model.ref.dtype}"
        if self._encoder.layout != SEQUENCE_LAYOUT:
            self.identity += f" {self._encoder.layout}"

    def close(self) -> None:
        """Nothing of its own to free."""

    def stream(self, requests: Iterable[CompletionRequest]) -> Iterator[Finished]:
        waiting = enumerate(requests)
        while batch := list(islice(waiting, self._batch_size)):
            yield from self._answer(batch)

    def _answer(self, batch: Sequence[tuple[int, CompletionRequest]]) -> Iterator[Finished]:
        import torch

        base, soft = self._base_model, self._soft_prompt
        rows: list[tuple[int, CompletionRequest, list[int]]] = []
        for index, request in batch:
            ids = self._encoder.text(request.prompt)
            room = base.max_positions - soft.num_virtual_tokens - request.max_tokens
            if request.system is not None or len(ids) > room:
                found = "a system text" if request.system is not None else f"{len(ids)} tokens"
                yield Finished(
                    index,
                    LanguageModelError(
                        f"asking {self.name!r} under the soft prompt of task {soft.record.task!r}: found {found}, expected "
                        f"no system text and at most {room} tokens.",
                        retryable=False,
                        about_request=True,
                        hint="Leave out inputs that are as long, or lower max_tokens.",
                    ),
                )
            else:
                rows.append((index, request, ids))
        if not rows:
            return
        started = time.monotonic()
        embeddings = soft.embeddings.to(base.device).expand(len(rows), -1, -1)  # (B, K, D)
        longest = max(request.max_tokens for _, request, _ in rows)
        with torch.no_grad():
            written = base.generate(embeddings, [ids for _, _, ids in rows], max_new_tokens=longest)
        seconds = time.monotonic() - started
        for (index, request, ids), answer in zip(rows, written, strict=True):
            kept = answer[: request.max_tokens]
            ended = "stop" if len(answer) < request.max_tokens else "length"
            text, finish_reason, raw = read_answer(base.decode(kept), ended, request.stop)
            yield Finished(
                index,
                Completion(
                    # Targets were tuned with one space before them.
                    text=text.removeprefix(" "),
                    prompt_tokens=soft.num_virtual_tokens + len(ids),
                    completion_tokens=len(kept),
                    latency_s=seconds,
                    finish_reason=finish_reason,
                    attempts=1,
                    raw=raw,
                ),
            )
