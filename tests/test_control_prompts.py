"""Control prompts: what they are made of, and how refusals are counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from small_prompts import make
from tiny_llm import tiny_base_model

from softprompt_registry.evaluation.control_prompts import (
    KINDS,
    ControlPoint,
    ControlPrompt,
    control_prompts,
    control_result,
)
from softprompt_registry.verbalization.verbalizer import Verbalization

REAL = [make("moods", 1), make("sides", 2)]


def test_kinds_and_tasks_come_in_turn_and_the_seed_decides_the_numbers() -> None:
    made = control_prompts(tiny_base_model(), REAL, 6, seed=3)
    assert Counter(item.kind for item in made) == dict.fromkeys(KINDS, 2)
    assert Counter((item.kind, item.soft_prompt.record.task) for item in made) == {
        (kind, prompt.record.task): 1 for kind in KINDS for prompt in REAL
    }
    assert len({item.soft_prompt.id for item in made} | {prompt.id for prompt in REAL}) == 8
    again = control_prompts(tiny_base_model(), REAL, 6, seed=3)
    assert [item.soft_prompt.id for item in again] == [item.soft_prompt.id for item in made]
    other = control_prompts(tiny_base_model(), REAL, 6, seed=4)
    assert [item.soft_prompt.id for item in other] != [item.soft_prompt.id for item in made]


def test_shuffled_tokens_are_the_same_tokens_in_another_order() -> None:
    for item in control_prompts(tiny_base_model(), REAL, 12):
        real = next(prompt for prompt in REAL if prompt.record.task == item.soft_prompt.record.task).embeddings
        same = sorted(map(tuple, item.soft_prompt.embeddings.tolist())) == sorted(map(tuple, real.tolist()))
        assert same == (item.kind == "shuffled tokens")
        assert not torch.equal(item.soft_prompt.embeddings, real)


def test_noise_is_like_the_soft_prompt_and_random_vectors_like_the_vocabulary() -> None:
    base = tiny_base_model()
    far = replace(REAL[0], embeddings=5 + 2 * torch.randn(64, REAL[0].embeddings.shape[1]), initial_embeddings=None)
    random, noise, _ = (item.soft_prompt.embeddings for item in control_prompts(base, [far], 3))
    vocabulary = base.model.get_input_embeddings().weight
    assert noise.mean().item() == pytest.approx(5, abs=0.2) and noise.std().item() == pytest.approx(2, rel=0.1)
    assert random.mean().item() == pytest.approx(vocabulary.mean().item(), abs=0.01)
    assert random.std().item() == pytest.approx(vocabulary.std().item(), rel=0.1)


def test_one_token_cannot_be_shuffled() -> None:
    single = replace(REAL[0], embeddings=REAL[0].embeddings[:1], initial_embeddings=None)
    assert [item.kind for item in control_prompts(tiny_base_model(), [single], 3)] == [
        "random vectors",
        "noise",
        "noise",
    ]


def said(task: str, *, abstained: bool) -> Verbalization:
    return Verbalization("text", task, (), "id", "base", abstained=abstained, reason="no" if abstained else None)


def test_shares_are_counted_by_kind_and_for_good_texts() -> None:
    controls = [ControlPrompt(kind, REAL[0]) for kind in ("noise", "noise", "random vectors", "shuffled tokens")]
    read = [said("moods", abstained=refused) for refused in (True, False, True, True)]
    real = [said("moods", abstained=False), said("sides", abstained=True), said("sizes", abstained=False)]
    found = control_result(controls, read, real, {"moods": True, "sides": True, "sizes": False})
    assert found.metrics == {
        "num_garbage": 4,
        "garbage_refused_share": 0.75,
        "garbage_refused_share_noise": 0.5,
        "garbage_refused_share_random_vectors": 1,
        "garbage_refused_share_shuffled_tokens": 1,
        "num_good": 2,
        "good_passed_share": 0.5,
        "real_passed_share": pytest.approx(2 / 3),
    }
    assert found.rows["kind"] == [item.kind for item in controls]
    assert found.rows["abstained"] == [True, False, True, True]
    without = control_result(controls[:1], read[:1], real[:1], {"moods": False})
    assert "good_passed_share" not in without.metrics and without.metrics["num_good"] == 0


def test_the_curve_says_what_each_threshold_lets_through() -> None:
    def text(task: str, faithfulness: float | None, words: str = "text") -> Verbalization:
        return Verbalization(
            words, task, (), "id", "base", faithfulness=faithfulness, abstained=True, reason="whatever"
        )

    controls = [ControlPrompt(kind, REAL[0]) for kind in ("noise", "noise", "shuffled tokens", "shuffled tokens")]
    read = [text("moods", None), text("moods", 0.5), text("moods", 0.9), text("moods", 0.8, words=" ")]
    real = [text("moods", 0.5), text("sides", 0.7), text("sizes", 0.2), text("weights", 0.9)]
    good = {"moods": True, "sides": True, "sizes": False, "weights": True}
    found = control_result(controls, read, real, good, not_tuned=["weights"])
    at = {point.threshold: point for point in found.curve}
    assert list(at) == sorted(at) and min(at) == 0 and max(at) == 1
    assert at[0] == ControlPoint(0, 0.5, None, 0.5, 0.5, pytest.approx(2 / 3), 0.75)
    assert at[0.5] == at[0]._replace(threshold=0.5, real_passed=0.5)
    assert at[0.6] == ControlPoint(0.6, 0.75, None, 1, 0.5, pytest.approx(1 / 3), 0.25)
    assert at[0.95] == ControlPoint(0.95, 1, None, 1, 1, 0, 0)
    assert found.curve_table["garbage_refused"] == [point.garbage_refused for point in found.curve]
