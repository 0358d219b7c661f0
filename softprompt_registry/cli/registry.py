"""Commands of the registry."""

from __future__ import annotations

from pathlib import Path

import click

from softprompt_registry.cli.options import main, require_store, with_json
from softprompt_registry.printing import print_json, print_table


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
    from softprompt_registry.config import read_yaml

    settings = read_yaml(model_config) if model_config else None
    require_store()
    from softprompt_registry.stages.registering import register as register_stage

    registered = register_stage(model_uri, name, settings)
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
@click.option("--allow-base-change", is_flag=True, help="Allow another base model than the champion's.")
@click.option("--force", is_flag=True, help="Promote although a rule failed; needs --reason, which is recorded.")
@click.option("--reason", help="Reason for --force.")
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

    require_store()
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

    require_store(for_run=False)
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
    import dataclasses

    require_store(for_run=False)
    from softprompt_registry.registry.lineage import lineage as trace
    from softprompt_registry.registry.lineage import to_text

    graph = trace(uri)
    if as_json:
        print_json(dataclasses.asdict(graph))
        return
    click.echo(to_text(graph))
