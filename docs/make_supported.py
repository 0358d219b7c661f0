"""Writes docs/supported.md from the tests that are marked with `supports`; with --check, only says whether it is up to date.

python docs/make_supported.py
python docs/make_supported.py --check
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from written_page import write_or_check

TESTS = Path(__file__).parent.parent / "tests"
KINDS = ("tokenizers", "base models", "adapters", "target LLMs", "files", "MLflow stores", "terminals")
HEAD = """\
# What is supported

Written by `python docs/make_supported.py` from the tests that are marked with `supports`. Do not edit. Each line
names the test that shows it, on tokenizers, models and servers that are made for the test; what has no line here has not been
tried.
"""


def marks(file: Path) -> Iterator[tuple[str, str, str, str]]:
    """(kind, what, how, test) of each `@pytest.mark.supports(kind, what, how)` in a file, in order.

    Raises:
        ValueError: a mark has other arguments, or a kind that is not one of `KINDS`.
    """
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        for mark in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
            if not (isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.supports"):
                continue
            values = [ast.literal_eval(argument) for argument in mark.args]
            if len(values) != 3 or values[0] not in KINDS:
                raise ValueError(f"{file.name}: {ast.unparse(mark)}: expected a kind of {KINDS}, what, and how")
            kind, what, how = values
            yield kind, what, how, f"{file.name}::{node.name}"


def page() -> str:
    """The whole text of docs/supported.md."""
    found = [mark for file in sorted(TESTS.glob("test_*.py")) for mark in marks(file)]
    parts = [HEAD]
    for kind in KINDS:
        rows = [f"| {what} | {how} | `{test}` |" for of, what, how, test in found if of == kind]
        if rows:
            title = kind[0].upper() + kind[1:]
            parts.append(f"## {title}\n\n| what | how | test |\n|---|---|---|\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(write_or_check(__file__, __doc__, page()))
