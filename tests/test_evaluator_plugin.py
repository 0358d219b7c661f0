"""Verbalizations scored through `mlflow.models.evaluate`: numbers, what is logged, gates, models, settings and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.models import EvaluationResult, MetricThreshold
from mlflow.models.evaluation import list_evaluators
from mlflow.models.evaluation.validation import ModelValidationFailedException
from numpy.typing import NDArray
from portable_models import PortableModel, encoded, make_portable_model

from mlflow_plugins import portable_prompt
from mlflow_plugins.evaluator import CONFIG_TAG, MODEL_TYPE, SoftPromptEvaluator
from softprompt_registry.base_models.loading import BASE_MODEL_VARIABLE
from softprompt_registry.dod.task import Pair, Task
from softprompt_registry.errors import BaseModelError, ConfigError, DataError
from softprompt_registry.evaluation.verbalizations import MethodResult, evaluate_verbalizations
from softprompt_registry.verbalization.verbalizer import Verbalization


class AxisEncoder:
    """Each truth has an axis of its own, "joy" is near to the first, and everything else lies on one more axis."""

    AXES = {"joy, fear": 0, "up, down": 1, "Say it.": 2}

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        rows = np.zeros((len(texts), 8), dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            if text == "joy":
                row[[0, 3]] = (4.0, 3.0)  # cosine 4/5 with "joy, fear"
            else:
                row[self.AXES.get(text, 7)] = 1.0
        return rows


FRAME = pd.DataFrame(
    {
        "task": ["moods", "sides", "free"],
        "kind": ["classification", "classification", "generation"],
        "labels": [["joy", "fear"], '["up", "down"]', None],
        "references": [None, "", ["Say it.", "Tell them now."]],
        "truth": ["joy, fear", "up, down", "Say it."],
        "text": ["joy", "down up", " tell them now\n"],
    }
)
"""Labels as a list and as JSON, none where there are none; the last text is one of several right ones."""

TASKS = {
    "moods": Task("moods", "classification", (Pair("x", "joy"),), ("joy", "fear")),
    "sides": Task("sides", "classification", (Pair("x", "up"),), ("up", "down")),
    "free": Task("free", "generation", (Pair("x", "y"),), hard_prompts=("Say it.", "Tell them now.")),
}


def evaluate(data: Any = FRAME, model: Any = None, **arguments: Any) -> EvaluationResult:
    """With the small encoder, and the columns of `FRAME` unless told otherwise."""
    config = {"encoder": AxisEncoder(), **arguments.pop("config", {})}
    arguments = {"targets": "truth", "predictions": None if model is not None else "text", **arguments}
    return mlflow.models.evaluate(
        model, data, model_type=MODEL_TYPE, evaluators="softprompt", evaluator_config=config, **arguments
    )


def ours(texts: Sequence[str]) -> MethodResult:
    """The same texts through `evaluate_verbalizations`."""
    items = [
        Verbalization(text.strip(), task, (), f"id of {task}", "f" * 64)
        for task, text in zip(TASKS, texts, strict=True)
    ]
    return evaluate_verbalizations({"method": items}, TASKS, AxisEncoder()).methods["method"]


def prefixed(metrics: dict[str, float]) -> dict[str, float]:
    return {f"evaluation.{name}": value for name, value in metrics.items()}


# Numbers --------------------------------------------------------------------------------------------------------------


def test_metrics_by_hand(mlflow_store: str) -> None:
    metrics = evaluate().metrics
    assert metrics["evaluation.label_recall"] == (1 / 2 + 1) / 2  # in the two classification rows only
    assert metrics["evaluation.label_precision"] == 1
    assert metrics["evaluation.label_f1"] == pytest.approx((2 / 3 + 1) / 2)
    assert metrics["evaluation.rouge_l"] == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)  # the best of several references
    assert metrics["evaluation.cosine"] == pytest.approx((4 / 5 + 0 + 0) / 3)
    # Truth 0: nearest of all. Truths 1 and 2: as near as both others.
    assert metrics["evaluation.mpr_paper"] == 1
    assert metrics["evaluation.mpr_midrank"] == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)
    assert metrics["evaluation.top1"] == pytest.approx((1 + 1 / 3 + 1 / 3) / 3)
    assert metrics["evaluation.mpr_midrank_chance"] == 1 / 2
    assert metrics["evaluation.top1_chance"] == pytest.approx(1 / 3)
    assert (metrics["evaluation.num_tasks"], metrics["evaluation.empty_share"]) == (3, 0)


@pytest.mark.parametrize("texts", [["joy", "down up", "tell them now"], ["", "up", ""]])
def test_names_and_numbers_are_those_of_our_own_evaluation(mlflow_store: str, texts: list[str]) -> None:
    result = evaluate(FRAME.assign(text=texts))
    expected = ours(texts)
    # Whether a text abstained is not known of texts alone.
    of_texts = {name: value for name, value in expected.metrics.items() if name != "abstained_share"}
    assert result.metrics == pytest.approx(prefixed(of_texts), abs=1e-12)
    table = result.tables["verbalizations"]
    for number, row in enumerate(expected.rows):
        found = {name: table[name][number] for name in row.scores}
        assert found == pytest.approx(row.scores, abs=1e-9)


def test_a_missing_text_is_an_empty_one_and_is_not_left_out(mlflow_store: str) -> None:
    missing = evaluate(FRAME.assign(text=["joy", None, float("nan")]))
    assert missing.metrics == evaluate(FRAME.assign(text=["joy", "", " \n"])).metrics
    assert missing.metrics["evaluation.num_tasks"] == 3
    assert missing.metrics["evaluation.empty_share"] == 2 / 3


def test_labels_count_where_the_row_is_a_classification(mlflow_store: str) -> None:
    of_moods = evaluate(FRAME.assign(kind=["classification", "other", "other"])).metrics
    assert of_moods["evaluation.label_f1"] == 2 / 3
    # Without a kind, a row with labels is a classification.
    for data in (FRAME.drop(columns="kind"), FRAME.assign(kind=[None, float("nan"), "generation"])):
        assert evaluate(data).metrics["evaluation.label_f1"] == pytest.approx((2 / 3 + 1) / 2)
    without = evaluate(FRAME.drop(columns=["kind", "labels"]))
    assert not [name for name in without.metrics if "label" in name]
    assert "label_f1" not in without.tables["verbalizations"]


def test_the_prefill_is_not_scored(mlflow_store: str) -> None:
    begun = FRAME.assign(text=["Classify: joy", " Classify: down up", "tell them now"])
    assert evaluate(begun, config={"prefill": "Classify: "}).metrics == evaluate().metrics
    silent = evaluate(FRAME.assign(text=["Classify:"] * 3), config={"prefill": "Classify: "})
    assert silent.metrics["evaluation.empty_share"] == 1


# What is logged -------------------------------------------------------------------------------------------------------


def test_metrics_of_a_table_belong_to_the_run_and_its_dataset(mlflow_store: str) -> None:
    dataset = mlflow.data.from_pandas(FRAME, targets="truth", predictions="text", name="held-out")
    with mlflow.start_run() as run:
        result = evaluate(dataset, targets=None, predictions=None)
    assert result.run_id == run.info.run_id
    stored = mlflow.get_run(run.info.run_id)
    assert stored.data.metrics == pytest.approx(result.metrics)
    assert [(one.dataset.name, one.dataset.digest) for one in stored.inputs.dataset_inputs] == [
        ("held-out", dataset.digest)
    ]
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "evaluation.label_f1")
    assert [(point.step, point.value) for point in history] == [(0, pytest.approx(5 / 6))]
    assert json.loads(stored.data.tags[CONFIG_TAG]) == {
        "encoder": "AxisEncoder",
        "metrics": None,
        "col_mapping": {},
        "prefill": "",
        "rows_per_request": 16,
    }


def test_metrics_given_for_a_model_are_linked_to_model_and_dataset_once(mlflow_store: str) -> None:
    model_id = mlflow.create_external_model(name="translator").model_id
    dataset = mlflow.data.from_pandas(FRAME, targets="truth", predictions="text", name="held-out")
    result = evaluate(dataset, targets=None, predictions=None, model_id=model_id)
    points = mlflow.get_logged_model(model_id).metrics
    assert {point.key: point.value for point in points} == pytest.approx(result.metrics)
    assert len(points) == len(result.metrics), "MLflow logs them itself; an evaluator that does too logs them twice"
    assert {(point.dataset_name, point.dataset_digest) for point in points} == {("held-out", dataset.digest)}
    run = mlflow.get_run(points[0].run_id)
    assert [one.model_id for one in run.inputs.model_inputs] == [model_id]
    assert run.data.metrics == pytest.approx(result.metrics)


def test_the_table_shows_truth_beside_text_beside_scores(mlflow_store: str) -> None:
    result = evaluate()
    content = result.artifacts["verbalizations"].content
    assert content == mlflow.artifacts.load_dict(result.artifacts["verbalizations"].uri)
    table = result.tables["verbalizations"]
    assert list(table.columns) == [
        "task", "kind", "truth", "text", "label_recall", "label_precision", "label_f1", "rouge_l", "cosine", "mpr_midrank"
    ]  # fmt: skip
    assert table["task"].tolist() == ["moods", "sides", "free"]
    assert table["truth"].tolist() == FRAME["truth"].tolist()
    assert table["text"].tolist() == ["joy", "down up", "tell them now"]
    assert table["label_f1"].tolist()[:2] == [pytest.approx(2 / 3), 1] and pd.isna(table["label_f1"][2])
    plain = evaluate(FRAME[["truth", "text", "labels"]]).tables["verbalizations"]
    assert plain["kind"].tolist() == ["classification", "classification", "generation"] and "task" not in plain


# Gates ----------------------------------------------------------------------------------------------------------------


def test_a_gate_passes_at_the_value_and_fails_above_it(mlflow_store: str) -> None:
    result = evaluate()

    def gate(threshold: float) -> dict[str, MetricThreshold]:
        return {"evaluation.label_recall": MetricThreshold(threshold=threshold, greater_is_better=True)}

    mlflow.validate_evaluation_results(gate(0.75), result)
    with pytest.raises(ModelValidationFailedException, match=r"evaluation.label_recall = 0.75, .* threshold = 0.76"):
        mlflow.validate_evaluation_results(gate(0.76), result)


# Models ---------------------------------------------------------------------------------------------------------------


def test_the_served_model_is_evaluated_as_it_is(
    mlflow_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """18 rows: more than the model takes at once."""
    portable: PortableModel = make_portable_model(tmp_path / "portable")
    monkeypatch.setenv(BASE_MODEL_VARIABLE, str(portable.base_folder))
    logged = portable_prompt.log_model(portable.translator_folder, name="portable")
    soft_prompts = [encoded(portable.soft_prompt(seed % 3).to_bytes()) for seed in range(18)]
    texts = [portable.text(seed, max_new_tokens=64) for seed in range(3)] * 6
    assert len(set(texts)) == 3
    frame = pd.DataFrame({"soft_prompt": soft_prompts, "truth": [f"truth {n}" for n in range(18)]})

    result = evaluate(frame, model=logged.model_uri)

    assert result.tables["verbalizations"]["text"].tolist() == [text.strip() for text in texts]
    assert result.metrics == evaluate(frame.assign(text=texts)).metrics
    points = mlflow.get_logged_model(logged.model_id).metrics
    assert {point.key: point.value for point in points} == pytest.approx(result.metrics)
    assert len(points) == len(result.metrics)

    frame.loc[17, "soft_prompt"] = "not base64!"
    frame.loc[16, "soft_prompt"] = soft_prompts[0]
    with pytest.raises(DataError, match="answered 1 of 2 rows with an error, the first at position 17.*not base64"):
        evaluate(frame, model=logged.model_uri)


def test_a_model_sees_neither_truth_nor_labels_and_gets_some_rows_at_a_time(mlflow_store: str) -> None:
    seen: list[tuple[list[str], int]] = []

    def say(rows: pd.DataFrame) -> pd.Series[str]:
        seen.append((list(rows.columns), len(rows)))
        return rows["said"]

    data = FRAME.rename(columns={"text": "said", "labels": "classes"})
    config = {"rows_per_request": 2, "col_mapping": {"labels": "classes"}}
    assert evaluate(data, model=say, config=config).metrics == evaluate().metrics
    assert seen == [(["said"], 2), (["said"], 1)]


def test_a_model_may_answer_in_several_forms(mlflow_store: str) -> None:
    data = FRAME.rename(columns={"text": "said"})
    forms: list[tuple[Callable[[pd.DataFrame], Any], str | None]] = [
        (lambda rows: list(rows["said"]), None),
        (lambda rows: rows["said"].to_numpy(), None),
        (lambda rows: pd.DataFrame({"hard_prompt": rows["said"], "reason": "none"}), None),
        (lambda rows: pd.DataFrame({"anything": rows["said"]}), None),
        (lambda rows: [{"hard_prompt": text, "error": None} for text in rows["said"]], None),
        (lambda rows: pd.DataFrame({"hard_prompt": "wrong", "second": rows["said"]}), "second"),
    ]
    for answer, column in forms:
        assert evaluate(data, model=answer, predictions=column).metrics["evaluation.label_recall"] == 3 / 4


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda rows: ["joy"], "answered 3 rows from position 0 on with 1 predictions, expected as many as rows"),
        (lambda rows: "joy", "answers with 'joy', expected a table or a list"),
        (lambda rows: {"hard_prompt": ["joy"]}, "expected a table or a list"),
        (lambda rows: [1, 2, 3], "the prediction at position 0 is 1, expected a text"),
        (lambda rows: rows.assign(more=1), r"with the columns \['said', 'more'\], expected 'hard_prompt' among them"),
    ],
)
def test_an_answer_of_another_form_is_refused(
    mlflow_store: str, answer: Callable[[pd.DataFrame], Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        evaluate(FRAME.rename(columns={"text": "said"}), model=answer)


# Settings -------------------------------------------------------------------------------------------------------------


def test_without_a_metric_that_needs_it_no_encoder_is_loaded(mlflow_store: str) -> None:
    config: dict[str, Any] = {"encoder": "packaged:there-is-none", "metrics": ["label_f1", "rouge_l", "num_tasks"]}
    result = evaluate(config=config)
    assert list(result.metrics) == ["evaluation.label_f1", "evaluation.rouge_l", "evaluation.num_tasks"]
    table = result.tables["verbalizations"]
    assert list(table.columns) == ["task", "kind", "truth", "text", "label_f1", "rouge_l"]
    with pytest.raises(BaseModelError, match="there is no packaged encoder of that name"):
        evaluate(config={**config, "metrics": ["top1"]})


def test_columns_may_have_other_names(mlflow_store: str) -> None:
    names = {"labels": "classes", "references": "others", "kind": "type", "task": "dataset"}
    mlflow_names = {"expected": "truth", "said": "text"}
    result = evaluate(
        FRAME.rename(columns=names),
        config={"col_mapping": names | mlflow_names},
        targets="expected",
        predictions="said",
    )
    assert result.metrics == evaluate().metrics
    assert result.tables["verbalizations"]["task"].tolist() == ["moods", "sides", "free"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"metric": ["cosine"]}, "unknown 'metric'; known are encoder, metrics"),
        ({"metrics": ["f1"]}, r"metrics is \['f1'\], expected some of label_recall, .*empty_share"),
        ({"metrics": []}, r"metrics is \[\], expected some of"),
        ({"metrics": "cosine"}, "metrics is 'cosine', expected a list"),
        ({"encoder": 3}, "opening the sentence encoder: found 3, expected a reference"),
        ({"rows_per_request": 0}, "rows_per_request is 0, expected above 0"),
        ({"col_mapping": {"label": "labels"}}, r"col_mapping maps \['label'\], expected some of \['task', 'kind'"),
    ],
)
def test_a_wrong_setting_is_refused(mlflow_store: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate(config=config)


def test_what_is_for_mlflows_own_evaluator_is_not_dropped_in_silence(mlflow_store: str) -> None:
    length = mlflow.models.make_metric(
        eval_fn=lambda predictions, targets: float(predictions.str.len().mean()), greater_is_better=True, name="length"
    )
    with pytest.raises(ConfigError, match="once more with evaluators='default', and without model_type"):
        evaluate(extra_metrics=[length])


# Data that cannot be evaluated ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        # MLflow itself fails on an empty frame whose columns are of pandas 3's type for texts.
        (FRAME.iloc[:0].astype(object), "the data has no row, expected at least one"),
        (FRAME.assign(truth=["joy, fear", " ", "Say it."]), "the truth at position 1 is ' ', expected a text"),
        (FRAME.assign(truth=["joy, fear", "up, down", None]), "the truth at position 2 is (None|nan), expected a text"),
        (FRAME.assign(text=["joy", 2, "x"]), "the prediction at position 1 is 2, expected a text"),
        (
            FRAME.assign(labels=[["joy"], "up, down", None]),
            "reading labels at position 1: found 'up, down', expected a",
        ),
        (FRAME.assign(labels=[[1, 2], ["up"], None]), r"reading labels at position 0: found \[1, 2\], expected a list"),
        (FRAME.assign(references=[None, None, "Say it."]), "reading references at position 2: found 'Say it.'"),
        (FRAME.assign(labels=[["joy"], None, None]), "position 1 is a classification without labels"),
        (FRAME.drop(columns="labels"), "position 0 is a classification without labels"),
    ],
)
def test_a_row_that_cannot_be_scored_is_named(mlflow_store: str, data: pd.DataFrame, message: str) -> None:
    with pytest.raises(DataError, match=message):
        evaluate(data)


def test_a_missing_column_is_named(mlflow_store: str) -> None:
    with pytest.raises(DataError, match="names no column of ground truth.*Give its name as `targets`"):
        evaluate(targets=None)
    with pytest.raises(DataError, match="neither a model nor a column of texts.*as `predictions`"):
        evaluate(predictions=None)
    with pytest.raises(
        DataError, match=r"col_mapping names 'classes' as the column of labels, but .* \['task', 'kind'"
    ):
        evaluate(config={"col_mapping": {"labels": "classes"}})
    with pytest.raises(DataError, match=r"metrics asks for \['label_f1'\], but no row is a classification"):
        evaluate(FRAME[["truth", "text"]], config={"metrics": ["label_f1"]})
    # What MLflow is told by name, it looks for itself.
    with pytest.raises(mlflow.MlflowException, match="targets column 'truths'"):
        evaluate(targets="truths")
    with pytest.raises(mlflow.MlflowException, match="predictions column 'texts'"):
        evaluate(predictions="texts")


def test_mlflow_finds_the_evaluator_and_it_leaves_evaluations_of_other_kinds_alone() -> None:
    assert "softprompt" in list_evaluators()
    for model_type in (None, "text", "classifier", "regressor", "question-answering"):
        assert not SoftPromptEvaluator.can_evaluate(model_type=model_type, evaluator_config={})
