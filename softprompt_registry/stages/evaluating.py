"""Scoring methods of verbalization beside each other as MLflow runs: a parent, and a child for each method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import LoggedModelInput

from mlflow_plugins.dod_dataset import from_dod
from mlflow_plugins.recording import MlflowRecorder
from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.config import flatten
from softprompt_registry.dod.store import DodStore
from softprompt_registry.dod.task import Task
from softprompt_registry.errors import DataError
from softprompt_registry.evaluation.calibration import is_good, rule_from_training_tasks
from softprompt_registry.evaluation.control_prompts import ControlPrompt, ControlResult, control_prompts, control_result
from softprompt_registry.evaluation.metrics import SentenceEncoder, TextEncoder
from softprompt_registry.evaluation.text_scores import scored_text
from softprompt_registry.evaluation.verbalizations import Evaluation, evaluate_verbalizations
from softprompt_registry.fingerprints import digest_of_json
from softprompt_registry.recording import Recorder
from softprompt_registry.registry.artifacts import find_artifact
from softprompt_registry.soft_prompts.bank import SoftPromptBank
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt
from softprompt_registry.stages.evaluation_records import Evaluated, record_evaluation
from softprompt_registry.stages.proposing import EvaluationConfig, settings_digest
from softprompt_registry.stages.running import log_inputs, stage_run
from softprompt_registry.stages.training import require_same_dod
from softprompt_registry.storage import forget, locked
from softprompt_registry.translators.translator import Translator
from softprompt_registry.verbalization.abstention import AbstentionRule, why_not_tuned
from softprompt_registry.verbalization.held_out import MIN_ITEMS, split_pairs
from softprompt_registry.verbalization.kept_parts import KeptParts, KeptProposer, KeptVerifier
from softprompt_registry.verbalization.methods import ALL, WITH_VERIFIER, MethodTexts, apply_methods
from softprompt_registry.verbalization.proposers.translator import TranslatorProposer
from softprompt_registry.verbalization.proposing import NOT_AMONG_ALL, Sources, make_proposers
from softprompt_registry.verbalization.verbalizer import Proposer, Verbalization
from softprompt_registry.verbalization.verifier import Verifier

BEST = f"{ALL}{WITH_VERIFIER}"
"""The method whose texts the rule is chosen on: the verifier's choice among all candidates."""


@dataclass(frozen=True)
class EvaluationResult:
    """What the evaluation found, and the run that holds it."""

    run_id: str
    evaluation: Evaluation
    rule: AbstentionRule
    """By which texts were held back."""
    left_out: dict[str, str]
    """Test tasks that could not be evaluated, with the reason."""
    garbage: ControlResult | None = None
    """None if the settings asked for no garbage."""


@dataclass(frozen=True)
class _Work:
    """What all parts of one evaluation use."""

    base_model: BaseModel
    translator: Translator
    store: DodStore
    bank: SoftPromptBank
    verifier: Verifier
    kept: KeptParts
    encoder: TextEncoder
    config: EvaluationConfig
    recorder: Recorder

    def usable(self, names: Sequence[str]) -> tuple[dict[str, Task], dict[str, str]]:
        """The tasks that can be verified and scored, and of the others why not."""
        tasks, left_out = {}, {}
        for name in names:
            task = self.store.task(name)
            reason = self._why_not(task)
            if reason is None:
                tasks[name] = task
            else:
                left_out[name] = reason
        return tasks, left_out

    def _why_not(self, task: Task) -> str | None:
        if not task.ground_truth:
            return "it has neither labels nor a hard prompt that texts could be compared with. Give it one in `hard_prompts`."
        try:
            halves = split_pairs(task, self.config.verifier.seed)
            for pairs in halves:
                self.verifier.check_pairs(self.bank.member(task.name), pairs)
        except DataError as error:
            return str(error)
        found = min(map(len, halves))
        if found < MIN_ITEMS:
            return (
                f"half of its held-out pairs are {found}, expected at least {MIN_ITEMS}: fewer say nothing for sure. Give it "
                f"at least {2 * MIN_ITEMS} test and validation pairs with different inputs."
            )
        return None

    def methods(self, tasks: Mapping[str, Task], rule: AbstentionRule, *, test_order: bool = True) -> MethodTexts:
        return apply_methods(
            [self.bank.member(name) for name in tasks],
            tasks,
            [KeptProposer(proposer, self.kept) for proposer in self._proposers(tasks)],
            self.config.verbalization,
            self.verifier,
            rule,
            without_verifier=NOT_AMONG_ALL,
            translator_id=self.translator.id,
            test_order=test_order,
            recorder=self.recorder,
        )

    def _proposers(self, tasks: Mapping[str, Task]) -> list[Proposer]:
        return make_proposers(self.config.methods, Sources(self.translator, self.store, tasks, self.config))

    def is_good(self, item: Verbalization, task: Task) -> bool:
        limits = self.config.abstention
        text = scored_text(item.text, item.prefill)
        return is_good(text, task, self.encoder, label_f1=limits.good_label_f1, cosine=limits.good_cosine)


def evaluate(
    base_model: BaseModel,
    translator_uri: str,
    bank_uri: str,
    dod_path: Path,
    config: EvaluationConfig,
    *,
    work: Path | None = None,
) -> EvaluationResult:
    """Verbalize the bank's test tasks with every method, without and with the verifier, and score all on the same prompts.

    The parent run holds the report, table, figure, comparisons and every candidate with its scores, from which `reproduce`
    makes all numbers again; each method has a child run with the same metric names, so that MLflow's comparison view lays
    them side by side. The translator's scores also go to its LoggedModel. A test task with too few held-out pairs is left
    out, and named.

    Args:
        work: folder that keeps what is done, so that a second start with the same settings goes on there; it is removed
            at the end. None keeps nothing.

    Raises:
        BusyError: another process works in `work`.
        DataError: the translator has seen a test task, or no test task can be evaluated.
    """
    found = find_artifact(translator_uri, "translator")
    found_bank = find_artifact(bank_uri, "bank")
    bank = SoftPromptBank(found_bank.folder)
    with ExitStack() as stack:
        if work is not None:
            stack.enter_context(locked(work))
        store = stack.enter_context(DodStore.open(dod_path))
        run_id = stack.enter_context(stage_run("evaluate", base_model))
        require_same_dod(bank, store)
        dataset = from_dod(str(dod_path))
        log_inputs(base_model.ref, dataset, context="evaluation", upstream=found.model_id)
        if found_bank.model_id:
            mlflow.log_input(model=LoggedModelInput(model_id=found_bank.model_id))
        recorder = MlflowRecorder()
        recorder.params("evaluation", flatten(config))
        translator = Translator.load(found.folder, base_model)
        origin = [
            base_model.ref.fingerprint,
            base_model.ref.dtype,
            translator.id,
            store.digest,
            settings_digest(config),
        ]
        kept = KeptParts(work, digest_of_json(origin))
        verifier = KeptVerifier(base_model, config.verifier, kept)
        doing = _Work(base_model, translator, store, bank, verifier, kept, SentenceEncoder(), config, recorder)
        tasks, left_out = doing.usable(_test_tasks(store, bank, translator))
        if not tasks:
            name, reason = next(iter(left_out.items()))
            raise DataError(
                f"evaluating a translator on DoD {store.name!r}: none of its {len(left_out)} test tasks in the bank can be "
                f"evaluated, expected at least one. The first, {name!r}: {reason}"
            )
        rule, calibration = _rule(doing)
        made = doing.methods(tasks, rule)
        evaluation = evaluate_verbalizations(
            made.texts, tasks, doing.encoder, reporting=made.reporting, seed=config.seed
        )
        garbage = _try_garbage(doing, tasks, made, rule) if config.garbage_prompts else None
        evaluated = Evaluated(
            evaluation, made, tasks, rule, calibration, left_out, garbage, _accuracies(bank, list(tasks))
        )
        record_evaluation(evaluated, recorder, dataset, base_model, config, found.model_id)
    if work is not None:
        forget(work)
    return EvaluationResult(run_id, evaluation, rule, left_out, garbage)


def _rule(work: _Work) -> tuple[AbstentionRule, dict[str, list[Any]]]:
    """The settings' abstention rule, or the one that training tasks give: those that the translator held out first."""
    limits = work.config.abstention
    if limits.min_faithfulness is not None:
        return AbstentionRule(limits.min_faithfulness), {}
    held_out = work.translator.record.training.get("validation_tasks", [])
    others = [name for name in work.translator.record.train_tasks if name not in held_out]
    members = set(work.bank.tasks()) & set(work.store.task_names("train"))
    names = [name for name in (*held_out, *others) if name in members][: limits.num_tasks]
    tasks, _ = work.usable(names)
    if not tasks:
        return AbstentionRule(), {}
    # Here nothing is held back.
    made = work.methods(tasks, AbstentionRule(), test_order=False)
    return rule_from_training_tasks(made.texts[BEST], tasks, work.is_good, precision=limits.precision)


def _try_garbage(work: _Work, tasks: Mapping[str, Task], made: MethodTexts, rule: AbstentionRule) -> ControlResult:
    """Read garbage by the translator, and see what the rule lets through of it and of its texts of the real soft prompts."""
    real = [work.bank.member(name) for name in tasks]
    garbage: list[ControlPrompt] = control_prompts(
        work.base_model, real, work.config.garbage_prompts, seed=work.config.seed
    )
    read = _refused_unread(work, tasks, garbage)
    left = [number for number in range(len(garbage)) if number not in read]
    prompts: list[SoftPrompt] = [garbage[number].soft_prompt for number in left]
    if prompts:
        reader = TranslatorProposer(work.translator, prefills=work.config.prefills, num_beams=work.config.num_beams)
        written = apply_methods(
            prompts,
            tasks,
            [KeptProposer(reader, work.kept)],
            work.config.verbalization,
            work.verifier,
            rule,
            test_order=False,  # what is left has passed it
            recorder=work.recorder,
        )
        read |= zip(left, _chosen(written.texts), strict=True)
    of_translator = _chosen(made.texts)
    good = {item.task: work.is_good(item, tasks[item.task]) for item in of_translator}
    not_tuned = {item.task for item in made.ranking if why_not_tuned(item) is not None}
    return control_result(garbage, [read[number] for number in range(len(garbage))], of_translator, good, not_tuned)


def _refused_unread(
    work: _Work, tasks: Mapping[str, Task], garbage: Sequence[ControlPrompt]
) -> dict[int, Verbalization]:
    """By number, the garbage that is refused whatever is written of it (`why_not_tuned`)."""
    refused = {}
    with work.recorder.progress("see what garbage gains", len(garbage)) as bar:
        for number, prompt in enumerate(item.soft_prompt for item in garbage):
            pairs = split_pairs(tasks[prompt.record.task], work.config.verifier.seed).ranking
            found = work.verifier.verify(prompt, [], pairs=pairs, test_order=True)
            reason = why_not_tuned(found)
            if reason is not None:
                fingerprint = prompt.record.base_model.fingerprint
                nothing = Verbalization("", prompt.record.task, (), prompt.id, fingerprint)
                refused[number] = replace(nothing, abstained=True, evidence=found.evidence, reason=reason)
            bar.advance(1, prompt.record.task)
    return refused


def _chosen(texts: Mapping[str, list[Verbalization]]) -> list[Verbalization]:
    """The translator's texts, chosen by the verifier where there is a choice."""
    name = TranslatorProposer.name
    return texts.get(f"{name}{WITH_VERIFIER}") or texts[name]


def _test_tasks(store: DodStore, bank: SoftPromptBank, translator: Translator) -> list[str]:
    """The bank's tasks of the DoD's test split, none of which the translator may have seen."""
    members = set(bank.tasks())
    names = [name for name in store.task_names("test") if name in members]
    seen = sorted(set(names) & set(translator.record.train_tasks))
    if seen or not names:
        found = f"the translator was trained on {seen[:5]}" if seen else "the bank has no soft prompt of a test task"
        raise DataError(
            f"evaluating a translator on DoD {store.name!r}: {found}; expected test tasks that it never saw. "
            "Mark tasks with split 'test' in the DoD and tune them too."
        )
    return names


def _accuracies(bank: SoftPromptBank, names: Sequence[str]) -> dict[str, float]:
    """Of the soft prompts on test pairs: label accuracy, or exact match for other tasks."""
    found = {}
    for name in names:
        metrics = bank.record(name)["metrics"]
        for metric in ("label_accuracy", "exact_match"):
            if metric in metrics:
                found[name] = float(metrics[metric])
                break
    return found
