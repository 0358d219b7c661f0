"""The decoder layers of a base model, whatever its architecture calls them."""

from __future__ import annotations

import pytest
import torch
from small_decoders import LAYERS, base_of, gpt2, llama
from tiny_llm import tiny_tokenizer
from transformers import MistralConfig, MistralForCausalLM

from softprompt_registry.base_models.layers import decoder_layers
from softprompt_registry.errors import ConfigError


def test_layers_are_found_under_any_name() -> None:
    base, other = llama(), gpt2()
    assert decoder_layers(base) == list(base.model.model.layers)
    assert decoder_layers(other) == list(other.model.transformer.h)


def test_lists_inside_of_layers_are_not_taken_for_layers() -> None:
    base = llama()
    for layer in base.model.model.layers:
        layer.experts = torch.nn.ModuleList(torch.nn.Identity() for _ in range(LAYERS))
    assert decoder_layers(base) == list(base.model.model.layers)


def test_a_model_without_one_list_of_layers_is_refused() -> None:
    base = llama()
    base.model.model.layers = torch.nn.Sequential(*base.model.model.layers)
    with pytest.raises(
        ConfigError, match=r"its lists of modules have \{\} members; expected exactly one list with the 4"
    ):
        decoder_layers(base)
    base = llama()
    base.model.model.tower = torch.nn.ModuleList(torch.nn.Identity() for _ in range(LAYERS))
    with pytest.raises(ConfigError, match=r"\{'layers': 4, 'tower': 4\}"):
        decoder_layers(base)


def test_a_model_that_forgets_is_refused() -> None:
    vocab = len(tiny_tokenizer())
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = base_of(
        MistralForCausalLM(MistralConfig(vocab_size=vocab, sliding_window=8, num_key_value_heads=1, **sizes))
    )
    with pytest.raises(
        ConfigError, match=r"cannot continue a shared beginning \(between tokens it keeps a sliding window"
    ):
        decoder_layers(base)
