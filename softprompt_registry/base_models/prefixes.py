"""Soft prompts as keys and values: worked out once for each prompt, used by every row that begins with it.

In a causal model the soft tokens do not see the text, so the rows of one prompt share all that the model computes for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Prefixes:
    """Keys and values of G soft prompts in every layer.

    Each tensor is (G, H, K, D / heads) with H key-value heads.
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    dtype: torch.dtype
    """Of the base model, which takes the tensors in it."""

    @property
    def num_virtual_tokens(self) -> int:
        """K"""
        return int(self.keys[0].shape[2])

    def leaves(self) -> Prefixes:
        """The same numbers, cut off from how they were made, collecting gradients of their own.

        At least float32: the gradients of all rows add up here.
        """
        import torch

        def leaf(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32)).requires_grad_()

        return Prefixes(tuple(map(leaf, self.keys)), tuple(map(leaf, self.values)), self.dtype)

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

    def cache(self) -> Any:
        """The rows' keys and values as a transformers cache, to be continued."""
        import torch
        from transformers import DynamicCache

        chosen, dtype = torch.tensor(self.prompts, device=self.prefixes.keys[0].device), self.prefixes.dtype
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(zip(self.prefixes.keys, self.prefixes.values, strict=True)):
            cache.update(keys[chosen].to(dtype), values[chosen].to(dtype), layer)
        return cache


def prefixes_in(cache: Any) -> Prefixes | None:
    """What a model left in its cache; None if it keeps more or other things than all keys and values."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    if type(cache) is not DynamicCache or not all(type(layer) is DynamicLayer for layer in cache.layers):
        return None
    layers: list[Any] = list(cache.layers)
    keys, values = tuple(layer.keys for layer in layers), tuple(layer.values for layer in layers)
    return Prefixes(keys, values, keys[0].dtype)
