"""The command that tunes soft prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

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


@main.command()
@dod_option
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the bank to write.")
@click.option("--task", "tasks", multiple=True, help="Tune this task only; may be given several times.")
@click.option("--log-each", is_flag=True, help="Also log a nested run for each soft prompt, with its curves.")
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Tune in this process, or on a Ray cluster (needs the extra `ray`).",
)
@click.option(
    "--workers", type=int, default=1, show_default=True, help="Ray: number of actors, each with a base model."
)
@click.option("--gpus-per-worker", type=float, help="Ray: GPUs of each actor. Default: the largest equal share.")
@click.option(
    "--ray-address", help="Ray: address of the cluster. Default: $RAY_ADDRESS, else a new one on this machine."
)
@with_base_model
@with_settings
@with_json
def tune(
    dod: Path,
    out: Path,
    tasks: tuple[str, ...],
    log_each: bool,
    engine: str,
    workers: int,
    gpus_per_worker: float | None,
    ray_address: str | None,
    base_model: str | None,
    dtype: DType | None,
    config: Path | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Tune one soft prompt per task of a DoD. A run that was stopped or killed resumes.

    \b
    Example:
      softprompt tune --dod tasks.sqlite --out bank -s num_virtual_tokens=8 -s learning_rate=2e-2
      softprompt tune --dod tasks.sqlite --out bank --engine ray --workers 8 --gpus-per-worker 1
    """
    from softprompt_registry.base_models.loading import default_reference
    from softprompt_registry.config import build_config
    from softprompt_registry.soft_prompts.tuning_settings import TuningConfig

    settings = build_config(TuningConfig, section_of("tuning", config, overrides))
    require_store()
    from softprompt_registry.soft_prompts.bank import SoftPromptBank
    from softprompt_registry.stages.tuning import bank_table
    from softprompt_registry.stages.tuning import tune as tune_stage

    chosen: dict[str, Any] = {"task_names": tasks or None, "log_each": log_each}
    if engine == "ray":
        from softprompt_registry.soft_prompts.on_ray import RayConfig, RayEngine

        cluster = RayConfig(ray_address, workers, gpus_per_worker)
        with RayEngine(base_model or default_reference(), dtype or "float32", cluster) as on_ray:
            result = tune_stage(on_ray, dod, settings, out, **chosen)
    else:
        result = tune_stage(open_base_model(base_model, dtype), dod, settings, out, **chosen)
    bank = SoftPromptBank(out)
    table = bank_table(bank)
    if as_json:
        print_json({"run_id": result.run_id, "model_uri": result.model_uri, "bank": str(out), "soft_prompts": table})
        return
    shown = ("task", "kind", "validation_loss", "label_accuracy", "exact_match")
    print_table(f"{len(bank)} soft prompts", {name: table[name][: len(bank)] for name in shown})
    for name, reason in bank.failures().items():
        click.echo(f"not tuned: {name}: {reason}", err=True)
    click.echo(f"bank {out}  model {result.model_uri}  run {result.run_id}")


@main.command("import-peft")
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the soft prompt to write.")
@click.option("--task", required=True, help="Name of the task that it was tuned on.")
@click.option("--template", default="{x}", show_default=True, help="Frame of the inputs, with {x} for the input.")
@click.option("--label", "labels", multiple=True, help="A label of the task; may be given several times.")
@click.option("--ground-truth", default="", help="Text of a perfect verbalization, if known.")
@click.option(
    "--layout",
    type=click.Choice(["bos", "no-bos"]),
    help="Whether a BOS follows the soft tokens, as in training. Default: what the base model's tokenizer does.",
)
@with_base_model
@with_json
def import_peft_command(
    adapter: Path,
    out: Path,
    task: str,
    template: str,
    labels: tuple[str, ...],
    ground_truth: str,
    layout: str | None,
    base_model: str | None,
    dtype: DType | None,
    as_json: bool,
) -> None:
    """Make a soft prompt of a PEFT adapter of type PROMPT_TUNING; the base model must be the one it was trained on.

    \b
    Example:
      softprompt import-peft my-adapter --out my-soft-prompt --task reviews --label good --label bad
    """
    from softprompt_registry.base_models.frozen import LAYOUT_WITHOUT_BOS, SEQUENCE_LAYOUT
    from softprompt_registry.soft_prompts.peft_format import import_peft
    from softprompt_registry.storage import require_free_folder

    require_free_folder(out, f"importing PEFT adapter {str(adapter)!r}")
    loaded = open_base_model(base_model, dtype)
    soft_prompt = import_peft(
        adapter,
        loaded,
        task=task,
        kind="classification" if labels else "generation",
        template=template,
        labels=labels,
        ground_truth=ground_truth,
        layout={"bos": SEQUENCE_LAYOUT, "no-bos": LAYOUT_WITHOUT_BOS, None: None}[layout],
    )
    soft_prompt.save(out)
    if as_json:
        print_json({"soft_prompt": str(out), "id": soft_prompt.id, "record": soft_prompt.record.to_json()})
        return
    click.echo(
        f"soft prompt {out}: task {soft_prompt.record.task}, K={soft_prompt.num_virtual_tokens}, layout "
        f"{soft_prompt.record.layout}, base model {loaded.ref}"
    )


@main.command("export-peft")
@click.argument("soft_prompt")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the adapter to write.")
@click.option(
    "--base-model-path",
    help="Where PEFT's Auto classes will find the base model: a folder or a Hub name with @revision. Default: the base "
    "model's Hub name, if it has one; a path is in the adapter only if you give it.",
)
@with_json
def export_peft_command(soft_prompt: str, out: Path, base_model_path: str | None, as_json: bool) -> None:
    """Write a soft prompt as a PEFT adapter: a folder, models:/… or a member of a bank (bank#task).

    \b
    Example:
      softprompt export-peft "bank#instruments" --out adapter
    """
    from softprompt_registry.base_models.loading import find_tokenizer_for
    from softprompt_registry.errors import ArtifactError
    from softprompt_registry.registry.artifacts import find_soft_prompts
    from softprompt_registry.soft_prompts.peft_format import export_peft, how_to_load, what_peft_does_otherwise

    found = find_soft_prompts(soft_prompt)
    if len(found) != 1:
        raise ArtifactError(
            f"exporting {soft_prompt!r}: it holds {len(found)} soft prompts; expected one. Name a member as bank#task."
        )
    export_peft(found[0], out, base_model_path=base_model_path)
    record = found[0].record
    tokenizer = find_tokenizer_for(record.base_model)
    note = what_peft_does_otherwise(record, tokenizer) if tokenizer is not None else None
    load = how_to_load(out, record.base_model)
    if as_json:
        print_json({"adapter": str(out), "id": found[0].id, "layout": record.layout, "load": load, "note": note})
        return
    click.echo(f"PEFT adapter {out}: task {record.task}, layout {record.layout}, base model {record.base_model}")
    click.echo(f"to load it in Python: {load}")
    if note:
        click.echo(f"note: {note}", err=True)
    elif tokenizer is None:
        click.echo("note: without the base model's tokenizer it is not known whether PEFT gives that layout.", err=True)
