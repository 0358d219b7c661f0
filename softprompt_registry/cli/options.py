"""The command group, and the options that commands share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from softprompt_registry import __version__
from softprompt_registry.errors import SoftPromptError
from softprompt_registry.printing import accept_all_characters

if TYPE_CHECKING:
    from softprompt_registry.base_models.frozen import BaseModel
    from softprompt_registry.base_models.loading import DType
    from softprompt_registry.base_models.reference import BaseModelRef

CommandT = TypeVar("CommandT", bound=Callable[..., Any])

ORDER = (
    "build-dod",
    "audit-dod",
    "paraphrase-dod",
    "tune",
    "train-translator",
    "verbalize",
    "inspect-grid",
    "evaluate",
    "reproduce",
    "study",
    "portability",
    "publish",
    "register",
    "promote",
    "list",
    "lineage",
    "import-peft",
    "export-peft",
    "demo",
)


class StageGroup(click.Group):
    """Lists commands in the order of the data, and turns our errors into one clean message and exit code 1."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self.commands, key=ORDER.index)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        accept_all_characters()  # before help and messages about misuse as well
        return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SoftPromptError as error:
            raise click.ClickException(str(error)) from error
        except (PermissionError, FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise click.ClickException(
                f"{error.strerror}: {error.filename!r}. Check the path and whether it may be read and written."
            ) from error
        except Exception as error:
            # Only a command that has loaded MLflow can have met its failure.
            if "softprompt_registry.registry.store" not in sys.modules:
                raise
            from softprompt_registry.registry.store import STORE_FAILURES, failed_during_work

            if not isinstance(error, STORE_FAILURES):
                raise
            raise click.ClickException(str(failed_during_work(error))) from error


@click.group(cls=StageGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="softprompt")
def main() -> None:
    """Tune soft prompts, translate them into plain language, register and serve them with MLflow.

    Runs and models are stored at MLFLOW_TRACKING_URI; MLflow's default is ./mlflow.db. Keys of target
    LLMs come from the environment only.
    """
    # MLflow prints links to runs on stdout, where `--json` promises JSON alone.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")


with_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
"""--json: machine output on stdout."""

dod_option = click.option("--dod", required=True, type=click.Path(path_type=Path), help="DoD file (.sqlite).")


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
        help="Type of the weights. Default: that of the bank or translator that is read, else float32.",
    )(command)
    return click.option(
        "--base-model",
        help="Base model: packaged:NAME, a folder, or a Hub name with @revision. Default: $SOFTPROMPT_BASE_MODEL, else that "
        "of the bank or translator that is read, else packaged:smollm2-135m-instruct.",
    )(command)


def require_store(*, for_run: bool = True) -> None:
    """Check that MLflow's store can be used, once the settings are read and before anything that takes time."""
    from softprompt_registry.registry.store import require_store as check

    check(for_run=for_run)


def section_of(section: str, config: Path | None, overrides: Sequence[str]) -> dict[str, Any]:
    """One section of the settings file with the overrides on top; a file of one section needs no heading.

    Args:
        section: its name, with those of the sections around it in front: `evaluation.verbalization`.
    """
    from softprompt_registry.config import apply_overrides, read_yaml

    values = read_yaml(config) if config else {}
    for name in section.split("."):
        if isinstance(values.get(name), dict):
            values = values[name]
    return apply_overrides(values, overrides)


def open_base_model(base_model: str | None, dtype: DType | None, *, read_by: BaseModelRef | None = None) -> BaseModel:
    """The base model asked for; without one, that of the artifact that will be used with it."""
    from softprompt_registry.base_models.loading import default_reference, load_base_model, load_base_model_for

    if read_by is not None:
        return load_base_model_for(read_by, override=base_model, dtype=dtype)
    return load_base_model(base_model or default_reference(), dtype=dtype or "float32")
