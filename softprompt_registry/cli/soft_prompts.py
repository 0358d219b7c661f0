"""The command that tunes soft prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from softprompt_registry.cli.options import (
    dod_option,
    main,
    open_base_model,
    section_of,
    with_base_model,
    with_json,
    with_settings,
)
from softprompt_registry.printing import print_json, print_table

if TYPE_CHECKING:
    from softprompt_registry.base_models.loading import DType


@main.command()
@dod_option
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the bank to write.")
@click.option("--task", "tasks", multiple=True, help="Tune this task only; may be given several times.")
@with_base_model
@with_settings
@with_json
def tune(
    dod: Path,
    out: Path,
    tasks: tuple[str, ...],
    base_model: str | None,
    dtype: DType | None,
    config: Path | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Tune one soft prompt per task of a DoD. Stopped or killed, it goes on where it was.

    \b
    Example:
      softprompt tune --dod tasks.sqlite --out bank -s num_virtual_tokens=8 -s learning_rate=2e-2
    """
    from softprompt_registry.config import build_config
    from softprompt_registry.soft_prompts.tuning import TuningConfig

    settings = build_config(TuningConfig, section_of("tuning", config, overrides))
    from softprompt_registry.soft_prompts.bank import SoftPromptBank
    from softprompt_registry.stages.tuning import bank_table
    from softprompt_registry.stages.tuning import tune as tune_stage

    result = tune_stage(open_base_model(base_model, dtype), dod, settings, out, task_names=tasks or None)
    table = bank_table(SoftPromptBank(out))
    if as_json:
        print_json({"run_id": result.run_id, "model_uri": result.model_uri, "bank": str(out), "soft_prompts": table})
        return
    shown = ("task", "kind", "validation_loss", "label_accuracy", "exact_match")
    print_table(f"{len(table['task'])} soft prompts", {name: table[name] for name in shown})
    click.echo(f"bank {out}  model {result.model_uri}  run {result.run_id}")
