"""A real two-layer Llama and a byte-level tokenizer, built in code in a fraction of a second.

`initializer_range=0.1`: at transformers' default of 0.02 neither tuning nor translator training learns anything in the
few seconds that a test has.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.base_models.reference import reference_of

HIDDEN_SIZE = 64


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<bos>": 0, "<eos>": 1} | {letter: index + 2 for index, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>")


def tiny_base_model(seed: int = 0, hidden_size: int = HIDDEN_SIZE, name: str = "tiny") -> BaseModel:
    """A new model; another seed or size gives another base model with its own fingerprint."""
    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=hidden_size,
                intermediate_size=2 * hidden_size,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=512,
                initializer_range=0.1,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
                attn_implementation="eager",
            )
        )
    return BaseModel(model, tokenizer, reference_of(model, tokenizer, name=name, revision=None, dtype="float32"))


def save_tiny_model(folder: Path, seed: int = 0) -> Path:
    """A folder that `load_base_model` accepts."""
    base_model = tiny_base_model(seed)
    base_model.model.save_pretrained(folder)
    base_model.tokenizer.save_pretrained(folder)
    return folder
