"""Commands that score verbalizations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
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
from softprompt_registry.printing import print_evaluation, print_json, print_table

if TYPE_CHECKING:
    from softprompt_registry.base_models.loading import DType
    from softprompt_registry.evaluation.statistics import PairedComparison


@main.command()
@dod_option
@click.option("--bank", required=True, help="Bank: a folder, models:/… or runs:/….")
@click.option("--translator", required=True, help="Translator: models:/… so that the scores belong to it, or a folder.")
@click.option(
    "--work",
    default="evaluation.work",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Folder for finished parts, from which a second start resumes. It is removed at the end.",
)
@with_base_model
@with_settings
@with_json
def evaluate(
    dod: Path,
    bank: str,
    translator: str,
    work: Path,
    base_model: str | None,
    dtype: DType | None,
    config: Path | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Score methods of verbalization on the DoD's test tasks, each without and with the verifier.

    The run gets a report to read (report.html). Texts that do not make the base model act like their soft prompt are
    withheld by a rule that is chosen on training tasks. A run that was stopped or killed resumes.

    \b
    Example:
      softprompt evaluate --dod tasks.sqlite --bank bank --translator models:/m-0123 -s verbalization.num_candidates=8
    """
    from softprompt_registry.config import build_config
    from softprompt_registry.evaluation.evaluating import EvaluationConfig

    settings = build_config(EvaluationConfig, section_of("evaluation", config, overrides))
    require_store()
    from softprompt_registry.registry.artifacts import translator_base_model
    from softprompt_registry.stages.evaluating import evaluate as evaluate_stage

    loaded = open_base_model(base_model, dtype, read_by=translator_base_model(translator))
    result = evaluate_stage(loaded, translator, bank, dod, settings, work=work)
    found, record, controls = result.evaluation, result.record, result.record.controls
    if as_json:
        print_json(
            {
                "run_id": result.run_id,
                "metrics": {method: item.metrics for method, item in found.methods.items()},
                "comparisons": _as_dicts(found.comparisons),
                "verifier_effects": _as_dicts(found.verifier_effects),
                "rule": record.rule.to_json(),
                "garbage": controls and controls.metrics,
                "garbage_curve": controls and controls.curve_table,
                "left_out": record.left_out,
                "table": found.table(),
            }
        )
        return
    print_evaluation(found, record.rule)
    for name, reason in record.left_out.items():
        click.echo(f"left out: {name} ({reason})")
    if controls is not None:
        shares = controls.metrics
        good = f"{shares['good_passed_share']:.0%} of {shares['num_good']:.0f}" if shares["num_good"] else "none of 0"
        click.echo(
            f"control prompts: {shares['garbage_refused_share']:.0%} of {shares['num_garbage']:.0f} refused; of the "
            f"translator's texts of real soft prompts {good} good ones are given, {shares['real_passed_share']:.0%} of all"
        )
        lowest = controls.curve[0]
        click.echo(
            f"with a threshold of {lowest.threshold:.0f}: {lowest.garbage_refused:.0%} of "
            f"control prompts refused, {lowest.real_passed:.0%} of the real ones' texts given; report.html has the curve"
        )
    click.echo(f"run {result.run_id}, with report.html")


def _as_dicts(comparisons: Mapping[str, Mapping[str, PairedComparison]]) -> dict[str, dict[str, dict[str, float]]]:
    return {other: {name: item._asdict() for name, item in by.items()} for other, by in comparisons.items()}


@main.command("reproduce")
@click.argument("run_id")
@with_json
def reproduce_command(run_id: str, as_json: bool) -> None:
    """Compute the numbers of a finished evaluation again from its run alone, and compare them with the logged ones.

    \b
    Example:
      softprompt reproduce 0b5c9d1e7f6a4c2b8d3e5f7a9b1c3d5e
    """
    require_store(for_run=False)
    from softprompt_registry.stages.reproducing import reproduce

    result = reproduce(run_id)
    differences = [asdict(item) for item in result.differences]
    if as_json:
        print_json({"compared": result.num_compared, "differences": differences})
    else:
        print_evaluation(result.evaluation)
        for item in result.differences:
            click.echo(f"{item.method}: {item.metric} was logged as {item.logged}, is {item.computed}")
        click.echo(f"{result.num_compared - len(differences)} of {result.num_compared} numbers are as they were logged")
    if differences:
        raise click.exceptions.Exit(1)


@main.command("inspect-grid")
@dod_option
@click.option("--bank", required=True, help="Bank: a folder, models:/… or runs:/….")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="JSON file of the grid to write.")
@click.option(
    "--train-tasks", default=8, show_default=True, type=click.IntRange(1), help="Tasks the pair is chosen on."
)
@click.option("--test-tasks", type=click.IntRange(0), help="Tasks it is measured on. Default: all in the bank.")
@with_base_model
@with_settings
@with_json
def inspect_grid(
    dod: Path,
    bank: str,
    out: Path,
    train_tasks: int,
    test_tasks: int | None,
    base_model: str | None,
    dtype: DType | None,
    config: Path | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Find InSPEcT's best pair of layers on training tasks. A run that was stopped or killed resumes.

    \b
    Example:
      softprompt inspect-grid --dod tasks.sqlite --bank bank --out grid.json --train-tasks 8 -s step=2
    """
    from softprompt_registry.config import build_config
    from softprompt_registry.evaluation.layer_grid import LayerGridConfig

    settings = build_config(LayerGridConfig, section_of("layer_grid", config, overrides))
    require_store()
    from softprompt_registry.registry.artifacts import bank_base_model
    from softprompt_registry.stages.reading_layers import read_grid

    loaded = open_base_model(base_model, dtype, read_by=bank_base_model(bank))
    result = read_grid(loaded, bank, dod, settings, out, train_tasks=train_tasks, test_tasks=test_tasks)
    metrics = {kind: result.grid.metrics(kind) for kind in result.grid.kinds}
    oracle = result.grid.oracle()
    if as_json:
        found = {task: item._asdict() for task, item in oracle.items()}
        print_json({"run_id": result.run_id, "grid": str(out), "metrics": metrics, "oracle": found})
        return
    for kind, found_for in metrics.items():
        print_table(
            f"InSPEcT's layer pair for {kind}, chosen on training tasks",
            {name: [value] for name, value in found_for.items()},
        )
    if oracle:
        print_table(
            "Oracle: the best pair of each test task by its own labels, an upper bound",
            {
                "task": list(oracle),
                "pair": [f"{item.pair.source},{item.pair.target}" for item in oracle.values()],
                "text": [item.text for item in oracle.values()],
                "score": [item.score for item in oracle.values()],
            },
        )
    click.echo(f"grid {out}  run {result.run_id}")
