"""Writes docs/cli.md from the help texts of `softprompt` and the settings classes; with --check, only says whether it is
up to date.

    python docs/make_cli.py
    python docs/make_cli.py --check
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import click
from written_page import write_or_check

from softprompt_registry.cli import main as softprompt

ROOT = Path(__file__).parent.parent
WIDTH = 110
"""Wider than a terminal's 80 columns, so that examples stay on one line and can be pasted."""

HEAD = """\
# Command line

Written by `python docs/make_cli.py` from the `--help` of every command and from the settings classes. Do not edit.

Results go to stdout (as JSON with `--json`), progress and messages to stderr. The exit code is 0 when all went well, 1 when
the command failed or refused, 2 when it was called wrongly. The settings that `--config` and `-s` take stand at the end.
"""

SETTINGS_HEAD = """\
## Settings

`--config` names a YAML file, and `-s KEY=VALUE` overrides one key of it; an unknown key is an error that lists the known
ones. A file may hold several sections, of which a command reads its own; a file for one command may leave the heading out. A
command takes the bare key (`softprompt tune -s epochs=2`), while `demo` takes the section too
(`softprompt demo -s tuning.epochs=2`). "Paper" says what the published method used.

Values are read by the core schema of YAML 1.2: `true` and `false` are the only booleans, so `yes`, `no`, `on` and `off` are
text, as are dates, `12:30` and `1_000`; `1e-4` is a number; `null` is None. Keys stay as they are written, and a key that
stands twice is an error. With `-s`, a value that begins with a quote, `[` or `{` is YAML; any other is a number, `true`,
`false`, `null` or text, and neither a colon nor a `#` ends that text.

Types: `PositiveInt` and `PositiveFloat` are numbers above 0, `NonNegativeInt` and `NonNegativeFloat` from 0 up; `Share` is a
number from 0 to 1, `PositiveShare` above 0, `InnerShare` also below 1, and `PairShares` three shares that add up to 1; `Name`
is text that is not empty; `Distinct[…]` is a list of one or more values, each once.
"""

SETTINGS = [
    ("build-dod files", "section `files`", "softprompt_registry/dod/files.py", "FilesConfig"),
    (
        "build-dod classification",
        "section `classification`",
        "softprompt_registry/dod/classification.py",
        "ClassificationConfig",
    ),
    ("build-dod general", "section `general`", "softprompt_registry/dod/general.py", "GeneralConfig"),
    ("build-dod inspect", "section `inspect`", "softprompt_registry/dod/labelled_sets.py", "InspectConfig"),
    ("build-dod ood", "section `ood`", "softprompt_registry/dod/labelled_sets.py", "OodConfig"),
    ("audit-dod", "section `audit`", "softprompt_registry/dod/audit.py", "AuditConfig"),
    ("paraphrase-dod", "section `paraphrase`", "softprompt_registry/dod/paraphrase.py", "ParaphraseConfig"),
    (
        "the LLM that writes",
        "section `generator` inside `classification` and `paraphrase`",
        "softprompt_registry/language_models/opening.py",
        "LanguageModelConfig",
    ),
    (
        "engine openai",
        "section `options` inside `generator`",
        "softprompt_registry/language_models/openai_settings.py",
        "OpenAICompatibleConfig",
    ),
    (
        "prices",
        "beside `model` in `targets`, and inside `options` of engine `openai`",
        "softprompt_registry/language_models/protocol.py",
        "PriceConfig",
    ),
    (
        "engine vllm",
        "section `options` inside `generator`",
        "softprompt_registry/language_models/on_vllm.py",
        "VllmConfig",
    ),
    (
        "engine transformers",
        "section `options` inside `generator`",
        "softprompt_registry/language_models/on_transformers.py",
        "TransformersConfig",
    ),
    ("tune", "section `tuning`", "softprompt_registry/soft_prompts/tuning_settings.py", "TuningConfig"),
    ("train-translator", "section `translator`", "softprompt_registry/translators/training.py", "TranslatorConfig"),
    (
        "verbalize",
        "section `verbalization` inside `evaluation`",
        "softprompt_registry/verbalization/verbalizer.py",
        "VerbalizationConfig",
    ),
    ("inspect-grid", "section `layer_grid`", "softprompt_registry/evaluation/layer_grid.py", "LayerGridConfig"),
    ("evaluate", "section `evaluation`", "softprompt_registry/evaluation/evaluating.py", "EvaluationConfig"),
    (
        "the verifier",
        "section `verifier` inside `evaluation`",
        "softprompt_registry/verbalization/verifier.py",
        "VerifierConfig",
    ),
    (
        "the abstention rule",
        "section `abstention` inside `evaluation`",
        "softprompt_registry/evaluation/evaluating.py",
        "AbstentionConfig",
    ),
    (
        "instruction induction",
        "section `induction` inside `evaluation`",
        "softprompt_registry/verbalization/proposers/instruction_induction.py",
        "InductionConfig",
    ),
    ("study", "section `study`", "softprompt_registry/stages/study_settings.py", "StudyConfig"),
    ("portability", "section `portability`", "softprompt_registry/portability/measuring.py", "PortabilityConfig"),
    (
        "a target LLM",
        "in the list `targets` inside `portability`; `engine`, `model` and `options` as of the LLM that writes",
        "softprompt_registry/portability/targets.py",
        "TargetConfig",
    ),
    (
        "templates of prompts",
        "section `templates` inside `portability`",
        "softprompt_registry/portability/templates.py",
        "PromptTemplates",
    ),
    (
        "questions",
        "section `questions` inside `portability`",
        "softprompt_registry/portability/questions.py",
        "QuestionsConfig",
    ),
    ("budget", "section `budget` inside `portability`", "softprompt_registry/portability/budget.py", "Budget"),
    (
        "promote --policy",
        "the whole file; section `policy` of the demo's",
        "softprompt_registry/registry/promotion.py",
        "Policy",
    ),
    ("demo", "the whole file", "softprompt_registry/pipeline.py", "PipelineConfig"),
]
"""Command, place in its YAML file, source file and class."""


def commands(command: click.Command, context: click.Context) -> Iterator[tuple[str, str]]:
    """(full name, help text) of a command and of all below it, in the order of the help."""
    yield context.command_path, command.get_help(context)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            yield from commands(below, _context(below, name, context))


def _context(command: click.Command, name: str, parent: click.Context | None) -> click.Context:
    return click.Context(
        command, parent=parent, info_name=name, terminal_width=WIDTH, help_option_names=["-h", "--help"]
    )


def settings(file: str, class_name: str) -> Iterator[tuple[str, str, str, str]]:
    """(field, type, default, meaning) of a settings class; the meaning is the string under the field.

    Read from the source: a string under a field is not kept when the module is imported, and importing would load MLflow.
    """
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
    for node, after in zip(body, [*body[1:], ast.Pass()], strict=True):
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            meaning = ""
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                meaning = " ".join(str(after.value.value).split())
            yield ast.unparse(node.target), ast.unparse(node.annotation), _default(node.value), meaning


def _default(value: ast.expr) -> str:
    """As it is written in YAML: a list for a tuple, null for None. A section's default is that of its own keys."""
    if isinstance(value, ast.Call):
        return "{}" if ast.unparse(value).endswith("=dict)") else "see its section"
    text = ast.unparse(ast.List(list(value.elts)) if isinstance(value, ast.Tuple) else value)
    return {"None": "null", "True": "true", "False": "false", "''": '""'}.get(text, text)


def page() -> str:
    """The whole text of docs/cli.md."""
    parts = [HEAD]
    for name, text in commands(softprompt, _context(softprompt, "softprompt", None)):
        parts.append(f"## {name}\n\n```text\n{text.rstrip()}\n```\n")
    parts.append(SETTINGS_HEAD)
    for command, place, file, class_name in SETTINGS:
        rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
        for key, kind, default, meaning in settings(file, class_name):
            cells = (f"`{key}`", f"`{kind}`", f"`{default}`", meaning)
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append(f"### {command}\n\n`{class_name}` in `{file}`: {place}.\n\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(write_or_check(__file__, __doc__, page()))
