"""Reading the prompts that write DoDs: our own, or a user's changed copies of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from softprompt_registry.errors import ConfigError

OWN_FOLDER = Path(__file__).with_name("prompts")
_DIVIDER = "\n---\n"


@dataclass(frozen=True)
class PromptFile:
    """One prompt with places to fill in."""

    name: str
    system: str | None
    user: str

    def fill(self, values: Mapping[str, object]) -> str:
        """The request's text; words in braces that are not among `values` stay as they are."""
        pattern = "|".join(map(re.escape, values))
        # In one pass: braces in what is filled in are left alone.
        return re.sub(rf"\{{({pattern})\}}", lambda match: str(values[match[1]]), self.user)


def read_prompt(name: str, folder: str | None, required: tuple[str, ...]) -> PromptFile:
    """The prompt in `<folder>/<name>.txt`; None and a missing file mean our own.

    Args:
        required: places that the text must have, without which every request would be the same.

    Raises:
        ConfigError: the folder is missing, or the file lacks a place.
    """
    path = _path(f"{name}.txt", folder)
    # A line break before it, so that '---' may also be the first line.
    system, divider, user = ("\n" + _text_of(path)).partition(_DIVIDER)
    if not divider:
        system, user = "", system
    missing = [place for place in required if f"{{{place}}}" not in user]
    if missing:
        raise ConfigError(
            f"reading the prompt {str(path)!r}: it has no {', '.join(f'{{{place}}}' for place in missing)} below its '---' "
            "line; expected these places to be filled in. Add them."
        )
    return PromptFile(name, system.strip() or None, user.strip())


def read_styles(name: str, folder: str | None) -> list[str]:
    """The lines of `<folder>/<name>.txt` that are not blank."""
    path = _path(f"{name}.txt", folder)
    styles = [line.strip() for line in _text_of(path).splitlines() if line.strip()]
    if not styles:
        raise ConfigError(
            f"reading the styles in {str(path)!r}: the file is empty; expected one style per line. Add one."
        )
    return styles


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"reading the prompt file {str(path)!r}: it is not UTF-8 ({error}). Save it as UTF-8."
        ) from error


def _path(name: str, folder: str | None) -> Path:
    if folder is None:
        return OWN_FOLDER / name
    if not Path(folder).is_dir():
        raise ConfigError(
            f"reading prompts: there is no folder {folder!r}; expected copies of {str(OWN_FOLDER.name)!r} there. Correct "
            "prompts_folder, or leave it out for the prompts that come with the package."
        )
    own = Path(folder) / name
    return own if own.is_file() else OWN_FOLDER / name
