"""The command that trains a scale and bias."""

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
from softprompt_registry.printing import print_json

if TYPE_CHECKING:
    from softprompt_registry.base_models.loading import DType


@main.command("train-scale-and-bias")
@dod_option
@click.option("--bank", required=True, help="Bank: a folder, models:/… or runs:/….")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the scale and bias to write.")
@with_base_model
@with_settings
@with_json
def train_scale_and_bias_command(
    dod: Path,
    bank: str,
    out: Path,
    base_model: str | None,
    dtype: DType | None,
    config: Path | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Train the cheapest translator: a scale and a bias on the soft tokens. Stopped or killed, it goes on at its last epoch.

    `evaluate` compares it with others under the method scale_and_bias.

    \b
    Example:
      softprompt train-scale-and-bias --dod tasks.sqlite --bank bank --out scale-and-bias -s epochs=40
    """
    from softprompt_registry.config import build_config
    from softprompt_registry.translators.scale_and_bias_training import ScaleAndBiasConfig

    settings = build_config(ScaleAndBiasConfig, section_of("scale_and_bias", config, overrides))
    require_store()
    from softprompt_registry.registry.artifacts import bank_base_model
    from softprompt_registry.stages.training_scale_and_bias import train

    loaded = open_base_model(base_model, dtype, read_by=bank_base_model(bank))
    result = train(loaded, bank, dod, settings, out)
    record = result.scale_and_bias.record
    if as_json:
        print_json({"run_id": result.run_id, "folder": str(out), "scale_and_bias": record.to_json()})
        return
    click.echo(
        f"trained on {len(record.train_tasks)} tasks: train loss {record.metrics['train_loss']:.3f}, "
        f"held out {record.metrics['validation_loss']:.3f}"
    )
    click.echo(f"scale and bias {out}  run {result.run_id}")
