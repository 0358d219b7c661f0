"""MLflow's evaluator `softprompt`: verbalizations against ground truth, for `mlflow.models.evaluate` and the gates on it.

    frame = pd.DataFrame({"text": ["joy, anger"], "truth": ["joy, fear"], "labels": [["joy", "fear"]]})
    result = mlflow.models.evaluate(
        data=frame, model_type="verbalization", targets="truth", predictions="text", evaluators="softprompt"
    )
    gate = MetricThreshold(threshold=0.4, greater_is_better=True)
    mlflow.validate_evaluation_results({"evaluation.label_f1": gate}, result)

MLflow imports this module in every process that evaluates a model, so nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import json
import reprlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import field, fields, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import mlflow
from mlflow.entities import Metric
from mlflow.models.evaluation import EvaluationDataset, EvaluationResult, ModelEvaluator
from pydantic import PositiveInt

from softprompt_registry.config import build_config, settings

if TYPE_CHECKING:
    import pandas as pd

    from softprompt_registry.evaluation.metrics import TextEncoder
    from softprompt_registry.evaluation.text_scores import Truth

MODEL_TYPE = "verbalization"
"""The `model_type` that this evaluator is for. MLflow asks every evaluator about every evaluation that names none."""
HARD_PROMPT = "hard_prompt"
"""Column with the texts in the answers of our served model."""
CONFIG_TAG = "softprompt.evaluator"
"""Tag of the run: the settings as JSON."""
TABLE = "verbalizations"
"""The table in the run, and its name among the result's artifacts. MLflow appends the rows of a second evaluation."""


@settings
class EvaluatorConfig:
    """What `evaluator_config` may hold."""

    encoder: Any = None
    """The sentence encoder of cosine and ranks: a reference as `SentenceEncoder` takes it, or an object with its
    `encode`. None: the packaged encoder if it is installed, else the Hub's."""
    metrics: tuple[str, ...] | None = None
    """Names without the prefix `evaluation.`, such as `label_f1`. None: all. Where none of them needs the encoder, it is
    not loaded."""
    col_mapping: Mapping[str, str] = field(default_factory=dict)
    """Columns of the data that have other names than `task`, `kind`, `labels` and `references`. MLflow also reads it for
    the names given as `targets` and `predictions`."""
    prefill: str = ""
    """The beginning that every text was given. It was not found by the model and is not scored."""
    rows_per_request: PositiveInt = 16
    """Rows that a model gets at once; our served model takes 16 unless its `max_rows` says otherwise."""


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

        from softprompt_registry.errors import ConfigError
        from softprompt_registry.evaluation.text_scores import score_against_truths
        from softprompt_registry.registry.conventions import EVALUATION_PREFIX

        config = _read_config(evaluator_config)
        if extra_metrics or custom_artifacts:
            raise ConfigError(
                "evaluating verbalizations: found extra_metrics or custom_artifacts, expected neither: they are for MLflow's "
                "own evaluator, which leaves this model_type alone. Evaluate the same data once more with "
                "evaluators='default', and without model_type."
            )
        columns = _columns(dataset, config, predictions)
        truths = _truths(dataset, columns)
        encoder = _encoder(config)
        texts = _texts(dataset, model, predictions, config)
        scores = score_against_truths(texts, truths, encoder)
        metrics = _selected(scores.metrics, config)

        client = mlflow.MlflowClient()
        client.set_tag(run_id, CONFIG_TAG, _config_json(config))
        metrics = {f"{EVALUATION_PREFIX}{name}": value for name, value in metrics.items()}
        if model_id is None:  # else MLflow itself logs the metrics of the result, to the run and to the model
            _log_metrics(client, run_id, metrics, dataset)
        table = _table(columns, truths, texts, scores.rows, config)
        client.log_table(run_id, table, f"{TABLE}.json")
        artifact = JsonEvaluationArtifact(  # type: ignore[no-untyped-call]
            uri=mlflow.get_artifact_uri(f"{TABLE}.json"), content=json.loads(table.to_json(orient="split", index=False))
        )
        return EvaluationResult(metrics=metrics, artifacts={TABLE: artifact}, run_id=run_id)  # type: ignore[no-untyped-call]


# The encoder ---------------------------------------------------------------------------------------------------------


@cache
def sentence_encoder(reference: str | None = None) -> TextEncoder:
    """The sentence encoder behind a reference, loaded once in this process.

    Raises:
        BaseModelError: it cannot be found or loaded.
    """
    from softprompt_registry.evaluation.metrics import SentenceEncoder

    return SentenceEncoder(reference)


def open_encoder(encoder: str | TextEncoder | None) -> TextEncoder:
    """An encoder from what a caller may name it by: a reference, None for the default, or the object itself.

    Raises:
        ConfigError: it is something else.
        BaseModelError: it cannot be found or loaded.
    """
    from softprompt_registry.errors import ConfigError

    if encoder is None or isinstance(encoder, str):
        return sentence_encoder(encoder)
    if not callable(getattr(encoder, "encode", None)):
        raise ConfigError(
            f"opening the sentence encoder: found {reprlib.repr(encoder)}, expected a reference such as "
            "'packaged:all-minilm-l6-v2' or an object with `encode`. Correct the encoder."
        )
    return encoder


def texts_in(value: Any, where: str) -> tuple[str, ...]:
    """A list of texts, or the same as JSON; nothing where the value is missing or blank.

    Raises:
        DataError: it is something else.
    """
    from softprompt_registry.errors import DataError

    if is_missing(value) or (isinstance(value, str) and not value.strip()):
        return ()
    found = value.tolist() if hasattr(value, "tolist") else value  # a numpy array
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except ValueError:
            pass  # refused below
    if not isinstance(found, (list, tuple)) or not all(isinstance(text, str) and text.strip() for text in found):
        raise DataError(
            f'reading {where}: found {reprlib.repr(value)}, expected a list of texts such as ["joy", "fear"], or the same '
            "as JSON. Correct it."
        )
    return tuple(found)


def is_missing(value: Any) -> bool:
    """None, or what pandas puts where a row has no value."""
    import pandas as pd

    return bool(pd.api.types.is_scalar(value) and pd.isna(value))


# Settings -------------------------------------------------------------------------------------------------------------


def _read_config(values: Mapping[str, Any] | None) -> EvaluatorConfig:
    from softprompt_registry.errors import ConfigError

    given = dict(values or {})
    encoder = given.pop("encoder", None)  # may be an object
    config = replace(
        build_config(EvaluatorConfig, given, "evaluator_config of the evaluator 'softprompt'"), encoder=encoder
    )
    known = _known_metrics()
    if config.metrics is not None and (not config.metrics or set(config.metrics) - set(known)):
        raise ConfigError(
            f"reading evaluator_config: metrics is {list(config.metrics)}, expected some of {', '.join(known)}. Correct it."
        )
    return config


def _ranking_metrics() -> tuple[str, ...]:
    from softprompt_registry.evaluation.metrics import RankingMetrics

    return RankingMetrics._fields


def _known_metrics() -> list[str]:
    from softprompt_registry.evaluation.text_scores import ROW_METRICS

    return list(dict.fromkeys([*ROW_METRICS, *_ranking_metrics(), "num_tasks", "empty_share"]))


def _encoder(config: EvaluatorConfig) -> TextEncoder | None:
    if config.metrics is not None and not {"cosine", *_ranking_metrics()} & set(config.metrics):
        return None
    return open_encoder(config.encoder)


def _config_json(config: EvaluatorConfig) -> str:
    from softprompt_registry.evaluation.metrics import default_encoder_reference

    values = {field.name: getattr(config, field.name) for field in fields(config)}
    encoder = default_encoder_reference() if config.encoder is None else config.encoder
    if not isinstance(encoder, str):
        encoder = str(getattr(encoder, "reference", type(encoder).__qualname__))
    return json.dumps({**values, "encoder": encoder})


def _selected(metrics: Mapping[str, float], config: EvaluatorConfig) -> dict[str, float]:
    from softprompt_registry.errors import DataError

    if config.metrics is None:
        return dict(metrics)
    if absent := [name for name in config.metrics if name not in metrics]:
        raise DataError(
            f"evaluating verbalizations: metrics asks for {absent}, but no row is a classification with labels. Give the "
            "column of labels, or leave these metrics out."
        )
    return {name: metrics[name] for name in config.metrics}


# The data -------------------------------------------------------------------------------------------------------------

_COLUMNS = ("task", "kind", "labels", "references")


def _column_names(config: EvaluatorConfig) -> dict[str, str]:
    return {name: config.col_mapping.get(name, name) for name in _COLUMNS}


def _columns(dataset: EvaluationDataset, config: EvaluatorConfig, predictions: str | None) -> dict[str, list[Any]]:
    """Those of our columns that the data has, by our names."""
    from softprompt_registry.errors import ConfigError, DataError

    mapped = (dataset.targets_name, dataset.predictions_name, predictions)
    if unknown := [key for key, column in config.col_mapping.items() if key not in _COLUMNS and column not in mapped]:
        raise ConfigError(
            f"reading evaluator_config: col_mapping maps {unknown}, expected some of {list(_COLUMNS)} or what targets and "
            "predictions name. Correct it."
        )
    features = dataset.features_data
    present = list(getattr(features, "columns", []))
    for name, column in _column_names(config).items():
        if name in config.col_mapping and column not in present:
            raise DataError(
                f"evaluating verbalizations: col_mapping names {column!r} as the column of {name}, but the data has the "
                f"columns {present} besides targets and predictions. Correct the name, or add the column."
            )
    return {name: features[column].tolist() for name, column in _column_names(config).items() if column in present}


def _truths(dataset: EvaluationDataset, columns: Mapping[str, Sequence[Any]]) -> list[Truth]:
    from softprompt_registry.errors import DataError
    from softprompt_registry.evaluation.text_scores import Truth

    if not dataset.has_targets:
        raise DataError(
            "evaluating verbalizations: the data names no column of ground truth, expected one. Give its name as `targets` "
            "(for an MLflow dataset: when the dataset is made)."
        )
    if not len(dataset.labels_data):
        raise DataError("evaluating verbalizations: the data has no row, expected at least one. Check how it was made.")
    truths = []
    for position, text in enumerate(dataset.labels_data.tolist()):
        if not isinstance(text, str) or not text.strip():
            raise DataError(
                f"evaluating verbalizations: the truth at position {position} is {reprlib.repr(text)}, expected a text "
                "that is not blank. Correct it, or leave the row out."
            )
        labels, references = (
            texts_in(columns[name][position], f"{name} at position {position}") if name in columns else ()
            for name in ("labels", "references")
        )
        kind = columns["kind"][position] if "kind" in columns else None
        is_classification = bool(labels) if is_missing(kind) else kind == "classification"
        if is_classification and not labels:
            raise DataError(
                f"evaluating verbalizations: the row at position {position} is a classification without labels, expected "
                "them in the column of labels. Add them, or give the row another kind."
            )
        truths.append(Truth(text, labels if is_classification else (), references))
    return truths


def _table(
    columns: Mapping[str, Sequence[Any]],
    truths: Sequence[Truth],
    texts: Sequence[str],
    rows: Sequence[Mapping[str, float]],
    config: EvaluatorConfig,
) -> pd.DataFrame:
    """Truth beside text beside scores, a row for each text, in the order of the data."""
    import pandas as pd

    from softprompt_registry.evaluation.text_scores import ROW_METRICS

    kinds = ["classification" if truth.labels else "generation" for truth in truths]
    table = {"kind": columns.get("kind", kinds), "truth": [truth.text for truth in truths], "text": texts}
    if "task" in columns:
        table = {"task": columns["task"], **table}
    for name in ROW_METRICS:
        if any(name in row for row in rows) and (config.metrics is None or name in config.metrics):
            table[name] = [row.get(name) for row in rows]
    return pd.DataFrame(table)


def _log_metrics(
    client: mlflow.MlflowClient, run_id: str, metrics: Mapping[str, float], dataset: EvaluationDataset
) -> None:
    now = int(time.time() * 1000)
    # Without a digest the data is no MLflow dataset, and the run has no input to link to.
    linked = {} if dataset.digest is None else {"dataset_name": dataset.name, "dataset_digest": dataset.digest}
    client.log_batch(
        run_id, metrics=[Metric(name, value, now, 0, run_id=run_id, **linked) for name, value in metrics.items()]
    )


# The texts ------------------------------------------------------------------------------------------------------------


def _texts(dataset: EvaluationDataset, model: Any, predictions: str | None, config: EvaluatorConfig) -> list[str]:
    """(N,) texts without the prefill, from the data or the model."""
    from softprompt_registry.errors import DataError
    from softprompt_registry.evaluation.text_scores import scored_text

    if model is not None:
        found = _model_answers(model, dataset.features_data, predictions, config)
    elif dataset.has_predictions:
        found = dataset.predictions_data.tolist()
    else:
        raise DataError(
            "evaluating verbalizations: found neither a model nor a column of texts, expected one of the two. Give the "
            "column's name as `predictions`, or a model."
        )
    for position, text in enumerate(found):
        if not is_missing(text) and not isinstance(text, str):
            raise DataError(
                f"evaluating verbalizations: the prediction at position {position} is {reprlib.repr(text)}, expected a "
                "text. Name the column that holds the texts as `predictions`."
            )
    return ["" if is_missing(text) else scored_text(text, config.prefill) for text in found]


def _model_answers(model: Any, features: Any, predictions: str | None, config: EvaluatorConfig) -> list[Any]:
    """What the model makes of the rows, without their ground truth, some at a time."""
    import pandas as pd

    from softprompt_registry.errors import DataError

    if isinstance(features, pd.DataFrame):
        features = features.drop(columns=list(_column_names(config).values()), errors="ignore")
    answers: list[Any] = []
    for start in range(0, len(features), config.rows_per_request):
        stop = start + config.rows_per_request
        rows = features.iloc[start:stop] if isinstance(features, pd.DataFrame) else features[start:stop]
        found = _answers_in(model.predict(rows), predictions, start)
        if len(found) != len(rows):
            raise DataError(
                f"evaluating verbalizations: the model answered {len(rows)} rows from position {start} on with "
                f"{len(found)} predictions, expected as many as rows. Let it give an empty text where it has none."
            )
        answers += found
    return answers


def _answers_in(output: Any, predictions: str | None, start: int) -> list[Any]:
    import pandas as pd

    from softprompt_registry.errors import DataError

    if isinstance(output, list) and output and all(isinstance(row, Mapping) for row in output):
        output = pd.DataFrame(output)
    if isinstance(output, pd.DataFrame):
        names = list(output.columns)
        column: Any = predictions or (HARD_PROMPT if HARD_PROMPT in names else names[0] if len(names) == 1 else None)
        if column not in names:
            raise DataError(
                f"evaluating verbalizations: the model answers with the columns {names}, expected {column or HARD_PROMPT!r} "
                "among them. Name the column with the texts as `predictions`."
            )
        errors = [] if column == "error" or "error" not in names else output["error"].tolist()
        failed = [number for number, error in enumerate(errors) if not is_missing(error)]
        if failed:
            raise DataError(
                f"evaluating verbalizations: the model answered {len(failed)} of {len(output)} rows with an error, the "
                f"first at position {start + failed[0]}: {errors[failed[0]]} Correct those rows, or leave them out."
            )
        return list(output[column].tolist())
    if isinstance(output, (str, Mapping)) or not hasattr(output, "__iter__"):
        raise DataError(
            f"evaluating verbalizations: the model answers with {reprlib.repr(output)}, expected a table or a list with "
            "one text for each row. Let it answer all rows that it gets."
        )
    return list(output)
