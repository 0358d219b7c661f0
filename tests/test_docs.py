"""The documentation keeps its promises: generated pages are current, links lead somewhere, what is named exists."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import click
import pytest
import yaml

from softprompt_registry.cli import main

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
FOLDERS = ("softprompt_registry/", "mlflow_plugins/", "docs/", "configs/", "tests/", "benchmarks/", "examples/", ".ci/")
"""A path in code marks that starts with one of these is meant to be in the repository."""

MODULES = {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}

each_page = pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])


def make_cli(*arguments: str, script: Path = ROOT / "docs" / "make_cli.py") -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.parametrize("script", ["make_cli.py", "make_supported.py"])
def test_a_written_page_is_current(script: str) -> None:
    finished = make_cli("--check", script=ROOT / "docs" / script)
    assert (finished.returncode, finished.stderr) == (0, "")


def test_that_check_can_fail(tmp_path: Path) -> None:
    script = tmp_path / "docs" / "make_cli.py"
    script.parent.mkdir()
    for name in (script.name, "written_page.py"):
        script.with_name(name).write_text((ROOT / "docs" / name).read_text())
    (tmp_path / "softprompt_registry").symlink_to(ROOT / "softprompt_registry")
    assert make_cli(script=script).returncode == 0
    page = script.with_name("cli.md")
    assert page.read_text() == (ROOT / "docs" / "cli.md").read_text()
    page.write_text(page.read_text().replace("--overwrite", "--override"))
    finished = make_cli("--check", script=script)
    assert finished.returncode == 1 and "Run `python docs/make_cli.py`" in finished.stderr


# --- Links ---


def without_fences(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of headings."""
    headings = re.findall(r"^#+ (.+)$", without_fences(page.read_text()), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path, text: str) -> list[str]:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_fences(text)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@each_page
def test_relative_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page, page.read_text()) == []


def test_a_broken_link_is_found() -> None:
    text = "[a](serving.md) [b](serving.md#settings) [c](nowhere.md) [d](serving.md#nowhere) [e](https://example.org/x)"
    assert broken_links(ROOT / "docs" / "registry.md", text) == ["nowhere.md", "serving.md#nowhere"]


# --- What is named ---


def marked_as_code(text: str) -> Iterator[str]:
    """Lines of code blocks, continued lines joined, and the insides of backticks."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    rest = without_fences(text)
    blocks += re.findall(r"^ {4}.*$", rest, flags=re.MULTILINE)
    blocks = ["\n".join(blocks)]
    for block in blocks:
        yield from (line.strip() for line in re.sub(r"\\\n\s*", " ", block).splitlines())
    yield from (re.sub(r"\s+", " ", code) for code in re.findall(r"`([^`\n]+(?:\n[^`\n]+)?)`", rest))


def unknown_names(text: str) -> list[str]:
    """Commands, options, make targets, entry points and files of ours that are named and do not exist."""
    found = []
    for code in marked_as_code(text):
        found += unknown_commands(code)
        found += unknown_paths(code)
    return found


def unknown_paths(code: str) -> list[str]:
    words = [word.rstrip(".") for word in re.findall(r"(?<![\w/.])[\w.][\w./*-]*", code)]
    ours = [word for word in words if word.startswith(FOLDERS) and not any(ROOT.glob(word))]
    return ours + [word for word in words if re.fullmatch(r"[\w-]+\.py", word) and word not in MODULES]


def unknown_commands(code: str) -> list[str]:
    targets = re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    if (match := re.match(r"make ([a-z-]+)", code)) and match[1] not in targets:
        return [f"make {match[1]}"]
    if match := re.match(r"mlflow run \. .*-e ([\w-]+)", code):
        entry_points = yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"]
        return [] if match[1] in entry_points else [f"-e {match[1]}"]
    match = re.match(r"(?:\$ )?(?:\S*/)?softprompt( .*)", code)
    return unknown_options(match[1]) if match else []


def unknown_options(arguments: str) -> list[str]:
    lexer = shlex.shlex(arguments, posix=True, punctuation_chars=False)
    lexer.whitespace_split = True  # comments after # are left out
    command: click.Command = main
    words = list(lexer)
    while words and isinstance(command, click.Group) and not words[0].startswith("-"):
        name = words.pop(0)
        if not re.fullmatch(r"[a-z-]+", name):
            break
        if name not in command.commands:
            return [f"softprompt {name}"]
        command = command.commands[name]
    known = {"--help", "-h"} | {option for parameter in command.params for option in parameter.opts}
    return [
        f"softprompt {command.name} {word}" for word in words if re.fullmatch(r"--?[a-z-]+", word) and word not in known
    ]


@each_page
def test_what_is_named_exists(page: Path) -> None:
    assert unknown_names(page.read_text()) == []


def test_a_wrong_name_is_found() -> None:
    text = """Run `softprompt tune --dod x`, `softprompt rollback` or `make all`.
See `docs/none.md`, `docs/*.md`, `nothing.py` and `config.py`.

```bash
softprompt list --json
softprompt tune --dod x \\
    --fast   # --slow
mlflow run . -e fly
```

    softprompt build-dod tables x
"""
    assert unknown_names(text) == [
        "softprompt tune --fast", "-e fly", "softprompt tables", "softprompt rollback", "make all", "docs/none.md",
        "nothing.py",
    ]  # fmt: skip


def rows_of_table(page: str) -> dict[str, str]:
    """Name in code marks → the rest of its table row."""
    text = (ROOT / "docs" / page).read_text()
    return dict(re.findall(r"^\| `([a-z_]+)` \| (.+)$", text, flags=re.MULTILINE))


def test_serving_settings_and_params_are_all_described_with_their_defaults() -> None:
    from mlflow_plugins.serving_requests import RequestParams, ServingConfig

    rows = rows_of_table("serving.md")
    for config in (ServingConfig(), RequestParams()):
        for field in fields(config):
            value = getattr(config, field.name)
            written = {"None": "null", "True": "true", "False": "false", "": '""'}.get(str(value), str(value))
            written = written.replace("\n", "\\n")
            cells = [cell.strip().strip("`") for cell in rows[field.name].split(" | ")]
            assert written in cells[:2], field.name
