"""The methods an evaluation names: what they were chosen on must not be what they are tried on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from small_tasks import make_task
from tiny_llm import tiny_base_model

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.dod.store import DodStore
from softprompt_registry.errors import BaseModelMismatch, ConfigError, DataError
from softprompt_registry.evaluation.evaluating import EvaluationConfig
from softprompt_registry.translators.translator import Translator, TranslatorRecord
from softprompt_registry.verbalization.layer_grid import LayerGrid, TaskReadings
from softprompt_registry.verbalization.patching import LayerPair
from softprompt_registry.verbalization.proposers.inspect import InspectProposer
from softprompt_registry.verbalization.proposers.most_frequent import MostFrequentTargetProposer
from softprompt_registry.verbalization.proposing import Sources, make_proposers
from softprompt_registry.verbalization.verbalizer import Proposer

TRAIN = make_task("moods")
TEST = replace(make_task("sides", ("up", "down")), split="test")
EXAMPLES = {"classification": ["Identify the mood: joy, fear", "Identify the side: up, down"]}


@pytest.fixture
def base() -> BaseModel:
    return tiny_base_model()


@pytest.fixture
def store(tmp_path: Path) -> DodStore:
    with DodStore.create(tmp_path / "tasks.sqlite") as made:
        for task in (TRAIN, TEST):
            made.add_task(task)
    return DodStore.open(tmp_path / "tasks.sqlite")


def proposer(base: BaseModel, store: DodStore, config: EvaluationConfig, *seen: str) -> Proposer:
    translator = Translator(base, TranslatorRecord(base.ref, 4, train_tasks=seen or ("moods",)), "made")
    with store:
        return make_proposers(config.methods, Sources(translator, store, {"sides": TEST}, config))[0]


def grid_file(folder: Path, base: BaseModel, *train: str) -> EvaluationConfig:
    """A grid of two pairs, the second of which is better, and an evaluation that uses it."""
    readings = [
        TaskReadings(name, "classification", "train", "joy, fear", "id", ("joy", "joy, fear"), (0.5, 1.0))
        for name in train
    ]
    pairs = (LayerPair(-1, -1), LayerPair(0, -1))
    LayerGrid(base.ref, pairs, tuple(readings), {"examples": EXAMPLES}).save(folder / "grid.json")
    return EvaluationConfig(methods=("inspect",), layer_grid=str(folder / "grid.json"))


def test_inspect_takes_pair_and_descriptions_of_the_grid(tmp_path: Path, base: BaseModel, store: DodStore) -> None:
    made = proposer(base, store, grid_file(tmp_path, base, "moods"))
    assert isinstance(made, InspectProposer)
    assert made.pair == {"classification": LayerPair(0, -1)} and made.examples == EXAMPLES


def test_a_grid_of_another_base_model_or_of_a_test_task_is_refused(
    tmp_path: Path, base: BaseModel, store: DodStore
) -> None:
    with pytest.raises(BaseModelMismatch, match="the layer grid"):
        proposer(base, store, grid_file(tmp_path, tiny_base_model(seed=1), "moods"))
    with pytest.raises(DataError, match=r"the layer pair was chosen on \['sides'\]"):
        proposer(base, store, grid_file(tmp_path, base, "moods", "sides"))


def test_training_targets_are_counted_in_the_dod_that_was_trained_on(base: BaseModel, store: DodStore) -> None:
    config = EvaluationConfig(methods=("most_frequent_target",))
    with pytest.raises(ConfigError, match="1 of the translator's 2 training tasks are not in DoD 'tasks'"):
        proposer(base, store, config, "moods", "gone")


def test_training_targets_of_the_same_dod_are_counted(base: BaseModel, store: DodStore) -> None:
    made = proposer(base, store, EvaluationConfig(methods=("most_frequent_target",)))
    assert isinstance(made, MostFrequentTargetProposer)
