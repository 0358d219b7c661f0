"""The pictures of the project, as matplotlib figures. Drawn without a display; the recorder decides where they go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def curves(title: str, series: Mapping[str, Sequence[float]], *, x: str = "epoch", y: str = "loss") -> Figure:
    """Lines over epochs 1, 2, …; the last value of each stands at its end."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, values in series.items():
        (line,) = axes.plot(range(1, len(values) + 1), values, marker="o", markersize=3, label=name)
        axes.annotate(f"{values[-1]:.2f}", (len(values), values[-1]), color=line.get_color(), fontsize=8)
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def bands(title: str, series: Mapping[str, Sequence[Sequence[float]]], *, x: str = "epoch", y: str = "loss") -> Figure:
    """For each name many curves over epochs 1, 2, …: their median as a line, the middle 80 % of them as a band.

    A curve that ends early keeps its last value.
    """
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, many in series.items():
        longest = max(len(curve) for curve in many)
        table = np.array([[*curve, *[curve[-1]] * (longest - len(curve))] for curve in many])  # (curves, epochs)
        low, middle, high = np.quantile(table, [0.1, 0.5, 0.9], axis=0)
        epochs = np.arange(1, longest + 1)
        (line,) = axes.plot(epochs, middle, marker="o", markersize=3, label=f"{name} (median, 10 to 90 %)")
        axes.fill_between(epochs, low, high, color=line.get_color(), alpha=0.2)
        axes.annotate(f"{middle[-1]:.2f}", (longest, middle[-1]), color=line.get_color(), fontsize=8)
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def distribution(title: str, values: Sequence[float], *, x: str) -> Figure:
    """A histogram, with the median as a line."""
    import statistics

    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.hist(values, bins=min(40, max(10, len(values) // 5)), color="#4c78a8")
    median = statistics.median(values)
    axes.axvline(median, color="#e45756", linestyle="--", label=f"median {median:.2f}")
    axes.set(title=title, xlabel=x, ylabel="soft prompts")
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    return figure


def scores_by_task(title: str, scores: Mapping[str, float], *, x: str) -> Figure:
    """A horizontal bar per task, best on top, and the mean as a line."""
    from matplotlib.figure import Figure

    ordered = sorted(scores.items(), key=lambda item: item[1])
    figure = Figure(figsize=(7, 1.2 + 0.24 * len(ordered)), layout="constrained")
    axes = figure.subplots()
    axes.barh([name for name, _ in ordered], [value for _, value in ordered], color="#4c78a8")
    mean = sum(scores.values()) / len(scores)
    axes.axvline(mean, color="#e45756", linestyle="--", label=f"mean {mean:.2f}")
    axes.set(title=title, xlabel=x, xlim=(0, 1))
    axes.tick_params(axis="y", labelsize=8)
    axes.legend(loc="lower right")
    return figure


def methods_compared(title: str, values: Mapping[str, Mapping[str, float]], metrics: Sequence[str]) -> Figure:
    """Grouped bars: one group per metric, one colour per method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(values)
    for number, (method, scores) in enumerate(values.items()):
        places = [index + number * width for index in range(len(metrics))]
        bars = axes.bar(places, [scores.get(metric, 0.0) for metric in metrics], width, label=method)
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
    axes.set_xticks([index + 0.4 - width / 2 for index in range(len(metrics))], list(metrics))
    axes.set(title=title, ylim=(0, 1.05))
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    return figure
