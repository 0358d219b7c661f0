"""How the command line prints results: tables for people, JSON for machines."""

from __future__ import annotations

import codecs
import io
import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from softprompt_registry.evaluation.statistics import PairedComparison
    from softprompt_registry.evaluation.verbalizations import Evaluation
    from softprompt_registry.verbalization.abstention import AbstentionRule


_ASCII_FORMS = str.maketrans(
    {"└": "`", "├": "|", "│": "|", "─": "-", "→": "->", "·": "-", "–": "-", "—": "-", "…": "...", "×": "x", "≥": ">="}
)
"""For signs that we write ourselves; what users and models write is escaped instead, so that it stays distinct."""


def _written_in_ascii(error: UnicodeError) -> tuple[str, int]:
    """The error handler for characters that a stream's encoding lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end].translate(_ASCII_FORMS)
    return lacking.encode("ascii", "backslashreplace").decode("ascii"), error.end


codecs.register_error("softprompt-ascii", _written_in_ascii)


def accept_all_characters() -> None:
    """Let stdout and stderr take every text, in terminals that are not UTF-8 too."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="softprompt-ascii")


def print_json(value: Any) -> None:
    """The value on stdout, indented; where stdout's encoding lacks a character, with JSON's own escapes."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2, default=str)
    click.echo(text)


def print_table(title: str, columns: Mapping[str, Sequence[Any]]) -> None:
    """Columns of equal length under their names; floats with two digits, None as nothing."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", show_lines=False)
    for name, values in columns.items():
        numeric = any(isinstance(value, float) for value in values)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in zip(*columns.values(), strict=True):
        # `Text` takes a cell as it is: labels and generated texts may look like markup.
        table.add_row(*(Text(f"{v:.2f}" if isinstance(v, float) else "" if v is None else str(v)) for v in row))
    console = Console()
    # A file or a pipe has no width of its own; 80 columns would fold every word.
    (console if console.is_terminal else Console(width=150)).print(table)


def print_evaluation(evaluation: Evaluation, rule: AbstentionRule | None = None) -> None:
    """Truth beside the first method's text, the methods' means, and the differences between methods with intervals.

    With a rule: also what it withholds, and why.
    """
    first = next(iter(evaluation.methods))
    rows = evaluation.methods[first].rows
    print_table(
        f"Held-out tasks, verbalized by the {first}",
        {
            "task": [row.task for row in rows],
            "ground truth": [row.truth for row in rows],
            "verbalization": [row.text for row in rows],
            "recall": [row.scores.get("label_recall") for row in rows],
            "F1": [row.scores.get("label_f1") for row in rows],
            "ROUGE-L": [row.scores["rouge_l"] for row in rows],
            "cosine": [row.scores["cosine"] for row in rows],
        },
    )
    names = {
        "recall": "label_recall",
        "F1": "label_f1",
        "ROUGE-L": "rouge_l",
        "cosine": "cosine",
        "MPR (chance .50)": "mpr_midrank",
        "top-1": "top1",
        "log-likelihood": "heldout_log_likelihood",
        "faithfulness": "faithfulness",
        "abstained": "abstained_share",
    }
    means = [item.metrics for item in evaluation.methods.values()]
    print_table(
        f"Means over {len(rows)} tasks",
        {
            "method": list(evaluation.methods),
            **{name: [of.get(key) for of in means] for name, key in names.items() if any(key in of for of in means)},
        },
    )
    for other, by_metric in evaluation.comparisons.items():
        _print_difference(f"{first} minus {other}", by_metric)
    for name, by_metric in evaluation.verifier_effects.items():
        _print_difference(f"{name} with the verifier minus without", by_metric)
        if "heldout_log_likelihood" in by_metric:
            click.echo(f"  {verifier_verdict(by_metric['heldout_log_likelihood'])}")
    if rule is not None:
        _print_withheld(evaluation, first, rule)


def _print_withheld(evaluation: Evaluation, method: str, rule: AbstentionRule) -> None:
    """The rule, and the reason of each text of a method that is withheld, of its verified form where there is one."""
    from softprompt_registry.verbalization.methods import WITH_VERIFIER

    verified = f"{method}{WITH_VERIFIER}"
    shown = verified if verified in evaluation.methods else method
    withheld = [row for row in evaluation.methods[shown].rows if row.abstained]
    # A rule that withholds every text gives the same reason for all, which the sentence below has.
    rows = [row for row in withheld if row.reason != rule.always_abstain]
    if rows:
        print_table(
            f"Withheld texts of {shown}: {len(withheld)} of {len(evaluation.methods[shown].rows)}",
            {
                "task": [row.task for row in rows],
                "text": [row.text for row in rows],
                "reason": [row.reason for row in rows],
            },
        )
    click.echo(rule.describe())


def verifier_verdict(effect: PairedComparison) -> str:
    """Whether the verifier's choice does better on held-out pairs that it did not choose on, in a sentence."""
    measured = f"{effect.difference:+.3f} nats per token, 95 % interval {effect.low:+.3f} to {effect.high:+.3f}"
    if effect.low > 0:
        return f"The verifier's choice makes held-out pairs likelier than the first text does: {measured}."
    if effect.high < 0:
        return f"The verifier's choice makes held-out pairs less likely than the first text does: {measured}."
    return f"The verifier's choice is not shown to make held-out pairs likelier than the first text does: {measured}."


def _print_difference(title: str, by_metric: Mapping[str, PairedComparison]) -> None:
    parts = [
        f"{name} {c.difference:+.2f} [{c.low:+.2f}, {c.high:+.2f}] {c.wins}/{c.ties}/{c.losses}"
        for name, c in by_metric.items()
    ]
    click.echo(f"{title} (95 % interval, wins/ties/losses): " + "; ".join(parts))
