"""Where soft prompts are tuned: in this process, or (see `on_ray`) by the actors of a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.base_models.reference import BaseModelRef
from softprompt_registry.dod.task import Task
from softprompt_registry.soft_prompts.fleet import Fleet, FleetStatistics
from softprompt_registry.soft_prompts.progress import DodOrigin, finished_prompt
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt
from softprompt_registry.soft_prompts.tuning_settings import TuningConfig


@dataclass(frozen=True)
class Tuned:
    """What became of a task."""

    task: str
    soft_prompt: SoftPrompt | None
    failure: str | None = None
    """Why there is no soft prompt."""


class TuningEngine(Protocol):
    """Turns tasks into soft prompts of one base model."""

    @property
    def ref(self) -> BaseModelRef:
        """The base model."""

    @property
    def statistics(self) -> FleetStatistics:
        """Of the last `tune`."""

    def tune(
        self, tasks: Iterable[Task], config: TuningConfig, origin: DodOrigin, on_epoch: Callable[[str, int], None]
    ) -> Iterator[Tuned]:
        """Tune the tasks, drawn when they are needed; yields each when it is done, in any order.

        Args:
            on_epoch: told the name of a task and how many epochs it has behind it, where the engine knows.
        """


class InThisProcess:
    """One fleet on a loaded base model.

    Args:
        memory_share: of the GPU's free memory, where several processes use one GPU.
    """

    def __init__(self, base_model: BaseModel, *, memory_share: float = 1.0) -> None:
        self.base_model = base_model
        self.memory_share = memory_share
        self.statistics = FleetStatistics()

    @property
    def ref(self) -> BaseModelRef:
        return self.base_model.ref

    def tune(
        self, tasks: Iterable[Task], config: TuningConfig, origin: DodOrigin, on_epoch: Callable[[str, int], None]
    ) -> Iterator[Tuned]:
        fleet = Fleet(self.base_model, config, memory_share=self.memory_share)
        self.statistics = fleet.statistics
        for progress, scores in fleet.tune(tasks, on_epoch):
            if progress.failure:
                yield Tuned(progress.task.name, None, progress.failure)
            else:
                soft_prompt = finished_prompt(self.base_model, progress, config, scores, origin)
                yield Tuned(progress.task.name, soft_prompt)
