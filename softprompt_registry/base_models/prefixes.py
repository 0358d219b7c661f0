"""Soft prompts as keys and values: worked out once for each prompt, used by every row that begins with it.

In a causal model the soft tokens do not see the text, so the rows of one prompt share all that the model computes for it; and
for the first tokens of the text too, where all rows have the same ones, such as BOS and the beginning of the template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from softprompt_registry.base_models.decoding import at_least_float32

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Prefixes:
    """Keys and values of G soft prompts, and of L first tokens of the text behind each, in every layer.

    Each tensor is (G, H, K + L, D / heads) with H key-value heads.
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    dtype: torch.dtype
    """The base model's dtype, in which it takes the tensors."""
    lead: tuple[int, ...] = ()
    """L token ids, with which each row's text begins."""

    @property
    def num_tokens(self) -> int:
        """K + L"""
        return int(self.keys[0].shape[2])

    def leaves(self) -> Prefixes:
        """The same numbers, cut off from how they were made, collecting gradients of their own.

        At least float32: the gradients of all rows add up here.
        """

        def leaf(tensor: torch.Tensor) -> torch.Tensor:
            return at_least_float32(tensor.detach()).requires_grad_()

        return replace(self, keys=tuple(map(leaf, self.keys)), values=tuple(map(leaf, self.values)))

    def backward_from(self, leaves: Prefixes) -> None:
        """Send the gradients that rows left in `leaves` on to the soft prompts."""
        import torch

        pairs = [
            (made, leaf.grad.to(made.dtype))
            for made, leaf in zip((*self.keys, *self.values), (*leaves.keys, *leaves.values), strict=True)
            if leaf.grad is not None
        ]
        torch.autograd.backward([made for made, _ in pairs], [gradient for _, gradient in pairs])

    def of_rows(self, prompts: Sequence[int]) -> PrefixRows:
        """Row i begins with prompt number `prompts[i]`."""
        return PrefixRows(self, tuple(prompts))


@dataclass(frozen=True)
class PrefixRows:
    """Which prompt each row of a batch begins with."""

    prefixes: Prefixes
    prompts: tuple[int, ...]

    def after_lead(self, texts: Sequence[Sequence[int]]) -> list[Sequence[int]]:
        """The rows' texts without the tokens that the prefixes hold already.

        Raises:
            ValueError: a text begins otherwise, or has no other tokens.
        """
        lead = list(self.prefixes.lead)
        if any(list(text[: len(lead)]) != lead or len(text) == len(lead) for text in texts):
            raise ValueError(
                f"each text must begin with the tokens {lead}, which its prefix holds, and have more after them"
            )
        return [text[len(lead) :] for text in texts]

    def cache(self) -> Any:
        """The rows' keys and values as a transformers cache, to be continued."""
        import torch
        from transformers import DynamicCache

        chosen, dtype = torch.tensor(self.prompts, device=self.prefixes.keys[0].device), self.prefixes.dtype
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(self.prefixes.keys, self.prefixes.values, strict=True)):
            cache.update(keys[chosen].to(dtype), values[chosen].to(dtype), layer)
        return cache


def shared_lead(texts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The first tokens that all texts have in common, at most all but the last one of the shortest."""
    if not texts:
        return ()
    first, last = min(map(list, texts)), max(map(list, texts))
    length = 0
    while length < min(map(len, texts)) - 1 and first[length] == last[length]:
        length += 1
    return tuple(first[:length])


def prefixes_in(cache: Any, lead: tuple[int, ...] = ()) -> Prefixes | None:
    """What a model left in its cache; None if it keeps none, or more or other things than all keys and values."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    if type(cache) is not DynamicCache or not all(type(layer) is DynamicLayer for layer in cache.layers):
        return None
    layers: list[Any] = list(cache.layers)
    keys, values = tuple(layer.keys for layer in layers), tuple(layer.values for layer in layers)
    return Prefixes(keys, values, keys[0].dtype, lead)
