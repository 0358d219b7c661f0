"""Training a translator: LoRA on the base model, from (soft prompt, ground-truth text) pairs."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.base_models.reference import require_same_base
from softprompt_registry.dod.task import Task
from softprompt_registry.errors import ArtifactError, ConfigError, DataError
from softprompt_registry.fingerprints import SHORT, digest_of_json
from softprompt_registry.recording import NullRecorder, Recorder
from softprompt_registry.soft_prompts.bank import SoftPromptBank
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt
from softprompt_registry.storage import forget, locked, read_json, require_same_origin, write_json
from softprompt_registry.translators.translator import (
    Translator,
    TranslatorRecord,
    adapter_parameters,
    add_adapter,
    read_record,
    remove_adapter,
)

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TranslatorConfig:
    """How a translator is trained. Defaults are the paper's (section 4.3) where it has them."""

    lora_rank: int = 4
    """LoRA r (paper: 4)."""
    lora_alpha: int = 8
    """LoRA alpha (paper: 8)."""
    lora_dropout: float = 0.1
    """Dropout before the adapter (paper: 0.1)."""
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Layers that get an adapter (paper: these seven)."""
    learning_rate: float = 1e-4
    """AdamW's (paper: 1e-4)."""
    weight_decay: float = 0.1
    """AdamW's (paper: 0.1)."""
    schedule: str = "constant"
    """`constant`, or `cosine`: falling to zero over the epochs."""
    epochs: int = 5
    """Passes over the bank (paper: 5)."""
    batch_size: int = 16
    """Soft prompts per step (paper: 16)."""
    max_target_tokens: int = 300
    """Longer target texts are cut there (paper: 300)."""
    shuffle_labels: bool = True
    """Name the labels in a new order each epoch: their order is arbitrary, and a translator that learns it overfits."""
    noise: float = 0.0
    """Standard deviation of Gaussian noise on soft prompts, relative to that of all their values. Against overfitting."""
    validation_share: float = 0.1
    """Share of the training tasks whose loss is measured each epoch and never trained on (paper: 10 % of all)."""
    keep_best: bool = False
    """Keep the epoch with the lowest validation loss instead of the last."""
    checkpoint_every_epochs: int = 1
    """How often a checkpoint is written, from which a killed run goes on."""
    seed: int = 0
    """Of adapter initialisation, order, label shuffling, noise and dropout."""

    def __post_init__(self) -> None:
        for name in ("lora_rank", "epochs", "batch_size", "max_target_tokens", "checkpoint_every_epochs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"reading the translator settings: {name} is {getattr(self, name)}, expected >= 1.")
        if self.schedule not in ("constant", "cosine"):
            raise ConfigError(f"reading the translator settings: schedule is {self.schedule!r}; constant or cosine.")
        if not 0 <= self.validation_share < 1:
            raise ConfigError(
                f"reading the translator settings: validation_share {self.validation_share} is not in [0, 1)."
            )


@dataclass
class _State:
    """What a checkpoint holds."""

    epoch: int
    train_losses: list[float]
    validation_losses: list[float]
    best_loss: float = math.inf
    best_epoch: int = 0


def train_translator(
    base_model: BaseModel,
    bank: SoftPromptBank,
    tasks: Mapping[str, Task],
    config: TranslatorConfig,
    out: Path,
    *,
    recorder: Recorder | None = None,
) -> Translator:
    """Train on the bank's members among `tasks` and write the translator to `out`.

    Loss: cross-entropy of the target text and EOS after [soft tokens][BOS], summed over tokens and divided by their
    number. Paper: its classification translator was trained without EOS; ours learns where to end. Checkpoints are kept
    in `<out>.training`; a second start with the same bank and settings goes on from the last one and gives the same
    translator as an undisturbed run.

    Args:
        tasks: training tasks by name, each with its ground truth; members of the bank outside it are left out.

    Raises:
        BaseModelMismatch: bank and base model do not belong together.
        DataError: no task of the bank is in `tasks`, or one has no ground truth.
        ArtifactError: `out` holds a translator made from another bank or other settings.
        BusyError: another process trains into `out`.
    """
    import torch
    from peft import LoraConfig, TaskType

    recorder = recorder or NullRecorder()
    require_same_base("training a translator", "the bank", bank.base_model, "the loaded model", base_model.ref)
    names = [name for name in bank.records if name in tasks]
    if not names:
        raise DataError(
            f"training a translator: none of the bank's {len(bank)} soft prompts belongs to one of the {len(tasks)} "
            "training tasks. Tune the training tasks of the same DoD."
        )
    missing = [name for name in names if not tasks[name].ground_truth]
    if missing:
        raise DataError(
            f"training a translator: the tasks {missing[:5]} have no ground-truth hard prompt to learn from. "
            "Add hard_prompts to the DoD, or leave the tasks out."
        )
    held_out = _validation_names(names, config)
    soft_prompts = {name: bank.member(name) for name in names}
    learned = [[name, list(tasks[name].labels), list(tasks[name].hard_prompts)] for name in names]
    ref = base_model.ref
    made_from = digest_of_json([bank.digest, bank.dod_digest, learned, asdict(config), ref.fingerprint, ref.dtype])
    work = out.with_name(f"{out.name}.training")
    if out.exists():
        return _take_over(out, base_model, made_from, recorder)
    adapter_name = f"training_{digest_of_json([str(out), asdict(config)])[:SHORT]}"
    remove_adapter(base_model, adapter_name)
    lora = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.target_modules),
    )
    with locked(work):
        if out.exists():  # another process finished it just now
            forget(work)
            return _take_over(out, base_model, made_from, recorder)
        try:
            add_adapter(base_model, lora, adapter_name, seed=config.seed)
        except ValueError as error:
            raise ConfigError(
                f"training a translator: the adapter cannot be put on {base_model.ref} ({str(error)[:200]}). Set "
                "target_modules to names of its linear layers."
            ) from error
        parameters = adapter_parameters(base_model, adapter_name)
        optimizer = torch.optim.AdamW(parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay)
        record = TranslatorRecord(
            base_model=base_model.ref,
            num_virtual_tokens=int(bank.header["K"]),
            bank_digest=bank.digest,
            dod_name=bank.header.get("dod_name"),
            dod_digest=bank.dod_digest,
            train_tasks=tuple(names),
            training=asdict(config),
        )
        checkpoint = _Checkpoint(work, made_from)
        translator = Translator(base_model, record, adapter_name)
        try:
            state = checkpoint.load(parameters, optimizer) or _State(0, [], [])
            for epoch, (train, validation) in enumerate(zip(state.train_losses, state.validation_losses, strict=True)):
                _record_epoch(recorder, epoch, train, validation)
            with recorder.progress("train translator", config.epochs) as bar:
                bar.advance(state.epoch)
                for epoch in range(state.epoch, config.epochs):
                    train, validation = _epoch(
                        translator, soft_prompts, tasks, held_out, parameters, optimizer, config, epoch
                    )
                    if not (math.isfinite(train) and math.isfinite(validation)):
                        raise ArtifactError(
                            f"training a translator: in epoch {epoch + 1} the train loss became {train} and the validation "
                            f"loss {validation}; expected finite numbers. Lower the learning rate."
                        )
                    _record_epoch(recorder, epoch, train, validation)
                    state.train_losses.append(train)
                    state.validation_losses.append(validation)
                    state.epoch = epoch + 1
                    if validation < state.best_loss:
                        state.best_loss, state.best_epoch = validation, epoch + 1
                        checkpoint.save_best(parameters)
                    if state.epoch % config.checkpoint_every_epochs == 0:
                        checkpoint.save(parameters, optimizer, state)
                    bar.advance(1, f"loss {train:.3f}, held out {validation:.3f}")
        finally:
            for parameter in parameters.values():
                parameter.requires_grad_(False)
            base_model.model.eval()
            base_model.model.disable_adapters()
        kept_epoch = config.epochs
        if config.keep_best and held_out:
            checkpoint.load_best(parameters)
            kept_epoch = state.best_epoch
        translator.record = replace(
            record,
            training={
                **record.training,
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
        translator.save(out)
        forget(work)
    remove_adapter(base_model, adapter_name)
    return Translator.load(out, base_model)


def _take_over(out: Path, base_model: BaseModel, made_from: str, recorder: Recorder) -> Translator:
    """A finished translator, with its curve told once more."""
    finished = read_record(out).training
    require_same_origin("a translator", out, finished.get("made_from"), made_from)
    for epoch, losses in enumerate(zip(finished["train_losses"], finished["validation_losses"], strict=True)):
        _record_epoch(recorder, epoch, *losses)
    return Translator.load(out, base_model)


def target_text(task: Task, draw: random.Random | None) -> str:
    """What the translator should write: the label list in the order of `draw`, or one of the hard prompts."""
    if task.kind == "classification":
        labels = list(task.labels)
        if draw is not None:
            draw.shuffle(labels)
        return ", ".join(labels)
    return task.hard_prompts[0] if draw is None else draw.choice(task.hard_prompts)


def _validation_names(names: Sequence[str], config: TranslatorConfig) -> set[str]:
    # With few tasks a large share rounds up to all of them; one is left to train on.
    count = min(round(len(names) * config.validation_share), len(names) - 1)
    return set(random.Random(f"{config.seed}/validation").sample(sorted(names), count)) if count else set()


def _epoch(
    translator: Translator,
    soft_prompts: Mapping[str, SoftPrompt],
    tasks: Mapping[str, Task],
    held_out: set[str],
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    config: TranslatorConfig,
    epoch: int,
) -> tuple[float, float]:
    """One pass; returns (train loss, validation loss) in nats per token. Every random choice follows from the epoch."""
    import torch

    base = translator.base_model
    draw = random.Random(f"{config.seed}/{epoch}")
    order = [name for name in soft_prompts if name not in held_out]
    draw.shuffle(order)
    for settings in optimizer.param_groups:
        fall = 0.5 * (1 + math.cos(math.pi * epoch / config.epochs)) if config.schedule == "cosine" else 1.0
        settings["lr"] = config.learning_rate * fall
    spread = torch.stack([soft_prompts[name].embeddings for name in order]).std()
    total, count = 0.0, 0
    devices = [base.device] if base.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), translator.reading():
        torch.manual_seed(config.seed * 100_003 + epoch)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        base.model.train()
        for start in range(0, len(order), config.batch_size):
            batch = order[start : start + config.batch_size]
            soft = torch.stack([soft_prompts[name].embeddings for name in batch])  # (B, K, D)
            soft = soft + config.noise * spread * torch.randn(soft.shape)
            targets = [target_text(tasks[name], draw if config.shuffle_labels else None) for name in batch]
            loss, tokens = _summed_loss(base, soft, targets, config)
            (loss / tokens).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total, count = total + float(loss.detach()), count + tokens
        base.model.eval()
        validation = total / count
        if held_out:
            names = sorted(held_out)
            held_out_total, held_out_count = 0.0, 0
            with torch.no_grad():
                for start in range(0, len(names), config.batch_size):
                    batch = names[start : start + config.batch_size]
                    soft = torch.stack([soft_prompts[name].embeddings for name in batch])
                    loss, tokens = _summed_loss(base, soft, [target_text(tasks[name], None) for name in batch], config)
                    held_out_total, held_out_count = held_out_total + float(loss), held_out_count + tokens
            validation = held_out_total / held_out_count
    return total / count, validation


def _summed_loss(
    base: BaseModel, soft: torch.Tensor, targets: Sequence[str], config: TranslatorConfig
) -> tuple[torch.Tensor, int]:
    """-log p of all target tokens, EOS included, and their number. soft: (B, K, D)."""
    ids = [[*base.tokenize(text)[: config.max_target_tokens], base.eos_id] for text in targets]
    head = base.bos or ids[0][:0]
    scores = base.score_targets(soft.to(base.device), [head] * len(ids), ids)
    return -scores.log_likelihood.sum(), int(scores.num_tokens.sum())


def _record_epoch(recorder: Recorder, epoch: int, train: float, validation: float) -> None:
    recorder.metric("train_loss", train, step=epoch + 1)
    recorder.metric("validation_loss", validation, step=epoch + 1)


class _Checkpoint:
    """Adapter, optimizer moments and losses of the last whole epoch, as safetensors and JSON (no pickle)."""

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder
        self.key = key

    def save(
        self, parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, state: _State
    ) -> None:
        from safetensors.torch import save_file

        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in parameters.items():
            moments = optimizer.state[parameter]
            tensors[f"weight/{name}"] = parameter.detach().contiguous()
            tensors |= {f"{moment}/{name}": moments[moment] for moment in ("exp_avg", "exp_avg_sq", "step")}
        # The number of the epoch is part of the file name: JSON and tensors can never be of two epochs.
        file = f"epoch-{state.epoch}.safetensors"
        save_file(tensors, self.folder / f".{file}")
        (self.folder / f".{file}").rename(self.folder / file)
        previous = [path for path in self.folder.glob("epoch-*.safetensors") if path.name != file]
        write_json(self.folder / "state.json", {"key": self.key, "file": file, **asdict(state)})
        for path in previous:
            path.unlink()

    def load(self, parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> _State | None:
        """Put the last checkpoint of the same training in place; None if there is none."""
        from safetensors.torch import load_file

        stored = {}
        if (self.folder / "state.json").is_file():
            stored = read_json(self.folder / "state.json", "a training checkpoint")
        if stored.pop("key", None) != self.key:
            (self.folder / "best.safetensors").unlink(missing_ok=True)
            return None
        tensors = load_file(self.folder / stored.pop("file"))
        for name, parameter in parameters.items():
            parameter.data.copy_(tensors[f"weight/{name}"])
            moments: dict[str, Any] = {m: tensors[f"{m}/{name}"] for m in ("exp_avg", "exp_avg_sq", "step")}
            device = parameter.device
            optimizer.state[parameter] = {m: value if m == "step" else value.to(device) for m, value in moments.items()}
        return _State(**stored)

    def save_best(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        from safetensors.torch import save_file

        partial = self.folder / ".best.safetensors"
        save_file({name: parameter.detach().contiguous() for name, parameter in parameters.items()}, partial)
        partial.rename(self.folder / "best.safetensors")

    def load_best(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        from safetensors.torch import load_file

        path = self.folder / "best.safetensors"
        if not path.is_file():
            raise ArtifactError(f"finishing a translator: its best epoch {str(path)!r} is missing. Train it again.")
        for name, tensor in load_file(path).items():
            parameters[name].data.copy_(tensor)
