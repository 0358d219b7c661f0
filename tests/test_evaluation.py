"""Methods beside each other on the same soft prompts: scores per task, means, chance levels, paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from softprompt_registry.dod.task import Pair, Task
from softprompt_registry.errors import ArtifactError, DataError
from softprompt_registry.evaluation.record import EvaluationRecord
from softprompt_registry.evaluation.text_scores import EvaluatedTask
from softprompt_registry.evaluation.verbalizations import COMPARED, Evaluation, evaluate_verbalizations
from softprompt_registry.printing import print_evaluation
from softprompt_registry.verbalization.abstention import AbstentionRule
from softprompt_registry.verbalization.verbalizer import Verbalization
from softprompt_registry.verbalization.verification import Gain, Verification, Verified


class AxisEncoder:
    """Each distinct text gets an axis of its own, but `near` texts get a mixture; rows have any length."""

    AXES = {"joy, fear": 0, "up, down": 1, "Say it.": 2}

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        rows = np.zeros((len(texts), 8), dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            if text in self.AXES:
                row[self.AXES[text]] = 3.0
            elif text == "joy":
                row[[0, 3]] = (4.0, 3.0)  # cosine 4/5 with "joy, fear"
            elif text == "loud":
                row[[0, 1, 4]] = (60.0, 60.0, 600.0)  # long, and near to nothing: a rank is of directions
            else:
                row[7] = 1.0
        return rows


TASKS = {
    "moods": Task("moods", "classification", (Pair("x", "joy"),), ("joy", "fear")),
    "sides": Task("sides", "classification", (Pair("x", "up"),), ("up", "down")),
    "free": Task("free", "generation", (Pair("x", "y"),), hard_prompts=("Say it.", "Tell them now.")),
}


def said(task: str, text: str, prefill: str = "") -> Verbalization:
    return Verbalization(text, task, (), f"id of {task}", "f" * 64, prefill=prefill)


def method(moods: str, sides: str, free: str, prefill: str = "") -> list[Verbalization]:
    return [said("moods", moods, prefill), said("sides", sides, prefill), said("free", free, prefill)]


PERFECT = method("joy, fear", "up, down", "Say it.")
PARTIAL = method("joy", "down up", "tell them now")
SILENT = method("", "", "")


def evaluate(**methods: Sequence[Verbalization]) -> Evaluation:
    return evaluate_verbalizations(methods, TASKS, AxisEncoder())


def test_what_says_the_truth_gets_the_best_of_everything() -> None:
    result = evaluate(translator=PERFECT).methods["translator"]
    assert [row.task for row in result.rows] == ["moods", "sides", "free"]
    for row in result.rows[:2]:
        assert row.scores == pytest.approx(
            {"label_recall": 1, "label_precision": 1, "label_f1": 1, "rouge_l": 1, "cosine": 1, "mpr_midrank": 1}
        )
    assert result.rows[2].scores == pytest.approx({"rouge_l": 1, "cosine": 1, "mpr_midrank": 1})
    for name in ("label_recall", "label_f1", "rouge_l", "cosine", "mpr_paper", "mpr_midrank", "top1", "top1_reverse"):
        assert result.metrics[name] == pytest.approx(1.0), name
    assert (result.metrics["num_tasks"], result.metrics["empty_share"]) == (3, 0)


def test_scores_by_hand() -> None:
    result = evaluate(translator=PARTIAL).methods["translator"]
    moods, sides, free = (row.scores for row in result.rows)
    assert (moods["label_recall"], moods["label_precision"], moods["label_f1"]) == (1 / 2, 1.0, 2 / 3)
    assert moods["rouge_l"] == pytest.approx(2 / 3)  # P = 1, R = 1/2
    assert moods["cosine"] == pytest.approx(4 / 5)
    assert (sides["label_f1"], sides["rouge_l"]) == (1.0, pytest.approx(1 / 2))  # "down up" against "up down"
    assert "label_f1" not in free and free["rouge_l"] == 1.0, "the best of several hard prompts"
    assert free["cosine"] == 0.0, "the cosine is with the first one"
    # Labels count in the two classification tasks only, ROUGE-L in all three.
    assert result.metrics["label_f1"] == pytest.approx((2 / 3 + 1) / 2)
    assert result.metrics["rouge_l"] == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)


def test_every_ranking_metric_has_its_chance_level_beside_it() -> None:
    metrics = evaluate(translator=PARTIAL).methods["translator"].metrics
    for direction in ("", "_reverse"):
        # Three tasks, so three candidates: (n + 1) / 2n, one half, 1 / n.
        assert metrics[f"mpr_paper{direction}_chance"] == pytest.approx(4 / 6)
        assert metrics[f"mpr_midrank{direction}_chance"] == 1 / 2
        assert metrics[f"top1{direction}_chance"] == pytest.approx(1 / 3)
        for name in ("mpr_paper", "mpr_midrank", "top1"):
            assert 0 <= metrics[f"{name}{direction}"] <= 1


def test_saying_the_same_of_everything_is_at_chance_and_silence_is_below() -> None:
    result = evaluate(constant=method("loud", "loud", "loud"), silent=SILENT)
    constant, silent = result.methods["constant"].metrics, result.methods["silent"].metrics
    assert constant["mpr_midrank"] == 1 / 2 and constant["top1"] == pytest.approx(1 / 3)
    assert silent["mpr_midrank"] == silent["top1"] == silent["label_f1"] == silent["rouge_l"] == silent["cosine"] == 0
    assert silent["empty_share"] == 1.0


@pytest.mark.parametrize("prefill", ["Classify into: ", "Classify into:", " Classify into:\n"])
def test_the_prefill_is_not_scored_even_if_nothing_follows_it(prefill: str) -> None:
    """Texts come without outer spaces, the prefill may end in one: it once stayed in a text of nothing else."""

    def with_prefill(items: Sequence[Verbalization]) -> list[Verbalization]:
        return [replace(item, text=(prefill + item.text).strip(), prefill=prefill) for item in items]

    for items in (PERFECT, PARTIAL, SILENT):
        plain, prefixed = evaluate(m=items).methods["m"], evaluate(m=with_prefill(items)).methods["m"]
        assert prefixed.metrics == plain.metrics
        assert [row.scores for row in prefixed.rows] == [row.scores for row in plain.rows]
    assert evaluate(m=with_prefill(SILENT)).methods["m"].metrics["empty_share"] == 1.0


def test_a_prefill_in_the_middle_of_a_text_is_what_was_found() -> None:
    row = evaluate(m=[said("moods", "joy fear joy", prefill="fear"), *PERFECT[1:]]).methods["m"].rows[0]
    assert row.scores["label_recall"] == 1.0


def test_the_first_method_is_compared_with_every_other_one() -> None:
    result = evaluate(translator=PERFECT, partial=PARTIAL, silent=SILENT)
    assert list(result.comparisons) == ["partial", "silent"]
    assert set(result.comparisons["silent"]) == set(COMPARED) - {"heldout_log_likelihood", "faithfulness"}
    f1 = result.comparisons["partial"]["label_f1"]
    assert f1.difference == pytest.approx((1 / 3 + 0) / 2)
    assert (f1.wins, f1.ties, f1.losses, f1.n) == (1, 1, 0, 2)
    rouge = result.comparisons["silent"]["rouge_l"]
    assert (rouge.difference, rouge.low, rouge.high, rouge.n) == (
        pytest.approx(1),
        pytest.approx(1),
        pytest.approx(1),
        3,
    )
    assert evaluate(translator=PERFECT).comparisons == {}


def test_a_benchmark_of_one_kind_leaves_the_other_kinds_metrics_out() -> None:
    free = evaluate_verbalizations({"a": PERFECT[2:], "b": PARTIAL[2:]}, TASKS, AxisEncoder())
    assert "label_f1" not in free.methods["a"].metrics and "label_f1" not in free.comparisons["b"]
    assert free.table()["label_f1"] == [None, None]


def test_the_table_shows_truth_and_every_methods_text_task_by_task() -> None:
    table = evaluate(translator=PERFECT, partial=PARTIAL).table()
    assert table["task"] == ["moods", "moods", "sides", "sides", "free", "free"]
    assert table["method"] == ["translator", "partial"] * 3
    assert table["truth"][:2] == ["joy, fear"] * 2 and table["text"][1] == "joy"
    assert table["label_f1"] == [1.0, 0.6667, 1.0, 1.0, None, None]
    assert {len(column) for column in table.values()} == {6}


def test_methods_must_cover_the_same_soft_prompts() -> None:
    other = replace(PERFECT[0], soft_prompt_id="another tuning of the same task")
    for methods, counts in (
        ({"a": PERFECT, "b": PARTIAL[:2]}, r"\[3, 2\]"),
        ({"a": PERFECT, "b": list(reversed(PARTIAL))}, r"\[3, 3\]"),
        ({"a": PERFECT, "b": [other, *PARTIAL[1:]]}, r"\[3, 3\]"),
        ({"a": []}, r"\[0\]"),
        ({}, r"\[\]"),
    ):
        with pytest.raises(DataError, match=f"cover {counts} soft prompts; all must cover the same ones"):
            evaluate_verbalizations(methods, TASKS, AxisEncoder())


def test_a_task_that_is_unknown_or_without_a_truth_is_refused() -> None:
    with pytest.raises(DataError, match="task 'sides' is not in the DoD or has no ground truth"):
        evaluate_verbalizations({"a": PERFECT}, {"moods": TASKS["moods"]}, AxisEncoder())
    mute = TASKS | {"free": Task("free", "generation", (Pair("x", "y"),))}
    with pytest.raises(DataError, match="task 'free' is not in the DoD or has no ground truth"):
        evaluate_verbalizations({"a": PERFECT}, mute, AxisEncoder())


def test_a_record_comes_back_from_its_files_with_the_same_scores(tmp_path: Path) -> None:
    tasks = {name: EvaluatedTask.of(task, 0.75) for name, task in TASKS.items()}
    tried = [
        Verification(
            **{"task": item.task, "soft_prompt_id": item.soft_prompt_id, "base_fingerprint": "f" * 64},
            **{"evidence": "pairs", "items": (0,), "no_prompt_scores": (-2.0,), "soft_prompt_scores": (-1.0,)},
            **{
                "gain": Gain(1.0, 0.9, 1.1),
                "reason": None,
                "truncated_inputs": 0,
                "draws": 10,
                "level": 0.95,
                "seed": 0,
            },
            candidates=(Verified(item.text, -1.5, 0.5, 0.25, 0.75, (-1.5,)),),
        )
        for item in PERFECT
    ]
    settings = {"seed": "3", "verifier.seed": "5"}
    record = EvaluationRecord(tasks, {"translator": PERFECT}, [], tried, AbstentionRule(0.3), settings)
    record.save(tmp_path)
    loaded = EvaluationRecord.load(tmp_path, settings)
    assert loaded == record and loaded.tasks["moods"].ground_truth == "joy, fear"
    assert (loaded.seed, loaded.split_seed) == (3, 5)
    expected = evaluate_verbalizations({"translator": PERFECT}, TASKS, AxisEncoder(), reporting=tried, seed=3)
    assert loaded.score(AxisEncoder()) == expected
    assert expected.methods["translator"].rows[0].scores["faithfulness"] == 0.5
    with pytest.raises(ArtifactError, match=r"incomplete \('verifier.seed'\)"):
        EvaluationRecord.load(tmp_path, {"seed": "3"})
    (tmp_path / "rule.json").unlink()
    with pytest.raises(ArtifactError, match="'.*rule.json' is missing"):
        EvaluationRecord.load(tmp_path, settings)


def test_withheld_texts_are_printed_with_their_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    given, *others = PERFECT
    weak, silent = (
        replace(item, abstained=True, reason=why) for item, why in zip(others, ("weak", "silent"), strict=True)
    )
    print_evaluation(evaluate(translator=[given, weak, silent]), AbstentionRule(0.36))
    out = " ".join(capsys.readouterr().out.split())  # rich breaks a title at the width of its table
    assert "Withheld texts of translator: 2 of 3" in out and " weak " in out and " silent " in out
    assert "Texts with a faithfulness below 0.36 are withheld" in out
    # The same reason for all is said once.
    rule = AbstentionRule(always_abstain="always abstains: none was good")
    reason = rule.always_abstain
    print_evaluation(evaluate(translator=[replace(item, abstained=True, reason=reason) for item in PERFECT]), rule)
    out = capsys.readouterr().out
    assert "Withheld texts" not in out and "Every text is withheld: none was good. Train" in out
