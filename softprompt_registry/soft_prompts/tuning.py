"""Tuning soft prompts: several tasks share each forward pass, the base model stays frozen.

Tasks are tuned in groups. Every row of a batch carries the soft prompt of its own task, every task has its own optimizer,
order of examples, early stopping and best checkpoint. Groups are fixed by the list of tasks alone and a group is written
when it is finished, so a run that was killed and started again gives the same numbers as an undisturbed one.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.dod.task import Pair, PairSplit, Task, fill_template
from softprompt_registry.errors import ArtifactError, ConfigError, DataError
from softprompt_registry.fingerprints import SHORT, digest_of_json
from softprompt_registry.recording import NullRecorder, ProgressBar, Recorder
from softprompt_registry.soft_prompts.bank import SoftPromptBank
from softprompt_registry.soft_prompts.performance import Trial, measure
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt, SoftPromptRecord
from softprompt_registry.storage import forget, locked, require_same_origin

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TuningConfig:
    """How soft prompts are tuned. Defaults are the paper's for its Classification DoD (section 4.3), where it has them."""

    num_virtual_tokens: int = 20
    """K, soft tokens per prompt (paper: 20)."""
    init: Literal["shared_vocabulary", "own_vocabulary"] = "shared_vocabulary"
    """Start from embeddings of randomly drawn vocabulary tokens: the same ones for all tasks, or each task its own.
    Paper: own ones; one shared start makes prompts comparable and translators better."""
    learning_rate: float = 1e-4
    """AdamW's (paper: 1e-4 for classification, 1e-3 in general); weight decay is 0."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate over the epochs: constant, or falling to zero along a cosine."""
    epochs: int = 20
    """At most this many passes over the train pairs (paper: 20)."""
    patience_epochs: int | None = 5
    """Stop after so many epochs without a lower validation loss (paper: 5; 3 in general). None never stops early."""
    batch_size: int = 32
    """Pairs per task and step (paper: 32; 8 in general)."""
    tasks_per_group: int = 4
    """Tasks that share a forward pass. More costs memory and saves time."""
    rows_per_forward: int = 16
    """Rows of one forward pass: the rows of a step are sorted by length and cut into such pieces. Does not change
    gradients; a larger piece costs memory, a smaller one wastes less on padding."""
    max_sequence_tokens: int = 256
    """Longest row, soft tokens included. Longer inputs are cut from the right; targets never are."""
    max_train_pairs: int | None = None
    """Use at most so many train pairs of a task, balanced over labels. None takes all."""
    max_validation_pairs: int | None = None
    """The same for validation pairs."""
    max_test_pairs: int | None = None
    """The same for test pairs, which measure the finished prompt."""
    max_new_tokens: int = 48
    """Length cap when test answers are generated."""
    seed: int = 0
    """Of initialisation, example order and choice of pairs."""

    def __post_init__(self) -> None:
        for name in ("num_virtual_tokens", "epochs", "batch_size", "tasks_per_group", "rows_per_forward"):
            if getattr(self, name) < 1:
                raise ConfigError(f"reading the tuning settings: {name} is {getattr(self, name)}, expected at least 1.")
        if self.max_train_pairs is not None and self.max_train_pairs < 1:
            raise ConfigError(
                f"reading the tuning settings: max_train_pairs is {self.max_train_pairs}, expected at least 1 or null."
            )
        if self.max_sequence_tokens < self.num_virtual_tokens + 8:
            raise ConfigError(
                f"reading the tuning settings: max_sequence_tokens={self.max_sequence_tokens} leaves no room for text "
                f"after {self.num_virtual_tokens} soft tokens. Raise it."
            )


@dataclass(frozen=True)
class EncodedPair:
    """A pair as token ids."""

    prompt: list[int]
    """BOS and the filled template."""
    target: list[int]
    """One space, the output and EOS. Paper: its general prompts were trained without EOS and ran on; ours end."""


@dataclass
class _Progress:
    """A task while it is being tuned."""

    task: Task
    train: list[EncodedPair]
    validation: list[EncodedPair]
    test: list[EncodedPair]
    test_outputs: list[str]
    truncated: int
    prompt: torch.nn.Parameter
    initial: torch.Tensor
    optimizer: torch.optim.Optimizer
    order: random.Random
    best: torch.Tensor
    best_loss: float = math.inf
    best_epoch: int = 0
    stopped: bool = False
    train_losses: list[float] = field(default_factory=list)
    validation_losses: list[float] = field(default_factory=list)


def tune_soft_prompts(
    base_model: BaseModel,
    tasks: Sequence[Task],
    config: TuningConfig,
    out: Path,
    *,
    dod_name: str | None = None,
    dod_digest: str | None = None,
    recorder: Recorder | None = None,
) -> SoftPromptBank:
    """Tune one soft prompt per task and write the bank to `out`.

    Finished groups are kept in `<out>.tuning`; a second start with the same tasks, settings and base model takes them
    from there, and takes a finished bank as it is. Curves (means over prompts by epoch) go to the recorder.

    Raises:
        DataError: a task has no train pair, or a name occurs twice.
        ArtifactError: `out` holds a bank made from other tasks, settings or base model.
        ArtifactError: a loss became NaN or infinite.
        BusyError: another process tunes into `out`.
    """
    recorder = recorder or NullRecorder()
    _check_tasks(tasks)
    made_from = _key(base_model, tasks, config, dod_digest)
    work = out.with_name(f"{out.name}.tuning")
    if out.exists():
        return _take_over(out, made_from, recorder)
    with locked(work):
        if out.exists():  # another process finished it just now
            forget(work)
            return _take_over(out, made_from, recorder)
        finished: dict[str, SoftPrompt] = {}
        with recorder.progress("tune soft prompts", len(tasks)) as bar:
            for group in _groups(base_model, tasks, config):
                folder = work / _key(base_model, group, config, dod_digest)
                kept = _load_group(folder, group)
                if kept is None:
                    kept = _tune_group(base_model, group, config, dod_name, dod_digest, bar)
                    for soft_prompt in kept:
                        soft_prompt.save(folder / _folder_name(soft_prompt.record.task))
                else:
                    bar.advance(len(group), "taken from an earlier start")
                finished.update({soft_prompt.record.task: soft_prompt for soft_prompt in kept})
        bank = SoftPromptBank.save([finished[task.name] for task in tasks], out, made_from=made_from)
        _record_curves(bank, recorder)
        forget(work)
    return bank


def _take_over(out: Path, made_from: str, recorder: Recorder) -> SoftPromptBank:
    bank = SoftPromptBank(out)
    require_same_origin("a bank", out, bank.header.get("made_from"), made_from)
    _record_curves(bank, recorder)
    return bank


def encode_pair(base_model: BaseModel, template: str, pair: Pair, max_tokens: int) -> tuple[EncodedPair, bool]:
    """Token ids of a pair, and whether its input had to be cut to fit `max_tokens` (prompt and target together).

    Paper: it cut at 64 tokens from the right, label included; here the input gives way, the target never does.
    """
    target = [*base_model.tokenize(f" {pair.output}"), base_model.eos_id]
    whole = base_model.bos + base_model.tokenize(fill_template(template, pair.input))
    if len(whole) + len(target) <= max_tokens:
        return EncodedPair(whole, target), False
    before, after = template.split("{x}")
    # Most tokenizers join a space to the word after it, so the one before the input goes with the input.
    space = " " if before.endswith(" ") else ""
    head = base_model.bos + base_model.tokenize(before.removesuffix(space))
    tail = base_model.tokenize(after)
    room = max_tokens - len(head) - len(tail) - len(target)
    text = base_model.tokenize(space + pair.input)
    return EncodedPair([*head, *text[: max(room, 1)], *tail], target), True


def choose_pairs(task: Task, split: PairSplit, limit: int | None, seed: int) -> list[Pair]:
    """At most `limit` pairs of a split, in turn from each label so that a small choice stays balanced."""
    pairs = task.pairs_of(split)
    if limit is None or len(pairs) <= limit:
        return pairs
    draw = random.Random(f"{seed}/{task.name}/{split}")
    by_output: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_output.setdefault(pair.output if task.kind == "classification" else "", []).append(pair)
    for members in by_output.values():
        draw.shuffle(members)
    chosen: list[Pair] = []
    queues = [members for _, members in sorted(by_output.items())]
    while len(chosen) < limit:
        queues = [queue for queue in queues if queue]
        chosen += [queue.pop() for queue in queues][: limit - len(chosen)]
    return chosen


def _check_tasks(tasks: Sequence[Task]) -> None:
    names = [task.name for task in tasks]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if not tasks or doubled:
        found = f"the names {doubled[:5]} occur twice" if doubled else "there are no tasks"
        raise DataError(
            f"tuning soft prompts: {found}; expected tasks with distinct names. Correct the choice of tasks."
        )
    for task in tasks:
        if not task.pairs_of("train"):
            raise DataError(
                f"tuning task {task.name!r}: it has no train pairs; at least one is needed. Check its splits."
            )


def _groups(base_model: BaseModel, tasks: Sequence[Task], config: TuningConfig) -> Iterator[list[Task]]:
    """Tasks of similar length together, so that little is lost to padding; fixed by the tasks and settings alone."""

    def mean_characters(task: Task) -> float:
        pairs = task.pairs_of("train")
        return sum(len(pair.input) + len(pair.output) for pair in pairs) / len(pairs)

    ordered = sorted(tasks, key=lambda task: (mean_characters(task), task.name))
    for start in range(0, len(ordered), config.tasks_per_group):
        yield ordered[start : start + config.tasks_per_group]


def _key(base_model: BaseModel, group: Sequence[Task], config: TuningConfig, dod_digest: str | None) -> str:
    """What stored work must agree on to be taken over.

    The DoD's digest is part of it: a bank names the one DoD that it was tuned on, and is used with no other.
    """
    ref = base_model.ref
    return digest_of_json([ref.fingerprint, ref.dtype, dod_digest, asdict(config), [task.digest for task in group]])[
        :SHORT
    ]


def _folder_name(task_name: str) -> str:
    return digest_of_json(task_name)[:SHORT]


def _load_group(folder: Path, group: Sequence[Task]) -> list[SoftPrompt] | None:
    """A finished group's soft prompts, in its order; None unless all are there."""
    members = [folder / _folder_name(task.name) for task in group]
    if not all(member.is_dir() for member in members):
        return None
    return [SoftPrompt.load(member) for member in members]


def initial_embeddings(base_model: BaseModel, config: TuningConfig, task: Task) -> torch.Tensor:
    """(K, D) float32: embeddings of K tokens drawn from the vocabulary, special tokens left out."""
    import torch

    seed = config.seed
    if config.init == "own_vocabulary":
        seed = int(digest_of_json([config.seed, task.name])[:8], 16)
    generator = torch.Generator().manual_seed(seed)
    special = set(base_model.tokenizer.all_special_ids)
    order = torch.randperm(base_model.ref.vocab_size, generator=generator).tolist()
    chosen = [token for token in order if token not in special][: config.num_virtual_tokens]
    return base_model.input_embeddings[torch.tensor(chosen, device=base_model.device)].float().cpu().clone()


def _prepare(base_model: BaseModel, task: Task, config: TuningConfig) -> _Progress:
    import torch

    room = min(config.max_sequence_tokens, base_model.max_positions) - config.num_virtual_tokens
    chosen: dict[PairSplit, list[Pair]] = {
        "train": choose_pairs(task, "train", config.max_train_pairs, config.seed),
        "validation": choose_pairs(task, "validation", config.max_validation_pairs, config.seed),
        "test": choose_pairs(task, "test", config.max_test_pairs, config.seed),
    }
    encoded: dict[PairSplit, list[EncodedPair]] = {}
    truncated = 0
    for split, pairs in chosen.items():
        rows = [encode_pair(base_model, task.template, pair, room) for pair in pairs]
        encoded[split] = [row for row, _ in rows]
        truncated += sum(cut for _, cut in rows)
    initial = initial_embeddings(base_model, config, task)
    prompt = torch.nn.Parameter(initial.to(base_model.device).clone())
    return _Progress(
        task=task,
        train=encoded["train"],
        validation=encoded["validation"],
        test=encoded["test"],
        test_outputs=[pair.output for pair in chosen["test"]],
        truncated=truncated,
        prompt=prompt,
        initial=initial,
        optimizer=torch.optim.AdamW([prompt], lr=config.learning_rate, weight_decay=0.0),
        order=random.Random(f"{config.seed}/{task.name}"),
        best=initial.clone(),
    )


def _tune_group(
    base_model: BaseModel,
    group: Sequence[Task],
    config: TuningConfig,
    dod_name: str | None,
    dod_digest: str | None,
    bar: ProgressBar,
) -> list[SoftPrompt]:
    progresses = [_prepare(base_model, task, config) for task in group]
    for epoch in range(config.epochs):
        active = [progress for progress in progresses if not progress.stopped]
        if not active:
            break
        _train_epoch(base_model, active, config, epoch)
        losses = _validation_losses(base_model, active, config.rows_per_forward)
        for progress, loss in zip(active, losses, strict=True):
            _after_epoch(progress, loss, config, epoch)
        bar.advance(0, f"epoch {epoch + 1}: {', '.join(progress.task.name for progress in active)}")
    trials = [
        Trial(
            progress.task,
            progress.best.to(base_model.device),
            [pair.prompt for pair in progress.test],
            progress.test_outputs,
        )
        for progress in progresses
    ]
    measured = measure(
        base_model, trials, max_new_tokens=config.max_new_tokens, rows_per_forward=config.rows_per_forward
    )
    bar.advance(len(group))
    return [
        _finish(base_model, progress, config, scores, dod_name, dod_digest)
        for progress, scores in zip(progresses, measured, strict=True)
    ]


def _train_epoch(base_model: BaseModel, active: Sequence[_Progress], config: TuningConfig, epoch: int) -> None:
    """One pass of every active task over its train pairs; step by step, all tasks in the same forward passes."""
    batches = []
    for progress in active:
        rows = list(progress.train)
        progress.order.shuffle(rows)
        batches.append([rows[i : i + config.batch_size] for i in range(0, len(rows), config.batch_size)])
        rate = config.learning_rate
        if config.schedule == "cosine":
            rate *= 0.5 * (1 + math.cos(math.pi * epoch / config.epochs))
        for settings in progress.optimizer.param_groups:
            settings["lr"] = rate
    losses: list[list[float]] = [[] for _ in active]
    for step in range(max(len(task_batches) for task_batches in batches)):
        taking = [i for i in range(len(active)) if step < len(batches[i])]
        step_losses = _train_step(
            base_model, [active[i].prompt for i in taking], [batches[i][step] for i in taking], config.rows_per_forward
        )
        for i, loss in zip(taking, step_losses, strict=True):
            losses[i].append(loss)
            active[i].optimizer.step()
            active[i].optimizer.zero_grad(set_to_none=True)
    for progress, task_losses in zip(active, losses, strict=True):
        progress.train_losses.append(sum(task_losses) / len(task_losses))


def _train_step(
    base_model: BaseModel,
    prompts: Sequence[torch.nn.Parameter],
    batches: Sequence[Sequence[EncodedPair]],
    rows_per_forward: int,
) -> list[float]:
    """Leave in each prompt the gradient of its own mean token loss; returns those losses.

    loss_i = sum of -log p over the target tokens of task i / their number: neither padding, nor the other tasks, nor the
    cutting into pieces changes it.
    """
    import torch

    rows = [(i, pair) for i, batch in enumerate(batches) for pair in batch]
    rows.sort(key=lambda row: len(row[1].prompt) + len(row[1].target))
    num_tokens = [sum(len(pair.target) for pair in batch) for batch in batches]
    losses = [0.0] * len(prompts)
    for start in range(0, len(rows), rows_per_forward):
        piece = rows[start : start + rows_per_forward]
        soft = torch.stack([prompts[i] for i, _ in piece])  # (rows, K, D)
        scores = base_model.score_targets(soft, [pair.prompt for _, pair in piece], [pair.target for _, pair in piece])
        shares = torch.tensor([1 / num_tokens[i] for i, _ in piece], device=base_model.device)
        row_losses = -scores.log_likelihood * shares
        row_losses.sum().backward()
        for (i, _), loss in zip(piece, row_losses.tolist(), strict=True):
            losses[i] += loss
    return losses


def _validation_losses(base_model: BaseModel, active: Sequence[_Progress], rows_per_forward: int) -> list[float]:
    """Mean -log p per target token of each task's validation pairs; its train loss stands in where it has none."""
    import torch

    rows = [(i, pair) for i, progress in enumerate(active) for pair in progress.validation]
    rows.sort(key=lambda row: len(row[1].prompt) + len(row[1].target))
    totals, counts = [0.0] * len(active), [0] * len(active)
    with torch.no_grad():
        for start in range(0, len(rows), rows_per_forward):
            piece = rows[start : start + rows_per_forward]
            soft = torch.stack([active[i].prompt for i, _ in piece])
            scores = base_model.score_targets(soft, [p.prompt for _, p in piece], [p.target for _, p in piece])
            for (i, pair), log_likelihood in zip(piece, scores.log_likelihood.tolist(), strict=True):
                totals[i] -= log_likelihood
                counts[i] += len(pair.target)
    return [
        total / count if count else progress.train_losses[-1]
        for total, count, progress in zip(totals, counts, active, strict=True)
    ]


def _after_epoch(progress: _Progress, validation_loss: float, config: TuningConfig, epoch: int) -> None:
    """Keep the best epoch; stop a task that has not improved for long enough."""
    if not math.isfinite(validation_loss):
        raise ArtifactError(
            f"tuning task {progress.task.name!r}: its loss became {validation_loss} in epoch {epoch + 1}; expected a finite "
            "number. Lower the learning rate, or leave the task out; finished groups are kept."
        )
    progress.validation_losses.append(validation_loss)
    if validation_loss < progress.best_loss:
        progress.best_loss = validation_loss
        progress.best_epoch = epoch + 1
        progress.best = progress.prompt.detach().cpu().clone()
    elif config.patience_epochs is not None and epoch + 1 - progress.best_epoch >= config.patience_epochs:
        progress.stopped = True


def _finish(
    base_model: BaseModel,
    progress: _Progress,
    config: TuningConfig,
    measured: dict[str, float],
    dod_name: str | None,
    dod_digest: str | None,
) -> SoftPrompt:
    task = progress.task
    record = SoftPromptRecord(
        task=task.name,
        kind=task.kind,
        base_model=base_model.ref,
        template=task.template,
        labels=task.labels,
        task_digest=task.digest,
        dod_name=dod_name,
        dod_digest=dod_digest,
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
    )
    return SoftPrompt(progress.best, progress.initial, record)


def mean_curves(bank: SoftPromptBank) -> dict[str, list[float]]:
    """Mean train and validation loss over the bank's prompts, by epoch; a stopped prompt keeps its last value."""
    curves: dict[str, list[float]] = {}
    for name in ("train_losses", "validation_losses"):
        series = [record["tuning"][name] for record in bank.records.values()]
        longest = max(len(values) for values in series)
        padded = [values + [values[-1]] * (longest - len(values)) for values in series]
        curves[name] = [sum(column) / len(column) for column in zip(*padded, strict=True)]
    return curves


def _record_curves(bank: SoftPromptBank, recorder: Recorder) -> None:
    for name, values in mean_curves(bank).items():
        for epoch, value in enumerate(values, start=1):
            recorder.metric(f"mean_{name.removesuffix('es')}", value, step=epoch)
    finals: dict[str, list[float]] = {}
    for record in bank.records.values():
        for name, value in record["metrics"].items():
            finals.setdefault(name, []).append(value)
    for name, values in finals.items():
        recorder.metric(f"best_{name}" if name == "validation_loss" else name, sum(values) / len(values))
