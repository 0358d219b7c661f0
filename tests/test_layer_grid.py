"""The layer grid: texts of all pairs, the pair that training tasks choose, the oracle, and going on after a kill."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from small_prompts import edit_json, make, numbers, tiny_ref
from tiny_llm import tiny_base_model

from softprompt_registry.base_models.frozen import BaseModel
from softprompt_registry.dod.task import Pair, Task
from softprompt_registry.errors import ArtifactError, BaseModelMismatch, BusyError, ConfigError, DataError
from softprompt_registry.evaluation.grid_figure import heatmap
from softprompt_registry.evaluation.layer_grid import LayerGridConfig, read_layer_grid, score_texts
from softprompt_registry.recording import NullRecorder, ProgressBar
from softprompt_registry.soft_prompts.soft_prompt import SoftPrompt
from softprompt_registry.storage import locked
from softprompt_registry.verbalization.layer_grid import LayerGrid, TaskReadings
from softprompt_registry.verbalization.patching import LayerPair
from softprompt_registry.verbalization.proposers.inspect import InspectProposer
from softprompt_registry.verbalization.verbalizer import VerbalizationConfig

CONFIG = LayerGridConfig(max_new_tokens=8)
PAIRS = (LayerPair(-1, -1), LayerPair(-1, 0), LayerPair(0, -1), LayerPair(0, 0))
"""Of the tiny model, which has two layers."""


class LetterEncoder:
    """A text is the counts of its letters in eight groups: few, so that what a tiny model writes is near to something."""

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        rows = np.zeros((len(texts), 8), dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            for letter in text:
                row[ord(letter) % 8] += 1
        return rows


@cache
def base() -> BaseModel:
    return tiny_base_model()


def members() -> list[tuple[SoftPrompt, Task]]:
    """Three soft prompts with their tasks: two to choose by, one to measure."""
    moods = Task("moods", "classification", (Pair("x", "joy"),), ("joy", "fear"))
    sides = Task("sides", "classification", (Pair("x", "up"),), ("up", "down"), split="test")
    free = Task("free", "generation", (Pair("x", "y"),), hard_prompts=("Say it.",))
    return [
        (make("moods", 1), moods),
        (make("sides", 2), sides),
        (make("free", 3, kind="generation"), free),
    ]


def read(
    out: Path, given: Sequence[tuple[SoftPrompt, Task]] | None = None, recorder: NullRecorder | None = None
) -> LayerGrid:
    return read_layer_grid(base(), given or members(), LetterEncoder(), out, CONFIG, recorder=recorder)


# Reading --------------------------------------------------------------------------------------------------------------


def test_every_pair_reads_what_the_proposer_reads_with_it(tmp_path: Path) -> None:
    grid = read(tmp_path / "grid.json")
    assert grid.pairs == PAIRS and [item.task for item in grid.tasks] == ["moods", "sides", "free"]
    prompts, config = [soft_prompt for soft_prompt, _ in members()], VerbalizationConfig(max_new_tokens=8)
    by_pair = [InspectProposer(base(), pair).propose(prompts, config) for pair in PAIRS]
    for number, (item, (soft_prompt, task)) in enumerate(zip(grid.tasks, members(), strict=True)):
        assert list(item.texts) == [found[number][0].text for found in by_pair]
        assert list(item.scores) == score_texts(item.texts, task, LetterEncoder())
        assert (item.kind, item.split, item.truth) == (task.kind, task.split, task.ground_truth)
        assert item.soft_prompt_id == soft_prompt.id
    assert len({text for item in grid.tasks for text in item.texts}) > 6
    assert any(score > 0 for score in grid.tasks[2].scores)


def test_a_finished_grid_is_taken_as_it_is_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    out = tmp_path / "grid.json"
    grid = read(out)
    assert [path.name for path in tmp_path.iterdir()] == ["grid.json"]
    stamp = out.stat().st_mtime_ns
    assert read(out) == grid and out.stat().st_mtime_ns == stamp
    with pytest.raises(ArtifactError, match="writing a layer grid to .*one made from other inputs or settings"):
        read(out, members()[:2])


class NotingBar:
    def __init__(self, notes: list[tuple[int, str]]) -> None:
        self._notes = notes

    def advance(self, steps: int = 1, note: str = "") -> None:
        self._notes.append((steps, note))

    def __enter__(self) -> NotingBar:
        return self

    def __exit__(self, *error: object) -> None:
        return None


class NotingRecorder(NullRecorder):
    def __init__(self) -> None:
        self.total = 0
        self.notes: list[tuple[int, str]] = []

    def progress(self, title: str, total: int) -> AbstractContextManager[ProgressBar]:
        self.total = total
        return NotingBar(self.notes)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_layer_grid import CONFIG, LetterEncoder, NotingBar, NotingRecorder, base, members
from softprompt_registry.evaluation.layer_grid import read_layer_grid

class Killing(NotingBar):
    def advance(self, steps=1, note=""):
        if steps and note == "sides":  # its texts are read, and not yet on the disk
            os.kill(os.getpid(), signal.SIGKILL)

class Recorder(NotingRecorder):
    def progress(self, title, total):
        return Killing(self.notes)

read_layer_grid(base(), members(), LetterEncoder(), Path({out!r}), CONFIG, recorder=Recorder())
"""


def test_a_second_start_after_a_kill_goes_on_with_the_same_result(tmp_path: Path) -> None:
    out = tmp_path / "killed" / "grid.json"
    script = KILLED.format(tests=str(Path(__file__).parent), out=str(out))
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists()
    (kept,) = out.with_name("grid.json.reading").glob("*/*.json")
    assert kept.stem == members()[0][0].id
    recorder = NotingRecorder()
    grid = read(out, recorder=recorder)
    assert recorder.total == 12 and sum(steps for steps, _ in recorder.notes) == 12
    assert [note for steps, note in recorder.notes if steps] == ["taken from an earlier start", "sides", "free"]
    assert grid == read(tmp_path / "undisturbed.json")
    assert out.read_bytes() == (tmp_path / "undisturbed.json").read_bytes()
    assert [path.name for path in out.parent.iterdir()] == ["grid.json"]


def test_one_process_at_a_time_reads_a_grid(tmp_path: Path) -> None:
    with locked(tmp_path / "grid.json.reading"), pytest.raises(BusyError, match="another process is working there"):
        read(tmp_path / "grid.json")


def test_soft_prompts_without_their_task_are_refused(tmp_path: Path) -> None:
    (moods, task), *others = members()
    silent = Task("moods", "generation", (Pair("x", "y"),))
    stranger = SoftPrompt(numbers(1), None, replace(moods.record, base_model=tiny_ref(seed=9)))
    for given, message in (
        (
            [(moods, task), others[0], (moods, task)],
            r"the tasks \['moods'\] occur twice; expected soft prompts of distinct",
        ),
        ([(others[0][0], task)], "for task 'moods': soft prompt 'sides' stands beside it"),
        ([(moods, silent)], "for task 'moods': it has no ground truth"),
    ):
        with pytest.raises(DataError, match=message):
            read(tmp_path / "grid.json", given)
    with pytest.raises(DataError, match="there is no soft prompt"):
        read_layer_grid(base(), [], LetterEncoder(), tmp_path / "grid.json")
    with pytest.raises(BaseModelMismatch, match="soft prompt 'moods' belongs to base model"):
        read(tmp_path / "grid.json", [(stranger, task)])
    with pytest.raises(ConfigError, match="step is 0, expected above 0"):
        LayerGridConfig(step=0)


# Scores ---------------------------------------------------------------------------------------------------------------


def test_texts_are_scored_as_the_paper_chooses_its_pair() -> None:
    task = Task("moods", "classification", (Pair("x", "joy"),), ("joy", "very sad"))
    # 2 of 2 labels in 2 units; 1 of 2 in 3 words: recall 1/2, F1 2/5; nothing.
    expected = [1.0, (1 / 2 + 2 / 5) / 2, 0.0]
    assert score_texts(["Joy, very sad", "joy and peace", ""], task, LetterEncoder()) == pytest.approx(expected)
    free = Task("free", "generation", (Pair("x", "y"),), hard_prompts=("aab", "other"))
    found = score_texts(["aab", "ab", "c", ""], free, LetterEncoder())
    assert found == pytest.approx([1.0, 3 / 10**0.5, 0.0, 0.0])


def made_up() -> LayerGrid:
    """Four pairs; (0, -1) is best on training tasks, others on each test task."""

    def item(task: str, kind: str, split: str, *scores: float) -> TaskReadings:
        texts = tuple(f"{task} {number}" for number in range(4))
        return TaskReadings(task, kind, split, "truth", f"id of {task}", texts, scores)

    tasks = (
        item("a", "classification", "train", 0.1, 0.2, 0.6, 0.5),
        item("b", "classification", "train", 0.3, 0.0, 0.4, 0.5),
        item("c", "classification", "test", 0.8, 0.1, 0.2, 0.3),
        item("d", "classification", "test", 0.0, 0.4, 0.4, 0.3),
        item("e", "generation", "train", 0.0, 1.0, 0.1, 0.0),
    )
    return LayerGrid(tiny_ref(), PAIRS, tasks, {"step": 1}, "ab" * 32)


def test_the_pair_is_chosen_on_training_tasks_and_the_first_of_equal_ones_wins() -> None:
    grid = made_up()
    # Means over a and b: .2, .1, .5, .5.
    assert grid.best_pair("classification") == (LayerPair(0, -1), 0.5, 2)
    assert grid.best_pair("generation") == (LayerPair(-1, 0), 1.0, 1)
    # Over a, b and e: .4 / 3, 1.2 / 3, 1.1 / 3, 1 / 3.
    best = grid.best_pair()
    assert best.pair == LayerPair(-1, 0) and best.score == pytest.approx(1.2 / 3) and best.num_tasks == 3
    assert grid.mean_scores("test", "classification") == pytest.approx(
        dict(zip(PAIRS, (0.4, 0.25, 0.3, 0.3), strict=True))
    )


def test_the_oracle_chooses_for_each_test_task_with_its_own_truth() -> None:
    assert made_up().oracle() == {"c": (LayerPair(-1, -1), "c 0", 0.8), "d": (LayerPair(-1, 0), "d 1", 0.4)}
    assert made_up().oracle("generation") == {}


def test_metrics_name_the_chosen_pair_and_the_oracle_apart() -> None:
    assert made_up().metrics("classification") == pytest.approx(
        {
            "source_layer": 0.0,
            "target_layer": -1.0,
            "train_score": 0.5,
            "num_train_tasks": 2.0,
            "num_test_tasks": 2.0,
            "test_score": 0.3,
            "oracle_test_score": 0.6,
        }
    )
    assert "test_score" not in made_up().metrics("generation")


def test_no_pair_is_chosen_without_training_tasks() -> None:
    grid = replace(made_up(), tasks=made_up().tasks[2:4])
    with pytest.raises(DataError, match=r"it has no train task, only tasks of \[\('test', 'classification'\)\]"):
        grid.best_pair()
    with pytest.raises(DataError, match="it has no train task of kind 'generation'"):
        grid.metrics("generation")


# The artifact ---------------------------------------------------------------------------------------------------------


def test_a_grid_comes_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "grid.json"
    made_up().save(path)
    assert LayerGrid.load(path) == made_up()
    assert json.loads(path.read_text())["format_version"] == 1


def test_a_damaged_grid_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "grid.json"
    with pytest.raises(ArtifactError, match="reading layer grid .*is missing"):
        LayerGrid.load(path)
    for changes, message in (
        ({"format_version": 2}, "its format_version is 2; this version of softprompt-registry reads 1"),
        ({"pairs": ...}, r"its record is incomplete \('pairs'\)"),
        ({"pairs": [[0, 0]]}, "task 'a' has 4 texts and 4 scores for 1 pairs"),
    ):
        made_up().save(path)
        edit_json(path, **changes)  # type: ignore[arg-type]
        with pytest.raises(ArtifactError, match=message):
            LayerGrid.load(path)


def test_the_heatmap_shows_every_pair_and_rings_the_best() -> None:
    values = made_up().mean_scores("train", "classification")
    figure = heatmap("Layer pairs", values)
    axes = figure.axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.2, 0.1], [0.5, 0.5]])
    (ring,) = axes.lines
    assert (list(ring.get_xdata()), list(ring.get_ydata())) == ([0], [1])
    assert axes.get_title() == "Layer pairs\nbest: source 0, target emb., 0.50"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["emb.", "0"]
    holes = heatmap("Some", {LayerPair(-1, 3): 0.1, LayerPair(2, 5): 0.3}).axes[0].images[0].get_array()
    assert np.isnan(np.asarray(holes, dtype=float)).sum() == 2
