"""The numbers of a finished evaluation, computed again from what its run holds."""

from __future__ import annotations

from dataclasses import dataclass

import mlflow

from softprompt_registry.evaluation.metrics import SentenceEncoder
from softprompt_registry.evaluation.verbalizations import Evaluation
from softprompt_registry.registry import conventions
from softprompt_registry.registry.artifacts import find_evaluation

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
    evaluation = find_evaluation(run_id).score(SentenceEncoder())
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


def _logged(run_id: str) -> dict[str, dict[str, float]]:
    """Metrics of each method's child run."""
    run = mlflow.get_run(run_id)
    children = mlflow.search_runs(
        [run.info.experiment_id], filter_string=f"tags.`mlflow.parentRunId` = '{run_id}'", output_format="list"
    )
    return {
        child.data.params["method"]: dict(child.data.metrics) for child in children if "method" in child.data.params
    }
