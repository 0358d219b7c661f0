"""What a study's table says of its points: means, intervals, paired differences, rank correlations, and the pictures."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from softprompt_registry.errors import ArtifactError, DataError
from softprompt_registry.evaluation.statistics import bootstrap_mean, paired_bootstrap
from softprompt_registry.evaluation.study_figure import skill_figure, study_figure
from softprompt_registry.evaluation.study_table import ALL_POINTS, PointResult, StudyTable
from softprompt_registry.evaluation.verbalizations import TaskRow

DOD = "d" * 64
F1 = {"small": {"a": 0.0, "b": 0.5, "c": 0.5}, "large": {"a": 1.0, "b": 0.5, "c": 0.0}}
COSINE = {"small": {"a": 0.1, "b": 0.2, "free": 0.3}, "large": {"a": 0.4, "b": 0.5, "free": 0.6}}


def point(name: str, value: float | None, *, dod: str = DOD, method: str = "translator") -> PointResult:
    """Three classification tasks, of which `c` has no cosine here, and one that has no labels."""
    f1, cosine = F1[name], COSINE[name]
    rows = tuple(
        TaskRow(
            task,
            "generation" if task == "free" else "classification",
            f"truth of {task}",
            f"{name} text $1$ of {task}",
            ({"label_f1": f1[task]} if task in f1 else {}) | ({"cosine": cosine[task]} if task in cosine else {}),
        )
        for task in ("a", "b", "c", "free")
    )
    means = {"label_f1": sum(f1.values()) / 3, "cosine": sum(cosine.values()) / 3, "mpr_paper": 0.75}
    control = {"label_f1": 0.25, "cosine": 0.125}
    skills = {task: {"accuracy": accuracy} for task, accuracy in zip("abc", (0.0, 0.5, 1.0), strict=True)}
    skills["free"] = {"negative_validation_loss": -2.0}
    return PointResult(
        point=name,
        value=value,
        dod_name="tasks",
        dod_digest=dod,
        run_id=f"run of {name}",
        metrics={method: means, "most_frequent_target": control},
        rows={method: rows, "most_frequent_target": rows},
        skills=skills,
        facts={"train_tasks": 3},
    )


TABLE = StudyTable("dod-size", "translator", (point("small", 0.25), point("large", 1.0)), seed=5)


# The table ------------------------------------------------------------------------------------------------------------


def test_intervals_are_over_the_tasks_that_have_the_metric() -> None:
    assert TABLE.metrics == ["label_f1", "cosine"]
    assert TABLE.intervals["small"]["label_f1"] == bootstrap_mean([0.0, 0.5, 0.5], 5)
    assert TABLE.intervals["large"]["cosine"] == bootstrap_mean([0.4, 0.5, 0.6], 5)


def test_differences_are_paired_with_the_first_point() -> None:
    assert list(TABLE.differences) == ["large"]
    f1 = TABLE.differences["large"]["label_f1"]
    assert f1 == paired_bootstrap([1.0, 0.5, 0.0], [0.0, 0.5, 0.5], 5)
    assert (f1.difference, f1.wins, f1.ties, f1.losses, f1.n) == (pytest.approx(1 / 6), 1, 1, 1, 3)


def test_tasks_are_paired_by_name_not_by_place() -> None:
    large = point("large", 1.0)
    turned = replace(large, rows={**large.rows, "translator": large.rows["translator"][::-1]})
    found = StudyTable("dod-size", "translator", (point("small", 0.25), turned), seed=5).differences["large"]
    assert found["label_f1"].difference == pytest.approx(1 / 6)
    assert (found["label_f1"].wins, found["label_f1"].ties, found["label_f1"].losses) == (1, 1, 1)
    fewer = replace(large, rows={**large.rows, "translator": large.rows["translator"][1:2]})
    found = StudyTable("dod-size", "translator", (point("small", 0.25), fewer)).differences["large"]
    assert found["label_f1"].n == 1 and found["label_f1"].difference == 0.0


def test_points_of_different_dods_are_not_paired() -> None:
    points = (point("small", None), point("large", None, dod="e" * 64))
    assert StudyTable("out-of-domain", "translator", points).differences == {}


def test_the_columns_hold_means_of_all_methods_and_intervals_of_the_studys() -> None:
    columns = TABLE.columns()
    assert {len(column) for column in columns.values()} == {4}
    assert columns["point"] == ["small", "small", "large", "large"]
    assert columns["method"] == ["translator", "most_frequent_target"] * 2
    assert columns["label_f1"] == [1 / 3, 0.25, 0.5, 0.25]
    assert columns["num_tasks"] == [4] * 4
    interval = TABLE.intervals["large"]["label_f1"]
    assert columns["label_f1_low"] == [TABLE.intervals["small"]["label_f1"].low, None, interval.low, None]
    assert columns["label_f1_difference"] == [None, None, TABLE.differences["large"]["label_f1"].difference, None]


def test_every_task_has_its_row() -> None:
    columns = TABLE.task_columns()
    assert len(columns["task"]) == 2 * 2 * 4 and {len(column) for column in columns.values()} == {16}
    assert columns["task"][:4] == ["a", "b", "c", "free"]
    assert columns["label_f1"][:4] == [0.0, 0.5, 0.5, None] and columns["cosine"][:4] == [0.1, 0.2, None, 0.3]
    assert columns["accuracy"][:4] == [0.0, 0.5, 1.0, None]
    assert columns["negative_validation_loss"][:4] == [None, None, None, -2.0]


def test_skill_is_set_against_what_was_verbalized() -> None:
    assert TABLE.against_skill("accuracy", "label_f1") == {
        "small": [("a", 0.0, 0.0), ("b", 0.5, 0.5), ("c", 1.0, 0.5)],
        "large": [("a", 0.0, 1.0), ("b", 0.5, 0.5), ("c", 1.0, 0.0)],
    }
    found = TABLE.correlations()["accuracy and label_f1"]
    assert found["large"].rho == pytest.approx(-1)
    # Ranks 1, 2, 3 against 1, 2.5, 2.5: 1.5 / sqrt(2 · 1.5) = sqrt(3) / 2.
    assert found["small"].rho == pytest.approx(3**0.5 / 2)
    assert (found[ALL_POINTS].num_pairs, found[ALL_POINTS].num_tasks) == (6, 3)
    assert "negative_validation_loss and cosine" not in TABLE.correlations(), "one value of one task twice"


def test_a_study_can_be_computed_again_from_its_record() -> None:
    record = json.loads(json.dumps(TABLE.to_json()))
    row = record["points"][0]["rows"]["translator"][0]
    assert list(row) == ["task", "kind", "truth", "text", "scores", "abstained"]
    again = StudyTable.from_json(record)
    assert again == TABLE
    assert (again.intervals, again.differences) == (TABLE.intervals, TABLE.differences)
    assert again.columns() == TABLE.columns() and again.correlations() == TABLE.correlations()
    record = TABLE.to_json()
    del record["points"][0]["rows"]["translator"][0]["text"]
    with pytest.raises(ArtifactError, match="point 'small': its record is incomplete"):
        StudyTable.from_json(record)


def test_a_point_without_the_method_is_named() -> None:
    with pytest.raises(DataError, match="point 'large' has no method 'translator'; it has inspect, most_frequent"):
        StudyTable("dod-size", "translator", (point("small", 1.0), point("large", 2.0, method="inspect")))


# The pictures ---------------------------------------------------------------------------------------------------------


def test_the_figure_has_a_panel_per_metric_and_a_place_per_point(tmp_path: Path) -> None:
    figure = study_figure("Study dod-size", TABLE)
    panels = [panel for panel in figure.axes if panel.get_visible()]
    assert [panel.get_title() for panel in panels] == ["label_f1", "cosine"]
    for panel in panels:
        assert [label.get_text() for label in panel.get_xticklabels()] == ["small", "large"]
        line = panel.lines[0]
        means = [TABLE.intervals[name][panel.get_title()].mean for name in ("small", "large")]
        assert list(line.get_ydata()) == pytest.approx(means)
        assert all(left < right for left, right in pairwise(line.get_xdata()))
        assert line.get_linestyle() == "-", "shares are numbers, and joined"
    figure.savefig(tmp_path / "study.png")
    assert (tmp_path / "study.png").stat().st_size > 5_000
    apart = study_figure("labels", StudyTable("labels", "translator", (point("small", None), point("large", None))))
    assert apart.axes[0].lines[0].get_linestyle() == "None"


def test_the_scatter_has_a_dot_per_task_and_point(tmp_path: Path) -> None:
    figure = skill_figure("accuracy", TABLE, TABLE.correlations())
    assert figure is not None
    panels = [panel for panel in figure.axes if panel.get_visible()]
    assert [panel.get_ylabel() for panel in panels] == ["label_f1 of its text", "cosine of its text"] + [
        "cosine of its text"
    ]
    assert [len(line.get_xdata()) for line in panels[0].lines] == [3, 3]
    rho = TABLE.correlations()["accuracy and label_f1"][ALL_POINTS].rho
    assert f"{rho:+.2f}" in panels[0].get_title()
    assert panels[2].get_title() == "", "no rank correlation where there is none"
    figure.savefig(tmp_path / "accuracy.png")
    nothing = StudyTable("accuracy", "translator", (replace(point("small", 1.0), skills={}),))
    assert skill_figure("accuracy", nothing, {}) is None
