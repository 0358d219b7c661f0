"""MLflow's evaluator `softprompt`: verbalizations against ground truth, for `mlflow.models.evaluate` and the gates on it.

    frame = pd.DataFrame({"text": ["joy, anger"], "truth": ["joy, fear"], "labels": [["joy", "fear"]]})
    result = mlflow.models.evaluate(
        data=frame, model_type="verbalization", targets="truth", predictions="text", evaluators="softprompt"
    )
    gate = MetricThreshold(threshold=0.4, greater_is_better=True)
    mlflow.validate_evaluation_results({"evaluation.label_f1": gate}, result)

MLflow imports this module in every process that evaluates a model, so what scores and reads is imported when it is needed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

import mlflow
from mlflow.entities import Metric
from mlflow.models.evaluation import EvaluationDataset, EvaluationResult, ModelEvaluator

MODEL_TYPE = "verbalization"
"""The `model_type` that this evaluator is for. MLflow asks every evaluator about every evaluation that names none."""
CONFIG_TAG = "softprompt.evaluator"
"""Tag of the run: the settings as JSON."""
TABLE = "verbalizations"
"""The table in the run, and its name among the result's artifacts. MLflow appends the rows of a second evaluation."""


class SoftPromptEvaluator(ModelEvaluator):
    """Entry point of `mlflow.model_evaluator`.

    The data has a row for each verbalization, with its ground-truth text as `targets`, and these columns where known:

    - `labels`: the labels of a classification, a list of texts or the same as JSON;
    - `kind`: `classification`, or anything else for a row whose labels are not to be scored; where it is missing, a row
      with labels is a classification;
    - `references`: other hard prompts that would be right, a list of texts or the same as JSON. ROUGE-L takes the best of
      them and the truth, except in a classification, whose truth is its label list; cosine and ranks take the truth;
    - `task`: a name, for the table.

    The texts are the column named as `predictions`, or what the model answers: one text for each row, or a table with the
    column named as `predictions`, or `hard_prompt`. A model does not get to see the columns above. A missing or blank text
    gets the worst score and is never left out.

    `extra_metrics` and `custom_artifacts` are for MLflow's own evaluator, which leaves this `model_type` alone, and refused.
    """

    @classmethod
    def can_evaluate(cls, *, model_type: str | None, evaluator_config: Mapping[str, Any] | None, **kwargs: Any) -> bool:
        return model_type == MODEL_TYPE

    def evaluate(
        self,
        *,
        model_type: str | None,
        dataset: EvaluationDataset,
        run_id: str,
        evaluator_config: Mapping[str, Any] | None,
        model: Any = None,
        extra_metrics: Any = None,
        custom_artifacts: Any = None,
        predictions: str | None = None,
        model_id: str | None = None,
        **kwargs: Any,
    ) -> EvaluationResult:
        """Metrics under `evaluation.` and the names of `evaluate_verbalizations`, and a table with a row for each text.

        Raises:
            ConfigError: `evaluator_config` has an unknown key or metric, or a value of another type; `extra_metrics` or
                `custom_artifacts` are given.
            DataError: there is no row, no truth or no text; a column is missing or holds something else; the model answers
                with another number of texts, or with errors.
            BaseModelError: the sentence encoder cannot be loaded.
        """
        from mlflow.models.evaluation.artifacts import JsonEvaluationArtifact

        from mlflow_plugins import evaluator_data
        from softprompt_registry.errors import ConfigError
        from softprompt_registry.evaluation.text_scores import score_against_truths
        from softprompt_registry.registry.conventions import EVALUATION_PREFIX

        config = evaluator_data.read_config(evaluator_config)
        if extra_metrics or custom_artifacts:
            raise ConfigError(
                "evaluating verbalizations: found extra_metrics or custom_artifacts, expected neither: they are for MLflow's "
                "own evaluator, which leaves this model_type alone. Evaluate the same data once more with "
                "evaluators='default', and without model_type."
            )
        columns = evaluator_data.columns_of(dataset, config, predictions)
        truths = evaluator_data.truths_of(dataset, columns)
        encoder = evaluator_data.encoder_of(config)
        texts = evaluator_data.texts_of(dataset, model, predictions, config)
        scores = score_against_truths(texts, truths, encoder)
        selected = evaluator_data.selected(scores.metrics, config)
        metrics = {f"{EVALUATION_PREFIX}{name}": value for name, value in selected.items()}

        client = mlflow.MlflowClient()
        client.set_tag(run_id, CONFIG_TAG, evaluator_data.config_json(config))
        if model_id is None:  # else MLflow itself logs the metrics of the result, to the run and to the model
            # Without a digest the data is no MLflow dataset, and the run has no input to link to.
            linked = {} if dataset.digest is None else {"dataset_name": dataset.name, "dataset_digest": dataset.digest}
            now = int(time.time() * 1000)
            points = [Metric(name, value, now, 0, run_id=run_id, **linked) for name, value in metrics.items()]
            client.log_batch(run_id, metrics=points)
        table = evaluator_data.table_of(columns, truths, texts, scores.rows, config)
        client.log_table(run_id, table, f"{TABLE}.json")
        artifact = JsonEvaluationArtifact(  # type: ignore[no-untyped-call]
            uri=mlflow.get_artifact_uri(f"{TABLE}.json"), content=json.loads(table.to_json(orient="split", index=False))
        )
        return EvaluationResult(metrics=metrics, artifacts={TABLE: artifact}, run_id=run_id)  # type: ignore[no-untyped-call]
