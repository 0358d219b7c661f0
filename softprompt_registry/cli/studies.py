"""The command that runs a study."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from softprompt_registry.cli.options import (
    dod_option,
    main,
    open_base_model,
    require_store,
    section_of,
    with_base_model,
    with_json,
    with_settings,
)
from softprompt_registry.printing import print_json, print_table

if TYPE_CHECKING:
    from softprompt_registry.base_models.loading import DType
    from softprompt_registry.stages.studying import StudyResult

NAMES = ("dod-size", "paraphrase-factor", "prefill", "labels", "accuracy", "out-of-domain")
SHOWN = {
    "recall": "label_recall",
    "F1": "label_f1",
    "ROUGE-L": "rouge_l",
    "cosine": "cosine",
    "MPR (chance .50)": "mpr_midrank",
}


@main.command()
@click.argument("name", type=click.Choice(NAMES))
@dod_option
@click.option("--bank", required=True, help="Bank of the DoD: a folder, models:/… or runs:/….")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the study.")
@click.option(
    "--translator", help="Translator for prefill, accuracy and out-of-domain. Default: train one on --dod and --bank."
)
@click.option(
    "--other",
    "others",
    nargs=2,
    type=(click.Path(path_type=Path), str),
    multiple=True,
    metavar="DOD BANK",
    help="For labels and out-of-domain: another DoD with its bank; may be given several times.",
)
@with_base_model
@with_settings
@with_json
def study(
    name: str,
    dod: Path,
    bank: str,
    out: Path,
    translator: str | None,
    others: tuple[tuple[Path, str], ...],
    base_model: str | None,
    dtype: DType | None,
    config: Path | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Vary one thing and measure its effect on the verbalizations. A study that was stopped or killed resumes.

    \b
    dod-size           translators trained on shares of the training tasks
    paraphrase-factor  translators trained on so many hard prompts of each task
    prefill            one translator without and with a given beginning of its text
    labels             translators trained on this DoD and on others, tested on this one
    accuracy           soft prompts tuned on few or many pairs, read by one translator
    out-of-domain      one translator tested on this DoD and on others

    \b
    Example:
      softprompt study dod-size --dod tasks.sqlite --bank bank --out sizes -s "shares=[0.25, 1.0]"
    """
    require_store()
    from softprompt_registry.stages.study_plans import plan_study
    from softprompt_registry.stages.study_settings import read_study_config

    settings = read_study_config(section_of("study", config, overrides))
    plan = plan_study(name, settings, dod, bank, translator=translator, others=others)
    from softprompt_registry.registry.artifacts import bank_base_model
    from softprompt_registry.stages.studying import run_study

    for note in plan.notes:
        click.echo(note, err=True)
    loaded = open_base_model(base_model, dtype, read_by=bank_base_model(bank))
    result = run_study(loaded, plan, out)
    if as_json:
        table = result.table
        print_json(
            {
                "run_id": result.run_id,
                "study": name,
                "method": table.method,
                "notes": plan.notes,
                "table": table.columns(),
                "differences": {
                    point: {metric: item._asdict() for metric, item in by.items()}
                    for point, by in table.differences.items()
                },
                "correlations": {
                    pair: {point: item._asdict() for point, item in by.items()}
                    for pair, by in result.correlations.items()
                },
            }
        )
        return
    _print_study(result)


def _print_study(result: StudyResult) -> None:
    """A row per point, the differences from the first point, and rank correlations where there are any."""
    table = result.table
    shown = {word: metric for word, metric in SHOWN.items() if metric in table.metrics}
    cells = {
        word: [
            f"{found[metric].mean:.2f} [{found[metric].low:.2f}, {found[metric].high:.2f}]" if metric in found else None
            for found in (table.intervals[point.point] for point in table.points)
        ]
        for word, metric in shown.items()
    }
    print_table(
        f"Study {table.study}: {table.method}, means with 95 % intervals over tasks",
        {
            "point": [point.point for point in table.points],
            "tasks": [len(point.rows[table.method]) for point in table.points],
            **cells,
        },
    )
    first = table.points[0].point
    for point, by_metric in table.differences.items():
        parts = [
            f"{word} {c.difference:+.2f} [{c.low:+.2f}, {c.high:+.2f}] {c.wins}/{c.ties}/{c.losses}"
            for word, c in ((word, by_metric[metric]) for word, metric in shown.items() if metric in by_metric)
        ]
        click.echo(f"{point} minus {first} (95 % interval, wins/ties/losses): " + "; ".join(parts))
    for pair, by_point in result.correlations.items():
        parts = [f"{point} {c.rho:+.2f} [{c.low:+.2f}, {c.high:+.2f}]" for point, c in by_point.items()]
        click.echo(f"rank correlation of {pair.replace('_', ' ')} (95 % interval): " + "; ".join(parts))
    click.echo(f"run {result.run_id}, with study.png")
