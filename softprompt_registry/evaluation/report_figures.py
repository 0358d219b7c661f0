"""The figures of an evaluation's report, each with what it shows in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from softprompt_registry import figures
from softprompt_registry.evaluation.verbalizations import UNBOUNDED
from softprompt_registry.pages.svg import PageFigure

if TYPE_CHECKING:
    from softprompt_registry.evaluation.report_data import ReportData

METRIC_NAMES = {
    "label_f1": "Label F1",
    "label_recall": "Label recall",
    "rouge_l": "ROUGE-L",
    "cosine": "Cosine",
    "mpr_midrank": "Percentile rank",
    "top1": "Top-1",
    "faithfulness": "Faithfulness",
    "heldout_log_likelihood": "Held-out log-likelihood",
}
"""Names of the page's metrics, in its order."""
MOST_CATEGORIES = 20
"""More categories than this make no figure; the table has them all."""


def metric_name(metric: str) -> str:
    return METRIC_NAMES.get(metric, metric)


def report_figures(data: ReportData) -> list[PageFigure]:
    """All that the data allow: methods compared, quality by coverage and by soft-prompt accuracy, control prompts,
    means by category."""
    drawn = [_methods(data)]
    if any("faithfulness" in method.intervals for method in data.methods):
        drawn.append(_faithfulness(data))
    if data.curves:
        drawn.append(_coverage(data))
    if any(task.accuracy is not None for task in data.tasks):
        drawn.append(_accuracy(data))
    if data.garbage:
        drawn.append(_controls(data))
    if 2 <= len(data.category_names) <= MOST_CATEGORIES:
        drawn.append(_categories(data))
    return drawn


def _methods(data: ReportData) -> PageFigure:
    bounded = [name for name in METRIC_NAMES if name not in UNBOUNDED]
    metrics = [name for name in bounded if any(name in method.intervals for method in data.methods)]
    chances = {metric_name(metric): chance for metric in metrics if (chance := data.chance(metric)) is not None}
    return _intervals(data, "methods", "Methods compared", metrics, chances)


def _faithfulness(data: ReportData) -> PageFigure:
    # Apart from the others, since it may lie far below 0.
    return _intervals(data, "faithfulness", "Faithfulness", ["faithfulness"], {})


def _intervals(
    data: ReportData, name: str, title: str, metrics: Sequence[str], chances: Mapping[str, float]
) -> PageFigure:
    values = {
        method.name: {metric_name(metric): method.intervals[metric] for metric in metrics if metric in method.intervals}
        for method in data.methods
    }
    lines = []
    for metric in map(metric_name, metrics):
        means = [f"{method} {by[metric].mean:.2f}" for method, by in values.items() if metric in by]
        chance = [f"chance {chances[metric]:.2f}"] if metric in chances else []
        lines.append(f"{metric}: {', '.join(means + chance)}.")
    return PageFigure(
        name,
        title,
        figures.means_with_intervals(title, values, [metric_name(metric) for metric in metrics], chances=chances),
        " ".join(lines),
        "Dots are means over tasks, bars their 95 % bootstrap intervals.",
    )


def _coverage(data: ReportData) -> PageFigure:
    title, quality = "Quality against coverage", metric_name(data.ranked_by)
    curves = {name: [(p.coverage, p.quality) for p in curve.points] for name, curve in data.curves.items()}
    lines = [
        f"{name}: {quality} {curve.no_abstention:.2f} when all tasks are answered, {curve.area:.2f} on average over "
        "coverages."
        for name, curve in data.curves.items()
    ]
    return PageFigure(
        "coverage",
        title,
        figures.quality_by_coverage(title, curves, y=f"{quality} of answered tasks"),
        " ".join(lines),
        "A line that falls to the right says that faithfulness knows the good texts; dotted is answering everything.",
    )


def _controls(data: ReportData) -> PageFigure:
    title = "Control prompts refused, texts given"
    shares = {
        "control prompts refused": [(point.threshold, point.garbage_refused) for point in data.garbage],
        "texts of real soft prompts given": [(point.threshold, point.real_passed) for point in data.garbage],
    }
    good = [(point.threshold, point.good_passed) for point in data.garbage if point.good_passed is not None]
    if good:
        shares["good ones of these given"] = good
    lines = [f"{name}: {points[0][1]:.0%} at 0, {points[-1][1]:.0%} at 1." for name, points in shares.items()]
    return PageFigure(
        "garbage",
        title,
        figures.shares_by_threshold(title, shares, x="required faithfulness"),
        " ".join(lines),
        "Control prompts, and the translator's texts of real soft prompts, by the required faithfulness.",
    )


def _accuracy(data: ReportData) -> PageFigure:
    title, quality = "Quality against soft-prompt accuracy", metric_name(data.ranked_by)
    points = {
        method.name: [
            (task.accuracy, task.texts[method.name].scores[data.ranked_by])
            for task in data.tasks
            if task.accuracy is not None and data.ranked_by in task.texts[method.name].scores
        ]
        for method in data.methods
    }
    return PageFigure(
        "accuracy",
        title,
        figures.scatter(title, points, x="accuracy of the soft prompt", y=quality),
        " ".join(f"{name}: {correlation_words(data, name)}." for name in points),
        "A point is a task. Points without a slope say that weak soft prompts are read as well as strong ones.",
    )


def correlation_words(data: ReportData, method: str) -> str:
    """The correlation of a method's quality with the soft prompts' accuracy as part of a sentence."""
    found = data.correlations.get(method)
    if found is None:
        return "no correlation was computed"
    if found.spearman is None or found.pearson is None:
        return f"no correlation: {found.reason}"
    within = "" if found.low is None or found.high is None else f" ({found.low:.2f} to {found.high:.2f})"
    return f"Spearman {found.spearman:.2f}{within}, Pearson {found.pearson:.2f}, over {found.n} tasks"


def _categories(data: ReportData) -> PageFigure:
    title, quality = "Categories", metric_name(data.ranked_by)
    sizes = {name: f"{name} ({size})" for name, size in data.category_names.items()}
    values = {
        method: {
            sizes[category.name]: category.means[data.ranked_by].mean
            for category in categories
            if data.ranked_by in category.means
        }
        for method, categories in data.categories.items()
    }
    lines = [
        f"{group}: {', '.join(f'{method} {by[group]:.2f}' for method, by in values.items() if group in by)}."
        for group in sizes.values()
    ]
    return PageFigure(
        "categories",
        title,
        figures.grouped_bars(title, values, list(sizes.values()), x=quality),
        f"{quality} by category. {' '.join(lines)}",
        "Means by category, with the number of tasks in brackets.",
    )
