"""Token by token: several rows in one batch, which each row may leave when it is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from softprompt_registry.errors import BaseModelError

if TYPE_CHECKING:
    import torch

ENDED_SHARE = 1 / 8
"""Share of a batch's rows that must have ended before they are removed, which copies the keys and values of the others."""


class Decodable(Protocol):
    """What a `RowDecoder` needs of a `BaseModel`."""

    model: Any

    @property
    def end_ids(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class JoinedBatch:
    """Soft tokens and text of B rows, ready for a forward pass. N = K + T, padded."""

    inputs_embeds: torch.Tensor
    """(B, N, D) in the base model's dtype."""
    attention_mask: torch.Tensor
    """(B, N) int64; 0 on padding."""
    position_ids: torch.Tensor
    """(B, N) int64; padding does not move the positions of real tokens."""
    cache: Any = None
    """Keys and values of what stands before these columns (soft tokens and L first tokens of the text), where that is not
    among `inputs_embeds`: then N = T - L there and in `position_ids`, and N = K + T in `attention_mask`. A forward pass adds
    to it: use it once."""


class RowDecoder:
    """Rows that are continued together, with their keys and values kept from step to step.

    `logits`: (B, V) float32, or float64 of a model in float64, for the next token of each row that is left.
    """

    logits: torch.Tensor

    def __init__(self, base_model: Decodable, joined: JoinedBatch) -> None:
        """Reads the rows, which are padded on the left, up to where they are to be continued."""
        self._model = base_model.model
        self._end_ids = frozenset(base_model.end_ids)
        self._mask = joined.attention_mask
        self._positions = joined.position_ids[:, -1:]
        self._run(inputs_embeds=joined.inputs_embeds, position_ids=joined.position_ids, past_key_values=joined.cache)

    def keep(self, rows: Sequence[int]) -> None:
        """Continue these rows alone, by their place among those that are left."""
        import torch

        chosen = torch.tensor(rows, device=self._mask.device)
        self._cache.batch_select_indices(chosen)
        self._mask, self._positions, self.logits = self._mask[chosen], self._positions[chosen], self.logits[chosen]

    def feed(self, tokens: Sequence[int]) -> None:
        """Append one token to each row."""
        import torch

        self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        self._positions = self._positions + 1
        ids = torch.tensor(tokens, device=self._mask.device)[:, None]
        self._run(input_ids=ids, position_ids=self._positions, past_key_values=self._cache)

    def greedy(self, max_new_tokens: int, *, keep_end: bool = False) -> list[list[int]]:
        """The most likely continuation of each row, up to an end token (left out unless `keep_end`) or the length cap.

        Returns:
            A list of token ids for each row that was left at the call. Afterwards the decoder is used up.
        """
        found: list[list[int]] = [[] for _ in self._mask]
        batch = list(range(len(found)))  # which row stands at each place of the batch
        ended = [False] * len(found)
        for step in range(max_new_tokens):
            tokens: list[int] = self.logits.argmax(dim=1).tolist()
            for row, token in zip(batch, tokens, strict=True):
                if not ended[row]:
                    ended[row] = token in self._end_ids
                    if keep_end or not ended[row]:
                        found[row].append(token)
            going_on = [place for place, row in enumerate(batch) if not ended[row]]
            if not going_on or step == max_new_tokens - 1:
                break
            if len(batch) - len(going_on) >= ENDED_SHARE * len(batch):
                self.keep(going_on)
                batch, tokens = [batch[place] for place in going_on], [tokens[place] for place in going_on]
            self.feed(tokens)
        return found

    def _run(self, **inputs: Any) -> None:
        import torch

        with torch.no_grad():
            output = self._model(attention_mask=self._mask, use_cache=True, logits_to_keep=1, **inputs)
        self._cache: Any = getattr(output, "past_key_values", None)
        if self._cache is None:
            raise BaseModelError(
                f"continuing texts token by token: the model type {self._model.config.model_type!r} keeps no keys and "
                "values; expected a transformer. Use another model here."
            )
        self.logits = at_least_float32(output.logits[:, -1])  # (B, V)


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
