"""An HTML page as the tests look at it: parsed, checked for what every page owes its readers, and shown by a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

VOID = {"meta", "input", "br", "link", "img", "hr", "wbr"}
"""Tags of HTML that have no end."""

HOSTILE = '<script>alert(\'&"\')</script></style><b onload="x">\' " & &lt; ]]> --> {{ 1 }} $x$ $ _y'
UNPRINTABLE = "\x00\x1b[0m \u202e \ud800"
"""Texts that break a page in which anything is not escaped, and that no page can show."""

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")


class Page(HTMLParser):
    """What a browser would see; fails where a tag is not closed in its place."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.html, self.text = text, ""
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        """By tag, what stands directly in each."""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len(dict(attrs)), f"an attribute of <{tag}> stands twice"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open:
            self.texts[self._open[-1]][-1] += data

    def count(self, tag: str) -> int:
        return sum(found == tag for found, _ in self.tags)

    def article(self, number: int) -> Page:
        """One task of the page, from 1."""
        return Page(articles_of(self.html)[number - 1])


def flat(text: str) -> str:
    return " ".join(text.split())


def rows_of(html: str) -> list[list[str]]:
    """The words of each cell, by row."""
    return [
        [flat(Page(cell).text) for cell in re.findall(r"<t[hd]\b.*?</t[hd]>", row, flags=re.DOTALL)]
        for row in re.findall(r"<tr>.*?</tr>", html, flags=re.DOTALL)
    ]


def articles_of(html: str) -> list[str]:
    return re.findall(r"<article.*?</article>", html, flags=re.DOTALL)


def check_stands_alone(page: Page) -> None:
    """It needs nothing beside it, its links lead somewhere, and tables and figures say what they are."""
    attributes = [(name, value or "") for _, found in page.tags for name, value in found.items()]
    links = [value for name, value in attributes if name in ("src", "href", "xlink:href", "data", "action")]
    assert all(value.startswith("#") for value in links)
    assert not re.search(r"url\((?!#)|@import", page.html)
    ids = [value for name, value in attributes if name == "id"]
    assert len(set(ids)) == len(ids)
    labelled = [value for name, value in attributes if name == "aria-labelledby"]
    used = re.findall(r"url\(#([^)]*)\)", page.html)
    assert {value.removeprefix("#") for value in [*links, *labelled, *used]} <= set(ids)
    assert all(found.get("scope") in ("col", "row") for tag, found in page.tags if tag == "th")
    drawn = [found for tag, found in page.tags if tag == "svg"]
    assert len(drawn) == page.count("figure") > 0
    assert all(found["role"] == "img" and len(str(found["aria-label"])) > 20 for found in drawn)
    assert page.count("h1") == page.count("main") == 1
    assert ("html", {"lang": "en"}) in page.tags
    assert "viewport" in [found.get("name") for tag, found in page.tags if tag == "meta"]


def contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio of two colours "#rrggbb"."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    """WCAG's relative luminance of "#rrggbb"."""
    channels = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def browsed(folder: Path, html: str, anchor: str = "") -> tuple[str, list[str]]:
    """The page as the browser has it once its script has run, and what the browser had to say on its console."""
    (folder / "page.html").write_text(html, encoding="utf-8")
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
    ]
    command += ["--disable-background-networking", "--disable-component-update"]
    command += [f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=2000"]
    command += ["--dump-dom", (folder / "page.html").as_uri() + anchor]
    finished = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return finished.stdout, [line for line in finished.stderr.splitlines() if ":CONSOLE" in line]
