"""Small tasks, and settings under which a tiny model learns them in a moment."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from softprompt_registry.dod.store import DodStore
from softprompt_registry.dod.task import Pair, PairSplit, Task
from softprompt_registry.soft_prompts.tuning_settings import TuningConfig

CONFIG = TuningConfig(
    num_virtual_tokens=4,
    learning_rate=3e-2,
    epochs=3,
    patience_epochs=None,
    batch_size=4,
    slots=3,
    tokens_per_forward=200,
    max_sequence_tokens=80,
    max_new_tokens=8,
)


def make_task(
    name: str, labels: tuple[str, ...] = ("joy", "fear"), train: int = 6, length: int = 1, test: int = 3
) -> Task:
    counts: dict[PairSplit, int] = {"train": train, "validation": 2, "test": test}
    pairs = [
        Pair(f"{name} {number} " * length, labels[number % len(labels)], split)
        for split, count in counts.items()
        for number in range(count)
    ]
    return Task(name, "classification", tuple(pairs), labels)


def free_task(name: str, train: int = 5) -> Task:
    counts: dict[PairSplit, int] = {"train": train, "validation": 1, "test": 2}
    pairs = [Pair(f"{name} {n}", f"answer {n}", split) for split, count in counts.items() for n in range(count)]
    return Task(name, "generation", tuple(pairs))


def write_dod(path: Path, tasks: Iterable[Task]) -> Path:
    with DodStore.create(path) as store:
        for task in tasks:
            store.add_task(task)
    return path


TASKS = [
    make_task("b", length=2),
    make_task("a", ("up", "down"), train=5),
    make_task("c", ("red", "blue", "green"), train=9, length=3),
    free_task("free"),
    make_task("d", train=3),
]
