"""The points of a study beside each other: means with intervals, differences from the first point, rank correlations.

Everything here is worked out from what each point reached task by task, and nothing else, so that a logged study can be
computed again from its record.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, NamedTuple

from softprompt_registry.errors import DataError
from softprompt_registry.evaluation.correlation import correlation
from softprompt_registry.evaluation.statistics import Interval, PairedComparison, bootstrap_mean, paired_bootstrap
from softprompt_registry.evaluation.verbalizations import COMPARED, TaskRow
from softprompt_registry.storage import complete_record

SKILLS = ("accuracy", "negative_validation_loss")
"""What is known of how well a soft prompt does its task; higher is better."""
VERBALIZED = ("label_f1", "cosine")
"""What a verbalization is set against it by."""
ALL_POINTS = "all points"
KEPT = ("task", "kind", "truth", "text", "scores", "abstained")
"""What a study keeps of a row."""


class RankCorrelation(NamedTuple):
    """Spearman's rho of `num_pairs` observations of `num_tasks` tasks, with its bootstrap percentile interval."""

    rho: float
    low: float
    high: float
    num_pairs: int
    num_tasks: int


@dataclass(frozen=True)
class PointResult:
    """What one point of a study reached."""

    point: str
    value: float | None
    """The point as a number, where it is one."""
    dod_name: str
    dod_digest: str
    """Digest of the DoD whose test tasks were read. Points of different DoDs are not paired."""
    run_id: str
    """Run of the evaluation."""
    metrics: dict[str, dict[str, float]]
    """By method: the evaluation's means over tasks."""
    rows: dict[str, tuple[TaskRow, ...]]
    """By method."""
    skills: dict[str, dict[str, float]] = field(default_factory=dict)
    """By task: those of `SKILLS` that its soft prompt was measured by."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What else there is to know of the point, by name."""

    def to_json(self) -> dict[str, Any]:
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        rows = {
            method: [{name: getattr(row, name) for name in KEPT} for row in rows] for method, rows in self.rows.items()
        }
        return {**values, "rows": rows}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> PointResult:
        with complete_record(f"the result of a study's point {record.get('point')!r}"):
            rows = {name: tuple(TaskRow(**row) for row in items) for name, items in record["rows"].items()}
            return cls(**{**record, "rows": rows})


@dataclass(frozen=True)
class StudyTable:
    """A study's results, and what follows from them.

    Raises:
        DataError: a point has no result of the method.
    """

    study: str
    method: str
    """The method whose numbers are the study's."""
    points: tuple[PointResult, ...]
    """In order; the first is the one that the others are compared with."""
    seed: int = 0
    """Seed for the bootstraps."""

    def __post_init__(self) -> None:
        for point in self.points:
            if self.method not in point.rows:
                raise DataError(
                    f"comparing the points of study {self.study!r}: point {point.point!r} has no method {self.method!r}; it "
                    f"has {', '.join(point.rows)}. Set `method` to one of them."
                )

    @cached_property
    def intervals(self) -> dict[str, dict[str, Interval]]:
        """By point, by metric: mean over tasks with a 95 % interval."""
        return {
            point.point: {
                metric: bootstrap_mean(list(values.values()), self.seed)
                for metric, values in _columns(point.rows[self.method]).items()
            }
            for point in self.points
        }

    @cached_property
    def differences(self) -> dict[str, dict[str, PairedComparison]]:
        """By point after the first, by metric: this point minus the first, over the tasks that both have read.

        A point that was tested on another DoD has none.
        """
        first, *others = self.points
        reference = _columns(first.rows[self.method])
        return {
            point.point: _compare(_columns(point.rows[self.method]), reference, self.seed)
            for point in others
            if point.dod_digest == first.dod_digest
        }

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics that any point has, in their usual order."""
        return [name for name in COMPARED if any(name in found for found in self.intervals.values())]

    def columns(self) -> dict[str, list[Any]]:
        """A row per point and method: means, and for the study's method intervals and differences from the first point."""
        shown = self.metrics
        names = ["point", "value", "method", "dod", "num_tasks"]
        for metric in shown:
            names += [metric, f"{metric}_low", f"{metric}_high"]
            names += [f"{metric}_difference", f"{metric}_difference_low", f"{metric}_difference_high"]
        rows = [self._row(point, method, shown) for point in self.points for method in point.rows]
        return {name: [row.get(name) for row in rows] for name in names}

    def _row(self, point: PointResult, method: str, shown: Sequence[str]) -> dict[str, Any]:
        means = point.metrics[method]
        row: dict[str, Any] = {"point": point.point, "value": point.value, "method": method, "dod": point.dod_name}
        row |= {"num_tasks": len(point.rows[method])} | {name: means[name] for name in shown if name in means}
        if method != self.method:
            return row
        for metric, interval in self.intervals[point.point].items():
            row |= {f"{metric}_low": interval.low, f"{metric}_high": interval.high}
        for metric, found in self.differences.get(point.point, {}).items():
            row[f"{metric}_difference"] = found.difference
            row |= {f"{metric}_difference_low": found.low, f"{metric}_difference_high": found.high}
        return row

    def task_columns(self) -> dict[str, list[Any]]:
        """A row per point, method and task: truth and text with scores, and how good the soft prompt itself is."""
        names = ["point", "method", "task", "kind", "truth", "text", "abstained", *COMPARED, *SKILLS]
        rows = [
            {
                **{"point": point.point, "method": method, "task": row.task, "kind": row.kind, "truth": row.truth},
                **{"text": row.text, "abstained": row.abstained},
                **{name: row.scores[name] for name in COMPARED if name in row.scores},
                **point.skills.get(row.task, {}),
            }
            for point in self.points
            for method, items in point.rows.items()
            for row in items
        ]
        return {name: [row.get(name) for row in rows] for name in names}

    def against_skill(self, skill: str, metric: str) -> dict[str, list[tuple[str, float, float]]]:
        """By point: (task, how good its soft prompt is, how good its verbalization), for the tasks that have both."""
        return {
            point.point: [
                (row.task, point.skills[row.task][skill], row.scores[metric])
                for row in point.rows[self.method]
                if metric in row.scores and skill in point.skills.get(row.task, {})
            ]
            for point in self.points
        }

    def correlations(self) -> dict[str, dict[str, RankCorrelation]]:
        """By `<skill> and <metric>`, by point and over `ALL_POINTS`: rank correlations over tasks, where they are defined."""
        result: dict[str, dict[str, RankCorrelation]] = {}
        for skill, metric in skill_pairs():
            by_point = self.against_skill(skill, metric)
            by_point[ALL_POINTS] = [item for items in by_point.values() for item in items]
            found = {}
            for name, items in by_point.items():
                correlated = _rank_correlation(items, self.seed)
                if correlated is not None:
                    found[name] = correlated
            if found:
                result[f"{skill} and {metric}"] = found
        return result

    def to_json(self) -> dict[str, Any]:
        """What the study is made from; `from_json` works out the rest again."""
        return {
            "study": self.study,
            "method": self.method,
            "seed": self.seed,
            "points": [point.to_json() for point in self.points],
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> StudyTable:
        with complete_record("a study"):
            points = tuple(PointResult.from_json(point) for point in record["points"])
            return cls(record["study"], record["method"], points, record["seed"])


def skill_pairs() -> Iterator[tuple[str, str]]:
    """Each of `SKILLS` with each of `VERBALIZED`."""
    return ((skill, metric) for skill in SKILLS for metric in VERBALIZED)


def _rank_correlation(items: Sequence[tuple[str, float, float]], seed: int) -> RankCorrelation | None:
    """The correlation of the two numbers beside each task; None where it is not defined."""
    tasks = [task for task, _, _ in items]
    xs, ys = [x for _, x, _ in items], [y for _, _, y in items]
    found = correlation(xs, ys, seed, tasks=tasks, draws=2_000, tie_tolerance=0.0)
    if found.spearman is None:
        return None
    low, high = (found.spearman if end is None else end for end in (found.low, found.high))
    return RankCorrelation(found.spearman, low, high, found.n, len(set(tasks)))


def _columns(rows: Sequence[TaskRow]) -> dict[str, dict[str, float]]:
    """By metric, by task."""
    found = {name: {row.task: row.scores[name] for row in rows if name in row.scores} for name in COMPARED}
    return {name: values for name, values in found.items() if values}


def _compare(
    point: dict[str, dict[str, float]], first: dict[str, dict[str, float]], seed: int
) -> dict[str, PairedComparison]:
    compared = {}
    for metric, values in point.items():
        both = [task for task in values if task in first.get(metric, {})]
        if both:
            compared[metric] = paired_bootstrap([values[t] for t in both], [first[metric][t] for t in both], seed)
    return compared
