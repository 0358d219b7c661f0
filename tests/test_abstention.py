"""When no answer is given: the decision, the choice of a threshold on training tasks, and quality against coverage."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from softprompt_registry.errors import ArtifactError, ConfigError, DataError
from softprompt_registry.verbalization.abstention import (
    AbstentionRule,
    CoveragePoint,
    Decision,
    choose_rule,
    coverage_curve,
    decide,
)
from softprompt_registry.verbalization.verification import Gain, OrderTest, Verification, Verified

NO_GAIN = "no faithfulness: the soft prompt is not better than no prompt on 4 pairs"


def verification(*candidates: tuple[str, float | None], reason: str | None = None) -> Verification:
    verified = [
        Verified(text, 0.0, None, None, None, (0.0,) * 4)
        if value is None
        else Verified(text, value, value, value - 0.1, value + 0.1, (0.0,) * 4)
        for text, value in candidates
    ]
    return Verification(
        task="moods",
        soft_prompt_id="ab",
        base_fingerprint="cd",
        evidence="pairs",
        items=(0, 1, 2, 3),
        no_prompt_scores=(-2.0,) * 4,
        soft_prompt_scores=(-1.0,) * 4,
        gain=Gain(1.0, 1.0, 1.0),
        reason=reason,
        candidates=tuple(verified),
        truncated_inputs=0,
        draws=10,
        level=0.95,
        seed=0,
    )


# One verification -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (verification(("joy, fear", 0.5), ("up", 0.1)), Decision(False, None)),
        (verification(("joy", 0.3)), Decision(False, None)),
        (verification(), Decision(True, "there is no candidate text")),
        (verification(("joy", None), reason=NO_GAIN), Decision(True, NO_GAIN)),
        (verification(("  ", 0.4), ("joy", 0.1)), Decision(True, "the best text is empty, which is no prompt at all")),
        (
            verification(("joy", 0.25)),
            Decision(
                True,
                "the best text keeps 0.25 of the soft prompt's gain (95% interval 0.15 to 0.35, 4 pairs), less than the "
                "required 0.30",
            ),
        ),
    ],
    ids=["well above", "at the threshold", "no candidate", "no gain", "nothing said", "below"],
)
def test_the_best_text_is_given_only_if_it_keeps_enough_of_the_gain(found: Verification, expected: Decision) -> None:
    assert decide(found, AbstentionRule(0.3)) == expected


def test_a_soft_prompt_that_is_as_good_in_another_order_is_given_no_text() -> None:
    found = verification(("joy", 0.9))
    beaten = replace(found, order=OrderTest(-1.0, (-1.5,) * 19))
    assert decide(beaten, AbstentionRule(0.3)) == Decision(False, None)
    tie = replace(found, order=OrderTest(-1.0, (-1.0, *(-1.5,) * 18)))
    assert tie.order is not None and tie.order.p_value == 0.1
    reason = "tokens do as well in other orders (1 of 19 random ones, p = 0.10), as those of noise do"
    assert decide(tie, AbstentionRule(0.3)) == Decision(True, f"the soft prompt's {reason}")


def test_a_rule_that_always_abstains_says_why() -> None:
    rule = AbstentionRule(always_abstain="always abstains: nothing was good")
    assert decide(verification(("joy", 0.99)), rule) == Decision(True, "always abstains: nothing was good")
    assert decide(verification(), rule).reason == "there is no candidate text"


def test_a_rule_is_described_with_what_to_do_where_it_gives_no_text() -> None:
    assert AbstentionRule(0.36, None, 0.8, 14, 12, 10, 0.55).describe() == (
        "Texts with a faithfulness below 0.36 are withheld: 10 of the 12 training tasks that reach it have a good text "
        "(required: 80%)."
    )
    assert AbstentionRule(0.5).describe().endswith("this threshold was given, not chosen on training tasks.")
    withholding = choose_rule([0.9] * 5, [True, True, False, False, False], 0.8)
    assert withholding.describe().startswith(
        "Every text is withheld: no threshold that 5 or more of the 5 training tasks"
    )
    assert "makes 80% of their texts good; the best makes 40%. Train the translator on more" in withholding.describe()
    assert "(abstention.min_faithfulness)" in withholding.describe()


def test_without_a_threshold_what_is_worse_than_no_prompt_is_not_given() -> None:
    assert decide(verification(("joy", 0.01)), AbstentionRule()) == Decision(False, None)
    assert decide(verification(("joy", -0.01)), AbstentionRule()).abstained


@pytest.mark.parametrize("threshold", [math.nan, math.inf])
def test_a_threshold_is_a_finite_number(threshold: float) -> None:
    with pytest.raises(ConfigError, match="expected a finite number. Use always_abstain"):
        AbstentionRule(threshold)


# A rule from training tasks -------------------------------------------------------------------------------------------


def test_the_lowest_threshold_with_the_precision_is_chosen() -> None:
    # Good shares from the top: 1, 1, 2/3, 3/4, 4/5, 4/6, 4/7. At .75 or more the lowest threshold is that of the fifth.
    faithfulness = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]
    good = [True, True, False, True, True, False, False]
    rule = choose_rule(faithfulness, good, 0.75, min_answered=1)
    assert (rule.min_faithfulness, rule.always_abstain) == (0.5, None)
    assert (rule.precision, rule.num_tasks, rule.num_answered, rule.num_good) == (0.75, 7, 5, 4)
    # Wilson's interval of 4 of 5, from a table.
    assert rule.precision_low == pytest.approx(0.3755, abs=1e-4)
    assert choose_rule(faithfulness, good, 0.9, min_answered=1).min_faithfulness == 0.8
    assert choose_rule(faithfulness, good, 4 / 7, min_answered=1).min_faithfulness == 0.3
    shuffled = [4, 2, 0, 6, 1, 5, 3]
    again = choose_rule([faithfulness[i] for i in shuffled], [good[i] for i in shuffled], 0.75, min_answered=1)
    assert again == rule


def test_equal_faithfulness_is_answered_together_or_not_at_all() -> None:
    # Taken one by one the good ones of the tie could come first; together they are 3 of 5.
    faithfulness, good = [0.9, 0.5, 0.5, 0.5, 0.5], [True, True, True, False, False]
    assert choose_rule(faithfulness, good, 0.75, min_answered=1).min_faithfulness == 0.9
    assert choose_rule(faithfulness, good, 0.6, min_answered=1).min_faithfulness == 0.5


def test_tasks_without_faithfulness_are_never_answered() -> None:
    rule = choose_rule([0.9, None, 0.8, None], [True, True, True, False], 1.0, min_answered=1)
    assert (rule.min_faithfulness, rule.num_answered, rule.num_good, rule.num_tasks) == (0.8, 2, 2, 4)
    rule = choose_rule([None] * 6, [True] * 6, 0.5)
    assert (
        rule.always_abstain
        == "always abstains: only 0 of 6 training tasks have a faithfulness of 0 or more, expected at least 5"
    )


def test_a_few_lucky_tasks_choose_no_threshold() -> None:
    faithfulness, good = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4], [True, True, False, False, False, True]
    assert choose_rule(faithfulness, good, 0.9, min_answered=1).min_faithfulness == 0.8
    rule = choose_rule(faithfulness, good, 0.9)
    assert rule.always_abstain == (
        "always abstains: no threshold that 5 or more of the 6 training tasks reach makes 90% of their texts good; the best "
        "makes 50%"
    )
    assert (rule.num_tasks, rule.num_answered, rule.precision_low) == (6, 0, None)
    assert decide(verification(("joy", 0.99)), rule).abstained
    assert choose_rule(faithfulness, good, 0.5).min_faithfulness == 0.4


def test_a_text_that_is_worse_than_no_prompt_never_sets_the_threshold() -> None:
    faithfulness, good = [0.4, 0.3, 0.2, 0.1, 0.0, -2.0], [True] * 6
    rule = choose_rule(faithfulness, good, 0.8)
    assert (rule.min_faithfulness, rule.num_answered, rule.num_tasks) == (0.0, 5, 6)
    assert choose_rule([-1.0] * 6, good, 0.8).always_abstain is not None


def test_a_rule_comes_back_from_json() -> None:
    for rule in (
        choose_rule([0.9] * 5, [True] * 5, 0.8),
        choose_rule([0.9] * 5, [False] * 5, 0.8),
        AbstentionRule(0.25),
    ):
        assert AbstentionRule.from_json(json.loads(json.dumps(rule.to_json()))) == rule
    with pytest.raises(ArtifactError, match="reading an abstention rule: its record is incomplete"):
        AbstentionRule.from_json({"min_faithfulness": 0.5})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0.5], [True, False], 0.5), DataError, "found 1 faithfulness scores and 2 values"),
        (([], [], 0.5), DataError, "found 0 faithfulness scores and 0 values"),
        (([math.nan], [True], 0.5), DataError, "found NaN or infinity"),
        (([0.5], [True], 0.0), ConfigError, "precision is 0.0"),
        (([0.5], [True], 1.1), ConfigError, "precision is 1.1"),
    ],
)
def test_what_no_rule_can_be_chosen_from_is_refused(
    arguments: tuple[Any, Any, float], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        choose_rule(*arguments)


# Coverage -------------------------------------------------------------------------------------------------------------


def test_quality_against_coverage_takes_ties_together_and_none_last() -> None:
    faithfulness = [0.2, None, 0.9, 0.5, 0.5]
    quality = [0.4, 0.0, 1.0, 1.0, 0.4]
    assert coverage_curve(faithfulness, quality) == [
        CoveragePoint(0.2, 1.0, 0.9),
        CoveragePoint(0.6, pytest.approx(0.8), 0.5),
        CoveragePoint(0.8, pytest.approx(0.7), 0.2),
        CoveragePoint(1.0, pytest.approx(0.56), None),
    ]


def test_coverage_without_any_or_with_every_faithfulness() -> None:
    assert coverage_curve([None, None], [1.0, 0.5]) == [CoveragePoint(1.0, 0.75, None)]
    assert coverage_curve([-1.0, -1.0], [1.0, 0.5]) == [CoveragePoint(1.0, 0.75, -1.0)]
    with pytest.raises(DataError, match="drawing quality against coverage: found 1 faithfulness scores and 0 values"):
        coverage_curve([0.5], [])
    with pytest.raises(DataError, match="found NaN or infinity"):
        coverage_curve([0.5], [math.nan])
