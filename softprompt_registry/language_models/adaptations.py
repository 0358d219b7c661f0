"""What a server refuses to be sent, and how it is asked instead.

Models refuse parts of a request that others take: the system role, a temperature, stop strings, the name of the token limit.
The server says so, and each of these has a setting that leaves the part out or sends it in another way. So the first refusal
changes that setting for this client, and the request is sent again; every answer says which settings it was asked with.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import openai

    from softprompt_registry.language_models.openai_settings import OpenAICompatibleConfig
from softprompt_registry.language_models.protocol import CompletionRequest

_log = logging.getLogger(__name__)

_ALONE_S = 1.0
"""How long other requests wait for the first one, which a server refuses before it generates anything."""
_LIMITS = ("max_tokens", "max_completion_tokens")
_NO = (
    r"(?:not\W+(?:support|allow|permit|enabl)|n.t\W+support|unsupported|unrecogni[sz]ed|unknown|unexpected|extra_forbidden"
    r"|deprecated|only\W+(?:the\W+default|1\b|be\W+set))"
)


def _refused(name: str, *others: str) -> re.Pattern[str]:
    """Finds that a name is refused, within one sentence; or one of the other wordings."""
    near = r"[^.;]{0,60}?"
    return re.compile("|".join((f"(?:{name}){near}{_NO}", f"{_NO}{near}(?:{name})", *others)), re.IGNORECASE)


class _Rule(NamedTuple):
    """A part of a request that servers refuse, and the setting that helps."""

    setting: str
    value: object
    refused: re.Pattern[str]
    is_sent: Callable[[OpenAICompatibleConfig, CompletionRequest], bool]


_RULES = (
    _Rule(
        "send_system",
        False,
        _refused(
            r"system\W+(?:role|message|prompt|instruction)|role\W{1,5}system\b|messages\W+0\W+role|developer instruction",
            # What chat templates say that know no such role.
            r"roles?\W+(?:are|is)\W+supported\W+got\W+system",
            r"roles must alternate",
        ),
        lambda config, request: config.endpoint == "chat" and config.send_system and request.system is not None,
    ),
    *(
        _Rule(
            "max_tokens_parameter",
            other,
            _refused(rf"\b{name}\b"),
            lambda config, request, name=name: config.endpoint == "chat" and config.max_tokens_parameter == name,  # type: ignore[misc]
        )
        for name, other in (_LIMITS, _LIMITS[::-1])
    ),
    _Rule("send_temperature", False, _refused(r"\btemperature\b"), lambda config, request: config.send_temperature),
    _Rule("send_stop", False, _refused(r"\bstop\b"), lambda config, request: config.send_stop and bool(request.stop)),
)
_SETTINGS = tuple(dict.fromkeys(rule.setting for rule in _RULES))


def remedy(
    failure: openai.APIStatusError, request: CompletionRequest, config: OpenAICompatibleConfig
) -> tuple[str, object] | None:
    """The setting that helps against a refusal, and its value; of several the one about what the server names first."""
    said = failure.body if isinstance(failure.body, str) else json.dumps(failure.body, default=str)
    found = [
        (place.start(), rule.setting, rule.value)
        for rule in _RULES
        if rule.is_sent(config, request) and (place := rule.refused.search(said))
    ]
    return min(found, key=lambda one: one[0])[1:] if found else None


class Adaptations:
    """The settings of a client, less what its server has refused. One for all its threads."""

    def __init__(self, config: OpenAICompatibleConfig) -> None:
        self._given = config
        self._now = config
        self._learning = threading.Lock()
        self._alone = threading.Lock()
        self._is_settled = False

    @contextmanager
    def settings(self, longest_s: float) -> Iterator[OpenAICompatibleConfig]:
        """What the next try is sent with. Until a server has taken a request, one is sent at a time, so that it refuses one
        and not all that may be in flight; but none waits long for a slow server."""
        alone = not self._is_settled and self._alone.acquire(timeout=max(min(_ALONE_S, longest_s), 0))
        if alone and self._is_settled:
            self._alone.release()
            alone = False
        config = self._now
        try:
            yield config
        finally:
            if self._now is config:
                self._is_settled = True
            if alone:
                self._alone.release()

    def learn(self, setting: str, value: object, why: str) -> bool:
        """Change a setting for all tries from now on. False if it has been changed already, to another value: that the server
        refuses as well."""
        with self._learning:
            if getattr(self._now, setting) == value:
                return True  # another thread learned the same
            if getattr(self._now, setting) != getattr(self._given, setting):
                return False
            changed: dict[str, Any] = {setting: value}
            self._now = replace(self._now, **changed)
            self._is_settled = False
        _log.warning("asking model %r with %s=%r from now on: %s", self._given.model, setting, value, why)
        return True

    def of(self, config: OpenAICompatibleConfig) -> str | None:
        """The settings that an answer was asked with and that are not the given ones; None if there are none."""
        pairs = [(name, getattr(config, name)) for name in _SETTINGS]
        changed = [f"{name}={value!r}" for name, value in pairs if value != getattr(self._given, name)]
        return ", ".join(changed) or None
