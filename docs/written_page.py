"""What the scripts that write a page of docs/ have in common."""

from __future__ import annotations

import sys
from pathlib import Path


def write_or_check(script: str, usage: str | None, text: str) -> int:
    """Write docs/NAME.md for docs/make_NAME.py, or with --check say whether it is up to date; returns the exit code."""
    page = Path(script).with_name(Path(script).stem.removeprefix("make_") + ".md")
    if sys.argv[1:] not in ([], ["--check"]):
        print(usage, file=sys.stderr)
        return 2
    if not sys.argv[1:]:
        page.write_text(text, encoding="utf-8")
        return 0
    if not page.is_file() or page.read_text(encoding="utf-8") != text:
        print(f"docs/{page.name} is not up to date. Run `python docs/{Path(script).name}`.", file=sys.stderr)
        return 1
    return 0
