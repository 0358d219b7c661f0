"""How a provider's failure becomes ours: what was found, is a new try of use, what to do; and never the key."""

from __future__ import annotations

import math
import re
import time
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING

from softprompt_registry.errors import LanguageModelError
from softprompt_registry.language_models.openai_settings import OpenAICompatibleConfig
from softprompt_registry.language_models.replies import BadReply, provider_message

if TYPE_CHECKING:
    import openai


_MIN_SECRET = 12
"""Characters of a key that no answer holds by chance; keys of local servers are shorter, "EMPTY" for instance."""
_MAX_PROVIDER_MESSAGE = 200  # characters


class FailureReader:
    """Explains the failures of one client."""

    def __init__(self, config: OpenAICompatibleConfig, server: str, key: str, proxy: str | None = None) -> None:
        """
        Args:
            server: host and port, as errors name it.
            key: is masked wherever a provider repeats it.
            proxy: environment variable that names the proxy on the way to the server.
        """
        self._proxy = proxy
        self._config = config
        self._server = server
        self._key = key
        self._secret = _secret_pattern(key)

    def explain(
        self, failure: openai.OpenAIError | BadReply | UnicodeEncodeError, attempt: int, timeout_s: float
    ) -> LanguageModelError:
        """The one place where a provider's failure becomes ours."""
        import openai

        found, retryable, hint = self._read(failure, timeout_s)
        status = getattr(failure, "status_code", None)
        if self._proxy and (isinstance(failure, openai.APIConnectionError) or status in (407, 502, 503, 504)):
            hint += f" The request goes through the proxy in {self._proxy}; NO_PROXY can exempt the server from it."
        tries = "1 try" if attempt == 1 else f"{attempt} tries"
        error = LanguageModelError(
            f"asking model {self._config.model!r} at {self._server!r} ({tries}): found {found.rstrip()}.",
            retryable=retryable,
            about_request=isinstance(failure, UnicodeEncodeError) or status in (400, 413, 422),
            hint=hint,
        )
        error.__cause__ = self._without_secrets(failure)
        return error

    def _read(self, failure: Exception, timeout_s: float) -> tuple[str, bool, str]:
        """What was found, whether a new try is of use, and what to do."""
        import openai

        if isinstance(failure, openai.APIStatusError):
            found = f"HTTP {failure.status_code} {self._quote(provider_message(failure.body))}"
            return found, *self._about_status(failure)
        if isinstance(failure, openai.APITimeoutError):
            found = f"no reply within {timeout_s:.3g} s"
            return found, True, "Raise timeout_s, or lower max_tokens or max_concurrency."
        if isinstance(failure, openai.APIConnectionError):
            found = f"the connection failed {self._quote(str(failure.__cause__ or failure))}"
            return (
                found,
                True,
                "Check that the server runs, that base_url is right and that the network lets you through.",
            )
        if isinstance(failure, BadReply):
            hint = "Check that base_url leads to an OpenAI-compatible API, and read the server's log if it is yours."
            return f"an unusable reply {self._quote(str(failure))}", not failure.was_answered, hint
        if isinstance(failure, UnicodeEncodeError):
            found = f"a request that is not valid Unicode {self._quote(failure.reason)}"
            return found, False, "Remove the lone surrogates from prompt, system and stop."
        hint = "The client refused the request: check the settings and the installed version of openai."
        return f"{type(failure).__name__} {self._quote(str(failure))}", False, hint

    def _about_status(self, failure: openai.APIStatusError) -> tuple[bool, str]:
        """Whether a new try is of use, and what to do."""
        config, status = self._config, failure.status_code
        if status == 429 and failure.code == "insufficient_quota":
            return False, "The account's quota is used up, which waiting does not help: check its plan and billing."
        if status == 429:
            return True, "Lower max_concurrency, or raise max_attempts, max_backoff_s and deadline_s."
        if status >= 500 or status == 408:
            return True, "The server is in trouble: read its log if it is yours, else try again later."
        start = "names the resource" if config.api_version else "ends where the API starts (usually in /v1)"
        request = (
            "Check the prompt's length, max_tokens and stop against the model's limits; for a model that refuses the system "
            "role, max_tokens, a temperature or stop strings, set send_system=False, "
            "max_tokens_parameter='max_completion_tokens', send_temperature=False or send_stop=False."
        )
        hints = {
            400: request,
            401: f"Check the key in the environment variable {config.api_key_env}.",
            403: f"The key in the environment variable {config.api_key_env} may not use this model: ask for access or choose "
            "another model.",
            404: f"Check the model name {config.model!r}, that base_url {start}, and that the model serves the "
            f"{config.endpoint!r} endpoint.",
            422: request,
        }
        return False, hints.get(status, "The same request will fail again: check base_url and the request.")

    def deadline_error(self, last: LanguageModelError | None) -> LanguageModelError:
        """The error of a request that reached its deadline; `last` is the failure of its last try."""
        before = "" if last is None else f" Last failure: {last}"
        error = LanguageModelError(
            f"deadline of {self._config.deadline_s:g} s reached before model {self._config.model!r} at {self._server!r} "
            f"answered.{before}",
            retryable=True,
            hint="Raise deadline_s or max_concurrency, or send smaller batches.",
        )
        error.__cause__ = last
        return error

    def masked(self, text: str) -> str:
        """An answer without the key, which a server may repeat. A made-up key that may be a word stays."""
        return self._secret.sub("***", text) if len(self._key) >= _MIN_SECRET else text

    def _quote(self, text: str) -> str:
        """A provider's words in brackets: one short line, with the key masked before the cut could split it."""
        printable = "".join(character if character.isprintable() else " " for character in text)
        line = " ".join(self._secret.sub("***", printable).split())
        if len(line) > _MAX_PROVIDER_MESSAGE:
            line = line[: _MAX_PROVIDER_MESSAGE - 1] + "…"
        return f"({line})" if line else ""

    def _without_secrets(self, failure: Exception) -> Exception | None:
        """The failure, fit to be kept as a cause: without request headers and the frames that saw the key.

        None when its own text repeats the key.
        """
        response = getattr(failure, "response", None)
        body = "" if response is None else response.text
        if self._secret.search(f"{failure} {failure!r} {getattr(failure, 'body', '')} {body}"):
            return None
        if response is not None:
            for reply in (response, *response.history):
                reply.request.headers.clear()
        if (request := getattr(failure, "request", None)) is not None:
            request.headers.clear()
        failure.__cause__ = failure.__context__ = None
        return failure.with_traceback(None)


def retry_after_s(failure: Exception) -> float:
    """What the server asks to wait, as milliseconds, as seconds or as a date; 0 when it asks nothing that can be read."""
    response = getattr(failure, "response", None)
    headers = {} if response is None else response.headers
    for name, unit_s in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) * unit_s
        except ValueError:
            continue
        if math.isfinite(seconds):
            return max(seconds, 0.0)
    try:
        date = parsedate_to_datetime(headers.get("retry-after", ""))
        # The zone "-0000" gives a date without one; it means UTC.
        return max((date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - time.time(), 0.0)
    except (ValueError, OverflowError):
        return 0.0


def _secret_pattern(key: str) -> re.Pattern[str]:
    """Finds the key in a text. A made-up key of a few letters counts only as a whole word, lest it hide all text."""
    pattern = re.escape(key)
    return re.compile(pattern if len(key) >= 8 else rf"(?<!\w){pattern}(?!\w)")
