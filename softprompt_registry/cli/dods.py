"""Commands that make and check datasets of datasets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from softprompt_registry.cli.options import (
    main,
    section_of,
    with_json,
    with_settings,
)
from softprompt_registry.printing import print_json

if TYPE_CHECKING:
    pass


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

    settings = build_config(FilesConfig, section_of("files", config, overrides))
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
