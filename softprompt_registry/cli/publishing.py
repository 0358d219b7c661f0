"""The command that puts hard prompts into MLflow's Prompt Registry."""

from __future__ import annotations

import click

from softprompt_registry.cli.options import main, require_store, with_json
from softprompt_registry.printing import print_json, print_table


@main.command()
@click.argument("evaluation")
@click.option("--task", "tasks", multiple=True, help="Task whose text is published; may be given several times.")
@click.option("--all", "all_tasks", is_flag=True, help="Publish every task whose text was not withheld.")
@click.option(
    "--method", default="all+verifier", show_default=True, help="Method of the evaluation that wrote the text."
)
@click.option("--alias", default="champion", show_default=True, help="Alias that moves to the version.")
@click.option("--portability", help="Run of `softprompt portability`, whose scores on target LLMs become tags.")
@click.option(
    "--template", help="Prompt with the places {hard_prompt} and {input}. Default: the template of portability."
)
@click.option("--allow-abstained", is_flag=True, help="Publish a text that the verifier abstained on; its tags say so.")
@with_json
def publish(
    evaluation: str,
    tasks: tuple[str, ...],
    all_tasks: bool,
    method: str,
    alias: str,
    portability: str | None,
    template: str | None,
    allow_abstained: bool,
    as_json: bool,
) -> None:
    """Register texts of an evaluation as prompts that any MLflow program can load.

    The text for a task becomes prompts:/TASK.hard@champion. A text that is there already gets no new version; its tags and
    the alias are brought up to date.

    \b
    Example:
      softprompt publish 0b5c9d1e7f6a4c2b8d3e5f7a9b1c3d5e --task instruments
    """
    if bool(tasks) == all_tasks:
        raise click.UsageError("Name tasks with --task, or give --all; expected one of the two.")
    import dataclasses

    require_store()
    from softprompt_registry.registry.publishing import TEMPLATE
    from softprompt_registry.stages.publishing import publish as publish_stage

    result = publish_stage(
        evaluation,
        None if all_tasks else tasks,
        method=method,
        alias=alias,
        template=TEMPLATE if template is None else template,
        portability=portability,
        allow_abstained=allow_abstained,
    )
    if as_json:
        print_json(dataclasses.asdict(result))
        return
    if result.published:
        print_table(
            f"Published: texts of {result.method} as @{alias}",
            {
                "task": [item.task for item in result.published],
                "prompt": [f"prompts:/{item.name}@{alias}" for item in result.published],
                "version": [item.version for item in result.published],
                "": ["new" if item.is_new else "same text: no new version" for item in result.published],
            },
        )
    for reason in dict.fromkeys(result.held_back.values()):
        tasks_of = [task for task, why in result.held_back.items() if why == reason]
        click.echo(f"withheld: {', '.join(tasks_of)} ({reason})")
    unlinked = sum(item.links_left_out > 0 for item in result.published)
    if unlinked:
        click.echo(f"{unlinked} prompts are missing on the pages of runs: MLflow stores no longer list there")
    click.echo(f"run {result.run_id}")
