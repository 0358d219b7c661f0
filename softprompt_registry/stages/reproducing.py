"""The numbers of a finished evaluation, computed again from what its run holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlflow

from softprompt_registry.dod.task import Pair, Task
from softprompt_registry.errors import ArtifactError
from softprompt_registry.evaluation.metrics import SentenceEncoder
from softprompt_registry.evaluation.verbalizations import Evaluation, evaluate_verbalizations
from softprompt_registry.registry import conventions
from softprompt_registry.registry.store import STORE_FAILURES, in_one_line
from softprompt_registry.stages.evaluation_records import CANDIDATES, REPORTING, TASKS
from softprompt_registry.storage import complete_record
from softprompt_registry.verbalization.verbalizer import Verbalization
from softprompt_registry.verbalization.verification import Verification

TOLERANCE = 1e-5
"""A sentence encoder on another machine rounds otherwise."""


@dataclass(frozen=True)
class Difference:
    """A number that did not come out as it was logged."""

    method: str
    metric: str
    logged: float | None
    """None if the run has no such number."""
    computed: float


@dataclass(frozen=True)
class Reproduction:
    """An evaluation made again."""

    evaluation: Evaluation
    num_compared: int
    differences: tuple[Difference, ...]


def reproduce(run_id: str) -> Reproduction:
    """Compute every metric of an evaluation again, from the texts, truths and verified scores that its run holds.

    No base model, bank, translator or DoD is read; only the sentence encoder runs.

    Raises:
        ArtifactError: the run is not there, or is not one of `evaluate`.
    """
    try:
        candidates: dict[str, Any] = mlflow.artifacts.load_dict(f"runs:/{run_id}/{CANDIDATES}")
        reporting = mlflow.artifacts.load_dict(f"runs:/{run_id}/{REPORTING}")["tasks"]
        tasks = mlflow.artifacts.load_dict(f"runs:/{run_id}/{TASKS}")["tasks"]
        seed = int(mlflow.get_run(run_id).data.params["evaluation.seed"])
    except (*STORE_FAILURES, OSError, KeyError) as error:
        raise ArtifactError(
            f"reproducing the evaluation of run {run_id!r}: {in_one_line(error)}. "
            "Expected a run of `softprompt evaluate` with the files "
            f"{CANDIDATES}, {REPORTING} and {TASKS}. Give the run id that the command printed."
        ) from error
    with complete_record("an evaluation"):
        known = {record["name"]: _task(record) for record in tasks}
        texts = {method: [Verbalization.from_json(item) for item in items] for method, items in candidates.items()}
    verifications = [Verification.from_json(item) for item in reporting]
    evaluation = evaluate_verbalizations(texts, known, SentenceEncoder(), reporting=verifications, seed=seed)
    logged = _logged(run_id)
    differences = []
    compared = 0
    for method, result in evaluation.methods.items():
        for name, value in result.metrics.items():
            compared += 1
            found = logged.get(method, {}).get(f"{conventions.EVALUATION_PREFIX}{name}")
            if found is None or abs(found - value) > TOLERANCE:
                differences.append(Difference(method, name, found, value))
    return Reproduction(evaluation, compared, tuple(differences))


def _task(record: dict[str, Any]) -> Task:
    """The task without its pairs, which no metric reads; one stands in for them."""
    output = record["labels"][0] if record["labels"] else ""
    return Task(
        record["name"],
        record["kind"],
        (Pair("", output),),
        labels=tuple(record["labels"]),
        hard_prompts=tuple(record["hard_prompts"]),
        split="test",
        source=record["source"],
    )


def _logged(run_id: str) -> dict[str, dict[str, float]]:
    """Metrics of each method's child run."""
    run = mlflow.get_run(run_id)
    children = mlflow.search_runs(
        [run.info.experiment_id], filter_string=f"tags.`mlflow.parentRunId` = '{run_id}'", output_format="list"
    )
    return {
        child.data.params["method"]: dict(child.data.metrics) for child in children if "method" in child.data.params
    }
