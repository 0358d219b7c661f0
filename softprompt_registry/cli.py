"""The command line: parses, calls one library function, prints. Heavy libraries are imported inside the commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from softprompt_registry import __version__
from softprompt_registry.errors import SoftPromptError
from softprompt_registry.printing import print_evaluation, print_json, print_table

if TYPE_CHECKING:
    from softprompt_registry.base_models import BaseModel, BaseModelRef, DType

CommandT = TypeVar("CommandT", bound=Callable[..., Any])

ORDER = (
    "build-dod",
    "tune",
    "train-translator",
    "verbalize",
    "evaluate",
    "register",
    "promote",
    "list",
    "lineage",
    "demo",
)


class StageGroup(click.Group):
    """Lists commands in the order of the data, and turns our errors into one clean message and exit code 1."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name in ORDER if name in self.commands]

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SoftPromptError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=StageGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="softprompt")
def main() -> None:
    """Tune soft prompts, translate them into plain language, register and serve them with MLflow.

    Where runs and models go is MLflow's matter: set MLFLOW_TRACKING_URI, or take its default, ./mlflow.db. Keys of target
    LLMs come from the environment only.
    """
    # MLflow prints links to runs on stdout, where `--json` promises JSON alone.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")


def with_json(command: CommandT) -> CommandT:
    """--json: machine output on stdout."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(command)


def with_settings(command: CommandT) -> CommandT:
    """--config and --set."""
    command = click.option("--set", "-s", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting.")(
        command
    )
    return click.option("--config", type=click.Path(path_type=Path), help="YAML file with settings.")(command)


def with_base_model(command: CommandT) -> CommandT:
    """--base-model and --dtype."""
    command = click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16"]),
        help="Weights' type. Default: that of the bank or translator that is read, else float32.",
    )(command)
    return click.option(
        "--base-model",
        help="packaged:NAME, a folder, or a Hub name with @revision. Default: $SOFTPROMPT_BASE_MODEL, else that of the "
        "bank or translator that is read, else packaged:smollm2-135m-instruct.",
    )(command)


def dod_option(command: CommandT) -> CommandT:
    """--dod."""
    return click.option("--dod", required=True, type=click.Path(path_type=Path), help="DoD file (.sqlite).")(command)


def _settings(section: str, config: Path | None, overrides: Sequence[str]) -> dict[str, Any]:
    """One section of the settings file with the overrides on top; a file of one section needs no heading."""
    from softprompt_registry.config import apply_overrides, read_yaml

    values = read_yaml(config) if config else {}
    if isinstance(values.get(section), dict):
        values = values[section]
    return apply_overrides(values, overrides)


def _load_base_model(base_model: str | None, dtype: DType | None, *, read_by: BaseModelRef | None = None) -> BaseModel:
    """The base model asked for; without one, that of the artifact that will be used with it."""
    from softprompt_registry.base_models import default_reference, load_base_model, load_base_model_for

    if read_by is not None:
        return load_base_model_for(read_by, override=base_model, dtype=dtype)
    return load_base_model(base_model or default_reference(), dtype=dtype or "float32")


@main.group("build-dod")
def build_dod() -> None:
    """Build a dataset of datasets.

    \b
    Example:
      softprompt build-dod files my_tasks --out tasks.sqlite
    """


@build_dod.command("files")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="DoD file to write (.sqlite).")
@click.option("--overwrite", is_flag=True, help="Replace an existing DoD.")
@with_settings
@with_json
def build_dod_files(
    folder: Path, out: Path, overwrite: bool, config: Path | None, overrides: tuple[str, ...], as_json: bool
) -> None:
    """From a folder with one CSV, JSONL or Parquet file per task, each with the columns input and output.

    \b
    Example:
      softprompt build-dod files my_tasks --out tasks.sqlite -s test_share=0.2
    """
    from softprompt_registry.config import build_config
    from softprompt_registry.dod.files import FilesConfig, build_dod_from_files

    settings = build_config(FilesConfig, _settings("files", config, overrides))
    report = build_dod_from_files(
        folder, out, config=settings, overwrite=overwrite, progress=lambda line: click.echo(line, err=True)
    )
    if as_json:
        import dataclasses

        print_json(dataclasses.asdict(report))
        return
    click.echo(f"{report.path}: {report.tasks} tasks, {report.pairs} pairs, digest {report.digest[:12]}")
    skipped = sum(sum(reasons.values()) for reasons in report.skipped_rows.values())
    click.echo(f"dropped {sum(report.duplicates.values())} duplicate pairs, skipped {skipped} rows")


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

    settings = build_config(TuningConfig, _settings("tuning", config, overrides))
    from softprompt_registry import stages
    from softprompt_registry.soft_prompts.bank import SoftPromptBank

    result = stages.tune(_load_base_model(base_model, dtype), dod, settings, out, task_names=tasks or None)
    table = stages.bank_table(SoftPromptBank(out))
    if as_json:
        print_json({"run_id": result.run_id, "model_uri": result.model_uri, "bank": str(out), "soft_prompts": table})
        return
    shown = ("task", "kind", "validation_loss", "label_accuracy", "exact_match")
    print_table(f"{len(table['task'])} soft prompts", {name: table[name] for name in shown})
    click.echo(f"bank {out}  model {result.model_uri}  run {result.run_id}")


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

    \b
    Example:
      softprompt train-translator --dod tasks.sqlite --bank bank --out translator -s epochs=20
    """
    from softprompt_registry.config import build_config
    from softprompt_registry.translators.training import TranslatorConfig

    settings = build_config(TranslatorConfig, _settings("translator", config, overrides))
    from softprompt_registry import stages
    from softprompt_registry.registry.artifacts import bank_base_model
    from softprompt_registry.translators.translator import read_record

    loaded = _load_base_model(base_model, dtype, read_by=bank_base_model(bank))
    result = stages.train(loaded, bank, dod, settings, out)
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

    settings = build_config(VerbalizationConfig, _settings("verbalization", config, overrides))
    from softprompt_registry.registry.artifacts import find_artifact, find_soft_prompts, translator_base_model
    from softprompt_registry.translators.translator import Translator
    from softprompt_registry.verbalization.proposers.translator import TranslatorProposer
    from softprompt_registry.verbalization.verbalizer import verbalize as verbalize_soft_prompts

    read = [soft_prompt for uri in soft_prompts for soft_prompt in find_soft_prompts(uri)]
    loaded = _load_base_model(base_model, dtype, read_by=translator_base_model(translator))
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

    settings = build_config(VerbalizationConfig, _settings("verbalization", config, overrides))
    from softprompt_registry import stages
    from softprompt_registry.registry.artifacts import translator_base_model

    loaded = _load_base_model(base_model, dtype, read_by=translator_base_model(translator))
    result = stages.evaluate(loaded, translator, bank, dod, settings)
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


@main.command()
@click.argument("model_uri")
@click.option("--name", required=True, help="Name of the registered model.")
@click.option("--model-config", type=click.Path(path_type=Path), help="YAML with settings of the served model.")
@with_json
def register(model_uri: str, name: str, model_config: Path | None, as_json: bool) -> None:
    """Register an evaluated translator as a servable model; refused while its lineage is incomplete.

    \b
    Example:
      softprompt register models:/m-0123 --name soft-prompt-translator
    """
    from softprompt_registry import stages
    from softprompt_registry.config import read_yaml

    registered = stages.register(model_uri, name, read_yaml(model_config) if model_config else None)
    if as_json:
        import dataclasses

        print_json(dataclasses.asdict(registered))
        return
    click.echo(f"registered {registered.name} version {registered.version}: {registered.uri}")


@main.command()
@click.argument("name")
@click.option("--version", type=int, help="Version to promote; default: the latest.")
@click.option("--alias", default="champion", show_default=True, help="Alias that moves.")
@click.option("--policy", type=click.Path(path_type=Path), help="YAML with the policy (minimum: metric → value).")
@click.option("--allow-base-change", is_flag=True, help="Let the champion's base model differ from the new one's.")
@click.option("--force", is_flag=True, help="Promote although a rule failed; needs --reason, which is recorded.")
@click.option("--reason", help="Why.")
@with_json
def promote(
    name: str,
    version: int | None,
    alias: str,
    policy: Path | None,
    allow_base_change: bool,
    force: bool,
    reason: str | None,
    as_json: bool,
) -> None:
    """Move an alias to a version that meets the policy; the decision is recorded as a run.

    \b
    Example:
      softprompt promote soft-prompt-translator --policy policy.yaml
    """
    import dataclasses

    from softprompt_registry.registry.promotion import Policy, read_policy
    from softprompt_registry.registry.promotion import promote as promote_version

    decision = promote_version(
        name,
        version,
        alias=alias,
        policy=read_policy(policy) if policy else Policy(),
        allow_base_change=allow_base_change,
        force=force,
        reason=reason,
    )
    if as_json:
        print_json(dataclasses.asdict(decision))
        return
    click.echo(f"{decision.name} version {decision.version} is @{decision.alias} (before: {decision.previous_version})")
    for rule in decision.rules:
        click.echo(
            f"  {'passed' if rule.passed else 'FAILED'}  {rule.rule}: found {rule.found}, required {rule.required}"
        )


@main.command("list")
@click.option("--base", help="Only models of this base model (name or beginning of its fingerprint).")
@click.option("--task", help="Only models of this task or DoD.")
@click.option("--metric", help="Only models that meet this, for instance 'label_f1>=0.3'.")
@with_json
def list_command(base: str | None, task: str | None, metric: str | None, as_json: bool) -> None:
    """List registered versions.

    \b
    Example:
      softprompt list --metric "label_f1>=0.1"
    """
    import dataclasses

    from softprompt_registry.registry.registration import list_models

    found = list_models(base=base, task=task, metric_filter=metric)
    if as_json:
        print_json([dataclasses.asdict(item) for item in found])
        return
    print_table(
        f"{len(found)} registered versions",
        {
            "name": [item.name for item in found],
            "version": [item.version for item in found],
            "aliases": [", ".join(item.aliases) for item in found],
            "type": [item.model_type.removeprefix("softprompt_") for item in found],
            "base model": [item.base for item in found],
            "DoD": [item.dod for item in found],
            "F1": [item.metrics.get("label_f1") for item in found],
            "cosine": [item.metrics.get("cosine") for item in found],
        },
    )


@main.command()
@click.argument("uri")
@with_json
def lineage(uri: str, as_json: bool) -> None:
    """Show what a model came from and what came from it.

    \b
    Example:
      softprompt lineage models:/soft-prompt-translator@champion
    """
    from softprompt_registry.registry.lineage import lineage as trace
    from softprompt_registry.registry.lineage import to_json, to_text

    graph = trace(uri)
    if as_json:
        print_json(to_json(graph))
        return
    click.echo(to_text(graph))


@main.command()
@click.option("--dod", type=click.Path(path_type=Path), help="DoD to use instead of the sample.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("demo"), show_default=True, help="Working folder.")
@with_settings
@with_json
def demo(dod: Path | None, out: Path, config: Path | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """The whole chain on the sample DoD: tune, translate, evaluate, register, promote, serve.

    \b
    Example:
      softprompt demo -s tuning.epochs=1
    """
    from softprompt_registry.config import apply_overrides, build_config, read_yaml
    from softprompt_registry.sample import DEMO_CONFIG, build_sample_dod

    values = apply_overrides(read_yaml(config or DEMO_CONFIG), overrides)
    from softprompt_registry.pipeline import PipelineConfig, run_pipeline

    settings = build_config(PipelineConfig, values)
    if dod is None:
        dod = out / "sample.sqlite"
        if not dod.exists():
            build_sample_dod(dod)
    result = run_pipeline(settings, dod, out)
    if as_json:
        print_json(
            {
                "run_id": result.run_id,
                "registered": {"name": result.registered.name, "version": result.registered.version},
                "refusal": result.refusal,
                "metrics": {method: item.metrics for method, item in result.evaluation.methods.items()},
                "served": {"task": result.served_task, **result.served},
                "seconds": result.seconds,
            }
        )
        return
    print_evaluation(result.evaluation)
    print_table("Where the time went", {"step": list(result.seconds), "seconds": list(result.seconds.values())})
    name = result.registered.name
    click.echo(f"Asked the served model for task {result.served_task!r}: {result.served['hard_prompt']!r}")
    if result.refusal:
        click.echo(result.refusal)
    else:
        click.echo(f"Promoted {name} version {result.registered.version} to @champion.")
    python = Path(sys.executable).parent
    alias = f"{name}@champion" if not result.refusal else f"{name}/{result.registered.version}"
    click.echo(
        f"""
Next:
  {python}/mlflow ui --port 5000
      runs, curves, tables and models at http://127.0.0.1:5000
  PATH={python}:$PATH mlflow models serve -m models:/{alias} --env-manager local --port 5001
  curl -s http://127.0.0.1:5001/invocations -H 'Content-Type: application/json' -d @{result.payload_file}
      the second line answers the third: soft prompt in, hard prompt out
  {python}/softprompt lineage models:/{alias}
  {python}/softprompt build-dod files MY_FOLDER --out my.sqlite   # one CSV per task, columns input,output
  {python}/softprompt tune --dod my.sqlite --out my-bank --config {DEMO_CONFIG}"""
    )


if __name__ == "__main__":
    main()
