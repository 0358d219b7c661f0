"""Hard prompts at work on target LLMs, as MLflow runs: a parent, and a child for each target and condition."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow.entities import LoggedModelInput

from mlflow_plugins.dod_dataset import DodDataset, from_dod
from mlflow_plugins.recording import MlflowRecorder
from mlflow_plugins.target_traces import target_traces
from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.base_models.reference import BaseModelRef
from softprompt_registry.dod.store import DodStore
from softprompt_registry.errors import ConfigError
from softprompt_registry.language_models.answer_cache import AnswerCache
from softprompt_registry.portability.analysis import Portability
from softprompt_registry.portability.answers import Answer
from softprompt_registry.portability.asking import OnAnswer, TargetAnswers
from softprompt_registry.portability.budget import Estimate, estimate
from softprompt_registry.portability.conditions import CONDITIONS, SOFT_PROMPT
from softprompt_registry.portability.figures import portability_figures
from softprompt_registry.portability.measuring import (
    PortabilityConfig,
    PortabilityPlan,
    adapted_settings,
    measure_portability,
    plan_portability,
    require_same_soft_prompts,
)
from softprompt_registry.portability.page import portability_page
from softprompt_registry.portability.targets import key_of
from softprompt_registry.registry import conventions
from softprompt_registry.registry.artifacts import ANSWERS, RESULT, find_artifact, find_evaluation
from softprompt_registry.registry.lookup import find_logged_model, run_id_of
from softprompt_registry.soft_prompts.bank import SoftPromptBank
from softprompt_registry.stages.running import log_inputs, require_same_dod, stage_run


@dataclass(frozen=True)
class PortabilityResult:
    """What was found, what it cost, and the run that holds it."""

    run_id: str
    portability: Portability
    targets: list[TargetAnswers]
    """The soft prompts' own answers last, under the small model's name."""
    left_out: dict[str, str]
    """Tasks of the evaluation that nothing could be asked about, with the reason."""
    not_asked: tuple[str, ...] = ()
    """Conditions whose texts the evaluation does not have, or that lack a bank."""

    @property
    def missing(self) -> list[Answer]:
        """Every question without an answer; a second start asks for these alone."""
        return [answer for target in self.targets for answer in target.missing]


def estimate_portability(evaluation: str, dod_path: Path, cache_path: Path, config: PortabilityConfig) -> Estimate:
    """What the same command would ask for and cost at most; nothing is asked, and no run is made.

    Raises:
        ArtifactError, ConfigError, DataError: see `measure`.
    """
    with DodStore.open(dod_path) as store, AnswerCache(cache_path) as cache:
        return estimate(plan_portability(find_evaluation(evaluation), store, config, with_bank=False).targets, cache)


def measure(
    evaluation: str,
    dod_path: Path,
    cache_path: Path,
    config: PortabilityConfig,
    *,
    base_model: BaseModel | None = None,
    bank_uri: str | None = None,
) -> PortabilityResult:
    """Ask every target about held-out pairs of an evaluation's tasks under every condition, and score the answers.

    Every answer is in the cache as soon as it arrives: a second start with the same settings asks only for what is missing,
    costs nothing where nothing is, and gives the same numbers. Questions without an answer are listed, and not scored.

    Args:
        evaluation: run of `evaluate`, whose texts are used.
        cache_path: SQLite file with the answers of this and earlier runs.
        base_model, bank_uri: for the condition `soft_prompt`: the soft prompts, and the model that they were tuned on.

    Raises:
        ArtifactError: the run is not one of `evaluate`.
        ConfigError: there is no target, the evaluation lacks a method, the budget does not suffice, or the condition
            `soft_prompt` has no bank.
        DataError: the DoD or the bank is another one, or nothing can be asked about any task.
    """
    with_bank = base_model is not None and bank_uri is not None
    if config.conditions is not None and SOFT_PROMPT in config.conditions and not with_bank:
        raise ConfigError(
            "measuring portability: the condition 'soft_prompt' needs the bank with the soft prompts, found none. Give it, "
            "or leave the condition out."
        )
    with DodStore.open(dod_path) as store, AnswerCache(cache_path) as cache:
        record = find_evaluation(evaluation)
        plan = plan_portability(record, store, config, with_bank=with_bank)
        bank = None
        if SOFT_PROMPT in plan.conditions and bank_uri is not None:
            bank = SoftPromptBank(find_artifact(bank_uri, "bank").folder)
            require_same_dod(bank, store)
            require_same_soft_prompts(bank, record)
        config.budget.require(estimate(plan.targets, cache))
        with (
            stage_run(conventions.STAGE_PORTABILITY, None if bank is None else base_model) as run_id,
            ExitStack() as stack,
        ):
            evaluation_run = run_id_of(evaluation)
            recorder = MlflowRecorder()
            recorder.params("portability", {"evaluation_run_id": evaluation_run, **config.shown()})
            dataset = from_dod(str(dod_path))
            _log_inputs(dataset, evaluation_run, base_model.ref if base_model else None)
            on_answer: OnAnswer | None = None
            if config.trace:
                on_answer = stack.enter_context(target_traces({one.title: one.prices for one in config.targets}))
            result, found = measure_portability(
                plan, cache, config, recorder=recorder, base_model=base_model, bank=bank, on_answer=on_answer
            )
            _record(result, found, plan, recorder, dataset, config)
    not_asked = () if config.conditions else tuple(name for name in CONDITIONS if name not in plan.conditions)
    return PortabilityResult(run_id, result, found, plan.left_out, not_asked)


def _log_inputs(dataset: DodDataset, evaluation_run: str, ref: BaseModelRef | None) -> None:
    """The DoD, and the models that the evaluation read."""
    if ref is not None:
        log_inputs(ref, dataset, context="portability")
    else:
        mlflow.log_input(dataset, context="portability")
    inputs = mlflow.get_run(evaluation_run).inputs
    for item in inputs.model_inputs if inputs else []:
        model = find_logged_model(item.model_id)  # somebody may have deleted it since
        if model is not None and (model.model_type != conventions.BASE_MODEL or ref is None):
            mlflow.log_input(model=LoggedModelInput(model_id=item.model_id))


def _record(
    result: Portability,
    found: Sequence[TargetAnswers],
    plan: PortabilityPlan,
    recorder: MlflowRecorder,
    dataset: DodDataset,
    config: PortabilityConfig,
) -> None:
    answers = [answer for target in found for answer in target.answers]
    missing = [answer for answer in answers if answer.is_missing]
    adapted = adapted_settings(config.targets, found)
    if adapted:
        recorder.params("portability", adapted)
    mlflow.log_dict({"answers": [answer.to_json() for answer in answers]}, ANSWERS)
    mlflow.log_dict(result.to_json(), RESULT)
    recorder.table("conditions.json", result.table())
    recorder.table("tasks.json", result.task_table())
    recorder.table("comparisons.json", result.comparison_table())
    recorder.table("translation_against_few_shot.json", result.margin_table())
    columns: Mapping[str, list[object]] = {
        name: [getattr(answer.question, name) for answer in missing] for name in ("target", "condition", "task", "item")
    }
    recorder.table("missing.json", {**columns, "error": [answer.error for answer in missing]})
    recorder.table("left_out.json", {"task": list(plan.left_out), "reason": list(plan.left_out.values())})
    for figure in portability_figures(result):
        recorder.figure(f"{figure.name}.png", figure.figure)
    page = portability_page(
        result,
        answers,
        title="Hard prompts at work on other LLMs",
        when=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        settings={**config.shown(), **adapted},
        usage={target.target: target.total for target in found},
    )
    mlflow.log_text(page, "portability.html")
    recorder.metric("portability.num_missing", float(len(missing)))
    for target in found:
        key = key_of(target.target)
        for name, used in (("asked", target.asked), ("total", target.total)):
            recorder.metric(f"portability.{name}_requests.{key}", float(used.requests))
            recorder.metric(f"portability.{name}_tokens.{key}", float(used.prompt_tokens + used.completion_tokens))
            if used.cost is not None:
                recorder.metric(f"portability.{name}_cost.{key}", used.cost)
    for place_target, condition in result.places:
        tags = {conventions.STAGE_TAG: conventions.STAGE_PORTABILITY_CONDITION}
        with mlflow.start_run(run_name=f"{place_target} · {condition}", nested=True, tags=tags):
            mlflow.log_params({"target": place_target, "condition": condition})
            mlflow.log_input(dataset, context="portability")
            metrics = result.metrics(place_target, condition)
            mlflow.log_metrics({f"portability.{name}": value for name, value in metrics.items()})
