"""From soft prompt to text: ranking of candidates, the proposers, and what is recorded with the text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache

import pytest
import torch
from small_prompts import tiny_translator, translated
from tiny_llm import HIDDEN_SIZE, tiny_base_model

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.errors import ConfigError, DataError
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt, SoftPromptRecord
from softprompt_registry.translators.translator import Translator
from softprompt_registry.verbalization.proposers.most_frequent import MostFrequentTargetProposer
from softprompt_registry.verbalization.proposers.nearest_tokens import NearestTokensProposer
from softprompt_registry.verbalization.proposers.translator import TranslatorProposer
from softprompt_registry.verbalization.verbalizer import (
    NOT_VERIFIED,
    Candidate,
    Verbalization,
    VerbalizationConfig,
    rank,
    verbalize,
)


@cache
def tiny() -> BaseModel:
    return tiny_base_model()


def soft_prompt(task: str, embeddings: torch.Tensor) -> SoftPrompt:
    """Of a generation task, whose texts are given as they are written, commas and all."""
    return SoftPrompt(embeddings, None, SoftPromptRecord(task, "generation", tiny().ref, "{x}"))


def random_prompt(task: str, seed: int, num_virtual_tokens: int = 4) -> SoftPrompt:
    generator = torch.Generator().manual_seed(seed)
    return soft_prompt(task, torch.randn(num_virtual_tokens, HIDDEN_SIZE, generator=generator))


# Ranking --------------------------------------------------------------------------------------------------------------


def test_the_highest_score_comes_first_and_equal_ones_stay_in_order() -> None:
    low, high, tied, none = (
        Candidate("l", "p", -2.0),
        Candidate("h", "p", -0.5),
        Candidate("t", "p", -2.0),
        Candidate("n", "p"),
    )
    assert rank([none, low, high, tied]) == [high, low, tied, none]
    assert rank([tied, low]) == [tied, low]
    assert rank([Candidate("b", "p"), Candidate("a", "p")]) == [Candidate("b", "p"), Candidate("a", "p")]
    assert rank([]) == []


def test_doubles_are_dropped_and_the_first_of_them_stays() -> None:
    greedy, sampled, other = (
        Candidate("a, b", "greedy", -0.5),
        Candidate("a, b", "sampled", -0.6),
        Candidate("c", "s", -0.1),
    )
    assert rank([greedy, sampled, other, sampled]) == [other, greedy]
    assert rank([greedy, greedy]) == [greedy]


class TableProposer:
    """Candidates by task name from a fixed table."""

    name = identity = "table"

    def __init__(self, table: dict[str, list[Candidate]]) -> None:
        self.table = table

    def propose(self, soft_prompts: Sequence[SoftPrompt], config: VerbalizationConfig) -> list[list[Candidate]]:
        return [self.table[soft_prompt.record.task] for soft_prompt in soft_prompts]


def test_a_verbalization_keeps_what_is_needed_to_make_it_again() -> None:
    table = {"a": [Candidate("x", "table", -1.0), Candidate("Say: y", "table", -0.5, prefill="Say:")], "b": []}
    prompts = [random_prompt("a", 0), random_prompt("b", 1)]
    config = VerbalizationConfig(prefill="Say:", seed=7, temperature=0.5, max_new_tokens=9)
    first, second = verbalize(prompts, [TableProposer(table)], config, translator_id="translator_abc")
    assert first == Verbalization(
        text="Say: y",
        task="a",
        candidates=(Candidate("Say: y", "table", -0.5, prefill="Say:"), Candidate("x", "table", -1.0)),
        soft_prompt_id=prompts[0].id,
        base_fingerprint=tiny().ref.fingerprint,
        prefill="Say:",
        seed=7,
        temperature=0.5,
        max_new_tokens=9,
        translator_id="translator_abc",
        faithfulness=None,
        abstained=False,
        reason=NOT_VERIFIED,
    )
    assert (second.text, second.candidates) == ("", ())
    record = json.loads(json.dumps(first.to_json()))
    assert record["candidates"][0] == {
        "text": "Say: y", "proposer": "table", "score": -0.5, "verified_score": None, "prefill": "Say:",
    }  # fmt: skip
    assert record["faithfulness"] is None and "not verified" in record["reason"]
    assert Verbalization.from_json(record) == first


@pytest.mark.parametrize("values", [{"num_candidates": 0}, {"max_new_tokens": 0}, {"temperature": 0.0}])
def test_settings_that_cannot_work_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="is 0.*, expected above 0"):
        VerbalizationConfig(**values)  # type: ignore[arg-type]


# Baselines ------------------------------------------------------------------------------------------------------------


def test_the_nearest_token_of_each_soft_token_is_named() -> None:
    """With one-hot-like embeddings the nearest token is plain: token i stands on axis i % D."""
    base = tiny_base_model()
    tokens = {letter: base.tokenize(letter)[0] for letter in "Hcat"}
    with torch.no_grad():
        weight = base.model.get_input_embeddings().weight
        weight.zero_()
        weight[:, 0] = 1.0
        for axis, token in enumerate(tokens.values(), start=1):
            weight[token] = torch.eye(HIDDEN_SIZE)[axis]
    # The length of a soft token plays no part, only its direction; BOS (all else is axis 0) is no word.
    soft = torch.zeros(5, HIDDEN_SIZE)
    for row, (letter, scale) in enumerate([("t", 0.01), ("H", 5.0), ("a", 1.0), ("t", 2.0)]):
        soft[row] = scale * weight[tokens[letter]].detach()
        soft[row, 0] = 0.3 * scale
    soft[4, 0] = 1.0
    prompts = [soft_prompt("x", soft), soft_prompt("y", soft.flip(0)[1:])]
    found = NearestTokensProposer(base).propose(prompts, VerbalizationConfig())
    assert found == [[Candidate("t, H, a, t", "nearest_tokens")], [Candidate("t, a, H, t", "nearest_tokens")]]


def test_the_most_frequent_target_is_said_of_everything() -> None:
    proposer = MostFrequentTargetProposer(["b", "a, c", "b", "z"])
    found = proposer.propose([random_prompt("x", 0), random_prompt("y", 1)], VerbalizationConfig())
    assert found == [[Candidate("b", "most_frequent_target")]] * 2
    assert MostFrequentTargetProposer(["z", "b", "a", "b", "a"]).text == "a", "of equally frequent ones the first"
    with pytest.raises(DataError, match="there are no training targets"):
        MostFrequentTargetProposer([])


# The translator as proposer -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def translator() -> Translator:
    return tiny_translator(tiny())


def test_the_first_candidate_is_greedy_and_the_others_are_sampled_by_seed(translator: Translator) -> None:
    prompts = [random_prompt("a", 0), random_prompt("b", 1)]
    config = VerbalizationConfig(num_candidates=3, max_new_tokens=6, seed=5)
    found = TranslatorProposer(translator).propose(prompts, config)
    soft = torch.stack([prompt.embeddings for prompt in prompts])
    base, texts, scores = translator.base_model, [], []
    with translator.reading(), torch.no_grad():
        for temperature, seed in ((0.0, 5), (0.7, 6), (0.7, 7)):
            rows = base.generate(soft, [base.bos] * 2, max_new_tokens=6, temperature=temperature, seed=seed)
            texts.append([base.decode(row).strip() for row in rows])
            scored = base.score_targets(soft, [base.bos] * 2, [[*row, base.eos_id] for row in rows])
            scores.append((scored.log_likelihood / scored.num_tokens).tolist())
    for number, candidates in enumerate(found):
        assert [candidate.proposer for candidate in candidates] == [
            "translator:greedy",
            "translator:sampled",
            "translator:sampled",
        ]
        assert [candidate.text for candidate in candidates] == [row[number] for row in texts]
        assert [candidate.score for candidate in candidates] == [row[number] for row in scores]


def test_prompts_of_several_sizes_keep_their_order_whatever_the_batches(translator: Translator) -> None:
    prompts = [random_prompt(str(n), n, size) for n, size in enumerate([4, 2, 4, 3, 2, 4])]
    config = VerbalizationConfig(max_new_tokens=6)
    expected = [translated(translator, [prompt], max_new_tokens=6)[0].text for prompt in prompts]
    assert len(set(expected)) > 2
    for rows_per_batch in (1, 2, 16):
        found = TranslatorProposer(translator, rows_per_batch).propose(prompts, config)
        assert [candidates[0].text for candidates in found] == expected
    assert TranslatorProposer(translator).propose([], config) == []


def test_a_verbalization_by_the_translator_begins_with_its_prefill(translator: Translator) -> None:
    config = VerbalizationConfig(num_candidates=2, prefill="One of: ", max_new_tokens=5)
    (result,) = verbalize(
        [random_prompt("a", 0)], [TranslatorProposer(translator)], config, translator_id=translator.id
    )
    assert result.text.startswith("One of:") and result.prefill == "One of: "
    assert result.text == result.candidates[0].text and result.translator_id == "made"
    scores = [candidate.score for candidate in result.candidates]
    assert None not in scores and scores == sorted(scores, reverse=True)  # type: ignore[type-var]
