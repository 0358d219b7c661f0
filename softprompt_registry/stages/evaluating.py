"""Scoring a translator beside its baselines as MLflow runs: a parent, and a child for each method."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow.entities import LoggedModelInput

from mlflow_plugins.dod_dataset import DodDataset, from_dod
from mlflow_plugins.recording import MlflowRecorder
from softprompt_registry import figures
from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.config import flatten
from softprompt_registry.dod.store import DodStore
from softprompt_registry.dod.task import Task
from softprompt_registry.errors import DataError
from softprompt_registry.evaluation.metrics import SentenceEncoder
from softprompt_registry.evaluation.verbalizations import COMPARED, Evaluation, evaluate_verbalizations
from softprompt_registry.registry import conventions
from softprompt_registry.registry.artifacts import find_artifact
from softprompt_registry.soft_prompts.bank import SoftPromptBank
from softprompt_registry.stages.running import log_inputs, stage_run
from softprompt_registry.stages.training import require_same_dod
from softprompt_registry.translators.training import target_text
from softprompt_registry.translators.translator import Translator
from softprompt_registry.verbalization.proposers.most_frequent import MostFrequentTargetProposer
from softprompt_registry.verbalization.proposers.nearest_tokens import NearestTokensProposer
from softprompt_registry.verbalization.proposers.translator import TranslatorProposer
from softprompt_registry.verbalization.verbalizer import Proposer, Verbalization, VerbalizationConfig, verbalize


@dataclass(frozen=True)
class EvaluationResult:
    """What the evaluation found, and the run that holds it."""

    run_id: str
    evaluation: Evaluation


def evaluate(
    base_model: BaseModel,
    translator_uri: str,
    bank_uri: str,
    dod_path: Path,
    config: VerbalizationConfig,
    *,
    seed: int = 0,
) -> EvaluationResult:
    """Verbalize the bank's test tasks with the translator and two trivial baselines, and score all on the same prompts.

    The parent run holds table, figure and comparisons; each method has a child run with the same metric names, so that
    MLflow's comparison view lays them side by side. The translator's scores also go to its LoggedModel.
    """
    found = find_artifact(translator_uri, "translator")
    found_bank = find_artifact(bank_uri, "bank")
    bank = SoftPromptBank(found_bank.folder)
    with DodStore.open(dod_path) as store, stage_run("evaluate", base_model) as run_id:
        require_same_dod(bank, store)
        dataset = from_dod(str(dod_path))
        log_inputs(base_model.ref, dataset, context="evaluation", upstream=found.model_id)
        if found_bank.model_id:
            mlflow.log_input(model=LoggedModelInput(model_id=found_bank.model_id))
        recorder = MlflowRecorder()
        recorder.params("verbalization", flatten(config))
        translator = Translator.load(found.folder, base_model)
        tasks = _test_tasks(store, bank, translator)
        soft_prompts = [bank.member(name) for name in tasks]
        targets = [target_text(store.task(name), None) for name in translator.record.train_tasks]
        proposers: list[Proposer] = [
            TranslatorProposer(translator),
            NearestTokensProposer(base_model),
            MostFrequentTargetProposer(targets),
        ]
        texts: dict[str, list[Verbalization]] = {}
        with recorder.progress("verbalize", len(proposers)) as bar:
            for proposer in proposers:
                translator_id = translator.id if proposer.name == "translator" else None
                texts[proposer.name] = verbalize(soft_prompts, proposer, config, translator_id=translator_id)
                bar.advance(1, proposer.name)
        evaluation = evaluate_verbalizations(texts, tasks, SentenceEncoder(), seed=seed)
        _record_evaluation(evaluation, recorder, dataset, found.model_id)
        mlflow.log_dict(
            {method: [item.to_json() for item in items] for method, items in texts.items()}, "candidates.json"
        )
    return EvaluationResult(run_id, evaluation)


def _test_tasks(store: DodStore, bank: SoftPromptBank, translator: Translator) -> dict[str, Task]:
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
    return {name: store.task(name) for name in names}


def _record_evaluation(
    evaluation: Evaluation, recorder: MlflowRecorder, dataset: DodDataset, model_id: str | None
) -> None:
    values = {method: result.metrics for method, result in evaluation.methods.items()}
    shown = [name for name in COMPARED if name in next(iter(values.values()))]
    recorder.table("verbalizations.json", evaluation.table())
    recorder.figure("methods.png", figures.methods_compared("Verbalizations of held-out tasks", values, shown))
    mlflow.log_dict(
        {other: {name: item._asdict() for name, item in by.items()} for other, by in evaluation.comparisons.items()},
        "comparisons.json",
    )
    for method, metrics in values.items():
        with mlflow.start_run(run_name=method, nested=True, tags={conventions.STAGE_TAG: "evaluate-method"}):
            mlflow.log_params({"method": method})
            mlflow.log_input(dataset, context="evaluation")
            mlflow.log_metrics({f"{conventions.EVALUATION_PREFIX}{name}": value for name, value in metrics.items()})
            if method == "translator" and model_id:
                mlflow.log_metrics(
                    {f"{conventions.EVALUATION_PREFIX}{name}": value for name, value in metrics.items()},
                    model_id=model_id,
                    dataset=dataset,
                )
