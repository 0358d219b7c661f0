"""The page that shows an audit of a DoD to a person, and its figures."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from softprompt_registry.html_pages import page_environment
from softprompt_registry.storage import write_text

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

from softprompt_registry.dod.audit_findings import (
    FINDING_KINDS,
    SEVERITIES,
    Audit,
    _percent,
    excerpt,
    plural,
    what_is_found,
)

WORST_TASKS, LISTED_TASKS = 50, 20
"""Rows of the page's table, and task names under a finding."""
_TRAIN, _TEST, _LIMIT = "#4c78a8", "#f58518", "#b3261e"
_PAGE_COLOURS = {_TRAIN: "var(--train)", _TEST: "var(--test)", _LIMIT: "var(--error)", "#000000": "currentColor"}
"""Colours of the figures → what stands for them in the page, which has a dark mode."""


def audit_figures(audit: Audit) -> dict[str, Figure]:
    """File name → histogram with the train and the test side on top of each other. Without classification tasks there are
    two of the four."""
    import numpy as np

    settings, sides = audit.settings, ("train", "test")
    rows = {side: [row for row in audit.rows if row.side == side] for side in sides}
    pairs = {side: [float(row.pairs) for row in rows[side]] for side in sides}
    bins = np.unique(np.linspace(audit.sizes.min_pairs, audit.sizes.max_pairs + 1, 31).round()) - 0.5
    limit = settings["min_pairs_per_task"]
    figures = {"pairs_per_task.png": _histogram("Pairs per task", pairs, bins, x="pairs", limit=limit)}
    for title, field, x, limit in (
        ("Label balance", "balance", "balance: 1 when all labels are equally frequent", settings["min_label_balance"]),
        (
            "Label in inputs",
            "label_in_inputs",
            "share of inputs with their own label",
            settings["max_label_leak_share"],
        ),
    ):
        known = {side: [value for row in rows[side] if (value := getattr(row, field)) is not None] for side in sides}
        if any(known.values()):
            top = 1.0 if field == "balance" else min(1.0, max(2 * limit, *known["train"], *known["test"], 0.1))
            name = title.lower().replace(" ", "_") + ".png"
            figures[name] = _histogram(title, known, np.linspace(0, top, 21), x=x, limit=limit)
    lengths = [length for counts in audit.pair_lengths.values() for length in counts]
    shortest, longest = max(1, min(lengths)), max(1, *lengths)
    is_log = longest > 20 * shortest
    steps = (np.geomspace if is_log else np.linspace)(shortest, longest + 1, 41)
    figures["pair_lengths.png"] = _histogram(
        "Length of pairs",
        {side: list(map(float, audit.pair_lengths[side])) for side in sides},
        np.unique(np.ceil(steps - 1e-9)) - 0.5,
        weights={side: list(audit.pair_lengths[side].values()) for side in sides},
        x=f"{audit.lengths.unit}, input and output together{' (logarithmic)' if is_log else ''}",
        y="pairs",
        limit=settings["max_pair_tokens"],
        is_log=is_log,
    )
    return figures


def _histogram(
    title: str,
    values: Mapping[str, Sequence[float]],
    bins: NDArray[np.float64],
    *,
    weights: Mapping[str, Sequence[int]] | None = None,
    x: str,
    y: str = "tasks",
    limit: float | None,
    is_log: bool = False,
) -> Figure:
    """Stacked bars by side. The limit is drawn where it lies within the values; what lies outside the bins counts in the
    nearest."""
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = Figure(figsize=(5.4, 3.2), layout="constrained")
    axes = figure.subplots()
    below = np.zeros(len(bins) - 1)
    for side, colour in (("train", _TRAIN), ("test", _TEST)):
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
        axes.axvline(limit, color=_LIMIT, linestyle="--", label=f"limit {limit:g}", zorder=3)
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.grid(axis="y", alpha=0.3, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper right", ncols=3, frameon=False, fontsize=9)
    return figure


def _svg(figure: Figure, name: str) -> str:
    """A figure as SVG to stand inside a page: no title, which the page has, and the page's own colours and letters."""
    import matplotlib

    figure.axes[0].set_title("")
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)  # it would hold for the whole page, which has its own
    svg = svg[svg.index("<svg") :].replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)
    for colour, in_page in _PAGE_COLOURS.items():
        svg = svg.replace(colour, in_page)
    # Ids are unique within a figure only, and a page has several.
    return re.sub(r'(id="|url\(#|href="#)', rf"\1{Path(name).stem}-", svg)


def _captions(audit: Audit) -> dict[str, str]:
    """What each figure shows, in words, for those who do not see it."""
    sizes, lengths, settings = audit.sizes, audit.lengths, audit.settings
    balances = sorted(row.balance for row in audit.rows if row.balance is not None)
    shares = sorted(row.label_in_inputs for row in audit.rows if row.label_in_inputs is not None)
    captions = {
        "pairs_per_task.png": f"{sizes.min_pairs:,} to {sizes.max_pairs:,} pairs per task, median {sizes.median_pairs:,g}.",
        "pair_lengths.png": f"Half of the pairs have at most {lengths.p50:,} {lengths.unit}, 90 % at most {lengths.p90:,}, "
        f"99 % at most {lengths.p99:,}; the longest has {lengths.max:,}.",
    }
    if balances:
        low = sum(balance < settings["min_label_balance"] for balance in balances)
        leaking = sum(share > settings["max_label_leak_share"] for share in shares)
        captions["label_balance.png"] = (
            f"Balance from {balances[0]:.2f} to {balances[-1]:.2f}, median {balances[len(balances) // 2]:.2f}; "
            f"{plural(low, 'task')} below {settings['min_label_balance']:g}."
        )
        captions["label_in_inputs.png"] = (
            f"At most {_percent(shares[-1])} of a task's inputs contain their own label, "
            f"median {_percent(shares[len(shares) // 2])}; "
            f"{plural(leaking, 'task')} above {_percent(settings['max_label_leak_share'])}."
        )
    return captions


def write_audit_page(audit: Audit, path: Path) -> None:
    """Write the audit as one HTML file that needs nothing beside it: no scripts, no other files, no network."""
    from markupsafe import Markup

    captions, figures = _captions(audit), audit_figures(audit)
    titles = {name: figure.axes[0].get_title() for name, figure in figures.items()}
    plots = [(titles[name], Markup(_svg(figure, name)), captions[name]) for name, figure in figures.items()]
    found = {finding.code for finding in audit.findings}
    kinds = {code: f"{kind.unit}s {what_is_found(kind, audit.settings)}" for code, kind in FINDING_KINDS.items()}
    rows = [row for row in audit.rows if row.errors + row.warnings]
    rows.sort(key=lambda row: (-row.errors, -row.warnings, -row.leaks - row.both_sides_inputs, row.name))
    environment = page_environment(Path(__file__).parent / "pages")
    environment.globals["plural"] = plural
    environment.filters["excerpt"] = excerpt
    page = environment.get_template("audit.html.j2").render(
        audit=audit,
        name=audit.path.stem,
        severities=SEVERITIES,
        plots=plots,
        clean=[title for code, title in kinds.items() if code not in found and code not in audit.not_checked],
        not_checked=[(kinds[code], why) for code, why in audit.not_checked.items() if code not in found],
        worst=rows[:WORST_TASKS],
        num_concerned=len(rows),
        listed_tasks=LISTED_TASKS,
    )
    write_text(path, page)
