"""Tuning over a Ray cluster: actors with a base model each draw tasks from one queue, into one bank.

The driver hands out tasks, a few more than an actor has slots, and sends the next ones as results come back. What an actor
had when it was lost goes back to the head of the queue, and another actor takes its place. Needs the extra `ray`.
"""

from __future__ import annotations

import importlib
import math
import os
import queue
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

from pydantic import PositiveInt

from softprompt_registry.base_models.reference import BaseModelRef
from softprompt_registry.config import settings
from softprompt_registry.dod.task import Task
from softprompt_registry.errors import ConfigError, SoftPromptError
from softprompt_registry.soft_prompts.engines import InThisProcess, Tuned
from softprompt_registry.soft_prompts.fleet import PREPARED_AHEAD, FleetStatistics
from softprompt_registry.soft_prompts.progress import DodOrigin
from softprompt_registry.soft_prompts.tuning_settings import TuningConfig

if TYPE_CHECKING:
    from softprompt_registry.base_models.loading import DType

MAX_LOST_ACTORS_IN_A_ROW = 10
"""Without a finished task between them: then it is not the machines that fail."""
MAX_LOSSES_OF_A_TASK = 3
"""A task whose actors were lost that often is given up; before its last try it has an actor to itself."""
START_TIMEOUT_S = 900.0
"""How long to wait for the first actor to have loaded its base model."""


@settings
class RayConfig:
    """How a Ray cluster is used."""

    address: str | None = None
    """Of the cluster; null takes the one named by RAY_ADDRESS or running on this machine, else starts one here."""
    workers: PositiveInt = 1
    """Actors, with a base model each."""
    gpus_per_worker: float | None = None
    """GPUs of each, below 1 for several to share one; null gives each as many as all can have on the cluster's machines."""
    cpus_per_worker: float | None = None
    """Processors of each; null gives each as many as all can have on the cluster's machines."""


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
        self._end_workers()
        if self._started:
            self._ray.shutdown()

    @property
    def ref(self) -> BaseModelRef:
        if self._ref is None:
            self._start_workers()
            refs = {worker.actor.ref.remote(): worker for worker in self._workers}
            ready, _ = self._ray.wait(list(refs), num_returns=1, timeout=START_TIMEOUT_S)
            if not ready:
                raise self._not_started()
            try:
                self._ref = self._ray.get(ready[0])
            except self._ray.exceptions.RayTaskError as error:
                raise _own_error(error) from error
            except self._lost as error:
                raise ConfigError(
                    f"tuning on Ray: an actor was lost while it loaded {self._reference!r}: {error}"
                ) from error
        return self._ref

    def tune(
        self, tasks: Iterable[Task], config: TuningConfig, origin: DodOrigin, on_epoch: Callable[[str, int], None]
    ) -> Iterator[Tuned]:
        assert self.ref
        self._start_workers()
        try:
            yield from self._tune(_Queue(tasks), config, origin)
        finally:  # a next `tune` begins with new ones, whatever became of these
            self._end_workers()

    def _tune(self, todo: _Queue, config: TuningConfig, origin: DodOrigin) -> Iterator[Tuned]:
        started = last_result = time.perf_counter()
        losses: Counter[str] = Counter()
        lost_in_a_row = 0
        self.statistics, finished = FleetStatistics(), FleetStatistics()
        while not todo.is_empty() or any(worker.tasks for worker in self._workers):
            for worker in self._workers:
                if worker.results is None and not todo.is_empty():
                    worker.begin(config, origin)
            self._hand_out(todo, config.slots, losses)
            running = {worker.results: worker for worker in self._workers if worker.results is not None}
            ready, _ = self._ray.wait(list(running), num_returns=1, timeout=10.0, fetch_local=False)
            if not ready:
                if (
                    not any(worker.ready for worker in self._workers)
                    and time.perf_counter() - last_result > START_TIMEOUT_S
                ):
                    raise self._not_started()
                continue
            worker = running[ready[0]]
            try:
                result = self._ray.get(next(ready[0]))
            except StopIteration:
                _add(finished, worker.statistics)
                worker.results = None
                continue
            except self._lost as error:
                lost_in_a_row += 1
                if lost_in_a_row > MAX_LOST_ACTORS_IN_A_ROW:
                    raise ConfigError(
                        f"tuning on Ray: {lost_in_a_row} actors in a row were lost without finishing a task (the last one: "
                        f"{error}). Look into Ray's logs; fewer workers on a machine leave each more memory."
                    ) from error
                _add(finished, worker.statistics)
                losses.update(list(worker.tasks))
                for name in [name for name in worker.tasks if losses[name] >= MAX_LOSSES_OF_A_TASK]:
                    del worker.tasks[name]
                    yield Tuned(name, None, f"the actor that tuned it was lost {losses[name]} times")
                todo.put_back(worker.tasks.values())
                self._ray.kill(worker.actor)  # it may be cut off and not dead
                self._workers[self._workers.index(worker)] = self._new_worker()
                continue
            except self._ray.exceptions.RayTaskError as error:
                raise _own_error(error) from error
            last_result, worker.ready = time.perf_counter(), True
            if result is None:  # its base model is loaded
                continue
            lost_in_a_row = 0
            tuned, worker.statistics = result
            worker.tasks.pop(tuned.task, None)
            self.statistics = FleetStatistics()
            for part in (finished, *(worker.statistics for worker in self._workers)):
                _add(self.statistics, part)
            self.statistics.seconds = time.perf_counter() - started
            yield tuned

    def _hand_out(self, todo: _Queue, slots: int, losses: Counter[str]) -> None:
        """Give each actor that is ready tasks in turn, until it has enough to keep its slots full.

        An actor that gets no more is told so, as its fleet would else wait for the next task and not go on with what is in
        its slots. Should there be more for it after all, it begins anew.
        """
        enough = 2 * slots + PREPARED_AHEAD  # a fleet draws some ahead of its slots
        hungry = deque(worker for worker in self._workers if worker.ready and worker.total is None)
        while hungry:
            worker = hungry.popleft()
            if len(worker.tasks) >= enough:
                continue
            alone = not todo.is_empty() and losses[todo.first().name] >= MAX_LOSSES_OF_A_TASK - 1
            if todo.is_empty() or (alone and worker.tasks):
                worker.tell_the_end()
                continue
            worker.give(todo.next())
            if alone:
                worker.tell_the_end()
            else:
                hungry.append(worker)

    def _start_workers(self) -> None:
        if not self._workers:
            self._workers = [self._new_worker() for _ in range(self._config.workers)]

    def _end_workers(self) -> None:
        for worker in self._workers:
            self._ray.kill(worker.actor)
        self._workers.clear()

    def _new_worker(self) -> _Worker:
        # Two threads: one tunes, the other takes in tasks meanwhile.
        share = self._share_of_each()
        made = self._ray.remote(_Actor).options(**share, max_concurrency=2)
        memory_share = min(share["num_gpus"], 1.0) or 1.0  # several of them on one GPU divide its memory
        return _Worker(made.remote(self._reference, self._dtype, self._ref, memory_share))

    def _share_of_each(self) -> dict[str, float]:
        machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        return share_of_each(machines, self._config)

    def _not_started(self) -> ConfigError:
        share = self._share_of_each()
        return ConfigError(
            f"tuning on Ray: none of {self._config.workers} workers could start within {START_TIMEOUT_S:.0f} s; each asks "
            f"for {share['num_cpus']} CPUs and {share['num_gpus']} GPUs of one machine, the cluster has "
            f"{self._ray.available_resources()} free. Lower workers, or what each asks for."
        )

    @property
    def _lost(self) -> tuple[type[Exception], ...]:
        """What Ray raises when an actor, its process, its machine or what it had sent is gone."""
        names = ("RayActorError", "ObjectLostError", "NodeDiedError", "WorkerCrashedError", "OutOfMemoryError")
        return tuple(getattr(self._ray.exceptions, name) for name in names)


def share_of_each(machines: Sequence[Mapping[str, float]], config: RayConfig) -> dict[str, float]:
    """What each actor asks for, where the settings leave it open: the most with which all of them can run at once.

    An actor has its processors and GPUs on one machine. Below 1 several share a unit, and none has parts of two.

    Args:
        machines: the resources of each, by Ray's names.
    """
    rooms = [config.workers] * len(machines)
    gpus, cpus = config.gpus_per_worker, config.cpus_per_worker
    if gpus is None:
        gpus = _most([machine.get("GPU", 0) for machine in machines], rooms, config.workers)
    if cpus is None:
        if gpus:
            rooms = [_rooms(machine.get("GPU", 0), gpus) for machine in machines]
        cpus = _most([machine.get("CPU", 0) for machine in machines], rooms, config.workers)
    return {"num_cpus": cpus, "num_gpus": gpus}


def _most(sizes: Sequence[float], rooms: Sequence[int], workers: int) -> float:
    """The largest share with which all workers find a place, at most `rooms` of them on each machine; 0 if there is none."""
    wholes = range(int(max(sizes, default=0)), 0, -1)
    parts = (math.floor(1e4 / several) / 1e4 for several in range(2, workers + 1))  # Ray counts in steps of 0.0001
    for share in chain(wholes, parts):
        if sum(min(room, _rooms(size, share)) for size, room in zip(sizes, rooms, strict=True)) >= workers:
            return float(share)
    return 0.0


def _rooms(size: float, share: float) -> int:
    """How many actors with this share a machine takes."""
    return int(size // share) if share >= 1 else int(size) * int(1 / share)


@dataclass
class _Worker:
    """An actor as the driver sees it."""

    actor: Any
    results: Any = None
    """Stream of what it has tuned, after a first item once its base model is loaded; None between streams."""
    ready: bool = False
    tasks: dict[str, Task] = field(default_factory=dict)
    """What it was given and has not sent back."""
    num_given: int = 0
    total: int | None = None
    """How many tasks this stream has, once the actor was told."""
    statistics: FleetStatistics = field(default_factory=FleetStatistics)

    def begin(self, config: TuningConfig, origin: DodOrigin) -> None:
        self.num_given, self.total, self.ready, self.statistics = 0, None, False, FleetStatistics()
        self.results = self.actor.tune.remote(config, origin)

    def give(self, task: Task) -> None:
        self.tasks[task.name] = task
        self.num_given += 1
        self.actor.give.remote(task)

    def tell_the_end(self) -> None:
        self.total = self.num_given
        self.actor.give.remote(self.total)


class _Queue:
    """Tasks in order; those of a lost actor first."""

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._first: deque[Task] = deque()
        self._tasks = iter(tasks)

    def is_empty(self) -> bool:
        if not self._first and (task := next(self._tasks, None)) is not None:
            self._first.append(task)
        return not self._first

    def first(self) -> Task:
        """The next task, which stays; there is one."""
        return self._first[0]

    def next(self) -> Task:
        """The next task; there is one."""
        return self._first.popleft()

    def put_back(self, tasks: Iterable[Task]) -> None:
        self._first.extendleft(reversed(list(tasks)))


def _add(total: FleetStatistics, part: FleetStatistics) -> None:
    total.train_tokens += part.train_tokens
    total.halvings += part.halvings
    total.gpu_peak_mib = max(total.gpu_peak_mib, part.gpu_peak_mib)


class _Actor:
    """In a process of the cluster: a base model, and a fleet that takes tasks as they come."""

    def __init__(self, reference: str, dtype: DType, expected: BaseModelRef | None, memory_share: float) -> None:
        self._reference, self._dtype, self._expected, self._memory_share = reference, dtype, expected, memory_share
        self._engine: InThisProcess | None = None
        self._given: queue.SimpleQueue[Task | int] = queue.SimpleQueue()

    def _loaded(self) -> InThisProcess:
        # Not in `__init__`: what goes wrong there reaches the driver as a lost actor, without the reason.
        from softprompt_registry.base_models.loading import load_base_model

        if self._engine is None:
            base_model = load_base_model(self._reference, dtype=self._dtype, expected=self._expected)
            self._engine = InThisProcess(base_model, memory_share=self._memory_share)
        return self._engine

    def ref(self) -> BaseModelRef:
        return self._loaded().ref

    def give(self, task: Task | int) -> None:
        """A task, or the number of all tasks, once it is known: calls may overtake each other."""
        self._given.put(task)

    def tune(self, config: TuningConfig, origin: DodOrigin) -> Iterator[tuple[Tuned, FleetStatistics] | None]:
        engine = self._loaded()
        yield None  # ready
        for tuned in engine.tune(self._tasks(), config, origin, lambda task, epoch: None):
            yield tuned, FleetStatistics(**asdict(engine.statistics))

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
    wanted = (config.gpus_per_worker or 0) * config.workers
    if wanted > resources.get("GPU", 0):
        if started:
            ray.shutdown()
        raise ConfigError(
            f"tuning on Ray: {config.workers} workers with {config.gpus_per_worker} GPUs each need {wanted}, the cluster "
            f"has {resources.get('GPU', 0)}. Lower workers or gpus_per_worker."
        )
    return ray, started
