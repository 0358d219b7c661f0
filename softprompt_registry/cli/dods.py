"""Commands that make and check datasets of datasets."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from softprompt_registry.cli.options import CommandT, main, require_store, section_of, with_json, with_settings
from softprompt_registry.printing import print_json, print_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from softprompt_registry.language_models.answer_cache import Asked


def with_out(command: CommandT) -> CommandT:
    """--out and --overwrite."""
    command = click.option("--overwrite", is_flag=True, help="Replace an existing DoD.")(command)
    return click.option("--out", required=True, type=click.Path(path_type=Path), help="DoD file to write (.sqlite).")(
        command
    )


def with_generator(command: CommandT) -> CommandT:
    """--engine, --model and --base-url: the LLM that writes."""
    command = click.option("--base-url", help="Where the server's API starts, for instance http://127.0.0.1:8000/v1.")(
        command
    )
    command = click.option(
        "--model", help="The server's name for the model; in this process packaged:NAME, a folder or a Hub name."
    )(command)
    return click.option(
        "--engine",
        type=click.Choice(["openai", "vllm", "transformers"]),
        help="What writes: a server that speaks OpenAI's API (its key in OPENAI_API_KEY), or a model in this process.",
    )(command)


def with_tokenizer(command: CommandT) -> CommandT:
    """--base-model, of which only the tokenizer is loaded."""
    return click.option(
        "--base-model",
        help="Base model whose tokens are counted: packaged:NAME, a folder, or a Hub name with @revision. Default: "
        "$SOFTPROMPT_BASE_MODEL, else packaged:smollm2-135m-instruct.",
    )(command)


@main.group("build-dod")
def build_dod() -> None:
    """Build a dataset of datasets: from your files, with an LLM, or from public sets.

    \b
    Example:
      softprompt build-dod files my_tasks --out tasks.sqlite
    """


@build_dod.command("files")
@click.argument("folder", type=click.Path(path_type=Path))
@with_out
@with_settings
@with_json
def build_dod_files(
    folder: Path, out: Path, overwrite: bool, config: Path | None, overrides: tuple[str, ...], as_json: bool
) -> None:
    """From a folder with one CSV, TSV, JSON, JSONL or Parquet file per task, each with the columns input and output.

    \b
    Example:
      softprompt build-dod files my_tasks --out tasks.sqlite -s test_share=0.2
    """
    from softprompt_registry.config import build_config
    from softprompt_registry.dod.files import FilesConfig, build_dod_from_files

    settings = build_config(FilesConfig, section_of("files", config, overrides))
    require_store()
    from softprompt_registry.stages.dods import build

    run_id, report = build(
        "build-dod-files",
        settings,
        lambda recorder: build_dod_from_files(folder, out, config=settings, overwrite=overwrite, recorder=recorder),
    )
    if as_json:
        print_json({"run_id": run_id, **dataclasses.asdict(report)})
        return
    _say_built(report.path, report.tasks, report.pairs, report.digest)
    skipped = sum(sum(reasons.values()) for reasons in report.skipped_rows.values())
    click.echo(f"dropped {sum(report.duplicates.values())} duplicate pairs, skipped {skipped} rows")
    if report.respelled_labels:
        shown = [
            f"{', '.join(map(repr, others))} as {label!r} in {name}"
            for name, labels in report.respelled_labels.items()
            for label, others in labels.items()
        ]
        click.echo(f"took spellings of a label for one (label_spelling=keep leaves them): {_first(shown, '; ')}")
    if report.left_out:
        click.echo(f"left out what is no task file: {_first([*map(repr, report.left_out)], ', ')}")


@build_dod.command("classification")
@with_out
@click.option(
    "--words",
    type=click.Path(path_type=Path),
    help="CSV or JSONL of seed words with the columns word, pos, count. Default: the Brown corpus of NLTK.",
)
@click.option("--unrelated-labels", is_flag=True, help="Labels that have nothing in common: the Preliminary DoD.")
@with_generator
@click.option(
    "--dry-run", is_flag=True, help="Only print how many requests and tokens it takes if no answer is refused."
)
@with_settings
@with_json
def build_dod_classification_command(
    out: Path,
    overwrite: bool,
    words: Path | None,
    unrelated_labels: bool,
    engine: str | None,
    model: str | None,
    base_url: str | None,
    dry_run: bool,
    config: Path | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Classification tasks written by an LLM. Stopped or killed, it goes on where it was.

    \b
    Example:
      softprompt build-dod classification --out c.sqlite --model gpt-4o-mini -s num_tasks=50
    """
    from softprompt_registry.config import build_config
    from softprompt_registry.dod.classification import ClassificationConfig, build_dod_classification
    from softprompt_registry.dod.classification_requests import ClassificationRequests, estimate
    from softprompt_registry.dod.seed_words import brown_words, read_seed_words
    from softprompt_registry.dod.store import require_free

    values = _with_generator(section_of("classification", config, overrides), engine, model, base_url)
    if unrelated_labels:
        values["related_labels"] = False
    settings = build_config(ClassificationConfig, values)
    if dry_run:
        print_json(dataclasses.asdict(estimate(settings)))
        return
    require_store()
    require_free(out, "building a classification DoD", overwrite=overwrite)  # before a large model is loaded
    letters = settings.min_seed_letters
    seed_words = read_seed_words(words, min_letters=letters) if words else brown_words(min_letters=letters)
    ClassificationRequests(seed_words, settings)
    from softprompt_registry.language_models.opening import open_language_model
    from softprompt_registry.stages.dods import build

    with open_language_model(settings.generator) as writer:
        run_id, report = build(
            "build-dod-classification",
            settings,
            lambda recorder: build_dod_classification(
                seed_words, out, writer, config=settings, overwrite=overwrite, recorder=recorder
            ),
        )
    if as_json:
        print_json({"run_id": run_id, **_without_failure(dataclasses.asdict(report))})
        return
    _say_built(report.path, report.tasks, report.pairs, report.digest)
    _say_refused({f"given up, {reason}": count for reason, count in report.given_up.items()} | dict(report.refused))
    _say_asked(report.asked)


@build_dod.command("general")
@click.argument("source")
@with_out
@with_tokenizer
@with_settings
@with_json
def build_dod_general_command(
    source: str,
    out: Path,
    overwrite: bool,
    base_model: str | None,
    config: Path | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Super-NaturalInstructions: a folder with its task files, a flat copy of them, or hub for a copy on the Hub.

    \b
    Example:
      softprompt build-dod general natural-instructions --out general.sqlite
    """
    from softprompt_registry.config import build_config
    from softprompt_registry.dod.general import GeneralConfig, build_dod_general

    settings = build_config(GeneralConfig, section_of("general", config, overrides))
    require_store()
    tokenizer = _tokenizer(base_model)
    from softprompt_registry.stages.dods import build

    run_id, report = build(
        "build-dod-general",
        settings,
        lambda recorder: build_dod_general(
            source, out, tokenizer=tokenizer, config=settings, overwrite=overwrite, recorder=recorder
        ),
    )
    if as_json:
        print_json({"run_id": run_id, **dataclasses.asdict(report)})
        return
    shown = ("name", "split", "status", "pairs", "empty", "duplicates", "too_long", "drawn")
    table = report.table()
    print_table("Filters, task by task", {name: table[name] for name in shown})
    kept = [row for row in report.rows if row.status == "kept"]
    _say_built(report.path, len(kept), sum(row.drawn for row in kept), report.digest)
    for name, reason in report.skipped.items():
        click.echo(f"skipped {name}: {reason}")


@build_dod.command("inspect")
@click.argument("folder", required=False)
@with_out
@with_settings
@with_json
def build_dod_inspect_command(
    folder: str | None,
    out: Path,
    overwrite: bool,
    config: Path | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """SST-2, SST-5, TREC, Subj and AG News with the paper's labels, from FOLDER, else from the Hugging Face Hub.

    \b
    Example:
      softprompt build-dod inspect --out inspect.sqlite
    """
    from softprompt_registry.config import build_config
    from softprompt_registry.dod.labelled_sets import InspectConfig, build_dod_inspect

    # An entry point of MLproject has no way to leave the folder out but an empty text.
    source = Path(folder) if folder else None
    settings = build_config(InspectConfig, section_of("inspect", config, overrides))
    require_store()
    from softprompt_registry.stages.dods import build

    run_id, report = build(
        "build-dod-inspect",
        settings,
        lambda recorder: build_dod_inspect(source, out, config=settings, overwrite=overwrite, recorder=recorder),
    )
    _print_sets(run_id, report, as_json=as_json)


@build_dod.command("ood")
@with_out
@click.option(
    "--reviews",
    type=click.Path(path_type=Path),
    help="Hotel reviews: a file with text and label, or the corpus's own folders.",
)
@click.option("--essays", type=click.Path(path_type=Path), help="Essays: a file with text and label.")
@with_settings
@with_json
def build_dod_ood_command(
    out: Path,
    overwrite: bool,
    reviews: Path | None,
    essays: Path | None,
    config: Path | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Two sets from elsewhere: truthful or deceptive hotel reviews, essays by humans or generated.

    \b
    Example:
      softprompt build-dod ood --reviews op_spam_v1.4 --essays essays.csv --out ood.sqlite
    """
    from softprompt_registry.config import build_config
    from softprompt_registry.dod.labelled_sets import OodConfig, build_dod_ood

    settings = build_config(OodConfig, section_of("ood", config, overrides))
    require_store()
    from softprompt_registry.stages.dods import build

    run_id, report = build(
        "build-dod-ood",
        settings,
        lambda recorder: build_dod_ood(
            out, reviews=reviews, essays=essays, config=settings, overwrite=overwrite, recorder=recorder
        ),
    )
    _print_sets(run_id, report, as_json=as_json)


@main.command("audit-dod")
@click.argument("dod", type=click.Path(path_type=Path))
@click.option("--page", type=click.Path(path_type=Path), help="HTML report to write. Default: <DOD>.audit.html.")
@click.option("--strict", is_flag=True, help="Exit with code 1 on any error or warning.")
@with_tokenizer
@with_settings
@with_json
def audit_dod_command(
    dod: Path,
    page: Path | None,
    strict: bool,
    base_model: str | None,
    config: Path | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Look for what makes results too good or too bad: duplicates, leaks, imbalance, held-out labels, lengths.

    \b
    Example:
      softprompt audit-dod tasks.sqlite --strict
    """
    from softprompt_registry.config import build_config
    from softprompt_registry.dod.audit import AuditConfig

    settings = build_config(AuditConfig, section_of("audit", config, overrides))
    require_store()
    page = page or dod.with_name(dod.name + ".audit.html")
    from softprompt_registry.stages.dods import audit

    run_id, found = audit(dod, settings, page, tokenizer=_tokenizer(base_model))
    if as_json:
        print_json({"run_id": run_id, "page": str(page), "passed": found.passed(strict), **found.to_json()})
    else:
        print_table(
            f"{dod}: {found.sizes.tasks} tasks, {found.sizes.pairs} pairs",
            {
                "severity": [finding.kind.severity for finding in found.findings],
                "finding": [finding.title for finding in found.findings],
                "tasks": [str(len(finding.tasks)) for finding in found.findings],
            },
        )
        click.echo(f"page {page}  run {run_id}")
    if not found.passed(strict):
        raise click.exceptions.Exit(1)


@main.command("paraphrase-dod")
@click.argument("dod", type=click.Path(path_type=Path))
@with_out
@click.option("--factor", type=int, help="Paraphrases of each training task's hard prompt. Default: 10.")
@with_generator
@with_tokenizer
@with_settings
@with_json
def paraphrase_dod_command(
    dod: Path,
    out: Path,
    overwrite: bool,
    factor: int | None,
    engine: str | None,
    model: str | None,
    base_url: str | None,
    base_model: str | None,
    config: Path | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Add shorter wordings of the training tasks' hard prompts, written by an LLM. Stopped, it goes on where it was.

    \b
    Example:
      softprompt paraphrase-dod general.sqlite --out general-x10.sqlite --model gpt-4o-mini
    """
    from softprompt_registry.config import build_config
    from softprompt_registry.dod.paraphrase import ParaphraseConfig, paraphrase_dod
    from softprompt_registry.dod.store import DodStore, require_free

    values = _with_generator(section_of("paraphrase", config, overrides), engine, model, base_url)
    if factor is not None:
        values["factor"] = factor
    settings = build_config(ParaphraseConfig, values)
    require_store()
    require_free(out, f"paraphrasing DoD {str(dod)!r}", overwrite=overwrite)  # before a large model is loaded
    with DodStore.open(dod):
        pass
    tokenizer = _tokenizer(base_model)
    from softprompt_registry.language_models.opening import open_language_model
    from softprompt_registry.stages.dods import build

    with open_language_model(settings.generator) as writer:
        run_id, report = build(
            "paraphrase-dod",
            settings,
            lambda recorder: paraphrase_dod(
                dod,
                out,
                writer,
                lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]),
                config=settings,
                overwrite=overwrite,
                recorder=recorder,
            ),
        )
    if as_json:
        values = _without_failure(dataclasses.asdict(report))
        print_json({"run_id": run_id, "failed_share": report.failed_share, **values})
        return
    click.echo(
        f"{report.path}: {report.made} of {report.wanted} paraphrases for {report.tasks} tasks, "
        f"{100 * report.failed_share:.1f} % failed, digest {report.digest[:12]}"
    )
    _say_refused(report.refused)
    _say_asked(report.asked)


# --- What the commands share ---


def _with_generator(
    values: dict[str, Any], engine: str | None, model: str | None, base_url: str | None
) -> dict[str, Any]:
    """The options of the LLM that writes, laid over its section of the settings."""
    from softprompt_registry.config import apply_overrides

    generator = values.get("generator")
    if engine is not None and isinstance(generator, dict) and generator.get("engine", "openai") != engine:
        values = {**values, "generator": {**generator, "options": {}}}  # the file's options are those of its own engine
    given = {"engine": engine, "model": model, "options.base_url": base_url}
    texts = {key: json.dumps(value, ensure_ascii=False) for key, value in given.items() if value is not None}
    return apply_overrides(values, [f"generator.{key}={text}" for key, text in texts.items()])


def _tokenizer(base_model: str | None) -> PreTrainedTokenizerBase:
    from softprompt_registry.base_models.loading import default_reference, load_tokenizer

    return load_tokenizer(base_model or default_reference())


def _say_built(path: Path, tasks: int, pairs: int, digest: str) -> None:
    click.echo(f"{path}: {tasks} tasks, {pairs} pairs, digest {digest[:12]}")


def _first(texts: Sequence[str], separator: str) -> str:
    return separator.join(texts[:8]) + (f" and {len(texts) - 8} more" if len(texts) > 8 else "")


def _say_refused(refused: Any) -> None:
    if refused:
        print_table("Refused", {"reason": list(refused), "count": [str(count) for count in refused.values()]})


def _say_asked(asked: Asked) -> None:
    click.echo(
        f"asked {asked.requests} requests in {asked.seconds:.0f} s: {asked.prompt_tokens} prompt tokens, "
        f"{asked.completion_tokens} completion tokens; what was answered before was not asked again"
    )
    if asked.adapted:
        click.echo(f"the model refuses what was set, so answers were asked for with {asked.adapted}")


def _without_failure(report: dict[str, Any]) -> dict[str, Any]:
    report["asked"].pop("last_failure")
    return report


def _print_sets(run_id: str, report: Any, *, as_json: bool) -> None:
    if as_json:
        print_json({"run_id": run_id, **dataclasses.asdict(report)})
        return
    print_table("Labelled sets", report.table())
    _say_built(report.path, len(report.sets), sum(c.train + c.validation + c.test for c in report.sets), report.digest)
