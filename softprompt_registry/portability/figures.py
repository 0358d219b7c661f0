"""The figures of the portability page, each with what it shows in words."""

from __future__ import annotations

from softprompt_registry.figures import PALETTE, no_formula, scatter
from softprompt_registry.pages.formatting import signed
from softprompt_registry.pages.svg import PageFigure
from softprompt_registry.portability.analysis import ALL_TASKS, Measure, Portability
from softprompt_registry.portability.conditions import CONDITIONS, SOFT_PROMPT

METRIC_NAMES = {
    "rouge_l": "task ROUGE-L",
    "exact_match": "exact match",
    "accuracy_strict": "label accuracy, strict",
    "accuracy_lenient": "label accuracy",
}
_COLOURS = {"translation": PALETTE[0], "examples": PALETTE[1], "other text": PALETTE[2], "reference": PALETTE[7]}
_STRONGEST = 0.6
"""Share of colour in a cell of the heat map whose difference is 1 or more; a page's letters stay readable on it."""


def measure_name(measure: Measure) -> str:
    """As people call it."""
    name = METRIC_NAMES[measure.metric]
    return name if measure.kind is None else f"{name}, {measure.kind}"


def portability_figures(result: Portability) -> list[PageFigure]:
    """For each target: scores of the conditions, score against tokens where they were counted, differences of all pairs."""
    drawn = []
    for number, target in enumerate(result.targets):
        drawn.append(_scores(result, target, f"scores_{number}"))
        if points := _cost_points(result, target):
            drawn.append(_costs(points, target, f"costs_{number}"))
        if any(comparison.target == target for comparison in result.comparisons):
            drawn.append(_differences(result, target, f"differences_{number}"))
    return drawn


def _scores(result: Portability, target: str, name: str) -> PageFigure:
    """The paper's Figure 3: a bar per condition with its interval; a panel per measure."""
    from matplotlib.figure import Figure

    conditions = result.conditions(target)
    title = f"Scores on {target}"
    figure = Figure(figsize=(1.6 + 2.3 * len(result.measures), 0.9 + 0.27 * len(conditions)), layout="constrained")
    panels = figure.subplots(1, len(result.measures), sharey=True, squeeze=False)[0]
    words = []
    for panel, measure in zip(panels, result.measures, strict=True):
        said = []
        for place, condition in enumerate(conditions):
            interval = result.interval(target, condition, measure)
            if interval is None:
                continue
            # Rounding may put a mean some 1e-17 outside its interval.
            error = [[max(0.0, interval.mean - interval.low)], [max(0.0, interval.high - interval.mean)]]
            panel.barh(
                place,
                interval.mean,
                0.72,
                xerr=error,
                color=_COLOURS[CONDITIONS[condition].group],
                alpha=0.75,
                error_kw={"ecolor": "#000000", "elinewidth": 1, "capsize": 2},
            )
            panel.annotate(
                f"{interval.mean:.2f}", (max(interval.high, interval.mean) + 0.02, place), va="center", fontsize=8
            )
            said.append(f"{CONDITIONS[condition].label} {interval.mean:.2f}")
        panel.set(xlabel=measure_name(measure), xlim=(0, 1.15))
        panel.set_xticks([0, 0.5, 1])
        panel.grid(axis="x", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        words.append(f"{measure_name(measure)}: {', '.join(said)}.")
    panels[0].set_yticks(range(len(conditions)), [CONDITIONS[condition].label for condition in conditions])
    panels[0].set_ylim(len(conditions) - 0.5, -0.5)
    # Not by `loc`: a page takes away the title that stands in the middle.
    panels[0].set_title(no_formula(title), fontsize=11, x=0, ha="left")
    caption = "Means over tasks with their 95 % bootstrap intervals."
    if SOFT_PROMPT in conditions:
        caption += f" The soft prompt works on {result.small_model}."
    return PageFigure(name, title, figure, " ".join(words), caption, is_wide=True)


def _cost_points(result: Portability, target: str) -> dict[str, list[tuple[float, float]]]:
    """By condition, tokens per answer and score; empty where no token was counted."""
    points = {}
    for condition in result.conditions(target):
        tokens, interval = result.tokens_per_answer(target, condition), result.interval(target, condition)
        if tokens is not None and interval is not None and not _on_another_model(result, target, condition):
            points[CONDITIONS[condition].label] = [(tokens, interval.mean)]
    return points


def _costs(points: dict[str, list[tuple[float, float]]], target: str, name: str) -> PageFigure:
    title = f"Score against cost on {target}"
    words = [f"{condition}: {tokens:.0f} tokens, {score:.2f}." for condition, [(tokens, score)] in points.items()]
    return PageFigure(
        name,
        title,
        scatter(
            no_formula(title), points, x="tokens per answer, prompt and completion", y=METRIC_NAMES[ALL_TASKS.metric]
        ),
        " ".join(words),
        "High and left is good and cheap. Scores are means over tasks, tokens means over answers.",
    )


def _differences(result: Portability, target: str, name: str) -> PageFigure:
    """Every condition (row) minus every other (column)."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    conditions = result.conditions(target)
    title = f"Differences on {target}"
    size = len(conditions)
    figure = Figure(figsize=(1.9 + 0.42 * size, 1.6 + 0.36 * size), layout="constrained")
    axes = figure.subplots()
    words = []
    for row, a in enumerate(conditions):
        for column, b in enumerate(conditions):
            found = result.comparison(target, a, b) if a != b else None
            if found is None:
                continue
            # Cells are vectors of two colours at varying strength: they fit light pages and dark ones.
            strength = min(1.0, abs(found.difference)) * _STRONGEST
            colour = PALETTE[0] if found.difference > 0 else PALETTE[1]
            axes.add_patch(
                Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor=colour, alpha=strength, edgecolor="none")
            )
            is_clear = found.low > 0 or found.high < 0
            axes.annotate(
                signed(found.difference),
                (column, row),
                ha="center",
                va="center",
                fontsize=7,
                fontweight="bold" if is_clear else "normal",
            )
            if is_clear and found.difference > 0:
                words.append(f"{CONDITIONS[a].label} is ahead of {CONDITIONS[b].label} by {found.difference:.2f}.")
    names = [CONDITIONS[condition].label for condition in conditions]
    axes.set_xticks(range(size), names, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(size), names, fontsize=8)
    axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5), title=no_formula(title))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return PageFigure(
        name,
        title,
        figure,
        " ".join(words) or "No condition is clearly ahead of another.",
        f"The row's {METRIC_NAMES[ALL_TASKS.metric]} minus the column's, paired over tasks; bold where the 95 % interval "
        "leaves out zero.",
    )


def _on_another_model(result: Portability, target: str, condition: str) -> bool:
    """Whose tokens are not the target's."""
    return condition == SOFT_PROMPT and result.small_model != target
