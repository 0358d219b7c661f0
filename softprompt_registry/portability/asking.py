"""Puts questions to target LLMs. Every answer is kept at once; what could not be answered is named, never dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from softprompt_registry.errors import LanguageModelError, SoftPromptError
from softprompt_registry.language_models.answer_cache import AnswerCache, Asked, ask_missing
from softprompt_registry.language_models.opening import open_language_model
from softprompt_registry.language_models.protocol import (
    Completion,
    CompletionRequest,
    LanguageModel,
    Prices,
    Usage,
    usage_of,
)
from softprompt_registry.language_models.replies import CONTENT_FILTER, REFUSAL
from softprompt_registry.portability.answers import Answer, Question
from softprompt_registry.portability.budget import Budget, Spending, TargetPlan, estimate
from softprompt_registry.portability.targets import require_different_names
from softprompt_registry.recording import NullRecorder

if TYPE_CHECKING:
    from softprompt_registry.recording import ProgressBar, Recorder

OnAnswer = Callable[[Sequence[Answer]], None]
"""Told of each request of this run as it ends: its answer, or its failure, for each of the questions that it asks."""


@dataclass(frozen=True)
class TargetAnswers:
    """What one target said."""

    target: str
    answers: list[Answer]
    """One for each question, in order; those that are missing say why."""
    asked: Usage
    """Of the requests that were answered in this run, as the server counted their tokens."""
    total: Usage
    """Of all answers, those of earlier runs included, at today's prices; what several questions share counts once."""
    found: int = 0
    """Requests whose answer was there from an earlier run."""
    failed: int = 0
    """Requests that failed in this run; what a server bills for them it does not say."""
    ended: str | None = None
    """Why not everything was asked."""

    @property
    def missing(self) -> list[Answer]:
        """The questions without an answer."""
        return [answer for answer in self.answers if answer.is_missing]

    @property
    def adapted(self) -> list[str]:
        """Settings that answers were asked with in place of those given, since the target refuses these."""
        return list(dict.fromkeys(answer.adapted for answer in self.answers if answer.adapted))

    @property
    def num_refused(self) -> int:
        """Questions that the server says were refused or filtered."""
        return sum(answer.finish_reason in (CONTENT_FILTER, REFUSAL) for answer in self.answers)

    @property
    def num_empty(self) -> int:
        """Questions whose answer has no text, refusals included."""
        return sum(answer.text is not None and not answer.text.strip() for answer in self.answers)


def ask_targets(
    plans: Sequence[TargetPlan],
    cache: AnswerCache,
    *,
    budget: Budget | None = None,
    recorder: Recorder | None = None,
    on_answer: OnAnswer | None = None,
) -> list[TargetAnswers]:
    """Ask every target what the cache does not know yet, one target after the other, in the order of the plans.

    A target that cannot be opened, or that fails many times in a row, ends for itself alone; what it has not answered is
    missing with that reason. A second run asks for what is missing only, and gives the other answers as they were.

    Args:
        recorder: shows a progress bar for each target.
        on_answer: is told of every request that is asked.

    Raises:
        ConfigError: two targets have one name, or what is missing could go past the budget; nothing was asked then.
        DataError: the cache cannot be read or written.
    """
    require_different_names([plan.config for plan in plans])
    if budget is not None:
        budget.require(estimate(plans, cache))
    spending = Spending(budget or Budget())
    shown = recorder or NullRecorder()
    return [_ask_target(plan, cache, spending, shown, on_answer) for plan in plans]


def _ask_target(
    plan: TargetPlan, cache: AnswerCache, spending: Spending, recorder: Recorder, on_answer: OnAnswer | None
) -> TargetAnswers:
    config, identity = plan.config, plan.config.identity
    distinct = dict.fromkeys(plan.requests)
    if identity is not None and all(cache.get(identity, request) is not None for request in distinct):
        # Nothing to ask, so neither a key nor a server is needed.
        return _collected(config.title, cache, identity, plan.questions, plan.requests, config.prices)
    with ExitStack() as stack:
        try:
            model = stack.enter_context(open_language_model(config))
        except SoftPromptError as error:
            return _collected(
                config.title,
                cache,
                identity,
                plan.questions,
                plan.requests,
                config.prices,
                ended=config.told(str(error)),
            )
        bar = stack.enter_context(recorder.progress(f"asking {config.title}", len(distinct)))
        return ask_questions(
            model,
            cache,
            plan.questions,
            plan.requests,
            target=config.title,
            bar=bar,
            identity=identity,
            prices=config.prices,
            spending=spending if config.is_remote else None,
            on_answer=on_answer,
            told=config.told,
        )


def ask_questions(
    model: LanguageModel,
    cache: AnswerCache,
    questions: Sequence[Question],
    requests: Sequence[CompletionRequest],
    *,
    target: str,
    bar: ProgressBar,
    identity: str | None = None,
    prices: Prices | None = None,
    spending: Spending | None = None,
    on_answer: OnAnswer | None = None,
    told: Callable[[str], str] = str,
) -> TargetAnswers:
    """Ask one open language model what the cache does not know yet; equal requests once.

    Args:
        requests: one for each question.
        bar: moves on by one for each different request.
        identity: what the answers are kept under; None: the model's own.
        spending: no request is drawn that could go past its budget; what is on its way is waited for.
        on_answer: is told of every request that is asked, once its answer is in the cache.
        told: what errors become before anyone reads them.

    Raises:
        DataError: the cache cannot be read or written.
    """
    identity = identity or model.identity
    by_request: dict[CompletionRequest, list[Question]] = {}
    for question, request in zip(questions, requests, strict=True):
        by_request.setdefault(request, []).append(question)
    asked = Asked()
    answered: list[Completion] = []
    errors: dict[CompletionRequest, str] = {}
    ended: str | None = None

    def within_budget() -> Iterator[CompletionRequest]:
        nonlocal ended
        for request in by_request:
            if spending is not None and cache.get(identity, request) is None:
                if spent := spending.reserve(request, prices):
                    ended = spent
                    bar.advance()
                    continue
            yield request

    def on_result(request: CompletionRequest, result: Completion | LanguageModelError) -> None:
        if isinstance(result, LanguageModelError):
            errors[request] = told(str(result))
        else:
            answered.append(result)
        if spending is not None:
            spending.settle(request, result, prices)
        if on_answer is not None:
            on_answer([_answer(question, result, told) for question in by_request[request]])

    try:
        ask_missing(model, cache, within_budget(), bar, asked, identity=identity, on_result=on_result)
    except LanguageModelError as error:
        # Its cause is the last failure; the error itself names the cache's path, which has no place in results.
        ended = told(f"too many requests in a row failed; the last one: {error.__cause__ or error}")
    return _collected(
        target,
        cache,
        identity,
        questions,
        requests,
        prices,
        asked=usage_of(answered, prices),
        found=asked.found,
        errors=errors,
        ended=ended,
    )


def _collected(
    target: str,
    cache: AnswerCache,
    identity: str | None,
    questions: Sequence[Question],
    requests: Sequence[CompletionRequest],
    prices: Prices | None,
    *,
    asked: Usage | None = None,
    found: int | None = None,
    errors: Mapping[CompletionRequest, str] | None = None,
    ended: str | None = None,
) -> TargetAnswers:
    """All answers as the cache has them, so that a second run gives the same to the last bit."""
    known = {request: cache.get(identity, request) if identity else None for request in dict.fromkeys(requests)}
    completions = [answer for answer in known.values() if answer is not None]
    answers = []
    for question, request in zip(questions, requests, strict=True):
        completion = known[request]
        if completion is not None:
            answers.append(_answer(question, completion))
        else:
            answers.append(Answer(question, None, error=(errors or {}).get(request) or f"not asked: {ended}"))
    return TargetAnswers(
        target,
        answers,
        asked=asked or usage_of([], prices),
        total=usage_of(completions, prices),
        found=len(completions) if found is None else found,
        failed=len(errors or {}),
        ended=ended,
    )


def _answer(question: Question, result: Completion | LanguageModelError, told: Callable[[str], str] = str) -> Answer:
    if isinstance(result, LanguageModelError):
        return Answer(question, None, error=told(str(result)))
    return Answer(
        question,
        result.text,
        result.finish_reason,
        result.prompt_tokens,
        result.completion_tokens,
        result.latency_s,
        raw=result.raw,
        adapted=result.adapted,
    )
