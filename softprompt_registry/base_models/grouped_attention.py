"""Attention without a copy of keys and values for each query head.

In grouped-query attention several query heads read the keys and values of one. transformers' plain attention first copies
them for each head, in every layer and with every new token; with hundreds of rows that takes as long as the products of the
layers. Here the query heads of a group stand as rows in one product: the same numbers, to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from softprompt_registry.base_models.frozen import BaseModel

NAME = "softprompt_grouped"
"""Name under which transformers knows this attention."""
PLAIN_MODELS = frozenset({"llama", "mistral", "qwen2", "qwen3", "smollm3"})
"""Model types whose attention is softmax(q·k · scale + mask)·v and nothing else, such as a cap on scores or a sink."""


@contextmanager
def grouped_attention(base_model: BaseModel) -> Iterator[None]:
    """Let the base model use it inside the block, where it computes the same as the model's own attention.

    That is where the own one is the plain one ("eager"), the model type is known, and heads are grouped. Elsewhere nothing
    changes.
    """
    model, config = base_model.model, base_model.model.config
    grouped = config.model_type in PLAIN_MODELS and config.num_key_value_heads < config.num_attention_heads
    own = config._attn_implementation
    if not grouped or own != "eager":
        yield
        return
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def _mask(*, q_length: int, allow_is_causal_skip: bool = True, **arguments: Any) -> torch.Tensor | None:
    """(B, 1, T, N) bool, true where a token is seen; None where one new token (T = 1) sees all.

    transformers leaves the mask out for several tokens too, where nothing but the future is hidden, and trusts the attention
    to hide that: `_attend` would not.
    """
    skip = allow_is_causal_skip and q_length == 1
    mask: torch.Tensor | None = sdpa_mask(q_length=q_length, allow_is_causal_skip=skip, **arguments)
    return mask


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The signature that transformers calls attention with; H query heads, G key-value heads.

    Args:
        query: (B, H, T, D / H).
        key, value: (B, G, N, D / H).
        attention_mask: from `_mask`.
    Returns:
        (B, T, H, D / H), and no attention weights.
    """
    rows, heads, tokens, size = query.shape
    groups, seen = key.shape[1:3]
    # Query heads j·H/G to (j + 1)·H/G - 1 belong to key-value head j.
    query = query.reshape(rows, groups, heads // groups * tokens, size)
    scores = torch.matmul(query * scaling, key.transpose(2, 3))  # (B, G, H / G · T, N)
    if attention_mask is not None:
        by_head = scores.view(rows, groups, heads // groups, tokens, seen)
        # Not minus infinity: padding on the left sees nothing at all, and its softmax must stay a number.
        unseen = ~attention_mask[:, :, None]  # (B, 1, 1, T, N)
        scores = by_head.masked_fill(unseen, torch.finfo(scores.dtype).min).view_as(scores)
    precision = torch.promote_types(scores.dtype, torch.float32)
    weights = torch.softmax(scores, dim=-1, dtype=precision).to(value.dtype)
    result = torch.matmul(weights, value).view(rows, heads, tokens, size)
    return result.transpose(1, 2).contiguous(), None
