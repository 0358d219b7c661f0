"""Scores equal texts and targets after different beginnings: no prompt, a soft prompt, candidate texts.

The keys and values of a beginning, and of the first text tokens that all rows have in common, are worked out once; rows of
all conditions then share forward passes, sorted by length. In a pass the shorter beginnings are filled up on the right, and
the rows do not see what they are filled up with:

    keys and values of earlier passes               columns of this pass
    [soft tokens][BOS][first text tokens][filled]   [rest of the text][target][padding]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from softprompt_registry.base_models.decoding import JoinedBatch
from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.base_models.prefixes import Prefixes, shared_lead
from softprompt_registry.soft_prompts.token_budget import pieces

if TYPE_CHECKING:
    import torch

KEPT_TOKENS_PER_TOKEN = 16
"""So many tokens of which a row only keeps keys and values take the room of one that goes through the model."""


class Item(NamedTuple):
    """What follows the beginning in a row."""

    text: Sequence[int]
    """Token ids of the filled template, without BOS; at least one."""
    target: Sequence[int]
    """Token ids of the answer; at least one."""


class Row(NamedTuple):
    """One item under one condition, by their numbers."""

    condition: int
    item: int


@dataclass
class PassStatistics:
    """What has gone through the model."""

    tokens: int = 0
    padded_tokens: int = 0
    """Tokens of all rows, padding included."""
    target_tokens: int = 0
    """Positions whose logits were worked out."""


class Conditions:
    """Items after each of several beginnings. Use without gradients.

    Args:
        beginnings: C of (N, D), of different lengths N, which may be 0. BOS is in them, the text's is not in the items.
        tokens_per_forward: see `pieces`.
        statistics: counts on.
    """

    def __init__(
        self,
        base_model: BaseModel,
        beginnings: Sequence[torch.Tensor],
        items: Sequence[Item],
        tokens_per_forward: int,
        statistics: PassStatistics,
    ) -> None:
        self._base_model = base_model
        self.beginnings = beginnings
        self.items = items
        self._tokens = tokens_per_forward
        self._statistics = statistics
        lead = shared_lead([item.text for item in items])
        self._prefixes = self._shared(lead)
        self._lead = () if self._prefixes is None else lead

    def target_logits(self, conditions: Sequence[int]) -> Iterator[tuple[list[Row], torch.Tensor]]:
        """Next-token logits at the target positions of all items under these conditions.

        Yields:
            The rows of a pass, and (M, V) float32 (float64 of a model in float64): a row for each target token of the first
            of them, then of the next.
        """
        import torch

        for piece in self._passes(conditions):
            joined = self._joined(piece)
            num_columns = joined.inputs_embeds.shape[1]
            # Where the rest of the texts begins: behind whole beginnings, or at column 0 if those are kept apart.
            start = num_columns - max(self._rest(row) for row in piece)
            rows: list[int] = []
            columns: list[int] = []
            for place, row in enumerate(piece):
                text, target = self.items[row.item]
                first = start + len(text) - len(self._lead) - 1  # the token at column c is predicted from column c - 1
                rows += [place] * len(target)
                columns += range(first, first + len(target))
            self._statistics.tokens += sum(start + self._rest(row) for row in piece)
            self._statistics.padded_tokens += len(piece) * num_columns
            self._statistics.target_tokens += len(rows)
            device = self._base_model.device
            positions = torch.tensor(rows, device=device), torch.tensor(columns, device=device)
            yield piece, self._base_model.logits_at(joined, *positions)

    def _passes(self, conditions: Sequence[int]) -> Iterator[list[Row]]:
        numbers = range(len(self.items))
        if self._prefixes is not None:
            rows = [Row(condition, item) for condition in conditions for item in numbers]
            kept = self._prefixes.num_tokens // KEPT_TOKENS_PER_TOKEN
            yield from pieces(rows, lambda row: kept + self._rest(row), self._tokens)
            return
        for condition in conditions:  # rows of one pass begin alike
            rows = [Row(condition, item) for item in numbers]
            yield from pieces(rows, lambda row: len(self.beginnings[row.condition]) + self._rest(row), self._tokens)

    def _rest(self, row: Row) -> int:
        """Tokens of a row's text and target that its prefix does not hold."""
        text, target = self.items[row.item]
        return len(text) - len(self._lead) + len(target)

    def _joined(self, piece: Sequence[Row]) -> JoinedBatch:
        import torch

        items = [self.items[row.item] for row in piece]
        rest = [[*item.text[len(self._lead) :], *item.target] for item in items]
        conditions = [row.condition for row in piece]
        if self._prefixes is None:
            beginning = self.beginnings[conditions[0]]
            return self._base_model.join(beginning.expand(len(piece), -1, -1), rest, pad_side="right")
        joined = self._base_model.join(None, rest, pad_side="right")  # the columns of this pass alone
        lengths = [len(self.beginnings[condition]) + len(self._lead) for condition in conditions]
        longest = max(*lengths, 1)
        prefixes = replace(
            self._prefixes,
            keys=tuple(layer[:, :, :longest] for layer in self._prefixes.keys),
            values=tuple(layer[:, :, :longest] for layer in self._prefixes.values),
        )
        before = torch.tensor(lengths, device=self._base_model.device)[:, None]  # (B, 1)
        seen = torch.arange(longest, device=self._base_model.device) < before  # (B, longest)
        return JoinedBatch(
            joined.inputs_embeds,
            torch.cat([seen.long(), joined.attention_mask], dim=1),
            before + joined.position_ids,
            prefixes.of_rows(conditions).cache(),
        )

    def _shared(self, lead: Sequence[int]) -> Prefixes | None:
        """Keys and values of all beginnings with the lead behind them, each (C, H, longest, D / heads).

        Shorter ones are filled up on the right. None for a model that keeps other things than all keys and values, and
        where there is nothing to keep.
        """
        import torch

        first = embedded(self._base_model, lead)  # (L, D)
        whole = [torch.cat([beginning.to(first), first]) for beginning in self.beginnings]
        keys: list[torch.Tensor] = []
        values: list[torch.Tensor] = []
        made: Prefixes | None = None
        for piece in pieces([i for i in range(len(whole)) if len(whole[i])], lambda i: len(whole[i]), self._tokens):
            width = max(len(whole[i]) for i in piece)
            padded = torch.nn.utils.rnn.pad_sequence([whole[i] for i in piece], batch_first=True)  # (C', width, D)
            made = self._base_model.prefixes(padded)
            if made is None:
                return None
            if not keys:  # the first piece has the longest one
                keys, values = (
                    [layer.new_zeros(len(whole), *layer.shape[1:]) for layer in layers]
                    for layers in (made.keys, made.values)
                )
            for all_rows, rows in zip([*keys, *values], [*made.keys, *made.values], strict=True):
                all_rows[piece, :, :width] = rows
            self._statistics.tokens += sum(len(whole[i]) for i in piece)
            self._statistics.padded_tokens += len(piece) * width
        return None if made is None else replace(made, keys=tuple(keys), values=tuple(values))


def embedded(base_model: BaseModel, ids: Sequence[int]) -> torch.Tensor:
    """(N, D) input embeddings of N token ids, in the base model's dtype."""
    import torch

    return base_model.embed(torch.tensor(list(ids), dtype=torch.long)).detach()


def target_log_likelihoods(conditions: Conditions) -> list[list[float]]:
    """(C, n): mean log-likelihood per target token of each item under each condition, in nats."""
    import torch

    scores = [[0.0] * len(conditions.items) for _ in conditions.beginnings]
    for piece, logits in conditions.target_logits(range(len(conditions.beginnings))):
        targets = torch.tensor([token for row in piece for token in conditions.items[row.item].target])
        tokens = -torch.nn.functional.cross_entropy(logits, targets.to(logits.device), reduction="none")  # (M,)
        _fill(scores, conditions, piece, tokens)
    return scores


def negative_divergences(conditions: Conditions, *, reference: int) -> list[list[float]]:
    """(C, n): minus the mean over target positions of KL(p under `reference` || p under the condition), in nats.

    KL(p || q) = sum over the vocabulary of p (log p - log q)
    """
    import torch

    expected: dict[int, torch.Tensor] = {}  # by item, (target tokens, V)
    for piece, logits in conditions.target_logits([reference]):
        parts = logits.log_softmax(dim=1).split([len(conditions.items[row.item].target) for row in piece])
        expected |= {row.item: part for row, part in zip(piece, parts, strict=True)}
    scores = [[0.0] * len(conditions.items) for _ in conditions.beginnings]
    others = [number for number in range(len(conditions.beginnings)) if number != reference]
    for piece, logits in conditions.target_logits(others):
        log_p = torch.cat([expected[row.item] for row in piece])  # (M, V)
        terms = torch.nn.functional.kl_div(logits.log_softmax(dim=1), log_p, reduction="none", log_target=True)
        _fill(scores, conditions, piece, -terms.sum(dim=1))
    return scores


def _fill(scores: list[list[float]], conditions: Conditions, piece: Sequence[Row], tokens: torch.Tensor) -> None:
    """Put each row's mean of the (M,) values of its target tokens into its place."""
    values: list[float] = tokens.tolist()
    start = 0
    for row in piece:
        end = start + len(conditions.items[row.item].target)
        scores[row.condition][row.item] = fmean(values[start:end])
        start = end
