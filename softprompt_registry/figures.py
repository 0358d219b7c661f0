"""The pictures of the project, as matplotlib figures. Drawn without a display; the recorder decides where they go."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

PALETTE = ("#0072b2", "#c4500a", "#00795a", "#b0528a", "#8f6400", "#5b4bb5", "#7a5230", "#5f6770")
"""Colours of series, told apart by colour-blind readers too and dark enough for white paper; a ninth series starts again,
with other markers, lines and bars."""
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_LINES = ("-", "--", "-.")
_HATCHES = ("", "///", "...")
_PAGE_WIDTH = 5.6
"""Inches: about the width at which a page shows a figure, so that its letters are as large as the page's."""
_LEGEND_LETTERS, _ROW_LETTERS = 60, 24
"""Longer names begin a new line."""


# Figures of a run


def curves(title: str, series: Mapping[str, Sequence[float]], *, x: str = "epoch", y: str = "loss") -> Figure:
    """Lines over epochs 1, 2, …; the last value of each stands at its end."""
    figure, axes = _run_figure(title, x, y)
    for name, values in series.items():
        _epochs(axes, values, name)
    return _with_legend(figure)


def bands(title: str, series: Mapping[str, Sequence[Sequence[float]]], *, x: str = "epoch", y: str = "loss") -> Figure:
    """For each name many curves over epochs 1, 2, …: their median as a line, the middle 80 % of them as a band.

    A curve that ends early keeps its last value.
    """
    figure, axes = _run_figure(title, x, y)
    for name, many in series.items():
        longest = max(len(curve) for curve in many)
        table = np.array([[*curve, *[curve[-1]] * (longest - len(curve))] for curve in many])  # (curves, epochs)
        low, middle, high = np.quantile(table, [0.1, 0.5, 0.9], axis=0)
        colour = _epochs(axes, middle.tolist(), f"{name} (median, 10 to 90 %)")
        axes.fill_between(np.arange(1, longest + 1), low, high, color=colour, alpha=0.2)
    return _with_legend(figure)


def distribution(title: str, values: Sequence[float], *, x: str) -> Figure:
    """A histogram, with the median as a line."""
    figure, axes = _run_figure(title, x, "soft prompts", height=3.6, grid="y")
    axes.hist(values, bins=min(40, max(10, len(values) // 5)), color="#4c78a8")
    median = statistics.median(values)
    axes.axvline(median, color="#e45756", linestyle="--", label=f"median {median:.2f}")
    return _with_legend(figure)


def scores_by_task(title: str, scores: Mapping[str, float], *, x: str) -> Figure:
    """A horizontal bar per task, best on top, and the mean as a line."""
    ordered = sorted(scores.items(), key=lambda item: item[1])
    figure, axes = _run_figure(title, x, "", height=1.2 + 0.24 * len(ordered), grid=None)
    axes.barh([name for name, _ in ordered], [value for _, value in ordered], color="#4c78a8")
    mean = sum(scores.values()) / len(scores)
    axes.axvline(mean, color="#e45756", linestyle="--", label=f"mean {mean:.2f}")
    axes.set_xlim(0, 1)
    axes.tick_params(axis="y", labelsize=8)
    return _with_legend(figure, loc="lower right")


def methods_compared(title: str, values: Mapping[str, Mapping[str, float]], metrics: Sequence[str]) -> Figure:
    """Grouped bars: one group per metric, one colour per method."""
    figure, axes = _run_figure(title, "", "", width=8, grid="y")
    width = 0.8 / len(values)
    for number, (method, scores) in enumerate(values.items()):
        places = [index + number * width for index in range(len(metrics))]
        bars = axes.bar(places, [scores.get(metric, 0.0) for metric in metrics], width, label=method)
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
    axes.set_xticks([index + 0.4 - width / 2 for index in range(len(metrics))], list(metrics))
    axes.set_ylim(0, 1.05)
    return _with_legend(figure)


def _run_figure(
    title: str, x: str, y: str, *, width: float = 7, height: float = 4.2, grid: Literal["both", "y"] | None = "both"
) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=x, ylabel=y)
    if grid:
        axes.grid(axis=grid, alpha=0.3)
    return figure, axes


def _epochs(axes: Axes, values: Sequence[float], label: str) -> Any:
    """Draw a line over epochs 1, 2, … with its last value at its end, and return its colour."""
    (line,) = axes.plot(range(1, len(values) + 1), values, marker="o", markersize=3, label=label)
    axes.annotate(f"{values[-1]:.2f}", (len(values), values[-1]), color=line.get_color(), fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return line.get_color()


def _with_legend(figure: Figure, loc: Literal["best", "lower right"] = "best") -> Figure:
    figure.axes[0].legend(loc=loc)
    return figure


# Figures of a page


def means_with_intervals(
    title: str,
    values: Mapping[str, Mapping[str, tuple[float, float, float]]],
    metrics: Sequence[str],
    *,
    chances: Mapping[str, float] | None = None,
) -> Figure:
    """A row per metric, best read from left to right: a dot for each method's mean, a bar for its interval.

    Args:
        values: by method, by metric: mean, low, high.
        metrics: the rows, from the top.
        chances: by metric the value that no information gives, drawn as a dotted line.
    """
    figure, axes = _page_figure(1.2 + len(metrics) * (0.3 + 0.16 * len(values)), grid="x")
    step = 0.8 / len(values)
    lowest, highest = 0.0, 1.0
    for number, (method, scores) in enumerate(values.items()):
        shown = [(place, *scores[metric]) for place, metric in enumerate(metrics) if metric in scores]
        if not shown:
            continue
        lowest, highest = min(lowest, *(low for _, _, low, _ in shown)), max(highest, *(high for *_, high in shown))
        # Rounding may put a mean some 1e-17 outside its interval.
        below = [max(0.0, mean - low) for _, mean, low, _ in shown]
        above = [max(0.0, high - mean) for _, mean, _, high in shown]
        axes.errorbar(
            [mean for _, mean, _, _ in shown],
            [place + (number - (len(values) - 1) / 2) * step for place, *_ in shown],
            xerr=[below, above],
            fmt=_marker(number),
            markersize=5,
            capsize=2,
            color=PALETTE[number % len(PALETTE)],
            label=_words(method, _LEGEND_LETTERS),
        )
    marked = [(place, chances[metric]) for place, metric in enumerate(metrics) if chances and metric in chances]
    for number, (place, chance) in enumerate(marked):
        label = None if number else "chance"
        axes.plot([chance, chance], [place - 0.45, place + 0.45], color="#000000", linestyle=":", label=label)
    axes.set_yticks(range(len(metrics)), [_words(metric, _ROW_LETTERS) for metric in metrics])
    axes.set(title=title, xlim=(lowest - 0.03, highest + 0.03), ylim=(len(metrics) - 0.5, -0.5))
    return _with_legend_above(figure)


def quality_by_coverage(title: str, curves: Mapping[str, Sequence[tuple[float, float]]], *, y: str) -> Figure:
    """For each name steps through (coverage, quality), by growing coverage; a dotted line shows the quality of the last.

    Each quality holds from the coverage before it.
    """
    figure, axes = _page_figure()
    for number, (name, points) in enumerate(curves.items()):
        colour = PALETTE[number % len(PALETTE)]
        coverages, qualities = [0.0, *(c for c, _ in points)], [points[0][1], *(q for _, q in points)]
        line = _LINES[number // len(PALETTE) % len(_LINES)]
        axes.plot(coverages, qualities, line, drawstyle="steps-pre", color=colour, label=_words(name, _LEGEND_LETTERS))
        axes.axhline(points[-1][1], color=colour, linestyle=":", linewidth=1)
    axes.set(title=title, xlabel="share of tasks answered, most faithful first", ylabel=_words(y), xlim=(0, 1))
    return _with_legend_above(figure)


def shares_by_threshold(title: str, curves: Mapping[str, Sequence[tuple[float, float]]], *, x: str) -> Figure:
    """For each name a line through (threshold, share)."""
    figure, axes = _page_figure()
    for number, (name, points) in enumerate(curves.items()):
        thresholds, shares = [threshold for threshold, _ in points], [share for _, share in points]
        axes.plot(thresholds, shares, color=PALETTE[number % len(PALETTE)], label=_words(name, _LEGEND_LETTERS))
    axes.set(title=title, xlabel=_words(x), ylabel="share", ylim=(-0.02, 1.02))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    return _with_legend_above(figure)


def scatter(title: str, points: Mapping[str, Sequence[tuple[float, float]]], *, x: str, y: str) -> Figure:
    """Points (x, y), with a colour and a marker for each name."""
    figure, axes = _page_figure()
    for number, (name, places) in enumerate(points.items()):
        axes.plot(
            [left for left, _ in places],
            [right for _, right in places],
            _marker(number),
            color=PALETTE[number % len(PALETTE)],
            markersize=5,
            alpha=0.6,
            label=_words(name, _LEGEND_LETTERS),
        )
    axes.set(title=title, xlabel=_words(x), ylabel=_words(y))
    return _with_legend_above(figure)


def grouped_bars(title: str, values: Mapping[str, Mapping[str, float]], groups: Sequence[str], *, x: str) -> Figure:
    """Horizontal bars: a cluster per group, from the top, with a colour for each name; a missing value has no bar."""
    figure, axes = _page_figure(1.2 + len(groups) * (0.25 + 0.2 * len(values)), grid="x")
    height = 0.8 / len(values)
    for number, (name, by_group) in enumerate(values.items()):
        shown = [(place, by_group[group]) for place, group in enumerate(groups) if group in by_group]
        bars = axes.barh(
            [place + (number - (len(values) - 1) / 2) * height for place, _ in shown],
            [value for _, value in shown],
            height * 0.9,
            color=PALETTE[number % len(PALETTE)],
            hatch=_HATCHES[number // len(PALETTE) % len(_HATCHES)],
            label=_words(name, _LEGEND_LETTERS),
        )
        axes.bar_label(bars, fmt="%.2f", fontsize=8, padding=2)
    axes.set_yticks(range(len(groups)), [_words(group, _ROW_LETTERS) for group in groups])
    lowest = min((value for by_group in values.values() for value in by_group.values()), default=0.0)
    axes.set(title=title, xlabel=_words(x), xlim=(min(0.0, 1.1 * lowest), 1.08), ylim=(len(groups) - 0.5, -0.5))
    return _with_legend_above(figure)


def _marker(number: int) -> str:
    """Of a series: where the colours start again, the markers are shifted by one."""
    return _MARKERS[(number + number // len(PALETTE)) % len(_MARKERS)]


def _page_figure(height: float = 4.2, grid: Literal["both", "x"] = "both") -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_PAGE_WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(axis=grid, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _with_legend_above(figure: Figure) -> Figure:
    """What the series are, in as many columns as their names leave room for."""
    labels = figure.axes[0].get_legend_handles_labels()[1]
    longest = max((len(line) for label in labels for line in label.splitlines()), default=0)
    columns = 75 // (longest + 7)  # some 75 letters are as wide as the figure; the sign before a name is 7 wide
    figure.legend(loc="outside upper left", ncols=max(1, min(3, columns, len(labels))), frameon=False, fontsize=9)
    return figure


def _words(text: str, letters: int = 100) -> str:
    """A name that comes from outside, as matplotlib shows it unchanged, in lines of so many letters: "$" begins no formula,
    and the legend leaves out what begins with "_"."""
    plain = no_formula("\n".join(textwrap.wrap(text, letters)))
    return f" {plain}" if plain.startswith("_") else plain


def no_formula(text: str) -> str:
    """A name that comes from outside, as matplotlib shows it unchanged: "$" would begin a formula."""
    return text.replace("$", r"\$")
