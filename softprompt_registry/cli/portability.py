"""The command that puts hard prompts to work on other LLMs."""

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
    from softprompt_registry.portability.analysis import Portability
    from softprompt_registry.portability.budget import Estimate
    from softprompt_registry.stages.porting import PortabilityResult

SHOWN = {
    "ROUGE-L": "rouge_l",
    "strict": "accuracy_strict",
    "lenient": "accuracy_lenient",
    "exact": "exact_match",
    "empty": "num_empty",
    "missing": "num_missing",
    "tokens": "tokens_per_answer",
    "cost": "cost",
}
MISSING_SHOWN = 5


@main.command()
@click.argument("evaluation")
@dod_option
@click.option("--bank", help="Bank of the soft prompts, for the condition soft_prompt: a folder, models:/… or runs:/….")
@click.option(
    "--answers",
    default="portability.answers",
    show_default=True,
    type=click.Path(path_type=Path),
    help="SQLite file that keeps every answer; a second start requests only what is missing.",
)
@click.option("--target", "models", multiple=True, help="Name of a target LLM; may be given several times.")
@click.option(
    "--engine",
    type=click.Choice(["openai", "vllm", "transformers"]),
    default="openai",
    show_default=True,
    help="Engine of the models of --target: a server, or a model in this process.",
)
@click.option("--base-url", help="Server of the models of --target. Default: $OPENAI_BASE_URL, else OpenAI.")
@click.option("--dry-run", is_flag=True, help="Print the number of requests and the largest cost; send nothing.")
@with_base_model
@with_settings
@with_json
def portability(
    evaluation: str,
    dod: Path,
    bank: str | None,
    answers: Path,
    models: tuple[str, ...],
    engine: str,
    base_url: str | None,
    dry_run: bool,
    base_model: str | None,
    dtype: DType | None,
    config: Path | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Ask target LLMs about held-out pairs with an evaluation's texts as prompts, beside no prompt, examples and the truth.

    EVALUATION is a run of `softprompt evaluate`. Keys come from the environment (OPENAI_API_KEY). Every answer is kept at
    once; a run that was stopped or killed resumes. Several targets, each with its own settings, go into the settings, under
    `targets`.

    \b
    Example:
      softprompt portability 0b5c9d1e7f6a4c2b8d3e5f7a9b1c3d5e --dod tasks.sqlite --bank bank --target gpt-4.1-mini --dry-run
    """
    from softprompt_registry.config import build_config
    from softprompt_registry.portability.conditions import SOFT_PROMPT
    from softprompt_registry.portability.measuring import PortabilityConfig
    from softprompt_registry.stages.porting import estimate_portability, measure

    values = section_of("portability", config, overrides)
    if models:
        options = {"base_url": base_url} if base_url else {}
        given = [{"model": model, "engine": engine, "options": options} for model in models]
        values["targets"] = [*values.get("targets", []), *given]
    settings = build_config(PortabilityConfig, values)
    require_store(for_run=not dry_run)
    if dry_run:
        _print_estimate(estimate_portability(evaluation, dod, answers, settings), as_json)
        return
    loaded = None
    if bank is not None and (settings.conditions is None or SOFT_PROMPT in settings.conditions):
        from softprompt_registry.registry.artifacts import bank_base_model

        loaded = open_base_model(base_model, dtype, read_by=bank_base_model(bank))
    result = measure(evaluation, dod, answers, settings, base_model=loaded, bank_uri=bank)
    _print_result(result, as_json)
    if result.missing:
        raise click.exceptions.Exit(1)


def _print_estimate(found: Estimate, as_json: bool) -> None:
    rows = found.conditions
    if as_json:
        from dataclasses import asdict

        print_json({"tokens": found.tokens, "cost": found.cost, "conditions": [asdict(row) for row in rows]})
        return
    columns: dict[str, list[Any]] = {
        "target": [row.target for row in rows],
        "condition": [row.condition for row in rows],
        "questions": [row.questions for row in rows],
        "to ask": [row.requests for row in rows],
        "prompt tokens": [row.prompt_tokens for row in rows],
        "answer tokens, at most": [row.completion_tokens for row in rows],
        "cost, at most": [row.cost for row in rows],
    }
    print_table("What it would ask for; what is in the answers already is not asked again", columns)
    counted = ", ".join(dict.fromkeys(row.counted_by for row in rows))
    cost = "unknown, since a target has no prices" if found.cost is None else f"{found.cost:.4f} at most"
    click.echo(
        f"of servers: {found.tokens:,} tokens at most (prompts counted by {counted}), cost {cost}; nothing was asked"
    )


def _print_result(result: PortabilityResult, as_json: bool) -> None:
    found = result.portability
    if as_json:
        print_json(
            {
                "run_id": result.run_id,
                "conditions": found.table(),
                "comparisons": found.comparison_table(),
                "translation_against_few_shot": found.margin_table(),
                "missing": [answer.to_json() for answer in result.missing],
                "left_out": result.left_out,
                "not_asked": result.not_asked,
            }
        )
        return
    for target in found.targets:
        _print_target(found, target)
    for item in result.targets:
        cost = "" if item.asked.cost is None else f", cost {item.asked.cost:.4f} of {item.total.cost or 0:.4f} in all"
        tokens = item.asked.prompt_tokens + item.asked.completion_tokens
        click.echo(
            f"{item.target}: asked {item.asked.requests:,} requests now ({tokens:,} tokens), {item.found:,} were answered "
            f"before{cost}"
        )
        for adapted in item.adapted:
            click.echo(f"{item.target} refuses what was set, so answers were asked for with {adapted}")
        if item.ended:
            click.echo(f"{item.target} ended early: {item.ended}", err=True)
    if result.not_asked:
        click.echo(
            f"not asked, since the evaluation lacks the method or there is no bank: {', '.join(result.not_asked)}"
        )
    for name, reason in result.left_out.items():
        click.echo(f"left out: {name} ({reason})")
    for answer in result.missing[:MISSING_SHOWN]:
        question = answer.question
        place = f"{question.target}, {question.condition}, {question.task} #{question.item}"
        click.echo(f"missing: {place}: {answer.error}", err=True)
    if result.missing:
        click.echo(
            f"{len(result.missing)} answers are missing, all in the run's missing.json; the same command asks for these "
            "alone",
            err=True,
        )
    click.echo(f"run {result.run_id}, with portability.html")


def _print_target(found: Portability, target: str) -> None:
    from softprompt_registry.portability.conditions import SOFT_PROMPT

    conditions = found.conditions(target)
    place = found.small_model
    rows = [found.metrics(place if name == SOFT_PROMPT and place else target, name) for name in conditions]
    columns: dict[str, list[Any]] = {"condition": list(conditions)}
    for shown, metric in SHOWN.items():
        if any(metric in row for row in rows):
            columns[shown] = [row.get(metric) for row in rows]
    print_table(f"{target}: means over tasks; the soft prompt works on {place}" if place else target, columns)
