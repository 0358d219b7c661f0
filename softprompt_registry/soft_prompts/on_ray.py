"""Tuning over a Ray cluster: actors with a base model each draw tasks from one queue, into one bank.

The driver hands out tasks, a few more than an actor has slots, and sends the next ones as results come back. What an actor
had when it was lost goes back to the head of the queue, and another actor takes its place. Needs the extra `ray`.
"""

from __future__ import annotations

import importlib
import os
import queue
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from softprompt_registry.base_models.reference import BaseModelRef
from softprompt_registry.dod.task import Task
from softprompt_registry.errors import ConfigError, SoftPromptError
from softprompt_registry.soft_prompts.engines import InThisProcess, Tuned
from softprompt_registry.soft_prompts.fleet import PREPARED_AHEAD, FleetStatistics
from softprompt_registry.soft_prompts.progress import DodOrigin

if TYPE_CHECKING:
    from softprompt_registry.base_models.loading import DType
    from softprompt_registry.soft_prompts.tuning import TuningConfig

MAX_LOST_ACTORS_IN_A_ROW = 5
"""Without a finished task between them: then it is not the machines that fail."""


@dataclass(frozen=True)
class RayConfig:
    """How a Ray cluster is used."""

    address: str | None = None
    """Of the cluster; null takes the one named by RAY_ADDRESS or running on this machine, else starts one here."""
    workers: int = 1
    """Actors, with a base model each."""
    gpus_per_worker: float = 0.0
    """GPUs of each; below 1 several share one."""
    cpus_per_worker: float | None = None
    """Processors of each; null divides those of the cluster by the number of workers."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigError(f"reading the Ray settings: workers is {self.workers}, expected at least 1.")


class RayEngine:
    """Tunes on a Ray cluster. Use as a context manager: it ends its actors.

    Args:
        reference, dtype: what each actor loads, see `load_base_model`; a local folder must be there on each machine.

    Raises:
        ConfigError: ray is not installed, or the cluster cannot hold the actors.
    """

    def __init__(self, reference: str, dtype: DType, config: RayConfig) -> None:
        self._reference, self._dtype, self._config = reference, dtype, config
        self.statistics = FleetStatistics()
        self._ray, self._started = _connect(config)
        self._workers: list[_Worker] = []
        self._ref: BaseModelRef | None = None

    def __enter__(self) -> RayEngine:
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self._workers:
            self._ray.kill(worker.actor)
        self._workers.clear()
        if self._started:
            self._ray.shutdown()

    @property
    def ref(self) -> BaseModelRef:
        if self._ref is None:
            self._workers = [self._new_worker() for _ in range(self._config.workers)]
            try:
                self._ref = self._ray.get(self._workers[0].actor.ref.remote())
            except self._ray.exceptions.RayTaskError as error:
                raise _own_error(error) from error
        return self._ref

    def tune(
        self, tasks: Iterable[Task], config: TuningConfig, origin: DodOrigin, on_epoch: Callable[[str, int], None]
    ) -> Iterator[Tuned]:
        assert self.ref
        started = time.perf_counter()
        finished_tokens = 0
        todo = _Queue(tasks)
        lost_in_a_row = 0
        for worker in self._workers:
            worker.results = worker.actor.tune.remote(config, origin)
            worker.num_given, worker.told_the_end = 0, False
        self._hand_out(todo, config.slots)
        while any(worker.results is not None for worker in self._workers):
            running = {worker.results: worker for worker in self._workers if worker.results is not None}
            (ready,), _ = self._ray.wait(list(running), num_returns=1, fetch_local=False)
            worker = running[ready]
            try:
                tuned, statistics = self._ray.get(next(ready))
            except StopIteration:
                worker.results = None
                continue
            except self._ray.exceptions.RayActorError:
                lost_in_a_row += 1
                if lost_in_a_row > MAX_LOST_ACTORS_IN_A_ROW:
                    raise
                todo.put_back(worker.tasks.values())
                finished_tokens += worker.statistics.train_tokens
                self._replace(worker, config, origin)
            except self._ray.exceptions.RayTaskError as error:
                raise _own_error(error) from error
            else:
                lost_in_a_row = 0
                worker.tasks.pop(tuned.task, None)
                worker.statistics = statistics
                self._add_up(finished_tokens, time.perf_counter() - started)
                yield tuned
            self._hand_out(todo, config.slots)

    def _hand_out(self, todo: _Queue, slots: int) -> None:
        """Give each actor tasks in turn, until it has enough to keep its slots full; tell it when there are no more."""
        # A fleet draws some ahead of its slots, and must never wait for the next task while others are in its slots.
        enough = 2 * slots + PREPARED_AHEAD
        hungry = deque(worker for worker in self._workers if worker.results is not None and not worker.told_the_end)
        while hungry:
            worker = hungry.popleft()
            if len(worker.tasks) >= enough:
                continue
            task = todo.next()
            if task is None:
                worker.told_the_end = True
                worker.actor.give.remote(worker.num_given)
            else:
                worker.tasks[task.name] = task
                worker.num_given += 1
                worker.actor.give.remote(task)
                hungry.append(worker)

    def _replace(self, worker: _Worker, config: TuningConfig, origin: DodOrigin) -> None:
        new = self._new_worker()
        new.results = new.actor.tune.remote(config, origin)
        self._workers[self._workers.index(worker)] = new

    def _add_up(self, tokens_of_lost: int, seconds: float) -> None:
        own = [worker.statistics for worker in self._workers]
        self.statistics.train_tokens = tokens_of_lost + sum(item.train_tokens for item in own)
        self.statistics.seconds = seconds
        self.statistics.halvings = sum(item.halvings for item in own)
        self.statistics.gpu_peak_mib = max(item.gpu_peak_mib for item in own)

    def _new_worker(self) -> _Worker:
        cpus = self._config.cpus_per_worker
        if cpus is None:
            cpus = max(self._ray.cluster_resources().get("CPU", 1) // self._config.workers, 1)
        # Two threads: one tunes, the other takes in tasks meanwhile.
        options = {"num_cpus": cpus, "num_gpus": self._config.gpus_per_worker, "max_concurrency": 2}
        return _Worker(self._ray.remote(_Actor).options(**options).remote(self._reference, self._dtype))


@dataclass
class _Worker:
    """An actor as the driver sees it."""

    actor: Any
    results: Any = None
    """Stream of what it has tuned; None before and after."""
    tasks: dict[str, Task] = field(default_factory=dict)
    """What it was given and has not sent back."""
    num_given: int = 0
    told_the_end: bool = False
    statistics: FleetStatistics = field(default_factory=FleetStatistics)


class _Queue:
    """Tasks in order; those of a lost actor first."""

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._returned: deque[Task] = deque()
        self._tasks = iter(tasks)

    def next(self) -> Task | None:
        return self._returned.popleft() if self._returned else next(self._tasks, None)

    def put_back(self, tasks: Iterable[Task]) -> None:
        self._returned.extend(tasks)


class _Actor:
    """In a process of the cluster: a base model, and a fleet that takes tasks as they come."""

    def __init__(self, reference: str, dtype: DType) -> None:
        self._reference, self._dtype = reference, dtype
        self._given: queue.SimpleQueue[Task | int] = queue.SimpleQueue()

    @cached_property
    def _engine(self) -> InThisProcess:
        # Not in `__init__`: what goes wrong there reaches the driver as a lost actor, without the reason.
        from softprompt_registry.base_models.loading import load_base_model

        return InThisProcess(load_base_model(self._reference, dtype=self._dtype))

    def ref(self) -> BaseModelRef:
        return self._engine.ref

    def give(self, task: Task | int) -> None:
        """A task, or the number of all tasks, once it is known: calls may overtake each other."""
        self._given.put(task)

    def tune(self, config: TuningConfig, origin: DodOrigin) -> Iterator[tuple[Tuned, FleetStatistics]]:
        for tuned in self._engine.tune(self._tasks(), config, origin, lambda task, epoch: None):
            yield tuned, FleetStatistics(**asdict(self._engine.statistics))

    def _tasks(self) -> Iterator[Task]:
        taken, total = 0, None
        while taken != total:
            given = self._given.get()
            if isinstance(given, int):
                total = given
            else:
                taken += 1
                yield given


def _own_error(error: Any) -> Exception:
    """What was raised in an actor, if it is an error of this project."""
    return error.cause if isinstance(error.cause, SoftPromptError) else error


def _connect(config: RayConfig) -> tuple[Any, bool]:
    """The ray module, connected to a cluster, and whether it was connected here."""
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError as error:
        raise ConfigError(
            "tuning on Ray: the package 'ray' is not installed. Install the extra: pip install 'softprompt-registry[ray]'."
        ) from error
    started = not ray.is_initialized()
    if started:
        address = config.address or os.environ.get("RAY_ADDRESS") or None
        try:
            ray.init(address=address, log_to_driver=False, include_dashboard=False if address is None else None)
        except ConnectionError as error:
            raise ConfigError(
                f"tuning on Ray: there is no cluster at {address!r} ({error}). Start one (`ray start --head`), or leave the "
                "address out to start one on this machine."
            ) from error
    resources = ray.cluster_resources()
    wanted = config.gpus_per_worker * config.workers
    if wanted > resources.get("GPU", 0):
        raise ConfigError(
            f"tuning on Ray: {config.workers} workers with {config.gpus_per_worker} GPUs each need {wanted}, the cluster "
            f"has {resources.get('GPU', 0)}. Lower workers or gpus_per_worker."
        )
    return ray, started
