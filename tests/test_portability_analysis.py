"""How well conditions work and what they cost: means, coverage, paired differences, margins, tokens, and the record."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence

import pytest

from softprompt_registry.dod.task import Pair, Task
from softprompt_registry.errors import ArtifactError, DataError
from softprompt_registry.evaluation.statistics import bootstrap_mean, paired_bootstrap
from softprompt_registry.language_models.protocol import Prices
from softprompt_registry.portability.analysis import ALL_TASKS, Measure, Portability
from softprompt_registry.portability.answers import Answer, Question
from softprompt_registry.portability.conditions import (
    FEW_SHOT_3,
    FEW_SHOT_5,
    NO_PROMPT,
    SOFT_PROMPT,
    TRANSLATED,
    TRANSLATED_VERIFIED,
)
from softprompt_registry.portability.scoring import score_answers

DRAWS = 200
TASKS = {
    "a": Task("a", "generation", (Pair("one", "red", "test"), Pair("two", "blue", "test"))),
    "b": Task("b", "generation", (Pair("three", "red", "test"), Pair("four", "blue", "test"))),
    "c": Task("c", "classification", (Pair("five", "joy", "test"), Pair("six", "fear", "test")), ("joy", "fear")),
}
SAID: dict[str, dict[str, list[str | None]]] = {
    TRANSLATED: {"a": ["red", "green"], "b": ["red", None], "c": ["JOY", "dread"]},
    FEW_SHOT_5: {"a": ["green", ""], "b": ["green", "blue"], "c": ["joy", "fear"]},
    NO_PROMPT: {"a": ["I cannot answer that.", "green"], "b": [None, None], "c": ["fear or joy", "green"]},
}
"""By condition and task, an answer to each item; None is missing."""
PROMPT_TOKENS = {TRANSLATED: 18, FEW_SHOT_5: 98, NO_PROMPT: 8, SOFT_PROMPT: 5}


def answers_of(
    said: Mapping[str, Mapping[str, Sequence[str | None]]], target: str = "big", *, tokens: int | None = None
) -> list[Answer]:
    found = []
    for condition, by_task in said.items():
        for task, texts in by_task.items():
            for item, text in enumerate(texts):
                pair = TASKS[task].pairs[item]
                question = Question(task, condition, target, item, pair.input, pair.output, None, pair.input, None)
                prompt_tokens = PROMPT_TOKENS.get(condition, 10) if tokens is None else tokens
                finish = "length" if text == "green" else "stop"
                if text is None:
                    found.append(Answer(question, None, error="server error 500"))
                else:
                    found.append(Answer(question, text, finish, prompt_tokens, 2))
    return found


def measured(answers: Sequence[Answer], prices: Mapping[str, Prices] | None = None) -> Portability:
    return Portability(tuple(score_answers(answers, TASKS)), dict(prices or {}), 3, DRAWS)


RESULT = measured(answers_of(SAID))


# Means and counts -----------------------------------------------------------------------------------------------------


def test_a_mean_is_over_tasks_of_means_over_answered_items() -> None:
    assert RESULT.task_means("big", TRANSLATED) == {"a": 0.5, "b": 1.0, "c": 0.5}
    metrics = RESULT.metrics("big", TRANSLATED)
    assert metrics["rouge_l"] == pytest.approx(2 / 3)
    assert metrics["rouge_l_generation"] == pytest.approx(0.75)
    assert (metrics["accuracy_lenient"], metrics["accuracy_strict"]) == (0.5, 0.0)
    assert metrics["accuracy_lost_to_form"] == 0.5
    assert (metrics["num_tasks"], metrics["num_items"], metrics["num_missing"]) == (3, 6, 1)
    assert metrics["coverage"] == pytest.approx(5 / 6)
    expected = bootstrap_mean([0.5, 1.0, 0.5], seed=3, draws=DRAWS)
    assert (metrics["rouge_l_low"], metrics["rouge_l_high"]) == (expected.low, expected.high)
    assert RESULT.task_means("big", TRANSLATED, Measure("rouge_l", "classification")) == {"c": 0.5}


def test_empty_refused_cut_and_ambiguous_answers_are_counted_and_missing_tasks_are_not_zero() -> None:
    metrics = RESULT.metrics("big", NO_PROMPT)
    counts = [metrics[f"num_{name}"] for name in ("refused", "empty", "missing", "ambiguous", "cut")]
    assert counts == [1, 0, 2, 1, 2] and metrics["runaway_share"] == 0.5
    assert metrics["num_tasks"] == 2 and RESULT.task_means("big", NO_PROMPT).keys() == {"a", "c"}
    # "fear or joy" and "joy": one common word of 3 and 1, so 2 · 1/3 · 1 / (4/3) = 0.5; two items; the mean with task a's 0.
    assert metrics["rouge_l"] == pytest.approx((0 + 0.5 / 2) / 2)
    assert RESULT.metrics("big", FEW_SHOT_5)["num_empty"] == 1


def test_a_condition_without_any_answer_has_counts_only() -> None:
    result = measured(answers_of({TRANSLATED: SAID[TRANSLATED], NO_PROMPT: {"a": [None, None]}}))
    metrics = result.metrics("big", NO_PROMPT)
    assert metrics["coverage"] == 0 and metrics["num_missing"] == 2
    assert not {"rouge_l", "runaway_share", "tokens_per_answer"} & metrics.keys()
    assert result.interval("big", NO_PROMPT) is None
    assert result.comparison("big", TRANSLATED, NO_PROMPT) is None
    assert result.table()["rouge_l"][0] is None


def test_every_condition_has_the_same_names() -> None:
    names = [RESULT.metrics(*place).keys() for place in RESULT.places]
    assert RESULT.places == [("big", NO_PROMPT), ("big", TRANSLATED), ("big", FEW_SHOT_5)]
    assert names[0] == names[1] == names[2]
    assert all(math.isfinite(value) for place in RESULT.places for value in RESULT.metrics(*place).values())


def test_kinds_are_measured_apart_where_there_are_several() -> None:
    assert [measure.name for measure in RESULT.measures] == ["rouge_l", "accuracy_lenient", "rouge_l_generation"]
    only = {condition: {"a": by_task["a"]} for condition, by_task in SAID.items()}
    assert measured(answers_of(only)).measures == [ALL_TASKS]


# Differences ----------------------------------------------------------------------------------------------------------


def test_a_difference_is_over_the_items_that_both_have() -> None:
    # Of task b the second item is missing under one condition, so the other's success there does not count.
    found = RESULT.comparison("big", TRANSLATED, FEW_SHOT_5)
    assert found is not None
    assert found == paired_bootstrap([0.5, 1.0, 0.5], [0.0, 0.0, 1.0], seed=3, draws=DRAWS)
    assert found.difference == pytest.approx(1 / 3)
    assert (found.wins, found.ties, found.losses, found.n) == (2, 0, 1, 3)
    (pair,) = [c for c in RESULT.comparisons if (c.a, c.b, c.measure) == (TRANSLATED, FEW_SHOT_5, ALL_TASKS)]
    assert pair.num_items == 5
    turned = RESULT.comparison("big", FEW_SHOT_5, TRANSLATED)
    assert turned is not None
    assert (turned.difference, turned.low, turned.high) == (-found.difference, -found.high, -found.low)
    assert (turned.wins, turned.ties, turned.losses) == (1, 0, 2)


def test_a_task_that_one_condition_has_no_answer_to_is_in_no_difference() -> None:
    found = RESULT.comparison("big", TRANSLATED, NO_PROMPT)
    # Task a: 0.5 and 0; task c: 0.5 and 0.25.
    assert found is not None and found.n == 2
    assert found.difference == pytest.approx((0.5 + 0.25) / 2)


def test_every_pair_is_compared_by_every_measure() -> None:
    assert len(RESULT.comparisons) == 3 * 3
    table = RESULT.comparison_table()
    row = list(zip(table["condition"], table["other"], table["metric"], strict=True)).index(
        (TRANSLATED, FEW_SHOT_5, "accuracy_lenient")
    )
    assert (table["difference"][row], table["n"][row], table["num_items"][row]) == (-0.5, 1, 2)


def test_tasks_in_which_translation_beats_few_shot_come_with_their_margin() -> None:
    said: dict[str, dict[str, list[str | None]]] = {
        **SAID,
        TRANSLATED_VERIFIED: {"a": ["red", "blue"]},
        FEW_SHOT_3: {"a": ["red", "blue"], "c": ["fear", "joy"]},
    }
    result = measured(answers_of(said))
    found = [(m.translation, m.few_shot, m.task, m.score, m.few_shot_score) for m in result.margins]
    assert found == [
        (TRANSLATED, FEW_SHOT_3, "c", 0.5, 0.0),
        (TRANSLATED, FEW_SHOT_5, "b", 1.0, 0.0),
        (TRANSLATED, FEW_SHOT_5, "a", 0.5, 0.0),
        (TRANSLATED_VERIFIED, FEW_SHOT_5, "a", 1.0, 0.0),
    ]
    half = result.margins[2].over_items
    assert half == paired_bootstrap([1.0, 0.0], [0.0, 0.0], seed=3, draws=DRAWS)
    assert (half.low, half.high, half.n) == (0.0, 1.0, 2)
    table = result.margin_table()
    assert [table[name][1] for name in ("task", "margin", "num_items", "kind")] == ["b", 1.0, 1, "generation"]


# Targets and the soft prompt ------------------------------------------------------------------------------------------


def test_the_soft_prompt_stands_beside_every_target() -> None:
    soft = {SOFT_PROMPT: {"a": ["red", "blue"], "b": ["red", "blue"], "c": ["joy", "joy"]}}
    answers = [*answers_of(soft, "small"), *answers_of(SAID, "big"), *answers_of(SAID, "other")]
    result = measured(answers)
    assert result.targets == ["big", "other"] and result.small_model == "small"
    assert result.conditions("other") == [NO_PROMPT, TRANSLATED, FEW_SHOT_5, SOFT_PROMPT]
    assert result.places.count(("small", SOFT_PROMPT)) == 1 and ("big", SOFT_PROMPT) not in result.places
    assert result.metrics("big", SOFT_PROMPT) == result.metrics("small", SOFT_PROMPT)
    for target in ("big", "other"):
        # Tasks a, b (its first item) and c: 1, 1 and 0.5 against 0.5, 1 and 0.5.
        found = result.comparison(target, SOFT_PROMPT, TRANSLATED)
        assert found is not None and found.difference == pytest.approx(0.5 / 3)
    # Its tokens are another model's.
    assert result.tokens_saved("big", SOFT_PROMPT) is None
    assert "tokens_saved_share" not in result.metrics("small", SOFT_PROMPT)


def test_the_small_model_can_be_a_target_too() -> None:
    soft = {SOFT_PROMPT: {"a": ["red", "blue"]}}
    result = measured([*answers_of({**SAID, **soft}, "small"), *answers_of(SAID, "big")])
    assert result.targets == ["small", "big"]
    # On the model itself tokens can be compared: 7 against 100 for each answer.
    assert result.tokens_saved("small", SOFT_PROMPT) == pytest.approx((93.0, 0.93))
    assert result.tokens_saved("big", SOFT_PROMPT) is None


def test_soft_prompts_on_several_models_are_refused() -> None:
    soft = {SOFT_PROMPT: {"a": ["red", "blue"]}}
    with pytest.raises(DataError, match=r"found soft prompts on \['one', 'two'\], expected .* one small model"):
        measured([*answers_of(soft, "one"), *answers_of(soft, "two")])
    with pytest.raises(DataError, match="found no answer"):
        measured([])


def test_a_condition_that_was_not_asked_is_named() -> None:
    with pytest.raises(DataError, match="target 'big' was not asked under the condition 'inspect'"):
        RESULT.metrics("big", "inspect")


# Costs ----------------------------------------------------------------------------------------------------------------


def test_tokens_are_counted_and_saved_on_the_items_that_both_answered() -> None:
    metrics = RESULT.metrics("big", TRANSLATED)
    assert (metrics["prompt_tokens"], metrics["completion_tokens"], metrics["tokens_per_answer"]) == (90, 10, 20)
    assert (metrics["tokens_saved_per_answer"], metrics["tokens_saved_share"]) == pytest.approx((80, 0.8))
    assert RESULT.metrics("big", FEW_SHOT_5)["tokens_saved_share"] == 0


def test_cost_is_exact_and_of_priced_targets_only() -> None:
    assert "cost" not in RESULT.metrics("big", TRANSLATED)
    answers = [*answers_of(SAID), *answers_of(SAID, "free of charge")]
    result = measured(answers, {"big": Prices(2.0, 10.0)})
    assert result.metrics("big", TRANSLATED)["cost"] == pytest.approx((90 * 2 + 10 * 10) / 1_000_000)
    assert result.cost("free of charge", TRANSLATED) is None


def test_tokens_that_no_server_counted_are_unknown_and_not_zero() -> None:
    result = measured(answers_of(SAID, tokens=0), {"big": Prices(1.0, 1.0)})
    unknown = {"prompt_tokens", "tokens_per_answer", "tokens_saved_share", "cost"}
    assert not unknown & result.metrics("big", TRANSLATED).keys()
    partly = answers_of(SAID)
    partly[0] = dataclasses.replace(partly[0], prompt_tokens=0, completion_tokens=0)
    result = measured(partly, {"big": Prices(1.0, 1.0)})
    assert result.metrics("big", TRANSLATED)["tokens_per_answer"] == 20
    assert result.cost("big", TRANSLATED) is None


# Tables and the record ------------------------------------------------------------------------------------------------


def test_tables_have_columns_of_one_length() -> None:
    for table in (RESULT.table(), RESULT.task_table(), RESULT.comparison_table(), RESULT.margin_table()):
        assert len({len(column) for column in table.values()}) == 1
    table = RESULT.table()
    assert list(zip(table["target"], table["condition"], strict=True)) == RESULT.places
    assert table["rouge_l"][1] == pytest.approx(2 / 3)
    rows = RESULT.task_table()
    where = list(zip(rows["condition"], rows["task"], strict=True)).index((TRANSLATED, "b"))
    assert (rows["num_items"][where], rows["num_answered"][where], rows["rouge_l"][where]) == (2, 1, 1.0)
    assert rows["accuracy_lenient"][where] is None


def test_every_number_can_be_computed_again_from_the_record() -> None:
    answers = [*answers_of(SAID), *answers_of({SOFT_PROMPT: {"a": ["red", None]}}, "small")]
    result = measured(answers, {"big": Prices(2.0, 10.0)})
    again = Portability.from_json(json.loads(json.dumps(result.to_json(), allow_nan=False)))
    assert again == result
    assert again.table() == result.table()
    assert again.comparison_table() == result.comparison_table()
    assert again.task_table() == result.task_table()
    # And from the stored answers themselves.
    stored = [Answer.from_json(json.loads(json.dumps(answer.to_json()))) for answer in answers]
    assert measured(stored, {"big": Prices(2.0, 10.0)}) == result


def test_a_damaged_record_is_refused() -> None:
    record = RESULT.to_json()
    with pytest.raises(ArtifactError, match="the result of a portability run: its format_version is 2"):
        Portability.from_json({**record, "format_version": 2})
    del record["answers"]["rouge_l"]
    with pytest.raises(ArtifactError, match="its record is incomplete"):
        Portability.from_json(record)


def test_another_seed_draws_other_intervals_of_the_same_means() -> None:
    # Of so few tasks many draws give the same interval, so here each is a single draw.
    drawn = [dataclasses.replace(RESULT, seed=seed, draws=1).interval("big", FEW_SHOT_5) for seed in (0, 0, *range(20))]
    assert drawn[0] == drawn[1] and len(set(drawn)) > 1
    assert {interval.mean for interval in drawn if interval} == {0.5}
