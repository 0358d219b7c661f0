"""One task on its way from its pairs to a soft prompt."""

from __future__ import annotations

import math
import random
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Literal

import torch

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.dod.task import Pair, PairSplit, Task
from softprompt_registry.fingerprints import digest_of_json
from softprompt_registry.soft_prompts.encoding import EncodedPair, RowEncoder, choose_pairs
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt, SoftPromptRecord
from softprompt_registry.soft_prompts.tuning_settings import TuningConfig


@dataclass(frozen=True)
class DodOrigin:
    """The DoD that tasks come from, where there is one."""

    name: str | None = None
    digest: str | None = None


@dataclass
class EncodedTask:
    """A task's pairs as token ids."""

    task: Task
    train: list[EncodedPair]
    validation: list[EncodedPair]
    test: list[EncodedPair]
    test_outputs: list[str]
    truncated: int
    """Inputs that had to be cut."""
    failure: str | None
    """Why the task cannot be tuned; None while all is well."""


@dataclass
class Progress(EncodedTask):
    """A task while it is being tuned, in a slot of a fleet."""

    prompt: torch.nn.Parameter
    initial: torch.Tensor
    optimizer: torch.optim.Optimizer
    order: random.Random
    best: torch.Tensor
    best_loss: float = math.inf
    best_epoch: int = 0
    train_losses: list[float] = field(default_factory=list)
    validation_losses: list[float] = field(default_factory=list)
    epoch: int = 0
    """Epochs that have ended."""
    batches: deque[list[EncodedPair]] = field(default_factory=deque)
    """What is left of the epoch."""
    step_losses: list[float] = field(default_factory=list)
    """Train losses of the epoch's steps."""
    stopped: bool = False

    @property
    def ended(self) -> bool:
        return self.stopped or self.failure is not None

    def begin_epoch(self, config: TuningConfig) -> None:
        rows = list(self.train)
        self.order.shuffle(rows)
        self.batches.extend(rows[i : i + config.batch_size] for i in range(0, len(rows), config.batch_size))
        for settings in self.optimizer.param_groups:
            settings["lr"] = scheduled_rate(config.learning_rate, config.schedule, self.epoch, config.epochs)

    def end_epoch(self, validation_loss: float | None, config: TuningConfig) -> None:
        """Keep the best epoch; stop a task that has not improved for long enough, or whose loss is no number."""
        self.epoch += 1
        self.train_losses.append(sum(self.step_losses) / len(self.step_losses))
        self.step_losses.clear()
        loss = self.train_losses[-1] if validation_loss is None else validation_loss
        if not math.isfinite(loss):
            self.failure = f"its validation loss became {loss} in epoch {self.epoch}"
            return
        if not bool(self.prompt.isfinite().all()):
            self.failure = f"its soft prompt became NaN or infinite in epoch {self.epoch}"
            return
        self.validation_losses.append(loss)
        if loss < self.best_loss:
            self.best_loss, self.best_epoch = loss, self.epoch
            self.best = self.prompt.detach().float().cpu().clone()
        elif config.patience_epochs is not None and self.epoch - self.best_epoch >= config.patience_epochs:
            self.stopped = True
        self.stopped = self.stopped or self.epoch == config.epochs


def prepare(base_model: BaseModel, task: Task, config: TuningConfig) -> Progress:
    """A task's pairs as token ids, and a soft prompt at its start with an optimizer of its own."""
    return begin(base_model, encode_task(base_model, task, config), config)


def encode_task(base_model: BaseModel, task: Task, config: TuningConfig) -> EncodedTask:
    """The pairs that the settings choose, as token ids. Without any torch, so it can run beside the training."""
    room = min(config.max_sequence_tokens, base_model.max_positions) - config.num_virtual_tokens
    chosen: dict[PairSplit, list[Pair]] = {
        "train": choose_pairs(task, "train", config.max_train_pairs, config.seed),
        "validation": choose_pairs(task, "validation", config.max_validation_pairs, config.seed),
        "test": choose_pairs(task, "test", config.max_test_pairs, config.seed),
    }
    encoder = RowEncoder.of_new_prompts(base_model)
    encoded: dict[PairSplit, list[EncodedPair]] = {}
    truncated = 0
    for split, pairs in chosen.items():
        rows = [encoder.pair(task.template, pair, room) for pair in pairs]
        encoded[split] = [row for row, _ in rows]
        truncated += sum(cut for _, cut in rows)
    longest = config.num_virtual_tokens + max(row.num_tokens for rows in encoded.values() for row in rows)
    failure = None
    if longest > base_model.max_positions:
        failure = (
            f"its longest row has {longest} tokens, soft ones included, although its input was cut; the base model takes "
            f"{base_model.max_positions}"
        )
    return EncodedTask(
        task=task,
        train=encoded["train"],
        validation=encoded["validation"],
        test=encoded["test"],
        test_outputs=[pair.output for pair in chosen["test"]],
        truncated=truncated,
        failure=failure,
    )


def begin(base_model: BaseModel, encoded: EncodedTask, config: TuningConfig) -> Progress:
    """The soft prompt at its start, with an optimizer of its own."""
    initial = initial_embeddings(base_model, config, encoded.task)
    precision = torch.promote_types(torch.float32, base_model.dtype)
    prompt = torch.nn.Parameter(initial.to(base_model.device, precision, copy=True))
    return Progress(
        **vars(encoded),
        prompt=prompt,
        initial=initial,
        optimizer=torch.optim.AdamW([prompt], lr=config.learning_rate, weight_decay=0.0),
        order=random.Random(f"{config.seed}/{encoded.task.name}"),
        best=initial.clone(),
    )


def initial_embeddings(base_model: BaseModel, config: TuningConfig, task: Task) -> torch.Tensor:
    """(K, D) float32: embeddings of K tokens drawn from the vocabulary, as the model reads them.

    Special tokens are left out, and so are rows of the matrix that belong to no token: many models pad it with those.
    """
    seed = config.seed
    if config.init == "own_vocabulary":
        seed = int(digest_of_json([config.seed, task.name])[:8], 16)
    generator = torch.Generator().manual_seed(seed)
    special, known = set(base_model.tokenizer.all_special_ids), len(base_model.tokenizer)
    order = torch.randperm(base_model.ref.vocab_size, generator=generator).tolist()
    chosen = [token for token in order if token < known and token not in special][: config.num_virtual_tokens]
    return base_model.embed(torch.tensor(chosen)).detach().float().cpu().clone()


def scheduled_rate(rate: float, schedule: Literal["constant", "cosine"], epoch: int, epochs: int) -> float:
    """The learning rate of an epoch, which counts from 0: constant, or falling to zero along a cosine."""
    return rate * (0.5 * (1 + math.cos(math.pi * epoch / epochs)) if schedule == "cosine" else 1.0)


def finished_prompt(
    base_model: BaseModel,
    progress: Progress,
    config: TuningConfig,
    measured: dict[str, float],
    origin: DodOrigin,
) -> SoftPrompt:
    """The soft prompt of the best epoch, with the record of how it was made."""
    task = progress.task
    encoder = RowEncoder.of_new_prompts(base_model)
    record = SoftPromptRecord(
        task=task.name,
        kind=task.kind,
        base_model=base_model.ref,
        template=task.template,
        labels=task.labels,
        task_digest=task.digest,
        dod_name=origin.name,
        dod_digest=origin.digest,
        ground_truth=task.ground_truth,
        tuning={
            **asdict(config),
            "best_epoch": progress.best_epoch,
            "num_train_pairs": len(progress.train),
            "num_validation_pairs": len(progress.validation),
            "num_truncated_inputs": progress.truncated,
            "train_losses": progress.train_losses,
            "validation_losses": progress.validation_losses,
        },
        metrics={"validation_loss": progress.best_loss, **measured},
        layout=encoder.layout,
        encoding=encoder.encoding,
    )
    return SoftPrompt(progress.best, progress.initial, record)
