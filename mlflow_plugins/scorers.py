"""Scorers for `mlflow.genai.evaluate`: how close a verbalization is to the truth, row by row.

    from mlflow_plugins.scorers import cosine_scorer, label_f1, label_recall, rouge_l

    row = {
        "inputs": {"task": "moods"},
        "outputs": "joy, anger",
        "expectations": {"expected_response": "joy, fear", "labels": ["joy", "fear"]},
    }
    mlflow.genai.evaluate(data=[row], scorers=[label_recall, label_f1, rouge_l, cosine_scorer()])

The numbers are those of the evaluator `softprompt`. Ranks compare a text with the truths of other rows, which a scorer never
sees: they need the evaluator.

- `outputs`: the text, or a row of our served model's answers, whose `hard_prompt` is taken. None is an empty text, which gets
  the worst score.
- `expectations`: `expected_response`, the ground-truth text; `labels`, those of a classification; `references`, other hard
  prompts that would be right. Lists may be JSON. Without `expected_response` the truth is the label list, else the first
  reference.

A row that cannot be scored gets a `DataError` as its assessment; MLflow shows it, warns, and continues with the others.
"""

from __future__ import annotations

import reprlib
import threading
from collections.abc import Mapping
from typing import Any

from mlflow.genai.scorers import Scorer, scorer

from mlflow_plugins.evaluator_data import HARD_PROMPT, is_missing, open_encoder, texts_in
from softprompt_registry.errors import DataError
from softprompt_registry.evaluation.metrics import TextEncoder
from softprompt_registry.evaluation.text_scores import Truth, cosines_of, label_score_of, rouge_l_of


@scorer
def label_recall(outputs: Any, expectations: Any) -> float | None:
    """Share of the labels that the text names, in [0, 1]; nothing for a row without labels (section 4.4)."""
    score = label_score_of(_text(outputs), _truth(expectations))
    return None if score is None else score.recall


@scorer
def label_f1(outputs: Any, expectations: Any) -> float | None:
    """F1 of the labels against the words of the text, in [0, 1]; nothing for a row without labels (section 4.4)."""
    score = label_score_of(_text(outputs), _truth(expectations))
    return None if score is None else score.f1


@scorer
def rouge_l(outputs: Any, expectations: Any) -> float:
    """ROUGE-L of the text, in [0, 1]: the best over truth and references, in a classification over the truth alone."""
    return rouge_l_of(_text(outputs), _truth(expectations))


def cosine_scorer(encoder: str | TextEncoder | None = None) -> Scorer:
    """A scorer named `cosine`: cosine of the text and its truth, in [-1, 1] (section 4.4).

    Args:
        encoder: a reference as `SentenceEncoder` takes it, or an object with its `encode`; None is the default encoder. It is
            loaded here, once in a process, so that a wrong one fails here and not in every row.

    Raises:
        ConfigError: it is neither.
        BaseModelError: it cannot be found or loaded.
    """
    opened = open_encoder(encoder)
    # MLflow scores rows in threads, and a tokenizer refuses a second one while it works.
    lock = threading.Lock()

    @scorer
    def cosine(outputs: Any, expectations: Any) -> float:
        text, truth = _text(outputs), _truth(expectations)
        with lock:
            return cosines_of([text], [truth], opened)[0]

    return cosine


def _text(outputs: Any) -> str:
    """The text of a row, without outer white space."""
    text = outputs
    if isinstance(outputs, Mapping):
        if not is_missing(error := outputs.get("error")):
            raise DataError(
                f"scoring a verbalization: the model answered this row with an error: {error} Correct the row."
            )
        text = outputs.get(HARD_PROMPT, outputs)
    if is_missing(text):
        return ""
    if not isinstance(text, str):
        raise DataError(
            f"scoring a verbalization: the output is {reprlib.repr(outputs)}, expected a text, or an object with "
            f"{HARD_PROMPT!r}. Let `outputs` or the `predict_fn` give one."
        )
    return text.strip()


def _truth(expectations: Any) -> Truth:
    known = expectations if isinstance(expectations, Mapping) else {}
    labels = texts_in(known.get("labels"), "the expectation 'labels'")
    references = texts_in(known.get("references"), "the expectation 'references'")
    text = known.get("expected_response")
    if is_missing(text):
        text = ", ".join(labels) or next(iter(references), "")
    if not isinstance(text, str) or not text.strip():
        found = reprlib.repr(expectations)
        raise DataError(
            f"scoring a verbalization: the expectations are {found}, expected 'expected_response' with the ground-truth "
            "text, 'labels' with those of a classification, or 'references'. Add it."
        )
    return Truth(text, labels, references)
