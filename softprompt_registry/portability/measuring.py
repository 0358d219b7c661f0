"""What a measurement of portability asks: the settings, the plan for every target, and the soft prompts' own answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pydantic import PositiveInt

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.config import Distinct, flatten, settings
from softprompt_registry.dod.store import DodStore
from softprompt_registry.dod.task import Task
from softprompt_registry.errors import DataError
from softprompt_registry.evaluation.record import EvaluationRecord
from softprompt_registry.language_models.answer_cache import AnswerCache
from softprompt_registry.language_models.protocol import Usage, without_folders
from softprompt_registry.portability.analysis import Portability
from softprompt_registry.portability.asking import OnAnswer, TargetAnswers, ask_questions, ask_targets
from softprompt_registry.portability.budget import Budget, TargetPlan
from softprompt_registry.portability.conditions import CONDITIONS, SOFT_PROMPT
from softprompt_registry.portability.hard_prompts import LABEL_LIST, hard_prompts
from softprompt_registry.portability.questions import (
    QuestionsConfig,
    TaskItems,
    choose_items,
    questions_for,
    requests_of,
    soft_prompt_questions,
)
from softprompt_registry.portability.scoring import score_answers
from softprompt_registry.portability.soft_prompted import SoftPrompted
from softprompt_registry.portability.targets import TargetConfig, require_different_names
from softprompt_registry.portability.templates import PromptTemplates
from softprompt_registry.recording import Recorder
from softprompt_registry.soft_prompts.bank import SoftPromptBank


@settings
class PortabilityConfig:
    """What is asked, whom, and how it is counted."""

    targets: tuple[TargetConfig, ...] = ()
    """The target LLMs, asked one after the other."""
    conditions: Distinct[str] | None = None
    """What stands before the input. Null: all whose texts the evaluation has, and `soft_prompt` if there is a bank; one that
    is named and lacks its method is an error."""
    templates: PromptTemplates = field(default_factory=PromptTemplates)
    label_list: str = LABEL_LIST
    """The instruction that a bare list of labels is put into."""
    questions: QuestionsConfig = field(default_factory=QuestionsConfig)
    budget: Budget = field(default_factory=Budget)
    """Limits for all remote targets together; a request that could exceed one is not sent."""
    soft_prompt_max_tokens: PositiveInt = 64
    """Length cap of an answer under the soft prompt itself, which ends by its own EOS."""
    trace: bool = True
    """Whether each request to a target becomes an MLflow trace, which takes about a tenth of a second."""
    seed: int = 0
    """Seed for the bootstraps over tasks."""

    def __post_init__(self) -> None:
        if unknown := set(self.conditions or ()) - set(CONDITIONS):
            raise ValueError(f"conditions has {sorted(unknown)}, expected some of {list(CONDITIONS)}")

    def shown(self) -> dict[str, Any]:
        """All settings for a record, flat, without folders of this machine."""
        shown = flatten(replace(self, targets=()))
        for target in self.targets:
            for name, value in asdict(target).items():
                if name == "options":
                    shown |= {
                        f"targets.{target.key}.{option}": _without_folders(given) for option, given in value.items()
                    }
                elif name != "name" and value is not None:
                    shown[f"targets.{target.key}.{name}"] = _without_folders(value)
        return shown


@dataclass(frozen=True)
class PortabilityPlan:
    """All that will be asked."""

    items: list[TaskItems]
    targets: list[TargetPlan]
    left_out: dict[str, str]
    """Tasks of the evaluation that nothing can be asked about, with the reason."""
    conditions: tuple[str, ...]


def plan_portability(
    evaluation: EvaluationRecord, store: DodStore, config: PortabilityConfig, *, with_bank: bool
) -> PortabilityPlan:
    """Choose test pairs of every task of an evaluation, and make every target's questions about them.

    Args:
        with_bank: whether the soft prompts can be asked themselves.

    Raises:
        ConfigError: there is no target, two have one name, or the evaluation lacks a method that a condition needs.
        DataError: the DoD is not the one that was evaluated on, or nothing can be asked about any task.
    """
    require_different_names(config.targets)
    tasks = _evaluated_tasks(evaluation, store)
    conditions = config.conditions or tuple(
        name
        for name, condition in CONDITIONS.items()
        if (
            with_bank
            if name == SOFT_PROMPT
            else not condition.methods or set(condition.methods) & set(evaluation.texts)
        )
    )
    prompts = hard_prompts(evaluation.texts, tasks, conditions, label_list=config.label_list)
    chosen, left_out = [], {}
    for name, task in tasks.items():
        try:
            chosen.append(choose_items(task, config.questions, split_seed=evaluation.split_seed))
        except DataError as error:
            left_out[name] = str(error)
    if not chosen:
        name, reason = next(iter(left_out.items()))
        raise DataError(
            f"measuring portability: nothing can be asked about any of the {len(left_out)} tasks, expected at least one. The "
            f"first, {name!r}: {reason}"
        )
    plans = []
    for target in config.targets:
        questions = [
            question
            for items in chosen
            for question in questions_for(items, target.title, conditions, prompts[items.task.name], config.templates)
        ]
        plans.append(
            TargetPlan(target, questions, requests_of(questions, tasks, config.questions, max_tokens=target.max_tokens))
        )
    return PortabilityPlan(chosen, plans, left_out, conditions)


def measure_portability(
    plan: PortabilityPlan,
    cache: AnswerCache,
    config: PortabilityConfig,
    *,
    recorder: Recorder,
    base_model: BaseModel | None = None,
    bank: SoftPromptBank | None = None,
    on_answer: OnAnswer | None = None,
) -> tuple[Portability, list[TargetAnswers]]:
    """Ask every target what the cache does not know yet, then each soft prompt on the base model, and score all answers.

    Args:
        base_model, bank: for the condition `soft_prompt`; see `require_same_soft_prompts`.
        on_answer: is called for every request to a target.

    Raises:
        ConfigError: what is missing could exceed the budget; nothing was asked then.
    """
    found = ask_targets(plan.targets, cache, budget=config.budget, recorder=recorder, on_answer=on_answer)
    if bank is not None and base_model is not None and SOFT_PROMPT in plan.conditions:
        found.append(_ask_soft_prompts(plan, bank, base_model, cache, config, recorder))
    tasks = {items.task.name: items.task for items in plan.items}
    scored = score_answers([answer for target in found for answer in target.answers], tasks)
    prices = {target.title: target.prices for target in config.targets if target.prices}
    return Portability(tuple(scored), prices, config.seed), found


def require_same_soft_prompts(bank: SoftPromptBank, evaluation: EvaluationRecord) -> None:
    """The texts were read from these very soft prompts, so that both are compared on equal terms.

    Raises:
        DataError: the bank lacks a task's soft prompt, or has another one.
    """
    members = set(bank.tasks())
    for item in next(iter(evaluation.texts.values()), []):  # every method read the same ones
        if item.task not in members or bank.member(item.task).id != item.soft_prompt_id:
            found = "another soft prompt" if item.task in members else "no soft prompt"
            raise DataError(
                f"measuring portability of an evaluation: the bank has {found} of task {item.task!r}, expected the one that "
                "the text was read from. Give the bank that was evaluated, or leave it out."
            )


def _evaluated_tasks(evaluation: EvaluationRecord, store: DodStore) -> dict[str, Task]:
    """The evaluation's tasks out of the DoD with all their pairs."""
    known = set(store.task_names())
    tasks = {name: store.task(name) for name in evaluation.tasks if name in known}
    others = [name for name, task in evaluation.tasks.items() if name not in tasks or tasks[name].digest != task.digest]
    if others:
        raise DataError(
            f"measuring portability of an evaluation on DoD {store.name!r}: {len(others)} of its {len(evaluation.tasks)} "
            f"tasks are missing or another one there ({others[:5]}); pairs that chose a text could be asked about. Give the "
            "DoD that was evaluated on."
        )
    return tasks


def _ask_soft_prompts(
    plan: PortabilityPlan,
    bank: SoftPromptBank,
    base_model: BaseModel,
    cache: AnswerCache,
    config: PortabilityConfig,
    recorder: Recorder,
) -> TargetAnswers:
    """The same questions to the small model under each task's own soft prompt."""
    name = base_model.ref.name
    shown = f"{name} (soft prompt)" if name in {target.title for target in config.targets} else name
    parts: list[TargetAnswers] = []
    with recorder.progress(f"asking {shown} under soft prompts", sum(len(items.items) for items in plan.items)) as bar:
        for items in plan.items:
            questions = soft_prompt_questions(items, shown)
            requests = requests_of(
                questions, {items.task.name: items.task}, config.questions, max_tokens=config.soft_prompt_max_tokens
            )
            model = SoftPrompted(base_model, bank.member(items.task.name))
            parts.append(ask_questions(model, cache, questions, requests, target=shown, bar=bar))
    return TargetAnswers(
        shown,
        [answer for part in parts for answer in part.answers],
        asked=sum((part.asked for part in parts), Usage()),
        total=sum((part.total for part in parts), Usage()),
        found=sum(part.found for part in parts),
        failed=sum(part.failed for part in parts),
        ended=next((part.ended for part in parts if part.ended), None),
    )


def adapted_settings(targets: Sequence[TargetConfig], found: Sequence[TargetAnswers]) -> dict[str, str]:
    """For a record, what targets were asked with in place of the settings given, since they refuse these."""
    keys = {target.title: target.key for target in targets}
    return {
        f"targets.{keys[one.target]}.adapted": "; ".join(one.adapted)
        for one in found
        if one.adapted and one.target in keys
    }


def _without_folders(value: Any) -> Any:
    return without_folders(value) if isinstance(value, str) else value
