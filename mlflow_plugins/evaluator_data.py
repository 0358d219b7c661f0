"""What the evaluator `softprompt` is given, read and checked: settings, encoder, truths and texts."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import field, fields, replace
from functools import cache
from typing import Any

import pandas as pd
from mlflow.models.evaluation import EvaluationDataset
from pydantic import PositiveInt

from softprompt_registry.config import build_config, settings
from softprompt_registry.errors import ConfigError, DataError
from softprompt_registry.evaluation.metrics import (
    RankingMetrics,
    SentenceEncoder,
    TextEncoder,
    default_encoder_reference,
)
from softprompt_registry.evaluation.text_scores import ROW_METRICS, Truth, scored_text

HARD_PROMPT = "hard_prompt"
"""Column with the texts in the answers of our served model."""
METRICS = tuple(dict.fromkeys([*ROW_METRICS, *RankingMetrics._fields, "num_tasks", "empty_share"]))


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


# The encoder ---------------------------------------------------------------------------------------------------------


sentence_encoder = cache(SentenceEncoder)
"""The sentence encoder behind a reference, loaded once in this process."""


def open_encoder(encoder: str | TextEncoder | None) -> TextEncoder:
    """An encoder from what a caller may name it by: a reference, None for the default, or the object itself.

    Raises:
        ConfigError: it is something else.
        BaseModelError: it cannot be found or loaded.
    """
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
    return bool(pd.api.types.is_scalar(value) and pd.isna(value))


# Settings -------------------------------------------------------------------------------------------------------------


def read_config(values: Mapping[str, Any] | None) -> EvaluatorConfig:
    given = dict(values or {})
    encoder = given.pop("encoder", None)  # may be an object
    config = build_config(EvaluatorConfig, given, "evaluator_config of the evaluator 'softprompt'")
    config = replace(config, encoder=encoder)
    if config.metrics is not None and (not config.metrics or set(config.metrics) - set(METRICS)):
        raise ConfigError(
            f"reading evaluator_config: metrics is {list(config.metrics)}, expected some of {', '.join(METRICS)}. Correct it."
        )
    return config


def encoder_of(config: EvaluatorConfig) -> TextEncoder | None:
    if config.metrics is not None and not {"cosine", *RankingMetrics._fields} & set(config.metrics):
        return None
    return open_encoder(config.encoder)


def config_json(config: EvaluatorConfig) -> str:
    encoder = default_encoder_reference() if config.encoder is None else config.encoder
    if not isinstance(encoder, str):
        encoder = str(getattr(encoder, "reference", type(encoder).__qualname__))
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return json.dumps({**values, "encoder": encoder})


def selected(metrics: Mapping[str, float], config: EvaluatorConfig) -> dict[str, float]:
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


def columns_of(dataset: EvaluationDataset, config: EvaluatorConfig, predictions: str | None) -> dict[str, list[Any]]:
    """Those of our columns that the data has, by our names."""
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


def truths_of(dataset: EvaluationDataset, columns: Mapping[str, Sequence[Any]]) -> list[Truth]:
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


def table_of(
    columns: Mapping[str, Sequence[Any]],
    truths: Sequence[Truth],
    texts: Sequence[str],
    rows: Sequence[Mapping[str, float]],
    config: EvaluatorConfig,
) -> pd.DataFrame:
    """Truth beside text beside scores, a row for each text, in the order of the data."""
    kinds = ["classification" if truth.labels else "generation" for truth in truths]
    table = {"kind": columns.get("kind", kinds), "truth": [truth.text for truth in truths], "text": texts}
    if "task" in columns:
        table = {"task": columns["task"], **table}
    for name in ROW_METRICS:
        if any(name in row for row in rows) and (config.metrics is None or name in config.metrics):
            table[name] = [row.get(name) for row in rows]
    return pd.DataFrame(table)


# The texts ------------------------------------------------------------------------------------------------------------


def texts_of(dataset: EvaluationDataset, model: Any, predictions: str | None, config: EvaluatorConfig) -> list[str]:
    """(N,) texts without the prefill, from the data or the model."""
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
