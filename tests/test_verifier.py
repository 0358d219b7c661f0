"""The verifier: the scores of a plain loop over whole rows, faithfulness at its ends, and what cannot be verified."""

from __future__ import annotations

import importlib
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_decoders import base_of
from tiny_llm import HIDDEN_SIZE, tiny_base_model, tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.dod.task import Pair, Task
from softprompt_registry.errors import ArtifactError, BaseModelError, BaseModelMismatch, ConfigError, DataError
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt, SoftPromptRecord
from softprompt_registry.verbalization.held_out import in_turn, split_pairs
from softprompt_registry.verbalization.verification import (
    Bootstrap,
    Faithfulness,
    Gain,
    Verification,
    faithfulness_of,
    gain_of,
)
from softprompt_registry.verbalization.verifier import Verifier, VerifierConfig

TEMPLATE = "Sentence: {x} Label:"
INPUTS = ["a fine day", "rain", "the long and winding road to the sea", "no", "x", "what is it"]
TEXTS = ["joy, fear", "Say which of the two: up or down.", "", "q"]
CONFIG = VerifierConfig(tokens_per_forward=150, max_answer_tokens=4, draws=200)


SIZES: dict[str, Any] = {"vocab_size": len(tiny_tokenizer()), "bos_token_id": 0, "eos_token_id": 1}


def tiny_llama() -> BaseModel:
    base = tiny_base_model()
    base.model.double()
    return base


def tiny_gpt2() -> BaseModel:
    """Learned positions, and nothing computed in float32: whole calculations in float64."""
    sizes = {**SIZES, "n_embd": HIDDEN_SIZE, "n_layer": 2, "n_head": 4, "n_positions": 512}
    config = GPT2Config(**sizes, initializer_range=0.1, attn_implementation="eager")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return base_of(GPT2LMHeadModel(config))


def tiny_mistral() -> BaseModel:
    """A token sees itself and 29 before it, so that its cache does not hold whole prefixes. That is shorter than the padding
    of the shortest rows, whose last columns see nothing at all; two layers of it reach back over the longest input."""
    config = MistralConfig(
        **SIZES,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=2 * HIDDEN_SIZE,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        sliding_window=30,
        initializer_range=0.1,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = base_of(MistralForCausalLM(config))
    assert base.prefixes(torch.zeros(1, 3, HIDDEN_SIZE)) is None
    return base


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return tiny_gpt2()


def prompt_of(
    base: BaseModel, embeddings: torch.Tensor, *, kind: str = "unknown", template: str = TEMPLATE
) -> SoftPrompt:
    return SoftPrompt(embeddings.float(), None, SoftPromptRecord("moods", kind, base.ref, template))


def random_prompt(base: BaseModel, num_virtual_tokens: int = 5) -> SoftPrompt:
    shape = (num_virtual_tokens, HIDDEN_SIZE)
    return prompt_of(base, 0.5 * torch.randn(shape, generator=torch.Generator().manual_seed(3)))


def pairs_of(base: BaseModel, soft_prompt: SoftPrompt, *, helps: bool = True) -> list[Pair]:
    """Outputs that the soft prompt makes more likely, or less."""
    choose = max if helps else min
    pairs = []
    for text in INPUTS:
        gains = {}
        for letter in "abcdefghij":
            scores = [
                loglikelihood(base, before, text, letter)
                for before in (base.input_embeddings[base.bos], with_soft(base, soft_prompt))
            ]
            gains[letter] = scores[1] - scores[0]
        pairs.append(Pair(text, choose(gains, key=gains.__getitem__), "test"))
    return pairs


both_kinds = pytest.mark.parametrize("evidence", ["pairs", "inputs"])


def evidence_of(base: BaseModel, soft_prompt: SoftPrompt, kind: str) -> dict[str, Any]:
    return {"inputs": INPUTS} if kind == "inputs" else {"pairs": pairs_of(base, soft_prompt)}


# The plain way: whole rows, one at a time, the raw model, logits at all positions -----------------------------------------


def with_soft(base: BaseModel, soft_prompt: SoftPrompt) -> torch.Tensor:
    return torch.cat([soft_prompt.embeddings.double(), base.input_embeddings[base.bos].double()])


def with_text(base: BaseModel, text: str) -> torch.Tensor:
    ids = base.bos + (base.tokenize(text.strip()) + base.tokenize("\n") if text.strip() else [])
    return base.input_embeddings[ids]


def logits_after(base: BaseModel, before: torch.Tensor, ids: Sequence[int]) -> torch.Tensor:
    """(N, V) float64"""
    embeds = torch.cat([before, base.input_embeddings[list(ids)]])[None]
    with torch.no_grad():
        logits: torch.Tensor = base.model(inputs_embeds=embeds, use_cache=False).logits[0].double()
    return logits


def loglikelihood(base: BaseModel, before: torch.Tensor, text: str, output: str) -> float:
    """Mean per target token, the end token among them."""
    target = [*base.tokenize(f" {output}"), base.eos_id]
    ids = base.tokenize(TEMPLATE.replace("{x}", text))
    logits = logits_after(base, before, [*ids, *target])
    predicted = logits[len(before) + len(ids) - 1 : -1].log_softmax(dim=1)
    return sum(float(predicted[i, token]) for i, token in enumerate(target)) / len(target)


def greedy_answer(base: BaseModel, before: torch.Tensor, text: str, cap: int, end: int = 1) -> list[int]:
    ids = base.tokenize(TEMPLATE.replace("{x}", text))
    answer: list[int] = []
    while len(answer) < cap and end not in answer:
        answer.append(int(logits_after(base, before, [*ids, *answer])[-1].argmax()))
    return answer


def divergence(base: BaseModel, p_before: torch.Tensor, q_before: torch.Tensor, text: str, answer: list[int]) -> float:
    """Mean KL(p || q), summed in Python."""
    ids = base.tokenize(TEMPLATE.replace("{x}", text))
    found = []
    for position in range(len(answer)):
        row = [*ids, *answer[:position]]
        logits = [logits_after(base, before, row)[-1].tolist() for before in (p_before, q_before)]
        weights = [[math.exp(x) for x in side] for side in logits]
        p, q = ([weight / sum(side) for weight in side] for side in weights)
        found.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    return sum(found) / len(found)


def scores_by_text(found: Verification) -> dict[str, tuple[float, ...]]:
    return {candidate.text: candidate.item_scores for candidate in found.candidates}


# Scores ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "tolerance"),
    [(tiny_gpt2, 1e-9), (tiny_llama, 1e-6), (tiny_mistral, 1e-6)],
    ids=["gpt2", "llama, which works out norms in float32", "mistral, without prefixes"],
)
@pytest.mark.parametrize("tokens_per_forward", [1, 60, 5000])
def test_scores_on_pairs_are_those_of_whole_rows_one_at_a_time(
    make: Callable[[], BaseModel], tolerance: float, tokens_per_forward: int
) -> None:
    base = make()
    soft_prompt = random_prompt(base)
    pairs = [Pair(text, output) for text, output in zip(INPUTS, ["a", "bc", "d", "efgh", "", "i j"], strict=True)]
    verifier = Verifier(base, replace(CONFIG, tokens_per_forward=tokens_per_forward))
    found = verifier.verify(soft_prompt, TEXTS, pairs=pairs)

    def plain(before: torch.Tensor) -> list[float]:
        return [loglikelihood(base, before, pair.input, pair.output) for pair in pairs]

    assert found.evidence == "pairs" and found.items == tuple(range(6))
    assert found.no_prompt_scores == pytest.approx(plain(base.input_embeddings[base.bos]), rel=tolerance)
    assert found.soft_prompt_scores == pytest.approx(plain(with_soft(base, soft_prompt)), rel=tolerance)
    scores = scores_by_text(found)
    for text in TEXTS:
        assert scores[text] == pytest.approx(plain(with_text(base, text)), rel=tolerance)
    assert len({round(score, 4) for row in scores.values() for score in row}) == 24, "texts and items differ"


@pytest.mark.parametrize(
    ("make", "tolerance"), [(tiny_gpt2, 1e-9), (tiny_mistral, 1e-5)], ids=["gpt2", "mistral, without prefixes"]
)
def test_scores_on_probe_inputs_are_divergences_on_the_own_answer(
    make: Callable[[], BaseModel], tolerance: float
) -> None:
    base = make()
    soft_prompt = random_prompt(base)
    found = Verifier(base, CONFIG).verify(soft_prompt, TEXTS, inputs=INPUTS)
    before = with_soft(base, soft_prompt)
    answers = [greedy_answer(base, before, text, 4) for text in INPUTS]
    assert found.evidence == "probe inputs"
    assert found.soft_prompt_scores == (0.0,) * 6
    for text, row in [("", found.no_prompt_scores), *scores_by_text(found).items()]:
        q_before = with_text(base, text)
        plain = [-divergence(base, before, q_before, x, answer) for x, answer in zip(INPUTS, answers, strict=True)]
        assert row == pytest.approx(plain, rel=tolerance)
        assert max(plain) < -1e-4


@pytest.mark.parametrize("named_by", ["tokenizer", "model"])
def test_the_end_token_is_a_position_of_an_answer_that_ends(named_by: str) -> None:
    """A token that some answers come to becomes an end token: those are shorter, and compared up to their own end."""
    base = tiny_gpt2()
    soft_prompt = random_prompt(base)
    before = with_soft(base, soft_prompt)
    free = [greedy_answer(base, before, text, 6) for text in INPUTS]
    early = free[0][2]
    if named_by == "tokenizer":
        base.tokenizer.eos_token = base.tokenizer.convert_ids_to_tokens(early)
    else:
        base.model.generation_config.eos_token_id = [1, early]
    answers = [greedy_answer(base, before, text, 6, early) for text in INPUTS]
    assert answers[0][-1] == early and len(answers[0]) <= 3
    found = Verifier(base, replace(CONFIG, max_answer_tokens=6)).verify(soft_prompt, ["joy"], inputs=INPUTS)
    q_before = with_text(base, "joy")
    plain = [-divergence(base, before, q_before, x, answer) for x, answer in zip(INPUTS, answers, strict=True)]
    assert found.candidates[0].item_scores == pytest.approx(plain, rel=1e-9)


def test_what_rows_have_in_common_goes_through_the_model_once(base: BaseModel) -> None:
    soft_prompt = random_prompt(base)
    verifier = Verifier(base, CONFIG)
    pairs = [Pair(text, "yes") for text in INPUTS]
    verifier.verify(soft_prompt, TEXTS, pairs=pairs)
    lead = len("Sentence: ")
    beginnings = [1, 5 + 1, *(1 + len(text) + 1 for text in TEXTS if text)]  # a token is a byte
    rest = sum(len(text) + len(" Label:") + len(" yes") + 1 for text in INPUTS)
    counted = verifier.statistics
    assert counted.tokens == sum(beginnings) + lead * len(beginnings) + rest * len(beginnings)
    assert counted.target_tokens == 5 * len(INPUTS) * len(beginnings)
    assert counted.tokens < counted.padded_tokens < 1.5 * counted.tokens


def test_equal_texts_are_scored_once_and_listed_once(base: BaseModel) -> None:
    soft_prompt, pairs = random_prompt(base), [Pair(text, "yes") for text in INPUTS]
    once, twice = Verifier(base, CONFIG), Verifier(base, CONFIG)
    single = once.verify(soft_prompt, ["joy", "", "fear"], pairs=pairs)
    double = twice.verify(soft_prompt, ["joy", " joy\n", "", "  ", "fear", "joy"], pairs=pairs)
    assert twice.statistics == once.statistics
    assert sorted(candidate.text for candidate in double.candidates) == ["", "  ", " joy\n", "fear", "joy"]
    scores = scores_by_text(double)
    assert scores[" joy\n"] == scores["joy"] == scores_by_text(single)["joy"]
    assert scores["  "] == scores[""] == double.no_prompt_scores
    texts = [candidate.text for candidate in double.candidates]
    assert texts.index("joy") + 1 == texts.index(" joy\n"), "of equal scores the first one given comes first"


# Faithfulness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [None, "Ċ"], ids=["no BOS", "the line break is BOS"])
@both_kinds
def test_a_text_that_acts_as_the_soft_prompt_keeps_its_whole_gain(bos: str | None, evidence: str) -> None:
    """Without BOS the rows are [soft tokens][text] and [candidate][line break][text]: the same, where the soft tokens are the
    embeddings of candidate and line break. With the line break as BOS they are [soft tokens][BOS][text] and
    [BOS][candidate][BOS][text]."""
    base = tiny_gpt2()
    base.tokenizer.bos_token = bos
    words = "up, down"
    ids = [*base.tokenize(words), *base.tokenize("\n")] if bos is None else [*base.bos, *base.tokenize(words)]
    soft_prompt = prompt_of(base, base.input_embeddings[ids])
    given = evidence_of(base, soft_prompt, evidence)
    found = Verifier(base, CONFIG).verify(soft_prompt, ["something else", words, ""], **given)
    best = found.best
    assert found.reason is None and found.gain.low > 0
    assert best is not None and best.text == words
    assert (best.faithfulness, best.low, best.high) == pytest.approx((1, 1, 1), rel=1e-6)
    other, nothing = (next(c for c in found.candidates if c.text == text) for text in ("something else", ""))
    assert (nothing.faithfulness, nothing.low, nothing.high) == (0, 0, 0)
    assert other.faithfulness is not None and other.faithfulness < 0.99
    assert other.low is not None and other.high is not None and other.low < other.faithfulness < other.high
    by_hand = (other.score - found.no_prompt) / (found.soft_prompt - found.no_prompt)
    assert other.faithfulness == pytest.approx(by_hand, rel=1e-12)


def test_a_prompt_that_hurts_has_no_faithfulness_and_says_why(base: BaseModel) -> None:
    soft_prompt = random_prompt(base)
    pairs = pairs_of(base, soft_prompt, helps=False)
    found = Verifier(base, CONFIG).verify(soft_prompt, TEXTS, pairs=pairs)
    assert found.gain.mean < 0 and found.gain.mean == pytest.approx(found.soft_prompt - found.no_prompt)
    assert found.reason is not None
    assert found.reason.startswith("no faithfulness: the soft prompt is not better than no prompt on 6 pairs (gain -")
    assert all((c.faithfulness, c.low, c.high) == (None, None, None) for c in found.candidates)
    scores = [candidate.score for candidate in found.candidates]
    assert scores == sorted(scores, reverse=True), "they are ranked all the same"


def test_a_gain_that_may_be_chance_is_no_gain(base: BaseModel) -> None:
    soft_prompt = random_prompt(base)
    good, bad = pairs_of(base, soft_prompt), pairs_of(base, soft_prompt, helps=False)
    verifier = Verifier(base, CONFIG)
    shares = {count: verifier.verify(soft_prompt, [], pairs=[*good[:count], *bad[count:]]).gain for count in range(7)}
    unsure = [count for count, gain in shares.items() if gain.mean > 0 >= gain.low]
    assert unsure, "some mixture gains on the mean only"
    found = verifier.verify(soft_prompt, ["joy"], pairs=[*good[: unsure[0]], *bad[unsure[0] :]])
    assert found.reason is not None and "is not surely better than no prompt" in found.reason
    assert found.candidates[0].faithfulness is None


def test_intervals_on_two_items_are_worked_out_by_hand() -> None:
    """A draw takes one item twice, the other one twice, or both; each has a share of a quarter or more of the draws."""
    bootstrap = Bootstrap(2, draws=2000, level=0.95, seed=0)
    no_prompt, soft_prompt = (1.0, 0.0), (2.0, 3.0)
    assert gain_of(no_prompt, soft_prompt, bootstrap) == Gain(2.0, 1.0, 3.0)
    assert faithfulness_of((1.5, 3.0), no_prompt, soft_prompt, bootstrap) == Faithfulness(3.5 / 4, 0.5, 1.0)


def test_draws_without_a_gain_have_no_share_of_it() -> None:
    """Of six items one is hurt. With four draws of it or more, in 0.9 % of all, nothing is gained; with three, in 5.4 %, the
    share is 3 / 0.3 = 10."""
    no_prompt, soft_prompt, candidate = [0.0] * 6, [1.0] * 5 + [-0.9], [0.0] * 5 + [1.0]
    bootstrap = Bootstrap(6, draws=20_000, level=0.95, seed=0)
    gain = gain_of(no_prompt, soft_prompt, bootstrap)
    assert gain.low == pytest.approx(0.3 / 6)
    value, low, high = faithfulness_of(candidate, no_prompt, soft_prompt, bootstrap)
    assert (value, low, high) == pytest.approx((1 / 4.1, 0.0, 10.0))


def test_the_bootstrap_is_seeded_and_draws_whole_items() -> None:
    first, same, other = (Bootstrap(8, draws=50, level=0.9, seed=seed).means(range(8)) for seed in (1, 1, 2))
    assert np.array_equal(first, same) and not np.array_equal(first, other)
    assert np.allclose(first * 8, np.round(first * 8)) and len(set(first)) > 10, "means of eight whole numbers"
    assert Bootstrap(8, draws=50, level=0.9, seed=1).means([1.0] * 8) == pytest.approx([1.0] * 50)
    with pytest.raises(ConfigError, match="draws=0 and level=0.9"):
        Bootstrap(8, draws=0, level=0.9, seed=1)


def test_the_seed_moves_intervals_and_nothing_else(base: BaseModel) -> None:
    soft_prompt = random_prompt(base)
    pairs = pairs_of(base, soft_prompt)
    first, same, other = (
        Verifier(base, replace(CONFIG, seed=seed)).verify(soft_prompt, TEXTS, pairs=pairs) for seed in (0, 0, 1)
    )
    assert first == same and first != other
    assert [c.score for c in other.candidates] == [c.score for c in first.candidates]
    assert [c.faithfulness for c in other.candidates] == [c.faithfulness for c in first.candidates]
    assert other.gain.mean == first.gain.mean and other.gain.low != first.gain.low


def test_a_verification_comes_back_from_json_and_holds_all_it_was_made_of(base: BaseModel) -> None:
    soft_prompt = random_prompt(base)
    found = Verifier(base, CONFIG).verify(soft_prompt, TEXTS, pairs=pairs_of(base, soft_prompt))
    record = json.loads(json.dumps(found.to_json()))
    again = Verification.from_json(record)
    assert again == found
    assert record["soft_prompt"] == found.soft_prompt and record["soft_prompt_id"] == soft_prompt.id
    bootstrap = Bootstrap(len(again.items), draws=again.draws, level=again.level, seed=again.seed)
    assert gain_of(again.no_prompt_scores, again.soft_prompt_scores, bootstrap) == found.gain
    for candidate in again.candidates:
        kept = faithfulness_of(candidate.item_scores, again.no_prompt_scores, again.soft_prompt_scores, bootstrap)
        assert kept == (candidate.faithfulness, candidate.low, candidate.high)
    with pytest.raises(ArtifactError, match="reading a verification: its record is incomplete"):
        Verification.from_json({key: value for key, value in record.items() if key != "gain"})


# Other orders of the soft tokens ---------------------------------------------------------------------------------------


def test_other_orders_are_scored_on_the_same_pairs(base: BaseModel) -> None:
    soft_prompt = random_prompt(base, 3)
    pairs = pairs_of(base, soft_prompt)
    verifier = Verifier(base, replace(CONFIG, level=0.8))  # four orders suffice, and there are five others
    found = verifier.verify(soft_prompt, TEXTS, pairs=pairs, test_order=True)
    possible = []
    for order in list(itertools.permutations(range(3)))[1:]:
        other = replace(soft_prompt, embeddings=soft_prompt.embeddings[list(order)])
        possible.append(verifier.verify(other, [], pairs=pairs).soft_prompt)
    assert found.order is not None and found.order.score == pytest.approx(found.soft_prompt)
    scores = sorted(found.order.order_scores)
    left_out = [score for score in possible if all(abs(score - other) > 1e-9 for other in scores)]
    assert len(scores) == 4 and len(left_out) == 1
    assert scores == pytest.approx(sorted(score for score in possible if score not in left_out), rel=1e-9)
    as_good = sum(score >= found.soft_prompt for score in scores)
    assert found.order.p_value == (1 + as_good) / 5
    assert replace(found, order=None) == verifier.verify(soft_prompt, TEXTS, pairs=pairs)
    assert Verification.from_json(json.loads(json.dumps(found.to_json()))) == found
    earlier = {name: value for name, value in found.to_json().items() if name != "order"}
    assert Verification.from_json(earlier).order is None


def test_vectors_that_nobody_tuned_pass_as_rarely_as_the_level_says(base: BaseModel) -> None:
    verifier = Verifier(base, replace(CONFIG, level=0.75, orders=3, draws=1))
    pairs = [Pair(text, text[::-1]) for text in INPUTS[:3]]
    generator = torch.Generator().manual_seed(0)
    passed = 0
    for _ in range(80):
        numbers = torch.randn(4, HIDDEN_SIZE, generator=generator)
        found = verifier.verify(prompt_of(base, numbers), [], pairs=pairs, test_order=True)
        passed += found.order is not None and found.order.p_value <= 0.25
    assert 1 <= passed <= 28, "80 tests at 25 %, not all of which gain anything: at most 2 standard deviations above 20"


def test_ten_pairs_are_enough_to_try_orders_on(base: BaseModel) -> None:
    soft_prompt = random_prompt(base)
    pairs = pairs_of(base, soft_prompt) * 3
    verifier = Verifier(base, CONFIG)
    found = verifier.verify(soft_prompt, [], pairs=pairs, test_order=True)
    few = verifier.verify(soft_prompt, [], pairs=pairs[:10], test_order=True)
    assert len(found.items) > 10 and found.order is not None and few.order is not None
    assert found.order.score == pytest.approx(few.soft_prompt) and found.order.score != found.soft_prompt
    assert found.order.order_scores == pytest.approx(few.order.order_scores)


@pytest.mark.parametrize(
    ("changes", "given", "num_virtual_tokens"),
    [({}, "pairs", 3), ({"orders": 0}, "pairs", 5), ({}, "inputs", 5), ({"level": 0.995}, "pairs", 5)],
    ids=["too few orders of three tokens", "switched off", "probe inputs", "too few orders for the level"],
)
def test_the_order_is_not_tested(base: BaseModel, changes: dict[str, Any], given: str, num_virtual_tokens: int) -> None:
    soft_prompt = random_prompt(base, num_virtual_tokens)
    data = evidence_of(base, soft_prompt, given)
    found = Verifier(base, replace(CONFIG, **changes)).verify(soft_prompt, [], test_order=True, **data)
    assert found.order is None


# Without prefixes, without memory, without room -----------------------------------------------------------------------


@both_kinds
def test_a_model_without_shareable_prefixes_gives_the_same_numbers(
    base: BaseModel, evidence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    soft_prompt = random_prompt(base)
    given = evidence_of(base, soft_prompt, evidence)
    shared = Verifier(base, CONFIG).verify(soft_prompt, TEXTS, **given)
    monkeypatch.setattr(BaseModel, "prefixes", lambda self, soft_prompts, lead=(): None)
    whole = Verifier(base, CONFIG).verify(soft_prompt, TEXTS, **given)
    assert [c.text for c in whole.candidates] == [c.text for c in shared.candidates]
    for one, other in zip(whole.candidates, shared.candidates, strict=True):
        assert one.item_scores == pytest.approx(other.item_scores, rel=1e-9)
        assert one.faithfulness == pytest.approx(other.faithfulness, rel=1e-9, abs=1e-12)


@both_kinds
def test_out_of_memory_halves_the_passes_and_changes_nothing(evidence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_gpt2()
    soft_prompt = random_prompt(base)
    given = evidence_of(base, soft_prompt, evidence)
    expected = Verifier(base, CONFIG).verify(soft_prompt, TEXTS, **given)
    real: Callable[..., Any] = base.model.base_model.forward
    tried: list[int] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        read = kwargs.get("inputs_embeds")
        read = args[0] if read is None else read  # token ids
        tried.append(read.shape[0] * read.shape[1])
        result = real(*args, **kwargs)
        if tried[-1] > 130:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return result

    monkeypatch.setattr(base.model.base_model, "forward", forward)
    verifier = Verifier(base, replace(CONFIG, tokens_per_forward=1000))
    found = verifier.verify(soft_prompt, TEXTS, **given)
    assert verifier.halvings == 3, "from 1000 over 500 and 250 to 125"
    for one, other in zip(found.candidates, expected.candidates, strict=True):
        assert one.item_scores == pytest.approx(other.item_scores, rel=1e-9)


@pytest.mark.parametrize(("max_candidate_tokens", "kept"), [(10, 10), (400, 256)], ids=["setting", "half the context"])
def test_of_a_long_candidate_the_beginning_is_read_and_that_is_said(
    base: BaseModel, max_candidate_tokens: int, kept: int
) -> None:
    text = "name the colour of it " * 20
    soft_prompt, pairs = random_prompt(base), [Pair(text, "yes") for text in INPUTS]
    verifier = Verifier(base, replace(CONFIG, max_candidate_tokens=max_candidate_tokens))
    found = {c.text: c for c in verifier.verify(soft_prompt, [text, text[:kept]], pairs=pairs).candidates}
    assert found[text].truncated and not found[text[:kept]].truncated
    assert found[text].item_scores == found[text[:kept]].item_scores


def test_long_inputs_are_cut_and_counted(base: BaseModel) -> None:
    soft_prompt = random_prompt(base)
    verifier = Verifier(base, replace(CONFIG, max_pair_tokens=40))
    texts = ["short", "w" * 100]
    found = verifier.verify(soft_prompt, ["joy"], pairs=[Pair(text, "yes") for text in texts])
    # 40 tokens: BOS, "Sentence:", the space and the input, " Label:", " yes" and EOS
    kept = 40 - 1 - len("Sentence:") - 1 - len(" Label:") - len(" yes") - 1
    plain = [loglikelihood(base, with_text(base, "joy"), text, "yes") for text in ("short", "w" * kept)]
    assert found.truncated_inputs == 1
    assert found.candidates[0].item_scores == pytest.approx(plain, rel=1e-9)
    assert verifier.verify(soft_prompt, ["joy"], inputs=texts).truncated_inputs == 1


def test_what_cannot_be_verified_is_an_error(base: BaseModel) -> None:
    verifier = Verifier(base, CONFIG)
    soft_prompt = random_prompt(base)
    with pytest.raises(DataError, match=r"prompt 'moods' with pair 1: its text and answer have \d+ and 602 tokens"):
        verifier.verify(soft_prompt, ["joy"], pairs=[Pair("a", "b"), Pair("a", "b" * 600)])
    with pytest.raises(DataError, match="with input 0: .* there is room for 6"):
        verifier.verify(random_prompt(base, 505), ["joy"], inputs=["a"])
    with pytest.raises(DataError, match="with input 0: its filled template is empty"):
        verifier.verify(soft_prompt, ["joy"], inputs=[""], template="{x}")
    with pytest.raises(ConfigError, match="neither pairs nor inputs.*Give held-out pairs of its task as `pairs`, or"):
        verifier.verify(soft_prompt, ["joy"])
    with pytest.raises(BaseModelMismatch, match="verifying texts for soft prompt 'moods'"):
        verifier.verify(random_prompt(tiny_base_model()), ["joy"], inputs=INPUTS)


# What is tried --------------------------------------------------------------------------------------------------------


def test_the_first_pairs_are_used_for_a_classification_in_turn_from_each_output(base: BaseModel) -> None:
    pairs = [Pair(f"input {n}", output) for n, output in enumerate(["a", "a", "a", "b", "b", "c"])]
    assert in_turn(pairs, 4, balanced=True) == [0, 3, 5, 1]
    assert in_turn(pairs, 4, balanced=False) == [0, 1, 2, 3]
    assert in_turn(pairs, 6, balanced=True) == in_turn(pairs, 9, balanced=False) == [0, 1, 2, 3, 4, 5]
    verifier = Verifier(base, replace(CONFIG, max_pairs=4, max_probe_inputs=2))
    labelled = prompt_of(base, random_prompt(base).embeddings, kind="classification")
    all_pairs = Verifier(base, CONFIG).verify(labelled, [], pairs=pairs)
    found = verifier.verify(labelled, [], pairs=pairs)
    assert found.items == (0, 3, 5, 1)
    assert found.no_prompt_scores == pytest.approx([all_pairs.no_prompt_scores[place] for place in found.items])
    assert verifier.verify(random_prompt(base), [], pairs=pairs).items == (0, 1, 2, 3)
    assert verifier.verify(random_prompt(base), [], inputs=INPUTS).items == (0, 1)


def test_pairs_go_before_inputs_and_a_template_can_be_given(base: BaseModel) -> None:
    verifier = Verifier(base, CONFIG)
    pairs = [Pair(text, "yes") for text in INPUTS]
    own = verifier.verify(random_prompt(base), ["joy"], pairs=pairs, inputs=["x"])
    assert own.evidence == "pairs" and own == verifier.verify(random_prompt(base), ["joy"], pairs=pairs)
    bare = prompt_of(base, random_prompt(base).embeddings, template="")
    assert verifier.verify(bare, ["joy"], pairs=pairs, template=TEMPLATE).candidates == own.candidates
    with pytest.raises(ConfigError, match=r"its template is '', expected one with '\{x\}' once"):
        verifier.verify(bare, ["joy"], pairs=pairs)


def test_scores_that_are_no_numbers_are_an_error() -> None:
    base = tiny_base_model()
    with torch.no_grad():
        base.model.get_input_embeddings().weight[base.tokenize("z")[0]] = math.inf
    with pytest.raises(BaseModelError, match="the base model's scores hold NaN or infinity"):
        Verifier(base, CONFIG).verify(random_prompt(base), ["zz"], pairs=[Pair("a", "b")])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"level": 1.0}, "level is 1.0, expected below 1"),
        ({"orders": 18}, "orders is 18, expected 0 or at least 19"),
        ({"max_pair_tokens": 15}, "max_pair_tokens=15 leaves no room for text before 8 tokens of an answer"),
    ],
)
def test_settings_that_cannot_work_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VerifierConfig(**values)


# Ranking pairs and reporting pairs ------------------------------------------------------------------------------------


def held_out_task(test: Sequence[str], validation: Sequence[str]) -> Task:
    pairs = [Pair("tuned on", "x"), *(Pair(text, "x", "test") for text in test)]
    pairs += [Pair(text, f"y{n}", "validation") for n, text in enumerate(validation)]
    return Task("t", "generation", tuple(pairs))


def test_ranking_and_reporting_pairs_share_no_input() -> None:
    task = held_out_task([f"test {n}" for n in range(7)], [f"validation {n}" for n in range(4)])
    for seed in range(5):
        ranking, reporting = split_pairs(task, seed)
        assert sorted([*ranking, *reporting]) == sorted([*task.pairs_of("test"), *task.pairs_of("validation")])
        assert abs(len(ranking) - len(reporting)) <= 1
        for half in (ranking, reporting):
            splits = [pair.split for pair in half]
            assert splits == sorted(splits), "test pairs come first"
            assert 3 <= splits.count("test") <= 4
    assert split_pairs(task, 1) == split_pairs(task, 1) != split_pairs(task, 2)


def test_pairs_with_the_same_input_stay_on_one_side() -> None:
    task = held_out_task(["a", "b", "A ", "c", "d"], ["a", "B", "e", "e"])
    for seed in range(10):
        ranking, reporting = split_pairs(task, seed)
        sides = [{pair.input.strip().lower() for pair in half} for half in (ranking, reporting)]
        assert sides[0].isdisjoint(sides[1]) and len(ranking) + len(reporting) == 9
        assert abs(len(ranking) - len(reporting)) <= 3


def test_one_input_cannot_be_divided() -> None:
    with pytest.raises(DataError, match="of task 't': found 1 different inputs .* expected at least two"):
        split_pairs(held_out_task(["same"], ["Same "]), 0)
    ranking, reporting = split_pairs(held_out_task([], ["one", "two"]), 0)
    assert len(ranking) == len(reporting) == 1


# The benchmark --------------------------------------------------------------------------------------------------------


def test_the_benchmark_compares_equal_scores(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    benchmark = importlib.import_module("verifier")
    monkeypatch.setattr(benchmark, "matrix_product_rate", partial(benchmark.matrix_product_rate, budget_s=0.1))
    out = tmp_path / "figures.json"
    given = ["--base-model", str(tiny_folder), "--candidates", "3", "--pairs", "4", "--k", "4", "--json", str(out)]
    benchmark.main([*given, "--runs", "1", "--device", "cpu"])
    figures = json.loads(out.read_text())["figures"]
    assert figures["largest_difference"] < 1e-4
    assert figures["speedup_vs_row_by_row"] > 0
    assert 0 < figures["matrix_product_time_share"] < 1 and 0 <= figures["padding_share"] < 0.5
    assert "3 candidates of" in capsys.readouterr().out
