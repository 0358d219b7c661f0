"""Commands that train, use and score translators."""

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
from softprompt_registry.printing import print_evaluation, print_json, print_table

if TYPE_CHECKING:
    from softprompt_registry.base_models.loading import DType


@main.command("train-translator")
@dod_option
@click.option("--bank", required=True, help="Bank: a folder, models:/… or runs:/….")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the translator to write.")
@with_base_model
@with_settings
@with_json
def train_translator_command(
    dod: Path,
    bank: str,
    out: Path,
    base_model: str | None,
    dtype: DType | None,
    config: Path | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Train a translator on the bank's training tasks. Stopped or killed, it goes on at its last epoch.

    Under `accelerate launch` several processes divide each step among them.

    \b
    Example:
      softprompt train-translator --dod tasks.sqlite --bank bank --out translator -s epochs=20
    """
    from softprompt_registry.config import build_config
    from softprompt_registry.processes import launched_processes
    from softprompt_registry.translators.training import TranslatorConfig

    with launched_processes() as processes:
        settings = build_config(TranslatorConfig, section_of("translator", config, overrides))
        from softprompt_registry.registry.artifacts import bank_base_model
        from softprompt_registry.stages.training import take_part_in_training, train
        from softprompt_registry.translators.translator import read_record

        loaded = open_base_model(base_model, dtype, read_by=bank_base_model(bank))
        if not processes.is_main:
            take_part_in_training(loaded, bank, dod, settings, out, processes=processes)
            return
        result = train(loaded, bank, dod, settings, out, processes=processes)
    record = read_record(out)
    if as_json:
        print_json({"run_id": result.run_id, "model_uri": result.model_uri, "translator": record.to_json()})
        return
    click.echo(f"trained on {len(record.train_tasks)} tasks: train loss {record.metrics['train_loss']:.3f}")
    click.echo(f"translator {out}  model {result.model_uri}  run {result.run_id}")


@main.command()
@click.argument("soft_prompts", nargs=-1, required=True)
@click.option("--translator", required=True, help="Translator: a folder, models:/… or runs:/….")
@with_base_model
@with_settings
@with_json
def verbalize(
    soft_prompts: tuple[str, ...],
    translator: str,
    base_model: str | None,
    dtype: DType | None,
    config: Path | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Write soft prompts out as text: folders, models:/… or members of a bank (bank#task).

    \b
    Example:
      softprompt verbalize "bank#instruments" --translator translator -s num_candidates=4
    """
    from softprompt_registry.config import build_config
    from softprompt_registry.verbalization.verbalizer import VerbalizationConfig

    settings = build_config(VerbalizationConfig, section_of("verbalization", config, overrides))
    from softprompt_registry.registry.artifacts import find_artifact, find_soft_prompts, translator_base_model
    from softprompt_registry.translators.translator import Translator
    from softprompt_registry.verbalization.proposers.translator import TranslatorProposer
    from softprompt_registry.verbalization.verbalizer import verbalize as verbalize_soft_prompts

    read = [soft_prompt for uri in soft_prompts for soft_prompt in find_soft_prompts(uri)]
    loaded = open_base_model(base_model, dtype, read_by=translator_base_model(translator))
    reader = Translator.load(find_artifact(translator, "translator").folder, loaded)
    results = verbalize_soft_prompts(read, TranslatorProposer(reader), settings, translator_id=reader.id)
    if as_json:
        print_json([result.to_json() for result in results])
        return
    truths = [soft_prompt.record.ground_truth for soft_prompt in read]
    print_table(
        "Verbalizations",
        {"task": [r.task for r in results], "ground truth": truths, "verbalization": [r.text for r in results]},
    )


@main.command()
@dod_option
@click.option("--bank", required=True, help="Bank: a folder, models:/… or runs:/….")
@click.option("--translator", required=True, help="Translator: models:/… so that the scores belong to it, or a folder.")
@with_base_model
@with_settings
@with_json
def evaluate(
    dod: Path,
    bank: str,
    translator: str,
    base_model: str | None,
    dtype: DType | None,
    config: Path | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Score the translator on the DoD's test tasks, beside two trivial baselines.

    \b
    Example:
      softprompt evaluate --dod tasks.sqlite --bank bank --translator models:/m-0123
    """
    from softprompt_registry.config import build_config
    from softprompt_registry.verbalization.verbalizer import VerbalizationConfig

    settings = build_config(VerbalizationConfig, section_of("verbalization", config, overrides))
    from softprompt_registry.registry.artifacts import translator_base_model
    from softprompt_registry.stages.evaluating import evaluate as evaluate_stage

    loaded = open_base_model(base_model, dtype, read_by=translator_base_model(translator))
    result = evaluate_stage(loaded, translator, bank, dod, settings)
    if as_json:
        print_json(
            {
                "run_id": result.run_id,
                "metrics": {method: item.metrics for method, item in result.evaluation.methods.items()},
                "comparisons": {
                    other: {name: item._asdict() for name, item in by.items()}
                    for other, by in result.evaluation.comparisons.items()
                },
                "table": result.evaluation.table(),
            }
        )
        return
    print_evaluation(result.evaluation)
    click.echo(f"run {result.run_id}")
