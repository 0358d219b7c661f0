"""The fleet: many soft prompts tuned at once in slots, each as if it were alone.

A step takes one batch of every slot. Their rows share forward passes, sorted by length; each row begins with the soft prompt
of its own slot, whose keys and values are worked out once a step. A slot has its own optimizer, order of examples,
schedule, early stopping and best epoch, and when it is done the next task takes its place at once.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch

from softprompt_registry.base_models.compiling import compile_parts
from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.base_models.prefixes import shared_lead
from softprompt_registry.dod.task import Task
from softprompt_registry.soft_prompts.encoding import EncodedPair
from softprompt_registry.soft_prompts.performance import Trial, measure, soft_rows
from softprompt_registry.soft_prompts.progress import EncodedTask, Progress, begin, encode_task
from softprompt_registry.soft_prompts.token_budget import TokenBudget, pieces, tokens_that_fit
from softprompt_registry.soft_prompts.tuning_settings import TuningConfig

PREPARED_AHEAD = 2
"""Tasks whose text is made into token ids while others are tuned."""

MAX_UNTESTED_S = 60.0
"""A prompt that is done waits no longer for others to be tested together with it."""


@dataclass
class FleetStatistics:
    """What a fleet has done so far."""

    train_tokens: int = 0
    """Tokens of training rows, soft tokens counted in each row, padding not."""
    seconds: float = 0.0
    """Spent on training, validation and test."""
    halvings: int = 0
    """How often the memory did not suffice."""
    gpu_peak_mib: float = 0.0
    """Highest memory of a GPU in use, by this process."""

    @property
    def tokens_per_s(self) -> float:
        return self.train_tokens / self.seconds if self.seconds else 0.0


class Fleet:
    """Tunes tasks on one base model in this process.

    Args:
        memory_share: of the GPU's free memory, which others may want at the same time.
    """

    def __init__(self, base_model: BaseModel, config: TuningConfig, *, memory_share: float = 1.0) -> None:
        self.base_model = base_model
        self.config = config
        self.statistics = FleetStatistics()
        if config.compile:
            compile_parts(base_model)
        tokens = config.tokens_per_forward or tokens_that_fit(base_model, config.num_virtual_tokens, memory_share)
        self._budget = TokenBudget(tokens)

    def tune(
        self, tasks: Iterable[Task], on_epoch: Callable[[str, int], None] = lambda task, epoch: None
    ) -> Iterator[tuple[Progress, dict[str, float]]]:
        """Tune task after task; yields each with its test scores when it is done, or without any when it failed.

        A task whose loss becomes NaN or infinite ends there, with the reason in `Progress.failure`; the others go on.

        Args:
            tasks: drawn from when a slot is free, so they need not be in memory all at once.
            on_epoch: called with the name of a task and how many epochs it has behind it.
        """
        encoded = _ahead(partial(encode_task, self.base_model, task, self.config) for task in tasks)
        slots: list[Progress] = []
        done: list[Progress] = []
        waiting_since = 0.0
        while True:
            while len(slots) < self.config.slots and (next_task := next(encoded, None)) is not None:
                progress = begin(self.base_model, next_task, self.config)
                (done if progress.ended else slots).append(progress)
            started = time.perf_counter()
            if slots:
                self._step(slots)
                for slot in self._end_epochs(slots):
                    on_epoch(slot.task.name, slot.epoch)
                done += [slot for slot in slots if slot.ended]
                slots = [slot for slot in slots if not slot.ended]
            # Tests of several prompts together cost less; but what is done should soon be on the disk.
            finished: list[tuple[Progress, dict[str, float]]] = []
            if not done:
                waiting_since = started
            waited = started - waiting_since
            if done and (not slots or len(done) >= max(self.config.slots // 4, 1) or waited > MAX_UNTESTED_S):
                finished = list(zip(done, self._measure(done), strict=True))
                done = []
            self.statistics.seconds += time.perf_counter() - started
            self.statistics.halvings = self._budget.halvings
            if self.base_model.device.type == "cuda":
                self.statistics.gpu_peak_mib = torch.cuda.max_memory_allocated(self.base_model.device) / 2**20
            yield from finished
            if not slots and not done and not finished:
                return

    def _step(self, slots: Sequence[Progress]) -> None:
        """One batch of every slot."""
        for slot in slots:
            if not slot.batches:
                slot.begin_epoch(self.config)
        prompts = [slot.prompt for slot in slots]
        batches = [slot.batches[0] for slot in slots]

        def forget_gradients() -> None:
            for prompt in prompts:
                prompt.grad = None

        losses = self._budget.run(
            lambda tokens: train_step(self.base_model, prompts, batches, tokens), forget_gradients
        )
        for slot, loss in zip(slots, losses, strict=True):
            batch = slot.batches.popleft()
            self.statistics.train_tokens += sum(pair.num_tokens + self.config.num_virtual_tokens for pair in batch)
            if not math.isfinite(loss):
                slot.failure = f"its train loss became {loss} in epoch {slot.epoch + 1}"
                continue
            slot.step_losses.append(loss)
            slot.optimizer.step()
            slot.optimizer.zero_grad(set_to_none=True)

    def _end_epochs(self, slots: Sequence[Progress]) -> list[Progress]:
        """Validate the slots that have used up their batches; returns them."""
        ended = [slot for slot in slots if not slot.batches and slot.failure is None]
        if ended:
            losses = self._budget.run(lambda tokens: validation_losses(self.base_model, ended, tokens))
            for slot, loss in zip(ended, losses, strict=True):
                slot.end_epoch(loss, self.config)
        return ended

    def _measure(self, done: Sequence[Progress]) -> list[dict[str, float]]:
        """Scores on test pairs; none for what failed."""
        well = [progress for progress in done if progress.failure is None]
        trials = [
            Trial(
                progress.task,
                progress.best.to(self.base_model.device),
                [pair.prompt for pair in progress.test],
                progress.test_outputs,
            )
            for progress in well
        ]
        found = self._budget.run(
            lambda tokens: measure(
                self.base_model, trials, max_new_tokens=self.config.max_new_tokens, tokens_per_forward=tokens
            )
        )
        scores = {progress.task.name: score for progress, score in zip(well, found, strict=True)}
        return [scores.get(progress.task.name, {}) for progress in done]


def train_step(
    base_model: BaseModel,
    prompts: Sequence[torch.nn.Parameter],
    batches: Sequence[Sequence[EncodedPair]],
    tokens_per_forward: int,
) -> list[float]:
    """Leave in each prompt the gradient of its own mean token loss; returns those losses.

    loss_i = sum of -log p over the target tokens of prompt i / their number: neither padding, nor the other prompts, nor the
    cutting into pieces changes it.

    Args:
        prompts: G of (K, D).
        batches: the rows of each.
    """
    num_soft = prompts[0].shape[0]
    groups = math.ceil(len(prompts) * num_soft / max(tokens_per_forward, num_soft))
    if groups > 1:  # what is kept of the soft prompts themselves must fit too
        size = math.ceil(len(prompts) / groups)
        parts = [slice(start, start + size) for start in range(0, len(prompts), size)]
        steps = [train_step(base_model, prompts[part], batches[part], tokens_per_forward) for part in parts]
        return [loss for losses_of_part in steps for loss in losses_of_part]
    rows = [(i, pair) for i, batch in enumerate(batches) for pair in batch]
    num_tokens = [sum(len(pair.target) for pair in batch) for batch in batches]
    stacked = torch.stack(list(prompts))  # (G, K, D)
    losses = stacked.new_zeros(len(prompts))
    prefixes = base_model.prefixes(stacked, shared_lead([pair.prompt for _, pair in rows]))
    leaves = None if prefixes is None else prefixes.leaves()
    for piece in pieces(rows, lambda row: num_soft + row[1].num_tokens, tokens_per_forward):
        owners = [i for i, _ in piece]
        soft = torch.stack([prompts[i] for i in owners]) if leaves is None else leaves.of_rows(owners)
        scores = base_model.score_targets(soft, [pair.prompt for _, pair in piece], [pair.target for _, pair in piece])
        shares = scores.log_likelihood.new_tensor([1 / num_tokens[i] for i in owners])
        row_losses = -scores.log_likelihood * shares
        row_losses.sum().backward()
        losses.index_add_(0, torch.tensor(owners, device=losses.device), row_losses.detach().to(losses.dtype))
    if prefixes is not None and leaves is not None:
        prefixes.backward_from(leaves)
    found: list[float] = losses.tolist()
    return found


def validation_losses(
    base_model: BaseModel, progresses: Sequence[Progress], tokens_per_forward: int
) -> list[float | None]:
    """Mean -log p per target token of each task's validation pairs; None for a task without any."""
    rows = [(i, pair) for i, progress in enumerate(progresses) for pair in progress.validation]
    totals, counts = [0.0] * len(progresses), [0] * len(progresses)
    with torch.no_grad():
        prompts = [progress.prompt for progress in progresses]
        soft_of = soft_rows(base_model, prompts, [pair.prompt for _, pair in rows])
        for piece in pieces(rows, lambda row: prompts[0].shape[0] + row[1].num_tokens, tokens_per_forward):
            scores = base_model.score_targets(
                soft_of([i for i, _ in piece]), [p.prompt for _, p in piece], [p.target for _, p in piece]
            )
            for (i, pair), log_likelihood in zip(piece, scores.log_likelihood.tolist(), strict=True):
                totals[i] -= log_likelihood
                counts[i] += len(pair.target)
    return [total / count if count else None for total, count in zip(totals, counts, strict=True)]


def _ahead(making: Iterable[Callable[[], EncodedTask]]) -> Iterator[EncodedTask]:
    """What the calls return, in order; the next few are made in another thread meanwhile.

    They must not use torch: a second thread that does gets OpenMP threads of its own, and with more of those than processors
    OpenMP lets all of them sleep between operations, which made training on two cores a third slower.
    """
    with ThreadPoolExecutor(1) as thread:
        waiting: deque[Future[EncodedTask]] = deque()
        for make in making:
            waiting.append(thread.submit(make))
            if len(waiting) > PREPARED_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
