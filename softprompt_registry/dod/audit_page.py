"""The page that shows an audit of a DoD to a person, and its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from softprompt_registry.dod.audit_findings import FINDING_KINDS, Audit, excerpt, what_is_found
from softprompt_registry.figures import PALETTE
from softprompt_registry.pages.formatting import percent, plural
from softprompt_registry.pages.page import Tone, Verdict, render_page
from softprompt_registry.pages.svg import LIMIT, PageFigure
from softprompt_registry.storage import write_text

if TYPE_CHECKING:
    from numpy.typing import NDArray

WORST_TASKS, LISTED_TASKS = 50, 20
"""Rows of the page's table, and task names under a finding."""
_SIDES = ("train", "test")


def audit_figures(audit: Audit) -> list[PageFigure]:
    """Histograms of tasks or pairs, train and test stacked. Those of labels need classification tasks."""
    drawn = [_pairs_per_task(audit)]
    if any(row.balance is not None for row in audit.rows):
        drawn.append(_label_balance(audit))
    if any(row.label_in_inputs is not None for row in audit.rows):
        drawn.append(_label_in_inputs(audit))
    return [*drawn, _pair_lengths(audit)]


def _pairs_per_task(audit: Audit) -> PageFigure:
    sizes = audit.sizes
    bins = np.unique(np.linspace(sizes.min_pairs, sizes.max_pairs + 1, 31).round()) - 0.5
    return _histogram(
        "pairs_per_task",
        "Pairs per task",
        _by_side(audit, "pairs"),
        bins,
        x="pairs",
        limit=audit.settings["min_pairs_per_task"],
        caption=f"{sizes.min_pairs:,} to {sizes.max_pairs:,} pairs per task, median {sizes.median_pairs:,g}.",
    )


def _label_balance(audit: Audit) -> PageFigure:
    values, limit = _by_side(audit, "balance"), audit.settings["min_label_balance"]
    known = sorted(values["train"] + values["test"])
    low = sum(balance < limit for balance in known)
    return _histogram(
        "label_balance",
        "Label balance",
        values,
        np.linspace(0, 1, 21),
        x="balance: 1 when all labels are equally frequent",
        limit=limit,
        caption=f"Balance from {known[0]:.2f} to {known[-1]:.2f}, median {known[len(known) // 2]:.2f}; "
        f"{plural(low, 'task')} below {limit:g}.",
    )


def _label_in_inputs(audit: Audit) -> PageFigure:
    values, limit = _by_side(audit, "label_in_inputs"), audit.settings["max_label_leak_share"]
    known = sorted(values["train"] + values["test"])
    leaking = sum(share > limit for share in known)
    return _histogram(
        "label_in_inputs",
        "Label in inputs",
        values,
        np.linspace(0, min(1.0, max(2 * limit, known[-1], 0.1)), 21),
        x="share of inputs with their own label",
        limit=limit,
        caption=f"At most {percent(known[-1])} of a task's inputs contain their own label, "
        f"median {percent(known[len(known) // 2])}; {plural(leaking, 'task')} above {percent(limit)}.",
    )


def _pair_lengths(audit: Audit) -> PageFigure:
    lengths = audit.lengths
    different = [length for counts in audit.pair_lengths.values() for length in counts]
    shortest, longest = max(1, min(different)), max(1, *different)
    is_log = longest > 20 * shortest
    steps = (np.geomspace if is_log else np.linspace)(shortest, longest + 1, 41)
    return _histogram(
        "pair_lengths",
        "Length of pairs",
        {side: list(map(float, audit.pair_lengths[side])) for side in _SIDES},
        np.unique(np.ceil(steps - 1e-9)) - 0.5,
        weights={side: list(audit.pair_lengths[side].values()) for side in _SIDES},
        x=f"{lengths.unit}, input and output together{' (logarithmic)' if is_log else ''}",
        y="pairs",
        limit=audit.settings["max_pair_tokens"],
        is_log=is_log,
        caption=f"Half of the pairs have at most {lengths.p50:,} {lengths.unit}, 90 % at most {lengths.p90:,}, "
        f"99 % at most {lengths.p99:,}; the longest has {lengths.max:,}.",
    )


def _by_side(audit: Audit, field: str) -> dict[str, list[float]]:
    """The known values of a field of the tasks' rows."""
    rows = {side: [getattr(row, field) for row in audit.rows if row.side == side] for side in _SIDES}
    return {side: [value for value in values if value is not None] for side, values in rows.items()}


def _histogram(
    name: str,
    title: str,
    values: Mapping[str, Sequence[float]],
    bins: NDArray[np.float64],
    *,
    weights: Mapping[str, Sequence[int]] | None = None,
    x: str,
    y: str = "tasks",
    limit: float | None,
    is_log: bool = False,
    caption: str,
) -> PageFigure:
    """Stacked bars by side. The limit is drawn where it lies within the values; what lies outside the bins counts in the
    nearest."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = Figure(figsize=(5.4, 3.2), layout="constrained")
    axes = figure.subplots()
    below = np.zeros(len(bins) - 1)
    for side, colour in zip(_SIDES, PALETTE, strict=False):
        if values[side]:
            inside = np.clip(values[side], bins[0], bins[-1])
            counts, _ = np.histogram(inside, bins, weights=weights[side] if weights else None)
            widths = np.diff(bins)
            axes.bar(
                bins[:-1], counts, widths, bottom=below, align="edge", color=colour, label=f"{side} tasks", zorder=2
            )
            below += counts
    if is_log:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if limit is not None and bins[0] <= limit <= bins[-1]:
        axes.axvline(limit, color=LIMIT, linestyle="--", label=f"limit {limit:g}", zorder=3)
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.grid(axis="y", alpha=0.3, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper right", ncols=3, frameon=False, fontsize=9)
    return PageFigure(name, title, figure, f"Histogram of {title.lower()}. {caption}", caption)


def write_audit_page(audit: Audit, path: Path) -> None:
    """Write the audit as one HTML file."""
    found = {finding.code for finding in audit.findings}
    kinds = {code: f"{kind.unit}s {what_is_found(kind, audit.settings)}" for code, kind in FINDING_KINDS.items()}
    rows = [row for row in audit.rows if row.errors + row.warnings]
    rows.sort(key=lambda row: (-row.errors, -row.warnings, -row.leaks - row.both_sides_inputs, row.name))
    page = render_page(
        Path(__file__).with_suffix(".html.j2"),
        title=f"Audit of {excerpt(audit.path.stem)}",
        subtitle=f"dataset of datasets, digest {audit.digest[:12]}",
        verdicts=[_verdict(audit)],
        figures=audit_figures(audit),
        settings=audit.settings,
        audit=audit,
        clean=[title for code, title in kinds.items() if code not in found and code not in audit.not_checked],
        not_checked=[(kinds[code], why) for code, why in audit.not_checked.items() if code not in found],
        worst=rows[:WORST_TASKS],
        num_concerned=len(rows),
        listed_tasks=LISTED_TASKS,
        excerpt=excerpt,
    )
    write_text(path, page)


def _verdict(audit: Audit) -> Verdict:
    counts: tuple[tuple[Tone, str], ...] = (("note", audit.verdict),)
    if audit.number_of("error"):
        return Verdict("Numbers measured with this DoD would be wrong.", counts, "error")
    if audit.number_of("warning"):
        return Verdict("Usable, but some tasks teach less than they could.", counts, "warning")
    return Verdict("Good to use.", counts, "fine")
