"""The page of an evaluation's report, which people read in a browser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from softprompt_registry.evaluation.analysis import label_pieces, missed_labels
from softprompt_registry.evaluation.report_data import MethodReport, ReportData
from softprompt_registry.evaluation.report_figures import METRIC_NAMES, metric_name, report_figures
from softprompt_registry.evaluation.statistics import PairedComparison
from softprompt_registry.figures import PALETTE
from softprompt_registry.pages.formatting import number, plural, signed
from softprompt_registry.pages.page import Tone, Verdict, render_page

FEW_TASKS = 20
"""Below this the page warns that a bootstrap over tasks has little to draw from."""

MIN_TASKS = 6
"""On fewer tasks nothing is called the best: winning on all five is chance once in sixteen times (two-sided sign test)."""


def verdict(data: ReportData) -> Verdict:
    """The page's first lines. A method is called the best only if the paired intervals against all others lie above zero,
    and on at least `MIN_TASKS` tasks."""
    best = data.best
    interval = best.intervals.get(data.ranked_by)
    score = f"{metric_name(data.ranked_by)} {number(best.metrics[data.ranked_by])}"
    if interval:
        score += f" ({number(interval.low)} to {number(interval.high)})"
    rivals = sorted(
        (method for method in data.rivals if method is not best), key=lambda method: -method.metrics[data.ranked_by]
    )
    leads = {item.other: item.metrics[data.ranked_by] for item in data.comparisons if item.method == best.name}
    points = tuple(_lead(rival.name, leads.get(rival.name)) for rival in rivals) + tuple(_grounds(data, best))
    if not rivals:
        return Verdict(f"{best.name} reaches {score}; there is no other method to compare it with.", points, "note")
    is_clear = all(rival.name in leads and leads[rival.name].low > 0 for rival in rivals)
    if is_clear and len(data.tasks) >= MIN_TASKS:
        return Verdict(f"{best.name} is the best method: {score}.", points, "fine")
    return Verdict(f"No method is clearly the best; {best.name} scores highest: {score}.", points, "warning")


def _lead(rival: str, lead: PairedComparison | None) -> tuple[Tone, str]:
    if lead is None:
        return "warning", f"Not compared with {rival}, task by task."
    size, counts = difference_words(lead)
    if lead.low > 0:
        return "fine", f"Ahead of {rival} by {size}: {counts}."
    return "warning", f"The lead over {rival} may be chance: {size}, {counts}."


def difference_words(found: PairedComparison) -> tuple[str, str]:
    """The difference with its interval, and in how many tasks the first is better; parts of a sentence."""
    return (
        f"{signed(found.difference)} ({signed(found.low)} to {signed(found.high)})",
        f"better in {found.wins}, equal in {found.ties} and worse in {found.losses} of {plural(found.n, 'task')}",
    )


def _grounds(data: ReportData, best: MethodReport) -> Iterator[tuple[Tone, str]]:
    """What the best method's numbers rest on."""
    total = len(data.tasks)
    texts = [task.texts[best.name] for task in data.tasks]
    ranks, chance = best.intervals.get("mpr_midrank"), data.chance("mpr_midrank")
    if ranks and chance is not None and total > 1:
        size = f"percentile rank {number(ranks.mean)} ({number(ranks.low)} to {number(ranks.high)}), chance {number(chance)}"
        if ranks.low > chance:
            yield "fine", f"Its texts tell the tasks apart: {size}."
        else:
            yield "warning", f"Its texts may not tell the tasks apart better than chance: {size}."
    if total < FEW_TASKS:
        yield "warning", f"Only {plural(total, 'task')}: the intervals say little about other tasks."
    known = [text.faithfulness.value for text in texts if text.faithfulness and text.faithfulness.value is not None]
    if known:
        yield "note", f"Mean faithfulness {number(fmean(known))} over the {len(known)} of {total} texts that have one."
    else:
        yield "note", "Its faithfulness is not known: whether its texts act like the soft prompts is open."
    answered = [text.scores[data.ranked_by] for text in texts if not text.abstained]
    if len(answered) < total:
        quality = f"; the others have {metric_name(data.ranked_by)} {number(fmean(answered))}" if answered else ""
        yield "note", f"It abstains on {total - len(answered)} of {total} tasks, which count all the same{quality}."
    if empty := sum(not text.found for text in texts):
        yield "warning", f"{empty} of its {total} texts {'is' if empty == 1 else 'are'} empty, which scores lowest."


def report_page(data: ReportData) -> str:
    """The report as one HTML page. Filter and sort need JavaScript; everything else is there without it."""
    template = Path(__file__).with_suffix(".html.j2")
    columns = [name for name in METRIC_NAMES if all(name in method.metrics for method in data.methods)]
    keys = _sort_keys(data)
    known = [data.when, data.base_model]
    tasks = f"{plural(len(data.methods), 'method')} on the same soft prompts of {plural(len(data.tasks), 'task')}"
    return render_page(
        template,
        title=data.title,
        subtitle=" · ".join([*filter(None, known), tasks]),
        verdicts=[verdict(data)],
        figures=report_figures(data),
        settings=data.settings,
        script=template.with_name("report_page.js").read_text(encoding="utf-8"),
        data=data,
        columns=columns,
        winners={metric: max(method.metrics[metric] for method in data.rivals or data.methods) for metric in columns},
        all_metrics=[metric for metric in data.methods[0].metrics if not metric.endswith("_chance")],
        series=[f"var(--series-{place % len(PALETTE)})" for place in range(len(data.methods))],
        sort_titles=list(keys),
        sort_values=list(zip(*keys.values(), strict=True)),
        metric_name=metric_name,
        pieces=label_pieces,
        missed=missed_labels,
        bar_place=bar_place,
    )


def _sort_keys(data: ReportData) -> dict[str, list[float | None]]:
    """By title, a value for each task."""
    keys: dict[str, list[float | None]] = {
        f"{metric_name(data.ranked_by)} of {method.name}": [
            task.texts[method.name].scores[data.ranked_by] for task in data.tasks
        ]
        for method in data.methods
    }
    if data.correlations:
        keys["accuracy of the soft prompt"] = [task.accuracy for task in data.tasks]
    for method in data.curves:
        found = [task.texts[method].faithfulness for task in data.tasks]
        keys[f"faithfulness of {method}"] = [value.value if value else None for value in found]
    return keys


def bar_place(share: float) -> float:
    """A share as a place on a bar that goes from 0 to 1; what lies beyond stands at its end."""
    return round(100 * min(1.0, max(0.0, share)), 1)
