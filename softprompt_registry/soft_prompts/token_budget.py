"""How many tokens share a forward pass: as many as the memory takes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from softprompt_registry.base_models.frozen import BaseModel

ResultT = TypeVar("ResultT")
RowT = TypeVar("RowT")

CPU_TOKENS = 512
"""Measured: on two cores with 32 MiB of cache 512 to 1024 are fastest, 256 a tenth slower, 4096 half as fast."""
FREE_MEMORY_SHARE = 0.6
"""Of a GPU's free memory, for the pieces; the rest is for logits, prompts and what a longer row needs."""


def pieces(rows: Sequence[RowT], length: Callable[[RowT], int], tokens: int) -> Iterator[list[RowT]]:
    """Rows of similar length together, longest first; each piece has at most `tokens` with its padding, or one row.

    Args:
        length: tokens of a row.
    """
    ordered = sorted(rows, key=length, reverse=True)
    start = 0
    while start < len(ordered):
        size = max(tokens // max(length(ordered[start]), 1), 1)
        yield ordered[start : start + size]
        start += size


class TokenBudget:
    """Padded tokens of one forward pass, halved each time that the memory does not suffice."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.halvings = 0

    def run(self, work: Callable[[int], ResultT], undo: Callable[[], None] = lambda: None) -> ResultT:
        """`work(tokens)`, again with half of the tokens after each out-of-memory error.

        Args:
            undo: takes back what a failed try has left behind, such as gradients.
        """
        while True:
            try:
                return work(self.tokens)
            except Exception as error:
                if not is_out_of_memory(error) or self.tokens == 1:
                    raise
            # Outside of `except`: the error holds the frames, and with them the tensors, of the failed try.
            undo()
            self.tokens = max(self.tokens // 2, 1)
            self.halvings += 1
            _free_memory()


def is_out_of_memory(error: Exception) -> bool:
    """Whether a GPU or the machine had no memory left."""
    import torch

    said = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in said)


def tokens_that_fit(base_model: BaseModel, num_virtual_tokens: int, memory_share: float = 1.0) -> int:
    """A first guess at the budget: a fixed one on a CPU; on a GPU what one training pass takes, measured, says how many.

    A guess that is too high costs a failed try and no more (see `TokenBudget`).

    Args:
        memory_share: of a GPU's free memory, for several processes that begin on it together.
    """
    if base_model.device.type != "cuda":
        return CPU_TOKENS
    try:
        return _measured_tokens(base_model, num_virtual_tokens, memory_share)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    _free_memory()
    return CPU_TOKENS


def _measured_tokens(base_model: BaseModel, num_virtual_tokens: int, memory_share: float) -> int:
    import torch

    _free_memory()
    before = torch.cuda.memory_allocated(base_model.device)
    torch.cuda.reset_peak_memory_stats(base_model.device)
    rows, text = 8, list(base_model.bos) + [base_model.eos_id] * 63
    soft = base_model.input_embeddings[: num_virtual_tokens * rows].view(rows, num_virtual_tokens, -1).clone()
    scores = base_model.score_targets(soft.requires_grad_(), [text] * rows, [text[-4:]] * rows)
    scores.log_likelihood.sum().backward()
    taken = torch.cuda.max_memory_allocated(base_model.device) - before
    per_token = max(taken // (rows * (num_virtual_tokens + len(text) + 4)), 1)
    free, _ = torch.cuda.mem_get_info(base_model.device)
    return max(int(FREE_MEMORY_SHARE * memory_share * free / per_token), CPU_TOKENS)


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
