"""The base of every HTML page: one file that needs nothing beside it, in which every text is escaped."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from softprompt_registry.figures import PALETTE
from softprompt_registry.pages import formatting
from softprompt_registry.pages.svg import PageFigure, inline_svg

Tone = Literal["fine", "note", "warning", "error"]


class Verdict(NamedTuple):
    """A box at the top of a page: a result, and what speaks for and against it."""

    headline: str
    points: tuple[tuple[Tone, str], ...]
    tone: Tone | None = None
    """Colour of the box; without one it looks like any other."""


def render_page(
    template: Path,
    *,
    title: str,
    subtitle: str,
    verdicts: Sequence[Verdict],
    figures: Sequence[PageFigure],
    settings: Mapping[str, Any],
    script: str = "",
    **content: Any,
) -> str:
    """A page from a template that extends `base.html.j2`. A name that the template uses and nobody gives is an error.

    Figures, style and script stand inside the page. It fetches nothing and runs no script but its own.

    Args:
        template: file with the blocks of the page: `style`, `main`, `reading`.
        settings: shown at the end of the page.
        script: JavaScript for what the page can do without only with less comfort.
        content: what the template uses beside the above, functions too.
    """
    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = formatting.shown_text
    for form in (formatting.number, formatting.signed, formatting.integer, formatting.percent):
        environment.filters[form.__name__] = form
    environment.globals["plural"] = formatting.plural
    return environment.get_template(template.name).render(
        title=title,
        subtitle=subtitle,
        verdicts=verdicts,
        figures=[(drawn, Markup(inline_svg(drawn))) for drawn in figures],
        settings=settings,
        palette=PALETTE,
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **content,
    )
