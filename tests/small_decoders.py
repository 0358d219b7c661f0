"""Decoders of several architectures, of a few thousand weights in float64: the same tokens whatever the order of sums."""

from __future__ import annotations

import copy
from typing import Any

import torch
from tiny_llm import tiny_base_model, tiny_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, GPTJConfig, GPTJForCausalLM, LlamaForCausalLM

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.base_models.reference import reference_of

LAYERS = 4
K = 3


def base_of(model: Any, dtype: torch.dtype = torch.float64) -> BaseModel:
    model = model.to(dtype)
    tokenizer = tiny_tokenizer()
    return BaseModel(model, tokenizer, reference_of(model, tokenizer, name="tiny", revision=None, dtype=str(dtype)))


def llama(layers: int = LAYERS) -> BaseModel:
    """The tiny Llama with more layers, in float64."""
    config = copy.deepcopy(tiny_base_model().model.config)
    config.num_hidden_layers = layers
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return base_of(LlamaForCausalLM(config))


def gpt2() -> BaseModel:
    """Positions are added to the embeddings, and the layers have other names."""
    vocab = len(tiny_tokenizer())
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = GPT2Config(
            vocab_size=vocab,
            n_positions=256,
            n_embd=32,
            n_layer=LAYERS,
            n_head=4,
            initializer_range=0.3,  # at 0.1 a third of the pairs says something of its own, at this nearly all
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
        return base_of(GPT2LMHeadModel(config))


def gptj() -> BaseModel:
    """Each layer returns a tuple."""
    vocab = len(tiny_tokenizer())
    with torch.random.fork_rng():
        torch.manual_seed(2)
        config = GPTJConfig(
            vocab_size=vocab,
            n_positions=256,
            n_embd=32,
            n_layer=3,
            n_head=4,
            rotary_dim=4,
            initializer_range=0.1,
            bos_token_id=0,
            eos_token_id=1,
        )
        return base_of(GPTJForCausalLM(config))


def soft_prompts(base: BaseModel, count: int = 2, num_virtual_tokens: int = K) -> torch.Tensor:
    """(count, K, D)"""
    generator = torch.Generator().manual_seed(3)
    shape = (count, num_virtual_tokens, base.ref.hidden_size)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * 0.5
