"""The table of methods: which proposers there are by name, how each one is made, and what it sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from softprompt_registry.base_models.reference import require_same_base
from softprompt_registry.dod.store import DodStore
from softprompt_registry.dod.task import Task
from softprompt_registry.errors import ConfigError, DataError
from softprompt_registry.translators.training import target_text
from softprompt_registry.translators.translator import Translator
from softprompt_registry.verbalization.layer_grid import LayerGrid
from softprompt_registry.verbalization.patching import LayerPair
from softprompt_registry.verbalization.proposers.behaviour import BehaviourProposer, training_inputs
from softprompt_registry.verbalization.proposers.inspect import InspectProposer
from softprompt_registry.verbalization.proposers.instruction_induction import (
    InductionConfig,
    InstructionInductionProposer,
)
from softprompt_registry.verbalization.proposers.label_list import LabelListProposer
from softprompt_registry.verbalization.proposers.most_frequent import MostFrequentTargetProposer
from softprompt_registry.verbalization.proposers.nearest_tokens import NearestTokensProposer
from softprompt_registry.verbalization.proposers.translator import TranslatorProposer
from softprompt_registry.verbalization.verbalizer import Proposer


class ProposerSettings(Protocol):
    """The settings of an evaluation that its proposers use."""

    @property
    def layer_grid(self) -> str | None: ...
    @property
    def layer_pair(self) -> tuple[int, ...] | None: ...
    @property
    def prefills(self) -> tuple[str, ...]: ...
    @property
    def num_beams(self) -> int | None: ...
    @property
    def induction(self) -> InductionConfig: ...
    @property
    def seed(self) -> int: ...


@dataclass(frozen=True)
class Sources:
    """What a proposer can be made from."""

    translator: Translator
    """It also gives the base model."""
    store: DodStore
    tasks: Mapping[str, Task]
    """The tasks to be verbalized, by name."""
    settings: ProposerSettings


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    label: str
    """Its name in figures and on pages."""
    make: Callable[[Sources], Proposer]
    privileged: bool = False
    """Whether it sees the labels of the task that it describes. It takes no part in `all+verifier`."""
    negative_control: bool = False
    """Whether it ignores what the soft prompt does. It takes no part in `all+verifier`."""
    portability: bool = False
    """Whether `softprompt portability` has a condition of the method's name, with the method's text and label."""


def make_proposers(methods: Sequence[str], sources: Sources) -> list[Proposer]:
    """One proposer per method, in order.

    Raises:
        ConfigError, DataError, BaseModelMismatch: a method cannot be used on these tasks.
    """
    made = [METHODS[name].make(sources) for name in methods]
    assert [proposer.name for proposer in made] == list(methods), "a row of METHODS has another name than its proposer"
    return made


def _translator(sources: Sources) -> Proposer:
    settings = sources.settings
    return TranslatorProposer(sources.translator, prefills=settings.prefills, num_beams=settings.num_beams)


def _behaviour(sources: Sources) -> Proposer:
    inputs = {name: training_inputs(task, seed=sources.settings.seed) for name, task in sources.tasks.items()}
    return BehaviourProposer(sources.translator.base_model, inputs)


def _inspect(sources: Sources) -> Proposer:
    """With the given pair, or for each kind of task the grid's best on training tasks of that kind, on all if it has none."""
    base_model, settings = sources.translator.base_model, sources.settings
    if settings.layer_pair is not None:
        return InspectProposer(base_model, LayerPair(*settings.layer_pair))
    grid = LayerGrid.load(Path(str(settings.layer_grid)))
    require_same_base("reading soft prompts", "the layer grid", grid.base_model, "the loaded model", base_model.ref)
    tasks = sources.tasks
    chosen_on = {item.task for item in grid.tasks if item.split == "train"}
    seen = sorted(name for name in chosen_on if name in tasks and tasks[name].split == "test")
    if seen:
        raise DataError(
            f"verbalizing test tasks: the layer pair was chosen on {seen[:5]}; expected test tasks that it never saw. Make "
            "it anew on training tasks of this DoD."
        )
    kinds: list[str] = sorted({task.kind for task in tasks.values()})
    pairs = {kind: grid.best_pair(kind if kind in grid.kinds else None).pair for kind in kinds}
    return InspectProposer(base_model, pairs, grid.settings["examples"])


def _most_frequent_target(sources: Sources) -> Proposer:
    store, names = sources.store, sources.translator.record.train_tasks
    unknown = sorted(set(names) - set(store.task_names()))
    if unknown:
        raise ConfigError(
            f"counting training targets for the method most_frequent_target: {len(unknown)} of the translator's {len(names)} "
            f"training tasks are not in DoD {store.name!r} (for instance {unknown[0]!r}), expected all; it was trained on "
            "another DoD. Leave the method out."
        )
    return MostFrequentTargetProposer([target_text(store.task(name), None) for name in names])


METHODS = {
    "translator": Method("translator", _translator),
    "inspect": Method("InSPEcT", _inspect, portability=True),
    "nearest_tokens": Method(
        "nearest tokens",
        lambda sources: NearestTokensProposer(sources.translator.base_model),
        negative_control=True,
        portability=True,
    ),
    "behaviour": Method("behaviour", _behaviour),
    "instruction_induction": Method(
        "instruction induction",
        lambda sources: InstructionInductionProposer(
            sources.translator.base_model, sources.tasks, sources.settings.induction
        ),
        portability=True,
    ),
    "label_list": Method(
        "label list", lambda sources: LabelListProposer(sources.translator, sources.tasks), privileged=True
    ),
    "most_frequent_target": Method("most frequent target", _most_frequent_target, negative_control=True),
}
"""By the name that the setting `methods` has; a proposer's own name is the same."""
NOT_AMONG_ALL = tuple(name for name, row in METHODS.items() if row.privileged or row.negative_control)
"""Methods whose texts are left out of `all+verifier`."""
