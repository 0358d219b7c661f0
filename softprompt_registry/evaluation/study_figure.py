"""The pictures of a study."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from softprompt_registry.evaluation.study_table import ALL_POINTS, RankCorrelation, StudyTable, skill_pairs
from softprompt_registry.figures import PALETTE, no_formula

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHANCE = {"mpr_midrank": 0.5}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def study_figure(title: str, table: StudyTable) -> Figure:
    """A panel per metric: the mean at each point with its 95 % interval over tasks.

    Points that are numbers are joined by a line. The control `most_frequent_target` is grey, chance is dotted.
    """
    from matplotlib.figure import Figure

    metrics = table.metrics
    across = min(3, len(metrics))
    down = math.ceil(len(metrics) / across)
    figure = Figure(figsize=(3.6 * across, 2.6 * down + 0.9), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    names = [point.point for point in table.points]
    joined = all(point.value is not None for point in table.points)
    for panel, metric in zip(panels, metrics, strict=False):
        shown = [
            (place, table.intervals[name][metric])
            for place, name in enumerate(names)
            if metric in table.intervals[name]
        ]
        panel.errorbar(
            [place for place, _ in shown],
            [interval.mean for _, interval in shown],
            # Rounding may put a mean some 1e-17 outside its interval.
            yerr=[
                [max(0.0, interval.mean - interval.low) for _, interval in shown],
                [max(0.0, interval.high - interval.mean) for _, interval in shown],
            ],
            fmt="o-" if joined else "o",
            markersize=5,
            capsize=3,
            color=PALETTE[0],
            label=table.method,
        )
        _draw_control(panel, table, metric)
        if metric in CHANCE:
            panel.axhline(CHANCE[metric], color="#000000", linestyle=":", linewidth=1)
        panel.set_title(metric, fontsize=10)
        panel.set_xticks(range(len(names)), [no_formula(name) for name in names], rotation=30, ha="right", fontsize=8)
        panel.set_xlim(-0.5, len(names) - 0.5)
        panel.grid(axis="y", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[len(metrics) :]:
        panel.set_visible(False)
    figure.suptitle(title, fontsize=11)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def _draw_control(panel: object, table: StudyTable, metric: str, control: str = "most_frequent_target") -> None:
    from matplotlib.axes import Axes

    assert isinstance(panel, Axes)
    means = [point.metrics.get(control, {}).get(metric) for point in table.points]
    places = [place for place, mean in enumerate(means) if mean is not None]
    if control != table.method and places:
        values = [mean for mean in means if mean is not None]
        panel.plot(places, values, "_", markersize=14, color="#7f7f7f", label=control)


def skill_figure(
    title: str, table: StudyTable, correlations: Mapping[str, Mapping[str, RankCorrelation]]
) -> Figure | None:
    """A panel per pair of (how good the soft prompt is, how good its verbalization): a dot per task, a colour per point.

    The title of a panel is the rank correlation over all points. None where no task has both numbers.
    """
    from matplotlib.figure import Figure

    panels = {(skill, metric): table.against_skill(skill, metric) for skill, metric in skill_pairs()}
    panels = {pair: by_point for pair, by_point in panels.items() if any(by_point.values())}
    if not panels:
        return None
    across = min(2, len(panels))
    down = math.ceil(len(panels) / across)
    figure = Figure(figsize=(4.2 * across, 3.2 * down + 0.7), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for place, ((skill, metric), by_point) in enumerate(panels.items()):
        for number, (point, items) in enumerate(by_point.items()):
            axes[place].plot(
                [x for _, x, _ in items],
                [y for _, _, y in items],
                MARKERS[number % len(MARKERS)],
                color=PALETTE[number % len(PALETTE)],
                markersize=5,
                alpha=0.6,
                label=no_formula(point),
            )
        found = correlations.get(f"{skill} and {metric}", {}).get(ALL_POINTS)
        axes[place].set(xlabel=skill.replace("_", " ") + " of the soft prompt", ylabel=f"{metric} of its text")
        if found is not None:
            axes[place].set_title(
                f"rank correlation {found.rho:+.2f} [{found.low:+.2f}, {found.high:+.2f}]", fontsize=9
            )
        axes[place].grid(alpha=0.3)
        axes[place].spines[["top", "right"]].set_visible(False)
    for panel in axes[len(panels) :]:
        panel.set_visible(False)
    figure.suptitle(title, fontsize=11)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure
