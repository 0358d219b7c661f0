"""Training a translator: LoRA on the base model, from (soft prompt, ground-truth text) pairs."""

from __future__ import annotations

import contextlib
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PositiveInt

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.base_models.layers import linear_layers
from softprompt_registry.base_models.reference import require_same_base
from softprompt_registry.config import PositiveShare, settings
from softprompt_registry.dod.task import Task
from softprompt_registry.errors import ArtifactError, ConfigError, DataError
from softprompt_registry.fingerprints import SHORT, digest_of_json
from softprompt_registry.processes import ALONE, Processes
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


LLAMA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@settings
class TranslatorConfig:
    """How a translator is trained. Defaults are the paper's (section 4.3) where it has them."""

    lora_rank: PositiveInt = 4
    """LoRA r (paper: 4)."""
    lora_alpha: int = 8
    """LoRA alpha (paper: 8)."""
    lora_dropout: float = 0.1
    """Dropout before the adapter (paper: 0.1)."""
    target_modules: tuple[str, ...] | None = None
    """Names of the layers that get an adapter. None takes all linear layers but the head: of a Llama `q_proj`, `k_proj`,
    `v_proj`, `o_proj`, `gate_proj`, `up_proj` and `down_proj` (paper: these seven)."""
    learning_rate: float = 1e-4
    """AdamW's (paper: 1e-4)."""
    weight_decay: float = 0.1
    """AdamW's (paper: 0.1)."""
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
    noise: float = 0.0
    """Standard deviation of Gaussian noise on soft prompts, relative to that of all their values. Against overfitting."""
    train_share: PositiveShare = 1.0
    """Train on this share of the training tasks only, drawn by the seed (paper, section 5.1.1: 12, 25 and 50 %). A smaller
    share lies within a larger one, and the tasks held out for validation are the same at every share."""
    max_hard_prompts: PositiveInt | None = None
    """Of a task with more hard prompts than this, only the first ones are learned. None takes all."""
    validation_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the training tasks whose loss is measured each epoch and never trained on (paper: 10 % of all)."""
    keep_best: bool = False
    """Keep the epoch with the lowest validation loss instead of the last."""
    checkpoint_every_epochs: PositiveInt = 1
    """How often a checkpoint is written, from which a killed run goes on."""
    seed: int = 0
    """Of adapter initialisation, order, label shuffling, noise and dropout."""

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


@dataclass
class TrainingState:
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
    processes: Processes = ALONE,
) -> Translator:
    """Train on the bank's members among `tasks` and write the translator to `out`.

    Loss: cross-entropy of the target text and EOS after [soft tokens][BOS], summed over tokens and divided by their
    number. Paper: its classification translator was trained without EOS; ours learns where to end. Checkpoints are kept
    in `<out>.training`; a second start with the same bank and settings goes on from the last one and gives the same
    translator as an undisturbed run.

    Several processes divide the soft prompts of each step among them and sum their gradients. They give the translator
    that one process gives, up to rounding: order, labels and noise are drawn for the whole batch in each. Dropout masks
    are drawn for the rows of a process, so with `lora_dropout` the number of processes changes them, as another seed
    would. A training may go on with another number of processes than it began with.

    Args:
        tasks: training tasks by name, each with its ground truth; members of the bank outside it are left out.
        recorder: hears of the main process alone.
        processes: all of them make this call with the same arguments and, on GPUs, a base model each on its own. The main
            process writes `out` and the checkpoints, and the others read them: the folder must be one that all can see.

    Raises:
        BaseModelMismatch: bank and base model do not belong together.
        DataError: no task of the bank is in `tasks`, or one has no ground truth.
        ConfigError: the base model lacks some of the target modules.
        ArtifactError: `out` holds a translator made from another bank or other settings, the losses are no numbers any
            more, or the processes do not see the same checkpoint.
        BusyError: another process trains into `out`.
    """
    import torch

    if recorder is None or not processes.is_main:
        recorder = NullRecorder()
    require_same_base("training a translator", "the bank", bank.base_model, "the loaded model", base_model.ref)
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
    held_out = validation_names(names, config.validation_share, config.seed)
    chosen = _share_of([name for name in names if name not in held_out], config)
    names = [name for name in names if name in held_out or name in chosen]
    tasks = {name: _with_first_hard_prompts(tasks[name], config.max_hard_prompts) for name in names}
    soft_prompts = {name: bank.member(name) for name in names}
    learned = [[name, list(tasks[name].labels), list(tasks[name].hard_prompts)] for name in names]
    if config.target_modules is None:
        config = replace(config, target_modules=tuple(linear_layers(base_model)))
    ref = base_model.ref
    made_from = digest_of_json([bank.digest, bank.dod_digest, learned, config.identity, ref.fingerprint, ref.dtype])
    work = out.with_name(f"{out.name}.training")
    adapter_name = f"training_{digest_of_json([str(out), config.identity])[:SHORT]}"
    remove_adapter(base_model, adapter_name)
    with held_by_main(out, work, processes) as finished:
        if finished:
            return _take_over(out, base_model, made_from, recorder)
        _add_adapter(base_model, config, adapter_name)
        # Without the adapter's name, which follows from the spelling of `out`: a later start may spell it otherwise.
        named = adapter_parameters(base_model, adapter_name)
        parameters = {name.replace(f".{adapter_name}.", "."): parameter for name, parameter in named.items()}
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
        checkpoint = Checkpoint(work, made_from)
        translator = Translator(base_model, record, adapter_name)
        try:
            state = checkpoint.load(parameters, optimizer) or TrainingState(0, [], [])
            if processes.totals(state.epoch != processes.main_says(state.epoch))[0]:
                raise ArtifactError(
                    f"training a translator: the processes do not see the same checkpoint in {str(work)!r}; expected a "
                    "folder that the machines of all processes share. Choose such an output."
                )
            for epoch, (train, validation) in enumerate(zip(state.train_losses, state.validation_losses, strict=True)):
                record_epoch(recorder, epoch, train, validation)
            with recorder.progress("train translator", config.epochs) as bar:
                bar.advance(state.epoch)
                for epoch in range(state.epoch, config.epochs):
                    train, validation = _epoch(
                        translator, soft_prompts, tasks, held_out, parameters, optimizer, config, epoch, processes
                    )
                    if not (math.isfinite(train) and math.isfinite(validation)):
                        raise ArtifactError(
                            f"training a translator: in epoch {epoch + 1} the train loss became {train} and the validation "
                            f"loss {validation}; expected finite numbers. Lower the learning rate."
                        )
                    record_epoch(recorder, epoch, train, validation)
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
        finally:
            for parameter in parameters.values():
                parameter.requires_grad_(False)
            base_model.model.eval()
            base_model.model.disable_adapters()
        if processes.is_main:
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
        processes.wait()
    remove_adapter(base_model, adapter_name)
    return Translator.load(out, base_model)


def _add_adapter(base_model: BaseModel, config: TranslatorConfig, adapter_name: str) -> None:
    """Put an untrained adapter on the target modules of the decoder, and on nothing if one of them is not found."""
    from peft import LoraConfig, TaskType
    from torch import nn

    model, found = base_model.model, linear_layers(base_model)
    lora = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.target_modules or found),
        # Of layers that hold their weights the other way round, as those of GPT-2.
        fan_in_fan_out=any(not isinstance(layer, nn.Linear) for layer in found.values()),
    )
    if model.config.get_text_config() is not model.config:  # what reads images may have layers of the same names
        decoder = next(name for name, module in model.named_modules() if module is base_model.decoder)
        lora.exclude_modules = rf"(?!{re.escape(decoder)}\.).*"
    try:
        add_adapter(base_model, lora, adapter_name, seed=config.seed)
        # Left out of `lora` by now is what PEFT itself translates, as the names of experts.
        wanted: set[str] = set(lora.target_modules or ())
        on = [f".{name.partition('.lora_')[0]}" for name in adapter_parameters(base_model, adapter_name)]
        if missing := [name for name in wanted if not any(layer.endswith(f".{name}") for layer in on)]:
            remove_adapter(base_model, adapter_name)
            raise ValueError(f"it has no layers named {sorted(missing)}")
    except ValueError as error:
        raise ConfigError(
            f"training a translator: the adapter cannot be put on all target modules of {base_model.ref} "
            f"({str(error)[:200]}); its linear layers are {list(found)}. Set target_modules to some of them, or leave it out "
            "for all."
        ) from error


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
    """A finished translator, with its curve told once more."""
    finished = read_record(out).training
    require_same_origin("a translator", out, finished.get("made_from"), made_from)
    for epoch, losses in enumerate(zip(finished["train_losses"], finished["validation_losses"], strict=True)):
        record_epoch(recorder, epoch, *losses)
    return Translator.load(out, base_model)


def target_text(task: Task, draw: random.Random | None) -> str:
    """What the translator should write: the label list in the order of `draw`, or one of the hard prompts."""
    if task.kind == "classification":
        labels = list(task.labels)
        if draw is not None:
            draw.shuffle(labels)
        return ", ".join(labels)
    return task.hard_prompts[0] if draw is None else draw.choice(task.hard_prompts)


def validation_names(names: Sequence[str], share: float, seed: int) -> set[str]:
    """The tasks that are held out: a share of them, drawn by the seed."""
    # With few tasks a large share rounds up to all of them; one is left to train on.
    count = min(round(len(names) * share), len(names) - 1)
    return set(random.Random(f"{seed}/validation").sample(sorted(names), count)) if count else set()


def _share_of(names: Sequence[str], config: TranslatorConfig) -> set[str]:
    """The first `train_share` of one drawn order, so that shares lie within each other; never none."""
    order = sorted(names)
    random.Random(f"{config.seed}/share").shuffle(order)
    return set(order[: max(1, round(len(order) * config.train_share))])


def _with_first_hard_prompts(task: Task, limit: int | None) -> Task:
    return task if limit is None else replace(task, hard_prompts=task.hard_prompts[:limit])


def _epoch(
    translator: Translator,
    soft_prompts: Mapping[str, SoftPrompt],
    tasks: Mapping[str, Task],
    held_out: set[str],
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    config: TranslatorConfig,
    epoch: int,
    processes: Processes,
) -> tuple[float, float]:
    """One pass; returns (train loss, validation loss) in nats per token, the same in all processes.

    Every random choice follows from seed and epoch; dropout masks follow from the process and its forward passes too.
    """
    import torch

    base = translator.base_model
    draw = random.Random(f"{config.seed}/{epoch}")
    order = [name for name in soft_prompts if name not in held_out]
    draw.shuffle(order)
    for group in optimizer.param_groups:
        fall = 0.5 * (1 + math.cos(math.pi * epoch / config.epochs)) if config.schedule == "cosine" else 1.0
        group["lr"] = config.learning_rate * fall
    spread = torch.stack([soft_prompts[name].embeddings for name in order]).std()
    total, count = 0.0, 0
    seed = config.seed * 100_003 + epoch
    # Alone, noise and dropout draw in turn from one stream. Divided, dropout would move the noise along: it has its own.
    alone = processes.count == 1 and config.micro_batch_size is None
    noise_draw = torch.default_generator if alone else torch.Generator().manual_seed(seed)
    devices = [base.device] if base.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), translator.reading():
        torch.manual_seed(seed + (processes.index << 40))  # beyond any epoch's seed: no two processes share masks
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        base.model.train()
        for start in range(0, len(order), config.batch_size):
            batch = order[start : start + config.batch_size]
            soft = torch.stack([soft_prompts[name].embeddings for name in batch])  # (B, K, D)
            soft = soft + config.noise * spread * torch.randn(soft.shape, generator=noise_draw)
            targets = [target_text(tasks[name], draw if config.shuffle_labels else None) for name in batch]
            ids = _target_ids(base, targets, config)
            tokens = sum(map(len, ids))
            for rows in _passes(len(batch), config, processes):
                loss = _summed_loss(base, soft[rows], ids[rows])
                (loss / tokens).backward()
                total += float(loss.detach())
            processes.add_up_gradients(parameters.values())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            count += tokens
        base.model.eval()
        names = sorted(held_out)
        held_out_total, held_out_count = 0.0, 0
        with torch.no_grad():
            for start in range(0, len(names), config.batch_size):
                batch = names[start : start + config.batch_size]
                soft = torch.stack([soft_prompts[name].embeddings for name in batch])
                ids = _target_ids(base, [target_text(tasks[name], None) for name in batch], config)
                held_out_count += sum(map(len, ids))
                for rows in _passes(len(batch), config, processes):
                    held_out_total += float(_summed_loss(base, soft[rows], ids[rows]))
    total, held_out_total = processes.totals(total, held_out_total)
    train = total / count
    return train, held_out_total / held_out_count if held_out else train


def _passes(num_rows: int, config: TranslatorConfig, processes: Processes) -> Iterator[slice]:
    """This process's rows of a batch, forward pass by forward pass."""
    share = processes.share_of(num_rows)
    size = config.micro_batch_size or num_rows
    for start in range(share.start, share.stop, size):
        yield slice(start, min(start + size, share.stop))


def _target_ids(base: BaseModel, targets: Sequence[str], config: TranslatorConfig) -> list[list[int]]:
    """The tokens to learn of each target text, EOS included."""
    return [[*base.tokenize(text)[: config.max_target_tokens], base.eos_id] for text in targets]


def _summed_loss(base: BaseModel, soft: torch.Tensor, ids: Sequence[Sequence[int]]) -> torch.Tensor:
    """-log p of all target tokens, as a scalar. soft: (B, K, D); ids: B rows."""
    scores = base.score_targets(soft.to(base.device), [base.bos] * len(ids), ids)
    return -scores.log_likelihood.sum()


def record_epoch(recorder: Recorder, epoch: int, train: float, validation: float) -> None:
    """Losses of an epoch, which counts from 0 here and from 1 in the curves."""
    recorder.metric("train_loss", train, step=epoch + 1)
    recorder.metric("validation_loss", validation, step=epoch + 1)


class Checkpoint:
    """What is trained, optimizer moments and losses of the last whole epoch, as safetensors and JSON (no pickle)."""

    def __init__(self, folder: Path, key: str) -> None:
        """
        Args:
            key: of the training; a checkpoint of another one is not gone on with.
        """
        self.folder = folder
        self.key = key

    def save(
        self, parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, state: TrainingState
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

    def load(
        self, parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> TrainingState | None:
        """Put the last checkpoint of the same training in place; None if there is none."""
        stored = {}
        if (self.folder / "state.json").is_file():
            stored = read_json(self.folder / "state.json", "a training checkpoint")
        if stored.pop("key", None) != self.key:
            (self.folder / "best.safetensors").unlink(missing_ok=True)
            return None
        tensors = _tensors_in(self.folder / stored.pop("file"))
        for name, parameter in parameters.items():
            parameter.data.copy_(tensors[f"weight/{name}"])
            moments: dict[str, Any] = {m: tensors[f"{m}/{name}"] for m in ("exp_avg", "exp_avg_sq", "step")}
            device = parameter.device
            optimizer.state[parameter] = {m: value if m == "step" else value.to(device) for m, value in moments.items()}
        return TrainingState(**stored)

    def save_best(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        from safetensors.torch import save_file

        partial = self.folder / ".best.safetensors"
        save_file({name: parameter.detach().contiguous() for name, parameter in parameters.items()}, partial)
        partial.rename(self.folder / "best.safetensors")

    def load_best(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        path = self.folder / "best.safetensors"
        if not path.is_file():
            raise ArtifactError(f"finishing a translator: its best epoch {str(path)!r} is missing. Train it again.")
        for name, tensor in _tensors_in(path).items():
            parameters[name].data.copy_(tensor)


def _tensors_in(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint; the names of earlier ones hold that of the adapter."""
    from safetensors.torch import load_file

    return {re.sub(r"\.training_[0-9a-f]+\.", ".", name): tensor for name, tensor in load_file(path).items()}
