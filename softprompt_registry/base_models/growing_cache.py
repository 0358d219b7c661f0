"""Keys and values that grow in place.

The cache of transformers copies all that it holds with every new token. Here room is set aside once, new tokens are written
into it, and what the model gets are views of the part that is filled: the same numbers, without the copies.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from softprompt_registry.base_models.prefixes import PrefixRows


def growing_cache(rows: PrefixRows, room: int) -> Any:
    """The rows' keys and values as a transformers cache, with room for `room` more tokens.

    More than that may follow; then it is all copied once, into twice the room. Use it without gradients.
    """
    prefixes = rows.prefixes
    chosen = torch.tensor(rows.prompts, device=prefixes.keys[0].device)
    layers: list[Any] = []
    for keys, values in zip(prefixes.keys, prefixes.values, strict=True):
        layer: Any = GrowingLayer()  # type: ignore[no-untyped-call]
        layer.room = room
        layer.update(keys[chosen].to(prefixes.dtype), values[chosen].to(prefixes.dtype))
        layers.append(layer)
    return Cache(layers=layers)


class GrowingLayer(DynamicLayer):
    """`keys` and `values`, (B, H, N, D / heads), are views of the first N tokens of what is stored."""

    keys: torch.Tensor
    values: torch.Tensor
    room = 0
    """Tokens that will follow those of the first update."""
    _stored_keys: torch.Tensor
    _stored_values: torch.Tensor

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        before = self.get_seq_length()
        after = before + key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._store(key_states[:, :, :0], value_states[:, :, :0], after + self.room)
        elif after > self._stored_keys.shape[-2]:
            self._store(self.keys, self.values, 2 * after)
        self._stored_keys[:, :, before:after] = key_states
        self._stored_values[:, :, before:after] = value_states
        self._show(after)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        keys, values = self.keys[indices], self.values[indices]
        if len(indices) > len(self._stored_keys):
            self._store(keys, values, self._stored_keys.shape[-2])
            return
        # Written back into what is there already: asking the system for new memory takes longer.
        self._stored_keys, self._stored_values = (
            self._stored_keys[: len(indices)],
            self._stored_values[: len(indices)],
        )
        self._stored_keys[:, :, : keys.shape[-2]] = keys
        self._stored_values[:, :, : keys.shape[-2]] = values
        self._show(keys.shape[-2])

    def _store(self, keys: torch.Tensor, values: torch.Tensor, tokens: int) -> None:
        """Move what is held into new room for `tokens` tokens, those held included."""
        held = keys.shape[-2]
        self._stored_keys = keys.new_empty((*keys.shape[:2], tokens, keys.shape[3]))
        self._stored_values = values.new_empty((*values.shape[:2], tokens, values.shape[3]))
        self._stored_keys[:, :, :held] = keys
        self._stored_values[:, :, :held] = values
        self._show(held)

    def _show(self, tokens: int) -> None:
        self.keys = self._stored_keys[:, :, :tokens]
        self.values = self._stored_values[:, :, :tokens]
