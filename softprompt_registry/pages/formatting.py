"""Numbers, counts and texts as pages show them."""

from __future__ import annotations

import unicodedata

_DIRECTIONS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def number(value: float | None) -> str:
    """Two decimals, with a real minus sign; a dash for what is not known."""
    return "–" if value is None else signed(value).removeprefix("+")


def signed(value: float) -> str:
    """Two decimals with a sign; zero has none."""
    text = f"{value:+.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text.replace("-", "\N{MINUS SIGN}")


def integer(value: float) -> str:
    """No decimals, with a comma between thousands."""
    return f"{value:,.0f}"


def percent(share: float) -> str:
    """Three significant digits: "12.5 %"."""
    return f"{100 * share:.3g} %"


def plural(count: int, unit: str) -> str:
    """ "1 task", "5,500 tasks"."""
    return f"{count:,} {unit}{'' if count == 1 else 's'}"


def shown_text(text: str) -> str:
    """The text with a replacement character for each control character, lone surrogate and change of direction."""
    hidden = ("Cc", "Cs")
    return "".join(
        "\N{REPLACEMENT CHARACTER}"
        if letter in _DIRECTIONS or (unicodedata.category(letter) in hidden and letter not in "\n\t")
        else letter
        for letter in text
    )
