"""Reading soft prompts through patched layers: the same tokens as one pair at a time, written out plainly without a cache."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from small_decoders import LAYERS, K, gpt2, gptj, llama, soft_prompts
from small_prompts import make, numbers
from tiny_llm import tiny_base_model

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.base_models.growing_cache import growing_cache
from softprompt_registry.dod.labelled_sets import EVALUATION_LABELS
from softprompt_registry.errors import BaseModelMismatch, ConfigError
from softprompt_registry.verbalization import patching
from softprompt_registry.verbalization.patching import (
    STOPS,
    LayerPair,
    PatchedRow,
    TargetPrompt,
    all_pairs,
    cut_description,
    read_examples,
    read_patched,
    source_states,
    target_prompt,
)
from softprompt_registry.verbalization.proposers.inspect import InspectProposer
from softprompt_registry.verbalization.verbalizer import Candidate, VerbalizationConfig

NEW = 12


plain_base = cache(tiny_base_model)
"""The base model of `small_prompts`: two layers, float32."""


@cache
def shared_llama() -> BaseModel:
    return llama()


@pytest.fixture
def base() -> BaseModel:
    return shared_llama()


def target_of(base: BaseModel) -> TargetPrompt:
    return target_prompt(base, ["Say a: b, c", "Say d: e, f"])


def embed(base: BaseModel, ids: Sequence[int]) -> torch.Tensor:
    found: torch.Tensor = base.model.get_input_embeddings()(torch.tensor(ids, dtype=torch.long))
    return found


# The same as one pair at a time ---------------------------------------------------------------------------------------


def next_token(base: BaseModel, embeds: torch.Tensor, target: int, places: slice, states: torch.Tensor) -> int:
    """The next token after N embeddings (N, D), with states put in after layer `target`."""
    embeds = embeds.clone()
    if target == -1:
        embeds[places] = states

    def put(module: Any, arguments: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[:, places] = states
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    inner = base.model.base_model
    layers = inner.layers if hasattr(inner, "layers") else inner.h
    handle = None if target == -1 else layers[target].register_forward_hook(put)
    try:
        return int(base.model(inputs_embeds=embeds[None], use_cache=False).logits[0, -1].argmax())
    finally:
        if handle is not None:
            handle.remove()


@torch.no_grad()
def one_pair_at_a_time(
    base: BaseModel, soft: torch.Tensor, pair: LayerPair, target: TargetPrompt, max_new_tokens: int = NEW
) -> list[int]:
    """The whole text again for every new token, without a cache."""
    found = base.model(inputs_embeds=soft[None], output_hidden_states=True).hidden_states
    states = soft if pair.source == -1 else found[pair.source + 1][0]
    places = slice(len(target.before), len(target.before) + len(soft))
    ids: list[int] = []
    while len(ids) < max_new_tokens:
        embeds = embed(base, [*target.before, *[target.placeholder] * len(soft), *ids])
        token = next_token(base, embeds, pair.target, places, states)
        if token == base.eos_id:
            break
        ids.append(token)
    return ids


@cache
def expected_of_llama() -> dict[PatchedRow, list[int]]:
    base = shared_llama()
    return {
        PatchedRow(prompt, pair): one_pair_at_a_time(base, soft, pair, target_of(base))
        for prompt, soft in enumerate(soft_prompts(base))
        for pair in all_pairs(LAYERS)
    }


@pytest.mark.parametrize("rows_per_batch", [1, 5, None])
def test_rows_of_a_batch_say_what_each_says_alone(base: BaseModel, rows_per_batch: int | None) -> None:
    expected = expected_of_llama()
    assert len(expected) == 32 and len({tuple(ids) for ids in expected.values()}) > 20
    states = source_states(base, soft_prompts(base))
    found = read_patched(
        base, states, list(expected), target_of(base), max_new_tokens=NEW, rows_per_batch=rows_per_batch
    )
    assert found == list(expected.values())
    assert read_patched(base, states, [], target_of(base)) == []


@pytest.mark.parametrize("build", [gpt2, gptj], ids=["positions added", "layers give tuples"])
def test_models_with_other_layers_are_read_alike(build: Any) -> None:
    base = build()
    rows = [PatchedRow(prompt, pair) for prompt in (1, 0) for pair in all_pairs(base.ref.num_layers)]
    soft = soft_prompts(base)
    expected = [one_pair_at_a_time(base, soft[row.prompt], row.pair, target_of(base)) for row in rows]
    assert len({tuple(ids) for ids in expected}) > len(rows) // 2
    found = read_patched(base, source_states(base, soft), rows, target_of(base), max_new_tokens=NEW, rows_per_batch=7)
    assert found == expected


def test_rows_that_come_to_the_end_token_leave_the_others_as_they_are() -> None:
    base = llama()
    free = list(expected_of_llama().values())
    # A token that some rows come to, early or late, and others do not, becomes the end token.
    early = max({token for ids in free for token in ids}, key=lambda token: sum(token in ids for ids in free))
    base.tokenizer.eos_token = base.tokenizer.convert_ids_to_tokens(early)
    expected = [ids[: ids.index(early)] if early in ids else ids for ids in free]
    assert len({len(ids) for ids in expected}) > 2
    states = source_states(base, soft_prompts(base))
    found = read_patched(base, states, list(expected_of_llama()), target_of(base), max_new_tokens=NEW)
    assert found == expected


def test_a_token_of_the_cap_is_the_last_one(base: BaseModel) -> None:
    states = source_states(base, soft_prompts(base))
    rows = list(expected_of_llama())[:2]
    for cap in (1, 2):
        found = read_patched(base, states, rows, target_of(base), max_new_tokens=cap)
        assert found == [expected_of_llama()[row][:cap] for row in rows]


# What patching means --------------------------------------------------------------------------------------------------


def test_from_embeddings_to_embeddings_feeds_the_soft_tokens_in_place_of_the_placeholders(base: BaseModel) -> None:
    soft, target = soft_prompts(base), target_of(base)
    expected = []
    for prompt in soft:
        embeds = torch.cat([embed(base, target.before), prompt])[None]
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        output = base.model.generate(
            inputs_embeds=embeds, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=1
        )
        expected.append(output[0].tolist())
    rows = [PatchedRow(prompt, LayerPair(-1, -1)) for prompt in range(len(soft))]
    found = read_patched(base, source_states(base, soft), rows, target, max_new_tokens=NEW)
    assert found == expected and expected[0] != expected[1]


def test_patching_a_layer_with_its_own_states_changes_nothing(base: BaseModel) -> None:
    target = target_of(base)
    ids = torch.tensor([[*target.before, *[target.placeholder] * K]])
    with torch.no_grad():
        found = base.model(ids, output_hidden_states=True).hidden_states
        states = torch.stack([layer[:, -K:] for layer in found[:LAYERS]], dim=1)  # (1, L, K, D)
    output = base.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    plain = output[0, ids.shape[1] :].tolist()
    own = [PatchedRow(0, LayerPair(layer, layer)) for layer in range(-1, LAYERS - 1)]
    assert read_patched(base, states, own, target, max_new_tokens=NEW) == [plain] * LAYERS
    assert plain not in read_patched(base, states.flip(3), own, target, max_new_tokens=NEW)


def test_source_states_are_the_layers_outputs_of_the_prompt_alone(base: BaseModel) -> None:
    soft = soft_prompts(base)
    states = source_states(base, soft)
    assert states.shape == (2, LAYERS, K, base.ref.hidden_size)
    with torch.no_grad():
        for number, prompt in enumerate(soft):
            expected = base.model(inputs_embeds=prompt[None], output_hidden_states=True).hidden_states
            for layer in range(LAYERS):
                torch.testing.assert_close(states[number, layer], expected[layer][0])
    assert torch.equal(states[:, 0], soft)


def test_the_pairs_of_a_model_leave_out_its_last_layer() -> None:
    assert all_pairs(3) == [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 0), (0, 1), (1, -1), (1, 0), (1, 1)]
    assert len(all_pairs(32)) == 1024 and max(all_pairs(32)) == (30, 30)
    assert all_pairs(6, step=3) == [(-1, -1), (-1, 2), (2, -1), (2, 2)]
    with pytest.raises(ConfigError, match="the step is 0, expected at least 1"):
        all_pairs(6, 0)


# The base model is left as it was -------------------------------------------------------------------------------------


def hooks_of(base: BaseModel) -> list[Any]:
    """Ours alone: transformers leaves some of its own in a model that was once asked for its hidden states."""
    hooks = [hook for module in base.model.modules() for hook in module._forward_hooks.values()]
    return [hook for hook in hooks if hook.__module__ == patching.__name__]


def test_the_model_is_as_before_after_an_error_too() -> None:
    base = llama()
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    states = source_states(base, soft_prompts(base))
    seen: list[int] = []

    def fail_at_the_patched_pass(module: Any, arguments: Any) -> None:
        seen.append(len(hooks_of(base)))
        if seen[-1]:
            raise RuntimeError("no memory left")

    base.model.model.layers[-1].register_forward_pre_hook(fail_at_the_patched_pass)
    rows = [PatchedRow(0, LayerPair(0, target)) for target in (-1, 0, 1)]
    with pytest.raises(RuntimeError, match="no memory left"):
        read_patched(base, states, rows, target_of(base))
    assert seen[-1] == 2 and len(seen) > 1  # the beginning that all share is read without hooks
    assert hooks_of(base) == [] and base.model.config._attn_implementation == "eager"
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.model.state_dict().items())


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        (PatchedRow(0, LayerPair(3, 0)), {}, r"source 3 and target 0; a model with 4 layers takes layers -1 .* to 2"),
        (PatchedRow(0, LayerPair(0, -2)), {}, "source 0 and target -2"),
        (PatchedRow(2, LayerPair(0, 0)), {}, "soft prompt number 2; expected 0 to 1"),
        (PatchedRow(0, LayerPair(0, 0)), {"max_new_tokens": 0}, "max_new_tokens=0, rows_per_batch=None"),
        (PatchedRow(0, LayerPair(0, 0)), {"rows_per_batch": 0}, "rows_per_batch=0"),
        (
            PatchedRow(0, LayerPair(0, 0)),
            {"max_new_tokens": 500},
            r"K=3 and 500 new tokens are \d+; the base model takes",
        ),
    ],
)
def test_rows_that_cannot_be_read_are_refused(
    base: BaseModel, row: PatchedRow, settings: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_patched(base, source_states(base, soft_prompts(base)), [row], target_of(base), **settings)


def test_as_many_rows_share_a_batch_as_the_memory_takes(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    target = target_of(base)
    tokens = len(target.before) + K + NEW
    per_row = tokens * LAYERS * 2 * (2 * 16) * 8  # keys and values of 2 heads of 16 numbers in 8 bytes
    monkeypatch.setattr(patching, "CACHE_BYTES", 5 * per_row + per_row // 2)
    sizes: list[int] = []
    rows = [PatchedRow(0, pair) for pair in all_pairs(LAYERS)]
    states = source_states(base, soft_prompts(base))
    read_patched(base, states, rows, target, max_new_tokens=NEW, on_rows=sizes.append)
    assert sizes == [4, 4, 4, 4]  # not 5, 5, 5, 1
    monkeypatch.setattr(patching, "CACHE_BYTES", 1)
    sizes.clear()
    read_patched(base, states, rows[:2], target, max_new_tokens=NEW, on_rows=sizes.append)
    assert sizes == [1, 1]


def test_no_new_token_moves_what_a_patched_row_holds(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache has just enough room: what it holds lies where it lay at first."""
    caches: list[Any] = []
    places: list[int] = []

    def noted(*arguments: Any) -> Any:
        caches.append(growing_cache(*arguments))
        places.append(caches[-1].layers[0].keys.data_ptr())
        return caches[-1]

    monkeypatch.setattr(patching, "growing_cache", noted)
    rows = list(expected_of_llama())[:4]
    read_patched(base, source_states(base, soft_prompts(base)), rows, target_of(base), max_new_tokens=NEW)
    (cache,) = caches
    assert [cache.layers[0].keys.data_ptr()] == places
    assert cache.get_seq_length() == len(target_of(base).before) + K + NEW - 1


# Texts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("say which mood it is. And more", "say which mood it is"),
        ("say which mood | say", "say which mood"),
        ("say\nwhich", "say"),
        ("a mood costs $5 each day", "a mood costs"),
        # The stop would leave less than a fifth.
        ("a. 45678901", "a. 45678901"),
        ("ab. 456789", "ab"),
        ("1. say which mood it is. And", "1. say which mood it is"),
        ("  \n say it. yes", "say it"),
        ("no stop at all", "no stop at all"),
        (" \n", ""),
        (".", "."),
    ],
)
def test_a_text_is_cut_after_its_first_description(text: str, expected: str) -> None:
    assert cut_description(text) == expected


def test_our_example_descriptions_are_three_lines_that_cut_nothing_and_give_no_answer_away() -> None:
    labels = {label for names in EVALUATION_LABELS.values() for label in names}
    for kind in ("classification", "generation"):
        examples = read_examples(kind)
        assert len(examples) == 3 and not any(stop in example for example in examples for stop in STOPS)
        words = set(" ".join(examples).lower().replace(":", " ").replace(",", " ").split())
        assert not words & labels
    assert all(": " in example and "of a given text" in example for example in read_examples("classification"))
    assert read_examples("generation") == read_examples("unknown") != read_examples("classification")


def test_example_descriptions_can_be_changed(tmp_path: Path) -> None:
    (tmp_path / "general.txt").write_text("\ufeffDo this\n\n  Do that \n", encoding="utf-8")
    assert read_examples("generation", tmp_path) == ["Do this", "Do that"]
    assert read_examples("classification", tmp_path) == read_examples("classification")
    (tmp_path / "general.txt").write_text(" \n")
    with pytest.raises(ConfigError, match="the file has no text; expected one description per line"):
        read_examples("generation", tmp_path)
    with pytest.raises(ConfigError, match="there is no folder .*missing"):
        read_examples("generation", str(tmp_path / "missing"))


def test_the_target_prompt_ends_where_the_placeholders_stand(base: BaseModel) -> None:
    target = target_prompt(base, ["a b", "c"])
    assert target.before == (0, *base.tokenize("a b | c |"))
    assert base.decode([target.placeholder]) == "x"  # this tokenizer knows bytes only; others have a token " x"


# The proposer ---------------------------------------------------------------------------------------------------------


def alone(soft: torch.Tensor, kind: str, pair: LayerPair, max_new_tokens: int) -> str:
    base = plain_base()
    target = target_prompt(base, read_examples(kind))
    (ids,) = read_patched(
        base, source_states(base, soft[None]), [PatchedRow(0, pair)], target, max_new_tokens=max_new_tokens
    )
    return cut_description(base.decode(ids))


def test_each_prompt_gets_a_candidate_of_its_kinds_pair_in_order() -> None:
    pairs = {"classification": LayerPair(0, 0), "generation": LayerPair(-1, -1)}
    prompts = [make("a", 1), make("b", 2, kind="generation"), make("c", 3)]
    short = make("d", initial=False)
    prompts.insert(1, type(short)(numbers(4, 2), None, short.record))
    config = VerbalizationConfig(max_new_tokens=10, num_candidates=3)
    names = {"classification": "inspect:0,0", "generation": "inspect:-1,-1"}
    found = InspectProposer(plain_base(), pairs).propose(prompts, config)
    kinds = [prompt.record.kind for prompt in prompts]
    assert found == [
        [Candidate(alone(prompt.embeddings, kind, pairs[kind], 10), names[kind])]
        for prompt, kind in zip(prompts, kinds, strict=True)
    ]
    assert len({candidates[0].text for candidates in found}) > 2
    assert InspectProposer(plain_base(), pairs).propose([], config) == []
    (one,) = InspectProposer(plain_base(), LayerPair(0, -1)).propose(prompts[:1], config)
    assert [candidate.proposer for candidate in one] == ["inspect:0,-1"]


def test_a_proposer_refuses_pairs_and_prompts_of_other_models() -> None:
    with pytest.raises(ConfigError, match="none for a task of kind 'classification'"):
        InspectProposer(plain_base(), {}).propose([make()], VerbalizationConfig())
    with pytest.raises(ConfigError, match="a model with 2 layers takes layers -1"):
        InspectProposer(plain_base(), {"generation": LayerPair(0, 0), "classification": LayerPair(1, 0)})
    other = InspectProposer(tiny_base_model(seed=5), LayerPair(0, 0))
    with pytest.raises(BaseModelMismatch, match="soft prompt 'moods' belongs to base model"):
        other.propose([make()], VerbalizationConfig())
