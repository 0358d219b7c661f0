"""What every HTML page satisfies, with usual and with hostile texts: the audit, the report and the portability page."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest
import test_audit
import test_portability_page
import test_report_page
from html_page import HOSTILE, UNPRINTABLE, Page, browsed, check_stands_alone, contrast, in_browser

from softprompt_registry import figures
from softprompt_registry.dod.audit_page import write_audit_page
from softprompt_registry.dod.task import Pair, Task
from softprompt_registry.evaluation.report_page import report_page
from softprompt_registry.pages.formatting import integer, number, percent, plural, shown_text, signed
from softprompt_registry.pages.svg import LIMIT, PageFigure, inline_svg


class Made(NamedTuple):
    plain: str
    again: str
    """From the same data."""
    hostile: str


def audit_pages(folder: Path) -> Made:
    def page(name: str, *tasks: Task) -> str:
        (folder / name).mkdir()
        write_audit_page(test_audit.audit_of(folder / name, *tasks), folder / "page.html")
        return (folder / "page.html").read_text()

    unprintable = [Pair(UNPRINTABLE[:-1], output) for output in ("y", HOSTILE)]  # a DoD takes no lone surrogate
    pairs = (*test_audit.pairs_about(HOSTILE, (HOSTILE, "y")), *unprintable)
    task = Task(HOSTILE, "classification", pairs, labels=(HOSTILE, "y"))
    copy = dataclasses.replace(task, name=f"copy {HOSTILE}", split="test")
    messy = test_audit.messy_tasks()
    return Made(page("plain", *messy), page("again", *messy), page("hostile", task, copy))


def report_pages(folder: Path) -> Made:
    plain = test_report_page.full_data()
    return Made(report_page(plain), report_page(plain), report_page(test_report_page.hostile_data()))


def portability_pages(folder: Path) -> Made:
    page_of = test_portability_page.page_of
    return Made(page_of(), page_of(), test_portability_page.hostile_page())


@pytest.fixture(scope="module", params=[audit_pages, report_pages, portability_pages], ids=lambda make: make.__name__)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    make: Callable[[Path], Made] = request.param
    return make(tmp_path_factory.mktemp("pages"))


def test_a_page_stands_alone_and_is_accessible(made: Made) -> None:
    for html in (made.plain, made.hostile):
        check_stands_alone(Page(html))
    assert made.again == made.plain


def test_no_text_becomes_markup(made: Made) -> None:
    page, plain = Page(made.hostile), Page(made.plain)
    assert [page.count(tag) for tag in ("script", "style")] == [plain.count("script"), 1]
    assert not [found for tag, found in page.tags if tag == "b" and not found.keys() <= {"class"}]
    assert not [found for _, found in page.tags if any(name.startswith("on") for name in found)]
    assert page.text.count(HOSTILE) >= 10
    assert "\N{REPLACEMENT CHARACTER}" in page.text
    assert not [letter for letter in "\x00\x1b\u202e\ud800" if letter in made.hostile]
    made.hostile.encode()  # lone surrogates would not go into a file


def test_letters_and_lines_stand_out_in_light_and_dark(made: Made) -> None:
    (style,) = Page(made.plain).texts["style"]
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#\w{6})", part))
        for part in style.split("@media (prefers-color-scheme: dark)")[:2]
    )
    assert light.keys() == dark.keys() and light["error"] == LIMIT
    assert [light[f"series-{place}"] for place in range(len(figures.PALETTE))] == list(figures.PALETTE)
    fronts = {
        "text": ("page", "card", "hit", "fine-on", "warning-on", "note-on", "error-on"),
        "soft": ("page", "card", "hit", "fine-on", "warning-on", "error-on"),
        "fine": ("fine-on",),
        "warning": ("warning-on",),
        "note": ("note-on", "card"),
        "error": ("error-on", "card"),
    }
    for colours in (light, dark):
        for front, backs in fronts.items():
            for back in backs:
                assert contrast(colours[front], colours[back]) >= 4.5, (front, back)
        for place in range(len(figures.PALETTE)):
            assert contrast(colours[f"series-{place}"], colours["card"]) >= 3


@in_browser
def test_a_browser_shows_the_page_without_complaint(made: Made, tmp_path: Path) -> None:
    for html in (made.plain, made.hostile):
        shown, console = browsed(tmp_path, html)
        assert console == [] and "How to read this" in shown


@in_browser
def test_a_browser_runs_no_script_but_the_pages_own(made: Made, tmp_path: Path) -> None:
    html = made.plain.replace("</body>", "<script>document.title = 'taken over'</script></body>")
    shown, console = browsed(tmp_path, html)
    assert re.findall("<title>.*?</title>", shown) == re.findall("<title>.*?</title>", made.plain)
    assert len(console) == 1 and "Content Security Policy" in console[0]


def test_a_figure_in_a_page_has_the_pages_letters_and_colours() -> None:
    drawn = figures.scatter("title", {"#000000": [(0, 0)], "one": [(1, 1)]}, x="x", y="y")
    svg = inline_svg(PageFigure("points", "title", drawn, 'an "alt" <text>', "caption"))
    root = ElementTree.fromstring(svg)
    assert (root.attrib["role"], root.attrib["aria-label"]) == ("img", 'an "alt" <text>')
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"#000000", "one", "x", "y"} <= set(texts) and "title" not in texts
    assert "var(--series-0)" in svg and "currentColor" in svg and "<style" not in svg
    assert figures.PALETTE[0] not in svg and svg.count("#000000") == 1, "a name is no colour"
    assert all(found.startswith("points-") for found in re.findall(r'(?: id="|url\(#|href="#)([^")]*)', svg))


def test_numbers_and_texts() -> None:
    values = (0.126, -0.126, 0.0, -0.001, 12)
    assert [signed(value) for value in values] == ["+0.13", "−0.13", "0.00", "0.00", "+12.00"]
    assert [number(value) for value in (*values, None)] == ["0.13", "−0.13", "0.00", "0.00", "12.00", "–"]
    assert (integer(1234.4), percent(0.125), plural(1, "task"), plural(5500, "task")) == (
        "1,234",
        "12.5 %",
        "1 task",
        "5,500 tasks",
    )
    assert shown_text("a\n\tb\x00\u202ec\ud800\r") == "a\n\tb" + "\N{REPLACEMENT CHARACTER}" * 2 + "c" + "\ufffd" * 2
