"""A figure inside a page: SVG with the page's letters and colours, which follow light and dark mode."""

from __future__ import annotations

import html
import io
import re
import warnings
from dataclasses import dataclass

import matplotlib
from matplotlib.figure import Figure

from softprompt_registry.figures import PALETTE
from softprompt_registry.pages.formatting import shown_text

LIMIT = "#b3261e"
"""Colour of a limit that values should keep to."""
_COLOURS = {colour: f"var(--series-{place})" for place, colour in enumerate(PALETTE)} | {
    LIMIT: "var(--error)",
    "#000000": "currentColor",
}
"""Colour of a figure → its name in the pages' style sheet."""


@dataclass(frozen=True)
class PageFigure:
    """A figure and the words that go with it."""

    name: str
    """Letters, digits and "_", for ids and file names."""
    title: str
    figure: Figure
    alt: str
    """What it shows, for those who do not see it."""
    caption: str
    """How to read it."""
    is_wide: bool = False
    """Whether it takes the whole width of the page."""


def inline_svg(drawn: PageFigure) -> str:
    """The figure as SVG without its title, which stands in the page; the same figure gives the same SVG."""
    drawn.figure.axes[0].set_title("")
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": drawn.name}):
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the reader's browser has its own fonts
        drawn.figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = re.sub(r"<style.*?</style>", "", file.getvalue(), flags=re.DOTALL)  # it would hold for the whole page

    def for_page(tag: re.Match[str]) -> str:
        # Ids are unique within a figure only, and a page has several.
        text = re.sub(r'( id="|url\(#|href="#)', rf"\1{drawn.name}-", tag.group())
        for colour, in_page in _COLOURS.items():
            text = text.replace(colour, in_page)
        return re.sub(r"(\d\.\d\d)\d+", r"\1", text)

    # Inside tags only: what stands between them are names from outside.
    svg = re.sub(r"<[^>]*>", for_page, svg[svg.index("<svg") :])
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(shown_text(drawn.alt))}" ', 1)
