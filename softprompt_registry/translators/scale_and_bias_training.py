"""Training a scale and bias: 2·D numbers, from (soft prompt, ground-truth text) pairs.

It learns as `train_translator` does: from the same target texts, in the same order, with the same tasks held out under the
same seed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.base_models.reference import require_same_base
from softprompt_registry.dod.task import Task
from softprompt_registry.errors import ArtifactError, ConfigError, DataError
from softprompt_registry.fingerprints import digest_of_json
from softprompt_registry.processes import ALONE
from softprompt_registry.recording import NullRecorder, Recorder
from softprompt_registry.soft_prompts.bank import SoftPromptBank
from softprompt_registry.storage import forget, require_same_origin
from softprompt_registry.translators.scale_and_bias import ScaleAndBias, read_record
from softprompt_registry.translators.training import (
    Checkpoint,
    TrainingState,
    held_by_main,
    record_epoch,
    target_text,
    validation_names,
)
from softprompt_registry.translators.translator import TranslatorRecord

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ScaleAndBiasConfig:
    """How a scale and bias is trained. The paper has none. A setting means what it means in `TranslatorConfig`."""

    learning_rate: float = 1e-2
    """AdamW's. A step moves the scale by about this much, the bias by this much of the soft prompts' standard deviation."""
    weight_decay: float = 0.0
    """AdamW's; it pulls towards soft tokens that are read as they are."""
    schedule: str = "constant"
    """`constant`, or `cosine`: falling to zero over the epochs."""
    epochs: int = 20
    """Passes over the bank."""
    batch_size: int = 16
    """Soft prompts per step."""
    micro_batch_size: int | None = None
    """Soft prompts per forward pass, whose gradients add up to the step's: less memory, and the same result up to rounding.
    None takes all at once. It may differ from start to start of one training."""
    max_target_tokens: int = 300
    """Longer target texts are cut there."""
    shuffle_labels: bool = True
    """Name the labels in a new order each epoch."""
    noise: float = 0.0
    """Standard deviation of Gaussian noise on soft prompts, relative to that of all their values."""
    validation_share: float = 0.1
    """Share of the training tasks whose loss is measured each epoch and never trained on."""
    keep_best: bool = True
    """Keep the epoch with the lowest validation loss instead of the last."""
    checkpoint_every_epochs: int = 1
    """How often a checkpoint is written, from which a killed run goes on."""
    seed: int = 0
    """Of order, label shuffling and noise."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "micro_batch_size", "max_target_tokens", "checkpoint_every_epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"reading the scale-and-bias settings: {name} is {value}, expected >= 1.")
        if self.schedule not in ("constant", "cosine"):
            raise ConfigError(
                f"reading the scale-and-bias settings: schedule is {self.schedule!r}; constant or cosine."
            )
        if not 0 <= self.validation_share < 1:
            raise ConfigError(
                f"reading the scale-and-bias settings: validation_share {self.validation_share} is not in [0, 1)."
            )

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that make another result of the same inputs. How a step is divided does not."""
        return {name: value for name, value in asdict(self).items() if name != "micro_batch_size"}


def train_scale_and_bias(
    base_model: BaseModel,
    bank: SoftPromptBank,
    tasks: Mapping[str, Task],
    config: ScaleAndBiasConfig,
    out: Path,
    *,
    recorder: Recorder | None = None,
) -> ScaleAndBias:
    """Train on the bank's members among `tasks` and write the result to `out`.

    Loss: cross-entropy of the target text and EOS after [scale * soft + bias][BOS], summed over tokens and divided by their
    number. Training begins at scale 1 and bias 0, where the soft tokens are read as they are. Checkpoints are kept in
    `<out>.training`; a second start with the same bank and settings goes on from the last one and gives the same result
    as an undisturbed run.

    Args:
        tasks: training tasks by name, each with its ground truth; members of the bank outside it are left out.

    Raises:
        BaseModelMismatch: bank and base model do not belong together.
        DataError: no task of the bank is in `tasks`, or one has no ground truth.
        ArtifactError: `out` holds one made from another bank or other settings, or the losses are no numbers any more.
        BusyError: another process trains into `out`.
    """
    recorder = recorder or NullRecorder()
    require_same_base("training a scale and bias", "the bank", bank.base_model, "the loaded model", base_model.ref)
    names = _names_to_learn(bank, tasks)
    soft_prompts = {name: bank.member(name).embeddings for name in names}
    # Drawn as for a translator, so that both are measured on the same tasks.
    held_out = validation_names(names, config.validation_share, config.seed)
    learned = [[name, list(tasks[name].labels), list(tasks[name].hard_prompts)] for name in names]
    ref = base_model.ref
    made_from = digest_of_json(
        ["scale and bias", bank.digest, bank.dod_digest, learned, config.identity, ref.fingerprint, ref.dtype]
    )
    work = out.with_name(f"{out.name}.training")
    with held_by_main(out, work, ALONE) as finished:
        if finished:
            return _take_over(out, base_model, made_from, recorder)
        training = _Training(base_model, soft_prompts, tasks, held_out, config)
        checkpoint = Checkpoint(work, made_from)
        state = checkpoint.load(training.change, training.optimizer) or TrainingState(0, [], [])
        for epoch, (train, validation) in enumerate(zip(state.train_losses, state.validation_losses, strict=True)):
            record_epoch(recorder, epoch, train, validation)
        with recorder.progress("train scale and bias", config.epochs) as bar:
            bar.advance(state.epoch)
            for epoch in range(state.epoch, config.epochs):
                train, validation = training.epoch(epoch)
                if not (math.isfinite(train) and math.isfinite(validation)):
                    raise ArtifactError(
                        f"training a scale and bias: in epoch {epoch + 1} the train loss became {train} and the validation "
                        f"loss {validation}; expected finite numbers. Lower the learning rate."
                    )
                record_epoch(recorder, epoch, train, validation)
                state.train_losses.append(train)
                state.validation_losses.append(validation)
                state.epoch = epoch + 1
                if validation < state.best_loss:
                    state.best_loss, state.best_epoch = validation, epoch + 1
                    checkpoint.save_best(training.change)
                if state.epoch % config.checkpoint_every_epochs == 0:
                    checkpoint.save(training.change, training.optimizer, state)
                bar.advance(1, f"loss {train:.3f}, held out {validation:.3f}")
        kept_epoch = config.epochs
        if config.keep_best and held_out:
            checkpoint.load_best(training.change)
            kept_epoch = state.best_epoch
        record = TranslatorRecord(
            base_model=ref,
            num_virtual_tokens=int(bank.header["K"]),
            bank_digest=bank.digest,
            dod_name=bank.header.get("dod_name"),
            dod_digest=bank.dod_digest,
            train_tasks=tuple(names),
            training={
                **asdict(config),
                "made_from": made_from,
                "validation_tasks": sorted(held_out),
                "train_losses": state.train_losses,
                "validation_losses": state.validation_losses,
                "kept_epoch": kept_epoch,
            },
            metrics={
                "train_loss": state.train_losses[kept_epoch - 1],
                "validation_loss": state.validation_losses[kept_epoch - 1],
            },
        )
        ScaleAndBias(base_model, record, *training.scale_and_bias()).save(out)
        forget(work)
    return ScaleAndBias.load(out, base_model)


def _names_to_learn(bank: SoftPromptBank, tasks: Mapping[str, Task]) -> list[str]:
    names = [name for name in bank.tasks() if name in tasks]
    if not names:
        raise DataError(
            f"training a scale and bias: none of the bank's {len(bank)} soft prompts belongs to one of the {len(tasks)} "
            "training tasks. Tune the training tasks of the same DoD."
        )
    missing = [name for name in names if not tasks[name].ground_truth]
    if missing:
        raise DataError(
            f"training a scale and bias: the tasks {missing[:5]} have no ground-truth hard prompt to learn from. "
            "Add hard_prompts to the DoD, or leave the tasks out."
        )
    return names


def _take_over(out: Path, base_model: BaseModel, made_from: str, recorder: Recorder) -> ScaleAndBias:
    """A finished one, with its curve told once more."""
    finished = read_record(out).training
    require_same_origin("a scale and bias", out, finished.get("made_from"), made_from)
    for epoch, losses in enumerate(zip(finished["train_losses"], finished["validation_losses"], strict=True)):
        record_epoch(recorder, epoch, *losses)
    return ScaleAndBias.load(out, base_model)


class _Training:
    """What is trained, and one epoch of it.

    `change`: the parameters `scale` and `bias`, (D,) float32 each, as their distance from reading soft tokens as they are,
    with the bias in units of the soft prompts' standard deviation: one learning rate then fits all base models, and
    weight decay pulls towards no change.
    """

    def __init__(
        self,
        base_model: BaseModel,
        soft_prompts: Mapping[str, torch.Tensor],
        tasks: Mapping[str, Task],
        held_out: set[str],
        config: ScaleAndBiasConfig,
    ) -> None:
        """soft_prompts: (K, D) float32 by the name of the task."""
        import torch

        self.base_model, self.soft_prompts, self.tasks, self.config = base_model, soft_prompts, tasks, config
        self.held_out = sorted(held_out)
        self.names = [name for name in soft_prompts if name not in held_out]
        self.spread = float(torch.stack([soft_prompts[name] for name in self.names]).std())
        size = base_model.ref.hidden_size
        self.change = {
            name: torch.nn.Parameter(torch.zeros(size, device=base_model.device)) for name in ("scale", "bias")
        }
        self.optimizer = torch.optim.AdamW(
            self.change.values(), lr=config.learning_rate, weight_decay=config.weight_decay
        )

    def scale_and_bias(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(D,) and (D,), without gradients."""
        return 1 + self.change["scale"].detach(), self.spread * self.change["bias"].detach()

    def epoch(self, epoch: int) -> tuple[float, float]:
        """One pass; returns (train loss, validation loss) in nats per token. Random choices follow from seed and epoch."""
        import torch

        config = self.config
        draw = random.Random(f"{config.seed}/{epoch}")
        order = list(self.names)
        draw.shuffle(order)
        for settings in self.optimizer.param_groups:
            fall = 0.5 * (1 + math.cos(math.pi * epoch / config.epochs)) if config.schedule == "cosine" else 1.0
            settings["lr"] = config.learning_rate * fall
        noise_draw = torch.Generator().manual_seed(config.seed * 100_003 + epoch)
        total, count = 0.0, 0
        for batch in _slices(order, config.batch_size):
            soft = torch.stack([self.soft_prompts[name] for name in batch])  # (B, K, D)
            soft = soft + config.noise * self.spread * torch.randn(soft.shape, generator=noise_draw)
            ids = self._target_ids(batch, draw if config.shuffle_labels else None)
            tokens = sum(map(len, ids))
            for rows in _slices(range(len(batch)), config.micro_batch_size or len(batch)):
                loss = self._summed_loss(soft[rows], [ids[row] for row in rows])
                (loss / tokens).backward()
                total += float(loss.detach())
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            count += tokens
        train = total / count
        held_out_total, held_out_count = 0.0, 0
        with torch.no_grad():
            for batch in _slices(self.held_out, config.micro_batch_size or config.batch_size):
                ids = self._target_ids(batch, None)
                soft = torch.stack([self.soft_prompts[name] for name in batch])
                held_out_total += float(self._summed_loss(soft, ids))
                held_out_count += sum(map(len, ids))
        return train, held_out_total / held_out_count if self.held_out else train

    def _target_ids(self, names: Sequence[str], draw: random.Random | None) -> list[list[int]]:
        """The tokens to learn of each task's target text, EOS included."""
        base = self.base_model
        texts = [target_text(self.tasks[name], draw) for name in names]
        return [[*base.tokenize(text)[: self.config.max_target_tokens], base.eos_id] for text in texts]

    def _summed_loss(self, soft: torch.Tensor, ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """-log p of all target tokens, as a scalar. soft: (B, K, D); ids: B rows."""
        base = self.base_model
        read = (1 + self.change["scale"]) * soft.to(base.device) + self.spread * self.change["bias"]
        return -base.score_targets(read, [base.bos] * len(ids), ids).log_likelihood.sum()


def _slices(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
