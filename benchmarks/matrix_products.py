"""What a device can do in matrix products, and how many of them tuning a soft prompt needs.

The quotient says how far a way of tuning is from what the device gives at best:

    flops_of_training(…) / seconds / matrix_product_rate(…)
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from measuring import clock

SIZES = (256, 512, 1024, 2048, 4096, 8192)
PRODUCTS = 5
"""Timed products of a size; the fastest one counts."""


def matrix_product_rate(device: torch.device | str, dtype: torch.dtype, *, budget_s: float = 1.5) -> float:
    """FLOP/s of a square matrix product of random numbers, the best that any size and repetition reaches.

    Sizes double up to 8192 as long as the next one is expected to fit in what is left of the budget: a GPU gets to the
    last, two CPU cores in float32 to 1024 or 2048. It is the rate of this process: of torch's threads on a CPU, and with
    torch's setting for TF32 on a GPU in float32.
    """
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(0)
    deadline = time.perf_counter() + budget_s
    best = 0.0
    expected_s = 0.0
    for size in SIZES:
        if best and time.perf_counter() + expected_s > deadline:
            break
        left, right = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
        product = torch.empty(size, size, device=device, dtype=dtype)
        fastest = math.inf
        for turn in range(PRODUCTS + 1):
            started = clock(device)
            torch.mm(left, right, out=product)
            elapsed = clock(device) - started
            # The first one sets up the library.
            if turn:
                fastest = min(fastest, elapsed)
        best = max(best, 2 * size**3 / fastest)
        expected_s = 8 * fastest * (PRODUCTS + 1)
    return best


def flops_of_training(config: Any, row_tokens: Sequence[int], projected_tokens: int, *, backward: bool = True) -> float:
    """FLOP that tuning needs for these rows, forward and backward through a frozen dense model of Llama's shape.

    With P weights in the matrices of all layers, A = heads × head size, L layers, D hidden size, V vocabulary:

        layers      2·P per token forward, 2·P backward: the gradient of the activations. There is no third 2·P, as no weight
                    gets a gradient; the gradient reaches back to the first layer, where the soft prompt enters.
        attention   4·A·L per pair of a token and one that it sees (scores, and the weighted sum of values) forward, twice
                    that backward, where both factors of each product get a gradient. A row of N tokens has N·(N + 1)/2 such
                    pairs; a kernel that also computes the masked half does more.
        vocabulary  2·D·V forward and 2·D·V backward per token whose next token is predicted.

    This is what is needed, not what is done: padding, logits at positions that are no targets, and anything computed twice
    lower the quotient with the device's rate. Norms, activations, softmax, lookups and the optimizer are left out; they
    take time, but few FLOP.

    Args:
        config: of a transformers model: layers of q, k, v and o projections and an MLP of three matrices, without experts.
        row_tokens: length of each row, soft tokens included and padding left out.
        projected_tokens: target tokens of these rows, all together.
        backward: False for validation, which is forward alone.
    """
    pairs = sum(tokens * (tokens + 1) // 2 for tokens in row_tokens)
    attention_width = config.num_attention_heads * _head_size(config)
    layers = 2 * layer_weights(config) * sum(row_tokens)
    attention = 4 * attention_width * config.num_hidden_layers * pairs
    vocabulary = 2 * config.hidden_size * config.vocab_size * projected_tokens
    forward = layers + attention + vocabulary
    return float(forward + (layers + 2 * attention + vocabulary if backward else 0))


def layer_weights(config: Any) -> int:
    """P: weights in the matrices of all layers; embeddings, norms and biases are not among them."""
    hidden = config.hidden_size
    queries = config.num_attention_heads * _head_size(config)
    keys = (getattr(config, "num_key_value_heads", None) or config.num_attention_heads) * _head_size(config)
    per_layer = 2 * hidden * queries + 2 * hidden * keys + 3 * hidden * config.intermediate_size
    return int(config.num_hidden_layers * per_layer)


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
