"""Scorers row by row, and through a real `mlflow.genai.evaluate`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import mlflow
import numpy as np
import pytest
from mlflow.entities import Feedback
from mlflow.genai.scorers import Scorer
from numpy.typing import NDArray

from mlflow_plugins.evaluator_data import sentence_encoder
from mlflow_plugins.scorers import cosine_scorer, label_f1, label_recall, rouge_l
from softprompt_registry.errors import BaseModelError, ConfigError, DataError


class LetterEncoder:
    """(N,) texts → (N, 26): how often each letter occurs. Refuses a second caller while it works, as tokenizers do."""

    def __init__(self) -> None:
        self.busy = False

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        assert not self.busy, "already borrowed"
        self.busy = True
        time.sleep(0.005)  # lets other threads run
        rows = np.array([[text.count(chr(97 + n)) for n in range(26)] for text in texts], dtype=np.float32)
        self.busy = False
        return rows


MOODS = {"expected_response": "joy, fear", "labels": ["joy", "fear"]}
SPEECH = {"expected_response": "Say it.", "references": ["Tell them now."]}


def score(scorer: Scorer, outputs: Any, expectations: Any) -> Any:
    """As MLflow calls it: with everything that it knows of a row."""
    return scorer.run(inputs={"task": "moods"}, outputs=outputs, expectations=expectations)


# By hand --------------------------------------------------------------------------------------------------------------


def test_scores_by_hand() -> None:
    assert score(label_recall, "joy, anger", MOODS) == 1 / 2
    answer = {"hard_prompt": "joy", "candidates": [{"text": "fear"}], "error": None}  # of the served model
    assert score(label_f1, answer, MOODS) == score(label_f1, "joy", MOODS) == 2 / 3
    assert score(rouge_l, "joy", MOODS) == pytest.approx(2 / 3)  # P = 1, R = 1/2
    assert score(cosine_scorer(LetterEncoder()), "ab", {"expected_response": "a"}) == pytest.approx(1 / np.sqrt(2))
    # A row without labels gets no label score.
    assert score(label_recall, "joy", SPEECH) is None and score(label_f1, "joy", SPEECH) is None
    assert score(label_f1, "joy", {**SPEECH, "labels": []}) is None


def test_rouge_takes_the_best_reference_but_a_classification_has_its_label_list_alone() -> None:
    assert score(rouge_l, "tell them now", SPEECH) == 1
    assert score(rouge_l, "tell them now", {**MOODS, **SPEECH}) == 0


def test_the_truth_may_be_the_label_list_or_the_first_reference() -> None:
    assert score(rouge_l, "joy fear", {"labels": ["joy", "fear"]}) == 1
    letters = cosine_scorer(LetterEncoder())
    assert score(letters, "ab", {"references": ["ab", "xy"]}) == pytest.approx(1)
    assert score(letters, "xy", {"references": ["ab", "xy"]}) == 0

    assert score(label_recall, "very good", {"labels": '["very good", "bad"]'}) == 1 / 2


def test_an_empty_text_gets_the_worst_score() -> None:
    scorers = [label_recall, label_f1, rouge_l, cosine_scorer(LetterEncoder())]
    for outputs in (None, "", " \n", float("nan"), {"hard_prompt": None}):
        assert [score(scorer, outputs, MOODS) for scorer in scorers] == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("outputs", "expectations", "message"),
    [
        (3, MOODS, "the output is 3, expected a text, or an object with 'hard_prompt'"),
        ({"hard_prompt": None, "error": "too long."}, MOODS, "answered this row with an error: too long."),
        ("joy", None, "the expectations are None, expected 'expected_response'"),
        (
            "joy",
            {"labels": "joy, fear"},
            "reading the expectation 'labels': found 'joy, fear', expected a list of texts",
        ),
        ("joy", {"references": [3]}, r"reading the expectation 'references': found \[3\]"),
        ("joy", {"expected_response": 5}, "the expectations are .*5.*, expected 'expected_response'"),
    ],
)
def test_what_cannot_be_scored_is_refused(outputs: Any, expectations: Any, message: str) -> None:
    for scorer in (label_f1, rouge_l):
        with pytest.raises(DataError, match=message):
            score(scorer, outputs, expectations)


# Encoders -------------------------------------------------------------------------------------------------------------


def test_a_wrong_encoder_fails_where_the_scorer_is_made() -> None:
    with pytest.raises(ConfigError, match="opening the sentence encoder: found 3, expected a reference"):
        cosine_scorer(3)  # type: ignore[arg-type]
    with pytest.raises(BaseModelError, match="there is no packaged encoder of that name"):
        cosine_scorer("packaged:other")


def test_the_default_encoder_is_the_packaged_one_loaded_once() -> None:
    cosine = cosine_scorer()
    truth = {"expected_response": "Decide whether the movie review is positive or negative."}
    paraphrase = score(cosine, "Classify the sentiment of a film review.", truth)
    assert paraphrase > 0.6 > 0.3 > score(cosine, "Translate the sentence into German.", truth)
    before = sentence_encoder.cache_info().misses
    assert score(cosine_scorer(), "Classify the sentiment of a film review.", truth) == paraphrase
    assert sentence_encoder.cache_info().misses == before


# Through MLflow -------------------------------------------------------------------------------------------------------


def rows(*texts: Any) -> list[dict[str, Any]]:
    truths = [MOODS, {"labels": ["up", "down"]}, SPEECH]
    return [
        {"inputs": {"task": str(number)}, "outputs": text, "expectations": truth}
        for number, (text, truth) in enumerate(zip(texts, truths, strict=True))
    ]


def test_an_evaluation_scores_every_row_and_the_run_has_the_means(mlflow_store: str) -> None:
    scorers = [label_recall, label_f1, rouge_l, cosine_scorer(LetterEncoder())]
    result = mlflow.genai.evaluate(data=rows("joy", "down up", "tell them now"), scorers=scorers)
    assert set(result.metrics) == {f"{name}/mean" for name in ("label_recall", "label_f1", "rouge_l", "cosine")}
    assert result.metrics["label_recall/mean"] == (1 / 2 + 1) / 2  # the third row has no labels
    assert result.metrics["label_f1/mean"] == pytest.approx((2 / 3 + 1) / 2)
    assert result.metrics["rouge_l/mean"] == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert mlflow.get_run(result.run_id).data.metrics == pytest.approx(result.metrics)

    traces = mlflow.search_traces(run_id=result.run_id, return_type="list")
    found = {trace.data.spans[0].inputs["task"]: feedbacks(trace) for trace in traces}
    assert found["0"]["label_f1"] == pytest.approx(2 / 3)
    assert set(found["2"]) == {"rouge_l", "cosine"} and found["2"]["rouge_l"] == 1


def feedbacks(trace: Any) -> dict[str, Any]:
    return {one.name: one.value for one in trace.info.assessments if isinstance(one, Feedback)}


def test_a_row_that_cannot_be_scored_says_why_and_spoils_no_other(mlflow_store: str) -> None:
    result = mlflow.genai.evaluate(data=rows("joy", 7, "tell them now"), scorers=[label_f1, rouge_l])
    assert result.metrics["label_f1/mean"] == pytest.approx(2 / 3)
    assert result.metrics["rouge_l/mean"] == pytest.approx((2 / 3 + 1) / 2)
    errors = [
        one.error.error_message
        for trace in mlflow.search_traces(run_id=result.run_id, return_type="list")
        for one in trace.info.assessments
        if isinstance(one, Feedback) and one.error is not None
    ]
    assert len(errors) == 2 and all("the output is 7, expected a text" in error for error in errors)


def test_a_predict_fn_gives_the_texts_and_many_rows_share_one_encoder(mlflow_store: str) -> None:
    data = [{"inputs": {"word": word}, "expectations": {"expected_response": word}} for word in "abcdefghijkl"]

    def answer(word: str) -> dict[str, Any]:
        return {"hard_prompt": word, "error": None}

    result = mlflow.genai.evaluate(data=data, predict_fn=mlflow.trace(answer), scorers=[cosine_scorer(LetterEncoder())])
    assert result.metrics == {"cosine/mean": pytest.approx(1)}
    assert result.result_df is not None
    assert result.result_df["cosine/value"].tolist() == pytest.approx([1] * 12)
