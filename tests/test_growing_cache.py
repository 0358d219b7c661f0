"""Decoding without copies: a cache that grows in place, and attention by groups of heads; the numbers stay the same."""

from __future__ import annotations

import pytest
import torch
from small_decoders import LAYERS, gpt2, llama, soft_prompts
from tiny_llm import tiny_base_model
from transformers import DynamicCache

from softprompt_registry.base_models.grouped_attention import grouped_attention
from softprompt_registry.base_models.growing_cache import growing_cache


def test_a_growing_cache_holds_what_a_plain_one_holds() -> None:
    base = llama()
    with torch.no_grad():
        prefixes = base.prefixes(soft_prompts(base))
    assert prefixes is not None
    rows = prefixes.of_rows([1, 0, 1])
    plain, growing = rows.cache(), growing_cache(rows, 4)
    generator = torch.Generator().manual_seed(0)

    def add(tokens: int) -> None:
        for layer in range(LAYERS):
            shape = (len(plain.layers[0].keys), 2, tokens, 16)
            new = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
            expected = plain.update(new[0], new[1], layer)
            found = growing.update(new[0], new[1], layer)
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        assert growing.get_seq_length() == plain.get_seq_length()
        assert growing.get_mask_sizes(2, 0) == plain.get_mask_sizes(2, 0)

    place = growing.layers[0].keys.data_ptr()
    add(1)
    add(3)
    assert growing.layers[0].keys.data_ptr() == place, "nothing was moved"
    add(2)  # more than there was room for
    for change in (
        lambda cache: cache.batch_select_indices(torch.tensor([0, 2])),
        lambda cache: cache.batch_select_indices(torch.tensor([1, 0, 0, 1, 1])),
        lambda cache: cache.crop(-2),
    ):
        change(plain)
        change(growing)
        add(1)


@pytest.mark.parametrize(
    "texts", [("a fine day", "no", "what"), ("abc", "xyz"), ("one",)], ids=["padded", "even", "one"]
)
@pytest.mark.parametrize("with_soft", [False, True])
def test_grouped_attention_gives_the_same_numbers(texts: tuple[str, ...], with_soft: bool) -> None:
    # In float32: transformers' own attention takes the softmax in float32, where the mask of float64 is minus infinity and
    # padding becomes NaN.
    base = tiny_base_model()
    soft = soft_prompts(base, len(texts)) if with_soft else None
    joined = base.join(soft, [base.bos + base.tokenize(text) for text in texts], pad_side="left")
    inputs = {
        "inputs_embeds": joined.inputs_embeds,
        "attention_mask": joined.attention_mask,
        "position_ids": joined.position_ids,
    }
    found = []
    with torch.no_grad():
        expected = base.model(**inputs).logits
        with grouped_attention(base):
            assert base.model.config._attn_implementation == "softprompt_grouped"
            # A beginning of several tokens, then two, then one, as when a text is written behind what its rows share.
            cache, length = DynamicCache(), inputs["inputs_embeds"].shape[1]
            for start, end in ((0, length - 3), (length - 3, length - 1), (length - 1, length)):
                part = {name: inputs[name][:, start:end] for name in ("inputs_embeds", "position_ids")}
                mask = inputs["attention_mask"][:, :end]
                found.append(base.model(**part, attention_mask=mask, past_key_values=cache, use_cache=True).logits)
        whole = base.model(**inputs).logits
    real = joined.attention_mask.bool()
    torch.testing.assert_close(torch.cat(found, dim=1)[real], expected[real], rtol=1e-4, atol=1e-4)
    assert torch.equal(whole, expected), "outside the block the model is what it was"


def test_attention_of_other_kinds_is_left_alone() -> None:
    base, other = llama(), gpt2()
    with grouped_attention(other):
        assert other.model.config._attn_implementation != "softprompt_grouped"
    base.model.set_attn_implementation("sdpa")
    with grouped_attention(base):
        assert base.model.config._attn_implementation == "sdpa"
