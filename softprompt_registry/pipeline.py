"""The whole chain as one readable function: DoD → bank → translator → verbalizations → registry → served answer."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow

from softprompt_registry.base_models.loading import default_reference, load_base_model
from softprompt_registry.config import settings
from softprompt_registry.dod.store import DodStore
from softprompt_registry.errors import PromotionRefused
from softprompt_registry.evaluation.evaluating import EvaluationConfig
from softprompt_registry.evaluation.verbalizations import Evaluation
from softprompt_registry.registry.promotion import Decision, Policy, promote
from softprompt_registry.registry.registration import RegisteredVersion
from softprompt_registry.registry.store import open_run
from softprompt_registry.soft_prompts.bank import SoftPromptBank
from softprompt_registry.soft_prompts.tuning_settings import TuningConfig
from softprompt_registry.stages.evaluating import evaluate
from softprompt_registry.stages.registering import register
from softprompt_registry.stages.training import train
from softprompt_registry.stages.tuning import tune
from softprompt_registry.storage import write_text
from softprompt_registry.translators.training import TranslatorConfig
from softprompt_registry.verbalization.abstention import AbstentionRule


@settings
class PipelineConfig:
    """Settings of the whole chain."""

    model_name: str = "soft-prompt-translator"
    """Name of the registered model."""
    base_model: str | None = None
    """Reference of the base model; None takes $SOFTPROMPT_BASE_MODEL, else the packaged one."""
    tuning: TuningConfig = field(default_factory=TuningConfig)
    translator: TranslatorConfig = field(default_factory=TranslatorConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    policy: Policy = field(default_factory=Policy)
    """What promotion asks for."""


@dataclass(frozen=True)
class PipelineResult:
    """What the chain made, and where the time went."""

    run_id: str
    folder: Path
    evaluation: Evaluation
    rule: AbstentionRule
    """The rule by which texts are withheld."""
    registered: RegisteredVersion
    decision: Decision | None
    """None when promotion was refused."""
    refusal: str | None
    served_task: str
    served: dict[str, Any]
    """The served model's answer for one held-out soft prompt."""
    payload_file: Path
    """A request body for the served model: that soft prompt as JSON."""
    seconds: dict[str, float]


def run_pipeline(config: PipelineConfig, dod_path: Path, folder: Path) -> PipelineResult:
    """Run every stage on one DoD, each as a child of one MLflow run, and leave bank and translator in `folder`.

    The base model is loaded once. Started again with the same settings and folder it takes over what is finished.
    """
    seconds: dict[str, float] = {}
    with open_run("pipeline") as run_id:
        with _timed("load base model", seconds):
            base_model = load_base_model(config.base_model or default_reference())
        with _timed("tune soft prompts", seconds):
            bank = tune(base_model, dod_path, config.tuning, folder / "bank")
        with _timed("train translator", seconds):
            translator = train(base_model, bank.model_uri, dod_path, config.translator, folder / "translator")
        with _timed("verbalize and evaluate", seconds):
            work = folder / "evaluation.work"
            evaluated = evaluate(
                base_model, translator.model_uri, bank.model_uri, dod_path, config.evaluation, work=work
            )
        with _timed("register and promote", seconds):
            registered = register(translator.model_uri, config.model_name)
            decision, refusal = _try_promote(registered, config.policy)
        del base_model
        with _timed("serve one soft prompt in-process", seconds):
            task, request, served = _ask(registered, folder / "bank", dod_path)
            payload_file = folder / "request.json"
            write_text(payload_file, request)
        mlflow.log_metrics({f"seconds.{name.replace(' ', '_')}": value for name, value in seconds.items()})
    return PipelineResult(
        run_id,
        folder,
        evaluated.evaluation,
        evaluated.record.rule,
        registered,
        decision,
        refusal,
        task,
        served,
        payload_file,
        seconds,
    )


@contextmanager
def _timed(name: str, seconds: dict[str, float]) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[name] = time.monotonic() - started


def _try_promote(registered: RegisteredVersion, policy: Policy) -> tuple[Decision | None, str | None]:
    """A refused promotion is a result of the pipeline, not its failure."""
    try:
        return promote(registered.name, registered.version, policy=policy), None
    except PromotionRefused as error:
        return None, str(error)


def _ask(registered: RegisteredVersion, bank_folder: Path, dod_path: Path) -> tuple[str, str, dict[str, Any]]:
    """Send the first held-out soft prompt to the registered model, as the scoring server would."""
    import pandas

    bank = SoftPromptBank(bank_folder)
    members = set(bank.tasks())
    with DodStore.open(dod_path) as store:
        task = next(name for name in store.task_names("test") if name in members)
    payload = base64.b64encode(bank.member(task).to_bytes()).decode("ascii")
    model = mlflow.pyfunc.load_model(f"models:/{registered.name}/{registered.version}")
    answer = model.predict(pandas.DataFrame({"soft_prompt": [payload]}))
    request = json.dumps({"dataframe_records": [{"soft_prompt": payload}]}) + "\n"
    return task, request, dict(answer.to_dict(orient="records")[0])
