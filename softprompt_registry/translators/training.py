"""Training a translator: LoRA on the base model, from (soft prompt, ground-truth text) pairs."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.base_models.layers import linear_layers
from softprompt_registry.base_models.reference import require_same_base
from softprompt_registry.config import PositiveShare, settings
from softprompt_registry.dod.task import Task
from softprompt_registry.errors import ArtifactError, DataError
from softprompt_registry.fingerprints import SHORT, digest_of_json
from softprompt_registry.processes import ALONE, Processes
from softprompt_registry.recording import NullRecorder, Recorder
from softprompt_registry.soft_prompts.bank import SoftPromptBank
from softprompt_registry.soft_prompts.progress import scheduled_rate
from softprompt_registry.storage import forget, locked, require_same_origin
from softprompt_registry.translators.adapting import adapter_in_training, add_untrained_adapter
from softprompt_registry.translators.checkpoint import Checkpoint, TrainingState
from softprompt_registry.translators.translator import Translator, TranslatorRecord, read_record, remove_adapter

LLAMA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@settings
class TranslatorConfig:
    """How a translator is trained. Defaults are the paper's (section 4.3) where it has them."""

    lora_rank: PositiveInt = 4
    """LoRA r (paper: 4)."""
    lora_alpha: PositiveInt = 8
    """LoRA alpha (paper: 8)."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Dropout before the adapter (paper: 0.1)."""
    target_modules: tuple[str, ...] | None = None
    """Names of the layers that get an adapter. None takes all linear layers but the head: of a Llama `q_proj`, `k_proj`,
    `v_proj`, `o_proj`, `gate_proj`, `up_proj` and `down_proj` (paper: these seven)."""
    learning_rate: PositiveFloat = 1e-4
    """Learning rate of AdamW (paper: 1e-4)."""
    weight_decay: NonNegativeFloat = 0.1
    """Weight decay of AdamW (paper: 0.1)."""
    schedule: Literal["constant", "cosine"] = "constant"
    """`constant`, or `cosine`: falling to zero over the epochs."""
    epochs: PositiveInt = 5
    """Passes over the bank (paper: 5)."""
    batch_size: PositiveInt = 16
    """Soft prompts per step (paper: 16)."""
    micro_batch_size: PositiveInt | None = None
    """Soft prompts per forward pass, whose gradients add up to the step's: less memory, and the same translator up to
    rounding and dropout masks. None takes all at once. It may differ from start to start of one training."""
    max_target_tokens: PositiveInt = 300
    """Longer target texts are cut there (paper: 300)."""
    shuffle_labels: bool = True
    """Name the labels in a new order each epoch: their order is arbitrary, and a translator that learns it overfits."""
    noise: NonNegativeFloat = 0.0
    """Standard deviation of Gaussian noise on soft prompts, relative to that of all their values. Against overfitting."""
    train_share: PositiveShare = 1.0
    """Train on this share of the training tasks only, drawn by the seed (paper, section 5.1.1: 12, 25 and 50 %). A smaller
    share lies within a larger one, and the tasks held out for validation are the same at every share."""
    max_hard_prompts: PositiveInt | None = None
    """Hard prompts of each task that are learned, the first ones. None takes all."""
    validation_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the training tasks whose loss is measured each epoch and never trained on (paper: 10 % of all)."""
    keep_best: bool = False
    """Keep the epoch with the lowest validation loss instead of the last."""
    checkpoint_every_epochs: PositiveInt = 1
    """Epochs between two checkpoints, from which a killed run resumes."""
    seed: int = 0
    """Seed for adapter initialisation, order, label shuffling, noise and dropout."""

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that make another translator of the same inputs. How a step is divided does not.

        Settings that came later count where they are set: what was begun before them is taken over. So is what was begun
        when the layers of a Llama were the default of all models.
        """
        later = {"train_share": 1.0, "max_hard_prompts": None}
        settings = {name: value for name, value in asdict(self).items() if name != "micro_batch_size"}
        settings["target_modules"] = self.target_modules or LLAMA_LAYERS
        return {name: value for name, value in settings.items() if name not in later or value != later[name]}


def train_translator(
    base_model: BaseModel,
    bank: SoftPromptBank,
    tasks: Mapping[str, Task],
    config: TranslatorConfig,
    out: Path,
    *,
    recorder: Recorder | None = None,
    processes: Processes = ALONE,
) -> Translator:
    """Train on the bank's members among `tasks` and write the translator to `out`.

    Loss: cross-entropy of the target text and EOS after [soft tokens][BOS], summed over tokens and divided by their
    number. Paper: its classification translator was trained without EOS; ours learns where to end. Checkpoints are kept
    in `<out>.training`; a second start with the same bank and settings resumes from the last one and gives the same
    translator as an undisturbed run.

    Several processes divide the soft prompts of each step among them and sum their gradients. They give the translator
    that one process gives, up to rounding: order, labels and noise are drawn for the whole batch in each. Dropout masks
    are drawn for the rows of a process, so with `lora_dropout` the number of processes changes them, as another seed
    would. A training may resume with another number of processes.

    Args:
        tasks: training tasks by name, each with its ground truth; members of the bank outside it are left out.
        recorder: receives the curves, from the main process alone.
        processes: all of them make this call with the same arguments and, on GPUs, a base model each on its own. The main
            process writes `out` and the checkpoints, and the others read them: the folder must be one that all can see.

    Raises:
        BaseModelMismatch: bank and base model do not belong together.
        DataError: no task of the bank is in `tasks`, or one has no ground truth.
        ConfigError: the base model lacks some of the target modules.
        ArtifactError: `out` holds a translator made from another bank or other settings, a loss became NaN or
            infinite, or the processes do not see the same checkpoint.
        BusyError: another process trains into `out`.
    """
    if recorder is None or not processes.is_main:
        recorder = NullRecorder()
    require_same_base("training a translator", "the bank", bank.base_model, "the loaded model", base_model.ref)
    lessons = _lessons(bank, tasks, config)
    if config.target_modules is None:
        config = replace(config, target_modules=tuple(linear_layers(base_model)))
    made_from = _origin(base_model, bank, lessons, config)
    work = out.with_name(f"{out.name}.training")
    adapter_name = f"training_{digest_of_json([str(out), config.identity])[:SHORT]}"
    remove_adapter(base_model, adapter_name)
    with held_by_main(out, work, processes) as finished:
        if finished:
            return _take_over(out, base_model, made_from, recorder)
        add_untrained_adapter(
            base_model,
            adapter_name,
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            target_modules=config.target_modules or (),
            seed=config.seed,
        )
        record = TranslatorRecord(
            base_model=base_model.ref,
            num_virtual_tokens=int(bank.header["K"]),
            bank_digest=bank.digest,
            dod_name=bank.header.get("dod_name"),
            dod_digest=bank.dod_digest,
            train_tasks=tuple(lessons.tasks),
        )
        translator = Translator(base_model, record, adapter_name)
        state, kept_epoch = _train(translator, lessons, config, Checkpoint(work, made_from), recorder, processes)
        if processes.is_main:
            translator.record = replace(
                record,
                training={
                    **asdict(config),
                    "made_from": made_from,
                    "validation_tasks": lessons.held_out,
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
        processes.wait()
    remove_adapter(base_model, adapter_name)
    return Translator.load(out, base_model)


# The loop -------------------------------------------------------------------------------------------------------------


def _train(
    translator: Translator,
    lessons: _Lessons,
    config: TranslatorConfig,
    checkpoint: Checkpoint,
    recorder: Recorder,
    processes: Processes,
) -> tuple[TrainingState, int]:
    """Train the translator's adapter from its checkpoint to the end; returns the losses, and the epoch that is kept."""
    with adapter_in_training(translator) as parameters, recorder.progress("train translator", config.epochs) as bar:
        # Build
        optimizer = torch.optim.AdamW(parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay)
        state = checkpoint.load(parameters, optimizer) or TrainingState(0, [], [])
        _require_same_epoch(state, checkpoint, processes)
        _record_curves(recorder, state.train_losses, state.validation_losses)
        bar.advance(state.epoch)
        for epoch in range(state.epoch, config.epochs):
            # Step
            for group in optimizer.param_groups:
                group["lr"] = scheduled_rate(config.learning_rate, config.schedule, epoch, config.epochs)
            train = _train_epoch(translator.base_model, lessons, optimizer, config, epoch, processes)
            # Measure
            validation = _validation_loss(translator.base_model, lessons, config, processes)
            if validation is None:
                validation = train
            if not (math.isfinite(train) and math.isfinite(validation)):
                raise ArtifactError(
                    f"training a translator: in epoch {epoch + 1} the train loss became {train} and the validation "
                    f"loss {validation}; expected finite numbers. Lower the learning rate."
                )
            _record_curves(recorder, [train], [validation], first=epoch)
            # Keep
            state.train_losses.append(train)
            state.validation_losses.append(validation)
            state.epoch = epoch + 1
            if validation < state.best_loss:
                state.best_loss, state.best_epoch = validation, epoch + 1
                if processes.is_main:
                    checkpoint.save_best(parameters)
            if processes.is_main and state.epoch % config.checkpoint_every_epochs == 0:
                checkpoint.save(parameters, optimizer, state)
            bar.advance(1, f"loss {train:.3f}, held out {validation:.3f}")
        if not (config.keep_best and lessons.held_out):
            return state, config.epochs
        if processes.is_main:
            checkpoint.load_best(parameters)
        return state, state.best_epoch


def _train_epoch(
    base: BaseModel,
    lessons: _Lessons,
    optimizer: torch.optim.Optimizer,
    config: TranslatorConfig,
    epoch: int,
    processes: Processes,
) -> float:
    """One pass over the training tasks; returns the loss in nats per token, the same in all processes.

    Every random choice follows from seed and epoch; dropout masks follow from the process and its forward passes too.
    """
    draw = random.Random(f"{config.seed}/{epoch}")
    order = list(lessons.trained_on)
    draw.shuffle(order)
    spread = lessons.embeddings(order).std()
    seed = config.seed * 100_003 + epoch
    # Alone, noise and dropout draw in turn from one stream. Divided, dropout would move the noise along: it has its own.
    alone = processes.count == 1 and config.micro_batch_size is None
    noise_draw = torch.default_generator if alone else torch.Generator().manual_seed(seed)
    total, count = 0.0, 0
    base.model.train()
    with torch.random.fork_rng(devices=[base.device] if base.device.type == "cuda" else []):
        torch.manual_seed(seed + (processes.index << 40))  # beyond any epoch's seed: no two processes share masks
        for names in _batches(order, config):
            soft = lessons.embeddings(names)  # (B, K, D)
            soft = soft + config.noise * spread * torch.randn(soft.shape, generator=noise_draw)
            ids = lessons.target_ids(base, names, draw if config.shuffle_labels else None, config)
            tokens = sum(map(len, ids))
            for rows in _passes(len(names), config, processes):
                loss = _summed_loss(base, soft[rows], ids[rows])
                (loss / tokens).backward()
                total += float(loss.detach())
            processes.add_up_gradients(optimizer.param_groups[0]["params"])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            count += tokens
    base.model.eval()
    return processes.totals(total)[0] / count


@torch.no_grad()
def _validation_loss(
    base: BaseModel, lessons: _Lessons, config: TranslatorConfig, processes: Processes
) -> float | None:
    """Loss on the tasks that are held out, in nats per token; None without any."""
    total, count = 0.0, 0
    for names in _batches(lessons.held_out, config):
        soft, ids = lessons.embeddings(names), lessons.target_ids(base, names, None, config)
        count += sum(map(len, ids))
        for rows in _passes(len(names), config, processes):
            total += float(_summed_loss(base, soft[rows], ids[rows]))
    return processes.totals(total)[0] / count if lessons.held_out else None


def _batches(names: Sequence[str], config: TranslatorConfig) -> Iterator[Sequence[str]]:
    for start in range(0, len(names), config.batch_size):
        yield names[start : start + config.batch_size]


def _passes(num_rows: int, config: TranslatorConfig, processes: Processes) -> Iterator[slice]:
    """This process's rows of a batch, forward pass by forward pass."""
    share = processes.share_of(num_rows)
    size = config.micro_batch_size or num_rows
    for start in range(share.start, share.stop, size):
        yield slice(start, min(start + size, share.stop))


def _summed_loss(base: BaseModel, soft: torch.Tensor, ids: Sequence[Sequence[int]]) -> torch.Tensor:
    """-log p of all target tokens, as a scalar. soft: (B, K, D); ids: B rows."""
    scores = base.score_targets(soft.to(base.device), [base.bos] * len(ids), ids)
    return -scores.log_likelihood.sum()


# What is learned ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Lessons:
    """Soft prompts with the tasks whose text they should give."""

    bank: SoftPromptBank
    tasks: Mapping[str, Task]
    """In the order of the bank."""
    held_out: list[str]
    """Names of the tasks whose loss is measured each epoch, sorted."""

    @property
    def trained_on(self) -> list[str]:
        held_out = set(self.held_out)
        return [name for name in self.tasks if name not in held_out]

    def embeddings(self, names: Sequence[str]) -> torch.Tensor:
        """(B, K, D) float32 on the CPU."""
        return torch.stack([self.members[name] for name in names])

    def target_ids(
        self, base: BaseModel, names: Sequence[str], draw: random.Random | None, config: TranslatorConfig
    ) -> list[list[int]]:
        """The tokens to learn of each task, EOS included."""
        texts = [target_text(self.tasks[name], draw) for name in names]
        return [[*base.tokenize(text)[: config.max_target_tokens], base.eos_id] for text in texts]

    @cached_property
    def members(self) -> dict[str, torch.Tensor]:
        return {name: self.bank.member(name).embeddings for name in self.tasks}


def _lessons(bank: SoftPromptBank, tasks: Mapping[str, Task], config: TranslatorConfig) -> _Lessons:
    """The members of the bank that the settings choose from `tasks`."""
    names = [name for name in bank.tasks() if name in tasks]
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
    # With few tasks a large share rounds up to all of them; one is left to train on.
    count = min(round(len(names) * config.validation_share), len(names) - 1)
    held_out = random.Random(f"{config.seed}/validation").sample(sorted(names), count) if count else []
    # The first of one drawn order, so that shares lie within each other.
    order = sorted(set(names) - set(held_out))
    random.Random(f"{config.seed}/share").shuffle(order)
    chosen = {*held_out, *order[: max(1, round(len(order) * config.train_share))]}
    limit = config.max_hard_prompts
    return _Lessons(
        bank,
        {
            name: tasks[name] if limit is None else replace(tasks[name], hard_prompts=tasks[name].hard_prompts[:limit])
            for name in names
            if name in chosen
        },
        sorted(held_out),
    )


def _origin(base_model: BaseModel, bank: SoftPromptBank, lessons: _Lessons, config: TranslatorConfig) -> str:
    """What a checkpoint or a finished translator must agree on to be taken over."""
    learned = [[name, list(task.labels), list(task.hard_prompts)] for name, task in lessons.tasks.items()]
    ref = base_model.ref
    return digest_of_json([bank.digest, bank.dod_digest, learned, config.identity, ref.fingerprint, ref.dtype])


def target_text(task: Task, draw: random.Random | None) -> str:
    """What the translator should write: the label list in the order of `draw`, or one of the hard prompts."""
    if task.kind == "classification":
        labels = list(task.labels)
        if draw is not None:
            draw.shuffle(labels)
        return ", ".join(labels)
    return task.hard_prompts[0] if draw is None else draw.choice(task.hard_prompts)


# Safety ---------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def held_by_main(out: Path, work: Path, processes: Processes) -> Iterator[bool]:
    """The main process holds `work` for the block; gives True to all, and holds nothing, if `out` is finished."""
    with contextlib.ExitStack() as held:
        finished = False
        if processes.is_main and not (finished := out.exists()):
            held.enter_context(locked(work))
            if finished := out.exists():  # another start finished it just now
                forget(work)
        yield bool(processes.main_says(finished))


def _take_over(out: Path, base_model: BaseModel, made_from: str, recorder: Recorder) -> Translator:
    """A finished translator; its curves are recorded again."""
    finished = read_record(out).training
    require_same_origin("a translator", out, finished.get("made_from"), made_from)
    _record_curves(recorder, finished["train_losses"], finished["validation_losses"])
    return Translator.load(out, base_model)


def _require_same_epoch(state: TrainingState, checkpoint: Checkpoint, processes: Processes) -> None:
    """Refuse, in all processes, to train where they do not see the same checkpoint."""
    if processes.totals(state.epoch != processes.main_says(state.epoch))[0]:
        raise ArtifactError(
            f"training a translator: the processes do not see the same checkpoint in {str(checkpoint.folder)!r}; expected "
            "a folder that the machines of all processes share. Choose such an output."
        )


def _record_curves(recorder: Recorder, train: Sequence[float], validation: Sequence[float], first: int = 0) -> None:
    """Losses by epoch; the curves count epochs from 1."""
    for epoch, (train_loss, validation_loss) in enumerate(zip(train, validation, strict=True), start=first + 1):
        recorder.metric("train_loss", train_loss, step=epoch)
        recorder.metric("validation_loss", validation_loss, step=epoch)
