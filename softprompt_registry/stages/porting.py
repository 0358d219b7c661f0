"""Hard prompts at work on target LLMs, as MLflow runs: a parent, and a child for each target and condition."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import LoggedModelInput
from pydantic import PositiveInt

from mlflow_plugins.dod_dataset import DodDataset, from_dod
from mlflow_plugins.recording import MlflowRecorder
from mlflow_plugins.target_traces import target_traces
from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.base_models.reference import BaseModelRef
from softprompt_registry.config import Distinct, flatten, settings
from softprompt_registry.dod.store import DodStore
from softprompt_registry.dod.task import Task
from softprompt_registry.errors import ArtifactError, ConfigError, DataError
from softprompt_registry.evaluation.record import CANDIDATES, TASKS
from softprompt_registry.language_models.answer_cache import AnswerCache
from softprompt_registry.language_models.protocol import Usage, without_folders
from softprompt_registry.portability.analysis import Portability, measure_portability
from softprompt_registry.portability.answers import CONDITIONS, SOFT_PROMPT, Answer, Question
from softprompt_registry.portability.asking import OnAnswer, TargetAnswers, ask_questions, ask_targets
from softprompt_registry.portability.budget import Budget, Estimate, TargetPlan, estimate
from softprompt_registry.portability.figures import portability_figures
from softprompt_registry.portability.hard_prompts import LABEL_LIST, METHODS, HardPrompt, hard_prompts
from softprompt_registry.portability.page import portability_page
from softprompt_registry.portability.questions import (
    QuestionsConfig,
    TaskItems,
    choose_items,
    questions_for,
    requests_of,
    soft_prompt_questions,
)
from softprompt_registry.portability.soft_prompted import SoftPrompted
from softprompt_registry.portability.targets import TargetConfig, key_of, require_different_names
from softprompt_registry.portability.templates import PromptTemplates
from softprompt_registry.registry import conventions
from softprompt_registry.registry.artifacts import find_artifact
from softprompt_registry.registry.lookup import find_logged_model
from softprompt_registry.registry.store import STORE_FAILURES, in_one_line
from softprompt_registry.soft_prompts.bank import SoftPromptBank
from softprompt_registry.stages.running import log_inputs, require_same_dod, stage_run
from softprompt_registry.storage import complete_record
from softprompt_registry.verbalization.verbalizer import Verbalization

ANSWERS = "answers.json"
RESULT = "portability.json"
"""From these two files all numbers and the page can be made again."""


@settings
class PortabilityConfig:
    """What is asked, whom, and how it is counted."""

    targets: tuple[TargetConfig, ...] = ()
    """The target LLMs, one after the other."""
    conditions: Distinct[str] | None = None
    """What stands before the input. Null: all whose texts the evaluation has, and `soft_prompt` if there is a bank; one that
    is named and lacks its method is an error."""
    templates: PromptTemplates = field(default_factory=PromptTemplates)
    label_list: str = LABEL_LIST
    """The instruction that a bare list of labels is put into."""
    questions: QuestionsConfig = field(default_factory=QuestionsConfig)
    budget: Budget = field(default_factory=Budget)
    """Of all remote targets together; what could pass it is not asked."""
    soft_prompt_max_tokens: PositiveInt = 64
    """Length cap of an answer under the soft prompt itself, which ends by its own EOS."""
    trace: bool = True
    """Whether each request to a target becomes an MLflow trace, which takes about a tenth of a second."""
    seed: int = 0
    """Of the bootstraps over tasks."""

    def __post_init__(self) -> None:
        if unknown := set(self.conditions or ()) - set(CONDITIONS):
            raise ValueError(f"conditions has {sorted(unknown)}, expected some of {list(CONDITIONS)}")


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


@dataclass(frozen=True)
class _Evaluated:
    """What a run of `evaluate` says about its tasks."""

    run_id: str
    texts: Mapping[str, list[Verbalization]]
    tasks: Mapping[str, Task]
    split_seed: int
    """By which the held-out pairs were divided into those that chose the texts and others."""


@dataclass(frozen=True)
class _Work:
    """All that will be asked."""

    chosen: list[TaskItems]
    prompts: Mapping[str, Mapping[str, HardPrompt]]
    plans: list[TargetPlan]
    left_out: dict[str, str]
    conditions: tuple[str, ...]

    @property
    def tasks(self) -> dict[str, Task]:
        return {items.task.name: items.task for items in self.chosen}


def estimate_portability(evaluation: str, dod_path: Path, cache_path: Path, config: PortabilityConfig) -> Estimate:
    """What the same command would ask for and cost at most; nothing is asked, and no run is made.

    Raises:
        ArtifactError, ConfigError, DataError: see `measure`.
    """
    require_different_names(config.targets)
    with DodStore.open(dod_path) as store, AnswerCache(cache_path) as cache:
        return estimate(_prepare(_read(evaluation, store), config, with_bank=False).plans, cache)


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
        DataError: the DoD is another one, or nothing can be asked about any task.
    """
    require_different_names(config.targets)
    if config.conditions is not None and SOFT_PROMPT in config.conditions and (base_model is None or bank_uri is None):
        raise ConfigError(
            "measuring portability: the condition 'soft_prompt' needs the bank with the soft prompts, found none. Give it, "
            "or leave the condition out."
        )
    with DodStore.open(dod_path) as store, AnswerCache(cache_path) as cache:
        evaluated = _read(evaluation, store)
        work = _prepare(evaluated, config, with_bank=base_model is not None and bank_uri is not None)
        bank = None
        if SOFT_PROMPT in work.conditions and bank_uri is not None:
            bank = SoftPromptBank(find_artifact(bank_uri, "bank").folder)
            require_same_dod(bank, store)
            _require_same_soft_prompts(bank, evaluated)
        config.budget.require(estimate(work.plans, cache))
        with stage_run(conventions.STAGE_PORTABILITY, None if bank is None else base_model) as run_id:
            dataset = from_dod(str(dod_path))
            recorder = MlflowRecorder()
            recorder.params(
                "portability",
                {
                    "evaluation_run_id": evaluated.run_id,
                    **flatten(replace(config, targets=())),
                    **_shown(config.targets),
                },
            )
            _log_inputs(dataset, evaluated.run_id, base_model.ref if base_model else None)
            with ExitStack() as stack:
                on_answer: OnAnswer | None = None
                if config.trace:
                    prices = {target.title: target.prices for target in config.targets}
                    on_answer = stack.enter_context(target_traces(prices))
                found = ask_targets(work.plans, cache, budget=config.budget, recorder=recorder, on_answer=on_answer)
            if bank is not None and base_model is not None:
                found.append(_ask_soft_prompts(work, bank, base_model, cache, config, recorder))
            answers = [answer for target in found for answer in target.answers]
            known = {target.title: target.prices for target in config.targets if target.prices}
            result = measure_portability(answers, work.tasks, prices=known, seed=config.seed)
            if adapted := _adapted(config.targets, found):
                recorder.params("portability", adapted)
            _record(result, answers, found, work.left_out, recorder, dataset, config, adapted)
    not_asked = (
        () if config.conditions is not None else tuple(name for name in CONDITIONS if name not in work.conditions)
    )
    return PortabilityResult(run_id, result, found, work.left_out, not_asked)


def read_portability(run_id: str) -> tuple[Portability, list[Answer]]:
    """A finished run's result and answers, from the run alone.

    Raises:
        ArtifactError: the run is not there, or is not one of `portability`.
    """
    try:
        record = mlflow.artifacts.load_dict(f"runs:/{run_id}/{RESULT}")
        rows = mlflow.artifacts.load_dict(f"runs:/{run_id}/{ANSWERS}")["answers"]
    except (*STORE_FAILURES, OSError, KeyError) as error:
        raise ArtifactError(
            f"reading portability run {run_id!r}: {in_one_line(error)}. "
            "Expected a run of `softprompt portability` with the files "
            f"{RESULT} and {ANSWERS}. Give the run id that the command printed."
        ) from error
    with complete_record("the answers of a portability run"):
        return Portability.from_json(record), [Answer.from_json(row) for row in rows]


def _read(evaluation: str, store: DodStore) -> _Evaluated:
    """The evaluation's texts, and its tasks out of the DoD with all their pairs."""
    run_id = evaluation.removeprefix("runs:/").strip("/")
    try:
        candidates = mlflow.artifacts.load_dict(f"runs:/{run_id}/{CANDIDATES}")
        records = mlflow.artifacts.load_dict(f"runs:/{run_id}/{TASKS}")["tasks"]
        split_seed = int(mlflow.get_run(run_id).data.params["evaluation.verifier.seed"])
    except (*STORE_FAILURES, OSError, KeyError) as error:
        raise ArtifactError(
            f"reading the evaluation of run {run_id!r}: {in_one_line(error)}. "
            "Expected a run of `softprompt evaluate` with the files "
            f"{CANDIDATES} and {TASKS}. Give the run id that the command printed."
        ) from error
    with complete_record("an evaluation"):
        texts = {method: [Verbalization.from_json(item) for item in items] for method, items in candidates.items()}
        digests = {record["name"]: record["digest"] for record in records}
    known = set(store.task_names())
    tasks = {name: store.task(name) for name in digests if name in known}
    others = [name for name, digest in digests.items() if name not in tasks or tasks[name].digest != digest]
    if others:
        raise DataError(
            f"measuring portability of the evaluation {run_id!r} on DoD {store.name!r}: {len(others)} of its {len(digests)} "
            f"tasks are missing or another one there ({others[:5]}); pairs that chose a text could be asked about. Give the "
            "DoD that was evaluated on."
        )
    return _Evaluated(run_id, texts, tasks, split_seed)


def _require_same_soft_prompts(bank: SoftPromptBank, evaluated: _Evaluated) -> None:
    """The texts were read off these very soft prompts, so that both are compared on equal terms."""
    members = set(bank.tasks())
    for items in evaluated.texts.values():
        for item in items:
            if item.task not in members or bank.member(item.task).id != item.soft_prompt_id:
                found = "another soft prompt" if item.task in members else "no soft prompt"
                raise DataError(
                    f"measuring portability of the evaluation {evaluated.run_id!r}: the bank has {found} of task "
                    f"{item.task!r}, expected the one that the text was read off. Give the bank that was evaluated, or "
                    "leave it out."
                )
        return  # every method read the same ones


def _conditions(evaluated: _Evaluated, config: PortabilityConfig, *, with_bank: bool) -> tuple[str, ...]:
    if config.conditions is not None:
        return config.conditions
    return tuple(
        name
        for name in CONDITIONS
        if (with_bank if name == SOFT_PROMPT else name not in METHODS or set(METHODS[name]) & set(evaluated.texts))
    )


def _prepare(evaluated: _Evaluated, config: PortabilityConfig, *, with_bank: bool) -> _Work:
    conditions = _conditions(evaluated, config, with_bank=with_bank)
    prompts = hard_prompts(evaluated.texts, evaluated.tasks, conditions, label_list=config.label_list)
    chosen, left_out = [], {}
    for name, task in evaluated.tasks.items():
        try:
            chosen.append(choose_items(task, config.questions, split_seed=evaluated.split_seed))
        except DataError as error:
            left_out[name] = str(error)
    if not chosen:
        name, reason = next(iter(left_out.items()))
        raise DataError(
            f"measuring portability: nothing can be asked about any of the {len(left_out)} tasks, expected at least one. The "
            f"first, {name!r}: {reason}"
        )
    tasks = {items.task.name: items.task for items in chosen}
    plans = []
    for target in config.targets:
        questions: list[Question] = []
        for items in chosen:
            questions += questions_for(items, target.title, conditions, prompts[items.task.name], config.templates)
        requests = requests_of(questions, tasks, config.questions, max_tokens=target.max_tokens)
        plans.append(TargetPlan(target, questions, requests))
    return _Work(chosen, prompts, plans, left_out, conditions)


def _ask_soft_prompts(
    work: _Work,
    bank: SoftPromptBank,
    base_model: BaseModel,
    cache: AnswerCache,
    config: PortabilityConfig,
    recorder: MlflowRecorder,
) -> TargetAnswers:
    """The same questions to the small model under each task's own soft prompt."""
    name = base_model.ref.name
    taken = {target.title for target in config.targets}
    shown = f"{name} (soft prompt)" if name in taken else name
    parts = []
    total = sum(len(items.items) for items in work.chosen)
    with recorder.progress(f"asking {shown} under soft prompts", total) as bar:
        for items in work.chosen:
            questions = soft_prompt_questions(items, shown)
            requests = requests_of(questions, work.tasks, config.questions, max_tokens=config.soft_prompt_max_tokens)
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


def _shown(targets: Sequence[TargetConfig]) -> dict[str, Any]:
    """The targets' settings for the record, without folders of this machine."""
    shown: dict[str, Any] = {}
    for target in targets:
        for name, value in asdict(target).items():
            if name == "options":
                shown |= {f"targets.{target.key}.{option}": _without_folders(given) for option, given in value.items()}
            elif name != "name" and value is not None:
                shown[f"targets.{target.key}.{name}"] = _without_folders(value)
    return shown


def _adapted(targets: Sequence[TargetConfig], found: Sequence[TargetAnswers]) -> dict[str, Any]:
    """For the record, what targets were asked with in place of the settings given, since they refuse these."""
    keys = {target.title: target.key for target in targets}
    return {
        f"targets.{keys[one.target]}.adapted": "; ".join(one.adapted)
        for one in found
        if one.adapted and one.target in keys
    }


def _without_folders(value: Any) -> Any:
    return without_folders(value) if isinstance(value, str) else value


def _log_inputs(dataset: DodDataset, evaluation_run: str, ref: BaseModelRef | None) -> None:
    """The DoD, and the models that the evaluation read."""
    if ref is not None:
        log_inputs(ref, dataset, context="portability")
    else:
        mlflow.log_input(dataset, context="portability")
    client = mlflow.MlflowClient()
    inputs = client.get_run(evaluation_run).inputs
    for item in inputs.model_inputs if inputs else []:
        model = find_logged_model(client, item.model_id)  # somebody may have deleted it since
        if model is not None and (model.model_type != conventions.BASE_MODEL or ref is None):
            mlflow.log_input(model=LoggedModelInput(model_id=item.model_id))


def _record(
    result: Portability,
    answers: Sequence[Answer],
    found: Sequence[TargetAnswers],
    left_out: Mapping[str, str],
    recorder: MlflowRecorder,
    dataset: DodDataset,
    config: PortabilityConfig,
    adapted: Mapping[str, Any],
) -> None:
    mlflow.log_dict({"answers": [answer.to_json() for answer in answers]}, ANSWERS)
    mlflow.log_dict(result.to_json(), RESULT)
    recorder.table("conditions.json", result.table())
    recorder.table("tasks.json", result.task_table())
    recorder.table("comparisons.json", result.comparison_table())
    recorder.table("translation_against_few_shot.json", result.margin_table())
    missing = [answer for target in found for answer in target.missing]
    recorder.table(
        "missing.json",
        {
            "target": [answer.question.target for answer in missing],
            "condition": [answer.question.condition for answer in missing],
            "task": [answer.question.task for answer in missing],
            "item": [answer.question.item for answer in missing],
            "error": [answer.error for answer in missing],
        },
    )
    recorder.table("left_out.json", {"task": list(left_out), "reason": list(left_out.values())})
    for figure in portability_figures(result):
        recorder.figure(f"{figure.name}.png", figure.figure)
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    title = "Hard prompts at work on other LLMs"
    settings = {**flatten(replace(config, targets=())), **_shown(config.targets), **adapted}
    usage = {target.target: target.total for target in found}
    page = portability_page(result, answers, title=title, when=when, settings=settings, usage=usage)
    mlflow.log_text(page, "portability.html")
    recorder.metric("portability.num_missing", float(len(missing)))
    for target in found:
        usage = {"asked": target.asked, "total": target.total}
        for name, used in usage.items():
            recorder.metric(f"portability.{name}_requests.{key_of(target.target)}", float(used.requests))
            recorder.metric(
                f"portability.{name}_tokens.{key_of(target.target)}", float(used.prompt_tokens + used.completion_tokens)
            )
            if used.cost is not None and config.targets:
                recorder.metric(f"portability.{name}_cost.{key_of(target.target)}", used.cost)
    for place_target, condition in result.places:
        tags = {conventions.STAGE_TAG: conventions.STAGE_PORTABILITY_CONDITION}
        with mlflow.start_run(run_name=f"{place_target} · {condition}", nested=True, tags=tags):
            mlflow.log_params({"target": place_target, "condition": condition})
            mlflow.log_input(dataset, context="portability")
            metrics = result.metrics(place_target, condition)
            mlflow.log_metrics({f"portability.{name}": value for name, value in metrics.items()})
