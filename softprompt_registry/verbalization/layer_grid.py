"""The layer grid: what every layer pair of InSPEcT says of each soft prompt, and which pair to use.

Paper: its Table 2 gives InSPEcT the best pair for each test task, found with that task's own labels, which a user
does not have. Here the pair is chosen on training tasks, as for the paper's Table 4 (appendix A.3), and
the best of each test task stands beside it under the name oracle.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from softprompt_registry.base_models.reference import BaseModelRef
from softprompt_registry.errors import ArtifactError, DataError
from softprompt_registry.storage import check_format_version, complete_record, read_json, write_json
from softprompt_registry.verbalization.patching import LayerPair

FORMAT_VERSION = 1


@dataclass(frozen=True)
class TaskReadings:
    """What all pairs say of one soft prompt."""

    task: str
    kind: str
    split: str
    """Split of the task: "train" chooses the pair, "test" measures it."""
    truth: str
    soft_prompt_id: str
    texts: tuple[str, ...]
    """One per pair of the grid, cut to the first description."""
    scores: tuple[float, ...]
    """Scores of these texts, in the same order (`evaluation/layer_grid.py`)."""


class ChosenPair(NamedTuple):
    """The pair with the highest mean score over training tasks; of equal ones the first."""

    pair: LayerPair
    score: float
    num_tasks: int


class OracleReading(NamedTuple):
    """The best text of one test task, chosen with the task's own truth."""

    pair: LayerPair
    text: str
    score: float


@dataclass(frozen=True)
class LayerGrid:
    """All readings of a bank's soft prompts, as an artifact: one JSON file.

    Scores of classification tasks and of others are different things; `kind` keeps to the tasks of one kind, and without it
    all count alike.
    """

    base_model: BaseModelRef
    pairs: tuple[LayerPair, ...]
    tasks: tuple[TaskReadings, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    made_from: str | None = None
    """Digest of soft prompts, tasks, base model and settings."""

    def best_pair(self, kind: str | None = None) -> ChosenPair:
        """The pair to use (appendix A.3).

        Raises:
            DataError: the grid has no training task of that kind.
        """
        means = self.mean_scores("train", kind)
        best = max(means, key=means.__getitem__)
        return ChosenPair(best, means[best], len(self._chosen("train", kind)))

    def mean_scores(self, split: str, kind: str | None = None) -> dict[LayerPair, float]:
        """Mean score of every pair over the tasks of a split.

        Raises:
            DataError: there is none.
        """
        readings = self._chosen(split, kind)
        if not readings:
            found = sorted({(item.split, item.kind) for item in self.tasks})
            raise DataError(
                f"averaging a layer grid: it has no {split} task{f' of kind {kind!r}' if kind else ''}, only tasks of "
                f"{found}; expected at least one. Read soft prompts of such tasks too."
            )
        columns = zip(*(item.scores for item in readings), strict=True)
        return {pair: fmean(column) for pair, column in zip(self.pairs, columns, strict=True)}

    def oracle(self, kind: str | None = None) -> dict[str, OracleReading]:
        """For each test task its own best text: an upper bound, not a method."""
        found = {}
        for item in self._chosen("test", kind):
            best = max(range(len(self.pairs)), key=item.scores.__getitem__)
            found[item.task] = OracleReading(self.pairs[best], item.texts[best], item.scores[best])
        return found

    def metrics(self, kind: str | None = None) -> dict[str, float]:
        """The chosen pair with its mean score on training and on test tasks, and the oracle's on test tasks; what needs
        test tasks is left out where there are none.

        Raises:
            DataError: the grid has no training task of that kind.
        """
        chosen = self.best_pair(kind)
        oracle = self.oracle(kind)
        metrics = {
            "source_layer": float(chosen.pair.source),
            "target_layer": float(chosen.pair.target),
            "train_score": chosen.score,
            "num_train_tasks": float(chosen.num_tasks),
            "num_test_tasks": float(len(oracle)),
        }
        if oracle:
            metrics["test_score"] = self.mean_scores("test", kind)[chosen.pair]
            metrics["oracle_test_score"] = fmean(item.score for item in oracle.values())
        return metrics

    @property
    def kinds(self) -> list[str]:
        """Kinds of the training tasks; a pair is chosen for each."""
        return sorted({item.kind for item in self.tasks if item.split == "train"})

    def save(self, path: Path) -> None:
        """Write the file whole or not at all."""
        write_json(
            path,
            {
                "format_version": FORMAT_VERSION,
                "base_model": self.base_model.to_json(),
                "made_from": self.made_from,
                "settings": self.settings,
                "pairs": self.pairs,
                "tasks": [asdict(item) for item in self.tasks],
            },
        )

    @classmethod
    def load(cls, path: Path) -> LayerGrid:
        """Read a file written by `save`.

        Raises:
            ArtifactError: it is missing, damaged or of another format version.
        """
        what = f"layer grid {str(path)!r}"
        record = read_json(path, what)
        check_format_version(record, FORMAT_VERSION, what)
        with complete_record(what):
            pairs = tuple(LayerPair(*pair) for pair in record["pairs"])
            tasks = tuple(
                TaskReadings(**{**item, "texts": tuple(item["texts"]), "scores": tuple(item["scores"])})
                for item in record["tasks"]
            )
            grid = cls(
                BaseModelRef.from_json(record["base_model"]), pairs, tasks, record["settings"], record["made_from"]
            )
        for item in tasks:
            if not len(item.texts) == len(item.scores) == len(pairs):
                raise ArtifactError(
                    f"reading {what}: task {item.task!r} has {len(item.texts)} texts and {len(item.scores)} scores for "
                    f"{len(pairs)} pairs; expected one of each for every pair. Make it again."
                )
        return grid

    def _chosen(self, split: str, kind: str | None) -> list[TaskReadings]:
        return [item for item in self.tasks if item.split == split and kind in (None, item.kind)]
