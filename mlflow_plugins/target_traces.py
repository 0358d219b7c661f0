"""MLflow traces of what target LLMs were asked: one for each request, with tokens, duration and digests.

No input of a request is written, only its digest and length; answers of a portability run are, once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import mlflow
from mlflow.entities import SpanStatusCode, SpanType
from mlflow.tracing.constant import CostKey, SpanAttributeKey, TokenUsageKey, TraceMetadataKey

from softprompt_registry.fingerprints import SHORT, digest_of_texts
from softprompt_registry.language_models.protocol import Completion, Prices, usage_of
from softprompt_registry.portability.answers import Answer

if TYPE_CHECKING:
    from mlflow.entities.span import LiveSpan

SPAN_NAME = "target LLM"
PREFIX = "softprompt."
"""Prefix of our attributes and tags, such as `softprompt.target`."""
_ASYNC = "MLFLOW_ENABLE_ASYNC_TRACE_LOGGING"
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def target_traces(prices: Mapping[str, Prices | None] | None = None) -> Iterator[Callable[[Sequence[Answer]], None]]:
    """What `ask_targets` takes as `on_answer`, for the length of the block: it records a trace of each request.

    Each trace is in the store before the next request is sent, unless the environment says otherwise
    (`MLFLOW_ENABLE_ASYNC_TRACE_LOGGING`): MLflow's own way, from threads, loses what it has not written when the process is
    stopped. A process that has traced before keeps the way that it has begun with.

    Args:
        prices: of the targets, by their names; without them a trace has no cost.
    """
    run = mlflow.active_run()
    run_id = None if run is None else run.info.run_id
    is_set = _ASYNC in os.environ
    os.environ.setdefault(_ASYNC, "false")

    def on_answer(answers: Sequence[Answer]) -> None:
        _record_answers(answers, (prices or {}).get(answers[0].question.target), run_id)

    try:
        yield on_answer
    finally:
        if not is_set:
            os.environ.pop(_ASYNC, None)


def _record_answers(answers: Sequence[Answer], prices: Prices | None, run_id: str | None) -> None:
    """One request may ask several questions; all of them got the same answer."""
    answer, question = answers[0], answers[0].question
    conditions = ", ".join(dict.fromkeys(one.question.condition for one in answers))
    result: Completion | str = answer.error or ""
    if answer.text is not None:
        tokens = answer.prompt_tokens, answer.completion_tokens
        result = Completion(
            answer.text, *tokens, answer.latency_s, answer.finish_reason, attempts=1, adapted=answer.adapted
        )
    about = {"task": question.task, "condition": conditions, "target": question.target}
    record_target_call(
        result,
        model=question.target,
        hard_prompt=question.hard_prompt,
        prompt=question.prompt,
        about={**about, "items": [one.question.item for one in answers]},
        tags=about,
        prices=prices,
        run_id=run_id,
        with_text=True,
    )


def record_target_call(
    result: Completion | str,
    *,
    model: str,
    hard_prompt: str | None,
    prompt: str,
    about: Mapping[str, Any] | None = None,
    tags: Mapping[str, str] | None = None,
    prices: Prices | None = None,
    run_id: str | None = None,
    with_text: bool = False,
) -> None:
    """Record one request that has ended: as a span of the active trace, or as a trace of its own.

    What goes wrong here goes to the log: the answer was paid for, and is worth more than its trace.

    Args:
        result: the answer, or why there is none.
        about: what else is known, as attributes.
        tags: of a trace of its own, to search by.
        run_id: the run that a trace of its own belongs to.
        with_text: whether the answer's text is recorded, beside its digest and length.
    """
    try:
        ended_ns = time.time_ns()
        latency_s = result.latency_s if isinstance(result, Completion) else 0.0
        parent = mlflow.get_current_active_span()
        own: dict[str, Any] = {}
        if parent is None:
            own["tags"] = {f"{PREFIX}{key}": value for key, value in (tags or {}).items()}
            own["metadata"] = {TraceMetadataKey.SOURCE_RUN: run_id} if run_id else None
        span = mlflow.start_span_no_context(
            SPAN_NAME,
            span_type=SpanType.CHAT_MODEL,
            parent_span=parent,
            inputs={
                "hard_prompt_digest": _digest(hard_prompt),
                "prompt_digest": _digest(prompt),
                "prompt_characters": len(prompt),
            },
            start_time_ns=ended_ns - int(latency_s * 1e9),
            **own,
        )
        attributes = {"prompt_id": _digest(hard_prompt), "target_model": model, "latency_s": latency_s, **(about or {})}
        span.set_attributes({f"{PREFIX}{key}": value for key, value in attributes.items()})
        if isinstance(result, Completion):
            if result.adapted:
                span.set_attribute(f"{PREFIX}adapted", result.adapted)
            _set_usage(span, result, model, prices)
            outputs = {
                "digest": _digest(result.text),
                "characters": len(result.text),
                "finish_reason": result.finish_reason,
            }
            span.set_outputs({"text": result.text, **outputs} if with_text else outputs)
            span.end(end_time_ns=ended_ns)
        else:
            span.set_outputs({"error": result})
            span.end(status=SpanStatusCode.ERROR, end_time_ns=ended_ns)
    except Exception as error:
        _log.warning(
            "recording a trace of a request to %r: %s; the request itself went well", model, type(error).__name__
        )


def _set_usage(span: LiveSpan, answer: Completion, model: str, prices: Prices | None) -> None:
    """Under MLflow's own names, so that its pages add them up."""
    span.set_attribute(
        SpanAttributeKey.CHAT_USAGE,
        {
            TokenUsageKey.INPUT_TOKENS: answer.prompt_tokens,
            TokenUsageKey.OUTPUT_TOKENS: answer.completion_tokens,
            TokenUsageKey.TOTAL_TOKENS: answer.prompt_tokens + answer.completion_tokens,
        },
    )
    if prices is None:
        return  # and no name of a model: MLflow would look its price up in a list from the network
    if not answer.is_counted:
        return
    costs = [prices.cost(answer.prompt_tokens, 0), prices.cost(0, answer.completion_tokens)]
    names = (CostKey.INPUT_COST, CostKey.OUTPUT_COST)
    span.set_attribute(SpanAttributeKey.MODEL, model)
    span.set_attribute(
        SpanAttributeKey.LLM_COST,
        {**dict(zip(names, costs, strict=True)), CostKey.TOTAL_COST: usage_of([answer], prices).cost},
    )


def _digest(text: str | None) -> str | None:
    return None if text is None else digest_of_texts(text)[:SHORT]
