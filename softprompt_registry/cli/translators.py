"""Commands that train and use translators."""

from __future__ import annotations

from collections.abc import Sequence
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
    from softprompt_registry.verbalization.verbalizer import Verbalization


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
    """Train a translator on the bank's training tasks. A run that was stopped or killed resumes at its last epoch.

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
        require_store()
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
@click.option("--dod", type=click.Path(path_type=Path), help="Verify texts on each task's test pairs in this DoD.")
@click.option(
    "--pairs",
    type=click.Path(path_type=Path),
    help="Verify texts on these pairs: a file that build-dod files reads.",
)
@click.option(
    "--inputs", type=click.Path(path_type=Path), help="Verify texts on these inputs: a file with one on each line."
)
@click.option(
    "--labels",
    type=click.Choice(["from-data"]),
    help="Add lists of the labels, which are the outputs in --dod or --pairs, to the candidates.",
)
@click.option(
    "--min-faithfulness",
    type=float,
    help="Withhold texts below this faithfulness. Default: 0.5; better the one in an evaluation's rule.json.",
)
@with_base_model
@with_settings
@with_json
def verbalize(
    soft_prompts: tuple[str, ...],
    translator: str,
    dod: Path | None,
    pairs: Path | None,
    inputs: Path | None,
    labels: str | None,
    min_faithfulness: float | None,
    base_model: str | None,
    dtype: DType | None,
    config: Path | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Write soft prompts out as text: folders, models:/… or members of a bank (bank#task).

    With --dod, --pairs or --inputs the text is the candidate that makes the base model act most as the soft prompt does, and
    how much of the soft prompt's gain it keeps stands beside it (faithfulness).

    \b
    Examples:
      softprompt verbalize "bank#instruments" --translator translator -s num_candidates=4
      softprompt verbalize bank --translator translator --dod tasks.sqlite --labels from-data
    """
    from softprompt_registry.config import build_config
    from softprompt_registry.verbalization.verbalizer import Proposer, VerbalizationConfig
    from softprompt_registry.verbalization.verbalizer import verbalize as verbalize_soft_prompts

    given = [name for name, file in (("--dod", dod), ("--pairs", pairs), ("--inputs", inputs)) if file is not None]
    if len(given) > 1:
        raise click.UsageError(f"Found {' and '.join(given)}; texts are tried on one of them. Leave the others out.")
    if labels and not (dod or pairs):
        raise click.UsageError("--labels from-data takes the labels from outputs; give --dod or --pairs with it.")
    if min_faithfulness is not None and not given:
        raise click.UsageError("--min-faithfulness needs something to try texts on; give --dod, --pairs or --inputs.")
    settings = build_config(VerbalizationConfig, section_of("evaluation.verbalization", config, overrides))
    from softprompt_registry.registry.artifacts import find_artifact, find_soft_prompts, translator_base_model
    from softprompt_registry.translators.translator import Translator
    from softprompt_registry.verbalization.abstention import DEFAULT_MIN_FAITHFULNESS, AbstentionRule
    from softprompt_registry.verbalization.evidence import collect_evidence
    from softprompt_registry.verbalization.proposers.label_list import LabelListProposer
    from softprompt_registry.verbalization.proposers.translator import TranslatorProposer
    from softprompt_registry.verbalization.verifier import Verifier

    read = [soft_prompt for uri in soft_prompts for soft_prompt in find_soft_prompts(uri)]
    # Before the base model is loaded: what is wrong with files is known at once.
    evidence = collect_evidence(read, dod=dod, pairs=pairs, inputs=inputs, labels_from_data=labels is not None)
    loaded = open_base_model(base_model, dtype, read_by=translator_base_model(translator))
    reader = Translator.load(find_artifact(translator, "translator").folder, loaded)
    proposers: list[Proposer] = [TranslatorProposer(reader)]
    if evidence.labelled_tasks:
        proposers.append(LabelListProposer(reader, evidence.labelled_tasks))
    rule = AbstentionRule(DEFAULT_MIN_FAITHFULNESS if min_faithfulness is None else min_faithfulness)
    texts = verbalize_soft_prompts(
        read,
        proposers,
        settings,
        verifier=Verifier(loaded),
        evidence=evidence.tried_on,
        rule=rule,
        translator_id=reader.id,
    )
    if as_json:
        print_json(
            [{**text.to_json(), "verification": text.verification and text.verification.to_json()} for text in texts]
        )
        return
    columns: dict[str, Sequence[str | None]] = {
        "task": [text.task for text in texts],
        "ground truth": [soft_prompt.record.ground_truth for soft_prompt in read],
        "verbalization": [text.text for text in texts],
    }
    if evidence.what is None:
        print_table("Verbalizations", columns)
        click.echo(
            "Not verified: give --dod, --pairs or --inputs to try texts on, and to withhold those that fail.", err=True
        )
        return
    columns["faithfulness"] = [_with_interval(text) for text in texts]
    columns["abstained"] = ["yes" if text.abstained else "no" for text in texts]
    columns["reason"] = [text.reason for text in texts]
    print_table(f"Verbalizations, tried on {evidence.what}; required faithfulness {rule.min_faithfulness:g}", columns)


def _with_interval(text: Verbalization) -> str | None:
    if text.faithfulness is None:
        return None
    low, high = text.faithfulness_interval or (text.faithfulness, text.faithfulness)
    return f"{text.faithfulness:.2f} ({low:.2f} to {high:.2f})"
