"""How hard prompt, examples and input become the text that a target LLM gets (paper section 4.5)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from softprompt_registry.config import settings
from softprompt_registry.dod.task import Pair

_HARD_PROMPT = re.compile(r"\{hard_prompt\}\s*")
_PLACE = re.compile(r"\{(\w+)\}")


@settings
class PromptTemplates:
    """Templates of a request; what is put in their places is taken as it is, braces included."""

    system: str | None = "You are a helpful assistant. Follow the task exactly."
    """Sent beside the prompt. None: nothing. The paper's text."""
    prompt: str = "{hard_prompt} Input: {input}\nOutput:"
    """The user's text. Without a hard prompt its place goes, and the white space after it. The paper's text."""
    example: str = "Input: {input}\nOutput: {output}\n\n"
    """One few-shot example. All of them stand one after the other behind the hard prompt and its white space."""

    def __post_init__(self) -> None:
        _check("prompt", self.prompt, ["hard_prompt", "input"])
        _check("example", self.example, ["input", "output"])

    def fill(self, text: str, *, hard_prompt: str | None = None, examples: Sequence[Pair] = ()) -> str:
        """The user's text for one input. An empty hard prompt is none."""
        place = _HARD_PROMPT.search(self.prompt)
        assert place is not None, "checked when the templates were made"
        opening = fill(place[0], {"hard_prompt": hard_prompt}) if hard_prompt else ""
        shown = "".join(fill(self.example, {"input": pair.input, "output": pair.output}) for pair in examples)
        return self.prompt[: place.start()] + opening + shown + fill(self.prompt[place.end() :], {"input": text})


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template with `{name}` replaced, for the given names only and in one pass, so that braces in a value stay."""
    return _PLACE.sub(lambda place: values.get(place[1], place[0]), template)


def _check(name: str, template: str, expected: list[str]) -> None:
    found = _PLACE.findall(template)
    if found != expected:
        raise ValueError(
            f"{name} is {template!r} with the places {found}, expected each of {expected} once and in this order"
        )
