"""The demo."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from softprompt_registry.cli.options import (
    main,
    require_store,
    with_json,
    with_settings,
)
from softprompt_registry.printing import print_evaluation, print_json, print_table

if TYPE_CHECKING:
    pass


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
    require_store()
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
                "rule": result.rule.to_json(),
                "served": {"task": result.served_task, **result.served},
                "seconds": result.seconds,
            }
        )
        return
    print_evaluation(result.evaluation, result.rule)
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
