"""A causal LLM in this process through transformers: slower than vLLM, and runs wherever torch does."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveInt

from softprompt_registry.config import Name, settings
from softprompt_registry.errors import LanguageModelError
from softprompt_registry.language_models.local_prompts import LocalPrompts
from softprompt_registry.language_models.protocol import Completion, CompletionRequest, Finished, LanguageModel
from softprompt_registry.language_models.replies import cut_at_stop, read_answer, without_thoughts

if TYPE_CHECKING:
    import torch

    from softprompt_registry.base_models.frozen import BaseModel


@settings
class TransformersConfig:
    model: Name
    """`packaged:NAME`, a local folder, or a Hub name with an optional `@revision`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the weights in memory."""
    prompt_format: Literal["chat", "plain"] = "chat"
    """`chat` uses the tokenizer's chat template; `plain` sends system and prompt as plain text, for base models."""
    batch_size: PositiveInt = 8
    """Requests that are answered together; answers do not depend on who shares the batch, but for rounding."""


class OnTransformers(LanguageModel):
    """Answers requests in batches, each row with its own temperature, seed, penalty and JSON schema."""

    def __init__(self, config: TransformersConfig, base_model: BaseModel | None = None) -> None:
        """Loads the model; a `base_model` that is loaded already is used instead."""
        from softprompt_registry.base_models.loading import load_base_model

        self.config = config
        self._base_model: BaseModel | None = base_model or load_base_model(config.model, dtype=config.dtype)
        self.name = self._base_model.ref.name
        self._prompts = LocalPrompts(self._base_model.tokenizer, config.prompt_format, self.name)
        self.identity = f"{self._base_model.ref.fingerprint} {config.dtype} {self._prompts.identity}"
        self._grammar_tokenizer: Any = None

    def close(self) -> None:
        self._base_model = None

    def stream(self, requests: Iterable[CompletionRequest]) -> Iterator[Finished]:
        waiting = iter(enumerate(requests))
        while batch := list(islice(waiting, self.config.batch_size)):
            yield from self._answer(batch)

    def _answer(self, batch: list[tuple[int, CompletionRequest]]) -> Iterator[Finished]:
        from softprompt_registry.base_models.decoding import RowDecoder

        base_model = self._base_model
        if base_model is None:
            raise RuntimeError("this language model is closed")
        rows: list[_Row] = []
        for index, request in batch:
            try:
                ids = self._readable_ids(request)
                room = base_model.max_positions - len(ids)
                if room < 1:
                    raise _Unanswerable(
                        f"its prompt has {len(ids)} tokens; the model takes {base_model.max_positions}.",
                        "Shorten the prompt, or choose a model with a longer context.",
                    )
                rows.append(
                    _Row(
                        index,
                        request,
                        ids,
                        min(room, request.max_tokens),
                        self._matcher(request),
                        self._prompts.opened_thoughts(ids),
                        self._prompts.adapted(request),
                    )
                )
            except _Unanswerable as fault:
                error = LanguageModelError(
                    f"asking model {self.name!r} in this process: {fault.found}",
                    retryable=False,
                    about_request=True,
                    hint=fault.hint,
                )
                yield Finished(index, error)
        if not rows:
            return
        started = time.monotonic()
        decoder = RowDecoder(base_model, base_model.join(None, [row.prompt_ids for row in rows], pad_side="left"))
        while True:
            for row, scores in zip(rows, decoder.logits.cpu(), strict=True):
                row.take(_choose(row, scores), base_model)
            for row in rows:
                if row.finish_reason is not None:
                    yield Finished(row.index, row.completion(base_model, time.monotonic() - started))
            kept = [number for number, row in enumerate(rows) if row.finish_reason is None]
            if not kept:
                return
            if len(kept) < len(rows):  # rows that have finished leave the batch
                decoder.keep(kept)
                rows = [rows[number] for number in kept]
            decoder.feed([row.ids[-1] for row in rows])

    def _readable_ids(self, request: CompletionRequest) -> list[int]:
        from jinja2 import TemplateError

        try:
            return self._prompts.ids(request)
        except (TemplateError, TypeError, ValueError) as error:  # tokenizers say TypeError to lone surrogates
            raise _Unanswerable(
                f"its prompt cannot be read ({error}).",
                "Remove lone surrogates, and see that the model's chat template takes a single user message.",
            ) from error

    def _matcher(self, request: CompletionRequest) -> Any:
        """What says, token by token, which tokens keep the answer within its JSON schema."""
        if request.json_schema is None:
            return None
        import llguidance
        import llguidance.hf

        assert self._base_model is not None
        if self._grammar_tokenizer is None:
            tokenizer = self._base_model.tokenizer
            vocab_size = max(self._base_model.ref.vocab_size, len(tokenizer))
            self._grammar_tokenizer = llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocab_size)
        # Free white space would let a small model fill the whole answer with it.
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(
                request.json_schema, overrides={"whitespace_flexible": False}
            )
        except ValueError as error:
            raise _Unanswerable(f"its JSON schema is not a JSON object ({error}).", "Correct the schema.") from error
        matcher = llguidance.LLMatcher(self._grammar_tokenizer, grammar)
        if matcher.is_error():
            raise _Unanswerable(f"its JSON schema cannot be followed ({matcher.get_error()}).", "Correct the schema.")
        return matcher


class _Unanswerable(Exception):
    def __init__(self, found: str, hint: str) -> None:
        super().__init__(found)
        self.found, self.hint = found, hint


@dataclass
class _Row:
    """One request on its way through the batch."""

    index: int
    request: CompletionRequest
    prompt_ids: list[int]
    max_tokens: int
    matcher: Any
    opened: str
    """The tag of thoughts that the prompt ends with."""
    adapted: str | None
    ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None

    def __post_init__(self) -> None:
        import torch

        self.generator = torch.Generator()
        if self.request.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(self.request.seed)

    def take(self, token: int, base_model: BaseModel) -> None:
        if token in base_model.end_ids:
            self.finish_reason = "stop"
            return
        self.ids.append(token)
        if self.matcher is not None:
            self.matcher.consume_token(token)
        if self.request.stop and cut_at_stop(without_thoughts(self._written(base_model)), self.request.stop)[1]:
            self.finish_reason = "stop"
        elif len(self.ids) >= self.max_tokens:
            self.finish_reason = "length"

    def _written(self, base_model: BaseModel) -> str:
        return self.opened + base_model.decode(self.ids)

    def completion(self, base_model: BaseModel, latency_s: float) -> Completion:
        text, finish_reason, raw = read_answer(self._written(base_model), self.finish_reason, self.request.stop)
        return Completion(
            text=text,
            prompt_tokens=len(self.prompt_ids),
            completion_tokens=len(self.ids),
            latency_s=latency_s,
            finish_reason=finish_reason,
            attempts=1,
            raw=raw,
            adapted=self.adapted,
        )


def _choose(row: _Row, scores: torch.Tensor) -> int:
    """The next token of one row from its logits (V,), which are changed in place."""
    import torch

    request = row.request
    if request.presence_penalty and row.ids:
        scores[list(set(row.ids))] -= request.presence_penalty
    if row.matcher is not None:
        allowed = torch.frombuffer(bytearray(row.matcher.compute_logit_bias()), dtype=torch.uint8) > 0  # (V,)
        scores[~allowed[: len(scores)]] = -math.inf
    if request.temperature <= 0:
        return int(scores.argmax())
    probabilities = torch.softmax(scores / request.temperature, dim=0)
    return int(torch.multinomial(probabilities, 1, generator=row.generator))
