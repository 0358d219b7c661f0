"""Puts questions to target LLMs. Every answer is kept at once; what could not be answered is named, never dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
from softprompt_registry.portability.answers import Answer, Question
from softprompt_registry.portability.budget import Budget, Spending, TargetPlan, estimate
from softprompt_registry.portability.targets import require_different_names
from softprompt_registry.recording import NullRecorder

if TYPE_CHECKING:
    from softprompt_registry.recording import ProgressBar, Recorder

OnAnswer = Callable[[Sequence[Answer]], None]
"""Called as each request of this run ends, with its answer or failure for each of the questions that it asks."""


@dataclass(frozen=True)
class TargetAnswers:
    """The answers of one target and what they cost."""

    target: str
    answers: list[Answer]
    """One for each question, in order; those that are missing say why."""
    asked: Usage
    """Usage of the requests that were answered in this run, as the server counted their tokens."""
    total: Usage
    """Usage of all answers, those of earlier runs included, at today's prices; a shared request counts once."""
    found: int = 0
    """Requests whose answer was there from an earlier run."""
    failed: int = 0
    """Requests that failed in this run; a server does not say what it bills for them."""
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
    budget = budget or Budget()
    budget.require(estimate(plans, cache))
    spending = Spending(budget)
    shown = recorder or NullRecorder()
    return [_ask_target(plan, cache, spending, shown, on_answer) for plan in plans]


def _ask_target(
    plan: TargetPlan, cache: AnswerCache, spending: Spending, recorder: Recorder, on_answer: OnAnswer | None
) -> TargetAnswers:
    config, identity = plan.config, plan.config.identity
    distinct = dict.fromkeys(plan.requests)
    model, ended = None, None
    with ExitStack() as stack:
        # With nothing to ask neither a key nor a server is needed.
        if identity is None or any(cache.get(identity, request) is None for request in distinct):
            try:
                model = stack.enter_context(open_language_model(config))
            except SoftPromptError as error:
                ended = config.told(str(error))
        shown = NullRecorder() if model is None else recorder
        bar = stack.enter_context(shown.progress(f"asking {config.title}", len(distinct)))
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
            ended=ended,
        )


def ask_questions(
    model: LanguageModel | None,
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
    ended: str | None = None,
) -> TargetAnswers:
    """Ask an open language model what the cache does not know yet; equal requests once.

    Args:
        model: None asks nothing, and gives what the cache knows.
        requests: one for each question.
        bar: advances by one for each different request.
        identity: key of the answers in the cache; None: the model's own.
        spending: a request that could exceed its budget is not sent; requests that were sent are waited for.
        on_answer: is called for every request that is asked, once its answer is in the cache.
        told: what is applied to error texts before they are shown.
        ended: why nothing is asked.

    Raises:
        DataError: the cache cannot be read or written.
    """
    identity = identity or (model.identity if model else "")
    by_request: dict[CompletionRequest, list[Question]] = {}
    for question, request in zip(questions, requests, strict=True):
        by_request.setdefault(request, []).append(question)
    asked = Asked()
    answered: list[Completion] = []
    errors: dict[CompletionRequest, str] = {}

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

    if model is not None:
        try:
            ask_missing(model, cache, within_budget(), bar, asked, identity=identity, on_result=on_result)
        except LanguageModelError as error:
            # Its cause is the last failure; the error itself names the cache's path, which has no place in results.
            ended = told(f"too many requests in a row failed; the last one: {error.__cause__ or error}")
    # All answers are those of the cache, so that a second run gives the same to the last bit.
    known = {request: cache.get(identity, request) if identity else None for request in by_request}
    completions = [answer for answer in known.values() if answer is not None]
    answers = []
    for question, request in zip(questions, requests, strict=True):
        completion = known[request]
        if completion is not None:
            answers.append(_answer(question, completion))
        else:
            answers.append(Answer(question, None, error=errors.get(request) or f"not asked: {ended}"))
    return TargetAnswers(
        target,
        answers,
        asked=usage_of(answered, prices),
        total=usage_of(completions, prices),
        found=len(completions) if model is None else asked.found,
        failed=len(errors),
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
