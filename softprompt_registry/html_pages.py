"""What HTML pages have in common: templates that believe no text, and pictures that follow the page's colours."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from softprompt_registry.figures import PALETTE, inline_svg

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup
    from matplotlib.figure import Figure

COLOURS = {colour: f"var(--series-{place})" for place, colour in enumerate(PALETTE)} | {"#000000": "currentColor"}
"""Colour of a picture → what a page's style sheet calls it."""

_DIRECTIONS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


class Picture(Protocol):
    """A figure with its words."""

    @property
    def name(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def figure(self) -> Figure: ...
    @property
    def alt(self) -> str: ...
    @property
    def caption(self) -> str: ...


def page_environment(templates: Path) -> Environment:
    """Renders the templates of a folder. Every text is escaped, and a name that is not there is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(templates),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def inline_pictures(pictures: Iterable[Picture]) -> list[tuple[str, Markup, str]]:
    """Title, drawing and caption of each, ready for a template."""
    from markupsafe import Markup

    return [
        (
            picture.title,
            Markup(inline_svg(picture.figure, picture.name, shown_text(picture.alt), COLOURS)),
            picture.caption,
        )
        for picture in pictures
    ]


def shown_text(text: str) -> str:
    """The text with a mark in place of what no page can show: control characters, half characters, changes of direction."""
    hidden = ("Cc", "Cs")
    return "".join(
        "\N{REPLACEMENT CHARACTER}"
        if letter in _DIRECTIONS or (unicodedata.category(letter) in hidden and letter not in "\n\t")
        else letter
        for letter in text
    )
