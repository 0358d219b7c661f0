"""A real two-layer Llama and a byte-level tokenizer, built in code in a fraction of a second.

`initializer_range=0.1`: at transformers' default of 0.02 neither tuning nor translator training learns anything in the
few seconds that a test has.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
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


def bos_writing_tokenizer() -> PreTrainedTokenizerFast:
    """The same tokens, with the BOS before each text, as Llama's tokenizers write it."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 0)]
    )
    return tokenizer


def sentencepiece_tokenizer(like: Literal["llama2", "mistral", "unigram"], words: Sequence[str]) -> Any:
    """A tokenizer that marks spaces by "▁" and puts one before each text; it knows letters, `words` and two spaces.

    The settings are those of Llama 2's tokenizer in transformers (a normalizer), of Mistral's (Metaspace before the first
    word) and of SentencePiece's unigram models (Metaspace before all).
    """
    spaced = [f"▁{word}" for word in words] + ["▁▁"]
    letters = sorted({*"".join(spaced), *map(chr, range(33, 127)), "\n"})
    merges = [(piece[:end], piece[end]) for piece in ["▁▁", *spaced] for end in range(1, len(piece))]
    pieces = dict.fromkeys(["<bos>", "<eos>", *letters, *(left + right for left, right in merges)])
    if like == "unigram":
        scores = [(piece, 0.0 if piece[0] == "<" else -10.0 if piece not in spaced else -1.0) for piece in pieces]
        tokenizer = Tokenizer(models.Unigram(scores, unk_id=0))
    else:
        vocabulary = {piece: number for number, piece in enumerate(pieces)}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(dict.fromkeys(merges))))
    if like == "llama2":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        scheme: Literal["first", "always"] = "first" if like == "mistral" else "always"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=like == "unigram")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>")


def tiny_base_model(
    seed: int = 0, hidden_size: int = HIDDEN_SIZE, name: str = "tiny", tokenizer: Any = None
) -> BaseModel:
    """A new model; another seed or size gives another base model with its own fingerprint."""
    tokenizer = tokenizer or tiny_tokenizer()
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
