"""Commands that make and check datasets of datasets."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from softprompt_registry.cli.options import CommandT, main, require_store, section_of, with_json, with_settings
from softprompt_registry.printing import print_json, print_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from softprompt_registry.dod.classification import ClassificationReport
    from softprompt_registry.dod.files import FilesReport
    from softprompt_registry.dod.general import GeneralReport
    from softprompt_registry.dod.labelled_sets import LabelledSetsReport
    from softprompt_registry.dod.paraphrase import ParaphraseReport
    from softprompt_registry.language_models.answer_cache import Asked
    from softprompt_registry.stages.dods import BuildReport

ConfigT = TypeVar("ConfigT")
ReportT = TypeVar("ReportT", bound="BuildReport")


@dataclasses.dataclass(frozen=True)
class Given:
    """What every builder is given: --out, --overwrite, --config, --set and --json."""

    out: Path
    overwrite: bool
    config: Path | None
    overrides: tuple[str, ...]
    as_json: bool

    def settings(
        self, cls: type[ConfigT], section: str, edit: Callable[[dict[str, Any]], Any] | None = None
    ) -> ConfigT:
        """The builder's settings; `edit` lays options of the command over them."""
        from softprompt_registry.config import build_config

        values = section_of(section, self.config, self.overrides)
        return build_config(cls, edit(values) if edit else values)

    def build(
        self, stage: str, settings: Any, build_dod: Callable[..., ReportT], show: Callable[[ReportT], None]
    ) -> None:
        """Build in a run of its own and print the report."""
        from softprompt_registry.stages.dods import build

        arguments = {"config": settings, "overwrite": self.overwrite}
        run_id, report = build(stage, settings, lambda recorder: build_dod(**arguments, recorder=recorder))
        if not self.as_json:
            show(report)
            return
        values = dataclasses.asdict(report)  # type: ignore[call-overload]
        if "asked" in values:
            values["asked"].pop("last_failure")
        print_json({"run_id": run_id, **values})


def with_given(command: Callable[..., None]) -> Callable[..., None]:
    """--config, --set and --json; with those of `with_out` they reach the command as one `Given`."""

    @with_settings
    @with_json
    @wraps(command)
    def wrapped(**options: Any) -> None:
        given = Given(**{field.name: options.pop(field.name) for field in dataclasses.fields(Given)})
        command(given, **options)

    return wrapped


def with_out(command: CommandT) -> CommandT:
    """--out and --overwrite."""
    command = click.option("--overwrite", is_flag=True, help="Replace an existing DoD.")(command)
    return click.option("--out", required=True, type=click.Path(path_type=Path), help="DoD file to write (.sqlite).")(
        command
    )


def with_generator(command: CommandT) -> CommandT:
    """--engine, --model and --base-url: the LLM that writes."""
    command = click.option("--base-url", help="Base URL of the server's API, for instance http://127.0.0.1:8000/v1.")(
        command
    )
    command = click.option(
        "--model", help="The server's name for the model; in this process packaged:NAME, a folder or a Hub name."
    )(command)
    return click.option(
        "--engine",
        type=click.Choice(["openai", "vllm", "transformers"]),
        help="Engine of the LLM that writes: a server that speaks OpenAI's API (its key in OPENAI_API_KEY), or a model in "
        "this process.",
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
@with_given
def build_dod_files(given: Given, folder: Path) -> None:
    """From a folder with one CSV, TSV, JSON, JSONL or Parquet file per task, each with the columns input and output.

    \b
    Example:
      softprompt build-dod files my_tasks --out tasks.sqlite -s test_share=0.2
    """
    from softprompt_registry.dod.files import FilesConfig, build_dod_from_files

    settings = given.settings(FilesConfig, "files")
    require_store()
    given.build("build-dod-files", settings, partial(build_dod_from_files, folder, given.out), _show_files)


def _show_files(report: FilesReport) -> None:
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
@click.option("--unrelated-labels", is_flag=True, help="Write unrelated labels: the paper's Preliminary DoD.")
@with_generator
@click.option("--dry-run", is_flag=True, help="Only print the number of requests and tokens if no answer is rejected.")
@with_given
def build_dod_classification_command(
    given: Given,
    words: Path | None,
    unrelated_labels: bool,
    engine: str | None,
    model: str | None,
    base_url: str | None,
    dry_run: bool,
) -> None:
    """Classification tasks written by an LLM. A build that was stopped or killed resumes.

    \b
    Example:
      softprompt build-dod classification --out c.sqlite --model gpt-4o-mini -s num_tasks=50
    """
    from softprompt_registry.dod.classification import (
        ClassificationConfig,
        ClassificationRequests,
        build_dod_classification,
        estimate,
    )
    from softprompt_registry.dod.seed_words import brown_words, read_seed_words
    from softprompt_registry.dod.store import require_free

    def edit(values: dict[str, Any]) -> dict[str, Any]:
        values = _with_generator(values, engine, model, base_url)
        return {**values, "related_labels": False} if unrelated_labels else values

    settings = given.settings(ClassificationConfig, "classification", edit)
    if dry_run:
        print_json(dataclasses.asdict(estimate(settings)))
        return
    require_store()
    require_free(given.out, "building a classification DoD", overwrite=given.overwrite)  # before a model is loaded
    letters = settings.min_seed_letters
    seed_words = read_seed_words(words, min_letters=letters) if words else brown_words(min_letters=letters)
    ClassificationRequests(seed_words, settings)
    from softprompt_registry.language_models.opening import open_language_model

    with open_language_model(settings.generator) as writer:
        given.build(
            "build-dod-classification",
            settings,
            partial(build_dod_classification, seed_words, given.out, writer),
            _show_classification,
        )


def _show_classification(report: ClassificationReport) -> None:
    _say_built(report.path, report.tasks, report.pairs, report.digest)
    given_up = {f"given up, {reason}": count for reason, count in report.given_up.items()}
    _say_refused_and_asked({**given_up, **report.refused}, report.asked)


@build_dod.command("general")
@click.argument("source")
@with_out
@with_tokenizer
@with_given
def build_dod_general_command(given: Given, source: str, base_model: str | None) -> None:
    """Super-NaturalInstructions: a folder with its task files, a flat copy of them, or hub for a copy on the Hub.

    \b
    Example:
      softprompt build-dod general natural-instructions --out general.sqlite
    """
    from softprompt_registry.dod.general import GeneralConfig, build_dod_general

    settings = given.settings(GeneralConfig, "general")
    require_store()
    build = partial(build_dod_general, source, given.out, tokenizer=_tokenizer(base_model))
    given.build("build-dod-general", settings, build, _show_general)


def _show_general(report: GeneralReport) -> None:
    table = report.table()
    shown = ("name", "split", "status", "pairs", "empty", "duplicates", "too_long", "drawn")
    print_table("Filters, task by task", {name: table[name] for name in shown})
    kept = [row.drawn for row in report.rows if row.kept]
    _say_built(report.path, len(kept), sum(kept), report.digest)
    for name, reason in report.skipped.items():
        click.echo(f"skipped {name}: {reason}")


@build_dod.command("inspect")
@click.argument("folder", required=False)
@with_out
@with_given
def build_dod_inspect_command(given: Given, folder: str | None) -> None:
    """SST-2, SST-5, TREC, Subj and AG News with the paper's labels, from FOLDER, else from the Hugging Face Hub.

    \b
    Example:
      softprompt build-dod inspect --out inspect.sqlite
    """
    from softprompt_registry.dod.labelled_sets import InspectConfig, build_dod_inspect

    # An entry point of MLproject has no way to leave the folder out but an empty text.
    source = Path(folder) if folder else None
    settings = given.settings(InspectConfig, "inspect")
    require_store()
    given.build("build-dod-inspect", settings, partial(build_dod_inspect, source, given.out), _show_sets)


@build_dod.command("ood")
@with_out
@click.option(
    "--reviews",
    type=click.Path(path_type=Path),
    help="Hotel reviews: a file with text and label, or the corpus's own folders.",
)
@click.option("--essays", type=click.Path(path_type=Path), help="Essays: a file with text and label.")
@with_given
def build_dod_ood_command(given: Given, reviews: Path | None, essays: Path | None) -> None:
    """Two sets from elsewhere: truthful or deceptive hotel reviews, essays by humans or generated.

    \b
    Example:
      softprompt build-dod ood --reviews op_spam_v1.4 --essays essays.csv --out ood.sqlite
    """
    from softprompt_registry.dod.labelled_sets import OodConfig, build_dod_ood

    settings = given.settings(OodConfig, "ood")
    require_store()
    given.build(
        "build-dod-ood", settings, partial(build_dod_ood, given.out, reviews=reviews, essays=essays), _show_sets
    )


def _show_sets(report: LabelledSetsReport) -> None:
    print_table("Labelled sets", report.table())
    _say_built(report.path, len(report.sets), sum(c.train + c.validation + c.test for c in report.sets), report.digest)


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
    """Look for faults that bias results: duplicates, leaks, imbalance, held-out labels, lengths.

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
@with_given
def paraphrase_dod_command(
    given: Given,
    dod: Path,
    factor: int | None,
    engine: str | None,
    model: str | None,
    base_url: str | None,
    base_model: str | None,
) -> None:
    """Add shorter wordings of the training tasks' hard prompts, written by an LLM. A run that was stopped resumes.

    \b
    Example:
      softprompt paraphrase-dod general.sqlite --out general-x10.sqlite --model gpt-4o-mini
    """
    from softprompt_registry.dod.paraphrase import ParaphraseConfig, paraphrase_dod
    from softprompt_registry.dod.store import DodStore, require_free

    def edit(values: dict[str, Any]) -> dict[str, Any]:
        values = _with_generator(values, engine, model, base_url)
        return values if factor is None else {**values, "factor": factor}

    settings = given.settings(ParaphraseConfig, "paraphrase", edit)
    require_store()
    require_free(given.out, f"paraphrasing DoD {str(dod)!r}", overwrite=given.overwrite)  # before a model is loaded
    with DodStore.open(dod):
        pass
    tokenizer = _tokenizer(base_model)
    from softprompt_registry.language_models.opening import open_language_model

    def count_tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    with open_language_model(settings.generator) as writer:
        given.build(
            "paraphrase-dod", settings, partial(paraphrase_dod, dod, given.out, writer, count_tokens), _show_paraphrases
        )


def _show_paraphrases(report: ParaphraseReport) -> None:
    click.echo(
        f"{report.path}: {report.made} of {report.wanted} paraphrases for {report.tasks} tasks, "
        f"{100 * report.failed_share:.1f} % failed, digest {report.digest[:12]}"
    )
    _say_refused_and_asked(report.refused, report.asked)


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


def _say_refused_and_asked(refused: Mapping[str, int], asked: Asked) -> None:
    if refused:
        print_table("Refused", {"reason": list(refused), "count": [str(count) for count in refused.values()]})
    click.echo(
        f"asked {asked.requests} requests in {asked.seconds:.0f} s: {asked.prompt_tokens} prompt tokens, "
        f"{asked.completion_tokens} completion tokens; what was answered before was not asked again"
    )
    if asked.adapted:
        click.echo(f"the model refuses what was set, so answers were asked for with {asked.adapted}")
