"""The stages as MLflow runs: each wraps one library function, records what went in and out, and links the two.

A stage called inside an active run becomes its child; alone, it takes over the run that `mlflow run` has opened.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import LoggedModelInput, LoggedModelStatus

from mlflow_plugins import portable_prompt as portable_prompt_flavor
from mlflow_plugins import soft_prompt_bank as bank_flavor
from mlflow_plugins import translator as translator_flavor
from mlflow_plugins.dod_dataset import DodDataset, from_dod
from mlflow_plugins.recording import MlflowRecorder
from mlflow_plugins.run_context import set_base_fingerprint
from softprompt_registry import figures
from softprompt_registry.base_models import BaseModel, BaseModelRef
from softprompt_registry.config import flatten
from softprompt_registry.dod.store import DodStore
from softprompt_registry.dod.task import Task
from softprompt_registry.errors import DataError
from softprompt_registry.evaluation.metrics import SentenceEncoder
from softprompt_registry.evaluation.verbalizations import COMPARED, Evaluation, evaluate_verbalizations
from softprompt_registry.fingerprints import digest_of_directory, digest_of_json
from softprompt_registry.registry import conventions, registration
from softprompt_registry.registry.artifacts import find_artifact
from softprompt_registry.registry.lookup import evaluation_metrics, find_by_uri, quoted, search_logged_models
from softprompt_registry.soft_prompts.bank import SoftPromptBank
from softprompt_registry.soft_prompts.tuning import TuningConfig, mean_curves, tune_soft_prompts
from softprompt_registry.translators.training import TranslatorConfig, target_text, train_translator
from softprompt_registry.translators.translator import Translator
from softprompt_registry.verbalization.proposers.most_frequent import MostFrequentTargetProposer
from softprompt_registry.verbalization.proposers.nearest_tokens import NearestTokensProposer
from softprompt_registry.verbalization.proposers.translator import TranslatorProposer
from softprompt_registry.verbalization.verbalizer import Proposer, Verbalization, VerbalizationConfig, verbalize


@dataclass(frozen=True)
class StageResult:
    """What a stage left behind."""

    run_id: str
    model_id: str
    folder: Path

    @property
    def model_uri(self) -> str:
        return f"models:/{self.model_id}"


@dataclass(frozen=True)
class EvaluationResult:
    """What the evaluation found, and the run that holds it."""

    run_id: str
    evaluation: Evaluation


@contextlib.contextmanager
def stage_run(stage: str, base_model: BaseModel | None = None) -> Iterator[str]:
    """One MLflow run for a stage, tagged with the base model it uses; yields its id."""
    if base_model is not None:
        set_base_fingerprint(base_model.ref.fingerprint)
    nested = mlflow.active_run() is not None
    with mlflow.start_run(run_name=stage, nested=nested, tags={conventions.STAGE_TAG: stage}) as run:
        yield str(run.info.run_id)


def ensure_base_model(ref: BaseModelRef) -> str:
    """Id of the external LoggedModel that stands for a base model in this experiment; made on first use."""
    name = conventions.base_model_name(ref.fingerprint)
    found = mlflow.search_logged_models(filter_string=f"name = '{name}'", output_format="list")
    if found:
        return str(found[0].model_id)
    params = {key: str(value) for key, value in ref.to_json().items()}
    params |= {"base_fingerprint": ref.fingerprint, "base_model": ref.name}
    return str(mlflow.create_external_model(name=name, model_type=conventions.BASE_MODEL, params=params).model_id)


def tune(
    base_model: BaseModel, dod_path: Path, config: TuningConfig, out: Path, *, task_names: Sequence[str] | None = None
) -> StageResult:
    """Tune soft prompts for all tasks of a DoD, or the named ones, and log the bank."""
    with DodStore.open(dod_path) as store, stage_run("tune", base_model) as run_id:
        dataset = from_dod(str(dod_path))
        tasks = [store.task(name) for name in task_names] if task_names else list(store.tasks())
        _log_inputs(base_model.ref, dataset, context="tuning")
        mlflow.log_dict(store.manifest(), "dod_manifest.json")
        params = _lineage_params(base_model.ref, store.name, store.digest)
        with _logged_model("bank", conventions.BANK, params) as model_id:
            recorder = MlflowRecorder(model_id=model_id, dataset=dataset)
            recorder.params("tuning", flatten(config))
            bank = tune_soft_prompts(
                base_model, tasks, config, out, dod_name=store.name, dod_digest=store.digest, recorder=recorder
            )
            mlflow.log_model_params({"bank_digest": bank.digest, "artifact_digest": bank.digest}, model_id=model_id)
            recorder.figure(
                "tuning_curves.png", figures.curves(f"Tuning {len(bank)} soft prompts (mean)", mean_curves(bank))
            )
            for metric in ("label_accuracy", "exact_match"):
                scores = {task: r["metrics"][metric] for task, r in bank.records.items() if metric in r["metrics"]}
                if scores:
                    title = f"{metric.replace('_', ' ').capitalize()} on test pairs"
                    recorder.figure(f"{metric}.png", figures.scores_by_task(title, scores, x=metric))
            recorder.table("soft_prompts.json", bank_table(bank))
            bank_flavor.log_model(bank, name="bank", model_id=model_id)
    return StageResult(run_id, model_id, out)


def bank_table(bank: SoftPromptBank) -> dict[str, list[Any]]:
    """A row per soft prompt."""
    names = ("validation_loss", "label_accuracy", "exact_match")
    records = list(bank.records.values())
    columns: dict[str, list[Any]] = {
        "task": [record["task"] for record in records],
        "kind": [record["kind"] for record in records],
        "ground_truth": [record["ground_truth"] for record in records],
        "best_epoch": [record["tuning"].get("best_epoch") for record in records],
        "train_pairs": [record["tuning"].get("num_train_pairs") for record in records],
        "truncated_inputs": [record["tuning"].get("num_truncated_inputs") for record in records],
    }
    return columns | {name: [record["metrics"].get(name) for record in records] for name in names}


def train(base_model: BaseModel, bank_uri: str, dod_path: Path, config: TranslatorConfig, out: Path) -> StageResult:
    """Train a translator on the bank's training tasks and log it."""
    with DodStore.open(dod_path) as store, stage_run("train-translator", base_model) as run_id:
        found = find_artifact(bank_uri, "bank")
        bank = SoftPromptBank(found.folder)
        require_same_dod(bank, store)
        dataset = from_dod(str(dod_path))
        _log_inputs(base_model.ref, dataset, context="training", upstream=found.model_id)
        params = _lineage_params(base_model.ref, store.name, store.digest) | {"bank_digest": bank.digest}
        if found.model_id:
            params["bank_model_id"] = found.model_id
        with _logged_model("translator", conventions.TRANSLATOR, params) as model_id:
            recorder = MlflowRecorder(model_id=model_id, dataset=dataset)
            recorder.params("translator", flatten(config))
            tasks = {task.name: task for task in store.tasks("train") if task.name in bank.records}
            translator = train_translator(base_model, bank, tasks, config, out, recorder=recorder)
            mlflow.log_model_params({"artifact_digest": digest_of_directory(out)}, model_id=model_id)
            losses = {name: translator.record.training[name] for name in ("train_losses", "validation_losses")}
            recorder.figure("training_curves.png", figures.curves(f"Translator, {len(tasks)} tasks", losses))
            translator_flavor.log_model(out, name="translator", model_id=model_id)
    return StageResult(run_id, model_id, out)


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
        _log_inputs(base_model.ref, dataset, context="evaluation", upstream=found.model_id)
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


def register(model_uri: str, name: str, model_config: dict[str, Any] | None = None) -> registration.RegisteredVersion:
    """Register an evaluated artifact. A translator is wrapped as the servable portable prompt model first."""
    with stage_run("register"):
        model = find_by_uri(mlflow.MlflowClient(), model_uri)
        model_id = str(model.model_id)
        if model.model_type == conventions.TRANSLATOR:
            registration.require_complete_lineage(model)
            model_id = _wrap_as_portable_prompt(model, model_config)
        registered = registration.register(f"models:/{model_id}", name)
        mlflow.log_params({"register.model": registered.uri, "register.from": model_uri})
    return registered


def require_same_dod(bank: SoftPromptBank, store: DodStore) -> None:
    """A bank and a DoD that are used together must belong together."""
    if bank.dod_digest is not None and bank.dod_digest != store.digest:
        raise DataError(
            f"using bank {bank.folder.name!r} with DoD {store.name!r}: the bank was tuned on DoD "
            f"{bank.header.get('dod_name')!r} with digest {bank.dod_digest[:12]}, this one has {store.digest[:12]}. "
            "Use the DoD that the bank was tuned on."
        )


def _test_tasks(store: DodStore, bank: SoftPromptBank, translator: Translator) -> dict[str, Task]:
    """The bank's tasks of the DoD's test split, none of which the translator may have seen."""
    names = [name for name in store.task_names("test") if name in bank.records]
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


def _wrap_as_portable_prompt(translator: Any, model_config: dict[str, Any] | None) -> str:
    """Id of the servable model of a translator, with its lineage and its evaluation; logged on first use.

    A translator with the same settings and the same evaluation is wrapped once: registering it again gives the same
    model, evaluating it anew gives a new one.
    """
    settings = digest_of_json(model_config or {})
    wrapped = search_logged_models(
        mlflow.MlflowClient(),
        f"params.translator_model_id = {quoted(translator.model_id)} AND params.model_config_digest = {quoted(settings)}",
    )
    for model in wrapped:
        if model.status == LoggedModelStatus.READY and evaluation_metrics(model) == evaluation_metrics(translator):
            return str(model.model_id)
    folder = find_artifact(f"models:/{translator.model_id}", "translator").folder
    kept = {key: value for key, value in translator.params.items() if key in conventions.LINEAGE_PARAMS}
    mlflow.log_input(model=LoggedModelInput(model_id=translator.model_id))
    info = portable_prompt_flavor.log_model(
        folder,
        name="portable_prompt",
        params=kept | {"translator_model_id": translator.model_id, "model_config_digest": settings},
        model_config=model_config,
    )
    client = mlflow.MlflowClient()
    run = mlflow.active_run()
    assert run is not None
    for metric in translator.metrics or []:
        if metric.key.startswith(conventions.EVALUATION_PREFIX):
            client.log_metric(
                run.info.run_id,
                metric.key,
                metric.value,
                model_id=info.model_id,
                dataset_name=metric.dataset_name,
                dataset_digest=metric.dataset_digest,
            )
    return str(info.model_id)


def _log_inputs(ref: BaseModelRef, dataset: DodDataset, *, context: str, upstream: str | None = None) -> None:
    mlflow.log_input(dataset, context=context)
    mlflow.log_input(model=LoggedModelInput(model_id=ensure_base_model(ref)))
    if upstream:
        mlflow.log_input(model=LoggedModelInput(model_id=upstream))


def _lineage_params(ref: BaseModelRef, dod_name: str, dod_digest: str) -> dict[str, str]:
    return {
        "base_fingerprint": ref.fingerprint,
        "base_model": ref.name,
        "dod_name": dod_name,
        "dod_digest": dod_digest,
    }


@contextlib.contextmanager
def _logged_model(name: str, model_type: str, params: dict[str, str]) -> Iterator[str]:
    """A LoggedModel that exists before its training starts, so that the whole curve belongs to it."""
    model = mlflow.initialize_logged_model(name=name, model_type=model_type, params=params)
    try:
        yield str(model.model_id)
    except BaseException:
        mlflow.finalize_logged_model(model.model_id, LoggedModelStatus.FAILED)
        raise
