"""The page of a portability run, which people read in a browser."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from softprompt_registry.evaluation.report_page import FEW_TASKS, difference_words
from softprompt_registry.evaluation.statistics import PairedComparison
from softprompt_registry.language_models.protocol import Usage
from softprompt_registry.pages.formatting import number, plural
from softprompt_registry.pages.page import Tone, Verdict, render_page
from softprompt_registry.portability.analysis import ALL_TASKS, Margin, Portability
from softprompt_registry.portability.answers import Answer
from softprompt_registry.portability.conditions import (
    CONDITIONS,
    FEW_SHOT_5,
    FEW_SHOTS,
    GROUND_TRUTH,
    INSPECT,
    INSTRUCTION_INDUCTION,
    NO_PROMPT,
    SOFT_PROMPT,
    TRANSLATIONS,
    VERIFIED_BEST,
)
from softprompt_registry.portability.figures import METRIC_NAMES, measure_name, portability_figures
from softprompt_registry.portability.shown_tasks import shown_tasks

RIVALS = (NO_PROMPT, VERIFIED_BEST, INSPECT, INSTRUCTION_INDUCTION, *FEW_SHOTS, GROUND_TRUTH, SOFT_PROMPT)
"""What the translation is set against on the page's first screen."""

_MARKS = {"right": "✓", "partly": "≈", "wrong": "✗", "empty": "∅", "refused": "⊘", "missing": "?"}


def summary(result: Portability, target: str) -> Verdict:
    """What the verified translation, or else the greedy one, is worth on a target."""
    intervals = {name: result.interval(target, name) for name in result.conditions(target)}
    measured = {name: interval for name, interval in intervals.items() if interval is not None}
    translations = [name for name in TRANSLATIONS if name in measured]
    if not translations:
        headline = f"{target}: no answer under a translated prompt."
        return Verdict(headline, tuple(_gaps(result, target)))
    best = translations[-1]  # the verified one: which does better here is known only afterwards
    mean, low, high = measured[best]
    headline = (
        f"{target}: {CONDITIONS[best].label} prompts reach {METRIC_NAMES[ALL_TASKS.metric]} {number(mean)} "
        f"({number(low)} to {number(high)})."
    )
    points = []
    for rival in RIVALS:
        found = result.comparison(target, best, rival) if rival in measured else None
        if found is not None:
            points.append(_against(CONDITIONS[rival].label, found))
    if (saved := result.tokens_saved(target, best)) is not None:
        tokens, share = saved
        words = f"{100 * abs(share):.0f} % {'fewer' if share >= 0 else 'more'} tokens"
        points.append(
            ("note", f"Takes {words} than {CONDITIONS[FEW_SHOT_5].label}: {abs(tokens):.0f} for each answer.")
        )
    return Verdict(headline, (*points, *_gaps(result, target)))


def _against(rival: str, found: PairedComparison) -> tuple[Tone, str]:
    size, counts = difference_words(found)
    if found.low > 0:
        return "fine", f"Ahead of {rival} by {size}: {counts}."
    if found.high < 0:
        return "warning", f"Behind {rival} by {size}: {counts}."
    return "note", f"No clear difference from {rival}: {size}, {counts}."


def _gaps(result: Portability, target: str) -> Iterator[tuple[Tone, str]]:
    """What the numbers do not rest on."""
    answers = [answer for name in result.conditions(target) for answer in result.of(target, name)]
    states = Counter(answer.state for answer in answers)
    total = f"{len(answers):,} answers"
    if states["missing"]:
        yield "warning", f"{states['missing']:,} of {total} are missing; they are in no mean."
    if said := states["empty"] + states["refused"]:
        yield "note", f"{said:,} of {total} are empty or refusals, which scores 0."
    if cut := sum(answer.cut for answer in answers):
        yield "note", f"{cut:,} of {total} ran on to the length limit."
    tasks = len({answer.task for answer in answers})
    if tasks < FEW_TASKS:
        yield "warning", f"Only {plural(tasks, 'task')}: the intervals say little about other tasks."


def portability_page(
    result: Portability,
    answers: Iterable[Answer],
    *,
    title: str,
    when: str = "",
    settings: Mapping[str, Any] | None = None,
    usage: Mapping[str, Usage] | None = None,
) -> str:
    """The run as one HTML page, which says that it shows only some test inputs of each task and the beginning of long texts.

    Args:
        answers: those that `result` was worked out from.
        settings: of the run, shown at the end of the page.
        usage: by target, of all requests behind the answers; conditions may share requests, so it is no sum over them.
    """
    tasks = shown_tasks(result, answers)
    num_tasks = len({answer.task for answer in result.answers})
    metrics = {place: result.metrics(*place) for place in _rows(result)}
    counts = [
        plural(num_tasks, "task"),
        plural(len(result.targets), "target LLM"),
        plural(len(result.answers), "question"),
    ]
    return render_page(
        Path(__file__).with_suffix(".html.j2"),
        title=title,
        subtitle=" · ".join(([when] if when else []) + counts),
        verdicts=[summary(result, target) for target in result.targets],
        figures=portability_figures(result),
        settings=settings or {},
        usage=usage or {},
        result=result,
        metrics=metrics,
        has_cost=any("cost" in found for found in metrics.values()),
        comparisons={
            target: _comparison_rows(result, target) for target in result.targets if len(result.conditions(target)) > 1
        },
        margins=_margin_rows(result),
        conditions=[name for name in CONDITIONS if any(condition == name for _, condition in result.places)],
        tasks=tasks,
        places={task.name: place for place, task in enumerate(tasks, start=1)},
        num_tasks=num_tasks,
        metric_names=METRIC_NAMES,
        condition_name=lambda name: CONDITIONS[name].label,
        measure_name=measure_name,
        marks=_MARKS,
        SOFT_PROMPT=SOFT_PROMPT,
    )


def _rows(result: Portability) -> list[tuple[str, str]]:
    """Of the summary table: every target with its conditions, the soft prompt among them."""
    return [(target, condition) for target in result.targets for condition in result.conditions(target)]


def _comparison_rows(result: Portability, target: str) -> list[tuple[str, str, list[PairedComparison | None]]]:
    """Every pair of conditions of a target, the better one first, with a comparison for each measure."""
    rows = []
    for found in result.comparisons:
        if found.target == target and found.measure == ALL_TASKS:
            a, b = (found.a, found.b) if found.result.difference >= 0 else (found.b, found.a)
            rows.append((a, b, [result.comparison(target, a, b, measure) for measure in result.measures]))
    return rows


def _margin_rows(result: Portability) -> list[tuple[str, str, str, int, list[Margin]]]:
    """Target, translation and few-shot condition with the tasks that both were asked about, and the margins."""
    rows = []
    for target in result.targets:
        for translation in TRANSLATIONS:
            for few_shot in FEW_SHOTS:
                found = (
                    result.comparison(target, translation, few_shot)
                    if {translation, few_shot} <= set(result.conditions(target))
                    else None
                )
                if found is not None:
                    margins = [
                        margin
                        for margin in result.margins
                        if (margin.target, margin.translation, margin.few_shot) == (target, translation, few_shot)
                    ]
                    rows.append((target, translation, few_shot, found.n, margins))
    return rows
