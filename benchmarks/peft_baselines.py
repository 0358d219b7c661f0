"""What a user would write instead of `tune_soft_prompts`: PEFT prompt tuning, one soft prompt after the other.

`with_trainer` is PEFT with transformers' `Trainer`, as PEFT's documentation shows it; `with_loop` is the loop that a careful
user writes by hand. Both take the rows, the initial embeddings, the settings and the order of examples that ours takes, so
that in float32 all three give the same losses and only the seconds differ. Neither stops early.

The base model is loaded once, outside; each task wraps it in a PEFT model of its own and drops that afterwards, which
costs no copy and no reload. What is timed is training and validation, from the making of the optimizer to the last
validation: not the wrapping, the encoding of rows, the copy in another dtype, nor the making of the `Trainer`.
"""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from measuring import clock
from peft import PeftModel, PromptTuningConfig, get_peft_model
from torch.utils.data import DataLoader, Sampler
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from softprompt_registry.base_models.frozen import BaseModel

IGNORED = -100
"""The label of a token that is no target, for transformers and PEFT alike."""

Row = tuple[list[int], list[int]]
"""Token ids of a prompt, BOS first, and of its target, EOS last."""


@dataclass(frozen=True)
class Rows:
    """One task as token ids."""

    name: str
    train: list[Row]
    validation: list[Row]
    """May be empty."""
    initial: torch.Tensor
    """(K, D): where the soft prompt starts."""


@dataclass(frozen=True)
class Settings:
    """How both baselines tune: AdamW without weight decay, at a constant learning rate, for all epochs."""

    epochs: int
    batch_size: int
    """Rows of a step, and of a validation batch."""
    learning_rate: float
    seed: int = 0
    """Of the order of examples, which is that of `tune_soft_prompts` with this seed."""


@dataclass(frozen=True)
class BaselineResult:
    """One tuned soft prompt."""

    task: str
    seconds: float
    """Of training and validation."""
    train_tokens: int
    """Tokens of all train rows in all epochs, K soft tokens per row included and padding left out."""
    final_train_loss: float
    """Mean over the steps of the last epoch; a step's loss is the mean -log p of its target tokens, in nats."""
    validation_losses: list[float]
    """Mean -log p of all target tokens of the validation rows, after each epoch."""
    embeddings: torch.Tensor
    """(K, D) float32, on the CPU: those of the last epoch."""


def with_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Rows],
    settings: Settings,
    *,
    dtype: torch.dtype | None = None,
) -> list[BaselineResult]:
    """PEFT and `Trainer`, with the defaults of `TrainingArguments` wherever they do not change the numbers.

    Two things differ from the defaults so that the numbers are those of the others: gradients are not clipped, and the
    order of examples is given. Validation collects no logits. The seconds are those of `Trainer.train()`. It sets the
    seeds of Python, NumPy and torch.

    Args:
        model: frozen by this, and left as it was otherwise.
        tasks: tuned one after the other.
        dtype: of the base model's weights and arithmetic; None for its own. Another one is applied to a copy.
    """
    base = _in_dtype(model, dtype)
    padding = _right_padding(tokenizer)
    return [_tune_with_trainer(base, padding, rows, settings) for rows in tasks]


def with_loop(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Rows],
    settings: Settings,
    *,
    dtype: torch.dtype | None = torch.bfloat16,
) -> list[BaselineResult]:
    """PEFT and a plain loop: base in bfloat16, soft prompt in float32, no waiting for the device but once per epoch.

    Args:
        model, tasks, dtype: as in `with_trainer`.
    """
    base = _in_dtype(model, dtype)
    pad_id = int(_right_padding(tokenizer).pad_token_id)
    return [_tune_with_loop(base, pad_id, rows, settings) for rows in tasks]


def check_same_loss(base_model: BaseModel, tasks: Sequence[Rows], rows_per_task: int = 8) -> float:
    """The largest difference between PEFT's loss and ours, in nats per target token.

    The first train rows of each task are scored with its initial embeddings: each row alone, and all of them padded to one
    batch. In float32 the difference is rounding, far below 1e-4; in bfloat16 it may be more, as PEFT projects all
    positions on the vocabulary and ours the targets alone.
    """
    largest = 0.0
    pad_id = int(_right_padding(base_model.tokenizer).pad_token_id)
    for rows in tasks:
        chosen = rows.train[:rows_per_task]
        with _prompt_tuned(base_model.model, rows.initial) as peft_model, torch.no_grad():
            for batch in [[row] for row in chosen] + [chosen]:
                inputs = _padded([_example(row) for row in batch], pad_id)
                theirs = peft_model(**_on_device(inputs, base_model.device)).loss
                soft = rows.initial.to(base_model.device).expand(len(batch), -1, -1)  # (B, K, D)
                scores = base_model.score_targets(
                    soft, [prompt for prompt, _ in batch], [target for _, target in batch]
                )
                ours = -scores.log_likelihood.sum() / scores.num_tokens.sum()
                largest = max(largest, abs(float(theirs - ours)))
    return largest


def _tune_with_trainer(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: Rows, settings: Settings
) -> BaselineResult:
    on_gpu = model.device.type == "cuda"
    with _prompt_tuned(model, rows.initial) as peft_model, tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=settings.batch_size,
            per_device_eval_batch_size=settings.batch_size,
            num_train_epochs=settings.epochs,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=0.0,
            eval_strategy="epoch" if rows.validation else "no",
            prediction_loss_only=True,
            logging_strategy="epoch",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            label_names=["labels"],
            dataloader_pin_memory=on_gpu,
            use_cpu=not on_gpu,
            seed=settings.seed,
        )
        trainer = _TrainerInGivenOrder(
            _orders(rows, settings),
            model=peft_model,
            args=arguments,
            train_dataset=[_example(row) for row in rows.train],
            eval_dataset=[_example(row) for row in rows.validation] or None,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
        )
        # It prints what it logs where there is no progress bar.
        trainer.remove_callback(PrinterCallback)
        started = clock(model.device)
        trainer.train()
        seconds = clock(model.device) - started
        train_losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return BaselineResult(
            rows.name,
            seconds,
            _train_tokens(rows, settings),
            float(train_losses[-1]),
            trainer.validation_losses,
            _embeddings_of(peft_model),
        )


class _TrainerInGivenOrder(Trainer):
    """A `Trainer` that takes the examples in a given order, and also reports the validation loss per token.

    Its own `eval_loss` is a mean over rows of the loss of their batch, which depends on the batches when targets differ in
    length.
    """

    def __init__(self, orders: list[list[int]], **settings: Any) -> None:
        super().__init__(**settings)
        self._given_orders = orders
        self._batch_losses: list[torch.Tensor] = []
        self.validation_losses: list[float] = []

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return _GivenOrders(self._given_orders)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        self._batch_losses = []
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        self.validation_losses.append(_mean_per_token(self._batch_losses))
        return metrics

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        assert loss is not None
        self._batch_losses.append(_sum_and_count(loss, inputs["labels"]))
        return loss, logits, labels


def _tune_with_loop(model: Any, pad_id: int, rows: Rows, settings: Settings) -> BaselineResult:
    device = model.device
    order = _GivenOrders(_orders(rows, settings))
    common: dict[str, Any] = {
        "batch_size": settings.batch_size,
        "collate_fn": lambda examples: _padded(examples, pad_id),
        "pin_memory": device.type == "cuda",
    }
    train: Any = DataLoader([_example(row) for row in rows.train], sampler=order, **common)  # type: ignore[arg-type]
    validation: Any = DataLoader([_example(row) for row in rows.validation], **common)  # type: ignore[arg-type]
    train_loss = 0.0
    validation_losses = []
    with _prompt_tuned(model, rows.initial) as peft_model:
        started = clock(device)
        prompt = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(prompt, lr=settings.learning_rate, weight_decay=0.0)
        for epoch in range(settings.epochs):
            order.set_epoch(epoch)
            step_losses = []
            for batch in train:
                loss = peft_model(**_on_device(batch, device), use_cache=False).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                step_losses.append(loss.detach())
            batch_losses = []
            with torch.no_grad():
                for batch in validation:
                    inputs = _on_device(batch, device)
                    batch_losses.append(_sum_and_count(peft_model(**inputs, use_cache=False).loss, inputs["labels"]))
            train_loss = float(torch.stack(step_losses).mean())
            if batch_losses:
                validation_losses.append(_mean_per_token(batch_losses))
        seconds = clock(device) - started
        embeddings = _embeddings_of(peft_model)
    return BaselineResult(rows.name, seconds, _train_tokens(rows, settings), train_loss, validation_losses, embeddings)


@contextmanager
def _prompt_tuned(model: Any, initial: torch.Tensor) -> Iterator[PeftModel]:
    """The model with a soft prompt (K, D) of PEFT's before it; afterwards it is as it was, but for being frozen.

    PEFT's prompt tuning keeps its embeddings beside the model and changes no module of it, so there is nothing to unload.
    `Trainer` puts it in training mode and turns its cache off.
    """
    training, use_cache = model.training, model.config.use_cache
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=initial.shape[0])
    peft_model = get_peft_model(model, config)
    weight = _prompt_of(peft_model)
    with torch.no_grad():
        weight.copy_(initial)
    trainable = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    assert len(trainable) == 1 and trainable[0] is weight and weight.dtype == torch.float32
    try:
        yield peft_model
    finally:
        model.train(training)
        model.config.use_cache = use_cache


def _prompt_of(peft_model: PeftModel) -> torch.nn.Parameter:
    """(K, D): the soft prompt itself."""
    encoders: Any = peft_model.prompt_encoder
    weight: torch.nn.Parameter = encoders[peft_model.active_adapter].embedding.weight
    return weight


def _embeddings_of(peft_model: PeftModel) -> torch.Tensor:
    return _prompt_of(peft_model).detach().float().cpu().clone()


def _in_dtype(model: PreTrainedModel, dtype: torch.dtype | None) -> Any:
    """The model itself where it has this dtype, else a copy in it.

    Only parameters are cast, as when a model is loaded in a dtype; `model.to(dtype)` would also round the frequencies of
    the rotary positions.
    """
    if dtype is None or model.dtype == dtype:
        return model
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _right_padding(tokenizer: PreTrainedTokenizerBase) -> Any:
    """A copy that pads on the right: on the left, padding would stand between soft prompt and text and move positions."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _example(row: Row) -> dict[str, list[int]]:
    """A row as transformers takes it: labels not shifted, the prompt masked out of them."""
    prompt, target = row
    ids = [*prompt, *target]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORED] * len(prompt) + target}


def _padded(examples: Sequence[dict[str, list[int]]], pad_id: int) -> dict[str, torch.Tensor]:
    """(B, T) int64 tensors, padded on the right to the longest example."""
    fill = {"input_ids": pad_id, "attention_mask": 0, "labels": IGNORED}
    longest = max(len(example["input_ids"]) for example in examples)
    return {
        name: torch.tensor([example[name] + [value] * (longest - len(example[name])) for example in examples])
        for name, value in fill.items()
    }


def _on_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def _sum_and_count(mean_loss: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(2,) float64 on the loss's device: the sum over the batch's target tokens, and their number."""
    count = (labels != IGNORED).sum().to(mean_loss.device, torch.float64)
    return torch.stack([mean_loss.double() * count, count])


def _mean_per_token(batches: Sequence[torch.Tensor]) -> float:
    total, count = torch.stack(list(batches)).sum(0).tolist()
    return float(total / count)


def _orders(rows: Rows, settings: Settings) -> list[list[int]]:
    """The order of the train rows in each epoch, drawn as `tune_soft_prompts` draws it."""
    draw = random.Random(f"{settings.seed}/{rows.name}")
    orders = []
    for _ in range(settings.epochs):
        order = list(range(len(rows.train)))
        draw.shuffle(order)
        orders.append(order)
    return orders


class _GivenOrders(Sampler[int]):
    """The order of each epoch, as told by `set_epoch`, which `Trainer` calls too."""

    def __init__(self, orders: list[list[int]]) -> None:
        self._orders = orders
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(self._orders[self._epoch])

    def __len__(self) -> int:
        return len(self._orders[0])


def _train_tokens(rows: Rows, settings: Settings) -> int:
    text = sum(len(prompt) + len(target) for prompt, target in rows.train)
    return settings.epochs * (text + len(rows.train) * rows.initial.shape[0])
