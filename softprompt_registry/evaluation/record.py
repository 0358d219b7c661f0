"""An evaluation as an artifact: every text with its candidates, what the verifier measured, the truths and the rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from softprompt_registry.evaluation.control_prompts import ControlResult
from softprompt_registry.evaluation.metrics import TextEncoder
from softprompt_registry.evaluation.text_scores import EvaluatedTask
from softprompt_registry.evaluation.verbalizations import Evaluation, evaluate_verbalizations
from softprompt_registry.storage import complete_record, read_json, write_json
from softprompt_registry.verbalization.abstention import AbstentionRule
from softprompt_registry.verbalization.verbalizer import Verbalization
from softprompt_registry.verbalization.verification import Verification

CANDIDATES, TASKS, RULE = "candidates.json", "tasks.json", "rule.json"
RANKING, REPORTING = "verification_ranking.json", "verification_reporting.json"
FILES = (CANDIDATES, TASKS, RANKING, REPORTING, RULE)
"""What `save` writes and `load` reads."""


@dataclass(frozen=True)
class EvaluationRecord:
    """What an evaluation found, from which all of its numbers can be computed again."""

    tasks: dict[str, EvaluatedTask]
    """By name, in the order of the texts."""
    texts: dict[str, list[Verbalization]]
    """By method, one for each task."""
    ranking: list[Verification]
    """For each task, every candidate on the pairs that the verifier chose on."""
    reporting: list[Verification]
    """For each task, every method's text on pairs that no text was chosen on."""
    rule: AbstentionRule
    """The rule by which texts were withheld."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The evaluation's settings by `section.key`. They are no part of the files: a run has them as its params."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Test tasks that could not be evaluated, with the reason. This and what follows are tables of the run, not read back."""
    failures: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """By proposer and task, why there is no candidate."""
    calibration: Mapping[str, list[Any]] = field(default_factory=dict)
    """Columns of what the rule was chosen on; empty if it was not chosen."""
    controls: ControlResult | None = None
    """None without control prompts."""

    @property
    def seed(self) -> int:
        """Seed of the bootstraps over tasks."""
        return int(self.settings["seed"])

    @property
    def split_seed(self) -> int:
        """Seed by which each task's held-out pairs were divided into those that chose a text and the others."""
        return int(self.settings["verifier.seed"])

    def score(self, encoder: TextEncoder) -> Evaluation:
        """Every text against its task's truth, and the methods compared."""
        return evaluate_verbalizations(self.texts, self.tasks, encoder, reporting=self.reporting, seed=self.seed)

    def tables(self) -> dict[str, Mapping[str, Sequence[Any]]]:
        """By file name, the columns of the run's tables for people."""
        failures = [("", task, reason) for task, reason in self.left_out.items()]
        failures += [(method, task, reason) for (method, task), reason in self.failures.items()]
        columns = {name: [row[place] for row in failures] for place, name in enumerate(("method", "task", "reason"))}
        tables: dict[str, Mapping[str, Sequence[Any]]] = {
            "abstention_rule.json": self.calibration,
            "left_out.json": columns,
        }
        if self.controls is not None:
            tables |= {"garbage.json": self.controls.rows, "garbage_curve.json": self.controls.curve_table}
        return tables

    def save(self, folder: Path) -> None:
        """Write `FILES` into a folder."""
        write_json(
            folder / CANDIDATES, {name: [item.to_json() for item in items] for name, items in self.texts.items()}
        )
        write_json(folder / TASKS, {"tasks": [task.to_json() for task in self.tasks.values()]})
        for name, verifications in ((RANKING, self.ranking), (REPORTING, self.reporting)):
            write_json(folder / name, {"tasks": [item.to_json() for item in verifications]})
        write_json(folder / RULE, self.rule.to_json())

    @classmethod
    def load(cls, folder: Path, settings: Mapping[str, Any]) -> EvaluationRecord:
        """What `save` wrote.

        Args:
            settings: the evaluation's, by `section.key`; values may be texts.

        Raises:
            ArtifactError: a file is missing or damaged, or the settings lack a seed.
        """
        what = "an evaluation"
        candidates, tasks, ranking, reporting, rule = (read_json(folder / name, what) for name in FILES)
        with complete_record(what):
            record = cls(
                {item["name"]: EvaluatedTask.from_json(item) for item in tasks["tasks"]},
                {method: [Verbalization.from_json(item) for item in items] for method, items in candidates.items()},
                [Verification.from_json(item) for item in ranking["tasks"]],
                [Verification.from_json(item) for item in reporting["tasks"]],
                AbstentionRule.from_json(rule),
                dict(settings),
            )
            _ = record.seed, record.split_seed
        return record
