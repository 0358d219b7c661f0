"""Tuning soft prompts: one for each task, many at a time, the base model stays frozen.

`fleet` does the work; here stands what is tuned, under which settings, and how the results get into a bank, so that a run
that was killed goes on where it was.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.base_models.reference import BaseModelRef
from softprompt_registry.dod.task import Task
from softprompt_registry.errors import ArtifactError, DataError
from softprompt_registry.fingerprints import SHORT, digest_of_json
from softprompt_registry.recording import NullRecorder, Recorder
from softprompt_registry.soft_prompts.bank import BankWriter, SoftPromptBank
from softprompt_registry.soft_prompts.engines import InThisProcess, TuningEngine
from softprompt_registry.soft_prompts.fleet import FleetStatistics
from softprompt_registry.soft_prompts.progress import DodOrigin
from softprompt_registry.soft_prompts.tuning_settings import TuningConfig
from softprompt_registry.storage import forget, locked, require_same_origin

RECORD_EVERY_S = 30.0
"""How often a run reports its speed."""


def tune_soft_prompts(
    base_model: BaseModel | TuningEngine,
    tasks: Sequence[Task],
    config: TuningConfig,
    out: Path,
    *,
    dod_name: str | None = None,
    dod_digest: str | None = None,
    recorder: Recorder | None = None,
) -> SoftPromptBank:
    """Tune one soft prompt per task and write the bank to `out`.

    Each prompt is on the disk, in `<out>.tuning`, as soon as it is finished; a second start with the same tasks, settings
    and base model resumes from there, and takes a finished bank as it is. A task whose loss becomes NaN or infinite is left
    out, with the reason in the bank's `failures`. Curves (means over prompts by epoch) go to the recorder.

    Args:
        base_model: a loaded one, or an engine that tunes elsewhere.
        tasks: read one after the other, several times, so they may come from the disk each time (`DodStore.stored_tasks`).

    Raises:
        DataError: a task has no train pair, or a name occurs twice.
        ArtifactError: `out` holds a bank made from other tasks, settings or base model, or all tasks failed.
        BusyError: another process tunes into `out`.
    """
    recorder = recorder or NullRecorder()
    engine = InThisProcess(base_model) if isinstance(base_model, BaseModel) else base_model
    names, digests, mean_characters = _overview(tasks)
    made_from = _key(engine.ref, digests, config, dod_digest)
    work = out.with_name(f"{out.name}.tuning")
    if out.exists():
        return _take_over(out, made_from, recorder)
    with locked(work):
        if out.exists():  # another process finished it just now
            forget(work)
            return _take_over(out, made_from, recorder)
        growing = work / made_from
        with BankWriter(growing) as writer, recorder.progress("tune soft prompts", len(names)) as bar:
            done = writer.done()
            if done:
                bar.advance(len(done), "taken from an earlier start")
            # Longest first: what does not fit into memory shows at once.
            waiting = sorted(set(range(len(names))) - done, key=lambda i: (-mean_characters[i], names[i]))
            position_of = {name: position for position, name in enumerate(names)}
            num_finished, next_record = len(done), time.monotonic() + RECORD_EVERY_S
            for tuned in engine.tune(
                (tasks[position] for position in waiting),
                config,
                DodOrigin(dod_name, dod_digest),
                lambda task, epoch: bar.advance(0, f"{task}: epoch {epoch} of {config.epochs}"),
            ):
                if tuned.soft_prompt is None:
                    writer.fail(position_of[tuned.task], tuned.task, str(tuned.failure))
                else:
                    writer.add(position_of[tuned.task], tuned.soft_prompt)
                bar.advance(1, f"{engine.statistics.tokens_per_s:,.0f} tokens/s")
                num_finished += 1
                if time.monotonic() >= next_record:
                    _record_statistics(engine.statistics, recorder, num_finished)
                    next_record = time.monotonic() + RECORD_EVERY_S
            failures = writer.failures()
            if len(failures) < len(names):
                writer.finish(made_from)
        if len(failures) == len(names):
            forget(growing)
            name, reason = next(iter(failures.items()))
            raise ArtifactError(
                f"tuning {len(names)} soft prompts: none could be tuned; of task {name!r}, {reason}. If a number became "
                "infinite or NaN, lower the learning rate."
            )
        growing.rename(out)
        forget(work)
    bank = SoftPromptBank(out)
    _record_curves(bank, recorder)
    _record_statistics(engine.statistics, recorder, len(names))
    return bank


def _take_over(out: Path, made_from: str, recorder: Recorder) -> SoftPromptBank:
    bank = SoftPromptBank(out)
    require_same_origin("a bank", out, bank.header.get("made_from"), made_from)
    _record_curves(bank, recorder)
    return bank


def _overview(tasks: Sequence[Task]) -> tuple[list[str], list[str], list[float]]:
    """What must be known of every task before the first one is tuned: name, digest, mean characters of a train pair."""
    names: list[str] = []
    digests: list[str] = []
    mean_characters: list[float] = []
    for task in tasks:
        pairs = task.pairs_of("train")
        if not pairs:
            raise DataError(
                f"tuning task {task.name!r}: it has no train pairs; at least one is needed. Check its splits."
            )
        names.append(task.name)
        digests.append(task.digest)
        mean_characters.append(sum(len(pair.input) + len(pair.output) for pair in pairs) / len(pairs))
    doubled = [name for name, times in Counter(names).items() if times > 1]
    if not names or doubled:
        found = f"the names {doubled[:5]} occur twice" if doubled else "there are no tasks"
        raise DataError(
            f"tuning soft prompts: {found}; expected tasks with distinct names. Correct the choice of tasks."
        )
    return names, digests, mean_characters


def _key(ref: BaseModelRef, digests: Sequence[str], config: TuningConfig, dod_digest: str | None) -> str:
    """What stored work must agree on to be taken over.

    The DoD's digest is part of it: a bank names the one DoD that it was tuned on, and is used with no other.
    """
    return digest_of_json([ref.fingerprint, ref.dtype, dod_digest, config.identity, digests])[:SHORT]


def mean_curves(bank: SoftPromptBank) -> dict[str, list[float]]:
    """Mean train and validation loss over the bank's prompts, by epoch; a stopped prompt keeps its last value."""
    tunings = [record["tuning"] for record in bank.records()]
    curves: dict[str, list[float]] = {}
    for name in ("train_losses", "validation_losses"):
        series = [tuning[name] for tuning in tunings]
        longest = max(len(values) for values in series)
        padded = [values + [values[-1]] * (longest - len(values)) for values in series]
        curves[name] = [sum(column) / len(column) for column in zip(*padded, strict=True)]
    return curves


def _record_curves(bank: SoftPromptBank, recorder: Recorder) -> None:
    for name, values in mean_curves(bank).items():
        for epoch, value in enumerate(values, start=1):
            recorder.metric(f"mean_{name.removesuffix('es')}", value, step=epoch)
    finals: dict[str, list[float]] = {}
    for record in bank.records():
        for name, value in record["metrics"].items():
            finals.setdefault(name, []).append(value)
    for name, values in finals.items():
        recorder.metric(f"best_{name}" if name == "validation_loss" else name, sum(values) / len(values))
    recorder.metric("failed_tasks", len(bank.failures()))


def _record_statistics(statistics: FleetStatistics, recorder: Recorder, num_finished: int) -> None:
    """How fast it goes, against how many tasks are finished; during a long run too, so that one sees it move."""
    if statistics.train_tokens:
        recorder.metric("finished_tasks", num_finished, step=num_finished)
        recorder.metric("train_tokens_per_s", statistics.tokens_per_s, step=num_finished)
        recorder.metric("memory_halvings", statistics.halvings, step=num_finished)
    if statistics.gpu_peak_mib:
        recorder.metric("gpu_peak_memory_mib", statistics.gpu_peak_mib, step=num_finished)
